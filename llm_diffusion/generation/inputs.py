"""What decoding is given, checked once at its entrance: token ids, their attention mask, processors, a streamer, texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from .. import UserError
from ..models.patching import base_of, embedding_table


def checked_inputs(
    model: torch.nn.Module,
    ids: Any,
    mask: Any = None,
    *,
    pad_token_id: int | None = None,
    left_padded: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, L) and their attention mask as int64, with one wait for the device.

    Args:
        ids: of any whole type, each a row of the embedding.
        mask: 0 at padding and 1 elsewhere, of any type. None: all 1, but for tokens on the left that are `pad_token_id`.
        left_padded: whether prompts end in the last column; rows with masks of their own may be padded on either side.

    Raises:
        UserError: anything else.
    """
    base, ids = base_of(model), _whole_tensor(ids, "input_ids")
    weight = embedding_table(base)
    elsewhere = ids.device != weight.device and getattr(base, "hf_device_map", None) is None
    if elsewhere or ids.is_meta:
        raise UserError(f"`input_ids` are on {ids.device}, the model on {weight.device}; move them there by `.to()`.")
    if mask is None:
        mask = torch.ones_like(ids)
        if pad_token_id is not None and ids.numel():
            mask = (ids != pad_token_id).long().cummax(-1).values
            mask = mask | (1 - mask[:, -1:])  # of nothing else it is text
    elif not isinstance(mask, torch.Tensor) or mask.shape != ids.shape or mask.device != ids.device:
        found = (tuple(mask.shape), str(mask.device)) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise UserError(f"`attention_mask` must be a tensor {tuple(ids.shape)} on {ids.device}, got {found}.")
    if not ids.numel():
        return ids, mask.long()
    real = mask == 1
    rising = (real[:, 1:] & ~real[:, :-1]).sum(-1) + real[:, 0]
    facts = [
        ids.min(),
        ids.max(),
        (real | (mask == 0)).all(),
        real.any(-1).all(),
        (rising <= 1).all(),
        real[:, -1].all(),
    ]
    lowest, highest, binary, filled, whole, ended = torch.stack([fact.long() for fact in facts]).tolist()
    if lowest < 0 or highest >= weight.shape[0]:
        wrong = lowest if lowest < 0 else highest
        raise UserError(f"`input_ids` must be rows of the embedding, [0, {weight.shape[0]}), got {wrong}.")
    if not binary:
        raise UserError("`attention_mask` must be 1 at tokens and 0 at padding, got other numbers.")
    if left_padded and not filled:
        raise UserError("`attention_mask`: a row is padding alone; answer an empty prompt by itself.")
    if left_padded and not ended:
        raise UserError("`input_ids`: prompts must be padded on the left (`tokenizer.padding_side='left'`).")
    if not whole:
        raise UserError("`attention_mask` has a hole: 0 between tokens of a row; padding stands at its ends.")
    return ids, real.long()


def _whole_tensor(ids: Any, name: str) -> torch.Tensor:
    if isinstance(ids, Mapping):
        raise UserError(f"`{name}`: got a mapping with {list(ids)[:3]}; pass it as `**batch`.")
    if not isinstance(ids, torch.Tensor):
        raise UserError(f"`{name}` must be a tensor of token ids (batch, length), got {type(ids).__name__}.")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise UserError(f"`{name}` must be whole numbers, got {ids.dtype}.")
    if ids.dim() != 2 or not len(ids):
        raise UserError(f"`{name}` must be (batch, length) with at least one row, got {tuple(ids.shape)}.")
    return ids.long()


def checked_processors(processors: Any) -> LogitsProcessorList:
    if not isinstance(processors, list | tuple | None) or not all(map(callable, processors or ())):
        raise UserError(f"`logits_processor` must be a list of functions of (ids, scores), got {processors!r}.")
    return LogitsProcessorList(processors or [])


def check_streamer(streamer: BaseStreamer | None) -> None:
    if streamer is not None and not all(callable(getattr(streamer, name, None)) for name in ("put", "end")):
        raise UserError(f"`streamer` must have `put` and `end`, got {streamer!r}.")


def checked_texts(texts: Any, name: str) -> list[str]:
    """A list of texts, of which there may be one alone."""
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise UserError(f"`{name}` must be text, or a list of texts, got {texts!r:.80}.")
    for text in texts:
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"`{name}` must be text that can be written as UTF-8, got {text!r:.80}.")
    return list(texts)
