"""Turns an autoregressive language model into a diffusion language model, with the Hugging Face tools you already use.

import llm_diffusion as ld

model, tokenizer = ld.load_diffusion_model("tiny")          # load and convert
ld.DiffusionSFTTrainer, ld.DiffusionSFTConfig                # train (TRL)
ld.DiffusionDPOTrainer, ld.DiffusionDPOConfig                # preferences (TRL)
ld.generate, ld.DiffusionGenerationConfig                    # decode by iterative unmasking
ld.DiffusionInference.from_pretrained(path).chat(messages)   # text in, text out
ld.evaluate, ld.log_likelihood_bound                         # measure
"""

from __future__ import annotations

import importlib
from typing import Any

_PUBLIC = {
    "load_diffusion_model": "modeling",
    "convert_to_diffusion": "modeling",
    "probe_attention": "probing",
    "patch_causal_attention": "attention",
    "DiffusionSFTConfig": "trainers.sft_config",
    "DiffusionSFTTrainer": "trainers.sft",
    "DiffusionDPOConfig": "trainers.dpo_config",
    "DiffusionDPOTrainer": "trainers.dpo",
    "DataCollatorForMaskedDiffusion": "collators",
    "DataCollatorForDiffusionPreference": "preference_collator",
    "generate": "generation",
    "generate_autoregressive": "generation",
    "DiffusionGenerationConfig": "generation_config",
    "DiffusionInference": "inference",
    "preference_pairs": "preferences",
    "evaluate": "evaluation_report",
    "log_likelihood_bound": "likelihood",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
