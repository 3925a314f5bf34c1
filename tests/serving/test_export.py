"""What other engines load: SDAR's published keys, shapes and config, GGUF's tensors, metadata and vocabulary, and every refusal."""

import json

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import (
    AutoConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import llm_diffusion as ld
from llm_diffusion import UserError
from llm_diffusion.main import cli
from llm_diffusion.models.record import save_generation_config, save_record, update_record
from llm_diffusion.serving import export as module
from llm_diffusion.serving.export import export

pytestmark = pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")  # it is in SDAR's configs

ROWS, MASK = 280, 261  # some rows behind the vocabulary, whose first free one is the mask's
WIDTH, HEADS, KV, SIZE, INNER, LAYERS, EXPERTS = 8, 4, 2, 4, 12, 2, 3
SHAPE = {
    "vocab_size": ROWS,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
    "bos_token_id": None,
    "eos_token_id": 6,
    "pad_token_id": 6,
}
LORA = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", trainable_token_indices=[MASK])
BLOCKS = {"attention": "block", "clean_context": "block", "block_length": 4}
IDS = {"input_ids": torch.tensor([[1, 5, MASK, 90, MASK, 7, 7, 3]])}

MERGES = [("h", "e"), ("l", "l"), ("he", "ll"), ("Ġ", "t")]
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_tokenizer(cut, **options):
    """Byte-level BPE of a few merges, and an end token."""
    words = [*sorted(ByteLevel.alphabet()), *(one + other for one, other in MERGES)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=MERGES, **options))
    tokenizer.pre_tokenizer = cut
    tokenizer.add_special_tokens(["<|end|>"])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def regex(pattern):
    return Sequence([Split(Regex(pattern), "isolated"), ByteLevel(add_prefix_space=False, use_regex=False)])


def build(kind, config, seed=0, **options):
    torch.manual_seed(seed)
    return kind(config(**{**SHAPE, **options})).eval()


def converted(folder, model, tokenizer, changes=None, **options):
    """A checkpoint as the trainers save it; `changes` of its record."""
    ld.convert_to_diffusion(model, tokenizer, **options)
    update_record(model, **{"conversion_steps": 3, **(changes or {})})
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@torch.no_grad()
def adapter_over(base, folder, targets):
    model, tokenizer = ld.load_diffusion_model(base, device="cpu")
    torch.manual_seed(1)
    peft = get_peft_model(model, targets)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.add_(0.3 * torch.randn_like(parameter))
    peft.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)
    save_record(peft, folder)
    save_generation_config(peft, folder)
    return str(folder)


# -- SDAR


@pytest.fixture
def small_mask(monkeypatch):
    """SDAR's vocabulary ends at 280 words, in place of 151,936."""
    monkeypatch.setitem(module._ASSUMED_BY["sdar"], "mask_token_id", MASK)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory):
    model = build(Qwen3ForCausalLM, Qwen3Config, head_dim=SIZE, tie_word_embeddings=True)
    return converted(tmp_path_factory.mktemp("qwen3"), model, byte_tokenizer(regex(QWEN2)), **BLOCKS)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, qwen3):
    return adapter_over(qwen3, tmp_path_factory.mktemp("adapter"), LORA)


def published_shapes(mlp):
    """As the index of JetLM/SDAR-4B-Chat lists them, 11 a layer of a dense one and 3 more."""
    layer = {
        "input_layernorm": (WIDTH,),
        "post_attention_layernorm": (WIDTH,),
        "self_attn.q_proj": (HEADS * SIZE, WIDTH),
        "self_attn.k_proj": (KV * SIZE, WIDTH),
        "self_attn.v_proj": (KV * SIZE, WIDTH),
        "self_attn.o_proj": (WIDTH, HEADS * SIZE),
        "self_attn.q_norm": (SIZE,),
        "self_attn.k_norm": (SIZE,),
        **mlp,
    }
    outer = {"model.embed_tokens.weight": (ROWS, WIDTH), "lm_head.weight": (ROWS, WIDTH), "model.norm.weight": (WIDTH,)}
    return outer | {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}


