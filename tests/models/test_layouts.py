"""LLaDA and SMDM checkpoints: the Llama that is loaded says what their own layers say, written out here; and it trains."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file
from small_trainers import LORA
from torch.nn import functional as F
from transformers import AutoTokenizer

from llm_diffusion import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    load_diffusion_model,
    probe_attention,
)
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

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
def test_loaded_model_says_what_the_checkpoint_says(tmp_path, build):
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
