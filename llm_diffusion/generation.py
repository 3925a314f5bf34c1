"""Decoding by iterative unmasking.

A canvas of prompt and mask tokens is filled from the most confident position outwards, several tokens a forward pass. With a
`block_length` the canvas is filled block by block from the left, LLaDA's semi-autoregressive order; later blocks stand there as
masks, or, with `grow_canvas`, do not exist yet. Only positions of the active block meet the vocabulary.
Trade-off: every forward sees the whole canvas (no cache), which is exact for a bidirectional model.
Alternative: a prefix cache, exact only for block-causal models.

References: LLaDA (arXiv 2502.09992, algorithms 4-5), Fast-dLLM (arXiv 2505.22618) for the threshold.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, fields
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer
from transformers.utils import ModelOutput

from . import masking, unmasking
from .attention import base_of, causal_attention

BANNED = -1e9  # large, finite, and applied last: an infinite ban turns into NaN in later arithmetic


class DiffusionGenerationConfig(GenerationConfig):
    """Decoding settings; a `GenerationConfig` that refuses keys unknown to both.

    Args:
        max_new_tokens: longest answer (default 128).
        steps: denoising steps over the whole canvas; None is one token a step. Ignored where `threshold` is set.
        block_length: tokens of a block; None is the whole canvas at once.
        grow_canvas: whether blocks after the active one do not exist yet, instead of standing there as masks.
        remasking: what orders the commits: "low_confidence", "random", "entropy" or "margin".
        threshold: commit every token at or above this confidence, in (0, 1]; at least one a step.
        temperature: 0.0 is greedy; above, tokens are sampled (with `top_p`, `top_k`).
        mask_token_id: defaults to `config.diffusion`.
        eos_early_stop: stop a row when an EOS is committed and no mask is left before it.
        seed: of sampling and of random order.
        output_history: keep the canvas after every step.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.steps = kwargs.pop("steps", None)
        self.block_length = kwargs.pop("block_length", None)
        self.grow_canvas = kwargs.pop("grow_canvas", False)
        self.remasking = kwargs.pop("remasking", "low_confidence")
        self.threshold = kwargs.pop("threshold", None)
        self.mask_token_id = kwargs.pop("mask_token_id", None)
        self.eos_early_stop = kwargs.pop("eos_early_stop", True)
        self.seed = kwargs.pop("seed", 0)
        self.output_history = kwargs.pop("output_history", False)
        temperature = kwargs.pop("temperature", None) or 0.0  # the host refuses 0.0, which is our greedy
        known = set(vars(GenerationConfig())) | {"_from_model_config", "_commit_hash", "generation_kwargs"}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ValueError(f"Unknown generation setting(s) {unknown}; see DiffusionGenerationConfig.")
        kwargs.setdefault("max_new_tokens", 128)
        super().__init__(**kwargs)
        self.temperature = temperature
        self.check()

    def check(self) -> None:
        """Raises ValueError, naming the value, for settings outside their range."""
        for name in ("steps", "block_length", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"`threshold` must be in (0, 1], got {self.threshold}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must not be negative, got {self.temperature}.")
        if self.remasking not in unmasking.CONFIDENCES:
            raise ValueError(f"`remasking` must be one of {unmasking.CONFIDENCES}, got {self.remasking!r}.")


@dataclass
class DiffusionOutput(ModelOutput):
    """What decoding returns.

    Args:
        sequences: (B, L) token ids, prompt included.
        nfe: (B,) forward passes each row took part in.
        tokens_per_forward: (B,) answer tokens, through the EOS, over `nfe`.
        history: canvases (B, L) after every step, when asked for; not yet written blocks are masks.
    """

    sequences: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    history: list[torch.Tensor] | None = None


