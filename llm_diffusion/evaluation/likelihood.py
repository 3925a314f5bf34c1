"""How likely a model finds a text: a bound with its standard error, and the AR model's exact figure beside it.

The bound is the NELBO by one of the estimators of `estimators`, of texts of any length, see `windows`.
The standard error is of the noise alone, from independent replicates; it says nothing about the choice of texts. Noise is keyed by
(seed, tokens of the row), so that no figure depends on batches or on the other texts; samples that drew the same mask are computed
once, so short completions cost little.
Trade-off: at the default of 128 samples a text costs 128 forward rows. Alternative: the evaluation loss of the trainer, one sample a text.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..models.attention import causal_attention
from ..models.patching import adapters_off, base_of
from ..models.record import record_of
from ..objective.estimators import (
    REPLICATES,
    check_estimator,
    draw,
    share_masked,
)
from ..objective.losses import token_nll
from ..objective.modes import IGNORE_INDEX, align_with_readout
from ..objective.noise import content_keys, hash_keys
from ..training.collator import DataCollatorForMaskedDiffusion
from .processes import dealt, gathered
from .windows import (
    Row,
    block_rows,
    pair_row,
    text_rows,
    window_length,
    windows,
)

logger = logging.getLogger(__name__)

AUTOREGRESSIVE = "autoregressive"
LEVELS = 10  # bins of the noise level


@dataclass
class Likelihood:
    """Upper bounds of the negative log-likelihood of texts; of an AR model the exact values.

    Args:
        nats: of every text, summed over its scored tokens.
        errors: standard errors of `nats`, of the noise alone.
        tokens: how many were scored.
        n_bytes: of the scored text, in UTF-8.
        estimator: one of `ESTIMATORS`, or "autoregressive".
        levels: mean NLL of masked tokens by the share of tokens that was masked: (share up to, nats, tokens).
    """

    nats: list[float]
    errors: list[float]
    tokens: list[int]
    n_bytes: list[int] = field(default_factory=list)
    estimator: str = AUTOREGRESSIVE
    levels: list[tuple[float, float, int]] = field(default_factory=list)

    @property
    def nats_per_token(self) -> float:
        return sum(self.nats) / sum(self.tokens)

    @property
    def standard_error(self) -> float:
        """Of `nats_per_token`; the noise of different texts is independent."""
        return math.sqrt(sum(error**2 for error in self.errors)) / sum(self.tokens)

    @property
    def perplexity_bound(self) -> float:
        return math.exp(min(self.nats_per_token, 700.0))

    @property
    def bits_per_byte(self) -> float:
        return sum(self.nats) / math.log(2) / max(sum(self.n_bytes), 1)

    def summary(self) -> dict[str, float | str | int]:
        """The figures of all texts together."""
        return {
            "estimator": self.estimator,
            "texts": len(self.nats),
            "tokens": sum(self.tokens),
            "nats_per_token": self.nats_per_token,
            "standard_error": self.standard_error,
            "bits_per_byte": self.bits_per_byte,
            "perplexity_bound": self.perplexity_bound,
        }


# -- scoring


@dataclass(frozen=True)
class _Mask:
    """One mask of a row, and the samples that drew it."""

    row: int
    masked: torch.Tensor  # (n,) bool, of the scored tokens
    level: torch.Tensor  # (L,) share of its part that is masked
    weights: torch.Tensor  # (k, n) of the k samples
    samples: torch.Tensor  # (k,)
    n_samples: int  # of the row


def _masks(
    rows: Sequence[Row], numbers: Sequence[int], block_length: int | None, clean_first: bool, settings: dict
) -> Iterator[_Mask]:
    """The distinct masks of some rows.

    Args:
        numbers: of the rows, in the order wanted.
        clean_first: whether the first token of a block is read from the clean text before it, so that it comes first in every order
            and is never masked: this is the tightest of the model's bounds, as no other order tells it more.
    """
    occurrence, seen = [], Counter()
    for row in rows:  # the n-th row of the same content has noise of its own
        occurrence.append(seen[row.ids, row.first])
        seen[row.ids, row.first] += 1
    for i in numbers:
        ids = torch.tensor(rows[i].ids)
        content = content_keys(ids[None], torch.ones_like(ids)[None])
        key = int(hash_keys(content, rows[i].first, occurrence[i]))
        whole = torch.arange(len(ids)) // (block_length or len(ids))
        part = whole[rows[i].first :]
        asked = torch.ones(len(part), dtype=torch.bool)
        if clean_first:
            asked = torch.arange(rows[i].first, len(ids)) % block_length != 0
        drawn, weights = draw(part[asked], key, **settings)
        masked = torch.zeros(len(drawn), len(part), dtype=torch.bool)
        masked[:, asked] = drawn
        weights = torch.zeros(masked.shape, dtype=torch.float64).masked_scatter(asked.expand_as(masked), weights)
        distinct, which = masked.unique(dim=0, return_inverse=True)
        levels = share_masked(distinct, part, whole)
        by_mask = which.argsort().split(which.bincount().tolist())
        for mask, level, samples in zip(distinct, levels, by_mask, strict=True):
            yield _Mask(i, mask, level, weights[samples], samples, len(masked))


def _longest_first(rows: Sequence[Row]) -> list[int]:
    return sorted(range(len(rows)), key=lambda i: -len(rows[i].ids))


def plain_collator(model: torch.nn.Module) -> DataCollatorForMaskedDiffusion:
    """Lays rows out as the model was converted, and adds nothing to them."""
    return DataCollatorForMaskedDiffusion(record_of(model), pad_token_id=0)  # hidden by the attention mask


def in_batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def padded(rows: Sequence[Row], collator: DataCollatorForMaskedDiffusion) -> dict[str, torch.Tensor]:
    """A clean batch of rows, what comes before `first` not maskable."""
    return collator(
        [{"input_ids": row.ids, "labels": [IGNORE_INDEX] * row.first + list(row.ids[row.first :])} for row in rows]
    )


def kept_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of the hidden states in `keep` (B, M) on what a collator laid out."""
    inputs = {**inputs, "use_cache": False}
    if inputs["attention_mask"].dim() == 4:
        dtype = base_of(model).dtype
        inputs["attention_mask"] = inputs["attention_mask"].clamp(min=torch.finfo(dtype).min).to(dtype)
    return model(**inputs, logits_to_keep=keep).logits


