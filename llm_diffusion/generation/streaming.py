"""What a streamer hears while a text is decoded: the prompt, drafts after every step, finished blocks, the end.

A streamer with `put_draft` (the host's `TextDiffusionStreamer`) gets after every step what was not put yet; if its `put_draft`
has a parameter `confidence`, it gets the probabilities too. `put` gets a block as soon as nothing can change it; with more than
one row, where rows end at different lengths, the whole answers at the end.
Trade-off: tokens pass to the CPU in every step, as streamers expect. Alternative: `output_history`, all at the end.
"""

from __future__ import annotations

import inspect

import torch
from transformers.generation.streamers import BaseStreamer

from ..models.record import DiffusionRecord
from .config import DiffusionGenerationConfig


class Stream:
    """One call of `generate`, as told to its streamer.

    Args:
        prompts, attention_mask: (B, P).
        record: of the model, which says from where blocks are counted.
    """

    def __init__(
        self,
        streamer: BaseStreamer,
        prompts: torch.Tensor,
        attention_mask: torch.Tensor,
        settings: DiffusionGenerationConfig,
        record: DiffusionRecord,
    ) -> None:
        self.streamer, self.settings, self.start = streamer, settings, prompts.shape[1]
        self.block_length = record.block_length or settings.block_length or settings.max_new_tokens
        # Blocks of a block model are counted from the start of the text, prompt included.
        self.offset = int(attention_mask[0].sum()) if record.mode.has_blocks and not record.mode.drafts else 0
        self.one_row, self.sent = len(prompts) == 1, 0
        self.drafts = hasattr(streamer, "put_draft")
        self.wants_confidence = self.drafts and "confidence" in inspect.signature(streamer.put_draft).parameters
        streamer.put(prompts.cpu())

    def step(self, canvas: torch.Tensor, confidence: torch.Tensor | None = None) -> None:
        """After every step: (B, L) canvas and, except from a verifying base, the probabilities of its tokens."""
        answer = canvas[:, self.start :].clone().cpu()  # the canvas goes on changing; a streamer may keep what it got
        if self.drafts:
            extra = {}
            if self.wants_confidence and confidence is not None:
                extra["confidence"] = confidence[:, self.start + self.sent :].clone().cpu()
            self.streamer.put_draft(value=answer[:, self.sent :], **extra)
        final = self._final(answer[0]) if self.one_row else 0
        if final > self.sent:
            self.streamer.put(answer[:, self.sent : final])
            self.sent = final

    def _final(self, answer: torch.Tensor) -> int:
        """Tokens on the left that nothing can change any more: whole blocks, none of them the last one begun."""
        masked = answer == self.settings.mask_token_id
        if not bool(masked.any()):
            return self.sent  # the rest comes at the end, cut behind the end token
        reached = int(masked.long().argmax())
        if self.settings.revises:  # a block is left when the next one is begun
            reached = min(reached, int((~masked).nonzero().amax())) if bool((~masked).any()) else 0
        return max((self.offset + reached) // self.block_length * self.block_length - self.offset, self.sent)

    def end(self, sequences: torch.Tensor) -> None:
        """The rest of the answers (B, P + n), as `generate` returns them."""
        self.streamer.put(sequences[:, self.start + self.sent :].cpu())
        self.streamer.end()
