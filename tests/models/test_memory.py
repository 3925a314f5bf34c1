"""The memory of a training step: exact counts, and estimates against a real step."""

import copy
import gc
from dataclasses import replace

import pytest
import torch
import transformers as hf
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch._C._profiler import _EventType
from torch.profiler import ProfilerActivity, profile

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.memory import (
    KINDS,
    ModelMemory,
    TrainingSetup,
    _trace,
)

IDS = {"vocab_size": 576, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
SMALL = {**IDS, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 6, "num_attention_heads": 4}
GROUPED = {**SMALL, "num_key_value_heads": 2}
TINY = {
    "qwen3": hf.Qwen3Config(**GROUPED, head_dim=16, tie_word_embeddings=True),
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


def small(name="qwen3", layers=2):
    config = copy.deepcopy(TINY[name])
    config.num_hidden_layers = layers
    config.layer_types = ["full_attention"] * layers
    return config


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
    memory = ModelMemory(small(name, layers=3))
    with torch.device("meta"):
        model = memory.build(3)
        lora = LoraConfig(r=5, target_modules="all-linear", trainable_token_indices=[0], fan_in_fan_out=name == "gpt2")
        trained = sum(p.numel() for p in get_peft_model(model, lora).parameters() if p.requires_grad)
    assert memory.trained(TrainingSetup("lora", lora_rank=5)) == trained


def peak(loss):
    """The allocator's own tally at its highest, above where it stood: events in the order of their clock may be out of order."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as events:
        loss().backward()
    nodes = list(events.profiler.kineto_results.experimental_event_tree())
    for node in nodes:
        nodes += node.children
    tallies = [node.extra_fields for node in nodes if node.tag == _EventType.Allocation]
    start = min(tally.total_allocated - tally.alloc_size for tally in tallies if tally.alloc_size > 0)
    return max(tally.total_allocated for tally in tallies) - start


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
        train_dataset=Dataset.from_list([{"input_ids": torch.randint(10, 500, (n,)).tolist()} for n in lengths]),
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

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(sum(lengths)))
    saved = sum(storage.nbytes() for storage in saved.values())
    gc.collect()
    return saved, max(
        peak(lambda: trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(sum(lengths))))
        for _ in range(2)
    )


@pytest.mark.parametrize(
    ("name", "setup"),
    [
        ("qwen3", TrainingSetup("lora", 6, 96, gradient_checkpointing=False)),
        ("gpt2", TrainingSetup("full", 6, 96, gradient_checkpointing=False)),
        ("llama", TrainingSetup("lora", 4, 64, attention="block", gradient_checkpointing=False)),
        ("llama", TrainingSetup("full", 4, 96, attention="block")),
        ("qwen3", TrainingSetup("lora", 6, 96)),
    ],
    ids=["lora", "full", "lora-block", "full-block-checkpointing", "lora-checkpointing"],
)
def test_estimate_is_what_a_real_step_takes(tmp_path, name, setup):
    estimate = sum(ModelMemory(TINY[name]).peak(setup, "cpu").values())
    saved, peak = real_step(tmp_path, TINY[name], setup)
    assert peak == pytest.approx(estimate, rel=0.05)
    if not setup.gradient_checkpointing:
        assert saved == pytest.approx(estimate, rel=0.15)


@pytest.mark.parametrize(
    ("setup", "device"),
    [(TrainingSetup("full", 3, 8), "cpu"), (TrainingSetup("lora", 1, 64), "cuda")],
    ids=["full", "lora"],
)
def test_depth_is_extrapolated_exactly(setup, device):
    memory = ModelMemory(small(layers=3))
    whole = _trace(memory._trainable(setup, 3, device), setup, device)
    assert sum(memory.peak(setup, device).values()) == max(sum(live.values()) for live in whole)


def test_more_of_anything_takes_more():
    memory = ModelMemory(small(layers=1))
    full, lora = TrainingSetup("full", 1, 32), TrainingSetup("lora", 1, 32)
    least = memory.training(full)["total"]
    for more in ({"batch_size": 2}, {"length": 64}, {"attention": "block"}, {"gradient_checkpointing": False}):
        assert memory.training(replace(full, **more))["total"] > least, more
    for less in ({"kind": "lora"}, {"optimizer": "paged_adamw_8bit"}, {"cards": 2}):
        assert memory.training(replace(full, **less))["total"] < least, less
    assert memory.training(replace(lora, lora_rank=32))["total"] > memory.training(lora)["total"]
    assert memory.training(replace(lora, kind="qlora"))["weights"] < memory.training(lora)["weights"]


def test_experts_are_traced_too():
    memory = ModelMemory(small("mixtral", layers=1))
    sizes = [memory.training(TrainingSetup(kind, 1, 16), "cpu")["activations"] for kind in KINDS]
    assert min(sizes) > 0


def test_full_fine_tuning_is_sixteen_bytes_a_parameter():
    memory = ModelMemory(small())
    assert sum(memory.fixed(TrainingSetup("full")).values()) == 16 * memory.parameters["total"]
