"""From any causal language model to a diffusion model, in place.

A converted model stays transformers' own class. What makes it a diffusion model is a record, `config.diffusion`, its attention, a mask
token, and a bound `generate`. A mask token with a row of its own stands in no text; an ordinary word as the mask (DiffuGPT's 10541)
needs no row, but is read as a mask wherever it stands in a text.
"""

from __future__ import annotations

import dataclasses
import logging
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import llm_diffusion

from .. import UserError
from ..objective.modes import MODES
from ..objective.noise import get_noise_schedule
from ..objective.settings import check_settings
from .attention import check_block_attention, check_decoder, patch_causal_attention
from .forward import TIME_EMBEDDING, attach, causal_ratio_of, forward_state, lift_masks
from .patching import BoundFunction, Patch, base_of, embedding_table
from .probing import check_clean_prefix, recurrent_layers
from .record import ConversionSettings, DiffusionRecord
from .special_tokens import (
    check_mask_token,
    check_vocabulary,
    grow,
    name_mask_token,
    set_end_tokens,
    set_mask_token,
    set_pad_token,
)

logger = logging.getLogger(__name__)


def convert_to_diffusion(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    *,
    attention: str | None = None,
    block_length: int | None = None,
    clean_context: str | None = None,
    right_shift_logits: bool | None = None,
    time_embedding: bool | None = None,
    noise_schedule: str | None = None,
    mask_token_id: int | None = None,
) -> torch.nn.Module:
    """Turns a causal language model into a masked-diffusion model, in place. Idempotent.

    Args:
        model: any `AutoModelForCausalLM`, bare or under PEFT.
        tokenizer: its tokenizer; gets the mask token.
        attention, block_length, clean_context, right_shift_logits, time_embedding, mask_token_id: see `ConversionSettings`. By default
            hidden state i - 1 predicts token i, the read-out that the model was trained with, but for `clean_context="block"`.
        noise_schedule: recorded for training and likelihood, "linear" by default.

    Returns:
        The same `model`, with `config.diffusion`, and `generate` bound to it.

    Raises:
        UserError: the model cannot attend so, or is already converted with other options.
    """
    base = base_of(model)
    _keep_quantised_weights(base)
    options = ConversionSettings(
        attention, block_length, clean_context, right_shift_logits, time_embedding, mask_token_id
    )
    saved = getattr(base.config, "diffusion", None)
    where = f"config.diffusion of {base.config.name_or_path!r}"
    record = DiffusionRecord() if saved is None else DiffusionRecord.from_dict(saved, where, complete=True)
    if record.converted:
        name_mask_token(tokenizer, record.mask_token_id)
        _check_against(record, tokenizer, {**vars(options), "noise_schedule": noise_schedule})
        grow(base, record.mask_token_id)  # of an adapter, whose base may be as it came
        check_vocabulary(base, tokenizer)
        set_attention(base, record)
    else:
        record = _new_record(options, noise_schedule or "linear")
        check_vocabulary(base, tokenizer)
        check_mask_token(tokenizer, mask_token_id)
        set_attention(base, record)
        record = dataclasses.replace(
            record,
            mask_token_id=set_mask_token(base, tokenizer, mask_token_id),
            base_model=base.config.name_or_path,
            base_fingerprint=fingerprint(base),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=version("llm_diffusion"),
        )
    base.config.diffusion = record.to_dict()
    set_pad_token(base, tokenizer)
    set_end_tokens(base, tokenizer)
    base.generate = BoundFunction(_generate, base)
    return model


