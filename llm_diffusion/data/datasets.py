"""Datasets by name, folder or file: a train and a test split, or one clear error that names the row of the file.

Rows are read here once, to find what is wrong before anything long begins; the trainers tokenise them (`tokens`).
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import textwrap
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, concatenate_datasets, load_dataset, load_from_disk
from loguru import logger
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..objective.modes import IGNORE_INDEX
from ..objective.settings import read_path
from .rows import (
    MIXED,
    SHAPES,
    Place,
    form_of,
    prompt_and_answer,
    read_pair,
    read_row,
    says_something,
    source_row,
    split_row,
)
from .tiny import tiny_dataset
from .tokens import check_pair_columns, given_labels

DEBUG_EXAMPLES = 100
SELF = "self"  # as `dataset`: what the model writes itself
TINY_ROWS = 100_000
SPLITS = ("train", "test", "validation")
# For tokenizers without a chat template of their own (Phi-2, GPT-2); ends an answer with the end token.
PLAIN_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] | capitalize }}: {{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's
_FORMATS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}


def load_splits(
    name: str,
    *,
    test_size: float | int,
    seed: int,
    limit: int | None = None,
    every_token: bool = False,
    text_field: str = "text",
) -> tuple[Dataset, Dataset]:
    """Train and test split of a dataset.

    Args:
        name: "tiny" (generated), a saved dataset, a folder or file of txt, JSONL or Parquet, or a hub name; or a mixture of them,
            "a:2000, b.jsonl:0.5, tiny".
        test_size: share (below 1) or number of examples held out, where the data has no test split of its own.
        seed: of the split.
        limit: use this many training examples at most.
        every_token: whether conversations are trained on as a whole, so that none needs an answer.
        text_field: column of whole texts; it is called `text` from here on.

    Raises:
        FileNotFoundError, ValueError: nothing there, no usable column, no example.
    """
    sources, trainable = _sources(name), partial(_trainable, every_token=every_token, text_field=text_field)
    if sources != {name: None}:
        return _mixture(sources, test_size, seed, limit, trainable)
    if name == "tiny":
        n_test = int(test_size) if test_size >= 1 else 500
        return tiny_dataset(limit or TINY_ROWS, seed), first_rows(tiny_dataset(n_test, seed, "test"), limit)
    return _held_out(trainable(name), name, test_size, seed, limit)


def _trainable(name: str, field: str = "dataset", *, every_token: bool, text_field: str) -> DatasetDict:
    splits = load_any(name)
    if "train" not in splits:
        raise UserError(f"`dataset`: {name!r} has the splits {sorted(splits)}, a split `train` is needed.")
    if text_field != "text":
        splits = DatasetDict({split: _with_text(rows, text_field) for split, rows in splits.items()})
    _check_columns(splits["train"], name)
    form = form_of(splits["train"].column_names)
    if others := [split for split in SPLITS if split in splits and form_of(splits[split].column_names) != form]:
        found = f"but its split {others[0]!r} has the columns {splits[others[0]].column_names}"
        raise UserError(f"`dataset`: {name!r} has rows of `{form}`, {found}.")
    return _checked(splits, name, field, partial(_is_example, every_token=every_token))


def _with_text(rows: Dataset, text_field: str) -> Dataset:
    """Rows whose texts are in the column `text`, and none that were there."""
    rows = rows.remove_columns({"text"} & set(rows.column_names))
    return rows.rename_column(text_field, "text") if text_field in rows.column_names else rows


# -- mixtures

Amount = float | int | None  # of a source's rows: a share, a number, all


def _sources(name: str) -> dict[str, Amount]:
    """The sources that `dataset` names; a path that exists is never taken apart."""
    parts, sources = name.split(","), []
    while parts:
        for n in range(len(parts), 0, -1):
            source, amount = ",".join(parts[:n]).strip(), None
            if not _exists(source) and (match := re.fullmatch(r"(.*\S)\s*:\s*([-+]?\.?\d[\w.%+-]*)", source)):
                source, amount = match.groups()
            if _exists(source):
                break
        sources.append((source, amount and _amount(source, amount)))
        parts = parts[n:]
    places = {os.path.realpath(os.path.expanduser(name)) if _exists(name) else name for name, _ in sources}
    if len(sources) > 1 and ("" in dict(sources) or len(places) < len(sources)):
        raise UserError(f"`dataset`: a mixture names each source once, and none is empty; got {name!r}.")
    if SELF in dict(sources):
        raise UserError("`dataset`: 'self' cannot be part of a mixture; `max_examples` says how much is written.")
    return dict(sources)


def _exists(name: str) -> bool:
    return os.path.exists(os.path.expanduser(name))  # False also for what cannot be a path


def _amount(source: str, text: str) -> Amount:
    with suppress(ValueError):
        amount = int(text) if text.isdecimal() else float(text)
        if 0 < amount <= 1 or (isinstance(amount, int) and amount):
            return amount
    wanted = "a whole number of rows or a share up to 1 is needed behind the last colon"
    raise UserError(f"`dataset`: {source!r} has the amount {text!r}; {wanted}.")


def _mixture(
    sources: dict[str, Amount], test_size: float | int, seed: int, limit: int | None, trainable: Callable
) -> tuple[Dataset, Dataset]:
    """Rows of all sources, shuffled; each gives as many of them as it was asked for, and holds out its part of `test_size`."""
    chosen = {source: _chosen(source, amount, seed, trainable) for source, amount in sources.items()}
    total, pairs = 1 if test_size < 1 else sum(len(splits["train"]) for splits in chosen.values()), []
    for source, splits in chosen.items():
        held_out = max(1, round(test_size * len(splits["train"]) / total))
        train, test = _held_out(splits, source, held_out, seed, None)
        pairs.append((train, first_rows(test, held_out)))
    (train, n_train), (test, n_test) = (_shuffled(parts, seed, limit) for parts in zip(*pairs, strict=True))
    for source, rows, held_out in zip(sources, n_train, n_test, strict=True):
        logger.info(f"`dataset`: {source!r}: {rows:,} rows to train on, {held_out:,} held out")
    return train, test


def _chosen(source: str, amount: Amount, seed: int, trainable: Callable) -> DatasetDict:
    """Rows of a source, chosen by the seed, in the one column that all sources can have."""
    n = amount if isinstance(amount, int) else None
    if source == "tiny":
        train, test = load_splits(source, test_size=min(n or 500, 500), seed=seed, limit=n)
        splits = DatasetDict(train=train, test=test)
    else:
        splits = trainable(source, f"dataset`: `{source}")
    rows = splits["train"].shuffle(seed=seed)
    splits["train"] = first_rows(rows, n or max(1, round((amount or 1) * len(rows))))
    return DatasetDict({k: rows.map(_as_mixed, remove_columns=rows.column_names) for k, rows in splits.items()})


def _as_mixed(row: dict[str, Any]) -> dict[str, str]:
    return {MIXED: json.dumps(dict(row), default=str, ensure_ascii=False)}  # dates and the like are not read


def _shuffled(parts: tuple[Dataset, ...], seed: int, limit: int | None) -> tuple[Dataset, list[int]]:
    """The rows of all parts, `limit` at most, and how many there are of each."""
    of = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.random.default_rng(seed).permutation(len(of))[:limit]
    return concatenate_datasets(parts).select(order), np.bincount(of[order], minlength=len(parts)).tolist()


# -- checks


def load_preference_splits(
    name: str, *, test_size: float | int, seed: int, limit: int | None = None
) -> tuple[Dataset, Dataset]:
    """As `load_splits`, of pairs in any of TRL's formats: `chosen` and `rejected`, and a `prompt` or a common beginning.

    Raises:
        FileNotFoundError, ValueError: nothing there, no pair, not the columns.
    """
    try:
        splits = load_any(name)
        if len(splits.get("train", ())) == 0:
            raise UserError(f"`dataset`: {name!r} has no row in a split `train`.")
        check_pair_columns(splits["train"].column_names, "dataset")
        return _held_out(_checked(splits, name, "dataset", _is_pair), name, test_size, seed, limit)
    except (UserError, FileNotFoundError) as error:
        raise type(error)(str(error).replace("`dataset`", "`preference_dataset`", 1)) from error


def _checked(splits: DatasetDict, name: str, field: str, is_usable: Callable[..., bool]) -> DatasetDict:
    """The splits without rows that hold nothing; the others can be read. Before any is shuffled: rows have their numbers of the file."""
    used = {split: splits[split] for split in SPLITS if split in splits}
    for split, rows in used.items():
        named = {"field": field, "split": split if len(used) > 1 else ""}
        used[split] = rows.filter(is_usable, with_indices=True, fn_kwargs=named)
        if (left := len(used[split])) < len(rows):
            logger.warning(f"{name}, split {split}: {len(rows) - left} of {len(rows)} rows: no text")
    if len(used["train"]) == 0:
        raise UserError(f"`{field}`: {name!r} is empty.")
    return DatasetDict(used)


def _is_example(example: dict[str, Any], row: int, field: str, split: str, every_token: bool = False) -> bool:
    """Whether a row holds something. UserError: it cannot be read, or has no answer to train on."""
    form, place = form_of(example), Place(field, row, split)
    read = read_row(example, form, place)
    if every_token or "text" in read or "input_ids" in read:
        return bool(read.get("text", "-").strip())
    return bool(split_row(read, form, place))


def _is_pair(example: dict[str, Any], row: int, field: str, split: str) -> bool:
    return bool(read_pair(example, Place(field, row, split)))


def _held_out(
    splits: DatasetDict, name: str, test_size: float | int, seed: int, limit: int | None
) -> tuple[Dataset, Dataset]:
    train, test = splits["train"], splits.get("test") or splits.get("validation")
    if test is None:
        if len(train) < 2:
            raise UserError(f"`dataset`: {name!r} has one example; at least two are needed, one of them held out.")
        train, test = split_rows(train, test_size, seed)
    return first_rows(train, limit), first_rows(test, limit)


def split_rows(rows: Dataset, test_size: float | int, seed: int) -> tuple[Dataset, Dataset]:
    """At least one row to train on, and a share (below 1) or number of the rows held out."""
    held_out = math.ceil(test_size * len(rows)) if test_size < 1 else int(test_size)
    train, test = rows.train_test_split(test_size=min(held_out, len(rows) - 1), seed=seed).values()
    return train, test


def first_rows(rows: Dataset, n: int | None) -> Dataset:
    return rows if n is None else rows.select(range(min(n, len(rows))))


def readable(test: Dataset, n: int, tokenizer: PreTrainedTokenizerBase) -> list[dict[str, Any]]:
    """The first `n` rows; tokens as prompt and last answer where labels tell them apart, else as text, as are turns without an answer."""
    return [_readable(row, tokenizer) for row in first_rows(test, n)]


def _readable(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    row = source_row(row)
    if "input_ids" in row:
        return _readable_tokens(read_row(row, "input_ids", Place("dataset")), tokenizer)
    with suppress(UserError):
        prompt_and_answer(row, Place("dataset"))
        return row
    read = read_row(row, form_of(row), Place("dataset"))
    return {"text": tokenizer.apply_chat_template(read["messages"], tokenize=False, **read["template"])}


def _readable_tokens(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids, scored = row["input_ids"], [label != IGNORE_INDEX for label in given_labels(row)]
    end = max((i for i, yes in enumerate(scored, 1) if yes), default=0)
    start = max((i for i, yes in enumerate(scored[:end], 1) if not yes), default=0)
    prompt = tokenizer.decode(ids[:start])  # with its special tokens: it is encoded again
    completion = tokenizer.decode(ids[start:end], skip_special_tokens=True).rstrip()
    if prompt.strip() and completion:
        return {"prompt": prompt, "completion": completion}
    return {"text": tokenizer.decode(ids, skip_special_tokens=True)}


def load_examples(name: str, limit: int | None = None) -> list[dict]:
    """Examples to evaluate on: the test split where there is one, else all; "tiny" are 60 held-out ones.

    Args:
        name: as in `load_splits`, but no mixture.
    """
    if name == "tiny":
        return list(tiny_dataset(limit or 60, split="test"))
    splits = load_any(name)
    rows = splits.get("test") or splits.get("validation") or next(iter(splits.values()))
    _check_columns(rows, name)
    usable = (row for number, row in enumerate(rows) if _can_be_asked(row, Place("dataset", number)))
    examples = list(itertools.islice(usable, limit))
    if not examples:
        raise UserError(f"`dataset`: {name!r} is empty.")
    return examples


def _can_be_asked(example: dict[str, Any], place: Place) -> bool:
    """Whether a row is no blank text. UserError: there is no prompt with an answer in it."""
    prompt, answer, _ = prompt_and_answer(example, place)
    if form_of(example) == "completion" and not says_something(answer):
        raise place.error("completion", "is empty", "an answer is needed to compare with")
    return not isinstance(prompt, str) or bool((prompt + str(answer)).strip())


def _check_columns(dataset: Dataset, name: str) -> None:
    if len(dataset) == 0:
        raise UserError(f"`dataset`: {name!r} is empty.")
    if form_of(dataset.column_names) is None:
        raise UserError(f"`dataset`: {name!r} has the columns {dataset.column_names}; one of {SHAPES} is needed.")


def load_any(name: str, configuration: str | None = None) -> DatasetDict:
    """All splits of a saved dataset, a folder or file, or a hub name (of which one `configuration`)."""
    path = read_path("dataset", name)
    if path.suffix == ".bin":
        command = f"llm-diffusion prepare-data {name} --model MODEL --output {path.with_suffix('')}"
        raise UserError(f"`dataset`: {name!r} is a bare array of token ids; run `{command}`, and name that folder.")
    if (path / "dataset_dict.json").exists() or (path / "dataset_info.json").exists():
        return _load_saved(name, path)
    if path.exists() or name.startswith((".", "/", "~")) or path.suffix in _FORMATS:
        found = local_files(name)
        if path.is_dir():
            found["data_files"] = _by_split(name, found["data_files"])
        return _load(name, **found)
    return _load(name, path=name, name=configuration)


def _load_saved(name: str, path: Path) -> DatasetDict:
    _check_whole(path)
    try:
        loaded = load_from_disk(str(path)).with_format(None)  # rows are plain, whatever they were saved as
        return _validated(loaded if isinstance(loaded, DatasetDict) else DatasetDict(train=loaded))
    except IndexError as error:  # raised for a table without rows
        raise UserError(f"`dataset`: {name!r} is empty.") from error
    except Exception as error:  # half a dozen types: Arrow's, and what JSON of another shape makes
        found = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"`dataset`: {name!r} is damaged: {found}") from error


def _validated(splits: DatasetDict) -> DatasetDict:
    """Tables that can be read: a row with wrong offsets would end the process, one that is no UTF-8 could not be named."""
    for rows in splits.values():
        rows.data.validate(full=True)
    return splits


def _check_whole(path: Path) -> None:
    """Refuses tables that were cut off; between two batches `datasets` would read what is left without an error."""
    for file in sorted(path.rglob("data-*.arrow")):
        with file.open("rb") as table:
            table.seek(max(0, file.stat().st_size - len(END_OF_STREAM)))
            if table.read() != END_OF_STREAM:
                raise UserError(f"`dataset`: {str(file)!r} is damaged: it is cut off; bring a whole copy back.")


def local_files(name: str) -> dict[str, Any]:
    """Keywords of `load_dataset` for a file, or for all files of a folder.

    Raises:
        FileNotFoundError, UserError: there are none, or several kinds.
    """
    path = read_path("dataset", name)
    if not path.exists():
        raise FileNotFoundError(f"`dataset`: {name!r} does not exist; give an existing file or folder, or a hub name.")
    files = sorted(f for f in ([path] if path.is_file() else path.glob("[!.]*")) if f.suffix in _FORMATS)
    formats = {_FORMATS[f.suffix] for f in files}
    if len(formats) != 1:
        found = f"files of one kind among {sorted(_FORMATS)}, found {sorted(formats) or 'none'}"
        raise UserError(f"`dataset`: {name!r} must hold {found}.")
    if not any(f.stat().st_size for f in files):
        raise UserError(f"`dataset`: {name!r} is empty.")
    encoding = {"encoding": "utf-8-sig"} if formats == {"text"} else {}  # a byte order mark is no text
    return {"path": formats.pop(), "data_files": [escape(str(f)) for f in files], **encoding}  # a name is no pattern


def _by_split(name: str, files: list[str]) -> dict[str, list[str]] | list[str]:
    """The files of a folder by split, where some are called `train.jsonl` or `test-00000-of-00002.jsonl`."""
    splits: dict[str, list[str]] = defaultdict(list)
    for file in files:
        found = re.fullmatch(rf"({'|'.join(SPLITS)})(-\d+-of-\d+)?", Path(file).stem)
        splits[found[1] if found else ""].append(file)
    others = splits.pop("", [])
    if splits and others:
        logger.warning(f"{name}: not read beside {sorted(splits)}: {', '.join(Path(file).name for file in others)}")
    return dict(splits) or others


def _load(source: str, **options: Any) -> DatasetDict:
    try:
        return _validated(load_dataset(**options))
    except Exception as error:  # the loaders raise a dozen types for "not there", "offline" and "malformed"
        # "An error occurred while generating the dataset" says nothing, what is behind it does.
        reason = textwrap.shorten(f"{str(error) or type(error).__name__} {error.__cause__ or ''}", 300)
        raise UserError(f"`dataset`: {source!r} could not be loaded: {reason}") from error
