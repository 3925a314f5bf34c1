"""Diffusion-DPO on TRL's `DPOTrainer`: preference optimisation whose log-probabilities are estimates of the ELBO.

1. A masked-diffusion model has no log p(y | x); a score stands for it, the mean over draws of weighted log-probabilities of masked tokens.
2. Policy and reference see the same masks, and the two answers of a pair share the noise of what they have in common, so that
   most of the noise cancels in the difference that the loss is a function of (VRPO).
3. The loss is TRL's: all its loss types, divergences, weights and metrics read our scores where they read log-probabilities.
4. Memory of one forward: the scores are taken without gradient, the loss's slope in each is computed, and then one draw after the other
   is scored again and sent back with its slope. That is the gradient of the whole, by the chain rule.
5. The reference is the adapters off, a frozen copy "ref" of trained adapters, or a frozen copy of a model that trains whole.
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
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from .. import UserError
from ..data.tokens import tokenised_pairs
from ..models.conversion import convert_to_diffusion
from ..models.forward import add_row_scores
from ..models.lm_head import train_rows_alone
from ..models.loading import load_diffusion_model
from ..models.patching import Patch, base_of, trained_as_before
from ..models.record import CONVERSION_OPTIONS, DiffusionRecord, record_of
from ..models.special_tokens import set_to_mean
from .adapters import prepare_adapter
from .collator import REFERENCE_COLUMNS
from .config import DiffusionDPOConfig, own_config
from .preparation import (
    check_optimizer,
    converted,
    make_preference_collator,
    model_is_loaded,
    no_router_loss,
    prepare_quantised,
    read_datasets,
    refuse_arguments,
)
from .scoring import DiffusionScore, compute_diffusion_score, score_draw
from .trainer import DiffusionTrainerMixin, numbered_rows

logger = logging.getLogger(__name__)


class DiffusionDPOTrainer(DiffusionTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` whose log-probabilities are scores of a masked-diffusion model. Arguments as there.

    `model` may be a name (loaded by `load_diffusion_model`), a converted model, or a `PeftModel` of one. The reference is `ref_model`, a
    model or a name, converted as the policy is where it is not, or without it: with a `peft_config` the model without the new
    adapters; of a `PeftModel` a frozen copy of its adapters and trained token rows; of a model that trains whole a frozen copy of it.

    Metrics have TRL's names: `rewards/chosen`, `rewards/rejected`, `rewards/accuracies`, `rewards/margins`, `logps/chosen` and
    `logps/rejected` (scores in nats), `entropy`, `mean_token_accuracy`, `logits/chosen`, `logits/rejected`; and `draws`, the forwards that
    a score took.

    Noise is hashed from (seed, optimiser step, pair of the global batch, token); in evaluation, and with `precompute_ref_log_probs` in
    training too, from the pair's content, so that stored scores are of the masks that the policy sees.

    References: Diffusion-DPO (arXiv 2311.12908), VRPO (LLaDA 1.5, arXiv 2505.19223), DPO (arXiv 2305.18290).

    Example:

        trainer = DiffusionDPOTrainer("output/sft_model", args=DiffusionDPOConfig("out"), train_dataset=pairs)
        trainer.train()
    """

    _tag_names = ["trl", "dpo", "masked-diffusion", "llm-diffusion"]
    _name = "Diffusion DPO"

    def __init__(
        self,
        model: torch.nn.Module | str,
        ref_model: PreTrainedModel | str | None = None,
        args: DiffusionDPOConfig | DPOConfig | None = None,
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
        args = own_config(args, DiffusionDPOConfig, "diffusion-dpo")
        refuse_arguments(data_collator=data_collator, compute_metrics=compute_metrics)
        model, processing_class = converted(model, processing_class, args, quantization_config)
        record = record_of(model)
        if record.mode.drafts:
            raise UserError(
                "`model`: a drafter's words are verified by its base, whose preferences it cannot change; train a 'bidirectional' or "
                "'block' model."
            )
        if not record.trained:
            logger.warning(
                "`model` has seen no noise yet: preferences teach it little; fine-tune it as a diffusion model first"
            )
        train_dataset, eval_dataset = read_datasets(train_dataset, eval_dataset)
        prepare_quantised(model, args)
        if peft_config is not None:
            peft_config = prepare_adapter(model, peft_config, record)
        no_router_loss(model, args)
        adapted = peft_config is not None or isinstance(model, PeftModel)
        ref_model = reference_of(model, ref_model, adapted, processing_class, args)
        for scored in filter(None, (model, ref_model)):  # now: TRL may score the reference before it returns
            add_row_scores(scored)
        self.diffusion_collator = make_preference_collator(processing_class, model, args)
        self._copies_adapters = isinstance(model, PeftModel) and ref_model is None
        with model_is_loaded(args):
            super().__init__(
                model=model,
                ref_model=ref_model,
                args=args,
                data_collator=self.diffusion_collator,
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

    def _complete_reference(self) -> None:
        """Once: what TRL left out of its copy of the adapters."""
        if self._copies_adapters:
            complete_ref_adapter(self.model)
        self._copies_adapters = False

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Every set that is trained on or evaluated passes here, in place of TRL's own preparation."""
        ends = self.diffusion_collator.layout.end_token_ids
        return self._tokenised(tokenised_pairs, dataset, processing_class, args, dataset_name, ends=ends)

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
        """The micro-batches of one optimiser step, told their pairs' places in the global batch and what they weigh in it."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self.args.precompute_ref_log_probs:
            numbered_rows(batches, self.accelerator, texts=2)
        # TRL takes means over a micro-batch, and the mean of these: a short one, or one of few tokens, would weigh too much.
        counts = [
            [len(mask) // 2, mask[: len(mask) // 2, 1:].sum()] for mask in (b["completion_mask"] for b in batches)
        ]
        counts = torch.tensor(counts, dtype=torch.float, device=device).reshape(-1, 2)
        whole = self.accelerator.gather(counts.sum(0, keepdim=True)).sum(0)
        for batch, share in zip(batches, counts * len(batches) * self.accelerator.num_processes / whole, strict=True):
            batch["pair_share"], batch["token_share"] = share
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

    def _score(self, model: torch.nn.Module, inputs: dict[str, Any]) -> DiffusionScore:
        return compute_diffusion_score(model, self._draws(inputs), self._model_inputs)

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's scores of the chosen and the rejected answers, (B,) each."""
        with trained_as_before(self.model):
            return super().compute_ref_log_probs(lambda **_: self._score(model, inputs), inputs)

    def _trl_loss(
        self, policy: DiffusionScore, inputs: dict[str, Any], reference: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """TRL's loss of given scores, with its metrics; every term weighs what its pairs, or tokens, are of the whole step's."""
        shares = [inputs.get("token_share" if kind == "sft" else "pair_share", 1) for kind in self.loss_types]
        with Patch() as patch:
            patch.set(self, "precompute_ref_logps", True)  # the reference has been scored
            patch.set(self, "loss_weights", [w * share for w, share in zip(self.loss_weights, shares, strict=True)])
            return super()._compute_loss(lambda **_: policy, {**inputs, **reference}, False)

    def _compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False
    ) -> torch.Tensor:
        if all(name in inputs for name in REFERENCE_COLUMNS):
            reference = {name: inputs[name] for name in REFERENCE_COLUMNS}
        else:
            scores = self.compute_ref_log_probs(self.ref_model or self.model, inputs)
            reference = dict(zip(REFERENCE_COLUMNS, scores, strict=True))
        if not torch.is_grad_enabled() or self._at_once(inputs):
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

    def _at_once(self, inputs: dict[str, Any]) -> bool:
        """Whether the graphs of all draws are kept: one draw has no others, and DeepSpeed's engine steps after every backward pass."""
        one = self.args.score == "elbo" and self.args.num_draws == 1
        return one or self.accelerator.distributed_type == DistributedType.DEEPSPEED

    def _draw_by_draw(
        self, model: torch.nn.Module, inputs: dict[str, Any], slope: torch.Tensor, n_draws: int
    ) -> torch.Tensor:
        """Sends every draw but the last one back; of value 0, and with the gradient of the last one."""
        for number, noisy in enumerate(self._draws(inputs), start=1):
            if number == n_draws:
                break
            with self.accelerator.no_sync(model):
                # As TRL does with what is returned.
                scale = 1 / self.current_gradient_accumulation_steps
                self.accelerator.backward(scale * self._share(model, noisy, slope))
        last = self._share(model, noisy, slope)
        return last - last.detach()

    def _share(self, model: torch.nn.Module, noisy: dict[str, Any], slope: torch.Tensor) -> torch.Tensor:
        log_probs, _, _ = score_draw(model, self._model_inputs(noisy), noisy)
        return (slope * log_probs[:, 1:]).sum()

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
    args: DiffusionDPOConfig,
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
