"""The gate: everything that happens to a dataset between its rows and the tokens that are trained on or scored.

1. read: columns, conversations, parts, tool calls (`rows`)
2. tokenise: by the chat template, or as text with its end token; the prompt is what training leaves clean
3. cut to `max_length`, and leave out rows in which nothing is left
4. count: one line a dataset says what was left out, an error if that is everything, a warning if no text has an end

Map-style datasets and streams go the same way; what a stream loses is known when it has flowed, see `RowCounts`.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from datasets import Dataset, IterableDataset
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..models.special_tokens import chat_ids, prompt_ids, shared_length, text_ids
from ..objective.modes import IGNORE_INDEX
from .rows import MEDIA, MIXED, SHAPES, Place, form_of, read_pair, read_row, source_row, split_row

logger = logging.getLogger(__name__)

PEEK = 1000  # rows of a stream that are looked at before it is used


@dataclass(frozen=True)
class Tokenising:
    """How rows become tokens; names and meanings are those of `SFTConfig` and `DPOConfig`.

    Args:
        tokenizer: with its chat template; `chat_template` stands in its place.
        ends: ids that end a text.
        completion_only: None: prompts stay clean where there are some.
        finish: (ids, labels) -> (ids, labels) of every row, before truncation.
        formatting_func: row -> text.
        kept: columns that stay as they are.
    """

    tokenizer: PreTrainedTokenizerBase
    ends: tuple[int, ...] = ()
    text_field: str = "text"
    max_length: int | None = None
    keep_end: bool = False
    completion_only: bool | None = None
    assistant_only: bool = False
    chat_template: str | None = None
    finish: Callable[[list[int], list[int]], tuple[list[int], list[int]]] | None = None
    formatting_func: Callable[[dict], str] | None = None
    kept: tuple[str, ...] = ()

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, args: Any, **options: Any) -> Tokenising:
        """From the arguments of a trainer; `options` win."""
        given = {
            "text_field": getattr(args, "dataset_text_field", "text"),
            "max_length": args.max_length,
            "keep_end": getattr(args, "truncation_mode", "") == "keep_end",
            "completion_only": getattr(args, "completion_only_loss", None),
            "assistant_only": getattr(args, "assistant_only_loss", False),
        }
        return cls(tokenizer, **{**given, **options})


# -- one row


def tokenised_row(example: dict[str, Any], form: str, how: Tokenising, place: Place) -> dict[str, Any]:
    """`input_ids` and `labels`, and what was left out: `reason` the row is, "" = kept; `cut` tokens; `merged`, whether the prompt's
    last tokens are others when the answer follows."""
    if how.formatting_func is not None and form != "input_ids":
        text = how.formatting_func(example)
        if not isinstance(text, str):
            found = f"returned a {type(text).__name__} for row {place.row}"
            raise UserError(f"`formatting_func` {found}; one text a row is needed.")
        example, form = {"text": text}, "text"
    if form == MIXED:
        form = form_of(example := source_row(example), how.text_field)
    row = read_row(example, form, place)
    merged = 0
    if form == "input_ids":
        ids, labels = row["input_ids"], given_labels(row, how.completion_only is not False)
        if (highest := max(*ids, *labels)) >= (size := len(how.tokenizer)):
            raise place.error(form, f"has the token {highest}", f"the tokenizer has the tokens 0 to {size - 1}")
    elif "text" in row:
        ids = _ended(text_ids(how.tokenizer, row["text"]), how) if row["text"].strip() else []
        labels = list(ids)
    else:
        ids, labels, merged = _answered(row, form, how, place)
    trained = any(label != IGNORE_INDEX for label in labels)
    cut = max(len(ids) - (how.max_length or len(ids)), 0)
    if how.finish is not None and trained:
        ids, labels = how.finish(ids, labels)
    if how.max_length is not None:
        kept = slice(-how.max_length, None) if how.keep_end else slice(how.max_length)
        ids, labels = ids[kept], labels[kept]
    reason = "" if any(label != IGNORE_INDEX for label in labels) else _reason(ids, trained, how)
    return {"input_ids": ids, "labels": labels, "reason": reason, "cut": cut, "merged": merged}


def _reason(ids: list[int], trained: bool, how: Tokenising) -> str:
    if trained:
        return f"nothing left to train on after `max_length`={how.max_length}"
    return "every label is -100" if ids else "no text"


def given_labels(row: dict[str, Any], completion_only: bool = True) -> list[int]:
    """What a row of tokens, read already, has to be learned from: its `labels`, or the tokens that its masks leave."""
    if "labels" in row:
        return row["labels"]
    names = ("assistant_masks", "completion_mask") if completion_only else ("assistant_masks",)
    masks = [row[name] for name in names if name in row]
    if not masks:
        return list(row["input_ids"])
    return [token if all(bits) else IGNORE_INDEX for token, *bits in zip(row["input_ids"], *masks, strict=True)]


def _ended(ids: list[int], how: Tokenising) -> list[int]:
    end = how.tokenizer.eos_token_id
    return ids if end is None or (ids and ids[-1] in {end, *how.ends}) else [*ids, end]


def _answered(row: dict[str, Any], form: str, how: Tokenising, place: Place) -> tuple[list[int], list[int], int]:
    """Tokens and labels of a conversation, or of a prompt and its answer; and whether the answer changed the prompt's last tokens."""
    splits = how.completion_only is not False and not how.assistant_only
    template = row["template"] | ({"chat_template": how.chat_template} if how.chat_template else {})
    prompt, answer = split_row(row, form, place) if splits or "messages" not in row else ([], row["messages"])
    first = merged = 0
    with _naming_the_row(how.tokenizer, form, place):
        if isinstance(answer, str):
            ids = _ended(text_ids(how.tokenizer, prompt + answer), how)
        else:
            ids = chat_ids(how.tokenizer, [*prompt, *answer], **template)
        if how.completion_only is not False and (prompt or isinstance(prompt, str)):
            asked = prompt_ids(how.tokenizer, prompt, **template)
            first = shared_length(asked, ids)
            merged = int(first < len(asked))
        labels = [IGNORE_INDEX] * first + ids[first:]
        if how.assistant_only:
            options = {"return_dict": True, "return_assistant_tokens_mask": True, **template}
            mask = how.tokenizer.apply_chat_template([*prompt, *answer], **options)["assistant_masks"]
            if 1 not in mask:
                wanted = (
                    "turns are marked by `{% generation %}` in the chat template; set `assistant_only_loss` to false"
                )
                raise place.error(form, "has no token of an assistant", wanted)
            labels = [label if bit else IGNORE_INDEX for label, bit in zip(labels, mask, strict=True)]
    return ids, labels, merged


