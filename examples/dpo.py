"""Diffusion-DPO in one file: a diffusion model learns to prefer right worked answers to answers with one injected error.

    python examples/dpo.py --model output/sft_model --output output/dpo_model
    python examples/dpo.py --model GSAI-ML/LLaDA-8B-Instruct --quantization nf4 --pairs pairs.jsonl   # 16 GB of GPU memory

Purpose: what to write in Python where the main job (`"phases": ["pretrain", "sft", "dpo"]`) does not fit. The reference is what is
loaded: a frozen copy of its adapters on the one base, or, of a full checkpoint, the model without the new adapters.
Pairs are rows of `prompt`, `chosen` and `rejected` in any of TRL's formats; without a file, errors are injected into worked arithmetic.
"""

from __future__ import annotations

import argparse

from datasets import load_dataset
from peft import LoraConfig, PeftModel

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.reasoning.pairs import preference_pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a diffusion model: saved by llm_diffusion, LLaDA or SMDM")
    parser.add_argument("--pairs", help="JSONL of prompt, chosen and rejected")
    parser.add_argument("--output", default="output/dpo_model")
    parser.add_argument("--steps", type=int, default=60, help="optimiser steps")
    parser.add_argument("--draws", type=int, default=8, help="masks that a score is the mean of")
    parser.add_argument("--batch-size", type=int, default=1, help="pairs of a micro-batch")
    parser.add_argument("--accumulation", type=int, default=16, help="micro-batches of an optimiser step")
    parser.add_argument("--learning-rate", type=float, default=2e-5)
    parser.add_argument("--beta", type=float, default=0.1, help="how far the policy may go from its reference")
    parser.add_argument("--quantization", choices=("nf4", "int8"))
    parser.add_argument("--device", choices=("cuda", "mps", "cpu"))
    args = parser.parse_args()

    if args.pairs:
        pairs = load_dataset("json", data_files=args.pairs, split="train")
    else:
        pairs = preference_pairs(tiny_dataset(2000, kinds=("arithmetic",)), seed=0)
    model, tokenizer = ld.load_diffusion_model(args.model, quantization=args.quantization, device=args.device)
    fresh = (
        None if isinstance(model, PeftModel) else LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    settings = ld.DiffusionDPOConfig(
        args.output,
        max_steps=args.steps,
        num_draws=args.draws,
        initial_draws=min(2, args.draws),
        beta=args.beta,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=args.batch_size,
        gradient_accumulation_steps=args.accumulation,
        max_length=512,
        logging_steps=5,
        report_to="none",
        save_strategy="no",
        use_cpu=args.device == "cpu",
    )
    trainer = ld.DiffusionDPOTrainer(
        model, args=settings, train_dataset=pairs, processing_class=tokenizer, peft_config=fresh
    )
    trainer.train()
    trainer.save_model(args.output)
    for row in trainer.state.log_history:
        if "rewards/accuracies" in row:
            print(f"step {row['step']}  loss {row['loss']:.4f}  preferred {100 * row['rewards/accuracies']:.0f} %")
    print(f"saved; load it with llm_diffusion.load_diffusion_model({args.output!r})")


if __name__ == "__main__":
    main()
