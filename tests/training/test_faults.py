"""Steps that go wrong: memory that runs out, a loss that is no number, a process that dies while it saves, a disk that is full."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from small_trainers import LORA, make
from transformers.trainer_utils import get_last_checkpoint

from llm_diffusion.analysis import PAGED, ModelMemory, TrainingSetup
from llm_diffusion.training.trainer import _single_changes

SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def test_a_loss_that_is_no_number_stops_before_the_weights(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, max_steps=3)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    plain = trainer._part_loss
    trainer._part_loss = lambda *args: tuple(value * float("nan") for value in plain(*args))
    with pytest.raises(FloatingPointError, match="nan at step 0; the weights are as they were"):
        trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))
    kept = json.loads((tmp_path / "bad_batch-0.json").read_text())
    assert kept["step"] == 0 and len(kept["batch"]["input_ids"]) == 4 and "noise_rows" in kept["batch"]


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gradient_that_is_no_number_stops_before_the_weights(tmp_path, tokenizer, value, max_grad_norm):
    """Of a loss that is one; a checkpoint of it would be lost work."""
    trainer = make(tmp_path, tokenizer, max_steps=3, max_grad_norm=max_grad_norm, save_strategy="steps", save_steps=1)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    next(trainer.model.parameters()).register_hook(lambda gradient: gradient * value)
    with pytest.raises(FloatingPointError, match=f"the gradient is {value} at step 0.* the weights are as they were"):
        trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))
    assert not list(tmp_path.glob("checkpoint-*"))


def test_out_of_memory_says_which_three_settings_to_change(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, peft_config=LORA, max_length=32, random_canvas=0.0)

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore lines.")

    trainer.model.forward = full
    with pytest.raises(torch.OutOfMemoryError) as caught:
        trainer.train()
    text = str(caught.value)
    assert (
        text.startswith("CUDA out of memory. Tried to allocate 2.00 GiB. A step of 4 x ") and "More lines" not in text
    )
    assert (
        text.count("->") >= 3 and "per_device_train_batch_size 4 -> 2 with gradient_accumulation_steps 1 -> 2" in text
    )
    length = int(text.split("A step of 4 x ")[1].split()[0])
    memory = ModelMemory(trainer.model.get_base_model().config)
    halved = memory.training(TrainingSetup("lora", 2, length, 4, gradient_checkpointing=False), "cpu")["total"]
    assert f"1 -> 2 ({halved:.2f} GiB)" in text


def test_only_changes_that_can_be_made_are_tried():
    """Of a full fine-tuning that has used up the others."""
    setup = TrainingSetup("full", 1, 64, gradient_checkpointing=True, optimizer=PAGED)
    changes = list(_single_changes(setup, SimpleNamespace(gradient_accumulation_steps=8)))
    assert [text for text, _ in changes] == ["max_length 64 -> 32", "all weights -> LoRA"]
    assert [(changed.kind, changed.length) for _, changed in changes] == [("full", 32), ("lora", 64)]


def test_other_errors_come_through(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)

    def wrong(*args, **kwargs):
        raise RuntimeError("shapes do not match")

    trainer.model.forward = wrong
    with pytest.raises(RuntimeError, match="shapes do not match"):
        trainer.train()


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, tokenizer):
    straight = make(tmp_path / "a", tokenizer, peft_config=LORA, **SAVING)
    straight.train()
    trainer = make(tmp_path / "b", tokenizer, peft_config=LORA, save_total_limit=1, **SAVING)
    plain = trainer._save_rng_state

    def full(folder):
        if trainer.state.global_step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        plain(folder)

    trainer._save_rng_state = full
    with pytest.raises(OSError, match="No space left"):
        trainer.train()
    assert [path.name for path in (tmp_path / "b").iterdir() if path.is_dir()] == ["checkpoint-2"]
    again = make(tmp_path / "b", tokenizer, peft_config=LORA, save_total_limit=1, **SAVING)
    again.train(resume_from_checkpoint=True)
    assert losses(again)[-2:] == losses(straight)[-2:]
    assert [path.name for path in (tmp_path / "b").glob("checkpoint-*")] == ["checkpoint-4"]


def test_the_best_checkpoint_is_found_by_its_name(tmp_path, tokenizer):
    from llm_diffusion.data.tiny import tiny_dataset

    settings = {
        **SAVING,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    }
    trainer = make(tmp_path, tokenizer, peft_config=LORA, evaluation=tiny_dataset(4, split="test"), **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path and best.is_dir() and not (tmp_path / ".unfinished").exists()
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


KILLED = """
import json, os, signal, sys
sys.path.insert(0, {tests!r})
from small_trainers import LORA, make
from transformers import AutoTokenizer
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
trainer = make({output!r}, AutoTokenizer.from_pretrained(TINY_MODEL_PATH), peft_config=LORA, **json.loads({settings!r}))
plain = trainer._save_rng_state
def die(*args):
    if trainer.state.global_step == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(*args)
trainer._save_rng_state = die
trainer.train()
"""


@pytest.mark.slow  # tests/test_kills.py kills at the same moment
def test_a_run_that_is_killed_while_it_saves_goes_on_to_the_digit(tmp_path, tokenizer):
    own = {"distillation_weight": 1.0, "distillation_targets": "all", "on_policy_share": 0.5}
    settings = {**SAVING, **own, "max_steps": 5, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    straight = make(tmp_path / "a", tokenizer, peft_config=LORA, **settings)
    straight.train()
    script = KILLED.format(
        tests=str(Path(__file__).parents[1]), output=str(tmp_path / "b"), settings=json.dumps(settings)
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert Path(get_last_checkpoint(str(tmp_path / "b"))).name == "checkpoint-2"
    assert (tmp_path / "b" / ".unfinished").exists()
    again = make(tmp_path / "b", tokenizer, peft_config=LORA, **settings)
    again.train(resume_from_checkpoint=True)
    assert losses(again)[-3:] == pytest.approx(
        losses(straight)[-3:], rel=1e-6
    )  # kernels may round by where memory lies
    assert not (tmp_path / "b" / ".unfinished").exists()
