"""Analysis: exact counts, estimates against a real step, advice, and errors."""

import copy
import json
from dataclasses import asdict, replace

import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch.profiler import ProfilerActivity, profile

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
from llm_diffusion.analysis import (
    CARDS,
    GIB,
    KINDS,
    ModelMemory,
    TrainingSetup,
    _changes,
    _describe,
    _fit,
    analysis_tables,
    analyze,
    load_config,
)
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

IDS = {"vocab_size": 576, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {**IDS, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
TINY = {
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
    "wide": hf.Qwen3Config(**{**GROUPED, "vocab_size": 16384}, head_dim=16, tie_word_embeddings=True),
    "llama": hf.LlamaConfig(**SMALL),
    "gpt2": hf.GPT2Config(**IDS, n_embd=64, n_layer=6, n_head=4),
    "phi": hf.PhiConfig(**SMALL),
    "mistral": hf.MistralConfig(**GROUPED),
    "stablelm": hf.StableLmConfig(**GROUPED),
    "gemma2": hf.Gemma2Config(**GROUPED, head_dim=16),
    "mixtral": hf.MixtralConfig(**GROUPED, num_local_experts=4),
    "gpt_neox": hf.GPTNeoXConfig(**SMALL),
    "falcon": hf.FalconConfig(**IDS, hidden_size=64, num_hidden_layers=6, num_attention_heads=4),
}
QWEN3 = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True}
QWEN3_SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
LLAMA = {"vocab_size": 128256, "num_key_value_heads": 8}
LLAMA_3B = {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
PUBLISHED = [
    (hf.GPT2Config(), 124_439_808),
    (hf.Qwen3Config(**QWEN3, **QWEN3_SMALL), 596_049_920),
    (hf.Qwen3Config(**QWEN3, **QWEN3_4B), 4_022_468_096),
    (hf.LlamaConfig(**LLAMA, **LLAMA_3B, tie_word_embeddings=True), 3_212_749_824),
    (hf.LlamaConfig(**LLAMA, **LLAMA_8B), 8_030_261_248),
]


@pytest.fixture(autouse=True)
def one_thread():
    """On tensors this small, threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("config", "total"), PUBLISHED, ids=[str(total) for _, total in PUBLISHED])
def test_totals_are_the_published_ones(config, total):
    assert ModelMemory(config).parameters["total"] == total


@pytest.mark.parametrize("name", TINY)
def test_every_parameter_belongs_to_one_part(name):
    memory = ModelMemory(TINY[name])
    parameters, model = memory.parameters, memory.model
    assert parameters["total"] == model.num_parameters() == sum(n for part, n in parameters.items() if part != "total")
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert (parameters["head"] == 0) == tied
    names = [name for name, _ in model.named_parameters()]
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n.split(".")[-2] and "self_attn" not in n)
    norms += sum(p.numel() for n, p in model.named_parameters() if n.split(".")[-2] in ("ln_1", "ln_2", "ln_f"))
    assert parameters["other"] == norms, names
    assert min(parameters[part] for part in ("embeddings", "attention", "mlp")) > 0


@pytest.mark.parametrize("name", TINY)
def test_adapters_are_counted_as_peft_makes_them(name):
    memory = ModelMemory(TINY[name])
    lora = LoraConfig(r=5, target_modules="all-linear", trainable_token_indices=[0], fan_in_fan_out=name == "gpt2")
    with torch.device("meta"):
        model = get_peft_model(copy.deepcopy(memory.model), lora)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.trained(TrainingSetup("lora", lora_rank=5)) == trained


def peak(loss, folder):
    """The allocator's own tally at its highest, above where it stood: events in the order of their clock may be out of order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        loss().backward()
    events.export_chrome_trace(str(folder / "trace.json"))
    trace = json.loads((folder / "trace.json").read_text())["traceEvents"]
    tallies = [event["args"] for event in trace if event.get("name") == "[memory]"]
    start = min(tally["Total Allocated"] - tally["Bytes"] for tally in tallies if tally["Bytes"] > 0)
    return max(tally["Total Allocated"] for tally in tallies) - start


def real_step(tmp_path, config, setup):
    """Bytes that autograd saves in the forward, and the allocator's peak over forward and backward, of a real micro-batch."""
    torch.manual_seed(0)
    lengths = [setup.length - i % 2 for i in range(setup.batch_size)]
    trainer = DiffusionSFTTrainer(
        hf.AutoModelForCausalLM.from_config(copy.deepcopy(config)),
        DiffusionSFTConfig(
            str(tmp_path),
            per_device_train_batch_size=setup.batch_size,
            max_length=setup.length,
            attention=setup.attention,
            min_mask_probability=0.99,
            gradient_checkpointing=setup.gradient_checkpointing,
            use_cpu=True,
            report_to="none",
            dataloader_pin_memory=False,
        ),
        train_dataset=Dataset.from_list([{"input_ids": torch.randint(10, 430, (n,)).tolist()} for n in lengths]),
        processing_class=hf.AutoTokenizer.from_pretrained(TINY_MODEL_PATH),
        peft_config=None
        if setup.kind == "full"
        else LoraConfig(r=16, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    model = trainer.model.train()
    if setup.gradient_checkpointing:
        model.activation_checkpointing_enable()
    batch = next(iter(trainer.get_train_dataloader()))
    batch |= {"noise_rows": torch.arange(setup.batch_size), "n_noise_rows": setup.batch_size}
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    known = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage
        return tensor

    def loss():
        return trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(sum(lengths)))

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss()
    saved = sum(storage.nbytes() for storage in saved.values())
    return saved, peak(loss, tmp_path)


@pytest.mark.parametrize(
    ("name", "setup"),
    [
        ("qwen3", TrainingSetup("lora", 6, 96, gradient_checkpointing=False)),
        ("gpt2", TrainingSetup("full", 6, 96, gradient_checkpointing=False)),
        ("llama", TrainingSetup("lora", 4, 64, attention="block", gradient_checkpointing=False)),
        ("llama", TrainingSetup("full", 4, 96, attention="block")),
        ("qwen3", TrainingSetup("lora", 6, 96)),
        ("gemma2", TrainingSetup("lora", 4, 64)),
        ("mixtral", TrainingSetup("full", 4, 64)),
        ("wide", TrainingSetup("lora", 6, 96)),
        ("wide", TrainingSetup("full", 6, 96)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.kind}-{value.attention}",
)
def test_estimate_is_what_a_real_step_takes(tmp_path, name, setup):
    """Within 10 %, weights and optimiser left out, which are exact."""
    estimate = sum(ModelMemory(TINY[name]).peak(setup, "cpu").values())
    saved, peak = real_step(tmp_path, TINY[name], setup)
    assert peak == pytest.approx(estimate, rel=0.1)
    if not setup.gradient_checkpointing:
        assert saved == pytest.approx(estimate, rel=0.15)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", KINDS)
def test_activations_grow_with_layers_alike(kind, device):
    """Three times the layers keep three times as much: what is outside of them stays."""
    setup = TrainingSetup(kind, 8, 64, gradient_checkpointing=False)
    sizes = []
    for layers in (2, 4, 6):
        config = copy.deepcopy(TINY["llama"])
        config.num_hidden_layers = layers
        sizes.append(ModelMemory(config).peak(setup, device)["activations"])
    assert sizes[2] - sizes[1] == pytest.approx(sizes[1] - sizes[0], rel=0.01) and sizes[1] > 1.5 * sizes[0]


def test_more_of_anything_takes_more():
    memory = ModelMemory(TINY["qwen3"])
    full, lora = TrainingSetup("full", 1, 32), TrainingSetup("lora", 1, 32)
    least = memory.training(full)["total"]
    for more in ({"batch_size": 2}, {"length": 64}, {"attention": "block"}, {"gradient_checkpointing": False}):
        assert memory.training(replace(full, **more))["total"] > least, more
    for less in ({"kind": "lora"}, {"optimizer": "paged_adamw_8bit"}, {"cards": 2}):
        assert memory.training(replace(full, **less))["total"] < least, less
    assert memory.training(replace(lora, lora_rank=32))["total"] > memory.training(lora)["total"]
    assert memory.training(replace(lora, kind="qlora"))["weights"] < memory.training(lora)["weights"]


def test_full_fine_tuning_is_sixteen_bytes_a_parameter():
    memory = ModelMemory(TINY["qwen3"])
    assert sum(memory.fixed(TrainingSetup("full")).values()) == 16 * memory.parameters["total"]


def test_changes_go_from_the_least_intrusive_to_two_cards():
    changes = [changes for changes, _ in _changes(TrainingSetup("lora", 4, 768, gradient_checkpointing=False))]
    assert changes[0] == [] and changes[1] == ["gradient_checkpointing: true"]
    assert changes[2] == ["gradient_checkpointing: true", "batch_size: 2 and 2 x accumulation"]
    assert changes[5][-1] == "max_length: 256"
    assert changes[6] == ["use_qlora: true"]
    assert changes[-1] == [
        "use_qlora: true",
        "optim: paged_adamw_8bit",
        "two such cards by device_map",
        "gradient_checkpointing: true",
        "batch_size: 1 and 4 x accumulation",
        "max_length: 256",
    ]


def test_a_card_that_is_too_small_gets_the_first_change_that_helps():
    memory = ModelMemory(hf.LlamaConfig(vocab_size=128256, num_key_value_heads=8, **LLAMA_8B))
    fit = _fit(memory, "RTX 4080", TrainingSetup("lora", 1, 512))
    assert not fit["fits"] and fit["total"] > 16  # 15 GiB of weights
    assert fit["changes"] == ["use_qlora: true"] and fit["total_changed"] < 16
    roomy = _fit(memory, "RTX 3090/4090", TrainingSetup("lora", 1, 512))
    assert roomy["fits"] and roomy["changes"] == [] and roomy["total_changed"] is None
    hopeless = _fit(memory, "RTX 4080", TrainingSetup("full", 1, 512))
    assert not hopeless["fits"] and hopeless["changes"] == [] and hopeless["total_changed"] is None


def test_analysis_of_the_tiny_model_is_json_and_tables():
    analysis = analyze("tiny", batch_size=2, length=32)
    loaded = json.loads(json.dumps(asdict(analysis)))
    assert loaded["name"] == "tiny" and loaded["model"]["layers"] == 6 and loaded["model"]["softmax_attention"] is True
    assert set(loaded["training"]) == set(KINDS) and len(loaded["cards"]) == len(KINDS) * len(CARDS)
    assert all(fit["fits"] and fit["changes"] == [] for fit in loaded["cards"])
    for sizes in loaded["training"].values():
        assert sizes.pop("total") == pytest.approx(sum(sizes.values()))
    console = Console(width=110, record=True, file=open("/dev/null", "w"))
    for table in analysis_tables(analysis):
        console.print(table)
    text = console.export_text()
    for word in ("Qwen3ForCausalLM", f"{analysis.parameters['total']:,}", "RTX 4080", "fits"):
        assert word in text


def test_weights_and_cache_are_those_of_the_formats():
    config = hf.LlamaConfig(**{**SMALL, "num_hidden_layers": 2})
    analysis = _describe("llama", ModelMemory(config), TrainingSetup(length=16))
    total = analysis.parameters["total"]
    rest = analysis.parameters["embeddings"] + analysis.parameters["other"] + analysis.parameters["head"]
    assert analysis.weights["bf16"] == 2 * total / GIB and analysis.weights["fp32"] == 4 * total / GIB
    assert analysis.weights["int8"] * GIB == total - rest + 2 * rest
    assert analysis.weights["nf4"] * GIB == pytest.approx((total - rest) * 4.127 / 8 + 2 * rest, rel=1e-4)
    # Keys and values, 2 layers, 4 heads of 16, 16 tokens, 2 bytes.
    assert analysis.inference["kv_cache"] * GIB == 2 * 2 * 4 * 16 * 16 * 2


def test_notes_tell_what_conversion_changes_and_refuses():
    windowed = _describe("mistral", ModelMemory(TINY["mistral"]), TrainingSetup())
    assert windowed.model["sliding_window"] == 4096 and "sliding window of 4096" in windowed.notes[0]
    mamba = analyze(hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    assert mamba.model["softmax_attention"] is False and not mamba.training and len(analysis_tables(mamba)) == 3
    assert "MambaMixer run from left to right" in mamba.notes[0] and "refused" in mamba.notes[0]
    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]}
    hybrid = analyze(hf.Lfm2Config(**{**GROUPED, **layers}))
    assert hybrid.model["softmax_attention"] is False and not hybrid.training
    assert "Lfm2ShortConv run from left to right" in hybrid.notes[0] and "no estimate of training" in hybrid.notes[1]


def test_an_adapter_is_analysed_as_its_base(tmp_path):
    LoraConfig(base_model_name_or_path=str(TINY_MODEL_PATH)).save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).num_hidden_layers == 6


@pytest.mark.parametrize("config", [hf.T5Config(), hf.BertConfig(), hf.ViTConfig()])
def test_other_kinds_of_models_are_refused(config):
    with pytest.raises(ValueError, match=f"`model`: '{config.model_type}'"):
        analyze(config)


def test_settings_out_of_range_and_missing_models_are_refused(tmp_path):
    for key, value in (("batch_size", 0), ("length", 1), ("lora_rank", 0), ("attention", "causal")):
        with pytest.raises(ValueError, match=f"`{key}`"):
            analyze("tiny", **{key: value})
    with pytest.raises(OSError, match="`model`"):
        analyze(str(tmp_path))
