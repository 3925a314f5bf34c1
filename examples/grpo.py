"""Diffusion-GRPO in one file: a diffusion model learns from a reward of one's own.

    python examples/grpo.py --model output/sft_model --output output/grpo_model
    python examples/grpo.py --model GSAI-ML/LLaDA-8B-Instruct --problems gsm8k.jsonl --quantization nf4

Purpose: how a reward is written, and which settings matter. Problems are rows of `prompt` and `answer`; without a file, worked arithmetic.
"""

from __future__ import annotations

import argparse
from typing import Any

from datasets import Dataset, load_dataset
from peft import LoraConfig, PeftModel

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset


def right(completions: list, answer: list[str], **_: Any) -> list[float]:
    """1 for an answer that ends as the right one does, a tenth of that for one that has its number of lines."""
    rewards = []
    for said, wanted in zip(completions, answer, strict=True):
        text = said if isinstance(said, str) else said[0]["content"]
        ends_right = text.split()[-1:] == wanted.split()[-1:]
        rewards.append(float(ends_right) + 0.1 * (text.count("\n") == wanted.count("\n")))
    return rewards


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusion model: saved by llm_diffusion, LLaDA or SMDM")
    parser.add_argument("--problems", help="JSONL of prompt and answer")
    parser.add_argument("--output", default="output/grpo_model")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps")
    parser.add_argument("--rollouts", type=int, default=64, help="of a step, 8 to a prompt")
    parser.add_argument("--length", type=int, default=80, help="longest answer, in tokens")
    parser.add_argument("--quantization", choices=("nf4", "int8"))
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"))
    args = parser.parse_args()

    if args.problems:
        problems = load_dataset("json", data_files=args.problems, split="train")
    else:
        asked = (row["messages"] for row in tiny_dataset(500, kinds=("arithmetic",)))
        problems = Dataset.from_list([{"prompt": turns[:1], "answer": turns[1]["content"]} for turns in asked])
    model, tokenizer = ld.load_diffusion_model(args.model, quantization=args.quantization, device=args.device)
    fresh = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = ld.DiffusionGRPOConfig(
        args.output,
        max_steps=args.steps,
        per_device_train_batch_size=args.rollouts,
        num_generations=8,
        max_completion_length=args.length,
        generation_kwargs={"threshold": 0.98},  # decoded as answers are to be later
        beta=0.1,  # without a pull to the start, wrong answers are pushed away at the cost of right ones
        learning_rate=1e-4,
        report_to="none",
        save_strategy="no",
        logging_steps=1,
        use_cpu=args.device == "cpu",
    )
    trainer = ld.DiffusionGRPOTrainer(
        model,
        right,
        settings,
        problems,
        processing_class=tokenizer,
        peft_config=None if isinstance(model, PeftModel) else fresh,
    )
    trainer.train()
    trainer.save_model(args.output)
    for row in (row for row in trainer.state.log_history if "reward" in row):
        print(f"step {row['step']}  reward {row['reward']:.3f}  length {row['completions/mean_length']:.0f}")


if __name__ == "__main__":
    main()
