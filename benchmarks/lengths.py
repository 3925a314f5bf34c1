"""Where answers end: what training teaches a bidirectional model to foresee, and what sized canvases save.

    python benchmarks/lengths.py --output benchmarks/results/lengths-cpu
    python benchmarks/lengths.py --canvas 256 --only "sized canvases, first steps"      # a fixed canvas of 256 that was trained
    python benchmarks/lengths.py --steps 60 --examples 60

Three trainings of the embedded model on the same examples: canvases that end with the answer, tails of up to 16 end tokens and cut canvases
(the default), and canvases whose length says nothing of the answer, with first steps beside the bound. Of each: the end foreseen on an empty
canvas. Of the last: the same answers on a fixed canvas and on sized ones; of a block model, whose length is open, likewise.

computed: tokens that went through the model, prompts and first steps included. wasted: of those the canvas tokens behind the answer's end.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from recipes import CO_LOSS, LEARNING_RATE, build, common_settings, data, lora

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.evaluation.metrics import COLUMNS, foresee_ends, plot_ends

TRAININGS: dict[str, dict[str, Any]] = {
    "canvas ends with the answer": {"eos_tail": 0, "random_canvas": 0.0},
    "tail up to 16, cut canvases": {},
    "sized canvases": {"random_canvas": 0.5},
    "sized canvases, first steps": {"random_canvas": 0.5, "first_step_share": 0.25},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "fixed canvas of 256": {"max_new_tokens": 256},
    "fixed canvas of 80": {"max_new_tokens": 80},
    "sized, quantile 0.5": {"max_new_tokens": 256, "length_quantile": 0.5},
    "sized, quantile 0.9": {"max_new_tokens": 256, "length_quantile": 0.9},
    "sized, quantile 0.9, 4 more": {"max_new_tokens": 256, "length_quantile": 0.9, "length_margin": 4},
    "sized, quantile 0.99": {"max_new_tokens": 256, "length_quantile": 0.99},
    "canvas grown in blocks of 16": {"max_new_tokens": 256, "block_length": 16, "grow_canvas": True},
}


def train(settings: dict[str, Any], steps: int) -> tuple[torch.nn.Module, Any]:
    model, tokenizer = build("", 64)
    rows, _ = data(0, 32 * steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DiffusionSFTTrainer(
            model,
            DiffusionSFTConfig(folder, **common_settings(steps, 32, 0, LEARNING_RATE), **settings),
            train_dataset=rows,
            processing_class=tokenizer,
            peft_config=lora(64),
        )
        trainer.train()
    return trainer.model.eval(), tokenizer


def decode(model: torch.nn.Module, tokenizer: Any, examples: list[dict], settings: dict[str, Any]) -> list[str]:
    """Exact match, tokens computed a prompt, seconds; batches of one, so that no row pays for another."""
    computed = 0

    def count(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal computed
        computed += kwargs["input_ids"].numel()

    handle = model.get_base_model().register_forward_pre_hook(count, with_kwargs=True)
    started = time.perf_counter()
    found = [evaluate_answers(model, tokenizer, [example], threshold=0.9, **settings) for example in examples]
    seconds = time.perf_counter() - started
    handle.remove()
    match = sum(report.mean for report in found) / len(found)
    forwards = sum(report.tokens_per_forward for report in found) / len(found)
    return [f"{match:.1f}", f"{computed / len(found):,.0f}", f"{forwards:.2f}", f"{1000 * seconds / len(found):.0f}"]


def table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--examples", type=int, default=300, help="held-out prompts")
    parser.add_argument("--canvas", type=int, default=64, help="longest canvas that the sized ones are trained on")
    parser.add_argument("--only", choices=TRAININGS, help="one training; none of a block model")
    parser.add_argument("--output", type=Path, help="where .md and .png go")
    args = parser.parse_args()
    _, test = data(0, 1)
    examples = list(test)[: args.examples]
    foreseen = [["training", "canvas", "answer shown", *COLUMNS]]
    for name, settings in TRAININGS.items():
        if args.only not in (None, name):
            continue
        model, tokenizer = train(settings | ({"max_canvas": args.canvas} if "sized" in name else {}), args.steps)
        for canvas in (64, 256):
            report = foresee_ends(model, tokenizer, examples, canvas)
            for share, row in report.table.items():
                foreseen.append([name, str(canvas), f"{share:.0%}", *(f"{row[column]:.3f}" for column in COLUMNS)])
            if args.output and canvas == args.canvas:
                plot_ends(report, args.output.with_suffix(".png"))
        print(table(foreseen), flush=True)
    decoded = [["strategy", "exact match", "tokens computed", "tokens per forward", "ms a prompt"]]
    for name, settings in STRATEGIES.items():
        decoded.append([name, *decode(model, tokenizer, examples, settings)])
        print(decoded[-1], flush=True)
    if not args.only:
        model, tokenizer = train(CO_LOSS, args.steps)
        decoded.append(["block model, open length", *decode(model, tokenizer, examples, {"max_new_tokens": 256})])
    text = (
        f"# Where answers end\n\n`python benchmarks/lengths.py --steps {args.steps} --canvas {args.canvas}`: {args.steps} steps of 32 rows, LoRA r 64, "
        f"{len(examples)} held-out prompts, CPU.\n\n{table(foreseen)}\n\nThe same answers, threshold 0.9, one prompt at a time:\n\n"
        f"{table(decoded)}\n"
    )
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(
            f"{text}\n![ends foreseen by the last training]({args.output.name}.png)\n"
        )


if __name__ == "__main__":
    main()
