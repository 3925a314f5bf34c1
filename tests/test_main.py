"""The command line: the whole job at toy size, and one clear line with exit code 2 for everything that can be wrong."""

import importlib.util
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pyarrow
import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import BertConfig, Qwen3Config

from llm_diffusion import UserError, load_diffusion_model
from llm_diffusion.main import cli, is_users
from llm_diffusion.models.record import save_record

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
FAST = {
    "model": "tiny",
    "dataset": "tiny",
    "max_examples": 16,
    "test_size": 6,
    "batch_size": 4,
    "gradient_accumulation_steps": 1,
    "max_length": 128,
    "device": "cpu",
    "pretrain_config": {"max_steps": 1},
    "sft_config": {"max_steps": 2},
    "generation": {"max_new_tokens": 16, "block_length": 8},
    "lora_config": {"r": 4},
    "eval_examples": 6,
}


def invoke(*arguments):
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


def with_settings(**settings):
    return invoke("--hyper-parameters-json", json.dumps({**FAST, **settings}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    output = tmp_path_factory.mktemp("run") / "out"
    tokens = {
        "hub_token": SECRET,
        "model_init_kwargs": {"token": SECRET},
        "sft_config": {"max_steps": 2, "hub_token": SECRET},
    }
    result = with_settings(output_dir=str(output), eval_answers=2, save_strategy="steps", save_steps=1, **tokens)
    assert result.exit_code == 0, result.output
    assert SECRET not in result.output
    return output, result.stdout


def test_no_file_of_a_run_has_a_secret_in_it(trained):
    files = [file for file in trained[0].rglob("*") if file.is_file()]
    assert {"hyper_parameters.json", "training_args.bin", "README.md"} <= {file.name for file in files}
    assert [file for file in files if SECRET.encode() in file.read_bytes()] == []
    assert json.loads((trained[0] / "hyper_parameters.json").read_text())["sft_config"]["hub_token"] is None


def test_main_job_end_to_end(trained):
    output, text = trained
    for line in ("Exact match", "sudoku", "tokens per forward", "one answer as it is denoised", "from_pretrained"):
        assert line in text
    assert "\x1b" not in text and "\r" not in text  # a log that can be followed
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((output / "hyper_parameters.json").read_text())["max_examples"] == 16
    history = json.loads((output / "sft_model" / "stage.json").read_text())
    assert any(
        "eval_exact_match" in logs and "(reference:" in logs["eval_samples"]
        for logs in history
        if "eval_samples" in logs
    )
    results = json.loads((output / "results.json").read_text())
    assert results["AR base"]["tokens_per_forward"] == 1.0
    record = json.loads((output / "sft_model" / "diffusion_config.json").read_text())
    assert record["conversion_steps"] == 3 and record["base_model"] == "tiny"  # both phases


def test_preferences_follow_fine_tuning(tmp_path):
    """Their reference is what fine-tuning leaves; both are saved and answer, and a stopped job goes on with the second."""
    prompt = [{"role": "user", "content": "Which is greater, 45 or 37?"}]
    sides = {
        name: [{"role": "assistant", "content": text}]
        for name, text in (("chosen", "45 is greater than 37."), ("rejected", "37 is greater than 45."))
    }
    rows = write(tmp_path / "pairs.jsonl", "\n".join([json.dumps({"prompt": prompt, **sides})] * 8))
    output = tmp_path / "out"
    settings = {
        "phases": ["sft", "dpo"],
        "eval_examples": 2,
        "preference_dataset": rows,
        "dpo_config": {"max_steps": 3, "num_draws": 1, "learning_rate": 1e-3},
        "output_dir": str(output),
    }
    result = with_settings(**settings)
    assert result.exit_code == 0, result.output
    assert "preferred" in result.stdout and "dpo_model" in result.stdout
    assert set(json.loads((output / "results.json").read_text())) == {"AR base", "converted", "preferences"}
    history = json.loads((output / "dpo_model" / "stage.json").read_text())
    assert {"eval_rewards/accuracies", "eval_rewards/margins"} <= {key for row in history for key in row}
    before, after = (
        load_diffusion_model(str(output / name), device="cpu")[0].state_dict() for name in ("sft_model", "dpo_model")
    )
    moved = [key for key in before if not before[key].equal(after[key])]
    assert moved and all("lora_" in key or "trainable_tokens" in key for key in moved)
    (output / "dpo_model" / "stage.json").unlink()
    untouched = (output / "sft_model" / "stage.json").stat().st_mtime_ns
    again = invoke("--resume", "--hyper-parameters-json", json.dumps({**FAST, **settings}))
    assert again.exit_code == 0, again.output
    assert (output / "sft_model" / "stage.json").stat().st_mtime_ns == untouched
    resumed = load_diffusion_model(str(output / "dpo_model"), device="cpu")[0].state_dict()
    for key in moved:
        torch.testing.assert_close(resumed[key], after[key], atol=1e-5, rtol=1e-3)


def test_the_lossless_job_keeps_every_answer(tmp_path):
    """Two steps teach a drafter nothing, and cost nothing: the answers are the base's."""
    small = {
        name: FAST[name]
        for name in ("max_examples", "test_size", "batch_size", "max_length", "device", "eval_examples")
    }
    small |= {
        "stages": [{"name": "sft", "trains": "adapters", "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}]
    }
    small |= {"output_dir": str(tmp_path / "out"), "generation": {"max_new_tokens": 16}, "answers_from_base": True}
    result = invoke("--preset", "tiny-lossless", "--hyper-parameters-json", json.dumps(small))
    assert result.exit_code == 0, result.output
    assert "6 of 6" in result.stdout and "a verified draft yielded" in result.stdout
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert results["converted"]["answers"] == results["AR base"]["answers"]
    assert sum(results["converted"]["accepted"].values()) >= 6
    assert "A lossless drafter" in (tmp_path / "out" / "sft_model" / "README.md").read_text()
    chat = invoke(
        "chat", str(tmp_path / "out" / "sft_model"), "Sort the letters: k d e a", "--settings", '{"max_new_tokens": 8}'
    )
    assert chat.exit_code == 0 and chat.stdout.strip() == "a d e k"


def test_the_job_with_sized_canvases_shows_where_ends_are_foreseen(tmp_path):
    small = {**FAST, "max_canvas": 24, "generation": {"max_new_tokens": 24, "length_quantile": 0.5}}
    del small["model"], small["dataset"]
    result = invoke(
        "--preset", "tiny-variable", "--hyper-parameters-json", json.dumps({**small, "output_dir": str(tmp_path)})
    )
    assert result.exit_code == 0, result.output
    assert "end foreseen at the first step, canvas of 24" in result.stdout
    assert (tmp_path / "ends.png").stat().st_size > 1000


def test_result_is_loaded_by_chat_and_generate(trained):
    model = str(trained[0] / "sft_model")
    settings = ("--settings", '{"max_new_tokens": 8}')
    for command, text in (("chat", "Sort the letters: k d"), ("generate", "Tom has")):
        result = invoke(command, model, text, *settings)
        assert result.exit_code == 0 and result.stdout.endswith("\n")


def test_generate_shows_the_text_forming(trained, tmp_path):
    model, picture = str(trained[0] / "sft_model"), tmp_path / "pictures" / "text.svg"
    settings = ("--settings", '{"max_new_tokens": 8}')
    plain = invoke("generate", model, "Tom has", *settings)
    shown = invoke("generate", model, "Tom has", "--watch", "--svg", str(picture), *settings)
    assert shown.exit_code == 0 and shown.stdout == plain.stdout  # no terminal to watch it in
    assert picture.read_text().startswith("<svg") and "@keyframes" in picture.read_text()
    assert invoke("generate", model, "Tom has", "--svg", str(picture), *settings).stdout == plain.stdout


def write(path: Path, text: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return str(path)


def chat_row(question: str, answer: str) -> str:
    return json.dumps({"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]})


def orphan_adapter(path: Path) -> str:
    """An adapter whose base model is gone."""
    model, tokenizer = load_diffusion_model("tiny", device="cpu")
    model.config.diffusion["base_model"] = str(path / "gone")
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.peft_config["default"].base_model_name_or_path = str(path / "gone")
    adapter.save_pretrained(path / "adapter")
    tokenizer.save_pretrained(path / "adapter")
    save_record(adapter, path / "adapter")
    return str(path / "adapter")


def encoder_only(path: Path) -> str:
    BertConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(path / "bert")
    return str(path / "bert")


def cut_adapter(path: Path) -> str:
    model, tokenizer = load_diffusion_model("tiny", device="cpu")
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    adapter.save_pretrained(path / "adapter")
    tokenizer.save_pretrained(path / "adapter")
    save_record(adapter, path / "adapter")
    truncated(path / "adapter" / "adapter_model.safetensors")
    return str(path / "adapter")


def cut_dataset(path: Path) -> str:
    Dataset.from_list([{"text": "Tom has"}] * 100).save_to_disk(str(path / "data"))
    for file in (path / "data").glob("*.arrow"):
        file.write_bytes(file.read_bytes()[:300])
    return str(path / "data")


# What each room refuses is tested there; these are errors of every room, seen through the whole command line.
# name -> (settings made from a temporary folder, what the line names)
BAD_INPUT = {
    "settings": (lambda p: {"modle": "tiny"}, "`modle`"),
    "a setting of the trainer": (lambda p: {"random_canvas": 5.0}, "`random_canvas`"),
    "a setting that transformers refuses": (lambda p: {"lr_scheduler_type": "sudden"}, "`lr_scheduler_type`"),
    "rows beyond the positions": (lambda p: {"max_length": 1025}, "`max_length` (1025)"),
    "rows of a stage beyond them": (lambda p: {"sft_config": {"max_length": 2000}}, "`max_length` (2000)"),
    "answers beyond them": (lambda p: {"generation": {"max_new_tokens": 1024}}, "`generation.max_new_tokens`"),
    "adapters beyond the layers": (lambda p: {"lora_config": {"r": 200}}, "`r` (200)"),
    "no such padding token": (lambda p: {"pad_token": "<nonsense>"}, "`pad_token`"),
    "model missing": (lambda p: {"model": str(p / "none")}, "`model`"),
    "model folder empty": (lambda p: {"model": str(p)}, "`model`"),
    "hub unreachable": (lambda p: {"model": "Qwen/Qwen3-0.6B"}, "`model`"),
    "encoder": (lambda p: {"model": encoder_only(p)}, "`model`"),
    "adapter without base": (lambda p: {"model": orphan_adapter(p)}, "`model`"),
    "dataset not on the hub": (lambda p: {"dataset": "nobody/nothing"}, "`dataset`"),
    "a question without an answer": (
        lambda p: {"dataset": write(p / "a.jsonl", '{"messages": [{"from": "human", "value": "hi"}]}\n' * 3)},
        "`messages` of row 0",
    ),
    "answers cut off": (lambda p: {"max_length": 4}, "`max_length`"),
    "output under a file": (lambda p: {"output_dir": write(p / "file", "") + "/out"}, "`output_dir`"),
    "no hub to push to": (lambda p: {"push_to_hub": True}, "`push_to_hub`"),
    "output in a place for no files": (lambda p: {"output_dir": "/proc/out"}, "/proc/out"),
    "adapter cut off": (lambda p: {"model": cut_adapter(p)}, "`model`"),
    "saved dataset cut off": (lambda p: {"dataset": cut_dataset(p)}, "`dataset`"),
    "no such mask": (lambda p: {"mask_token_id": 9999}, "`mask_token_id`"),
    "no such padding": (lambda p: {"token_ids": {"pad": 9999}}, "`token_ids.pad`"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(case, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import; spares the retries
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    settings, expected = BAD_INPUT[case]
    output = tmp_path / "output"
    result = with_settings(**{"output_dir": str(output), **settings(tmp_path)})
    assert result.exit_code == 2
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and result.stderr.splitlines()[-1] == errors[0]
    assert expected in errors[0]
    assert "Traceback" not in result.stderr
    assert not list(output.rglob("*.safetensors"))  # nothing half-written


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("tinny",), "did you mean 'tiny'"),
        (("analyse", "tiny"), "did you mean 'analyze'"),
        (("tiny", "--no-such-option"), "--no-such-option"),
        (("--config", "{bad}"), "malformed"),
        (("convert", "--hyper-parameters-json", '{"pipeline": "arm", "stages": [{"name": "a"}]}'), "`pipeline`"),
        (("chat", "{folder}/none", "hi"), "`model`"),
        (("chat", "tiny", "hi", "--settings", '{"step": 1}'), "step"),
        (("generate", "--settings", "{}"), "MODEL and PROMPTS"),
        (("generate", "tiny", "hi", "--pipeline", "ar"), "`pipeline`"),
        (("generate", "tiny", "hi", "--pipeline", "arm", "--watch"), "`--watch`"),
        (("generate", "tiny", "hi", "--pipeline", "arm", "--settings", '{"steps": 4}'), "steps"),
        (("generate", "tiny", "hi", "ho", "--svg", "{folder}/a.svg"), "`--svg`"),
        (("generate", "--config", "{scratch}"), "`init_from`"),
        (("side-by-side", "{folder}/none", "--prompt", "hi"), "`model`"),
        (("analyze", "tiny", "--json", "{bad}/a.json"), "`--json`"),
        (("evaluate", "tiny", "--prompts", "tiny", "--output", "{bad}/out"), "`--output`"),
        (("evaluate", "tiny", "{folder}/none", "--prompts", "tiny"), "`model`"),
        (("prefer", "tiny", "--output", "{folder}/o.jsonl", "--limit", "0"), "--limit"),
        (("prefer", "tiny", "--output", "{folder}/o.jsonl", "--answers"), "`--from-model`"),
        (("prefer", "tiny", "--output", "{folder}/o.jsonl", "--settings", '{"steps": 4}'), "`--from-model`"),
        (("prefer", "tiny", "--output", "{folder}/o.jsonl", "--from-model", "x", "--kinds", "converse"), "`--kinds`"),
        (("prefer", "tiny", "--output", "{folder}/o.jsonl", "--from-model", "x", "--judge-model", "y"), "`--judge`"),
        (("prefer", "{answers}", "--output", "{folder}/o.jsonl", "--kinds", "converse"), "`kinds`"),
        (("evaluate", "tiny", "--text", "{latin}", "--output", "{folder}/out"), "`--text`"),
        (("prefer", "{same}", "--output", "{folder}/o.jsonl"), "`chosen`"),
        (("prefer", "{same}", "--output", "{same}"), "is the source"),
        (("prepare-data", "{same}", "--model", "tiny", "--output", "{folder}"), "is not empty"),
    ],
)
def test_bad_command_line(arguments, expected, tmp_path):
    shape = '"n_embd": 8, "n_layer": 1, "n_head": 2 // a shape'
    files = {
        "bad": write(tmp_path / "bad.yaml", "a: [1\n"),
        "same": write(tmp_path / "same.jsonl", '{"prompt": "q", "chosen": "a", "rejected": "a"}\n'),
        "folder": str(tmp_path),
        "answers": write(tmp_path / "answers.jsonl", '{"prompt": "q", "answer": "a", "right": true}\n'),
        "latin": str(tmp_path / "latin.txt"),
        "scratch": write(tmp_path / "scratch.json", f'{{"pipeline": "arm", "init_from": "", {shape}\n}}'),
    }
    Path(files["latin"]).write_text("café", encoding="latin-1")
    result = invoke(*(re.sub(r"\{(\w+)\}", lambda m: files[m[1]], a) for a in arguments))
    assert result.exit_code == 2
    assert re.match("error: ", result.stderr.splitlines()[-1], re.IGNORECASE) and expected in result.stderr
    assert not (tmp_path / "o.jsonl").exists()


@pytest.mark.parametrize("fault", [ValueError("a shape"), RuntimeError("a size"), TypeError("an argument")])
def test_a_fault_of_ours_keeps_its_traceback(fault, monkeypatch):
    def broken(*arguments):
        raise fault

    monkeypatch.setattr("llm_diffusion.job.run", broken)
    with pytest.raises(type(fault)):
        invoke("tiny")


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError("`a` must be b."), True),
        (FileNotFoundError("`model`: none"), True),
        (FloatingPointError("the loss is non-finite"), True),
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (ImportError("`use_wandb`: wandb is not installed"), True),
        (ImportError("cannot import name 'x' from 'llm_diffusion.job'"), False),
        (KeyError("a"), False),
    ],
)
def test_which_errors_are_the_users(error, shown):
    assert is_users(error) is shown


class Dying(torch.utils.data.Dataset):
    """Whose worker the system kills, as it does when memory runs out."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        os.kill(os.getpid(), signal.SIGKILL)


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-9])
    return path


def a_full_disk(write, room=1000):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


MANY = {"a": torch.zeros(10_000)}
FAULTS = {
    "a killed worker": lambda p: next(iter(torch.utils.data.DataLoader(Dying(), num_workers=1))),
    "no memory": lambda p: torch.zeros(2**50),
    "no memory for Python": lambda p: bytearray(2**60),
    "no space for weights": lambda p: a_full_disk(lambda: save_file(MANY, p / "a.safetensors")),
    "no space for an optimizer": lambda p: a_full_disk(lambda: torch.save(MANY, p / "a.pt")),
    "no space for text": lambda p: a_full_disk(lambda: (p / "a.txt").write_text("a" * 2000)),
    "weights cut off": lambda p: [save_file(MANY, p / "a.safetensors"), load_file(truncated(p / "a.safetensors"))],
    "a table cut off": lambda p: pyarrow.ipc.open_file(pyarrow.py_buffer(b"ARROW1 and more")),
    "a file that vanished": lambda p: (p / "none").read_text(),
    "a text that is no UTF-8": lambda p: b"caf\xe9 ".decode(),
    "nobody there": lambda p: httpx.get("http://127.0.0.1:9"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_faults_of_the_machine_are_no_faults_of_ours(case, tmp_path):
    """As the libraries raise them."""
    with pytest.raises(Exception) as raised:  # noqa: PT011
        FAULTS[case](tmp_path)
    assert is_users(raised.value), raised.value


def test_a_disk_that_is_full_in_training_is_one_line_and_loses_nothing(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "output_dir": str(tmp_path / "out"), "logging_steps": 1}
    results = []
    a_full_disk(lambda: results.append(with_settings(**settings)), room=20_000)
    lines = results[0].stderr.splitlines()
    assert results[0].exit_code == 2 and lines[-1].startswith("error: ") and "Traceback" not in results[0].stderr
    assert (tmp_path / "out" / "hyper_parameters.json").exists() and not list(tmp_path.rglob("checkpoint-*"))
    assert not list(tmp_path.rglob(".unfinished*")) and not list(tmp_path.rglob(".lock"))


def test_a_text_of_one_token_is_refused_before_anything_is_written(tmp_path):
    text = write(tmp_path / "a.txt", "a")
    result = invoke("evaluate", "tiny", "--text", text, "--output", str(tmp_path / "out"))
    assert result.exit_code == 2 and "at least 2 are needed" in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_tasks_need_the_harness_and_their_files(tmp_path):
    installed = importlib.util.find_spec("lm_eval") is not None
    result = invoke(
        "evaluate", "tiny", "--tasks", "gsm8k", "--data", str(tmp_path / "no"), "--output", str(tmp_path / "out")
    )
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert ("`data`" if installed else "pip install 'llm-diffusion[eval]'") in result.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ("lambda,countdown", "`tasks`: lambda, countdown unknown to lm-evaluation-harness; with files in `data`: none"),
        ("arc_easy", "`tasks`: 'arc_easy' cannot be loaded"),
    ],
)
def test_unknown_tasks_and_tasks_of_the_hub_are_one_line(tasks, expected, tmp_path, monkeypatch):
    pytest.importorskip("lm_eval")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    result = invoke("evaluate", "tiny", "--tasks", tasks, "--output", str(tmp_path / "out"))
    assert result.exit_code == 2 and not (tmp_path / "out").exists()
    assert result.stderr.splitlines()[-1].startswith(f"error: {expected}")


def test_an_unconverted_model_is_measured_as_what_it_is_and_said_so(tmp_path):
    output = tmp_path / "out"
    small = ("--limit", "1", "--settings", '{"max_new_tokens": 4}', "--output", str(output))
    result = invoke("evaluate", "tiny", "--prompts", "tiny", *small)
    assert result.exit_code == 0, result.output
    found = json.loads((output / "results.json").read_text())
    assert list(found["models"]) == ["AR base"] and "autoregressive model it is" in found["notes"][0]
    assert "autoregressive model it is" in (output / "report.html").read_text()


def test_evaluate_writes_one_report(trained, tmp_path):
    text = write(tmp_path / "a.txt", "Tom has 23 apples. Tom gets 45 more.")
    output = tmp_path / "out"
    options = ("--text", text, "--prompts", "tiny", "--limit", "4", "--samples", "8", "--report", str(output))
    result = invoke("evaluate", str(trained[0] / "sft_model"), *options, "--settings", '{"max_new_tokens": 8}')
    assert result.exit_code == 0, result.output
    assert str(output / "report.html") in result.stdout
    results = json.loads((output / "results.json").read_text())
    assert list(results["models"]) == ["AR base", "converted"]
    assert results["models"]["AR base"]["likelihood"]["standard_error"] == 0
    assert results["settings"]["model"].endswith("sft_model") and results["settings"]["decoding"]["block_length"] == 8


@pytest.fixture
def wise():
    """A server that calls every answer wrong in its first step, and keeps what it is asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            content = '{"right": false, "first_wrong_step": 1}'
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"choices": [{"message": {"content": content}}]}).encode())

        def log_message(self, *arguments):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", server.asked
        server.shutdown()


def test_a_judge_reads_worked_answers_and_sampled_ones(trained, tmp_path, wise):
    url, asked = wise
    model, judge = str(trained[0] / "sft_model"), ("--judge", url, "--judge-model", "wise")
    small = ("--limit", "2", "--settings", '{"max_new_tokens": 8}')
    gsm8k = write(tmp_path / "a.jsonl", '{"question": "What is 1+2?", "answer": "1+2=3.\\n#### 3"}\n' * 2)
    result = invoke("evaluate", model, "--prompts", gsm8k, *judge, *small, "--output", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert len(asked) == 1 + 2 * 2 and {body["model"] for body in asked} == {"wise"}  # one to see that it is there
    for found in results["worked"].values():
        assert found["summary"]["judge: right, %"] == 0 and found["answers"][0]["judge"]["first_wrong_step"] == 0
    assert results["settings"]["judge"] == url and results["settings"]["judge_model"] == "wise"
    assert "judge: first wrong step" in (tmp_path / "out" / "report.html").read_text()
    answers = tmp_path / "answers.jsonl"
    sampled = ("--from-model", model, "--samples", "2", "--answers", *judge, *small)
    assert invoke("prefer", gsm8k, "--output", str(answers), *sampled).exit_code == 0
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    assert [(row["right"], row["first_wrong_step"]) for row in rows] == [(False, 0)] * 4 and len(asked) == 5 + 4


def test_analyze_needs_no_weights(tmp_path, trained):
    Qwen3Config(num_hidden_layers=2).save_pretrained(tmp_path)
    file = tmp_path / "analysis.json"
    result = invoke("analyze", str(tmp_path), "--batch-size", "2", "--length", "64", "--json", str(file))
    assert result.exit_code == 0 and "RTX 4080" in result.stdout and "\x1b" not in result.stdout
    assert json.loads(file.read_text())["model"]["layers"] == 2
    # An adapter is analysed as its base; --download of what is here already says where it is.
    result = invoke("analyze", str(trained[0] / "sft_model"), "--block", "--download")
    assert result.exit_code == 0 and "weights:" in result.stdout


def test_pairs_are_made_checked_and_compared(tmp_path, trained):
    first, second, answers = (str(tmp_path / f"{name}.jsonl") for name in ("first", "second", "answers"))
    result = invoke("prefer", "tiny", "--output", first, "--limit", "30", "--seed", "3")
    assert result.exit_code == 0 and "swapped_items" in result.stdout
    assert invoke("prefer", first, "--output", second).exit_code == 0  # pairs come in too, and are checked
    assert Path(first).read_text() == Path(second).read_text()
    model = str(trained[0] / "sft_model")
    small = ("--limit", "4", "--settings", '{"max_new_tokens": 8}')
    result = invoke("prefer", "tiny", "--output", answers, "--from-model", model, "--samples", "2", "--answers", *small)
    assert result.exit_code == 0 and "of 8 answers are right" in result.stdout
    rows = [json.loads(line) for line in Path(answers).read_text().splitlines()]
    for row in rows:
        row["answer"], row["right"] = row["reference"][:-1] + "#", False  # what people hand back
    write(Path(answers), "".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("prefer", answers, "--output", second)
    assert result.exit_code == 0 and "sampled" in result.stdout
    result = invoke("evaluate", "tiny", model, "--prompts", "tiny", "--output", str(tmp_path / "out"), *small)
    assert result.exit_code == 0 and "McNemar" in result.stdout and "\x1b" not in result.stdout
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["paired"][-1]["differences"][0]["second"] == model and len(found["samples"]) == 4


def test_convert_runs_three_stages_and_goes_on_after_a_stop(tmp_path):
    output = tmp_path / "out"
    stages = [
        {
            "name": "attention",
            "trains": "attention",
            "max_steps": 1,
            "completion_only_loss": False,
            "annealing": "soft",
        },
        {"name": "recovery", "max_steps": 2},
    ]
    own = {"save_strategy": "no", "eval_strategy": "no", "load_best_model_at_end": False, "stages": stages}
    arguments = ("--hyper-parameters-json", json.dumps({**FAST, **own, "output_dir": str(output)}))
    first = invoke("convert", "tiny", *arguments)
    assert first.exit_code == 0, first.output
    assert "RTX 4080" in first.stdout and "Exact match" in first.stdout  # from analysis to evaluation
    assert "attention" in first.stdout and "recovery" in first.stdout
    record = json.loads((output / "sft_model" / "diffusion_config.json").read_text())
    assert record["conversion_steps"] == 3
    (output / "sft_model" / "stage.json").unlink()  # stopped before the end of the last stage
    again = invoke("convert", "tiny", *arguments, "--resume")
    assert again.exit_code == 0, again.output
    assert (output / "sft_model" / "stage.json").exists()
    other = invoke(
        "convert",
        "tiny",
        "--hyper-parameters-json",
        json.dumps({**FAST, **own, "output_dir": str(output), "seed": 1}),
        "--resume",
    )
    assert other.exit_code == 2 and "`--resume`" in other.stderr


def test_missing_bitsandbytes_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # cannot be imported
    result = with_settings(use_qlora=True, output_dir=str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "bitsandbytes is not installed" in result.stderr.splitlines()[-1]


def test_the_command_line_sends_no_usage_counts():
    """In a process of its own: the hub's client reads the variable when it is imported, and never again."""
    code = (
        "from click.testing import CliRunner; from llm_diffusion.main import cli; CliRunner().invoke(cli, ['--list-presets'])\n"
        "from huggingface_hub import constants; assert constants.HF_HUB_DISABLE_TELEMETRY"
    )
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_DISABLE_TELEMETRY"}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True)
