"""What a converted model is: the record in its config.json, or in `diffusion_config.json` beside an adapter; and its model card.

`model.config.diffusion` holds it as a plain dict, which transformers saves and loads; everything else reads it through attributes.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig
from transformers.utils import ADAPTER_CONFIG_NAME, CONFIG_NAME, GENERATION_CONFIG_NAME

from .. import UserError
from ..objective.modes import MODES, Bidirectional
from ..objective.noise import NOISE_SCHEDULES
from ..objective.settings import hints_of, read_setting, setting
from .checkpoints import is_adapter, local_file
from .files import atomic, write_text
from .patching import BoundFunction, base_of

SIDECAR = "diffusion_config.json"
# What a model is; the rest of its record tells how it came about.
DECISIVE = {
    *("mask_token_id", "attention", "block_length", "clean_context", "right_shift_logits", "time_embedding"),
    "base_model",
}


@dataclass(frozen=True)
class DiffusionRecord:
    """How a model was converted and what it has been trained on since; without arguments, a bidirectional model that never was.

    Raises:
        UserError: from `from_dict`, for values that no conversion writes.
    """

    mask_token_id: int | None = setting(None, "None: not converted.", min=0)
    attention: str = setting("bidirectional", "See `ConversionSettings`, as for the next five.", choices=tuple(MODES))
    block_length: int | None = setting(None, "None: no blocks.", min=1)
    clean_context: str | None = setting(None, "None: no blocks.", choices=("causal", "block"))
    right_shift_logits: bool = False
    time_embedding: bool = False
    noise_schedule: str = setting("linear", "Of training and likelihood.", choices=tuple(NOISE_SCHEDULES))
    final_causal_ratio: float = setting(0.0, "What is left of the causal mask for good.", min=0, below=1)
    tail_token_id: int | None = setting(None, "What stands behind the end of a text; None: the end token.", min=0)
    base_model: str = setting("", "Name of the autoregressive model.")
    base_fingerprint: list[float] | None = setting(None, "A few of its weights.")
    gguf_file: str | None = setting(None, "Of a base that was unpacked from one.")
    conversion_steps: int = setting(0, "Optimiser steps since the conversion.", min=0)
    training_tokens: int = setting(0, "Tokens since the conversion.", min=0, max=2**63 - 1)
    annealed: bool = setting(
        False, "Whether annealing has reached its target, or the model came from diffusion training elsewhere."
    )
    created_at: str | None = setting(None, "ISO time.")
    version: str | None = setting(None, "Of this package.")

    @classmethod
    def from_dict(cls, values: Any, where: str = "config.diffusion", complete: bool = False) -> DiffusionRecord:
        """A checked record; keys that a later version may have written are left out.

        Args:
            where: what an error names, a file for one.
            complete: whether all that decides what the model is must be there, as in files.
        """
        if not isinstance(values, dict):
            raise UserError(f"`{where}` must be a mapping, got {values!r}.")
        given = {name for name, value in values.items() if value is not None or name != "mask_token_id"}
        if missing := sorted(DECISIVE - given) if complete else []:
            raise UserError(f"`{where}` lacks {missing}: it is damaged, or was not written by llm_diffusion.")
        record = cls._known(values)
        for field in dataclasses.fields(cls):
            value, hint, bounds = getattr(record, field.name), hints_of(cls)[field.name], dict(field.metadata.items())
            read_setting(f"{where}: {field.name}", value, hint, bounds, field.default)
        mode = MODES[record.attention]
        fits = (record.block_length or 0) >= mode.min_block_length if mode.has_blocks else record.block_length is None
        if record.converted and not fits:
            raise UserError(
                f"`{where}: block_length` is {record.block_length}, which `attention`={mode.name!r} cannot have."
            )
        if complete and mode.drafts and (not record.right_shift_logits or record.clean_context != "causal"):
            raise UserError(
                f"`{where}`: `attention`={mode.name!r} has `clean_context` 'causal', `right_shift_logits` true."
            )
        return record

    @classmethod
    def _known(cls, values: dict[str, Any]) -> DiffusionRecord:
        return cls(**{field.name: values[field.name] for field in dataclasses.fields(cls) if field.name in values})

    def to_dict(self) -> dict[str, Any]:
        optional = ("tail_token_id", "gguf_file")
        return {name: value for name, value in vars(self).items() if value is not None or name not in optional}

    @property
    def mode(self) -> Bidirectional:
        """The object that knows how this model attends."""
        return MODES[self.attention](self.block_length, self.clean_context or "causal", self.right_shift_logits)

    @property
    def converted(self) -> bool:
        return self.mask_token_id is not None

    @property
    def trained(self) -> bool:
        """Whether it has seen noise: here, or, if there is no record of a conversion, elsewhere."""
        return self.conversion_steps > 0 or self.annealed or not self.converted


@dataclass
class ConversionSettings:
    """How a model that is not converted yet is converted; None: the recommended choice, or as the checkpoint was."""

    attention: str | None = setting(
        None,
        "`bidirectional` (the default); `block`: bidirectional inside a block, blocks from left to right; `lossless`: adapters draft, "
        "the base verifies.",
        choices=tuple(MODES),
    )
    block_length: int | None = setting(None, "Tokens of a block (4; 8 of a lossless draft).", min=1)
    clean_context: str | None = setting(
        None, "How finished blocks see themselves: `causal` (the default) or `block`.", choices=("causal", "block")
    )
    right_shift_logits: bool | None = setting(None, "Hidden state i - 1 predicts token i, as in the AR model.")
    time_embedding: bool | None = setting(None, "Tell the model the noise level (off by default).")
    mask_token_id: int | None = setting(
        None, "A token of the vocabulary as the mask; else the tokenizer's, or a new one.", min=0
    )


CONVERSION_OPTIONS = tuple(field.name for field in dataclasses.fields(ConversionSettings))


def record_of(model: torch.nn.Module) -> DiffusionRecord:
    """The record of a model under any wrappers, checked when it was loaded; that of a model which was never converted is empty."""
    return DiffusionRecord._known(getattr(base_of(model).config, "diffusion", None) or {})


def update_record(model: torch.nn.Module, **changes: Any) -> DiffusionRecord:
    """Writes `changes` into the model's record; returns it."""
    record = dataclasses.replace(record_of(model), **changes)
    base_of(model).config.diffusion = record.to_dict()
    return record


