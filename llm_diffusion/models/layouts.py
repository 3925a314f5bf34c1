"""Existing diffusion models whose checkpoints have a layout of their own, loaded as the Llama models that they are.

    LLaDA   model_type "llada": OLMo's names (`transformer.blocks.0.ff_proj`), its mask token among the tokenizer's
    SMDM    one file of lit-gpt's names (`transformer.h.0.attn.attn`), queries, keys and values in one matrix, and one more row of the
            embedding than of the head: the mask token, which the head cannot say

Both are bidirectional and read every token at its own position. Trade-off: weights are renamed, so that PEFT, quantisation and all of
the library see a plain Llama, without remote code. Alternative: the checkpoints' own modelling code, which SMDM's is no package, and
LLaDA's knows neither `logits_to_keep` nor additive masks.

References: LLaDA (arXiv 2502.09992), SMDM (arXiv 2410.18514).
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import CONFIG_NAME

from .. import UserError
from .checkpoints import from_hub, local_file

MASK_TOKEN = "<|mask|>"
_LLADA_NAMES = {
    r"^model\.transformer\.wte\.": "model.embed_tokens.",
    r"^model\.transformer\.ln_f\.": "model.norm.",
    r"^model\.transformer\.ff_out\.": "lm_head.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_norm\.": r"model.layers.\1.input_layernorm.",
    # One group a pattern is all that the host's loader knows.
    r"^model\.transformer\.blocks\.(\d+)\.q_proj\.": r"model.layers.\1.self_attn.q_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.k_proj\.": r"model.layers.\1.self_attn.k_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.v_proj\.": r"model.layers.\1.self_attn.v_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.attn_out\.": r"model.layers.\1.self_attn.o_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_norm\.": r"model.layers.\1.post_attention_layernorm.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_proj\.": r"model.layers.\1.mlp.gate_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.up_proj\.": r"model.layers.\1.mlp.up_proj.",
    r"^model\.transformer\.blocks\.(\d+)\.ff_out\.": r"model.layers.\1.mlp.down_proj.",
}
# What a LLaDA config must say for its blocks to be Llama's.
_LLADA_NEEDS = {
    "block_type": ("llama",),
    "layer_norm_type": ("rms",),
    "activation_type": ("silu", "swiglu"),
    "rope": (True,),
    "alibi": (False, None),
    "include_bias": (False, None),
    "include_qkv_bias": (False, None),
    "attention_layer_norm": (False, None),
    "scale_logits": (False, None),
    "input_emb_norm": (False, None),
}
_SMDM_NAMES = {
    r"^transformer\.wte\.": "model.embed_tokens.",
    r"^transformer\.ln_f\.": "model.norm.",
    r"^transformer\.h\.(\d+)\.norm_1\.": r"model.layers.\1.input_layernorm.",
    r"^transformer\.h\.(\d+)\.attn\.proj\.": r"model.layers.\1.self_attn.o_proj.",
    r"^transformer\.h\.(\d+)\.norm_2\.": r"model.layers.\1.post_attention_layernorm.",
    r"^transformer\.h\.(\d+)\.mlp\.swiglu\.w1\.": r"model.layers.\1.mlp.gate_proj.",
    r"^transformer\.h\.(\d+)\.mlp\.swiglu\.w2\.": r"model.layers.\1.mlp.up_proj.",
    r"^transformer\.h\.(\d+)\.mlp\.swiglu\.w3\.": r"model.layers.\1.mlp.down_proj.",
}
_SMDM_ATTENTION = "transformer.h.0.attn.attn.weight"


@dataclass
class Layout:
    """A checkpoint that `load` makes a Llama of.

    Args:
        config: of the Llama.
        mask_token_id: which embedding is the mask's.
        file: of an SMDM checkpoint, its weights; None: LLaDA.
    """

    config: LlamaConfig
    mask_token_id: int
    file: Path | None = None

    def load(self, path: str, **options: Any) -> LlamaForCausalLM:
        """`options` are keywords of `from_pretrained`."""
        if self.file is None:
            options |= {"key_mapping": _LLADA_NAMES, "output_loading_info": True}
            model, found = from_hub(LlamaForCausalLM, path, config=self.config, **options)
            if wrong := sorted(
                {*found["missing_keys"], *found["unexpected_keys"]}
            ):  # the host would draw them at random
                raise UserError(
                    f"`model`: {path!r} does not hold LLaDA's weights: {wrong[:5]} are missing or too many."
                )
        else:
            plain = LlamaForCausalLM(self.config).to(self.config.dtype)
            plain.load_state_dict(_smdm_weights(load_file(self.file), self.config))
            with tempfile.TemporaryDirectory() as folder:  # quantisation and placement are matters of loading
                plain.save_pretrained(folder)
                del plain
                model = from_hub(LlamaForCausalLM, folder, **options)
        model.name_or_path = model.config._name_or_path = path  # where PEFT looks for the base
        return model

    def name_mask(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Tells the tokenizer which token is the mask, a new one where it has none of this id.

        Raises:
            ValueError: its next free id is not the mask's.
        """
        if tokenizer.mask_token_id == self.mask_token_id:
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
    """The layout of a checkpoint that is none of the host's; None: the host's loaders know it."""
    file = local_file(path, CONFIG_NAME)
    try:
        config = json.loads(Path(file).read_text()) if file else {}
    except json.JSONDecodeError:
        return None  # the host's loader says what is wrong with it
    if config.get("model_type") == "llada":
        return _llada(config, path)
    weights = sorted(Path(path).glob("*.safetensors")) if Path(path).is_dir() else []
    if len(weights) == 1 and "architectures" not in config:
        with safe_open(weights[0], framework="pt") as found:
            if _SMDM_ATTENTION in found.keys():
                shapes = {name: found.get_slice(name).get_shape() for name in found.keys()}
                dtype = found.get_tensor("transformer.ln_f.weight").dtype
                return _smdm(shapes, dtype, config, weights[0])
    return None


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
    return Layout(llama, config["mask_token_id"])


