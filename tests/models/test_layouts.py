"""Published layouts: the model that is loaded predicts what their own layers, written out here, predict; and it trains."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from small_trainers import LORA
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from llm_diffusion import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionInference,
    load_diffusion_model,
    probe_attention,
)
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.layouts import find_layout
from llm_diffusion.objective.modes import IGNORE_INDEX, align_with_readout

WIDTH, HEADS, LAYERS, INNER, MASK = 32, 4, 2, 48, 520
LLADA = {
    "model_type": "llada",
    "architectures": ["LLaDAModelLM"],
    "auto_map": {
        "AutoConfig": "configuration_llada.LLaDAConfig",
        "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
    },
    "d_model": WIDTH,
    "n_heads": HEADS,
    "n_kv_heads": HEADS,
    "n_layers": LAYERS,
    "mlp_hidden_size": INNER,
    "mlp_ratio": 4,
    "vocab_size": 521,
    "embedding_size": 528,
    "max_sequence_length": 128,
    "rope": True,
    "rope_theta": 500000.0,
    "rms_norm_eps": 1e-5,
    "block_type": "llama",
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "attention_layer_norm": False,
    "scale_logits": False,
    "input_emb_norm": False,
    "weight_tying": False,
    "mask_token_id": MASK,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def weights(names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.3 * torch.randn(shape, generator=generator) + ("norm" in name or "ln_f" in name)
        for name, shape in names.items()
    }


def llada_weights() -> dict[str, torch.Tensor]:
    start, block = "model.transformer.", {}
    for i in range(LAYERS):
        own = f"{start}blocks.{i}."
        square = dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (WIDTH, WIDTH))
        wide = dict.fromkeys(("ff_proj", "up_proj"), (INNER, WIDTH))
        norms = dict.fromkeys(("attn_norm", "ff_norm"), (WIDTH,))
        block |= {f"{own}{k}.weight": v for k, v in {**square, **wide, **norms, "ff_out": (WIDTH, INNER)}.items()}
    ends = {f"{start}wte.weight": (528, WIDTH), f"{start}ff_out.weight": (528, WIDTH), f"{start}ln_f.weight": (WIDTH,)}
    return weights({**block, **ends})


def smdm_weights(groups: int = HEADS) -> dict[str, torch.Tensor]:
    block, size = {}, WIDTH // HEADS
    for i in range(LAYERS):
        own = {
            "norm_1": (WIDTH,),
            "attn.attn": ((HEADS + 2 * groups) * size, WIDTH),
            "attn.proj": (WIDTH, WIDTH),
            "norm_2": (WIDTH,),
            "mlp.swiglu.w1": (INNER, WIDTH),
            "mlp.swiglu.w2": (INNER, WIDTH),
            "mlp.swiglu.w3": (WIDTH, INNER),
        }
        block |= {f"transformer.h.{i}.{name}.weight": shape for name, shape in own.items()}
    ends = {
        "transformer.wte.weight": (MASK + 1, WIDTH),
        "transformer.ln_f.weight": (WIDTH,),
        "lm_head.weight": (MASK, WIDTH),
    }
    return weights({**block, **ends})


def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()


def rotated(x: torch.Tensor, theta: float) -> torch.Tensor:
    """Rotary embedding of (H, L, D): dimension i and i + D/2 turn together."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] / theta ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, theta: float) -> torch.Tensor:
    """Everyone sees everyone: (H, L, D) each -> (L, H * D)."""
    q, k = rotated(q, theta), rotated(k, theta)
    shares = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
    return (shares @ v).transpose(0, 1).flatten(1)


def heads_of(x: torch.Tensor) -> torch.Tensor:
    return x.view(len(x), HEADS, -1).transpose(0, 1)


