"""The collator owns the forward process: it pads, says what may be masked, and masks.

Called, it turns tokenised rows into a clean batch. `corrupt` then draws the noise and lays out what the model sees and which
hidden state must predict which token. Inside our trainers `corrupt` runs in `compute_loss`, on the device, so that the noise
depends on neither loader workers, processes nor accumulation; used alone, `collator(examples)` followed by
`collator.corrupt(batch, …)` gives the same tensors.
Trade-off: masks are not drawn in loader workers, which would be off the critical path but cannot be resumed exactly.
Alternative: `DataCollatorForLanguageModeling(mlm=True)`, with one mask rate, no time and no weights.
"""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers.data.data_collator import DataCollatorMixin

from ..objective.attention_masks import (
    additive,
    bidirectional,
    block_diffusion,
    positions,
)
from ..objective.losses import loss_weights
from ..objective.noise import (
    FIRST_STEP_STREAM,
    FIRST_STREAM,
    FULL_STREAM,
    IGNORE_INDEX,
    MIN_TIME,
    OFFSET_STREAM,
    ORDER_STREAM,
    REPLACE_STREAM,
    TIME_STREAM,
    align_with_readout,
    content_keys,
    draw_exact_mask,
    draw_mask,
    draw_tokens,
    hash_keys,
    stratified_times,
    times_of_parts,
    uniform,
)
from ..objective.noise_schedules import get_noise_schedule
from ..objective.segments import (
    behind_first,
    first_of,
    nothing_to_the_right,
    parts,
    places,
)


