"""The main job's parts: settings as the trainer gets them, LoRA's targets, Weights & Biases. The whole job: see test_main."""

import os

import pytest
from peft import get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from llm_diffusion import DiffusionDPOConfig
from llm_diffusion.config import build, stages_of
from llm_diffusion.data.datasets import load_splits
from llm_diffusion.job import (
    lora,
    preference_data,
    start_wandb,
    training_arguments,
)


def test_debug_limits_the_data_and_marks_the_run(tmp_path):
    hp = build({"model": "tiny", "debug": True})
    assert training_arguments(hp, {"name": "sft"}, tmp_path, "cpu", "none").run_name == "debug-tiny-sft"


def test_settings_reach_the_trainer(tmp_path):
    hp = build({"warmup_steps": 7, "max_grad_norm": 0.5, "sft_config": {"learning_rate": 1e-5}})
    pretrain, sft = (training_arguments(hp, stage, tmp_path, "cpu", "none") for stage in stages_of(hp))
    assert (pretrain.warmup_steps, pretrain.max_grad_norm) == (7, 0.5)
    assert (pretrain.learning_rate, sft.learning_rate) == (2e-4, 1e-5)
    assert pretrain.completion_only_loss is False and sft.completion_only_loss is None


def test_preferences_have_a_learning_rate_of_their_own(tmp_path):
    """What runs of all phases share is handed on; what means something else to a loss of preferences is not."""
    hp = build({"phases": ["sft", "dpo"], "batch_size": 3, "learning_rate": 1e-2, "attention": "block", "eos_tail": 4})
    sft, dpo = (training_arguments(hp, stage, tmp_path, "cpu", "none") for stage in stages_of(hp))
    assert (sft.learning_rate, sft.eos_tail) == (1e-2, 4)
    assert (dpo.learning_rate, dpo.per_device_train_batch_size, dpo.attention) == (1e-6, 3, "block")
    assert isinstance(dpo, DiffusionDPOConfig)


def test_wandb_without_a_login_goes_on_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    hp = build({"use_wandb": True, "debug": True, "wandb_config": {"wandb_log_path": str(tmp_path / "w")}})
    assert start_wandb(hp) == "wandb"
    assert os.environ["WANDB_MODE"] == "offline" and os.environ["WANDB_PROJECT"] == "debug-llm-diffusion"


def test_lora_targets_are_resolved_for_other_architectures():
    phi = PhiForCausalLM(
        PhiConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    for model in (phi, gpt2):
        adapted = get_peft_model(model, lora(build({}), model))
        assert adapted.get_nb_trainable_parameters()[0] > 0
    with pytest.raises(ValueError, match="query_proj"):
        lora(build({"lora_config": {"target_modules": ["query_proj"]}}), phi)
    with pytest.raises(ValueError, match="lora_config"):
        build({"lora_config": {"rank": 4}})


def test_lora_on_attention_alone_by_its_real_names():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    config = lora(build({"lora_config": {"target_modules": "attention"}}), model)
    adapted = {name for name, _ in get_peft_model(model, config).named_parameters() if "lora_A" in name}
    assert len(adapted) == 4 and all(".attn." in name for name in adapted)  # two layers, c_attn and c_proj


def test_preferences_are_errors_in_the_training_answers():
    hp = build({"dataset": "tiny", "phases": ["sft", "dpo"]})
    train, test = load_splits("tiny", test_size=12, seed=0, limit=24)
    pairs, held_out = preference_data(hp, train, test, None)
    answers = {example["messages"][-1]["content"] for example in train}
    assert 12 <= len(pairs) <= len(train) and 6 <= len(held_out) <= len(test)
    for pair in pairs:
        assert pair["chosen"][0]["content"] in answers and pair["rejected"] != pair["chosen"]
