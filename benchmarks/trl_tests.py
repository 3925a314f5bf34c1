"""TRL's own tests of SFTTrainer and DPOTrainer, run with TRL's classes and then with ours in their place.

    python benchmarks/trl_tests.py --trl ../trl --output benchmarks/results/trl-tests.md
    python benchmarks/trl_tests.py --trl ../trl --only "dpo and gpt_oss"

`--trl` is a checkout of TRL's repository. Its two test files are copied, and one line of each is changed: the import of the trainer and its config.
No hub is needed: the tiny models come from TRL's generators, with a small tokenizer, and the data sets from its scripts. Tests that need images
or an accelerator and slow ones are left out; those of TRL's helpers (collators, chunked loss) stay, and can only agree.
A test that TRL passes and we do not must be one of REFUSED, and end in a UserError, else the command fails.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import datasets
import transformers
import trl
from datasets import Dataset, DatasetDict
from lengths import table
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

FILES = {"SFT": "test_sft_trainer.py", "DPO": "test_dpo_trainer.py"}
ORGANISATION = "trl-internal-testing"
TEMPLATES = {"gpt_oss": "gptoss", "qwen3": "qwen3", "gpt_neox": None}  # by the generator's name
LEFT_OUT = ["test requires vision", "test requires accelerator", "test requires multiple accelerators"]
CONFTEST = f"""

@pytest.fixture
def lazy_shared_datadir():
    import pathlib

    return pathlib.Path(__file__).parent / "data"


def pytest_collection_modifyitems(items):
    left_out = {LEFT_OUT}
    marked = lambda item: any(mark.kwargs.get("reason") in left_out for mark in item.iter_markers("skipif"))
    items[:] = [item for item in items if not marked(item) and not item.get_closest_marker("slow")]
"""
STATES = ["passed", "failed", "skipped"]
UNEXPLAINED = "**unexplained**"
# Parts of names; each has a row in docs/trl.md, and a test in tests/training/test_trl.py or test_numerics.py.
REFUSED = {
    "SFT": ["train_dft_loss", "model_dtype", "prompt_tuning", "padding_free_without_packing", "packing[wrapped]"],
    "DPO": ["train_with_wpo", "train_with_ld", "model_dtype", "train_with_compute_metrics"],
}


def installed(source: str) -> str:
    """The source without the names that it imports from trl and that the installed TRL lacks."""
    lines = source.splitlines(keepends=True)
    for node in reversed(ast.parse(source).body):
        if not isinstance(node, ast.ImportFrom) or node.level or not node.module.startswith("trl"):
            continue
        module = importlib.import_module(node.module)
        names = [alias.name for alias in node.names if hasattr(module, alias.name)]
        if gone := sorted({alias.name for alias in node.names} - set(names)):
            print(f"not in trl {trl.__version__}: {node.module}: {', '.join(gone)}")
            new = [f"from {node.module} import {', '.join(names)}\n"] if names else []
            new += [f"{name} = bool\n" for name in gone if name.startswith("is_")]  # not available
            lines[node.lineno - 1 : node.end_lineno] = new
    return "".join(lines)


def with_ours(source: str, kind: str) -> str:
    """The source with our trainer and config under the names of TRL's."""
    theirs = f"from trl import {kind}Config, {kind}Trainer\n"
    if source.count(theirs) != 1:
        raise SystemExit(f"no line {theirs!r} in {FILES[kind]}: TRL would be compared with itself")
    names = ", ".join(f"Diffusion{kind}{each} as {kind}{each}" for each in ("Config", "Trainer"))
    return source.replace(theirs, f"from llm_diffusion import {names}\n")


def save_dataset(splits: DatasetDict, name: str, config_name: str) -> None:
    """Stands for `push_to_hub`: a folder that `load_dataset` reads by the same name, relative to where we are."""
    page = Path(name, "README.md")
    page.parent.mkdir(parents=True, exist_ok=True)
    configs = page.read_text().removesuffix("---\n") if page.exists() else "---\nconfigs:\n"
    configs += f"- config_name: {config_name}\n  data_files:\n"
    for split, rows in splits.items():
        if "tools" in rows.column_names:  # the hub's are JSON
            rows = rows.remove_columns("tools").add_column("tools", [json.dumps(tools) for tools in rows["tools"]])
        rows.to_parquet(f"{name}/{config_name}/{split}.parquet")
        configs += f"  - split: {split}\n    path: {config_name}/{split}.parquet\n"
    page.write_text(f"{configs}---\n")


def save_model(model: Any, tokenizer: Any, generation_config: Any, *affixes: str) -> None:
    """Stands for the generators' `push_to_hub(…, prefix, suffix)`."""
    name = "-".join([affixes[0], type(model).__name__, *affixes[1:]])
    for part in (model, tokenizer, generation_config):
        if part is not None:
            part.save_pretrained(f"{ORGANISATION}/{name}")


def fitting_tokenizer() -> PreTrainedTokenizerBase:
    """The embedded one trained anew, on the data sets: a few tests count on words being tokens."""
    files = [str(path) for path in Path(ORGANISATION).rglob("*.parquet")]
    texts = [json.dumps(row) for file in files for row in Dataset.from_parquet(file)]
    return AutoTokenizer.from_pretrained(TINY_MODEL_PATH).train_new_from_iterator(texts, 4000)


def with_template(tokenizer: PreTrainedTokenizerBase, generator: str) -> PreTrainedTokenizerBase:
    """With the chat template that the generator's model has."""
    template = next((TEMPLATES[name] for name in TEMPLATES if generator.startswith(name)), "qwen2_5")
    tokenizer.chat_template = None
    if template:
        templates = Path(trl.__file__).with_name("chat_templates")
        tokenizer.chat_template = (templates / f"{template}.jinja").read_text()
    return tokenizer


