"""The vocabulary, met by masked tokens alone and a few of them at a time: no (tokens, vocabulary) tensor, on any device.

    hidden (n, D)   ->   for every few rows:   logits = hidden W'   ->   nll, best guess, entropy
                                               and at once d nll / d hidden = (softmax - one hot) W

A row's NLL depends on its own hidden state alone, so its gradient is known, up to a factor, before the loss is: what backward has to
do for a frozen vocabulary is one product a row. That costs the two matrix products that whole logits cost, and the memory of a few rows.
Trade-off: a vocabulary that is trained (full fine-tuning) is multiplied once more in backward. Alternative: the host's fused head, which
on a CPU projects every row, masked or not, multiplies thrice, and for a trained row of the vocabulary takes a gradient of all rows.

What an architecture does to its logits (scaling, soft capping, a bias) is found by handing its forward known ones; a forward that does
anything else, and a head that is adapted or quantised, is scored by whole logits of the masked rows.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..objective.losses import entropy, token_nll
from ..objective.modes import IGNORE_INDEX
from .patching import Patch, base_of, wrap_forward
from .token_rows import trained_rows

PIECE, GPU_PIECE = 2**22, 2**26  # numbers of a piece of the logits on a CPU, 16 MiB of fp32, and elsewhere


@dataclass(frozen=True)
class LogitRule:
    """What a model's forward makes of its head's output z: `cap * tanh(scale * z / cap)`, or `scale * z` without a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, z: torch.Tensor) -> torch.Tensor:
        """In place."""
        if self.scale != 1.0:
            z.mul_(self.scale)
        return z if self.cap is None else z.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, gradient: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Gradient by z from that by the logits, in place; `logits` are used up."""
        if self.cap is not None:
            gradient.mul_(logits.div_(self.cap).square_().neg_().add_(1))
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


class _RowScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: torch.Tensor | None,
        index: torch.Tensor | None,
        targets: torch.Tensor,
        rule: LogitRule,
        dtype: torch.dtype,
        size: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        n = len(hidden)
        nll, spread, average = (torch.empty(n, dtype=torch.float32, device=hidden.device) for _ in range(3))
        right = torch.empty(n, dtype=torch.bool, device=hidden.device)
        by_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        by_rows = hidden.new_empty(n, len(index), dtype=torch.float32) if ctx.needs_input_grad[3] else None
        wide, own = weight.to(dtype), None if rows is None else rows.to(dtype)
        for piece in pieces(n, weight, size):
            logits = rule(_project(hidden[piece].to(dtype), wide, bias, own, index))
            wanted = targets[piece, None]
            said, (most, best) = logits.gather(1, wanted), logits.max(-1, keepdim=True)
            right[piece], average[piece] = (best == wanted)[:, 0], logits.mean(-1)
            # One table beside the logits, no more: each costs as much time as memory.
            p = (logits - most).exp_()
            total = p.sum(-1, keepdim=True)
            norm, p = most + total.log(), p.div_(total)
            nll[piece] = (norm - said)[:, 0]
            mean = (logits.mul_(p) if rule.cap is None else p * logits).sum(-1)
            spread[piece] = norm[:, 0] - mean
            if by_hidden is None and by_rows is None:
                continue
            gradient = rule.slope(p.scatter_add_(1, wanted, torch.full_like(said, -1.0)), logits)
            if by_rows is not None:
                by_rows[piece] = gradient[:, index]
            if by_hidden is not None:
                by_hidden[piece] = _backproject(gradient, wide, own, index).to(hidden.dtype)
        trains = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        ctx.save_for_backward(
            by_hidden,
            by_rows,
            hidden if trains or by_rows is not None else None,
            *((weight, bias, rows, index, targets) if trains else (None,) * 5),
        )
        ctx.rule, ctx.dtype, ctx.size, ctx.rows_dtype = rule, dtype, size, None if rows is None else rows.dtype
        ctx.mark_non_differentiable(right, spread, average)
        return nll, right, spread, average

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        by_hidden, by_rows, hidden, weight, bias, rows, index, targets = ctx.saved_tensors
        d_hidden = d_weight = d_bias = d_rows = None
        if by_hidden is not None:
            d_hidden = by_hidden * given[:, None].to(by_hidden.dtype)
        if by_rows is not None:
            d_rows = ((by_rows * given[:, None]).T @ hidden.float()).to(ctx.rows_dtype)
        if weight is not None:
            d_weight, d_bias = _by_weight(ctx, given, hidden, weight, bias, rows, index, targets)
        return d_hidden, d_weight, d_bias, d_rows, None, None, None, None, None


def _by_weight(
    ctx: Any,
    given: torch.Tensor,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    index: torch.Tensor | None,
    targets: torch.Tensor,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Gradients of a trained vocabulary, summed in fp32 over the pieces: in 16 bits the small ones would be lost."""
    d_weight = torch.zeros_like(weight, dtype=torch.float32)
    d_bias = None if bias is None else torch.zeros_like(bias, dtype=torch.float32)
    wide, own = weight.to(ctx.dtype), None if rows is None else rows.to(ctx.dtype)
    for piece in pieces(len(hidden), weight, ctx.size):
        read = hidden[piece].to(ctx.dtype)
        logits = ctx.rule(_project(read, wide, bias, own, index))
        gradient = logits.softmax(-1).scatter_add_(1, targets[piece, None], -torch.ones_like(given[piece, None]))
        gradient = ctx.rule.slope(gradient, logits).mul_(given[piece, None])
        if d_bias is not None:
            d_bias += gradient.sum(0)
        if index is not None:
            gradient[:, index] = 0  # another row stands there
        d_weight.addmm_(gradient.T, read.float())
    return (
        d_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None,
        d_bias.to(bias.dtype) if ctx.needs_input_grad[2] else None,
    )


