"""Fills the masks of a canvas by iterative unmasking, every forward over the whole canvas.

A canvas of text and mask tokens is filled from the most confident position outwards, several tokens a forward pass. With a
`block_length` it is filled block by block from the left, LLaDA's semi-autoregressive order; later blocks stand there as masks,
or, with `grow_canvas`, do not exist yet. Only positions of the active block meet the vocabulary.
Trade-off: no cache, which is exact for a bidirectional model, unless an `approximate_cache` is asked for. Alternative:
`block_decoding`, exact with a cache, for block models.

References: LLaDA (arXiv 2502.09992, algorithms 4-5), Fast-dLLM (arXiv 2505.22618) for the threshold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from . import logit_rules, masking, unmasking
from .approximate_cache import CanvasCache, check_canvas_cache, refuse
from .attention_masks import additive, block_decoding
from .commit_rules import by_rule, revise, still_busy
from .generation_config import DiffusionGenerationConfig, DiffusionOutput
from .logit_rules import BANNED, Window
from .patching import base_of
from .speculation import sample

OnStep = Callable[[torch.Tensor, torch.Tensor], None]  # gets the canvas (B, L) and how sure each token was, (B, L)


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
    certainty: torch.Tensor  # (B, L) probability that every token had when it was committed
    block: torch.Tensor  # (B, L) block of every open position, counted from the left
    keys: torch.Tensor  # (B,) of the noise
    index: torch.Tensor  # (B,) place in the batch as given
    active: torch.Tensor  # (B,) block being filled
    steps_left: torch.Tensor  # (B,) steps left for that block, this one included
    steps_done: torch.Tensor  # (B,) steps so far
    busy: torch.Tensor  # (B,) bool, whether revision of the active block goes on
    post_steps: torch.Tensor  # (B,) steps over the active block without a mask

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
        certainty=torch.zeros(ids.shape, device=ids.device),
        block=(place // settings.block_length).clamp(min=0),
        keys=row_keys(ids, attention_mask),
        index=index,
        active=torch.full_like(index, -1),
        steps_left=torch.zeros_like(index),
        steps_done=torch.zeros_like(index),
        busy=torch.zeros_like(index, dtype=torch.bool),
        post_steps=torch.zeros_like(index),
    )


@torch.no_grad()
def fill_masks(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: DiffusionGenerationConfig,
    first: int = 0,
    on_step: OnStep | None = None,
    processors: LogitsProcessorList | None = None,
) -> DiffusionOutput:
    """Fills every mask token of a batch; other tokens stay as they are.

    Args:
        input_ids: (B, L) with mask tokens anywhere, ragged rows padded on either side.
        attention_mask: (B, L), 0 at padding.
        settings: see `DiffusionGenerationConfig`.
        first: column at which the canvas starts: blocks are counted from it, and mask tokens before it stay.
        on_step: called after every step with the whole canvas (B, L) and the probabilities its tokens had when committed, (B, L).
        processors: of the host, see `logit_rules.apply_processors`.

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
    refuse(record, settings)
    settings.block_length = min(record.get("block_length") or settings.block_length or span, span)
    eos = eos_ids(settings, input_ids.device)
    rows = _start(input_ids, attention_mask, settings, first, from_start=record.get("attention") == "block")
    canvas, was_open = rows.ids.clone(), rows.open
    nfe, history, sureness = torch.zeros_like(rows.index), [], []
    certainty = rows.certainty.clone()
    cache = (
        CanvasCache(settings.approximate_cache, settings.cache_refresh_steps) if settings.approximate_cache else None
    )
    training = model.training
    model.eval()
    try:
        if cache is not None:
            check_canvas_cache(model)
        rows = rows.select(rows.open.any(-1))
        while rows.index.numel():
            working, chosen, tokens, probability = _step(model, rows, first, settings, processors, cache)
            rows.ids = torch.where(chosen, tokens, rows.ids)
            rows.certainty = torch.where(chosen, probability, rows.certainty)
            nfe[rows.index] += passes_of(settings) * working
            finished, rows.ids = finish(rows.ids, rows.open, eos, settings, rows.busy)
            canvas[rows.index] = rows.ids
            certainty[rows.index] = rows.certainty
            stay = (~finished).nonzero().squeeze(-1)
            if len(stay) < len(finished):
                rows = rows.select(stay)
                if cache is not None:
                    cache.batch_select_indices(with_guided(stay, len(finished), settings))
            if settings.output_history:
                history.append(canvas.clone())
                sureness.append(certainty.clone())
            if on_step is not None:
                on_step(canvas, certainty)
    finally:
        model.train(training)
    output = output_of(canvas, was_open, nfe, eos, history if settings.output_history else None)
    output.confidence = sureness if settings.output_history else None
    return output


