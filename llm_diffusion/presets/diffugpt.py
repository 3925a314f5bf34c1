"""Reads the flat `config.json` of GPT-2 and DiffuGPT experiments: one file for model, training and sampling.

`diffugpt_keys.yaml` lists what a key may be and what it becomes; keys that mean nothing in the file's own combination (the width of
a model that is loaded, padding where nothing is padded) are left aside, and named. Keys of ours may stand beside them and win.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

from .. import UserError
from ..objective.settings import check_value, merge, read_value

TYPES = {"str": str, "bool": bool, "int": int, "int or null": int | None, "float": float, "list": list}


@cache
def table() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent / "diffugpt_keys.yaml").read_text())


def is_diffugpt_config(given: dict[str, Any]) -> bool:
    own = set(table()["keys"]) - set(table()["shared"])
    return bool({"pipeline", "init_from"} & set(given)) and bool(own & set(given))


def left_aside(given: dict[str, Any]) -> dict[str, str]:
    """Keys that mean nothing in this combination, and why."""
    loaded, arm = bool(given.get("init_from")), given.get("pipeline") == "arm"
    lacking = {"shape": loaded, "padding": arm or not given.get("padded_dataset"), "diffusion": arm}
    needs = {key: table()["keys"][key].get("needs") for key in given if key in table()["keys"]}
    return {key: table()["needs"][need] for key, need in needs.items() if lacking.get(need)}


def read_diffugpt_config(given: dict[str, Any]) -> dict[str, Any]:
    """Our settings for a mapping that `is_diffugpt_config` recognises.

    Raises:
        UserError: wrong type or range, or a key that cannot be honoured, with the reason.
    """
    keys, aside = table()["keys"], left_aside(given)
    flat = {key: _checked(key, value, keys[key]) for key, value in given.items() if key in keys}
    flat = {key: value for key, value in flat.items() if key not in aside}
    settings: dict[str, Any] = {"phases": ["pretrain"], "use_lora": False}
    for key, value in flat.items():
        becomes = keys[key].get("becomes", {})
        for name, meaning in ({becomes: "$"} if isinstance(becomes, str) else becomes).items():
            outer, _, inner = name.partition(".")
            ours = value if meaning == "$" else meaning
            settings = merge(settings, {outer: {inner: ours} if inner else ours})
    own = {key: value for key, value in given.items() if key not in keys}
    settings |= _start(flat, own) | _combined(flat)
    if flat.get("init_from"):
        own.pop("model", None)  # which beside an empty `init_from` is whose tokenizer is taken
    return merge(settings, own)


def _checked(key: str, value: Any, row: dict[str, Any]) -> Any:
    hint = TYPES[row["type"]]
    value = read_value(key, value, hint)
    if "why" in row and value not in row["choices"]:
        raise UserError(f"`{key}`: {row['why']}.")
    if value is not None:
        check_value(key, value, hint, row)
    return value


def _start(flat: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The model that `init_from` names, or the shape of one from nothing."""
    start = flat.get("init_from")
    if start is None and "model" not in own:
        raise UserError("`init_from` is missing: a folder, a name on the hub, or '' for a model from nothing.")
    if start and start.endswith(".ckpt"):
        raise UserError(f"`init_from`: {start!r} is another trainer's pickle; name a folder of `save_pretrained`.")
    if start != "":
        return {"model": table()["starts"].get(start, start)} if start else {}
    shape = {name: flat.get(name, default) for name, default in (("n_embd", 768), ("n_layer", 12), ("n_head", 12))}
    return {"model": table()["starts"]["gpt2"], "scratch": {**shape, "n_positions": flat.get("context_length", 1024)}}


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
