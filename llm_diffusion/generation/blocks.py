"""Block decoding with an exact key-value cache, for models that were converted with block attention.

The prompt is prefilled once. A block of masks is then denoised against the cache; when it is finished, one forward over
[finished block ; next block] writes its keys and values, as clean text, and gives the first logits of the next block: no extra
pass to commit a block. The noisy block's own entries are cropped off the cache, never copied.

    cache            | finished block      | next block                 rows of one batch share the columns of a block:
    clean, frozen    | clean_context       | sees everything            a row's prompt is shifted left by its incomplete
                     | -> stays in cache   | -> cropped again           block, which is decoded with its answer

Blocks are counted in the text, from its first token, as in training. With the right-shifted read-out a block's first token is
read from the last finished token, so it is the AR prediction and is kept for all steps of the block. Rows wait for each other at
the end of a block. `canvas.fill_masks`, which forwards the whole text each step, is the reference this is tested against.

References: BD3LM (arXiv 2503.09573), SDAR (arXiv 2510.06303), Fast-dLLM v2 (arXiv 2509.26328).
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad
from transformers import DynamicCache

from ..models.patching import base_of
from ..objective.attention_masks import additive
from .canvas import CanvasDecoder
from .step import Rows, Window, guide, with_unconditional


class BlockDecoder(CanvasDecoder):
    """A canvas whose rows are shifted so that their blocks share columns, and whose finished blocks are in a cache."""

    def _rows(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Rows:
        """Columns (B, W): whole blocks of prompt, padded on the left, then the rest of the prompt, the answer, and padding."""
        rows, b, self.canvas = super()._rows(ids, attention_mask), self.settings.block_length, ids
        lengths, ends = attention_mask[:, : self.first].sum(-1), attention_mask.sum(-1)
        tail = lengths % b  # prompt tokens of the incomplete block
        self.prefix = int((lengths - tail).max())
        n_blocks = -(-(int(tail.max()) + ids.shape[1] - self.first) // b)
        column = torch.arange(self.prefix + n_blocks * b, device=ids.device)
        rows.places = column - (self.prefix - (lengths - tail))[:, None]
        inside = (rows.places >= 0) & (rows.places < ends[:, None])
        source = (rows.places + ids.shape[1] - ends[:, None]).clamp(0, ids.shape[1] - 1)
        rows.ids = ids.gather(-1, source)
        rows.attention_mask, rows.open = inside.long(), inside & (rows.places >= lengths[:, None])
        rows.block = ((column - self.prefix) // b).clamp(min=0).expand_as(rows.ids)
        rows.confidence = torch.zeros(rows.ids.shape, device=ids.device)
        self.answer = rows.open.long().argmax(-1, keepdim=True)  # (B, 1) its first column
        return rows

    def _as_given(self, per_column: torch.Tensor, prompt: int | None = None) -> torch.Tensor:
        columns = self.answer + torch.arange(self.canvas.shape[1] - self.first, device=per_column.device)
        before = self.canvas[:, : self.first]
        before = before if prompt is None else torch.full_like(before, prompt, dtype=per_column.dtype)
        return torch.cat([before, per_column.gather(-1, columns)], -1)

    def _prefill(self) -> int:
        self.cache, self.last_logits = DynamicCache(), None
        if self.prefix:
            allowed = self.mode.clean_mask(self.rows.attention_mask[:, : self.prefix])
            last = torch.full_like(self.rows.index, self.prefix - 1)[:, None]
            self.last_logits = self._forward(self.rows, 0, self.prefix, allowed, last)
        return int(self.prefix > 0)

    def _leave(self, stay: torch.Tensor, n_rows: int) -> None:
        super()._leave(stay, n_rows)
        self.last_logits = None if self.last_logits is None else self.last_logits[stay]

    def _logits(self, window: Window) -> torch.Tensor:
        """(B, k, V) fp32 logits of the tokens of a window; the block before it enters the cache if it is not there yet."""
        rows, b, cached = window.rows, self.settings.block_length, self.cache.get_seq_length()
        start = self.prefix + window.block * b
        fresh = start - cached  # b when the finished block is still to be written, else 0
        allowed = rows.attention_mask[:, None, : start + b].bool().repeat(1, fresh + b, 1)
        allowed[:, :fresh, start:] = False
        if fresh:
            allowed[:, :fresh, cached:start] &= self.mode.clean_mask(torch.ones_like(rows.ids[:1, :b]))
        columns = (window.columns - start).clamp(0, b - 1)  # those of rows that have fewer may be anywhere
        keep, shift = columns + fresh, self.record.right_shift_logits
        if shift:  # a block's first token is read from the last of the block before, in the pass that writes that one
            keep = (keep - 1).clamp(min=0)
            keep = pad(keep, (1, 0), value=fresh - 1) if fresh else keep
        logits = self._forward(rows, cached, start + b, allowed, keep)
        self.cache.crop(-b)
        if not self.cache.get_seq_length():  # of an empty cache transformers selects no rows when some leave
            self.cache = DynamicCache()
        if shift and fresh:
            self.last_logits, logits = logits[:, :1], logits[:, 1:]
        elif shift and self.last_logits is not None:
            logits = torch.where(columns[..., None] == 0, self.last_logits, logits)
        return logits

    def _forward(self, rows: Rows, start: int, end: int, allowed: torch.Tensor, keep: torch.Tensor) -> torch.Tensor:
        """Logits at `keep` (B, k) of the columns [start, end), which enter the cache."""
        settings, b = self.settings, self.settings.block_length
        inputs = {
            "input_ids": rows.ids[:, start:end],
            "attention_mask": additive(allowed, base_of(self.model).dtype),
            "position_ids": rows.places[:, start:end].clamp(min=0),
            "logits_to_keep": keep,
        }
        if self.record.time_embedding:  # the last columns are the block; what stands before them is clean
            noise = self._mask_share(rows.ids[:, end - b : end], rows.open[:, end - b : end])
            inputs["timesteps"] = pad(noise.expand(-1, b), (end - start - b, 0))
        inputs = with_unconditional(inputs, rows.given[:, start:end], settings)
        logits = self.model(**inputs, past_key_values=self.cache, use_cache=True).logits.float()
        return guide(logits, settings.guidance_scale)
