"""The leaderboard of recipes at matched tokens: what keeps most of the AR model per token of training.

    python benchmarks/recipes.py --seeds 0 1 2 --output benchmarks/results/recipes
    python benchmarks/recipes.py --only "block 4 + co-loss" --steps 1400 --output /tmp/long
    python benchmarks/recipes.py --report --output benchmarks/results/recipes      # tables and picture of what is there
    python benchmarks/recipes.py --orders --steps 260                               # one bidirectional model, decoded in many orders

Every recipe sees the same examples in the same order for the same number of optimiser steps; a seed draws other examples, other
noise and other adapters. Finished runs are kept in `<output>.jsonl` and not run again, so several processes with different
`--seeds` may fill one table, and a stopped one goes on. Answers are decoded with room for 80 tokens, whatever the reference's length.

NELBO - AR NLL: nats a token of held-out answers, through the end token; the bound of the converted model minus the AR base's own NLL.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
from llm_diffusion.data.tiny import KINDS, tiny_dataset
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.objective.modes import IGNORE_INDEX

FULL, HEAD = "full", "fresh head"
RANK, LEARNING_RATE, FULL_LEARNING_RATE = 32, 2e-3, 3e-4
SHARES = (0.9, 0.95, 0.98)  # of the AR base's exact match
BLOCK_4 = {"attention": "block", "block_length": 4}
BLOCK_CAUSAL = {"clean_context": "block", "right_shift_logits": True}
LISTENING = {"distillation_weight": 0.5, "distillation_targets": "all", "distillation_hidden_weight": 0.1}
CO_LOSS = {**BLOCK_4, "ar_loss_weight": 0.5}

# name -> settings of DiffusionSFTConfig, and what is trained: a rank of LoRA, everything, or adapters and a head from nothing.
RECIPES: dict[str, tuple[dict[str, Any], int | str]] = {
    "AR-SFT twin": ({}, RANK),
    "bidirectional, own position": ({"attention": "bidirectional", "right_shift_logits": False}, RANK),
    "bidirectional": ({"attention": "bidirectional"}, RANK),
    "bidirectional, soft annealing": (
        {"attention": "bidirectional", "annealing": "soft", "annealing_steps": 0.5},
        RANK,
    ),
    "bidirectional, stochastic annealing": (
        {"attention": "bidirectional", "annealing": "stochastic", "annealing_steps": 0.5},
        RANK,
    ),
    "block 4": (BLOCK_4, RANK),
    "block 4, block-causal": ({**BLOCK_4, **BLOCK_CAUSAL}, RANK),
    "block 4, block-causal, own position": ({**BLOCK_4, "clean_context": "block"}, RANK),
    "block 8": ({"attention": "block", "block_length": 8}, RANK),
    "block 8, block-causal": ({"attention": "block", "block_length": 8, **BLOCK_CAUSAL}, RANK),
    "block 8, growing": (
        {"attention": "block", "block_length": 8, "annealing": "block", "annealing_steps": 0.5},
        RANK,
    ),
    "block 16": ({"attention": "block", "block_length": 16}, RANK),
    "block 4 + co-loss": (CO_LOSS, RANK),
    "block 4 + co-loss, distilled": ({**CO_LOSS, "distillation_weight": 1.0}, RANK),
    "block 4 + co-loss, distilled, on policy": ({**CO_LOSS, "distillation_weight": 1.0, "on_policy_share": 0.25}, RANK),
    "bidirectional, distilled": ({"attention": "bidirectional", **LISTENING}, RANK),
    "bidirectional, exact counts": ({"attention": "bidirectional", "exact_mask_count": True}, RANK),
    "block 4 + co-loss, replaced 5 %": ({**CO_LOSS, "random_replacement": 0.05}, RANK),
    "block 4 + co-loss, r 8": (CO_LOSS, 8),
    "block 4 + co-loss, r 128": (CO_LOSS, 128),
    "block 4 + co-loss, distilled, r 128": ({**CO_LOSS, "distillation_weight": 1.0}, 128),
    "block 4 + co-loss, full": (CO_LOSS, FULL),
    "block 4 + co-loss, fresh head": (CO_LOSS, HEAD),
}


def decoding(settings: dict[str, Any], threshold: float | None = 0.98) -> dict[str, Any]:
    """Every token that is sure, or one a step without a threshold; bidirectional models in blocks of 16 that come into being one after the other."""
    block = {} if settings["attention"] == "block" else {"block_length": 16, "grow_canvas": True}
    return {"max_new_tokens": 80, "threshold": threshold, **block}


def data(seed: int, rows: int) -> tuple[Dataset, Dataset]:
    """Training rows of this seed, and the held-out rows of every seed."""
    return tiny_dataset(rows, seed=100 + seed), tiny_dataset(600, seed=1, split="test")


def build(recipe: str, rank: int | str) -> tuple[torch.nn.Module, Any]:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32)
    if rank == HEAD:
        head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
        torch.nn.init.normal_(head.weight, std=model.config.initializer_range)
        model.lm_head, model.config.tie_word_embeddings = head, False
    return model, tokenizer


def lora(rank: int | str) -> LoraConfig | None:
    if rank == FULL:
        return None
    r = RANK if rank == HEAD else rank
    head = ["lm_head"] if rank == HEAD else None
    return LoraConfig(task_type="CAUSAL_LM", r=r, lora_alpha=2 * r, target_modules="all-linear", modules_to_save=head)


def run(
    recipe: str, seed: int, steps: int, batch_size: int, milestones: int, examples: int, careful: bool
) -> dict[str, Any]:
    settings, rank = RECIPES[recipe]
    settings = dict(settings)
    if "annealing_steps" in settings:
        settings["annealing_steps"] = int(settings["annealing_steps"] * steps)
    torch.manual_seed(seed)
    model, tokenizer = build(recipe, rank)
    train, test = data(seed, steps * batch_size)
    held_out = list(test)[:examples]
    autoregressive = not settings
    reached: list[tuple[int, float]] = []

    def answers(model: torch.nn.Module, n: int, **how: Any) -> Any:
        if autoregressive:  # `generate_autoregressive` turns adapters off: decode the merged twin
            merged = copy.deepcopy(model).merge_and_unload().eval()
            return evaluate_answers(merged, tokenizer, held_out[:n], autoregressive=True, max_new_tokens=80)
        return evaluate_answers(model, tokenizer, held_out[:n], **decoding(settings, **how))

    class Milestones(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            if state.global_step % max(1, steps // milestones) == 0 and state.global_step < steps:
                reached.append((state.global_step, answers(model, 180).mean))

    common = common_settings(steps, batch_size, seed, FULL_LEARNING_RATE if rank == FULL else LEARNING_RATE)
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        if autoregressive:
            rows = train.map(
                lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]},
                remove_columns=train.column_names,
            )
            trainer = SFTTrainer(
                model,
                SFTConfig(folder, bf16=False, **common),
                train_dataset=rows,
                processing_class=tokenizer,
                peft_config=lora(rank),
                callbacks=[Milestones()],
            )
        else:
            trainer = DiffusionSFTTrainer(
                model,
                DiffusionSFTConfig(folder, **common, **settings),
                train_dataset=train,
                eval_dataset=test,
                processing_class=tokenizer,
                peft_config=lora(rank),
                callbacks=[Milestones()],
            )
        trainer.train()
        seconds = time.perf_counter() - started
        report = answers(trainer.model, examples)
        one_a_step = answers(trainer.model, examples, threshold=None).mean if careful else None
        gap = None if autoregressive else nelbo(trainer) - autoregressive_nll(tokenizer, test)
    tokens = sum(len(row["input_ids"]) for row in trainer.train_dataset.select(range(steps * batch_size)))
    reached.append((steps, report.mean))
    return {
        "recipe": recipe,
        "seed": seed,
        "steps": steps,
        "tokens": tokens,
        "exact_match": report.exact_match,
        "mean": report.mean,
        "tokens_per_forward": report.tokens_per_forward,
        "one_a_step": one_a_step,
        "gap": gap,
        "milestones": [(round(tokens * step / steps), mean) for step, mean in reached],
        "seconds": seconds,
    }


ORDERS: list[dict[str, Any]] = [
    {"block_length": 80, "threshold": 0.9},
    *({"block_length": block, "grow_canvas": True, "threshold": 0.9} for block in (16, 8, 4, 2, 1)),
    *({"block_length": block, "grow_canvas": True, "threshold": 0.98} for block in (16, 4)),
]


def orders(steps: int, examples: int) -> str:
    """What the order of commits does to one bidirectional model: blocks that come into being one after the other, and none."""
    model, tokenizer = build("bidirectional", 64)
    train, test = data(0, 32 * steps)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DiffusionSFTTrainer(
            model,
            DiffusionSFTConfig(folder, exact_mask_count=True, **common_settings(steps, 32, 0, LEARNING_RATE)),
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=lora(64),
        )
        trainer.train()
    lines = [
        "| blocks of | threshold | " + " | ".join(KINDS) + " | mean | tokens/forward |",
        "|" + "---|" * (len(KINDS) + 4),
    ]
    for settings in ORDERS:
        found = evaluate_answers(trainer.model, tokenizer, list(test)[:examples], max_new_tokens=80, **settings)
        scores = " | ".join(f"{found.exact_match[kind]:.1f}" for kind in KINDS)
        block = settings["block_length"] if "grow_canvas" in settings else "the whole canvas"
        figures = f"{found.mean:.1f} | {found.tokens_per_forward:.2f}"
        lines.append(f"| {block} | {settings['threshold']} | {scores} | {figures} |")
    return "\n".join(lines)


def common_settings(steps: int, batch_size: int, seed: int, learning_rate: float) -> dict[str, Any]:
    return {
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": 20,
        "max_length": 256,
        "seed": seed,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(),
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "logging_steps": 50,
    }


def nelbo(trainer: DiffusionSFTTrainer) -> float:
    """Nats a token of the held-out answers through their end token; the tail of a block counts to the bound."""
    collator, rows = trainer.diffusion_collator, trainer.eval_dataset
    collator.settings.eos_tail, collator.settings.random_canvas = 0, 0.0
    counted = sum(int((collator([row])["labels"] != IGNORE_INDEX).sum()) for row in rows)
    return trainer.evaluate()["eval_nelbo"] * counted / sum(_answer_tokens(row, collator.eos_token_id) for row in rows)


def _answer_tokens(row: dict[str, Any], ends: list[int]) -> int:
    labels = [label for label in row["labels"] if label != IGNORE_INDEX]
    return next(place for place, label in enumerate(labels, start=1) if label in ends)


@torch.no_grad()
def autoregressive_nll(tokenizer: Any, test: Dataset) -> float:
    """Nats a token of the same answers under the AR base."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32).eval()
    nats = tokens = 0
    for row in test:
        prompt = tokenizer.apply_chat_template(row["messages"][:-1], add_generation_prompt=True, return_dict=False)
        answer = tokenizer(row["messages"][-1]["content"] + tokenizer.eos_token)["input_ids"]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        nats += torch.nn.functional.cross_entropy(logits, torch.tensor(answer), reduction="sum").item()
        tokens += len(answer)
    return nats / tokens


