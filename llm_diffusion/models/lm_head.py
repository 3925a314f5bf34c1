"""The vocabulary, projected for masked tokens alone and a few of them at a time: no (tokens, vocabulary) tensor, on any device.

    hidden (n, D)   ->   for every few rows:   logits = head(hidden)   ->   nll, best guess, entropy
                                               and at once d nll / d hidden, by autograd through the head alone

A row's NLL depends on its own hidden state alone, so its gradient is known, up to a factor, before the loss is: backward is one product a
row. A head that is trained itself is run again in backward instead.

`head` is the model's own forward with its backbone cut out, so that what an architecture does to its logits (scaling, soft capping, a
bias) and what PEFT does to its head is done here too. Rows of a tied vocabulary that PEFT trains (`trainable_token_indices`) stand beside
the matrix: PEFT itself copies the whole matrix at every forward to change one row of it, gigabytes and most of a short step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.utils.other import TrainableTokensWrapper
from torch.autograd.function import once_differentiable
from torch.autograd.graph import get_gradient_edge
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled

from ..objective.losses import entropy, token_nll
from ..objective.modes import IGNORE_INDEX
from .patching import FORWARD_ERRORS, BoundFunction, embedding_table, in_eval_mode

PIECE, GPU_PIECE = 2**22, 2**26  # numbers of a piece of the logits on a CPU, 16 MiB of fp32, and elsewhere
NAMES = ("nll", "right", "entropy", "mean_logits")

# -- scores


def score_whole(run: Callable[[torch.Tensor], Any], targets: torch.Tensor) -> dict[str, Any]:
    """Scores by the logits of all targets at once.

    Args:
        run: the model's forward, given which logits to keep.
        targets: (B, M) token ids, -100 where there is none.

    Returns:
        As `scores_of_logits`, and the places of the n targets, `at`.
    """
    keep = targets != IGNORE_INDEX
    return {**scores_of_logits(run(keep).logits, targets[keep]), "at": keep.nonzero(as_tuple=True)}


def score_in_pieces(
    model: PreTrainedModel, run: Callable[[torch.Tensor], Any], targets: torch.Tensor
) -> dict[str, Any]:
    """As `score_whole`, without the logits of all targets."""
    weight = trained_rows(model.get_output_embeddings())[0].weight
    if is_deepspeed_zero3_enabled() or isinstance(weight, DTensor):
        return score_whole(run, targets)  # a head that is sharded by itself has its weights in its own call only
    at = (targets != IGNORE_INDEX).nonzero(as_tuple=True)  # the one wait for the device
    # Through the whole forward, which others may have wrapped, with no token at all for its own head.
    with _backbone_outputs(model) as caught:
        run(torch.empty(0, dtype=torch.long, device=targets.device))
    hidden = caught[-1][0][tuple(i.to(caught[-1][0].device) for i in at)].to(weight.device)
    return {**row_scores(Head(model, caught[-1]), hidden, targets[at].to(weight.device)), "at": at}


def scores_of_logits(logits: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
    """Scores of targets from logits, (n, V) and (n,) -> (n,) each: `nll` in nats, fp32, differentiable; `right`, whether the best
    guess is the target; `entropy` in nats and `mean_logits`, fp32."""
    plain = logits.detach()
    return {
        "nll": token_nll(logits, targets),
        "right": plain.argmax(-1) == targets,
        "entropy": entropy(plain),
        "mean_logits": plain.mean(-1, dtype=torch.float32),
    }


@torch.compiler.disable  # compiled, every number of masked tokens would be compiled anew
def row_scores(head: Head, hidden: torch.Tensor, targets: torch.Tensor, piece: int | None = None) -> dict[str, Any]:
    """Scores of targets from the hidden states that predict them, as `scores_of_logits`.

    Args:
        hidden: (n, D).
        targets: (n,) token ids.
        piece: numbers of a piece of the logits; None: what suits the device.
    """
    size = max(1, (piece or (PIECE if hidden.device.type == "cpu" else GPU_PIECE)) // head.width)
    pieces = [slice(start, start + size) for start in range(0, max(len(hidden), 1), size)]
    own = head.own_logits(hidden)
    given = (hidden,) if own is None else (hidden, own)
    if torch.is_grad_enabled() and head.trains:
        parts = [checkpoint(_scores, head, targets[i], *(x[i] for x in given), use_reentrant=False) for i in pieces]
        return {name: torch.cat([scores[name] for scores in parts]) for name in NAMES}
    return dict(zip(NAMES, _RowScores.apply(head, targets, pieces, *given), strict=True))


def _scores(head: Head, targets: torch.Tensor, *given: torch.Tensor) -> dict[str, torch.Tensor]:
    return scores_of_logits(head(*given), targets)


class _RowScores(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, head: Head, targets: torch.Tensor, pieces: list[slice], *given: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        scores, needed = [], any(ctx.needs_input_grad)
        slopes = [torch.empty_like(x) for x in given] if needed else []
        for piece in pieces:
            leaves = [x[piece].detach().requires_grad_(needed) for x in given]
            with torch.set_grad_enabled(needed):
                logits = head(*leaves)
            end = get_gradient_edge(logits) if needed else None
            found, slope = _scores_and_slope(logits.detach(), targets[piece])
            del logits  # backward needs the graph, not its end
            scores.append(found)
            for whole, part in zip(slopes, torch.autograd.grad(end, leaves, slope) if needed else (), strict=True):
                whole[piece] = part
        ctx.save_for_backward(*slopes)
        nll, *others = (torch.cat(column) for column in zip(*scores, strict=True))
        ctx.mark_non_differentiable(*others)
        return nll, *others

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        return None, None, None, *(slope * given[:, None].to(slope.dtype) for slope in ctx.saved_tensors)


def _scores_and_slope(logits: torch.Tensor, targets: torch.Tensor) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """What `scores_of_logits` returns, and d nll / d logits = softmax - one hot; with one table beside the logits, no more."""
    wanted = targets[:, None]
    most, best = logits.max(-1, keepdim=True)
    p = (logits - most).exp_()
    total = p.sum(-1, keepdim=True)
    norm, p = most + total.log(), p.div_(total)
    nll, spread = (norm - logits.gather(1, wanted))[:, 0], norm[:, 0] - (p[:, None] @ logits[..., None]).flatten()
    found = (nll, (best == wanted)[:, 0], spread, logits.mean(-1))
    return found, p.scatter_add_(1, wanted, torch.full_like(norm, -1.0))


# -- the head alone


class Head:
    """A model's own path from last hidden states to logits: its forward with a backbone that returns what it is given.

    Attributes:
        rows: (r, D) trained rows of the vocabulary whose logits `__call__` wants to be given; or None.
        width: of the vocabulary.
        trains: whether anything else of the head is trained.
    """

    def __init__(self, model: PreTrainedModel, output: Any) -> None:
        """`output`: of the backbone, for what stands in it beside the hidden states."""
        head = model.get_output_embeddings()
        linear, self.rows, index = trained_rows(head)
        self.width = model.config.get_text_config().vocab_size
        self.trains = any(parameter.requires_grad for parameter in linear.parameters())
        self._output, self._backbone = output, _Given()
        self._head = head if index is None else _WithRows(linear, index)
        # The model with two of its children replaced, and everything else its own.
        name = next(name for name, module in model._modules.items() if module is head)
        self._shell = object.__new__(type(model))
        vars(self._shell).update(vars(model))
        self._shell._modules = {**model._modules, model.base_model_prefix: self._backbone, name: self._head}

    def own_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """(n, r) logits of the trained rows, if there are any."""
        return None if self.rows is None else F.linear(hidden, self.rows.to(hidden.dtype))

    def __call__(self, hidden: torch.Tensor, own: torch.Tensor | None = None) -> torch.Tensor:
        """(n, D), and (n, r) logits of the trained rows -> (n, V) fp32."""
        whole = hidden[None]
        if isinstance(self._output, tuple):
            self._backbone.output = (whole, *self._output[1:])
        else:
            self._backbone.output = dataclasses.replace(self._output, last_hidden_state=whole)
        if own is not None:
            self._head.own = own[None]
        return type(self._shell).forward(self._shell, inputs_embeds=whole, use_cache=False).logits.squeeze(0).float()


class _Given(torch.nn.Module):
    """A backbone that returns its `output`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.output