def llada_logits(w: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    start = "model.transformer."
    x = w[f"{start}wte.weight"][ids]
    for i in range(LAYERS):
        p = {name.removeprefix(f"{start}blocks.{i}."): value for name, value in w.items()}
        h = norm(x, p["attn_norm.weight"])
        x = x + attention(*(heads_of(h @ p[f"{n}_proj.weight"].T) for n in "qkv"), 500000.0) @ p["attn_out.weight"].T
        h = norm(x, p["ff_norm.weight"])
        x = x + (F.silu(h @ p["ff_proj.weight"].T) * (h @ p["up_proj.weight"].T)) @ p["ff_out.weight"].T
    return norm(x, w[f"{start}ln_f.weight"]) @ w[f"{start}ff_out.weight"].T


def smdm_logits(w: dict[str, torch.Tensor], ids: torch.Tensor, groups: int) -> torch.Tensor:
    x, size = w["transformer.wte.weight"][ids], WIDTH // HEADS
    for i in range(LAYERS):
        p = {name.removeprefix(f"transformer.h.{i}."): value for name, value in w.items()}
        fused = (norm(x, p["norm_1.weight"]) @ p["attn.attn.weight"].T).view(len(ids), groups, -1, size)
        each = HEADS // groups
        q = fused[:, :, :each].flatten(1, 2).transpose(0, 1)
        k, v = (fused[:, :, each + j].repeat_interleave(each, 1).transpose(0, 1) for j in (0, 1))
        x = x + attention(q, k, v, 10000.0) @ p["attn.proj.weight"].T
        h = norm(x, p["norm_2.weight"])
        x = (
            x
            + (F.silu(h @ p["mlp.swiglu.w1.weight"].T) * (h @ p["mlp.swiglu.w2.weight"].T))
            @ p["mlp.swiglu.w3.weight"].T
        )
    return norm(x, w["transformer.ln_f.weight"]) @ w["lm_head.weight"].T


def tokenizer_with(n: int, folder) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    tokenizer.add_tokens([f"<|spare {i}|>" for i in range(n - len(tokenizer))])
    tokenizer.save_pretrained(folder)


def llada(folder):
    w = llada_weights()
    save_file(w, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(LLADA))
    tokenizer_with(MASK + 1, folder)  # the mask is among its tokens
    return w, lambda ids: llada_logits(w, ids)


def smdm(folder, groups=HEADS):
    w = smdm_weights(groups)
    save_file(w, folder / "mdm-6M.safetensors")
    (folder / "config.json").write_text(json.dumps({"n_head": HEADS}))
    tokenizer_with(MASK, folder)  # one short of the mask
    return w, lambda ids: smdm_logits(w, ids, groups)


def loaded(folder, **options):
    return load_diffusion_model(str(folder), device="cpu", **options)


@pytest.mark.parametrize(
    "build", [llada, smdm, lambda folder: smdm(folder, groups=2)], ids=["llada", "smdm", "smdm grouped"]
)
def test_a_loaded_model_predicts_what_its_checkpoint_does(tmp_path, build):
    _, logits = build(tmp_path)
    model, tokenizer = loaded(tmp_path)
    record = model.config.diffusion
    assert record["mask_token_id"] == tokenizer.mask_token_id == MASK
    assert record["right_shift_logits"] is False and record["attention"] == "bidirectional"
    assert probe_attention(model) == "bidirectional"
    ids = torch.tensor([5, 17, MASK, 300, MASK, MASK, 9, 41])
    with torch.no_grad():
        found = model(input_ids=ids[None]).logits[0]
    expected = logits(ids)
    torch.testing.assert_close(found[:, : expected.shape[1]], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("build", [llada, smdm], ids=["llada", "smdm"])
def test_they_learn_preferences_and_come_back(tmp_path, build):
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    build(base)
    model, tokenizer = loaded(base)
    rows = [{"prompt": "Add 1 and 2. ", "chosen": "It is 3.", "rejected": "It is 4."}] * 4
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    trainer = DiffusionDPOTrainer(
        model,
        args=DiffusionDPOConfig(str(out), max_steps=6, learning_rate=5e-3, num_draws=2, **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LORA,
    )
    trainer.train()
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert history[0]["loss"] == pytest.approx(math.log(2), abs=1e-5) and history[-1]["rewards/margins"] > 0.05
    trainer.save_model(str(out))
    again, _ = loaded(out)
    ids = {"input_ids": torch.tensor([[5, 17, MASK, 300]])}
    torch.testing.assert_close(again(**ids).logits, trainer.model.eval()(**ids).logits, atol=1e-4, rtol=1e-4)


def test_other_llada_blocks_are_refused(tmp_path):
    llada(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**LLADA, "block_type": "sequential"}))
    with pytest.raises(ValueError, match="`block_type`='sequential'; only 'llama' is Llama's layout"):
        loaded(tmp_path)


def test_a_tokenizer_that_ends_before_the_mask_is_refused(tmp_path):
    smdm(tmp_path)
    tokenizer_with(MASK - 5, tmp_path)
    with pytest.raises(ValueError, match=f"mask token is id {MASK}, but the tokenizer beside it ends at"):
        loaded(tmp_path)


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
    state["denoise_model.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.bool)  # older versions saved it
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
    """Logits of the wrapper's forward: embeddings passed in, a mask of zeros that hides nothing."""
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
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")  # GPT-2's own names, for every loader
    assert torch.equal(plain.lm_head.weight, again.lm_head.weight) and probe_attention(plain) == "bidirectional"
    for name, weight in again.state_dict().items():
        assert torch.equal(weight, inference.model.state_dict()[name]), name


def test_a_mask_that_its_tokenizer_knows_or_that_is_asked_for_comes_first(tmp_path):
    published(tmp_path / "diffugpt", mask_token="w77")
    assert load_diffusion_model(str(tmp_path / "diffugpt"), device="cpu")[1].mask_token_id == 77
    assert load_diffusion_model(str(tmp_path / "diffugpt"), device="cpu", mask_token_id=88)[1].mask_token_id == 88


@pytest.mark.parametrize("form", ["safetensors", "zip", "legacy", "truncated"])
def test_plain_gpt2_is_left_to_transformers(tmp_path, form):
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, n_positions=8, vocab_size=16))
    model.save_pretrained(tmp_path)
    if form != "safetensors":
        (tmp_path / "model.safetensors").unlink()
        file = tmp_path / "pytorch_model.bin"
        torch.save(model.state_dict(), file, _use_new_zipfile_serialization=form != "legacy")
        if form == "truncated":
            file.write_bytes(file.read_bytes()[:-100])
    assert find_layout(str(tmp_path)) is None


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path):
    published(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["denoise_model.h.1.ln_1.weight"]
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(OSError, match="transformer.h.1.ln_1.weight"):
        load_diffusion_model(str(tmp_path), device="cpu")