def read_record(path: str | Path) -> DiffusionRecord:
    """The record of a saved adapter or full checkpoint, in a folder or hub repository.

    Raises:
        UserError: an adapter without one, or a malformed one.
    """
    sidecar = local_file(str(path), SIDECAR)
    if sidecar is None and is_adapter(str(path)):
        raise UserError(
            f"`model`: {path!r} holds an adapter without {SIDECAR}; it was not saved by llm_diffusion's trainers."
        )
    file = sidecar or local_file(str(path), CONFIG_NAME)
    try:
        values = json.loads(Path(file).read_text())
        values = values if sidecar else values["diffusion"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"`model`: {file!r} is malformed: {error}.") from error
    return DiffusionRecord.from_dict(values, file, complete=True)


def save_record(model: torch.nn.Module, folder: str | Path) -> None:
    """Writes the record beside an adapter, whose own files cannot carry it."""
    write_text(Path(folder) / SIDECAR, json.dumps(record_of(model).to_dict(), indent=2) + "\n")


def keep_record(model: PeftModel) -> None:
    """Makes `save_pretrained` of adapters, and `push_to_hub`, which uploads what that writes, save what they are loaded by too."""
    model.save_pretrained = BoundFunction(_save_pretrained, model)


def _save_pretrained(self: PeftModel, save_directory: str, *args: Any, **options: Any) -> None:
    type(self).save_pretrained(self, save_directory, *args, **options)
    if not options.get("is_main_process", True):
        return
    for name in ("", *self.peft_config):  # all but the default one are in folders of their names
        if (folder := Path(save_directory) / name).joinpath(ADAPTER_CONFIG_NAME).exists():
            save_record(self, folder)
            save_generation_config(self, folder)


# -- the model card

# Three lines beside the weights send the `generate` of transformers here.
GENERATE = '''"""Decoding by iterative unmasking; needs the package llm_diffusion."""

from llm_diffusion.generation.generate import generate_as_loaded as generate  # noqa: F401
'''