@dataclass
class DataCollatorForMaskedDiffusion(DataCollatorMixin):
    """Collates tokenised rows and corrupts batches.

    Rows are dicts of `input_ids` and, optionally, `labels` (-100 = never masked: prompts); without labels every token may be
    masked. Rows are padded on the right. A row whose last trained token is the EOS is an answer, and becomes a canvas:

        prompt prompt answer answer <eos>  <eos> <eos>  pad        with a tail of 0 to `eos_tail` further EOS tokens
        clean  clean  maskable ----------  maskable --  hidden
        prompt prompt answer pad                                   or, one row in `1 / random_canvas`, cut anywhere

    so that neither a canvas longer than the answer nor one that ends before it is new to the model. Both still say how long the
    answer is, within the tail. With `max_canvas` they do not: the canvas has `max_canvas` tokens, in a share `random_canvas` of the
    rows 1 to `max_canvas`, and the answer is cut or filled up to it. A model so trained says at position i of an empty canvas how
    likely the answer has ended by then, P(end <= i), which is what `lengths` reads. What stands after the EOS
    (the chat template's newline) is dropped: left visible, it would give away where the answer ends. A truncated answer has no
    EOS: it gets no tail and teaches no false end. Lengths are drawn from the row's content, the same in every batch.

    A packed row (`seq_lengths`, as TRL's packing writes it) is treated text by text, each with its own time; its texts do not see
    each other. They are taken as they are: `canvas` has its place before packing, or rows would outgrow what they were packed to.

    Args:
        pad_token_id, mask_token_id, eos_token_id: ids; without `eos_token_id` rows are left as they are.
        eos_tail: longest tail, in tokens.
        random_canvas: share of answers cut at a random place.
        max_canvas: tokens of a canvas behind the prompt, whatever the answer's length; None: see above.
        text_tails: whether texts without a prompt that come to their EOS get canvases too.
        tail_token_id: token of the tail; None: the EOS.
        eos_tail_weight: what a token of the tail weighs in training, of 1.
        pad_mask_ratio: the tail's mask probability, over the text's.
        pad_annealing_steps: optimiser steps in which that ratio grows from nothing; see `corrupt`.
        first_step_share: share of rows that are masked whole, as at the first step of decoding; see `corrupt`.
        noise_schedule: name, see `noise_schedules`.
        loss_weight: see `losses.loss_weights`.
        right_shift_logits: whether hidden state i - 1 predicts token i.
        attention: "bidirectional", "block" (answers are filled up with EOS to the end of their block) or "lossless" (blocks start
            anywhere; their first token is the base's own and never asked, nor is what stands behind the answer).
        block_length, clean_context: of block attention, see `attention_masks.block_diffusion`.
        max_positions: tokens that the model can count; tails end there.
        full_mask_share: of lossless drafts, the share of blocks that are masked whole, as most are in decoding.
        ar_loss_weight: weight of next-token prediction on the clean half of block attention.
        min_mask_probability, max_mask_probability: range of the mask probability; anything but (0, 1) is no ELBO.
        exact_mask_count: whether the number of masks is drawn, see `noise.draw_exact_mask`, and not every token by itself.
        random_replacement: probability that a trained token, where it is seen, is replaced by a random one; see `corrupt`.
        vocab_size: ids below it are what a replacement is drawn from, the mask left out.
        distillation_targets: which tokens an autoregressive teacher may speak of, see `corrupt`.
        pad_to_multiple_of: as in transformers.
        packing: whether rows hold several texts.
        time_embedding: whether the model is told the noise level.
    """

    pad_token_id: int
    mask_token_id: int
    eos_token_id: int | None = None
    eos_tail: int = 0
    random_canvas: float = 0.0
    max_canvas: int | None = None
    text_tails: bool = False
    tail_token_id: int | None = None
    eos_tail_weight: float = 1.0
    pad_mask_ratio: float = 1.0
    pad_annealing_steps: int | None = None
    first_step_share: float = 0.0
    noise_schedule: str = "linear"
    loss_weight: str = "elbo"
    right_shift_logits: bool = True
    attention: str = "bidirectional"
    block_length: int | None = None
    clean_context: str = "causal"
    full_mask_share: float = 0.7
    max_positions: int | None = None
    ar_loss_weight: float = 0.0
    min_mask_probability: float = 0.0
    max_mask_probability: float = 1.0
    exact_mask_count: bool = False
    random_replacement: float = 0.0
    vocab_size: int | None = None
    distillation_targets: str = "causal"
    pad_to_multiple_of: int | None = None
    packing: bool = False
    time_embedding: bool = False
    return_tensors: str = "pt"

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """-> `input_ids`, `labels`, `attention_mask`, each (B, L); the mask holds the number of a packed row's text, 0 at padding."""
        rows = [
            _texts(example) if "seq_lengths" in example else [self.canvas(*_texts(example)[0])] for example in examples
        ]
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
        # An ordinary word may serve as the mask: where it stands in a text, it is no word that decoding could ever say.
        batch["labels"][batch["input_ids"] == self.mask_token_id] = IGNORE_INDEX
        if self.right_shift_logits:
            batch["labels"][positions(batch["attention_mask"]) == 0] = IGNORE_INDEX  # no hidden state before it
        return batch

    def canvas(self, ids: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
        """A text that ends with an answer, as the canvas that the class's docstring draws; any other as it is."""
        trained = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
        # The template may add a token or two (a newline) after the EOS of the last turn.
        ends = [i for i in trained if i >= trained[-1] - 2 and labels[i] == self.eos_token_id]
        if not ends or (labels[0] != IGNORE_INDEX and not self.text_tails):
            return ids, labels
        ids, labels = ids[: ends[-1] + 1], labels[: ends[-1] + 1]
        if self.attention == "lossless":
            # A draft does not know where the answer ends: masks stand behind it too, which are not asked for.
            tail = self._tail(ids, self.block_length - 1)
            return ids + tail, labels + tail
        if self.attention == "block":
            tail = [self.eos_token_id] * (-len(ids) % self.block_length)
            return ids + tail, labels + tail
        first = max((i for i, label in enumerate(labels) if label == IGNORE_INDEX), default=-1) + 1
        cut, length = zlib.crc32(repr(ids).encode()), zlib.crc32(repr(ids[::-1]).encode())
        random = cut % 1000 < 1000 * self.random_canvas
        if self.max_canvas is not None:
            end = first + (1 + length % self.max_canvas if random else self.max_canvas)
        elif random:
            end = first + 1 + length % (len(ids) - first)
        else:
            end = len(ids) + length % (self.eos_tail + 1)
        tail = self._tail(ids, end - len(ids))
        return (ids + tail)[:end], (labels + tail)[:end]

    def _tail(self, ids: list[int], length: int) -> list[int]:
        room = length if self.max_positions is None else max(self.max_positions - len(ids), 0)
        return [self.eos_token_id if self.tail_token_id is None else self.tail_token_id] * min(length, room)

    def corrupt(
        self,
        batch: dict[str, torch.Tensor],
        *,
        seed: int,
        step: int,
        rows: torch.Tensor | None = None,
        n_rows: int | None = None,
        block_length: int | None = None,
        complement: bool = False,
    ) -> dict[str, torch.Tensor]:
        """Draws noise and lays out the model's inputs and targets.

        Random replacement changes what is seen, never what is asked: every trained token outside the masks (in block attention of
        both halves) is replaced with this probability. The weights stay: a reader who redraws the replacements before every step
        decodes any order of tokens at this cost, so the loss is still an upper bound on the text's NLL, of a model that reads
        through noise. Evaluation sees no replacements.

        The tail, padding in all but name, may have a mask rate of its own: `pad_mask_ratio`, which grows from nothing within
        `pad_annealing_steps`, times the text's; each token is weighed by the inverse of its own rate. So the model first reads where
        a text ends, and later says it. First steps (`first_step_share`) add rows of which nothing is seen, of a text without a prompt
        nothing behind a random place, every token weighing 1, beside the bound. Evaluation knows neither.

        An autoregressive teacher knows p(token | all tokens before it). Averaged over the masked ones among these, that is what the
        model must learn where it sees nothing to the right of the token ("causal"); elsewhere ("all") it is biased, for the
        teacher knows nothing of what comes after. The tail of end tokens was never text to the teacher.

            text     p  a  b  c  d  E  E        bidirectional: p a M M d M M   teacher_mask "causal":  -  -  -  -  -  x  -
            masked         x  x     x  x        blocks of 3:  (p a M)(M d M) M                   -  -  x  -  -  x  -

        Args:
            batch: `input_ids`, `labels`, `attention_mask`, each (B, L).
            seed, step: key of the noise; `step` is the optimiser step.
            rows: (B,) places of these rows in the global batch. None: the noise is keyed by every row's content instead,
                as evaluation wants it.
            n_rows: rows of the global batch, for the strata of the times.
            block_length: of this batch, while blocks still grow; None: the model's.
            complement: mask exactly what the same draw without it leaves visible; the mean of the two estimates is unbiased too.

        Returns:
            Of the model's length M (L, or up to 2L with block attention): `inputs`, the model's keywords (`input_ids` (B, M) and
            masks); `targets` (B, M), the token that each hidden state must predict, -100 = none; `weights` (B, M) fp32 of
            these terms in the objective, and `extra_weights` (B, M) beside the bound (AR co-loss, first steps); `levels` (B, M), the mask probability they
            were seen under, 0 on clean text; `tokens` (B, M), the place in the row of the token that each predicts; `teacher_mask`
            (B, M) bool, whether the teacher speaks of it. Further `masked` and `times` (B, L), `first_step` (B,) bool.
        """
        ids, attention_mask = batch["input_ids"], batch["attention_mask"]
        maskable = (batch["labels"] != IGNORE_INDEX) & attention_mask.bool()
        if fixed := rows is None:
            rows = content_keys(ids, attention_mask)
            times = MIN_TIME + (1 - MIN_TIME) * uniform(seed, step, rows, TIME_STREAM)
        else:
            times = stratified_times(seed, step, rows, n_rows)
        block_length, lossless = block_length or self.block_length, self.attention == "lossless"
        offset: torch.Tensor | int = 0
        if lossless:
            offset = (hash_keys(seed, step, rows, OFFSET_STREAM) % block_length)[:, None]
        part = parts(attention_mask, block_length if self.attention != "bidirectional" else None, offset)
        times = times_of_parts(times, part)
        tail = maskable & ~self._without_tail(ids, maskable)
        probability, weights = self._rates(times, tail, None if fixed else step)
        if self.exact_mask_count:
            masked, probability = draw_exact_mask(seed, step, rows, times, maskable, part)
            weights = 1 / probability
        else:
            masked = draw_mask(seed, step, rows, probability, maskable)
        if complement:
            # Substitute q = 1 - p in the bound's integral: dq = -p'(t) dt, so 1 / q weighs p'(t) / (1 - p) in t.
            weights = weights * probability / (1 - probability).clamp(min=1e-6)
            masked, probability = maskable & ~masked, 1 - probability
        weights = loss_weights(self.loss_weight, weights, probability, masked, attention_mask)
        tail_weight = torch.where(tail, 1.0 if fixed else self.eos_tail_weight, 1.0)
        first_step = uniform(seed, step, rows, FIRST_STEP_STREAM) < (not fixed) * self.first_step_share
        unseen = first_step[:, None] & self._unseen(seed, step, rows, maskable, attention_mask)
        masked = torch.where(first_step[:, None], unseen, masked)
        probability = torch.where(first_step[:, None], torch.ones_like(probability), probability)
        weights, extra = weights * tail_weight * ~first_step[:, None], unseen * tail_weight
        if lossless:
            masked, probability = self._drafted(seed, step, rows, masked, probability, maskable, part)
            weights = torch.ones_like(weights)
            # A draft sees nothing behind its first token, neither the next question.
            behind = ~maskable & (attention_mask > 0) & behind_first(maskable, part)
        seen = ids
        if self.random_replacement and not fixed:
            replaced = draw_mask(seed, step, rows, self.random_replacement, maskable, REPLACE_STREAM)
            tokens = draw_tokens(seed, step, rows, maskable, self.vocab_size - 1)
            seen = torch.where(replaced, tokens + (tokens >= self.mask_token_id), ids)  # any but the mask
        teacher_mask = self._without_tail(ids, maskable)
        if self.distillation_targets == "causal":
            shown = (attention_mask > 0) & ~(masked | behind if lossless else masked)
            teacher_mask &= nothing_to_the_right(shown, part)
        hidden = masked | behind if lossless else masked
        noised = _Noised(ids, seen, attention_mask, maskable, masked, weights, extra, probability, teacher_mask, hidden)
        laid_out = self._lay_out(noised, block_length, offset)
        return {**laid_out, "masked": masked, "times": times, "first_step": first_step}

    def lay_out(
        self, batch: dict[str, torch.Tensor], masked: torch.Tensor, weights: torch.Tensor, probability: torch.Tensor
    ) -> dict[str, Any]:
        """`corrupt` with given noise: `masked`, `weights` and mask `probability`, each (B, L)."""
        ids, document_ids, none = batch["input_ids"], batch["attention_mask"], torch.zeros_like(weights)
        maskable = (batch["labels"] != IGNORE_INDEX) & document_ids.bool()
        noised = _Noised(ids, ids, document_ids, maskable, masked, weights, none, probability, maskable, masked)
        return {**self._lay_out(noised, self.block_length, 0), "masked": masked}

    def _lay_out(self, noised: _Noised, block_length: int | None, offset: torch.Tensor | int) -> dict[str, Any]:
        if self.attention == "bidirectional":
            laid_out = self._whole(noised)
        else:
            laid_out = self._blocks(noised, block_length, offset)
        if self.time_embedding:
            # Not the time but the mask probability, which is what a sampler knows; clean context has none.
            noise = noised.probability
            if self.attention == "block":
                noise = torch.cat([noise, torch.zeros_like(noise)], -1)
            laid_out["inputs"]["timesteps"] = noise[:, -laid_out["inputs"]["input_ids"].shape[1] :]
        return laid_out

    def _rates(self, times: torch.Tensor, tail: torch.Tensor, step: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Mask probability and weight of every token, (B, L) each; `step` None: of evaluation."""
        probability, weights = get_noise_schedule(self.noise_schedule)(times)
        if (self.min_mask_probability, self.max_mask_probability) != (0.0, 1.0):
            low, high = self.min_mask_probability, self.max_mask_probability
            probability = low + (high - low) * probability
            weights = 1 / probability
        if step is None:
            return probability, weights
        grown = 1.0 if self.pad_annealing_steps is None else min(1.0, step / self.pad_annealing_steps)
        ratio = self.pad_mask_ratio * grown
        # At a ratio of nothing the tail is never masked, and its weight never asked for.
        own = weights / max(ratio, MIN_TIME)
        return torch.where(tail, ratio * probability, probability), torch.where(tail, own, weights)

    def _unseen(
        self, seed: int, step: int, rows: torch.Tensor, maskable: torch.Tensor, document_ids: torch.Tensor
    ) -> torch.Tensor:
        """What is masked of a row at its first step: all that is trained, of a text without a prompt what is behind a random place."""
        whole = maskable | (places(document_ids) == 0)  # a first token may have nothing to be read from
        texts = ((document_ids > 0) <= whole).all(-1)
        cut = uniform(seed, step, rows, ORDER_STREAM) * (document_ids > 0).sum(-1)
        return maskable & (~texts[:, None] | (places(document_ids) >= cut[:, None]))

    def _whole(self, noised: _Noised) -> dict[str, Any]:
        """Bidirectional attention: the noisy text, and its masked tokens as targets."""
        document_ids = noised.document_ids
        targets = noised.ids.masked_fill(~noised.masked, IGNORE_INDEX)
        targets = align_with_readout(targets, self.right_shift_logits, IGNORE_INDEX)
        weights = align_with_readout(noised.weights, self.right_shift_logits, 0.0)
        # A hidden state of padding predicts nothing.
        targets = targets.masked_fill(document_ids == 0, IGNORE_INDEX)
        inputs = {"input_ids": noised.noisy(self.mask_token_id), "attention_mask": document_ids}
        if self.packing:
            # `is_causal=False` ignores position ids, so packed texts would see each other.
            inputs["attention_mask"] = additive(bidirectional(document_ids))
            inputs["position_ids"] = positions(document_ids).clamp(min=0)
        return {
            "inputs": inputs,
            "targets": targets,
            "weights": weights,
            "extra_weights": align_with_readout(noised.extra, self.right_shift_logits, 0.0),
            "levels": align_with_readout(noised.probability, self.right_shift_logits, 0.0),
            "tokens": align_with_readout(places(document_ids), self.right_shift_logits, 0),
            "teacher_mask": align_with_readout(noised.teacher_mask, self.right_shift_logits, False),
        }

    def _drafted(
        self,
        seed: int,
        step: int,
        rows: torch.Tensor,
        masked: torch.Tensor,
        probability: torch.Tensor,
        maskable: torch.Tensor,
        part: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Masks and their probability (B, L) as drafting meets them: most blocks whole, the first token of half of these known."""
        full = uniform(seed, step, rows[:, None], part, FULL_STREAM) < self.full_mask_share
        known = uniform(seed, step, rows[:, None], part, FIRST_STREAM) < 0.5
        masked = torch.where(full, maskable & ~(first_of(part) & known), masked)
        return masked, torch.where(full, torch.ones_like(probability), probability)

    def _blocks(self, noised: _Noised, block_length: int, offset: torch.Tensor | int = 0) -> dict[str, Any]:
        """Block attention: [noisy ; clean] in one pass; with the right shift a block's first token is read from the clean half.

        That read-out sees no noise, so the expectation over its mask, weight 1 whether masked or not, is taken exactly. The AR
        co-loss adds `ar_loss_weight` times next-token prediction on the clean half.
        """
        ids, document_ids, maskable = noised.ids, noised.document_ids, noised.maskable
        position = positions(document_ids).clamp(min=0)
        place, lossless = position + offset, self.attention == "lossless"
        from_clean = torch.zeros_like(maskable)
        if self.right_shift_logits:
            from_clean = maskable & (place % block_length == 0)
        none, wanted = IGNORE_INDEX, from_clean | (maskable & (self.ar_loss_weight > 0))
        if lossless:
            wanted = torch.zeros_like(wanted)  # the base says it
            from_clean = from_clean | ~self._without_tail(ids, maskable)

        # Blocks that no row masks (prompts) need no noisy copy.
        length = ids.shape[1]
        used = maskable.any(0)
        first = used.int().argmax()
        inside = (place % block_length * (document_ids > 0)).index_select(1, first[None]).max()
        start = int((first - inside) * used.any())
        start = max(start, 0)  # the start of the block it is in
        kept = torch.cat([torch.arange(start, length), torch.arange(length, 2 * length)]).to(ids.device)

        def align(noisy_half: torch.Tensor, clean_half: torch.Tensor, fill: float) -> torch.Tensor:
            # The clean half is an AR model: it always predicts the next token.
            halves = align_with_readout(noisy_half, self.right_shift_logits, fill)
            return torch.cat([halves, align_with_readout(clean_half, True, fill)], -1)[:, kept]

        allowed = block_diffusion(document_ids, block_length, self.clean_context, offset)[:, kept][:, :, kept]
        return {
            "inputs": {
                "input_ids": torch.cat([noised.noisy(self.mask_token_id), noised.seen], -1)[:, kept],
                "attention_mask": additive(allowed),
                "position_ids": torch.cat([position, position], -1)[:, kept],
            },
            "targets": align(ids.masked_fill(~noised.masked | from_clean, none), ids.masked_fill(~wanted, none), none),
            "weights": align(noised.weights, from_clean.float(), 0.0),
            "extra_weights": align(torch.zeros_like(noised.weights), self.ar_loss_weight * maskable, 0.0),
            "levels": align(noised.probability, torch.zeros_like(noised.probability), 0.0),
            "tokens": align(places(ids), places(ids), 0),
            # The clean half reads from left to right at every token.
            "teacher_mask": align(noised.teacher_mask, self._without_tail(ids, maskable), False),
        }

    def _without_tail(self, ids: torch.Tensor, maskable: torch.Tensor) -> torch.Tensor:
        """Trained tokens but for end tokens that follow another one: the tail of a canvas, which is no text."""
        if self.eos_token_id is None:
            return maskable.clone()
        tail = self.eos_token_id if self.tail_token_id is None else self.tail_token_id
        ends = ((ids == self.eos_token_id) | (ids == tail)) & maskable
        return maskable & ~(ends & torch.nn.functional.pad(ends[:, :-1], (1, 0), value=False))


@dataclass
class _Noised:
    """Rows and what the noise made of them, each (B, L)."""

    ids: torch.Tensor
    seen: torch.Tensor  # with replacements
    document_ids: torch.Tensor
    maskable: torch.Tensor
    masked: torch.Tensor
    weights: torch.Tensor
    extra: torch.Tensor  # weights beside the bound
    probability: torch.Tensor
    teacher_mask: torch.Tensor
    hidden: torch.Tensor  # what stands as a mask: the masked tokens, of a drafter more

    def noisy(self, mask_token_id: int) -> torch.Tensor:
        return self.seen.masked_fill(self.hidden, mask_token_id)


def _texts(example: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Tokens and labels of the texts of a row, several when it is packed."""
    ids = [int(token) for token in example["input_ids"]]
    labels = example.get("labels")
    labels = list(ids) if labels is None else [int(token) for token in labels]
    ends = list(itertools.accumulate(example.get("seq_lengths") or [len(ids)]))
    return [(ids[start:end], labels[start:end]) for start, end in zip([0, *ends], ends, strict=False)]
