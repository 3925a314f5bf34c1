"""From any causal language model to a diffusion model, in place.

A converted model stays transformers' own class. What makes it a diffusion model is a record, `config.diffusion`, the attention
switch, a mask token, and a bound `generate`.
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
from ..objective.noise_schedules import get_noise_schedule
from ..objective.settings import check_settings
from . import time_embedding as time_embeddings
from .attention import check_block_attention, check_decoder, check_transformers, lift_masks, patch_causal_attention
from .patching import Patch, base_of, bind, keep_logits
from .prefix_cache import check_clean_prefix
from .probing import recurrent_layers
from .record import ConversionSettings, DiffusionRecord, record_of
from .special_tokens import check_mask_token, set_mask_token

logger = logging.getLogger(__name__)


def _new_record(
    attention: str | None,
    block_length: int | None,
    clean_context: str | None,
    right_shift_logits: bool | None,
    time_embedding: bool | None,
    noise_schedule: str | None,
) -> DiffusionRecord:
    """Checked options with their defaults filled in."""
    attention, noise_schedule = attention or "bidirectional", noise_schedule or "linear"
    check_settings(ConversionSettings(attention, block_length, clean_context))
    get_noise_schedule(noise_schedule)
    mode = MODES[attention]
    if mode.has_blocks:
        block_length = mode.default_block_length if block_length is None else block_length
        clean_context = clean_context or "causal"
        if block_length < mode.min_block_length:
            raise UserError(
                f"`block_length` must be at least {mode.min_block_length} with `attention`={attention!r}, got {block_length}."
            )
    elif block_length is not None or clean_context is not None:
        raise UserError("`block_length` and `clean_context` belong to `attention`='block'; leave them out.")
    if mode.drafts and (clean_context != "causal" or right_shift_logits is False or time_embedding):
        raise UserError(
            "`attention`='lossless' drafts behind the base's own text and read-out: `clean_context` is 'causal', `right_shift_logits` "
            "true and `time_embedding` false; leave them out."
        )
    if right_shift_logits is None:  # a block-causal clean half reads every token in its own place, as SDAR
        right_shift_logits = clean_context != "block"
    return DiffusionRecord(
        attention=attention,
        block_length=block_length,
        clean_context=clean_context,
        right_shift_logits=right_shift_logits,
        time_embedding=bool(time_embedding),
        noise_schedule=noise_schedule,
    )


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
        attention: "bidirectional" (default); "block": bidirectional inside a block, blocks from left to right; or "lossless": the model
            stays as it is, and adapters learn to draft blocks that it verifies.
        block_length: tokens of a block (default 4; 8 of a lossless draft).
        clean_context: how finished blocks see themselves: "causal" (default; what the AR model did) or "block".
        right_shift_logits: whether hidden state i - 1 predicts token i, as in the AR model. Default True, the read-out that the
            model was trained with; False for `clean_context="block"`.
        time_embedding: whether the model is told how noisy its input is (default False), see `time_embedding`.
        noise_schedule: recorded for training and likelihood, "linear" by default.
        mask_token_id: any token of the vocabulary as the mask; default the tokenizer's own, or a new one, see `set_mask_token`.

    Returns:
        The same `model`, with `config.diffusion`, and `generate` bound to it.

    Raises:
        ValueError: the model cannot attend as asked, or is already converted with other options.
    """
    check_transformers()
    base = base_of(model)
    keep_logits(base)
    for module in base.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # bitsandbytes would repack 4-bit weights at the first evaluation, the probe below for one, and train with wrong
            # gradients afterwards.
            module.support_avx512bf16_for_cpu = False
    asked = {
        "attention": attention,
        "block_length": block_length,
        "clean_context": clean_context,
        "right_shift_logits": right_shift_logits,
        "time_embedding": time_embedding,
        "noise_schedule": noise_schedule,
    }
    record = record_of(base)
    if not record.converted:
        record = _new_record(**asked)
        check_mask_token(tokenizer, mask_token_id)
        set_attention(base, record)
        record = dataclasses.replace(
            record,
            mask_token_id=set_mask_token(base, tokenizer, mask_token_id),
            base_model=base.config._name_or_path,
            base_fingerprint=fingerprint(base),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            version=version("llm_diffusion"),
        )
    else:
        for name, value in {**asked, "mask_token_id": mask_token_id}.items():
            found = getattr(record, name)
            if value is not None and value != found:
                raise UserError(
                    f"`{name}`: the checkpoint was converted with {found!r}, asked for {value!r}; leave it out."
                )
        set_attention(base, record)
        if tokenizer.mask_token_id != record.mask_token_id:
            raise UserError(
                f"`tokenizer`: its mask token id is {tokenizer.mask_token_id}, the checkpoint's is {record.mask_token_id}; "
                "load the tokenizer that was saved with the model."
            )
    base.config.diffusion = record.to_dict()
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    bind(base, "generate", _generate)
    return model


def _generate(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Decoding stands above models: it is reached by its public name when it is called."""
    return llm_diffusion.generate(self, *args, **kwargs)


def set_attention(model: PreTrainedModel, record: DiffusionRecord) -> None:
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
        time_embeddings.attach(model)


def set_final_causal_ratio(model: PreTrainedModel, ratio: float) -> None:
    """What stays of the causal mask for good, in evaluation and generation too: 0 is fully bidirectional."""
    if ratio or getattr(model, "lifted_causal_ratio", None) is not None:
        lift_masks(Patch(), model, ratio)


def fingerprint(model: PreTrainedModel) -> list[float]:
    """Weights that neither adapters nor quantisation touch: of the last norm, as a rule, and of the input embedding."""
    head = model.get_output_embeddings()
    others = {id(parameter) for parameter in head.parameters()} if head is not None else set()
    weights = [
        parameter
        for name, parameter in model.named_parameters()
        if parameter.dim() == 1 and parameter.numel() >= 8 and parameter.is_floating_point()
        if id(parameter) not in others and not name.startswith(time_embeddings.NAME)
    ]
    values = [model.get_input_embeddings().weight[3:11, 0]]
    if weights:
        values.append(weights[-1][:: len(weights[-1]) // 8][:8])
    return [round(value, 6) for value in torch.cat([v.detach().float().cpu() for v in values]).tolist()]
