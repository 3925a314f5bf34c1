"""Collators for tests, from flat options."""

from dataclasses import fields
from typing import Any

from llm_diffusion.models.record import DiffusionRecord
from llm_diffusion.objective.forward_process import NoiseSettings
from llm_diffusion.training.collator import DataCollatorForMaskedDiffusion


def collator_of(pad_token_id: int = 0, mask_token_id: int = 1, **options: Any) -> DataCollatorForMaskedDiffusion:
    """Without canvases and with the shifted read-out unless said otherwise; keys of the record, the noise and the collator alike."""
    options = {
        "mask_token_id": mask_token_id,
        "right_shift_logits": True,
        "eos_tail": 0,
        "random_canvas": 0.0,
        **options,
    }
    record, noise = ({f.name for f in fields(kind)} for kind in (DiffusionRecord, NoiseSettings))
    of_record = {name: options.pop(name) for name in record & set(options)}
    of_noise = {name: options.pop(name) for name in noise & set(options)}
    return DataCollatorForMaskedDiffusion(
        DiffusionRecord(**of_record), pad_token_id, settings=NoiseSettings(**of_noise), **options
    )