def _settings(
    model: PreTrainedModel, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> DiffusionGenerationConfig:
    """The model's record and end tokens < the given config < keywords."""
    record = getattr(model.config, "diffusion", None) or {}
    chosen = (
        {}
        if given is None
        else {name: value for name, value in given.to_diff_dict().items() if name != "transformers_version"}
    )
    chosen |= kwargs
    chosen.setdefault("mask_token_id", record.get("mask_token_id"))
    for name in ("eos_token_id", "pad_token_id"):
        if chosen.get(name) is None and name not in kwargs:
            chosen[name] = getattr(model.generation_config, name, None)
    settings = DiffusionGenerationConfig(**chosen)
    if settings.mask_token_id is None:
        raise ValueError(
            "`mask_token_id` is missing: the model is not converted; pass it, or call `convert_to_diffusion` first."
        )
    return settings


def _eos_ids(settings: DiffusionGenerationConfig, device: torch.device) -> torch.Tensor:
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

    def select(self, rows: torch.Tensor) -> _Rows:
        return _Rows(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


def _start(ids: torch.Tensor, attention_mask: torch.Tensor, settings: DiffusionGenerationConfig, first: int) -> _Rows:
    is_open = (ids == settings.mask_token_id) & attention_mask.bool()
    place = torch.arange(ids.shape[1], device=ids.device)
    keys = masking.content_keys(ids, attention_mask)
    # The n-th row with the same content gets noise of its own; what else is in the batch does not matter.
    occurrence = (keys[:, None] == keys[None]).long().tril(-1).sum(-1)
    return _Rows(
        ids=ids.clone(),
        attention_mask=attention_mask,
        open=is_open,
        block=((place - first) // settings.block_length).clamp(min=0).expand_as(ids),
        keys=masking.hash_keys(keys, occurrence),
        index=torch.arange(ids.shape[0], device=ids.device),
        active=torch.full_like(keys, -1),
        steps_left=torch.zeros_like(keys),
    )


def _propose(
    logits: torch.Tensor, keys: torch.Tensor, positions: torch.Tensor, step: int, settings: DiffusionGenerationConfig
) -> torch.Tensor:
    """(B, k, V) logits -> (B, k) proposed tokens: the best ones, or a sample by the Gumbel-max rule."""
    if settings.temperature == 0:
        return logits.argmax(-1)
    warpers = LogitsProcessorList()
    if settings.top_k:
        warpers.append(TopKLogitsWarper(settings.top_k))
    if settings.top_p is not None and settings.top_p < 1:
        warpers.append(TopPLogitsWarper(settings.top_p))
    scores = warpers(None, (logits / settings.temperature).flatten(0, 1)).view_as(logits)
    token = torch.arange(logits.shape[-1], device=logits.device)
    noise = masking.uniform(masking.hash_keys(settings.seed, step, keys[:, None], positions)[..., None], token)
    return (scores - torch.log(-torch.log(noise))).argmax(-1)


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
        first: position from which blocks are counted.
        on_step: called with the whole canvas (B, L) after every step.

    Returns:
        A `DiffusionOutput`. After the end token a row is filled with it, so that no mask is left.
    """
    settings = copy.copy(settings)
    span = input_ids.shape[1] - first
    settings.block_length = min(settings.block_length or span, span)
    eos = _eos_ids(settings, input_ids.device)
    rows = _start(input_ids, attention_mask, settings, first)
    canvas, was_open = rows.ids.clone(), rows.open
    nfe, history, step = torch.zeros_like(rows.index), [], 0
    training = model.training
    model.eval()
    try:
        rows = rows.select(rows.open.any(-1))
        while rows.index.numel():
            commit, tokens = _step(model, rows, first, step, settings)
            rows.ids = torch.where(commit, tokens, rows.ids)
            nfe[rows.index] += 1
            step += 1
            finished = _finish(rows, eos, settings)
            canvas[rows.index] = rows.ids
            rows = rows.select(~finished)
            if settings.output_history:
                history.append(canvas.clone())
            if on_step is not None:
                on_step(canvas)
    finally:
        model.train(training)
    ends = (torch.isin(canvas, eos) & was_open).long()
    answer = was_open & (ends.cumsum(-1) - ends == 0)  # through the first end token
    return DiffusionOutput(
        sequences=canvas,
        nfe=nfe,
        tokens_per_forward=answer.sum(-1) / nfe.clamp(min=1),
        history=history if settings.output_history else None,
    )


def _step(
    model: torch.nn.Module, rows: _Rows, first: int, step: int, settings: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """One forward pass: (B, L) bool, which positions to commit, and (B, L), to which tokens."""
    pending = rows.ids == settings.mask_token_id
    active = rows.block.masked_fill(~pending, rows.ids.shape[1]).amin(-1)
    eligible = pending & (rows.block == active[:, None])
    if settings.steps:
        n_blocks = -(-(rows.ids.shape[1] - first) // settings.block_length)
        per_block = max(1, settings.steps // n_blocks)
        rows.steps_left = torch.where(active == rows.active, rows.steps_left - 1, per_block)
        rows.active = active
    width = rows.ids.shape[1]
    if settings.grow_canvas:
        width = min(width, first + settings.block_length * (int(active.max()) + 1))
    # The eligible positions of every row side by side, (B, k); shorter rows are filled up with ineligible ones.
    positions = eligible.long().argsort(dim=-1, descending=True, stable=True)[:, : int(eligible.sum(-1).max())]
    eligible = eligible.gather(-1, positions)
    logits = _logits(model, rows, positions, width, settings)
    tokens = _propose(logits, rows.keys, positions, step, settings)
    order = None
    if settings.remasking == "random":
        order = masking.uniform(settings.seed, step, rows.keys[:, None], positions, masking.ORDER_STREAM)
    score = unmasking.confidence(logits, tokens, settings.remasking, order)
    if settings.threshold is not None:
        chosen = unmasking.commit_threshold(score, eligible, settings.threshold)
    else:
        quota = (
            unmasking.step_quota(eligible.sum(-1), rows.steps_left) if settings.steps else torch.ones_like(rows.index)
        )
        chosen = unmasking.commit_quota(score, eligible, quota)
    return torch.zeros_like(pending).scatter(-1, positions, chosen), rows.ids.scatter(-1, positions, tokens)


def _logits(
    model: torch.nn.Module, rows: _Rows, positions: torch.Tensor, width: int, settings: DiffusionGenerationConfig
) -> torch.Tensor:
    """(B, k, V) fp32 logits of the tokens at `positions`, banned tokens out of reach."""
    record = getattr(base_of(model).config, "diffusion", None) or {}
    attention_mask = rows.attention_mask[:, :width]
    positions = masking.readout_positions(positions, record.get("right_shift_logits", False))
    logits = model(
        input_ids=rows.ids[:, :width],
        attention_mask=attention_mask,
        position_ids=(attention_mask.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=positions.clamp(max=width - 1),
        use_cache=False,
    ).logits.float()
    return logits.index_fill(-1, _banned(settings, logits.device), BANNED)


def _banned(settings: DiffusionGenerationConfig, device: torch.device) -> torch.Tensor:
    return torch.tensor([settings.mask_token_id, *(settings.suppress_tokens or [])], device=device)


def _finish(rows: _Rows, eos: torch.Tensor, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """(B,) bool, rows that are done: no mask left, or an end token committed and no mask before it.

    In the second case what is left of the row's masks becomes that end token, in place.
    """
    pending = rows.ids == settings.mask_token_id
    if not settings.eos_early_stop:
        return ~pending.any(-1)
    length = rows.ids.shape[1]
    ends = rows.open & torch.isin(rows.ids, eos)
    end = torch.where(ends.any(-1), ends.long().argmax(-1), length)
    first_mask = torch.where(pending.any(-1), pending.long().argmax(-1), length)
    stopped = (first_mask > end)[:, None]
    end_token = rows.ids.gather(-1, end.clamp(max=length - 1)[:, None])
    rows.ids = torch.where(pending & stopped, end_token, rows.ids)
    return stopped.squeeze(-1) | ~pending.any(-1)


def _with_canvas(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, settings: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends `max_new_tokens` masks to left-padded prompts."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}."
        )
    if input_ids.shape[1] and not bool(attention_mask[:, -1].all()):
        raise ValueError(
            "`input_ids`: prompts of different lengths must be padded on the left (`tokenizer.padding_side='left'`)."
        )
    new = (0, settings.max_new_tokens)
    pad = torch.nn.functional.pad
    return pad(input_ids, new, value=settings.mask_token_id), pad(attention_mask, new, value=1)


def generate(
    model: torch.nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    *,
    inputs: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | DiffusionOutput:
    """Answers prompts by iterative unmasking; bound as `model.generate` on every converted model.

    Args:
        input_ids: (B, P) prompts, padded on the left.
        attention_mask: (B, P).
        generation_config: any `GenerationConfig`; keywords win over it.
        streamer: gets the prompt, every draft (`put_draft`, where it has one) and the answer.
        kwargs: settings of `DiffusionGenerationConfig`.

    Returns:
        (B, P + n) token ids as from transformers' own `generate`, padded after the end token; with
        `return_dict_in_generate=True` a `DiffusionOutput`.

    Raises:
        ValueError: unknown or impossible setting, missing mask token, prompts padded on the right or too long.
    """
    input_ids = inputs if input_ids is None else input_ids
    base = base_of(model)
    settings = _settings(base, generation_config, kwargs)
    canvas, attention_mask = _with_canvas(input_ids, attention_mask, settings)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and canvas.shape[1] > limit:
        raise ValueError(
            f"`max_new_tokens`: prompt ({input_ids.shape[1]}) and answer ({settings.max_new_tokens}) exceed the model's {limit} positions."
        )
    start = input_ids.shape[1]
    on_step = None
    if streamer is not None:
        streamer.put(input_ids.cpu())
        if hasattr(streamer, "put_draft"):
            on_step = lambda drafts: streamer.put_draft(value=drafts[:, start:].cpu())  # noqa: E731
    output = fill_masks(model, canvas, attention_mask, settings, first=start, on_step=on_step)
    output.sequences = _trim(output.sequences, start, settings)
    if streamer is not None:
        streamer.put(output.sequences[:, start:].cpu())
        streamer.end()
    return output if settings.return_dict_in_generate else output.sequences


def _trim(sequences: torch.Tensor, start: int, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """Pads behind every row's first end token and cuts to the longest row."""
    eos = _eos_ids(settings, sequences.device)
    if not eos.numel() or not settings.eos_early_stop:
        return sequences
    answer = sequences[:, start:]
    ends = torch.isin(answer, eos).long()
    after = ends.cumsum(-1) - ends > 0
    pad = settings.pad_token_id if settings.pad_token_id is not None else int(eos[0])
    longest = int((~after).sum(-1).max()) if after.numel() else 0
    return torch.cat([sequences[:, :start], answer.masked_fill(after, pad)[:, :longest]], dim=-1)


def generate_autoregressive(model: torch.nn.Module, input_ids: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Decodes as the autoregressive model did: adapters off, attention causal, the host's own `generate`.

    Under LoRA this is the untouched base, the fair baseline of its conversion. Arguments as in transformers.
    """
    base = base_of(model)
    with ExitStack() as stack:
        if isinstance(model, PeftModel):
            stack.enter_context(model.disable_adapter())
        stack.enter_context(causal_attention(base))
        return type(base).generate(base, input_ids, **kwargs)
