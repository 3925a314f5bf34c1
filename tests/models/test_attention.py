"""The switch from causal to bidirectional: on many architectures, proven by perturbation, and undone without a trace."""

import copy
import inspect
import tempfile
import types

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    BitsAndBytesConfig,
    CohereConfig,
    FalconConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoConfig,
    GPTNeoXConfig,
    GraniteConfig,
    Lfm2Config,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    OpenAIGPTConfig,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
    StableLmConfig,
    Starcoder2Config,
)
from transformers.modeling_outputs import BaseModelOutputWithPast

from llm_diffusion.models.attention import (
    METHODS,
    BidirectionalSDPA,
    causal_attention,
    check_block_attention,
    patch_causal_attention,
)
from llm_diffusion.models.forward import lift_masks
from llm_diffusion.models.patching import Patch, base_of
from llm_diffusion.models.probing import (
    attention_pattern,
    causal_layers,
    probe_attention,
    recurrent_layers,
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
    """An additive 4-D mask of zeros has the same effect on the unpatched model."""
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


# -- causal again, for decoding


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
def test_a_saved_model_is_bidirectional_to_a_plain_loader(name, tmp_path):
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


# -- sliding windows


WINDOWED = {
    "mistral": lambda: MistralConfig(**GROUPED, sliding_window=3),
    "gemma2": lambda: Gemma2Config(**GROUPED, head_dim=8, sliding_window=3),
    "gemma3": lambda: Gemma3TextConfig(
        **GROUPED, head_dim=8, sliding_window=3, layer_types=["sliding_attention", "full_attention"]
    ),
    "starcoder2": lambda: Starcoder2Config(**GROUPED, sliding_window=3),
}


def windowed(name, kernel="eager"):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(WINDOWED[name](), attn_implementation=kernel).eval()


@pytest.mark.parametrize("name", WINDOWED)
@torch.no_grad()
def test_windows_are_widened(name, tmp_path):
    model, ids = windowed(name), some_ids((2, 12))
    causal, before = model(ids).logits, flags(model)
    want = model(ids, attention_mask=torch.zeros(2, 1, 12, 12)).logits
    patch = patch_causal_attention(model)
    # Some layers choose their rotary embeddings by the kind of layer, so the kind must stay.
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)
    with causal_attention(model):
        assert torch.equal(model(ids).logits, causal)
    patch.undo()
    assert flags(model) == before
    assert torch.equal(model(ids).logits, causal)
    patch_causal_attention(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    torch.testing.assert_close(again(ids).logits, want, atol=1e-5, rtol=1e-5)
    with causal_attention(again):
        assert torch.equal(again(ids).logits, causal)


def test_a_window_that_the_config_does_not_reach_is_refused():
    """The probe is shorter than real windows: that the setting is alive must be shown, not believed."""
    model = windowed("mistral")

    class Deaf(type(model)):
        def forward(self, input_ids=None, **kwargs):
            width, self.config.sliding_window = self.config.sliding_window, None
            try:
                return super().forward(input_ids, **kwargs)
            finally:
                self.config.sliding_window = width

    model.__class__ = Deaf
    with pytest.raises(ValueError, match=r"\(config: its sliding window does not follow the config\)"):
        patch_causal_attention(model, "config")
    assert model.config.sliding_window == 3


def test_a_widened_model_may_lift_masks_too():
    model = windowed("mistral")
    patch_causal_attention(model)
    with Patch() as patch:
        lift_masks(patch, model, 0.3)
        assert patch_causal_attention(model).mechanism == "mask"
    assert patch_causal_attention(model).mechanism == "config"


# -- each mechanism


class OwnKernel(torch.nn.Module):
    """Attention as remote code writes it: its own causal mask, its own call of the kernel."""

    def __init__(self, width, heads=4, groups=2):
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.q = torch.nn.Linear(width, width)
        self.kv = torch.nn.Linear(width, 2 * groups * self.size)
        self.o = torch.nn.Linear(width, width)

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        b, n, _ = hidden_states.shape
        q = self.q(hidden_states).view(b, n, self.heads, self.size).transpose(1, 2)
        k, v = self.kv(hidden_states).view(b, n, 2, self.groups, self.size).permute(2, 0, 3, 1, 4)
        mask = None
        if attention_mask is not None:
            # From the 2-D padding mask, whatever is passed down.
            real = attention_mask if attention_mask.dim() == 2 else torch.ones(b, n)
            mask = real[:, None, None, :].bool() & torch.ones(n, n, dtype=torch.bool).tril()
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=0.5, enable_gqa=True
        )
        return self.o(out.transpose(1, 2).reshape(b, n, -1)), None


