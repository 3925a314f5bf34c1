"""Lossless decoding measured: the same text in fewer forward passes, what it costs to train, and how long drafts are accepted.

    ./run.sh tiny-lossless                                                             # trains output/tiny-lossless/sft_model
    python benchmarks/lossless.py decode output/tiny-lossless/sft_model --prompts 1000
    python benchmarks/lossless.py train                                                # a step against TRL's own SFT step
    python benchmarks/lossless.py acceptance --blocks 4 8 16 --steps 240               # picture: acceptance against tokens trained
    python benchmarks/lossless.py shapes --device cuda                                 # real shapes, acceptance fixed

`decode`: both ways, with drafts made in advance (one pass a cycle) and without (two), against the base's own `generate(use_cache=True)` with
no adapter in the model, prompt by prompt (batch 1), in turns in one run. The ceiling is what drafts that are always right would reach:
answers are short, and the prompt's pass counts too.
`shapes` needs no trained drafter: every verification is told to yield as many tokens as asked.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM
from trl import SFTConfig, SFTTrainer

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, load_diffusion_model
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import encode_prompts, evaluate_answers
from llm_diffusion.generation.generate import generate
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.record import record_of
from llm_diffusion.speculative import decoding as lossless_decoding
from llm_diffusion.speculative.trees import DraftTree

NEW = 80
WAYS: dict[str, dict[str, Any]] = {
    "two passes a cycle": {"draft_outcomes": 0},
    "one pass a cycle": {"draft_outcomes": 1024},  # for wherever the draft may end
    "as many as cost little": {},
}


def lora(rank: int = 32) -> LoraConfig:
    return LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def base() -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(TINY_MODEL_PATH)


def decode(folder: str, prompts: int, timed: int) -> list[Table]:
    model, tokenizer = load_diffusion_model(folder)
    plain, _ = base()
    plain.eval()
    examples = list(tiny_dataset(prompts, seed=1, split="test"))
    b = record_of(model).block_length
    want = evaluate_answers(plain, tokenizer, examples, autoregressive=True, max_new_tokens=NEW)
    lengths = [len(tokenizer(answer)["input_ids"]) + 1 for answer in want.answers]
    # The prompt says the first token; every cycle yields up to a block, and the token behind it is known then.
    one, two = (statistics.mean(n / (1 + passes * -(-(n - 1) // b)) for n in lengths) for passes in (1, 2))
    ceiling = {"one pass a cycle": f"{one:.2f}", "two passes a cycle": f"{two:.2f}"}
    table = Table(title=f"{prompts} held-out prompts, greedy, drafts of {b}")
    for column in (
        "",
        "same as the base",
        "exact match",
        "tokens/forward",
        "its ceiling",
        "seconds, batch 1",
        "times the base",
    ):
        table.add_column(column, justify="right" if column else "left")
    reports = {way: evaluate_answers(model, tokenizer, examples, max_new_tokens=NEW, **s) for way, s in WAYS.items()}
    took = seconds_one_by_one(plain, model, tokenizer, examples[:timed])
    table.add_row("AR base", "", f"{want.mean:.1f}", "1.00", "1.00", f"{took['base']:.2f}", "1.00")
    for way, report in reports.items():
        same = sum(a == c for a, c in zip(want.answers, report.answers, strict=True))
        figures = f"{report.tokens_per_forward:.2f}", ceiling.get(way, ""), f"{took[way]:.2f}"
        table.add_row(way, f"{same} of {prompts}", f"{report.mean:.1f}", *figures, f"{took['base'] / took[way]:.2f}")
    histogram = Table(title="Tokens that a verification yielded, % of verifications")
    histogram.add_column("")
    for tokens in range(1, b + 1):
        histogram.add_column(str(tokens), justify="right")
    for way, report in reports.items():
        total = sum(report.accepted.values())
        shares = (f"{100 * report.accepted.get(tokens, 0) / total:.0f}" for tokens in range(1, b + 1))
        histogram.add_row(way, *shares)
    return [table, histogram]


def seconds_one_by_one(plain: Any, model: Any, tokenizer: Any, examples: list[dict]) -> dict[str, float]:
    """Seconds for all examples, each way in turn on each prompt."""
    ways = {"base": partial(plain.generate, max_new_tokens=NEW, do_sample=False, use_cache=True)}
    for way, settings in WAYS.items():
        ways[way] = partial(generate, model, max_new_tokens=NEW, **settings)
    took = dict.fromkeys(ways, 0.0)
    for number, example in enumerate([*examples[:2], *examples]):  # two to warm up
        batch = encode_prompts(tokenizer, [example["messages"][:-1]])
        for way, run in ways.items():
            started = time.perf_counter()
            with torch.no_grad():
                run(**batch)
            took[way] += (time.perf_counter() - started) * (number >= 2)
    return took


def train(rounds: int) -> list[Table]:
    """A training step on the same rows, in turns: TRL's SFT, drafting, with only the answers noised and with all."""
    table = Table(title="Training step, forward and backward, 32 rows of the tiny base")
    for column in ("", "ms", "times SFT"):
        table.add_column(column, justify="right" if column else "left")
    rows = tiny_dataset(32)
    steps: dict[str, Callable[[], None]] = {}
    with tempfile.TemporaryDirectory() as folder:
        common = {"report_to": "none", "use_cpu": not torch.cuda.is_available(), "gradient_checkpointing": False}
        common |= {"per_device_train_batch_size": 32, "max_length": 256, "bf16": False}
        model, tokenizer = base()
        sft = SFTTrainer(
            model,
            SFTConfig(folder, **common),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora(),
        )
        steps["TRL's SFT"] = step_of(sft)
        for name, settings in (
            ("lossless, answers noised", {}),
            ("lossless, all tokens noised", {"completion_only_loss": False}),
            ("lossless, answers noised, distilled", {"distillation_weight": 1.0}),
        ):
            model, tokenizer = base()
            trainer = DiffusionSFTTrainer(
                model,
                DiffusionSFTConfig(folder, attention="lossless", **common, **settings),
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=lora(),
            )
            steps[name] = step_of(trainer)
        took: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds + 2):
            for name, step in steps.items():
                started = time.perf_counter()
                step()
                if number >= 2:
                    took[name].append(time.perf_counter() - started)
    for name, seconds in took.items():
        ratio = statistics.median(a / c for a, c in zip(seconds, took["TRL's SFT"], strict=True))
        table.add_row(name, f"{1000 * statistics.median(seconds):.0f}", f"{ratio:.2f}")
    return [table]