def make_hub(checkout: Path) -> None:
    """Models and data sets that the tests name, as folders under the one we are in."""
    sys.path.append(str(checkout))  # behind the installed TRL
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    with patch.object(DatasetDict, "push_to_hub", save_dataset):
        for name in ("zen", "harmony", "toolcall"):
            importlib.import_module(f"scripts.generate_{name}_dataset").main(0.1, True, f"{ORGANISATION}/{name}")
    tokenizer = fitting_tokenizer()
    with_template(tokenizer, "qwen3").save_pretrained("Qwen/Qwen3-4B")  # whose template one test borrows
    common = importlib.import_module("scripts.generate_tiny_models._common")
    for name in ("check_transformers_version", "check_dtype_pattern", "print_config_diff", "smoke_test"):
        setattr(common, name, lambda *_: None)
    common.push_to_hub = save_model
    for path in sorted(checkout.glob("scripts/generate_tiny_models/for_causal_lm/[!_]*.py")):
        if not path.stem.startswith("peft"):  # no test names these
            make_model(path, with_template(tokenizer, path.stem))


def make_model(generator: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Runs a generator with our tokenizer and its special tokens."""
    source = re.sub(r"\n    (pad|eos|bos)_token_id=.*", "", generator.read_text())
    ends = "pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None"
    source = re.sub(r"(?<=\n)    vocab_size=.*", f"    vocab_size=len(tokenizer), {ends},", source)
    package = "scripts.generate_tiny_models.for_causal_lm"
    importlib.import_module(package)
    with (
        patch.object(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer),
        patch.object(GenerationConfig, "from_pretrained", lambda *_, **__: GenerationConfig()),
    ):
        exec(compile(source, generator, "exec"), {"__package__": package, "__name__": f"{package}.{generator.stem}"})


def outcomes(report: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Name of every test, and `passed`, `failed` or `skipped` with the first line of the reason."""
    for case in ET.parse(report).iter("testcase"):
        end = next((case.find(tag) for tag in ("failure", "error", "skipped") if case.find(tag) is not None), None)
        name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}".replace(f"{ORGANISATION}/", "")
        state = "passed" if end is None else "skipped" if end.tag == "skipped" else "failed"
        yield name, (state, "" if end is None else (end.get("message") or "").split("\n")[0])


def run(kind: str, whose: str, only: str) -> dict[str, tuple[str, str]]:
    report = Path(f"{kind}-{whose}.xml")
    log = report.with_suffix(".log")
    command = [sys.executable, "-m", "pytest", "-q", "-k", only, f"--junitxml={report}", f"tests/{FILES[kind]}"]
    with log.open("w") as out:
        subprocess.run(command, stdout=out, stderr=out, check=False)
    if not report.exists():
        raise SystemExit(log.read_text())
    print(f"{kind} with the classes of {whose}: {log.read_text().splitlines()[-1]}", flush=True)
    return dict(outcomes(report))


def copy_tests(checkout: Path) -> None:
    for name in ("__init__.py", "testing_utils.py", "conftest.py", *FILES.values()):
        text = installed((checkout / "tests" / name).read_text())
        Path("tests", name).write_text(text + CONFTEST * (name == "conftest.py"))


def compare(kind: str, only: str) -> tuple[list[list[str]], list[list[str]], list[str]]:
    """Two rows of counts; a row for each test that ends otherwise with our classes; those that fail with both."""
    test = Path("tests", FILES[kind])
    theirs = run(kind, "TRL", only)
    test.write_text(with_ours(test.read_text(), kind))
    ours = run(kind, "llm_diffusion", only)
    rows, differ, both = [], [], []
    for whose, ends in (("TRL", theirs), ("llm_diffusion", ours)):
        count = Counter(state for state, _ in ends.values())
        rows.append([kind, whose, *(str(count[state]) for state in STATES)])
    for name, (state, _) in theirs.items():
        if state != ours[name][0]:
            why = ours[name][1].removeprefix("llm_diffusion.UserError: ")
            known = why != ours[name][1] and any(part in name for part in REFUSED[kind])
            differ.append([f"{kind} {name}", state, ours[name][0], why if known else f"{UNEXPLAINED} {why}"])
        elif state == "failed":
            both.append(f"{kind} {name}, ours with `{ours[name][1]:.110}`")
    return rows, differ, both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="a checkout of TRL's repository")
    parser.add_argument("--only", default="", help="what pytest's -k takes")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    checkout, output = args.trl.resolve(), args.output and args.output.resolve()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        os.environ["HF_HOME"] = folder
        shutil.copytree(checkout / "tests" / "data", "tests/data")
        copy_tests(checkout)
        make_hub(checkout)
        rows, differ, both = (
            sum(parts, []) for parts in zip(*(compare(kind, args.only) for kind in FILES), strict=True)
        )
    page = f"# TRL's own tests\n\n`python benchmarks/trl_tests.py --trl DIR`, trl {trl.__version__}, transformers {transformers.__version__}; "
    page += f"tests of TRL {(checkout / 'VERSION').read_text().strip()}\n\n{table([['trainer', 'classes', *STATES], *rows])}\n\n"
    page += f"{table([['test', 'TRL', 'ours', 'why'], *differ])}\n\nFailed with both, as where the tests are of another TRL:\n\n"
    page += "\n".join(f"- {name}" for name in both) + "\n"
    print(page)
    if output:
        output.write_text(page)
    if any(UNEXPLAINED in row[-1] for row in differ):
        sys.exit("tests differ for no known reason")


if __name__ == "__main__":
    main()
