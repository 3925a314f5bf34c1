"""Dealing and gathering, and the figures of two processes, which are those of one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import llm_diffusion as ld
from llm_diffusion.evaluation.processes import (
    dealt,
    gathered,
    in_order,
    over_processes,
    place,
)
from llm_diffusion.main import cli

ROOT = Path(__file__).parents[2]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.parametrize(("n", "count"), [(7, 3), (3, 3), (2, 3), (0, 2), (5, 1)])
def test_what_is_dealt_comes_back_in_order(n, count, monkeypatch):
    hands = []
    for index in range(count):
        monkeypatch.setattr("llm_diffusion.evaluation.processes.place", lambda index=index: (index, count))
        hands.append(list(dealt(range(n))))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    assert in_order(hands) == list(range(n))


def test_one_process_does_everything():
    assert place() == (0, 1) and gathered("all") == ["all"] and dealt([1, 2], split=False) == [1, 2]
    assert over_processes(lambda items: [2 * item for item in items], [3, 1]) == [6, 2]
    assert over_processes(lambda items: 1 / 0, []) == []


def differing(one, other, path=""):
    """Paths at which two results differ by more than rounding; speeds apart."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [p for k in one if "second" not in k for p in differing(one[k], other[k], f"{path}/{k}")]
    if isinstance(one, list):
        assert len(one) == len(other)
        return [p for i, (a, b) in enumerate(zip(one, other, strict=True)) for p in differing(a, b, f"{path}/{i}")]
    if isinstance(one, float):
        return [] if math.isclose(one, other, rel_tol=1e-4, abs_tol=1e-4) else [f"{path}: {one} {other}"]
    return [] if one == other else [f"{path}: {one} {other}"]


@pytest.mark.slow  # processes of their own
def test_two_processes_write_the_one_report_of_one(tmp_path):
    pytest.importorskip("lm_eval")
    model, tokenizer = ld.load_diffusion_model("tiny", device="cpu")
    model.config.diffusion = {**model.config.diffusion, "conversion_steps": 1}
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    puzzles = [{"input": f"{i},2,3,{i + 5}", "output": f"{i}+2={i + 2},{i + 2}+3={i + 5}"} for i in range(3)]
    for name, rows in {"cd3_test": puzzles, "lambada_test": [{"text": "Tom has 23 apples."}] * 3}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    # A text twice, with noise of its own.
    (tmp_path / "a.jsonl").write_text('{"text": "Tom has 23 apples."}\n' * 2 + '{"text": "Sort the letters"}\n')
    command = [
        "evaluate",
        str(tmp_path / "model"),
        "--prompts",
        "tiny",
        "--limit",
        "3",
        "--text",
        str(tmp_path / "a.jsonl"),
    ]
    command += ["--tasks", "countdown3,lambada_openai", "--data", str(tmp_path), "--num-fewshot", "0"]
    command += ["--settings", '{"max_new_tokens": 6, "threshold": 0.9}', "--samples", "16", "--batch-size", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    launch = [*TORCHRUN, "-m", "llm_diffusion.main", *command, "--output", str(tmp_path / "two")]
    done = subprocess.run(launch, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("report:") == 1
    alone = CliRunner().invoke(cli, [*command, "--output", str(tmp_path / "one")])
    assert alone.exit_code == 0, alone.output
    both, one = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("two", "one"))
    assert (both["settings"]["processes"], one["settings"]["processes"]) == (2, 1)
    assert len(both["samples"]) == 3 and both["models"]["converted"]["tasks"]
    figures = ("models", "levels", "paired", "worked", "samples")
    assert differing(*({name: found[name] for name in figures} for found in (both, one))) == []
