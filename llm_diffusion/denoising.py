"""Fills the masks of a canvas by iterative unmasking, every forward over the whole canvas.

A canvas of text and mask tokens is filled from the most confident position outwards, several tokens a forward pass. With a
`block_length` it is filled block by block from the left, LLaDA's semi-autoregressive order; later blocks stand there as masks,
or, with `grow_canvas`, do not exist yet. Only positions of the active block meet the vocabulary.
Trade-off: no cache, which is exact for a bidirectional model. Alternative: `block_decoding`, exact with a cache, for block models.

References: LLaDA (arXiv 2502.09992, algorithms 4-5), Fast-dLLM (arXiv 2505.22618) for the threshold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from . import masking, unmasking
from .attention_masks import additive, block_decoding
from .generation_config import DiffusionGenerationConfig, DiffusionOutput
from .patching import base_of

BANNED = -1e9  # large, finite, and applied last: an infinite ban turns into NaN in later arithmetic


def eos_ids(settings: DiffusionGenerationConfig, device: torch.device) -> torch.Tensor:
    eos = settings.eos_token_id
    return torch.tensor(
        [] if eos is None else [eos] if isinstance(eos, int) else list(eos), dtype=torch.long, device=device
    )


@dataclass
class _Rows:
    """The rows still being decoded; all tensors lose a row together when it is finished."""

    ids: torch.Tensor  # (B, L)
    attention_mask: torch.Tensor  # (B, L)
    open: torch.Tensor  # (B, L) bool, positions that held a mask at the start
    block: torch.Tensor  # (B, L) block of every open position, counted from the left
    keys: torch.Tensor  # (B,) of the noise
    index: torch.Tensor  # (B,) place in the batch as given
    active: torch.Tensor  # (B,) block being filled
    steps_left: torch.Tensor  # (B,) steps left for that block, this one included
    steps_done: torch.Tensor  # (B,) forward passes so far

    def select(self, rows: torch.Tensor) -> _Rows:
        return _Rows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def record_of(model: torch.nn.Module) -> dict:
    """`config.diffusion`, or nothing: any bidirectional model can be decoded."""
    return getattr(base_of(model).config, "diffusion", None) or {}


def row_keys(ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """(B,) keys of the noise: by content, and the n-th row with the same content gets noise of its own."""
    keys = masking.content_keys(ids, attention_mask)
    occurrence = (keys[:, None] == keys[None]).long().tril(-1).sum(-1)
    return masking.hash_keys(keys, occurrence)


def _start(
    ids: torch.Tensor, attention_mask: torch.Tensor, settings: DiffusionGenerationConfig, first: int, from_start: bool
) -> _Rows:
    is_open = (ids == settings.mask_token_id) & attention_mask.bool()
    is_open[:, :first] = False  # a prompt may speak of the mask token
    # Blocks are counted in the text, padding left out: from its start, or from the first token of the answer.
    place = attention_mask.cumsum(-1) - 1
    if first and not from_start:
        place = place - place[:, first : first + 1]
    index = torch.arange(ids.shape[0], device=ids.device)
    return _Rows(
        ids=ids.clone(),
        attention_mask=attention_mask,
        open=is_open,
        block=(place // settings.block_length).clamp(min=0),
        keys=row_keys(ids, attention_mask),
        index=index,
        active=torch.full_like(index, -1),
        steps_left=torch.zeros_like(index),
        steps_done=torch.zeros_like(index),
    )


@torch.no_grad()
def fill_masks(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: DiffusionGenerationConfig,
    first: int = 0,
    on_step: Callable[[torch.Tensor], None] | None = None,
) -> DiffusionOutput:
    """Fills every mask token of a batch; other tokens stay as they are.

    Args:
        input_ids: (B, L) with mask tokens anywhere, ragged rows padded on either side.
        attention_mask: (B, L), 0 at padding.
        settings: see `DiffusionGenerationConfig`.
        first: column at which the canvas starts: blocks are counted from it, and mask tokens before it stay.
        on_step: called with the whole canvas (B, L) after every step.

    Returns:
        A `DiffusionOutput`. After the end token a row is filled with it, so that no mask is left.
    """
    settings = copy.copy(settings)
    span = input_ids.shape[1] - first
    record = record_of(model)
    if record.get("attention") == "lossless":
        raise ValueError(
            "`model`: a lossless adapter drafts what its base says next; it cannot fill gaps. Train one with `attention='bidirectional'`."
        )
    settings.block_length = min(record.get("block_length") or settings.block_length or span, span)
    eos = eos_ids(settings, input_ids.device)
    rows = _start(input_ids, attention_mask, settings, first, from_start=record.get("attention") == "block")
    canvas, was_open = rows.ids.clone(), rows.open
    nfe, history = torch.zeros_like(rows.index), []
    training = model.training
    model.eval()
    try:
        rows = rows.select(rows.open.any(-1))
        while rows.index.numel():
            chosen, tokens = _step(model, rows, first, settings)
            rows.ids = torch.where(chosen, tokens, rows.ids)
            nfe[rows.index] += 1
            finished, rows.ids = finish(rows.ids, rows.open, eos, settings)
            canvas[rows.index] = rows.ids
            rows = rows.select(~finished)
            if settings.output_history:
                history.append(canvas.clone())
            if on_step is not None:
                on_step(canvas)
    finally:
        model.train(training)
    return output_of(canvas, was_open, nfe, eos, history if settings.output_history else None)


def _step(
    model: torch.nn.Module, rows: _Rows, first: int, settings: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass: (B, L) bool, which positions to commit, and (B, L), to which tokens."""
    pending = (rows.ids == settings.mask_token_id) & rows.open
    active = rows.block.masked_fill(~pending, rows.ids.shape[1]).amin(-1)
    eligible = pending & (rows.block == active[:, None])
    if settings.steps:
        per_block = steps_per_block(settings, rows.ids.shape[1] - first)
        rows.steps_left = torch.where(active == rows.active, rows.steps_left - 1, per_block)
    rows.active = active
    # The eligible positions of every row side by side, (B, k); shorter rows are filled up with ineligible ones.
    most = int(eligible.sum(-1).max())
    positions = eligible.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
    eligible = eligible.gather(-1, positions)
    logits = ban(_logits(model, rows, positions, first, settings), settings)
    places = (rows.attention_mask.cumsum(-1) - 1).gather(-1, positions)
    chosen, tokens = commit(logits, eligible, rows.keys, places, rows.steps_done, rows.steps_left, settings)
    rows.steps_done = rows.steps_done + 1
    return torch.zeros_like(pending).scatter(-1, positions, chosen), rows.ids.scatter(-1, positions, tokens)


