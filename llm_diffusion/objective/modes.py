"""The three ways in which a converted model attends, one object each; nothing else compares their names.

A mode owns what depends on attention: the canvas of an answer, the layout of a noisy batch, the mask of decoding and the read-out.

    read-out          position          0    1    2    3
                      hidden state      h0   h1   h2   h3
    own position      hidden[i] predicts token i            (LLaDA, SDAR)
    right-shifted     hidden[i - 1] predicts token i        (what the autoregressive model learned; Dream)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from .attention_masks import (
    additive,
    bidirectional,
    block_causal,
    block_decoding,
    block_diffusion,
    column_index,
    positions,
)

IGNORE_INDEX = -100  # label of a position that is never masked and never scored


@dataclass
class NoisyRows:
    """The rows of a batch and what the noise made of them, each (B, L)."""

    input_ids: torch.Tensor
    document_ids: torch.Tensor  # see `attention_masks`
    segment_ids: torch.Tensor  # number of the text, or block, that has one time
    maskable: torch.Tensor
    text: torch.Tensor  # maskable tokens but for the tail of end tokens behind an answer
    masked: torch.Tensor
    probability: torch.Tensor  # that a token is masked
    weights: torch.Tensor  # of the terms of the bound
    extra_weights: torch.Tensor  # of terms beside it
    seen: torch.Tensor  # ids, some of them replaced
    hidden: torch.Tensor  # what stands as a mask: the masked tokens, of a drafter more
    teacher_mask: torch.Tensor  # tokens that an autoregressive teacher can predict
    offset: torch.Tensor | int = 0  # (B, 1) by how many tokens the first block is shortened

    def noisy_ids(self, mask_token_id: int) -> torch.Tensor:
        return self.seen.masked_fill(self.hidden, mask_token_id)


@dataclass(frozen=True)
class Bidirectional:
    """Every token sees the whole text; a canvas of masks is filled in any order."""

    name: ClassVar[str] = "bidirectional"
    has_blocks: ClassVar[bool] = False  # whether text is cut into blocks, from left to right
    drafts: ClassVar[bool] = False  # whether adapters only propose what the untouched base verifies
    default_block_length: ClassVar[int | None] = None
    min_block_length: ClassVar[int] = 1

    block_length: int | None = None
    clean_context: str | None = None
    right_shift_logits: bool = True

    def canvas_end(self, length: int, first: int, settings: Any, choice: int, draw: int) -> int:
        """Tokens of a canvas: of an answer from `first` to `length`, by two numbers that its content decides."""
        random = choice % 1000 < 1000 * settings.random_canvas
        if settings.max_canvas is not None:
            return first + (1 + draw % settings.max_canvas if random else settings.max_canvas)
        if random:
            return first + 1 + draw % (length - first)
        return length + draw % (settings.eos_tail + 1)

    def lay_out(self, rows: NoisyRows, mask_token_id: int, ar_loss_weight: float, packing: bool) -> dict[str, Any]:
        """What the model sees of noisy rows, and which hidden state predicts which token; see `ForwardProcess.corrupt`."""
        document_ids = rows.document_ids
        inputs = {"input_ids": rows.noisy_ids(mask_token_id), "attention_mask": document_ids}
        if packing:
            # `is_causal=False` ignores position ids, so packed texts would see each other.
            inputs["attention_mask"] = additive(bidirectional(document_ids))
            inputs["position_ids"] = positions(document_ids).clamp(min=0)
        targets = self.align(rows.input_ids.masked_fill(~rows.masked, IGNORE_INDEX), IGNORE_INDEX)
        # A hidden state of padding predicts nothing.
        return {
            "inputs": inputs,
            "noise_levels": rows.probability,
            "targets": targets.masked_fill(document_ids == 0, IGNORE_INDEX),
            "weights": self.align(rows.weights, 0.0),
            "extra_weights": self.align(rows.extra_weights, 0.0),
            "levels": self.align(rows.probability, 0.0),
            "tokens": self.align(column_index(document_ids), 0),
            "teacher_mask": self.align(rows.teacher_mask, False),
        }

    def align(self, per_token: torch.Tensor, fill: float) -> torch.Tensor:
        return align_with_readout(per_token, self.right_shift_logits, fill)

    def decoding_mask(self, document_ids: torch.Tensor, active: torch.Tensor) -> torch.Tensor | None:
        """(B, L, L) bool, what every token sees while block `active` (B,) is filled; None: all but padding."""
        return None

    def block_start(self, prompt_lengths: torch.Tensor) -> torch.Tensor:
        """(B,) -> (B,) position from which the blocks of an answer are counted: its own first token."""
        return prompt_lengths

    def readout_positions(self, columns: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Columns of the hidden states that predict the tokens at `columns` (B, k), whose positions in the text are `places`.

        The first token of a text has no predecessor, not even padding: it is read in its own place.
        """
        return torch.where((places > 0) & self.right_shift_logits, columns - 1, columns)