def remote_model(attention=OwnKernel, seed=0):
    """A Llama whose attention is its own, and which hands the padding mask down as it came."""
    torch.manual_seed(seed)
    model = build("llama")

    class Backbone(type(model.model)):
        def forward(self, input_ids=None, attention_mask=None, position_ids=None, **kwargs):
            hidden = self.embed_tokens(input_ids)
            for layer in self.layers:
                hidden = layer(hidden, attention_mask=attention_mask, position_embeddings=None)
            return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))

    model.model.__class__ = Backbone
    for layer in model.model.layers:
        layer.self_attn = attention(32)
        for parameter in layer.self_attn.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


class OwnSoftmax(OwnKernel):
    """Attention that no switch, mask or kernel reaches."""

    def forward(self, hidden_states, attention_mask=None, **kwargs):
        b, n, _ = hidden_states.shape
        q = self.q(hidden_states).view(b, n, self.heads, self.size).transpose(1, 2)
        scores = (q @ q.transpose(-1, -2)).masked_fill(torch.ones(n, n, dtype=torch.bool).triu(1), -1e9)
        return self.o((scores.softmax(-1) @ q).transpose(1, 2).reshape(b, n, -1)), None


def test_models_that_stay_causal_are_refused_unchanged():
    model = remote_model(OwnSoftmax)
    before = flags(model)
    with pytest.raises(ValueError, match=r"cannot be made bidirectional \(config: its attention is .*sdpa"):
        patch_causal_attention(model)
    assert flags(model) == before
    assert causal_layers(model) == [0, 1]


def test_one_causal_layer_among_bidirectional_ones_is_found():
    model = remote_model()
    patch_causal_attention(model)
    assert causal_layers(model) == causal_layers(model, left_padding=3) == []
    with causal_attention(model):
        assert causal_layers(model) == [0, 1]
    mixed = remote_model()
    mixed.model.layers[0].self_attn = OwnSoftmax(32)
    for parameter in mixed.model.layers[0].self_attn.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with pytest.raises(ValueError, match=r"cannot be made bidirectional"):
        patch_causal_attention(mixed)


class PlainLayer(torch.nn.Module):
    """A layer that is not transformers' own, as in remote code."""

    def __init__(self, attention):
        super().__init__()
        self.self_attn = attention

    def forward(self, hidden_states, **kwargs):
        return hidden_states + self.self_attn(hidden_states, **kwargs)[0]


@pytest.mark.parametrize("place", [0, 1])
def test_one_causal_layer_hides_in_layers_of_remote_code_neither(place):
    model = remote_model()
    for i, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        if i == place:  # tidy about padding, but causal
            attention.forward = types.MethodType(_always_causal, attention)
        model.model.layers[i] = PlainLayer(attention)
    with pytest.raises(ValueError, match=rf"sdpa: its layers \[{place}\] stay causal"):
        patch_causal_attention(model)


def _always_causal(self, hidden_states, attention_mask=None, **kwargs):
    b, n, _ = hidden_states.shape
    q = self.q(hidden_states).view(b, n, self.heads, self.size).transpose(1, 2)
    hidden = torch.ones(n, n, dtype=torch.bool).triu(1).expand(b, 1, n, n)
    if attention_mask is not None:
        hidden = hidden | (attention_mask[:, None, None, :n] == 0 if attention_mask.dim() == 2 else attention_mask < 0)
    scores = (q @ q.transpose(-1, -2)).masked_fill(hidden, -1e9)
    return self.o((scores.softmax(-1) @ q).transpose(1, 2).reshape(b, n, -1)), None


