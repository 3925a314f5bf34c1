"""The collator owns the forward process: it pads, says what may be masked, and masks.

Called, it turns tokenised rows into a clean batch. `corrupt` then draws the noise and lays out what the model sees and which
hidden state must predict which token. Inside our trainers `corrupt` runs in `compute_loss`, on the device, so that the noise
depends on neither loader workers, processes nor accumulation; used alone, `collator(examples)` followed by
`collator.corrupt(batch, …)` gives the same tensors.
Trade-off: masks are not drawn in loader workers, which would be off the critical path but cannot be resumed exactly.
Alternative: `DataCollatorForLanguageModeling(mlm=True)`, with one mask rate, no time and no weights.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from . import masking
from .losses import loss_weights
from .noise_schedules import get_noise_schedule


@dataclass
class DataCollatorForMaskedDiffusion(DataCollatorMixin):
    """Collates tokenised rows and corrupts batches.

    Rows are dicts of `input_ids` and, optionally, `labels` (-100 = never masked: prompts); without labels every token may be
    masked. Rows are padded on the right. A row whose last trained token is the EOS is an answer, and becomes a canvas:

        prompt prompt answer answer <eos>  <eos> <eos>  pad        with a tail of 0 to `eos_tail` further EOS tokens
        clean  clean  maskable ----------  maskable --  hidden
        prompt prompt answer pad                                   or, one row in `1 / random_canvas`, cut anywhere

    so that neither a canvas longer than the answer nor one that ends before it is new to the model. What stands after the EOS
    (the chat template's newline) is dropped: left visible, it would give away where the answer ends. A truncated answer has no
    EOS: it gets no tail and teaches no false end. Lengths are drawn from the row's content, the same in every batch.

    Args:
        pad_token_id, mask_token_id, eos_token_id: ids; without `eos_token_id` rows are left as they are.
        eos_tail: longest tail, in tokens.
        random_canvas: share of answers cut at a random place.
        noise_schedule: name, see `noise_schedules`.
        loss_weight: "elbo" or "uniform".
        right_shift_logits: whether hidden state i - 1 predicts token i.
        min_mask_probability, max_mask_probability: range of the mask probability; anything but (0, 1) is no ELBO.
        pad_to_multiple_of: as in transformers.
    """

    pad_token_id: int
    mask_token_id: int
    eos_token_id: int | None = None
    eos_tail: int = 0
    random_canvas: float = 0.0
    noise_schedule: str = "linear"
    loss_weight: str = "elbo"
    right_shift_logits: bool = True
    min_mask_probability: float = 0.0
    max_mask_probability: float = 1.0
    pad_to_multiple_of: int | None = None
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """-> `input_ids`, `labels`, `attention_mask`, each (B, L)."""
        rows = [self._canvas(list(e["input_ids"]), list(e.get("labels") or e["input_ids"])) for e in examples]
        longest = max(len(ids) for ids, _ in rows)
        if self.pad_to_multiple_of:
            longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of

        def pad(values: list[int], value: int) -> list[int]:
            return values + [value] * (longest - len(values))

        batch = {
            "input_ids": torch.tensor([pad(ids, self.pad_token_id) for ids, _ in rows]),
            "labels": torch.tensor([pad(labels, masking.IGNORE_INDEX) for _, labels in rows]),
            "attention_mask": torch.tensor([pad([1] * len(ids), 0) for ids, _ in rows]),
        }
        if self.right_shift_logits:
            batch["labels"][:, 0] = masking.IGNORE_INDEX  # no hidden state before it
        return batch

    def _canvas(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        trained = [i for i, label in enumerate(labels) if label != masking.IGNORE_INDEX]
        ends = [
            i for i in trained[-3:] if labels[i] == self.eos_token_id
        ]  # the template may add a newline after the EOS
        if not ends or labels[0] != masking.IGNORE_INDEX:
            return ids, labels
        ids, labels, first = ids[: ends[-1] + 1], labels[: ends[-1] + 1], trained[0]
        cut, length = zlib.crc32(repr(ids).encode()), zlib.crc32(repr(ids[::-1]).encode())
        if cut % 1000 < 1000 * self.random_canvas:
            end = first + 1 + length % (len(ids) - first)
            return ids[:end], labels[:end]
        tail = [self.eos_token_id] * (length % (self.eos_tail + 1))
        return ids + tail, labels + tail

    def corrupt(
        self,
        batch: dict[str, torch.Tensor],
        *,
        seed: int,
        step: int,
        rows: torch.Tensor | None = None,
        n_rows: int | None = None,
    ) -> dict[str, torch.Tensor]:
        """Draws noise and lays out the model's inputs and targets.

        Args:
            batch: `input_ids`, `labels`, `attention_mask`, each (B, L).
            seed, step: key of the noise; `step` is the optimiser step.
            rows: (B,) places of these rows in the global batch. None: the noise is keyed by every row's content instead,
                as evaluation wants it.
            n_rows: rows of the global batch, for the strata of the times.

        Returns:
            `input_ids`, `attention_mask` for the model, and, aligned with its hidden states, `targets` (B, L) (token that the
            state must predict, -100 = none), `weights` (B, L) fp32; further `times` (B,).
        """
        ids, labels, attention_mask = batch["input_ids"], batch["labels"], batch["attention_mask"]
        maskable = labels != masking.IGNORE_INDEX
        if rows is None:
            rows = masking.content_keys(ids, attention_mask)
            times = masking.MIN_TIME + (1 - masking.MIN_TIME) * masking.uniform(seed, step, rows, masking.TIME_STREAM)
        else:
            times = masking.stratified_times(seed, step, rows, n_rows)
        probability, weight = get_noise_schedule(self.noise_schedule)(times)
        if (self.min_mask_probability, self.max_mask_probability) != (0.0, 1.0):
            low, high = self.min_mask_probability, self.max_mask_probability
            probability = low + (high - low) * probability
            weight = 1 / probability
        masked = masking.draw_mask(seed, step, rows, probability[:, None], maskable)
        targets = ids.masked_fill(~masked, masking.IGNORE_INDEX)
        weights = loss_weights(self.loss_weight, weight)[:, None].expand(ids.shape)
        return {
            "input_ids": ids.masked_fill(masked, self.mask_token_id),
            "attention_mask": attention_mask,
            "targets": masking.align_with_readout(targets, self.right_shift_logits, masking.IGNORE_INDEX),
            "weights": masking.align_with_readout(weights, self.right_shift_logits, 0.0),
            "times": times,
        }
