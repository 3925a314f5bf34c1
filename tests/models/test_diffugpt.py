"""DiffuGPT's published layout: read by the names it uses, and scored as its own forward scores."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llm_diffusion import DiffusionInference, load_diffusion_model, probe_attention
from llm_diffusion.models.layouts import find_layout
from llm_diffusion.objective.modes import IGNORE_INDEX, align_with_readout


def published(folder, rows=50257, weights="safetensors", mask_token=None):
    """A small GPT-2 in DiffuGPT's layout, as it lies on the hub: half precision left out, a wrapper's tokenizer class, and a config
    that never counts a new row."""
    torch.manual_seed(0)
    config = GPT2Config(n_embd=8, n_layer=2, n_head=2, n_positions=32, vocab_size=rows, initializer_range=0.3)
    model = GPT2LMHeadModel(config).eval()
    state = {
        name.replace("transformer.wte.", "embed_tokens.").replace("transformer.", "denoise_model."): value.clone()
        for name, value in model.state_dict().items()
    }
    state["denoise_model.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)  # older hosts saved it
    folder.mkdir(exist_ok=True)
    if weights == "safetensors":
        save_file(state, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    GPT2Config(**{**config.to_dict(), "vocab_size": 50257}).save_pretrained(folder)
    words = {f"w{i}": i for i in range(50256)} | {"<|endoftext|>": 50256}
    backend = Tokenizer(models.WordLevel(words, unk_token="<|endoftext|>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>", "mask_token": mask_token}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": "MaskTokenWrapper"}))
    return model


def as_published(model, ids):
    """Logits of the wrapper's forward: embeddings handed in, a mask of zeros that hides nothing."""
    everything = torch.zeros(ids.shape[0], 1, ids.shape[1], ids.shape[1])
    hidden = model.transformer(inputs_embeds=model.transformer.wte(ids), attention_mask=everything)[0]
    return model.lm_head(hidden)


@pytest.mark.parametrize(("weights", "rows"), [("safetensors", 50257), ("bin", 50258)])
def test_it_is_scored_as_its_own_forward_scores(tmp_path, weights, rows):
    reference = published(tmp_path / "diffugpt", rows, weights)
    model, tokenizer = load_diffusion_model(str(tmp_path / "diffugpt"), device="cpu")
    mask = 10541 if rows == 50257 else 50257  # the small one made a word its mask, the larger one a new row
    assert model.config.diffusion["mask_token_id"] == tokenizer.mask_token_id == mask
    assert model.get_input_embeddings().weight.shape[0] == rows
    assert probe_attention(model) == "bidirectional" and model.config.diffusion["right_shift_logits"]
    ids = torch.tensor([[5, mask, 7, mask, mask, 9], [1, 2, mask, 4, 5, mask]])
    with torch.no_grad():
        ours, theirs = model(input_ids=ids).logits[..., :rows], as_published(reference, ids)
    assert torch.allclose(ours, theirs, atol=1e-5)
    # The published sampler reads token i from place i - 1, and so does our convention.
    targets = torch.arange(6)[None].expand(2, -1)
    shifted = torch.cat([targets[:, 1:], torch.full((2, 1), IGNORE_INDEX)], 1)
    assert torch.equal(align_with_readout(targets, True, IGNORE_INDEX), shifted)


def test_it_decodes_trains_on_and_is_saved_as_any_other(tmp_path, caplog):
    published(tmp_path / "diffugpt")
    inference = DiffusionInference.from_pretrained(str(tmp_path / "diffugpt"), device="cpu", max_new_tokens=4)
    assert "mean nothing" not in caplog.text  # it was trained as a diffusion model
    (answer,) = inference.generate("w1 w2 w3")
    assert "w10541" not in answer.split()
    inference.model.save_pretrained(tmp_path / "saved")
    inference.tokenizer.save_pretrained(tmp_path / "saved")
    again, tokenizer = load_diffusion_model(str(tmp_path / "saved"), device="cpu")
    assert tokenizer.mask_token_id == again.config.diffusion["mask_token_id"] == 10541
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # the host's names, for every loader
    assert torch.equal(plain.lm_head.weight, again.lm_head.weight) and probe_attention(plain) == "bidirectional"
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, inference.model.state_dict()[name]), name


def test_a_mask_that_its_tokenizer_knows_or_that_is_asked_for_comes_first(tmp_path):
    published(tmp_path / "diffugpt", mask_token="w77")
    assert load_diffusion_model(str(tmp_path / "diffugpt"), device="cpu")[1].mask_token_id == 77
    assert load_diffusion_model(str(tmp_path / "diffugpt"), device="cpu", mask_token_id=88)[1].mask_token_id == 88


def test_plain_gpt2_is_left_to_the_host(tmp_path):
    GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=16)).save_pretrained(tmp_path)
    assert find_layout(str(tmp_path)) is None


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    published(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["denoise_model.h.1.ln_1.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="transformer.h.1.ln_1.weight"):
        load_diffusion_model(str(tmp_path), device="cpu")
