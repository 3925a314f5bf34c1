"""Makes a causal language model bidirectional, and proves it: a model that stays silently causal is the worst bug of a conversion.

So a model is changed by the mildest mechanism that works for it, and then probed, see `probing`.

    mechanism   what is changed                                             saved with the model
    config      `config.is_causal = False`; beside it the modules' own      yes (what is beside it is not: StableLM,
                flag, and the triangles that they keep as buffers           Nemotron, GPT-Neo)
    mask        the forward is given a full 4-D mask                        no
    sdpa        calls of `scaled_dot_product_attention` inside its          no
                attention modules, for remote code that makes its own causal mask; no other model sees it

Whatever is changed stays on the model for as long as it trains: what is switched on around the forward alone gives wrong gradients
under gradient checkpointing, because the recomputation runs outside of it. Sliding windows are widened to the whole context.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from torch.utils.module_tracker import ModuleTracker
from transformers import PretrainedConfig, PreTrainedModel

from .. import UserError
from ..objective.attention_masks import symmetric
from .forward import ForwardState, causal_ratio_of, forward_state, lift_masks
from .patching import FORWARD_ERRORS, Patch, base_of, wrap_forward
from .probing import (
    PADDING,
    PROBE_LENGTH,
    attention_pattern,
    causal_layers,
    eval_logits,
    probe_attention,
    probe_ids,
    recurrent_layers,
    sees_padding,
)

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
    for module in model.modules():
        # StableLM does not pass the setting to its attention function; the module's own flag does the rest.
        if isinstance(getattr(module, "is_causal", None), bool):
            patch.set(module, "is_causal", is_causal)
    _switch_triangles(patch, model, is_causal)


def _switch_triangles(patch: Patch, model: PreTrainedModel, is_causal: bool) -> None:
    """GPT-Neo and GPT keep their causal mask as a buffer; it is filled, and what it was is kept in the model's state."""
    buffers = {name: x for name, x in model.named_buffers(remove_duplicate=False) if in_attention(name)}
    found = {} if is_causal else {name: x for name, x in buffers.items() if _is_triangle(x)}
    if found:
        state = forward_state(model, patch)
        patch.set(state, "triangles", {**state.triangles, **found})
    for name, triangle in _triangles(model).items():
        owner, _, leaf = name.rpartition(".")
        value = triangle.to(buffers[name].device) if is_causal else torch.ones_like(buffers[name])
        patch.set(model.get_submodule(owner), leaf, value)


