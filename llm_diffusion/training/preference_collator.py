"""Collates preference pairs and draws their noise: `DataCollatorForMaskedDiffusion` for two answers to one prompt.

    rows of a batch of two pairs     chosen 0, chosen 1, rejected 0, rejected 1     (as TRL's preference collator lays them out)

Every row is a prompt, which stays clean, and an answer. Trade-off: answers get no tail of end tokens and are not cut at random, as they
are in fine-tuning: a preference is about these words, and what only one text has is noise. Alternative: TRL's own collator, which knows no
blocks that must be filled, and not which tokens two texts have in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from ..objective.noise import IGNORE_INDEX, content_keys, hash_keys
from ..objective.preference_noise import (
    aligned_positions,
    elbo_draws,
    pair_times,
    trajectory_draws,
)
from ..objective.segments import parts
from .collator import DataCollatorForMaskedDiffusion

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")


@dataclass
class DataCollatorForDiffusionPreference(DataCollatorMixin):
    """Collates rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL's `DPOTrainer` prepares them, and draws their noise.

    Args:
        layout: how one row becomes what the model sees; its tail and its random cuts must be off, and its noise is not used.
        max_length: tokens of prompt and answer; what is beyond is cut from the answer's end.
    """

    layout: DataCollatorForMaskedDiffusion
    max_length: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """-> `input_ids`, `attention_mask`, `completion_mask` (1 where a token is scored) and `noise_positions`, each (2B, L), and
        the reference's stored scores, (B,) each, where the examples have them."""
        batch = self.layout(
            [self._row(example, side) for side in ("chosen_ids", "rejected_ids") for example in examples]
        )
        scored = batch.pop("labels") != IGNORE_INDEX
        scored[:, 0] = False  # of an empty prompt; the host's tables begin behind it
        positions = torch.zeros_like(batch["input_ids"])
        for i in range(len(examples)):
            pair = (i, len(examples) + i)
            keys = aligned_positions(*(batch["input_ids"][row][scored[row]].tolist() for row in pair))
            for row, own in zip(pair, keys, strict=True):
                positions[row, scored[row]] = torch.tensor(own, dtype=torch.long)
        stored = {name: torch.tensor([e[name] for e in examples]) for name in REFERENCE_COLUMNS if name in examples[0]}
        return {**batch, "completion_mask": scored.long(), "noise_positions": positions, **stored}

    def _row(self, example: dict[str, Any], side: str) -> dict[str, list[int]]:
        prompt, answer = list(example["prompt_ids"]), list(example[side])
        labels = [IGNORE_INDEX] * len(prompt) + answer
        return {"input_ids": (prompt + answer)[: self.max_length], "labels": labels[: self.max_length]}

    def corrupt(
        self,
        batch: dict[str, torch.Tensor],
        *,
        seed: int,
        step: int,
        rows: torch.Tensor | None = None,
        n_rows: int | None = None,
        score: str = "elbo",
        n_draws: int = 8,
    ) -> Iterator[dict[str, Any]]:
        """The draws that the score of every row is the mean of; the same whenever it is called with the same arguments.

        Args:
            batch: as made by a call.
            seed, step: key of the noise; `step` is the optimiser step.
            rows: (B,) places of these pairs in the global batch. None: the noise is keyed by the pair's content instead, as evaluation
                and stored reference scores want it.
            n_rows: pairs of the global batch, for the strata of the times.
            score: "elbo" or "trajectory", see `preference_noise`.
            n_draws: draws, or steps of the trajectory.

        Yields:
            As `DataCollatorForMaskedDiffusion.corrupt`; targets are those that the draw scores.
        """
        ids, document_ids = batch["input_ids"], batch["attention_mask"]
        maskable = batch["completion_mask"].bool()
        if rows is None:
            chosen, rejected = content_keys(ids, document_ids).chunk(2)
            keys = hash_keys(chosen, rejected)
        else:
            keys = rows
        times = pair_times(seed, step, keys, n_rows if rows is not None else None).repeat(2)
        part = parts(document_ids, self.layout.block_length if self.layout.attention == "block" else None)
        rest = (batch["noise_positions"], maskable, part, n_draws)
        if score == "elbo":
            draws = elbo_draws(seed, step, keys.repeat(2), times, *rest)
        else:
            draws = trajectory_draws(seed, step, keys.repeat(2), *rest)
        clean = {"input_ids": ids, "attention_mask": document_ids, "labels": ids.masked_fill(~maskable, IGNORE_INDEX)}
        for masked, weights, probability in draws:
            noisy = self.layout.lay_out(clean, masked, weights, probability)
            noisy["targets"] = noisy["targets"].masked_fill(noisy["weights"] == 0, IGNORE_INDEX)
            yield noisy
