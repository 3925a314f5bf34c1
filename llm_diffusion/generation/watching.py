"""Shows a text as it forms, every token in the colour of how sure the model was of it: in the terminal, or as an animated SVG file.

`Watch` is a streamer for `generate`; it keeps all frames, from which `svg` draws. The file needs neither scripts nor fonts nor the
network, so that a README can show it.
Trade-off: tokens stand where the final text has them, whatever stood there before. Alternative: laying out every frame anew, in which
the eye finds nothing again.
"""

from __future__ import annotations

from collections import defaultdict
from html import escape

import torch
from rich.console import Console
from rich.live import Live
from rich.text import Text
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .. import UserError

# (probability from which it is used, colour in the terminal, colour in the file)
SHADES = (
    (0.95, "green", "#1b7f5c"),
    (0.8, "yellow", "#8a8a00"),
    (0.5, "dark_orange", "#d07b00"),
    (0.0, "red", "#c8324a"),
)
HIDDEN = "░"
Frame = list[tuple[int, float]]  # token id and its probability when committed, for every position of the answer


class Watch(BaseStreamer):
    """A streamer that shows one answer forming.

    Args:
        mask_token_id: shown as a shaded cell.
        console: where to show it; None shows nothing and keeps the frames only.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, console: Console | None = None) -> None:
        self.tokenizer, self.mask_token_id = tokenizer, mask_token_id
        self.frames: list[Frame] = []
        self._done: Frame = []  # what nothing changes any more
        self._draft: Frame = []
        self._prompt_seen = False
        self._live = None if console is None else Live(console=console, auto_refresh=False)

    def put(self, value: torch.Tensor) -> None:
        """The prompt first, then tokens that are final."""
        if not self._prompt_seen:
            if len(value) > 1:
                raise UserError(f"`streamer`: one text can be watched at a time, got {len(value)}.")
            self._prompt_seen = True
            if self._live is not None:
                self._live.start()
            return
        tokens = value.flatten().tolist()
        sure = [probability for _, probability in self._draft[: len(tokens)]] or [1.0] * len(tokens)
        self._done += zip(tokens, sure, strict=True)
        self._draft = self._draft[len(tokens) :]

    def put_draft(self, value: torch.Tensor, confidence: torch.Tensor | None = None) -> None:
        """What is not final, after every step; without `confidence` all that is written counts as sure."""
        sure = torch.ones(value.shape) if confidence is None else confidence
        self._draft = list(zip(value.flatten().tolist(), sure.flatten().tolist(), strict=True))
        self._show(self._done + self._draft)

    def end(self) -> None:
        self._show(self._done)
        if self._live is not None:
            self._live.stop()

    def _show(self, frame: Frame) -> None:
        self.frames.append(frame)
        if self._live is not None:
            self._live.update(shaded(self.tokenizer, frame, self.mask_token_id), refresh=True)

    def svg(self, seconds_per_step: float = 0.25, columns: int = 80) -> str:
        """The frames as an animated SVG."""
        return svg(self.tokenizer, self.frames, self.mask_token_id, seconds_per_step, columns)


def _text_of(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """One token's text, with the space before it that some tokenizers drop when it stands alone."""
    text = tokenizer.decode([token])
    spaced = tokenizer.convert_ids_to_tokens(token).startswith("▁")
    return " " + text if spaced and not text.startswith(" ") else text


def _shade(probability: float) -> int:
    return next(i for i, (least, _, _) in enumerate(SHADES) if probability >= least)


def shaded(tokenizer: PreTrainedTokenizerBase, frame: Frame, mask_token_id: int) -> Text:
    """A frame for the terminal; special tokens are not shown."""
    text = Text()
    for token, probability in frame:
        if token == mask_token_id:
            text.append(HIDDEN, style="dim")
        elif token not in tokenizer.all_special_ids:
            text.append(_text_of(tokenizer, token), style=SHADES[_shade(probability)][1])
    return text


def svg(
    tokenizer: PreTrainedTokenizerBase,
    frames: list[Frame],
    mask_token_id: int,
    seconds_per_step: float = 0.25,
    columns: int = 80,
) -> str:
    """Frames of one answer -> a self-contained animated SVG, which loops and holds its last frame for a while.

    Args:
        frames: of equal length, but for the last, which may be shorter: its tokens are laid out, the others are cut to it.
        columns: characters of a line.
    """
    final = frames[-1]
    width, height = 8.4, 22.0
    total = len(frames) + 8  # steps of a loop; the last ones show the whole text
    cells, n_lines = _layout([_text_of(tokenizer, token) for token, _ in final], columns)
    shown: dict[tuple[int, int], list[str]] = defaultdict(list)
    for place, (column, line, length) in enumerate(cells):
        x, y = 10 + column * width, 8 + (line + 1) * height
        for (token, probability), start, end in _runs([frame[place] for frame in frames]):
            end = total if end == len(frames) else end
            if token == mask_token_id:
                box = f'<rect x="{x + 1:.1f}" y="{y - 15:.1f}" width="{max(length, 1) * width - 2:.1f}" height="18" rx="3" class="m"/>'
                shown[start, end].append(box)
            elif token not in tokenizer.all_special_ids:
                text = _text_of(tokenizer, token)
                # Control characters have no place in XML.
                text = escape("".join(c if c.isprintable() else " " for c in text))
                shown[start, end].append(f'<text x="{x:.1f}" y="{y:.1f}" class="c{_shade(probability)}">{text}</text>')
    style = [f".c{i}{{fill:{colour}}}" for i, (_, _, colour) in enumerate(SHADES)]
    groups = []
    for number, ((start, end), elements) in enumerate(sorted(shown.items())):
        last = end == total
        marks = [(0, 0)] * (start > 0) + [(start, 1)] + [(end, 0)] * (not last)
        keys = "".join(f"{100 * at / total:.2f}%{{opacity:{opacity}}}" for at, opacity in marks)
        style.append(f"@keyframes k{number}{{{keys}}}")
        style.append(
            f".g{number}{{opacity:{int(last)};animation:k{number} {total * seconds_per_step:.2f}s step-end infinite}}"
        )
        groups.append(f'<g class="g{number}">{"".join(elements)}</g>')
    w, h = 20 + columns * width, 20 + n_lines * height
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h:.0f}" width="{w:.0f}" height="{h:.0f}">'
        f"<style>text{{font:14px monospace;white-space:pre}}.m{{fill:#d4d7dd}}{''.join(style)}</style>"
        f'<rect width="100%" height="100%" rx="6" fill="#fbfbfa"/>{"".join(groups)}</svg>\n'
    )


def _layout(texts: list[str], columns: int) -> tuple[list[tuple[int, int, int]], int]:
    """Column, line and length of every token, and the number of lines."""
    cells, column, line = [], 0, 0
    for text in texts:
        if column and column + len(text.rstrip("\n")) > columns:
            column, line = 0, line + 1
        cells.append((column, line, len(text.rstrip("\n"))))
        column += len(text)
        if "\n" in text:
            column, line = 0, line + text.count("\n")
    return cells, line + 1


def _runs(states: list[tuple[int, float]]) -> list[tuple[tuple[int, float], int, int]]:
    """What a position held, from which frame and up to which."""
    runs: list[tuple[tuple[int, float], int, int]] = []
    for at, state in enumerate(states):
        if runs and runs[-1][0][0] == state[0]:
            runs[-1] = (runs[-1][0], runs[-1][1], at + 1)
        else:
            runs.append((state, at, at + 1))
    return runs
