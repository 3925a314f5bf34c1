"""Training a drafter: clean text through the base as it is, without gradient, then noisy blocks through the adapter.

The tests compare this with one pass over both halves.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache
from trl import SFTConfig

from .. import UserError
from ..models.patching import adapters_off, base_of, in_eval_mode
from ..models.probing import BLOCK, CleanPrefix, probe_ids, same_logits
from ..models.record import DiffusionRecord
from ..objective.attention_masks import additive, block_causal
from .adapters import AdapterSwitch, check_adapters


def check_drafter(record: DiffusionRecord, adapted: bool, converted_base: bool, args: SFTConfig) -> None:
    """Refuses what a drafter cannot be trained with."""
    if not record.mode.drafts:
        return
    if not adapted or converted_base:
        raise UserError(
            "`attention`='lossless' trains adapters on an autoregressive base, which verifies what they draft; "
            + ("the base is a converted checkpoint itself." if converted_base else "pass a `peft_config`.")
        )
    without = ("complementary_masks", "exact_mask_count", "random_replacement", "distillation_hidden_weight")
    foreign = [name for name in without if getattr(args, name)] + ["loss_weight"] * (args.loss_weight != "elbo")
    if foreign:
        raise UserError(f"`{foreign[0]}` means nothing to a drafter; leave it out with `attention`='lossless'.")


def ready_drafter(model: PeftModel, mask_token_id: int, checkpointing: bool) -> None:
    """Checks the adapters that were made, and lets them train under gradient checkpointing."""
    check_adapters(model, mask_token_id)
    allow_prefix_under_checkpointing(model)
    check_drafts(model, mask_token_id, checkpointing)


def accepted_lengths(
    agrees: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, whole: torch.Tensor, block_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What verification would yield of the drafts: their tokens up to the first that is not the base's, and its own before them.

    Args:
        agrees: (n,) bool, whether the best guess is the base's; in the order of `rows` and `tokens`, (n,) each.
        whole: (n,) bool, of a block that was masked whole.

    Returns:
        Sum over whole blocks of full length, and how many these are.
    """
    # Between blocks stands a token that is not drafted.
    jumps = (rows[1:] != rows[:-1]) | (tokens[1:] != tokens[:-1] + 1)
    starts = torch.nn.functional.pad(jumps, (1, 0), value=True)[: len(rows)]
    segment = starts.long().cumsum(0) - 1
    sizes = torch.zeros_like(segment).scatter_add(0, segment, torch.ones_like(segment))
    counted = whole & (sizes[segment] == block_length - 1)
    misses = (~agrees).long().cumsum(0)
    before = torch.zeros_like(misses).scatter_add(0, segment, starts * (misses - (~agrees).long()))
    run = (misses == before[segment]) & counted
    blocks = (counted & starts).sum()
    return run.sum() + blocks, blocks


def draft_logits(
    model: torch.nn.Module,
    adapted: PeftModel,
    inputs: dict[str, Any],
    length: int,
    keep: torch.Tensor,
    wanted: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The drafter's logits at `keep`, and the base's.

    Args:
        model: called; `adapted` or a wrapper of it.
        inputs: of a row of noisy and clean tokens, (B, N + L) each, and their (B, 1, N + L, N + L) mask.
        length: L.
        keep: (B, N + L), all of it in the noisy part.
        wanted: (B, L) clean tokens at which the base's logits are returned too.

    Returns:
        (n, V) logits; (m, V) logits of the base, or None.
    """
    ids, places, mask = inputs["input_ids"], inputs["position_ids"], inputs["attention_mask"]
    noisy, clean = slice(0, ids.shape[1] - length), slice(ids.shape[1] - length, None)
    cache = DynamicCache()
    with in_eval_mode(adapted), adapters_off(adapted):
        base_logits = model(
            input_ids=ids[:, clean],
            position_ids=places[:, clean],
            attention_mask=mask[:, :, clean, clean],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1 if wanted is None else wanted,
        ).logits
    logits = model(
        input_ids=ids[:, noisy],
        position_ids=places[:, noisy],
        attention_mask=torch.cat([mask[:, :, noisy, clean], mask[:, :, noisy, noisy]], -1),
        past_key_values=CleanPrefix(cache),
        use_cache=False,
        logits_to_keep=keep[:, noisy],
    ).logits
    return logits, None if wanted is None else base_logits


def allow_prefix_under_checkpointing(model: torch.nn.Module) -> None:
    """Lets transformers' layers have a cache while they are checkpointed, which they drop otherwise."""
    for module in base_of(model).modules():
        if hasattr(module, "_can_checkpoint_with_cache"):
            module._can_checkpoint_with_cache = True


def check_drafts(model: torch.nn.Module, mask_token_id: int, checkpointing: bool) -> None:
    """Refuses adapters that act otherwise in decoding than in training, on one block behind a clean one.

    Raises:
        UserError: adapters on experts or other layers that do not see rows, or layers that drop the prefix while checkpointed.
    """
    base = base_of(model)
    name, training, cache = type(base).__name__, base.training, DynamicCache()
    ids = probe_ids(base, 2 * BLOCK)
    ids[:, BLOCK:] = mask_token_id
    place = torch.arange(ids.shape[1], device=ids.device)[None]
    mask = additive(block_causal(torch.ones_like(ids), BLOCK), base.dtype)

    def logits(first: int, last: int, **options: Any) -> torch.Tensor:
        rows = {"input_ids": ids[:, first:last], "position_ids": place[:, first:last]}
        return base(**rows, attention_mask=mask[:, :, first:last, :last], **options).logits

    adapters = [parameter for key, parameter in model.named_parameters() if "lora_B" in key]
    kept = [parameter.detach().clone() for parameter in adapters]
    base.eval()
    try:
        with torch.no_grad():
            for parameter in adapters:  # they start at zero, and would do nothing
                parameter.copy_(torch.full_like(parameter, 0.01))
            with adapters_off(model):
                logits(0, BLOCK, past_key_values=cache, use_cache=True)
            want = logits(BLOCK, 2 * BLOCK, past_key_values=CleanPrefix(cache), use_cache=False)
            with AdapterSwitch(model) as switch:
                switch.first = BLOCK
                found = logits(0, 2 * BLOCK, use_cache=False)[:, BLOCK:]
        if checkpointing:
            base.train()
            base.activation_checkpointing_enable({"use_reentrant": False})
            logits(BLOCK, 2 * BLOCK, past_key_values=CleanPrefix(cache), use_cache=False)
    except Exception as error:  # experts, shapes, checkpointing: every architecture fails in its own way
        hint = "; set `gradient_checkpointing` to false" if base.training else "; leave experts out of `target_modules`"
        raise UserError(f"`attention`='lossless': the adapters of {name} cannot draft: {error}{hint}.") from error
    finally:
        if checkpointing:
            base.activation_checkpointing_disable()
        base.train(training)
        with torch.no_grad():
            for parameter, value in zip(adapters, kept, strict=True):
                parameter.copy_(value)
    others = torch.arange(want.shape[-1], device=want.device) != mask_token_id  # which is never predicted
    if not same_logits(found[..., others], want[..., others]):
        raise UserError(
            f"`attention`='lossless': the adapters of {name} act otherwise in decoding than in training; adapt linear layers that see "
            "every token, and no experts."
        )
