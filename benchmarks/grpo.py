"""GRPO beside fine-tuning on the model's own right answers, from one fine-tuned checkpoint of the embedded model: what rewards are worth.

    nice python benchmarks/grpo.py --seeds 0 1 2 --output benchmarks/results/grpo.md
    python benchmarks/grpo.py --steps 8 --rollouts '{"steps": 80, "temperature": 1.5}'     # what other rollouts are like
    python benchmarks/grpo.py --quick                # few steps and problems: only that it runs

Both get as many rollouts at temperature 1 for as many worked problems, and are rewarded for, or keep, exact answers. GRPO rolls out with
the model that it trains; rejection sampling rolls out once, and fine-tunes on what was right for as many optimiser steps as it takes to
see each right answer once, or as many as GRPO makes, where that is more.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig

from llm_diffusion import (
    DiffusionGRPOConfig,
    DiffusionGRPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    load_diffusion_model,
)
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.evaluation.statistics import paired
from llm_diffusion.models.patching import base_of

LENGTH, THRESHOLD = 80, 0.98


def exact(completions: list, answer: list[str], **_: Any) -> list[float]:
    return [float(said[0]["content"].strip() == right) for said, right in zip(completions, answer, strict=True)]


def one_seed(seed: int, args: argparse.Namespace) -> Iterator[tuple[str, list[bool], str, float]]:
    """Training, whether each held-out problem is right after it, what it saw, and minutes."""
    held_out = list(tiny_dataset(args.problems, seed=99, split="test", kinds=("arithmetic",)))
    asked = [r["messages"] for r in tiny_dataset(8 * args.steps, seed=1000 + seed, kinds=("arithmetic",))]
    problems = Dataset.from_list([{"prompt": turns[:1], "answer": turns[1]["content"]} for turns in asked])
    model, tokenizer = load_diffusion_model("tiny", attention="block", device="cpu")

    def right() -> list[bool]:
        model.eval()
        said = evaluate_answers(model, tokenizer, held_out, max_new_tokens=LENGTH, threshold=THRESHOLD).answers
        return [a.strip() == e["messages"][-1]["content"] for a, e in zip(said, held_out, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        common: dict[str, Any] = {
            "output_dir": folder,
            "gradient_checkpointing": False,
            "seed": seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "logging_steps": 10,
            "use_cpu": True,
        }
        settings = {"per_device_train_batch_size": 32, "learning_rate": 2e-3, "ar_loss_weight": 0.5, "max_length": 256}
        sft = DiffusionSFTTrainer(
            model,
            DiffusionSFTConfig(**common, **settings, max_steps=args.sft_steps, lr_scheduler_type="cosine"),
            train_dataset=tiny_dataset(32 * args.sft_steps, seed=seed),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        sft.train()
        model = sft.model
        yield "before", right(), "", 0.0
        start = {name: weight.clone() for name, weight in model.state_dict().items()}

        def restart() -> float:
            if "ref" in model.peft_config:  # GRPO's reference
                model.delete_adapter("ref")
            model.load_state_dict(start)
            base_of(model).config.diffusion["conversion_steps"] = args.sft_steps  # which masks are keyed by
            return time.time()

        def grpo(**settings: Any) -> DiffusionGRPOTrainer:
            how = {
                "num_generations": 8,
                "max_completion_length": LENGTH,
                "generation_kwargs": {name: value for name, value in args.rollouts.items() if name != "temperature"},
                "temperature": args.rollouts.get("temperature", 1.0),
                "beta": args.beta,
            }
            how |= {"per_device_train_batch_size": 64, "max_steps": args.steps, "num_draws": args.draws}
            config = DiffusionGRPOConfig(**common, **how, lr_scheduler_type="constant", **settings)
            return DiffusionGRPOTrainer(model, exact, config, problems, processing_class=tokenizer)

        began = restart()
        kept, alike = rejection(grpo(), problems, args.quick)
        steps = max(args.steps, -(-len(kept) // 32))
        config = DiffusionSFTConfig(
            **common, **settings | {"learning_rate": 5e-4}, max_steps=steps, lr_scheduler_type="cosine"
        )
        DiffusionSFTTrainer(model, config, train_dataset=kept, processing_class=tokenizer).train()
        told = f"{len(kept)} right of {64 * args.steps}, {100 * alike:.0f} % of groups with one reward; {steps} steps of 32"
        yield "fine-tuning on its own right answers", right(), told, (time.time() - began) / 60

        began = restart()
        trainer = grpo(learning_rate=args.learning_rate)
        trainer.train()
        log = [row for row in trainer.state.log_history if "reward" in row]
        alike = sum(row["frac_reward_zero_std"] for row in log) / len(log)
        told = f"{args.steps} steps of 64; {100 * alike:.0f} % of groups with one reward"
        yield "GRPO", right(), told, (time.time() - began) / 60


def rejection(trainer: DiffusionGRPOTrainer, problems: Dataset, quick: bool) -> tuple[Dataset, float]:
    """The right ones of as many rollouts as GRPO makes, by its own generation; and the share of groups with one reward."""
    rows, groups = [], []
    trainer.model.eval()
    for first in range(0, len(problems), 8):
        part = [problem for problem in problems.select(range(first, first + 8)) for _ in range(8)]
        with torch.no_grad():
            *_, completions, _, _, _, _ = trainer._generate([problem["prompt"] for problem in part])
        scores = exact(completions, [problem["answer"] for problem in part])
        groups += torch.tensor(scores).view(-1, 8).std(1).tolist()
        rows += [
            {"prompt": problem["prompt"], "completion": said}
            for problem, said, score in zip(part, completions, scores, strict=True)
            if score or quick  # after two steps nothing is right
        ]
    return Dataset.from_list(rows).shuffle(seed=trainer.args.seed), groups.count(0.0) / len(groups)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--sft-steps", type=int, default=55)
    parser.add_argument("--steps", type=int, default=100, help="of GRPO, 64 rollouts each")
    parser.add_argument("--draws", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of GRPO")
    parser.add_argument(
        "--rollouts", type=json.loads, default={"threshold": THRESHOLD}, help="how they are decoded, JSON"
    )
    parser.add_argument("--beta", type=float, default=0.1, help="of GRPO: weight of the distance from the start")
    parser.add_argument("--problems", type=int, default=1000)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", help="file of the table")
    args = parser.parse_args()
    if args.quick:
        args.sft_steps, args.steps, args.problems = 1, 1, 8
    lines = [
        f"`python benchmarks/grpo.py --seeds {' '.join(map(str, args.seeds))}`: the embedded model, blocks of 4, after {args.sft_steps} "
        f"steps of fine-tuning; {64 * args.steps} rollouts, 8 for each of {8 * args.steps} worked problems; GRPO with "
        f"`num_draws` {args.draws}, `beta` {args.beta:g}, learning rate {args.learning_rate:g}. {args.problems} held-out worked problems; "
        f"threshold {THRESHOLD}, of rollouts {json.dumps(args.rollouts)}; CPU. Differences in points, with 95 % intervals (paired bootstrap).\n",
        "| seed | trained by | right, % | over before | minutes | |\n|---|---|--:|---|--:|---|",
    ]
    print("\n".join(lines), flush=True)
    for seed in args.seeds:
        before: list[bool] = []
        for name, answers, told, minutes in one_seed(seed, args):
            gain = ""
            if before:
                found = paired("", {"before": before, "after": answers}, seed)["differences"][0]
                gain = "{points:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]".format(**found)
            before = before or answers
            share = 100 * sum(answers) / len(answers)
            lines.append(f"| {seed} | {name} | {share:.1f} | {gain} | {minutes:.1f} | {told} |")
            print(lines[-1], flush=True)
            if args.output:
                Path(args.output).write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
