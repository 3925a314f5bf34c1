"""Texts as rows of tokens of which some are scored: whole texts, completions behind prompts, windows over long ones, blocks.

The length of a text is given, as is what stands before it; its first token is context (the BOS, where the tokenizer puts one), because
no causal model scores it. Texts longer than a window are cut: every window sees `max_length - stride` tokens of what came before, and by
the chain rule the bounds of the parts add up.

    text       a b c d e f g h i j     max_length 6, stride 3
    window 1   a B C D E F             capitals are scored, the others seen
    window 2         d e f G H I
    window 3           e f g h i J

Trade-off: a token right behind a cut sees less than the whole text, which makes the bound looser, for the AR model alike. Alternative:
one window a text, as long as the model can count: `stride` is of no use then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..models.patching import base_of

DEFAULT_LENGTH = 1024  # of a window, where the model can count further


@dataclass(frozen=True)
class Row:
    """Tokens of which those from `first` on are scored, the others seen; `text` is the number of the text they belong to."""

    ids: tuple[int, ...]
    first: int
    text: int = 0


def text_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Row]:
    """Texts, of which all but the first token is scored.

    Raises:
        ValueError: no text, or a text of fewer than two tokens.
    """
    rows = [Row(tuple(tokenizer(text)["input_ids"]), 1, number) for number, text in enumerate(texts)]
    for row, text in zip(rows, texts, strict=True):
        if len(row.ids) < 2:
            raise UserError(
                f"`texts`: text {row.text} ({text[:40]!r}) has {len(row.ids)} token(s); at least 2 are needed, the first being context. "
                "Leave it out."
            )
    if not rows:
        raise UserError("`texts` are empty: there is nothing to measure.")
    return rows


def pair_row(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], completion: str, number: int = 0) -> Row:
    """A prompt (text or messages) and the completion that is scored; blanks between the two belong to the completion."""
    if isinstance(prompt, str):
        stem = prompt.rstrip()
        context = list(tokenizer(stem)["input_ids"])
        ids = list(tokenizer(prompt + completion)["input_ids"])
    else:
        context = list(tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False))
        ids = context + list(tokenizer(completion, add_special_tokens=False)["input_ids"])
    first = max(len(context), 1)  # without a prompt the first token is context
    if len(ids) <= first:
        raise UserError(f"`completion`: {completion!r} adds no token to its prompt, so there is nothing to score.")
    return Row(tuple(ids), first, number)


def windows(row: Row, max_length: int, stride: int) -> list[Row]:
    """A row cut into windows of at most `max_length` tokens; the first scores all it can, each later one at most `stride` tokens."""
    parts, start = [], row.first
    while start < len(row.ids):
        end = min(start + max(max_length - start, stride), len(row.ids))
        left = max(0, end - max_length)
        parts.append(Row(row.ids[left:end], start - left, row.text))
        start = end
    return parts


def window_length(model: torch.nn.Module, max_length: int | None, stride: int | None) -> tuple[int, int]:
    """Checked tokens of a window and of its scored part, by default half of it."""
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    length = min(limit, DEFAULT_LENGTH) if max_length is None else max_length
    if not 2 <= length <= limit:
        raise UserError(f"`max_length` must be from 2 to the model's {limit} positions, got {length}.")
    stride = length // 2 if stride is None else stride
    if not 1 <= stride < length:
        raise UserError(f"`stride` must be from 1 to `max_length` - 1 = {length - 1}, got {stride}.")
    return length, stride


def block_rows(rows: Sequence[Row], block_length: int) -> list[Row]:
    """Every block as a row of its own, behind the text before it."""
    return [
        Row(row.ids[: start + block_length], max(start, row.first), row.text)
        for row in rows
        for start in range(row.first - row.first % block_length, len(row.ids), block_length)
    ]
