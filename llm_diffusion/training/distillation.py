"""Listening to the autoregressive model that is still there: the base under the adapters, with causal attention.

1. `teacher_scores`: what the AR model expects after every clean prefix. One forward without gradients, no second copy of the model.
2. `head_inputs`: the hidden states that reach the vocabulary, of teacher and student alike.
3. `with_own_tokens`: rows in which the student's own guesses stand in place of masked text, for the teacher to judge.

References: knowledge distillation (arXiv 1503.02531), on-policy distillation (GKD, arXiv 2306.13649).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from transformers import DynamicCache

from .. import UserError
from ..models.attention import causal_attention
from ..models.patching import adapters_off, base_of, in_eval_mode
from ..models.record import record_of
from ..models.sampling import sample
from ..objective.attention_masks import additive, block_causal, positions
from ..objective.losses import entropy, relative_error, soft_cross_entropy, total_variation
from ..objective.modes import IGNORE_INDEX
from ..objective.noise import TOKEN_STREAM, uniform
from .config import DiffusionSFTConfig


def check_base_stays(configs: list[PeftConfig]) -> None:
    """Refuses adapters that change the base: with them off it is no longer the autoregressive model.

    Raises:
        ValueError: biases are trained, or the weights are moved at the start (PiSSA, OLoRA, CorDA, LoftQ).
    """
    for config in configs:
        start, bias = getattr(config, "init_lora_weights", True), getattr(config, "bias", "none")
        if bias != "none" or start not in (True, False, "gaussian", "orthogonal", "eva"):
            raise UserError(
                f"`peft_config`: bias={bias!r} and init_lora_weights={start!r} change the base itself, which must stay the "
                "autoregressive model here; use bias='none' and init_lora_weights=True."
            )


def check_teacher(model: torch.nn.Module, adapted: bool, converted_base: bool, args: DiffusionSFTConfig) -> None:
    """Refuses distillation where no autoregressive model is left to learn from."""
    if not args.uses_teacher:
        return
    config = base_of(model).config
    windows = getattr(config, "causal_windows", None) or any(
        getattr(layer, "is_sliding", False) for layer in DynamicCache(config=config).layers
    )
    if args.packing and windows:
        raise UserError(
            "`packing`: the autoregressive model has sliding windows, which the mask of packed texts would take from it while it "
            "teaches; leave one of packing and distillation off."
        )
    if not adapted:
        raise UserError(
            "`distillation_weight` and `distillation_hidden_weight` need adapters, under which the autoregressive model stays as "
            "it was; pass a `peft_config`, or set them to 0."
        )
    if converted_base:
        raise UserError(
            "`distillation_weight` and `distillation_hidden_weight`: the weights under the adapters are converted themselves, no "
            "autoregressive model is left to learn from; set them to 0."
        )


@contextmanager
def head_inputs(model: torch.nn.Module) -> Iterator[list[torch.Tensor]]:
    """Collects what the output head is given, one tensor (…, D) a forward pass."""
    caught: list[torch.Tensor] = []
    head = base_of(model).get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda module, args: caught.append(args[0]))
    try:
        yield caught
    finally:
        handle.remove()


def positions_mask(like: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions (n,) of which some may be named twice, in the noisy and in the clean half -> each once, as a mask (B, L) like `like`,
    and (n,) where in its order the answers stand."""
    wanted = torch.zeros_like(like, dtype=torch.bool)
    wanted[rows, columns] = True
    return wanted, (wanted.flatten().cumsum(0) - 1)[rows * like.shape[1] + columns]


def without_mask_token(logits: torch.Tensor, adapted: PeftModel) -> torch.Tensor:
    """The AR model's logits (n, V), changed in place: the mask token, which it never knew, out of reach."""
    logits[:, record_of(adapted).mask_token_id] = torch.finfo(logits.dtype).min
    return logits


