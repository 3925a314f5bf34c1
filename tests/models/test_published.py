"""Dream, SDAR, Fast-dLLM v2, LLaDA-MoE and DiffuLLaMA: stand-ins with their published names and configs predict what layers written out here
predict, decode, and train."""

from __future__ import annotations

import json
import math

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from small_trainers import LORA
from torch.nn import functional as F
from transformers import AutoTokenizer

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, generate, load_diffusion_model, probe_attention
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

WIDTH, HEADS, KV, SIZE, INNER, EXPERTS, LAYERS, ROWS, MASK = 32, 4, 2, 8, 48, 4, 2, 528, 520
QWEN = {
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "vocab_size": ROWS,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "use_sliding_window": False,
    "torch_dtype": "float32",
    "auto_map": {"AutoModel": "modeling_own.Own"},
}
MOE = {
    **{name: value for name, value in QWEN.items() if name != "intermediate_size"},
    "model_type": "llada",
    "architectures": ["LLaDAMoEModelLM"],
    "dense_intermediate_size": 96,
    "expert_intermediate_size": INNER,
    "shared_expert_intermediate_size": None,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "norm_topk_prob": None,
    "qk_layernorm": True,
    "partial_rotary_factor": 1,
    "attention_bias": False,
}
SDAR = {**QWEN, "head_dim": SIZE, "architectures": ["SDARForCausalLM"], "attention_bias": False}
CONFIGS = {
    "Dream": {**QWEN, "model_type": "Dream", "architectures": ["DreamModel"], "mask_token_id": MASK},
    "Fast-dLLM v2": {**QWEN, "model_type": "Fast_dLLM_Qwen", "bd_size": 8, "mask_token_id": MASK},
    "SDAR": {**SDAR, "model_type": "sdar", "block_size": 4, "mask_token_id": MASK},
    "LLaDA-MoE": {**MOE, "mask_token_id": MASK},
    "DiffuLLaMA": {**QWEN, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": MASK},
}
# attention, block length, whether the hidden state before a token predicts it
RECORDED = {
    "Dream": ("bidirectional", None, True),
    "Fast-dLLM v2": ("block", 8, True),
    "SDAR": ("block", 4, False),
    "LLaDA-MoE": ("bidirectional", None, False),
    "DiffuLLaMA": ("bidirectional", None, True),
}


def weights(name: str) -> dict[str, torch.Tensor]:
    shapes = {
        "model.embed_tokens.weight": (ROWS, WIDTH),
        "lm_head.weight": (ROWS, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    mlp = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
    for i in range(LAYERS):
        own = {"q_proj": (HEADS * SIZE, WIDTH), "k_proj": (KV * SIZE, WIDTH), "v_proj": (KV * SIZE, WIDTH)}
        layer = {f"self_attn.{part}.weight": shape for part, shape in own.items()}
        if name in ("Dream", "Fast-dLLM v2"):
            layer |= {f"self_attn.{part}.bias": shape[:1] for part, shape in own.items()}
        if name in ("SDAR", "LLaDA-MoE"):
            layer |= {f"self_attn.{part}_norm.weight": (SIZE,) for part in "qk"}
        layer |= {"self_attn.o_proj.weight": (WIDTH, HEADS * SIZE)}
        layer |= {f"{norm}_layernorm.weight": (WIDTH,) for norm in ("input", "post_attention")}
        if name == "LLaDA-MoE":
            layer |= {"mlp.gate.weight": (EXPERTS, WIDTH)}
            layer |= {f"mlp.experts.{j}.{part}.weight": shape for j in range(EXPERTS) for part, shape in mlp.items()}
        else:
            layer |= {f"mlp.{part}.weight": shape for part, shape in mlp.items()}
        shapes |= {f"model.layers.{i}.{part}": shape for part, shape in layer.items()}
    generator = torch.Generator().manual_seed(0)
    return {key: 0.3 * torch.randn(shape, generator=generator) + ("norm" in key) for key, shape in shapes.items()}


def rms(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def rotated(x: torch.Tensor) -> torch.Tensor:
    """(H, L, D): dimension i and i + D/2 turn together."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1])[:, None] / 1e6 ** (torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1)


def swiglu(x: torch.Tensor, p: dict[str, torch.Tensor], start: str) -> torch.Tensor:
    gate, up, down = (p[f"{start}.{part}_proj.weight"] for part in ("gate", "up", "down"))
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T


def written_out(w: dict[str, torch.Tensor], ids: torch.Tensor, block: int | None) -> torch.Tensor:
    """(L,) -> (L, V): every token sees its own block and those before, or all."""
    x, place = w["model.embed_tokens.weight"][ids], torch.arange(len(ids)) // (block or len(ids))
    for i in range(LAYERS):
        p = {key.removeprefix(f"model.layers.{i}."): value for key, value in w.items()}
        h, parts = rms(x, p["input_layernorm.weight"]), {}
        for part in "qkv":
            one = h @ p[f"self_attn.{part}_proj.weight"].T + p.get(f"self_attn.{part}_proj.bias", 0.0)
            parts[part] = one.view(len(ids), -1, SIZE)
            if f"self_attn.{part}_norm.weight" in p:
                parts[part] = rms(parts[part], p[f"self_attn.{part}_norm.weight"])
        q, k, v = (parts[part].transpose(0, 1) for part in "qkv")
        k, v = (one.repeat_interleave(HEADS // KV, 0) for one in (k, v))
        scores = rotated(q) @ rotated(k).transpose(-1, -2) / math.sqrt(SIZE)
        shares = scores.masked_fill(place[:, None] < place, -torch.inf).softmax(-1)
        x = x + (shares @ v).transpose(0, 1).flatten(1) @ p["self_attn.o_proj.weight"].T
        h = rms(x, p["post_attention_layernorm.weight"])
        if "mlp.gate.weight" not in p:
            x = x + swiglu(h, p, "mlp")
            continue
        share = (h @ p["mlp.gate.weight"].T).softmax(-1)
        kept = share * (share >= share.topk(2, -1).values[:, -1:])  # the two best, their shares as they are
        x = x + sum(kept[:, j : j + 1] * swiglu(h, p, f"mlp.experts.{j}") for j in range(EXPERTS))
    return rms(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def publish(name: str, folder) -> dict[str, torch.Tensor]:
    w = weights(name)
    wrapped = {"model.embed_tokens.": "embed_tokens.", "model.": "denoise_model."} if name == "DiffuLLaMA" else {}
    saved = {}
    for key, value in w.items():
        start = next((start for start in wrapped if key.startswith(start)), "")
        saved[wrapped.get(start, "") + key.removeprefix(start)] = value
    folder.mkdir(exist_ok=True)
    save_file(saved, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIGS[name]))
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    tokenizer.add_tokens([f"<|spare {i}|>" for i in range(MASK + 1 - len(tokenizer))])
    if name == "DiffuLLaMA":  # its tokenizer knows the mask, its config does not
        tokenizer.mask_token = f"<|spare {MASK - len(AutoTokenizer.from_pretrained(TINY_MODEL_PATH))}|>"
    tokenizer.save_pretrained(folder)
    return w


@pytest.mark.parametrize("name", CONFIGS)
def test_it_is_recognised_and_predicts_what_its_checkpoint_does(tmp_path, name):
    w = publish(name, tmp_path)
    model, tokenizer = load_diffusion_model(str(tmp_path), device="cpu")
    attention, block, shift = RECORDED[name]
    record = model.config.diffusion
    assert (record["attention"], record["block_length"], record["right_shift_logits"]) == RECORDED[name]
    assert record["mask_token_id"] == tokenizer.mask_token_id == MASK and record["annealed"]
    assert block is None or record["clean_context"] == "block"
    ids = torch.randint(5, 400, (24,), generator=torch.Generator().manual_seed(1))
    ids[[3, 9, 10, 17, 23]] = MASK
    if block is None:
        assert probe_attention(model) == "bidirectional"
        options = {}
    else:
        place = torch.arange(24) // block
        options = {
            "attention_mask": torch.where(place[:, None] < place, torch.finfo(torch.float32).min, 0.0)[None, None]
        }
    with torch.no_grad():
        found = model(input_ids=ids[None], **options).logits[0]
    torch.testing.assert_close(found[:, :ROWS], written_out(w, ids, block), atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_token_it_commits_is_the_most_confident_one_of_its_layers(tmp_path, name):
    """One token a pass: the first pass's choice, of the first block behind a prompt that fills whole blocks."""
    w = publish(name, tmp_path)
    model, _ = load_diffusion_model(str(tmp_path), device="cpu")
    _, block, shift = RECORDED[name]
    prompt = torch.randint(5, 400, (16,), generator=torch.Generator().manual_seed(2))
    length = block or 8
    output = generate(
        model,
        prompt[None],
        max_new_tokens=length,
        steps=length,
        eos_token_id=None,
        output_history=True,
        return_dict_in_generate=True,
    )
    canvas = torch.cat([prompt, torch.full((length,), MASK)])
    logits = written_out(w, canvas, block)
    rows = logits[15:-1] if shift else logits[16:]
    rows[:, MASK] = -torch.inf
    first = int(rows.softmax(-1).amax(-1).argmax())
    committed = output.history[0][0, 16:]
    assert committed[first] == rows[first].argmax() and int((committed != MASK).sum()) == 1


@pytest.mark.parametrize("name", ["Dream", "SDAR", "LLaDA-MoE"])
def test_it_trains_under_adapters_and_comes_back(tmp_path, name):
    publish(name, tmp_path / "base")
    model, tokenizer = load_diffusion_model(str(tmp_path / "base"), device="cpu")
    config = DiffusionSFTConfig(
        str(tmp_path / "out"), max_steps=2, use_cpu=True, report_to="none", disable_tqdm=True, learning_rate=1e-2
    )
    rows = Dataset.from_list([{"prompt": "Add 1 and 2. ", "completion": "It is 3."}] * 8)
    trainer = DiffusionSFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, peft_config=LORA)
    trainer.train()
    trainer.save_model(str(tmp_path / "out"))
    again, _ = load_diffusion_model(str(tmp_path / "out"), device="cpu")
    ids = {"input_ids": torch.tensor([[5, 17, MASK, 300]])}
    torch.testing.assert_close(again(**ids).logits, trainer.model.eval()(**ids).logits, atol=1e-4, rtol=1e-4)


def test_another_attention_may_be_chosen(tmp_path):
    publish("SDAR", tmp_path)
    record = load_diffusion_model(str(tmp_path), device="cpu", attention="bidirectional")[0].config.diffusion
    assert (record["attention"], record["block_length"], record["right_shift_logits"]) == ("bidirectional", None, False)


def test_experts_of_another_kind_and_missing_weights_are_refused(tmp_path):
    publish("LLaDA-MoE", tmp_path / "shared")
    (tmp_path / "shared" / "config.json").write_text(json.dumps({**MOE, "shared_expert_intermediate_size": 64}))
    with pytest.raises(ValueError, match="`shared_expert_intermediate_size`=64"):
        load_diffusion_model(str(tmp_path / "shared"), device="cpu")
    publish("Dream", tmp_path / "torn")
    state = load_file(tmp_path / "torn" / "model.safetensors")
    del state["model.layers.1.self_attn.q_proj.bias"]
    save_file(state, tmp_path / "torn" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match="layers.1.self_attn.q_proj.bias"):
        load_diffusion_model(str(tmp_path / "torn"), device="cpu")
