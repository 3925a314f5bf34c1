"""A model's own answers to problems, labelled by checking them: natural wrong answers for preference pairs.

Trade-off: the errors are those that the model makes, and rare once it is good. Alternative: injected errors (`pairs`), named
and as many as wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..reasoning.preference_files import labelled_answer
from ..reasoning.problems import Problem, is_right
from .answers import evaluate_answers


def sample_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    problems: Sequence[Problem],
    n: int = 4,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    **settings: Any,
) -> list[dict]:
    """`n` answers to every problem, labelled.

    Args:
        progress: wraps the rounds, one answer to every problem each (a progress bar).
        settings: decoding settings; the temperature is 0.7 unless given, and round i draws with the seed `seed` + i.

    Returns:
        rows of `labelled_answer`, the answers to one problem together.

    Raises:
        ValueError: n below 1, no problem, or a temperature of 0 with more than one answer.
    """
    settings = {"temperature": 0.7, **settings}
    if n < 1:
        raise UserError(f"`samples` must be at least 1, got {n}.")
    if not problems:
        raise UserError("`problems` is empty; at least one is needed.")
    if n > 1 and settings["temperature"] == 0:
        raise UserError("`temperature` 0 gives one and the same answer; raise it, or set `samples` to 1.")
    examples = [problem.example() for problem in problems]
    rounds = [
        evaluate_answers(model, tokenizer, examples, **{**settings, "seed": seed + i}).answers
        for i in progress(range(n))
    ]
    return [
        labelled_answer(problem, answer, is_right(problem, answer))
        for problem, answers in zip(problems, zip(*rounds, strict=True), strict=True)
        for answer in answers
    ]