@contextmanager
def _naming_the_row(tokenizer: PreTrainedTokenizerBase, column: str, place: Place) -> Iterator[None]:
    """What a chat template cannot render is the row's fault, and is named so; without a template it is the tokenizer's."""
    try:
        yield
    except (TemplateError, TypeError) as error:
        found = f"is refused by the chat template ({error.__cause__ or error})"
        raise place.error(column, found, "change the row or the template") from error
    except UserError:
        raise
    except ValueError as error:
        if tokenizer.chat_template:
            raise
        raise UserError(
            "`processing_class`: the tokenizer has no chat template for conversations; set `chat_template_path`, or its `chat_template`."
        ) from error


def tokenised_pair(example: dict[str, Any], form: str, how: Tokenising, place: Place) -> dict[str, Any]:
    """`prompt_ids`, `chosen_ids` and `rejected_ids`, cut so that prompt and answer have `max_length` tokens; and what was left out."""
    row, tokenizer = read_pair(example, place), how.tokenizer
    prompt, template, ids = row["prompt"], row["template"], {}
    with _naming_the_row(tokenizer, "chosen", place):
        asked = prompt_ids(tokenizer, prompt, **template) if prompt or isinstance(prompt, str) else []
        for name in ("chosen", "rejected"):
            if isinstance(prompt, str):
                ids[name] = _ended(text_ids(tokenizer, prompt + row[name]), how)
            else:
                ids[name] = chat_ids(tokenizer, [*prompt, *row[name]], **template)
    first = min(shared_length(asked, side) for side in ids.values())
    found: dict[str, Any] = {"prompt_ids": asked[:first]}
    found |= {f"{name}_ids": side[first : how.max_length] for name, side in ids.items()}
    cut, reason = sum(max(len(side) - (how.max_length or len(side)), 0) for side in ids.values()), ""
    if not (found["chosen_ids"] and found["rejected_ids"]):
        reason = f"no answer left after `max_length`={how.max_length}"
    elif found["chosen_ids"] == found["rejected_ids"]:
        reason = (
            f"both answers are the same after `max_length`={how.max_length}" if cut else "both answers are the same"
        )
    return found | {"reason": reason, "cut": cut, "merged": int(first < len(asked))}


