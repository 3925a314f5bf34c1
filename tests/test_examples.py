"""The example scripts, as a user runs them."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_diffusion import load_diffusion_model
from llm_diffusion.data.tiny import KINDS, LEFT_TO_RIGHT_KINDS
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

SCRIPT = Path(__file__).parent.parent / "examples" / "train_tiny_base.py"


def run(*arguments):
    result = subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {kind: float(re.search(rf"^  {kind} +([\d.]+)$", result.stdout, re.MULTILINE)[1]) for kind in KINDS}


@pytest.mark.slow
def test_the_shipped_base_is_right_on_what_a_left_to_right_model_can_do():
    scores = run("--output", str(TINY_MODEL_PATH), "--eval-only")
    assert min(scores[kind] for kind in LEFT_TO_RIGHT_KINDS) >= 95


@pytest.mark.slow
def test_the_base_can_be_trained_from_scratch(tmp_path):
    scores = run("--output", str(tmp_path / "base"), "--steps", "1", "--batch-size", "4", "--device", "cpu")
    assert max(scores.values()) < 50  # one step teaches nothing
    assert (tmp_path / "base" / "model.safetensors").stat().st_size < 4_000_000
    assert (tmp_path / "base" / "tokenizer.json").read_text() == (TINY_MODEL_PATH / "tokenizer.json").read_text()


@pytest.fixture
def saved(tmp_path):
    """The embedded base as a diffusion model on disk."""
    for part in load_diffusion_model("tiny", device="cpu"):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def train(script, model, output, *arguments):
    """Runs an example on the CPU; what it says, and what it has saved."""
    where = ["--model", model, "--output", str(output), "--device", "cpu"]
    command = [sys.executable, str(SCRIPT.parent / script), *where, *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    trained, tokenizer = load_diffusion_model(str(output), device="cpu")
    assert trained.get_base_model().config.diffusion["mask_token_id"] == tokenizer.mask_token_id
    return result.stdout


def test_preferences_in_one_file(tmp_path, saved):
    rows = [{"prompt": "2+3=", "chosen": "5", "rejected": "6"}, {"prompt": "2+4=", "chosen": "6", "rejected": "5"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 2))
    how = ["--pairs", str(tmp_path / "pairs.jsonl"), "--batch-size", "2", "--accumulation", "1"]
    assert "preferred" in train("dpo.py", saved, tmp_path / "out", *how, "--steps", "5", "--draws", "2")


def test_rewards_in_one_file(tmp_path, saved):
    said = train("grpo.py", saved, tmp_path / "out", "--steps", "2", "--rollouts", "8", "--length", "8")
    assert said.count("\nstep ") == 2