def _smdm(shapes: dict[str, list[int]], dtype: torch.dtype, config: dict[str, Any], file: Path) -> Layout:
    """Sizes are read from the weights; the heads are SMDM's: 64 wide up to 1,024 dimensions, then 128, unless a config says `n_head`."""
    embeddings, hidden = shapes["transformer.wte.weight"]
    heads = config.get("n_head") or hidden // (64 if hidden <= 1024 else 128)
    fused = shapes[_SMDM_ATTENTION][0] * heads // hidden  # heads of queries, keys and values together
    llama = LlamaConfig(
        vocab_size=embeddings,
        hidden_size=hidden,
        intermediate_size=shapes["transformer.h.0.mlp.swiglu.w1.weight"][0],
        num_hidden_layers=sum(name.endswith("attn.attn.weight") for name in shapes),
        num_attention_heads=heads,
        num_key_value_heads=(fused - heads) // 2,
        max_position_embeddings=config.get("block_size", 2048),
        rms_norm_eps=config.get("norm_eps", 1e-5),
        tie_word_embeddings=False,
        bos_token_id=1,
        eos_token_id=2,
        dtype=dtype,
    )
    return Layout(llama, embeddings - 1, file)


def _smdm_weights(state: dict[str, torch.Tensor], config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Llama's names, the fused attention cut apart: it holds, group by group, the group's queries, its key and its value."""
    renamed = {}
    groups, size = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    for name, weight in state.items():
        if match := re.fullmatch(r"transformer\.h\.(\d+)\.attn\.attn\.weight", name):
            rows = weight.view(groups, -1, size, config.hidden_size)
            for part, of in (("q", rows[:, :-2]), ("k", rows[:, -2]), ("v", rows[:, -1])):
                place = f"model.layers.{match[1]}.self_attn.{part}_proj.weight"
                renamed[place] = of.reshape(-1, config.hidden_size).contiguous()
            continue
        for pattern, replacement in _SMDM_NAMES.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight
    head = renamed["lm_head.weight"]
    # The mask is never said. Its row is that of the unknown token, which no text holds, so it takes nothing from the others.
    renamed["lm_head.weight"] = torch.cat([head, head[:1].expand(config.vocab_size - len(head), -1)])
    return renamed
