"""A setting is declared once: a dataclass field with its default, its range or choices, and a sentence of help.

One checker reads the declaration, and so do the tables of docs/settings.md and `--help`.

    eos_tail: int = setting(16, "Longest tail of end tokens after an answer.", min=0)
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Literal

from .. import UserError

BOUNDS = {"choices", "min", "max", "above", "below"}
TYPE_NAMES = {
    bool: "true or false",
    str: "text",
    int: "a whole number",
    float: "a number",
    list: "a list",
    tuple: "a list",
    dict: "a mapping",
    types.NoneType: "None",
}


class _Declaration(dict):
    """Metadata of a field; parsers of TRL and transformers hand a `copy()` or `dict()` of it to argparse, which knows no bounds.
    `items()` has them all."""

    def keys(self) -> list[str]:
        return [name for name in ("help", "choices") if name in self]

    def copy(self) -> dict[str, Any]:
        return {name: self[name] for name in self.keys()}


def setting(default: Any, help: str, *, choices=None, min=None, max=None, above=None, below=None) -> Any:
    """A dataclass field: a tuple of `choices`, or a number that does not reach `above` and `below`. None only as default."""
    given = {"choices": choices, "min": min, "max": max, "above": above, "below": below}
    metadata = _Declaration(help=help, **{name: value for name, value in given.items() if value is not None})
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(settings: Any, declared: type | None = None) -> None:
    """Holds the values of an object against the declarations of its class, or of the dataclass `declared`.

    Raises:
        UserError: naming the setting, its value and what it may be.
    """
    hints = typing.get_type_hints(declared or type(settings))
    for field in dataclasses.fields(declared or settings):
        value = getattr(settings, field.name)
        if value is not None or field.default is not None:
            check_value(field.name, value, hints[field.name], dict(field.metadata.items()))


def check_value(name: str, value: Any, hint: Any, bounds: Mapping[str, Any]) -> None:
    """Raises UserError for a value that is none of the `choices`, or no number inside `min`, `max`, `above` and `below`."""
    if not bounds.keys() & BOUNDS:
        return
    if "choices" in bounds:
        fits = value in bounds["choices"]
    elif fits := isinstance(value, int | float if float in _options(hint) else int) and not isinstance(value, bool):
        reaches = bounds.get("min", value) <= value <= bounds.get("max", value)
        fits = reaches and bounds.get("above", -math.inf) < value < bounds.get("below", math.inf)
    if not fits:
        raise UserError(f"`{name}` must be {allowed(hint, bounds)}, got {value!r}.")


def _options(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def allowed(hint: Any, bounds: Mapping[str, Any]) -> str:
    """What a setting may be, in words: "a whole number, at least 0", "a number in (0, 1]", "one of ('kl', 'tv') or None"."""
    kinds = [typing.get_origin(option) or option for option in _options(hint)]
    none = ", or None" if types.NoneType in kinds else ""
    if "choices" in bounds:
        return f"one of {tuple(bounds['choices'])}{none}"
    low, high = bounds.get("min", bounds.get("above")), bounds.get("max", bounds.get("below"))
    if low is None and high is None:
        words = (TYPE_NAMES.get(kind) or getattr(kind, "__name__", str(kind)) for kind in kinds)
        return " or ".join(dict.fromkeys(words))
    number = TYPE_NAMES[float if float in kinds else int]
    if low is not None and high is not None:
        return f"{number} in {'[' if 'min' in bounds else '('}{low}, {high}{']' if 'max' in bounds else ')'}{none}"
    if low is not None:
        return f"{number}, at least {low}{none}" if "min" in bounds else f"{number} above {low}{none}"
    return f"{number}, at most {high}{none}" if "max" in bounds else f"{number} below {high}{none}"


def read_value(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it; a number written as text (YAML's 2e-4) is read as one.

    Raises:
        UserError: of another type.
    """
    kinds = {typing.get_origin(option) or option for option in _options(hint)}
    literals = [word for option in _options(hint) if typing.get_origin(option) is Literal for word in option.__args__]
    if Any in kinds or value in literals:
        return value
    if isinstance(value, bool):  # which is an int to Python
        fits = bool in kinds
    else:
        fits = isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))
    if float in kinds and isinstance(value, int | str) and not fits and not isinstance(value, bool):
        with suppress(ValueError):
            return float(value)
    if fits or not kinds & TYPE_NAMES.keys() - {types.NoneType}:
        return value  # an enum or object of transformers, which checks it itself
    raise UserError(f"`{name}` must be {allowed(hint, {})}, got {value!r} ({type(value).__name__}).")


@contextmanager
def user_settings(where: str, errors: type[Exception] = Exception) -> Iterator[None]:
    """What transformers, TRL or PEFT refuse in the settings of `where` becomes a UserError that names it."""
    try:
        yield
    except (UserError, ImportError):
        raise
    except errors as error:
        raise UserError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`; nested mappings are merged key by key."""
    merged = dict(low)
    for key, value in high.items():
        merged[key] = merge(low[key], value) if isinstance(value, dict) and isinstance(low.get(key), dict) else value
    return merged


def default_of(field: dataclasses.Field) -> Any:
    return field.default if field.default_factory is dataclasses.MISSING else field.default_factory()


def settings_table(declared: type) -> str:
    """The settings that a class declares itself, as a table in Markdown."""
    hints, own = typing.get_type_hints(declared), inspect.get_annotations(declared)
    rows = ["| setting | default | may be | what it does |", "|---|---|---|---|"]
    for field in dataclasses.fields(declared):
        if field.name in own and "help" in field.metadata:
            default, values = repr(default_of(field)), allowed(hints[field.name], field.metadata)
            cells = (f"`{field.name}`", f"`{default}`", values, field.metadata["help"])
            rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(rows)
