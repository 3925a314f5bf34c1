"""From logits to tokens: what is banned, temperature and filters, and one uniform number a token."""

from __future__ import annotations

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

BANNED = -1e9  # large, finite, and applied last: an infinite ban turns into NaN in later arithmetic


def ban(logits: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """Puts the mask token and `suppress_tokens` out of reach: (..., V) -> (..., V)."""
    banned = torch.tensor([settings.mask_token_id, *(settings.suppress_tokens or [])], device=logits.device)
    return logits.index_fill(-1, banned, BANNED)


def warped(logits: torch.Tensor, settings: GenerationConfig) -> torch.Tensor:
    """Logits (..., V) under temperature (above 0), top-k and top-p, as the host's own sampling has them."""
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
