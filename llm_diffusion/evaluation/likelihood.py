"""How likely a model finds a text: an upper bound of the negative log-likelihood (the NELBO), of the AR model the exact figure.

The standard error, from independent replicates, is that of the noise alone. Noise is keyed by (seed, tokens of the row), so that no figure
depends on batches or other texts; samples that drew the same mask are computed once. Windows of long texts add up by the chain rule:

    text       a b c d e f g h i j     max_length 6, stride 3
    window 1   a B C D E F             capitals are scored, the others seen
    window 2         d e f G H I
    window 3           e f g h i J
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..data.rows import Place, read_turns
from ..generation.inputs import checked_texts
from ..models.attention import causal_attention
from ..models.patching import adapters_off, base_of, in_eval_mode
from ..models.record import DiffusionRecord, record_of
from ..models.sampling import check_decodable
from ..models.special_tokens import prompt_ids, text_ids
from ..objective.estimators import REPLICATES, check_estimator, draw, share_masked
from ..objective.losses import token_nll
from ..objective.modes import IGNORE_INDEX, align_with_readout
from ..objective.noise import content_keys, hash_keys
from ..objective.settings import check_value
from ..training.collator import DataCollatorForMaskedDiffusion
from .answers import in_batches, over_processes

DEFAULT_LENGTH = 1024  # of a window, where the model can count further
LEVELS = 10  # bins of the noise level


@dataclass(frozen=True)
class Row:
    """Tokens of which those from `first` on are scored, the others seen; `text` is the number of the text they belong to."""

    ids: tuple[int, ...]
    first: int
    text: int = 0


def text_rows(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Row]:
    """Texts, of which all but the first token is scored: it is context, as no causal model scores it."""
    if not texts:
        raise UserError("`texts` are empty: there is nothing to measure.")
    rows = [Row(tuple(text_ids(tokenizer, text)), 1, number) for number, text in enumerate(texts)]
    for row in rows:
        if len(row.ids) < 2:
            text = texts[row.text][:40]
            raise UserError(f"`texts`: text {row.text} ({text!r}) is too short: of its tokens at least 2 are needed.")
    return rows


def pair_row(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict], completion: str, number: int = 0) -> Row:
    """A prompt (text or messages) and the completion that is scored; blanks between the two belong to the completion."""
    if isinstance(prompt, str):
        context = prompt_ids(tokenizer, prompt.rstrip())
        ids = text_ids(tokenizer, prompt + completion)
    else:
        context = prompt_ids(tokenizer, prompt)
        ids = context + text_ids(tokenizer, completion, add_special_tokens=False)
    first = max(len(context), 1)  # without a prompt the first token is context
    if len(ids) <= first:
        raise UserError(f"`completion`: {completion!r} adds no token to its prompt, so there is nothing to score.")
    return Row(tuple(ids), first, number)


def windows(row: Row, max_length: int, stride: int | None = None) -> list[Row]:
    """A row cut into windows of at most `max_length` tokens; the first scores all it can, each later one at most `stride`, by default half."""
    parts, start, stride = [], row.first, stride or max_length // 2
    while start < len(row.ids):
        end = min(start + max(max_length - start, stride), len(row.ids))
        left = max(0, end - max_length)
        parts.append(Row(row.ids[left:end], start - left, row.text))
        start = end
    return parts


def window_length(model: torch.nn.Module, max_length: int | None) -> int:
    """Checked tokens of a window; half of them are scored in all but the first."""
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None) or DEFAULT_LENGTH
    length = min(limit, DEFAULT_LENGTH) if max_length is None else max_length
    if not 2 <= length <= limit:
        raise UserError(f"`max_length` must be from 2 to the model's {limit} positions, got {length}.")
    return length


def block_rows(rows: Sequence[Row], block_length: int) -> list[Row]:
    """Every block as a row of its own, behind the text before it."""
    return [
        Row(row.ids[: start + block_length], max(start, row.first), row.text)
        for row in rows
        for start in range(row.first - row.first % block_length, len(row.ids), block_length)
    ]


@dataclass
class Likelihood:
    """Upper bounds of the negative log-likelihood of texts; of an AR model the exact values."""

    nats: list[float]  # of every text, summed over its scored tokens
    errors: list[float]  # standard errors of `nats`, of the noise alone
    tokens: list[int]  # how many were scored
    n_bytes: list[int] = field(default_factory=list)  # of the scored text, in UTF-8
    estimator: str = "autoregressive"  # or one of `ESTIMATORS`
    levels: list[tuple[float, float, int]] = field(default_factory=list)  # share masked up to, mean NLL, masked tokens

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
        sums = {"estimator": self.estimator, "texts": len(self.nats), "tokens": sum(self.tokens)}
        means = ("nats_per_token", "standard_error", "bits_per_byte", "perplexity_bound")
        return sums | {name: getattr(self, name) for name in means}


def _by_text(rows: Sequence[Row], nats: Sequence[float], variances: Sequence[float]) -> Likelihood:
    """Sums over the rows of every text."""
    sums = torch.zeros(1 + max(row.text for row in rows), 3, dtype=torch.float64)
    for row, *figures in zip(rows, nats, variances, strict=True):
        sums[row.text] += torch.tensor([*figures, len(row.ids) - row.first], dtype=torch.float64)
    return Likelihood(sums[:, 0].tolist(), sums[:, 1].sqrt().tolist(), sums[:, 2].long().tolist())


class _Mask(NamedTuple):
    """One mask of a row, and the samples that drew it."""

    number: int  # of the row
    row: Row
    masked: torch.Tensor  # (n,) bool, of the scored tokens
    level: torch.Tensor  # (L,) share of its part that is masked
    weights: torch.Tensor  # (k, n) of the k samples
    samples: torch.Tensor  # (k,)
    n_samples: int  # of the row


def _masks(number: int, row: Row, occurrence: int, record: DiffusionRecord, draws: dict) -> Iterator[_Mask]:
    """The distinct masks of a row; the n-th `occurrence` of the same content has noise of its own."""
    ids, position = torch.tensor(row.ids), torch.arange(len(row.ids))
    key = int(hash_keys(content_keys(ids[None], torch.ones_like(ids)[None]), row.first, occurrence))
    whole = position // (record.block_length or len(ids))
    part, maskable = whole[row.first :], torch.ones(len(ids) - row.first, dtype=torch.bool)
    if record.block_length and record.right_shift_logits:
        # The first token of a block is read from the clean text before it, so never masked: the model's tightest bound.
        maskable = position[row.first :] % record.block_length != 0
    drawn, drawn_weights = draw(part[maskable], key, **draws)
    masked = torch.zeros(len(drawn), len(part), dtype=torch.bool)
    weights = torch.zeros(masked.shape, dtype=torch.float64)
    masked[:, maskable], weights[:, maskable] = drawn, drawn_weights
    distinct, which = masked.unique(dim=0, return_inverse=True)
    levels = share_masked(distinct, part, whole)
    by_mask = which.argsort().split(which.bincount().tolist())
    for mask, level, samples in zip(distinct, levels, by_mask, strict=True):
        yield _Mask(number, row, mask, level, weights[samples], samples, len(masked))


def is_diffusion(model: torch.nn.Module) -> bool:
    """Whether the model fills masks itself: it has a mask token, and does not draft for its base."""
    record = record_of(model)
    return record.converted and not record.mode.drafts


def plain_collator(model: torch.nn.Module) -> DataCollatorForMaskedDiffusion:
    """Lays rows out as the model was converted, and adds nothing to them."""
    return DataCollatorForMaskedDiffusion(record_of(model), pad_token_id=0)  # padding is hidden by the attention mask


def padded(rows: Sequence[Row], collator: DataCollatorForMaskedDiffusion) -> dict[str, torch.Tensor]:
    """A clean batch of rows, what comes before `first` not maskable."""
    labels = [[IGNORE_INDEX] * row.first + list(row.ids[row.first :]) for row in rows]
    return collator([{"input_ids": row.ids, "labels": mine} for row, mine in zip(rows, labels, strict=True)])


def kept_logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor], keep: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of the hidden states in `keep` (B, M) on what a collator laid out."""
    inputs = {**inputs, "use_cache": False}
    if inputs["attention_mask"].dim() == 4:
        dtype = base_of(model).dtype
        inputs["attention_mask"] = inputs["attention_mask"].clamp(min=torch.finfo(dtype).min).to(dtype)
    return model(**inputs, logits_to_keep=keep).logits


