"""Shipped settings: model, training and hardware presets; and the flat `config.json` of GPT-2 and DiffuGPT experiments.

`diffugpt_keys.yaml` lists what a key of such a file may be and what it becomes; keys that mean nothing in the file's own combination (the
width of a model that is loaded, padding where nothing is padded) are left aside, and named. Keys of ours may stand beside them and win.
"""

from __future__ import annotations

import difflib
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .. import UserError
from ..objective.settings import check_value, merge, read_value
from .files import read_mapping

PRESETS = Path(__file__).parent
TYPES = {"str": str, "bool": bool, "int": int, "int or null": int | None, "float": float, "list": list}


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*/*.yaml"))


def read_preset(names: str) -> dict[str, Any]:
    """The settings of a preset, or of several joined by "+", later ones winning: `qwen3-4b+rtx4080`."""
    merged: dict[str, Any] = {}
    if names not in preset_names():  # `phi-2-3stage` is short for `phi-2+3stage`
        names = names.replace("-3stage", "+3stage")
    for name in names.split("+"):
        if name not in preset_names():
            close = difflib.get_close_matches(name, preset_names(), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            raise UserError(f"preset {name!r} is unknown{hint} There are: {', '.join(preset_names())}.")
        (path,) = PRESETS.glob(f"*/{name}.yaml")
        merged = merge(merged, read_mapping(str(path), f"preset {name}"))
    return merged


@cache
def table() -> dict[str, Any]:
    return yaml.safe_load((PRESETS / "diffugpt_keys.yaml").read_text())


def is_diffugpt_config(given: dict[str, Any]) -> bool:
    own = set(table()["keys"]) - set(table()["shared"])
    return bool({"pipeline", "init_from"} & set(given)) and bool(own & set(given))


def left_aside(given: dict[str, Any]) -> dict[str, str]:
    """Keys that mean nothing in this combination, and why."""
    loaded, arm = given.get("init_from") != "", given.get("pipeline") == "arm"
    lacking = {"shape": loaded, "padding": arm or not given.get("padded_dataset"), "diffusion": arm}
    needs = {key: table()["keys"][key].get("needs") for key in given if key in table()["keys"]}
    return {key: table()["needs"][need] for key, need in needs.items() if lacking.get(need)}


def read_diffugpt_config(given: dict[str, Any]) -> dict[str, Any]:
    """Our settings for a mapping that `is_diffugpt_config` recognises.

    Raises:
        UserError: wrong type or range, or a key that cannot be honoured, with the reason.
    """
    keys, starts, aside = table()["keys"], table()["starts"], left_aside(given)
    own = {key: value for key, value in given.items() if key not in keys}
    flat: dict[str, Any] = {}
    for key in (key for key in given if key in keys):
        row, hint = keys[key], TYPES[keys[key]["type"]]
        value = read_value(key, given[key], hint)
        if "why" in row and (value.endswith(row["not"]) if "not" in row else value not in row["choices"]):
            raise UserError(f"`{key}`: {row['why']}.")
        if value is not None:
            check_value(key, value, hint, row)
        if key not in aside:
            flat[key] = value
    settings: dict[str, Any] = {"phases": ["pretrain"], "use_lora": False}
    start = flat.get("init_from")
    if start:
        settings["model"] = starts.get(start, start)
        own.pop("model", None)  # which beside an empty `init_from` is whose tokenizer is taken
    elif start == "":
        shape = {**table()["scratch"], "n_positions": flat.get("context_length", 1024)}
        settings |= {"model": starts["gpt2"], "scratch": shape}
    elif "model" not in own:
        raise UserError("`init_from` is missing: a folder, a name on the hub, or '' for a model from nothing.")
    for key, value in flat.items():
        becomes = keys[key].get("becomes", {})
        for name, meaning in ({becomes: "$"} if isinstance(becomes, str) else becomes).items():
            outer, _, inner = name.partition(".")
            ours = value if meaning == "$" else meaning
            settings = merge(settings, {outer: {inner: ours} if inner else ours})
    return merge(settings | _combined(flat), own)


def _combined(flat: dict[str, Any]) -> dict[str, Any]:
    """What several keys mean together, or a key by its value."""
    settings: dict[str, Any] = {}
    if flat.get("padded_dataset"):  # every text is filled up to the context, and what is behind its end is scored too
        padding = flat.get("pad_token_id") not in (None, flat.get("eos_token_id", 50256))
        settings |= {"text_tails": True, "tail": "pad" if padding else "eos", "random_canvas": 0.0}
        settings |= {"max_canvas": flat["context_length"]} if "context_length" in flat else {}
    if steps := flat.get("attn_annealing_steps"):  # 0: open from the start
        settings |= {"annealing": "stochastic", "annealing_schedule": "linear", "annealing_steps": steps}
    if "n_steps" in flat:
        settings["max_steps"] = flat["n_steps"] * flat.get("n_epochs", 1)
    if {"warmup_pct", "div_factor", "final_div_factor"} & set(flat):  # up to `max_lr`, and down along a cosine
        first = 1 / flat.get("div_factor", 25.0)
        rates = {"warmup_lr_rate": first, "min_lr_rate": first / flat.get("final_div_factor", 1e4)}
        settings |= {"lr_scheduler_type": "cosine_warmup_with_min_lr", "lr_scheduler_kwargs": rates}
    if "enable_checkpointing" in flat:  # with every validation; the final model is saved in any case
        every = flat.get("val_check_interval")
        kept = {"save_strategy": "epoch"} if every is None else {"save_strategy": "steps", "save_steps": every}
        settings |= kept if flat["enable_checkpointing"] else {"save_strategy": "no"}
    if "betas" in flat:
        if len(flat["betas"]) != 2 or not all(isinstance(b, int | float) and 0 <= b < 1 for b in flat["betas"]):
            raise UserError(f"`betas` must be two numbers in [0, 1), got {flat['betas']}.")
        settings |= dict(zip(("adam_beta1", "adam_beta2"), flat["betas"], strict=True))
    if "user_prompt" in flat:
        settings["prompts"] = [flat["user_prompt"]] * flat.get("n_samples", 1)
    return settings
