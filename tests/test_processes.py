"""Dealing and gathering, and the figures of two processes, which are those of one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_diffusion.processes import dealt, gathered, in_order, over_processes, place

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


@pytest.mark.parametrize(("n", "count"), [(7, 3), (3, 3), (2, 3), (0, 2), (5, 1)])
def test_what_is_dealt_comes_back_in_order(n, count, monkeypatch):
    hands = []
    for index in range(count):
        monkeypatch.setattr("llm_diffusion.processes.place", lambda index=index: (index, count))
        hands.append(list(dealt(range(n))))
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    assert in_order(hands) == list(range(n))


def test_one_process_does_everything():
    assert place() == (0, 1) and gathered("all") == ["all"] and dealt([1, 2], split=False) == [1, 2]
    assert over_processes(lambda items: [2 * item for item in items], [3, 1]) == [6, 2]
    assert over_processes(lambda items: 1 / 0, []) == []


TWO = """
import copy, json, sys
import llm_diffusion as ld
from llm_diffusion.processes import place
from llm_diffusion.tiny import tiny_dataset

model, tokenizer = ld.load_diffusion_model("tiny", device="cpu")
model.config.diffusion = {**model.config.diffusion, "conversion_steps": 1}
texts = ["Tom has 23 apples.", "Sort the letters: k d e a", "Tom has 23 apples."]  # one twice, with noise of its own
examples = list(tiny_dataset(5, split="test", kinds=("sort", "arithmetic")))
options = {"decoding": {"max_new_tokens": 6, "threshold": 0.9}, "n_samples": 16, "batch_size": 2}
tasks = ["countdown3", "lambada_openai"]
for split in (True, False)[: 2 - place()[0]]:  # together, then the first process alone
    found = ld.evaluate(
        model, tokenizer, texts=texts, examples=examples, tasks=tasks, data=sys.argv[1], num_fewshot=0, split=split, **options
    )
    if place()[0] == 0:
        timeless = {k: found[k] for k in ("models", "levels", "paired", "worked", "samples")}
        print("FOUND", json.dumps(timeless))
assert place()[1] == 2
"""


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


def launched(*command):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
def test_two_processes_say_what_one_says(tmp_path):
    pytest.importorskip("lm_eval")
    puzzles = [{"input": f"{i},2,3,{i + 5}", "output": f"{i}+2={i + 2},{i + 2}+3={i + 5}"} for i in range(3)]
    for name, rows in {"cd3_test": puzzles, "lambada_test": [{"text": "Tom has 23 apples."}] * 3}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.py").write_text(TWO)
    said = launched(*TORCHRUN, str(tmp_path / "run.py"), str(tmp_path))
    both, alone = (json.loads(line[6:]) for line in said.splitlines() if line.startswith("FOUND"))
    assert len(both["samples"]) == 5 and both["models"]["converted"]["tasks"]
    assert differing(both, alone) == []


@pytest.mark.slow
def test_the_command_writes_one_report(tmp_path):
    (tmp_path / "a.txt").write_text("Tom has 23 apples. Tom gets 45 more.")
    command = ["-m", "llm_diffusion.main", "evaluate", "tiny", "--prompts", "tiny", "--limit", "3"]
    said = launched(*TORCHRUN, *command, "--text", str(tmp_path / "a.txt"), "--output", str(tmp_path / "out"))
    assert said.count("report:") == 1
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["settings"]["processes"] == 2 and len(found["samples"]) == 3
    assert found["models"]["AR base"]["likelihood"]["texts"] == 1
