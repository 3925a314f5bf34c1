"""Diffusion-KTO on TRL's `KTOTrainer`: answers that are each good or bad, by estimates of the ELBO in place of log-probabilities."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from trl import KTOTrainer

from .. import UserError
from ..data.rows import Place
from ..data.tokens import columns_of, tokenised, tokenised_pairs
from ..models.patching import Patch, trained_as_before
from ..objective.modes import IGNORE_INDEX
from .config import DiffusionKTOConfig
from .preparation import dataset_field
from .scored import PreferenceTrainerMixin
from .scoring import DiffusionScore


class DiffusionKTOTrainer(PreferenceTrainerMixin, KTOTrainer):
    """`trl.KTOTrainer` whose log-probabilities are scores of a masked-diffusion model. Arguments, references and noise as those of
    `DiffusionDPOTrainer`; rows are `prompt`, `completion` and `label`, or pairs of `chosen` and `rejected`, which are taken apart.

    The baseline that rewards are compared with, `kl`, is TRL's: the mean log-ratio of mismatched prompts and answers, not below 0. Here
    it is a mean difference of two ELBO estimates under the same masks, which is exactly 0 while policy and reference agree, and
    estimates how far the bounds are apart rather than a KL divergence of the models. It has no gradient, and is taken over a
    micro-batch, as there.

    References: KTO (arXiv 2402.01306, equations 7 and 8), shared masks as in VRPO (LLaDA 1.5, arXiv 2505.19223).
    """

    _tag_names = ["trl", "kto", "masked-diffusion", "llm-diffusion"]
    _name = "Diffusion KTO"
    _config = DiffusionKTOConfig
    _reference_columns = ("ref_logps", "ref_KL_logps")

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Every set that is trained on or evaluated passes here, in place of TRL's own preparation."""
        columns, field = columns_of(dataset), dataset_field(dataset_name)
        how = {"ends": self.diffusion_collator.layout.end_token_ids}
        if "completion_ids" in columns:
            pass
        elif "chosen" in columns:
            dataset = self._tokenised(tokenised_pairs, dataset, processing_class, args, dataset_name, **how)
            dataset = dataset.map(_taken_apart, batched=True, remove_columns=columns_of(dataset))
        elif "label" not in columns:
            raise UserError(
                f"`{field}` lacks `label`, its columns are {sorted(columns)}; a row has `prompt`, `completion` and `label`, true where the "
                "answer is desirable, or `chosen` and `rejected`."
            )
        else:
            how |= {"completion_only": True, "kept": ("label",)}
            dataset = self._tokenised(tokenised, dataset, processing_class, args, dataset_name, **how)
            dataset = dataset.map(partial(_split, field), with_indices=True, remove_columns=["input_ids", "labels"])
        if self.calculate_KL and "KL_completion_ids" not in columns:
            dataset = dataset.map(_mismatched_answers, batched=True, batch_size=args.per_device_train_batch_size)
        return dataset

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The reference's scores of the answers and of the mismatched ones, (B,) each."""

        def score(input_ids: torch.Tensor, **_: Any) -> DiffusionScore:
            return self._score(model, inputs if input_ids is inputs["input_ids"] else mismatched(inputs))

        with trained_as_before(self.model):
            return super().compute_ref_log_probs(score, inputs)

    def _compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], return_outputs: bool = False
    ) -> torch.Tensor:
        if self.calculate_KL:
            with torch.no_grad():
                inputs = {**inputs, "policy_KL_logps": self._score(model, mismatched(inputs)).log_probs.sum(-1)}
        return super()._compute_loss(model, inputs)

    def _compute_kl_logps(self, model: Any, batch: dict[str, Any]) -> torch.Tensor | None:
        return batch.get("policy_KL_logps")

    def _trl_loss(
        self, policy: DiffusionScore, inputs: dict[str, Any], reference: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        with Patch() as patch:
            patch.set(self, "precompute_ref_logps", True)  # the reference has been scored
            loss = self._loss_of_trl(lambda **_: policy, {**inputs, **reference}, False)
        return loss * inputs.get("row_share", 1)


def mismatched(inputs: dict[str, Any]) -> dict[str, Any]:
    """The batch with each prompt's mismatched answer, at the noise of the same places."""
    return inputs | {name[3:]: value for name, value in inputs.items() if name.startswith("KL_")}


def _split(field: str, example: dict[str, Any], row: int) -> dict[str, list[int]]:
    if example["label"] not in (0, 1):
        raise Place(field, row).error("label", f"is {example['label']!r}", "true (desirable) or false is needed")
    ids, labels = example["input_ids"], example["labels"]
    first = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    return {"prompt_ids": ids[:first], "completion_ids": ids[first:], "label": bool(example["label"])}


def _taken_apart(pairs: dict[str, list]) -> dict[str, list]:
    """As TRL does it, the chosen answers before the rejected ones, so that neighbours are of different prompts."""
    n = len(pairs["prompt_ids"])
    answers = pairs["chosen_ids"] + pairs["rejected_ids"]
    return {"prompt_ids": 2 * pairs["prompt_ids"], "completion_ids": answers, "label": [True] * n + [False] * n}


def _mismatched_answers(rows: dict[str, list]) -> dict[str, list]:
    """Every prompt beside its left neighbour's answer, around each micro-batch, as TRL does it."""
    answers = rows["completion_ids"]
    return {"KL_completion_ids": answers[-1:] + answers[:-1]}
