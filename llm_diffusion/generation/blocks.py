"""Block decoding with an exact key-value cache, for models that were converted with block attention.

The prompt is prefilled once. A block of masks is then denoised against the cache; when it is finished, one forward over
[finished block ; next block] writes its keys and values, as clean text, and gives the first logits of the next block: no extra
pass to commit a block. The noisy block's own entries are cropped off the cache, never copied.

    cache            | finished block      | next block                 rows of one batch share the columns of a block:
    clean, frozen    | clean_context       | sees everything            a row's prompt is shifted left by its incomplete
                     | -> stays in cache   | -> cropped again           block, which is decoded with its answer

Blocks are counted in the text, from its first token, as in training. With the right-shifted read-out a block's first token is
read from the last finished token, so it is the AR prediction and is kept for all steps of the block.
Trade-off: rows wait for each other at the end of a block. Alternative: `canvas.fill_masks`, which forwards the whole text each
step and is the reference this is tested against.

References: BD3LM (arXiv 2503.09573), SDAR (arXiv 2510.06303), Fast-dLLM v2 (arXiv 2509.26328).
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from transformers import DynamicCache, LogitsProcessorList

from ..models.outputs import DiffusionOutput, eos_ids, output_of
from ..models.patching import base_of, is_compiled
from ..models.record import record_of
from ..objective.attention_masks import additive, block_causal
from ..objective.noise import row_keys
from .canvas import OnStep, finish, mask_share, passes_of, steps_per_block, with_guided
from .config import DiffusionGenerationConfig
from .logits import (
    Window,
    guide,
)
from .step import commit, still_busy


class BlockDecoder:
    """One batch under block decoding.

    Args:
        input_ids, attention_mask: (B, P) prompts, padded on the left.
        settings: see `DiffusionGenerationConfig`; blocks have the length that the model was converted with.
        processors: of the host, see `logits.apply_processors`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        settings: DiffusionGenerationConfig,
        processors: LogitsProcessorList | None = None,
    ) -> None:
        record = record_of(model)
        self.block_length, self.shift = record.block_length, record.right_shift_logits
        self.model, self.settings, self.processors = model, copy.copy(settings), processors
        self.settings.block_length = self.block_length
        self.clean_context = record.clean_context
        self.eos = eos_ids(settings, input_ids.device)
        self.prompts, self.prompt_mask = input_ids, attention_mask
        lengths = attention_mask.sum(-1)
        tail = lengths % self.block_length  # prompt tokens of the incomplete block
        self.prefix = int((lengths - tail).max())
        n_blocks = -(-(int(tail.max()) + settings.max_new_tokens) // self.block_length)
        column = torch.arange(self.prefix + n_blocks * self.block_length, device=input_ids.device)
        place = column - (self.prefix - (lengths - tail))[:, None]  # (B, W) position in the text, negative: padding
        source = (place + input_ids.shape[1] - lengths[:, None]).clamp(0, max(input_ids.shape[1] - 1, 0))
        is_prompt = (place >= 0) & (place < lengths[:, None])
        masks = torch.full_like(place, settings.mask_token_id)
        self.ids = torch.where(is_prompt, input_ids.gather(-1, source), masks) if input_ids.shape[1] else masks
        self.places = place.clamp(min=0)
        end = lengths + settings.max_new_tokens
        self.mask = ((place >= 0) & (place < end[:, None])).long()
        self.open = (place >= lengths[:, None]) & (place < end[:, None])
        canvas_mask = torch.cat([attention_mask, torch.ones_like(masks[:, : settings.max_new_tokens])], -1)
        self.keys = row_keys(self.sequences(), canvas_mask)
        self.index = torch.arange(len(input_ids), device=input_ids.device)
        self.steps_done, self.nfe = torch.zeros_like(self.index), torch.zeros_like(self.index)
        self.confidence = torch.zeros(self.ids.shape, device=input_ids.device)
        self.cache, self.last_logits = DynamicCache(), None

    def sequences(self) -> torch.Tensor:
        """(B, P + max_new_tokens) canvas in the layout of the prompts."""
        return torch.cat([self.prompts, self._answers(self.ids)], -1)

    def _answers(self, per_column: torch.Tensor) -> torch.Tensor:
        """(B, W) -> (B, max_new_tokens), the columns of the answers."""
        first = self.open.long().argmax(-1)
        columns = first[:, None] + torch.arange(self.settings.max_new_tokens, device=self.ids.device)
        return per_column.gather(-1, columns)

    def run(self, on_step: OnStep | None = None) -> DiffusionOutput:
        """Decodes all rows to their end."""
        history: list[torch.Tensor] = []
        confidences: list[torch.Tensor] = []

        def after_step() -> None:
            if self.settings.output_history or on_step is not None:
                history.append(self.sequences())
                confidences.append(torch.nn.functional.pad(self._answers(self.confidence), (self.prompts.shape[1], 0)))
                if on_step is not None:
                    on_step(history[-1], confidences[-1])

        rows = self.index  # still being decoded
        static = is_compiled(self.model)  # rows that are done stay then, and do nothing: another batch is another graph
        if self.prefix:
            self._prefill(rows)
        for start in range(self.prefix, self.ids.shape[1], self.block_length):
            self._denoise(rows, start, after_step)
            finished, self.ids[rows] = finish(self.ids[rows], self.open[rows], self.eos, self.settings)
            stay = [row for row, done in enumerate(finished.tolist()) if not done]
            if not stay:
                break
            if len(stay) < len(finished) and not static:
                stay = torch.tensor(stay, device=rows.device)
                rows = rows[stay]
                self.cache.batch_select_indices(with_guided(stay, len(finished), self.settings))
                self.last_logits = None if self.last_logits is None else self.last_logits[stay]
        was_open = torch.zeros_like(self.sequences(), dtype=torch.bool)
        was_open[:, self.prompts.shape[1] :] = True
        history_ = history if self.settings.output_history else None
        output = output_of(self.sequences(), was_open, self.nfe, self.eos, history_)
        output.confidence = confidences if self.settings.output_history else None
        return output

    def _prefill(self, rows: torch.Tensor) -> None:
        mask = self.mask[:, : self.prefix]
        # Causal is block-causal with blocks of one.
        allowed = block_causal(mask, 1 if self.clean_context == "causal" else self.block_length)
        last = torch.tensor([self.prefix - 1], device=mask.device)
        self.last_logits = self._forward(rows, 0, self.prefix, allowed, last)[:, 0]
        self.nfe += passes_of(self.settings)

    def _denoise(self, rows: torch.Tensor, start: int, after_step: Callable[[], None]) -> None:
        """Fills one block of every row."""
        end, settings = start + self.block_length, self.settings
        per_block = steps_per_block(settings, settings.max_new_tokens) if settings.steps else 0
        steps_left, post_steps = torch.full_like(rows, per_block), torch.zeros_like(rows)
        pending = self._pending(rows, start, end)
        working, go_on = pending.any(-1), True  # rows that are done have left: some row has masks in its next block
        while go_on:
            columns = torch.arange(start, end, device=rows.device).expand(len(rows), -1)
            window = Window(
                columns=columns,
                open=self.open[rows, start:end] & working[:, None],
                masked=pending,
                canvas=self.ids[rows, :end],
                visible=self.mask[rows, :end].bool() & torch.nn.functional.pad(~pending, (start, 0), value=True),
                confidence=self.confidence[rows, start:end],
                keys=self.keys[rows],
                places=self.places[rows, start:end],
                step=self.steps_done[rows],
                steps_left=steps_left,
                post_steps=post_steps,
                block_steps=per_block,
            )
            chosen, tokens, probability = commit(self._block_logits(rows, start), window, settings, self.processors)
            self.steps_done[rows] += working.long()
            self.nfe[rows] += working.long() * passes_of(settings)
            self.ids[rows, start:end] = torch.where(chosen, tokens, self.ids[rows, start:end])
            self.confidence[rows, start:end] = torch.where(chosen, probability, self.confidence[rows, start:end])
            busy, post_steps = still_busy(window, chosen, tokens, settings)
            busy = busy & working
            # An end token with no mask before it makes the rest of the block a formality.
            _, self.ids[rows, start:end] = finish(
                self.ids[rows, start:end], self.open[rows, start:end], self.eos, settings, busy
            )
            steps_left = (steps_left - 1).clamp(min=1)
            pending = self._pending(rows, start, end)
            working = pending.any(-1) | busy
            go_on = bool(working.any())
            after_step()

    def _pending(self, rows: torch.Tensor, start: int, end: int) -> torch.Tensor:
        return (self.ids[rows, start:end] == self.settings.mask_token_id) & self.open[rows, start:end]

    def _block_logits(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """(B, b, V) logits of the block's tokens; the block before it enters the cache if it is not there yet."""
        b, cached = self.block_length, self.cache.get_seq_length()
        fresh = start - cached  # b when the finished block is still to be written, else 0
        mask = self.mask[rows, : start + b].bool()
        allowed = mask[:, None, :].repeat(1, fresh + b, 1)
        allowed[:, :fresh, start:] = False
        if fresh and self.clean_context == "causal":
            allowed[:, :fresh, cached:start] &= torch.ones(b, b, dtype=torch.bool, device=mask.device).tril()
        keep = torch.arange(max(fresh - 1, 0), fresh + b, device=mask.device)
        logits = self._forward(rows, cached, start + b, allowed, keep)
        self.cache.crop(-b)
        if fresh:
            self.last_logits, logits = logits[:, 0], logits[:, 1:]
        if not self.shift:
            return logits
        first = logits[:, :1] if self.last_logits is None else self.last_logits[:, None]
        return torch.cat([first, logits[:, :-1]], 1)

    def _forward(
        self, rows: torch.Tensor, start: int, end: int, allowed: torch.Tensor, keep: torch.Tensor
    ) -> torch.Tensor:
        """Logits at `keep` of the columns [start, end), which enter the cache."""
        timing = {}
        if record_of(self.model).time_embedding:
            block = slice(end - self.block_length, end)  # the last columns; what stands before them is clean
            noise = mask_share(self.ids[rows, block], self.open[rows, block], self.settings)
            timing["timesteps"] = torch.nn.functional.pad(
                noise.expand(-1, self.block_length), (end - start - self.block_length, 0)
            )
        inputs = {
            "input_ids": self.ids[rows, start:end],
            "attention_mask": additive(allowed, base_of(self.model).dtype),
            "position_ids": self.places[rows, start:end],
            **timing,
        }
        guided = self.settings.guided
        if guided:
            inputs = {name: torch.cat([value, value]) for name, value in inputs.items()}
            is_prompt = self.mask[rows, start:end].bool() & ~self.open[rows, start:end]
            inputs["input_ids"][len(rows) :].masked_fill_(is_prompt, self.settings.mask_token_id)
        logits = self.model(**inputs, past_key_values=self.cache, use_cache=True, logits_to_keep=keep).logits.float()
        return guide(logits, self.settings.guidance_scale) if guided else logits


@torch.no_grad()
def decode_blocks(
    model: torch.nn.Module,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    settings: DiffusionGenerationConfig,
    on_step: OnStep | None = None,
    processors: LogitsProcessorList | None = None,
) -> DiffusionOutput:
    """Answers left-padded prompts (B, P) block by block; a `DiffusionOutput` with sequences (B, P + max_new_tokens)."""
    training = model.training
    model.eval()
    try:
        return BlockDecoder(model, input_ids, attention_mask, settings, processors).run(on_step)
    finally:
        model.train(training)
