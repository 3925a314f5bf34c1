"""Reads the flat `config.json` of GPT-2 and DiffuGPT experiments: one file for model, training and sampling, `//` comments and all.

Every key becomes one of ours or is refused with a reason; keys that mean nothing in the file's own combination (the width of a model
that is loaded, padding where nothing is padded) are left aside, and named. Keys of ours may stand beside them and win.

    key                                     becomes
    pipeline, init_from                     pipeline, model; an empty `init_from` is a model from nothing (`scratch`)
    attn_annealing_steps                    annealing: stochastic, annealing_schedule: linear, annealing_steps
    pad_masked_perc, pad_annealing_steps    pad_mask_ratio, pad_annealing_steps, where `padded_dataset` is true
    max_lr, warmup_pct, *div_factor         learning_rate, warmup_steps, lr_scheduler_type: cosine_warmup_with_min_lr
    denoising_strategy                      generation.remasking

Trade-off: a pure function of the mapping, so that nothing here knows files or models. Alternative: our own schema alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from . import UserError
from .generation.commit_rules import CONFIDENCES

NUMBER = (int, float)
GPT2, DIFFUGPT = "openai-community/gpt2", "diffusionfamily/diffugpt-s"
# What a start is called there; anything else is a folder or a name on the hub.
STARTS = {
    **{name: f"openai-community/{name}" for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")},
    "diffugpt": DIFFUGPT,
}
# Names that our own settings have too: alone they do not tell whose file it is.
SHARED = {"pipeline", "batch_size", "weight_decay", "diffusion_steps", "run_name", "pad_annealing_steps"}
Reading = Callable[[Any, dict[str, Any]], dict[str, Any]]


def strip_comments(text: str) -> str:
    """JSON without `// …`, which become blanks, so that errors still name the right column; strings stay as they are."""
    return re.sub(
        r'"(?:\\.|[^"\\\n])*"|//[^\n]*', lambda found: found[0] if found[0][0] == '"' else " " * len(found[0]), text
    )


def is_diffugpt_config(given: dict[str, Any]) -> bool:
    return bool({"pipeline", "init_from"} & set(given)) and bool((set(KEYS) - SHARED) & set(given))


def read_diffugpt_config(given: dict[str, Any]) -> dict[str, Any]:
    """Our settings for a mapping that `is_diffugpt_config` recognises.

    Raises:
        ValueError: wrong type or range, or a key that cannot be honoured, with the reason.
    """
    for key, value in given.items():
        if key in KEYS:
            _check(key, value)
    if not {"init_from", "model"} & set(given):
        raise UserError("`init_from` is missing: a folder, a name on the hub, or '' for a model from nothing.")
    aside = left_aside(given)
    settings: dict[str, Any] = {"phases": ["pretrain"], "use_lora": False}
    for key, value in given.items():
        if key in KEYS and key not in aside:
            settings = _merged(settings, KEYS[key][2](value, given))
    ours = {key: value for key, value in given.items() if key not in KEYS}
    if given.get("init_from"):
        ours.pop("model", None)  # which beside an empty `init_from` is whose tokenizer is taken
    return _merged(settings, ours)


def left_aside(given: dict[str, Any]) -> dict[str, str]:
    """Keys that mean nothing in this combination, and why."""
    aside: dict[str, str] = {}
    arm, padded = given.get("pipeline") == "arm", given.get("padded_dataset", False)
    if given.get("init_from"):
        aside |= dict.fromkeys(("n_embd", "n_layer", "n_head"), "a loaded model has its own shape")
    if arm or not padded:
        aside |= dict.fromkeys(("pad_masked_perc", "pad_annealing_steps", "pad_token_id"), "no padding is trained on")
    if arm:
        names = ("attn_annealing_steps", "mask_id", "padded_dataset", "diffusion_steps", "denoising_strategy")
        aside |= dict.fromkeys(names, "belongs to the pipeline 'diffusion'")
    return {key: why for key, why in aside.items() if key in given}


def _merged(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    both = dict(low)
    for key, value in high.items():
        both[key] = {**low[key], **value} if isinstance(value, dict) and isinstance(low.get(key), dict) else value
    return both


def _to(name: str) -> Reading:
    """Same meaning, other name; a dot leads into a nested mapping."""
    outer, _, inner = name.partition(".")
    return lambda value, given: {outer: {inner: value}} if inner else {outer: value}


def _start(value: str, given: dict[str, Any]) -> dict[str, Any]:
    if value.endswith(".ckpt"):
        raise UserError(
            f"`init_from`: {value!r} is a pickle of another trainer, which is not loaded; save the model by `save_pretrained` and name "
            "that folder."
        )
    if value:
        return {"model": STARTS.get(value, value)}
    shape = {name: given.get(name, default) for name, default in (("n_embd", 768), ("n_layer", 12), ("n_head", 12))}
    return {"model": GPT2, "scratch": {**shape, "n_positions": given.get("context_length", 1024)}}


def _resume(value: bool, given: dict[str, Any]) -> dict[str, Any]:
    if value:
        raise UserError("`resume_training`: a stopped run goes on with `--resume` and the same settings; leave it out.")
    return {}


def _padded(value: bool, given: dict[str, Any]) -> dict[str, Any]:
    """Every text is filled up to the context, what is behind its end is scored too."""
    if not value:
        return {}
    own = given.get("pad_token_id") not in (None, given.get("eos_token_id", 50256))
    tail = {"text_tails": True, "tail": "pad" if own else "eos", "random_canvas": 0.0}
    return tail | ({"max_canvas": given["context_length"]} if "context_length" in given else {})


def _annealing(value: int, given: dict[str, Any]) -> dict[str, Any]:
    """Entries of the mask open at random, with a probability that grows linearly; 0 steps: open from the start."""
    return {"annealing": "stochastic", "annealing_schedule": "linear", "annealing_steps": value} if value else {}


def _steps(value: int, given: dict[str, Any]) -> dict[str, Any]:
    return {"max_steps": value * given.get("n_epochs", 1)}


def _schedule(value: Any, given: dict[str, Any]) -> dict[str, Any]:
    """One cycle: from `max_lr / div_factor` up to `max_lr`, and along a cosine down to `max_lr / div_factor / final_div_factor`."""
    start = 1 / given.get("div_factor", 25.0)
    return {
        "lr_scheduler_type": "cosine_warmup_with_min_lr",
        "lr_scheduler_kwargs": {"warmup_lr_rate": start, "min_lr_rate": start / given.get("final_div_factor", 1e4)},
    }


def _warmup(value: float, given: dict[str, Any]) -> dict[str, Any]:
    """A share of all steps; the host reads numbers below 1 so. A single cycle that only rises has no host schedule."""
    if value == 1:
        raise UserError("`warmup_pct` must be below 1, got 1: the rate would never fall.")
    return _schedule(value, given) | {"warmup_steps": value}


def _checkpoints(value: bool, given: dict[str, Any]) -> dict[str, Any]:
    """With every validation; the final model is saved in any case."""
    if not value:
        return {"save_strategy": "no"}
    every = given.get("val_check_interval")
    return {"save_strategy": "epoch"} if every is None else {"save_strategy": "steps", "save_steps": every}


def _decoding_steps(value: int, given: dict[str, Any]) -> dict[str, Any]:
    """Over the whole canvas, which that decoder fills at once."""
    return {"diffusion_steps": value, "generation": {"steps": value, "block_length": None}}


def _strategy(value: str, given: dict[str, Any]) -> dict[str, Any]:
    if value not in CONFIDENCES:
        raise UserError(f"`denoising_strategy` must be one of {CONFIDENCES}, got {value!r}.")
    return {"generation": {"remasking": value}}


# key -> (types, lowest value or None, reading)
KEYS: dict[str, tuple[tuple[type, ...], float | None, Reading]] = {
    "pipeline": ((str,), None, _to("pipeline")),
    "init_from": ((str,), None, _start),
    "memmap_path": ((str,), None, _to("dataset")),
    "padded_dataset": ((bool,), None, _padded),
    "pad_masked_perc": (NUMBER, 0, _to("pad_mask_ratio")),
    "pad_annealing_steps": ((int,), 1, _to("pad_annealing_steps")),
    "context_length": ((int,), 2, _to("max_length")),
    "n_embd": ((int,), 1, lambda value, given: {}),  # read with `init_from`
    "n_layer": ((int,), 1, lambda value, given: {}),
    "n_head": ((int,), 1, lambda value, given: {}),
    "resume_training": ((bool,), None, _resume),
    "attn_annealing_steps": ((int,), 0, _annealing),
    "mask_id": ((int,), 0, _to("mask_token_id")),
    "eos_token_id": ((int,), 0, _to("token_ids.eos")),
    "pad_token_id": ((int,), 0, _to("token_ids.pad")),
    "n_epochs": ((int,), 1, _to("epochs")),
    "n_steps": ((int,), 1, _steps),
    "val_check_interval": ((int,), 1, lambda value, given: {"eval_strategy": "steps", "eval_steps": value}),
    "val_test_perc": (NUMBER, 0, _to("test_size")),
    "batch_size": ((int,), 1, _to("batch_size")),
    "accumulate_grad": ((int,), 1, _to("gradient_accumulation_steps")),
    "grad_clip": (NUMBER, 0, _to("max_grad_norm")),
    "betas": ((list,), None, lambda value, given: {"adam_beta1": value[0], "adam_beta2": value[1]}),
    "weight_decay": (NUMBER, 0, _to("weight_decay")),
    "max_lr": (NUMBER, 0, _to("learning_rate")),
    "warmup_pct": (NUMBER, 0, _warmup),
    "div_factor": (NUMBER, 1, _schedule),
    "final_div_factor": (NUMBER, 1, _schedule),
    "enable_checkpointing": ((bool,), None, _checkpoints),
    "save_dir": ((str,), None, _to("output_dir")),
    "wandb": ((bool,), None, _to("use_wandb")),
    "run_name": ((str,), None, _to("run_name")),
    "project_name": ((str,), None, _to("wandb_config.project")),
    "user_prompt": ((str,), None, lambda value, given: {"prompts": [value] * given.get("n_samples", 1)}),
    "n_samples": ((int,), 1, lambda value, given: {}),  # read with `user_prompt`
    "temperature": (NUMBER, 0, _to("generation.temperature")),
    "max_new_tokens": ((int,), 1, _to("generation.max_new_tokens")),
    "top_k": ((int, type(None)), 1, _to("generation.top_k")),
    "diffusion_steps": ((int,), 1, _decoding_steps),
    "repetition_penalty": (NUMBER, 0, _to("generation.repetition_penalty")),
    "do_sample": ((bool,), None, _to("generation.do_sample")),
    "denoising_strategy": ((str,), None, _strategy),
}


def _check(key: str, value: Any) -> None:
    types, least, _ = KEYS[key]
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
        raise UserError(f"`{key}` must be {expected}, got {value!r} ({type(value).__name__}).")
    if least is not None and value is not None and not least <= value < float("inf"):
        raise UserError(f"`{key}` must be at least {least:g}, got {value}.")
    if key in ("max_lr", "val_test_perc") and not value:
        raise UserError(f"`{key}` must be above 0, got {value}.")
    if key == "pad_masked_perc" and not 0 < value <= 1:
        raise UserError(f"`pad_masked_perc` must be in (0, 1], got {value}.")
    if key == "warmup_pct" and value > 1:
        raise UserError(f"`warmup_pct` must be in [0, 1), got {value}.")
    if key == "betas" and not (len(value) == 2 and all(isinstance(b, NUMBER) and 0 <= b < 1 for b in value)):
        raise UserError(f"`betas` must be two numbers in [0, 1), got {value}.")