# -- a dataset


@dataclass
class RowCounts:
    """What a dataset lost, by the numbers of its rows, which a stream may pass more than once."""

    name: str
    how: Tokenising
    unread: list[str] = field(default_factory=list)  # columns
    rows: int = 0
    left_out: dict[int, str] = field(default_factory=dict)
    cut: dict[int, int] = field(default_factory=dict)
    merged: set[int] = field(default_factory=set)
    said: str = ""

    def add(self, row: int, reason: str, cut: int, merged: int) -> None:
        self.rows = max(self.rows, row + 1)
        if reason:
            self.left_out[row] = reason
        elif cut:
            self.cut[row] = cut
        if merged:
            self.merged.add(row)

    def __str__(self) -> str:
        reasons = list(self.left_out.values())
        parts = [f"{reasons.count(reason)} of {self.rows} rows: {reason}" for reason in dict.fromkeys(reasons)]
        if self.cut:
            tokens, length = sum(self.cut.values()), self.how.max_length
            parts.append(f"{len(self.cut)} of {self.rows} rows: cut to `max_length`={length}, {tokens} tokens left out")
        if self.merged:
            parts.append(f"{len(self.merged)} of {self.rows} rows: the answer changes the last tokens of its prompt")
        if self.unread:
            parts.append(f"columns not read: {', '.join(self.unread)}")
        return "; ".join(parts)

    def report(self) -> None:
        """Says it, once; of a stream again when it has lost more."""
        if (line := str(self)) != self.said:
            lost = self.left_out or self.cut or self.merged
            logger.log(logging.WARNING if lost else logging.INFO, "%s: %s", self.name, line)
            self.said = line


def read_dataset(dataset: Any, name: str, is_prepared: bool = False) -> Any:
    """A dataset that rows can be read from; `is_prepared`: nothing is to be done to them.

    Raises:
        UserError: it is none, has splits, is empty, or transforms its rows as they are read though they are to be prepared.
    """
    if isinstance(dataset, list):
        dataset = _table(dataset, name)
    if isinstance(dataset, dict):
        raise UserError(f"`{name}`: it has the splits {sorted(dataset)}; pass one of them.")
    if not isinstance(dataset, Dataset | IterableDataset):
        raise UserError(f"`{name}`: a Dataset, an IterableDataset or a list of rows is needed, got {dataset!r:.60}.")
    if isinstance(dataset, Dataset) and dataset.format["type"] == "custom" and not is_prepared:
        raise UserError(
            f"`{name}` has a transform, `Dataset.with_transform()`, which preparation would run once and keep; apply it by `map`, or in "
            "SFT set `dataset_kwargs`={'skip_prepare_dataset': True} and let it return trainer-ready rows."
        )
    first = next(iter(dataset), None)
    if first is None:
        raise UserError(f"`{name}` is empty.")
    for column in MEDIA:
        if first.get(column) not in (None, []):
            raise Place(name, 0).error(column, f"holds {column}", "these models read text alone")
    return dataset


def _table(rows: list[Any], name: str) -> Dataset:
    try:
        return Dataset.from_list(rows)
    except Exception as error:  # of Arrow, which names no row
        for number, row in enumerate(rows):
            if not isinstance(row, dict):
                raise UserError(f"`{name}`: row {number} is {row!r:.60}; a mapping is needed.") from error
            if form := form_of(row):
                read_row(row, form, Place(name, number))
        raise UserError(f"`{name}`: its rows are not of one kind: {' '.join(str(error).split())}.") from error


def tokenised(
    dataset: Any, how: Tokenising, name: str, reports: list[RowCounts] | None = None, num_proc: int | None = None
) -> Any:
    """Rows as `input_ids` and `labels`; packed ones and what has gone through here stay as they are.

    Args:
        name: of the dataset, as errors say it.
        reports: what a stream will lose is put here, to be reported when it has flowed.
    """
    columns = columns_of(dataset := read_dataset(dataset, name))
    if "seq_lengths" in columns:
        return dataset
    if how.formatting_func is not None and how.completion_only:
        raise UserError(
            "`formatting_func` makes one text of a row, without an answer for `completion_only_loss`; leave one out."
        )
    form = form_of(columns, how.text_field)
    if form is None and how.formatting_func is None:
        raise UserError(f"`{name}` has the columns {columns}; one of {SHAPES} is needed.")
    sides = ("prompt", "completion") if form == "completion" else ()
    read = {form, "tools", "chat_template_kwargs", *sides, *how.kept}
    if form == "input_ids":
        read |= {"labels", "completion_mask", "assistant_masks", "attention_mask", "token_type_ids"}
    row_counts = RowCounts(name, how, [column for column in columns if column not in read])
    row_of = partial(_numbered, tokenised_row, form, how, name)
    return _through(dataset, row_of, row_counts, "labels", (reports, num_proc))


