"""Commit rules: given how confident the model is about every masked position, which positions are unmasked now.

Pure functions on (B, L) tensors, vectorised over ragged rows, without a loop over rows and without a host synchronisation.
Ties go to the leftmost position (stable sort). Confidence is fp32: bf16 leaves some 170 distinct values in 256 positions and
the order to chance. Rules of revision (`revise_p2`, `revise_remdm`, `edits`) also take back or change what was committed.

References: LLaDA (arXiv 2502.09992, algorithm 5), Dream (arXiv 2508.15487), Fast-dLLM (arXiv 2505.22618, section 3.3), EB-Sampler
(arXiv 2505.24857), P2 (arXiv 2502.03540), ReMDM (arXiv 2503.00307), LLaDA2.1 (arXiv 2602.08676).
"""

from __future__ import annotations

import torch

REMDM_LOOP = (0.55, 0.05, 0.9)  # t_on, t_off and alpha_on as published
CONFIDENCES = ("low_confidence", "random", "entropy", "margin", "left_to_right")
NOT_PROBABILITIES = ("entropy", "left_to_right")


def confidence(
    logits: torch.Tensor, tokens: torch.Tensor, kind: str, random: torch.Tensor | None = None
) -> torch.Tensor:
    """How sure the model is of the proposed tokens; higher is committed earlier: (..., V) logits and (...) tokens -> (...) fp32.

    Args:
        logits: after bans, before temperature.
        kind: "low_confidence" (probability of the token; the least confident stay masked), "entropy" (negative entropy),
            "margin" (probability gap of the two best), "random" or "left_to_right".
        random: (...) uniform numbers, for "random".
    """
    if kind == "random":
        return random
    if kind == "left_to_right":
        return -torch.arange(tokens.shape[-1], dtype=torch.float32, device=tokens.device).expand(tokens.shape)
    log_probs = logits.float().log_softmax(-1)
    if kind == "entropy":
        return torch.special.entr(log_probs.exp()).sum(-1).neg()
    if kind == "margin":
        best, second = log_probs.topk(2, dim=-1).values.exp().unbind(-1)
        return best - second
    return log_probs.gather(-1, tokens[..., None]).squeeze(-1).exp()


def ranks(score: torch.Tensor, eligible: torch.Tensor) -> torch.Tensor:
    """(B, L) rank of every position among the eligible ones of its row, 0 = highest score; ineligible ones come last."""
    # Two stable sorts, the second by eligibility: even a score of -inf stands before the ineligible ones.
    order = score.argsort(dim=-1, descending=True, stable=True)
    order = order.gather(-1, eligible.gather(-1, order).long().argsort(dim=-1, descending=True, stable=True))
    return order.argsort(dim=-1)


def commit_quota(score: torch.Tensor, eligible: torch.Tensor, quota: torch.Tensor) -> torch.Tensor:
    """The `quota` (B,) best positions of every row: (B, L) bool."""
    return (ranks(score, eligible) < quota[:, None]) & eligible


def commit_threshold(score: torch.Tensor, eligible: torch.Tensor, threshold: float) -> torch.Tensor:
    """All positions at or above `threshold`, and always the best one of a row that has any: (B, L) bool."""
    return ((score >= threshold) | (ranks(score, eligible) == 0)) & eligible


def commit_factor(score: torch.Tensor, eligible: torch.Tensor, factor: float) -> torch.Tensor:
    """The n best positions of every row, n the largest with (n + 1) (1 - n-th score) <= `factor`, at least one: (B, L) bool.

    The more are committed together, the surer each must be. As scores fall with the rank and the bound 1 - factor / (n + 1) rises,
    every position can be judged by its own rank. (Fast-dLLM's own loop also takes the last candidate when it is the first to fail.)
    """
    rank = ranks(score, eligible)
    return ((score >= 1 - factor / (rank + 2)) | (rank == 0)) & eligible


def commit_entropy_bound(
    score: torch.Tensor, eligible: torch.Tensor, entropy: torch.Tensor, bound: float
) -> torch.Tensor:
    """The best positions of every row as long as their entropies (B, L), the largest left out, sum to at most `bound` nats.

    That sum bounds what is lost by committing them independently of each other. The first one is always committed. The published
    order is by negative entropy.

    References: EB-Sampler (arXiv 2505.24857, eq. 8).
    """
    rank = ranks(score, eligible)
    ordered = torch.zeros_like(entropy).scatter(-1, rank, entropy)
    within = ordered.cumsum(-1) - ordered.cummax(-1).values <= bound
    return (within.gather(-1, rank) | (rank == 0)) & eligible


def perturb(score: torch.Tensor, temperature: float, random: torch.Tensor) -> torch.Tensor:
    """Gumbel noise on an order: its k best are k draws without replacement from softmax(score / temperature), (B, L).

    Dream's order temperature (`alg_temp`); Dream's `multinomial` fails where fewer than k positions have any probability.
    """
    return score / temperature - torch.log(-torch.log(random))


