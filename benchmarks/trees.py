"""What verifying a tree of drafts yields, by its size, beside a block: SmolLM2's drafter on the base's own answers.

    python benchmarks/trees.py --questions gsm8k/test.jsonl --limit 20 --skip 100

Drafts are made behind every token of an answer, as in decoding with two passes a cycle; then the answer is walked through with each
size, from where one verification would end to the next.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from smollm2 import read_questions
from tqdm import tqdm
from transformers import DynamicCache

from llm_diffusion import generate
from llm_diffusion.evaluation.answers import encode_prompts
from llm_diffusion.generation.inference import DiffusionInference
from llm_diffusion.models.packing import packed
from llm_diffusion.models.patching import base_of
from llm_diffusion.models.record import record_of
from llm_diffusion.objective.attention_masks import additive
from llm_diffusion.speculative.adapters import AdapterSwitch
from llm_diffusion.speculative.trees import likeliest_tree

SIZES = (5, 7, 11, 15, 23, 31, 47, 63)
AT_ONCE = 16  # drafts in one pass


@torch.no_grad()
def drafts_of(model: torch.nn.Module, text: torch.Tensor, first: int) -> torch.Tensor:
    """(L - first, b - 1, V) logits of the block that is drafted behind each token of a text (L,) from `first` on."""
    base, record, n = base_of(model), record_of(model), len(text)
    b, cache, found = record.block_length, DynamicCache(), []
    with packed(model), AdapterSwitch(model, in_int8=True) as switch:
        base(input_ids=text[None], past_key_values=cache, use_cache=True, logits_to_keep=1)
        switch.first = 0
        for known in torch.arange(first, n).split(AT_ONCE):
            place = (known[:, None] + torch.arange(b)).flatten()
            block = torch.arange(len(known)).repeat_interleave(b)
            ids = torch.full((len(known), b), record.mask_token_id)
            ids[:, 0] = text[known]
            mask = torch.cat([torch.arange(n) < known[block][:, None], block[:, None] == block], -1)
            logits = base(
                input_ids=ids.flatten()[None],
                attention_mask=additive(mask[None], base.dtype),
                position_ids=place[None],
                past_key_values=cache,
                use_cache=True,
            ).logits[0]
            cache.crop(-len(block))
            logits = logits.float().index_fill(-1, torch.tensor([record.mask_token_id]), -1e9)
            found.append(logits.view(len(known), b, -1)[:, :-1])
    return torch.cat(found)


def right_of(logits: torch.Tensor, answer: list[int], size: int | None) -> list[int]:
    """How many drafted tokens the base would accept behind each token of its answer, of a tree of `size` tokens or of a block."""
    best, found = logits.argmax(-1).tolist(), []
    tree = None if size is None else likeliest_tree(logits, size)
    for at in range(len(answer)):
        rest, right, node = answer[at + 1 :], 0, 0
        if tree is None:
            while right < min(len(rest), len(best[at])) and best[at][right] == rest[right]:
                right += 1
        else:
            tokens, parents = tree.tokens[at].tolist(), tree.parents[at].tolist()
            for token in rest:
                following = [row + 1 for row in range(len(tokens)) if parents[row] == node and tokens[row] == token]
                if not following:
                    break
                right, node = right + 1, following[0]
        found.append(right)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the drafter; a folder, or the embedded one")
    parser.add_argument(
        "--questions", type=Path, required=True, help='JSONL file ("question", or the first of "turns")'
    )
    parser.add_argument("--limit", type=int, default=20)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    inference = DiffusionInference.from_pretrained(args.model)
    model, tokenizer = inference.model, inference.tokenizer
    tokens, cycles = dict.fromkeys((None, *SIZES), 0), dict.fromkeys((None, *SIZES), 0)
    for question in tqdm(read_questions(args.questions, args.limit + args.skip)[args.skip :]):
        batch = encode_prompts(tokenizer, [[{"role": "user", "content": question}]])
        text = generate(model, **batch, max_new_tokens=args.max_new_tokens)[0]
        first = batch["input_ids"].shape[1]
        logits, answer = drafts_of(model, text, first), text[first:].tolist()
        for size in tokens:
            right, at = right_of(logits, answer, size), 0
            while at < len(answer):
                tokens[size], cycles[size] = tokens[size] + min(right[at] + 1, len(answer) - at), cycles[size] + 1
                at += right[at] + 1
    print("| tokens verified | block | " + " | ".join(map(str, SIZES)) + " |\n|---|" + "--:|" * len(tokens))
    print("| yield | " + " | ".join(f"{tokens[size] / cycles[size]:.2f}" for size in tokens) + " |")


if __name__ == "__main__":
    main()
