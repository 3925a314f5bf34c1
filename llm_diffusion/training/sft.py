"""Mask-and-denoise training on TRL's `SFTTrainer`: pretraining on all tokens, and fine-tuning with the prompt left clean.

1. `text` data, or `completion_only_loss=False`: every token may be masked (mask-and-denoise pretraining).
2. `messages`, or `prompt` with `completion`: the prompt stays clean, the answer is masked (prefix-masked fine-tuning).
3. Objective: the NELBO of LLaDA / MDLM on masked positions only; denominator: the maskable tokens of the whole optimiser step,
   over processes and accumulation, so that 1 x 8 and 8 x 1 rows give the same gradient.
4. Noise: hashed from (seed, optimiser step, row of the global batch, position); in evaluation from the row's content.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from peft import PeftConfig
from torch.nn.utils.rnn import pad_sequence
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from .. import UserError
from ..data.tokens import tokenised
from ..models.conversion import set_final_causal_ratio
from ..models.forward import add_row_scores
from ..models.lm_head import train_rows_alone
from ..models.patching import base_of, in_eval_mode
from ..models.record import record_of, update_record
from ..models.special_tokens import set_end_tokens
from ..objective.annealing import Annealing
from ..objective.attention_masks import positions
from ..objective.modes import IGNORE_INDEX
from ..objective.noise import uniform
from ..speculative.training import accepted_lengths, ready_drafter
from .config import DiffusionSFTConfig, own_config
from .distillation import distilled, teacher_scores, with_own_tokens
from .preparation import (
    by_length,
    check_optimizer,
    converted,
    make_collator,
    model_is_loaded,
    prepare_model,
    read_datasets,
    refuse_arguments,
)
from .scoring import Scores, by_level, metric_values, score, score_drafts
from .trainer import DiffusionTrainerMixin, numbered_rows

logger = logging.getLogger(__name__)


class DiffusionSFTTrainer(DiffusionTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` whose loss is the masked-diffusion NELBO. Arguments as there.

    `model` may be a name (loaded by `load_diffusion_model`, "tiny" included), an AR model (converted in place), a converted
    model, or a `PeftModel` of one. With a `peft_config` the mask token's embedding row is trained beside the adapters.

    Logged beside TRL's metrics: `nelbo` (nats a maskable token, the canvas's end tokens among them), `perplexity_bound`,
    `masked_accuracy`, `masked_nll`, `masked_nll_low_noise` (up to a third masked), `…_middle_noise`, `…_high_noise`, `mask_ratio`,
    `masked_entropy` (nats, of the predictions of masked tokens); with distillation `distillation_loss` and `teacher_ratio`. A drafter
    logs no bound, but `accepted_length`: tokens that a verified draft would yield, always in evaluation, in training with distillation.
    `compute_metrics` is given the logits and labels of the tokens that evaluation masks, row by row, already in each other's places.

    References: LLaDA (arXiv 2502.09992, eq. 3 and 5), MDLM (arXiv 2406.07524).

    Example:

        trainer = DiffusionSFTTrainer("tiny", DiffusionSFTConfig("out"), train_dataset=dataset, peft_config=LoraConfig())
        trainer.train()
    """

    _tag_names = ["trl", "sft", "masked-diffusion", "llm-diffusion"]
    _name = "Diffusion SFT"
    loss_is_scaled_for_ga = True  # `compute_loss` divides by the tokens of the whole step

    def __init__(
        self,
        model: torch.nn.Module | str,
        args: DiffusionSFTConfig | TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_loss_func: None = None,
        *,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        formatting_func: Callable[[dict], str] | None = None,
        **kwargs: Any,
    ) -> None:
        args = own_config(args, DiffusionSFTConfig, "diffusion-sft")
        refuse_arguments(data_collator=data_collator, compute_loss_func=compute_loss_func)
        model, processing_class = converted(model, processing_class, args, quantization_config)
        peft_config = prepare_model(model, processing_class, peft_config, args)
        self.diffusion_collator = make_collator(processing_class, model, args)
        self._mode = self.diffusion_collator.record.mode
        # What `_prepare_dataset` needs, which TRL calls before it returns.
        self._formatting = formatting_func
        train_dataset, eval_dataset = read_datasets(train_dataset, eval_dataset, args)
        with model_is_loaded(args):
            super().__init__(
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                # TRL packs for its own collator only; ours takes its place below.
                data_collator=None if args.packing else self.diffusion_collator,
                **kwargs,
            )
        check_optimizer(self.model, self.optimizer)
        self._count_from(None)
        self.data_collator = self.diffusion_collator
        if self._mode.drafts:
            ready_drafter(self.model, self.diffusion_collator.record.mask_token_id, args.gradient_checkpointing)
        set_end_tokens(model, processing_class)  # of a cloned template, and where TRL has put its own first
        self._sums: dict[str, dict[str, torch.Tensor]] = {"train": {}, "eval": {}}
        self._annealed = record_of(model).annealed
        train_rows_alone(self.model)
        add_row_scores(self.model)

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, packing: bool, formatting_func: Any, dataset_name: str
    ) -> Any:
        """Every set that is trained on or evaluated passes here; TRL itself packs and shuffles what comes out of the gate."""
        collator, kinds = self.diffusion_collator, (processing_class, args, dataset_name)
        how = {"ends": collator.end_token_ids, "chat_template": self.chat_template, "formatting_func": self._formatting}
        splits = packing and args.packing_strategy == "bfd_split"
        if packing:  # canvases before packing, or rows would outgrow what they were packed to
            how |= {"finish": collator.canvas} | ({"max_length": None} if splits else {})
        dataset = self._tokenised(tokenised, dataset, *kinds, **how)
        if splits and IGNORE_INDEX in next(iter(dataset))["labels"]:
            raise UserError(
                "`packing_strategy`: 'bfd_split' tears answers from their prompts; use 'bfd', which cuts them."
            )
        whole = copy.copy(args)
        whole.max_length = args.max_length if packing else None  # cut already
        return super()._prepare_dataset(dataset, processing_class, whole, packing, None, dataset_name)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        resume_from_checkpoint, record = self._count_from(resume_from_checkpoint), record_of(self.model)
        if self.args.annealing is not None:
            update_record(self.model, final_causal_ratio=self.args.final_causal_ratio)
            set_final_causal_ratio(base_of(self.model), self.args.final_causal_ratio)
        if self.args.noise_schedule is not None:
            update_record(self.model, noise_schedule=self.args.noise_schedule)
        steps = self.args.annealing_steps
        late = steps is not None and self._start["conversion_steps"] >= steps
        self._annealed = late or record.annealed
        if self.args.annealing is not None and self._annealed:
            logger.warning("the model reached its target in an earlier run: `annealing` is skipped")
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _update_record(self) -> None:
        super()._update_record()
        annealing = self._annealing()
        if annealing is not None and self._conversion_step >= annealing.total_steps:
            update_record(self.model, annealed=True)

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | None]:
        """The micro-batches of one optimiser step, told their rows' places in the global batch; and its loss's denominator."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        numbered_rows(batches, self.accelerator)
        none = torch.zeros((), dtype=torch.long, device=device)
        items = sum((self._items(batch).to(device) for batch in batches), none)
        return batches, self.accelerator.gather(items).sum()

    def _items(self, batch: dict[str, Any]) -> torch.Tensor:
        """What the loss of a step is divided by, of one micro-batch."""
        maskable = batch["labels"] != IGNORE_INDEX
        if self._mode.drafts and self.args.normalization in ("token", "masked"):
            return (self._corrupt(batch, "train")["targets"] != IGNORE_INDEX).sum()  # the others are never scored
        if self.args.normalization == "token":
            return maskable.sum()
        if self.args.normalization == "sequence":
            return maskable.any(-1).sum()
        if self.args.normalization == "length":
            return (batch["attention_mask"] > 0).sum()
        passes = self._passes("train")
        return sum(self._corrupt(batch, "train", complement)["masked"].sum() for complement in passes) / len(passes)

    def _passes(self, mode: str) -> tuple[bool, ...]:
        """Whether each pass over the rows of a batch masks the complement."""
        return (False, True) if mode == "train" and self.args.complementary_masks else (False,)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """NELBO of the batch in nats a maskable token (training: its share of the whole step's)."""
        mode = "train" if self.model.training else "eval"
        passes = self._passes(mode)
        parts = [
            self._part_loss(model, part, mode, complement, 1 / len(passes))
            for part in by_length(inputs, self.args.pad_to_multiple_of or 1)
            for complement in passes
        ]
        nll, objective = (torch.stack(column).sum() for column in zip(*parts, strict=True))
        if mode == "eval":
            return nll / (inputs["labels"] != IGNORE_INDEX).sum().clamp(min=1)
        # Distributed training averages gradients over processes; the denominator already counts all of them.
        return objective / num_items_in_batch.clamp(min=1) * self.accelerator.num_processes

    def _part_loss(
        self, model: torch.nn.Module, part: dict[str, Any], mode: str, complement: bool, share: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The bound of some rows, in nats, and their part of the objective; `share` of the rows' passes."""
        own = torch.zeros_like(part["labels"][:, 0], dtype=torch.bool)
        if mode == "train" and self.args.on_policy_share and "noise_rows" in part:
            part, own = self._on_policy(model, part)
        noisy = self._corrupt(part, mode, complement)
        with_teacher = self.args.uses_teacher if mode == "train" else self._mode.drafts
        scores = self._score(model, noisy, with_teacher=with_teacher)
        rows, data = scores.at[0], ~own[scores.at[0]]  # the student's own tokens are no labels
        weights, extra_weights = noisy["weights"][scores.at], noisy["extra_weights"][scores.at]
        nll = share * (scores.nll * weights * data).detach().sum()
        maskable = (part["labels"] != IGNORE_INDEX) & ~(own | noisy["first_step"])[:, None]
        self._add_scores(mode, noisy, scores, (weights > 0) & data, data)
        self._add(mode, nll=nll, maskable=share * maskable.sum(), masked=share * (noisy["masked"] & maskable).sum())
        objective = scores.nll * data
        if mode == "train" and scores.logits is not None:
            objective = self._distill(model, part, noisy, scores, objective, data)
        objective = objective * (weights + extra_weights)
        if self.args.normalization == "sequence":
            tokens = (part["labels"] != IGNORE_INDEX).sum(-1).clamp(min=1)
            objective = objective / tokens[rows]
        return nll, share * objective.sum()

    def _add_scores(
        self, mode: str, noisy: dict[str, Any], scores: Scores, bound: torch.Tensor, data: torch.Tensor
    ) -> None:
        """Adds to the metrics; `bound`, `data` (n,) bool: which targets count to the bound, and which are the data's."""
        terms, levels = scores.nll.detach(), noisy["levels"][scores.at]
        self._add(
            mode,
            terms=(terms * bound).sum(),
            right=(scores.right & bound).sum(),
            entropy=(scores.entropy * bound).sum(),
            scored=bound.sum(),
            **by_level(terms * data, levels * data),
        )
        if scores.teacher is not None:
            agrees = scores.logits.detach().argmax(-1) == scores.teacher.argmax(-1)
            block_length = self._block_length() if mode == "train" else self._mode.block_length
            whole = (levels == 1) & data
            accepted, blocks = accepted_lengths(agrees, scores.at[0], noisy["tokens"][scores.at], whole, block_length)
            self._add(mode, accepted=accepted, blocks=blocks)

    def _distill(
        self,
        model: torch.nn.Module,
        part: dict[str, Any],
        noisy: dict[str, Any],
        scores: Scores,
        objective: torch.Tensor,
        data: torch.Tensor,
    ) -> torch.Tensor:
        """The objective of every term (n,) with the AR teacher's distribution in place of its share of the labels."""
        tokens = noisy["tokens"][scores.keep]
        at_teacher = noisy["teacher_mask"][scores.keep] & (tokens > 0)
        if scores.teacher is not None:
            logits, hidden = scores.teacher[at_teacher], None
        else:
            places, packed = (scores.at[0][at_teacher], tokens[at_teacher]), self.diffusion_collator.packing
            logits, hidden = teacher_scores(model, self.model, part, *places, packed)
        student = scores.logits[at_teacher], None if hidden is None else scores.hidden[at_teacher]
        mixed, loss = distilled(objective[at_teacher], data[at_teacher], student, (logits, hidden), self.args)
        self._add("train", distillation=loss.sum(), from_teacher=at_teacher.sum(), targets=scores.keep.sum())
        return objective.index_put((at_teacher.nonzero()[:, 0],), mixed)

    def _on_policy(self, model: torch.nn.Module, part: dict[str, Any]) -> tuple[dict[str, Any], torch.Tensor]:
        """The rows, some of them with the student's own tokens where another noise had masked them; and which, (B,)."""
        seed, step = self.args.seed + 1, self._conversion_step
        chosen = uniform(seed, step, part["noise_rows"]) < self.args.on_policy_share
        noisy = self._corrupt(part, "train", seed=seed)
        with in_eval_mode(model):
            scores = self._score(model, noisy, with_teacher=True)
        keys, collator = (seed, step, part["noise_rows"]), self.diffusion_collator
        special = collator.record.mask_token_id, collator.end_token_ids
        return with_own_tokens(part, noisy, scores.logits, scores.keep, chosen, keys, *special), chosen

    def _corrupt(
        self, part: dict[str, Any], mode: str, complement: bool = False, seed: int | None = None
    ) -> dict[str, Any]:
        """The rows under the noise and the attention of this step; in evaluation under fixed noise and at the target."""
        rows = part.get("noise_rows") if mode == "train" else None
        step, annealing = self._conversion_step, self._annealing()
        noisy = self.diffusion_collator.corrupt(
            part,
            seed=self.args.seed if seed is None else seed,
            step=0 if rows is None else step,
            rows=rows,
            n_rows=part.get("n_noise_rows"),
            block_length=self._block_length() if mode == "train" else None,
            complement=complement,
        )
        if annealing is not None and not self._mode.has_blocks:
            # Evaluation is at the target, as generation is.
            at = step if mode == "train" else annealing.total_steps
            mask = annealing.mask(part["attention_mask"], at, self.args.seed, self.args.max_length)
            if mask is not None:  # some architectures derive positions from a 2-D mask, which this is not
                place = positions(part["attention_mask"]).clamp(min=0)
                noisy["inputs"] |= {"attention_mask": mask, "position_ids": place}
        return noisy

    def _block_length(self) -> int | None:
        """Of this step's blocks, which may still grow; None without blocks."""
        annealing, target = self._annealing(), self._mode.block_length
        if annealing is None or target is None:
            return target
        length = annealing.block_length(self._conversion_step, target)
        return max(length, 2) if self._mode.drafts else length  # of a block of one nothing is drafted

    def _annealing(self) -> Annealing | None:
        if self._annealed:
            return None
        return self.args.annealing_to(self._start["conversion_steps"] + self.state.max_steps)

    def _annealing_metrics(self) -> dict[str, float]:
        """Where the model is on its way from causal attention."""
        annealing, step = self._annealing(), self._conversion_step
        if annealing is None:
            return {}
        if annealing.grows_blocks:
            return {"annealed_block_length": self._block_length() or annealing.block_length(step, self.args.max_length)}
        return {"causal_ratio": annealing.causal_ratio(step)}

    def _score(self, model: torch.nn.Module, noisy: dict[str, Any], with_teacher: bool = False) -> Scores:
        """What the model predicts at the targets; `with_teacher` keeps its logits and hidden states."""
        inputs = self._model_inputs(noisy)
        if self._mode.drafts:
            return score_drafts(model, self.model, inputs, noisy, with_teacher)
        return score(model, inputs, noisy["targets"], with_teacher)

    def _add(self, mode: str, **new: torch.Tensor) -> None:
        """Adds to the running sums, on the device: nothing is read back before it is logged."""
        for name, value in new.items():
            self._sums[mode][name] = self._sums[mode].get(name, 0) + value

    def _metric_values(self, mode: str) -> dict[str, float]:
        sums = {name: self.accelerator.gather(value).sum().item() for name, value in self._sums[mode].items()}
        self._sums[mode] = {}
        return metric_values(sums, bounded=not self._mode.drafts)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self.model.training:
            tokens = {"num_tokens": self._num_tokens()}
            logs = {**logs, **self._metric_values("train"), **self._annealing_metrics(), **tokens}
        super().log(logs, start_time)

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> EvalLoopOutput:
        self._sums["eval"] = {}
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        values = {f"{metric_key_prefix}_{name}": value for name, value in self._metric_values("eval").items()}
        output.metrics.update(values)
        loss = f"{metric_key_prefix}_{'masked_nll' if self._mode.drafts else 'nelbo'}"
        if loss in values:
            # Over all tokens at once, so the same whatever the batch size; transformers averages batches.
            output.metrics[f"{metric_key_prefix}_loss"] = values[loss]
        return output

    def _without_repeated(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """The rows, without labels where a loader has dealt the first ones again, so that every process has a whole last batch."""
        loader, labels = self.accelerator.gradient_state, inputs["labels"]
        if not loader.end_of_dataloader or loader.remainder <= 0:
            return inputs
        places = self.accelerator.process_index * len(labels) + torch.arange(len(labels), device=labels.device)
        return {**inputs, "labels": labels.masked_fill((places >= loader.remainder)[:, None], IGNORE_INDEX)}

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The loss; and for `compute_metrics` the logits (B, M, V) and labels (B, M) of masked tokens alone, -100 behind a row's last."""
        inputs = self._without_repeated(self._prepare_inputs(inputs))
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs).detach()
            if prediction_loss_only:
                return loss, None, None
            noisy = self._corrupt(inputs, "eval")
            scores = self._score(model, noisy, with_teacher=True)
        rows, bound = scores.at[0], noisy["weights"][scores.at] > 0
        of_rows = [bound & (rows == row) for row in range(len(inputs["input_ids"]))]
        tables = ([values[own] for own in of_rows] for values in (scores.logits.float(), noisy["targets"][scores.at]))
        logits, labels = (pad_sequence(table, batch_first=True, padding_value=IGNORE_INDEX) for table in tables)
        return loss, logits, labels