class _WithRows(torch.nn.Module):
    """A head with logits of its `own` (1, n, r) in place of those of some rows."""

    def __init__(self, linear: torch.nn.Module, index: torch.Tensor) -> None:
        super().__init__()
        self.linear, self.index = linear, index

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        result = self.linear(hidden)
        return result.index_copy_(-1, self.index, self.own.to(result.dtype))


@contextmanager
def _backbone_outputs(model: PreTrainedModel) -> Iterator[list[Any]]:
    """Collects what the backbone returns."""
    caught: list[Any] = []
    handle = model.base_model.register_forward_hook(lambda module, args, output: caught.append(output))
    try:
        yield caught
    finally:
        handle.remove()


@torch.no_grad()
def can_score_in_pieces(model: PreTrainedModel, forward: Callable[..., Any]) -> bool:
    """Whether `Head` gives the logits of the model's whole `forward`: shown on a few tokens."""
    head = model.get_output_embeddings()
    if head is None or model.base_model is model or head not in model._modules.values():
        return False
    ids = torch.arange(3, 7, device=embedding_table(model).device)[None]
    try:
        with in_eval_mode(model), _backbone_outputs(model) as caught:
            logits = forward(input_ids=ids, use_cache=False).logits[0, 1:3].float()
        if len(caught) != 1:
            return False
        alone, hidden = Head(model, caught[0]), caught[0][0][0, 1:3]  # without the others
        found = alone(hidden, alone.own_logits(hidden))
        return found.shape == logits.shape and torch.allclose(found, logits, rtol=1e-2, atol=1e-2 * logits.abs().max())
    except FORWARD_ERRORS:
        return False  # an architecture of its own kind: `score_whole` takes it


