"""Finds out by perturbation which positions attend to which, and whether a cache can hold clean text.

Settings, flags and docstrings of an architecture can be wrong; what changes when a token changes cannot. It takes a few short forwards
at every load.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from .. import UserError
from ..objective.attention_masks import additive, block_causal, positions
from .forward import forward_state
from .patching import base_of, embedding_table, in_eval_mode
from .record import record_of

PROBE_LENGTH = 8
PADDING = 3  # tokens of padding in padded probes
TOLERANCE = 1e-4
BLOCK, BLOCKS = 4, 3  # of the probe of a cache


def same_logits(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether two ways to the same logits differ by rounding alone, that of their type through a deep model; non-finite ones do not."""
    tolerance = max(0.01, 16 * torch.finfo(wanted.dtype).eps)
    return bool((found - wanted).abs().max() <= tolerance * wanted.abs().max())


def probe_ids(model: PreTrainedModel, length: int) -> torch.Tensor:
    """(1, length) token ids in the lower half of the vocabulary, clear of the first ones, which are special as a rule."""
    embedding = embedding_table(model)
    half = embedding.shape[0] // 2
    low = min(5, half - 1)
    return low + torch.arange(length, device=embedding.device)[None] * 7 % (half - low)


def eval_logits(model: torch.nn.Module, **inputs: torch.Tensor) -> torch.Tensor:
    """fp32 logits without dropout (it would look like dependence), and without noise where the model has a time embedding."""
    if hasattr(base_of(model), "time_embedding"):
        # A mask among the tokens must not look like noise.
        inputs["timesteps"] = torch.zeros(inputs["input_ids"].shape, device=inputs["input_ids"].device)
    with in_eval_mode(model):
        return model(**inputs, use_cache=False).logits.float()


def _logits(
    model: torch.nn.Module, ids: torch.Tensor, left_padding: int, block_length: int | None = None
) -> torch.Tensor:
    """(B, L, V) fp32 logits of rows that are all padded on the left by as much."""
    ids = torch.nn.functional.pad(ids, (left_padding, 0), value=1)
    mask = torch.ones_like(ids)
    mask[:, :left_padding] = 0
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    if left_padding or block_length:
        # Some architectures derive positions from a 2-D mask, which a 4-D one is not.
        inputs |= {"attention_mask": mask, "position_ids": positions(mask).clamp(min=0)}
    if block_length:
        inputs["attention_mask"] = additive(block_causal(mask, block_length), base_of(model).dtype)
    return eval_logits(model, **inputs)[:, left_padding:]