@dataclass(frozen=True)
class Block(Bidirectional):
    """Blocks from left to right, bidirectional inside; finished blocks are clean context, causal or block-causal."""

    name: ClassVar[str] = "block"
    has_blocks: ClassVar[bool] = True
    default_block_length: ClassVar[int | None] = 4

    def canvas_end(self, length: int, first: int, settings: Any, choice: int, draw: int) -> int:
        return length + -length % self.block_length

    def lay_out(self, rows: NoisyRows, mask_token_id: int, ar_loss_weight: float, packing: bool) -> dict[str, Any]:
        """[noisy ; clean] in one pass; with the right shift a block's first token is read from the clean half.

        That read-out sees no noise, so the expectation over its mask, weight 1 whether masked or not, is taken exactly. The AR
        co-loss adds `ar_loss_weight` times next-token prediction on the clean half.
        """
        ids, none = rows.input_ids, IGNORE_INDEX
        position = positions(rows.document_ids).clamp(min=0)
        from_clean, clean_targets = self._read_from_clean(rows, position, ar_loss_weight)
        kept = self._kept_columns(rows, position)

        def join(noisy: torch.Tensor, clean: torch.Tensor, fill: float) -> torch.Tensor:
            # The clean half is an AR model: it always predicts the next token.
            return torch.cat([self.align(noisy, fill), align_with_readout(clean, True, fill)], -1)[:, kept]

        zeros = torch.zeros_like(rows.weights)
        allowed = block_diffusion(rows.document_ids, self.block_length, self.clean_context, rows.offset)
        return {
            "inputs": {
                "input_ids": torch.cat([rows.noisy_ids(mask_token_id), rows.seen], -1)[:, kept],
                "attention_mask": additive(allowed[:, kept][:, :, kept]),
                "position_ids": torch.cat([position, position], -1)[:, kept],
            },
            "noise_levels": torch.cat([rows.probability, zeros], -1)[:, kept],
            "targets": join(
                ids.masked_fill(~rows.masked | from_clean, none), ids.masked_fill(~clean_targets, none), none
            ),
            "weights": join(rows.weights, from_clean.float(), 0.0),
            "extra_weights": join(zeros, ar_loss_weight * rows.maskable, 0.0),
            "levels": join(rows.probability, zeros, 0.0),
            "tokens": join(column_index(ids), column_index(ids), 0),
            # The clean half reads from left to right at every token.
            "teacher_mask": join(rows.teacher_mask, rows.text, False),
        }

    def _read_from_clean(
        self, rows: NoisyRows, position: torch.Tensor, ar_loss_weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokens that the noisy half does not predict, and those that the clean half does, (B, L) bool each."""
        first = rows.maskable & ((position + rows.offset) % self.block_length == 0)
        from_clean = first if self.right_shift_logits else torch.zeros_like(first)
        return from_clean, from_clean | (rows.maskable & (ar_loss_weight > 0))

    def _kept_columns(self, rows: NoisyRows, position: torch.Tensor) -> torch.Tensor:
        """Columns of [noisy ; clean], without noisy blocks in which no row masks anything (prompts)."""
        length = rows.input_ids.shape[1]
        used = rows.maskable.any(0)
        first = used.int().argmax()
        inside = (position + rows.offset) % self.block_length * (rows.document_ids > 0)
        start = max(int((first - inside.index_select(1, first[None]).max()) * used.any()), 0)
        columns = [torch.arange(start, length), torch.arange(length, 2 * length)]
        return torch.cat(columns).to(rows.input_ids.device)

    def decoding_mask(self, document_ids: torch.Tensor, active: torch.Tensor) -> torch.Tensor | None:
        return block_decoding(document_ids, self.block_length, self.clean_context, active)

    def clean_mask(self, document_ids: torch.Tensor) -> torch.Tensor:
        """(B, L, L) bool, what tokens of finished blocks see of each other."""
        return block_causal(document_ids, 1 if self.clean_context == "causal" else self.block_length)

    def block_start(self, prompt_lengths: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(prompt_lengths)  # as in training: the start of the text


@dataclass(frozen=True)
class Lossless(Block):
    """Adapters draft a block behind the base's own text, and the base accepts what it would have predicted itself."""

    name: ClassVar[str] = "lossless"
    drafts: ClassVar[bool] = True
    default_block_length: ClassVar[int | None] = 8
    min_block_length: ClassVar[int] = 2  # the first token of a draft is the base's own

    def canvas_end(self, length: int, first: int, settings: Any, choice: int, draw: int) -> int:
        # A draft does not know where the answer ends: masks stand behind it too, which are not scored.
        return length + self.block_length - 1

    def _read_from_clean(
        self, rows: NoisyRows, position: torch.Tensor, ar_loss_weight: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        first, _ = super()._read_from_clean(rows, position, 0.0)
        return first | ~rows.text, torch.zeros_like(first)  # the base predicts them

    def block_start(self, prompt_lengths: torch.Tensor) -> torch.Tensor:
        return prompt_lengths  # drafts start anywhere


MODES = {mode.name: mode for mode in (Bidirectional, Block, Lossless)}


def align_with_readout(per_token: torch.Tensor, right_shift: bool, fill: float) -> torch.Tensor:
    """Moves values that belong to tokens to the hidden states that predict them: (B, L) -> (B, L).

    With the right-shifted read-out hidden state i holds the value of token i + 1, and the last one `fill`; token 0 has no
    predictor.
    """
    return pad(per_token[:, 1:], (0, 1), value=fill) if right_shift else per_token
