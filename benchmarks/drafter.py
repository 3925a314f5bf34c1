"""Trains a lossless drafter for SmolLM2, or goes on with the shipped one: held-out accepted length against trained tokens.

    python benchmarks/drafter.py --output /tmp/drafter --minutes 60                         on a CPU; in bf16 if it multiplies that
    python benchmarks/drafter.py --output /tmp/drafter --minutes 9 --batch-size 64          on a GPU, in bf16: all that fits into ten minutes
    python benchmarks/drafter.py --output /tmp/drafter --minutes 60 --resume                goes on where it stopped

Rows are the base's own greedy answers: half to prompts that it writes itself, half, with `--questions FILE`, to those of a JSONL file; they
are made once and kept in the output folder. Settings are those of the preset `smollm2`; the rate falls to zero with the time that is left,
so every run ends as if its length had been known. Printed: a table of tokens and accepted length; saved: the adapter, `accepted.png`.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from datasets import concatenate_datasets
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from transformers import TrainerCallback

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, load_diffusion_model
from llm_diffusion.config import resolve
from llm_diffusion.generation.self_generated import generate_answers, generate_prompts
from llm_diffusion.models.packing import has_fast_bfloat16
from llm_diffusion.models.smollm2 import DRAFTER
from llm_diffusion.models.special_tokens import prompt_ids

HELD_OUT = 12  # rows of each kind


class UntilTime(TrainerCallback):
    """Linear decay of the rate over the time that is left, and the end with it."""

    def __init__(self, minutes: float) -> None:
        self.minutes = minutes

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.began = time.monotonic()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        left = 1 - (time.monotonic() - self.began) / (60 * self.minutes)
        warm = min(1.0, (state.global_step + 1) / args.warmup_steps)
        for group in kwargs["optimizer"].param_groups:
            group["lr"] = args.learning_rate * max(0.0, min(warm, left))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if time.monotonic() - self.began > 60 * self.minutes:
            control.should_evaluate = control.should_save = control.should_training_stop = True


def on_this_machine() -> dict[str, Any]:
    """Where SmolLM2 is loaded to, and its type: bf16 where that is multiplied as such."""
    on_gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if on_gpu or has_fast_bfloat16() else torch.float32
    return {"device": "cuda" if on_gpu else "cpu", "dtype": dtype}


def rows_of(
    model: Any, tokenizer: Any, args: argparse.Namespace, held_out_rows: int = HELD_OUT
) -> tuple[list[Any], Any]:
    """The base's answers to the questions, if there are any, and to prompts of its own: to train on, kind by kind, and held out of both."""
    cache, prompts = args.output / "answers.jsonl", []
    if args.questions:
        lines = args.questions.read_text().splitlines()[args.skip : args.skip + args.prompts]
        prompts.append([prompt_ids(tokenizer, [{"role": "user", "content": json.loads(x)["question"]}]) for x in lines])
    prompts.append(generate_prompts(model, tokenizer, args.prompts, seed=args.seed, cache=cache))
    kinds = [generate_answers(model, tokenizer, kind, max_new_tokens=192, cache=cache) for kind in prompts]
    kinds = [kind.filter(lambda row: sum(label != -100 for label in row["labels"]) > 8) for kind in kinds]
    held_out = concatenate_datasets([kind.select(range(held_out_rows)) for kind in kinds])
    return [kind.select(range(held_out_rows, len(kind))) for kind in kinds], held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True, help="of training, without making the rows")
    parser.add_argument("--prompts", type=int, default=640, help="of each kind")
    parser.add_argument(
        "--questions", type=Path, help="JSONL file with `question`; so many of them as prompts of the model's own"
    )
    parser.add_argument("--skip", type=int, default=0, help="questions of the file to leave out")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--every", type=int, default=20, help="steps from one evaluation to the next")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--go-on", action="store_true", help="with the shipped adapter, instead of a fresh one")
    parser.add_argument("--resume", action="store_true", help="with the last checkpoint in the output folder")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    preset, options = resolve("smollm2"), on_this_machine()
    name = str(DRAFTER) if args.go_on else "smollm2"
    model, tokenizer = load_diffusion_model(name, attention="lossless", block_length=8, **options)
    kinds, held_out = rows_of(model, tokenizer, args)
    train = concatenate_datasets(kinds)
    settings = DiffusionSFTConfig(
        str(args.output),
        **{key: value for key, value in preset.training.items() if key != "lr_scheduler_type"},
        lr_scheduler_type="constant",
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        max_length=preset.max_length,
        max_steps=10**6,
        eval_strategy="steps",
        eval_steps=args.every,
        eval_on_start=True,
        save_strategy="steps",
        save_steps=args.every,
        save_total_limit=2,
        logging_steps=args.every,
        seed=args.seed,
        use_cpu=options["device"] == "cpu",
        bf16=options["dtype"] == torch.bfloat16,
        report_to="none",
        train_sampling_strategy="group_by_length",
    )
    adapters = None if args.go_on else LoraConfig(**preset.lora_config, task_type="CAUSAL_LM")
    trainer = DiffusionSFTTrainer(
        model,
        settings,
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=adapters,
        callbacks=[UntilTime(args.minutes)],
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model(str(args.output / "drafter"))
    found, tokens = [], 0
    for row in trainer.state.log_history:
        tokens = row.get("num_tokens", tokens)
        if "eval_accepted_length" in row:
            found.append((row["step"], tokens, row["eval_accepted_length"]))
    table = Table("steps", "tokens", "held-out accepted length", title=f"{len(train):,} rows, {settings.device}")
    for step, n, accepted in found:
        table.add_row(f"{step:,}", f"{n:,.0f}", f"{accepted:.2f}")
    Console(width=100).print(table)
    plt.plot([n for _, n, _ in found], [accepted for *_, accepted in found], marker="o")
    plt.xlabel("trained tokens")
    plt.ylabel("held-out accepted length")
    plt.savefig(args.output / "accepted.png", dpi=120)


if __name__ == "__main__":
    main()
