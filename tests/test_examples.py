"""The example scripts, as a user runs them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_diffusion.tiny import KINDS, LEFT_TO_RIGHT_KINDS, TINY_MODEL_PATH

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