def teacher_scores(
    model: torch.nn.Module,
    adapted: PeftModel,
    part: dict[str, Any],
    rows: torch.Tensor,
    tokens: torch.Tensor,
    packed: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the AR model expects at some tokens of clean rows.

    Args:
        model: called; `adapted` or a wrapper of it.
        part: `input_ids` and `attention_mask`, (B, L) each.
        rows, tokens: (n,) each; every token has one before it.
        packed: whether a row holds several texts, which do not see each other.

    Returns:
        (n, V) logits, the mask token out of reach, and (n, D) inputs of the head.
    """
    ids, document_ids = part["input_ids"], part["attention_mask"]
    wanted, place = positions_mask(ids, rows, tokens - 1)
    inputs: dict[str, Any] = {"attention_mask": document_ids}
    if packed:
        mask = additive(block_causal(document_ids, 1), base_of(adapted).dtype)
        inputs = {"attention_mask": mask, "position_ids": positions(document_ids).clamp(min=0)}
    with in_eval_mode(adapted), adapters_off(adapted), causal_attention(adapted), head_inputs(adapted) as caught:
        logits = model(input_ids=ids, **inputs, use_cache=False, logits_to_keep=wanted).logits
    hidden = caught[-1] if caught[-1].dim() == 2 else caught[-1][wanted]
    return without_mask_token(logits[place], adapted), hidden[place]


def distilled(
    terms: torch.Tensor,
    data: torch.Tensor,
    student: tuple[torch.Tensor, torch.Tensor | None],
    teacher: tuple[torch.Tensor, torch.Tensor | None],
    args: DiffusionSFTConfig,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Terms (n,) of the objective with the teacher's distribution in place of its share of the labels; and its loss (n,).

    Args:
        data: (n,) bool, whether the token is the data's; of its own tokens the student learns from the teacher alone.
        student, teacher: logits (n, V) and inputs of the head (n, D), the latter where they are compared.
    """
    divergence = total_variation if args.distillation_divergence == "tv" else soft_cross_entropy
    soft = divergence(student[0], teacher[0])
    share = torch.where(data, args.distillation_weight, float(args.distillation_weight > 0))
    mixed = (1 - share) * terms + share * soft
    if args.distillation_hidden_weight:
        mixed = mixed + args.distillation_hidden_weight * relative_error(student[1], teacher[1])
    return mixed, soft.detach() - (entropy(teacher[0]) if args.distillation_divergence == "kl" else 0)


def with_own_tokens(
    part: dict[str, Any],
    noisy: dict[str, Any],
    logits: torch.Tensor,
    keep: torch.Tensor,
    chosen: torch.Tensor,
    keys: tuple[int, int, torch.Tensor],
    mask_token_id: int,
    end_token_ids: Sequence[int],
) -> dict[str, Any]:
    """The rows, with what the student predicts in place of their masked tokens, sampled from its own distribution.

    Behind an end token among them, the rest of the answer becomes end tokens, as in decoding.

    Args:
        part, noisy: the rows (`input_ids`, `labels`), and what `corrupt` made of them.
        logits, keep: (n, V) the student's, and (B, M) where they stand.
        chosen: (B,) bool, which rows are changed.
        keys: of the sampling: seed, step, and (B,) the rows'.
    """
    rows, _ = keep.nonzero().unbind(-1)
    tokens = noisy["tokens"][keep]
    # A token may be predicted twice, in both halves; the one that counts to the bound is the sampler's.
    sampled = noisy["masked"][rows, tokens] & chosen[rows] & (noisy["weights"][keep] > 0)
    seed, step, row_keys = keys
    noise = uniform(seed, step, row_keys[rows], tokens, TOKEN_STREAM)[sampled]
    logits = logits[sampled].float()
    logits[:, mask_token_id] = -torch.inf
    drawn = sample(logits.softmax(-1), noise)
    ids = part["input_ids"].clone()
    ids[rows[sampled], tokens[sampled]] = drawn
    if end_token_ids:
        ended, trained = torch.zeros_like(ids), part["labels"] != IGNORE_INDEX
        ended[rows[sampled], tokens[sampled]] = torch.isin(drawn, drawn.new_tensor(end_token_ids)).long()
        earlier = torch.where(trained, 0, ended.cumsum(-1)).cummax(-1).values  # of answers before this one
        ids = ids.masked_fill(trained & (ended.cumsum(-1) - ended > earlier), end_token_ids[0])
    return {**part, "input_ids": ids}
