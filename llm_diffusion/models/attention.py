"""Makes a causal language model bidirectional, and proves it.

Purpose: the one unforgivable bug of a conversion is a model that stays silently causal. So a model is changed by the mildest
mechanism that works for it, and then probed: every token is perturbed, and which positions react says who attends to whom.

    mechanism   what is changed                                             saved with the model
    config      `config.is_causal = False`; beside it the modules' own      yes (what is beside it is not: StableLM,
                flag, and the triangles that they keep as buffers           Nemotron, GPT-Neo)
    mask        the forward is handed a full 4-D mask                       no
    sdpa        calls of `scaled_dot_product_attention` inside its          no
                attention modules, for code that makes its own causal mask

Whatever is changed stays on the model for as long as it trains: what is switched on around the forward alone gives wrong gradients
under gradient checkpointing, because the recomputation runs outside of it. Sliding windows are widened to the whole context.
Trade-off: architectures that none of this mends are refused. Alternative: replacing the attention kernel for the whole process,
which every other model in it would see.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from .. import UserError
from ..objective.attention_masks import annealed
from .patching import Patch, base_of, wrap_forward
from .probing import (
    PADDING,
    PROBE_LENGTH,
    causal_layers,
    eval_logits,
    probe_attention,
    probe_ids,
    recurrent_layers,
    sees_padding,
)
from .sdpa_patch import patch_sdpa

MINIMUM_TRANSFORMERS = (5, 2)  # before that `config.is_causal` is silently ignored
METHODS = ("config", "mask", "sdpa")
# How configs call the reach of local attention.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")


def _configs(model: PreTrainedModel) -> list[Any]:
    return list({id(c): c for c in (model.config, model.config.get_text_config())}.values())


# -- the mechanisms


def _switch(patch: Patch, model: PreTrainedModel, is_causal: bool) -> None:
    """The setting that transformers honours, saves and reloads."""
    for config in _configs(model):
        patch.set(config, "is_causal", is_causal)
    for name, module in model.named_modules():
        # StableLM does not hand the switch to its attention function; the module's own flag does the rest.
        if isinstance(getattr(module, "is_causal", None), bool):
            patch.set(module, "is_causal", is_causal)
        if in_attention(name):
            _switch_triangles(patch, module, is_causal)


def _switch_triangles(patch: Patch, module: torch.nn.Module, is_causal: bool) -> None:
    """GPT-Neo and GPT keep their causal mask as a buffer; it is filled, and kept for the way back."""
    kept = vars(module).get("causal_triangles", {})
    if is_causal:
        for name, triangle in kept.items():
            patch.set(module, name, triangle.to(getattr(module, name).device))
        return
    triangles = {name: buffer for name, buffer in module.named_buffers(recurse=False) if _is_triangle(buffer)}
    if triangles:
        patch.set(module, "causal_triangles", {**kept, **triangles})
        for name, triangle in triangles.items():
            patch.set(module, name, torch.ones_like(triangle))


def _is_triangle(buffer: torch.Tensor) -> bool:
    """Whether a buffer is a square of zeros and ones with nothing above the diagonal, windowed or not."""
    if buffer.dim() < 2 or buffer.shape[-1] != buffer.shape[-2] or buffer.shape[-1] < 2:
        return False
    corner = buffer[..., :64, :64]  # real ones have a row for every position
    return bool(
        ((corner == 0) | (corner == 1)).all()
        and (corner.triu(1) == 0).all()
        and (corner.diagonal(dim1=-2, dim2=-1) == 1).all()
    )


def _widen(patch: Patch, model: PreTrainedModel) -> None:
    """Local attention that reaches over the whole context; what it was is kept in `config.causal_windows`.

    The layers keep their types: some architectures choose rotary embeddings by them.
    """
    for config in _configs(model):
        reach = getattr(config, "max_position_embeddings", None) or 2**20
        narrow = {
            name: value for name in WINDOWS if isinstance(value := getattr(config, name, None), int) and value < reach
        }
        if not narrow:
            continue
        patch.set(config, "causal_windows", narrow)
        for name in narrow:
            patch.set(config, name, reach)
            for module in model.modules():
                if vars(module).get(name) == narrow[name]:
                    patch.set(module, name, reach)


def _narrow(patch: Patch, model: PreTrainedModel) -> None:
    """The windows as they were before `_widen`."""
    for config in _configs(model):
        for name, value in (getattr(config, "causal_windows", None) or {}).items():
            for module in model.modules():
                if vars(module).get(name) == getattr(config, name):
                    patch.set(module, name, value)
            patch.set(config, name, value)


@torch.no_grad()
def _window_complaint(model: PreTrainedModel) -> str:
    """What keeps a widened window narrow: it is baked in where the config does not reach it; nothing if it is wide.

    The probe is shorter than a real window, so it cannot see one. But if the setting is alive, a window of one changes the logits.
    """
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ["sliding"]
    if getattr(model, "lifted_causal_ratio", None) is not None:
        return ""  # a 4-D mask takes the place of the window
    if any("causal_triangles" in vars(module) for module in model.modules()):
        return ""  # the window was in the triangles
    if not any(getattr(config, "causal_windows", None) for config in _configs(model)) or not any(
        "full" not in layer for layer in layers
    ):
        return ""
    original = copy.deepcopy(model.config)
    for config in (original, original.get_text_config()):
        for name, value in (getattr(config, "causal_windows", None) or {}).items():
            setattr(config, name, value)
    with torch.device("meta"):
        shapes = [
            [p.shape for p in type(model)(config).parameters()] for config in (copy.deepcopy(model.config), original)
        ]
    if shapes[0] != shapes[1]:
        return "weights have the shape of its sliding window"
    ids = probe_ids(model, PROBE_LENGTH)
    wide, patch = eval_logits(model, input_ids=ids), Patch()
    for config in _configs(model):
        for name in getattr(config, "causal_windows", None) or {}:
            patch.set(config, name, 1)
    try:
        narrow = eval_logits(model, input_ids=ids)
    finally:
        patch.undo()
    return "sliding window does not follow the config" if torch.equal(wide, narrow) else ""


def lift_masks(patch: Patch, model: PreTrainedModel, causal_ratio: float = 0.0) -> None:
    """The model's forward makes a 4-D mask of the 2-D padding mask that it is given; 4-D masks pass as they are.

    Args:
        causal_ratio: what is left of the causal mask, see `attention_masks.annealed`.
    """
    patch.set(model, "lifted_causal_ratio", causal_ratio)
    wrap_forward(patch, model, _lifted_forward, "_unlifted_forward")


def _lifted_forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    if self.lifted_causal_ratio is not None:
        kwargs |= dict(zip(inspect.signature(self.forward).parameters, args, strict=False))
        args, mask = (), kwargs.get("attention_mask")
        if mask is None or mask.dim() == 2:
            tokens = kwargs["inputs_embeds"][..., 0] if kwargs.get("input_ids") is None else kwargs["input_ids"]
            document_ids = torch.ones_like(tokens, dtype=torch.long) if mask is None else mask
            kwargs["attention_mask"] = annealed(document_ids, self.lifted_causal_ratio, self.dtype)
    return self._unlifted_forward(*args, **kwargs)


def _try(model: PreTrainedModel, method: str, padded_well: bool) -> tuple[Patch, str]:
    """Applies one mechanism; the patch, and what the probes say of the model then."""
    patch = Patch()
    try:
        if method == "config":
            _switch(patch, model, is_causal=False)
            _widen(patch, model)
        elif method == "mask":
            lift_masks(patch, model)
        else:
            _widen(patch, model)
            patch_sdpa(patch, model)
        complaint = _complaint(model, padded_well)
    except Exception as error:  # an architecture may choke on a change in any way
        complaint = f"forward fails ({type(error).__name__}: {error})"
    patch.mechanism = method
    return patch, complaint


def _complaint(model: PreTrainedModel, padded_well: bool) -> str:
    """What keeps a model from being bidirectional, by the probes; nothing if it is."""
    if narrow := _window_complaint(model):
        return narrow
    if (found := probe_attention(model)) != "bidirectional":
        return f"attention is {found!r}"
    layers = sorted({*causal_layers(model), *causal_layers(model, left_padding=PADDING)})
    if layers and not recurrent_layers(model):
        return f"layers {layers} stay causal"
    return "real tokens see the padding" if padded_well and sees_padding(model) else ""


def patch_causal_attention(model: torch.nn.Module, method: str | None = None) -> Patch:
    """Makes `model` attend in both directions, in place and for good, and checks that it does.

    Safe to call twice, right under PEFT, quantisation, gradient checkpointing and `torch.compile`; two models in one process do not
    see each other.

    Args:
        method: "config", "mask" or "sdpa" forces one mechanism (see the module's docstring); None takes the first that works.

    Returns:
        The patch: a context manager, undoable by `.undo()`, with the `mechanism` that worked.

    Raises:
        ValueError: the architecture stays (partly) causal; nothing is changed then.
    """
    if method not in (None, *METHODS):
        raise UserError(f"`method` must be one of {METHODS} or None, got {method!r}.")
    check_transformers()
    model = base_of(model)
    check_decoder(model)
    done = _mechanism(model)
    if done and method in (None, done) and not _complaint(model, padded_well=False):
        patch = Patch()  # nothing to do, and nothing to take back
        patch.mechanism = done
        return patch
    # A recurrent layer may have seen padding all along.
    padded_well, reasons = not recurrent_layers(model) or not sees_padding(model), []
    for mechanism in (method,) if method else METHODS:
        patch, complaint = _try(model, mechanism, padded_well)
        if not complaint:
            return patch
        patch.undo()
        reasons.append(f"{mechanism}: its {complaint}")
    raise UserError(
        f"`model`: {type(model).__name__} cannot be made bidirectional{_why(model)} ({'; '.join(reasons)}). Use an architecture "
        "that honours `config.is_causal`, for example Qwen3, Llama, Mistral, Phi, GPT-2 or StableLM."
    )


def check_block_attention(model: torch.nn.Module, block_length: int, purpose: str = "block attention") -> None:
    """Refuses a model that does not attend as a block-causal 4-D mask says.

    Block models keep their causal config, because their clean context is causal: masks are handed to them by training and
    decoding. Annealing and packing hand masks to bidirectional models.

    Raises:
        ValueError: the architecture ignores, changes or rejects 4-D masks.
    """
    name = type(base_of(model)).__name__
    if layers := recurrent_layers(model):
        raise UserError(
            f"`model`: {name} has layers that take no 4-D attention masks, which {purpose} needs: {', '.join(layers)} run from left "
            "to right through whatever stands there."
        )
    try:
        # Whatever the length of the blocks, several must fit into the probe.
        found = probe_attention(model, min(block_length, PROBE_LENGTH // 2))
        if blind := causal_layers(model, block_length=PROBE_LENGTH):  # one block: everything is seen
            found = f"causal in layers {blind}"
    except Exception as error:  # rejected in as many ways as there are architectures
        raise UserError(f"`model`: {name} rejects 4-D attention masks, which {purpose} needs: {error}") from error
    if found != "block":
        raise UserError(
            f"`model`: {name} does not follow 4-D attention masks, which {purpose} needs: it attends {found!r}."
        )


def check_transformers(found: str = transformers.__version__) -> None:
    """Raises ImportError for a transformers that would ignore `config.is_causal` in silence."""
    if tuple(int(part) for part in found.split(".")[:2]) < MINIMUM_TRANSFORMERS:
        raise ImportError(
            f"transformers {found} ignores `config.is_causal`, so models would stay causal; run `pip install -U 'transformers>=5.2'`."
        )


def _mechanism(model: PreTrainedModel) -> str | None:
    """What made a model bidirectional, one of `METHODS`; None: it was not."""
    if any(vars(module).get("bidirectional_sdpa") for module in model.modules()):
        return "sdpa"
    if getattr(model, "lifted_causal_ratio", None) is not None:
        return "mask"
    return "config" if any(getattr(config, "is_causal", None) is False for config in _configs(model)) else None


def check_decoder(model: PreTrainedModel) -> None:
    """Refuses encoders, which were never autoregressive."""
    if _mechanism(model):
        return
    try:
        found = probe_attention(model)
    except Exception as error:  # a forward may fail in any way
        raise UserError(
            f"`model`: {type(model).__name__} cannot be probed, its forward fails on plain token ids "
            f"({type(error).__name__}: {error})."
        ) from error
    if found == "bidirectional":
        raise UserError(
            f"`model`: {type(model).__name__} attends in both directions already, without having been converted: it is an encoder, "
            "not an autoregressive language model; use a decoder."
        )


def in_attention(name: str) -> bool:
    """Whether a parameter or module belongs to an attention layer, by its dotted name: `self_attn`, `attn`, `attention`, …"""
    return any(part.endswith(("attn", "attention")) for part in name.split("."))


def _why(model: PreTrainedModel) -> str:
    layers = recurrent_layers(model)
    return f": {', '.join(layers)} are recurrent, which no mask can turn around" if layers else ""


@contextmanager
def causal_attention(model: torch.nn.Module) -> Iterator[None]:
    """Attention as the autoregressive model had it, for decoding or scoring without gradients."""
    model, patch = base_of(model), Patch()
    _switch(patch, model, is_causal=True)
    _narrow(patch, model)
    if getattr(model, "lifted_causal_ratio", None) is not None:
        patch.set(model, "lifted_causal_ratio", None)
    for module in model.modules():
        if vars(module).get("bidirectional_sdpa"):
            patch.set(module, "bidirectional_sdpa", False)
    try:
        yield
    finally:
        patch.undo()