def pieces(n: int, weight: torch.Tensor, piece: int | None = None) -> list[slice]:
    """Rows of hidden states that meet the vocabulary together."""
    size = max(1, (piece or (PIECE if weight.device.type == "cpu" else GPU_PIECE)) // len(weight))
    return [slice(start, start + size) for start in range(0, n, size)]


def _project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    rows: torch.Tensor | None,
    index: torch.Tensor | None,
) -> torch.Tensor:
    """(n, V) fp32."""
    z = torch.mm(hidden, weight.T)
    if rows is not None:
        z[:, index] = torch.mm(hidden, rows.T)
    z = z.float()
    return z if bias is None else z.add_(bias)


def _backproject(
    gradient: torch.Tensor, weight: torch.Tensor, rows: torch.Tensor | None, index: torch.Tensor | None
) -> torch.Tensor:
    gradient = gradient.to(weight.dtype)
    if rows is None:
        return torch.mm(gradient, weight)
    own = gradient[:, index]
    gradient[:, index] = 0
    return torch.mm(gradient, weight).addmm_(own, rows)


@torch.compiler.disable  # compiled, every number of masked tokens would be compiled anew
def row_scores(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    rows: torch.Tensor | None = None,
    index: torch.Tensor | None = None,
    rule: LogitRule | None = None,
    piece: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of targets from the hidden states that predict them, differentiable in all but `targets`.

    Args:
        hidden: (n, D).
        weight, bias: (V, D) and (V,) of the head.
        targets: (n,) token ids.
        rows, index: (r, D) and (r,): what stands in place of these rows of `weight`.
        rule: what the architecture makes of its logits.
        piece: numbers of a piece of the logits; None: what suits the device.

    Returns:
        NLL in nats, fp32, with its gradient; whether the best guess is the target, bool; entropy in nats and the mean of the logits,
        fp32: (n,) each.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    if index is not None:
        index = index.to(weight.device)
    return _RowScores.apply(hidden, weight, bias, rows, index, targets, rule or LogitRule(), dtype, piece)


def add_row_scores(model: torch.nn.Module) -> None:
    """Teaches a model's forward `score_targets`, (B, M) token ids with -100 for none: with it, it returns no logits but a dict of
    `nll`, `right`, `entropy` and `mean_logits` of the n others, (n,) each, and their places `at`. Idempotent; copies keep it."""
    base = base_of(model)
    base.logit_rule = _logit_rule(base)
    wrap_forward(Patch(), base, _scoring_forward, "_forward_without_scores")


def _scoring_forward(
    self: PreTrainedModel, *args: Any, score_targets: torch.Tensor | None = None, **kwargs: Any
) -> Any:
    if score_targets is None:
        return self._forward_without_scores(*args, **kwargs)
    at = (score_targets != IGNORE_INDEX).nonzero(as_tuple=True)  # the one wait for the device
    targets = score_targets[at]
    head = _plain_head(self.get_output_embeddings())
    if self.logit_rule is None or head is None or is_deepspeed_zero3_enabled():
        # ZeRO-3 gathers a head's weights for its own forward only.
        keep = score_targets != IGNORE_INDEX
        logits = self._forward_without_scores(*args, **kwargs, logits_to_keep=keep).logits
        return {**scores_of_logits(logits, targets), "at": at}
    # Through the whole forward, which others may have wrapped, with no token at all for its own head.
    none = torch.empty(0, dtype=torch.long, device=targets.device)
    with _backbone_output(self) as caught:
        self._forward_without_scores(*args, **kwargs, logits_to_keep=none)
    (hidden,), (linear, rows, index) = caught, head
    weight, bias = (p.full_tensor() if isinstance(p, DTensor) else p for p in (linear.weight, linear.bias))
    hidden, targets = hidden[tuple(i.to(hidden.device) for i in at)].to(weight.device), targets.to(weight.device)
    found = row_scores(hidden, weight, targets, bias=bias, rows=rows, index=index, rule=self.logit_rule)
    return {**dict(zip(("nll", "right", "entropy", "mean_logits"), found, strict=True)), "at": at}


def scores_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """What `row_scores` returns, by name, from whole logits: (n, V) and (n,) -> (n,) each."""
    plain = logits.detach()
    return {
        "nll": token_nll(logits, targets),
        "right": plain.argmax(-1) == targets,
        "entropy": entropy(plain),
        "mean_logits": plain.mean(-1, dtype=torch.float32),
    }


@contextmanager
def _backbone_output(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """Collects the last hidden state (B, M, D) of every forward."""
    caught: list[torch.Tensor] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: caught.append(output[0]))
    try:
        yield caught
    finally:
        handle.remove()


def _plain_head(
    head: torch.nn.Module,
) -> tuple[torch.nn.Linear, torch.Tensor | None, torch.Tensor | None] | None:
    """The matrix of a head, and rows that are trained in place of its own; None: more is done to it than a product."""
    linear, rows, index = trained_rows(head)
    return (linear, rows, index) if type(linear) is torch.nn.Linear else None


@torch.no_grad()
def _logit_rule(model: PreTrainedModel) -> LogitRule | None:
    """What the model's forward makes of the output of its head; None where that is no such rule.

    Found, not read from the config, where it has a name of its own in every architecture: the forward is handed a spread of
    known numbers in place of its head's output, and its head's input is compared with what its backbone returns.
    """
    head, width = model.get_output_embeddings(), model.config.get_text_config().vocab_size
    if head is None or model.base_model is model or "_forward_of_all_logits" in vars(model):
        return None
    device = model.get_input_embeddings().weight.device
    spread = torch.cat([torch.tensor([1e-3, 1e6]), torch.linspace(-90.0, 90.0, max(width - 2, 2))])
    seen: list[torch.Tensor] = []

    def swap(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        seen.append(args[0])
        return spread[: output.shape[-1]].to(output.device).expand(output.shape).clone()

    training, handle = model.training, head.register_forward_hook(swap)
    ids = torch.arange(3, 7, device=device)[None]
    model.eval()
    try:
        with _backbone_output(model) as caught:
            found = model(input_ids=ids, use_cache=False).logits[0, -1].float().cpu()
        (direct,), (given,) = caught, seen
    except Exception:  # remote code may fail in any way; the plain way is still there
        return None
    finally:
        handle.remove()
        model.train(training)
    if given.shape[-1] != direct.shape[-1]:
        return None
    cap = found[1].item() if found[1] < 1e4 else None
    rule = LogitRule(found[0].item() / spread[0].item(), cap)
    if abs(rule.scale - 1) < 1e-6:
        rule = LogitRule(1.0, cap)
    same = torch.equal(given[0, -1], direct[0, -1].to(given))
    fits = torch.allclose(rule(spread[: len(found)].clone()), found, rtol=1e-4, atol=1e-5)
    return rule if same and fits else None
