"""Requests that come together, decoded together, each told of its own answer as blocks become final.

The event loop keeps the list of those that wait, and the model runs in a thread of its own: nothing is locked. A batch is the requests with the
settings of the one that came first; no row of a batch depends on the others.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from loguru import logger
from transformers.generation.streamers import BaseStreamer

from .. import UserError
from ..generation.inference import DiffusionInference


class Done(NamedTuple):
    finish_reason: str  # "stop" or "length"
    tokens: int  # through the end token, or the one that completes a stop word


@dataclass(eq=False)
class Job:
    """One request between the event loop, which takes what is in `out`, and the thread of the model, which fills it."""

    ids: list[int]
    settings: dict[str, Any]
    ends: set[int]
    stop: list[str]
    decode: Callable[[list[int]], str]
    loop: asyncio.AbstractEventLoop
    out: asyncio.Queue = field(default_factory=asyncio.Queue)  # of text, then `Done` or what went wrong
    over: bool = False  # it has its answer, or nobody waits for it
    known: int = 0  # tokens
    sent: int = 0  # letters

    def tell(self, item: str | Done | Exception) -> None:
        self.loop.call_soon_threadsafe(self.out.put_nowait, item)

    def _stopped(self, ids: list[int]) -> str | None:
        """The text before the first stop word; None: there is none."""
        text = self.decode(ids)
        found = [at for word in self.stop if (at := text.find(word)) >= 0]
        return text[: min(found)] if found else None

    def feed(self, ids: list[int], whole: bool) -> None:
        """All tokens so far that are final; `whole`: no more will come."""
        if self.over or (len(ids) == self.known and not whole):
            return
        self.known, end = len(ids), next((i + 1 for i, token in enumerate(ids) if token in self.ends), None)
        ids = ids[:end]
        text = self._stopped(ids) if self.stop else None
        reason = "length" if end is None and text is None else "stop"
        if text is not None:  # the first to be complete counts, wherever the answer was cut
            ids = ids[: bisect_left(range(len(ids)), True, key=lambda n: self._stopped(ids[:n]) is not None)]
            text = self._stopped(ids)
        else:
            text = self.decode(ids)
        if not (over := whole or reason == "stop"):  # half a character, and what may become a stop word, waits
            text = text.rstrip("\ufffd")
            text = text[: max(len(text) + 1 - max(map(len, self.stop), default=1), 0)]
        if len(text) > self.sent:
            self.tell(text[self.sent :])
            self.sent = len(text)
        if over:
            self.over = True  # never False: the event loop may have set it meanwhile
            self.tell(Done(reason, len(ids)))


class Batch(BaseStreamer):
    """Deals out what `generate` tells of its rows; those that are over leave. Equal prompts share one: two would be sampled differently."""

    def __init__(self, jobs: list[Job]) -> None:
        rows: dict[tuple[int, ...], list[Job]] = {}
        for job in jobs:
            rows.setdefault(tuple(job.ids), []).append(job)
        self.rows = list(rows.values())

    def put_rows(self, answers: torch.Tensor, final: list[int]) -> torch.Tensor:
        for jobs, answer, n in zip(self.rows, answers, final, strict=True):
            for job in jobs:
                job.feed(answer[:n].tolist(), n == len(answer))
        return torch.tensor([all(job.over for job in jobs) for jobs in self.rows])

    def put(self, value: torch.Tensor) -> None:
        """The prompts, and the answers, which are returned too."""

    def end(self) -> None: ...


class Engine:
    """What waits, and the thread that decodes it, `batch_size` requests at a time, first come first served."""

    def __init__(self, inference: DiffusionInference, batch_size: int) -> None:
        self.inference, self.batch_size = inference, batch_size
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.arrived, self.batches = asyncio.Event(), 0

    async def run(self) -> None:
        with ThreadPoolExecutor(1, "decoding") as thread:
            try:
                while await self.arrived.wait():
                    alike = [job for job in self.waiting if job.settings == self.waiting[0].settings]
                    self.running = alike[: self.batch_size]
                    self.waiting = [job for job in self.waiting if job not in self.running]
                    if self.running:
                        await asyncio.get_running_loop().run_in_executor(thread, self._decode, self.running)
                    elif not self.waiting:
                        self.arrived.clear()
            finally:  # the thread comes to its end with the next step
                for job in self.running:
                    job.over = True

    def _decode(self, jobs: list[Job]) -> None:
        self.batches += 1
        batch, again = Batch(jobs), []
        try:
            prompts = [row[0].ids for row in batch.rows]
            answers = self.inference.answer_ids(prompts, **jobs[0].settings, streamer=batch)
            batch.put_rows(answers, [answers.shape[1]] * len(answers))
        except Exception as error:
            logger.opt(exception=not isinstance(error, UserError)).error("{} requests failed: {}", len(jobs), error)
            # One of several rows may be at fault, or too many of them.
            again = [job for job in jobs if len(batch.rows) > 1 and not job.sent]
            for job in jobs:
                if job not in again:
                    job.tell(error)
        for job in again:  # here nothing holds the memory of the batch any more
            if not job.over:
                self._decode([job])

    async def answer(self, job: Job) -> AsyncIterator[str | Done]:
        """Pieces of text and `Done`. A job whose answer is not taken to its end is decoded no further.

        Raises:
            Exception: of decoding.
        """
        self.waiting.append(job)
        self.arrived.set()
        try:
            item: Any = ""
            while not isinstance(item, Done):
                item = await job.out.get()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            job.over, self.waiting = True, [other for other in self.waiting if other is not job]