def _logits(
    model: torch.nn.Module, rows: _Rows, positions: torch.Tensor, first: int, settings: DiffusionGenerationConfig
) -> torch.Tensor:
    """(B, k, V) fp32 logits of the tokens at `positions`."""
    record, width, attention_mask = record_of(model), rows.ids.shape[1], rows.attention_mask
    places = attention_mask.cumsum(-1) - 1
    if record.get("attention") == "block":
        allowed = block_decoding(attention_mask, record["block_length"], record["clean_context"], rows.active)
        model_mask = additive(allowed, base_of(model).dtype)
    else:
        if settings.grow_canvas:
            width = min(width, first + settings.block_length * (int(rows.active.max()) + 1))
            # Rows that are behind do not see the canvas that others have reached.
            attention_mask = attention_mask * (rows.block <= rows.active[:, None])
        model_mask = attention_mask[:, :width]
    if record.get("right_shift_logits", False):
        # The first token of a text has no predecessor, not even padding: it is read in its own place.
        positions = torch.where(places.gather(-1, positions) > 0, masking.readout_positions(positions, True), positions)
    timing = {}
    if record.get("time_embedding"):
        # As in training: the prompt tokens of a block share its noise level, finished text has none.
        noisy = rows.block == rows.active[:, None] if record["attention"] == "block" else attention_mask.bool()
        timing["timesteps"] = (noisy * mask_share(rows.ids, noisy & rows.open, settings))[:, :width]
    return model(
        input_ids=rows.ids[:, :width],
        attention_mask=model_mask,
        position_ids=places.clamp(min=0)[:, :width],
        logits_to_keep=positions.clamp(max=width - 1),
        use_cache=False,
        **timing,
    ).logits.float()


