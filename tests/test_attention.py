"""The switch from causal to bidirectional: on many architectures, proven by perturbation, and undone without a trace."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    MptConfig,
    Olmo2Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
)

from llm_diffusion.attention import (
    attention_pattern,
    base_of,
    causal_attention,
    patch_causal_attention,
    probe_attention,
)

VOCAB = 64
TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
# Wide initial weights: every position visibly moves every other one that sees it.
SHAPE = {
    **TOKENS,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
GROUPED = {**SHAPE, "num_key_value_heads": 2}
CONFIGS = {
    "qwen3": lambda: Qwen3Config(**GROUPED, head_dim=8),
    "qwen2": lambda: Qwen2Config(**GROUPED),
    "llama": lambda: LlamaConfig(**GROUPED),
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=None),
    "gpt2": lambda: GPT2Config(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2),
    "phi": lambda: PhiConfig(**SHAPE),
    "stablelm": lambda: StableLmConfig(**SHAPE, num_key_value_heads=4),
    "gemma": lambda: GemmaConfig(**GROUPED, head_dim=8),
    "gpt_neox": lambda: GPTNeoXConfig(**SHAPE),
    "olmo2": lambda: Olmo2Config(**SHAPE),
    "granite": lambda: GraniteConfig(**GROUPED),
    "cohere": lambda: CohereConfig(**GROUPED),
    "falcon": lambda: FalconConfig(
        **TOKENS, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.2
    ),
    "mixtral": lambda: MixtralConfig(**GROUPED, num_local_experts=2),
}
everywhere = pytest.mark.parametrize(
    ("name", "kernel"), [(name, kernel) for name in CONFIGS for kernel in ("sdpa", "eager")]
)


def build(name, kernel="sdpa", seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation=kernel).eval()


def flags(model):
    """Everything the switch could touch: the config, and the plain attributes of every module."""
    plain = (bool, int, float, str, type(None))
    modules = {
        name: {key: value for key, value in vars(module).items() if isinstance(value, plain)}
        for name, module in model.named_modules()
    }
    return copy.deepcopy(model.config.to_dict()), modules, set(vars(model.config))


def some_ids(shape, seed=1):
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def positions_of(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


# -- on every architecture


@everywhere
def test_plain_models_are_causal_and_patched_ones_bidirectional(name, kernel):
    model = build(name, kernel)
    assert model.config._attn_implementation == kernel
    assert probe_attention(model) == "causal"
    patch_causal_attention(model)
    assert probe_attention(model) == "bidirectional"


@everywhere
@torch.no_grad()
def test_patched_equals_an_explicit_full_mask(name, kernel):
    """An additive 4-D mask of zeros says the same to the unpatched model, by another road."""
    model, ids = build(name, kernel), some_ids((2, 10))
    causal = model(ids).logits
    want = model(ids, attention_mask=torch.zeros(2, 1, 10, 10)).logits
    patch_causal_attention(model)
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    assert (want - causal).abs().max() > 1e-3


@everywhere
@torch.no_grad()
def test_padding_changes_nothing_at_real_positions(name, kernel):
    model, ids = build(name, kernel), some_ids((3, 6))
    patch_causal_attention(model)
    want = model(ids).logits
    for left, right in ((3, 0), (0, 3)):
        padded = torch.nn.functional.pad(ids, (left, right))
        mask = torch.nn.functional.pad(torch.ones_like(ids), (left, right))
        # A row without padding in the same batch: the mask may not be dropped because of it.
        padded = torch.cat([padded, some_ids((1, 9))])
        mask = torch.cat([mask, torch.ones_like(mask[:1])])
        logits = model(padded, attention_mask=mask, position_ids=positions_of(mask)).logits
        torch.testing.assert_close(logits[:3, left : left + 6], want, atol=1e-4, rtol=1e-4)
        assert logits.isfinite().all()


@everywhere
def test_undo_leaves_no_trace(name, kernel):
    model = build(name, kernel)
    before, ids = flags(model), some_ids((2, 7))
    with torch.no_grad():
        logits = model(ids).logits
    with patch_causal_attention(model):
        assert flags(model) != before
    assert flags(model) == before
    patch = patch_causal_attention(model)
    patch.undo()
    patch.undo()  # twice is once
    assert flags(model) == before
    assert probe_attention(model) == "causal"
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


# -- the probe


def test_the_probe_sees_who_depends_on_whom():
    model = build("llama")
    lower = torch.ones(8, 8, dtype=torch.bool).tril()
    for left_padding in (0, 3):
        assert torch.equal(attention_pattern(model, left_padding), lower)
    patch_causal_attention(model)
    assert attention_pattern(model, 2, length=11).shape == (11, 11)
    assert attention_pattern(model, 2, length=11).all()


def test_the_probe_tells_causal_in_places_from_bidirectional():
    """One causal layer among bidirectional ones hides in the output of all but the last."""
    model = build("stablelm")
    patch_causal_attention(model)
    for layer in model.model.layers:
        layer.self_attn.is_causal = True
    # With sdpa StableLM is then causal, unless the batch has padding.
    assert probe_attention(model) == "mixed"


def test_the_probe_leaves_the_training_flag():
    model = build("llama").train()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    assert probe_attention(model) == "causal"
    assert model.training


# -- the patch


def test_patching_twice_is_safe():
    model, ids = build("llama"), some_ids((2, 7))
    patch_causal_attention(model)
    once, logits = flags(model), model(ids).logits
    second = patch_causal_attention(model)
    assert flags(model) == once
    assert torch.equal(model(ids).logits, logits)
    second.undo()  # takes back what the second call changed, which is nothing
    assert flags(model) == once
    assert probe_attention(model) == "bidirectional"


def test_two_models_in_one_process_do_not_see_each_other():
    for kernel in ("sdpa", "eager"):
        patched, plain = build("llama", kernel), build("llama", kernel)
        before, ids = flags(plain), some_ids((2, 7))
        want = plain(ids).logits
        patch_causal_attention(patched)
        patched(ids)
        assert flags(plain) == before
        assert torch.equal(plain(ids).logits, want)
        assert probe_attention(plain) == "causal"
        assert probe_attention(build("llama", kernel)) == "causal"
        assert probe_attention(patched) == "bidirectional"


def test_a_copy_and_its_original_part_ways():
    model = build("llama")
    patch = patch_causal_attention(model)
    twin = copy.deepcopy(model)
    patch.undo()
    assert probe_attention(model) == "causal"
    assert probe_attention(twin) == "bidirectional"


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "stablelm", "gpt_neox"])
def test_gradient_checkpointing_gives_the_same_gradients(name, kernel):
    """The recomputation runs outside the forward: a switch that is on only there would differ."""
    ids, gradients = some_ids((2, 9)), []
    for checkpointing in (False, True):
        model = build(name, kernel)
        patch_causal_attention(model)
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train()
        logits = model(ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, 0], ids[:, -1]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
        # The first position's loss reaches the last token only through attention to the right.
        assert model.get_input_embeddings().weight.grad[ids[:, 1:-1]].abs().max() > 0
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)


def test_models_that_stay_causal_are_refused_unchanged():
    config = GPTNeoConfig(
        **TOKENS,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global"], 2]],
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    before = flags(model)
    with pytest.raises(ValueError, match="`model`: GPTNeoForCausalLM cannot be made bidirectional.*'causal'"):
        patch_causal_attention(model)
    assert flags(model) == before
    assert probe_attention(model) == "causal"


# -- the way back for decoding


def test_causal_attention_is_the_model_as_it_was():
    for name in ("llama", "stablelm", "gpt2"):
        model, ids = build(name), some_ids((2, 7))
        with torch.no_grad():
            want = model(ids).logits
            patch_causal_attention(model)
            patched = flags(model)
            with causal_attention(model):
                assert probe_attention(model) == "causal"
                assert torch.equal(model(ids).logits, want)
            assert flags(model) == patched
            with pytest.raises(KeyError), causal_attention(model):
                raise KeyError
        assert flags(model) == patched
        assert probe_attention(model) == "bidirectional"


# -- files and wrappers


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "mistral", "phi", "gemma"])
def test_a_saved_model_is_bidirectional_to_the_hosts_own_loader(name, tmp_path):
    """StableLM needs the module flag beside the config; everything here must do without our loader."""
    model, ids = build(name), some_ids((2, 7))
    patch_causal_attention(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert probe_attention(again) == "bidirectional"
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-6, rtol=1e-6)


def test_base_of_looks_under_every_wrapper():
    model = build("llama")
    assert base_of(model) is model
    assert base_of(torch.nn.DataParallel(model)) is model
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert base_of(peft) is model
    assert base_of(torch.nn.DataParallel(torch.nn.DataParallel(peft))) is model


def test_patch_and_probe_work_under_lora():
    model = build("llama")
    peft = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    assert probe_attention(peft) == "causal"
    patch_causal_attention(peft)
    assert model.config.is_causal is False
    assert probe_attention(peft) == probe_attention(model) == "bidirectional"
    assert probe_attention(peft.merge_and_unload()) == "bidirectional"


@pytest.mark.parametrize("window", [4, 16])
def test_a_window_longer_than_the_probe_is_refused_too(window):
    config = MistralConfig(**SHAPE, num_key_value_heads=2, sliding_window=window)
    with pytest.raises(ValueError, match=f"sliding_window={window}"):
        patch_causal_attention(AutoModelForCausalLM.from_config(config))


def test_a_model_that_chokes_on_the_switch_is_refused():
    model = AutoModelForCausalLM.from_config(
        MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)
    )
    with pytest.raises(ValueError, match="MptForCausalLM cannot be made bidirectional"):
        patch_causal_attention(model.eval())
