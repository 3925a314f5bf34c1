"""Trainers of small random models, for the tests of training."""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import Qwen3Config, Qwen3ForCausalLM

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
from llm_diffusion.data.tiny import tiny_dataset, tiny_examples

LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def tiny_model(tied=True, seed=0, **options):
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        tie_word_embeddings=tied,
        eos_token_id=2,
        **options,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # the default initialisation is so small that every token is equally likely
        model.model.embed_tokens.weight.mul_(10)
    return model


def preference_rows(n, seed=0):
    """Arithmetic answers beside themselves with one digit moved."""
    rows = []
    for i, example in zip(range(n), tiny_examples(seed, kinds=("arithmetic",)), strict=False):
        question, answer = example["messages"]
        text = answer["content"]
        places = [j for j, letter in enumerate(text) if letter.isdigit()]
        j = places[(7 * i) % len(places)]
        wrong = text[:j] + str((int(text[j]) + 1 + i % 8) % 10) + text[j + 1 :]
        rejected = [{"role": "assistant", "content": wrong}]
        rows.append({"prompt": [question], "chosen": [answer], "rejected": rejected})
    return rows


def pairs(n, seed=0):
    return Dataset.from_list(preference_rows(n, seed))


SETTINGS = {
    "per_device_train_batch_size": 4,
    "max_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
}


def make(tmp_path, tokenizer, model=None, peft_config=None, dataset=None, evaluation=None, **settings):
    settings = SETTINGS | settings
    return DiffusionSFTTrainer(
        tiny_model() if model is None else model,
        DiffusionSFTConfig(str(tmp_path), **settings),
        train_dataset=tiny_dataset(16) if dataset is None else dataset,
        eval_dataset=evaluation,
        processing_class=copy.deepcopy(tokenizer),
        peft_config=peft_config,
    )


def moved(trainer: Any) -> Any:
    """Adapters that do something, so that a teacher who hears them is found out."""
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad and "lora_B" in name:
            parameter.data.normal_(std=0.3)
    return trainer


def step_batch(trainer: Any) -> dict[str, Any]:
    (batch,), trainer.items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return batch