def _keep_quantised_weights(base: PreTrainedModel) -> None:
    """bitsandbytes would repack 4-bit weights at the first evaluation, a probe for one, and train with wrong gradients afterwards."""
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Decoding is a room above this one: it is reached by its public name when it is called."""
    return llm_diffusion.generate(self, *args, **kwargs)


def _check_against(record: DiffusionRecord, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> None:
    for name, value in options.items():
        found = getattr(record, name)
        if value is not None and value != found:
            raise UserError(f"`{name}`: the checkpoint was converted with {found!r}, got {value!r}; leave it out.")
    if tokenizer.mask_token_id != record.mask_token_id:
        raise UserError(
            f"`tokenizer`: its mask token id is {tokenizer.mask_token_id}, the checkpoint's is {record.mask_token_id}; "
            "load the tokenizer that was saved with the model."
        )


def _new_record(options: ConversionSettings, noise_schedule: str) -> DiffusionRecord:
    """Checked options with their defaults filled in."""
    check_settings(options)
    get_noise_schedule(noise_schedule)
    attention, length, context = options.attention or "bidirectional", options.block_length, options.clean_context
    mode = MODES[attention]
    if mode.has_blocks:
        length, context = length or mode.default_block_length, context or "causal"
        if length < mode.min_block_length:
            raise UserError(
                f"`block_length` must be at least {mode.min_block_length} with `attention`={attention!r}, got {length}."
            )
    elif length is not None or context is not None:
        raise UserError("`block_length` and `clean_context` belong to `attention`='block'; leave them out.")
    shifted = options.right_shift_logits
    if mode.drafts and (context != "causal" or shifted is False or options.time_embedding):
        raise UserError(
            "`attention`='lossless' drafts behind the base's own text and read-out: `clean_context` is 'causal', `right_shift_logits` "
            "true and `time_embedding` false; leave them out."
        )
    return DiffusionRecord(
        attention=attention,
        block_length=length,
        clean_context=context,
        # A block-causal clean half reads every token in its own place, as SDAR.
        right_shift_logits=context != "block" if shifted is None else shifted,
        time_embedding=bool(options.time_embedding),
        noise_schedule=noise_schedule,
    )


def set_attention(model: PreTrainedModel, record: DiffusionRecord) -> None:
    """Makes the model attend as its record tells, or checks that it can; its forward becomes ours."""
    if record.mode.has_blocks:
        check_decoder(model)
        check_block_attention(model, record.block_length)
        if record.mode.drafts:
            check_clean_prefix(model)
    else:
        patch_causal_attention(model)
        if layers := recurrent_layers(model):
            logger.warning("%s: its layers %s still run from left to right", type(model).__name__, ", ".join(layers))
        set_final_causal_ratio(model, record.final_causal_ratio)
    if record.time_embedding:
        attach(model)
    forward_state(model).attention_set = True


def set_final_causal_ratio(model: PreTrainedModel, ratio: float) -> None:
    """What stays of the causal mask for good, in evaluation and generation too: 0 is fully bidirectional."""
    if ratio or causal_ratio_of(model) is not None:
        lift_masks(Patch(), model, ratio)


def fingerprint(model: PreTrainedModel) -> list[float]:
    """Weights that adapters do not touch: of the input embedding, of the last norm, as a rule, and, unless they are quantised, one weight
    of every matrix, summed up to 16 numbers. Earlier versions wrote the first two parts."""
    head = model.get_output_embeddings()
    others = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and parameter.numel() >= 8 and parameter.is_floating_point()
        if id(parameter) not in others and not name.startswith(TIME_EMBEDDING)
    ]
    embedding = embedding_table(model)
    values = [embedding[3:11, 0]]
    if weights:
        values.append(weights[-1][:: len(weights[-1]) // 8][:8])
    added = (TIME_EMBEDDING, "lora_", "modules_to_save", "trainable_tokens")
    matrices = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() > 1 and parameter.shape != embedding.shape  # of the head too
        if not any(part in name for part in added)
    ]
    if all(matrix.is_floating_point() and not matrix.is_meta for matrix in matrices):
        middles = [matrix.detach().flatten()[matrix.numel() // 2].float().cpu() for matrix in matrices]
        # Sizes, because a sum of numbers of both signs would be mostly rounding.
        values += [torch.stack(middles[i::16]).abs().sum()[None] for i in range(min(16, len(middles)))]
    return [round(value, 6) for value in torch.cat([v.detach().float().cpu() for v in values]).tolist()]
