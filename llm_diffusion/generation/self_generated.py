"""Self-generated data for a drafter: prompts that an instruct model writes itself, and the base's greedy answers to any prompts.

A drafter has to predict the base's own words, so it trains on nothing else. An instruct model writes a user's turn when it is given the
chat template up to there (Magpie, arXiv 2406.08464). Answers are those of the base, adapters off; they stay token ids, because text
that is tokenised again may come apart otherwise. What was generated is kept in a file, and not generated again for the same weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..data.rows import CONVERSATIONS, Place, form_of, prompt_and_answer, source_row
from ..models.conversion import fingerprint
from ..models.files import write_text
from ..models.patching import base_of
from ..models.special_tokens import end_token_ids, prompt_ids
from ..objective.modes import IGNORE_INDEX
from .generate import generate_autoregressive

logger = logging.getLogger(__name__)

BATCH_SIZE = 64
MIN_PROMPT_TOKENS = 3  # of the user's words
PLACEHOLDER = "\u241f"  # stands for the user's words in a template


class GenerationCache:
    """Token ids by what they were generated from, in a file of JSON lines that grows; without a path, in memory."""

    def __init__(self, model: torch.nn.Module, path: Path | None = None) -> None:
        self.path, self.weights, self.ids = path, fingerprint(base_of(model)), {}
        if path is not None:
            for line in path.read_text().splitlines() if path.exists() else ():
                try:
                    key, ids = json.loads(line)
                except ValueError:  # the run was killed while it wrote this line
                    continue
                self.ids[key] = ids
            write_text(path, "".join(map(_as_line, self.ids.items())))

    def key(self, *source: Any) -> str:
        """What is generated from `source` by these weights is stored under."""
        return hashlib.sha256(json.dumps([self.weights, *source]).encode()).hexdigest()

    def add(self, new: dict[str, list]) -> None:
        self.ids |= new
        if self.path is not None:
            with self.path.open("a") as file:
                file.writelines(map(_as_line, new.items()))


def _as_line(pair: tuple[str, list]) -> str:
    return json.dumps(pair) + "\n"


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before the user's words, and behind them up to where the assistant begins.

    Raises:
        UserError: there is no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "`dataset`='self' needs a chat template, after which the model writes; this tokenizer has none."
        )
    chat = [{"role": "user", "content": PLACEHOLDER}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    before, _, behind = text.partition(PLACEHOLDER)
    return before, behind


def generate_prompts(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    n: int,
    *,
    seed: int = 0,
    max_new_tokens: int = 96,
    cache: Path | None = None,
) -> list[list[int]]:
    """`n` prompts, all different, as token ids up to where the assistant begins; sampled at temperature 1, the same for a seed.

    Args:
        cache: see `GenerationCache`.

    Raises:
        UserError: no chat template, or a model that does not write that many different prompts.
    """
    ends, (before, behind) = set(end_token_ids(model, tokenizer)), user_turn(tokenizer)
    start = tokenizer(before, add_special_tokens=False, return_tensors="pt").input_ids.to(base_of(model).device)
    kept, found, rounds = GenerationCache(model, cache), {}, 10 + 4 * n // BATCH_SIZE
    with tqdm(total=n, desc="prompts of the model itself", unit="prompt") as bar:
        for attempt in range(rounds):
            key = kept.key("prompts", start.tolist(), max_new_tokens, seed, attempt)
            if key not in kept.ids:
                kept.add({key: _sampled(model, start, max_new_tokens, int(key[:12], 16))})
            for ids in kept.ids[key]:
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                if not ends.isdisjoint(ids[MIN_PROMPT_TOKENS:]) and text and len(found) < n:
                    found.setdefault(
                        text.casefold(), tokenizer(before + text + behind, add_special_tokens=False).input_ids
                    )
            bar.update(len(found) - bar.n)
            if len(found) == n:
                return list(found.values())
    raise UserError(
        f"`dataset`='self': {len(found)} of {n} different prompts in {rounds} rounds; is the model an instruct model? Lower "
        "`max_examples`, or give prompts of your own and set `answers_from_base`."
    )


def _sampled(model: torch.nn.Module, start: torch.Tensor, max_new_tokens: int, seed: int) -> list[list[int]]:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        rows = start.expand(BATCH_SIZE, -1)
        options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": True,
            "top_k": 0,
            "attention_mask": rows.new_ones(rows.shape),
        }
        return generate_autoregressive(model, rows, **options)[:, start.shape[1] :].tolist()


def generate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    *,
    max_new_tokens: int = 128,
    cache: Path | None = None,
) -> Dataset:
    """The base's greedy answers: rows of `input_ids` and `labels` (-100 on the prompt), in the order of the prompts.

    An answer that is cut off has no end token, so it teaches no false end.

    Args:
        prompts: token ids, as `special_tokens.prompt_ids` makes them.
        cache: see `GenerationCache`.
    """
    kept = GenerationCache(model, cache)
    keys = [kept.key("answer", max_new_tokens, prompt) for prompt in prompts]
    # Of prompts alike in length little is padding.
    left = sorted((n for n in range(len(prompts)) if keys[n] not in kept.ids), key=lambda n: len(prompts[n]))
    with tqdm(total=len(prompts), initial=len(prompts) - len(left), desc="answers of the base", unit="answer") as bar:
        for first in range(0, len(left), BATCH_SIZE):
            batch = left[first : first + BATCH_SIZE]
            made = _greedy(model, tokenizer, [prompts[n] for n in batch], max_new_tokens)
            kept.add({keys[n]: ids for n, ids in zip(batch, made, strict=True)})
            bar.update(len(batch))
    answers = [kept.ids[key] for key in keys]
    return Dataset.from_list(
        [
            {"input_ids": prompt + answer, "labels": [IGNORE_INDEX] * len(prompt) + answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
    )


def _greedy(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    """Every answer through its first end token."""
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(base_of(model).device)
    ends = end_token_ids(model, tokenizer)
    stops = {"eos_token_id": ends} if ends else {}
    ids = generate_autoregressive(model, **inputs, max_new_tokens=max_new_tokens, do_sample=False, **stops)
    answers = ids[:, inputs["input_ids"].shape[1] :].tolist()
    lengths = [next((i for i, token in enumerate(row, start=1) if token in ends), len(row)) for row in answers]
    return [row[:length] for row, length in zip(answers, lengths, strict=True)]


def answered_by_base(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    max_new_tokens: int = 128,
    cache: Path | None = None,
) -> Dataset:
    """Prompts of chats, or of prompts with completions, with the AR base's own answers: rows as of `generate_answers`.

    Raises:
        UserError: other columns, or no answer that comes to its end.
    """
    prompts = []
    for row, example in enumerate(map(source_row, dataset)):
        if form_of(example) not in (*CONVERSATIONS, "completion"):
            found = f"row {row} has the columns {sorted(example)}"
            raise UserError(f"`answers_from_base` needs chats or prompts with completions; {found}.")
        prompt, _, template = prompt_and_answer(example, Place("dataset", row))
        prompts.append(prompt_ids(tokenizer, prompt, **template))
    rows = generate_answers(model, tokenizer, prompts, max_new_tokens=max_new_tokens, cache=cache)
    ends, whole = end_token_ids(model, tokenizer), []
    for prompt, row in zip(prompts, rows, strict=True):
        answer = row["input_ids"][len(prompt) :]
        if answer[-1] in ends and tokenizer.decode(answer, skip_special_tokens=True).strip():
            whole.append(row)
    unfinished = f"{len(rows) - len(whole)} of {len(rows)} answers are empty or not over after {max_new_tokens} tokens"
    if not whole:
        raise UserError(f"`answers_from_base`: {unfinished}; raise `generation.max_new_tokens`.")
    if len(whole) < len(rows):
        logger.warning("%s and are dropped", unfinished)
    return Dataset.from_list(whole)
