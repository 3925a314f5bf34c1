"""Which drafted tokens are the base's own: by its choice, or by its distribution (speculative sampling, arXiv 2211.17192)."""

from __future__ import annotations

import torch

from ..models.sampling import sample


def accept_greedy(draft: torch.Tensor, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, m) drafted tokens and (B, m + 1, V) logits -> (B,) how many are accepted, 0 to m, and (B,) the token after them."""
    best = target_logits.argmax(-1)
    accepted = (draft == best[:, :-1]).long().cumprod(-1).sum(-1)
    return accepted, best.gather(-1, accepted[:, None]).squeeze(-1)


def accept_sampled(
    draft: torch.Tensor,
    draft_probs: torch.Tensor,
    target_probs: torch.Tensor,
    accept_noise: torch.Tensor,
    token_noise: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Accepts token x with probability min(1, p(x) / q(x)); the first that is not is drawn from max(0, p - q), rescaled.

    Args:
        draft: (B, m) tokens drawn from `draft_probs`.
        draft_probs: (B, m, V), q.
        target_probs: (B, m + 1, V), p; sums to one.
        accept_noise: (B, m) uniform numbers in (0, 1).
        token_noise: (B, m + 1) uniform numbers in (0, 1), for the token after the accepted ones.

    Returns:
        (B,) how many are accepted, and (B,) the token after them.
    """
    p = target_probs[:, :-1].gather(-1, draft[..., None]).squeeze(-1)
    q = draft_probs.gather(-1, draft[..., None]).squeeze(-1)
    accepted = (accept_noise * q < p).long().cumprod(-1).sum(-1)
    at = accepted[:, None, None].expand(-1, 1, target_probs.shape[-1])
    # After the last one nothing was drafted: the residual is the target's own distribution.
    nothing = torch.zeros_like(target_probs[:, :1])
    residual = (target_probs - torch.cat([draft_probs, nothing], 1)).clamp(min=0).gather(1, at).squeeze(1)
    return accepted, sample(residual, token_noise.gather(-1, accepted[:, None]).squeeze(-1))