def base_report(examples: int) -> dict[str, Any]:
    model, tokenizer = build("base", FULL)
    report = evaluate_answers(model, tokenizer, list(data(0, 1)[1])[:examples], autoregressive=True, max_new_tokens=80)
    return {"exact_match": report.exact_match, "mean": report.mean}


def spread(values: list[float], digits: int = 1) -> str:
    middle = statistics.mean(values)
    if len(values) == 1:
        return f"{middle:.{digits}f}"
    return f"{middle:.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def tokens_to(share: float, runs: list[dict[str, Any]], base: float) -> str:
    """Tokens at the first milestone at or above this share of the base, mean over seeds; "-" if a seed never got there."""
    firsts = [next((tokens for tokens, mean in run["milestones"] if mean >= share * base), None) for run in runs]
    return "-" if None in firsts else f"{statistics.mean(firsts) / 1000:,.0f}k"


def table(runs: list[dict[str, Any]], base: dict[str, Any]) -> str:
    columns = ["recipe", "seeds", *KINDS, "mean", "kept", "tokens/forward"]
    careful = any(run.get("one_a_step") is not None for run in runs)
    columns += [*(["mean, one token a step"] if careful else []), "NELBO − AR NLL"]
    columns += [f"tokens to {100 * share:.0f} %" for share in SHARES]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    cells = ["AR base", ""] + [f"{base['exact_match'][kind]:.1f}" for kind in KINDS] + [f"{base['mean']:.1f}", "100 %"]
    lines.append("| " + " | ".join(cells + ["1.00"] + [""] * (len(columns) - len(cells) - 1)) + " |")
    order = sorted(
        RECIPES, key=lambda name: -max([statistics.mean(r["mean"] for r in of(runs, name) or [{"mean": 0}])])
    )
    for name in order:
        found = of(runs, name)
        if not found:
            continue
        cells = [name, str(len(found))]
        cells += [spread([run["exact_match"][kind] for run in found]) for kind in KINDS]
        cells += [spread([run["mean"] for run in found])]
        cells += [f"{100 * statistics.mean(run['mean'] for run in found) / base['mean']:.1f} %"]
        cells += [spread([run["tokens_per_forward"] for run in found], 2)]
        one_a_step = [run["one_a_step"] for run in found if run.get("one_a_step") is not None]
        cells += [spread(one_a_step) if one_a_step else ""] if careful else []
        cells += ["" if found[0]["gap"] is None else spread([run["gap"] for run in found], 3)]
        cells += [tokens_to(share, found, base["mean"]) for share in SHARES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def of(runs: list[dict[str, Any]], recipe: str) -> list[dict[str, Any]]:
    return [run for run in runs if run["recipe"] == recipe]


def picture(runs: list[dict[str, Any]], base: dict[str, Any], path: Path) -> None:
    """Exact match and tokens per forward of every recipe."""
    from matplotlib.figure import Figure

    names = sorted({run["recipe"] for run in runs}, key=lambda name: statistics.mean(r["mean"] for r in of(runs, name)))
    figure = Figure(figsize=(9, 0.36 * len(names) + 1.2), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    for axes, key in ((left, "mean"), (right, "tokens_per_forward")):
        for place, name in enumerate(names):
            values = [run[key] for run in of(runs, name)]
            axes.barh(place, statistics.mean(values), color="C0" if key == "mean" else "C1", alpha=0.6)
            axes.plot(values, [place] * len(values), "k.", markersize=4)
    left.axvline(base["mean"], color="black", linewidth=1)
    left.set(xlabel="exact match, % (line: AR base; dots: seeds)", yticks=range(len(names)), yticklabels=names)
    right.set(xlabel="tokens per forward")
    figure.savefig(path, dpi=120)


def report(output: Path, examples: int) -> None:
    runs = [json.loads(line) for line in output.with_suffix(".jsonl").read_text().splitlines()]
    base = base_report(examples)
    steps = " to ".join(str(n) for n in sorted({run["steps"] for run in runs}))
    title = f"{steps} steps, about {statistics.mean(run['tokens'] for run in runs) / 1000:,.0f}k tokens a run"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    text = (
        f"# Recipes at matched tokens\n\n`python benchmarks/recipes.py`: {title}; {device}. Exact match in percent on {examples} "
        f"held-out prompts, mean ± standard deviation over seeds.\n\n{table(runs, base)}\n\n![recipes]({output.name}.png)\n"
    )
    output.with_suffix(".md").write_text(text)
    picture(runs, base, output.with_suffix(".png"))
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("output/recipes"), help="where .jsonl, .md and .png go")
    parser.add_argument("--only", nargs="*", choices=RECIPES, default=list(RECIPES), metavar="RECIPE")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--milestones", type=int, default=4)
    parser.add_argument("--examples", type=int, default=480)
    parser.add_argument("--careful", action="store_true", help="answer once more, one token a step")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--orders", action="store_true", help="decode one bidirectional model in many orders")
    args = parser.parse_args()
    if args.orders:
        text = (
            f"# The order of commits of a bidirectional model\n\n`python benchmarks/recipes.py --orders --steps {args.steps} --examples "
            f"{args.examples}`: one model, LoRA r 64, exact mask counts, {args.steps} steps of 32 rows. Exact match in percent. Blocks come "
            f"into being one after the other; the whole canvas is one block of 80.\n\n{orders(args.steps, args.examples)}\n"
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.with_name("orders.md").write_text(text)
        print(text)
        return
    lines = args.output.with_suffix(".jsonl")
    lines.parent.mkdir(parents=True, exist_ok=True)
    lines.touch()
    for seed, recipe in itertools.product([] if args.report else args.seeds, args.only):
        done = {(run["recipe"], run["seed"], run["steps"]) for run in map(json.loads, lines.read_text().splitlines())}
        if (recipe, seed, args.steps) in done:
            continue
        result = run(recipe, seed, args.steps, args.batch_size, args.milestones, args.examples, args.careful)
        with lines.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(f"{recipe}, seed {seed}: {result['mean']:.1f} in {result['seconds']:.0f} s", flush=True)
    report(args.output, args.examples)


if __name__ == "__main__":
    main()
