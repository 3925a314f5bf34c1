"""A process that is killed, or asked to stop, at any moment, and then resumed, ends with the very weights of the one that was not."""

import json
import signal

import pytest
from killing import command_line

SETTINGS = {
    "model": "tiny",
    "dataset": "tiny",
    "max_examples": 8,
    "test_size": 2,
    "batch_size": 2,
    "gradient_accumulation_steps": 1,
    "max_length": 64,
    "max_steps": 3,
    "learning_rate": 1e-2,
    "save_strategy": "steps",
    "save_steps": 1,
    "device": "cpu",
    "num_threads": 1,
    "lora_config": {"r": 2, "lora_dropout": 0.1},
    "generation": {"max_new_tokens": 4, "block_length": 4},
}
MODELS = ("pretrain_model", "sft_model")


def run(output, *options, moments=None, **settings):
    """The job's exit code and what it printed."""
    output.parent.mkdir(exist_ok=True)
    given = json.dumps({**SETTINGS, "output_dir": str(output), **settings})
    log = output.with_suffix(".log")
    code = command_line(["--hyper-parameters-json", given, *options], log, moments or {})
    return code, log.read_text()


def weights(output):
    return {name: (output / name / "adapter_model.safetensors").read_bytes() for name in MODELS}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What a run that nobody stops ends with."""
    output = tmp_path_factory.mktemp("straight") / "out"
    code, text = run(output, dataset_num_proc=2)
    assert code == 0 and "Traceback" not in text, text  # processes of a pool are ended by SIGTERM too
    return weights(output)


# In the order in which a run comes there.
KILLS = {
    "/hyper_parameters.json": "the settings are written",
    "pretrain/.unfinished/checkpoint-1": "a checkpoint gets its name",
    ".unfinished/pretrain_model/README.md": "the first phase's model is written, at its last step",
    ".unfinished/pretrain_model": "it gets its name",
    "sft/.unfinished/checkpoint-2/trainer_state.json": "the second phase saves",
}


def test_a_run_that_is_killed_five_times_ends_with_the_same_weights(straight, tmp_path):
    output = tmp_path / "out"
    for number, moment in enumerate(KILLS):
        code, text = run(output, *["--resume"] * (number > 0), moments={moment: signal.SIGKILL})
        assert code == -signal.SIGKILL, f"{KILLS[moment]}: {text}"
    code, text = run(output, "--resume", logging_steps=5)
    assert code == 0, text
    assert weights(output) == straight
    assert not list(output.rglob(".unfinished*")) and not list(output.rglob(".lock"))


def test_a_run_that_is_asked_to_stop_saves_and_says_how_to_go_on(straight, tmp_path):
    """Asked after the first step of three, it stops after the second, of which a checkpoint is not due."""
    output, rare = tmp_path / "out", {"save_steps": 3, "logging_steps": 1}
    code, text = run(output, moments={"pretrain  step 1/3": signal.SIGTERM}, **rare)
    assert code == 128 + signal.SIGTERM, text
    saved, last = text.splitlines()[-2:]
    assert last == "stopped by SIGTERM" and "Traceback" not in text
    assert "step 2 is saved; go on with: " in saved and saved.endswith("--resume")
    assert [path.name for path in output.glob("pretrain/checkpoint-*")] == ["checkpoint-2"]
    code, text = run(output, "--resume", **rare)
    assert code == 0, text
    assert weights(output) == straight


def test_a_second_one_ends_at_once(tmp_path):
    output = tmp_path / "out"
    moments = {"pretrain  step 1/3": signal.SIGINT, "pretrain/.unfinished/checkpoint-1": signal.SIGTERM}
    code, text = run(output, moments=moments, logging_steps=1)
    assert code == 128 + signal.SIGTERM and text.splitlines()[-1].endswith("once more to end at once")
    assert not list(output.glob("pretrain/checkpoint-*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_training_it_ends_at_once_with_one_line(number, tmp_path):
    code, text = run(tmp_path / "out", moments={"tiny_base": number})
    assert code == 128 + number and text.splitlines()[-1] == f"stopped by {number.name}" and "Traceback" not in text
    assert not (tmp_path / "out").exists()
