"""The one forward that a converted model runs. It is bound to the model and reads `model.diffusion_forward`:

    1. the embedding of the noise level is added to the tokens' own     where the model has one
    2. the padding mask becomes a 4-D mask                              where `causal_ratio` is set
    3. the model's own forward
    4. targets are scored, or some of the logits kept                   also where the architecture cannot

The time embedding is off by default, because the masks themselves show how noisy a text is. Its last layer starts at zero.

References: DDPM (arXiv 2006.11239) for the sinusoids, MDLM (arXiv 2406.07524) for doing without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from ..objective.attention_masks import annealed
from .lm_head import can_score_in_pieces, score_in_pieces, score_whole
from .patching import Patch, base_of, embedding_table, wrap_forward
from .record import record_of

TIME_EMBEDDING = "time_embedding"  # of the submodule, and so of its weights in a checkpoint
DIM, MAX_TIMESTEPS = 256, 1000


@dataclass
class ForwardState:
    """What the forward of one model does besides the model's own, and what was done to the model already.

    Attributes:
        original, parameters: the forward that was there before, and the names of its positional arguments.
        causal_ratio: what a 4-D mask leaves of causal attention, see `attention_masks.annealed`; None: masks are passed on unchanged.
        triangles: causal masks that the model keeps as buffers, by their names, as they were.
        scores_in_pieces: whether `score_targets` may be scored a few at a time.
        attention_set, prepared_for_training: whether `set_attention`, or PEFT's preparation of quantised weights, has run.
        draft_schedule: of lossless decoding, where it was made, and how it drafts there.
    """

    original: Callable[..., Any] | None = None
    parameters: tuple[str, ...] = ()
    causal_ratio: float | None = None
    triangles: dict[str, torch.Tensor] = field(default_factory=dict)
    scores_in_pieces: bool = False
    attention_set: bool = False
    prepared_for_training: bool = False
    draft_schedule: tuple[Any, Any] | None = None


def forward_state(model: torch.nn.Module, patch: Patch | None = None) -> ForwardState:
    """The state of a model's forward, which becomes ours at the first call; `patch` can undo that."""
    model = base_of(model)
    if "diffusion_forward" not in vars(model):
        wrap_forward(patch or Patch(), model, _forward, ForwardState())
    return model.diffusion_forward


def causal_ratio_of(module: torch.nn.Module) -> float | None:
    """What the 4-D mask of a module's forward leaves of causal attention; None: it makes none."""
    state = vars(module).get("diffusion_forward")
    return None if state is None else state.causal_ratio


def lift_masks(patch: Patch, model: torch.nn.Module, causal_ratio: float = 0.0) -> None:
    """Lets the forward make a 4-D mask of the 2-D padding mask that it is given; 4-D masks pass as they are.

    Args:
        causal_ratio: what is left of the causal mask, see `attention_masks.annealed`.
    """
    patch.set(forward_state(model, patch), "causal_ratio", causal_ratio)


def add_row_scores(model: torch.nn.Module) -> None:
    """Readies the forward for the keyword `score_targets`, (B, M) token ids with -100 for none: with it, it returns no logits but a
    dict of `nll`, `right`, `entropy` and `mean_logits` of the n others, (n,) each, and their places `at`. Idempotent."""
    state, base = forward_state(model), base_of(model)
    state.scores_in_pieces = "logits_to_keep" in state.parameters and can_score_in_pieces(base, state.original)


def attach(model: PreTrainedModel) -> None:
    """Gives `model` a time embedding, and its forward the keyword `timesteps`. Idempotent.

    `timesteps` (B, L) holds the noise level of every token: the mask probability of its text or block, 0 for clean context.
    Left out, it is the share of masks among a row's tokens.
    """
    if hasattr(model, TIME_EMBEDDING):
        return
    embedding = TimeEmbedding(embedding_table(model).shape[1])
    # A quantised model computes in its own type and holds its weights in another.
    model.add_module(TIME_EMBEDDING, embedding.to(device=model.device, dtype=model.dtype))
    forward_state(model)


