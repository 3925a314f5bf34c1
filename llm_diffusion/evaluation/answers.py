"""Answers of a model, measured: exact match, tokens per forward, seconds; sampled and labelled; under swept decoding settings.

Exact match is the same text as the one reference, blanks around it ignored; what is right by other rules is counted in `statistics`.
"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from rich.progress import track
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from .. import UserError
from ..data.rows import Place, form_of, prompt_and_answer, read_row
from ..generation.config import check_one_answer
from ..generation.generate import generate, generate_autoregressive
from ..generation.inference import DiffusionInference
from ..models.patching import base_of
from ..models.record import layered, record_of
from ..models.special_tokens import end_token_ids, prompt_ids
from ..reasoning.pairs import LLMJudge, labelled_answer, pairs_of, write_rows
from ..reasoning.problems import Problem, is_right, load_records, read_problem

logger = logging.getLogger(__name__)

BATCH_SIZE = 50
LATENCY_PROMPTS = 4
THRESHOLDS = (0.5, 0.7, 0.8, 0.9, 0.95, 0.99)
SIDES = ("messages", "prompt", "completion")  # what reading a row may change


# -- a model over many items


def in_batches(items: Iterable, size: int) -> Iterator[list]:
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def place() -> tuple[int, int]:
    """Number of this process, and how many `accelerate launch` or torchrun started."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1  # without a state, which would fix the device of every trainer made later
    state = PartialState(cpu=not torch.accelerator.is_available())  # what a trainer has made before wins
    return state.process_index, state.num_processes


def over_processes(work: Callable[[list], list], items: Sequence, split: bool = True) -> list:
    """`work(items)`, one result an item; with `split` every process works on its part and gets all results.

    All processes must call this together, and each needs all weights.
    """
    if not split or place()[1] == 1:
        return work(list(items))
    with PartialState().split_between_processes(list(items)) as mine:
        return gather_object(work(mine) if mine else [])


# -- prompts


def prompt_and_reference(example: dict, row: int | None = None) -> tuple[str | list[dict], str]:
    """The prompt (messages or text) and the reference answer of an example of any trainable shape; `row`: its number, for errors."""
    prompt, answer, _ = prompt_and_answer(example, Place("examples", row))
    return prompt, answer if isinstance(answer, str) else answer[-1]["content"]


def question_of(example: dict) -> str:
    """The text of the prompt, of a conversation its last message."""
    prompt = prompt_and_reference(example)[0]
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def as_problem(record: dict) -> Problem:
    """A record of any form that `problems` reads, or an example of any trainable shape."""
    if set(record) >= {"text"} and "options" not in record:
        prompt, reference = prompt_and_reference(record)
        return Problem(({"role": "user", "content": prompt},), reference, "plain", reference, kind="all")
    return read_problem(as_example(record) if _is_trainable(record) else record)


def _is_trainable(record: dict) -> bool:
    form = form_of(name for name, value in record.items() if value is not None)
    return form not in (None, "input_ids") and "options" not in record


def as_example(record: dict, row: int | None = None) -> dict:
    """A trainable shape of a record; those that have one stay as they are, but for conversations in ShareGPT's keys or in parts."""
    if not _is_trainable(record):
        return as_problem(record).example()
    form = form_of(name for name, value in record.items() if value is not None)
    read = read_row(record, form, Place("examples", row))
    changed = {name: value for name, value in read.items() if name in SIDES and value != record.get(name)}
    return record | changed if changed else record


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict] | dict]
) -> dict[str, torch.Tensor]:
    """Left-padded batch of prompts: text, conversations, or examples, which bring the tools that their template reads."""
    return tokenizer.pad(
        {"input_ids": [_prompt_ids(tokenizer, prompt) for prompt in prompts]}, padding_side="left", return_tensors="pt"
    )


def _prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str | list[dict] | dict) -> list[int]:
    template: dict[str, Any] = {}
    if isinstance(prompt, dict):
        prompt, _, template = prompt_and_answer(prompt, Place("examples"))
    return prompt_ids(tokenizer, prompt, **template)


# -- answers


@dataclass
class AnswerReport:
    """Answers of one model to a list of examples."""

    answers: list[str] = field(default_factory=list)  # in the order of the examples
    exact_match: dict[str, float] = field(default_factory=dict)  # percent by kind of task
    tokens_per_forward: float = 0.0  # answer tokens, end token included, over forward passes, mean over examples
    ended: list[bool] = field(default_factory=list)  # whether each answer came to its end token
    accepted: dict[int, int] = field(default_factory=dict)  # of lossless decoding, verifications by how many tokens
    seconds: float = 0.0  # for all examples
    tokens: list[int] = field(default_factory=list)  # of every answer, its end token included

    @property
    def mean(self) -> float:
        """Mean exact match over the kinds, percent."""
        return fmean(self.exact_match.values())

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / self.seconds


