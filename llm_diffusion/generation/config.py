"""Settings and result of decoding.

Trade-off: a `GenerationConfig` subclass that refuses unknown keys, so that a misspelt setting is an error and the hosts' own
settings files still load. Alternative: a dataclass of our own, which `pipeline` and TRL's callbacks could not pass through.
"""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig

from .. import UserError
from .commit_rules import (
    CONFIDENCES,
)

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
        "num_return_sequences",
        "repetition_penalty",
        "bad_words_ids",
        "guidance_scale",
    ),
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version"),
    *("_from_model_config", "_commit_hash", "cache_implementation", "disable_compile"),
}
REVISIONS = ("p2", "remdm", "remdm-rescale", "remdm-conf", "remdm-loop")
NEUTRAL = {
    "num_beams": 1,
    "repetition_penalty": 1.0,
    "length_penalty": 1.0,
    "typical_p": 1.0,
}


class DiffusionGenerationConfig(GenerationConfig):
    """Decoding settings; a `GenerationConfig` that refuses keys unknown to both. `docs/decoding.md` says which to use when.

    Args:
        max_new_tokens: longest answer (default 128).
        steps: denoising steps over the whole canvas; None is one token a step. Ignored under `threshold`, `factor`, `entropy_bound`.
        block_length: tokens of a block; None is the whole canvas at once.
        grow_canvas: whether blocks after the active one do not exist yet, instead of standing there as masks.
        approximate_cache: of bidirectional models, keep keys and values between the passes of a block: "prefix" those before the block,
            "dual" those behind it too (Fast-dLLM). Faster, and not the model's own answers; None, the default, computes all of them.
        cache_refresh_steps: passes from one full computation to the next within a block; None: once a block; 1 is exact again.
        length_quantile: size every row's canvas by the length that the model foresees at the first step, which holds the answer with this
            probability, in (0, 1); None: the canvas has `max_new_tokens`. For models trained with `max_canvas`.
        length_margin: tokens more than foreseen.
        initial_length: canvas of that first step, doubled until the answer ends in it.
        remasking: what orders the commits: "low_confidence", "random", "entropy", "margin" or "left_to_right".
        alg_temp: temperature of that order (Dream); None or 0 is none.
        threshold: commit every token at or above this confidence, in (0, 1]; at least one a step.
        factor: commit the n surest tokens while (n + 1) (1 - confidence) <= factor (Fast-dLLM).
        entropy_bound: commit the surest tokens while their entropies, the largest left out, sum to at most this, in nats (EB-Sampler).
        revision: whether committed tokens may become masks again: "p2", or by chance "remdm" (ReMDM-cap), "remdm-rescale", "remdm-conf" or
            "remdm-loop". All take all `steps`.
        eta: of ReMDM, in [0, 1]: the highest probability a step, or (rescale, conf) a factor of the highest possible one.
        remdm_loop: of "remdm-loop", [t_on, t_off, alpha_on], 0 < t_off < t_on < 1: while time falls from t_on to t_off the share of
            committed tokens stays alpha_on, and they are revised (default [0.55, 0.05, 0.9]).
        editing_threshold: replace a committed token of the active block when another has more than this probability (LLaDA2.1).
        max_post_steps: of editing, steps over a block after its last mask (default 16).
        temperature: 0.0 is greedy; above, tokens are sampled (with `top_p`, `top_k`).
        guidance_scale: classifier-free guidance, 1 is none; two forward passes a step. LLaDA's `cfg_scale`, which is understood, plus 1.
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
        self.approximate_cache = kwargs.pop("approximate_cache", None)
        self.cache_refresh_steps = kwargs.pop("cache_refresh_steps", None)
        self.length_quantile = kwargs.pop("length_quantile", None)
        self.length_margin = kwargs.pop("length_margin", 0)
        self.initial_length = kwargs.pop("initial_length", 64)
        self.remasking = kwargs.pop("remasking", "low_confidence")
        self.alg_temp = kwargs.pop("alg_temp", None)
        self.threshold = kwargs.pop("threshold", None)
        self.factor = kwargs.pop("factor", None)
        self.entropy_bound = kwargs.pop("entropy_bound", None)
        self.revision = kwargs.pop("revision", None)
        self.eta = kwargs.pop("eta", None)
        self.remdm_loop = kwargs.pop("remdm_loop", None)
        self.editing_threshold = kwargs.pop("editing_threshold", None)
        self.max_post_steps = kwargs.pop("max_post_steps", 16)
        if (cfg_scale := kwargs.pop("cfg_scale", None)) is not None:
            if kwargs.get("guidance_scale") is not None:
                raise UserError(
                    "`cfg_scale` and `guidance_scale` are one setting, the second 1 above; give one of them."
                )
            kwargs["guidance_scale"] = _number("cfg_scale", cfg_scale, 0) + 1
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
            raise UserError(f"Unknown generation setting(s) {unknown}; see DiffusionGenerationConfig.")
        for name in sorted(set(kwargs) - HONOURED):
            if kwargs[name] not in (None, False, 0, NEUTRAL.get(name)):
                raise UserError(f"`{name}` is not supported when decoding by unmasking, got {kwargs[name]!r}.")
        kwargs.setdefault("max_new_tokens", 128)
        copies = kwargs.pop("num_return_sequences", None)  # the host allows them under `do_sample` alone
        super().__init__(**kwargs)
        self.num_return_sequences = copies
        self.temperature = temperature
        self.check()

    @property
    def revises(self) -> bool:
        """Whether committed tokens may change."""
        return self.revision is not None or self.editing_threshold is not None

    @property
    def guided(self) -> bool:
        """Whether a second pass, without the prompt, is made in every step."""
        return self.guidance_scale not in (None, 1)

    def check(self) -> None:
        """Raises ValueError, naming the value, for settings outside their range or against each other."""
        self._check_ranges()
        self._check_more_ranges()
        self._check_rules()
        self._check_cache()
        self._check_words()

    def _check_ranges(self) -> None:
        whole = ("steps", "block_length", "max_new_tokens", "seed", "top_k", "draft_outcomes", "cache_refresh_steps")
        for name in whole:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) and (value is not None or name == "seed"):
                raise UserError(f"`{name}` must be a whole number, got {value!r}.")
            if value is not None and value < 1 and name not in ("seed", "top_k", "draft_outcomes"):
                raise UserError(f"`{name}` must be at least 1, got {value}.")
        if self.draft_outcomes is not None and self.draft_outcomes < 0:
            raise UserError(f"`draft_outcomes` must not be negative, got {self.draft_outcomes}.")
        if self.verify not in (None, True, False):
            raise UserError(f"`verify` must be true or false, got {self.verify!r}.")
        for name in ("threshold", "top_p", "temperature"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float | None):
                raise UserError(f"`{name}` must be a number, got {value!r}.")
            if value is not None and name != "temperature" and not 0 < value <= 1:
                raise UserError(f"`{name}` must be in (0, 1], got {value}.")
        if self.temperature < 0:
            raise UserError(f"`temperature` must not be negative, got {self.temperature}.")
        if self.remasking not in CONFIDENCES:
            raise UserError(f"`remasking` must be one of {CONFIDENCES}, got {self.remasking!r}.")
        if self.revision not in (None, *REVISIONS):
            raise UserError(f"`revision` must be one of {REVISIONS} or None, got {self.revision!r}.")

    def _check_more_ranges(self) -> None:
        ranges = {"alg_temp": None, "entropy_bound": None, "guidance_scale": None, "eta": 1, "editing_threshold": 1}
        for name, highest in ranges.items():
            if getattr(self, name) is not None:
                _number(name, getattr(self, name), 0, highest)
        for name in ("factor", "repetition_penalty"):
            if getattr(self, name) is not None and not _number(name, getattr(self, name), 0):
                raise UserError(f"`{name}` must be above 0, got {getattr(self, name)!r}.")
        if self.length_quantile is not None and not 0 < _number("length_quantile", self.length_quantile, 0) < 1:
            raise UserError(f"`length_quantile` must be in (0, 1), got {self.length_quantile}.")
        least = {"max_post_steps": 0, "num_return_sequences": 1, "length_margin": 0, "initial_length": 1}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < lowest):
                raise UserError(f"`{name}` must be a whole number, at least {lowest}, got {value!r}.")

    def _check_rules(self) -> None:
        """One rule decides; what would be ignored beside it is refused."""
        rules = [name for name in ("threshold", "factor", "entropy_bound") if getattr(self, name) is not None]
        rules += ["revision"] if self.revision else []
        chosen = f"`{rules[0]}`={getattr(self, rules[0])!r}" if rules else ""
        if len(rules) > 1:
            raise UserError(
                f"{chosen} and `{rules[1]}`={getattr(self, rules[1])!r}: each is a rule of its own; give one."
            )
        if rules and self.alg_temp:
            raise UserError(f"`alg_temp`={self.alg_temp}: {chosen} does not deal out quotas; leave one out.")
        if self.alg_temp and self.remasking in ("random", "left_to_right"):
            raise UserError(f"`alg_temp`={self.alg_temp} means nothing where `remasking` is {self.remasking!r}.")
        if rules and rules[0] in ("threshold", "factor") and self.remasking in ("entropy", "left_to_right"):
            raise UserError(f"{chosen} is compared with probabilities, which `remasking`={self.remasking!r} has not.")
        if self.revision and not self.steps:
            raise UserError(f"{chosen} needs `steps`, over which it is spread.")
        if self.revision and self.editing_threshold is not None:
            raise UserError(f"{chosen} and `editing_threshold`={self.editing_threshold}: give one of them.")
        if self.revision == "p2" and self.remasking in ("random", "left_to_right"):
            raise UserError(f"`revision`='p2' plans by confidence, which `remasking`={self.remasking!r} has not.")
        self._check_remdm()

    def _check_remdm(self) -> None:
        by_chance = self.revision not in (None, "p2")
        if by_chance != (self.eta is not None):
            raise UserError(f"`eta`={self.eta!r} belongs to `revision`='remdm' and its kin, got {self.revision!r}.")
        if by_chance and self.remasking != "random":
            raise UserError(
                f"`revision`={self.revision!r} goes by chance: it needs `remasking`='random', got {self.remasking!r}."
            )
        if self.remdm_loop is None:
            return
        if self.revision != "remdm-loop":
            raise UserError(
                f"`remdm_loop`={self.remdm_loop!r} belongs to `revision`='remdm-loop', got {self.revision!r}."
            )
        times = self.remdm_loop if isinstance(self.remdm_loop, list | tuple) else []
        numbers = [value for value in times if isinstance(value, int | float) and 0 < value < 1]
        if len(times) != 3 or len(numbers) != 3 or numbers[1] >= numbers[0]:
            raise UserError(
                f"`remdm_loop` must be [t_on, t_off, alpha_on], each in (0, 1) and t_off below t_on, got {self.remdm_loop!r}."
            )

    def _check_cache(self) -> None:
        kind, steps = self.approximate_cache, self.cache_refresh_steps
        if kind not in (None, "prefix", "dual"):
            raise UserError(f"`approximate_cache` must be 'prefix', 'dual' or None, got {kind!r}.")
        if kind and self.use_cache is False:
            raise UserError(f"`approximate_cache`={kind!r} and `use_cache`=False contradict each other; give one.")
        if steps is not None and not kind:
            raise UserError(f"`cache_refresh_steps`={steps} belongs to `approximate_cache`, which is not set.")

    def _check_words(self) -> None:
        words = self.bad_words_ids
        if words is not None and not (
            isinstance(words, list) and all(isinstance(word, list) and word for word in words)
        ):
            raise UserError(f"`bad_words_ids` must be a list of lists of token ids, got {words!r}.")
        if words and self.revises and any(len(word) > 1 for word in words):
            raise UserError("`bad_words_ids` of several tokens cannot be kept out where committed tokens are revised.")
        copies = self.num_return_sequences or 1
        if copies > 1 and not (self.temperature or self.alg_temp or self.remasking == "random"):
            raise UserError(
                f"`num_return_sequences`={copies}: greedy decoding has one answer; set `temperature` above 0, or `do_sample`."
            )


def _number(name: str, value: Any, lowest: float, highest: float | None = None) -> float:
    """The value, if it is a number of that range."""
    inside = not isinstance(value, bool) and isinstance(value, int | float) and lowest <= value
    if not inside or highest is not None and value > highest:
        wanted = f"at least {lowest}" if highest is None else f"in [{lowest}, {highest}]"
        raise UserError(f"`{name}` must be a number, {wanted}, got {value!r}.")
    return value
