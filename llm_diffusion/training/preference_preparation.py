"""What preference training does to data, references and collators before the first step.

Trade-off: plain functions, so that the trainer reads as its objective. Alternative: methods, which nothing else could call.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .. import UserError
from ..models.conversion import convert_to_diffusion
from ..models.patching import base_of
from ..models.record import DiffusionRecord, record_of
from ..objective.forward_process import NoiseSettings
from .collator import DataCollatorForDiffusionPreference, DataCollatorForMaskedDiffusion
from .config import DiffusionDPOConfig


def make_collator(
    processing_class: PreTrainedTokenizerBase, record: DiffusionRecord, args: DiffusionDPOConfig
) -> DataCollatorForDiffusionPreference:
    layout = DataCollatorForMaskedDiffusion(
        record,
        pad_token_id=processing_class.pad_token_id,
        eos_token_id=processing_class.eos_token_id,
        settings=NoiseSettings(eos_tail=0, random_canvas=0.0),
        pad_to_multiple_of=args.pad_to_multiple_of,
    )
    return DataCollatorForDiffusionPreference(layout, max_length=args.max_length)


def frozen_copy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A converted model of the same weights that does not train.

    Built anew: trainers bind forwards to a model that keep calling it from a deep copy.
    """
    base = base_of(model)
    reference = type(base)._from_config(copy.deepcopy(base.config), dtype=base.dtype)
    convert_to_diffusion(reference, tokenizer)
    reference.load_state_dict(base.state_dict())
    return reference.to(base.device).requires_grad_(False).eval()


def check_reference(reference: torch.nn.Module, record: DiffusionRecord) -> None:
    """Refuses a reference that cannot be asked what the policy is asked.

    Raises:
        ValueError: not converted, with another mask token, attention or read-out.
    """
    theirs = record_of(reference)
    if not theirs.converted:
        raise UserError(
            f"`ref_model`: {type(base_of(reference)).__name__} has no mask token and no record of a conversion; convert it with "
            "`convert_to_diffusion`, load it with `load_diffusion_model`, or leave it out: the policy's start is the reference then."
        )
    for name in ("mask_token_id", "attention", "block_length", "clean_context", "right_shift_logits"):
        if getattr(theirs, name) != getattr(record, name):
            raise UserError(
                f"`ref_model`: its `{name}` is {getattr(theirs, name)!r}, the policy's is {getattr(record, name)!r}."
            )


def reference_of(
    model: torch.nn.Module,
    reference: PreTrainedModel | None,
    adapted: bool,
    tokenizer: PreTrainedTokenizerBase,
    args: DiffusionDPOConfig,
) -> PreTrainedModel | None:
    """The model to hand to the host as the reference; None: adapters off, a copy of them, or scores stored before the first step."""
    if reference is not None:
        check_reference(reference, record_of(model))
        return reference
    if adapted:
        return None
    if args.precompute_ref_log_probs:
        if args.fsdp:
            raise UserError(
                "`precompute_ref_log_probs` under FSDP needs a `ref_model`; the host would load an unconverted one."
            )
        return None
    # The host would load the checkpoint again, which need not be converted, and has not been trained in memory.
    return frozen_copy(model, tokenizer)


def complete_ref_adapter(model: PeftModel) -> None:
    """Makes the host's "ref" adapter what "default" is now: it leaves out trained token rows and what has no dot behind its name."""
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if "default" in (parts := name.split(".")):
                parameters[".".join("ref" if part == "default" else part for part in parts)].copy_(parameter)
    for name, parameter in parameters.items():
        if "ref" in name.split("."):
            parameter.requires_grad_(False)


def _last_words(side: Any) -> tuple[str, bool]:
    """The text of an answer, or of a conversation's last turn; and whether it does something else than speak."""
    if isinstance(side, str):
        return side, False
    if not side:
        return "", False
    return side[-1].get("content") or "", bool(side[-1].get("tool_calls"))


def _is_pair(example: dict[str, Any], row: int, name: str) -> bool:
    for side in ("chosen", "rejected"):
        text, acts = _last_words(example[side])
        if not acts and not (text if isinstance(text, str) else repr(text)).strip():
            raise UserError(f"`{name}_dataset`: `{side}` of row {row} is empty; an answer is needed to compare.")
    if example["chosen"] == example["rejected"]:
        raise UserError(
            f"`{name}_dataset`: `chosen` and `rejected` of row {row} are the same; leave the pair out, it prefers nothing."
        )
    return True


def check_columns(dataset: Any, name: str) -> None:
    """Refuses data without rows, or without the two answers of a pair.

    Raises:
        ValueError: no row, or a missing column.
    """
    if (first := next(iter(dataset), None)) is None:
        raise UserError(f"`{name}_dataset` is empty.")
    if missing := [side for side in ("chosen", "rejected") if side not in first]:
        raise UserError(
            f"`{name}_dataset` lacks {missing}, its columns are {sorted(first)}; a pair has `chosen` and `rejected`, and a `prompt` "
            "of its own or as their common beginning."
        )


def check_pairs(dataset: Any, name: str) -> Any:
    """The data, refused where it holds no preference; a stream is checked as it flows.

    Raises:
        ValueError: see `check_columns`; an empty answer, or two equal ones.
    """
    check_columns(dataset, name)
    return dataset.filter(_is_pair, with_indices=True, fn_kwargs={"name": name})
