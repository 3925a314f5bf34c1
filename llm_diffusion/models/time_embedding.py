"""An optional embedding of the noise level, added to the input embeddings.

The optimal denoiser of masked diffusion does not need it, because the masks themselves say how noisy a text is; so it is off by
default. Its last layer starts at zero: the converted model starts bit-equal to the one without.
Trade-off: a submodule that plain loaders do not know; `load_diffusion_model` attaches it. Alternative: none, the default.

References: DDPM (arXiv 2006.11239) for the sinusoids, MDLM (arXiv 2406.07524) for doing without.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from transformers import PreTrainedModel

from .patching import Patch, wrap_forward
from .record import record_of

DIM, MAX_TIMESTEPS = 256, 1000
NAME = "time_embedding"  # of the submodule, and so of its weights in a checkpoint


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


def attach(model: PreTrainedModel) -> None:
    """Gives `model` a time embedding, and its forward the keyword `timesteps`. Idempotent.

    `timesteps` (B, L) holds the noise level of every token: the mask probability of its text or block, 0 for clean context.
    Left out, it is the share of masks among a row's tokens.
    """
    if hasattr(model, NAME):
        return
    embedding = TimeEmbedding(model.get_input_embeddings().weight.shape[1])
    # A quantised model computes in its own type and holds its weights in another.
    model.add_module(NAME, embedding.to(device=model.device, dtype=model.dtype))
    wrap_forward(Patch(), model, _timed_forward, "_untimed_forward")


def _timed_forward(
    self: PreTrainedModel,
    input_ids: torch.Tensor | None = None,
    *args: Any,
    timesteps: torch.Tensor | None = None,
    inputs_embeds: torch.Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Bound to a model: closes over nothing, so that a copy embeds with its own weights."""
    if inputs_embeds is None:
        if timesteps is None:
            given = dict(zip(list(inspect.signature(self.forward).parameters)[1:], args, strict=False)) | kwargs
            timesteps = _mask_share(self, input_ids, given.get("attention_mask"))
        inputs_embeds = self.get_input_embeddings()(input_ids)
        inputs_embeds = inputs_embeds + self.time_embedding(timesteps).to(inputs_embeds.dtype)
    return self._untimed_forward(None, *args, inputs_embeds=inputs_embeds, **kwargs)


def _mask_share(model: PreTrainedModel, ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    real = torch.ones_like(ids) if attention_mask is None or attention_mask.shape != ids.shape else attention_mask
    masks = (ids == record_of(model).mask_token_id) & real.bool()
    return (masks.sum(-1) / real.sum(-1).clamp(min=1))[:, None].expand(ids.shape)
