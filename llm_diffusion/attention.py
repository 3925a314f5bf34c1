"""Makes a causal language model bidirectional, and proves it.

Purpose: the one unforgivable bug of a conversion is a model that stays silently causal. So a model is switched by settings
that transformers itself honours, saves and reloads, and is then probed: every token is perturbed, and which positions react
says who attends to whom.
Trade-off: architectures that ignore the switch are refused. Alternative: patching the attention kernel, which is process-global
and, when toggled around the forward, gives wrong gradients under gradient checkpointing (the recomputation runs outside).
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from .attention_masks import additive, block_causal

_MISSING = object()
PROBE_LENGTH = 8


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model under any number of PEFT, DDP or compile wrappers."""
    while True:
        if isinstance(model, PeftModel):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), torch.nn.Module) and not isinstance(model, PreTrainedModel):
            model = model.module
        else:
            return model


class AttentionPatch:
    """What `patch_causal_attention` changed; `undo()`, or the end of a `with` block, puts it back."""

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        self._changes.append((owner, name, getattr(owner, name, _MISSING)))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._changes:
            owner, name, value = self._changes.pop()
            delattr(owner, name) if value is _MISSING else setattr(owner, name, value)

    def __enter__(self) -> AttentionPatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def _switch(model: PreTrainedModel, is_causal: bool) -> AttentionPatch:
    patch = AttentionPatch()
    for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
        patch.set(config, "is_causal", is_causal)
    for module in model.modules():
        # StableLM does not hand the switch to its attention function; the module's own flag does the rest.
        if isinstance(getattr(module, "is_causal", None), bool):
            patch.set(module, "is_causal", is_causal)
    return patch


def _check_window(model: PreTrainedModel) -> None:
    """Refuses sliding windows; the probe is shorter than a window, so this is decided from the config."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window is not None and "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"]):
        raise ValueError(
            f"`model`: {type(model).__name__} has a sliding window (sliding_window={window}), so distant tokens would not see each "
            "other; use a checkpoint without one."
        )


def patch_causal_attention(model: torch.nn.Module) -> AttentionPatch:
    """Makes `model` attend in both directions, in place and for good, and checks that it does.

    The change is `config.is_causal = False`, which survives saving and reloading, with the attention modules' own flag beside
    it, which does not (StableLM alone needs it: reload it with `load_diffusion_model`). Safe to call twice, right under PEFT and gradient checkpointing; two models in one process do not see each other.

    Returns:
        The patch: a context manager, and undoable by `.undo()`.

    Raises:
        ValueError: the architecture stays (partly) causal; nothing is changed then.
    """
    model = base_of(model)
    _check_window(model)
    patch = _switch(model, is_causal=False)
    try:
        found = f"attention is {probe_attention(model)!r}"
    except Exception as error:  # an architecture may choke on the switch in any way
        found = f"forward fails ({type(error).__name__}: {error})"
    if found != "attention is 'bidirectional'":
        patch.undo()
        raise ValueError(
            f"`model`: {type(model).__name__} cannot be made bidirectional: with `config.is_causal=False` its {found}. Use an "
            "architecture that honours the switch, for example Qwen3, Llama, Mistral, Phi, GPT-2 or StableLM."
        )
    return patch


@contextmanager
def causal_attention(model: torch.nn.Module) -> Iterator[None]:
    """Attention as the autoregressive model had it, for decoding or scoring without gradients."""
    patch = _switch(base_of(model), is_causal=True)
    try:
        yield
    finally:
        patch.undo()


@torch.no_grad()
def attention_pattern(
    model: torch.nn.Module, left_padding: int = 0, length: int = PROBE_LENGTH, block_length: int | None = None
) -> torch.Tensor:
    """Who depends on whom: (length, length) bool, [i, j] = the output at position i changes when token j changes.

    One forward: row 0 is a text, row j + 1 the same text with token j replaced. With `left_padding` > 0 the text stands after
    that many padding tokens. With `block_length` the model is handed a block-causal 4-D mask, as block decoding does.
    """
    base = base_of(model)
    vocab = base.get_input_embeddings().weight.shape[0]
    device = base.get_input_embeddings().weight.device
    text = torch.arange(length, device=device) * 7 % (vocab // 2)
    ids = text.repeat(length + 1, 1)
    ids[1:].diagonal().add_(vocab // 2)
    inputs: dict[str, torch.Tensor] = {"input_ids": ids}
    if left_padding:
        ids = torch.nn.functional.pad(ids, (left_padding, 0))
        mask = torch.ones_like(ids)
        mask[:, :left_padding] = 0
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    if block_length:
        mask = inputs.get("attention_mask", torch.ones_like(ids))
        inputs["attention_mask"] = additive(block_causal(mask, block_length), base.dtype)
    training = model.training
    model.eval()  # dropout would look like dependence
    try:
        logits = model(**inputs, use_cache=False).logits[:, left_padding:].float()
    finally:
        model.train(training)
    change = (logits[1:] - logits[:1]).abs().amax(-1)
    # Experts of mixture models are run in groups: identical rows may differ by rounding, never by this much.
    return (change > 1e-4 * logits.abs().max()).T


def probe_attention(model: torch.nn.Module, block_length: int | None = None) -> str:
    """Finds out by perturbation, with and without padding, who attends to whom.

    Args:
        block_length: of a block model, which is handed its mask; read from `config.diffusion` when left out.

    Returns:
        "causal", "bidirectional", "block" (block-causal) or "mixed" (none of these, or different with padding).
    """
    record = getattr(base_of(model).config, "diffusion", None) or {}
    block_length = block_length or record.get("block_length")  # set on block models alone
    length = max(PROBE_LENGTH, 2 * (block_length or 0))
    index = torch.arange(length)
    patterns = {"causal": index[:, None] >= index[None], "bidirectional": torch.ones(length, length, dtype=torch.bool)}
    if block_length:  # first: blocks of one are causal, and meant to be
        patterns = {"block": index[:, None] // block_length >= index[None] // block_length, **patterns}
    found = [attention_pattern(model, left_padding, length, block_length).cpu() for left_padding in (0, 3)]
    for name, pattern in patterns.items():
        if all(torch.equal(pattern, dependence) for dependence in found):
            return name
    return "mixed"


def check_block_attention(model: torch.nn.Module, block_length: int) -> None:
    """Refuses a model that does not attend as a block-causal 4-D mask says.

    Block models keep their causal config, because their clean context is causal: masks are handed to them by training and
    decoding.

    Raises:
        ValueError: the architecture ignores, changes or rejects 4-D masks.
    """
    name = type(base_of(model)).__name__
    _check_window(base_of(model))
    try:
        found = probe_attention(model, block_length)
    except Exception as error:  # rejected in as many ways as there are architectures
        raise ValueError(
            f"`model`: {name} rejects 4-D attention masks, which block attention needs: {error}"
        ) from error
    if found != "block":
        raise ValueError(
            f"`model`: {name} does not follow 4-D attention masks, which block attention needs: it attends {found!r}."
        )


def bind(model: torch.nn.Module, name: str, function: Any) -> None:
    """Binds `function` as a method of this one model (a bound method follows `copy.deepcopy`, a closure would not)."""
    setattr(model, name, types.MethodType(function, model))
