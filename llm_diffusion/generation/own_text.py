"""What a model writes itself, for a drafter to learn from: prompts of its own, and greedy answers to any prompts.

A drafter has to foresee the base's own words, so it trains on nothing else. An instruct model writes a user's turn when it is given the
chat template up to there (Magpie, arXiv 2406.08464). Answers are those of the base, adapters off; they stay token ids, because text
that is tokenised again may come apart otherwise.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..models.patching import base_of
from ..models.special_tokens import end_token_ids
from ..objective.modes import IGNORE_INDEX
from .generate import generate_autoregressive

BATCH_SIZE = 64
SHORTEST_PROMPT = 3  # tokens of the user's words
MARK = "\u241f"  # stands for the user's words in a template


def user_turn(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What the chat template writes before the user's words, and behind them up to where the assistant begins.

    Raises:
        UserError: there is no chat template.
    """
    if tokenizer.chat_template is None:
        raise UserError(
            "`dataset`='self' needs a chat template, after which the model writes; this tokenizer has none."
        )
    chat = [{"role": "user", "content": MARK}]
    before, _, behind = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True).partition(MARK)
    return before, behind


def write_prompts(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, n: int, *, seed: int = 0, max_new_tokens: int = 96
) -> list[list[int]]:
    """`n` prompts, all different, as token ids up to where the assistant begins; sampled at temperature 1, the same for a seed.

    Raises:
        UserError: no chat template, or a model that does not write that many different prompts.
    """
    ends, (before, behind) = set(end_token_ids(model, tokenizer)), user_turn(tokenizer)
    start = tokenizer(before, add_special_tokens=False, return_tensors="pt").input_ids.to(base_of(model).device)
    found: dict[str, list[int]] = {}
    rounds = 10 + 4 * n // BATCH_SIZE
    with tqdm(total=n, desc="own prompts", unit="prompt") as bar:
        for attempt in range(rounds):
            with torch.random.fork_rng():
                torch.manual_seed(seed * rounds + attempt)
                written = generate_autoregressive(
                    model, start.expand(BATCH_SIZE, -1), max_new_tokens=max_new_tokens, do_sample=True, top_k=0
                )[:, start.shape[1] :]
            for ids in written.tolist():
                text = tokenizer.decode(ids, skip_special_tokens=True).strip()
                if not ends.isdisjoint(ids[SHORTEST_PROMPT:]) and text and len(found) < n:
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


def write_answers(
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
        prompts: token ids, as `apply_chat_template` makes them.
        cache: JSON lines, written after every batch; what is there is not generated again.
    """
    answers = {} if cache is None else read_answers(cache)
    if cache is not None:
        cache.parent.mkdir(parents=True, exist_ok=True)
        cache.write_text("".join(json.dumps(pair) + "\n" for pair in answers.items()))  # without a torn last line
    key = {number: json.dumps([max_new_tokens, *prompt]) for number, prompt in enumerate(prompts)}
    left = sorted((n for n in key if key[n] not in answers), key=lambda n: len(prompts[n]))
    with tqdm(total=len(prompts), initial=len(prompts) - len(left), desc="own answers", unit="answer") as bar:
        for first in range(0, len(left), BATCH_SIZE):
            batch = left[first : first + BATCH_SIZE]
            made = _answers(model, tokenizer, [prompts[n] for n in batch], max_new_tokens)
            new = {key[n]: ids for n, ids in zip(batch, made, strict=True)}
            answers |= new
            if cache is not None:
                with cache.open("a") as file:
                    file.writelines(json.dumps(pair) + "\n" for pair in new.items())
            bar.update(len(batch))
    return Dataset.from_list(
        [
            {"input_ids": prompt + answers[key[n]], "labels": [IGNORE_INDEX] * len(prompt) + answers[key[n]]}
            for n, prompt in enumerate(prompts)
        ]
    )


def read_answers(cache: Path) -> dict[str, list[int]]:
    """Answers by prompt; a last line that was not written whole is left out."""
    found = {}
    for line in cache.read_text().splitlines() if cache.exists() else ():
        try:
            key, ids = json.loads(line)
        except ValueError:
            continue
        found[key] = ids
    return found


def _answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[list[int]], max_new_tokens: int
) -> list[list[int]]:
    inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(base_of(model).device)
    ids = generate_autoregressive(model, **inputs, max_new_tokens=max_new_tokens, do_sample=False)
    answers, ends = ids[:, inputs["input_ids"].shape[1] :].tolist(), end_token_ids(model, tokenizer)
    firsts = [next((i for i, token in enumerate(row, start=1) if token in ends), len(row)) for row in answers]
    return [row[:first] for row, first in zip(answers, firsts, strict=True)]