MLP = {"gate_proj": (INNER, WIDTH), "up_proj": (INNER, WIDTH), "down_proj": (WIDTH, INNER)}
DENSE = {f"mlp.{name}": shape for name, shape in MLP.items()}
MOE = {f"mlp.experts.{j}.{name}": shape for j in range(EXPERTS) for name, shape in MLP.items()}
MOE |= {"mlp.gate": (EXPERTS, WIDTH)}
# The keys of JetLM/SDAR-1.7B-Chat without those of its training, and a padding token, which LMDeploy reads.
CONFIG = {
    "architectures": ["SDARForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_sdar.SDARConfig"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "block_size": 4,
    "bos_token_id": None,
    "eos_token_id": 6,
    "head_dim": SIZE,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.3,
    "intermediate_size": INNER,
    "mask_token_id": MASK,
    "max_position_embeddings": 64,
    "max_window_layers": 28,
    "model_type": "sdar",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KV,
    "pad_token_id": 6,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": ROWS,
}


def check_sdar(folder, source, mlp, within=1e-6):
    """The published tensors, and the source's logits after loading them by SDAR's name."""
    assert {name: tuple(weight.shape) for name, weight in load_file(folder / "model.safetensors").items()} == (
        published_shapes(mlp)
    )
    want = ld.load_diffusion_model(source, device="cpu")[0].eval()
    again, tokenizer = ld.load_diffusion_model(str(folder), device="cpu")
    record = again.config.diffusion
    assert {name: record[name] for name in BLOCKS} == BLOCKS and not record["right_shift_logits"]
    assert tokenizer.mask_token_id == again.generation_config.mask_token_id == MASK
    with torch.no_grad():
        torch.testing.assert_close(again(**IDS).logits, want(**IDS).logits, atol=within, rtol=within)
    return again


def test_sdar_has_the_published_tensors_and_config_and_predicts_the_same(tmp_path, qwen3, small_mask):
    folder = export(qwen3, "sdar", tmp_path / "out", torch.float32)
    model = check_sdar(folder, qwen3, DENSE)
    assert json.loads((folder / "config.json").read_text()) == CONFIG
    read = AutoConfig.from_pretrained(
        folder, trust_remote_code=True
    )  # as SGLang and LMDeploy do, where sdar is unknown
    assert type(read).__name__ == "SDARConfig" and read.model_type == "sdar"
    kept = CONFIG.keys() - {"torch_dtype", "auto_map", "use_cache"}  # what transformers has renamed or reads itself
    assert {name: getattr(read, name) for name in kept} == {name: CONFIG[name] for name in kept}
    head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
    assert head is not embedding and torch.equal(head, embedding)


def test_sdar_holds_the_merged_adapter(tmp_path, adapter, qwen3, small_mask):
    folder = export(adapter, "sdar", tmp_path / "out", torch.float32)
    model = check_sdar(folder, adapter, DENSE, within=1e-5)  # sums in another order
    base = ld.load_diffusion_model(qwen3, device="cpu")[0]
    assert (model(**IDS).logits - base(**IDS).logits).abs().max() > 0.1  # it does something
    assert not list(folder.glob("adapter*")) and not (folder / "diffusion_config.json").exists()


def test_sdar_with_experts(tmp_path, small_mask):
    sizes = {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER, "head_dim": SIZE}
    model = build(Qwen3MoeForCausalLM, Qwen3MoeConfig, **sizes)
    source = converted(tmp_path / "moe", model, byte_tokenizer(regex(QWEN2)), **BLOCKS)
    folder = export(source, "sdar", tmp_path / "out", torch.float32)
    check_sdar(folder, source, MOE)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["SDARMoeForCausalLM"] and config["model_type"] == "sdar_moe"
    assert {name: config[name] for name in sizes} == sizes
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).num_experts == EXPERTS


def test_the_command_writes_bf16(tmp_path, qwen3, small_mask):
    out = tmp_path / "out"
    result = CliRunner().invoke(cli, ["export", qwen3, "--format", "sdar", "--output", str(out)])
    assert result.exit_code == 0 and result.output.rstrip().endswith(f"written: {out}")
    assert {weight.dtype for weight in load_file(out / "model.safetensors").values()} == {torch.bfloat16}
    again = CliRunner().invoke(cli, ["export", qwen3, "--format", "sdar", "--output", str(out)])
    assert again.exit_code == 2 and again.output.count("\n") == 1 and "exists; choose a new folder" in again.output