def mask_share(ids: torch.Tensor, canvas: torch.Tensor, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """(B, L) ids and the positions being filled -> (B, 1) share of them that is still masked, the noise level."""
    return ((ids == settings.mask_token_id) & canvas).sum(-1, keepdim=True) / canvas.sum(-1, keepdim=True).clamp(min=1)


def steps_per_block(settings: DiffusionGenerationConfig, span: int) -> int:
    """Denoising steps of a block when `settings.steps` are dealt out over a canvas of `span` tokens."""
    return max(1, settings.steps // -(-span // settings.block_length))


def ban(logits: torch.Tensor, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """Puts the mask token and `suppress_tokens` out of reach: (..., V) -> (..., V)."""
    banned = torch.tensor([settings.mask_token_id, *(settings.suppress_tokens or [])], device=logits.device)
    return logits.index_fill(-1, banned, BANNED)


def commit(
    logits: torch.Tensor,
    eligible: torch.Tensor,
    keys: torch.Tensor,
    places: torch.Tensor,
    step: torch.Tensor,
    steps_left: torch.Tensor,
    settings: DiffusionGenerationConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Proposes a token for every position and picks those to commit.

    Args:
        logits: (B, k, V), banned tokens out of reach.
        eligible: (B, k) bool.
        keys: (B,) of the noise; places: (B, k) positions in the text; step: (B,) forward passes the row has seen.
        steps_left: (B,) for the block, used where `settings.steps` is set.

    Returns:
        `(chosen, tokens)`, both (B, k).
    """
    tokens = _propose(logits, keys, places, step, settings)
    order = None
    if settings.remasking == "random":
        order = masking.uniform(settings.seed, step[:, None], keys[:, None], places, masking.ORDER_STREAM)
    score = unmasking.confidence(logits, tokens, settings.remasking, order)
    if settings.threshold is not None:
        return unmasking.commit_threshold(score, eligible, settings.threshold), tokens
    quota = unmasking.step_quota(eligible.sum(-1), steps_left) if settings.steps else torch.ones_like(keys)
    return unmasking.commit_quota(score, eligible, quota), tokens


def warped(logits: torch.Tensor, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """Logits (..., V) under temperature (above 0), top-k and top-p, as the host's own sampling has them."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(settings.temperature)])
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    return warpers(None, logits.flatten(0, -2)).view_as(logits)


def _propose(
    logits: torch.Tensor,
    keys: torch.Tensor,
    places: torch.Tensor,
    step: torch.Tensor,
    settings: DiffusionGenerationConfig,
) -> torch.Tensor:
    """(B, k, V) logits -> (B, k) proposed tokens: the best ones, or a sample by the Gumbel-max rule."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    scores = warped(logits, settings)
    token = torch.arange(logits.shape[-1], device=logits.device)
    noise = masking.uniform(masking.hash_keys(settings.seed, step[:, None], keys[:, None], places)[..., None], token)
    return (scores - torch.log(-torch.log(noise))).argmax(-1)


def finish(
    ids: torch.Tensor, was_open: torch.Tensor, eos: torch.Tensor, settings: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are done: no mask left, or an end token committed and no mask before it.

    Args:
        ids: (B, L) canvas.
        was_open: (B, L) bool, positions that held a mask at the start.

    Returns:
        (B,) bool, and the canvas, in which what is left of a stopped row's masks has become its end token.
    """
    pending = (ids == settings.mask_token_id) & was_open
    if not settings.eos_early_stop:
        return ~pending.any(-1), ids
    length = ids.shape[1]
    ends = was_open & torch.isin(ids, eos)
    end = torch.where(ends.any(-1), ends.long().argmax(-1), length)
    first_mask = torch.where(pending.any(-1), pending.long().argmax(-1), length)
    stopped = (first_mask > end)[:, None]
    end_token = ids.gather(-1, end.clamp(max=length - 1)[:, None])
    return stopped.squeeze(-1) | ~pending.any(-1), torch.where(pending & stopped, end_token, ids)


def output_of(
    canvas: torch.Tensor, was_open: torch.Tensor, nfe: torch.Tensor, eos: torch.Tensor, history: list | None
) -> DiffusionOutput:
    """The result, with answer tokens (through the first end token) over forward passes."""
    ends = (torch.isin(canvas, eos) & was_open).long()
    answer = was_open & (ends.cumsum(-1) - ends == 0)
    return DiffusionOutput(
        sequences=canvas, nfe=nfe, tokens_per_forward=answer.sum(-1) / nfe.clamp(min=1), history=history
    )
