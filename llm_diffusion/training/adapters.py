"""What adapters train beside their layers, what they are refused for, and what of the vocabulary is saved with them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.utils import set_additional_trainable_modules
from torch.nn import Linear
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from .. import UserError
from ..models.checkpoints import resolve_path
from ..models.conversion import fingerprint
from ..models.forward import TIME_EMBEDDING
from ..models.patching import base_of, embedding_table
from ..models.record import DiffusionRecord, record_of, update_record


def has_converted_weights(model: torch.nn.Module) -> bool:
    """Whether the weights under any adapters come from a converted checkpoint, and not from an autoregressive one."""
    return "diffusion" in _saved_config(model)


def _saved_config(model: torch.nn.Module) -> dict[str, Any]:
    """The config of the checkpoint that the weights under any adapters were loaded from; empty where there is none."""
    try:
        # Of published layouts it is of another class. What was loaded is here already: nothing is asked of the hub.
        path = resolve_path(base_of(model).config.name_or_path)
        return PreTrainedConfig.get_config_dict(path, local_files_only=True)[0]
    except (OSError, ValueError):
        return {}


def add_rows(model: torch.nn.Module, peft_config: PeftConfig, tokens: list[int], added: Iterable[int] = ()) -> None:
    """Lets `peft_config` train the rows of `tokens` beside its own, unless it trains, and saves, the whole vocabulary.

    Args:
        added: further tokens, which the model is to write too.
    """
    base = base_of(model)
    tied = base.config.get_text_config().tie_word_embeddings
    name, head = (name_of(base, module) for module in (base.get_input_embeddings(), base.get_output_embeddings()))
    if not hasattr(peft_config, "trainable_token_indices"):
        raise UserError(
            f"`peft_config`: {type(peft_config).__name__} cannot train the mask token's embedding row; use a LoraConfig."
        )
    saved, adapted = peft_config.modules_to_save or [], peft_config.target_modules or []
    if tied and any(part.endswith(tuple(saved)) for part in (name, head) if saved):
        peft_config.ensure_weight_tying = True  # else PEFT makes two matrices of one
        return
    adapts = re.fullmatch(adapted, name) if isinstance(adapted, str) else name.endswith(tuple(adapted))
    if adapts or name.endswith(tuple(saved)):
        return
    rows = peft_config.trainable_token_indices
    groups = copy.deepcopy(rows) if isinstance(rows, dict) else {name: list(rows or [])}
    for group in groups.values():
        group += [token for token in (*tokens, *added) if token not in group]
    if added and not tied and not head.endswith(tuple(saved)):
        groups.setdefault(head, list(added))
    peft_config.trainable_token_indices = groups if isinstance(rows, dict) or len(groups) > 1 else groups[name]


def name_of(model: torch.nn.Module, wanted: torch.nn.Module | None) -> str:
    """The name of a module in a model; "" if it is not there."""
    return next((name for name, module in model.named_modules() if module is wanted), "")


def keep_mask_row(model: PeftModel) -> None:
    """The mask token's row beside a user's own adapters on an autoregressive base, which no checkpoint would hold otherwise."""
    mask_id, base, name = record_of(model).mask_token_id, base_of(model), model.active_adapter
    before = getattr(model.active_peft_config, "trainable_token_indices", None)
    config = copy.deepcopy(model.active_peft_config)  # the user's own may serve again
    add_rows(model, config, [mask_id])
    if config.trainable_token_indices == before:
        return
    if before is not None:
        raise UserError(
            f"`model`: its adapters train the rows {before} of the vocabulary; add the mask token's, {mask_id}, to their "
            "`trainable_token_indices`."
        )
    model.peft_config[name], rows_alone = config, copy.copy(config)
    rows_alone.modules_to_save = None  # there already
    set_additional_trainable_modules(base, rows_alone, base.config.get_text_config().to_dict(), name)


def rows_suffice(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the rows that adapters train, and save, are all that the checkpoint of their base lacks of the tokenizer's tokens."""
    rows, saved = getattr(model.active_peft_config, "trainable_token_indices", None) or [], _saved_config(model)
    known = (saved.get("text_config") or saved).get("vocab_size")
    trained = set().union(*rows.values()) if isinstance(rows, dict) else set(rows)
    # Where it is not known, PEFT decides.
    return known is not None and bool(trained) and trained.issuperset(range(known, len(tokenizer)))


def prepare_adapter(
    model: torch.nn.Module, peft_config: PeftConfig, record: DiffusionRecord, added: Iterable[int] = ()
) -> PeftConfig:
    """Trains the rows of the mask token, of a tail's own token and of `added` ones, and a time embedding, beside the adapters."""
    peft_config = copy.deepcopy(peft_config)
    check_adapter(model, peft_config)
    rows = [row for row in (record.mask_token_id, record.tail_token_id) if row is not None]
    add_rows(model, peft_config, rows, added)
    if hasattr(base_of(model), TIME_EMBEDDING):
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), TIME_EMBEDDING})
    if peft_config.exclude_modules is None and peft_config.target_modules == "all-linear":
        # The time embedding is trained whole; routers of experts return tuples, which adapters cannot.
        unfit = re.compile(rf"(.*\.)?({TIME_EMBEDDING}|router|gate)(\..*)?")
        if any(unfit.fullmatch(name) for name, _ in model.named_modules()):
            peft_config.exclude_modules = unfit.pattern
    update_record(model, base_fingerprint=fingerprint(base_of(model)))  # full training may have moved it
    return peft_config


def check_adapter(model: torch.nn.Module, config: PeftConfig) -> None:
    """Refuses adapters that would be frozen, wider than any layer, or train whole modules that the model has not."""
    if config.inference_mode:
        raise UserError("`peft_config`: `inference_mode` leaves nothing to train; leave it out.")
    layers = [module for module in model.modules() if isinstance(module, Linear | Conv1D)]
    shapes = ((m.in_features, m.out_features) if isinstance(m, Linear) else m.weight.shape for m in layers)
    widest = max(map(min, shapes), default=None)
    if widest is not None and (rank := getattr(config, "r", 0)) > widest:
        raise UserError(f"`peft_config`: `r` ({rank}) is more than any matrix of the model can have ({widest}).")
    rows, size = getattr(config, "trainable_token_indices", None) or [], len(embedding_table(model))
    groups = rows.values() if isinstance(rows, dict) else [rows]
    if wrong := [row for group in groups for row in group if not 0 <= row < size]:
        raise UserError(f"`peft_config`: `trainable_token_indices` {wrong} are none of {size} rows of the embedding.")
    names = [name for name, _ in model.named_modules()]
    for wanted in getattr(config, "modules_to_save", None) or []:
        if not any(name.endswith(wanted) for name in names):
            raise UserError(f"`peft_config`: `modules_to_save` has {wanted!r}, which is no module of the model.")
