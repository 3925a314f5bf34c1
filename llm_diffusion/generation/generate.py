"""`generate`: prompts in, answers out, by iterative unmasking; and the autoregressive decoding of the same weights.

Which engine decodes is a matter of how the model attends: `canvas` (bidirectional; `lengths` where canvases are sized), `blocks`,
or `speculative.decoding` (lossless).
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
from ..models.forward import forward_state
from ..models.patching import Patch, adapters_off, base_of, embedding_table
from ..models.record import autoregressive_config, layered, record_of
from ..models.sampling import DiffusionOutput, eos_ids
from ..objective.settings import check_value
from ..speculative.decoding import decode_lossless
from .blocks import BlockDecoder
from .canvas import CanvasDecoder, with_masks
from .config import NEUTRAL, DiffusionGenerationConfig, check_room, given_settings, saved_settings
from .inputs import check_streamer, checked_inputs, checked_processors
from .lengths import fill_sized
from .streaming import Stream

logger = logging.getLogger(__name__)

# Of a `GenerationConfig`: what changes logits and looks at the text so far.
PROCESSORS = {
    *("repetition_penalty", "no_repeat_ngram_size", "min_new_tokens", "min_length", "bad_words_ids", "sequence_bias"),
    *("suppress_tokens", "begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "guidance_scale"),
    *("exponential_decay_length_penalty", "num_beams", "penalty_alpha", "assistant_early_exit"),
}
# Of transformers' `generate`, which a file beside the weights is handed whether they are set or not.
NOT_OURS = {
    *("stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model", "use_model_defaults"),
    *("negative_prompt_ids", "negative_prompt_attention_mask", "past_key_values", "trust_remote_code"),
    "cache_implementation",
}
# Handed over by tokenizers, and by `transformers serve` for stop strings that a request may have.
IGNORED = {"token_type_ids", "tokenizer"}


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
        generation_config: any `GenerationConfig`; over the settings that the model was saved with, and under keywords.
        streamer: gets the prompt, every draft (`put_draft`, where it has one) and finished blocks; see `streaming`.
        logits_processor: of transformers; see `step.apply_processors` for what each gets to see.
        kwargs: settings, see `UnmaskingSettings`.

    Returns:
        (B, P + n) token ids (B times `num_return_sequences`) as from transformers' own `generate`, padded after the end token; with
        `return_dict_in_generate=True` a `DiffusionOutput`.

    Raises:
        UserError: unknown or impossible setting, missing mask token, prompts padded on the right or too long.
    """
    ids, base, record = inputs if input_ids is None else input_ids, base_of(model), record_of(model)
    if ids is None:
        raise UserError("`input_ids` are missing.")
    settings = _settings(base, generation_config, kwargs, ids)
    processors = checked_processors(logits_processor)
    settings.check_model(record, processors)
    check_streamer(streamer)
    ends = eos_ids(settings, torch.device("cpu")).tolist()
    pad = None if settings.pad_token_id in ends else settings.pad_token_id
    ids, mask = checked_inputs(base, ids, attention_mask, pad_token_id=pad)
    check_room(base, ids.shape[1], settings.max_new_tokens)
    copies = settings.num_return_sequences or 1
    ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
    stream = None if streamer is None else Stream(streamer, ids, mask, settings, record)
    on_step = None if stream is None else stream.step
    if record.mode.drafts:
        _warn_of_processors(base, kwargs)
        output = decode_lossless(model, ids, mask, settings, on_step)
    elif settings.length_quantile is not None:
        output = fill_sized(model, ids, mask, settings, on_step, processors)
    else:
        canvas = with_masks(ids, mask, settings.max_new_tokens, settings.mask_token_id)
        decoder = BlockDecoder if record.mode.has_blocks and settings.use_cache is not False else CanvasDecoder
        output = decoder(model, *canvas, settings, ids.shape[1], processors).run(on_step)
    output.sequences = _trim(output.sequences, ids.shape[1], settings)
    if stream is not None:
        stream.end(output.sequences)
    return output if settings.return_dict_in_generate else output.sequences


