"""The job of `pipeline: arm`: next-token training from any start, by TRL's own `SFTTrainer`, saved as an ordinary causal model.

What it makes is a start for the pipeline `diffusion`, and its baseline.
Trade-off: the stages, data, logs and `--resume` of the main job; only the trainer is another. Alternative: TRL's command line.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import torch
from loguru import logger
from trl import SFTConfig, SFTTrainer

from .config import HyperParameters, stages_of
from .data.datasets import DEBUG_EXAMPLES, PLAIN_CHAT_TEMPLATE, load_splits
from .job import (
    SETTINGS,
    check_same_settings,
    check_writable,
    lora,
    print_settings,
    start_wandb,
    train_stages,
    training_arguments,
)
from .models.checkpoints import best_device, check_device, quantization_config
from .models.patching import base_of
from .models.special_tokens import use_tokens
from .pipelines import (
    check_positions,
    continue_from_left,
    load_autoregressive,
    scratch_model,
)
from .training.callbacks import plot_loss
from .training.rows import clean_prompts


def trainer(
    model: torch.nn.Module, args: SFTConfig, *, train_dataset: Any, eval_dataset: Any, **rest: Any
) -> SFTTrainer:
    """TRL's trainer; chats are split so that prompts are not trained on, unless every token is."""
    split = args.completion_only_loss is not False
    train_dataset, eval_dataset = clean_prompts(train_dataset, split), clean_prompts(eval_dataset, split)
    if not {"prompt", "messages"} & set(train_dataset.column_names):
        args.completion_only_loss = None  # plain text has no prompt, and the host refuses the word
    return SFTTrainer(model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, **rest)


def run(hp: HyperParameters, resume: bool = False) -> None:
    """Loads or builds a causal model, trains it stage after stage, saves it, and continues `prompts`."""
    started = time.perf_counter()
    device = hp.device or best_device()
    check_device(device)
    if hp.num_threads:
        torch.set_num_threads(hp.num_threads)
    output = Path(hp.output_dir).expanduser()
    quantized = quantization_config("nf4", device, **hp.qlora_config) if hp.use_qlora else None
    check_writable(output, "output_dir")
    if resume:
        check_same_settings(hp, output / SETTINGS)
    report_to = start_wandb(hp)
    arguments = [training_arguments(hp, stage, output, device, report_to, SFTConfig) for stage in stages_of(hp)]
    print_settings(hp)
    limit = DEBUG_EXAMPLES if hp.debug else hp.max_examples
    train, test = load_splits(hp.dataset, test_size=hp.test_size, seed=hp.seed, limit=limit)
    logger.info(f"data: {len(train):,} examples to train on, {len(test):,} held out")
    options: dict[str, Any] = {"device": device, "trust_remote_code": hp.trust_remote_code, **hp.model_init_kwargs}
    if quantized is not None:
        options["quantization_config"] = quantized
    if hp.scratch:
        model, tokenizer = scratch_model(hp.scratch, hp.model, seed=hp.seed, device=device)
    else:
        model, tokenizer = load_autoregressive(hp.model, **options)
    use_tokens(base_of(model), tokenizer, hp.token_ids)
    check_positions(model, hp.max_length)
    tokenizer.chat_template = tokenizer.chat_template or PLAIN_CHAT_TEMPLATE
    logger.info(f"model: {'from nothing' if hp.scratch else hp.model} on {device}, from left to right")
    peft_config = lora(hp, model) if hp.use_lora and not hasattr(model, "peft_config") else None
    load = (lambda folder: load_autoregressive(folder, **options)) if resume else None
    histories = train_stages(hp, arguments, model, tokenizer, peft_config, train, test, output, load, trainer)
    plot_loss(histories, output / "loss.png")
    final = output / "sft_model"
    for stage, history in histories.items():
        losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
        if losses:
            logger.info(f"{stage}: {losses[-1]:.3f} nats a held-out token, perplexity {math.exp(losses[-1]):.2f}")
    if hp.prompts:
        model, tokenizer = load_autoregressive(str(final), **options)
        for answer in continue_from_left(model, tokenizer, hp.prompts, **hp.generation):
            logger.info(f"continued: {answer!r}")
    logger.info(f"saved: {final}; done in {time.perf_counter() - started:.0f} s")
