"""A GPT-2 from nothing on real text, and what it becomes: tokens a second against perplexity, and where its sentences end.

    python benchmarks/starts.py --data wikitext.txt --tokenizer gpt2 --output benchmarks/results/starts-cpu
    python benchmarks/starts.py --data wikitext.txt --steps 20 --examples 8

Sentences of a text file: the first half of the words is given, the rest is to be written. One GPT-2 is trained from left to right by TRL, then
converted three times at the same number of steps: to full attention as it comes, with canvases that teach where answers end, and to blocks.

judged: nats a token of what was written, prompt given, under the model from left to right; the true sentences beside it. Low alone proves
little, text that repeats itself is likely too: distinct-2 is the share of pairs of words that are new.
"""

from __future__ import annotations

import argparse
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from lengths import table
from recipes import CO_LOSS, common_settings
from trl import SFTConfig, SFTTrainer

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.evaluation.metrics import COLUMNS, distinct_n, foresee_ends
from llm_diffusion.evaluation.statistics import nll_per_token
from llm_diffusion.generation.inference import continue_autoregressive
from llm_diffusion.models.conversion import convert_to_diffusion
from llm_diffusion.models.loading import scratch_model

SHAPE = {"n_embd": 128, "n_layer": 4, "n_head": 4, "n_positions": 256}
CANVAS = 48
SIZED = {"max_canvas": CANVAS, "random_canvas": 0.5, "first_step_share": 0.25}
CONVERSIONS: dict[str, dict[str, Any]] = {
    "full attention": {"attention": "bidirectional", "eos_tail": 0, "random_canvas": 0.0},
    "full attention, ends trained": {"attention": "bidirectional", **SIZED},
    "blocks of 4": CO_LOSS,
}
SAMPLED = {"do_sample": True, "temperature": 0.7, "max_new_tokens": CANVAS}
WAYS: dict[str, dict[str, Any]] = {
    "one word a step": {"steps": CANVAS},
    "threshold 0.9": {"threshold": 0.9},
    "threshold 0.5": {"threshold": 0.5},
    "two words a step": {"steps": CANVAS // 2},
    "four words a step": {"steps": CANVAS // 4},
    "eight words a step": {"steps": CANVAS // 8},
}


def sentences(path: Path, seed: int = 0) -> list[dict[str, str]]:
    """Sentences of 10 to 40 words, each cut in half, in a seeded order.

    Raises:
        SystemExit: a file with too few of them.
    """
    found = [part.split() for part in re.split(r"(?<=[.!?])\s+|\n+", path.read_text(encoding="utf-8"))]
    found = [words for words in found if 10 <= len(words) <= 40 and words[-1][-1] in ".!?"]
    if len(found) < 100:
        raise SystemExit(f"--data: {len(found)} sentences of 10 to 40 words in {path}; 100 are needed.")
    random.Random(seed).shuffle(found)
    halves = ((words[: len(words) // 2], words[len(words) // 2 :]) for words in found)
    return [{"prompt": " ".join(start), "completion": " " + " ".join(rest)} for start, rest in halves]


def train(
    kind: type, config: type, model: torch.nn.Module, tokenizer: Any, rows: Dataset, steps: int, **rest: Any
) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        settings = {**common_settings(steps, 16, 0, 2e-3), "bf16": False, "max_length": 128, **rest}
        trainer = kind(model, config(folder, **settings), train_dataset=rows, processing_class=tokenizer)
        trainer.train()
    return trainer.model.eval()


def judged(judge: torch.nn.Module, tokenizer: Any, rows: list[dict], answers: list[str]) -> list[str]:
    answers = [f" {answer.strip()}" for answer in answers]
    nats = nll_per_token(judge, tokenizer, [row["prompt"] for row in rows], answers)
    return [f"{nats:.2f}", f"{distinct_n(answers, 2):.2f}"]


def written(model: torch.nn.Module, tokenizer: Any, judge: torch.nn.Module, rows: list[dict], **how: Any) -> list[str]:
    """Tokens a second in one batch, tokens a forward, judged nats a token, distinct-2."""
    report = evaluate_answers(model, tokenizer, rows, **SAMPLED, **how)
    speed = sum(report.tokens) / report.seconds
    return [f"{speed:.0f}", f"{report.tokens_per_forward:.2f}", *judged(judge, tokenizer, rows, report.answers)]


def from_left(judge: torch.nn.Module, tokenizer: Any, rows: list[dict]) -> list[str]:
    """The same of the model from left to right, by the host's own `generate`."""
    started = time.perf_counter()
    answers = continue_autoregressive(judge, tokenizer, [row["prompt"] for row in rows], **SAMPLED)
    seconds = time.perf_counter() - started
    tokens = sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)
    return [f"{tokens / seconds:.0f}", "1.00", *judged(judge, tokenizer, rows, answers)]


def picture(rows: list[list[str]], path: Path) -> None:
    from matplotlib.figure import Figure  # slow to import, needed once; `Figure` alone touches no display

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in dict.fromkeys(row[0] for row in rows):
        points = sorted((float(row[4]), float(row[2])) for row in rows if row[0] == name)
        axes.plot(*zip(*points, strict=True), "o-", label=name)
    axes.set(xlabel="nats a token, judged by the model from left to right", ylabel="tokens a second", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--tokenizer", default="gpt2", help="hub name or folder")
    parser.add_argument("--steps", type=int, default=300, help="of every training")
    parser.add_argument("--examples", type=int, default=32, help="held-out sentences")
    parser.add_argument("--output", type=Path, help="where .md and .png go")
    args = parser.parse_args()
    found = sentences(args.data)
    held_out, rows = found[: args.examples], Dataset.from_list(found[args.examples :])
    judge, tokenizer = scratch_model(SHAPE, args.tokenizer)
    weights = train(SFTTrainer, SFTConfig, judge, tokenizer, rows, args.steps, completion_only_loss=False).state_dict()

    def trained() -> tuple[torch.nn.Module, Any]:
        """The model from left to right, free of what its trainer left on it."""
        model, words = scratch_model(SHAPE, args.tokenizer)
        model.load_state_dict(weights)
        return model, words

    judge, _ = trained()
    prompts, references = ([row[side] for row in held_out] for side in ("prompt", "completion"))
    true = nll_per_token(judge, tokenizer, prompts, references)
    lines = [["model", "decoding", "tokens/s", "tokens/forward", "judged", "distinct-2"]]
    raw, words = trained()
    convert_to_diffusion(raw, words)
    lines.append(["AR", "from left to right", *from_left(judge, tokenizer, held_out)])
    lines.append(["AR, not converted", "one word a step", *written(raw, words, judge, held_out, steps=CANVAS)])
    print(table(lines), flush=True)
    ends = [["training", "answer shown", *COLUMNS]]
    for name, settings in CONVERSIONS.items():
        model, words = trained()
        model = train(DiffusionSFTTrainer, DiffusionSFTConfig, model, words, rows, args.steps, **settings)
        if settings["attention"] == "bidirectional":
            for share, row in foresee_ends(model, words, held_out, CANVAS).table.items():
                ends.append([name, f"{share:.0%}", *(f"{row[column]:.3f}" for column in COLUMNS)])
        ways = {way: WAYS[way] for way in WAYS if settings["attention"] != "block" or "steps" not in WAYS[way]}
        if "first_step_share" in settings:
            ways |= {
                f"{way}, sized canvas": {**how, "length_quantile": 0.9}
                for way, how in WAYS.items()
                if "steps" not in how
            }
        for way, how in ways.items():
            lines.append([name, way, *written(model, words, judge, held_out, **how)])
            print(lines[-1], flush=True)
    text = (
        f"# A GPT-2 from nothing, and what it becomes\n\n`python benchmarks/starts.py --steps {args.steps}` on {args.data.name}: "
        f"{SHAPE}, vocabulary {len(tokenizer):,}, {args.steps} steps of 16 sentences for every training; {args.examples} held-out "
        f"sentences in one batch, sampled at temperature 0.7, CPU.\n\n{table(lines)}\n\n"
        f"The true second halves: {true:.2f} nats a token, distinct-2 {distinct_n(references, 2):.2f}.\n\n"
        f"The end of the sentence foreseen on a canvas of {CANVAS}:\n\n{table(ends)}\n"
    )
    print(text)
    if args.output:
        args.output.with_suffix(".md").write_text(f"{text}\n![speed against likelihood]({args.output.name}.png)\n")
        picture(lines[1:], args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
