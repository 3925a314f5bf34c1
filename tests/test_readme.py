"""Every command of the README and the docs: the Python block is run, command lines are parsed, scripts and presets exist."""

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser

from llm_diffusion.config import resolve
from llm_diffusion.main import cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
DOCS = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))


def blocks(language, text=TEXT):
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def shell_lines():
    return [
        line.split("  #")[0].strip()
        for block in blocks("bash", TEXT + DOCS)
        for line in block.splitlines()
        if line.strip()
    ]


def test_python_block_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    exec(compile(code, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
    assert (tmp_path / "output/readme/sft_model/adapter_model.safetensors").exists()


def test_python_blocks_of_the_decoding_page_run(tiny):
    import llm_diffusion as ld

    model, tokenizer = tiny
    batch = tokenizer(["Sort the letters: k d e a"], return_tensors="pt")
    names = {"ld": ld, "model": model, "tokenizer": tokenizer, "batch": batch}
    for code in blocks("python", (ROOT / "docs" / "decoding.md").read_text()):
        exec(compile(code, "decoding.md", "exec"), names)
    assert names["output"].tokens_per_forward.tolist()[0] <= 1


@pytest.fixture(scope="session")
def handed_through(tmp_path_factory):
    """What the real run.sh hands to Python for some words, without setting up or running anything."""
    folder = tmp_path_factory.mktemp("run")
    shutil.copy(ROOT / "run.sh", folder)  # with its permissions
    for name, text in (("setup.sh", "exit 0"), (".venv/bin/python", "printf '%s\\0' \"$@\"")):
        stub = folder / name
        stub.parent.mkdir(parents=True, exist_ok=True)
        stub.write_text(f"#!/usr/bin/env bash\n{text}\n")
        stub.chmod(0o755)

    def run(*words):
        done = subprocess.run([folder / "run.sh", *words], capture_output=True, text=True, check=True)
        return done.stdout.split("\0")[:-1]

    return run


@pytest.mark.parametrize("line", shell_lines())
def test_command_lines_are_real(line, handed_through):
    """Training commands are resolved, not run: CI runs the first two, the others need a hub."""
    words = shlex.split(re.sub(r"\s+>.*", "", line))
    words = [word for word in words if word != "nohup"]
    if words[0] in ("source", "pip") or words[:2] == ["./run.sh", "test"]:
        return
    if words[:2] == ["accelerate", "launch"]:
        launch, words = words[: words.index("-m")], ["python", *words[words.index("-m") :]]
        known = launch_command_parser().parse_args([*launch[2:], "script.py"])
        assert (ROOT / known.config_file).is_file()
    elif words[0] == "./run.sh":
        words = ["python", *handed_through(*words[1:])]
    elif words[0] == "llm-diffusion":
        words = ["python", "-m", "llm_diffusion.main", *words[1:]]
    elif words[1] != "-m":
        assert words[0] == "python" and (ROOT / words[1]).is_file()
        return
    assert words[:3] == ["python", "-m", "llm_diffusion.main"]
    check_command_line(words[3:])


def check_command_line(arguments):
    """The command is there, and takes these options; the main job's settings are right."""
    if arguments[0] in cli.commands:
        cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    else:
        given = cli.make_context("llm-diffusion", arguments).params
        resolve(given["preset"], given["config"], given["hyper_parameters"])


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.stem
)
def test_links_and_files_that_the_pages_name_exist(page):
    text = page.read_text()
    for target, anchor in re.findall(r"\]\((?!http)([^)#]*)(?:#([^)]*))?\)", text):
        file = page.parent / target if target else page
        assert file.exists(), target
        if anchor:
            titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
    if page.stem == "design":
        for name in re.findall(r"`((?:[a-z]+/)+(?:\w+\.\w+)?|\w+\.py)`", text):
            assert (ROOT / name).exists() or (ROOT / "llm_diffusion" / name).exists(), name


def test_index_names_every_page():
    names = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert names <= set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs" / "index.md").read_text()))


def test_files_named_on_the_design_page_exist():
    page = (ROOT / "docs" / "design.md").read_text()
    names = re.findall(r"`([\w/]+(?:\.py|/))`", page)
    assert len(names) > 20
    for name in names:
        assert (ROOT / "llm_diffusion" / name).exists() or (ROOT / name).exists(), name