def tokenised_pairs(
    dataset: Any, how: Tokenising, name: str, reports: list[RowCounts] | None = None, num_proc: int | None = None
) -> Any:
    """Pairs as `prompt_ids`, `chosen_ids` and `rejected_ids`, as `tokenised`."""
    columns = columns_of(dataset := read_dataset(dataset, name))
    if "chosen_ids" in columns:
        return dataset
    check_pair_columns(columns, name)
    read = {"prompt", "chosen", "rejected", "tools", "chat_template_kwargs"}
    row_counts = RowCounts(name, how, [column for column in columns if column not in read])
    row_of = partial(_numbered, tokenised_pair, "pair", how, name)
    return _through(dataset, row_of, row_counts, "chosen_ids", (reports, num_proc))


def check_pair_columns(columns: Iterable[str], name: str) -> None:
    if missing := [side for side in ("chosen", "rejected") if side not in columns]:
        raise UserError(
            f"`{name}` lacks {missing}, its columns are {sorted(columns)}; a pair has `chosen` and `rejected`, and a `prompt` "
            "of its own or as their common beginning."
        )


def columns_of(dataset: Any) -> list[str]:
    return list(next(iter(dataset))) if dataset.column_names is None else dataset.column_names


def _numbered(work: Callable, form: str, how: Tokenising, name: str, example: dict[str, Any], row: int) -> dict:
    return work(example, form, how, Place(name, row))


def _through(
    dataset: Any,
    row_of: Callable,
    row_counts: RowCounts,
    scored: str,
    options: tuple[list[RowCounts] | None, int | None],
) -> Any:
    """The dataset through `row_of`, without the rows that have nothing to learn from; counted and checked."""
    reports, num_proc = options
    columns = [column for column in columns_of(dataset) if column not in row_counts.how.kept]
    counts = ["reason", "cut", "merged"]
    if isinstance(dataset, Dataset):
        found = {"num_proc": num_proc, "desc": f"Tokenizing {row_counts.name}"}
        dataset = dataset.map(row_of, with_indices=True, remove_columns=columns, **found)
        for row, lost in enumerate(zip(*(dataset[name] for name in counts), strict=True)):
            row_counts.add(row, *lost)
        if row_counts.left_out:
            dataset = dataset.select([row for row in range(row_counts.rows) if row not in row_counts.left_out])
        first = dataset
    else:

        def counted(example: dict[str, Any], row: int) -> dict[str, Any]:
            found = row_of(example, row)
            row_counts.add(row, *(found[name] for name in counts))
            return found

        dataset = dataset.map(counted, with_indices=True, remove_columns=columns)
        first = []
        for row in itertools.islice(dataset, PEEK):
            first += [] if row["reason"] else [row]
            if len(first) == 10:
                break
        dataset = dataset.filter(lambda row: not row["reason"])
    if len(first) == 0:
        raise UserError(f"`{row_counts.name}`: {row_counts}; no row is left; raise `max_length`, or look at the rows.")
    if not row_counts.name.startswith("eval"):
        _warn_of_no_end(first, scored, row_counts)
    if isinstance(dataset, Dataset):
        row_counts.report()
    elif reports is not None:
        reports.append(row_counts)
    return dataset.remove_columns(counts)


def _warn_of_no_end(rows: Iterable[dict[str, Any]], scored: str, row_counts: RowCounts) -> None:
    """A model that is never shown an end writes on for ever."""
    ends, seen = set(row_counts.how.ends), 0
    for row in itertools.islice(rows, PEEK):
        seen += 1
        if not ends.isdisjoint(row[scored]):
            return
    known = [row_counts.how.tokenizer.convert_ids_to_tokens(end) for end in row_counts.how.ends]
    logger.warning(
        "%s: none of %d rows has an end token (%s) to learn from, so answers will not end; set `eos_token` to the token that ends them, "
        "use a chat template that ends turns with one, or raise `max_length`",
        row_counts.name,
        seen,
        ", ".join(map(str, known)) or "the tokenizer has none",
    )
