"""Published diffusion models whose checkpoints have a layout of their own, loaded as the transformers model that they are.

    LLaDA          model_type "llada": a Llama under OLMo's names
    LLaDA-MoE      model_type "llada" with experts: a Qwen3-MoE under other names of its sizes
    SMDM           one file of lit-gpt's names, queries, keys and values in one matrix, and one more row of the embedding than of the head:
                   the mask token, which is never predicted
    Dream, SDAR, Fast-dLLM v2    a Qwen under a model_type of their own
    DiffuGPT, DiffuLLaMA         GPT-2's or Llama's config, and the state of a wrapper: the body without its embedding, the embedding and
                                 the head by themselves

    read-out at the token itself     LLaDA, LLaDA-MoE, SMDM, SDAR
    one before it                    Dream, Fast-dLLM v2, DiffuGPT, DiffuLLaMA
    blocks that see those before     SDAR (of 4, unless its config says otherwise), Fast-dLLM v2 (of 32); the others are bidirectional

PEFT, quantisation and saving then know them without remote code.

References: LLaDA (arXiv 2502.09992), SMDM (arXiv 2410.18514), Dream (arXiv 2508.15487), SDAR (arXiv 2510.06303), Fast-dLLM v2 (arXiv
2509.26328), DiffuGPT and DiffuLLaMA (arXiv 2410.17891).
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, safe_open
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from .. import UserError
from .checkpoints import check_complete, from_hub, local_file
from .special_tokens import MASK_TOKEN

# Of a Llama's layer: its name, LLaDA's, SMDM's.
_LAYER = (
    ("input_layernorm", "attn_norm", "norm_1"),
    ("self_attn.q_proj", "q_proj", None),
    ("self_attn.k_proj", "k_proj", None),
    ("self_attn.v_proj", "v_proj", None),
    ("self_attn.o_proj", "attn_out", "attn.proj"),
    ("post_attention_layernorm", "ff_norm", "norm_2"),
    ("mlp.gate_proj", "ff_proj", "mlp.swiglu.w1"),
    ("mlp.up_proj", "up_proj", "mlp.swiglu.w2"),
    ("mlp.down_proj", "ff_out", "mlp.swiglu.w3"),
)


def _llama_names(start: str, layers: str, column: int) -> dict[str, str]:
    """Patterns of a layout's names, and Llama's in their place; of one group each, as transformers' loader wants them."""
    names = {rf"^{start}wte\.": "model.embed_tokens.", rf"^{start}ln_f\.": "model.norm."}
    for row in _LAYER:
        if row[column]:
            names[rf"^{start}{layers}\.(\d+)\.{re.escape(row[column])}\."] = rf"model.layers.\1.{row[0]}."
    return names


_LLADA_NAMES = {
    **_llama_names(r"model\.transformer\.", "blocks", 1),
    r"^model\.transformer\.ff_out\.": "lm_head.",
}
_SMDM_NAMES = _llama_names(r"transformer\.", "h", 2)
_GPT2_NAMES = {r"^denoise_model\.": "transformer.", r"^embed_tokens\.": "transformer.wte."}
_DIFFULLAMA_NAMES = {r"^denoise_model\.": "model.", r"^embed_tokens\.": "model.embed_tokens."}
_BLOCKS = {"attention": "block", "clean_context": "block"}
# Of a model_type: the config of the same layers, the mask token, how it was trained, and its config's name of the block's length with the
# length where it has none.
SAME_LAYERS: dict[str, tuple[type[PreTrainedConfig], int, dict[str, Any], tuple[str, int] | None]] = {
    "Dream": (Qwen2Config, 151666, {"right_shift_logits": True}, None),
    "Fast_dLLM_Qwen": (Qwen2Config, 151665, {**_BLOCKS, "right_shift_logits": True}, ("bd_size", 32)),
    "sdar": (Qwen3Config, 151669, _BLOCKS, ("block_size", 4)),
    "sdar_moe": (Qwen3MoeConfig, 151669, _BLOCKS, ("block_size", 4)),
}
_OWN_KEYS = ("model_type", "architectures", "auto_map", "transformers_version", "mask_token_id")
_LLADA_MOE_MASK = 156895
# What a LLaDA config must hold for its blocks to be Llama's.
_LLADA_NEEDS = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu", "swiglu"),
    "rope": (True,),
    **dict.fromkeys(("alibi", "include_bias", "include_qkv_bias", "scale_logits", "input_emb_norm"), (False, None)),
    "attention_layer_norm": (False, None),
}
_SMDM_ATTENTION = "transformer.h.0.attn.attn.weight"
_EMBEDDING = "embed_tokens.weight"  # in a wrapper's state
_GPT2_TOKENS, _LLAMA_TOKENS = 50257, 32000
_GPT2_WORD = 10541  # DiffuGPT-S made a word of GPT-2's vocabulary its mask; the larger one has a row of its own, 50257