def revise_p2(
    score: torch.Tensor, masked: torch.Tensor, open_: torch.Tensor, n_masked: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-planned path: the `n_masked` (B,) least sure of all open positions are masks after this step; `(commit, remask)`.

    Args:
        score: (B, L), of the proposed token where it is masked, of the committed token elsewhere.
        masked, open_: (B, L) bool, positions that are masked now, and those that may change.

    References: P2 (arXiv 2502.03540, algorithm 1).
    """
    low = (ranks(-score, open_) < n_masked[:, None]) & open_
    return masked & ~low, open_ & ~masked & low


def remdm_alpha(time: torch.Tensor, loop: tuple[float, float, float] | None = None) -> torch.Tensor:
    """Share of committed tokens at a time in [0, 1], (B,) -> (B,): 1 - time, or with a `loop` in three parts.

    `loop` is (t_on, t_off, alpha_on): up to alpha_on while time falls to t_on, then constant, and from t_off on up to 1.

    References: ReMDM (arXiv 2503.00307, section 4.2).
    """
    if loop is None:
        return 1 - time
    t_on, t_off, alpha_on = loop
    ending = 1 - time * (1 - alpha_on) / t_off
    return torch.where(time > t_on, (1 - time) * alpha_on / (1 - t_on), ending.clamp(min=alpha_on))


def revise_remdm(
    steps_left: torch.Tensor,
    steps: int | torch.Tensor,
    eta: float,
    masked: torch.Tensor,
    open_: torch.Tensor,
    random: torch.Tensor,
    kind: str = "cap",
    confidence: torch.Tensor | None = None,
    loop: tuple[float, float, float] = REMDM_LOOP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Remasking diffusion: committed tokens are masked again with probability sigma; `(commit, remask)`, (B, L) bool each.

    From t = steps_left / steps to s = t - 1 / steps, with alpha as in `remdm_alpha`: sigma is at most sigma_max = min(1, (1 - alpha_s) /
    alpha_t), and a mask is committed with probability (alpha_s - (1 - sigma) alpha_t) / (1 - alpha_t). The share of masks at every s
    is then that of no remasking, sigma = 0, which is the ancestral sampler of MDLM.

    Args:
        steps_left: (B,) this one included.
        steps: of all rows, or (B,).
        random: (B, L) uniform numbers in (0, 1).
        kind: "cap", sigma = min(eta, sigma_max); "rescale", sigma = eta sigma_max; "conf", the rescaled one dealt out among the
            committed tokens by softmax(-confidence), and masks committed as under sigma = 0, so their share is kept but roughly; "loop",
            capped, while t is in (t_off, t_on], and no remasking before and after.
        confidence: (B, L) probability that every token had when it was committed, for "conf".

    References: ReMDM (arXiv 2503.00307, eq. 6, sections 4.1 and 4.2).
    """
    t, s = steps_left.clamp(min=1) / steps, (steps_left.clamp(min=1) - 1) / steps
    alpha_t, alpha_s = (remdm_alpha(time, loop if kind == "loop" else None) for time in (t, s))
    highest = ((1 - alpha_s) / alpha_t.clamp(min=1e-9)).clamp(max=1)
    sigma = highest * eta if kind in ("rescale", "conf") else highest.clamp(max=eta)
    if kind == "loop":
        sigma = torch.where((loop[1] < t) & (t <= loop[0]), sigma, 0.0)
    sigma = torch.where(s > 0, sigma, 0.0)  # the last step leaves no mask
    again = sigma[:, None]
    if kind == "conf":
        # NaN where nothing is committed, which no noise is below.
        again = again * confidence.neg().masked_fill(masked | ~open_, -torch.inf).softmax(-1)
        sigma = torch.zeros_like(sigma)
    commit = torch.where(s > 0, (alpha_s - (1 - sigma) * alpha_t) / (1 - alpha_t), 1.0)
    return masked & (random < commit[:, None]), open_ & ~masked & (random < again)


def edits(
    probability: torch.Tensor, tokens: torch.Tensor, ids: torch.Tensor, editable: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Committed tokens that the model now replaces: it predicts another one, with more than `threshold` probability: (B, L) bool.

    References: LLaDA2.1 (arXiv 2602.08676), token-to-token editing.
    """
    return editable & (tokens != ids) & (probability > threshold)


def step_quota(masks: torch.Tensor, steps_left: torch.Tensor) -> torch.Tensor:
    """Positions to commit now so that `masks` (B,) are gone after `steps_left` (B,) steps: ceil(masks / steps_left).

    Dealing out n masks over S steps this way gives every step floor(n/S) or ceil(n/S), the larger ones first: LLaDA's quota.
    """
    return -(-masks // steps_left.clamp(min=1))
