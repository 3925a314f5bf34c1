"""Special tokens of a model and its tokenizer: the mask, and those that end a text; and texts as token ids, in one way for all.

A prompt has no end: what a post-processor appends to every text is taken off. A conversation's prompt stops where its answers begin in
training, which is before the generation prompt does where that opens a thought that finished conversations do not have.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.sandbox import SecurityError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import UserError
from .patching import base_of, embedding_table

logger = logging.getLogger(__name__)

MASK_TOKEN, PAD_TOKEN = "<|mask|>", "<|pad|>"
TOKEN_IDS = ("eos", "pad")
_ANSWER = "~answer~"
REFUSALS = TemplateError | ValueError | TypeError  # of a template that takes other conversations


# -- where a text ends


def turn_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template ends an assistant's turn; None: there is no template, or plain text ends it.

    Raises:
        UserError: a template that can render no conversation.
    """
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
    try:
        text = _rendered(tokenizer, turns, tokenize=False)
    except ValueError as error:
        why = error.__cause__ or error
        if isinstance(why, TemplateSyntaxError | SecurityError) or not isinstance(why, REFUSALS):
            raise
        return None  # there is none, or it takes no such conversation
    behind = tokenizer(text.rpartition(_ANSWER)[2], add_special_tokens=False)["input_ids"]
    no_end = (tokenizer.bos_token_id, tokenizer.mask_token_id)
    return next((token for token in behind if token in tokenizer.added_tokens_decoder and token not in no_end), None)


def end_token_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All tokens that end a text of this model: of an assistant's turn, of the tokenizer, of the generation_config, in this order."""
    own = getattr(getattr(base_of(model), "generation_config", None), "eos_token_id", None)
    own = [own] if own is None or isinstance(own, int) else list(own)
    found = (turn_end_id(tokenizer), tokenizer.eos_token_id, *own)
    return list(dict.fromkeys(token for token in found if token is not None))


def answer_end_id(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict]) -> int | None:
    """The token that an answer to this prompt ends with in training: of text the tokenizer's, of a conversation the template's."""
    end = None if isinstance(prompt, str) else turn_end_id(tokenizer)
    return tokenizer.eos_token_id if end is None else end


def set_end_tokens(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase) -> None:
    """Writes all of them into the generation_config, which is what `generate` reads and a checkpoint saves."""
    config, ends = base_of(model).generation_config, end_token_ids(model, tokenizer)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if ends and set(ends) != set(known):
        config.eos_token_id = ends if len(ends) > 1 else ends[0]


