"""Kills at random moments: how many of them cost a run nothing.

    python benchmarks/kills.py --kills 63 --output benchmarks/results/kills.md
    python benchmarks/kills.py --kills 9

Each command runs once to its end, and then again and again: killed at a random moment of its work (SIGKILL), and given once more, training
with `--resume`. A kill is survived when the files of the result are the same, byte for byte, as without it; and when before the second run
no file of them had its name without being whole. Two kills in three are followed by a second kill, of the resumed run.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lengths import table

COMMAND = [sys.executable, "-m", "llm_diffusion.main"]
TRAINING: dict[str, Any] = {
    "dataset": "tiny",
    "model": "tiny",
    "max_examples": 16,
    "test_size": 4,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_length": 128,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "save_strategy": "steps",
    "save_steps": 1,
    "device": "cpu",
    "eval_examples": 0,
    "lora_config": {"r": 4, "lora_dropout": 0.1},
    "generation": {"max_new_tokens": 8},
}
BEST = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 2}
STAGES = [{"name": "attention", "trains": "attention", "annealing": "soft", "completion_only_loss": False}]
STAGES += [{"name": "diffusion", "completion_only_loss": False}, {"name": "recovery", "trains": "everything"}]
JOBS: dict[str, dict[str, Any]] = {
    "pretrain": {"phases": ["pretrain"]},
    "sft": {"phases": ["pretrain", "sft"]},
    "dpo": {"phases": ["sft", "dpo"], "dpo_config": {"max_steps": 4, "num_draws": 1}},
    "three stages": {"stages": STAGES, **BEST},
    "lossless": {"phases": ["sft"], "attention": "lossless", "block_length": 8, "answers_from_base": True},
    "full fine-tuning": {"phases": ["sft"], "use_lora": False},
    "left to right": {"phases": ["pretrain"], "pipeline": "arm", "generation": {}},
}
OTHERS: dict[str, list[str]] = {
    "prepare-data": ["prepare-data", "{texts}", "--model", "tiny", "--length", "64", "--output", "{out}"],
    "prefer": ["prefer", "tiny", "--limit", "4000", "--output", "{out}"],
}


def command(name: str, out: Path, texts: Path) -> list[str]:
    if name in JOBS:
        return [*COMMAND, "--hyper-parameters-json", json.dumps({**TRAINING, **JOBS[name], "output_dir": str(out)})]
    return [*COMMAND, *(word.format(out=out, texts=texts) for word in OTHERS[name])]


def result(out: Path) -> dict[str, bytes]:
    """What the result is made of: weights of every phase, rows of prepared data, pairs. Times and folders' names are left out."""
    files = [out] * out.is_file() + [*out.glob("*_model/*.safetensors"), *out.glob("*/*.arrow")]
    return {str(file.relative_to(out.parent)): file.read_bytes() for file in files}


def run(arguments: list[str], out: Path, after: float | None = None) -> tuple[float, bool]:
    """Runs to the end, or kills so many seconds after the work began; the seconds of work, and whether it was killed."""
    began = None
    with subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        while process.poll() is None:
            if began is None and (out.exists() or "--hyper-parameters-json" not in arguments):
                began = time.perf_counter()
            if after is not None and began is not None and time.perf_counter() - began >= after:
                process.kill()
            time.sleep(0.001)
        if process.returncode not in (0, -9):
            raise SystemExit(f"{' '.join(arguments)}: {process.stderr.read().decode()}")
    return time.perf_counter() - (began or 0), process.returncode == -9


def kills(name: str, folder: Path, texts: Path, n: int, chance: random.Random) -> Iterator[bool]:
    """Whether each of `n` kills was survived."""
    out = folder / "straight" / "out"
    out.parent.mkdir(parents=True)
    seconds, _ = run(command(name, out, texts), out)
    want, resume = result(out), ["--resume"] * (name in JOBS)
    assert want, f"{name} left nothing in {out}"
    first = 0 if name in JOBS else seconds / 2  # the others import for most of their time
    for number in range(n):
        out, killed = folder / str(number) / "out", False
        arguments = command(name, out, texts)
        while not killed:  # the moment may come too late
            shutil.rmtree(out.parent, ignore_errors=True)
            out.parent.mkdir()
            _, killed = run(arguments, out, chance.uniform(first, seconds))
        if chance.random() < 2 / 3 and not (out.exists() and name in OTHERS):
            run([*arguments, *resume], out, chance.uniform(first, seconds))
        early = result(out)  # what has its name is whole
        if name in JOBS or not early:
            run([*arguments, *resume], out)
        yield all(want[file] == found for file, found in early.items()) and result(out) == want
        shutil.rmtree(out.parent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=63, help="of all commands together")
    parser.add_argument("--only", nargs="*", default=[*JOBS, *OTHERS], help="names of commands")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows, chance = [], random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        texts = Path(folder) / "texts.txt"
        texts.write_text("".join(f"Tom has {n} apples and Ann has {n * 7 % 13} books.\n" for n in range(40_000)))
        for number, name in enumerate(args.only):
            n = args.kills // len(args.only) + (number < args.kills % len(args.only))
            survived = list(kills(name, Path(folder) / str(number), texts, n, chance))
            rows.append([name, f"{sum(survived)} of {n}"])
            print(*rows[-1], flush=True)
    tried = sum(int(row[1].split()[-1]) for row in rows)
    rows.append(["all", f"{sum(int(row[1].split()[0]) for row in rows)} of {tried}"])
    page = f"# Kills survived\n\n`python benchmarks/kills.py --kills {args.kills} --seed {args.seed}`\n\n"
    page += table([["command", "survived"], *rows]) + "\n"
    print(page)
    if args.output:
        args.output.write_text(page)
    if not all(row[1].split()[0] == row[1].split()[-1] for row in rows):
        sys.exit("not every kill was survived")


if __name__ == "__main__":
    main()
