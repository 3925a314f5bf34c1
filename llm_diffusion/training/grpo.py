"""Diffusion-GRPO on TRL's `GRPOTrainer`: answers by unmasking, rewards and advantages of TRL, estimates of the ELBO for log-probabilities.

    l(y | x) = mean over draws of [ mean over the k masked tokens i of log p(y_i | x, visible) ]        k / n uniform in strata

the ELBO a token, which is UniGRPO's approximation of a sequence's log-likelihood: the answer masked at a random ratio, the prompt clean,
the mean over masked tokens, of a block model also the end tokens up to the end of its last block. TRL is handed l as the log-probability
of every token of y, so that its ratio at every token is that of the sequence, exp(l_new - l_old) (GSPO's), and the sum over the scored
tokens is the ELBO. Terms of the bound alone would not do: one masked token of n weighs n-fold, and its ratio would be an n-th power.

References: UniGRPO (MMaDA, arXiv 2505.15809, "efficient log-likelihood approximation"), diffu-GRPO (d1, arXiv 2504.12216), which masks
the whole answer and a part of the prompt in one step instead, GRPO (arXiv 2402.03300), GSPO (arXiv 2507.18071).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft import PeftConfig
from torch.utils.data import Sampler
from transformers import BitsAndBytesConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from .. import UserError
from ..models.patching import Patch, trained_as_before
from ..objective.noise import hash_keys
from .config import DiffusionGRPOConfig, own_config
from .scored import ScoreTrainerMixin, frozen_copy
from .scoring import DiffusionScore


class DiffusionGRPOTrainer(ScoreTrainerMixin, GRPOTrainer):
    """`trl.GRPOTrainer` for masked-diffusion models. Arguments, reward functions and models, advantages, losses and metrics as there.

    Rollouts are the model's own `generate`, with the decoding settings that it was saved with, under `temperature`, `top_p`, `top_k` and
    `repetition_penalty` of the config, and under its `generation_kwargs` (`threshold`, `block_length`, …). They depend on the seed, the
    generation, the process, and the prompt with its place in the call.

    Old policy, current policy and reference are scored under the same masks, hashed from (seed, generation, the answer's content), so
    that ratios are 1, and `kl` 0, before the first step, up to rounding where batches of other shapes are scored. Every generation has
    masks of its own.

    References: see the module.

    Example:

        def right(completions, answer, **_):
            return [float(text.strip() == a) for text, a in zip(completions, answer)]

        args = DiffusionGRPOConfig("out", generation_kwargs={"threshold": 0.9})
        DiffusionGRPOTrainer("output/sft_model", right, args=args, train_dataset=problems).train()
    """

    _tag_names = ["trl", "grpo", "masked-diffusion", "llm-diffusion"]
    _name = "Diffusion GRPO"

    def __init__(
        self,
        model: torch.nn.Module | str,
        reward_funcs: Any = None,
        args: DiffusionGRPOConfig | GRPOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        *,
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: None = None,
        rollout_func: None = None,
        environment_factory: None = None,
        **kwargs: Any,
    ) -> None:
        args = own_config(args, DiffusionGRPOConfig, "diffusion-grpo")
        others = {"tools": tools, "rollout_func": rollout_func, "environment_factory": environment_factory}
        for name, value in others.items():
            if value is not None:
                raise UserError(f"`{name}`: rollouts are one answer of the model's own `generate` each; leave it out.")
        if kwargs.pop("ref_model", None) is not None:
            raise UserError("`ref_model`: the reference is the model as it is before the first step; leave it out.")
        self._begin(
            model,
            args,
            processing_class,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            quantization_config=quantization_config,
            peft_config=peft_config,
            reward_funcs=reward_funcs,
            **kwargs,
        )
        ends = [*self.diffusion_collator.layout.end_token_ids, *self.eos_token_ids]
        self.eos_token_ids = [end for end in dict.fromkeys(ends) if end is not None]
        self.generation_config.eos_token_id = self.eos_token_ids

    def _reference_model(
        self, model: torch.nn.Module, given: None, adapted: bool, tokenizer: PreTrainedTokenizerBase, args: Any
    ) -> PreTrainedModel | None:
        return None if adapted or not args.beta else frozen_copy(model, tokenizer)

    def _construct(self, ref_model: PreTrainedModel | None, **kwargs: Any) -> None:
        with Patch() as patch:  # TRL would load the checkpoint again, see `reference_of`
            patch.set(grpo_trainer, "create_model_from_path", lambda *_, **__: ref_model)
            super(ScoreTrainerMixin, self).__init__(**kwargs)

    @property
    def _generation(self) -> int:
        """Number of the generation that is trained on; 0 in evaluation, so that its noise is the same every time."""
        return self._step // (self.args.steps_per_generation * self.num_iterations) if self.model.training else 0

    def _get_train_sampler(self, dataset: Any = None) -> Sampler:
        return _ByEpoch(super()._get_train_sampler(dataset), self)

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list, torch.Tensor | int | None]:
        if self._buffered_inputs is None and self.state.epoch:  # resumed: TRL would count generations from 0
            self._step = round(self.state.epoch * len(self.callback_handler.train_dataloader))
        return super().get_batch_samples(*args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As there; with what other trainers' batches have."""
        inputs = super()._prepare_inputs(generation_batch)
        for name, parts in (
            ("input_ids", ("prompt_ids", "completion_ids")),
            ("attention_mask", ("prompt_mask", "completion_mask")),
        ):
            inputs[name] = torch.cat([inputs[part] for part in parts], dim=1)
        return inputs

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> tuple[list[list[int]], None]:
        # `generate` gives every copy of a prompt noise of its own, but only within a call.
        key = hash_keys(torch.tensor(self.args.seed), self._generation, self.accelerator.process_index)
        self.generation_config.seed = int(key) >> 1
        return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with trained_as_before(self.model):
            return super()._generate_and_score_completions(inputs)

    def _draws(self, inputs: dict[str, Any]) -> Iterator[dict[str, Any]]:
        start, seen = inputs["prompt_ids"].shape[1], inputs["attention_mask"].bool()
        examples = [
            {"prompt_ids": row[:start][kept[:start]].tolist(), "completion_ids": row[start:][kept[start:]].tolist()}
            for row, kept in zip(inputs["input_ids"], seen, strict=True)
        ]
        batch = {name: value.to(seen.device) for name, value in self.diffusion_collator(examples).items()}
        how = {"seed": self.args.seed, "step": self._generation, "n_draws": self.args.num_draws}
        return self.diffusion_collator.corrupt(batch, **how)

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module | DiffusionScore,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, None]:
        """The ELBO a token, and the entropy of a masked token, at every token of an answer: (B, logits_to_keep) each; `model` may be the
        scores of this batch."""
        start, size = input_ids.shape[1] - logits_to_keep, batch_size or len(input_ids)
        scores = [model]
        if not isinstance(model, DiffusionScore):
            parts = zip(input_ids.split(size), attention_mask.split(size), strict=True)
            names = "input_ids", "attention_mask", "prompt_ids"
            scores = [
                self._score(model, dict(zip(names, (ids, seen, ids[:, :start]), strict=True))) for ids, seen in parts
            ]
        # A block model's include the end tokens up to the end of the last block.
        answer, scored = attention_mask[:, start:], torch.cat([score.n_scored for score in scores])

        def a_token(name: str) -> torch.Tensor:
            sums = torch.cat([getattr(score, name).sum(-1) for score in scores])
            return (sums / scored.clamp(min=1))[:, None] * answer

        return a_token("log_probs"), a_token("entropy") if compute_entropy else None, None

    def _reference_scores(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {}  # they are in the batch

    def _trl_loss(
        self, policy: DiffusionScore, inputs: dict[str, Any], reference: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        return self._loss_of_trl(policy, inputs)


class _ByEpoch(Sampler):
    """TRL's sampler, whose order of prompts follows from the epoch's number: in a resumed run it would be that of the first epoch."""

    def __init__(self, sampler: Sampler, trainer: DiffusionGRPOTrainer) -> None:
        self.sampler, self.trainer = sampler, trainer

    def __len__(self) -> int:
        return len(self.sampler)

    def __iter__(self) -> Iterator[int]:
        if self.sampler.shuffle:
            self.sampler.generator.manual_seed(self.sampler.seed + int(self.trainer.state.epoch or 0))
        return iter(self.sampler)
