"""A setting is declared once: a dataclass field with its default, its range or choices, and a sentence of help.

One checker reads the declaration, and so do the tables of docs/settings.md and `--help`.

    eos_tail: int = setting(16, "Longest tail of end tokens after an answer.", min=0)
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
import re
import types
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal

from .. import UserError

BOUNDS = {"choices", "min", "max", "above", "below", "whole"}
LARGEST = 2**31 - 1  # of whole numbers that declare no maximum
SEEDS = {"min": 0, "max": 2**32 - 1}  # what NumPy takes
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


def setting(
    default: Any, help: str, *, choices=None, min=None, max=None, above=None, below=None, whole: bool | None = None
) -> Any:
    """A dataclass field: a tuple of `choices`, or a number that does not reach `above` and `below`, and from 1 on is `whole`."""
    given = {"choices": choices, "min": min, "max": max, "above": above, "below": below, "whole": whole}
    metadata = _Declaration(help=help, **{name: value for name, value in given.items() if value is not None})
    if isinstance(default, list | dict):
        return dataclasses.field(default_factory=lambda: copy.deepcopy(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


@cache
def hints_of(declared: type) -> dict[str, Any]:
    """The fields of a dataclass and their types."""
    hints = typing.get_type_hints(declared)
    return {field.name: hints[field.name] for field in dataclasses.fields(declared)}


def check_settings(
    settings: Any, declared: type | None = None, inherited: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Holds the values of an object against the declarations of its class, or of the dataclass `declared`, and those that another library
    declares without bounds against the `inherited` ones.

    Raises:
        UserError: naming the setting, its value and what it may be.
    """
    declared = declared or type(settings)
    for field in dataclasses.fields(declared):
        hint, bounds = hints_of(declared)[field.name], (inherited or {}).get(field.name, {})
        bounds = {**dict(field.metadata.items()), **bounds}
        check_value(field.name, getattr(settings, field.name), hint, bounds, default_of(field))


def check_value(name: str, value: Any, hint: Any, bounds: Mapping[str, Any], default: Any = ...) -> None:
    """Raises UserError for a value that is none of the `choices`, or of an enum that `hint` names; or no number inside `min`, `max`,
    `above` and `below`. A number is finite and a whole one has 32 bits, declared or not. The `default`, and None where `hint`
    has it, are always right. The bounds of a list are those of its elements."""
    options = _options(hint)
    for place, element in enumerate(value if isinstance(value, list) else ()):
        check_value(f"{name}[{place}]", element, hint, bounds)
    if (value is None and types.NoneType in options) or (type(value) is type(default) and value == default):
        return
    enums = [option for option in options if isinstance(option, type) and issubclass(option, Enum)]
    if enums and isinstance(value, str):
        bounds = {"choices": [str(member.value) for member in enums[0]], **bounds}
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if number and isinstance(value, int) and value > LARGEST and not bounds.keys() & {"max", "below"}:
        bounds = {**bounds, "max": LARGEST}
    if "choices" in bounds and not isinstance(value, list):
        fits = value in tuple(bounds["choices"])
    elif number:
        kind = isinstance(value, int | float if float in options or int not in options else int)
        reaches = bounds.get("min", value) <= value <= bounds.get("max", value)
        fits = kind and reaches and bounds.get("above", -math.inf) < value < bounds.get("below", math.inf)
        fits = fits and (not bounds.get("whole") or value < 1 or (value == int(value) and value <= LARGEST))
    else:
        fits = isinstance(value, list) or not bounds.keys() & BOUNDS
    if not fits:
        raise UserError(f"`{name}` must be {allowed(hint, bounds)}, got {value!r:.80}.")


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
    if bounds.get("whole"):
        none = f", whole from 1 on{none}"
    if low is not None and high is not None:
        return f"{number} in {'[' if 'min' in bounds else '('}{low}, {high}{']' if 'max' in bounds else ')'}{none}"
    if low is not None:
        return f"{number}, at least {low}{none}" if "min" in bounds else f"{number} above {low}{none}"
    return f"{number}, at most {high}{none}" if "max" in bounds else f"{number} below {high}{none}"


def read_value(name: str, value: Any, hint: Any) -> Any:
    """`value` as the type `hint` wants it, and so what is in a list; a number written as text is read as one.

    Raises:
        UserError: of another type.
    """
    options = _options(hint)
    kinds = {typing.get_origin(option) or option for option in options}
    literals = [word for option in options if typing.get_origin(option) is Literal for word in option.__args__]
    if Any in kinds or value in literals:
        return value
    if isinstance(value, bool):  # which is an int to Python
        fits = bool in kinds
    else:
        fits = isinstance(value, tuple(kind for kind in kinds if isinstance(kind, type)))
    if float in kinds and isinstance(value, int | str) and not fits and not isinstance(value, bool):
        with suppress(ValueError, OverflowError):
            return float(value)
    lists = [option.__args__[0] for option in options if typing.get_origin(option) is list]
    if isinstance(value, list) and len(lists) == 1:
        return [read_value(f"{name}[{place}]", element, lists[0]) for place, element in enumerate(value)]
    if fits or not kinds & TYPE_NAMES.keys() - {types.NoneType}:
        return value  # an enum or object of transformers, which checks it itself
    raise UserError(f"`{name}` must be {allowed(hint, {})}, got {value!r:.80} ({type(value).__name__}).")


def read_setting(name: str, value: Any, hint: Any, bounds: Mapping[str, Any], default: Any = ...) -> Any:
    """`read_value`, and `check_value` of what was read."""
    value = read_value(name, value, hint)
    check_value(name, value, hint, bounds, default)
    return value


def read_path(name: str, text: str | Path) -> Path:
    """A path as people write it. Raises UserError: it is empty, or `~` is the home of nobody."""
    text = str(text)
    if not text.strip() or "\0" in text:
        raise UserError(f"`{name}` must be a path, got {text!r}.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"`{name}`: there is no home of {text.split('/')[0]!r}; write the path out.") from error


@contextmanager
def user_settings(where: str, errors: type[Exception] = Exception) -> Iterator[None]:
    """What transformers, TRL or PEFT refuse in the settings of `where` becomes a UserError that names it."""
    try:
        yield
    except UserError:
        raise
    except errors as error:
        raise UserError(f"{where}: {' '.join(str(error).split()) or type(error).__name__}") from error


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`high` over `low`; nested mappings are merged key by key."""
    merged = dict(low)
    for key, value in high.items():
        merged[key] = merge(low[key], value) if isinstance(value, dict) and isinstance(low.get(key), dict) else value
    return merged


SECRETS = {"token", "hub_token", "push_to_hub_token", "use_auth_token", "api_key"}
CREDENTIALS = re.compile(r"(?<=://)[^/\s@'\"]+(?=@)|\bhf_[A-Za-z0-9]{20,}")  # of a URL, or the hub's own


def redacted(value: Any) -> Any:
    """Settings, or a text, that may be shown and saved: without tokens, keys and passwords."""
    if isinstance(value, dict):
        return {key: None if key in SECRETS else redacted(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [redacted(inner) for inner in value]
    return CREDENTIALS.sub("***", value) if isinstance(value, str) else value


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