def test_a_layer_that_ignores_block_masks_is_found():
    model = build("llama", "eager")
    layer = model.model.layers[0].self_attn

    def causal(self, hidden_states, attention_mask=None, **kwargs):
        own = torch.full((hidden_states.shape[1],) * 2, -1e9).triu(1)
        return type(self).forward(self, hidden_states, attention_mask=own[None, None], **kwargs)

    layer.forward = types.MethodType(causal, layer)
    with pytest.raises(ValueError, match="causal in layers|attends"):
        check_block_attention(model, 4)


def test_hybrids_take_no_masks():
    config = Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])
    model = AutoModelForCausalLM.from_config(config).eval()
    for purpose in ("block attention", "`packing`"):
        with pytest.raises(ValueError, match="run from left to right"):
            check_block_attention(model, 4, purpose)


@pytest.mark.parametrize("kind", ["gpt_oss", "seed_oss"])
def test_state_spaces_are_not_read_into_other_names(kind):
    """`GptOssMLP` and `SeedOssMLP` hold the letters "ssm"."""
    sizes = {**GROUPED, "head_dim": 8, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes), attn_implementation="eager").eval()
    assert recurrent_layers(model) == []
    check_block_attention(model, 4)


def test_patches_may_be_undone_in_the_order_they_were_made():
    model = build("llama")
    first, second = patch_causal_attention(model), patch_causal_attention(model)
    assert second.mechanism == "config"
    first.undo()
    second.undo()
    assert probe_attention(model) == "causal"


@pytest.mark.parametrize("kind", ["gpt_neo", "openai_gpt"])
@torch.no_grad()
def test_triangles_kept_as_buffers_are_filled(kind):
    torch.manual_seed(0)
    if kind == "gpt_neo":
        config = GPTNeoConfig(
            **TOKENS,
            hidden_size=32,
            num_layers=2,
            num_heads=4,
            attention_types=[[["global", "local"], 1]],
            window_size=3,
            max_position_embeddings=64,
            initializer_range=0.2,
        )
    else:
        config = OpenAIGPTConfig(**TOKENS, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2)
    model, ids = AutoModelForCausalLM.from_config(config).eval(), some_ids((2, 12))
    want = model(ids).logits
    patch = patch_causal_attention(model)
    assert probe_attention(model) == "bidirectional"
    assert causal_layers(model) == []
    assert attention_pattern(model, length=12).all()
    twin = copy.deepcopy(model)
    with causal_attention(model):
        assert torch.equal(model(ids).logits, want)
    assert probe_attention(twin) == "bidirectional"
    patch.undo()
    assert torch.equal(model(ids).logits, want)
    assert probe_attention(twin) == "bidirectional"


def test_remote_code_with_its_own_kernel_call_is_patched_there():
    model = remote_model()
    assert probe_attention(model) == "causal"
    patch = patch_causal_attention(model)
    assert patch.mechanism == "sdpa"
    assert probe_attention(model) == "bidirectional"
    with causal_attention(model):
        assert probe_attention(model) == "causal"
    patch.undo()
    assert probe_attention(model) == "causal"
    assert "forward" not in vars(model.model.layers[0].self_attn)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llama", "stablelm", "gpt2"])
@torch.no_grad()
def test_all_mechanisms_give_the_same_logits(name, method):
    model, ids = build(name), some_ids((3, 9))
    mask = torch.ones_like(ids)
    mask[0, :3], mask[1, 6:] = 0, 0
    full = torch.zeros(3, 1, 9, 9).masked_fill(mask[:, None, None] == 0, torch.finfo(torch.float32).min)
    positions = positions_of(mask)
    want = model(ids, attention_mask=full, position_ids=positions).logits[mask.bool()]
    assert patch_causal_attention(model, method).mechanism == method
    got = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_each_mechanism_survives_checkpointing_copies_and_lora(method):
    ids, gradients = some_ids((2, 9)), []
    for checkpointing in (False, True):
        model = build("stablelm")
        patch_causal_attention(model, method)
        patch_causal_attention(model, method)  # twice is once
        model = copy.deepcopy(model)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
        assert probe_attention(model) == "bidirectional"
        if checkpointing:
            model.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        torch.manual_seed(5)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.train()
        first, second = (model(part, use_cache=False).logits for part in (ids[:1], ids[1:]))
        # Two forwards, one backward, as the trainer does: what a recomputation needs must not be the last forward's.
        torch.nn.functional.cross_entropy(torch.cat([first, second])[:, 0], ids[:, -1]).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
    assert gradients[0].abs().max() > 0


@pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning")  # torch's own compiler imports it
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_each_mechanism_compiles(method):
    model, ids = build("llama"), some_ids((2, 9))
    patch_causal_attention(model, method)
    compiled = torch.compile(model, backend="eager")  # what follows the tracing is torch's own
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for inputs in ({}, {"attention_mask": mask, "position_ids": positions_of(mask)}):
        want = model(ids, **inputs, use_cache=False).logits
        torch.testing.assert_close(compiled(ids, **inputs, use_cache=False).logits, want, atol=1e-5, rtol=1e-5)


def test_the_signature_stays_that_of_the_class():
    """transformers' `generate` makes position ids only for a forward that names them."""
    model = build("llama")
    want = inspect.signature(model.forward)
    patch_causal_attention(model, "mask")
    assert inspect.signature(model.forward) == want


# -- what is refused


def test_encoders_are_refused():
    config = BertConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        initializer_range=0.2,
    )
    with pytest.raises(ValueError, match="BertLMHeadModel attends in both directions already"):
        patch_causal_attention(BertLMHeadModel(config).eval())
    # The same class as a decoder is welcome.
    config.is_decoder = True
    model = BertLMHeadModel(config).eval()
    assert probe_attention(model) == "causal"


def test_state_space_models_are_refused():
    config = MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=4)
    with pytest.raises(ValueError, match="MambaForCausalLM cannot be made bidirectional: .*recurrent"):
        patch_causal_attention(AutoModelForCausalLM.from_config(config).eval())


def test_unknown_methods_are_refused():
    with pytest.raises(ValueError, match="`method` must be one of"):
        patch_causal_attention(build("llama"), "hope")


IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def test_the_sdpa_patch_passes_every_argument_through():
    torch.manual_seed(0)
    q, kv = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = sdpa(q, kv, kv, scale=0.3, enable_gqa=True)
    with BidirectionalSDPA():
        assert torch.equal(sdpa(q, kv, kv, is_causal=True, scale=0.3, enable_gqa=True), want)
        assert torch.equal(sdpa(q, kv, kv, None, 0.0, True, scale=0.3, enable_gqa=True), want)
        assert torch.equal(sdpa(query=q, key=kv, value=kv, is_causal=True, scale=0.3, enable_gqa=True), want)
        torch.manual_seed(1)
        dropped = sdpa(q, kv, kv, dropout_p=0.5, is_causal=True, enable_gqa=True)
    torch.manual_seed(1)
    assert torch.equal(dropped, sdpa(q, kv, kv, dropout_p=0.5, enable_gqa=True))


def test_the_sdpa_patch_is_of_one_model(random_llama):
    patched, plain, ids = random_llama(), random_llama(), IDS[:, :7]
    kernel, want = torch.nn.functional.scaled_dot_product_attention, plain(ids).logits
    with patch_causal_attention(patched, "sdpa"):
        assert torch.nn.functional.scaled_dot_product_attention is kernel
        assert torch.equal(plain(ids).logits, want)
        assert not torch.equal(patched(ids).logits, want)
    assert torch.equal(patched(ids).logits, want)


def test_the_sdpa_patch_under_4_bit(random_llama):
    pytest.importorskip("bitsandbytes")
    with tempfile.TemporaryDirectory() as folder:
        random_llama().save_pretrained(folder)
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert patch_causal_attention(model, "sdpa").mechanism == "sdpa"
    gradients = []
    for checkpointing in (False, True):
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        assert probe_attention(peft) == "bidirectional"
        if checkpointing:
            peft.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            peft.enable_input_require_grads()
        torch.manual_seed(5)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        torch.nn.functional.cross_entropy(
            peft.train()(IDS, use_cache=False).logits[:, 0].float(), IDS[:, -1]
        ).backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in peft.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)
    assert gradients[0].abs().max() > 0
