"""Oracle denoiser: a Markov chain whose p(token | visible tokens) are all known, so that the ELBO is tight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

NEVER = -1e4  # logit of what cannot be; finite, so that no product with it turns into NaN


@dataclass(frozen=True)
class MarkovChain:
    """A stationary chain: the first token is uniform, each next one repeats its predecessor with probability `stay`.

    Called with token ids it is a perfect masked model, which reads every token at its own position.

    Args:
        n_states: K; states are the token ids 0 to K-1, and id K is the mask token.
        length: L.
        stay: probability to repeat; the K-1 other states share the rest evenly.
        flips: probability that a visible token was replaced by a random state, itself among them, before it was seen.
    """

    n_states: int
    length: int
    stay: float = 0.8
    flips: float = 0.0

    @property
    def mask_token_id(self) -> int:
        return self.n_states

    def transition(self) -> torch.Tensor:
        """(K, K) fp64, symmetric; row = from, column = to."""
        k = self.n_states
        leave = (1 - self.stay) / (k - 1)
        return torch.full((k, k), leave, dtype=torch.float64).fill_diagonal_(self.stay)

    def sample(self, n_rows: int, seed: int = 0) -> torch.Tensor:
        """(n_rows, L) token ids."""
        generator = torch.Generator().manual_seed(seed)
        tokens = [torch.randint(self.n_states, (n_rows,), generator=generator)]
        for _ in range(self.length - 1):
            tokens.append(torch.multinomial(self.transition()[tokens[-1]], 1, generator=generator).squeeze(-1))
        return torch.stack(tokens, dim=-1)

    def log_prob(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Exact log p(x) of (B, L) token ids without masks: (B,) fp64, in nats."""
        first = -torch.tensor(self.n_states, dtype=torch.float64).log()
        return first + self.transition().log()[input_ids[:, :-1], input_ids[:, 1:]].sum(-1)

    def log_conditionals(self, input_ids: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        """Exact log p(x_i | visible tokens), by the forward-backward recursion.

        Args:
            input_ids: (B, L) token ids; what stands at hidden positions does not matter.
            visible: (B, L) bool, any pattern.

        Returns:
            (B, L, K) fp64; at a visible position 0 for its token and -inf for the others, unless they may be flipped.
        """
        n_rows, length = input_ids.shape
        known = F.one_hot(input_ids.clamp(max=self.n_states - 1), self.n_states).double()
        known = (1 - self.flips) * known + self.flips / self.n_states
        evidence = torch.where(visible[..., None], known, 1.0)
        # left[i]: p(x_i | visible before i); right[i]: p(visible after i | x_i), up to a factor, as both are rescaled.
        left = [torch.full((n_rows, self.n_states), 1 / self.n_states, dtype=torch.float64)]
        right = [torch.ones_like(left[0])]
        for i in range(length - 1):
            left.append(F.normalize((left[-1] * evidence[:, i]) @ self.transition(), p=1, dim=-1))
            right.append(F.normalize((right[-1] * evidence[:, length - 1 - i]) @ self.transition().T, p=1, dim=-1))
        joint = torch.stack(left, dim=1) * torch.stack(right[::-1], dim=1) * evidence
        return F.normalize(joint, p=1, dim=-1).log()

    def __call__(self, input_ids: torch.Tensor) -> torch.Tensor:
        """(B, L) token ids, masks among them -> logits (B, L, K+1) fp64, the mask's own column out of reach."""
        log_probs = self.log_conditionals(input_ids, input_ids != self.mask_token_id)
        return F.pad(log_probs.clamp(min=NEVER), (0, 1), value=NEVER)
