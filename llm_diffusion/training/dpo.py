"""Diffusion-DPO on TRL's `DPOTrainer`: preference optimisation whose log-probabilities are estimates of the ELBO.

1. A masked-diffusion model has no log p(y | x); a score stands for it, the mean over draws of weighted log-probabilities of masked tokens.
2. Policy and reference see the same masks, and the two answers of a pair share the noise of what they have in common, so that
   most of the noise cancels in the difference that the loss is a function of (VRPO).
3. The loss is TRL's: all its loss types, divergences, weights and metrics read our scores where they read log-probabilities.

The gradient with the memory of one forward, and the reference: see `scored`.
"""

from __future__ import annotations

from typing import Any

import torch
from trl import DPOTrainer

from ..data.tokens import tokenised_pairs
from ..models.patching import Patch, trained_as_before
from .config import DiffusionDPOConfig
from .scored import PreferenceTrainerMixin
from .scoring import DiffusionScore


class DiffusionDPOTrainer(PreferenceTrainerMixin, DPOTrainer):
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
    _config = DiffusionDPOConfig
    _texts = 2

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        """Every set that is trained on or evaluated passes here, in place of TRL's own preparation."""
        ends = self.diffusion_collator.layout.end_token_ids
        return self._tokenised(tokenised_pairs, dataset, processing_class, args, dataset_name, ends=ends)

    def compute_ref_log_probs(
        self, model: torch.nn.Module, inputs: dict[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The reference's scores of the chosen and the rejected answers, (B,) each."""
        with trained_as_before(self.model):
            return super().compute_ref_log_probs(lambda **_: self._score(model, inputs), inputs)

    def _trl_loss(
        self, policy: DiffusionScore, inputs: dict[str, Any], reference: dict[str, torch.Tensor]
    ) -> torch.Tensor:
        """Every term weighs what its pairs, or tokens, are of the whole step's."""
        shares = [inputs.get("token_share" if kind == "sft" else "row_share", 1) for kind in self.loss_types]
        with Patch() as patch:
            patch.set(self, "precompute_ref_logps", True)  # the reference has been scored
            patch.set(self, "loss_weights", [w * share for w, share in zip(self.loss_weights, shares, strict=True)])
            return self._loss_of_trl(lambda **_: policy, {**inputs, **reference}, False)
