"""A page to play with a converted model: an answer forms pass by pass, coloured by confidence, or by the pass that brought a token."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from functools import partial
from html import escape
from queue import SimpleQueue
from threading import Thread
from typing import Any

import gradio
import torch
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..generation.inference import DiffusionInference
from ..generation.streaming import HIDDEN, SHADES, Cell, Frame, Watch
from ..models.record import record_of

GAP = re.compile(r"_{2,}|\[(?:…|\.\.\.)\]")
PASSES = ("#1b7f5c", "#2563a8", "#8a6d00")  # of the first pass, the second, the third, the fourth again
GIVEN, MASKED = "#444a54", "#b9bec7"
PAPER = (
    "background:#fbfbfa;color:#444a54;border-radius:4px;padding:10px 12px;margin:-10px -12px"  # in a dark browser too
)


class Pages(Watch):
    """Shows every frame as HTML, instead of in a terminal."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, mask_token_id: int, by_pass: bool, show: Callable[[str], None]
    ) -> None:
        super().__init__(tokenizer, mask_token_id)
        self.by_pass, self.show, self.born = by_pass, show, {}

    def _show(self, frame: Frame) -> None:
        self.frames.append(frame)
        for place, (token, _) in enumerate(frame):
            if token != self.mask_token_id:
                self.born.setdefault(place, len(self.frames) - 1)
        self.show(self.page(frame))

    def filled(self, canvas: torch.Tensor, confidence: torch.Tensor) -> None:
        """A step of `fill_masks`: text that was given has no confidence."""
        self._show(list(zip(canvas[0].tolist(), confidence[0].tolist(), strict=True)))

    def page(self, frame: Frame, text: str | None = None) -> str:
        """A frame; `text`: what it says as a whole, where its tokens one by one are not the letters of it."""
        cells = self.cells(frame)
        if text is not None and "".join(words for words, _ in cells) != text:
            cells = [(text, None)]
        spans = (_span(cell, self._colour(place, *cell, frame)) for place, cell in enumerate(cells))
        return _paper("".join(spans))

    def _colour(self, place: int, text: str, shade: int | None, frame: Frame) -> str:
        if shade is None:
            return MASKED if text == HIDDEN else GIVEN
        if self.by_pass:
            return PASSES[self.born[place] % len(PASSES)]
        return SHADES[shade][2] if frame[place][1] else GIVEN


def _span(cell: Cell, colour: str) -> str:
    return f'<span style="color:{colour}">{escape(cell[0])}</span>'


def _paper(html: str) -> str:
    return f'<div style="{PAPER};min-height:4em;white-space:pre-wrap;font:15px/1.6 monospace">{html}</div>'


def _legend(drafts: bool) -> str:
    title = "Confidence of a token when it was written:"
    entries = [(f"{least:g} and above" if least else "below", colour) for least, _, colour in SHADES]
    if drafts:
        title = "Forward pass that brought a token:"
        entries = zip(("1, 4, …", "2, 5, …", "3, 6, …"), PASSES, strict=True)
    spans = (_span((f"■ {words}", None), colour) for words, colour in entries)
    return f'<div style="{PAPER}">{title} {" &ensp; ".join(spans)}</div>'


class PageClosed(Exception):
    """Nobody looks any more."""


def play(
    inference: DiffusionInference,
    text: str,
    max_new_tokens: int = 64,
    steps: int = 0,
    threshold: float = 0.9,
    block_length: int = 16,
) -> Iterator[str]:
    """HTML of every pass, the last of the answer. Decoding stops when the iterator is closed.

    Args:
        text: a question; with gaps, a text to fill them in.
        steps: passes over the whole canvas; 0: by `threshold` instead.
        block_length: 0: none. What a model has no use for is left out.
    """
    if not text.strip():
        raise UserError("`text` is empty; write a question, or a text with a gap.")
    pages: SimpleQueue[str | Exception | None] = SimpleQueue()
    left = False

    def show(page: str) -> None:
        if left:
            raise PageClosed
        pages.put(page)

    def work() -> None:
        try:
            pages.put(_decode(inference, text, settings, show))
            pages.put(None)
        except Exception as error:  # raised where the pages are read
            pages.put(error)

    mode = record_of(inference.model).mode
    rule = {"steps": int(steps)} if steps else {"threshold": threshold}
    blocks = {"block_length": int(block_length), "grow_canvas": True} if block_length else {"block_length": None}
    settings = {"max_new_tokens": int(max_new_tokens), **({} if mode.drafts else rule)}
    settings |= {} if mode.has_blocks else blocks
    worker = Thread(target=work, daemon=True)
    worker.start()
    try:
        while (page := pages.get()) is not None:
            if isinstance(page, Exception):
                raise page
            yield page
    finally:
        left = True
        worker.join()  # one run at a time on a model


def _decode(inference: DiffusionInference, text: str, settings: dict[str, Any], show: Callable[[str], None]) -> str:
    tokenizer = inference.tokenizer
    view = Pages(tokenizer, inference.settings["mask_token_id"], record_of(inference.model).mode.drafts, show)
    if GAP.search(text):
        filled = inference.infill_ids(GAP.split(text), on_step=view.filled, **settings)
        return view.page(view.frames[-1], tokenizer.decode(filled, skip_special_tokens=True))
    if tokenizer.chat_template:
        answer = inference.chat([{"role": "user", "content": text}], streamer=view, **settings)
    else:
        (answer,) = inference.generate(text, streamer=view, **settings)
    return view.page(view.frames[-1], answer)


def build_demo(inference: DiffusionInference, name: str) -> gradio.Blocks:
    """The page; on a machine without a network too."""
    record = record_of(inference.model)
    drafts, has_blocks = record.mode.drafts, record.mode.has_blocks
    hint = "Ask a question"
    if not has_blocks:
        hint += ", or write a text in which `____` or `[…]` stands for what is to be filled in"
    slider = partial(gradio.Slider, step=1, min_width=320)  # two in a row

    def show(*given: Any) -> Iterator[str]:
        try:
            yield from play(inference, *given)
        except UserError as error:
            raise gradio.Error(escape(str(error))) from error

    with gradio.Blocks(title=f"llm-diffusion: {name}", analytics_enabled=False) as page:
        gradio.Markdown(f"### {escape(name)}, `attention`={record.attention}\n\n{hint}.")
        text = gradio.Textbox("Sort the letters: k d e a", label="text", lines=2, elem_id="text")
        with gradio.Row():
            longest = slider(1, 512, 64, label="longest answer, tokens")
            steps = slider(0, 512, 0, label="passes; 0: by threshold", visible=not drafts)
            threshold = slider(0.05, 1, 0.9, label="threshold", step=0.01, visible=not drafts)
            blocks = slider(0, 128, 16, label="block length; 0: none", visible=not has_blocks)
        button = gradio.Button("Answer", variant="primary", elem_id="go")
        answer = gradio.HTML(_paper(""), elem_id="answer")
        gradio.HTML(_legend(drafts))
        gradio.on([button.click, text.submit], show, [text, longest, steps, threshold, blocks], answer)
    return page


def launch(page: gradio.Blocks, host: str, port: int) -> None:
    """Shows the page until the process is told to stop; port 0: at a free one, which is printed."""
    if not port:  # gradio would take it literally
        with socket.create_server(("", 0)) as free:
            port = free.getsockname()[1]
    page.queue(default_concurrency_limit=1).launch(server_name=host, server_port=port, share=False)