def _finite(nll: torch.Tensor) -> torch.Tensor:
    """fp64, on the CPU."""
    nll = nll.cpu().double()
    check_decodable(bool(nll.isfinite().all()))
    return nll


def _terms(
    model: torch.nn.Module, collator: DataCollatorForMaskedDiffusion, batch: list[_Mask]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every mask the NLL of its row's scored tokens (n,) fp64, 0 where none was predicted, and their levels (n,), 0 on clean text."""
    device, rows = base_of(model).device, {mask.number: mask.row for mask in batch}
    copies = torch.tensor([list(rows).index(mask.number) for mask in batch])
    clean = {name: value[copies] for name, value in padded(list(rows.values()), collator).items()}
    masked, levels = torch.zeros_like(clean["input_ids"], dtype=torch.bool), torch.zeros(clean["input_ids"].shape)
    for i, mask in enumerate(batch):
        masked[i, mask.row.first : len(mask.row.ids)] = mask.masked
        levels[i, : len(mask.row.ids)] = mask.level
    clean, masked, levels = {k: v.to(device) for k, v in clean.items()}, masked.to(device), levels.to(device)
    noisy = collator.process.lay_out(clean, masked, masked.float(), levels)
    keep = noisy["targets"] != IGNORE_INDEX
    nll = _finite(token_nll(kept_logits(model, noisy["inputs"], keep), noisy["targets"][keep]))
    found = torch.zeros(2, *masked.shape, dtype=torch.float64)
    place = (keep.nonzero()[:, 0].cpu(), noisy["tokens"][keep].cpu())
    found[0].index_put_(place, nll)
    found[1].index_put_(place, noisy["levels"][keep].double().cpu())
    return [tuple(found[:, i, mask.row.first : len(mask.row.ids)]) for i, mask in enumerate(batch)]


def _estimates(
    items: list[tuple[Row, int]], model: torch.nn.Module, draws: dict[str, Any], batch_size: int, progress: bool
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of every row the means of its replicates (R,), and NLL and number of masked tokens by their noise level (2, LEVELS)."""
    collator = plain_collator(model)
    longest_first = sorted(range(len(items)), key=lambda i: -len(items[i][0].ids))
    masks = (mask for i in longest_first for mask in _masks(i, *items[i], collator.record, draws))
    estimates, levels = {}, torch.zeros(len(items), 2, LEVELS, dtype=torch.float64)
    with in_eval_mode(model), tqdm(total=len(items), desc="likelihood", disable=None if progress else True) as bar:
        for batch in in_batches(masks, batch_size):
            for mask, (nll, level) in zip(batch, _terms(model, collator, batch), strict=True):
                if mask.number not in estimates:
                    estimates[mask.number] = torch.zeros(mask.n_samples, dtype=torch.float64)
                    bar.update()
                weights = torch.where(level > 0, mask.weights, (nll > 0).double())  # exact on clean text
                estimates[mask.number][mask.samples] = (weights * nll).sum(-1)
                shown = mask.masked & (level > 0)
                # Levels are fp32: 0.1 is a little above a tenth, and belongs to the first bin.
                index = (level[shown] * LEVELS - 1e-5).long().clamp(max=LEVELS - 1)
                levels[mask.number].index_add_(1, index, torch.stack([nll[shown], torch.ones_like(nll[shown])]))
    return [(estimates[i].view(draws["replicates"], -1).mean(-1), levels[i]) for i in range(len(items))]


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
    """NELBO of every text, from its rows, by an estimator of `objective/estimators.py`.

    Args:
        rows: no longer than the model can count; with a shifted read-out `first` is at least 1.
        n_samples: forward rows a row, in independent `replicates`; of "any_order" orders, each of as many as a row (a block) has tokens.
        block_length: of "per_block" on a bidirectional model; block models have their own.
    """
    check_estimator(estimator, n_samples, replicates)
    check_value("batch_size", batch_size, int, {"min": 1})
    check_value("seed", seed, int, {"min": 0})
    record = record_of(model)
    if not is_diffusion(model):
        raise UserError("`model` fills no masks, or drafts for its base: measure it by `autoregressive_rows`.")
    if record.block_length and block_length not in (None, record.block_length):
        raise UserError(f"`block_length` must be the model's, {record.block_length}, got {block_length}; leave it out.")
    if estimator == "per_block" and not record.block_length:
        if not block_length:
            raise UserError("`block_length` is needed by `estimator`='per_block' of a bidirectional model.")
        rows = block_rows(rows, block_length)
    seen, items = defaultdict(itertools.count), []
    for row in rows:
        if not int(record.right_shift_logits) <= row.first < len(row.ids):
            raise UserError(f"`rows`: text {row.text} has nothing to score, or no context before what is scored.")
        items.append((row, next(seen[row.ids, row.first])))
    if estimator == "left_to_right":
        n_samples = replicates = 1
    draws = {"estimator": estimator, "n_samples": n_samples, "replicates": replicates, "seed": seed}
    work = partial(_estimates, model=model, draws=draws, batch_size=batch_size, progress=progress)
    means, levels = zip(*over_processes(work, items, split), strict=True)
    variances = [float(m.var()) / len(m) if len(m) > 1 else 0.0 for m in means]
    found = _by_text(rows, [float(m.mean()) for m in means], variances)
    found.estimator = estimator
    sums = enumerate(torch.stack(levels).sum(0).T, start=1)
    found.levels = [(i / LEVELS, float(nll / count), int(count)) for i, (nll, count) in sums if count]
    return found


def autoregressive_rows(
    model: torch.nn.Module, rows: Sequence[Row], *, batch_size: int = 16, split: bool = False, progress: bool = False
) -> Likelihood:
    """Exact NLL under the AR model of the same weights: adapters off, causal attention. Under LoRA it is the untouched base."""
    base, collator = base_of(model), plain_collator(model)

    def work(mine: list[Row]) -> list[float]:
        found, longest_first = {}, sorted(range(len(mine)), key=lambda i: -len(mine[i].ids))
        for numbers in tqdm(list(in_batches(longest_first, batch_size)), desc="AR", disable=None if progress else True):
            batch = {k: v.to(base.device) for k, v in padded([mine[i] for i in numbers], collator).items()}
            targets = align_with_readout(batch["labels"], True, IGNORE_INDEX)
            keep = targets != IGNORE_INDEX
            inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
            nll = torch.zeros(keep.shape, dtype=torch.float64)
            nll[keep.cpu()] = _finite(token_nll(kept_logits(base, inputs, keep), targets[keep]))
            found |= zip(numbers, nll.sum(-1).tolist(), strict=True)
        return [found[i] for i in range(len(mine))]

    with adapters_off(model), causal_attention(base), in_eval_mode(base):
        nats = over_processes(work, rows, split)
    return _by_text(rows, nats, [0.0] * len(rows))


def likelihood(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    *,
    autoregressive: bool = False,
    max_length: int | None = None,
    **settings: Any,
) -> Likelihood:
    """NELBO of texts of any length, with the settings of `bound_rows`, or the exact NLL by `autoregressive_rows`.

    A window has `max_length` tokens, by default 1024 or what the model can count.
    """
    whole = text_rows(tokenizer, texts)
    rows = [part for row in whole for part in windows(row, window_length(model, max_length))]
    found = (autoregressive_rows if autoregressive else bound_rows)(model, rows, **settings)
    found.n_bytes = _scored_bytes(tokenizer, whole)
    return found


def _scored_bytes(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Row]) -> list[int]:
    """Of whole texts: blanks before a completion are scored with it, and what is context is not counted."""
    as_written = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}  # " ." stays two bytes
    return [len(tokenizer.decode(row.ids[row.first :], **as_written).encode()) for row in rows]


def log_likelihood_bound(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str | list,
    completion: str | list[str],
    n_samples: int = 128,
    estimator: str = "exact_count",
    *,
    max_length: int | None = None,
    **settings: Any,
) -> Likelihood:
    """Conditional bound of completions: `-nats` is a lower bound of log p(completion | prompt), to rank choices by.

    Args:
        prompt: text or messages, of all completions; or, of a list of them, a list of as many.
        settings: of `bound_rows`.
    """
    completions = checked_texts(completion, "completion")
    several = (
        isinstance(completion, list) and isinstance(prompt, list) and any(isinstance(p, str | list) for p in prompt)
    )
    prompts = prompt if several else [prompt] * len(completions)
    if not completions or len(prompts) != len(completions):
        found = f"{len(completions)} of the second, {len(prompts)} of the first"
        raise UserError(f"`prompt` must be one, or as many as there are in `completion`, at least one; got {found}.")
    prompts = [
        checked_texts(one, "prompt")[0] if isinstance(one, str) else read_turns(one, "prompt", Place("prompt", row))
        for row, one in enumerate(prompts)
    ]
    length = window_length(model, max_length)
    pairs = [pair_row(tokenizer, p, c, i) for i, (p, c) in enumerate(zip(prompts, completions, strict=True))]
    rows = [part for row in pairs for part in windows(row, length)]
    found = bound_rows(model, rows, n_samples=n_samples, estimator=estimator, **settings)
    found.n_bytes = _scored_bytes(tokenizer, pairs)
    return found
