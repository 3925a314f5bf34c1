"""Tasks of lm-evaluation-harness on local files, without a hub: its own definition with the local file in place of the hub's.

Countdown, sudoku and closed-book HotpotQA, which it does not have, are defined here; the functions at the end are called by the definitions.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval import tasks

from ... import UserError
from ...objective.settings import read_path
from ...reasoning.problems import LETTERS, logiqa_parts, reaches_countdown, solves_sudoku

HARNESS, OWN = Path(tasks.__file__).parent, Path(__file__).parent
# Of a local task: its definitions, the later over the earlier, and the file of every split.
LOCAL_TASKS: dict[str, tuple[list[Path], dict[str, str]]] = {
    "lambada_openai": ([HARNESS / "lambada/lambada_openai.yaml"], {"test": "lambada_test.jsonl"}),
    "gsm8k": ([HARNESS / "gsm8k/gsm8k.yaml"], {"train": "gsm8k/train.jsonl", "test": "gsm8k/test.jsonl"}),
    "hendrycks_math500": ([HARNESS / "hendrycks_math/hendrycks_math500.yaml"], {"test": "math500_test.jsonl"}),
    "hotpotqa": ([OWN / "hotpotqa.yaml"], {"test": "hotpot_dev_v1_simplified.json"}),
    "logiqa": ([HARNESS / "logiqa/logiqa.yaml", OWN / "logiqa.yaml"], {"test": "logiqa_test.jsonl"}),
    **{f"countdown{n}": ([OWN / "countdown.yaml"], {"test": f"cd{n}_test.jsonl"}) for n in (3, 4, 5)},
    **{f"sudoku_4x4_{n}": ([OWN / "sudoku.yaml"], {"test": f"sudoku_4x4_{n}.jsonl"}) for n in (4, 8, 12)},
}
TAGS = ("countdown", "sudoku")  # each stands for all tasks whose names begin so


def local_tasks(data: Path) -> dict[str, dict[str, Any]]:
    """Definitions of the tasks whose files are in a folder or its sub-folders."""
    data = read_path("data", data)
    if not data.is_dir():
        raise UserError(f"`data`: {str(data)!r} is not a folder.")
    found = {}
    for name, (definitions, files) in LOCAL_TASKS.items():
        paths = {split: _find(data, file) for split, file in files.items()}
        if all(paths.values()):
            source = {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": paths}}
            tags = {"tag": [tag for tag in TAGS if name.startswith(tag)]}
            found[name] = {"task": name, **tags, "include": [str(path) for path in definitions], **source}
    if not found:
        wanted = sorted({file for _, files in LOCAL_TASKS.values() for file in files.values()})
        raise UserError(f"`data`: {str(data)!r} holds none of the files that tasks are made of: {', '.join(wanted)}.")
    return found


def names_of(found: dict[str, Any]) -> set[str]:
    """Names of the tasks, and of several together."""
    return set(found) | {tag for definition in found.values() for tag in definition["tag"]}


def _find(folder: Path, file: str) -> str | None:
    paths = sorted(path for path in folder.rglob(Path(file).name) if path.as_posix().endswith("/" + file))
    return str(paths[0].resolve()) if paths else None


def countdown_question(doc: dict[str, str]) -> str:
    numbers, _, target = doc["input"].rpartition(",")
    return f"Reach {target} from {numbers}, each used once, by + - * / in equations.\nAnswer:"


def countdown_results(doc: dict[str, str], answers: list[str]) -> dict[str, float]:
    return {"exact_match": float(reaches_countdown(doc["input"], answers[0]))}


def sudoku_results(doc: dict[str, str], answers: list[str]) -> dict[str, float]:
    return {"exact_match": float(solves_sudoku(doc["input"], answers[0]))}


def logiqa_documents(dataset: Dataset) -> Dataset:
    """With the columns that the harness's definition reads, under whatever names the copy has them."""

    def renamed(record: dict) -> dict:
        context, question, options, index = logiqa_parts(record)
        return {"context": context, "question": question, "options": options, "label": LETTERS[index].lower()}

    return dataset.map(renamed, remove_columns=dataset.column_names)