def _terms(
    model: torch.nn.Module, collator: DataCollatorForMaskedDiffusion, rows: Sequence[Row], batch: list[_Mask]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every mask the NLL of its row's scored tokens (n,) fp64, 0 where nothing was asked, and their levels (n,), 0 on clean text."""
    mine, device = [rows[item.row] for item in batch], base_of(model).device
    numbers = sorted({item.row for item in batch})
    copies = torch.tensor([numbers.index(item.row) for item in batch])
    clean = {name: value[copies] for name, value in padded([rows[i] for i in numbers], collator).items()}
    masked, levels = torch.zeros_like(clean["input_ids"], dtype=torch.bool), torch.zeros(clean["input_ids"].shape)
    for number, (item, row) in enumerate(zip(batch, mine, strict=True)):
        masked[number, row.first : len(row.ids)] = item.masked
        levels[number, : len(row.ids)] = item.level
    clean, masked, levels = {k: v.to(device) for k, v in clean.items()}, masked.to(device), levels.to(device)
    noisy = collator.process.lay_out(clean, masked, masked.float(), levels)
    keep = noisy["targets"] != IGNORE_INDEX
    nll = token_nll(kept_logits(model, noisy["inputs"], keep), noisy["targets"][keep])
    found = torch.zeros(2, *masked.shape, dtype=torch.float64)
    place = (keep.nonzero()[:, 0].cpu(), noisy["tokens"][keep].cpu())
    found[0].index_put_(place, nll.double().cpu())
    found[1].index_put_(place, noisy["levels"][keep].double().cpu())
    return [tuple(found[:, number, row.first : len(row.ids)]) for number, row in enumerate(mine)]


@torch.no_grad()
def bound_rows(
    model: torch.nn.Module,
    rows: Sequence[Row],
    *,
    estimator: str = "exact_count",
    n_samples: int = 128,
    replicates: int = REPLICATES,
    batch_size: int = 16,
    seed: int = 0,
    block_length: int | None = None,
    split: bool = False,
    progress: bool = False,
) -> Likelihood:
    """NELBO of every text, from its rows.

    Args:
        rows: no longer than the model can count; with a shifted read-out `first` is at least 1.
        estimator: see `estimators`.
        n_samples: forward rows a row; of "any_order" orders, each of which takes as many as a row (a block) has tokens.
        replicates: independent parts of the samples, at least 2.
        batch_size: forward rows at once; no figure depends on it.
        block_length: of "per_block" on a bidirectional model; block models have their own.
        split: deal the rows out to all processes, each of which must call this and gets all figures.
        progress: a bar, where there is a terminal.

    Raises:
        ValueError: unknown estimator, samples that cannot be dealt out, a model without masks, a row with nothing to score.
    """
    check_estimator(estimator, n_samples, replicates)
    if not is_diffusion(model):
        raise UserError(
            "`model` is not a masked-diffusion model, or drafts for one that is not: measure it by `autoregressive_rows`."
        )
    own = record_of(model).block_length
    if own and block_length not in (None, own):
        raise UserError(
            f"`block_length`: the model was converted with blocks of {own}, got {block_length}; leave it out."
        )
    if estimator == "per_block" and not own:
        if not block_length:
            raise UserError("`block_length` is needed by `estimator`='per_block' of a bidirectional model.")
        rows = block_rows(rows, block_length)
    collator = plain_collator(model)
    for row in rows:
        if not (1 if collator.record.right_shift_logits else 0) <= row.first < len(row.ids):
            raise UserError(
                f"`rows`: text {row.text} has nothing to score, or no context before its first scored token."
            )
    if estimator == "left_to_right":
        n_samples = replicates = 1
    clean_first = bool(own) and collator.record.right_shift_logits
    draws = {"estimator": estimator, "n_samples": n_samples, "replicates": replicates, "seed": seed}
    estimates: dict[int, torch.Tensor] = {}
    totals = torch.zeros(2, LEVELS, dtype=torch.float64)  # NLL and number of masked tokens
    training = model.training
    model.eval()
    mine = dealt(_longest_first(rows), split)
    bar = tqdm(total=len(mine), desc="likelihood", disable=None if progress else True)
    try:
        for batch in in_batches(_masks(rows, mine, own, clean_first, draws), batch_size):
            for item, (nll, level) in zip(batch, _terms(model, collator, rows, batch), strict=True):
                if item.row not in estimates:
                    estimates[item.row] = torch.zeros(item.n_samples, dtype=torch.float64)
                    bar.update()
                weights = torch.where(level > 0, item.weights, (nll > 0).double())
                estimates[item.row][item.samples] = (weights * nll).sum(-1)
                shown = item.masked & (level > 0)
                index = (level[shown] * LEVELS - 1e-9).long().clamp(max=LEVELS - 1)
                totals.index_add_(1, index, torch.stack([nll[shown], torch.ones_like(nll[shown])]))
    finally:
        model.train(training)
        bar.close()
    own_means = {i: estimate.view(replicates, -1).mean(-1) for i, estimate in estimates.items()}
    parts = gathered((own_means, totals), split)
    totals = sum(part[1] for part in parts)
    by_row = {i: mean for part in parts for i, mean in part[0].items()}
    means = [by_row[i] for i in range(len(rows))]
    found = _gathered(rows, [float(m.mean()) for m in means], [_variance(m) for m in means])
    found.estimator = estimator
    found.levels = [
        ((i + 1) / LEVELS, float(nll / count), int(count)) for i, (nll, count) in enumerate(totals.T) if count
    ]
    return found


def _variance(replicates: torch.Tensor) -> float:
    """Of the mean over replicates (R,)."""
    return float(replicates.var()) / len(replicates) if len(replicates) > 1 else 0.0


def _gathered(rows: Sequence[Row], nats: Sequence[float], variances: Sequence[float]) -> Likelihood:
    """Sums over the rows of every text."""
    sums = [[0.0, 0.0, 0] for _ in range(1 + max(row.text for row in rows))]
    for row, value, variance in zip(rows, nats, variances, strict=True):
        mine = sums[row.text]
        mine[0], mine[1], mine[2] = mine[0] + value, mine[1] + variance, mine[2] + len(row.ids) - row.first
    return Likelihood([s[0] for s in sums], [math.sqrt(s[1]) for s in sums], [s[2] for s in sums])


@torch.no_grad()
def autoregressive_rows(
    model: torch.nn.Module, rows: Sequence[Row], *, batch_size: int = 16, split: bool = False, progress: bool = False
) -> Likelihood:
    """Exact NLL under the AR model of the same weights: adapters off, causal attention. Under LoRA it is the untouched base."""
    base, found = base_of(model), {}
    order = dealt(_longest_first(rows), split)
    collator = DataCollatorForMaskedDiffusion(pad_token_id=0, mask_token_id=-1)
    training = base.training
    base.eval()
    try:
        with adapters_off(model), causal_attention(base):
            for numbers in tqdm(list(in_batches(order, batch_size)), desc="AR", disable=None if progress else True):
                batch = {k: v.to(base.device) for k, v in padded([rows[i] for i in numbers], collator).items()}
                targets = align_with_readout(batch["labels"], True, IGNORE_INDEX)
                keep = targets != IGNORE_INDEX
                inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
                logits = base(**inputs, use_cache=False, logits_to_keep=keep).logits
                nll = torch.zeros(keep.shape, dtype=torch.float64).to(base.device, torch.float32)
                nll[keep] = token_nll(logits, targets[keep])
                for i, value in zip(numbers, nll.cpu().double().sum(-1).tolist(), strict=True):
                    found[i] = value
    finally:
        base.train(training)
    nats = {i: value for part in gathered(found, split) for i, value in part.items()}
    return _gathered(rows, [nats[i] for i in range(len(rows))], [0.0] * len(rows))


# -- text in, figures out


def is_diffusion(model: torch.nn.Module) -> bool:
    """Whether the model fills masks itself: it has a mask token, and does not draft for its base."""
    record = record_of(model)
    return record.mask_token_id is not None and not record.mode.drafts


def likelihood(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    autoregressive: bool = False,
    max_length: int | None = None,
    stride: int | None = None,
    batch_size: int = 16,
    split: bool = False,
    progress: bool = False,
    **settings: object,
) -> Likelihood:
    """NELBO (or the AR model's NLL) of texts of any length.

    Args:
        autoregressive: exact, by the AR model of the same weights.
        max_length: tokens of a window; default 1024 or what the model can count.
        stride: tokens that a window behind the first scores; default half of `max_length`.
        split: over all processes, see `bound_rows`.
        settings: of `bound_rows`.

    Returns:
        A `Likelihood`: nats a token, bits a byte, perplexity bound, standard error.
    """
    whole = text_rows(tokenizer, texts)
    rows = [part for row in whole for part in windows(row, *window_length(model, max_length, stride))]
    shared = {"batch_size": batch_size, "split": split, "progress": progress}
    found = (
        autoregressive_rows(model, rows, **shared) if autoregressive else bound_rows(model, rows, **shared, **settings)
    )
    scored = [tokenizer.decode(row.ids[row.first :], skip_special_tokens=True) for row in whole]
    found.n_bytes = [len(text.encode()) for text in scored]
    return found


def log_likelihood_bound(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list,
    completion: str | list[str],
    n_samples: int = 128,
    estimator: str = "exact_count",
    *,
    max_length: int | None = None,
    stride: int | None = None,
    **settings: object,
) -> Likelihood:
    """Conditional bound of completions: `-nats` is a lower bound of log p(completion | prompt), to rank choices by.

    Args:
        prompt: text or messages, or a list of them, one for every completion.
        completion: text, or a list of texts.
        settings: of `bound_rows`.
    """
    if isinstance(completion, str):
        prompt, completion = [prompt], [completion]
    length = window_length(model, max_length, stride)
    pairs = [pair_row(tokenizer, p, c, i) for i, (p, c) in enumerate(zip(prompt, completion, strict=True))]
    rows = [part for row in pairs for part in windows(row, *length)]
    found = bound_rows(model, rows, n_samples=n_samples, estimator=estimator, **settings)
    found.n_bytes = [len(text.encode()) for text in completion]
    return found
