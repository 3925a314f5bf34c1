"""What the trainers of DPO, KTO and GRPO share: scores, estimates of the ELBO, stand where TRL reads log-probabilities.

1. Policy and reference see the same masks, so that most of the noise cancels in what the loss is a function of.
2. Memory of one forward: the scores are taken without gradient, the loss's slope in each is computed, and then one draw after the other
   is scored again and sent back with its slope. That is the gradient of the whole, by the chain rule.
3. The reference is the adapters off, a frozen copy "ref" of trained adapters, or a frozen copy of a model that trains whole.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import DistributedType
from datasets.fingerprint import Hasher
from peft import PeftConfig, PeftModel
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from .. import UserError
from ..models.conversion import convert_to_diffusion
from ..models.forward import add_row_scores
from ..models.lm_head import train_rows_alone
from ..models.loading import load_diffusion_model
from ..models.patching import base_of
from ..models.record import CONVERSION_OPTIONS, DiffusionRecord, record_of
from ..models.special_tokens import set_to_mean
from .adapters import prepare_adapter
from .collator import REFERENCE_COLUMNS
from .config import own_config
from .preparation import (
    check_optimizer,
    converted,
    make_score_collator,
    model_is_loaded,
    no_router_loss,
    prepare_quantised,
    read_datasets,
    refuse_arguments,
)
from .scoring import DiffusionScore, compute_diffusion_score, score_draw
from .trainer import DiffusionTrainerMixin, numbered_rows

logger = logging.getLogger(__name__)


class ScoreTrainerMixin(DiffusionTrainerMixin):
    """Goes before a trainer of TRL that compares log-probabilities, in the bases of a class.

    The class has `_draws(inputs)`, the noise of a batch, the same every time; `_reference_scores(inputs)`, scores of the reference that are
    not in the batch, by the names under which TRL looks for them; and `_trl_loss(policy, inputs, reference)`, TRL's loss of given scores.
    """

    _texts = 1  # of one row of the data in a batch

    def _begin(
        self,
        model: torch.nn.Module | str,
        args: Any,
        processing_class: PreTrainedTokenizerBase | None,
        *,
        train_dataset: Any,
        eval_dataset: Any,
        ref_model: PreTrainedModel | str | None = None,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        """Readies the model and its reference, and constructs TRL's trainer around them; `kwargs` are what else that takes."""
        model, processing_class = converted(model, processing_class, args, quantization_config)
        record = record_of(model)
        if record.mode.drafts:
            raise UserError(
                "`model`: a drafter's words are verified by its base, whose preferences it cannot change; train a 'bidirectional' or "
                "'block' model."
            )
        if not record.trained:
            logger.warning(
                "`model` has seen no noise yet: preferences and rewards teach it little; fine-tune it as a diffusion model first"
            )
        train_dataset, eval_dataset = read_datasets(train_dataset, eval_dataset, args)
        prepare_quantised(model, args)
        if peft_config is not None:
            peft_config = prepare_adapter(model, peft_config, record)
        no_router_loss(model, args)
        adapted = peft_config is not None or isinstance(model, PeftModel)
        ref_model = self._reference_model(model, ref_model, adapted, processing_class, args)
        for scored in filter(None, (model, ref_model)):  # now: TRL may score the reference before it returns
            add_row_scores(scored)
            disable_functional_dropout(scored)
        self.diffusion_collator = make_score_collator(processing_class, model, args, self._texts)
        self._copies_adapters = isinstance(model, PeftModel) and ref_model is None and bool(args.beta)
        with model_is_loaded(args):
            self._construct(
                ref_model,
                model=model,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
                **kwargs,
            )
        check_optimizer(self.model, self.optimizer)
        self._count_from(None)
        self._complete_reference()
        train_rows_alone(self.model)

    def _reference_model(
        self,
        model: torch.nn.Module,
        given: PreTrainedModel | str | None,
        adapted: bool,
        tokenizer: PreTrainedTokenizerBase,
        args: Any,
    ) -> PreTrainedModel | None:
        return reference_of(model, given, adapted, tokenizer, args)

    def _construct(self, ref_model: PreTrainedModel | None, **kwargs: Any) -> None:
        """TRL's `__init__`."""
        super().__init__(ref_model=ref_model, data_collator=self.diffusion_collator, **kwargs)

    def _complete_reference(self) -> None:
        """Once: what TRL left out of its copy of the adapters."""
        if self._copies_adapters:
            complete_ref_adapter(self.model)
        self._copies_adapters = False

    def _loss_of_trl(self, *args: Any) -> torch.Tensor:
        return super()._compute_loss(*args)

    def _score(self, model: torch.nn.Module, inputs: dict[str, Any]) -> DiffusionScore:
        return compute_diffusion_score(model, self._draws(inputs), self._model_inputs)

    def _compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False
    ) -> torch.Tensor:
        reference = self._reference_scores(inputs)
        if not torch.is_grad_enabled() or self._at_once():
            policy = self._score(model, inputs)
            loss = self._trl_loss(policy, inputs, reference)
        else:
            with torch.no_grad():
                policy = self._score(model, inputs)
            policy.log_probs.requires_grad_()
            loss = self._trl_loss(policy, inputs, reference)
            (slope,) = torch.autograd.grad(loss, policy.log_probs)
            loss = loss.detach() + self._draw_by_draw(model, inputs, slope / policy.n_draws, policy.n_draws)
        self._metrics["train" if self.model.training else "eval"]["draws"].append(float(policy.n_draws))
        return loss

    def _at_once(self) -> bool:
        """Whether the graphs of all draws are kept: one draw has no others, and DeepSpeed's engine steps after every backward pass."""
        return self.args.draws_at(1.0) == 1 or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _draw_by_draw(
        self, model: torch.nn.Module, inputs: dict[str, Any], slope: torch.Tensor, n_draws: int
    ) -> torch.Tensor:
        """Sends every draw but the last one back; of value 0, and with the gradient of the last one."""
        # As transformers does with what is returned.
        scale = 1 if self.loss_is_scaled_for_ga else 1 / self.current_gradient_accumulation_steps
        for number, noisy in enumerate(self._draws(inputs), start=1):
            if number == n_draws:
                break
            with self.accelerator.no_sync(model):
                self.accelerator.backward(scale * self._share(model, noisy, slope))
        last = self._share(model, noisy, slope)
        return last - last.detach()

    def _share(self, model: torch.nn.Module, noisy: dict[str, Any], slope: torch.Tensor) -> torch.Tensor:
        log_probs, _, _ = score_draw(model, self._model_inputs(noisy), noisy)
        return (slope * log_probs[:, 1:]).sum()


