"""What decoding returns, and what it tells of its steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput

from .. import UserError

# Gets the canvas (B, L) and how sure each token was, (B, L); may return rows to decode no further, (B,) bool.
OnStep = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor | None]


@dataclass
class DiffusionOutput(ModelOutput):
    """What decoding returns.

    Args:
        sequences: (B, L) token ids, prompt included.
        nfe: (B,) forward passes each row took part in.
        tokens_per_forward: (B,) answer tokens, through the EOS, over `nfe`.
        accepted: (B, cycles) tokens that each verification of lossless decoding yielded, the base's own included; -1: row was done.
        history: canvases (B, L) after every step, with `output_history`; not yet written blocks are masks.
        confidence: beside each of them (B, L), the probability that every token had when it was committed; 0 where nothing was.
    """

    sequences: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    history: list[torch.Tensor] | None = None
    confidence: list[torch.Tensor] | None = None


class Recorder:
    """Keeps the steps of one decoding where `output_history` wants them, and calls `on_step` after each."""

    def __init__(self, settings: GenerationConfig, on_step: OnStep | None) -> None:
        self.keeps, self.on_step = settings.output_history, on_step
        self.wanted = self.keeps or on_step is not None
        self.history: list[torch.Tensor] = []
        self.confidence: list[torch.Tensor] = []

    def step(self, canvas: torch.Tensor, confidence: torch.Tensor | None = None) -> torch.Tensor | None:
        if self.keeps:
            self.history.append(canvas.clone())
            if confidence is not None:
                self.confidence.append(confidence.clone())
        return None if self.on_step is None else self.on_step(canvas, confidence)

    def output(
        self, canvas: torch.Tensor, was_open: torch.Tensor, nfe: torch.Tensor, eos: torch.Tensor
    ) -> DiffusionOutput:
        """The result, with answer tokens (through the first end token) over forward passes.

        Args:
            was_open: (B, L) or (L,) bool, positions of the answer.
            eos: (n,) end tokens.
        """
        ends = (torch.isin(canvas, eos) & was_open).long()
        answer = was_open & (ends.cumsum(-1) - ends == 0)
        return DiffusionOutput(
            sequences=canvas,
            nfe=nfe,
            tokens_per_forward=answer.sum(-1) / nfe.clamp(min=1),
            history=self.history if self.keeps else None,
            confidence=self.confidence if self.keeps and self.confidence else None,
        )


def behind(canvas: torch.Tensor, first: int) -> torch.Tensor:
    """(L,) bool, the columns from `first` on."""
    return torch.arange(canvas.shape[1], device=canvas.device) >= first


def eos_ids(settings: GenerationConfig, device: torch.device) -> torch.Tensor:
    """The end tokens of some decoding settings, () to (n,)."""
    eos = settings.eos_token_id
    return torch.tensor(
        [] if eos is None else [eos] if isinstance(eos, int) else list(eos), dtype=torch.long, device=device
    )


def check_decodable(fine: bool) -> None:
    """Raises UserError where logits gave no token, or no likelihood."""
    if not fine:
        raise UserError(
            "`model`: its logits are not finite, or a `logits_processor` leaves no token; look for NaN in the weights, or load them in "
            "another `dtype`."
        )


BANNED = -1e9  # large, finite, and applied last: an infinite ban turns into NaN in later arithmetic


def ban(logits: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """Puts the mask token and `suppress_tokens` out of reach: (..., V) -> (..., V)."""
    banned = torch.tensor([settings.mask_token_id, *(settings.suppress_tokens or [])], device=logits.device)
    return logits.index_fill(-1, banned, BANNED)


def warped(logits: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """Logits (..., V) under temperature (above 0), top-k and top-p, as in transformers' own sampling."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers(None, logits.flatten(0, -2)).view_as(logits)


def sample(weights: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    """Tokens by inverse transform: (..., V) weights that need no common sum, (...) uniform numbers -> (...)."""
    # A large vocabulary sums up to rounding errors that fp32 noise can see; MPS has no wider type.
    total = weights.cumsum(-1, dtype=torch.float32 if weights.device.type == "mps" else torch.float64)
    # A token of weight 0 is never drawn: its cumulative sum is no larger than its predecessor's.
    at = noise.to(total)[..., None] * total[..., -1:]
    return torch.searchsorted(total, at, right=True).squeeze(-1).clamp(max=weights.shape[-1] - 1)
