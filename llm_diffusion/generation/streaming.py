"""What a streamer gets while a text is decoded, and one that shows it: in the terminal, or as an animated SVG file.

prompt        put(prompt)
every step    put_draft(what was not put yet, confidence), where the streamer has it; transformers' `TextDiffusionStreamer` does
a block       put(block), as soon as nothing can change it; with several rows, which end at different lengths, all at the end
the end       put(the rest), end()

A streamer of many rows has `put_rows(answers so far, final tokens of each)` instead, which every step is told to; rows that it returns as
True, (B,) bool, are decoded no further.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from html import escape
from itertools import groupby
from typing import Any

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .. import UserError
from ..models.record import DiffusionRecord
from .config import DiffusionGenerationConfig


class Stream:
    """One call of `generate`, for prompts and their attention mask (B, P), as told to its streamer."""

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
        if settings.length_quantile is not None and settings.revises:  # each canvas counts its blocks anew
            self.block_length = settings.max_new_tokens
        lengths = attention_mask.sum(-1)
        self.offsets = (lengths - record.mode.block_start(lengths)).tolist()  # prompt tokens in blocks
        self.one_row, self.sent, self.by_row = len(prompts) == 1, 0, hasattr(streamer, "put_rows")
        self.drafts = hasattr(streamer, "put_draft")
        self.wants_confidence = self.drafts and "confidence" in inspect.signature(streamer.put_draft).parameters
        streamer.put(prompts.cpu())

    def step(self, canvas: torch.Tensor, confidence: torch.Tensor | None = None) -> torch.Tensor | None:
        """After every step: (B, L) canvas and, except from a verifying base, the probabilities of its tokens; (B,) bool, rows that may go."""
        answer = canvas[:, self.start :].clone().cpu()  # the canvas goes on changing; a streamer may keep what it got
        if self.by_row:
            gone = self.streamer.put_rows(answer, [self._final(*row) for row in zip(answer, self.offsets, strict=True)])
            return gone.to(canvas.device)
        if self.drafts:
            extra = {}
            if self.wants_confidence and confidence is not None:
                extra["confidence"] = confidence[:, self.start + self.sent :].clone().cpu()
            self.streamer.put_draft(value=answer[:, self.sent :], **extra)
        final = self._final(answer[0], self.offsets[0]) if self.one_row else 0
        if final > self.sent:
            self.streamer.put(answer[:, self.sent : final])
            self.sent = final

    def _final(self, answer: torch.Tensor, offset: int) -> int:
        """Tokens on the left that nothing can change any more: whole blocks, none of them the last one begun."""
        masked = answer == self.settings.mask_token_id
        if not bool(masked.any()):  # the rest comes at the end, cut behind the end token
            return len(answer) if self.by_row and not self.settings.revises else self.sent
        reached = int(masked.long().argmax())
        if self.settings.revises:  # a block is left when the next one is begun
            reached = min(reached, int((~masked).nonzero().amax())) if bool((~masked).any()) else 0
        return max((offset + reached) // self.block_length * self.block_length - offset, self.sent)

    def end(self, sequences: torch.Tensor) -> None:
        """The rest of the answers (B, P + n), as `generate` returns them."""
        self.streamer.put(sequences[:, self.start + self.sent :].cpu())
        self.streamer.end()


# (confidence from which it is used, colour in the terminal, colour in the file)
SHADES = (
    (0.95, "green", "#1b7f5c"),
    (0.8, "yellow", "#8a8a00"),
    (0.5, "dark_orange", "#d07b00"),
    (0, "red", "#c8324a"),
)
HIDDEN = "░"
Frame = list[tuple[int, float]]  # token id and its probability when committed, for every position of the answer
Cell = tuple[str, int | None]  # text and shade
HOLD = 8  # steps for which a picture holds its last frame


class Watch(BaseStreamer):
    """A streamer that shows one answer forming, every token in the colour of its confidence; `svg` draws it afterwards.

    Args:
        console: where to show it; None: nowhere.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, console: Console | None = None) -> None:
        self.tokenizer, self.mask_token_id = tokenizer, mask_token_id
        self.frames: list[Frame] = []
        self._final: Frame | None = None  # what nothing changes any more; None: the prompt was not put yet
        self._draft: Frame = []
        self._live = Live(console=console or Console(quiet=True), auto_refresh=False)

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then tokens that are final."""
        if self._final is None and len(value) > 1:
            raise UserError(f"`streamer`: one text can be watched at a time, got {len(value)}.")
        tokens = [] if self._final is None else value.flatten().tolist()
        sure = [probability for _, probability in self._draft[: len(tokens)]] or [1.0] * len(tokens)
        self._final = [*(self._final or []), *zip(tokens, sure, strict=True)]
        self._draft = self._draft[len(tokens) :]

    def put_draft(self, value: torch.Tensor, confidence: torch.Tensor | None = None) -> None:
        """What is not final, after every step; without `confidence` all that is written counts as sure."""
        sure = torch.ones(value.shape) if confidence is None else confidence
        self._draft = list(zip(value.flatten().tolist(), sure.flatten().tolist(), strict=True))
        self._show(self._final + self._draft)

    def end(self) -> None:
        self._show(self._final)
        self.stop()

    def stop(self) -> None:
        """Shows nothing further."""
        self._live.stop()

    def _show(self, frame: Frame) -> None:
        self.frames.append(frame)
        styles = [(text, "dim" if shade is None else SHADES[shade][1]) for text, shade in self.cells(frame)]
        self._live.start()
        self._live.update(Text.assemble(*styles), refresh=True)

    def cells(self, frame: Frame) -> list[Cell]:
        """Every token's text, none of special ones, and shade, none of masks."""
        cells = []
        for token, probability in frame:
            text = "" if token in self.tokenizer.all_special_ids else self.tokenizer.decode([token])
            # Some tokenizers drop the space before a token that stands alone.
            # Rows of the embedding behind the vocabulary are no token's.
            if (self.tokenizer.convert_ids_to_tokens(token) or "").startswith("▁") and not text.startswith(" "):
                text = " " + text
            shade = next(i for i, (least, _, _) in enumerate(SHADES) if probability >= least)
            cells.append((HIDDEN, None) if token == self.mask_token_id else (text, shade))
        return cells

    def svg(self, seconds_per_step: float = 0.25, columns: int = 80) -> str:
        """The frames as a self-contained animated SVG, which loops and holds its last frame for a while.

        Every token stands where the final text has it, in lines of at most `columns` characters.
        """
        frames, lines, column = [self.cells(frame) for frame in self.frames], [[]], 0
        for place, (text, _) in enumerate(frames[-1]):
            width = max(len(text.rstrip("\n")), 1)
            if column and column + width > columns:
                lines, column = [*lines, []], 0
            lines[-1].append((place, width))
            column += width
            if "\n" in text:
                lines, column = [*lines, []], 0
        steps = len(frames) + HOLD
        groups = []
        for number, frame in enumerate(frames):
            rows = (f'<text x="10" y="{24 + 22 * i}">{_spans(frame, line)}</text>' for i, line in enumerate(lines))
            delay = (number - steps) * seconds_per_step  # below 0: the loop has begun when the picture is opened
            groups.append(f'<g style="animation-delay:{delay:.2f}s">{"".join(rows)}</g>')
        width, height = round(20 + 8.43 * columns), 20 + 22 * len(lines)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"><style>'
            "text{font:14px monospace;white-space:pre;fill:#b9bec7}g:last-child{visibility:visible;animation-name:last}"
            f"g{{visibility:hidden;animation:frame {steps * seconds_per_step:.2f}s step-end infinite}}"
            + "".join(f".c{i}{{fill:{colour}}}" for i, (_, _, colour) in enumerate(SHADES))
            + f"@keyframes frame{{0%{{visibility:visible}}{100 / steps:.3f}%{{visibility:hidden}}}}"
            f"@keyframes last{{0%{{visibility:visible}}{100 * (1 + HOLD) / steps:.3f}%{{visibility:hidden}}}}"
            f'</style><rect width="100%" height="100%" rx="6" fill="#fbfbfa"/>{"".join(groups)}</svg>\n'
        )


def _spans(frame: list[Cell], line: list[tuple[int, int]]) -> str:
    """The cells of a line, each as wide as in the final text; neighbours of one shade together."""
    spans = []
    for shade, run in groupby(line, key=lambda cell: frame[cell[0]][1]):
        text = "".join(HIDDEN * n if shade is None else frame[place][0][:n].ljust(n) for place, n in run)
        # Control characters have no place in XML.
        text = escape("".join(c if c.isprintable() else " " for c in text))
        spans.append(text if shade is None else f'<tspan class="c{shade}">{text}</tspan>')
    return "".join(spans)


def generate_watched(inference: Any, prompts: Iterable[str], console: Console | None) -> Iterator[tuple[str, Watch]]:
    """Each prompt's answer by a `DiffusionInference`, when it has formed on the console, and what showed it."""
    for prompt in prompts:
        view = Watch(inference.tokenizer, inference.settings["mask_token_id"], console)
        try:
            yield inference.generate(prompt, streamer=view)[0], view
        finally:  # a text that was broken off gives the terminal its cursor back
            view.stop()
