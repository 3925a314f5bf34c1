"""The model under its wrappers, and changes to it that can be undone.

Everything is bound to the one model and closes over nothing, so that a deep copy calls its own methods and no other model is touched.
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

# What a forward may raise that is given what its architecture does not expect.
FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
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
    """Whether `torch.compile` was applied anywhere in a model: around it, in it, or to its forward."""
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

    def __init__(self, mechanism: str | None = None) -> None:
        self.mechanism = mechanism
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


def wrap_forward(patch: Patch, module: torch.nn.Module, function: Callable[..., Any], state: Any) -> None:
    """Binds `function`, which closes over nothing, as the forward of this one module.

    It keeps the signature of the class, which transformers and PEFT read, and finds `state` in `self.diffusion_forward`; with
    `state.original`, the forward that was there before, and `state.parameters`, the names of its positional arguments.
    """
    # The class's signature, not the bound method's: accelerate's hooks leave a partial there, which has no `self`.
    signature = inspect.signature(type(module).forward)
    wrapper = types.FunctionType(function.__code__, function.__globals__, function.__name__)
    wrapper.__kwdefaults__, wrapper.__signature__ = function.__kwdefaults__, signature
    state.original, state.parameters = module.forward, tuple(signature.parameters)[1:]
    patch.set(module, "diffusion_forward", state)
    patch.set(module, "forward", types.MethodType(wrapper, module))


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """No dropout and no gradients; then the mode that it was in."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def trained_as_before(model: torch.nn.Module) -> Iterator[None]:
    """Restores which parameters train; PEFT's switching of adapters makes all of them trainable, frozen ones too."""
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
