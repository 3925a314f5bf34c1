"""Diffusion-DPO: what sharing noise is worth, what draws cost in memory, and whether preferences make better answers.

    python benchmarks/dpo.py noise                   # spread of the preference score on the exact Markov chain, a minute
    python benchmarks/dpo.py memory                  # peak of a step with 1 and with 8 draws, CPU, fp32, three minutes (Linux)
    python benchmarks/dpo.py memory --device cuda    # LLaDA-8B's shape, random weights, nf4, 512 tokens, batch 1: peak and tokens/s
    python benchmarks/dpo.py estimate                # what that should take, from the config alone, a minute
    python benchmarks/dpo.py answers --seeds 0 1 2   # exact match on worked problems before and after, hours
    python benchmarks/dpo.py answers --quick         # the same with few steps and problems: only that it runs

Memory is measured as in `benchmarks/memory.py`: every case in a process of its own, growth of the resident set's high-water mark on
a CPU, `torch.cuda.max_memory_allocated` on CUDA.
Answers: the tiny model is converted and stopped early, at 60 to 85 % of the worked problems, then trained on pairs whose wrong answers are
injected errors or its own, or on their right answers alone, of all problems or of those that it failed; the same held-out problems are
answered before and after.
Trade-off: a model of two million parameters. Alternative: real checkpoints, which need a hub and a GPU.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from memory import ALLOCATOR, GIB, QUIET, build_model, config_of, resident

KL = 0.05  # nats a token between policy and reference
OTHER_KINDS = ("sort", "reverse", "compare", "fill", "sudoku")


def noise(args: argparse.Namespace) -> None:
    """Standard deviation of the preference score over masks, by what is shared."""
    tests = Path(__file__).parent.parent / "tests"
    sys.path[:0] = [str(tests), str(tests / "objective")]
    import torch
    from test_estimators import CHAIN, POLICY, pairs, score_of

    batch, n = pairs(12), 12
    kinds = {
        "nothing": lambda seed: [4 * seed + i for i in range(4)],
        "policy and reference": lambda seed: [2 * seed, 2 * seed, 2 * seed + 1, 2 * seed + 1],
        "all four": lambda seed: [seed] * 4,
    }
    sides = ((POLICY, slice(0, n)), (CHAIN, slice(0, n)), (POLICY, slice(n, None)), (CHAIN, slice(n, None)))
    print(f"| shared | {' | '.join(f'{score}, 8 forwards' for score in ('elbo', 'trajectory'))} |\n|---|---|---|")
    for name, seeds in kinds.items():
        spreads = []
        for score in ("elbo", "trajectory"):
            values = []
            for seed in range(args.repeats):
                policy, reference, policy_l, reference_l = (
                    score_of(chain, batch, own, score=score, n_draws=8)[rows]
                    for (chain, rows), own in zip(sides, seeds(seed), strict=True)
                )
                values.append(policy - reference - policy_l + reference_l)
            spreads.append(torch.stack(values).std(0).mean().item())
        print(f"| {name} | {' | '.join(f'{spread:.2f}' for spread in spreads)} |", flush=True)


def train_pairs(model: Any, draws: int, length: int, rows: int, device: str, checkpointing: bool) -> float:
    """Optimiser steps on pairs that differ in two tokens, two on CUDA, where the first one warms up -> seconds of the last."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback

    from llm_diffusion import DiffusionDPOConfig, DiffusionDPOTrainer, convert_to_diffusion
    from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            self.started = time.perf_counter()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            if device == "cuda":
                torch.cuda.synchronize()
            self.took = time.perf_counter() - self.started

    tokenizer, clock = AutoTokenizer.from_pretrained(TINY_MODEL_PATH), Clock()
    convert_to_diffusion(model, tokenizer, right_shift_logits=False)
    words = [f" {number}" for number in range(10, 100)]
    text = "".join(words[i % len(words)] for i in range(length))
    ids = tokenizer(text)["input_ids"][: length - 8]
    half = tokenizer.decode(ids[: length // 2]), tokenizer.decode(ids[length // 2 :])
    row = {"prompt": half[0], "chosen": half[1], "rejected": half[1][:-2] + "00"}
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        settings = DiffusionDPOConfig(
            folder,
            max_steps=2 if device == "cuda" else 1,
            per_device_train_batch_size=rows,
            max_length=length,
            num_draws=draws,
            gradient_checkpointing=checkpointing,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        DiffusionDPOTrainer(
            model,
            args=settings,
            train_dataset=Dataset.from_list([row] * (2 * rows)),
            processing_class=tokenizer,
            peft_config=lora,
            callbacks=[clock],
        ).train()
    return clock.took


def llada_8b() -> Any:
    from transformers import LlamaConfig

    shape = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32, "vocab_size": 126464}
    return LlamaConfig(**shape, num_attention_heads=32, num_key_value_heads=32, rope_theta=500000.0)


def estimate(args: argparse.Namespace) -> None:
    """GiB of a step of LLaDA-8B's shape under QLoRA with checkpointing, one pair of 512 tokens."""
    from llm_diffusion.analysis import analyze

    for part, size in analyze(llada_8b(), batch_size=2, length=512).training["qlora"].items():  # a pair is two rows
        print(f"{part:12s}{size:6.2f}")


def measure(case: str, device: str) -> dict[str, float]:
    """One case in this process -> peak bytes of training, weights included."""
    import torch

    draws, checkpointing = int(case.split("-")[0]), case.endswith("checkpointed")
    small = config_of("qwen3", num_hidden_layers=2, vocab_size=1024)
    train_pairs(build_model(small, "lora", device), draws, 64, 1, device, checkpointing)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        took = train_pairs(build_model(llada_8b(), "qlora", device), draws, 512, 1, device, checkpointing)
        # Two rows of 512 tokens, each scored by policy and reference and once more with gradient.
        return {"peak": torch.cuda.max_memory_allocated() - before, "tokens_per_second": 1024 / took}
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    config = config_of("qwen3", num_hidden_layers=4, vocab_size=4096)
    took = train_pairs(build_model(config, "lora", device), draws, 256, 2, device, checkpointing)
    return {"peak": resident("VmHWM") - before, "tokens_per_second": 4 * 256 / took}


def memory(args: argparse.Namespace) -> None:
    """Peak by number of draws, each in a fresh process."""
    if args.measure:
        print(json.dumps(measure(args.measure, args.device)))
        return
    environment = {**os.environ, **QUIET, **(ALLOCATOR if args.device == "cpu" else {})}
    print("| checkpointing | draws | peak GiB | of one draw's | tokens/s |\n|---|--:|--:|--:|--:|")
    for way in ("", "-checkpointed"):
        first = None
        for draws in (1, 8):
            command = [sys.executable, __file__, "memory", "--device", args.device, "--measure", f"{draws}{way}"]
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(done.stderr)
            found = json.loads(done.stdout.strip().splitlines()[-1])
            first = first or found["peak"]
            name = "on" if way else "off"
            figures = f"{found['peak'] / GIB:.2f} | {found['peak'] / first:.2f} | {found['tokens_per_second']:.0f}"
            print(f"| {name} | {draws} | {figures} |", flush=True)


def answers(args: argparse.Namespace) -> None:
    """Exact match before and after preferences: every training from the same fine-tuned model, as many steps on as many answers."""
    if args.quick:
        args.sft_steps, args.steps, args.records, args.problems = 2, 2, 60, 20
    points = "over before"
    head = ("seed", "problems", "trained by", "worked problems, %", points, "other kinds, %", points, "preferred, %")
    lines = [
        f"`python benchmarks/dpo.py answers --seeds {' '.join(map(str, args.seeds))}`: {args.sft_steps} steps of fine-tuning, then "
        f"{args.steps} of 8 answers or pairs, 2 draws, learning rate 5e-4; {args.problems} held-out worked problems and "
        f"{args.problems // 2} of the other kinds, blocks of 4, threshold 0.98; CPU. Differences in points, with 95 % intervals (paired "
        "bootstrap).\n",
        f"| {' | '.join(head)} |\n|{'---|' * len(head)}",
    ]
    print("\n".join(lines), flush=True)
    for seed in args.seeds:
        before = None
        for source, training, *right, preferred in one_seed(seed, args):
            worked, others = (f"{100 * sum(part) / len(part):.1f}" for part in right)
            gains = ["", ""] if before is None else [gain(a, b, seed) for a, b in zip(before, right, strict=True)]
            before = before or right
            row = (seed, source, training, worked, gains[0], others, gains[1], preferred)
            lines.append(f"| {' | '.join(map(str, row))} |")
            print(lines[-1], flush=True)
            if args.output:
                Path(args.output).write_text("\n".join(lines) + "\n")


def gain(before: list[bool], after: list[bool], seed: int) -> str:
    """Points of `after` over `before`, on the same problems."""
    from llm_diffusion.evaluation.statistics import paired

    found = paired("", {"before": before, "after": after}, seed)["differences"][0]
    return "{points:+.1f} [{interval[0]:+.1f}, {interval[1]:+.1f}]".format(**found)


def one_seed(seed: int, args: argparse.Namespace) -> Iterator[tuple[str, str, list[bool], list[bool], str]]:
    """Problems and training, whether each worked problem and each other one is right after it, percent of pairs preferred."""
    from datasets import Dataset
    from peft import LoraConfig

    from llm_diffusion import (
        DiffusionDPOConfig,
        DiffusionDPOTrainer,
        DiffusionSFTConfig,
        DiffusionSFTTrainer,
        load_diffusion_model,
    )
    from llm_diffusion.data.tiny import tiny_dataset
    from llm_diffusion.evaluation.answers import evaluate_answers, sample_answers
    from llm_diffusion.models.patching import base_of
    from llm_diffusion.reasoning.pairs import pairs_from_answers, preference_pairs
    from llm_diffusion.reasoning.problems import read_problem

    held_out = list(tiny_dataset(args.problems, seed=99, split="test", kinds=("arithmetic",)))
    rest = list(tiny_dataset(args.problems // 2, seed=99, split="test", kinds=OTHER_KINDS))
    kinds = (("arithmetic",), OTHER_KINDS)  # half of the records each
    records = [
        r
        for i, own in enumerate(kinds)
        for r in tiny_dataset(args.records // 2, seed=1000 * i + 1000 + seed, kinds=own)
    ]
    model, tokenizer = load_diffusion_model("tiny", attention="block", device="cpu")

    def right(examples: list[dict]) -> list[bool]:
        model.eval()
        said = evaluate_answers(model, tokenizer, examples, max_new_tokens=80, threshold=0.98).answers
        return [a.strip() == e["messages"][-1]["content"] for a, e in zip(said, examples, strict=True)]

    with tempfile.TemporaryDirectory() as folder:
        common = {
            "output_dir": folder,
            "gradient_checkpointing": False,
            "seed": seed,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "max_length": 256,
            "logging_steps": 20,
            "use_cpu": True,
            "lr_scheduler_type": "cosine",
        }
        short = {**common, "max_steps": args.steps, "per_device_train_batch_size": 8, "learning_rate": 5e-4}
        sft = DiffusionSFTTrainer(
            model,
            DiffusionSFTConfig(
                **common,
                max_steps=args.sft_steps,
                per_device_train_batch_size=32,
                learning_rate=2e-3,
                ar_loss_weight=0.5,
            ),
            train_dataset=tiny_dataset(32 * args.sft_steps, seed=seed),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM"),
        )
        sft.train()
        model = sft.model
        yield "", "before", right(held_out), right(rest), ""
        start = {name: weight.clone() for name, weight in model.state_dict().items()}

        def restart() -> None:
            model.load_state_dict(start)
            base_of(model).config.diffusion["conversion_steps"] = args.sft_steps  # which masks are keyed by

        asked = [read_problem(record) for record in records]
        said = sample_answers(model, tokenizer, asked, 1, seed, temperature=0, threshold=0.9, max_new_tokens=80)
        every, own = preference_pairs(records, seed), pairs_from_answers(said)
        failed = {json.dumps(row["prompt"]) for row in own}
        hard = [r for r, problem in zip(records, asked, strict=True) if json.dumps(problem.prompt) in failed]
        for source, chosen, trainings in (
            ("all", every, (("injected", every, 1.0), ("injected", every, 0.1))),
            ("those it failed", own, (("its own", own, 1.0), ("injected", preference_pairs(hard, seed), 0.1))),
        ):
            restart()
            DiffusionSFTTrainer(
                model,
                DiffusionSFTConfig(**short, ar_loss_weight=0.5),
                train_dataset=Dataset.from_list(
                    [{"prompt": row["prompt"], "completion": row["chosen"]} for row in chosen.shuffle(seed=seed)]
                ),
                processing_class=tokenizer,
            ).train()
            yield source, "fine-tuning", right(held_out), right(rest), ""
            for errors, pairs, weight in trainings:
                restart()
                losses = {"num_draws": 2, "loss_type": ["sigmoid", "sft"], "loss_weights": [weight, 1.0]}
                dpo = DiffusionDPOTrainer(
                    model,
                    args=DiffusionDPOConfig(**short, **losses),
                    train_dataset=pairs.shuffle(seed=seed),
                    processing_class=tokenizer,
                )
                dpo.train()
                seen = [row["rewards/accuracies"] for row in dpo.state.log_history if "rewards/accuracies" in row]
                preferred = f"{100 * seen[-1]:.0f}" if seen else ""
                yield source, f"{weight:g} sigmoid + sft, {errors} errors", right(held_out), right(rest), preferred
                model.delete_adapter("ref")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("noise")
    one.add_argument("--repeats", type=int, default=60)
    one.set_defaults(run=noise)
    two = commands.add_parser("memory")
    two.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    two.add_argument("--measure", help=argparse.SUPPRESS)
    two.set_defaults(run=memory)
    commands.add_parser("estimate").set_defaults(run=estimate)
    three = commands.add_parser("answers")
    three.add_argument("--seeds", type=int, nargs="+", default=[0])
    three.add_argument("--sft-steps", type=int, default=70)
    three.add_argument("--steps", type=int, default=60, help="of the trainings that are compared")
    three.add_argument("--records", type=int, default=3000, help="that errors are put in, or that the model answers")
    three.add_argument("--problems", type=int, default=2000)
    three.add_argument("--quick", action="store_true")
    three.add_argument("--output", help="file of the table")
    three.set_defaults(run=answers)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
