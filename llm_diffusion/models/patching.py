"""Changes to a model in place that can be taken back, and forwards with something before or after them.

Everything is bound to the one model and closes over nothing, so that a deep copy calls its own and no other model sees it.
Trade-off: instance attributes that pickling whole modules would carry along. Alternative: subclasses, which checkpoints would have
to name, or hooks, which PEFT steps around by calling `forward` itself.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

_MISSING = object()


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


def is_compiled(model: torch.nn.Module) -> bool:
    """Whether `torch.compile` stands anywhere in a model: around it, in it, or on its forward."""
    return any(
        hasattr(module, "_orig_mod")
        or module._compiled_call_impl is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )


class Patch:
    """Attributes that were changed; `undo()`, or the end of a `with` block, puts them back.

    `mechanism` names what `attention.patch_causal_attention` found to work.
    """

    mechanism: str | None = None

    def __init__(self) -> None:
        self._changes: list[tuple[Any, str, Any]] = []

    def set(self, owner: Any, name: str, value: Any) -> None:
        # A module's own attributes only: a bound `forward` hides the class's, and must be deleted to give it back.
        own = isinstance(owner, torch.nn.Module) and name not in owner._buffers
        before = vars(owner).get(name, _MISSING) if own else getattr(owner, name, _MISSING)
        self._changes.append((owner, name, before))
        setattr(owner, name, value)

    def undo(self) -> None:
        while self._changes:
            owner, name, value = self._changes.pop()
            delattr(owner, name) if value is _MISSING else setattr(owner, name, value)

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()


@contextmanager
def trained_as_before(model: torch.nn.Module) -> Iterator[None]:
    """Puts back which parameters train; PEFT's switching of adapters leaves them all trainable, also those that were frozen."""
    kept = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, trained in kept:
            parameter.requires_grad_(trained)


@contextmanager
def adapters_off(model: torch.nn.Module) -> Iterator[None]:
    """The base alone, where `model` is a `PeftModel`."""
    if not isinstance(model, PeftModel):
        yield
        return
    with trained_as_before(model), model.disable_adapter():
        yield


def bind(model: torch.nn.Module, name: str, function: Any) -> None:
    """Binds `function` as a method of this one model (a bound method follows `copy.deepcopy`, a closure would not)."""
    setattr(model, name, types.MethodType(function, model))


def wrap_forward(patch: Patch, module: torch.nn.Module, function: Callable[..., Any], inner: str) -> None:
    """Binds `function` as the module's forward; what it was before is the module's attribute `inner`.

    Bound, not closed over: a deep copy of the module calls its own forward. With the old signature, which hosts read.
    """
    if inner in vars(module):
        return
    wrapper = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    wrapper.__kwdefaults__, wrapper.__defaults__ = function.__kwdefaults__, function.__defaults__
    # The class's, not the bound one's: accelerate's hooks leave a partial there, which has no `self`.
    wrapper.__signature__ = inspect.signature(type(module).forward)
    patch.set(module, inner, module.forward)
    patch.set(module, "forward", types.MethodType(wrapper, module))


def keep_logits(model: PreTrainedModel) -> None:
    """Teaches a forward that computes all logits the host's `logits_to_keep`, so that callers need to know one form only."""
    if "logits_to_keep" not in inspect.signature(model.forward).parameters:
        wrap_forward(Patch(), model, _keeping_forward, "_forward_of_all_logits")


def _keeping_forward(self: PreTrainedModel, *args: Any, logits_to_keep: int | torch.Tensor = 0, **kwargs: Any) -> Any:
    output = self._forward_of_all_logits(*args, **kwargs)
    logits, keep = output.logits, logits_to_keep
    if isinstance(keep, int):
        output.logits = logits[:, -keep:] if keep else logits
    elif keep.dtype == torch.bool:
        output.logits = logits[keep]
    elif keep.dim() == 1:
        output.logits = logits[:, keep]
    else:
        output.logits = logits.gather(1, keep[..., None].expand(-1, -1, logits.shape[-1]))
    return output


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients; training goes on as before."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
