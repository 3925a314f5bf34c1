"""The masked-diffusion objective on rows that have already met the vocabulary.

    NELBO(x) = E_t E_m [ w(t) * sum over masked i of -log p(x_i | visible) ]

Only masked positions are ever scored, so the functions take gathered rows: (n, V) logits and (n,) targets.

References: MDLM (arXiv 2406.07524, eq. 11), LLaDA (arXiv 2502.09992, eq. 3).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .. import UserError


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every row in nats, fp32: (n, V) logits of any float type and (n,) token ids -> (n,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


WEIGHTS = ("elbo", "uniform", "clipped", "snr", "cart")
CLIP = 10.0  # of "clipped": what a token weighs at most, reached below one mask in ten on the linear schedule
CART_DECAY = 0.3  # of "cart": how fast a visible token's help falls with its distance


def loss_weights(
    kind: str, elbo_weight: torch.Tensor, probability: torch.Tensor, masked: torch.Tensor, document_ids: torch.Tensor
) -> torch.Tensor:
    """Weight of every token if it is masked: (B, L) each -> (B, L) fp32. Only "elbo" gives a bound.

    Args:
        kind: "elbo", w(t). "uniform", 1. "clipped", min(w(t), 10): the rare tokens of almost clean texts weigh less.
            "snr", sqrt(alpha / (1 - alpha)): for comparison; it is nothing at full masking, where sampling starts.
            "cart", half the sum over visible tokens of Geo(0.3) of their distance: context decides, not time.
        probability: mask probability, 1 - alpha.
        masked: bool, which tokens are masked.
        document_ids: see `attention_masks`; only tokens of the same text are context.

    References: LLaDA (arXiv 2502.09992, eq. 3) for "elbo", Dream (arXiv 2508.15487, section 3.2) for "cart".
    """
    if kind not in WEIGHTS:
        raise UserError(f"`loss_weight` must be one of {WEIGHTS}, got {kind!r}.")
    if kind == "elbo":
        return elbo_weight
    if kind == "uniform":
        return torch.ones_like(elbo_weight)
    if kind == "clipped":
        return elbo_weight.clamp(max=CLIP)
    if kind == "snr":
        return ((1 - probability) / probability).clamp(min=0).sqrt()
    index = torch.arange(masked.shape[-1], device=masked.device)
    distance = (index[:, None] - index).abs()
    kernel = 0.5 * CART_DECAY * (1 - CART_DECAY) ** (distance - 1).float() * (distance > 0)
    visible = (~masked & (document_ids > 0))[:, None, :] & (document_ids[:, :, None] == document_ids[:, None, :])
    return (visible * kernel).sum(-1)


def soft_cross_entropy(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every row with the teacher's distribution, nats, fp32: two (n, V) -> (n,).

    Its mean over teacher samples is that of `token_nll`: the same minimum, with less noise.
    """
    return F.cross_entropy(logits.float(), teacher_logits.float().softmax(-1), reduction="none")


def total_variation(logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    """Half the absolute difference of every row's two distributions, fp32: two (n, V) -> (n,), in [0, 1].

    One minus it is the chance that a token drawn from the first is accepted by the second (speculative decoding, arXiv 2211.17192).
    """
    return (logits.float().softmax(-1) - teacher_logits.float().softmax(-1)).abs().sum(-1) / 2


def relative_error(hidden: torch.Tensor, teacher_hidden: torch.Tensor) -> torch.Tensor:
    """Squared distance of every row over the teacher's squared length: two (n, D) -> (n,) fp32; 1 is as far as nothing at all."""
    wanted = teacher_hidden.float()
    return (hidden.float() - wanted).square().sum(-1) / wanted.square().sum(-1).clamp(min=1e-6)


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy of every row's distribution in nats, fp32: (n, V) -> (n,)."""
    # A few rows at a time, and no table of p log p: a figure for the log must not set the peak of memory.
    parts = logits.split(max(1, 2**22 // logits.shape[-1]))
    return torch.cat([_entropy(part.float()) for part in parts])


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    mean = (logits.softmax(-1)[:, None] @ logits[..., None]).flatten()
    return logits.logsumexp(-1) - mean
