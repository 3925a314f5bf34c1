"""Training a drafter: clean text through the base as it is, noisy blocks through the adapter, in two forward passes.

Trade-off: two calls of the model, of which the first has no gradient. Alternative: one call over both halves, see `clean_prefix`; it is
what the tests compare this with.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import DynamicCache

from ..adapter_switch import check_adapters
from ..clean_prefix import CleanPrefix, allow_prefix_under_checkpointing, check_drafts
from ..patching import adapters_off
from .sft_config import DiffusionSFTConfig


def check_drafter(record: dict[str, Any], adapted: bool, converted_base: bool, args: DiffusionSFTConfig) -> None:
    """Refuses what a drafter cannot be trained with."""
    if record["attention"] != "lossless":
        return
    if not adapted or converted_base:
        raise ValueError(
            "`attention`='lossless' trains adapters on an autoregressive base, which verifies what they draft; "
            + ("the base is a converted checkpoint itself." if converted_base else "pass a `peft_config`.")
        )
    if args.loss_weight != "elbo":
        raise ValueError(
            "`loss_weight` weighs noise levels, of which a drafter knows one; leave it out with `attention`='lossless'."
        )
    for name in ("complementary_masks", "exact_mask_count", "random_replacement", "distillation_hidden_weight"):
        if getattr(args, name):
            raise ValueError(
                f"`{name}` means nothing to `attention`='lossless', whose clean text is the base's; leave it out."
            )


def ready_drafter(model: PeftModel, mask_token_id: int, checkpointing: bool) -> None:
    """Checks the adapters that were made, and lets them train under gradient checkpointing."""
    check_adapters(model, mask_token_id)
    allow_prefix_under_checkpointing(model)
    check_drafts(model, mask_token_id, checkpointing)


def accepted_lengths(
    agrees: torch.Tensor, rows: torch.Tensor, tokens: torch.Tensor, whole: torch.Tensor, block_length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What verification would yield of the drafts: their tokens up to the first that the base would not say, and its own before them.

    Args:
        agrees: (n,) bool, whether the best guess is the base's; in the order of `rows` and `tokens`, (n,) each.
        whole: (n,) bool, of a block that was masked whole.

    Returns:
        Sum over whole blocks of full length, and how many these are.
    """
    jumps = (rows[1:] != rows[:-1]) | (tokens[1:] != tokens[:-1] + 1)  # between blocks stands a token that is not asked
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
    """The drafter's logits at `keep`, and what the base says.

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
    cache, training = DynamicCache(), adapted.training
    adapted.eval()  # no dropout
    try:
        with torch.no_grad(), adapters_off(adapted):
            base_logits = model(
                input_ids=ids[:, clean],
                position_ids=places[:, clean],
                attention_mask=mask[:, :, clean, clean],
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1 if wanted is None else wanted,
            ).logits
    finally:
        adapted.train(training)
    logits = model(
        input_ids=ids[:, noisy],
        position_ids=places[:, noisy],
        attention_mask=torch.cat([mask[:, :, noisy, clean], mask[:, :, noisy, noisy]], -1),
        past_key_values=CleanPrefix(cache),
        use_cache=False,
        logits_to_keep=keep[:, noisy],
    ).logits
    return logits, None if wanted is None else base_logits