class PreferenceTrainerMixin(ScoreTrainerMixin):
    """The same of TRL's DPO and KTO trainers, whose rows are at hand: noise belongs to places in the global batch, and scores of the
    reference may be stored."""

    _config: type[TrainingArguments]
    _reference_columns = REFERENCE_COLUMNS

    def __init__(
        self,
        model: torch.nn.Module | str,
        ref_model: PreTrainedModel | str | None = None,
        args: TrainingArguments | None = None,
        data_collator: None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: None = None,
        *,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        **kwargs: Any,
    ) -> None:
        args = own_config(args, self._config, self._name.lower().replace(" ", "-"))
        refuse_arguments(data_collator=data_collator, compute_metrics=compute_metrics)
        self._begin(
            model,
            args,
            processing_class,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            ref_model=ref_model,
            quantization_config=quantization_config,
            peft_config=peft_config,
            **kwargs,
        )

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        self._complete_reference()
        # TRL's cache knows the data and the weights; these scores depend on the noise and the attention too.
        noise = (self.args.seed, self.args.score, self.args.draws_at(1.0), record_of(self.model))
        weights, self._precompute_model_hash = (
            self._precompute_model_hash,
            Hasher.hash((self._precompute_model_hash, noise)),
        )
        try:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        finally:
            self._precompute_model_hash = weights

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The micro-batches of one optimiser step, told their rows' places in the global batch and what they weigh in it."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.args.precompute_ref_log_probs:
            numbered_rows(batches, self.accelerator, self._texts)
        # TRL takes means over a micro-batch, and the mean of these: a short one, or one of few tokens, would weigh too much.
        firsts = [mask[: len(mask) // self._texts, 1:] for mask in (batch["completion_mask"] for batch in batches)]
        counts = torch.tensor([[len(mask), mask.sum()] for mask in firsts], dtype=torch.float, device=device)
        counts = counts.reshape(-1, 2)
        whole = self.accelerator.gather(counts.sum(0, keepdim=True)).sum(0)
        for batch, share in zip(batches, counts * len(batches) * self.accelerator.num_processes / whole, strict=True):
            batch["row_share"], batch["token_share"] = share
        return batches, items

    def _draws(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The noise of a batch, the same every time."""
        rows = inputs.get("noise_rows") if self.model.training else None
        progress = 1.0 if rows is None else self.state.global_step / max(self.state.max_steps, 1)
        return self.diffusion_collator.corrupt(
            inputs,
            seed=self.args.seed,
            step=0 if rows is None else self.state.global_step,
            rows=rows,
            n_rows=inputs.get("n_noise_rows"),
            score=self.args.score,
            n_draws=self.args.draws_at(progress),
        )

    def _reference_scores(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        if self._reference_columns[0] in inputs:
            return {}
        scores = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
        return dict(zip(self._reference_columns, scores, strict=True))

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        return super().prediction_step(model, inputs, True, ignore_keys)


def reference_of(
    model: torch.nn.Module,
    reference: PreTrainedModel | str | None,
    adapted: bool,
    tokenizer: PreTrainedTokenizerBase,
    args: TrainingArguments,
) -> PreTrainedModel | None:
    """The model to hand to TRL as the reference; None: adapters off, a copy of them, or scores stored before the first step."""
    conversion = {name: getattr(record_of(model), name) for name in CONVERSION_OPTIONS}
    if isinstance(reference, str):
        options = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
        reference, _ = load_diffusion_model(reference, **conversion, **options)
    if reference is not None:
        if not record_of(reference).converted:
            convert_to_diffusion(reference, tokenizer, **conversion)
            set_to_mean(reference, record_of(reference).mask_token_id)  # as in the policy, whose tokenizer knew no mask
        check_reference(reference, record_of(model))
        return reference
    if adapted:
        return None
    if args.precompute_ref_log_probs:
        if args.fsdp:
            raise UserError(
                "`precompute_ref_log_probs` under FSDP needs a `ref_model`; TRL would load an unconverted one."
            )
        return None
    # TRL would load the checkpoint again, which need not be converted, and has not been trained in memory.
    return frozen_copy(model, tokenizer)


def disable_functional_dropout(model: torch.nn.Module) -> None:
    """Sets rates that forwards hand over as numbers (`attention_dropout`) to 0; TRL's `disable_dropout` reaches modules alone."""
    for module in model.modules():
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def frozen_copy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A converted model of the same weights that does not train.

    Built anew: trainers bind forwards to a model that keep calling it from a deep copy.
    """
    base = base_of(model)
    reference = type(base)._from_config(copy.deepcopy(base.config), dtype=base.dtype)
    convert_to_diffusion(reference, tokenizer)
    reference.load_state_dict(base.state_dict())
    return reference.to(base.device).requires_grad_(False).eval()


def check_reference(reference: torch.nn.Module, record: DiffusionRecord) -> None:
    """Refuses a reference that cannot be scored as the policy is.

    Raises:
        ValueError: with another mask token, attention or read-out.
    """
    theirs = record_of(reference)
    for name in ("mask_token_id", "attention", "block_length", "clean_context", "right_shift_logits"):
        if getattr(theirs, name) != getattr(record, name):
            raise UserError(
                f"`ref_model`: its `{name}` is {getattr(theirs, name)!r}, the policy's is {getattr(record, name)!r}."
            )


def complete_ref_adapter(model: PeftModel) -> None:
    """Makes TRL's "ref" adapter what "default" is now: it leaves out trained token rows and what has no dot behind its name."""
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        for name, parameter in parameters.items():
            if "default" in (parts := name.split(".")):
                parameters[".".join("ref" if part == "default" else part for part in parts)].copy_(parameter)
    for name, parameter in parameters.items():
        if "ref" in name.split("."):
            parameter.requires_grad_(False)
