"""Settings of decoding, each declared once: a `GenerationConfig` that refuses unknown keys, so that a misspelt one is an error.

What a model decodes with is laid over each other in this order, see `decoding_settings` and `generate`:

    defaults of its attention  <  its generation_config.json  <  a given config  <  keywords
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import GenerationConfig

from .. import UserError
from ..models.patching import base_of
from ..models.record import DiffusionRecord, autoregressive_config, decoding_defaults, layered, record_of
from ..objective.settings import check_value, hints_of, read_setting, setting
from .commit_rules import CONFIDENCES, NOT_PROBABILITIES

REVISIONS = ("p2", "remdm", "remdm-rescale", "remdm-conf", "remdm-loop")
RULES = ("threshold", "factor", "entropy_bound", "revision")
_OF_UNMASKING = ("guidance_scale", "repetition_penalty", "bad_words_ids", "revision", "editing_threshold", "alg_temp")


@dataclass
class UnmaskingSettings:
    """What `generate` of a converted model takes; `docs/decoding.md` says which to use when."""

    max_new_tokens: int = setting(128, "Longest answer, in tokens.", min=1)
    threshold: float | None = setting(None, "Commit all tokens at or above this confidence.", above=0, max=1)
    factor: float | None = setting(
        None, "Commit the n surest tokens while (n + 1) (1 - confidence) is at most this (Fast-dLLM).", above=0
    )
    entropy_bound: float | None = setting(
        None, "Commit the surest while all their entropies but the largest sum to so many nats (EB-Sampler).", min=0
    )
    steps: int | None = setting(None, "Without these rules: passes over the whole canvas; None: one a token.", min=1)
    remasking: str = setting("low_confidence", "What orders the commits.", choices=CONFIDENCES)
    alg_temp: float | None = setting(None, "Temperature of that order (Dream); None or 0: none.", min=0)
    block_length: int | None = setting(None, "Tokens of a block; None: the whole canvas at once.", min=1)
    grow_canvas: bool = setting(False, "Later blocks do not exist yet, instead of being masks.", choices=(True, False))
    length_quantile: float | None = setting(
        None, "Canvases that hold the answer with this probability; None: `max_new_tokens`.", above=0, below=1
    )
    length_margin: int = setting(0, "Tokens more than predicted by `length_quantile`.", min=0)
    initial_length: int = setting(64, "Canvas of that prediction, doubled until the answer ends in it.", min=1)
    revision: str | None = setting(
        None, "Committed tokens become masks again, by confidence (P2) or chance (ReMDM).", choices=REVISIONS
    )
    eta: float | None = setting(
        None, "Of ReMDM: highest probability a step, or (rescale, conf) a factor of it.", min=0, max=1
    )
    remdm_loop: list[float] | None = setting(
        None, "Of remdm-loop: [t_on, t_off, share of committed tokens between these times]; None: [0.55, 0.05, 0.9]."
    )
    editing_threshold: float | None = setting(
        None, "Replace a committed token when another is more probable than this (LLaDA2.1).", min=0, max=1
    )
    max_post_steps: int = setting(16, "Of editing: passes over a block after its last mask.", min=0)
    approximate_cache: str | None = setting(
        None, "Keep keys and values before a block, or behind it too (dual).", choices=("prefix", "dual")
    )
    cache_refresh_steps: int | None = setting(
        None, "Passes from one full computation to the next within a block; None: once a block; 1: exact again.", min=1
    )
    temperature: float = setting(0.0, "0.0 is greedy; `do_sample=True` alone is 1.0.", min=0)
    top_k: int | None = setting(None, "Sample among so many best tokens; None or 0: all.", min=0)
    top_p: float | None = setting(None, "Sample among the fewest tokens that hold this probability.", above=0, max=1)
    guidance_scale: float | None = setting(
        None, "Classifier-free guidance, 1 is none; two passes a step. LLaDA's `cfg_scale` is one less.", min=0
    )
    repetition_penalty: float | None = setting(None, "On tokens that are committed anywhere; 1 is none.", above=0)
    num_return_sequences: int | None = setting(None, "Answers to each prompt.", min=1)
    seed: int = setting(0, "Of sampling and of random order.", min=0)
    eos_early_stop: bool = setting(
        True, "A row ends with an end token that no mask is left before.", choices=(True, False)
    )
    verify: bool | None = setting(
        None, "Whether the base verifies drafts; None: where `attention` is lossless.", choices=(True, False)
    )
    draft_outcomes: int | None = setting(
        None,
        "Of lossless decoding: ends of a draft that the next is made for in advance; None: what is fastest on this machine.",
        min=0,
    )
    mask_token_id: int | None = setting(None, "None: that of `config.diffusion`.", min=0)
    output_history: bool = setting(False, "Keep the canvas after every pass.", choices=(True, False))


_TRANSFORMERS = set(vars(GenerationConfig()))
_OURS = {field.name: field.default for field in fields(UnmaskingSettings)}
# What else of transformers' settings has a meaning here, or none that could matter; others are refused when set, never ignored.
_TAKEN = {
    *("do_sample", "suppress_tokens", "use_cache", "return_dict_in_generate", "bad_words_ids"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id", "transformers_version"),
    *("_from_model_config", "_commit_hash", "cache_implementation", "disable_compile", *_OURS),
}
_IDS, _FLAG = list[int] | None, bool | None
_TYPES = {
    **{"suppress_tokens": _IDS, "bad_words_ids": list[list[int]] | None, "eos_token_id": int | _IDS},
    **dict.fromkeys(("pad_token_id", "bos_token_id"), int | None),
    **dict.fromkeys(("do_sample", "use_cache", "return_dict_in_generate"), _FLAG),
}
NEUTRAL = {"num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1.0, "typical_p": 1.0, "guidance_scale": 1}


class DiffusionGenerationConfig(GenerationConfig):
    """The settings of `UnmaskingSettings` and those of `GenerationConfig` that mean something here.

    Raises:
        UserError: a key unknown to both, a value outside its range, or settings that contradict each other.
    """

    def __init__(self, **kwargs: Any) -> None:
        kwargs = _in_our_terms(kwargs)
        check_given(kwargs)
        for name in set(_OURS) - _TRANSFORMERS:
            setattr(self, name, kwargs.pop(name, _OURS[name]))
        if unknown := sorted(set(kwargs) - _TRANSFORMERS - {"_from_model_config", "_commit_hash", "generation_kwargs"}):
            raise UserError(f"Unknown generation setting(s) {unknown}; see DiffusionGenerationConfig.")
        for name in sorted(set(kwargs) - _TAKEN):
            if kwargs[name] not in (None, False, 0, NEUTRAL.get(name)):
                raise UserError(f"`{name}` is not supported when decoding by unmasking, got {kwargs[name]!r}.")
        # transformers refuses a temperature of 0.0, our greedy, and several answers without `do_sample`.
        ours = {name: kwargs.pop(name) for name in ("temperature", "num_return_sequences") if name in kwargs}
        super().__init__(**kwargs)
        self.temperature, self.num_return_sequences = ours["temperature"], ours.get("num_return_sequences")
        self._refuse(self._conflicts())

    @property
    def revises(self) -> bool:
        """Whether committed tokens may change."""
        return self.revision is not None or self.editing_threshold is not None

    @property
    def guided(self) -> bool:
        """Whether a second pass, without the prompt, is made in every step."""
        return self.guidance_scale not in (None, 1)

    def _conflicts(self) -> Iterator[tuple[Any, str, str]]:
        """(whether it is there, the setting, what is wrong with it) of settings that need or exclude another one."""
        rules = [name for name in RULES if getattr(self, name) is not None]
        rule, other = (*rules, "", "")[:2]
        order, by_order = f"`remasking`={self.remasking!r}", self.remasking in ("random", "left_to_right")
        by_chance, loop = self.revision not in (None, "p2"), self.remdm_loop is not None
        yield other, rule, f"and `{other}` are each a rule of its own; give one"
        yield rule and self.alg_temp, "alg_temp", f"needs quotas, which `{rule}` does not deal out; leave one out"
        yield self.alg_temp and by_order, "alg_temp", f"means nothing beside {order}"
        compared = rule in ("threshold", "factor") and self.remasking in NOT_PROBABILITIES
        yield compared, rule, f"is compared with probabilities, which {order} has not"
        yield self.revision and not self.steps, "revision", "needs `steps`, over which it is spread"
        yield self.revision == "p2" and by_order, "revision", f"plans by confidence, which {order} has not"
        yield by_chance and self.remasking != "random", "revision", "goes by chance: it needs `remasking`='random'"
        edits = self.editing_threshold is not None
        yield self.revision and edits, "editing_threshold", "and `revision` both change what is committed; give one"
        misplaced = by_chance != (self.eta is not None)
        yield misplaced, "eta", f"belongs to ReMDM's kinds of `revision`, got {self.revision!r}"
        yield loop and self.revision != "remdm-loop", "remdm_loop", "belongs to `revision`='remdm-loop'"
        wrong = loop and not _is_loop(self.remdm_loop)
        yield wrong, "remdm_loop", "must be [t_on, t_off, alpha_on], each in (0, 1) and t_off below t_on"
        cache, uncached = self.approximate_cache, self.use_cache is False
        yield cache and uncached, "approximate_cache", "contradicts `use_cache`=False; give one"
        yield self.cache_refresh_steps and not cache, "cache_refresh_steps", "belongs to `approximate_cache`"
        words = self.bad_words_ids or []
        lists = isinstance(words, list) and all(isinstance(word, list) and word for word in words)
        yield not lists, "bad_words_ids", "must be a list of lists of token ids"
        several = self.revises and any(len(word) > 1 for word in words)
        yield several, "bad_words_ids", "of several tokens cannot be kept out where committed tokens are revised"
        greedy = not (self.temperature or self.alg_temp or self.remasking == "random")
        copies = greedy and (self.num_return_sequences or 1) > 1
        yield copies, "num_return_sequences", "of greedy decoding are all the same; set `temperature` above 0"

    def _useless(self, record: DiffusionRecord) -> Iterator[tuple[Any, str, str]]:
        """The same of settings that mean nothing to a model."""
        mode, length, sized = record.mode, record.block_length, self.length_quantile
        exact = mode.has_blocks and self.approximate_cache
        yield exact, "approximate_cache", f"and `attention`={record.attention!r}, whose cache is exact; leave it out"
        other = length and self.block_length not in (None, length)
        yield other, "block_length", f"of a model that was converted with blocks of {length}; leave it out"
        yield mode.has_blocks and sized, "length_quantile", "sizes canvases, and blocks end by themselves; leave it out"
        yield self.eos_token_id is None and sized, "length_quantile", "needs an end token, and `eos_token_id` is None"
        yield self.verify and not mode.drafts, "verify", "needs an adapter trained with `attention`='lossless'"
        yield self.verify is False and mode.drafts, "verify", "of a lossless adapter, which can only draft for its base"
        ends = self.eos_early_stop or not mode.drafts
        yield not ends, "eos_early_stop", "of a base, which is not decoded behind its end token; leave it out"
        for name in _OF_UNMASKING:
            wrong = mode.drafts and getattr(self, name) not in (None, 0, [], NEUTRAL.get(name))
            yield wrong, name, "of lossless decoding, which gives the base's own text without it; leave it out"

    def check_model(self, record: DiffusionRecord, processors: Any = None) -> None:
        """Refuses settings, and `processors` of a call, that a model has no use for."""
        self._refuse(self._useless(record))
        if record.mode.drafts and processors:
            raise UserError("`logits_processor`: lossless decoding gives the base's own text; leave it out.")

    def _refuse(self, conflicts: Iterator[tuple[Any, str, str]]) -> None:
        for wrong, name, why in conflicts:
            if wrong:
                raise UserError(f"`{name}`={getattr(self, name)!r} {why}.")


def check_given(kwargs: dict[str, Any]) -> None:
    """Raises UserError, naming it, for a setting of another type or out of its range."""
    for name, value in kwargs.items():
        if name in _OURS:
            field = UnmaskingSettings.__dataclass_fields__[name]
            check_value(name, value, hints_of(UnmaskingSettings)[name], dict(field.metadata.items()), field.default)
        elif name in _TYPES:
            read_setting(name, value, _TYPES[name], {"min": 0} if "id" in name or "tokens" in name else {})


def _in_our_terms(kwargs: dict[str, Any]) -> dict[str, Any]:
    """LLaDA's name of guidance, what `do_sample` says of the temperature, and how long an answer is."""
    kwargs = dict(kwargs)
    if (scale := kwargs.pop("cfg_scale", None)) is not None:
        if kwargs.get("guidance_scale") is not None:
            raise UserError("`cfg_scale` and `guidance_scale` are one setting, the second 1 above; give one of them.")
        if isinstance(scale, bool) or not isinstance(scale, int | float) or scale < 0:
            raise UserError(f"`cfg_scale` must be a number, at least 0, got {scale!r}.")
        kwargs["guidance_scale"] = scale + 1
    if kwargs.get("do_sample") is False:
        kwargs["temperature"] = 0.0
    elif kwargs.get("temperature") is None:
        kwargs["temperature"] = 1.0 if kwargs.get("do_sample") else 0.0
    if kwargs.get("max_new_tokens") is None:
        kwargs["max_new_tokens"] = _OURS["max_new_tokens"]
    return kwargs


