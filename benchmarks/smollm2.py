"""SmolLM2's own answers, four ways, beside each other in one run: are they the same, and how fast? And what a pass costs.

    python benchmarks/smollm2.py                               the questions below
    python benchmarks/smollm2.py --questions FILE --limit 20   those of a JSONL file ("question", or the first of "turns")

Batch 1. Rounds alternate between the ways, so that both sides of a ratio meet the same machine. On some processors the base's own `generate`
is faster in fp32 than in bf16: beside bf16 it is timed in both. A text that differs is shown with the gap
between the base's two best logits where it first does: a tie where this is no more than the rounding of the type.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from transformers import DynamicCache

from llm_diffusion.evaluation.report import speed_table
from llm_diffusion.evaluation.speed import Timed, compare_decoding, first_gap
from llm_diffusion.generation.generate import generate_autoregressive
from llm_diffusion.generation.inference import DiffusionInference
from llm_diffusion.models.loading import load_autoregressive
from llm_diffusion.models.packing import packed
from llm_diffusion.models.patching import base_of
from llm_diffusion.models.special_tokens import prompt_ids
from llm_diffusion.speculative.adapters import AdapterSwitch

QUESTIONS = (
    "A shop sells 12 pens a day at 3 dollars each. How many dollars does it earn in a week?",
    "Anna has 15 apples, gives 4 to Ben and buys twice as many as she has left. How many does she have now?",
    "What are three good ways to learn a language?",
    "Write a short email to a colleague, asking for the report by Friday.",
)


def read_questions(path: str | None, limit: int) -> list[str]:
    if path is None:
        return list(QUESTIONS[:limit])
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return [row["question"] if "question" in row else row["turns"][0] for row in rows][:limit]


class InFloat32:
    """The base in fp32, whose `generate` answers in turn with the ways that are compared."""

    def __init__(self, chats: list[list[dict]], device: torch.device, max_new_tokens: int) -> None:
        self.model, self.tokenizer = load_autoregressive("smollm2", device=str(device), dtype=torch.float32)
        self.chats, self.max_new_tokens, self.timed = chats, max_new_tokens, Timed()

    def __iter__(self) -> Iterator[list[dict]]:
        for number, chat in enumerate(self.chats):
            ids = torch.tensor([prompt_ids(self.tokenizer, chat)], device=self.model.device)
            if number == 0:
                generate_autoregressive(self.model, ids, max_new_tokens=8, do_sample=False)
            began = time.perf_counter()
            found = generate_autoregressive(self.model, ids, max_new_tokens=self.max_new_tokens, do_sample=False)
            self.timed.ids.append(found.cpu())  # waits for a GPU
            self.timed.seconds += time.perf_counter() - began
            self.timed.tokens += found.shape[1] - ids.shape[1]
            yield chat


def print_pass_costs(model: torch.nn.Module) -> None:
    """Milliseconds of a pass behind 150 tokens, the median of seven: the base, on plain and on packed weights, and the drafter in turn."""
    base, rows, times = base_of(model), (1, 8, 16, 32), defaultdict(list)
    cases = {
        "base": (None, nullcontext),
        "base, packed weights": (None, partial(packed, model)),
        "drafter, int8": (0, nullcontext),
    }
    cache = DynamicCache()
    with torch.no_grad(), AdapterSwitch(model, in_int8=True) as switch:
        base(input_ids=torch.ones((1, 150), dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(8):
            for name, (switch.first, context) in cases.items():
                with context():
                    for n in rows:
                        began = time.perf_counter()
                        ids = torch.ones((1, n), dtype=torch.long)
                        base(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=n)
                        times[name, n].append(1000 * (time.perf_counter() - began))
                        cache.crop(-n)
    print(f"\n| milliseconds of a pass over | {' | '.join(f'{n} rows' for n in rows)} |\n|---|{'--:|' * len(rows)}")
    for name in cases:
        cells = (f"{median(times[name, n][1:]):.0f}" for n in rows)  # the first round warms up
        print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the drafter; a folder, or the embedded one")
    parser.add_argument("--questions", help="JSONL file")
    parser.add_argument("--limit", type=int, default=4)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    args = parser.parse_args()
    dtype = args.dtype if args.dtype == "auto" else getattr(torch, args.dtype)
    inference = DiffusionInference.from_pretrained(args.model, dtype=dtype)
    model, tokenizer, longest = inference.model, inference.tokenizer, args.max_new_tokens
    questions = read_questions(args.questions, args.limit + args.skip)[args.skip :]
    chats = [[{"role": "user", "content": question}] for question in questions]
    lossless = {"lossless, two passes a cycle": {"draft_outcomes": 0}, "lossless, default": {}}
    base = base_of(model)
    in_fp32 = InFloat32(chats, base.device, longest) if base.dtype == torch.bfloat16 else None
    timed = compare_decoding(model, tokenizer, in_fp32 or chats, longest, lossless)
    if in_fp32:
        first = next(iter(timed))
        timed = {first: timed.pop(first), "AR, transformers' generate in fp32": in_fp32.timed, **timed}
    print(f"{len(questions)} questions, at most {longest} tokens, {base.dtype}, {torch.get_num_threads()} threads")
    Console(width=120).print(speed_table(timed))
    first, *others = timed.values()
    for name, way in zip(list(timed)[1:], others, strict=True):
        found = (first_gap(model, *pair) for pair in zip(first.ids, way.ids, strict=True))
        if gaps := [round(gap, 3) for gap in found if gap is not None]:
            print(f"\n{name}: gaps of the base's two best logits where texts part: {gaps}")
    print_pass_costs(model)


if __name__ == "__main__":
    main()