def evaluate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    *,
    autoregressive: bool = False,
    split: bool = False,
    **settings: Any,
) -> AnswerReport:
    """Answers the prompts of `examples` and compares with their references, blanks around them ignored.

    Args:
        examples: dicts of a trainable shape, with an optional `kind`.
        autoregressive: decode greedily as the AR base (adapter off, causal) instead of by unmasking.
        split: between all processes, each of which must call this and gets the whole report.
    """

    check_one_answer(settings)
    if not examples:
        raise UserError("`examples` are empty: there is nothing to answer.")
    started = time.perf_counter()
    rows = over_processes(lambda mine: _answered(model, tokenizer, mine, autoregressive, settings), examples, split)
    seconds = time.perf_counter() - started
    texts, tokens, ended, rates, accepted = zip(*rows, strict=True)
    right = defaultdict(list)
    for example, text in zip(examples, texts, strict=True):
        right[example.get("kind", "all")].append(text.strip() == prompt_and_reference(example)[1].strip())
    return AnswerReport(
        answers=list(texts),
        exact_match={kind: 100 * fmean(hits) for kind, hits in right.items()},
        tokens_per_forward=fmean(rates),
        ended=list(ended),
        accepted=dict(sorted(Counter(itertools.chain(*accepted)).items())),
        seconds=seconds,
        tokens=list(tokens),
    )


def _answered(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    autoregressive: bool,
    settings: dict[str, Any],
) -> list[tuple]:
    """Of every answer its text, how many tokens it has through its end, whether it ended, its tokens per forward, what verifications yielded."""
    ends, rows = end_token_ids(model, tokenizer), []
    stops = {"eos_token_id": ends} if ends else {}
    for batch in in_batches(examples, BATCH_SIZE):
        inputs = encode_prompts(tokenizer, batch).to(base_of(model).device)
        rates, accepted = [1.0] * len(batch), [[]] * len(batch)  # one token a forward
        if autoregressive:
            limit = settings.get("max_new_tokens", 128)
            ids = generate_autoregressive(model, **inputs, max_new_tokens=limit, do_sample=False, **stops)
        else:
            output = generate(model, **inputs, **{**stops, **settings, "return_dict_in_generate": True})
            ids, rates = output.sequences, output.tokens_per_forward.tolist()
            if output.accepted is not None:
                accepted = [row[row > 0].tolist() for row in output.accepted]
        written = ids[:, inputs["input_ids"].shape[1] :]
        is_end = torch.isin(written, written.new_tensor(ends)).long()
        lengths = (is_end.cumsum(-1) - is_end == 0).sum(-1).tolist()
        texts = tokenizer.batch_decode(written, skip_special_tokens=True)
        rows += zip(texts, lengths, is_end.any(-1).tolist(), rates, accepted, strict=True)
    return rows


def sample_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    n: int = 4,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    judge: Callable[[str, str, str], dict] | None = None,
    **settings: Any,
) -> list[dict]:
    """`n` answers to every problem, each labelled by checking it: natural wrong answers for preference pairs.

    Round i, one answer to every problem, draws with the seed `seed` + i, at temperature 0.7 unless `settings` have it.

    Args:
        progress: wraps the rounds and what the judge reads (a progress bar).
        judge: labels instead, of a question, an answer and its reference; see `LLMJudge`.

    Returns:
        rows of `labelled_answer`, the answers to one problem together.
    """
    settings = {"temperature": 0.7, **settings}
    if n < 1:
        raise UserError(f"`samples` must be at least 1, got {n}.")
    if not problems:
        raise UserError("`problems` is empty; at least one is needed.")
    if n > 1 and settings["temperature"] == 0:
        raise UserError("`temperature` 0 gives one and the same answer; raise it, or set `samples` to 1.")
    examples, rounds = [problem.example() for problem in problems], []
    for i in progress(range(n)):
        rounds.append(evaluate_answers(model, tokenizer, examples, **{**settings, "seed": seed + i}).answers)
    pairs = [(problem, texts[i]) for i, problem in enumerate(problems) for texts in rounds]
    rows = [labelled_answer(problem, answer, is_right(problem, answer)) for problem, answer in pairs]
    for row in progress(rows) if judge else ():
        row |= judge(row["prompt"][-1]["content"], row["answer"], row["reference"])
    return rows


