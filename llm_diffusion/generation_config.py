"""Settings and result of decoding.

Trade-off: a `GenerationConfig` subclass that refuses unknown keys, so that a misspelt setting is an error and the hosts' own
settings files still load. Alternative: a dataclass of our own, which `pipeline` and TRL's callbacks could not pass through.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput

from . import unmasking

# What of the host's settings has a meaning here, or none that could matter; any other that is set is refused, never ignored.
HONOURED = {
    *(
        "max_new_tokens",
        "do_sample",
        "temperature",
        "top_k",
        "top_p",
        "suppress_tokens",
        "use_cache",
        "return_dict_in_generate",
    ),
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version"),
    *("_from_model_config", "_commit_hash", "cache_implementation", "disable_compile"),
}
NEUTRAL = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
}


class DiffusionGenerationConfig(GenerationConfig):
    """Decoding settings; a `GenerationConfig` that refuses keys unknown to both.

    Args:
        max_new_tokens: longest answer (default 128).
        steps: denoising steps over the whole canvas; None is one token a step. Ignored where `threshold` is set.
        block_length: tokens of a block; None is the whole canvas at once.
        grow_canvas: whether blocks after the active one do not exist yet, instead of standing there as masks.
        remasking: what orders the commits: "low_confidence", "random", "entropy" or "margin".
        threshold: commit every token at or above this confidence, in (0, 1]; at least one a step.
        temperature: 0.0 is greedy; above, tokens are sampled (with `top_p`, `top_k`).
        mask_token_id: defaults to `config.diffusion`.
        verify: whether the base accepts what the adapter drafts; None: of models converted with `attention="lossless"`, and of no other.
        draft_outcomes: of lossless decoding, for how many places where a draft may end the next one is made in the same pass, the block's
            length is all; None is as many as cost little on the device at hand, 0 drafts in a pass of its own.
        eos_early_stop: stop a row when an EOS is committed and no mask is left before it.
        seed: of sampling and of random order.
        output_history: keep the canvas after every step.
    """

    def __init__(self, **kwargs: Any) -> None:
        self.steps = kwargs.pop("steps", None)
        self.block_length = kwargs.pop("block_length", None)
        self.grow_canvas = kwargs.pop("grow_canvas", False)
        self.remasking = kwargs.pop("remasking", "low_confidence")
        self.threshold = kwargs.pop("threshold", None)
        self.verify = kwargs.pop("verify", None)
        self.draft_outcomes = kwargs.pop("draft_outcomes", None)
        self.mask_token_id = kwargs.pop("mask_token_id", None)
        self.eos_early_stop = kwargs.pop("eos_early_stop", True)
        self.seed = kwargs.pop("seed", 0)
        self.output_history = kwargs.pop("output_history", False)
        # The host refuses a temperature of 0.0, which is our greedy; its `do_sample` keeps its meaning.
        temperature = kwargs.pop("temperature", None)
        if kwargs.get("do_sample") is False:
            temperature = 0.0
        temperature = (1.0 if kwargs.get("do_sample") else 0.0) if temperature is None else temperature
        known = set(vars(GenerationConfig())) | {"_from_model_config", "_commit_hash", "generation_kwargs"}
        unknown = sorted(set(kwargs) - known)
        if unknown:
            raise ValueError(f"Unknown generation setting(s) {unknown}; see DiffusionGenerationConfig.")
        for name in sorted(set(kwargs) - HONOURED):
            if kwargs[name] not in (None, False, 0, NEUTRAL.get(name)):
                raise ValueError(f"`{name}` is not supported when decoding by unmasking, got {kwargs[name]!r}.")
        kwargs.setdefault("max_new_tokens", 128)
        super().__init__(**kwargs)
        self.temperature = temperature
        self.check()

    def check(self) -> None:
        """Raises ValueError, naming the value, for settings outside their range."""
        for name in ("steps", "block_length", "max_new_tokens", "seed", "top_k", "draft_outcomes"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) and (value is not None or name == "seed"):
                raise ValueError(f"`{name}` must be a whole number, got {value!r}.")
            if value is not None and value < 1 and name not in ("seed", "top_k", "draft_outcomes"):
                raise ValueError(f"`{name}` must be at least 1, got {value}.")
        if self.draft_outcomes is not None and self.draft_outcomes < 0:
            raise ValueError(f"`draft_outcomes` must not be negative, got {self.draft_outcomes}.")
        if self.verify not in (None, True, False):
            raise ValueError(f"`verify` must be true or false, got {self.verify!r}.")
        for name in ("threshold", "top_p", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise ValueError(f"`{name}` must be a number, got {value!r}.")
            if value is not None and name != "temperature" and not 0 < value <= 1:
                raise ValueError(f"`{name}` must be in (0, 1], got {value}.")
        if self.temperature < 0:
            raise ValueError(f"`temperature` must not be negative, got {self.temperature}.")
        if self.remasking not in unmasking.CONFIDENCES:
            raise ValueError(f"`remasking` must be one of {unmasking.CONFIDENCES}, got {self.remasking!r}.")


@dataclass
class DiffusionOutput(ModelOutput):
    """What decoding returns.

    Args:
        sequences: (B, L) token ids, prompt included.
        nfe: (B,) forward passes each row took part in.
        tokens_per_forward: (B,) answer tokens, through the EOS, over `nfe`.
        accepted: (B, cycles) tokens that each verification of lossless decoding yielded, the base's own included; -1: row was done.
        history: canvases (B, L) after every step, when asked for; not yet written blocks are masks.
    """

    sequences: torch.Tensor | None = None
    nfe: torch.Tensor | None = None
    tokens_per_forward: torch.Tensor | None = None
    accepted: torch.Tensor | None = None
    history: list[torch.Tensor] | None = None
