"""Converted checkpoints that the host's own loaders bring: `from_pretrained(…, trust_remote_code=True)`, and `pipeline` on it.

A file beside the weights, three lines long, sends the host's `generate` here.
Trade-off: the package must be installed where the checkpoint is used. Alternative: a copy of the decoder in every checkpoint, which
nobody would ever mend.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .generation import generate
from .modeling import set_attention
from .patching import base_of, keep_logits

FILE = '''"""Decoding by iterative unmasking; needs the package llm_diffusion."""

from llm_diffusion.pushed import generate_as_loaded as generate  # noqa: F401
'''


def generate_as_loaded(model: torch.nn.Module, **kwargs: Any) -> Any:
    """`generate` for a converted checkpoint that the host's own loader brought: attention is set at the first call.

    This is what `custom_generate/generate.py` beside the weights hands to `from_pretrained`, `generate` and `pipeline`.
    """
    base = base_of(model)
    record = getattr(base.config, "diffusion", None)
    if record is None:
        raise ValueError("`model`: not a converted checkpoint; call `convert_to_diffusion` first.")
    if record.get("time_embedding"):
        raise ValueError("`model`: the host's loader leaves the time embedding out; use `load_diffusion_model`.")
    if not getattr(base, "_attention_set", False):
        keep_logits(base)
        set_attention(base, record)
        base._attention_set = True
    return generate(model, **kwargs)


def save_custom_generate(folder: str | Path) -> None:
    """Writes `custom_generate/generate.py` beside a full checkpoint, so that the host's loaders decode it by unmasking."""
    (Path(folder) / "custom_generate").mkdir(exist_ok=True)
    (Path(folder) / "custom_generate" / "generate.py").write_text(FILE)
