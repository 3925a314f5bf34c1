"""A lossless model beside its base on the clock: the same texts, in one run, one answer at a time.

Ways of decoding take turns at every prompt, so that both sides of a ratio meet the same machine. transformers' prompt lookup, which drafts
what stood in the text before, needs no training and is what a trained drafter has to beat.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..generation.generate import generate, generate_autoregressive
from ..models.patching import adapters_off, base_of
from ..models.special_tokens import prompt_ids, shared_length

AUTOREGRESSIVE = {"AR, transformers' generate": {}, "prompt lookup, 5 tokens": {"prompt_lookup_num_tokens": 5}}
LOSSLESS = {"lossless": {}}
WARM_UP = 8  # tokens before anything is timed


@dataclass
class Timed:
    """The answers of one way of decoding.

    Attributes:
        ids: (1, L) of every prompt, the prompt included.
        accepted: tokens that each verification yielded, of every prompt.
        forwards: tokens per forward pass, of every prompt.
    """

    ids: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0
    accepted: list[list[int]] = field(default_factory=list)
    forwards: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


def compare_decoding(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, Any]]],
    max_new_tokens: int,
    lossless: dict[str, dict[str, Any]] = LOSSLESS,
) -> dict[str, Timed]:
    """Greedy answers by name of the way, the base's own `generate` first.

    Args:
        prompts: texts or conversations.
        lossless: settings of `generate` by name.
    """
    common = {"max_new_tokens": max_new_tokens, "do_sample": False}
    ways = {name: (generate_autoregressive, more) for name, more in AUTOREGRESSIVE.items()}
    ways |= {name: (generate, {"return_dict_in_generate": True, **more}) for name, more in lossless.items()}
    results = {name: Timed() for name in ways}
    for number, prompt in enumerate(prompts):
        ids = torch.tensor([prompt_ids(tokenizer, prompt)], device=next(model.parameters()).device)
        for name, (decode, more) in ways.items():
            if number == 0:
                decode(model, ids, **common | more | {"max_new_tokens": min(WARM_UP, max_new_tokens)})
            _add(results[name], partial(decode, model, **common, **more), ids)
    return results


def _add(timed: Timed, run: Callable[..., Any], ids: torch.Tensor) -> None:
    began = time.perf_counter()
    output = run(ids)
    found = output if torch.is_tensor(output) else output.sequences
    found = found.cpu()  # waits for a GPU
    timed.seconds += time.perf_counter() - began
    timed.ids.append(found)
    timed.tokens += found.shape[1] - ids.shape[1]
    if not torch.is_tensor(output):
        timed.forwards.append(float(output.tokens_per_forward[0]))
        timed.accepted.append([n for n in output.accepted[0].tolist() if n > 0])


def first_gap(model: torch.nn.Module, want: torch.Tensor, found: torch.Tensor) -> float | None:
    """How far apart the base's two best logits are where a text (1, L) first differs from another one (1, M), which begins alike; None:
    they are the same. What is within the rounding of the model's type is a tie, which passes of another width may decide otherwise.
    """
    if torch.equal(want, found):
        return None
    at = shared_length(want[0].tolist(), found[0].tolist())
    with torch.no_grad(), adapters_off(model):
        top = base_of(model)(input_ids=want[:, :at], logits_to_keep=1).logits[0, -1].float().topk(2).values
    return float(top[0] - top[1])


def widest_gap(model: torch.nn.Module, timed: dict[str, Timed]) -> float | None:
    """The largest `first_gap` of the texts of all ways to those of the first one."""
    first, *others = timed.values()
    gaps = [first_gap(model, *pair) for way in others for pair in zip(first.ids, way.ids, strict=True)]
    return max((gap for gap in gaps if gap is not None), default=None)