@dataclass
class Layout:
    """A checkpoint that `load` makes a transformers model of.

    Args:
        config: of the transformers model.
        mask_token_id: which embedding is the mask's.
        names: patterns of the checkpoint's names, and the model's in their place.
        state: the weights under the model's own names, where renaming is not enough.
        trained_with: options of `ConversionSettings`.
    """

    config: PreTrainedConfig
    mask_token_id: int
    names: dict[str, str] | None = None
    state: dict[str, torch.Tensor] | None = None
    trained_with: dict[str, Any] = field(default_factory=dict)

    def load(self, path: str, **options: Any) -> PreTrainedModel:
        """`options` are keywords of `from_pretrained`."""
        kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(self.config)]
        options |= {"config": self.config, "output_loading_info": True}
        if self.state is None:
            model, found = from_hub(kind, path, key_mapping=self.names, **options)
        else:
            model, found = kind.from_pretrained(None, state_dict=self.state, **options)
        check_complete(path, missing=found["missing_keys"], without_a_place=found["unexpected_keys"])
        model.name_or_path = model.config.name_or_path = path  # where PEFT looks for the base
        return model

    def options(self, chosen: dict[str, Any]) -> dict[str, Any]:
        """Options of the conversion: the chosen ones, and what it was trained with; another attention leaves the read-out alone."""
        attention = self.trained_with.get("attention", "bidirectional")
        other = chosen["attention"] not in (None, attention)
        found = {"right_shift_logits": False} | self.trained_with
        known = {"right_shift_logits": found["right_shift_logits"]} if other else found
        return chosen | {name: value for name, value in known.items() if chosen[name] is None}

    def name_mask(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Makes the mask token known to the tokenizer, a new one where it has none of this id.

        Raises:
            ValueError: its next free id is not the mask's.
        """
        if tokenizer.mask_token_id == self.mask_token_id:
            return
        if self.config.model_type in _WRAPPED and tokenizer.mask_token is not None:
            return
        if len(tokenizer) > self.mask_token_id:
            tokenizer.mask_token = tokenizer.convert_ids_to_tokens(self.mask_token_id)
        else:
            tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})
        if tokenizer.mask_token_id != self.mask_token_id:
            raise UserError(
                f"`model`: the checkpoint's mask token is id {self.mask_token_id}, but the tokenizer beside it ends at {len(tokenizer)}; "
                "put the tokenizer that it was trained with into its folder."
            )


def find_layout(path: str) -> Layout | None:
    """The layout of a checkpoint that is none of transformers' own; None: its loaders know it."""
    file = local_file(path, CONFIG_NAME)
    try:
        config = json.loads(Path(file).read_text()) if file else {}
    except json.JSONDecodeError:
        config = None
    if not isinstance(config, dict):
        return None  # the loader names what is wrong with it
    kind = config.get("model_type")
    if kind == "llada":
        return _llada_moe(config, path) if "num_experts" in config else _llada(config, path)
    if kind in SAME_LAYERS:
        return _same_layers(config, *SAME_LAYERS[kind])
    if kind in _WRAPPED and config.get("diffusion") is None:
        return _WRAPPED[kind](path)
    if Path(path).is_dir() and "architectures" not in config:
        return _smdm(config, sorted(Path(path).glob("*.safetensors")))
    return None


def _same_layers(
    config: dict[str, Any],
    kind: type[PreTrainedConfig],
    mask: int,
    trained_with: dict[str, Any],
    length: tuple[str, int] | None,
) -> Layout:
    own = {name: value for name, value in config.items() if name not in _OWN_KEYS}
    if length is not None:
        trained_with = {**trained_with, "block_length": own.pop(*length)}
    return Layout(kind(**own), config.get("mask_token_id", mask), trained_with=trained_with)


def _llada_moe(config: dict[str, Any], path: str) -> Layout:
    """Experts in every layer, none shared, their weights a softmax over all experts that is not scaled up again."""
    needs = {
        "qk_layernorm": (True,),
        "shared_expert_intermediate_size": (None, 0, -1),
        "partial_rotary_factor": (None, 1, -1),
    }
    for name, right in needs.items():
        if config.get(name) not in right:
            raise UserError(
                f"`model`: {path!r} is a LLaDA-MoE checkpoint with `{name}`={config.get(name)!r}; only {right[0]!r} is known."
            )
    own = {name: value for name, value in config.items() if name not in (*_OWN_KEYS, *needs)}
    own |= {
        "intermediate_size": own.pop("dense_intermediate_size"),
        "moe_intermediate_size": own.pop("expert_intermediate_size"),
        "head_dim": config["hidden_size"] // config["num_attention_heads"],
        "norm_topk_prob": False,
    }
    return Layout(Qwen3MoeConfig(**own), config.get("mask_token_id", _LLADA_MOE_MASK))


def _llada(config: dict[str, Any], path: str) -> Layout:
    for name, right in _LLADA_NEEDS.items():
        if config.get(name) not in right:
            raise UserError(
                f"`model`: {path!r} is a LLaDA checkpoint with `{name}`={config.get(name)!r}; only {right[0]!r} is Llama's layout."
            )
    llama = LlamaConfig(
        vocab_size=config.get("embedding_size") or config["vocab_size"],
        hidden_size=config["d_model"],
        intermediate_size=config.get("mlp_hidden_size") or config["mlp_ratio"] * config["d_model"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config.get("n_kv_heads") or config["n_heads"],
        max_position_embeddings=config["max_sequence_length"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=config.get("rope_theta", 10000.0),
        tie_word_embeddings=config.get("weight_tying", False),
        bos_token_id=None,
        eos_token_id=config.get("eos_token_id"),
        pad_token_id=config.get("pad_token_id"),
    )
    return Layout(llama, config["mask_token_id"], _LLADA_NAMES)


def _smdm(config: dict[str, Any], files: list[Path]) -> Layout | None:
    """Sizes are read from the weights; the heads are SMDM's: 64 wide up to 1,024 dimensions, then 128, unless a config has `n_head`."""
    if len(files) != 1 or _SMDM_ATTENTION not in _names_in(files[0]):
        return None
    state = load_file(files[0])
    embeddings, hidden = state["transformer.wte.weight"].shape
    heads = config.get("n_head") or hidden // (64 if hidden <= 1024 else 128)
    fused = state[_SMDM_ATTENTION].shape[0] * heads // hidden  # heads of queries, keys and values together
    llama = LlamaConfig(
        vocab_size=embeddings,
        hidden_size=hidden,
        intermediate_size=len(state["transformer.h.0.mlp.swiglu.w1.weight"]),
        num_hidden_layers=sum(name.endswith("attn.attn.weight") for name in state),
        num_attention_heads=heads,
        num_key_value_heads=(fused - heads) // 2,
        max_position_embeddings=config.get("block_size", 2048),
        rms_norm_eps=config.get("norm_eps", 1e-5),
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype=state["transformer.ln_f.weight"].dtype,
    )
    renamed = {}
    for name, weight in state.items():
        if match := re.fullmatch(r"transformer\.h\.(\d+)\.attn\.attn\.weight", name):
            # Group by group, the group's queries, its key and its value.
            rows = weight.view(llama.num_key_value_heads, -1, hidden // heads, hidden)
            for part, own in (("q", rows[:, :-2]), ("k", rows[:, -2]), ("v", rows[:, -1])):
                renamed[f"model.layers.{match[1]}.self_attn.{part}_proj.weight"] = own.reshape(-1, hidden).contiguous()
        else:
            renamed[_renamed(name, _SMDM_NAMES)] = weight
    head = renamed["lm_head.weight"]
    # The mask is never predicted. Its row is that of the unknown token, which no text holds, so it takes nothing from the others.
    renamed["lm_head.weight"] = torch.cat([head, head[:1].expand(embeddings - len(head), -1)])
    return Layout(llama, embeddings - 1, state=renamed)


def _diffugpt(path: str) -> Layout | None:
    if (file := local_file(path, SAFE_WEIGHTS_NAME)) is not None:
        state = load_file(file) if _EMBEDDING in _names_in(file) else {}
    elif (file := local_file(path, WEIGHTS_NAME)) is not None and is_zipfile(
        file
    ):  # older ones, and what is cut off, are not
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    else:
        return None
    if _EMBEDDING not in state:
        return None
    buffers = (".attn.bias", ".attn.masked_bias")  # older versions saved them
    state = {_renamed(name, _GPT2_NAMES): weight for name, weight in state.items() if not name.endswith(buffers)}
    config = from_hub(GPT2Config, path)
    config.vocab_size = len(state["transformer.wte.weight"])  # published configs do not count the row of a new mask
    mask = _GPT2_TOKENS if config.vocab_size > _GPT2_TOKENS else _GPT2_WORD
    return Layout(config, mask, state=state, trained_with={"right_shift_logits": True})


def _diffullama(path: str) -> Layout | None:
    index, whole = (local_file(path, name) for name in (SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME))
    weights = json.loads(Path(index).read_text())["weight_map"] if index else {}
    file = local_file(path, weights[_EMBEDDING]) if _EMBEDDING in weights else whole
    if file is None or _EMBEDDING not in _names_in(file):
        return None
    config = from_hub(LlamaConfig, path)
    with safe_open(file, framework="pt") as found:  # published configs may not count the row of the mask
        rows = found.get_slice(_EMBEDDING).get_shape()[0]
    config.vocab_size = rows
    return Layout(config, _LLAMA_TOKENS, _DIFFULLAMA_NAMES, trained_with={"right_shift_logits": True})


_WRAPPED = {"gpt2": _diffugpt, "llama": _diffullama}


def _names_in(file: str | Path) -> set[str]:
    try:
        with safe_open(file, framework="pt") as found:
            return set(found.keys())
    except SafetensorError:
        return set()  # the loader names what is wrong with it


def _renamed(name: str, names: dict[str, str]) -> str:
    for pattern, replacement in names.items():
        name = re.sub(pattern, replacement, name)
    return name