def _triangles(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return model.diffusion_forward.triangles if "diffusion_forward" in vars(model) else {}


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
        sizes = {name: getattr(config, name, None) for name in WINDOWS}
        narrow = {name: size for name, size in sizes.items() if isinstance(size, int) and size < reach}
        if narrow:
            patch.set(config, "causal_windows", narrow)
            _set_windows(patch, model, config, dict.fromkeys(narrow, reach))


def _set_windows(patch: Patch, model: PreTrainedModel, config: Any, sizes: dict[str, int]) -> None:
    for name, size in sizes.items():
        for module in model.modules():
            if vars(module).get(name) == getattr(config, name):
                patch.set(module, name, size)
        patch.set(config, name, size)


def _windows_of(config: Any) -> dict[str, int]:
    """The windows that `_widen` widened, as they were."""
    return getattr(config, "causal_windows", None) or {}


@torch.no_grad()
def _window_problem(model: PreTrainedModel) -> str:
    """What keeps a widened window narrow: it is baked in where the config does not reach it; "" if it is wide.

    The probe is shorter than a real window, so it cannot see one. But if the setting is alive, a window of one changes the logits.
    """
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ["sliding"]
    if causal_ratio_of(model) is not None or _triangles(model) or all("full" in layer for layer in layers):
        return ""  # a 4-D mask takes the place of the window, or the window was in the triangles
    if not any(_windows_of(config) for config in _configs(model)):
        return ""
    narrow_config = copy.deepcopy(model.config)
    for config in (narrow_config, narrow_config.get_text_config()):
        for name, size in _windows_of(config).items():
            setattr(config, name, size)
    with torch.device("meta"):
        kinds = [type(model)(config) for config in (copy.deepcopy(model.config), narrow_config)]
    if [p.shape for p in kinds[0].parameters()] != [p.shape for p in kinds[1].parameters()]:
        return "weights have the shape of its sliding window"  # of Inkling: the widened model could not be reloaded
    ids = probe_ids(model, PROBE_LENGTH)
    wide = eval_logits(model, input_ids=ids)
    with Patch() as patch:
        for config in _configs(model):
            for name in _windows_of(config):
                patch.set(config, name, 1)
        narrow = eval_logits(model, input_ids=ids)
    return "sliding window does not follow the config" if torch.equal(wide, narrow) else ""


# -- remote code that calls the kernel itself


class BidirectionalSDPA(TorchFunctionMode):
    """Inside it `scaled_dot_product_attention` is not causal; every other argument passes through."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            kwargs = {**dict(zip(names, args, strict=False)), **kwargs, "is_causal": False}
            args = (kwargs.pop("query"), kwargs.pop("key"), kwargs.pop("value"))
            if kwargs.get("attn_mask") is not None:
                kwargs["attn_mask"] = symmetric(kwargs["attn_mask"])
        return func(*args, **kwargs)


def patch_sdpa(patch: Patch, model: PreTrainedModel) -> None:
    """The modules that call the kernel run inside `BidirectionalSDPA` from now on, unless their `causal_ratio` is None."""
    for module in _callers_of_sdpa(model):
        if "diffusion_forward" not in vars(module):
            wrap_forward(patch, module, _bidirectional_forward, ForwardState())
        patch.set(module.diffusion_forward, "causal_ratio", 0.0)


def _bidirectional_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Gradient checkpointing runs this again: the recomputation is bidirectional too.
    state = self.diffusion_forward
    with nullcontext() if state.causal_ratio is None else BidirectionalSDPA():
        return state.original(*args, **kwargs)


class _Spy(TorchFunctionMode):
    """Notes the innermost of the `running` modules at every `scaled_dot_product_attention`."""

    def __init__(self, running: ModuleTracker) -> None:
        super().__init__()
        self.running, self.found = running, set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        if func is scaled_dot_product_attention:
            self.found.add(max(self.running.parents, key=len))
        return func(*args, **(kwargs or {}))


def _callers_of_sdpa(model: PreTrainedModel) -> list[torch.nn.Module]:
    with ModuleTracker() as running, _Spy(running) as spy:
        attention_pattern(model)
    return [model.get_submodule(name.partition(".")[2]) for name in spy.found]  # the first part is the model's class


# -- which mechanism works


def _try(model: PreTrainedModel, method: str, padded_well: bool) -> tuple[Patch, str]:
    """Applies one mechanism; the patch, and what the probes find wrong with the model then."""
    patch = Patch(method)
    try:
        if method == "config":
            _switch(patch, model, is_causal=False)
            _widen(patch, model)
        elif method == "mask":
            lift_masks(patch, model)
        else:
            _widen(patch, model)
            patch_sdpa(patch, model)
        problem = _problem(model, padded_well)
    except FORWARD_ERRORS as error:
        problem = f"forward fails ({type(error).__name__}: {error})"
    return patch, problem


def _problem(model: PreTrainedModel, padded_well: bool) -> str:
    """What keeps a model from being bidirectional, by the probes; "" if it is."""
    if narrow := _window_problem(model):
        return narrow
    if (found := probe_attention(model)) != "bidirectional":
        return f"attention is {found!r}"
    layers = sorted({*causal_layers(model), *causal_layers(model, left_padding=PADDING)})
    if layers and not recurrent_layers(model):
        return f"layers {layers} stay causal"
    return "real tokens see the padding" if padded_well and sees_padding(model) else ""


def patch_causal_attention(model: torch.nn.Module, method: str | None = None) -> Patch:
    """Makes `model` attend in both directions, in place and for good, and checks that it does.

    Safe to call twice; works under PEFT, quantisation, gradient checkpointing and `torch.compile`; touches no other model.

    Args:
        method: "config", "mask" or "sdpa" forces one mechanism (see the module's docstring); None takes the first that works.

    Returns:
        The patch: a context manager, undoable by `.undo()`, with the `mechanism` that worked.

    Raises:
        ValueError: the architecture stays (partly) causal; nothing is changed then.
    """
    if method not in (None, *METHODS):
        raise UserError(f"`method` must be one of {METHODS} or None, got {method!r}.")
    model = base_of(model)
    check_decoder(model)
    done = _mechanism(model)
    if done and method in (None, done) and not _problem(model, padded_well=False):
        return Patch(done)  # nothing to do, and nothing to take back
    # A recurrent layer may have seen padding all along.
    padded_well, reasons = not recurrent_layers(model) or not sees_padding(model), []
    for mechanism in (method,) if method else METHODS:
        patch, problem = _try(model, mechanism, padded_well)
        if not problem:
            return patch
        patch.undo()
        reasons.append(f"{mechanism}: its {problem}")
    recurrent = ", ".join(recurrent_layers(model))
    why = f": {recurrent} are recurrent, which no mask can turn around" if recurrent else ""
    raise UserError(
        f"`model`: {type(model).__name__} cannot be made bidirectional{why} ({'; '.join(reasons)}). Use an architecture "
        "that honours `config.is_causal`, for example Qwen3, Llama, Mistral, Phi, GPT-2 or StableLM."
    )


def check_block_attention(model: torch.nn.Module, block_length: int, purpose: str = "block attention") -> None:
    """Refuses a model that does not follow a block-causal 4-D mask.

    Block models keep their causal config, because their clean context is causal: training and decoding pass masks to them.
    Annealing and packing pass masks to bidirectional models.

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
    except Exception as error:
        raise UserError(f"`model`: {name} rejects 4-D attention masks, which {purpose} needs: {error}") from error
    if found != "block":
        raise UserError(
            f"`model`: {name} does not follow 4-D attention masks, which {purpose} needs: it attends {found!r}."
        )


def _mechanism(model: PreTrainedModel) -> str | None:
    """What made a model bidirectional, one of `METHODS`; None: it was not."""
    lifted = {module for module in model.modules() if causal_ratio_of(module) is not None}
    if lifted - {model}:
        return "sdpa"
    if lifted:
        return "mask"
    return "config" if any(getattr(config, "is_causal", None) is False for config in _configs(model)) else None


def check_decoder(model: PreTrainedModel) -> None:
    """Refuses encoders, which were never autoregressive."""
    if _mechanism(model):
        return
    try:
        found = probe_attention(model)
    except Exception as error:
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


def make_causal(config: PretrainedConfig) -> None:
    """Turns a saved config of a bidirectional model back into the autoregressive model's, which is loaded by it then."""
    for part in (config, config.get_text_config()):
        part.is_causal = True
        for name, size in (vars(part).pop("causal_windows", None) or {}).items():
            setattr(part, name, size)


@contextmanager
def causal_attention(model: torch.nn.Module) -> Iterator[None]:
    """Attention as the autoregressive model had it, for decoding or scoring without gradients."""
    model = base_of(model)
    with Patch() as patch:
        _switch(patch, model, is_causal=True)
        for config in _configs(model):
            _set_windows(patch, model, config, _windows_of(config))
        for module in model.modules():
            if causal_ratio_of(module) is not None:
                patch.set(module.diffusion_forward, "causal_ratio", None)
        yield
