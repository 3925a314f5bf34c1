"""Autoregressive models from every start: a diffusion checkpoint is causal again, a model from nothing is a GPT-2."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llm_diffusion import UserError, convert_to_diffusion, load_diffusion_model, probe_attention
from llm_diffusion.generation.inference import continue_autoregressive
from llm_diffusion.models.loading import (
    autoregressive_base,
    check_positions,
    check_scratch,
    load_autoregressive,
    scratch_model,
)
from llm_diffusion.models.record import save_record

SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PROMPTS = ["Tom has", "Sort the letters: k d"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One set of random weights as an AR checkpoint and as a diffusion checkpoint, and an adapter over the first."""
    root = tmp_path_factory.mktemp("starts")
    model, tokenizer = scratch_model(SHAPE, "tiny", seed=1, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from equally likely tokens
    model.save_pretrained(root / "ar")
    tokenizer.save_pretrained(root / "ar")
    convert_to_diffusion(model, tokenizer)
    model.save_pretrained(root / "diffusion")
    tokenizer.save_pretrained(root / "diffusion")
    converted, tokenizer = load_diffusion_model(str(root / "ar"), device="cpu")
    adapter = get_peft_model(converted, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapter.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    save_record(adapter, root / "adapter")
    return root


def test_a_diffusion_checkpoint_is_causal_again(folders):
    assert probe_attention(AutoModelForCausalLM.from_pretrained(folders / "diffusion")) == "bidirectional"
    model, tokenizer = load_autoregressive(str(folders / "diffusion"), device="cpu")
    original = AutoModelForCausalLM.from_pretrained(folders / "ar").eval()
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        rows = original.config.vocab_size
        assert torch.allclose(model(ids).logits[..., :rows], original(ids).logits, atol=1e-5)
    assert probe_attention(model) == "causal" and not hasattr(model.config, "diffusion")
    # The row of the mask is there and is never generated.
    ours = continue_autoregressive(model, tokenizer, PROMPTS[:1], max_new_tokens=8)
    first = tokenizer(PROMPTS[0], return_tensors="pt")
    theirs = original.generate(**first, max_new_tokens=8, do_sample=False)[:, first["input_ids"].shape[1] :]
    assert ours == tokenizer.batch_decode(theirs, skip_special_tokens=True)


def test_a_diffusion_adapter_is_decoded_by_its_base_and_not_trained_from_left_to_right(folders):
    assert autoregressive_base(str(folders / "adapter")) == str(folders / "ar")
    assert autoregressive_base(str(folders / "ar")) == str(folders / "ar")
    with pytest.raises(UserError, match="`model`"):
        load_autoregressive(str(folders / "adapter"), device="cpu")


def test_a_model_from_nothing_is_a_gpt2_of_that_shape():
    model, tokenizer = scratch_model(SHAPE, "tiny", seed=1, device="cpu")
    config, width, layers = model.config, 32, 2
    assert (config.model_type, config.n_positions, config.vocab_size) == ("gpt2", 64, len(tokenizer))
    # Embeddings, the final norm, and in every layer two norms, attention and a perceptron four times as wide, with biases.
    layer = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + 8 * width * width + 5 * width
    assert model.num_parameters() == (len(tokenizer) + 64) * width + 2 * width + layers * layer
    same, other = (scratch_model(SHAPE, "tiny", seed=seed, device="cpu")[0] for seed in (1, 2))
    weights = [m.transformer.h[1].attn.c_attn.weight for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({**SHAPE, "n_head": 3}, "n_head"),
        ({**SHAPE, "n_layer": 0}, "scratch.n_layer"),
        ({**SHAPE, "n_layer": True}, "scratch.n_layer"),
        ({**SHAPE, "n_positions": 32}, "max_length"),
        ({"n_embd": 32}, "scratch"),
    ],
)
def test_shapes_that_cannot_be(shape, named):
    with pytest.raises(UserError, match=f"`{named}`"):
        check_scratch(shape, max_length=64)


def test_rows_longer_than_learned_positions_are_refused(folders, tiny):
    model, _ = load_autoregressive(str(folders / "ar"), device="cpu")
    check_positions(model, 64)
    with pytest.raises(UserError, match="`max_length`"):
        check_positions(model, 65)
    check_positions(tiny[0], 10**6)  # rotary: counts on
