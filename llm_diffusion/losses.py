"""The masked-diffusion objective on rows that have already met the vocabulary.

    NELBO(x) = E_t E_m [ w(t) * sum over masked i of -log p(x_i | visible) ]

Only masked positions are ever scored, so the functions take gathered rows: (n, V) logits and (n,) targets.
Trade-off: terms are returned, never means, because the right denominator (maskable tokens of the whole accumulated, gathered
batch) is known to the trainer alone. Alternative: a mean per micro-batch, which makes the gradient depend on how a batch is
cut up.

References: MDLM (arXiv 2406.07524, eq. 11), LLaDA (arXiv 2502.09992, eq. 3).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def token_nll(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every row in nats, fp32: (n, V) logits of any float type and (n,) token ids -> (n,)."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


WEIGHTS = ("elbo", "uniform")


def loss_weights(kind: str, elbo_weight: torch.Tensor) -> torch.Tensor:
    """Weight of a masked token: `elbo` is w(t), an unbiased bound; `uniform` is 1, a reweighted objective (seed recipes)."""
    if kind not in WEIGHTS:
        raise ValueError(f"`loss_weight` must be one of {WEIGHTS}, got {kind!r}.")
    return elbo_weight if kind == "elbo" else torch.ones_like(elbo_weight)
