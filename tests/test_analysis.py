"""Analysis: what is counted and told, advice, and errors."""

import json
from dataclasses import asdict

import pytest
import transformers as hf
from peft import LoraConfig
from rich.console import Console

from llm_diffusion.analysis import (
    CARDS,
    _changes,
    _describe,
    _fit,
    analysis_tables,
    analyze,
    load_config,
)
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.memory import (
    GIB,
    KINDS,
    ModelMemory,
    TrainingSetup,
)

SMALL = {
    "vocab_size": 576,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}


def test_changes_go_from_the_least_intrusive_to_two_cards():
    told = [changes for changes, _ in _changes(TrainingSetup("lora", 4, 768, gradient_checkpointing=False))]
    assert told[0] == [] and told[1] == ["gradient_checkpointing: true"]
    assert told[2] == ["gradient_checkpointing: true", "batch_size: 2 and 2 x accumulation"]
    assert told[5][-1] == "max_length: 256"
    assert told[6] == ["use_qlora: true"]
    assert told[-1] == [
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
    assert not fit.fits and fit.total > 16  # 15 GiB of weights
    assert fit.changes == ["use_qlora: true"] and fit.total_changed < 16
    assert _fit(memory, "RTX 3090/4090", TrainingSetup("lora", 1, 512)).fits


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
    analysis = _describe(ModelMemory(hf.LlamaConfig(**SMALL)), TrainingSetup(length=16))
    total = analysis.parameters["total"]
    rest = analysis.parameters["embeddings"] + analysis.parameters["other"] + analysis.parameters["head"]
    assert analysis.weights["bf16"] == 2 * total / GIB and analysis.weights["fp32"] == 4 * total / GIB
    assert analysis.weights["int8"] * GIB == total - rest + 2 * rest
    assert analysis.weights["nf4"] * GIB == pytest.approx((total - rest) * 4.127 / 8 + 2 * rest, rel=1e-4)
    # Keys and values, 2 layers, 4 heads of 16, 16 tokens, 2 bytes.
    assert analysis.inference["kv_cache"] * GIB == 2 * 2 * 4 * 16 * 16 * 2


def test_what_conversion_changes_leaves_and_refuses_is_said():
    windowed = _describe(ModelMemory(hf.MistralConfig(**SMALL, num_key_value_heads=2)), TrainingSetup())
    assert windowed.model["sliding_window"] == 4096 and "sliding window of 4096" in windowed.notes[0]
    mamba = analyze(hf.MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2))
    assert mamba.model["softmax_attention"] is False and not mamba.training and len(analysis_tables(mamba)) == 3
    assert "MambaMixer run from left to right" in mamba.notes[0] and "refused" in mamba.notes[0]
    hybrid = analyze(hf.Lfm2Config(**SMALL, num_key_value_heads=2, layer_types=["conv", "full_attention"]))
    assert hybrid.model["softmax_attention"] is False and not hybrid.training
    assert "Lfm2ShortConv run from left to right" in hybrid.notes[0] and "no estimate of training" in hybrid.notes[1]


class PeekingConfig(hf.LlamaConfig):
    model_type = "peeking"


class PeekingForCausalLM(hf.LlamaForCausalLM):
    config_class = PeekingConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.register_forward_pre_hook(lambda *call: call[2]["input_ids"].max().item(), with_kwargs=True)


def test_a_forward_that_looks_at_its_data_costs_the_estimate_alone():
    hf.AutoModelForCausalLM.register(PeekingConfig, PeekingForCausalLM)
    analysis = analyze(PeekingConfig(**SMALL), batch_size=1, length=8)
    assert analysis.parameters["total"] > 0 and not analysis.cards
    assert "no estimate of training" in analysis.notes[0]


def test_an_adapter_is_analysed_as_its_base(tmp_path):
    LoraConfig(base_model_name_or_path=str(TINY_MODEL_PATH)).save_pretrained(tmp_path)
    assert load_config(str(tmp_path)).num_hidden_layers == 6


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (hf.T5Config(), "is an encoder-decoder"),
        (hf.BertConfig(), "is an encoder;"),
        (hf.ViTConfig(), "has no causal language model"),
    ],
)
def test_other_kinds_of_models_are_refused(config, found):
    with pytest.raises(ValueError, match=f"`model`: '{config.model_type}' {found}.*give a decoder-only"):
        analyze(config)


def test_settings_out_of_range_and_missing_models_are_refused(tmp_path):
    for key, value in (("batch_size", 0), ("length", 1), ("lora_rank", 0)):
        with pytest.raises(ValueError, match=f"`{key}` must be at least"):
            analyze("tiny", **{key: value})
    with pytest.raises(ValueError, match="`attention` must be"):
        analyze("tiny", attention="causal")
    with pytest.raises(OSError, match="`model`: .*is not a loadable checkpoint: .*config.json"):
        analyze(str(tmp_path))
