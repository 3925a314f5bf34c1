"""Makes a causal language model bidirectional, and proves it.

Purpose: the one unforgivable bug of a conversion is a model that stays silently causal. So a model is changed by the mildest
mechanism that works for it, and then probed: every token is perturbed, and which positions react says who attends to whom.

    mechanism   what is changed                                             saved with the model
    config      `config.is_causal = False`, the modules' flag beside it     yes (the flag is not: StableLM)
    mask        the forward is handed a full 4-D mask                       no
    sdpa        calls of `scaled_dot_product_attention` inside its          no
                attention modules, for code that makes its own causal mask

Whatever is changed stays on the model for as long as it trains: what is switched on around the forward alone gives wrong gradients
under gradient checkpointing, because the recomputation runs outside of it. Sliding windows are widened to the whole context.
Trade-off: architectures that none of this mends are refused. Alternative: replacing the attention kernel for the whole process,
which every other model in it would see.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from peft import PeftModel
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .attention_masks import additive, annealed, block_causal

_MISSING = object()
PROBE_LENGTH = 8
MINIMUM_TRANSFORMERS = (5, 2)  # before that `config.is_causal` is silently ignored
METHODS = ("config", "mask", "sdpa")
# How configs call the reach of local attention.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size", "local_attention")


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
    """What `patch_causal_attention` changed; `undo()`, or the end of a `with` block, puts it back.

    `mechanism` names what worked, see the module's docstring.
    """

    mechanism: str | None = None

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        # A module's own attributes only: a bound `forward` hides the class's, and must be deleted to give it back.
        module = isinstance(owner, torch.nn.Module)
        before = vars(owner).get(name, _MISSING) if module else getattr(owner, name, _MISSING)
        self._changes.append((owner, name, before))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._changes:
            owner, name, value = self._changes.pop()
            delattr(owner, name) if value is _MISSING else setattr(owner, name, value)

    def __enter__(self) -> AttentionPatch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


def _configs(model: PreTrainedModel) -> list[Any]:
    return list({id(c): c for c in (model.config, model.config.get_text_config())}.values())


# -- the mechanisms


def _switch(patch: AttentionPatch, model: PreTrainedModel, is_causal: bool) -> None:
    """The setting that transformers honours, saves and reloads."""
    for config in _configs(model):
        patch.set(config, "is_causal", is_causal)
    for module in model.modules():
        # StableLM does not hand the switch to its attention function; the module's own flag does the rest.
        if isinstance(getattr(module, "is_causal", None), bool):
            patch.set(module, "is_causal", is_causal)


def _widen(patch: AttentionPatch, model: PreTrainedModel) -> None:
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


def _narrow(patch: AttentionPatch, model: PreTrainedModel) -> None:
    """The windows as they were before `_widen`."""
    for config in _configs(model):
        for name, value in (getattr(config, "causal_windows", None) or {}).items():
            for module in model.modules():
                if vars(module).get(name) == getattr(config, name):
                    patch.set(module, name, value)
            patch.set(config, name, value)


@torch.no_grad()
def _check_windows(model: PreTrainedModel) -> None:
    """Refuses windows that are baked in where the config does not reach them.

    The probe is shorter than a real window, so it cannot see one. But if the setting is alive, a window of one changes the logits.
    """
    layers = getattr(model.config.get_text_config(), "layer_types", None) or ["sliding"]
    if not any(getattr(config, "causal_windows", None) for config in _configs(model)) or not any(
        "full" not in layer for layer in layers
    ):
        return
    ids = torch.arange(PROBE_LENGTH, device=model.device)[None]
    wide, patch = model(input_ids=ids, use_cache=False).logits, AttentionPatch()
    for config in _configs(model):
        for name in getattr(config, "causal_windows", None) or {}:
            patch.set(config, name, 1)
    try:
        narrow = model(input_ids=ids, use_cache=False).logits
    finally:
        patch.undo()
    if torch.equal(wide, narrow):
        raise ValueError("its sliding window does not follow the config")


def wrap_forward(patch: AttentionPatch, module: torch.nn.Module, function: Callable[..., Any], inner: str) -> None:
    """Binds `function` as the module's forward; what it was before is the module's attribute `inner`.

    Bound, not closed over: a deep copy of the module calls its own forward. With the old signature, which hosts read.
    """
    if inner in vars(module):
        return
    before = module.forward
    wrapper = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    wrapper.__kwdefaults__, wrapper.__defaults__ = function.__kwdefaults__, function.__defaults__
    wrapper.__signature__ = inspect.signature(getattr(before, "__func__", before))  # type: ignore[attr-defined]
    patch.set(module, inner, before)
    patch.set(module, "forward", types.MethodType(wrapper, module))


def lift_masks(patch: AttentionPatch, model: PreTrainedModel, causal_ratio: float = 0.0) -> None:
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
            documents = torch.ones_like(tokens, dtype=torch.long) if mask is None else mask
            kwargs["attention_mask"] = annealed(documents, self.lifted_causal_ratio, self.dtype)
    return self._unlifted_forward(*args, **kwargs)


class _BidirectionalSDPA(TorchFunctionMode):
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


def symmetric(mask: torch.Tensor) -> torch.Tensor:
    """A causal attention mask (..., Q, K), bool or additive, made bidirectional; one that is not causal passes as it is.

    Whoever may be seen from a later position may be seen from an earlier one, if it stands in the same text; keys that no real
    query sees (padding) stay hidden:

        left padding                 two packed texts
        . . . .      . . . .         x . . .      x x . .
        . x . .  ->  . x x x         x x . .  ->  x x . .
        . x x .      . x x x         . . x .      . . x x
        . x x x      . x x x         . . x x      . . x x

    Raises:
        ValueError: an additive mask with biases of its own (ALiBi), whose mirror image is unknown.
    """
    length = mask.shape[-1]
    if mask.shape[-2] != length:
        return mask
    visible = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    later = torch.ones(length, length, dtype=torch.bool, device=mask.device).triu(1)
    # Host code lets padding look everywhere, where the kernel makes NaN of a row that sees nothing.
    open_row = visible.all(-1, keepdim=True) | ~visible.any(-1, keepdim=True)
    open_row[..., -1:, :] = False  # the last row of a causal mask sees all without being open
    causal = ~(visible & later & ~open_row).any(-1, keepdim=True).any(-2, keepdim=True)
    seen = visible & ~open_row
    either = (seen | seen.transpose(-1, -2)) & seen.any(-2, keepdim=True)
    if mask.dtype == torch.bool:
        return torch.where(causal, either | (visible & open_row), visible)
    if not torch.compiler.is_compiling() and bool((mask.masked_fill(~visible, 0) != 0).any() & causal.any()):
        raise ValueError("its attention mask carries position biases, whose mirror image is unknown")
    bias = torch.zeros_like(mask).masked_fill(~(either | (visible & open_row)), torch.finfo(mask.dtype).min)
    return torch.where(causal, bias, mask)


def _patch_sdpa(patch: AttentionPatch, model: PreTrainedModel) -> None:
    """The modules that call the kernel, found by running them, run inside `_BidirectionalSDPA` from now on."""
    for module in _callers_of_sdpa(model):
        patch.set(module, "bidirectional_sdpa", True)
        wrap_forward(patch, module, _bidirectional_forward, "_causal_forward")


def _bidirectional_forward(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    # Gradient checkpointing runs this again: the recomputation is bidirectional too.
    if not self.bidirectional_sdpa:
        return self._causal_forward(*args, **kwargs)
    with _BidirectionalSDPA():
        return self._causal_forward(*args, **kwargs)


class _Spy(TorchFunctionMode):
    """Calls `found` at every `scaled_dot_product_attention`."""

    def __init__(self, found: Callable[[], None]) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        if func is scaled_dot_product_attention:
            self.found()
        return func(*args, **(kwargs or {}))


def _callers_of_sdpa(model: PreTrainedModel) -> list[torch.nn.Module]:
    running: list[torch.nn.Module] = []
    callers: dict[int, torch.nn.Module] = {}

    def found() -> None:
        callers[id(running[-1])] = running[-1]

    hooks = [
        torch.nn.modules.module.register_module_forward_pre_hook(lambda module, _: running.append(module)),
        torch.nn.modules.module.register_module_forward_hook(lambda *_: running.pop() and None),
    ]
    try:
        with _Spy(found):
            attention_pattern(model)
    finally:
        for hook in hooks:
            hook.remove()
    return list(callers.values())


def _try(model: PreTrainedModel, method: str) -> tuple[AttentionPatch, str]:
    """Applies one mechanism; the patch, and what the probe says of the model then."""
    patch = AttentionPatch()
    try:
        if method == "config":
            _switch(patch, model, is_causal=False)
            _widen(patch, model)
            _check_windows(model)
        elif method == "mask":
            lift_masks(patch, model)
        else:
            _widen(patch, model)
            _patch_sdpa(patch, model)
            _check_windows(model)
        found = f"attention is {probe_attention(model)!r}"
    except Exception as error:  # an architecture may choke on a change in any way
        found = f"forward fails ({type(error).__name__}: {error})"
    patch.mechanism = method
    return patch, found


def patch_causal_attention(model: torch.nn.Module, method: str | None = None) -> AttentionPatch:
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
        raise ValueError(f"`method` must be one of {METHODS} or None, got {method!r}.")
    check_transformers()
    model = base_of(model)
    _check_decoder(model)
    reasons = []
    for mechanism in (method,) if method else METHODS:
        patch, found = _try(model, mechanism)
        if found == "attention is 'bidirectional'":
            return patch
        patch.undo()
        reasons.append(f"{mechanism}: its {found}")
    raise ValueError(
        f"`model`: {type(model).__name__} cannot be made bidirectional{_why(model)} ({'; '.join(reasons)}). Use an architecture "
        "that honours `config.is_causal`, for example Qwen3, Llama, Mistral, Phi, GPT-2 or StableLM."
    )


def check_transformers() -> None:
    """Raises ImportError for a transformers that would ignore `config.is_causal` in silence."""
    found = transformers.__version__
    if tuple(int(part) for part in found.split(".")[:2]) < MINIMUM_TRANSFORMERS:
        raise ImportError(
            f"transformers {found} ignores `config.is_causal`, so models would stay causal; run `pip install -U 'transformers>=5.2'`."
        )


def _is_patched(model: PreTrainedModel) -> bool:
    return (
        any(getattr(config, "is_causal", None) is False for config in _configs(model))
        or getattr(model, "lifted_causal_ratio", None) is not None
        or any(vars(module).get("bidirectional_sdpa") for module in model.modules())
    )


def _check_decoder(model: PreTrainedModel) -> None:
    """Refuses encoders, which were never autoregressive."""
    if _is_patched(model):
        return
    try:
        found = probe_attention(model)
    except Exception as error:  # a forward may fail in any way
        raise ValueError(
            f"`model`: {type(model).__name__} cannot be probed, its forward fails on plain token ids "
            f"({type(error).__name__}: {error})."
        ) from error
    if found == "bidirectional":
        raise ValueError(
            f"`model`: {type(model).__name__} attends in both directions already, without having been converted: it is an encoder, "
            "not an autoregressive language model; use a decoder."
        )


def in_attention(name: str) -> bool:
    """Whether a parameter or module belongs to an attention layer, by its dotted name: `self_attn`, `attn`, `attention`, …"""
    return any(part.endswith(("attn", "attention")) for part in name.split("."))


def recurrent_layers(model: torch.nn.Module) -> list[str]:
    """Class names of the layers that run from left to right by construction: state-space, recurrent, linear attention, convolution."""
    kinds = (
        "mamba",
        "mixer",
        "rwkv",
        "ssm",
        "recurrent",
        "deltanet",
        "linearattention",
        "lightning",
        "shortconv",
        "xlstm",
        "mlstm",
    )
    names = {type(module).__name__ for module in base_of(model).modules()}
    return sorted(name for name in names if any(kind in name.lower() for kind in kinds))


def _why(model: PreTrainedModel) -> str:
    layers = recurrent_layers(model)
    return f": {', '.join(layers)} are recurrent, which no mask can turn around" if layers else ""


@contextmanager
def causal_attention(model: torch.nn.Module) -> Iterator[None]:
    """Attention as the autoregressive model had it, for decoding or scoring without gradients."""
    model, patch = base_of(model), AttentionPatch()
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
    if hasattr(base, "time_embedding"):
        inputs["timesteps"] = torch.zeros(ids.shape, device=device)  # a mask among the tokens must not look like noise
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


def check_block_attention(model: torch.nn.Module, block_length: int, purpose: str = "block attention") -> None:
    """Refuses a model that does not attend as a block-causal 4-D mask says.

    Block models keep their causal config, because their clean context is causal: masks are handed to them by training and
    decoding. Annealing and packing hand masks to bidirectional models.

    Raises:
        ValueError: the architecture ignores, changes or rejects 4-D masks.
    """
    name = type(base_of(model)).__name__
    try:
        found = probe_attention(model, block_length)
    except Exception as error:  # rejected in as many ways as there are architectures
        raise ValueError(f"`model`: {name} rejects 4-D attention masks, which {purpose} needs: {error}") from error
    if found != "block":
        raise ValueError(
            f"`model`: {name} does not follow 4-D attention masks, which {purpose} needs: it attends {found!r}."
        )


def bind(model: torch.nn.Module, name: str, function: Any) -> None:
    """Binds `function` as a method of this one model (a bound method follows `copy.deepcopy`, a closure would not)."""
    setattr(model, name, types.MethodType(function, model))