# -- GGUF

KINDS = {"llada": (LlamaForCausalLM, LlamaConfig), "dream": (Qwen2ForCausalLM, Qwen2Config)}
BYTES = ByteLevel(add_prefix_space=False)
PRE = {
    "gpt-2": (BYTES, {}),
    "smollm": (Sequence([Digits(individual_digits=True), BYTES]), {}),
    "qwen2": (regex(QWEN2), {}),
    "llama-bpe": (regex(QWEN2.replace(r"\p{N}|", r"\p{N}{1,3}|")), {"ignore_merges": True}),
}
OUTER = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def gguf_name(name):
    if name in OUTER or name == "lm_head.weight":
        return OUTER.get(name, "output.weight")
    _, _, layer, *part, ending = name.split(".")
    return f"blk.{layer}.{LAYER['.'.join(part)]}.{ending}"


def neighbours(weight, heads):
    """Row 2i of a head is its row i, and row 2i + 1 the one half a head further: what LLaDA turns together."""
    size = len(weight) // heads
    return weight[[head * size + i + j for head in range(heads) for i in range(size // 2) for j in (0, size // 2)]]


@pytest.mark.parametrize("name", PRE)
def test_the_pre_tokenizer_is_called_as_in_llama_cpp(name):
    cut, options = PRE[name]
    assert module._pre_tokenizer(byte_tokenizer(cut, **options)) == name


@pytest.mark.parametrize(
    ("arch", "pre", "tied", "dtype"),
    [("llada", "smollm", True, torch.float32), ("dream", "qwen2", False, torch.bfloat16)],
)
def test_a_gguf_file_has_the_weights_settings_and_vocabulary(tmp_path, arch, pre, tied, dtype):
    gguf = pytest.importorskip("gguf")
    (kind, config), (cut, options) = KINDS[arch], PRE[pre]
    model = build(kind, config, tie_word_embeddings=tied)
    source = converted(tmp_path / "base", model, byte_tokenizer(cut, **options), right_shift_logits=tied)
    if tied:
        source = adapter_over(source, tmp_path / "adapter", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    file = export(source, "gguf", tmp_path / "out", dtype)
    model, tokenizer = ld.load_diffusion_model(source, device="cpu")
    model = model.merge_and_unload() if tied else model
    read = gguf.GGUFReader(file)
    found = {t.name: torch.tensor(gguf.quants.dequantize(t.data, t.tensor_type)) for t in read.tensors}
    want = {gguf_name(name): weight.detach().to(dtype).float() for name, weight in model.named_parameters()}
    if arch == "llada":
        for name in want:
            heads = {"attn_q": HEADS, "attn_k": KV}.get(name.split(".")[-2])
            want[name] = neighbours(want[name], heads) if heads else want[name]
    assert found.keys() == want.keys() and ("output.weight" in found) != tied
    assert all(torch.equal(found[name], want[name]) for name in want)
    kinds = {(len(t.shape), t.tensor_type.name) for t in read.tensors}
    assert kinds == {(1, "F32"), (2, "F32" if dtype == torch.float32 else "BF16")}
    value = {name: field.contents() for name, field in read.fields.items()}
    assert value["general.architecture"] == arch and value["diffusion.shift_logits"] is tied
    assert value["tokenizer.ggml.mask_token_id"] == tokenizer.mask_token_id
    assert value["tokenizer.ggml.pre"] == pre and value["tokenizer.ggml.add_bos_token"] is False
    names = {"context_length": 64, "embedding_length": WIDTH, "feed_forward_length": INNER, "block_count": LAYERS}
    names |= {"attention.head_count": HEADS, "attention.head_count_kv": KV, "attention.causal": False}
    names |= {"rope.dimension_count": WIDTH // HEADS, "attention.key_length": WIDTH // HEADS, "vocab_size": ROWS}
    assert {name: value[f"{arch}.{name}"] for name in names} == names
    assert value[f"{arch}.rope.freq_base"] == 1e6
    assert value[f"{arch}.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    tokens, types = value["tokenizer.ggml.tokens"], value["tokenizer.ggml.token_type"]
    used = len(tokenizer)
    assert tokens[:used] == tokenizer.convert_ids_to_tokens(range(used)) and len(tokens) == ROWS > used
    special = set(tokenizer.all_special_ids)
    assert types == [5 if i >= used else 3 if i in special else 1 for i in range(ROWS)]
    assert value["tokenizer.ggml.merges"] == [" ".join(pair) for pair in MERGES]


# -- refusals

LLAMA, QWEN = (LlamaForCausalLM, LlamaConfig), (Qwen3ForCausalLM, Qwen3Config)
SCALED = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "linear", "factor": 2.0}}
BIDIRECTIONAL = {"attention": "bidirectional"}
REFUSED = {
    "sdar of a Llama": ("sdar", LLAMA, {}, BLOCKS, "'sdar' holds qwen3 and qwen3_moe models, this one is llama"),
    "sdar, bidirectional": ("sdar", QWEN, {}, BIDIRECTIONAL, "`attention` is 'bidirectional', where 'sdar' must have"),
    "sdar, causal context": ("sdar", QWEN, {}, {"attention": "block"}, "`clean_context` is 'causal'"),
    "sdar, shifted": ("sdar", QWEN, {}, {**BLOCKS, "right_shift_logits": True}, "`right_shift_logits` is True"),
    "sdar, another mask": ("sdar", QWEN, {}, BLOCKS, "`mask_token_id` is 261, where 'sdar' must have 151669"),
    "sdar, untrained": ("sdar", QWEN, {"conversion_steps": 0}, BLOCKS, "`trained` is False"),
    "sdar, a drafter": ("sdar", QWEN, {}, {"attention": "lossless"}, "give them its base"),
    "sdar, some layers dense": (
        "sdar",
        (Qwen3MoeForCausalLM, Qwen3MoeConfig),
        {"config": {"num_experts": 2, "num_experts_per_tok": 1, "mlp_only_layers": [0]}},
        {"attention": "block"},
        "`mlp_only_layers` is [0]",
    ),
    "gguf of a Qwen3": ("gguf", QWEN, {}, BIDIRECTIONAL, "'gguf' holds llama and qwen2 models, this one is qwen3"),
    "gguf, in blocks": ("gguf", LLAMA, {}, BLOCKS, "`attention` is 'block', where 'gguf' must have 'bidirectional'"),
    "gguf, told the time": ("gguf", LLAMA, {}, {"time_embedding": True}, "`time_embedding` is True"),
    "gguf, still causal": ("gguf", LLAMA, {"final_causal_ratio": 0.5}, {}, "`final_causal_ratio` is 0.5"),
    "gguf, positions": ("gguf", LLAMA, {"config": SCALED}, {}, "`rope_type` is 'linear'"),
    "gguf, a bias": ("gguf", LLAMA, {"config": {"attention_bias": True}}, {}, "`attention_bias` is True"),
    "gguf, a drafter": ("gguf", LLAMA, {}, {"attention": "lossless"}, "give them its base"),
    "gguf, digits by threes": ("gguf", LLAMA, {"cut": Sequence([Digits(), BYTES])}, {}, r"by ('Digits', 'words')"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_an_engine_would_decode_wrongly_is_refused(case):
    form, (kind, config), changes, options, message = REFUSED[case]
    changes = {"conversion_steps": 3, **changes}
    tokenizer = byte_tokenizer(changes.pop("cut", BYTES))
    model = ld.convert_to_diffusion(build(kind, config, head_dim=2, **changes.pop("config", {})), tokenizer, **options)
    update_record(model, **changes)
    with pytest.raises(UserError) as error:
        module._check(form, model, tokenizer)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_refusal_is_one_line_and_leaves_nothing(tmp_path, qwen3):
    out = tmp_path / "out"
    for form, message in (("sdar", "`mask_token_id` is 261"), ("gguf", "is qwen3"), ("onnx", "('sdar', 'gguf')")):
        result = CliRunner().invoke(cli, ["export", qwen3, "--format", form, "--output", str(out)])
        assert result.exit_code == 2 and result.output.count("\n") == 1 and message in result.output
        assert not list(tmp_path.iterdir())
