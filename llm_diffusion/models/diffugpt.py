"""Checkpoints of DiffuGPT (Gong et al., arXiv 2410.17891): GPT-2 with full attention, read out one place to the left.

They are published as the state of a wrapper: the body without its embedding, the embedding and the head by themselves. Only the names
are translated; devices, types and quantisation stay the host's, and what is saved is an ordinary GPT-2.

    denoise_model.h.*, .wpe, .ln_f    transformer.h.*, .wpe, .ln_f
    embed_tokens.weight               transformer.wte.weight
    lm_head.weight                    lm_head.weight

Trade-off: told by the names in the weights, since the config is GPT-2's own. Alternative: the host's `key_mapping`, which also undoes
the names when the model is saved.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from safetensors import safe_open
from transformers import GPT2LMHeadModel, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME, WEIGHTS_NAME

from .checkpoints import local_file
from .special_tokens import MASK_TOKEN

EMBEDDING = "embed_tokens.weight"
NAMES = {r"^denoise_model\.": "transformer.", r"^embed_tokens\.": "transformer.wte."}
SMALL_MASK_ID = 10541  # of DiffuGPT-S, a word of GPT-2's vocabulary; the larger one has a row of its own, 50257
GPT2_TOKENS = 50257


def load_published(path: str, config: PretrainedConfig, **options: Any) -> PreTrainedModel | None:
    """A checkpoint of this layout as an ordinary GPT-2; None for any other checkpoint.

    Args:
        options: keywords of `from_pretrained`.
    """
    if config.model_type != "gpt2" or getattr(config, "diffusion", None) is not None:
        return None
    state = _state(path)
    if state is None:
        return None
    config.vocab_size = state["transformer.wte.weight"].shape[0]  # published configs do not count the row of a new mask
    model = GPT2LMHeadModel.from_pretrained(None, config=config, state_dict=state, **options)
    if missing := set(dict(model.named_parameters())) - set(state):
        raise OSError(f"`model`: {path!r} is not a loadable checkpoint: it lacks {sorted(missing)[:3]}.")
    model.name_or_path = model.config._name_or_path = path
    return model


def name_mask(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Tells the tokenizer which mask a published checkpoint was trained with, where it does not say so itself."""
    if tokenizer.mask_token is not None or len(tokenizer) != GPT2_TOKENS:
        return
    if model.get_input_embeddings().weight.shape[0] > GPT2_TOKENS:
        tokenizer.add_special_tokens({"mask_token": MASK_TOKEN})  # its row is there, and trained
    else:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(SMALL_MASK_ID)


def _state(path: str) -> dict[str, torch.Tensor] | None:
    """The weights under the host's names; None where no embedding stands by itself."""
    if (weights := local_file(path, SAFE_WEIGHTS_NAME)) is not None:
        with safe_open(weights, framework="pt") as file:
            state = {name: file.get_tensor(name) for name in file.keys()} if EMBEDDING in file.keys() else {}
    elif (weights := local_file(path, WEIGHTS_NAME)) is not None:
        state = torch.load(weights, map_location="cpu", weights_only=True, mmap=True)
    else:
        return None
    if EMBEDDING not in state:
        return None
    for ours, theirs in NAMES.items():
        state = {re.sub(ours, theirs, name): weight for name, weight in state.items()}
    return {name: weight for name, weight in state.items() if not name.endswith((".attn.bias", ".attn.masked_bias"))}