def prefer(
    source: str,
    output: str,
    settings: dict[str, Any],
    *,
    kinds: str | None = None,
    seed: int = 0,
    limit: int | None = None,
    from_model: str | None = None,
    samples: int = 4,
    answers: bool = False,
    judge: str | None = None,
    judge_model: str | None = None,
) -> Iterator[str]:
    """Writes preference pairs as JSONL, as the options of `llm-diffusion prefer` say; yields what there is to tell, in lines.

    Args:
        settings: of decoding, with `from_model`.

    Raises:
        UserError: options that contradict each other, or a source that cannot be read.
    """
    target = Path(output)
    if target.exists() and Path(source).exists() and target.samefile(source):
        raise UserError(f"`--output`: {output!r} is the source, which would be lost; choose another file.")
    of_a_model = {"--answers": answers, "--judge": judge, "--judge-model": judge_model, "--settings": settings}
    if from_model is None and (given := [option for option, value in of_a_model.items() if value]):
        raise UserError(f"`{given[0]}` is of a model's answers; name the model with `--from-model`.")
    if from_model is not None and kinds is not None:
        raise UserError("`--kinds` chooses errors that are injected; leave it out with `--from-model`.")
    if judge_model and not judge:
        raise UserError("`--judge-model` is a model at `--judge`; name its URL too.")
    label = LLMJudge(judge, judge_model or "") if judge else None
    records = load_records(source, limit, seed=seed)
    if from_model is not None:
        inference = DiffusionInference.from_pretrained(from_model, **settings)
        bar = partial(track, transient=True, disable=not sys.stderr.isatty())  # nothing in a log
        drawn = [read_problem(record) for record in records], samples, seed, bar, label
        records = sample_answers(inference.model, inference.tokenizer, *drawn, **inference.settings)
        yield f"{sum(row['right'] for row in records)} of {len(records)} answers are right"
    rows = records if answers else pairs_of(records, seed, None if kinds is None else kinds.split(","))
    write_rows(output, rows)
    for kind, count in Counter(row["kind"] for row in ([] if answers else rows)).most_common():
        yield f"{count:6d}  {kind}"


# -- speed and quality


@dataclass
class Point:
    """Speed and quality of one setting of the decoding."""

    label: str
    settings: dict[str, Any] | None  # None: the AR model's greedy decoding
    exact_match: float  # percent, mean over the kinds of tasks
    tokens_per_second: float  # in one batch, end tokens included
    tokens_per_forward: float  # mean over the answers
    first_token: float  # seconds from the call until the first token of an answer is known, median of single prompts
    last_token: float  # … until the answer is
    memory: int | None = None  # peak of the batch in bytes, where the device counts it (CUDA)
    on_frontier: bool = False  # no other point is both faster and better


class _Clock(BaseStreamer):
    """Notes when the first token of the one answer is known."""

    def __init__(self, mask_token_id: int) -> None:
        self.mask, self.first, self.prompt_seen = mask_token_id, None, False
        self.started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        if self.prompt_seen and value.numel():
            self.end()
        self.prompt_seen = True

    def put_draft(self, value: torch.Tensor) -> None:
        if int(value[0, 0]) != self.mask:
            self.end()

    def end(self) -> None:
        self.first = self.first or time.perf_counter() - self.started


def grid(axes: dict[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """All combinations: `{"threshold": [0.5, 0.9], "block_length": [8]}` -> two settings."""
    for name, values in axes.items():
        if not isinstance(values, list | tuple) or not values:
            raise UserError(f"`sweep.{name}` must be a list of values, got {values!r}.")
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def default_grid(model: torch.nn.Module) -> list[dict[str, Any]]:
    """Thresholds; of a drafter, whose answers do not depend on them, one point."""
    return [{}] if record_of(model).mode.drafts else grid({"threshold": THRESHOLDS})


def sweep(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    settings: dict[str, Any],
    points: Sequence[dict[str, Any]],
    base: tuple[torch.nn.Module, PreTrainedTokenizerBase] | None = None,
) -> list[Point]:
    """The AR decoding of the same weights or of `base`, then every point of a grid over common `settings`.

    Each answers all prompts in one batch (tokens a second), then the first few one by one (latency).
    """
    longest, cuda = settings.get("max_new_tokens", 128), base_of(model).device.type == "cuda"

    def measure(label: str, chosen: dict[str, Any] | None, model: torch.nn.Module, tokenizer: Any) -> Point:
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        given = {"autoregressive": True, "max_new_tokens": longest} if chosen is None else chosen
        report = evaluate_answers(model, tokenizer, examples, **given)
        memory, times = torch.cuda.max_memory_allocated() if cuda else None, []
        for example in examples[:LATENCY_PROMPTS]:
            batch = encode_prompts(tokenizer, [example]).to(base_of(model).device)
            clock = _Clock(tokenizer.mask_token_id)
            if chosen is None:
                generate_autoregressive(model, **batch, max_new_tokens=longest, do_sample=False, streamer=clock)
            else:
                generate(model, **batch, **chosen, streamer=clock)
            times.append((clock.first, time.perf_counter() - clock.started))
        speeds = report.tokens_per_second, report.tokens_per_forward
        return Point(label, chosen, report.mean, *speeds, *map(median, zip(*times, strict=True)), memory)

    evaluate_answers(model, tokenizer, examples[:1], **layered(settings, points[0]))  # warms up
    found = [measure("autoregressive", None, *(base or (model, tokenizer)))]
    for point in points:
        label = ", ".join(f"{name} {value}" for name, value in point.items()) or "as set"
        found.append(measure(label, layered(settings, point), model, tokenizer))
    places = [(point.exact_match, point.tokens_per_second) for point in found]
    for point, mine in zip(found, places, strict=True):
        point.on_frontier = not any(o != mine and o[0] >= mine[0] and o[1] >= mine[1] for o in places)
    return found
