"""Trees of drafts: several ways to go on, verified in one pass.

A drafter guesses all places of a block at once, so that second choices, and what may follow them, cost no pass of the drafter. Of all
paths through these guesses the tree has those with the highest product of probabilities, which yield most if places are independent:

    t ── a ── b ── c        row   sees  t  a  b  c  e  b         t: the base's own next token
      └─ e ── b             t           x                        a b c: the best guess at each place
                            a           x  x                     e: the second one at the first place
                            b           x  x  x
                            c           x  x  x  x
                            e           x           x
                            b           x           x  x

References: verification of trees (SpecInfer, arXiv 2305.09781), trees grown by the drafter's probabilities (EAGLE-2, arXiv 2406.16858).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import one_hot, pad
from transformers import DynamicCache

# Log-probabilities are cut off at the first, and a path loses the second a token: none ties with what it begins with.
LEAST, STEP = -50.0, 1e-3


@dataclass
class DraftTree:
    """n drafted tokens behind a token t that is known, for B texts; row 0 of a verification is t, row i + 1 token i.

    Attributes:
        tokens: (B, n), every one behind what it follows.
        parents: (B, n) rows that they follow.
        sees: (B, n + 1, n + 1) bool, what each row follows, itself included.
        ranks: (B, n) places in the order of probability, from 0.
        chain: (B, n) bool, on the path of best guesses; these stand first.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    sees: torch.Tensor
    ranks: torch.Tensor
    chain: torch.Tensor


def likeliest_tree(logits: torch.Tensor, n: int) -> DraftTree:
    """The n likeliest paths through guesses (B, m, V) for m places, as a tree; fewer, if there are no more."""
    batch, m, vocab = logits.shape
    best, tokens = logits.topk(min(n, vocab), -1)
    # Guesses of a broken adapter that are no numbers must not break the tree: its order is what the accepted text is read by.
    scores = (best - logits.logsumexp(-1, keepdim=True)).nan_to_num(LEAST).clamp(LEAST, 0) - STEP
    width = scores.shape[-1]
    # 1. The n best paths of every length. A path is likelier than any that begins with it, so none of the n best overall is missed.
    score, begins = scores[:, 0], torch.full_like(tokens[:, 0], -1)
    chain = (torch.arange(width, device=logits.device) == 0).expand(batch, -1)
    levels, first = [(score, begins, tokens[:, 0], chain)], 0
    for place in range(1, m):
        grown = (score[:, :, None] + scores[:, place, None]).flatten(1)
        size, (score, at) = score.shape[-1], grown.topk(min(n, grown.shape[-1]))
        before, guess = at // width, at % width
        chain = chain.gather(-1, before) & (guess == 0)
        levels.append((score, first + before, tokens[:, place].gather(-1, guess), chain))
        first += size
    score, begins, tokens, chain = (torch.cat(parts, -1) for parts in zip(*levels, strict=True))
    # 2. The n best of these, best guesses first; what a path begins with stands before it in either order.
    likely = score.topk(min(n, score.shape[-1]))[1]
    ranks = (~chain.gather(-1, likely)).long().argsort(dim=-1, stable=True)
    nodes = likely.gather(-1, ranks)
    number = torch.arange(1, nodes.shape[-1] + 1, device=nodes.device).expand(batch, -1)
    row_of = torch.zeros_like(pad(begins, (1, 0))).scatter(-1, nodes + 1, number)
    parents = row_of.gather(-1, begins.gather(-1, nodes) + 1)
    # 3. What each row sees: steps to the row before, taken twice as far each time.
    rows = nodes.shape[-1] + 1
    sees = torch.eye(rows, device=nodes.device) + pad(one_hot(parents, rows).float(), (0, 0, 1, 0))
    for _ in range((m - 1).bit_length()):
        sees = (sees @ sees).clamp(max=1)
    return DraftTree(tokens.gather(-1, nodes), parents, sees > 0, ranks, chain.gather(-1, nodes))


def accept_tree(tree: DraftTree, target_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Which path the base takes.

    Args:
        target_logits: (B, n + 1, V), of the rows.

    Returns:
        (B,) how many tokens are accepted; (B, n + 1) rows, those of t and of these tokens first, in the order of the text; (B,) the
        token after them.
    """
    best = target_logits.argmax(-1)
    wrong = pad(tree.tokens != best.gather(-1, tree.parents), (1, 0))
    off_path = (tree.sees & wrong[:, None]).any(-1)
    order, accepted = off_path.long().argsort(dim=-1, stable=True), (~off_path).sum(-1) - 1
    last = order.gather(-1, accepted[:, None])
    return accepted, order, best.gather(-1, last).squeeze(-1)


def reorder_columns(cache: DynamicCache, order: torch.Tensor, n: int) -> None:
    """Of the last columns (B, as many as in `order`) of a cache those in `order` come first, n of them; the others are undefined."""
    index = order[:, None, :n, None]
    for layer in cache.layers:
        for states in (layer.keys, layer.values):
            new = states[:, :, -order.shape[-1] :]
            new[:, :, :n] = new.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))
