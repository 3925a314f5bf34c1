"""The example scripts, as a user runs them."""

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from llm_diffusion import load_diffusion_model
from llm_diffusion.data.tiny import KINDS, LEFT_TO_RIGHT_KINDS
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

EXAMPLES = Path(__file__).parent.parent / "examples"
SCRIPT = EXAMPLES / "train_tiny_base.py"


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script in this process as `python SCRIPT ARGUMENTS` would, and gives what it printed."""

    def printed(script, *arguments):
        monkeypatch.setattr(sys, "argv", [str(script), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(script), run_name="__main__")
        return capsys.readouterr().out

    return printed


def scores_in(printed):
    return {kind: float(re.search(rf"^  {kind} +([\d.]+)$", printed, re.MULTILINE)[1]) for kind in KINDS}


def test_the_shipped_base_is_right_on_what_a_left_to_right_model_can_do(run):
    scores = scores_in(run(SCRIPT, "--output", TINY_MODEL_PATH, "--eval-only"))
    assert min(scores[kind] for kind in LEFT_TO_RIGHT_KINDS) >= 95


@pytest.mark.slow
def test_the_base_can_be_trained_from_scratch(tmp_path, run):
    how = ["--steps", "1", "--batch-size", "4", "--device", "cpu"]
    scores = scores_in(run(SCRIPT, "--output", tmp_path / "base", *how))
    assert max(scores.values()) < 50  # one step teaches nothing
    assert (tmp_path / "base" / "model.safetensors").stat().st_size < 4_000_000
    assert (tmp_path / "base" / "tokenizer.json").read_text() == (TINY_MODEL_PATH / "tokenizer.json").read_text()


@pytest.fixture
def saved(tmp_path):
    """The embedded base as a diffusion model on disk."""
    for part in load_diffusion_model("tiny", device="cpu"):
        part.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def train(run, saved, tmp_path):
    """Runs an example on that model; what it says, when what it has saved is a model."""

    def said(script, *arguments):
        output = str(tmp_path / "out")
        printed = run(EXAMPLES / script, "--model", saved, "--output", output, "--device", "cpu", *arguments)
        trained, tokenizer = load_diffusion_model(output, device="cpu")
        assert trained.get_base_model().config.diffusion["mask_token_id"] == tokenizer.mask_token_id
        return printed

    return said


def test_preferences_in_one_file(tmp_path, train):
    rows = [{"prompt": "2+3=", "chosen": "5", "rejected": "6"}, {"prompt": "2+4=", "chosen": "6", "rejected": "5"}]
    (tmp_path / "pairs.jsonl").write_text("\n".join(json.dumps(row) for row in rows * 2))
    how = ["--pairs", tmp_path / "pairs.jsonl", "--batch-size", 2, "--accumulation", 1, "--steps", 5, "--draws", 2]
    assert "preferred" in train("dpo.py", *how)


def test_rewards_in_one_file(train):
    assert train("grpo.py", "--steps", 2, "--rollouts", 8, "--length", 8).count("\nstep ") == 2


# -- the short ones, in this process: what is at the top of each is made small

SMALL = {
    "STEPS": 1,
    "N_CHATS": 12,
    "BATCH_SIZE": 2,
    "MICRO_BATCH": 2,
    "ACCUMULATION": 1,
    "LENGTH": 256,
    "BASE_LENGTH": 128,
}
SMALL |= {"N_PROMPTS": 2, "N_TEXTS": 1, "N_SAMPLES": 8}


def main_of(name, monkeypatch, folder):
    """Runs an example in a folder."""
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for constant in SMALL.keys() & vars(module).keys():
        setattr(module, constant, SMALL[constant])
    module.main()


@pytest.mark.parametrize(
    ("name", "printed"),
    [
        ("qlora", "weights: 1"),
        ("block", "threshold 0.95: "),
        ("lossless", "as the base alone: yes"),
        ("long_context", "longest row: 256 tokens"),
        ("own_architecture", "attention: bidirectional"),
    ],
)
def test_an_example(name, printed, monkeypatch, tmp_path, capsys):
    if name == "qlora":
        pytest.importorskip("bitsandbytes")
    main_of(name, monkeypatch, tmp_path)
    assert printed in capsys.readouterr().out


def test_the_examples_that_build_on_each_other(monkeypatch, tmp_path, capsys):
    main_of("sft", monkeypatch, tmp_path)
    assert "held-out bound: " in capsys.readouterr().out
    main_of("infilling", monkeypatch, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("Fill the gap: 3 6") and lines[1].endswith("12 15")
    main_of("evaluate", monkeypatch, tmp_path)
    assert "AR base: " in capsys.readouterr().out and (tmp_path / "output/evaluation/report.html").exists()


def test_examples_are_short_and_say_how_to_run_them():
    for path in EXAMPLES.glob("*.py"):
        text = path.read_text()
        assert f"python examples/{path.name}" in text.split('"""')[1]
        assert path == SCRIPT or len(text.splitlines()) < 80


NOTEBOOKS = sorted((EXAMPLES / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_short_and_shows_what_it_printed(path):
    text = path.read_text()
    cells = json.loads(text)["cells"]
    assert len(cells) <= 12 and len(text) < 300_000
    assert not re.search(r"/(home|root|tmp|work|usr|Users)/", text)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert {"stream", "display_data"} == {output["output_type"] for output in outputs}


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch, tmp_path):
    """Its code cells, one after the other, with the numbers of its first cell made small."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    names = {}
    for number, cell in enumerate(
        cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"
    ):
        exec(compile("".join(cell["source"]), f"{path.name}, code cell {number + 1}", "exec"), names)
        if number == 0:
            names |= {name: value for name, value in SMALL.items() if name in names}


def test_slurm_launches_one_process_a_machine_with_the_arguments_as_given(tmp_path):
    """With commands of Slurm that do what two machines would see, and an `accelerate` that says what it was given."""
    programs = {
        "scontrol": "echo node7; echo node8",
        "srun": 'shift; for SLURM_NODEID in 0 1; do export SLURM_NODEID; "$@"; done',
        "accelerate": "printf '%s\\0' \"$@\"; echo",
    }
    for name, text in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    script = str(EXAMPLES / "accelerate" / "slurm.sh")
    subprocess.run(["bash", "-n", script], check=True)
    slurm = {
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "4",
    }
    slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(EXAMPLES.parent)}
    given = ["--preset", "qwen3-4b", "--hyper-parameters-json", '{"dataset": "a b, c\'d"}']
    done = subprocess.run(["bash", script, *given], capture_output=True, text=True, env=slurm, check=True)
    launched = [launch_command_parser().parse_args(line.split("\0")[1:-1]) for line in done.stdout.splitlines()]
    assert [each.machine_rank for each in launched] == [0, 1]
    for each in launched:
        assert (each.num_machines, each.num_processes, each.main_process_ip) == (2, 8, "node7")
        assert each.main_process_port == 23456 and (EXAMPLES.parent / each.config_file).exists()
        assert each.module and each.training_script == "llm_diffusion.main" and each.training_script_args == given
