"""What every trainer of ours does around its objective: noise that knows its rows, masks in the right type, saving with the record,
and no step with a non-finite loss.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils.memory import should_reduce_batch_size
from peft import PeftModel
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from .. import UserError
from ..analysis import PAGED, ModelMemory, TrainingSetup
from ..data.tokens import Tokenising
from ..models.files import write_text
from ..models.patching import Patch, base_of
from ..models.record import (
    keep_record,
    model_card,
    record_of,
    save_custom_generate,
    save_generation_config,
    save_record,
    update_record,
)
from .adapters import has_converted_weights, rows_suffice
from .preparation import counts_before, dataset_field
from .resuming import ResumableTrainerMixin, checkpoint_of

logger = logging.getLogger(__name__)


def numbered_rows(batches: list[dict[str, Any]], accelerator: Accelerator, texts: int = 1) -> None:
    """Tells the micro-batches of one optimiser step their rows' places in the global batch; `texts` belong to one row."""
    processes, index, seen = accelerator.num_processes, accelerator.process_index, 0
    for batch in batches:
        size = len(batch["input_ids"]) // texts
        # Loaders deal whole micro-batches to the processes in turn, and put them on the device.
        first, device = seen * processes + index * size, batch["input_ids"].device
        batch["noise_rows"] = torch.arange(first, first + size, device=device)
        seen += size
    for batch in batches:
        batch["n_noise_rows"] = seen * processes