def step_of(trainer: Any) -> Callable[[], None]:
    batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
    trainer.model.train()

    def step() -> None:
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, dict(batches[0]), num_items_in_batch=items).backward()

    return step


TARGETS: dict[str, dict[str, Any]] = {
    "data": {},
    "KL to the base": {"distillation_weight": 1.0},
    "total variation": {"distillation_weight": 1.0, "distillation_divergence": "tv"},
}


def acceptance(blocks: list[int], steps: int, every: int, path: Path) -> list[Table]:
    """Held-out accepted length while drafters train, by block length and by target."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, table = figure.subplots(), Table(title=f"Held-out accepted length after {steps} steps")
    for column in ("block", "target", "tokens a verification"):
        table.add_column(column)
    for block, target in itertools.product(blocks, TARGETS):
        if target != "data" and block != 8:
            continue
        model, tokenizer = base()
        with tempfile.TemporaryDirectory() as folder:
            settings = {
                "attention": "lossless",
                "block_length": block,
                "max_steps": steps,
                "per_device_train_batch_size": 32,
                "learning_rate": 2e-3,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 20,
                "max_length": 256,
                "eval_strategy": "steps",
                "eval_steps": every,
                "report_to": "none",
                "save_strategy": "no",
                "use_cpu": not torch.cuda.is_available(),
                "gradient_checkpointing": False,
                "disable_tqdm": True,
                **TARGETS[target],
            }
            trainer = DiffusionSFTTrainer(
                model,
                DiffusionSFTConfig(folder, **settings),
                train_dataset=tiny_dataset(32 * steps, seed=100),
                eval_dataset=tiny_dataset(120, seed=1, split="test"),
                processing_class=tokenizer,
                peft_config=lora(),
            )
            trainer.train()
        tokens = trainer.model.get_base_model().config.diffusion["training_tokens"] / steps
        curve = [
            (row["step"] * tokens, row["eval_accepted_length"])
            for row in trainer.state.log_history
            if "eval_accepted_length" in row
        ]
        axes.plot(*zip(*curve, strict=True), ".-", label=f"block {block}, {target}")
        table.add_row(str(block), target, f"{curve[-1][1]:.2f}")
    axes.set(xlabel="tokens trained", ylabel="tokens a verification yields, held out")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
    return [table]


SHAPES = {
    "0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
    "4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
}


@contextmanager
def always(tokens: int) -> Iterator[None]:
    """Every verification yields `tokens`."""
    real = lossless_decoding.accept_greedy, lossless_decoding.accept_tree

    def fixed(draft: torch.Tensor, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        accepted = torch.full_like(draft[:, 0], min(tokens - 1, draft.shape[1]))
        return accepted, logits.argmax(-1).gather(-1, accepted[:, None]).squeeze(-1)

    def fixed_tree(tree: DraftTree, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        accepted, token = fixed(tree.tokens, logits)
        return accepted, torch.arange(logits.shape[1], device=logits.device).expand(len(logits), -1), token

    lossless_decoding.accept_greedy, lossless_decoding.accept_tree = fixed, fixed_tree
    try:
        yield
    finally:
        lossless_decoding.accept_greedy, lossless_decoding.accept_tree = real


def shapes(device: str, new: int) -> list[Table]:
    table = Table(title=f"Random weights, bf16, prompt of 128, {new} new tokens, {torch.cuda.get_device_name()}")
    for column in ("shape", "batch", "way", "tokens/s", "times AR"):
        table.add_column(column, justify="right")
    for (name, shape), batch in itertools.product(SHAPES.items(), (1, 4, 16)):
        config = Qwen3Config(vocab_size=151936, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True, **shape)
        model = Qwen3ForCausalLM(config).to(device, torch.bfloat16).eval()
        ids = torch.randint(0, 1000, (batch, 128), device=device)
        common = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new}
        ar = rate(partial(model.generate, ids, cache_implementation="static", **common), batch * new)
        table.add_row(name, str(batch), "AR, static cache, compiled", f"{ar:.0f}", "1.00")
        model.config.diffusion = {"attention": "lossless", "block_length": 8, "mask_token_id": 151669}
        drafter = get_peft_model(model, lora(64)).eval()
        settings = {"eos_token_id": None, "max_new_tokens": new}
        for tokens, (way, options) in itertools.product((3, 5, 7), WAYS.items()):
            with always(tokens):
                ours = rate(partial(generate, drafter, ids, **settings, **options), batch * new)
            table.add_row(name, str(batch), f"{way}, {tokens} accepted", f"{ours:.0f}", f"{ours / ar:.2f}")
        torch.cuda.empty_cache()
    return [table]


def rate(run: Callable[[], Any], tokens: int) -> float:
    """Tokens a second, the best of three after a warm-up."""
    best = float("inf")
    for number in range(4):
        torch.cuda.synchronize()
        started = time.perf_counter()
        run()
        torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - started)
    return tokens / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measure", choices=["decode", "train", "acceptance", "shapes"])
    parser.add_argument("drafter", nargs="?", default="output/tiny-lossless/sft_model")
    parser.add_argument("--prompts", type=int, default=1000)
    parser.add_argument("--timed", type=int, default=60, help="prompts that are timed one by one")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--blocks", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--every", type=int, default=40)
    parser.add_argument("--new", type=int, default=256)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.measure == "decode":
        tables = decode(args.drafter, args.prompts, args.timed)
    elif args.measure == "train":
        tables = train(args.rounds)
    elif args.measure == "acceptance":
        picture = (args.output or Path("output/lossless-acceptance.md")).with_suffix(".png")
        picture.parent.mkdir(parents=True, exist_ok=True)
        tables = acceptance(args.blocks, args.steps, args.every, picture)
    else:
        if args.device != "cuda":
            parser.error("`shapes` measures a GPU; there is none here.")
        tables = shapes(args.device, args.new)
    console = Console(width=120, record=True, highlight=False)
    for table in tables:
        console.print(table)
    if args.output:
        words = "python " + " ".join(["benchmarks/lossless.py", args.measure])
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(f"`{words}` ({args.device})\n\n```\n{console.export_text()}```\n")


if __name__ == "__main__":
    main()
