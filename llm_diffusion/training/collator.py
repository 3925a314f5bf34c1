"""Collators: they pad rows, say what may be masked, put answers on canvases, and own the forward process.

Inside the trainers `corrupt` runs in `compute_loss`, on the device, so that the noise depends on neither loader workers,
processes nor accumulation; used alone, `collator(examples)` followed by `collator.corrupt(batch, …)` gives the same tensors.
"""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from .. import UserError
from ..models.record import DiffusionRecord
from ..objective.attention_masks import positions, segments
from ..objective.estimators import aligned_positions, elbo_draws, pair_times, trajectory_draws
from ..objective.forward_process import ForwardProcess, NoiseSettings, check_noise
from ..objective.modes import IGNORE_INDEX
from ..objective.noise import content_keys, hash_keys
from ..objective.settings import check_value

REFERENCE_COLUMNS = ("ref_chosen_logps", "ref_rejected_logps")
STORED_COLUMNS = (*REFERENCE_COLUMNS, "ref_logps", "ref_KL_logps", "label")


@dataclass
class DataCollatorForMaskedDiffusion(DataCollatorMixin):
    """Collates tokenised rows and corrupts batches.

    Rows are dicts of `input_ids` and, optionally, `labels` (-100 = never masked: prompts); without labels every token may be
    masked. Rows are padded on the right. A row whose last trained token is the EOS is an answer, and becomes a canvas:

        prompt prompt answer answer <eos>  <eos> <eos>  pad        with a tail of 0 to `eos_tail` further EOS tokens
        clean  clean  maskable ----------  maskable --  hidden
        prompt prompt answer pad                                   or, one row in `1 / random_canvas`, cut anywhere

    so that neither a canvas longer than the answer nor one that ends before it is new to the model. Both still tell how long the
    answer is, within the tail. With `max_canvas` they do not: the canvas has `max_canvas` tokens, in a share `random_canvas` of the
    rows 1 to `max_canvas`, and the answer is cut or filled up to it. A model so trained predicts at position i of an empty canvas
    how likely the answer has ended by then, P(end <= i), which is what `generation.lengths` reads. What stands after the EOS (the
    chat template's newline) is dropped: left visible, it would give away where the answer ends. A truncated answer has no EOS: it
    gets no tail and teaches no false end. Lengths are drawn from the row's content, the same in every batch.

    A packed row (`seq_lengths`, as TRL's packing writes it) is treated text by text, each with its own time; its texts do not see
    each other. They are taken as they are: `canvas` has its place before packing, or rows would outgrow what they were packed to.

    Args:
        record: of the model.
        pad_token_id: what rows are padded with; it is hidden.
        eos_token_id: the token that ends a text, or several, the usual one first; without it rows are left as they are.
        settings: any object with the attributes of `NoiseSettings`, a `DiffusionSFTConfig` for one.
        vocab_size: ids below it are what replacements are drawn from.
        max_positions: tokens that the model can count; tails end there.
        pad_to_multiple_of: as in transformers.
        packing: whether rows hold several texts.
    """

    record: DiffusionRecord
    pad_token_id: int
    eos_token_id: int | Sequence[int] | None = None
    settings: Any = field(default_factory=NoiseSettings)
    vocab_size: int | None = None
    max_positions: int | None = None
    pad_to_multiple_of: int | None = None
    packing: bool = False
    return_tensors: str = "pt"

    def __post_init__(self) -> None:
        DiffusionRecord.from_dict(getattr(self.record, "__dict__", self.record), "record")
        check_noise(self.settings)
        check_value("pad_token_id", self.pad_token_id, int, {"min": 0})

    @property
    def process(self) -> ForwardProcess:
        """The forward process of this model."""
        if self.record.mask_token_id is None:
            raise UserError("`record`: `mask_token_id` is missing; convert the model first.")
        tail = self.record.tail_token_id
        ends = self.end_token_ids + (() if tail is None or not self.end_token_ids else (tail,))
        return ForwardProcess(
            mode=self.record.mode,
            mask_token_id=self.record.mask_token_id,
            settings=self.settings,
            noise_schedule=self.record.noise_schedule,
            end_token_ids=ends,
            vocab_size=self.vocab_size,
            packing=self.packing,
            time_embedding=self.record.time_embedding,
        )

    @property
    def end_token_ids(self) -> tuple[int, ...]:
        ends = self.eos_token_id
        return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)

    def corrupt(self, batch: dict[str, torch.Tensor], **keys: Any) -> dict[str, Any]:
        """Draws noise and lays out the model's inputs and targets, see `ForwardProcess.corrupt`."""
        return self.process.corrupt(batch, **keys)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """-> `input_ids`, `labels`, `attention_mask`, each (B, L); the mask holds the number of a packed row's text, 0 at padding."""
        if not examples:
            raise UserError("`examples` are empty: a batch needs a row.")
        rows = [_texts(example) for example in examples]
        packed = ["seq_lengths" in example for example in examples]
        rows = [texts if several else [self.canvas(*texts[0])] for texts, several in zip(rows, packed, strict=True)]
        longest = max(sum(len(ids) for ids, _ in texts) for texts in rows)
        if self.pad_to_multiple_of:
            longest = -(-longest // self.pad_to_multiple_of) * self.pad_to_multiple_of
        batch = {
            "input_ids": torch.full((len(rows), longest), self.pad_token_id),
            "labels": torch.full((len(rows), longest), IGNORE_INDEX),
            "attention_mask": torch.zeros((len(rows), longest), dtype=torch.long),
        }
        for row, texts in enumerate(rows):
            start = 0
            for number, (ids, labels) in enumerate(texts, start=1):
                place = slice(start, start := start + len(ids))
                batch["input_ids"][row, place] = torch.tensor(ids)
                batch["labels"][row, place] = torch.tensor(labels)
                batch["attention_mask"][row, place] = number
        # An ordinary word may serve as the mask: where it stands in a text, it is no word that decoding could ever predict.
        batch["labels"][batch["input_ids"] == self.record.mask_token_id] = IGNORE_INDEX
        if self.record.right_shift_logits:
            batch["labels"][positions(batch["attention_mask"]) == 0] = IGNORE_INDEX  # no hidden state before it
        return batch

    def canvas(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """A text that ends with an answer, as the canvas that the class's docstring draws; any other as it is."""
        trained = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        # The template may add a token or two (a newline) after the EOS of the last turn.
        ends = [i for i in trained if i >= trained[-1] - 2 and labels[i] in self.end_token_ids]
        mode, whole_text = self.record.mode, labels[0] != IGNORE_INDEX
        if not ends or (whole_text and not self.settings.text_tails):
            return ids, labels
        # Decoding stops at the first of several (`<|end|>\n<|endoftext|>`), unless they are a tail already.
        end = ends[-1] if labels[ends[0] - 1] in self.end_token_ids else ends[0]
        ids, labels = ids[: end + 1], labels[: end + 1]
        first = max((i for i, label in enumerate(labels) if label == IGNORE_INDEX), default=-1) + 1
        choice, draw = zlib.crc32(repr(ids).encode()), zlib.crc32(repr(ids[::-1]).encode())
        end = mode.canvas_end(len(ids), first, self.settings, choice, draw)
        room = end - len(ids) if self.max_positions is None else self.max_positions - len(ids)
        behind = ids[-1] if self.record.tail_token_id is None else self.record.tail_token_id
        tail = [behind] * max(min(end - len(ids), room), 0)
        return (ids + tail)[:end], (labels + tail)[:end]


@dataclass
class DataCollatorForDiffusionPreference(DataCollatorMixin):
    """Collates rows of `prompt_ids`, `chosen_ids` and `rejected_ids`, as TRL's `DPOTrainer` prepares them, and draws their noise.

        rows of a batch of two pairs     chosen 0, chosen 1, rejected 0, rejected 1     (as TRL's preference collator lays them out)

    Every row is a prompt, which stays clean, and an answer, never cut at random and without a tail: a preference is about these words,
    and what only one text has is noise. A block model alone ends what it writes with its block: the end tokens up to there are scored.

    Args:
        layout: how one row becomes what the model sees; its tails and random cuts must be off, and its noise is not used.
        max_length: tokens of prompt and answer; what is beyond is cut from the answer's end.
        texts: 1: an example has one answer, `completion_ids`, and maybe a mismatched one, `KL_completion_ids`, as TRL's `KTOTrainer`
            prepares them.
    """

    layout: DataCollatorForMaskedDiffusion
    max_length: int | None = None
    texts: int = 2
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """-> `input_ids`, `attention_mask`, `completion_mask` (1 where a token is scored) and `noise_positions`, each (2B, L) or (B, L), the
        same of mismatched answers with `KL_` before their names, and (B,) each what else the examples have of `STORED_COLUMNS`."""
        mismatched = {}
        if self.texts == 2:
            batch = self._rows(examples, "chosen_ids", "rejected_ids")
        else:
            batch = self._rows(examples, "completion_ids")
            if "KL_completion_ids" in examples[0]:
                mismatched = self._rows(examples, "KL_completion_ids")
        stored = {name: torch.tensor([e[name] for e in examples]) for name in STORED_COLUMNS if name in examples[0]}
        return {**batch, **{f"KL_{name}": value for name, value in mismatched.items()}, **stored}

    def _rows(self, examples: list[dict[str, Any]], *sides: str) -> dict[str, torch.Tensor]:
        batch = self.layout([self._row(example, side) for side in sides for example in examples])
        scored = batch.pop("labels") != IGNORE_INDEX
        scored[:, 0] = False  # of an empty prompt; TRL's tables begin behind it
        noise_positions = (scored.cumsum(-1) - 1) * scored
        for i in range(len(examples) if len(sides) == 2 else 0):
            other = len(examples) + i
            pair = [batch["input_ids"][row][scored[row]].tolist() for row in (i, other)]
            noise_positions[other, scored[other]] = torch.tensor(aligned_positions(*pair)[1], dtype=torch.long)
        return {**batch, "completion_mask": scored.long(), "noise_positions": noise_positions}

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
            rows: (B,) places of these examples in the global batch. None: the noise is keyed by their content instead, as evaluation
                and stored reference scores want it.
            n_rows: examples of the global batch, for the strata of the times.
            score: "elbo" or "trajectory", see `objective.estimators`.
            n_draws: draws, or steps of the trajectory.

        Yields:
            As `ForwardProcess.corrupt`; targets are those that the draw scores, and `n_scored` (B,) counts the tokens that any may score.
        """
        ids, document_ids = batch["input_ids"], batch["attention_mask"]
        maskable, process = batch["completion_mask"].bool(), self.layout.process
        keys = hash_keys(*content_keys(ids, document_ids).chunk(self.texts)) if rows is None else rows
        of_rows = batch["noise_positions"], maskable, segments(document_ids, process.mode.block_length), n_draws
        if score == "elbo":
            times = pair_times(seed, step, keys, None if rows is None else n_rows).repeat(self.texts)
            draws = elbo_draws(seed, step, keys.repeat(self.texts), times, *of_rows)
        else:
            draws = trajectory_draws(seed, step, keys.repeat(self.texts), *of_rows)
        clean = {"input_ids": ids, "attention_mask": document_ids, "labels": ids.masked_fill(~maskable, IGNORE_INDEX)}
        for masked, weights, probability in draws:
            noisy = process.lay_out(clean, masked, weights, probability)
            noisy["targets"] = noisy["targets"].masked_fill(noisy["weights"] == 0, IGNORE_INDEX)
            yield {**noisy, "n_scored": maskable.sum(-1)}


def _whole_numbers(example: Mapping[str, Any], name: str, lowest: int) -> list[int]:
    try:
        numbers = torch.as_tensor(example[name])
    except (KeyError, OverflowError, RuntimeError, TypeError, ValueError):
        numbers = torch.zeros(())
    whole = not (numbers.is_floating_point() or numbers.is_complex() or numbers.dtype == torch.bool)
    values = numbers.tolist() if numbers.dim() == 1 and whole else []
    if min(values, default=lowest - 1) < lowest:
        found = f"{example.get(name)!r:.80}"
        raise UserError(f"`{name}` of an example must be a list of token ids, {lowest} or more, got {found}.")
    return values


def _texts(example: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the texts of a row, several when it is packed."""
    if not isinstance(example, Mapping):
        raise UserError(f"`examples` must be mappings with `input_ids`, got {example!r:.80}.")
    ids = _whole_numbers(example, "input_ids", lowest=0)
    labels = ids if example.get("labels") is None else _whole_numbers(example, "labels", lowest=IGNORE_INDEX)
    ends = list(itertools.accumulate(example.get("seq_lengths") or [len(ids)]))
    if not len(labels) == len(ids) == ends[-1]:
        lengths = f"{len(ids)} `input_ids`, {len(labels)} `labels`, `seq_lengths` up to {ends[-1]}"
        raise UserError(f"`labels` and `seq_lengths` of an example must have the length of its tokens, got {lengths}.")
    return [(ids[start:end], labels[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
