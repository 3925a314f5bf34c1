"""Measures answers: exact match by kind of task, tokens per forward, seconds; AR base and converted model side by side.

Trade-off: exact match against the one reference, the plainest figure there is. Alternative: a harness, for tasks whose answers
need extracting.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..generation.generate import generate, generate_autoregressive
from ..models.patching import base_of
from .processes import dealt, gathered, in_order

logger = logging.getLogger(__name__)
Decode = Callable[[dict[str, torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]
BATCH_SIZE = 50


@dataclass
class AnswerReport:
    """Answers of one model to a list of examples.

    Args:
        answers: texts, in the order of the examples.
        exact_match: percent by kind of task.
        tokens_per_forward: answer tokens, end token included, over forward passes, mean over examples.
        ended: whether each answer came to its end token.
        accepted: of lossless decoding, how many verifications yielded how many tokens.
        seconds: for all examples.
        tokens: of every answer, its end token included.
    """

    answers: list[str] = field(default_factory=list)
    exact_match: dict[str, float] = field(default_factory=dict)
    tokens_per_forward: float = 0.0
    ended: list[bool] = field(default_factory=list)
    accepted: dict[int, int] = field(default_factory=dict)
    seconds: float = 0.0
    tokens: list[int] = field(default_factory=list)

    @property
    def mean(self) -> float:
        """Mean exact match over the kinds, percent."""
        return sum(self.exact_match.values()) / len(self.exact_match)


def prompt_and_reference(example: dict) -> tuple[str | list[dict], str]:
    """The prompt (messages or text) and the reference answer of an example of any trainable shape."""
    if "messages" in example:
        return example["messages"][:-1], example["messages"][-1]["content"]
    if isinstance(example.get("prompt"), list):
        return example["prompt"], example["completion"][-1]["content"]
    if "prompt" in example:
        return example["prompt"], example["completion"]
    half = len(example["text"]) // 2
    return example["text"][:half], example["text"][half:]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str | list[dict]]) -> dict[str, torch.Tensor]:
    """Left-padded batch of prompts; conversations through the chat template."""
    ids = [
        tokenizer(prompt)["input_ids"]
        if isinstance(prompt, str)
        else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        for prompt in prompts
    ]
    return tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")


def answered_by_base(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, dataset: Dataset, max_new_tokens: int = 128
) -> Dataset:
    """Chats whose last answers are what the AR base says itself, adapter off: what a drafter has to foresee.

    Args:
        dataset: with `messages`, or `prompt` and `completion`.
    """
    if not {"messages", "completion"} & set(dataset.column_names):
        raise UserError(
            f"`answers_from_base` needs chats or prompts with completions, got the columns {dataset.column_names}."
        )
    rows = list(dataset)
    report = evaluate_answers(model, tokenizer, rows, autoregressive=True, max_new_tokens=max_new_tokens)
    for row, answer in zip(rows, report.answers, strict=True):
        if "messages" in row:
            row["messages"] = [*row["messages"][:-1], {"role": "assistant", "content": answer}]
        elif isinstance(row["completion"], list):
            row["completion"] = [{"role": "assistant", "content": answer}]
        else:
            row["completion"] = answer
    # An answer that was cut off would teach a false end.
    whole = [
        row for row, ended, answer in zip(rows, report.ended, report.answers, strict=True) if ended and answer.strip()
    ]
    if len(whole) < len(rows):
        logger.warning(
            "%d of %d answers are not over after %d tokens and are dropped",
            len(rows) - len(whole),
            len(rows),
            max_new_tokens,
        )
    if not whole:
        raise UserError(
            f"`answers_from_base`: no answer is over after {max_new_tokens} tokens; raise `generation.max_new_tokens`."
        )
    return Dataset.from_list(whole)


def evaluate_answers(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[dict],
    *,
    autoregressive: bool = False,
    split: bool = False,
    **settings: object,
) -> AnswerReport:
    """Answers the prompts of `examples` and compares with their references, blanks around them ignored.

    Args:
        examples: dicts of a trainable shape, with an optional `kind`.
        autoregressive: decode greedily as the AR base (adapter off, causal) instead of by unmasking.
        split: deal the examples out to all processes, each of which must call this and gets the whole report.
        settings: decoding settings.
    """
    device, right, forwards = base_of(model).device, defaultdict(list), 0.0
    accepted: Counter[int] = Counter()
    mine, rows = dealt(examples, split), []  # of every answer its text, its tokens and whether it ended
    started = time.perf_counter()
    for start in range(0, len(mine), BATCH_SIZE):
        batch = encode_prompts(tokenizer, [prompt_and_reference(e)[0] for e in mine[start : start + BATCH_SIZE]])
        batch = batch.to(device)
        if autoregressive:
            limit = settings.get("max_new_tokens", 128)
            ids = generate_autoregressive(model, **batch, max_new_tokens=limit, do_sample=False)
            forwards += len(ids)  # one token a forward
        else:
            output = generate(model, **batch, **{**settings, "return_dict_in_generate": True})
            ids = output.sequences
            forwards += output.tokens_per_forward.sum().item()
            if output.accepted is not None:
                accepted.update(output.accepted[output.accepted > 0].tolist())
        written = ids[:, batch["input_ids"].shape[1] :]
        ends = (written == tokenizer.eos_token_id).long()
        tokens = (ends.cumsum(-1) - ends == 0).sum(-1).tolist()
        answers = tokenizer.batch_decode(written, skip_special_tokens=True)
        rows += zip(answers, tokens, ends.any(-1).tolist(), strict=True)
    parts = gathered((rows, forwards, accepted, time.perf_counter() - started), split)
    rows = in_order([part[0] for part in parts])
    for example, (answer, _, _) in zip(examples, rows, strict=True):
        right[example.get("kind", "all")].append(answer.strip() == prompt_and_reference(example)[1].strip())
    return AnswerReport(
        answers=[answer for answer, _, _ in rows],
        exact_match={kind: 100 * sum(hits) / len(hits) for kind, hits in right.items()},
        tokens_per_forward=sum(part[1] for part in parts) / len(examples),
        ended=[ended for _, _, ended in rows],
        accepted=dict(sorted(sum((part[2] for part in parts), Counter()).items())),
        seconds=max(part[3] for part in parts),
        tokens=[tokens for _, tokens, _ in rows],
    )
