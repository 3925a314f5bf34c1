"""Tokenises a corpus once, into memory-mapped Arrow that every later run opens at once: `llm-diffusion prepare-data`.

    form      one row                                                         what for
    joined    documents joined by the end token, cut every `length` tokens     pretraining; nothing is padded, nothing lost
    padded    a document, its end token, padding up to `length` tokens          learning where a text ends
    documents a document and its end token, whole                              `packing`, in which texts do not see each other

Everything is read as a stream and written as it is read; only what is held out by share waits in memory, 4 bytes a token. The result is
an ordinary saved dataset of `input_ids`, with the splits `train` and `test`: name its folder as `dataset`.
Trade-off: the tokens are those of one tokenizer, recorded beside them. Alternative: a bare array of token ids (`.bin`), which says
nothing of itself; it can be read here.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, DatasetDict, Features, Value, load_dataset
from datasets import List as ListOf
from datasets.exceptions import DatasetGenerationError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .. import UserError
from ..models.checkpoints import from_hub, resolve_path
from .datasets import PLAIN_CHAT_TEMPLATE, data_files

FORMS = ("joined", "padded", "documents")
RECORD = "prepared.json"
_CHUNK = 2**20  # tokens of a `.bin` read at once
_BATCH = 256  # documents tokenised at once


@dataclass
class Preparation:
    """What is made of which corpus.

    Args:
        source: file or folder of txt (a document a line), JSONL or Parquet, a `.bin` of token ids, or a hub name, streamed.
        model: whose tokenizer is used; "tiny" or a folder or hub name.
        form: see the module's docstring; `length` are the tokens of a row of the first two.
        train, test: documents of each split; `test` below 1 is a share. None: all others.
        text_field: column of the text; rows with `messages` are rendered by the chat template.
        config, split: of a hub dataset, `sample-10BT` and `train` for one.
        dtype: of the ids in a `.bin`.
    """

    source: str
    model: str
    form: str = "joined"
    length: int = 1024
    train: int | None = None
    test: float = 0.01
    text_field: str = "text"
    config: str | None = None
    split: str = "train"
    dtype: str = "uint16"
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise UserError(f"`--form` must be one of {FORMS}, got {self.form!r}.")
        if self.length < 2:
            raise UserError(f"`--length` must be at least 2, got {self.length}.")
        if self.train is not None and self.train < 1:
            raise UserError(f"`--train` must be at least 1, got {self.train}.")
        if self.test < 0 or (self.test > 1 and self.test != int(self.test)):
            raise UserError(f"`--test` must be a share below 1 or a number of documents, got {self.test}.")
        if self.dtype not in ("uint16", "uint32", "int32", "int64"):
            raise UserError(f"`--dtype` must be uint16, uint32, int32 or int64, got {self.dtype!r}.")


def prepare(asked: Preparation, output: Path, say: Callable[[str], None] = lambda line: None) -> DatasetDict:
    """Writes the dataset to the folder `output`, which is there when it is whole or not at all.

    Args:
        say: told every few seconds how far it is.

    Raises:
        ValueError, OSError: the source cannot be read, has no document, or the folder is in use.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"`--output`: {str(output)!r} is not empty; choose another folder, or remove it.")
    tokenizer = from_hub(AutoTokenizer, resolve_path(asked.model))
    if tokenizer.eos_token_id is None:
        raise UserError(f"`--model`: the tokenizer of {asked.model!r} has no end token, which separates documents.")
    documents = iter(_Progress(_documents(asked, tokenizer), say))
    first = next(documents, None)
    if first is None:
        raise UserError(f"`source`: {asked.source!r} has no document.")
    documents = chain([first], documents)
    output.parent.mkdir(parents=True, exist_ok=True)
    building, cache = output.with_name(output.name + ".partial"), output.with_name(output.name + ".cache")
    for folder in (building, cache):
        shutil.rmtree(folder, ignore_errors=True)
    try:
        splits = _write(asked, documents, tokenizer, cache)
        splits.save_to_disk(str(building))
        record = {**asdict(asked), "vocabulary": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        (building / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        if output.exists():
            output.rmdir()
        building.rename(output)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(cache, ignore_errors=True)
    return DatasetDict.load_from_disk(str(output))


def _write(
    asked: Preparation, documents: Iterator[list[int]], tokenizer: PreTrainedTokenizerBase, cache: Path
) -> DatasetDict:
    """Both splits, by one reading: documents held out by number are the first; those by share are kept until the end."""
    held_out: list[Any] = []
    if asked.test >= 1:
        held_out = list(islice(documents, int(asked.test)))

    def others() -> Iterator[list[int]]:
        for number, ids in enumerate(documents):
            if asked.test < 1 and zlib.crc32(str(number).encode()) % 2**16 < asked.test * 2**16:
                held_out.append(np.array(ids, dtype=np.int32))
            else:
                yield ids

    def rows(ids: Iterable[list[int]], split: str) -> Iterator[dict[str, list[int]]]:
        count = asked.counts[split] = {"documents": 0, "rows": 0, "tokens": 0}
        for row in _rows(_counted(ids, count), asked, tokenizer):
            count["rows"] += 1
            yield {"input_ids": row}

    splits = DatasetDict()
    train = others() if asked.train is None else islice(others(), asked.train)
    for split, ids in (("train", train), ("test", held_out)):
        made = None if ids is held_out and not held_out else _table(rows(ids, split), split, cache)
        if made is not None:
            splits[split] = made
    if "train" not in splits:
        raise UserError(
            f"`source`: {asked.source!r} is too short: {asked.counts['train']['tokens']} tokens to train on, a row has {asked.length}."
        )
    return splits


def _table(rows: Iterator[dict[str, list[int]]], split: str, cache: Path) -> Dataset | None:
    """Rows written as they come; None of no row, which the host makes no dataset of."""
    first = next(rows, None)
    if first is None:
        return None
    features = Features({"input_ids": ListOf(Value("int32"))})
    # A name of its own for every run: a generator has no content to be found again by.
    options = {"cache_dir": str(cache), "features": features, "fingerprint": f"{split}-{time.time_ns():x}"}
    try:
        return Dataset.from_generator(lambda: chain([first], rows), split=split, **options)
    except DatasetGenerationError as error:  # the host's name for whatever went wrong on the way
        raise error.__cause__ or error from None


def _counted(documents: Iterable[list[int]], count: dict[str, int]) -> Iterator[list[int]]:
    for ids in documents:
        count["documents"] += 1
        count["tokens"] += len(ids)
        yield ids


def _rows(
    documents: Iterable[list[int]], asked: Preparation, tokenizer: PreTrainedTokenizerBase
) -> Iterator[list[int]]:
    """Rows of one split; what is left at the end of joined documents, less than a row, is dropped."""
    end, length = tokenizer.eos_token_id, asked.length
    if asked.form == "documents":
        yield from ([*ids, end] for ids in documents)
    elif asked.form == "padded":
        pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        for ids in documents:
            row = [*ids, end][:length]
            yield row + [pad] * (length - len(row))
    else:
        left: list[int] = []
        for ids in documents:
            left += [*ids, end]
            for start in range(0, len(left) - length + 1, length):
                yield left[start : start + length]
            left = left[len(left) // length * length :]


def _documents(asked: Preparation, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of every document that says something, without an end token."""
    path = Path(asked.source).expanduser()
    if path.suffix == ".bin":
        yield from _from_bin(path, asked, tokenizer)
        return
    rows = _streamed(asked, path)
    for batch in iter(lambda: list(islice(rows, _BATCH)), []):
        texts = [text for text in (_text(row, asked, tokenizer) for row in batch) if text.strip()]
        if texts:
            # A row longer than the model's context is cut later.
            yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _streamed(asked: Preparation, path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.exists() or asked.source.startswith((".", "/", "~")):
            kind, files = data_files(asked.source)
            stream = load_dataset(kind, data_files=files, split="train", streaming=True)
        else:
            stream = load_dataset(asked.source, asked.config, split=asked.split, streaming=True)
        yield from stream
    except FileNotFoundError:
        raise
    except Exception as error:  # the loaders raise a dozen types for "not there", "offline" and "malformed"
        if isinstance(error, ValueError) and str(error).startswith("`"):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"`source`: {asked.source!r} could not be read: {reason}") from error


def _text(row: dict[str, Any], asked: Preparation, tokenizer: PreTrainedTokenizerBase) -> str:
    if asked.text_field in row:
        return row[asked.text_field] or ""
    if "messages" in row:
        template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
        return tokenizer.apply_chat_template(row["messages"], tokenize=False, chat_template=template)
    raise UserError(
        f"`source`: {asked.source!r} has the columns {sorted(row)}; name the one that holds the text by `--text-field`."
    )


def _from_bin(path: Path, asked: Preparation, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Documents of an array of token ids, which end tokens separate."""
    if not path.is_file():
        raise FileNotFoundError(f"`source`: {str(path)!r} does not exist.")
    size = np.dtype(asked.dtype).itemsize
    if path.stat().st_size % size or not path.stat().st_size:
        raise UserError(
            f"`source`: {str(path)!r} holds {path.stat().st_size} bytes, no whole {asked.dtype}s; set `--dtype`."
        )
    tokens, left = np.memmap(path, dtype=asked.dtype, mode="r"), np.empty(0, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK].astype(np.int64)
        if chunk.min() < 0 or chunk.max() >= len(tokenizer):
            raise UserError(
                f"`source`: {str(path)!r} has token {chunk.max()}, the tokenizer of {asked.model!r} knows {len(tokenizer)}; it is of "
                "another tokenizer, or `--dtype` is another."
            )
        chunk = np.concatenate([left, chunk])
        *whole, left = np.split(chunk, np.flatnonzero(chunk == tokenizer.eos_token_id) + 1)
        yield from (document[:-1].tolist() for document in whole if len(document) > 1)
    if len(left):
        yield left.tolist()


class _Progress:
    """Passes documents on, and says how many there were every five seconds and at the end."""

    def __init__(self, documents: Iterator[list[int]], say: Callable[[str], None]) -> None:
        self.documents, self.say = documents, say

    def __iter__(self) -> Iterator[list[int]]:
        started = last = time.perf_counter()
        count = tokens = 0
        for ids in self.documents:
            yield ids
            count, tokens, now = count + 1, tokens + len(ids), time.perf_counter()
            if now - last > 5:
                self.say(f"{count:,} documents, {tokens:,} tokens, {tokens / (now - started):,.0f} a second")
                last = now
        self.say(f"{count:,} documents, {tokens:,} tokens in {time.perf_counter() - started:.0f} s")
