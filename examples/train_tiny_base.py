"""Trains the tiny autoregressive base model that the package ships (`llm_diffusion/data/tiny_base`) from scratch.

    python examples/train_tiny_base.py --output llm_diffusion/data/tiny_base            # about an hour on two CPU cores
    python examples/train_tiny_base.py --output llm_diffusion/data/tiny_base --eval-only  # prints greedy exact match

The model is a Qwen3 with 1.9 million parameters, trained in fp32 and stored in 16 bit. The tokenizer is a byte-level BPE
with single digits, a ChatML template with generation markers, and spare rows in the embedding, as real Qwen3 has.
Loss: next-token cross-entropy; answers weigh 1, prompts 0.1 (their letters and numbers are random, nothing to learn).
"""

import argparse
import copy
import itertools
import json
import time
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llm_diffusion.data.tiny import (
    KINDS,
    LEFT_TO_RIGHT_KINDS,
    is_right,
    tiny_examples,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}<|im_end|>{% endgeneration %}"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PROMPT_WEIGHT = 0.1
TRAINING_MIX = (*KINDS, "arithmetic", "sudoku")  # the two hard kinds come twice


def build_tokenizer(vocab_size: int = 480) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d|\n| ?[A-Za-z]+| ?[^\sA-Za-z\d]|\s"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ["system\nuser\nassistant\n"] * 1000
    for example in itertools.islice(tiny_examples(seed=-1), 20_000):
        texts += [message["content"] for message in example["messages"]]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=1024,
        padding_side="left",
    )


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=160,
        intermediate_size=480,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def encode(tokenizer: PreTrainedTokenizerFast, example: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (L,) and loss weights (L,) of one example."""
    prompt = tokenizer.apply_chat_template(example["messages"][:-1], add_generation_prompt=True, return_dict=False)
    answer = tokenizer(example["messages"][-1]["content"] + "<|im_end|>\n")["input_ids"]
    return torch.tensor(prompt + answer), torch.tensor([PROMPT_WEIGHT] * len(prompt) + [1.0] * len(answer))


def train(output: Path, steps: int, batch_size: int, learning_rate: float, device: str) -> None:
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    model = build_model(tokenizer).to(device)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, steps, pct_start=0.05)
    pad = torch.nn.utils.rnn.pad_sequence
    stream, started, tokens, milestones = tiny_examples(seed=0, kinds=TRAINING_MIX), time.time(), 0, []
    for step in range(1, steps + 1):
        rows = sorted((encode(tokenizer, next(stream)) for _ in range(batch_size)), key=lambda row: len(row[0]))
        total, answer_loss = sum(weights.sum() for _, weights in rows).to(device), 0.0
        # The longest third (worked problems) is padded apart from the rest: half the padding.
        for part in (rows[: 2 * batch_size // 3], rows[2 * batch_size // 3 :]):
            ids, weights = (pad(column, batch_first=True).to(device) for column in zip(*part, strict=True))
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
            loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
            (loss * weights[:, 1:]).sum().div(total).backward()
            answer_loss += loss[weights[:, 1:] == 1].sum().item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        tokens += sum(len(ids) for ids, _ in rows)
        if step % 50 == 0:
            answer_loss /= sum((weights == 1).sum().item() for _, weights in rows)
            took = time.time() - started
            print(f"step {step}/{steps}  answer loss {answer_loss:.4f}  {tokens:,} tokens  {took:.0f} s", flush=True)
        if step % 250 == 0 or step == steps:
            scores = evaluate(model, tokenizer, n=150)
            milestones.append({"step": step, "tokens": tokens, "exact_match": scores})
            print(json.dumps(milestones[-1]), flush=True)
            save(model, tokenizer, output, milestones)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, output: Path, milestones: list[dict]) -> None:
    copy.deepcopy(model).half().save_pretrained(output)
    tokenizer.save_pretrained(output)
    (output / "training.json").write_text(json.dumps(milestones, indent=1) + "\n")


@torch.no_grad()
def evaluate(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, n: int = 500) -> dict[str, float]:
    """Greedy exact match by kind on the first `n` held-out examples."""
    model.eval()
    right = defaultdict(list)
    examples = list(itertools.islice(tiny_examples(seed=1, split="test"), n))
    for start in range(0, n, 100):
        batch = examples[start : start + 100]
        prompts = [example["messages"][:-1] for example in batch]
        inputs = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_tensors="pt", return_dict=True, padding=True
        ).to(model.device)
        output = model.generate(**inputs, max_new_tokens=80, do_sample=False)
        answers = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for example, answer in zip(batch, answers, strict=True):
            right[example["kind"]].append(is_right(example, answer))
    model.train()
    return {kind: round(100 * sum(right[kind]) / len(right[kind]), 1) for kind in KINDS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--eval-only", action="store_true", help="print greedy exact match of the model in --output")
    args = parser.parse_args()
    if not args.eval_only:
        train(args.output, args.steps, args.batch_size, args.learning_rate, args.device)
    tokenizer = AutoTokenizer.from_pretrained(args.output)
    model = AutoModelForCausalLM.from_pretrained(args.output, dtype=torch.float32).to(args.device)
    scores = evaluate(model, tokenizer)
    print("greedy exact match on 500 held-out examples, %")
    for kind, score in scores.items():
        print(f"  {kind:<11} {score:5.1f}")
    print(
        f"  mean of the left-to-right kinds {sum(scores[k] for k in LEFT_TO_RIGHT_KINDS) / len(LEFT_TO_RIGHT_KINDS):.1f}"
    )


if __name__ == "__main__":
    main()
