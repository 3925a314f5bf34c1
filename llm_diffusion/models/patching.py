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
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel

# What a forward may raise that is given what its architecture does not expect.
FORWARD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_MISSING = object()


def base_of(model: torch.nn.Module) -> PreTrainedModel:
    """The transformers model under any number of PEFT, DDP or compile wrappers."""
    while isinstance(model := _unwrapped(model), PeftModel):
        model = model.get_base_model()
    return model


def dtype_name(model: torch.nn.Module) -> str:
    """ "float32", "bfloat16" … of a model's base."""
    return str(base_of(model).dtype).removeprefix("torch.")


def _unwrapped(model: torch.nn.Module) -> torch.nn.Module:
    """Without DDP and compile wrappers, but under its adapters."""
    while not isinstance(model, PeftModel | PreTrainedModel):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, torch.nn.Module):
            break
        model = inner
    return model


def embedding_table(model: torch.nn.Module) -> torch.Tensor:
    """(V, D) the input embedding's matrix in the base; `weight` of one with rows that PEFT trains is a copy, made at every look."""
    module = base_of(model).get_input_embeddings()
    if isinstance(module, TrainableTokensWrapper):
        module = module.token_adapter
    return (module.get_base_layer() if isinstance(module, BaseTunerLayer) else module).weight


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


class BoundFunction:
    """A function bound to one object, as a method is; `copy.deepcopy` follows it, which a closure would escape, and so does pickle.

    Of a method pickle keeps the name, to look for it in the object's class, where nothing of ours is; a `functools.partial` has no
    `__func__`, which accelerate wraps and binds again.
    """

    # No `__dict__`, which whoever wraps a forward would copy into its own.
    __slots__ = ("__func__", "__self__", "__signature__", "__weakref__", "_made_of")

    def __init__(self, function: Callable[..., Any], owner: Any, method: str | None = None) -> None:
        """`method`: of the owner's class, whose signature transformers and PEFT shall read here."""
        self._made_of = function, owner, method
        self.__self__, self.__func__ = owner, function
        if method is not None:
            signature = inspect.signature(getattr(type(owner), method))
            self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])
            self.__func__ = types.FunctionType(function.__code__, function.__globals__, function.__name__)
            self.__func__.__kwdefaults__, self.__func__.__signature__ = function.__kwdefaults__, signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __reduce__(self) -> tuple[type, tuple]:
        return BoundFunction, self._made_of


def wrap_forward(patch: Patch, module: torch.nn.Module, function: Callable[..., Any], state: Any) -> None:
    """Binds `function`, which closes over nothing, as the forward of this one module.

    It keeps the signature of the class, which transformers and PEFT read, and finds `state` in `self.diffusion_forward`; with
    `state.original`, the forward that was there before, and `state.parameters`, the names of its positional arguments.
    """
    # The class's signature, not the bound method's: accelerate's hooks leave a partial there, which has no `self`.
    signature = inspect.signature(type(module).forward)
    state.original, state.parameters = module.forward, tuple(signature.parameters)[1:]
    patch.set(module, "diffusion_forward", state)
    patch.set(module, "forward", BoundFunction(function, module, "forward"))


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
    """The base alone, where `model` is a `PeftModel` under any wrappers."""
    model = _unwrapped(model)
    if not isinstance(model, PeftModel):
        yield
        return
    with trained_as_before(model), model.disable_adapter():
        yield
