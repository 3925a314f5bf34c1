"""Tokenises a corpus once, into memory-mapped Arrow that every later run opens at once: `llm-diffusion prepare-data`.

    form      one row                                                         what for
    joined    documents joined by the end token, cut every `length` tokens     pretraining; nothing is padded, nothing lost
    padded    a document, its end token, padding up to `length` tokens         learning where a text ends
    documents a document and its end token, whole                              `packing`, in which texts do not see each other

Everything is read as a stream and written as it is read; only what is held out by share waits in memory, 4 bytes a token.
The result is an ordinary saved dataset of `input_ids`, with the splits `train` and `test`: name its folder as `dataset`.
"""

from __future__ import annotations

import json
import shutil
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from glob import escape
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
from ..models.files import UNFINISHED, atomic, locked
from ..objective.settings import check_settings, read_path, setting
from .datasets import PLAIN_CHAT_TEMPLATE, local_files
from .rows import Place, read_row

_CHUNK = 2**20  # tokens of a `.bin` read at once


@dataclass
class Preparation:
    """What is made of which corpus.

    Args:
        source: file or folder of txt (a document a line), JSONL or Parquet, a `.bin` of token ids, or a hub name, streamed.
        model: whose tokenizer is used; "tiny" or a folder or hub name.
    """

    source: str
    model: str
    form: str = setting("joined", "What a row is.", choices=("joined", "padded", "documents"))
    length: int = setting(1024, "Tokens of a row.", min=2, max=2**20)
    train: int | None = setting(None, "Documents to train on; all if left out.", min=1)
    test: float = setting(0.01, "Documents held out: a share below 1 or a number.", min=0, whole=True)
    text_field: str = setting("text", "Column of the text; rows with `messages` are rendered by the chat template.")
    config: str | None = setting(None, "Configuration of a hub dataset, sample-10BT for one.")
    split: str = setting("train", "Split of a hub dataset.")
    dtype: str = setting("uint16", "Type of the ids in a .bin file.", choices=("uint16", "uint32", "int32", "int64"))
    counts: dict[str, dict[str, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_settings(self)


def prepare(plan: Preparation, output: Path, log: Callable[[str], None] = lambda line: None) -> DatasetDict:
    """Writes the dataset to the folder `output`, whole or not at all; `log` gets a line of progress every few seconds.

    Raises:
        ValueError, OSError: the source cannot be read, has no document, or the folder is in use.
    """
    with locked(output.with_name(f".{output.name}.lock"), f"`--output`: {str(output)!r}"):
        return _prepare(plan, output, log)


def _prepare(plan: Preparation, output: Path, log: Callable[[str], None]) -> DatasetDict:
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"`--output`: {str(output)!r} is not empty; choose another folder, or remove it.")
    tokenizer = from_hub(AutoTokenizer, resolve_path(plan.model))
    if tokenizer.eos_token_id is None:
        raise UserError(f"`--model`: the tokenizer of {plan.model!r} has no end token, which separates documents.")
    documents = _logged(_documents(plan, tokenizer), log)
    first = next(documents, None)
    if first is None:
        raise UserError(f"`source`: {plan.source!r} has no document.")
    for left in output.parent.glob(f"{UNFINISHED}-{escape(output.name)}-????????"):  # of a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    with atomic(output) as building:
        _write(plan, chain([first], documents), tokenizer, building.with_name("cache")).save_to_disk(str(building))
        record = {**asdict(plan), "vocabulary": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
        (building / "prepared.json").write_text(json.dumps(record, indent=1) + "\n")
    return DatasetDict.load_from_disk(str(output))


def _write(
    plan: Preparation, documents: Iterator[list[int]], tokenizer: PreTrainedTokenizerBase, cache: Path
) -> DatasetDict:
    """Both splits by one reading: documents held out by number are the first; those by share are kept until the end."""
    held_out: list[Any] = list(islice(documents, int(plan.test)))

    def others() -> Iterator[list[int]]:
        for number, ids in enumerate(documents):
            if plan.test < 1 and zlib.crc32(str(number).encode()) % 2**16 < plan.test * 2**16:
                held_out.append(np.array(ids, dtype=np.int32))
            else:
                yield ids

    splits, features = DatasetDict(), Features({"input_ids": ListOf(Value("int32"))})
    for split, ids in (("train", islice(others(), plan.train)), ("test", held_out)):
        rows = _rows(ids, split, plan, tokenizer)
        first = next(rows, None)
        if first is None:  # `datasets` makes nothing of no row
            continue
        # A name of its own for every run: a generator has no content to be found again by.
        options = {"cache_dir": str(cache), "features": features, "fingerprint": f"{split}-{time.time_ns():x}"}
        rows = chain([first], rows)
        try:
            splits[split] = Dataset.from_generator(lambda rows=rows: rows, split=split, **options)
        except DatasetGenerationError as error:  # for whatever went wrong on the way
            raise error.__cause__ or error from None
    if "train" not in splits:
        if "train" not in plan.counts:
            raise UserError(f"`test`: all {len(held_out)} documents of {plan.source!r} are held out; set fewer.")
        tokens = plan.counts["train"]["tokens"]
        raise UserError(f"`source`: {plan.source!r} is too short: {tokens} tokens, a row has {plan.length}.")
    return splits


def _rows(
    documents: Iterable[list[int]], split: str, plan: Preparation, tokenizer: PreTrainedTokenizerBase
) -> Iterator[dict[str, list[int]]]:
    """Rows of one split, counted; what is left at the end of joined documents, less than a row, is dropped."""
    end, length, left = tokenizer.eos_token_id, plan.length, []
    pad = end if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    for ids in documents:
        count = plan.counts.setdefault(split, {"documents": 0, "rows": 0, "tokens": 0})
        count["documents"] += 1
        count["tokens"] += len(ids)
        rows = [[*ids, end]]
        if plan.form == "padded":
            if (cut := len(rows[0]) - length) > 0:
                count["tokens cut off"] = count.get("tokens cut off", 0) + cut
            rows = [rows[0][:length] + [pad] * -cut]
        elif plan.form == "joined":
            left += rows[0]
            rows = [left[start : start + length] for start in range(0, len(left) - length + 1, length)]
            left = left[len(left) // length * length :]
        count["rows"] += len(rows)
        yield from ({"input_ids": row} for row in rows)


def _documents(plan: Preparation, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Token ids of every document that is not blank, without an end token."""
    path = read_path("source", plan.source)
    if path.suffix == ".bin":
        yield from _from_bin(path, plan, tokenizer)
        return
    rows = enumerate(_streamed(plan, path))
    while batch := list(islice(rows, 256)):
        texts = [text for text in (_text(number, row, plan, tokenizer) for number, row in batch) if text.strip()]
        if texts:
            # A row longer than the model's context is cut later.
            yield from tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _streamed(plan: Preparation, path: Path) -> Iterator[dict[str, Any]]:
    try:
        if path.exists() or plan.source.startswith((".", "/", "~")):
            yield from load_dataset(**local_files(plan.source), split="train", streaming=True)
        else:
            yield from load_dataset(plan.source, plan.config, split=plan.split, streaming=True)
    except (FileNotFoundError, UserError):
        raise
    except Exception as error:  # the loaders raise a dozen types for "not there", "offline" and "malformed"
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"`source`: {plan.source!r} could not be read: {reason}") from error


def _text(number: int, row: dict[str, Any], plan: Preparation, tokenizer: PreTrainedTokenizerBase) -> str:
    place = Place("source", number)
    if plan.text_field in row:
        text = row[plan.text_field]
        return "" if text is None else read_row({"text": text}, "text", place)["text"]
    if "messages" in row:
        read = read_row(row, "messages", place)
        template = {"chat_template": tokenizer.chat_template or PLAIN_CHAT_TEMPLATE, **read["template"]}
        return tokenizer.apply_chat_template(read["messages"], tokenize=False, **template)
    raise UserError(
        f"`source`: {plan.source!r} has the columns {sorted(row)}; name that of the text by `--text-field`."
    )


def _from_bin(path: Path, plan: Preparation, tokenizer: PreTrainedTokenizerBase) -> Iterator[list[int]]:
    """Documents of an array of token ids, which end tokens separate."""
    if not path.is_file():
        raise FileNotFoundError(f"`source`: {str(path)!r} does not exist.")
    size = path.stat().st_size
    if size % np.dtype(plan.dtype).itemsize or not size:
        raise UserError(f"`source`: {str(path)!r} holds {size} bytes, no whole {plan.dtype}s; set `--dtype`.")
    tokens, left = np.memmap(path, dtype=plan.dtype, mode="r"), np.empty(0, dtype=np.int64)
    for start in range(0, len(tokens), _CHUNK):
        chunk = tokens[start : start + _CHUNK].astype(np.int64)
        if len(wrong := chunk[(chunk < 0) | (chunk >= len(tokenizer))]):
            found = f"{str(path)!r} has token {wrong[0]}, {plan.model!r} has {len(tokenizer)}"
            raise UserError(f"`source`: {found}; it is of another tokenizer, or `--dtype` is another.")
        chunk = np.concatenate([left, chunk])
        *whole, left = np.split(chunk, np.flatnonzero(chunk == tokenizer.eos_token_id) + 1)
        yield from (document[:-1].tolist() for document in whole if len(document) > 1)
    if len(left):
        yield left.tolist()


def _logged(documents: Iterator[list[int]], log: Callable[[str], None]) -> Iterator[list[int]]:
    """Passes documents on, and logs how many there were every five seconds and at the end."""
    started = last = time.perf_counter()
    count = tokens = 0
    for ids in documents:
        yield ids
        count, tokens, now = count + 1, tokens + len(ids), time.perf_counter()
        if now - last > 5:
            log(f"{count:,} documents, {tokens:,} tokens, {tokens / (now - started):,.0f} a second")
            last = now
    log(f"{count:,} documents, {tokens:,} tokens in {time.perf_counter() - started:.0f} s")