def save_custom_generate(folder: str | Path) -> None:
    """Writes `custom_generate/generate.py` beside a full checkpoint, so that transformers' loaders decode it by unmasking."""
    write_text(Path(folder) / "custom_generate" / "generate.py", GENERATE)


def plain_loader(record: DiffusionRecord, adapter: bool, converted_base: bool) -> str:
    """What `AutoModelForCausalLM`, or `PeftModel` for an adapter, gives without llm_diffusion.

    Args:
        record: `config.diffusion`.
        converted_base: whether an adapter's base folder is a converted model itself.
    """
    if record.mode.drafts:
        what = "puts the adapter under every token, which makes the base worse: load it with llm_diffusion, or the base alone"
    elif record.mode.has_blocks:
        what = "gives the causal model: block attention is a mask that llm_diffusion passes to it"
    elif record.time_embedding:
        what = "ignores the time embedding, so its outputs are wrong: load it with llm_diffusion"
    elif record.final_causal_ratio:
        what = "attends fully in both directions, which is not what was trained: load it with llm_diffusion"
    elif adapter and not converted_base:
        what = "gives a causal model, because the base of this adapter is one: load it with llm_diffusion"
    else:
        what = (
            "gives the bidirectional model where transformers (5.2 or newer) honours `config.is_causal`, as for Qwen, Llama, Mistral, "
            "Phi and GPT-2, but not for StableLM, Nemotron, GPT-Neo and MPT; its own `generate` would still decode from left to right"
        )
    return f"A plain loader {what}."


CARD = """---
library_name: {library}
{base_line}{data_line}tags:
{tags}
---

# {name}

{what} `{base}` with llm_diffusion {version}: {kind}, {read_out} read-out, {steps:,} steps, {tokens:,} tokens.

```python
import llm_diffusion as ld

inference = ld.DiffusionInference.from_pretrained("{name}")
print(inference.chat([{{"role": "user", "content": "…"}}]))
```

{loader}
{figures}"""


def model_card(
    record: DiffusionRecord,
    name: str,
    tags: list[str],
    adapter: bool,
    converted_base: bool,
    dataset: str | None = None,
    figures: dict[str, float] | None = None,
) -> str:
    """Markdown with the hub's metadata; `name` is what loads the model, `figures` are those of the last evaluation."""
    rows = [
        f"| {key.removeprefix('eval_')} | {value:.4g} |"
        for key, value in (figures or {}).items()
        if isinstance(value, int | float) and not key.endswith(("_runtime", "_per_second"))
    ]
    base, what = record.base_model, "A masked-diffusion language model, converted from"
    if record.mode.drafts:
        what = (
            "A lossless drafter: this adapter proposes tokens by diffusion, the untouched base accepts those that it would have chosen "
            "itself, so the text is the base's own in fewer forward passes. Trained for"
        )
    on_hub = "/" in base and not base.startswith(("/", "."))
    return CARD.format(
        library="peft" if adapter else "transformers",
        base_line=f"base_model: {base}\n" if on_hub else "",
        data_line=f"datasets:\n- {dataset}\n" if dataset else "",
        tags="\n".join(f"- {tag}" for tag in dict.fromkeys(tags)),
        name=name,
        what=what,
        base=base,
        version=record.version,
        kind=f"blocks of {record.block_length}" if record.mode.has_blocks else "full attention",
        read_out="right-shifted" if record.right_shift_logits else "own position",
        steps=record.conversion_steps,
        tokens=record.training_tokens,
        loader=plain_loader(record, adapter, converted_base),
        figures="\n".join(["", "| evaluation | |", "|---|---|", *rows, ""]) if rows else "",
    )


RULES = ("threshold", "factor", "entropy_bound", "steps", "revision", "alg_temp")


def decoding_defaults(record: DiffusionRecord) -> dict[str, Any]:
    """Settings for a converted model; its mask token among them says that they are of unmasking."""
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
    with atomic(Path(folder) / GENERATION_CONFIG_NAME) as file:
        config.to_json_file(file, keys_to_pop=["compile_config"])