@torch.no_grad()
def attention_pattern(
    model: torch.nn.Module, left_padding: int = 0, length: int = PROBE_LENGTH, block_length: int | None = None
) -> torch.Tensor:
    """Which position depends on which: (length, length) bool, [i, j] = the output at position i changes when token j changes.

    One forward: row 0 is a text, row j + 1 the same text with token j replaced. With `left_padding` > 0 the text stands after
    that many padding tokens. With `block_length` the model is given a block-causal 4-D mask, as block decoding does.
    """
    base = base_of(model)
    ids = probe_ids(base, length).repeat(length + 1, 1)
    ids[1:].diagonal().add_(len(embedding_table(base)) // 2)
    logits = _logits(model, ids, left_padding, block_length)
    change = (logits[1:] - logits[:1]).abs().amax(-1)
    # Experts of mixture models are run in groups: identical rows may differ by rounding, never by this much.
    return (change > TOLERANCE * logits.abs().max()).T


def probe_attention(model: torch.nn.Module, block_length: int | None = None) -> str:
    """Finds out by perturbation, with and without padding, which positions attend to which.

    Args:
        block_length: of a block model, which is given its mask; read from `config.diffusion` when left out.

    Returns:
        "causal", "bidirectional", "block" (block-causal) or "mixed" (none of these, or different with padding). The base of a
        lossless drafter is causal.
    """
    record = record_of(model)
    if record.mode.has_blocks and not record.mode.drafts:
        block_length = block_length or record.block_length
    length = max(PROBE_LENGTH, 2 * (block_length or 0))
    index = torch.arange(length)
    patterns = {"causal": index[:, None] >= index[None], "bidirectional": torch.ones(length, length, dtype=torch.bool)}
    if block_length:  # first: blocks of one are causal, and meant to be
        patterns = {"block": index[:, None] // block_length >= index[None] // block_length, **patterns}
    found = [attention_pattern(model, left_padding, length, block_length).cpu() for left_padding in (0, PADDING)]
    for name, pattern in patterns.items():
        if all(torch.equal(pattern, dependence) for dependence in found):
            return name
    return "mixed"


@torch.no_grad()
def causal_layers(model: torch.nn.Module, left_padding: int = 0, block_length: int | None = None) -> list[int]:
    """Indices of the layers in which the first token does not see the last: one of them hides behind any other that does.

    Of three equal rows the last hidden state of two is changed before each layer, in opposite directions (attention to one of
    them may be nothing), and changed back behind it. With `block_length` the model is given a block-causal 4-D mask.
    """
    base, found = base_of(model), []
    layers = [module for module in base.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:  # remote code: the longest list of modules
        lists = [module for module in base.modules() if isinstance(module, torch.nn.ModuleList)]
        layers = list(max(lists, key=len, default=[]))

    def compare(index: int) -> Any:
        def hook(_: torch.nn.Module, __: tuple, output: Any) -> Any:
            several = isinstance(output, tuple | list)
            hidden = (output[0] if several else output).clone()
            first = _rows_at(hidden, left_padding, left_padding)
            # By element: a few huge activations would drown the rest.
            same, change = first[:1].abs(), (first[1:] - first[:1]).abs()
            if not (change > 1e-5 * same + 1e-6 * same.max()).any():
                found.append(index)
            every = hidden if hidden.shape[0] == 3 else hidden.movedim(1, 0)
            every[1:] = every[:1].clone()
            return type(output)([hidden, *output[1:]]) if several else hidden

        return hook

    def disturb(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        return _disturbed(args, kwargs, left_padding)

    hooks = [layer.register_forward_pre_hook(disturb, with_kwargs=True) for layer in layers]
    hooks += [layer.register_forward_hook(compare(index)) for index, layer in enumerate(layers)]
    try:
        _logits(model, probe_ids(base, PROBE_LENGTH).repeat(3, 1), left_padding, block_length)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _rows_at(hidden: torch.Tensor, index: int, left_padding: int) -> torch.Tensor:
    """A view of one position of the three rows, (3, …); hidden states of parallel streams have a further axis somewhere."""
    hidden = hidden if hidden.shape[0] == 3 else hidden.movedim(1, 0)
    sequence = 1 if hidden.shape[1] == PROBE_LENGTH + left_padding else 2
    return hidden.movedim(sequence, 1)[:, index]


def _disturbed(args: tuple, kwargs: dict, left_padding: int) -> tuple[tuple, dict]:
    """A layer's arguments, the last hidden state of the second and third row moved in opposite directions."""
    name = next((n for n, v in kwargs.items() if isinstance(v, torch.Tensor) and v.is_floating_point()), "")
    name = "hidden_states" if "hidden_states" in kwargs else name
    hidden = (args[0] if args else kwargs[name]).clone()
    wave = torch.linspace(-3, 3, hidden.shape[-1], device=hidden.device, dtype=hidden.dtype)
    wave = wave * hidden.float().square().mean().sqrt().clamp(min=1e-3).to(hidden.dtype)
    last = _rows_at(hidden, -1, left_padding)
    last[1] += wave
    last[2] -= wave
    return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, name: hidden})


@torch.no_grad()
def sees_padding(model: torch.nn.Module) -> bool:
    """Whether the content of padding moves a real token's output."""
    text = probe_ids(base_of(model), PROBE_LENGTH + 2 * PADDING).repeat(2, 1)
    mask = torch.ones_like(text)
    mask[:, :PADDING], mask[:, -PADDING:] = 0, 0
    text[1] = torch.where(mask[1].bool(), text[1], text[1].flip(0))
    logits = eval_logits(model, input_ids=text, attention_mask=mask, position_ids=positions(mask).clamp(min=0))
    logits = logits[:, PADDING:-PADDING]
    return bool((logits[0] - logits[1]).abs().max() > TOLERANCE * logits.abs().max())


RECURRENT = "mamba mixer rwkv recurrent delta linearattention lightning shortconv xlstm mlstm".split()
FAMILY = ("norm", "model", "causallm", "backend", "block")  # in class names that carry the name of their whole family


def recurrent_layers(model: torch.nn.Module) -> list[str]:
    """Class names of the layers that run from left to right by construction: state-space, recurrent, linear attention, convolution."""
    found = set()
    for name in {type(module).__name__ for module in base_of(model).modules()}:
        recurrent = "SSM" in name or any(word in name.lower() for word in RECURRENT)  # not GptOssMLP
        if recurrent and not any(word in name.lower() for word in FAMILY):
            found.add(name)
    return sorted(found)


# -- a clean prefix


class CleanPrefix(DynamicCache):
    """Keys and values of clean text that noisy rows see and do not extend: a cache that is read and never written.

        keys    | clean text, by the base, without gradient | noisy rows, by the adapter |
        queries |                                           | noisy rows                 |

    In lossless training the clean half then costs no backward pass. `update` joins the two in every call instead of storing them, so
    that gradient checkpointing may run a layer twice.
    """

    def __init__(self, cache: DynamicCache) -> None:
        super().__init__()
        self.layers = cache.layers

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        layer = self.layers[layer_idx]
        return torch.cat([layer.keys, key_states], -2), torch.cat([layer.values, value_states], -2)


@torch.no_grad()
def check_clean_prefix(model: torch.nn.Module) -> None:
    """Refuses a model whose cache cannot hold clean text for later rows, cannot be cropped, or may hold no columns that are not seen.

    Raises:
        ValueError: it forgets (sliding window, state space), gives other logits than without a cache, or counts its columns (ALiBi).
    """
    base = base_of(model)
    forward_state(base)  # which knows what this version calls a cache
    name = type(base).__name__
    if any(getattr(layer, "is_sliding", False) for layer in DynamicCache(config=base.config).layers):
        raise UserError(
            f"`attention`='lossless': {name} has sliding-window attention, whose cache forgets and cannot be cropped; use 'block'."
        )
    ids = probe_ids(base, BLOCK * BLOCKS)
    mask = additive(block_causal(torch.ones_like(ids), BLOCK), base.dtype)
    place, clean = torch.arange(ids.shape[1], device=ids.device)[None], BLOCK * (BLOCKS - 1)
    first = {"input_ids": ids[:, :clean], "attention_mask": mask[:, :, :clean, :clean]}
    rest = {"input_ids": ids[:, clean:], "attention_mask": mask[:, :, clean:], "position_ids": place[:, clean:]}
    try:
        with in_eval_mode(base):
            want = base(input_ids=ids, attention_mask=mask, position_ids=place, use_cache=False).logits[:, clean:]
            cache = DynamicCache()
            base(**first, position_ids=place[:, :clean], past_key_values=cache, use_cache=True)
            read = base(**rest, past_key_values=CleanPrefix(cache), use_cache=False).logits
            base(**rest, past_key_values=cache, use_cache=True)
            cache.crop(-BLOCK)
            again = base(**rest, past_key_values=cache, use_cache=True).logits
            # What is left of drafts that were not accepted: columns before the last block that nothing sees.
            unseen = torch.full_like(mask[:, :, clean:, :BLOCK], torch.finfo(mask.dtype).min)
            behind = {
                **rest,
                "attention_mask": torch.cat([mask[:, :, clean:, :clean], unseen, mask[:, :, clean:, clean:]], -1),
            }
            counted = base(**behind, past_key_values=cache, use_cache=True).logits
    except Exception as error:
        raise UserError(
            f"`attention`='lossless': the cache of {name} cannot be cropped or read alone: {error}"
        ) from error
    if not (same_logits(read, want) and same_logits(again, want)):
        raise UserError(
            f"`attention`='lossless': {name} gives other logits from its cache than without; use `attention`='block'."
        )
    if not same_logits(counted, want):
        raise UserError(
            f"`attention`='lossless': {name} counts columns of its cache, also those of drafts that were wrong, as places in the text; use "
            "`attention`='block'."
        )
