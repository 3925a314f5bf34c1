"""Special tokens that a model needs and its tokenizer may lack: the mask, and an end and a padding token chosen by id.

A token with a row of its own is clean: no text holds it. An ordinary word as the mask (DiffuGPT's 10541) spares the row, and every
published checkpoint that did so must be read with it; where that word stands in a text, it is a mask that nobody asks for.
Trade-off: rows are added one by one, never `len(tokenizer)`. Alternative: resizing the embedding to the tokenizer, as the hosts do.
"""

from __future__ import annotations

import logging

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import UserError

logger = logging.getLogger(__name__)

MASK_TOKEN, PAD_TOKEN = "<|mask|>", "<|pad|>"
TOKEN_IDS = ("eos", "pad")


def set_mask_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None = None) -> int:
    """Gives tokenizer and model their mask token; returns its id.

    Args:
        mask_token_id: None: the tokenizer's own, or a new one in the first free row of the embedding. A token of the vocabulary
            becomes the mask and keeps its row. The number behind the last token makes a new one.

    Raises:
        ValueError: no such token, or it is the end, start or padding token.
    """
    if mask_token_id is None and tokenizer.mask_token is not None:
        grow(model, tokenizer.mask_token_id)
        return tokenizer.mask_token_id
    if mask_token_id is None or mask_token_id == len(tokenizer):
        return _add(model, tokenizer, "mask", MASK_TOKEN)
    check_mask_token(tokenizer, mask_token_id)
    token = _existing(tokenizer, mask_token_id, "mask_token_id")
    if tokenizer.mask_token_id != mask_token_id:
        tokenizer.mask_token = token
        if tokenizer.decode([mask_token_id]) == token:
            # Reloaded tokenizers look for special tokens before they cut words.
            logger.warning("the mask token %r may stand in ordinary text, where it is read as a mask", token)
    grow(model, mask_token_id)
    return mask_token_id


def check_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token_id: int | None) -> None:
    """Raises ValueError for an id that is no token, or the end, start or padding token; None is right."""
    if mask_token_id is None or mask_token_id == len(tokenizer):
        return
    token = _existing(tokenizer, mask_token_id, "mask_token_id")
    if mask_token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id):
        raise UserError(
            f"`mask_token_id`: {mask_token_id} is {token!r}, which ends, starts or pads texts; choose another token."
        )


def use_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: dict[str, int]) -> None:
    """Makes the tokens with these ids the end ("eos") and the padding token ("pad") of tokenizer and model.

    A padding token may be new: its id is then the number behind the last token, as 50257 in GPT-2.

    Raises:
        ValueError: no such token, or it is the mask.
    """
    for name, token_id in ids.items():
        if token_id == getattr(tokenizer, f"{name}_token_id"):
            continue
        if token_id == tokenizer.mask_token_id:
            raise UserError(f"`token_ids.{name}`: {token_id} is the mask token {tokenizer.mask_token!r}.")
        if name == "pad" and token_id == len(tokenizer):
            _add(model, tokenizer, "pad", PAD_TOKEN)
        else:
            setattr(tokenizer, f"{name}_token", _existing(tokenizer, token_id, f"token_ids.{name}"))
    for name in ids:
        setattr(model.config, f"{name}_token_id", ids[name])
        setattr(model.generation_config, f"{name}_token_id", ids[name])


def grow(model: PreTrainedModel, token_id: int) -> None:
    """A row of the embedding for the token. Never `len(tokenizer)`: that would shrink a padded vocabulary, Qwen3's for one."""
    if token_id >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(token_id + 1, pad_to_multiple_of=64, mean_resizing=False)


def _add(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, token: str) -> int:
    """A new special token, whose row is the mean of all others."""
    known = len(tokenizer)
    tokenizer.add_special_tokens({f"{name}_token": token})
    token_id = getattr(tokenizer, f"{name}_token_id")
    grow(model, token_id)
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[token_id] = weight[:known].float().mean(0).to(weight.dtype)
    return token_id


def _existing(tokenizer: PreTrainedTokenizerBase, token_id: int, key: str) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    if token is None:
        raise UserError(
            f"`{key}`: {token_id} is no token; the tokenizer has the ids 0 to {len(tokenizer) - 1}, and {len(tokenizer)} would be a new one."
        )
    return token