# -- rows that PEFT trains; without what is used here of its layer, PEFT's own forward runs


def train_rows_alone(model: torch.nn.Module) -> None:
    """Computes every trained row of `model` beside its matrix. In place; idempotent; copies of the model keep it."""
    for module in model.modules():
        known = isinstance(module, TrainableTokensLayer) and hasattr(module, "forward_adapters")
        if known and getattr(module.base_layer, "max_norm", None) is None:
            module.forward_adapters = BoundFunction(_forward_rows, module)


def trained_rows(head: torch.nn.Module) -> tuple[torch.nn.Module, torch.Tensor | None, torch.Tensor | None]:
    """The module under PEFT's wrapper, the rows (r, D) that stand in place of its own now, and their numbers (r,)."""
    if not isinstance(head, TrainableTokensWrapper) or len(names := _in_use(head.token_adapter)) > 1:
        return head, None, None
    layer = head.token_adapter
    rows = layer.trainable_tokens_delta[names[0]] if names else None
    return layer.base_layer, rows, None if rows is None else _index(layer, names[0], rows.device)


def _in_use(layer: TrainableTokensLayer) -> list[str]:
    if layer.disable_adapters or layer.merged:
        return []
    return [name for name in layer.active_adapters if name in layer.trainable_tokens_delta]


def _index(layer: TrainableTokensLayer, name: str, device: torch.device) -> torch.Tensor:
    """The numbers of the rows, put on the device once: making them anew would wait for it at every call."""
    numbers, kept = layer.token_indices[name], getattr(layer, "_row_numbers", None)
    if kept is None or kept[0] != numbers or kept[1].device != device:
        kept = layer._row_numbers = (numbers, torch.tensor(numbers, device=device))
    return kept[1]


def _forward_rows(
    self: TrainableTokensLayer, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any
) -> torch.Tensor:
    names, base = _in_use(self), self.base_layer
    known = isinstance(base, torch.nn.Embedding | torch.nn.Linear) and list(active_adapters) == names
    if len(names) != 1 or not known:
        return type(self).forward_adapters(self, x, active_adapters, *args, **kwargs)
    rows, index, result = self.trainable_tokens_delta[names[0]], _index(self, names[0], x.device), base(x)
    if isinstance(base, torch.nn.Linear):
        # In place: a product keeps its inputs for backward, not its output.
        return result.index_copy_(-1, index, F.linear(x, rows.to(x.dtype)).to(result.dtype))
    hits, scale = x[..., None] == index, getattr(base, "embed_scale", 1.0)
    own = F.embedding(hits.int().argmax(-1), rows).to(result.dtype)
    own = own * (scale.to(own.dtype) if isinstance(scale, torch.Tensor) else scale)
    return torch.where(hits.any(-1, keepdim=True), own, result)