def _is_loop(times: Any) -> bool:
    inside = isinstance(times, list | tuple) and [isinstance(t, int | float) and 0 < t < 1 for t in times]
    return inside == [True] * 3 and times[1] < times[0]


def check_room(model: torch.nn.Module, text: int, new: int, setting: str = "max_new_tokens") -> None:
    """Raises UserError where `text` and `new` tokens are more than the model has positions."""
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and text + new > limit:
        raise UserError(f"`{setting}`: {text} tokens and {new} new ones exceed the model's {limit} positions.")


def check_one_answer(settings: dict[str, Any]) -> None:
    """Raises UserError for settings that give a prompt several answers, where one is expected."""
    if (copies := settings.get("num_return_sequences") or 1) > 1:
        raise UserError(f"`num_return_sequences`={copies}: a request gets one answer; leave it out.")


def saved_settings(model: torch.nn.Module) -> dict[str, Any]:
    """Those of a model's `generation_config` that unmasking takes; none where no converted model was saved with it.

    `max_new_tokens` and our own settings: sampling, penalties and the like are the autoregressive model's there.
    """
    _, saved = autoregressive_config(base_of(model).generation_config)
    return {name: value for name, value in saved.items() if name in _OURS and value is not None}


def given_settings(config: GenerationConfig) -> dict[str, Any]:
    """Those of a config that differ from the defaults."""
    aside = ("transformers_version", "max_length")
    changed = {name: value for name, value in config.to_diff_dict().items() if name not in aside}
    return {name: value for name, value in changed.items() if name in _TRANSFORMERS or value != _OURS.get(name)}


def decoding_settings(model: torch.nn.Module, chosen: dict[str, Any] | None = None) -> dict[str, Any]:
    """`chosen` settings over those that a model was saved with, or else over the defaults of its attention."""
    return layered(saved_settings(model) or decoding_defaults(record_of(model)), chosen or {})
