"""The common architectures, through the sweep's own checks, which ask the library nothing: see benchmarks/architectures.py."""

import importlib.util
from pathlib import Path

import pytest
import torch

from llm_diffusion.models.attention import check_block_attention, patch_causal_attention
from llm_diffusion.models.probing import probe_attention

PATH = Path(__file__).parents[2] / "benchmarks" / "architectures.py"
spec = importlib.util.spec_from_file_location("architectures", PATH)
architectures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(architectures)

COMMON = """
    GPT2LMHeadModel GPTJForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM OPTForCausalLM BloomForCausalLM FalconForCausalLM
    LlamaForCausalLM MistralForCausalLM MixtralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM Qwen3MoeForCausalLM PhiForCausalLM
    Phi3ForCausalLM GemmaForCausalLM Gemma2ForCausalLM Gemma3ForCausalLM StableLmForCausalLM SmolLM3ForCausalLM Olmo2ForCausalLM
    GraniteForCausalLM CohereForCausalLM Starcoder2ForCausalLM MptForCausalLM Llama4ForCausalLM NemotronForCausalLM
""".split()

EAGER = {"MptForCausalLM", "Gemma2ForCausalLM", "GPTNeoForCausalLM", "GPTJForCausalLM", "BloomForCausalLM"}


def build(name):
    return architectures.tiny_model(name, "eager" if name in EAGER else "sdpa")


@pytest.mark.parametrize("name", COMMON)
def test_bidirectional_in_every_layer_padded_and_unpadded(name):
    model, plain = (build(name) for _ in range(2))
    assert probe_attention(plain) in ("causal", "mixed")  # mixed: a window or chunk shorter than the probe
    patch_causal_attention(model)
    found = architectures.verify(model, plain, "decoder")
    assert found["problems"] == []
    if name not in (
        "BloomForCausalLM",
        "GPTNeoForCausalLM",
        "MptForCausalLM",
    ):  # no 4-D masks; triangles; ALiBi beside the mask
        assert found["full mask"] == "equal"


@pytest.mark.parametrize("name", sorted(set(COMMON) - {"BloomForCausalLM", "GPTNeoForCausalLM"}))
@torch.no_grad()
def test_block_masks_are_followed(name):
    check_block_attention(build(name), 4)


@pytest.mark.parametrize("name", ["BloomForCausalLM", "GPTNeoForCausalLM"])
def test_block_masks_that_are_not_followed_are_refused(name):
    with pytest.raises(ValueError, match="4-D attention masks, which block attention needs"):
        check_block_attention(build(name), 4)