def _settings(
    base: PreTrainedModel, given: GenerationConfig | None, kwargs: dict[str, Any], ids: Any = None
) -> DiffusionGenerationConfig:
    """What the model was saved with < the given config < keywords; special tokens default to the model's."""
    if not isinstance(given, GenerationConfig | None):
        raise UserError(
            f"`generation_config` must be a GenerationConfig, got {type(given).__name__}; pass `**settings`."
        )
    kwargs = {name: value for name, value in kwargs.items() if name not in IGNORED}
    for name in NOT_OURS & set(kwargs):
        if kwargs.pop(name):
            raise UserError(f"`{name}` means nothing when decoding by unmasking; leave it out.")
    # transformers' `max_length` counts the prompt; `max_new_tokens` wins over it.
    longest = kwargs.pop("max_length", None) or getattr(given, "max_length", None)
    if longest and kwargs.get("max_new_tokens") is None and getattr(given, "max_new_tokens", None) is None:
        check_value("max_length", longest, int, {"min": 1})
        prompt_length = ids.shape[-1] if isinstance(ids, torch.Tensor) and ids.dim() else 0
        if longest <= prompt_length:
            raise UserError(f"`max_length` ({longest}) leaves no room after a prompt of {prompt_length} tokens.")
        kwargs["max_new_tokens"] = longest - prompt_length
    chosen = layered(layered(saved_settings(base), {} if given is None else given_settings(given)), kwargs)
    if chosen.get("mask_token_id") is None:
        chosen["mask_token_id"] = record_of(base).mask_token_id
    rows = len(embedding_table(base))
    for name in ("eos_token_id", "pad_token_id"):
        if chosen.get(name) is None and name not in kwargs:
            own = getattr(base.generation_config, name, None)
            chosen[name] = None if own == -1 else own  # of LLaMA: none
    settings = DiffusionGenerationConfig(**chosen)
    _check_tokens(settings, rows)
    return settings


def _check_tokens(settings: DiffusionGenerationConfig, rows: int) -> None:
    """Refuses tokens that the embedding of so many rows does not have, and the mask where it means something else."""
    if settings.mask_token_id is None:
        raise UserError("`mask_token_id` is missing: the model is not converted; pass it, or convert the model first.")
    tokens = {
        "mask_token_id": [settings.mask_token_id],
        "suppress_tokens": settings.suppress_tokens or [],
        "bad_words_ids": sum(settings.bad_words_ids or [], []),
        "pad_token_id": [] if settings.pad_token_id is None else [settings.pad_token_id],
        "eos_token_id": eos_ids(settings, torch.device("cpu")).tolist(),
    }
    for name, found in tokens.items():
        if outside := [token for token in found if not 0 <= token < rows]:
            raise UserError(f"`{name}` must be rows of the embedding, [0, {rows}), got {outside}.")
        if name in ("pad_token_id", "eos_token_id") and settings.mask_token_id in found:
            raise UserError(f"`{name}` must not be the mask token, {settings.mask_token_id}.")


def _warn_of_processors(base: PreTrainedModel, kwargs: dict[str, Any]) -> None:
    """Which settings of the base's own `generate` are left out: the text is the base's without them."""
    own = base.generation_config.to_diff_dict()
    names = sorted(PROCESSORS & set(own) - set(kwargs))
    if left_out := {name: own[name] for name in names if own[name] not in (None, False, 0, NEUTRAL.get(name))}:
        logger.warning("lossless decoding leaves out %s of the base's generation_config", left_out)


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
    """Decodes as the autoregressive model did: adapters off, attention causal, transformers' own `generate`.

    Under LoRA this is the untouched base, the fair baseline of its conversion. Arguments as in transformers.
    """
    base = base_of(model)
    with adapters_off(model), causal_attention(base), Patch() as patch:
        patch.set(base, "generation_config", autoregressive_config(base.generation_config)[0])
        return type(base).generate(base, input_ids, **kwargs)


def generate_as_loaded(inputs: torch.Tensor | None = None, *, model: torch.nn.Module, **kwargs: Any) -> Any:
    """`generate` for a converted checkpoint that transformers' own loader brought: attention is set at the first call.

    This is what `custom_generate/generate.py` beside the weights hands to `from_pretrained`, `generate` and `pipeline`, which name the model:
    what comes first is the prompts.
    """
    base, record = base_of(model), record_of(model)
    if not record.converted:
        raise UserError("`model`: not a converted checkpoint; call `convert_to_diffusion` first.")
    if record.time_embedding:
        raise UserError("`model`: transformers' loader leaves the time embedding out; use `load_diffusion_model`.")
    if not forward_state(base).attention_set:
        set_attention(base, record)
    return generate(model, inputs=inputs, **kwargs)
