"""What a converted model is: the record in its config.json, or in `diffusion_config.json` beside an adapter.

`model.config.diffusion` holds it as a plain dict, which transformers saves and loads; everything here reads it through attributes.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .. import UserError
from ..objective.modes import MODES, Bidirectional
from ..objective.settings import setting
from .checkpoints import local_file
from .patching import base_of

SIDECAR = "diffusion_config.json"


@dataclass(frozen=True)
class DiffusionRecord:
    """How a model was converted and what it has been trained on since; without arguments, a bidirectional model that never was.

    Attributes:
        mask_token_id: None: not converted.
        attention, block_length, clean_context, right_shift_logits, time_embedding, noise_schedule: see `convert_to_diffusion`.
        final_causal_ratio: what is left of the causal mask for good, 0 is fully bidirectional.
        tail_token_id: what stands behind the end of a text in training; None: the end token.
        base_model, base_fingerprint: name of the autoregressive model, and a few of its weights.
        gguf_file: of a base that was unpacked from one.
        conversion_steps, training_tokens: optimiser steps and tokens since the conversion.
        annealed: whether annealing has reached its target, or the model came from diffusion training elsewhere.
        created_at, version: ISO time and version of this package.
    """

    mask_token_id: int | None = None
    attention: str = "bidirectional"
    block_length: int | None = None
    clean_context: str | None = None
    right_shift_logits: bool = False
    time_embedding: bool = False
    noise_schedule: str = "linear"
    final_causal_ratio: float = 0.0
    tail_token_id: int | None = None
    base_model: str = ""
    base_fingerprint: list[float] | None = None
    gguf_file: str | None = None
    conversion_steps: int = 0
    training_tokens: int = 0
    annealed: bool = False
    created_at: str | None = None
    version: str | None = None

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DiffusionRecord:
        """Keys that a later version may have written are left out."""
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

    def to_dict(self) -> dict[str, Any]:
        optional = ("tail_token_id", "gguf_file")
        return {name: value for name, value in vars(self).items() if value is not None or name not in optional}

    @property
    def mode(self) -> Bidirectional:
        """The object that knows how this model attends."""
        return MODES[self.attention](self.block_length, self.clean_context or "causal", self.right_shift_logits)

    @property
    def converted(self) -> bool:
        return self.mask_token_id is not None

    @property
    def trained(self) -> bool:
        """Whether it has seen noise: here, or, if there is no record of a conversion, elsewhere."""
        return self.conversion_steps > 0 or self.annealed or not self.converted


@dataclass
class ConversionSettings:
    """How a model that is not converted yet is converted; None: the recommended choice, or as the checkpoint was."""

    attention: str | None = setting(
        None,
        "`bidirectional` (the default); `block`: bidirectional inside a block, blocks from left to right; `lossless`: adapters draft, "
        "the base verifies.",
        choices=tuple(MODES),
    )
    block_length: int | None = setting(None, "Tokens of a block (4; 8 of a lossless draft).", min=1)
    clean_context: str | None = setting(
        None, "How finished blocks see themselves: `causal` (the default) or `block`.", choices=("causal", "block")
    )
    right_shift_logits: bool | None = setting(None, "Hidden state i - 1 predicts token i, as in the AR model.")
    time_embedding: bool | None = setting(None, "Tell the model the noise level (off by default).")
    mask_token_id: int | None = setting(
        None, "A token of the vocabulary as the mask; else the tokenizer's, or a new one."
    )


CONVERSION_OPTIONS = tuple(field.name for field in dataclasses.fields(ConversionSettings))


def record_of(model: torch.nn.Module) -> DiffusionRecord:
    """The record of a model under any wrappers; that of a model which was never converted is empty."""
    return DiffusionRecord.from_dict(getattr(base_of(model).config, "diffusion", None) or {})


def update_record(model: torch.nn.Module, **changes: Any) -> DiffusionRecord:
    """Writes `changes` into the model's record; returns it."""
    record = dataclasses.replace(record_of(model), **changes)
    base_of(model).config.diffusion = record.to_dict()
    return record


def read_record(folder: str | Path) -> DiffusionRecord:
    """The record of a saved adapter or full checkpoint."""
    if (Path(folder) / SIDECAR).exists():
        return read_sidecar(str(folder))
    return DiffusionRecord.from_dict(json.loads((Path(folder) / "config.json").read_text())["diffusion"])


def read_sidecar(path: str) -> DiffusionRecord:
    """The record beside an adapter, in a folder or hub repository.

    Raises:
        ValueError: there is none, or it is malformed.
    """
    sidecar = local_file(path, SIDECAR)
    if sidecar is None:
        raise UserError(
            f"`model`: {path!r} holds an adapter without {SIDECAR}; it was not saved by llm_diffusion's trainers."
        )
    try:
        values = json.loads(Path(sidecar).read_text())
        missing = {"base_model", "mask_token_id", "attention"} - set(values)
    except (json.JSONDecodeError, TypeError) as error:
        raise UserError(f"`model`: {sidecar!r} is malformed: {error}.") from error
    if missing:
        raise UserError(f"`model`: {sidecar!r} lacks {sorted(missing)}.")
    return DiffusionRecord.from_dict(values)


def save_record(model: torch.nn.Module, folder: str | Path) -> None:
    """Writes the record beside an adapter, whose own files cannot carry it."""
    (Path(folder) / SIDECAR).write_text(json.dumps(record_of(model).to_dict(), indent=2) + "\n")
