"""Answers during training: what reaches the log is what `evaluate_answers` says, of one process or two."""

import json
import os
import subprocess
import sys

import pytest
from small_trainers import make
from transformers import TrainerCallback

from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.evaluation.calibration import eos_positions
from llm_diffusion.evaluation.callbacks import AnswersCallback, _answer_metrics

SETTINGS = {"max_new_tokens": 8, "threshold": 0.9}


class Listener(TrainerCallback):
    """Stands where wandb, trackio and tensorboard stand: gets what they get."""

    def __init__(self) -> None:
        self.heard = []

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        self.heard.append(dict(logs))


def test_answers_reach_every_listener(tmp_path, tokenizer) -> None:
    examples, listener = list(tiny_dataset(6, split="test")), Listener()
    trainer = make(tmp_path, tokenizer, evaluation=tiny_dataset(4, split="test"))
    trainer.add_callback(AnswersCallback(trainer, examples, **SETTINGS))
    trainer.add_callback(listener)
    metrics = trainer.evaluate()
    (logged,) = [logs for logs in listener.heard if "eval_samples" in logs]
    report = evaluate_answers(trainer.model, trainer.processing_class, examples, **SETTINGS)
    assert logged["eval_exact_match"] == report.mean == metrics["eval_exact_match"]
    assert logged["eval_tokens_per_forward"] == pytest.approx(report.tokens_per_forward)
    ends = eos_positions(trainer.processing_class, examples, report)["accuracy"]
    assert logged["eval_eos_accuracy"] == pytest.approx(ends)
    for example, answer in list(zip(examples, report.answers, strict=True))[:4]:
        assert f"{example['messages'][0]['content']} -> {answer} (reference:" in logged["eval_samples"]
    json.dumps(trainer.state.log_history)  # it is saved with every checkpoint


def test_metrics_by_hand() -> None:
    rows = [
        {"kind": "a", "right": True, "ends": True, "rate": 2.0},
        {"kind": "a", "right": False, "ends": True, "rate": 2.0},
        {"kind": "b", "right": True, "ends": False, "rate": 5.0},
    ]
    assert _answer_metrics(rows) == {
        "eval_exact_match": 75.0,
        "eval_exact_match_a": 50.0,
        "eval_exact_match_b": 100.0,
        "eval_eos_accuracy": pytest.approx(200 / 3),
        "eval_tokens_per_forward": 3.0,
    }
    assert "eval_exact_match_b" not in _answer_metrics(rows[2:])


def test_nothing_to_answer_is_refused(tmp_path, tokenizer) -> None:
    with pytest.raises(ValueError, match="`examples` are empty"):
        AnswersCallback(make(tmp_path, tokenizer), [])


TWO = """
import json, sys
from small_trainers import make
from transformers import AutoTokenizer
from llm_diffusion.evaluation.callbacks import AnswersCallback
from llm_diffusion.data.tiny import TINY_MODEL_PATH, tiny_dataset

trainer = make(sys.argv[1], AutoTokenizer.from_pretrained(TINY_MODEL_PATH), evaluation=tiny_dataset(4, split="test"))
trainer.add_callback(AnswersCallback(trainer, list(tiny_dataset(5, split="test")), max_new_tokens=8, threshold=0.9))
metrics = trainer.evaluate()
if trainer.is_world_process_zero():
    print("FOUND", json.dumps({name: value for name, value in metrics.items() if "match" in name or "eos" in name}))
"""


@pytest.mark.slow
def test_two_processes_say_the_same(tmp_path, request) -> None:
    (tmp_path / "run.py").write_text(TWO)
    found = []
    for launcher in ([], ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]):
        result = subprocess.run(
            [sys.executable, *launcher, str(tmp_path / "run.py"), str(tmp_path)],
            env={**os.environ, "PYTHONPATH": f"{request.config.rootpath}:{request.config.rootpath}/tests"},
            capture_output=True,
            text=True,
        )
        lines = [line for line in result.stdout.splitlines() if line.startswith("FOUND")]
        assert len(lines) == 1, result.stderr[-2000:]
        found.append(json.loads(lines[0][6:]))
    assert found[0] == pytest.approx(found[1])
