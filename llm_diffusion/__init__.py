"""Turns an autoregressive language model into a diffusion language model, with the Hugging Face tools you already use.

import llm_diffusion as ld

model, tokenizer = ld.load_diffusion_model("tiny")          # load and convert
ld.DiffusionSFTTrainer, ld.DiffusionSFTConfig                # train (TRL)
ld.DiffusionDPOTrainer, ld.DiffusionDPOConfig                # preferences (TRL)
ld.DiffusionKTOTrainer, ld.DiffusionKTOConfig                # answers that are good or bad (TRL)
ld.DiffusionGRPOTrainer, ld.DiffusionGRPOConfig              # rewards (TRL)
ld.generate, ld.DiffusionGenerationConfig                    # decode by iterative unmasking
ld.DiffusionInference.from_pretrained(path).chat(messages)   # text in, text out
ld.evaluate, ld.log_likelihood_bound                         # measure
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

# PEFT imports bitsandbytes wherever it is installed, which on some processors warns of a kernel that nobody asked for.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


class UserError(ValueError):
    """What a caller got wrong, in one sentence: the setting or file, what was found, what was expected, what to do.

    The command line prints it without a traceback; any other error is a fault of ours.
    """


_PUBLIC = {
    "load_diffusion_model": "models.loading",
    "convert_to_diffusion": "models.conversion",
    "probe_attention": "models.probing",
    "patch_causal_attention": "models.attention",
    "DiffusionSFTConfig": "training.config",
    "DiffusionSFTTrainer": "training.sft",
    "DiffusionDPOConfig": "training.config",
    "DiffusionDPOTrainer": "training.dpo",
    "DiffusionKTOConfig": "training.config",
    "DiffusionKTOTrainer": "training.kto",
    "DiffusionGRPOConfig": "training.config",
    "DiffusionGRPOTrainer": "training.grpo",
    "DataCollatorForMaskedDiffusion": "training.collator",
    "DataCollatorForDiffusionPreference": "training.collator",
    "generate": "generation.generate",
    "generate_autoregressive": "generation.generate",
    "DiffusionGenerationConfig": "generation.config",
    "DiffusionInference": "generation.inference",
    "preference_pairs": "reasoning.pairs",
    "evaluate": "evaluation.evaluate",
    "log_likelihood_bound": "evaluation.likelihood",
}
__all__ = sorted([*_PUBLIC, "UserError"])


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PUBLIC[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
