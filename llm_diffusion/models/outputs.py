"""What decoding returns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput


@dataclass
class DiffusionOutput(ModelOutput):
    """What decoding returns.

    Args:
        sequences: (B, L) token ids, prompt included.
        nfe: (B,) forward passes each row took part in.
        tokens_per_forward: (B,) answer tokens, through the EOS, over `nfe`.
        accepted: (B, cycles) tokens that each verification of lossless decoding yielded, the base's own included; -1: row was done.
        history: canvases (B, L) after every step, when asked for; not yet written blocks are masks.
        confidence: beside each of them (B, L), the probability that every token had when it was committed; 0 where nothing was.
    """

    sequences: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    history: list[torch.Tensor] | None = None
    confidence: list[torch.Tensor] | None = None


def output_of(
    canvas: torch.Tensor, was_open: torch.Tensor, nfe: torch.Tensor, eos: torch.Tensor, history: list | None
) -> DiffusionOutput:
    """The result, with answer tokens (through the first end token) over forward passes."""
    ends = (torch.isin(canvas, eos) & was_open).long()
    answer = was_open & (ends.cumsum(-1) - ends == 0)
    return DiffusionOutput(
        sequences=canvas, nfe=nfe, tokens_per_forward=answer.sum(-1) / nfe.clamp(min=1), history=history
    )


def eos_ids(settings: GenerationConfig, device: torch.device) -> torch.Tensor:
    """The end tokens of some decoding settings, () to (n,)."""
    eos = settings.eos_token_id
    return torch.tensor(
        [] if eos is None else [eos] if isinstance(eos, int) else list(eos), dtype=torch.long, device=device
    )
