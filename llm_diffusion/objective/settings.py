"""A setting is declared once: a dataclass field with its default, its range or choices, and a sentence of help.

One checker reads the declaration, and so do the tables of the docs and `--help`.

    eos_tail: int = setting(16, "Longest tail of end tokens after an answer.", min=0)
"""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

from .. import UserError


class _Declaration(dict):
    """Metadata of a field; transformers' HfArgumentParser hands a `copy()` of it to argparse, which knows no bounds."""

    def copy(self) -> dict[str, Any]:
        return {name: self[name] for name in ("help", "choices") if name in self}


def setting(
    default: Any,
    help: str,
    *,
    choices: tuple[Any, ...] | None = None,
    min: float | None = None,
    max: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field; `above` and `below` are bounds that the value must not reach. None is a value only as the default."""
    given = {"choices": choices, "min": min, "max": max, "above": above, "below": below}
    metadata = _Declaration(help=help, **{name: value for name, value in given.items() if value is not None})
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_settings(settings: Any, declared: type | None = None) -> None:
    """Holds the values of an object against the declarations of its class, or of the dataclass `declared`.

    Raises:
        UserError: naming the setting, its value and what it may be.
    """
    hints = typing.get_type_hints(declared or type(settings))
    for field in dataclasses.fields(declared or settings):
        if not set(field.metadata) & {"choices", "min", "max", "above", "below"}:
            continue
        value = getattr(settings, field.name)
        if (value is None and field.default is None) or _fits(value, field, hints[field.name]):
            continue
        raise UserError(f"`{field.name}` must be {allowed(field, hints[field.name])}, got {value!r}.")


def _fits(value: Any, field: dataclasses.Field, hint: Any) -> bool:
    choices = field.metadata.get("choices")
    if choices is not None:
        return value in choices
    if isinstance(value, bool) or not isinstance(value, int if _is_whole(hint) else int | float):
        return False
    bounds = field.metadata
    return (
        value >= bounds.get("min", value)
        and value <= bounds.get("max", value)
        and ("above" not in bounds or value > bounds["above"])
        and ("below" not in bounds or value < bounds["below"])
    )


def _is_whole(hint: Any) -> bool:
    return float not in (typing.get_args(hint) or (hint,))


def allowed(field: dataclasses.Field, hint: Any) -> str:
    """What a setting may be, in words: "a whole number, at least 0", "a number in (0, 1]", "one of ('kl', 'tv')"."""
    bounds = field.metadata
    if "choices" in bounds:
        return f"one of {bounds['choices']}" + (" or None" if field.default is None else "")
    kind = "a whole number" if _is_whole(hint) else "a number"
    low, high = bounds.get("min", bounds.get("above")), bounds.get("max", bounds.get("below"))
    if low is not None and high is not None:
        return f"{kind} in {'[' if 'min' in bounds else '('}{low}, {high}{']' if 'max' in bounds else ')'}"
    if low is not None:
        return f"{kind}, at least {low}" if "min" in bounds else f"{kind} above {low}"
    return f"{kind}, at most {high}" if "max" in bounds else f"{kind} below {high}"
