"""SmolLM2's own answers, four ways, beside each other in one run: are they the same, and how fast? And what a pass costs.

    python benchmarks/smollm2.py                               the questions below
    python benchmarks/smollm2.py --questions FILE --limit 20   those of a JSONL file ("question", or the first of "turns")

Batch 1. Rounds alternate between the ways, so that both sides of a ratio meet the same machine. A text that differs is shown with the gap
between the base's two best logits where it first does: a tie where this is no more than the rounding of the type.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from statistics import mean, median

import torch
from transformers import DynamicCache

from llm_diffusion.generation.generate import generate, generate_autoregressive
from llm_diffusion.generation.inference import DiffusionInference
from llm_diffusion.models.packing import packed
from llm_diffusion.models.patching import adapters_off, base_of
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


def first_gap(model: torch.nn.Module, want: torch.Tensor, found: torch.Tensor) -> float:
    """Distance of the base's two best logits at the first token that differs."""
    n = min(want.shape[1], found.shape[1])
    at = int((want[:, :n] != found[:, :n]).long().argmax()) if not torch.equal(want[:, :n], found[:, :n]) else n
    with torch.no_grad(), adapters_off(model):
        top = base_of(model)(input_ids=want[:, :at], logits_to_keep=1).logits[0, -1].float().topk(2).values
    return float(top[0] - top[1])


def print_pass_costs(model: torch.nn.Module) -> None:
    """Milliseconds of a pass behind 150 tokens, the median of seven: the base and the drafter, on plain and on packed weights in turn."""
    base, rows, times = base_of(model), (1, 8, 16, 32), defaultdict(list)
    cache = DynamicCache()
    with torch.no_grad(), AdapterSwitch(model) as switch:
        base(input_ids=torch.ones((1, 150), dtype=torch.long), past_key_values=cache, use_cache=True, logits_to_keep=1)
        for _ in range(8):
            for weights, context in (("plain", nullcontext()), ("packed", packed(model))):
                with context:
                    for n, adapters in itertools.product(rows, ("base", "drafter")):
                        switch.first = 0 if adapters == "drafter" else None
                        began = time.perf_counter()
                        ids = torch.ones((1, n), dtype=torch.long)
                        base(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=n)
                        times[adapters, weights, n].append(1000 * (time.perf_counter() - began))
                        cache.crop(-n)
    print(f"\n| milliseconds of a pass over | {' | '.join(f'{n} rows' for n in rows)} |\n|---|{'--:|' * len(rows)}")
    for adapters, weights in itertools.product(("base", "drafter"), ("plain", "packed")):
        cells = (f"{median(times[adapters, weights, n][1:]):.0f}" for n in rows)  # the first round warms up
        print(f"| {adapters}, {weights} weights | {' | '.join(cells)} |")


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
    greedy = {"max_new_tokens": longest, "do_sample": False}

    def lossless(**settings: object):
        return lambda batch: generate(model, **batch, max_new_tokens=longest, return_dict_in_generate=True, **settings)

    ways = {
        "AR, transformers' generate": lambda batch: generate_autoregressive(model, **batch, **greedy),
        "prompt lookup, 5 tokens": lambda batch: generate_autoregressive(
            model, **batch, **greedy, prompt_lookup_num_tokens=5
        ),
        "lossless, two passes a cycle": lossless(draft_outcomes=0),
        "lossless, default": lossless(),
    }
    seconds, tokens, same, forwards, accepted, gaps = (defaultdict(list) for _ in range(6))
    questions = read_questions(args.questions, args.limit + args.skip)[args.skip :]
    for number, question in enumerate([questions[0], *questions]):  # the first one warms up
        chat = [{"role": "user", "content": question}]
        batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        start, want = batch["input_ids"].shape[1], None
        for way, run in ways.items():
            began = time.perf_counter()
            output = run(batch)
            took = time.perf_counter() - began
            ids = output if torch.is_tensor(output) else output.sequences
            want = ids if want is None else want
            if number == 0:
                continue
            seconds[way].append(took)
            tokens[way].append(ids.shape[1] - start)
            same[way].append(torch.equal(ids, want))
            if not same[way][-1]:
                gaps[way].append(first_gap(model, want, ids))
            if not torch.is_tensor(output):
                forwards[way].append(float(output.tokens_per_forward[0]))
                accepted[way] += [n for n in output.accepted[0].tolist() if n > 0]
    first = next(iter(ways))
    print(
        f"{len(questions)} questions, at most {longest} tokens, {base_of(model).dtype}, {torch.get_num_threads()} threads\n"
    )
    print("| | tokens/s | to AR | same text | tokens per forward | accepted length |")
    print("|---|--:|--:|--:|--:|--:|")
    for way in ways:
        speed = {name: sum(tokens[name]) / sum(seconds[name]) for name in (first, way)}
        more = [f"{mean(values[way]):.2f}" if values[way] else "" for values in (forwards, accepted)]
        print(
            f"| {way} | {speed[way]:.1f} | {speed[way] / speed[first]:.2f} | {sum(same[way])} of {len(same[way])} | {' | '.join(more)} |"
        )
    for way, values in gaps.items():
        print(f"\n{way}: gaps of the base's two best logits where texts part: {[round(gap, 3) for gap in values]}")
    print_pass_costs(model)


if __name__ == "__main__":
    main()
