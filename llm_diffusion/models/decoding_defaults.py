"""What decoding starts from: the defaults of a model's attention, saved with it as its generation_config.json."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from .patching import base_of
from .record import DiffusionRecord, record_of

RULES = ("threshold", "factor", "entropy_bound", "steps", "revision", "alg_temp")


def decoding_defaults(record: DiffusionRecord) -> dict[str, Any]:
    """Settings for a converted model; its mask token among them marks them as those of unmasking."""
    defaults = {"mask_token_id": record.mask_token_id, "max_new_tokens": 128}
    if not record.mode.drafts:
        defaults["threshold"] = 0.95
    if not record.mode.has_blocks:
        defaults |= {"block_length": 16, "grow_canvas": True}
    return defaults


def layered(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, where a rule of committing or a canvas displaces another one instead of meeting it."""
    displaced: set[str] = set()
    if any(above.get(name) is not None for name in RULES) or above.get("remasking") in ("entropy", "left_to_right"):
        displaced |= {"threshold", "factor", "entropy_bound"}
    if "block_length" in above or above.get("length_quantile") is not None:
        displaced |= {"block_length", "grow_canvas"}
    return {name: value for name, value in below.items() if name not in displaced} | above


def autoregressive_config(config: GenerationConfig) -> tuple[GenerationConfig, dict[str, Any]]:
    """A copy of a generation_config without what was saved for unmasking, and that; nothing where no mask token is in it."""
    config, plain, saved = copy.deepcopy(config), vars(GenerationConfig()), {}
    if getattr(config, "mask_token_id", None) is not None:
        saved = {name: value for name, value in vars(config).items() if name not in plain and not name.startswith("_")}
        for name in saved:
            delattr(config, name)
        saved["max_new_tokens"], config.max_new_tokens = config.max_new_tokens, None
    return config, saved


def save_generation_config(model: torch.nn.Module, folder: str | Path, chosen: dict[str, Any] | None = None) -> None:
    """Writes the model's generation_config with what its decoding starts from beside a full checkpoint or an adapter.

    Args:
        chosen: settings over the defaults, and over those that the model came with; sampling is a matter of each call and left out.
    """
    config, own = autoregressive_config(base_of(model).generation_config)
    for name, value in layered(own or decoding_defaults(record_of(model)), chosen or {}).items():
        if name == "max_new_tokens" or name not in vars(GenerationConfig()):
            setattr(config, name, value)
    config._from_model_config = False  # of such files transformers reads its own keys only
    # Not `save_pretrained`, which refuses what some published bases have in theirs.
    config.to_json_file(Path(folder) / GENERATION_CONFIG_NAME, keys_to_pop=["compile_config"])
