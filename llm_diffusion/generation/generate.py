"""`generate`: prompts in, answers out, by iterative unmasking; and the autoregressive decoding of the same weights.

Trade-off: one entry that picks the engine by how the model attends. Alternative: calling `canvas` or `blocks` directly.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from .. import UserError
from ..models.attention import causal_attention
from ..models.conversion import set_attention
from ..models.outputs import DiffusionOutput, eos_ids
from ..models.patching import adapters_off, base_of, keep_logits
from ..models.record import DiffusionRecord, record_of
from ..speculative.decoding import decode_lossless
from .blocks import decode_blocks
from .cache import (
    refuse,
)
from .canvas import fill_masks
from .config import NEUTRAL, DiffusionGenerationConfig
from .lengths import fill_sized
from .streaming import Stream

logger = logging.getLogger(__name__)

# Of a `GenerationConfig`: what changes logits and looks at the text so far.
PROCESSORS = {
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "min_length", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale"),
    *("exponential_decay_length_penalty", "num_beams", "penalty_alpha", "assistant_early_exit"),
}

# Of the host's `generate`, which a file beside the weights is handed whether they are set or not.
HOST_ARGUMENTS = {
    *("stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "use_model_defaults"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "past_key_values", "trust_remote_code"),
}


def _settings(
    model: PreTrainedModel, given: GenerationConfig | None, kwargs: dict[str, Any]
) -> DiffusionGenerationConfig:
    """The model's record and end tokens < the given config < keywords."""
    record = record_of(model)
    chosen = (
        {}
        if given is None
        else {
            name: value
            for name, value in given.to_diff_dict().items()
            if name not in ("transformers_version", "max_length")
        }
    )
    chosen |= kwargs
    if chosen.get("mask_token_id") is None:
        chosen["mask_token_id"] = record.mask_token_id
    for name in ("eos_token_id", "pad_token_id"):
        if chosen.get(name) is None and name not in kwargs:
            chosen[name] = getattr(model.generation_config, name, None)
    settings = DiffusionGenerationConfig(**chosen)
    if settings.mask_token_id is None:
        raise UserError(
            "`mask_token_id` is missing: the model is not converted; pass it, or call `convert_to_diffusion` first."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if not 0 <= settings.mask_token_id < rows:
        raise UserError(f"`mask_token_id` must be a row of the embedding, [0, {rows}), got {settings.mask_token_id}.")
    words = {"suppress_tokens": [settings.suppress_tokens or []], "bad_words_ids": settings.bad_words_ids or []}
    for name, lists in words.items():
        if outside := [token for word in lists for token in word if not 0 <= token < rows]:
            raise UserError(f"`{name}` must be rows of the embedding, [0, {rows}), got {outside}.")
    return settings


def _use_max_length(kwargs: dict[str, Any], given: GenerationConfig | None, prompt_length: int) -> None:
    """The host's `max_length` counts the prompt; `max_new_tokens` wins over it."""
    longest = kwargs.pop("max_length", None) or getattr(given, "max_length", None)
    if longest and kwargs.get("max_new_tokens") is None and getattr(given, "max_new_tokens", None) is None:
        if longest <= prompt_length:
            raise UserError(f"`max_length` ({longest}) leaves no room after a prompt of {prompt_length} tokens.")
        kwargs["max_new_tokens"] = longest - prompt_length


def _with_canvas(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, settings: DiffusionGenerationConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """Appends `max_new_tokens` masks to left-padded prompts."""
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise UserError(
            f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}."
        )
    if input_ids.shape[1] and not bool(attention_mask[:, -1].all()):
        raise UserError(
            "`input_ids`: prompts of different lengths must be padded on the left (`tokenizer.padding_side='left'`)."
        )
    new = (0, settings.max_new_tokens)
    pad = torch.nn.functional.pad
    return pad(input_ids, new, value=settings.mask_token_id), pad(attention_mask.long(), new, value=1)


def generate(
    model: torch.nn.Module,
    input_ids: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: BaseStreamer | None = None,
    *,
    inputs: torch.Tensor | None = None,
    logits_processor: LogitsProcessorList | list[LogitsProcessor] | None = None,
    **kwargs: Any,
) -> torch.Tensor | DiffusionOutput:
    """Answers prompts by iterative unmasking; bound as `model.generate` on every converted model.

    Args:
        input_ids: (B, P) prompts, padded on the left.
        attention_mask: (B, P).
        generation_config: any `GenerationConfig`; keywords win over it.
        streamer: gets the prompt, every draft (`put_draft`, where it has one) and finished blocks; see `streaming`.
        logits_processor: of the host; see `logits.apply_processors` for what each gets to see.
        kwargs: settings of `DiffusionGenerationConfig`.

    Returns:
        (B, P + n) token ids (B times `num_return_sequences`) as from transformers' own `generate`, padded after the end token; with
        `return_dict_in_generate=True` a `DiffusionOutput`.

    Raises:
        ValueError: unknown or impossible setting, missing mask token, prompts padded on the right or too long.
    """
    input_ids = inputs if input_ids is None else input_ids
    if input_ids is None:
        raise UserError("`input_ids` are missing.")
    kwargs.pop("token_type_ids", None)  # some tokenizers return them; causal models have no use for them
    for name in HOST_ARGUMENTS & set(kwargs):
        if kwargs.pop(name):
            raise UserError(f"`{name}` means nothing when decoding by unmasking; leave it out.")
    base = base_of(model)
    _use_max_length(kwargs, generation_config, input_ids.shape[1])
    settings = _settings(base, generation_config, kwargs)
    canvas, attention_mask = _with_canvas(input_ids, attention_mask, settings)
    limit = getattr(base.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and canvas.shape[1] > limit:
        raise UserError(
            f"`max_new_tokens`: prompt ({input_ids.shape[1]}) and answer ({settings.max_new_tokens}) exceed the model's {limit} positions."
        )
    start = input_ids.shape[1]
    _refuse(record_of(model), settings, logits_processor)
    copies = settings.num_return_sequences or 1
    canvas, attention_mask = canvas.repeat_interleave(copies, 0), attention_mask.repeat_interleave(copies, 0)
    stream = None
    if streamer is not None:
        stream = Stream(streamer, canvas[:, :start], attention_mask[:, :start], settings, record_of(model))
    on_step = None if stream is None else stream.step
    if record_of(model).mode.drafts:
        warn_of_processors(base, kwargs)
        output = decode_lossless(model, canvas[:, :start], attention_mask[:, :start], settings, on_step)
    else:
        processors = LogitsProcessorList(logits_processor or [])
        if record_of(model).block_length and settings.use_cache is not False:
            prompts = canvas[:, :start], attention_mask[:, :start]
            output = decode_blocks(model, *prompts, settings, on_step, processors)
        elif settings.length_quantile is not None:
            prompts = canvas[:, :start], attention_mask[:, :start]
            output = fill_sized(model, *prompts, settings, on_step, processors)
        else:
            output = fill_masks(model, canvas, attention_mask, settings, start, on_step, processors)
    output.sequences = _trim(output.sequences, start, settings)
    if stream is not None:
        stream.end(output.sequences)
    return output if settings.return_dict_in_generate else output.sequences


def _refuse(record: DiffusionRecord, settings: DiffusionGenerationConfig, processors: Any) -> None:
    """Settings that this model has no use for."""
    refuse(record, settings)
    block_length = record.block_length
    if block_length and settings.block_length not in (None, block_length):
        raise UserError(
            f"`block_length`: the model was converted with blocks of {block_length}, got {settings.block_length}; leave it out."
        )
    if settings.length_quantile is not None and (block_length or settings.eos_token_id is None):
        raise UserError(
            f"`length_quantile`={settings.length_quantile} sizes the canvas of a bidirectional model with an end token; "
            + ("answers in blocks end by themselves; leave it out." if block_length else "`eos_token_id` is None.")
        )
    if not record.mode.drafts:
        if settings.verify:
            raise UserError(
                "`verify`: only an adapter that was trained with `attention='lossless'` drafts for its base; leave it out, or train one."
            )
        return
    if settings.verify is False:
        raise UserError(
            "`verify`=False: a lossless adapter was trained on what its base writes; it can only draft for it."
        )
    if not settings.eos_early_stop:
        raise UserError("`eos_early_stop`=False: what the base says behind its end token is not decoded; leave it out.")
    neutral = {"guidance_scale": 1, "repetition_penalty": 1.0}
    names = ("guidance_scale", "repetition_penalty", "bad_words_ids", "revision", "editing_threshold", "alg_temp")
    given = {name: getattr(settings, name) for name in names} | {"logits_processor": processors}
    for name, value in given.items():
        if value and value != neutral.get(name):
            raise UserError(f"`{name}`: lossless decoding gives the base's own text, without it; leave it out.")


def warn_of_processors(base: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Says which habits of the base's own `generate` are left out: the text is the base's without them."""
    own = base.generation_config.to_diff_dict()
    left_out = {
        name: own[name]
        for name in sorted(PROCESSORS & set(own) - set(kwargs))
        if own[name] not in (None, False, 0, NEUTRAL.get(name))
    }
    if left_out:
        logger.warning(
            "lossless decoding leaves out %s of the base's generation_config; pass neutral values to compare with its `generate`",
            left_out,
        )


def _trim(sequences: torch.Tensor, start: int, settings: DiffusionGenerationConfig) -> torch.Tensor:
    """Pads behind every row's first end token and cuts to the longest row."""
    eos = eos_ids(settings, sequences.device)
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
    with adapters_off(model), causal_attention(base):
        return type(base).generate(base, input_ids, **kwargs)


def generate_as_loaded(model: torch.nn.Module, **kwargs: Any) -> Any:
    """`generate` for a converted checkpoint that the host's own loader brought: attention is set at the first call.

    This is what `custom_generate/generate.py` beside the weights hands to `from_pretrained`, `generate` and `pipeline`.
    """
    base = base_of(model)
    record = record_of(base)
    if not record.converted:
        raise UserError("`model`: not a converted checkpoint; call `convert_to_diffusion` first.")
    if record.time_embedding:
        raise UserError("`model`: the host's loader leaves the time embedding out; use `load_diffusion_model`.")
    if not getattr(base, "_attention_set", False):
        keep_logits(base)
        set_attention(base, record)
        base._attention_set = True
    return generate(model, **kwargs)