def _step(
    model: torch.nn.Module,
    rows: _Rows,
    first: int,
    settings: DiffusionGenerationConfig,
    processors: LogitsProcessorList | None,
    cache: CanvasCache | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """One forward pass.

    Returns:
        `(working, changed, tokens, probability)`: (B,) bool, the rows that took part; (B, L) bool, which positions change, (B, L), to
        which tokens, and (B, L), how probable those are.
    """
    pending = (rows.ids == settings.mask_token_id) & rows.open
    active = rows.block.masked_fill(~pending, rows.ids.shape[1]).amin(-1)
    active = torch.where(rows.busy, rows.active, active)
    # With a cache rows begin their blocks together, those that are ahead wait.
    working = torch.ones_like(rows.busy) if cache is None else active == active.amin()
    eligible = (rows.open if settings.revises else pending) & (rows.block == active[:, None]) & working[:, None]
    per_block = steps_per_block(settings, rows.ids.shape[1] - first) if settings.steps else 0
    if settings.steps:
        steps_left = torch.where(active == rows.active, rows.steps_left - 1, per_block)
        rows.steps_left = torch.where(working, steps_left, rows.steps_left)
    rows.active = torch.where(working, active, rows.active)
    # The eligible positions of every row side by side, (B, k); shorter rows are filled up with ineligible ones.
    most = int(eligible.sum(-1).max())
    positions = eligible.long().argsort(dim=-1, descending=True, stable=True)[:, :most]
    eligible = eligible.gather(-1, positions)
    window = Window(
        columns=positions,
        open=eligible,
        masked=eligible & pending.gather(-1, positions),
        canvas=rows.ids,
        visible=rows.attention_mask.bool() & ~pending,
        certainty=rows.certainty.gather(-1, positions),
        keys=rows.keys,
        places=(rows.attention_mask.cumsum(-1) - 1).gather(-1, positions),
        step=rows.steps_done,
        steps_left=rows.steps_left,
        post_steps=rows.post_steps,
        block_steps=per_block,
    )
    logits = _logits(model, rows, positions, first, settings, cache)
    chosen, tokens, probability = commit(logits, window, settings, processors)
    busy, rows.post_steps = still_busy(window, chosen, tokens, settings)
    rows.busy = busy & working
    rows.steps_done = rows.steps_done + working.long()
    return (
        working,
        torch.zeros_like(pending).scatter(-1, positions, chosen),
        rows.ids.scatter(-1, positions, tokens),
        torch.zeros(pending.shape, device=pending.device).scatter(-1, positions, probability),
    )


def _logits(
    model: torch.nn.Module,
    rows: _Rows,
    positions: torch.Tensor,
    first: int,
    settings: DiffusionGenerationConfig,
    cache: CanvasCache | None,
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
            attention_mask = attention_mask * (rows.block <= rows.active.clamp(min=0)[:, None])
        model_mask = attention_mask[:, :width]
    shift = record.get("right_shift_logits", False)
    if shift:
        # The first token of a text has no predecessor, not even padding: it is read in its own place.
        positions = torch.where(places.gather(-1, positions) > 0, masking.readout_positions(positions, True), positions)
    timing = {}
    if record.get("time_embedding"):
        # As in training: the prompt tokens of a block share its noise level, finished text has none.
        noisy = rows.block == rows.active[:, None] if record["attention"] == "block" else attention_mask.bool()
        timing["timesteps"] = (noisy * mask_share(rows.ids, noisy & rows.open, settings))[:, :width]
    inputs = {
        "input_ids": rows.ids[:, :width],
        "attention_mask": model_mask,
        "position_ids": places.clamp(min=0)[:, :width],
        "logits_to_keep": positions.clamp(max=width - 1),
        **timing,
    }
    if settings.guided:
        inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
        given = rows.attention_mask.bool() & ~rows.open
        inputs["input_ids"][len(rows.ids) :].masked_fill_(given[:, :width], settings.mask_token_id)
    if cache is not None:
        block = int(rows.active.amax())
        in_block = (rows.open & (rows.block == block))[:, :width].repeat(passes_of(settings), 1)
        inputs = cache.inputs(inputs, block, in_block, shift)
    logits = model(**inputs, past_key_values=cache, use_cache=cache is not None).logits.float()
    return logit_rules.guide(logits, settings.guidance_scale) if settings.guided else logits


def passes_of(settings: DiffusionGenerationConfig) -> int:
    """Forward passes of a step: guidance asks twice, in one batch."""
    return 2 if settings.guided else 1


def with_guided(rows: torch.Tensor, n_rows: int, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """Rows of a batch of `n_rows` -> of a cache, in which under guidance the rows without their prompts stand behind the others."""
    return torch.cat([rows, rows + n_rows]) if settings.guided else rows


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
    window: Window,
    settings: DiffusionGenerationConfig,
    processors: LogitsProcessorList | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Proposes a token for every position of a window and picks those to commit, replace or take back.

    Args:
        logits: (B, k, V) fp32, as the model gave them.

    Returns:
        `(changed, tokens, probability)`, all (B, k): the last is that of the tokens, before temperature.
    """
    if settings.repetition_penalty not in (None, 1.0):
        logits = logit_rules.penalise_repetition(logits, window, settings.repetition_penalty)
    if processors:
        logits = logit_rules.apply_processors(logits, window, processors)
    words = settings.bad_words_ids or []
    logits = logit_rules.ban_words(ban(logits, settings), window, words)
    tokens = _propose(logits, window.keys, window.places, window.step, settings)
    noise = masking.uniform(
        settings.seed, window.step[:, None], window.keys[:, None], window.places, masking.ORDER_STREAM
    )
    probability = unmasking.confidence(logits, tokens, "low_confidence")
    if settings.revision is not None:
        return revise(logits, tokens, probability, noise, window, settings)
    score = probability
    if settings.remasking != "low_confidence":
        score = unmasking.confidence(logits, tokens, settings.remasking, noise)
    if settings.alg_temp:
        score = unmasking.perturb(score, settings.alg_temp, noise)
    chosen = by_rule(logits, score, window, settings)
    if len(words):
        chosen = logit_rules.without_bad_words(chosen, tokens, score, window, words)
    if settings.editing_threshold is not None:
        editable = window.open & ~window.masked
        chosen = chosen | unmasking.edits(probability, tokens, window.ids, editable, settings.editing_threshold)
    return chosen, tokens, probability


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
    """(B, k, V) logits -> (B, k) proposed tokens: the best ones, or a sample."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    # One uniform number a place; the Gumbel rule would need one for every word of the vocabulary.
    noise = masking.uniform(settings.seed, step[:, None], keys[:, None], places, masking.TOKEN_STREAM)
    return sample(warped(logits, settings).softmax(-1), noise)


def finish(
    ids: torch.Tensor,
    was_open: torch.Tensor,
    eos: torch.Tensor,
    settings: DiffusionGenerationConfig,
    busy: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which rows are done: no mask left, or an end token committed and no mask before it.

    Args:
        ids: (B, L) canvas.
        was_open: (B, L) bool, positions that held a mask at the start.
        busy: (B,) bool, rows whose tokens may still be revised: they go on.

    Returns:
        (B,) bool, and the canvas, in which what is left of a stopped row's masks has become its end token.
    """
    pending = (ids == settings.mask_token_id) & was_open
    done = ~pending.any(-1) if busy is None else ~pending.any(-1) & ~busy
    if not settings.eos_early_stop:
        return done, ids
    length = ids.shape[1]
    ends = was_open & torch.isin(ids, eos)
    end = torch.where(ends.any(-1), ends.long().argmax(-1), length)
    first_mask = torch.where(pending.any(-1), pending.long().argmax(-1), length)
    stopped = (first_mask > end)[:, None]
    if busy is not None:
        stopped = stopped & ~busy[:, None]
    end_token = ids.gather(-1, end.clamp(max=length - 1)[:, None])
    if settings.length_quantile is not None and not settings.revises:
        # A sized canvas shrinks to its first end: nothing behind it will be read.
        behind = torch.arange(length, device=ids.device) > end[:, None]
        return stopped.squeeze(-1) | done, torch.where(pending & behind, end_token, ids)
    return stopped.squeeze(-1) | done, torch.where(pending & stopped, end_token, ids)


def output_of(
    canvas: torch.Tensor, was_open: torch.Tensor, nfe: torch.Tensor, eos: torch.Tensor, history: list | None
) -> DiffusionOutput:
    """The result, with answer tokens (through the first end token) over forward passes."""
    ends = (torch.isin(canvas, eos) & was_open).long()
    answer = was_open & (ends.cumsum(-1) - ends == 0)
    return DiffusionOutput(
        sequences=canvas, nfe=nfe, tokens_per_forward=answer.sum(-1) / nfe.clamp(min=1), history=history
    )
