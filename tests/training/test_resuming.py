"""Checkpoints that are damaged are passed over, and a resumed run ends with the very weights of the run that was not stopped."""

import json
import logging
import shutil

import pytest
import torch
from small_trainers import LORA, make
from transformers import AutoTokenizer

from llm_diffusion import UserError
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.training.resuming import checkpoint_of, last_checkpoint

SAVING = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2, "max_length": 64}


def trainer_in(folder, **settings):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    return make(folder, tokenizer, peft_config=LORA, **{**SAVING, **settings})


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run with a checkpoint at each of its three steps, and its weights."""
    folder = tmp_path_factory.mktemp("finished")
    trainer = trainer_in(folder)
    trainer.train()
    return folder, weights(trainer)


def halve(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


DAMAGES = {
    "weights": (lambda c: halve(c / "adapter_model.safetensors"), "adapter_model.safetensors is damaged"),
    "no weights": (
        lambda c: (c / "adapter_model.safetensors").unlink(),
        "it has no adapter_model.safetensors or model.safetensors",
    ),
    "optimizer": (lambda c: halve(c / "optimizer.pt"), "optimizer.pt is damaged"),
    "no optimizer": (lambda c: (c / "optimizer.pt").unlink(), "it has no optimizer.pt"),
    "no scheduler": (lambda c: (c / "scheduler.pt").unlink(), "it has no scheduler.pt"),
    "noise": (lambda c: halve(c / "rng_state.pth"), "rng_state.pth is damaged"),
    "state": (lambda c: halve(c / "trainer_state.json"), "trainer_state.json is damaged"),
    "empty state": (lambda c: (c / "trainer_state.json").write_text(""), "trainer_state.json is damaged"),
    "no state": (lambda c: (c / "trainer_state.json").unlink(), "it has no trainer_state.json"),
    "record": (lambda c: halve(c / "diffusion_config.json"), "diffusion_config.json is damaged"),
}


@pytest.fixture(scope="module")
def asking(tmp_path_factory):
    """A trainer that only looks for checkpoints."""
    return trainer_in(tmp_path_factory.mktemp("asking"))


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(case, finished, asking, tmp_path, caplog):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    asking.args.output_dir = str(tmp_path)
    (tmp_path / "checkpoint-abc").mkdir()
    assert checkpoint_of(asking, True) == str(tmp_path / "checkpoint-3") and not caplog.records
    damage, said = DAMAGES[case]
    damage(tmp_path / "checkpoint-3")
    with caplog.at_level(logging.WARNING):
        assert checkpoint_of(asking, True) == str(tmp_path / "checkpoint-2")
    assert [record.getMessage() for record in caplog.records] == [f"{tmp_path}/checkpoint-3 is passed over: {said}"]
    with pytest.raises(UserError, match="resume_from_checkpoint"):  # named, it is not replaced silently
        checkpoint_of(asking, str(tmp_path / "checkpoint-3"))


def test_without_an_optimizer_by_choice_it_is_said(finished, asking, tmp_path, caplog):
    shutil.copytree(finished[0], tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoint-3" / "optimizer.pt").unlink()
    asking.args.output_dir, asking.args.save_only_model = str(tmp_path), True
    assert checkpoint_of(asking, True) == str(tmp_path / "checkpoint-3")
    assert "has no optimizer, which starts anew" in caplog.records[-1].getMessage()
    asking.args.save_only_model = False


def test_no_checkpoint_is_whole(asking, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    asking.args.output_dir = str(tmp_path)
    assert last_checkpoint(asking) is None and checkpoint_of(asking, None) is None
    with pytest.raises(ValueError, match="no checkpoint in"):
        checkpoint_of(asking, True)


@pytest.mark.parametrize("damaged", [(), (3,), (2, 3)])
def test_it_ends_with_the_same_weights(damaged, finished, tmp_path):
    """From the last checkpoint, at the end of the run, without a step; and from the ones before."""
    folder, want = finished
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for step in damaged:
        halve(tmp_path / f"checkpoint-{step}" / "optimizer.pt")
    again = trainer_in(tmp_path)
    steps = []
    again.training_step = lambda *args, plain=again.training_step: steps.append(1) or plain(*args)
    again.train(resume_from_checkpoint=True)
    assert len(steps) == len(damaged) and again.state.global_step == 3
    assert_equal(weights(again), want)
    assert again.model.get_base_model().config.diffusion["conversion_steps"] == 3


def test_the_best_checkpoint_is_kept_from_the_end_too(tmp_path):
    """Resumed at its end, a run takes the best checkpoint as it would have; the last step is made to ruin the model."""
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "learning_rate": 1e-2}
    best |= {"evaluation": tiny_dataset(4, split="test"), "metric_for_best_model": "eval_nelbo", "max_steps": 2}
    best["greater_is_better"] = False
    trainer = trainer_in(tmp_path, **best)
    step = trainer.training_step

    def ruin(*args):
        if trainer.state.global_step == 1:
            with torch.no_grad():
                for name, parameter in trainer.model.named_parameters():
                    if "lora_B" in name:
                        parameter.fill_(5.0)
        return step(*args)

    trainer.training_step = ruin
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    again = trainer_in(tmp_path, **best)
    again.train(resume_from_checkpoint=True)
    assert json.loads((tmp_path / "checkpoint-2" / "trainer_state.json").read_text())["global_step"] == 2
    assert_equal(weights(again), weights(trainer))