# -- texts and conversations as token ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, add_special_tokens: bool = True) -> list[int]:
    """The tokens of a text, with what the tokenizer puts before it, once, and without what it puts behind it."""
    ids = list(tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    if add_special_tokens:
        ids = ids[: len(ids) - _n_appended(tokenizer)]
        if ids[:2] == [tokenizer.bos_token_id] * 2 and text.startswith(tokenizer.bos_token):
            del ids[0]  # a chat template has written it already
    return ids


def _n_appended(tokenizer: PreTrainedTokenizerBase) -> int:
    bare, whole = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    fitting = (i for i in range(len(whole) - len(bare), -1, -1) if whole[i : i + len(bare)] == bare)
    return len(whole) - len(bare) - next(fitting, len(whole) - len(bare))


def shared_length(one: Sequence, other: Sequence) -> int:
    """How many elements two sequences begin with alike."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))


class ChatTemplateError(UserError, TemplateError):
    """A conversation that a chat template does not take, or a template that takes none."""


def _rendered(tokenizer: PreTrainedTokenizerBase, turns: list[dict], **options: Any) -> Any:
    try:
        return tokenizer.apply_chat_template(turns, **options)
    except Exception as error:  # a template is a program of the checkpoint's, and fails as it likes
        if not tokenizer.chat_template:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ChatTemplateError(f"`model`: its chat template does not take this conversation ({reason}).") from error


def chat_ids(tokenizer: PreTrainedTokenizerBase, turns: list[dict], **template: Any) -> list[int]:
    """The tokens of a conversation; `template`: keywords of `apply_chat_template`."""
    return list(_rendered(tokenizer, turns, tokenize=True, return_dict=True, **template)["input_ids"])


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], **template: Any) -> list[int]:
    """The tokens of a prompt, text or messages, that an answer continues.

    Args:
        template: `tools` and whatever else the chat template reads.
    """
    if isinstance(prompt, str):
        return text_ids(tokenizer, prompt)
    ids = chat_ids(tokenizer, prompt, add_generation_prompt=True, **template)
    try:
        answered = chat_ids(tokenizer, [*prompt, {"role": "assistant", "content": _ANSWER}], **template)
    except TemplateError:  # no answer may follow
        return ids
    end = shared_length(ids, answered)
    if end < len(ids):  # never into the conversation itself
        end = max(end, shared_length(ids, chat_ids(tokenizer, prompt, **template)))
    return ids[:end]


# -- the mask and other special tokens


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
        return add_special_token(model, tokenizer, "mask", MASK_TOKEN)
    check_mask_token(tokenizer, mask_token_id)
    token = tokenizer.convert_ids_to_tokens(mask_token_id)
    if tokenizer.mask_token_id != mask_token_id:
        tokenizer.mask_token = token
        if tokenizer.decode([mask_token_id]) == token:
            # Reloaded tokenizers look for special tokens before they cut words.
            logger.warning("the mask token %r may stand in ordinary text, where it is read as a mask", token)
    grow(model, mask_token_id)
    return mask_token_id


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises UserError where the tokenizer has tokens, its mask left out, that the embedding has no row for."""
    rows, known = len(embedding_table(model)), tokenizer.get_vocab()
    highest = max((token_id for token_id in known.values() if token_id != tokenizer.mask_token_id), default=0)
    if 0 < rows <= highest:  # none are here where DeepSpeed has dealt them out
        raise UserError(
            f"`model`: {model.config.name_or_path!r} has a vocabulary of {rows} tokens, and its tokenizer goes up to id {highest}; put the "
            "tokenizer that it was trained with beside it, or give the model rows by `resize_token_embeddings`."
        )


def name_mask_token(tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> None:
    """Makes a converted model's mask known to the tokenizer of its base, which knows none."""
    if tokenizer.mask_token is not None or mask_token_id > len(tokenizer):
        return
    new = mask_token_id == len(tokenizer)
    token = MASK_TOKEN if new else tokenizer.convert_ids_to_tokens(mask_token_id)
    tokenizer.add_special_tokens({"mask_token": token})


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
            add_special_token(model, tokenizer, "pad", PAD_TOKEN)
        else:
            setattr(tokenizer, f"{name}_token", _existing(tokenizer, token_id, f"token_ids.{name}"))
    for name in ids:
        setattr(model.config, f"{name}_token_id", ids[name])
        setattr(model.generation_config, f"{name}_token_id", ids[name])
    set_end_tokens(model, tokenizer)


def set_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Pads with the end token where the tokenizer has no padding token, or with a new one where it has neither."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        logger.warning("the tokenizer has neither a padding nor an end token; it gets %r for padding", PAD_TOKEN)
        add_special_token(model, tokenizer, "pad", PAD_TOKEN)


def grow(model: PreTrainedModel, token_id: int) -> None:
    """A row of the embedding for the token. Never `len(tokenizer)`: that would shrink a padded vocabulary, Qwen3's for one."""
    known = len(embedding_table(model))
    if token_id < known:
        return
    model.resize_token_embeddings(token_id + 1, pad_to_multiple_of=64, mean_resizing=False)
    # The same numbers whenever it grows, also where an adapter is loaded: the mean of all others, as likely as the average token.
    for module in filter(None, (model.get_input_embeddings(), model.get_output_embeddings())):
        for parameter in module.parameters():
            parameter.data[known:] = parameter.data[:known].float().mean(0).to(parameter.dtype)


def add_special_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, token: str) -> int:
    """A special token; the row of a new one is the mean of those before it, one that was there already keeps its own."""
    new = token not in tokenizer.get_vocab()
    tokenizer.add_special_tokens({f"{name}_token": token})
    token_id = getattr(tokenizer, f"{name}_token_id")
    grow(model, token_id)
    if new:
        set_to_mean(model, token_id)
    return token_id


@torch.no_grad()
def set_to_mean(model: torch.nn.Module, token_id: int) -> None:
    """Makes a token's row the mean of those before it."""
    weight = embedding_table(model)
    weight[token_id] = weight[:token_id].float().mean(0).to(weight.dtype)


def _existing(tokenizer: PreTrainedTokenizerBase, token_id: int, key: str) -> str:
    token = tokenizer.convert_ids_to_tokens(token_id) if 0 <= token_id < len(tokenizer) else None
    if token is None:
        raise UserError(
            f"`{key}`: {token_id} is no token; the tokenizer has the ids 0 to {len(tokenizer) - 1}, and {len(tokenizer)} would be a new one."
        )
    return token