class DiffusionTrainerMixin(ResumableTrainerMixin):
    """Goes before a trainer of TRL in the bases of a class."""

    _batch: dict[str, Any] | None = None  # of the micro-batch at work, as the loss reads it

    def _tokenised(self, gate: Callable, dataset: Any, tokenizer: Any, args: Any, name: str, **how: Any) -> Any:
        """A dataset through `tokenised` or `tokenised_pairs`, once a machine; `how`: of `Tokenising`."""
        self._reports = getattr(self, "_reports", [])
        field, rules = dataset_field(name), Tokenising.of(tokenizer, args, **how)
        with args.main_process_first(desc=f"preparing {field}"):
            return gate(dataset, rules, field, self._reports, args.dataset_num_proc)

    def _reject_skip_prepare_without_labels(self, datasets: dict[str, Any], data_collator: Any) -> None:
        """TRL's check of masks that nobody would read, which it makes for its own collator alone."""
        super()._reject_skip_prepare_without_labels(datasets, DataCollatorForLanguageModeling(pad_token_id=0))

    @property
    def _conversion_step(self) -> int:
        """Optimiser steps since the conversion: phases share a seed and one annealing, so all of them count."""
        return self._start["conversion_steps"] + self.state.global_step

    def _count_from(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The checkpoint to go on from; steps and tokens are counted from what the model had seen before this run."""
        resume_from_checkpoint = checkpoint_of(self, resume_from_checkpoint)
        record = record_of(self.model)
        self._start = {name: getattr(record, name) for name in ("conversion_steps", "training_tokens")}
        self._tokens_seen = torch.zeros((), dtype=torch.long)
        if resume_from_checkpoint:
            self._start = counts_before(Path(resume_from_checkpoint))
        return resume_from_checkpoint

    def _num_tokens(self) -> int:
        """Tokens of this run, over all processes."""
        return int(self.accelerator.gather(self._tokens_seen.to(self.args.device)).sum())

    def _update_record(self) -> None:
        tokens = self._start["training_tokens"] + self._num_tokens()
        update_record(self.model, conversion_steps=self._conversion_step, training_tokens=tokens)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As there; says what streams have lost by then, which of other datasets is known before the first step.

        Raises:
            UserError: Adam is to train float16 weights.
        """
        half = any(weight.requires_grad and weight.dtype == torch.float16 for weight in self.model.parameters())
        if half and "adam" in str(self.args.optim).lower():
            raise UserError(
                "`model`: its float16 weights lose Adam's second moments, and the loss ends non-finite within a few steps; load it in float32 "
                "(`fp16` still computes in float16), or in bfloat16, or train adapters."
            )
        if isinstance(self.model, PeftModel):
            keep_record(self.model)
        result = super().train(resume_from_checkpoint=self._count_from(resume_from_checkpoint), **kwargs)
        self._update_record()
        self._report_streams()
        return result

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        output = super().evaluation_loop(*args, **kwargs)
        self._report_streams()
        return output

    def _report_streams(self) -> None:
        for lost_rows in getattr(self, "_reports", []):
            lost_rows.report()

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        self._batch = None  # a rollout runs out of memory with no batch at work
        self._batch = super()._prepare_inputs(inputs)
        return self._batch

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As there; a non-finite loss stops the run before it reaches the weights, and running out of memory says what helps."""
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error) or self.args.auto_find_batch_size or self._batch is None:
                raise
            raise out_of_memory(self.model, self.args, self._batch["input_ids"].shape, error) from error
        if not torch.isfinite(loss):  # in place of transformers' filter, which hides it: one wait, as there
            raise save_bad_batch(Path(self.args.output_dir), self.state.global_step, self.args.seed, self._batch, loss)
        seen = (self._batch["attention_mask"] > 0).sum()
        self._tokens_seen = self._tokens_seen.to(seen.device) + seen
        return loss

    def _model_inputs(self, noisy: dict[str, Any]) -> dict[str, Any]:
        """Keywords of the model for what a collator laid out."""
        inputs = {**noisy["inputs"], "use_cache": False}
        if inputs["attention_mask"].dim() == 4:
            inputs["attention_mask"] = self._in_compute_dtype(inputs["attention_mask"])
        return inputs

    def _in_compute_dtype(self, mask: torch.Tensor) -> torch.Tensor:
        """An additive mask in the type that attention computes in; the most negative number of fp32 is -inf in bf16."""
        # Not `torch.is_autocast_enabled`: accelerate turns autocast on inside the model's forward.
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}
        dtype = mixed.get(self.accelerator.mixed_precision, base_of(self.model).dtype)
        return mask.clamp(min=torch.finfo(dtype).min).to(dtype)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        self._update_record()  # what is pushed has its card first
        super()._save_checkpoint(model, trial)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._update_record()
        with Patch() as patch:
            if isinstance(self.model, PeftModel) and rows_suffice(self.model, self.processing_class):
                rows_alone = partial(self.model.save_pretrained, save_embedding_layers=False)
                patch.set(self.model, "save_pretrained", rows_alone)
            super()._save(output_dir, state_dict)
        if self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            self._save_beside(folder, self._card(folder.name))

    def _save_beside(self, folder: Path, card: str) -> None:
        """What stands beside the weights."""
        save_generation_config(self.model, folder)
        if isinstance(self.model, PeftModel):
            save_record(self.model, folder)
        elif not record_of(self.model).time_embedding:
            save_custom_generate(folder)
        write_text(folder / "README.md", card)

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """Our card in place of TRL's, whose quick start decodes from left to right."""
        if self.is_world_process_zero():
            folder = Path(self.args.output_dir)
            card = self._card(model_name or folder.name, tags, dataset_name)
            folder.mkdir(parents=True, exist_ok=True)
            if self.args.push_to_hub:  # from where transformers copies the weights to
                self._save_beside(folder, card)
            else:
                write_text(folder / "README.md", card)

    def _card(self, name: str, tags: str | list[str] | None = None, dataset_name: str | None = None) -> str:
        rows = ({k: v for k, v in row.items() if k.startswith("eval_")} for row in reversed(self.state.log_history))
        figures = next(filter(None, rows), {})
        return model_card(
            record_of(self.model),
            self.hub_model_id or name,
            [*self._tag_names, *([tags] if isinstance(tags, str) else tags or [])],
            isinstance(self.model, PeftModel),
            has_converted_weights(self.model),
            dataset_name,
            figures,
        )


def save_bad_batch(folder: Path, step: int, seed: int, batch: dict[str, Any], loss: torch.Tensor) -> FloatingPointError:
    """Keeps the rows that made the loss non-finite; the error that says so."""
    file = folder / f"bad_batch-{step}.json"
    kept = {name: value.tolist() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    write_text(file, json.dumps({"step": step, "seed": seed, "batch": kept}) + "\n")
    return FloatingPointError(
        f"the loss is {loss.item()} at step {step}; the weights are as they were before it. Its rows are in {str(file)!r}. "
        "Lower `learning_rate` or `max_grad_norm`, compute in bf16 instead of fp16, or look at the rows."
    )


def out_of_memory(model: torch.nn.Module, args: Any, shape: torch.Size, error: Exception) -> torch.OutOfMemoryError:
    """The error with the three settings that save most, each with the GiB that a step takes then."""
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    try:
        now, changes = remedies(model, args, shape)
    except Exception:  # a model that cannot be estimated; the error itself must come through
        return torch.OutOfMemoryError(reason)
    rows = "; ".join(f"{text} ({gib:.2f} GiB)" for text, gib in changes[:3])
    return torch.OutOfMemoryError(
        f"{reason} A step of {shape[0]} x {shape[1]} tokens takes {now:.2f} GiB by estimate (`llm-diffusion analyze`). What helps most: {rows}."
    )


def remedies(model: torch.nn.Module, args: Any, shape: torch.Size) -> tuple[float, list[tuple[str, float]]]:
    """GiB of a step on one card now, and after single changes of settings, the one that saves most first."""
    base = base_of(model)
    adapted = isinstance(model, PeftModel)
    kind = "full" if not adapted else "qlora" if getattr(base, "is_quantized", False) else "lora"
    setup = TrainingSetup(
        kind,
        shape[0],
        shape[1],
        model.peft_config[model.active_adapter].r if adapted else 16,
        "block" if record_of(base).mode.has_blocks else "bidirectional",
        bool(args.gradient_checkpointing),
        PAGED if "8bit" in str(args.optim) else "adamw",
    )
    device, memory = "cuda" if base.device.type == "cuda" else "cpu", ModelMemory(base.config)
    now = memory.training(setup, device)["total"]
    after = [(text, memory.training(tried, device)["total"]) for text, tried in _single_changes(setup, args)]
    return now, sorted((change for change in after if change[1] < now), key=lambda change: change[1])


def _single_changes(setup: TrainingSetup, args: Any) -> Iterator[tuple[str, TrainingSetup]]:
    rows, steps = setup.batch_size, args.gradient_accumulation_steps
    if rows > 1:
        text = (
            f"per_device_train_batch_size {rows} -> {rows // 2} with gradient_accumulation_steps {steps} -> {2 * steps}"
        )
        yield text, replace(setup, batch_size=rows // 2)
    if setup.length >= 4:
        yield f"max_length {setup.length} -> {setup.length // 2}", replace(setup, length=setup.length // 2)
    if not setup.gradient_checkpointing:
        yield "gradient_checkpointing false -> true", replace(setup, gradient_checkpointing=True)
    if setup.kind != "qlora":
        other = {"lora": ("quantization none -> nf4", "qlora"), "full": ("all weights -> LoRA", "lora")}[setup.kind]
        yield other[0], replace(setup, kind=other[1])
    if setup.optimizer != PAGED:
        yield f"optim -> {PAGED}", replace(setup, optimizer=PAGED)