def _forward(
    self: PreTrainedModel,
    *args: Any,
    timesteps: torch.Tensor | None = None,
    score_targets: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    state = self.diffusion_forward
    inputs = dict(zip(state.parameters, args, strict=False)) | kwargs
    if "past_key_values" in inputs and "cache" in state.parameters:  # as transformers 5.24 calls it
        inputs["cache"] = inputs.pop("past_key_values")
    if TIME_EMBEDDING in self._modules and inputs.get("inputs_embeds") is None:
        inputs["inputs_embeds"] = _embed(self, inputs.pop("input_ids"), inputs.get("attention_mask"), timesteps)
    if state.causal_ratio is not None:
        inputs["attention_mask"] = _lifted(inputs, state.causal_ratio, self.dtype)
    if score_targets is None:
        return _run(state, inputs)
    if state.scores_in_pieces:
        return score_in_pieces(self, lambda keep: _run(state, {**inputs, "logits_to_keep": keep}), score_targets)
    return score_whole(lambda keep: _run(state, {**inputs, "logits_to_keep": keep}), score_targets)


def _run(state: ForwardState, inputs: dict[str, Any]) -> Any:
    """The model's own forward, with the `logits_to_keep` of transformers also where it computes all logits."""
    if "logits_to_keep" in state.parameters or "logits_to_keep" not in inputs:
        return state.original(**inputs)
    keep = inputs.pop("logits_to_keep")
    output = state.original(**inputs)
    logits = output.logits
    if isinstance(keep, int):
        output.logits = logits[:, -keep:] if keep else logits
    elif keep.dtype == torch.bool:
        output.logits = logits[keep]
    elif keep.dim() == 1:
        output.logits = logits[:, keep]
    else:
        output.logits = logits.gather(1, keep[..., None].expand(-1, -1, logits.shape[-1]))
    return output


def _lifted(inputs: dict[str, Any], causal_ratio: float, dtype: torch.dtype) -> torch.Tensor:
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is not None and mask.dim() != 2:
        return mask
    tokens = inputs["inputs_embeds"][..., 0] if ids is None else ids
    return annealed(torch.ones_like(tokens, dtype=torch.long) if mask is None else mask, causal_ratio, dtype)


def _embed(
    model: PreTrainedModel, ids: torch.Tensor, attention_mask: torch.Tensor | None, timesteps: torch.Tensor | None
) -> torch.Tensor:
    """(B, L) -> (B, L, D)."""
    if timesteps is None:
        real = torch.ones_like(ids) if attention_mask is None or attention_mask.shape != ids.shape else attention_mask
        masks = (ids == record_of(model).mask_token_id) & real.bool()
        timesteps = (masks.sum(-1) / real.sum(-1).clamp(min=1))[:, None].expand(ids.shape)
    embeddings = model.get_input_embeddings()(ids)
    return embeddings + model.time_embedding(timesteps).to(embeddings.dtype)


class TimeEmbedding(torch.nn.Module):
    """Noise level in [0, 1] -> vector: sinusoids at `max_timesteps` grid points, interpolated in between, then an MLP."""

    def __init__(self, hidden_size: int, dim: int = DIM, max_timesteps: int = MAX_TIMESTEPS) -> None:
        super().__init__()
        self.dim, self.max_timesteps = dim, max_timesteps
        self.up = torch.nn.Linear(dim, hidden_size)
        self.down = torch.nn.Linear(hidden_size, hidden_size)
        torch.nn.init.zeros_(self.down.weight)
        torch.nn.init.zeros_(self.down.bias)

    def forward(self, times: torch.Tensor) -> torch.Tensor:
        """(...) -> (..., hidden_size)."""
        scaled = times.float().clamp(0, 1) * (self.max_timesteps - 1)
        low = scaled.floor()
        waves = torch.lerp(self.sinusoids(low), self.sinusoids(low + 1), (scaled - low)[..., None])
        return self.down(torch.nn.functional.silu(self.up(waves.to(self.up.weight.dtype))))

    def sinusoids(self, steps: torch.Tensor) -> torch.Tensor:
        """(...) steps, beyond the last one as the last one -> (..., dim): sines, then cosines."""
        half = self.dim // 2
        frequencies = torch.exp(torch.arange(half, device=steps.device) * (-math.log(10_000.0) / half))
        angles = steps.clamp(max=self.max_timesteps - 1)[..., None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], -1)
