"""Shipped settings: model, training and hardware presets, and the keys of DiffuGPT's config files."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from .. import UserError
from ..objective.settings import merge

PRESETS = Path(__file__).parent


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*/*.yaml"))


def read_preset(names: str) -> dict[str, Any]:
    """The settings of a preset, or of several joined by "+", later ones winning: `qwen3-4b+rtx4080`."""
    merged: dict[str, Any] = {}
    if names not in preset_names():  # `phi-2-3stage` is short for `phi-2+3stage`
        names = names.replace("-3stage", "+3stage")
    for name in names.split("+"):
        if name not in preset_names():
            close = difflib.get_close_matches(name, preset_names(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise UserError(f"preset {name!r} is unknown{hint} There are: {', '.join(preset_names())}.")
        (path,) = PRESETS.glob(f"*/{name}.yaml")
        merged = merge(merged, yaml.safe_load(path.read_text()))
    return merged
