"""What happens to data sets before the first step: prompts split off, canvases, preference pairs, and what is refused or dropped."""

from __future__ import annotations

import logging
from typing import Any

import torch
from datasets import Dataset

from .. import UserError
from ..data.datasets import as_prompt_completion
from .collator import DataCollatorForMaskedDiffusion
from .config import DiffusionSFTConfig

logger = logging.getLogger(__name__)


def clean_prompts(dataset: Any, split: bool) -> Any:
    """`messages` -> prompt and completion, for one dataset or a dict of them."""
    if isinstance(dataset, dict):
        return {name: clean_prompts(part, split) for name, part in dataset.items()}
    if dataset is None or "messages" not in (dataset.column_names or []):
        return dataset
    # TRL takes any `prompt` column for prompt and completion; chats are told by `messages` alone.
    dataset = dataset.remove_columns([name for name in ("prompt", "completion") if name in dataset.column_names])
    return as_prompt_completion(dataset) if split else dataset


def with_canvases(dataset: Any, collator: DataCollatorForMaskedDiffusion, num_proc: int | None) -> Any:
    """Tokenised texts as canvases, so that they can be packed."""

    def canvas(example: dict[str, Any]) -> dict[str, list[int]]:
        ids, labels = collator.canvas(list(example["input_ids"]), list(example["labels"]))
        return {"input_ids": ids, "labels": labels}

    options = (
        {"num_proc": num_proc, "desc": "Making canvases"} if isinstance(dataset, Dataset) else {}
    )  # streams take none
    return dataset.map(canvas, **options)


def report_dropped(given: Any, kept: Any, args: DiffusionSFTConfig) -> None:
    if isinstance(given, Dataset) and isinstance(kept, Dataset) and 0 < len(kept) < len(given):
        logger.warning(
            "%d of %d rows have nothing left to train on after truncation to `max_length`=%s and are dropped",
            len(given) - len(kept),
            len(given),
            args.max_length,
        )


def check_rows_left(dataset: Any, args: DiffusionSFTConfig) -> None:
    """Refuses data that truncation has left nothing of. ValueError."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise UserError(
            f"`train_dataset`: no row has a token left to train on: after truncation to `max_length`={args.max_length} every "
            "label is -100; raise it, shorten the prompts, or look at the labels."
        )


def check_columns(dataset: Any, name: str) -> None:
    """Refuses data without rows, or without the two answers of a pair.

    Raises:
        ValueError: no row, or a missing column.
    """
    if (first := next(iter(dataset), None)) is None:
        raise UserError(f"`{name}_dataset` is empty.")
    if missing := [side for side in ("chosen", "rejected") if side not in first]:
        raise UserError(
            f"`{name}_dataset` lacks {missing}, its columns are {sorted(first)}; a pair has `chosen` and `rejected`, and a `prompt` "
            "of its own or as their common beginning."
        )


def check_pairs(dataset: Any, name: str) -> Any:
    """The data, refused where it holds no preference; a stream is checked as it flows.

    Raises:
        ValueError: see `check_columns`; an empty answer, or two equal ones.
    """
    check_columns(dataset, name)
    return dataset.filter(_is_pair, with_indices=True, fn_kwargs={"name": name})


def _is_pair(example: dict[str, Any], row: int, name: str) -> bool:
    for side in ("chosen", "rejected"):
        text, acts = _last_words(example[side])
        if not acts and not (text if isinstance(text, str) else repr(text)).strip():
            raise UserError(f"`{name}_dataset`: `{side}` of row {row} is empty; an answer is needed to compare.")
    if example["chosen"] == example["rejected"]:
        raise UserError(
            f"`{name}_dataset`: `chosen` and `rejected` of row {row} are the same; leave the pair out, it prefers nothing."
        )
    return True


def _last_words(side: Any) -> tuple[str, bool]:
    """The text of an answer, or of a conversation's last turn; and whether it does something else than speak."""
    if isinstance(side, str):
        return side, False
    if not side:
        return "", False
    return side[-1].get("content") or "", bool(side[-1].get("tool_calls"))


def by_length(batch: dict[str, Any], multiple: int = 1) -> list[dict[str, Any]]:
    """The shorter two thirds and the longer third of a batch's rows, each cut to its own longest row.

    Text lengths are skewed: this saves a third or more of the padding, and changes nothing else, because noise belongs to rows
    and losses are sums.
    """
    lengths = (batch["attention_mask"] > 0).sum(-1)
    n = len(lengths)
    if n < 3:
        return [batch]
    (ordered, order), parts, first = lengths.sort(stable=True), [], 2 * n // 3
    ends = torch.stack([ordered[first - 1], ordered[-1]]).tolist()  # both by one wait for the device
    for rows, longest in zip((order[:first], order[first:]), ends, strict=True):
        longest = -(-longest // multiple) * multiple
        part = {name: batch[name][rows, :longest] for name in ("input_ids", "labels", "attention_mask")}
        if "noise_rows" in batch:
            part |= {"noise_rows": batch["noise_rows"][rows], "n_noise_rows": batch["n_noise_rows"]}
        parts.append(part)
    return parts
