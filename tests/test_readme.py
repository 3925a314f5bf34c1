"""Every command of the README and the docs: the Python block is run, command lines are parsed, scripts and presets exist."""

import re
import shlex
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from click.testing import CliRunner

from llm_diffusion.config import preset_names, read_preset, resolve
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


@pytest.mark.parametrize("line", shell_lines())
def test_command_lines_are_real(line):
    """Training commands are resolved, not run: CI runs the first two, the others need a hub."""
    words = shlex.split(re.sub(r"\s+>.*", "", line))
    words = [word for word in words if word != "nohup"]
    if words[0] == "source":
        return
    if words[:2] == ["accelerate", "launch"]:
        launch, words = words[: words.index("-m")], ["python", *words[words.index("-m") :]]
        known = launch_command_parser().parse_args([*launch[2:], "script.py"])
        assert (ROOT / known.config_file).is_file()
    if words[0] == "./run.sh":
        assert (ROOT / "run.sh").stat().st_mode & 0o111
        if words[1:] == [] or words[1] == "test":
            return
        if words[1] not in cli.commands and not words[1].startswith("-"):
            assert read_preset(words[1])["model"]
            return
        words[0] = "llm-diffusion"  # handed through
    assert words[:3] == ["python", "-m", "llm_diffusion.main"] or words[0] == "llm-diffusion"
    arguments = words[3:] if words[0] == "python" else words[1:]
    if arguments == ["--list-presets"]:
        assert CliRunner().invoke(cli, arguments).stdout.split() == preset_names()
    elif arguments[0] in cli.commands:
        cli.commands[arguments[0]].make_context(arguments[0], arguments[1:])
    else:
        options = dict(zip(arguments[::2], arguments[1::2], strict=True))
        resolve(options.get("--preset"), options.get("--config"), options.get("--hyper-parameters-json"))
