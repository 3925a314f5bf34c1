"""Text in, text out: a converted model and its tokenizer behind four verbs.

Trade-off: a thin object that holds no state of its own. Alternative: `model.generate` with token ids, which is what it calls.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .. import UserError
from ..models.loading import load_diffusion_model
from ..models.patching import base_of
from ..models.record import record_of
from .canvas import fill_masks
from .config import DiffusionGenerationConfig
from .generate import generate
from .infilling import fill_gaps

logger = logging.getLogger(__name__)


def default_decoding(model: torch.nn.Module, chosen: dict[str, Any]) -> dict[str, Any]:
    """Decoding settings that suit how a model attends, under those that were chosen."""
    settings: dict[str, Any] = {"max_new_tokens": 128}
    if "steps" not in chosen:
        settings["threshold"] = 0.95
    if "block_length" not in chosen and not record_of(model).mode.has_blocks:
        settings |= {"block_length": 16, "grow_canvas": True}
    return settings | chosen


class DiffusionInference:
    """Iterative unmasking with a diffusion language model.

    Args:
        model: a converted model.
        mask_token_id: its mask token.
        end_token_id: token that ends a row; None: rows end when no mask is left.
        steps: denoising steps.
        tokenizer: needed by `generate`, `chat` and `infill`; `from_pretrained` brings it.
        settings: further settings of `DiffusionGenerationConfig`.

    Example:

        inference = DiffusionInference(model, mask_token_id, end_token_id, steps=10)
        filled = inference(tokenizer(["2+2=<|mask|>"], return_tensors="pt"))
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mask_token_id: int,
        end_token_id: int | None,
        steps: int | None = 10,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.settings = {"mask_token_id": mask_token_id, "eos_token_id": end_token_id, "steps": steps, **settings}
        DiffusionGenerationConfig(**self.settings)  # a wrong setting fails here, not at the first call

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        steps: int | None = None,
        *,
        device: str | None = None,
        quantization: str | None = None,
        dtype: str | torch.dtype = "auto",
        trust_remote_code: bool = False,
        **settings: Any,
    ) -> DiffusionInference:
        """Loads a converted model, full or adapter (see `load_diffusion_model`); `settings` are decoding settings."""
        model, tokenizer = load_diffusion_model(
            name_or_path, device=device, quantization=quantization, dtype=dtype, trust_remote_code=trust_remote_code
        )
        record = record_of(model)
        if not record.trained:
            logger.warning(
                "%r is converted but not trained as a diffusion model yet: its answers mean nothing", name_or_path
            )
        return cls(model, tokenizer.mask_token_id, tokenizer.eos_token_id, steps, tokenizer, **settings)

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise UserError("`tokenizer` is missing: pass it to DiffusionInference, or use `from_pretrained`.")
        return self.tokenizer

    @property
    def device(self) -> torch.device:
        return base_of(self.model).device

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fills the masks of a batch: (B, L) `input_ids` (and `attention_mask`) -> (B, L) ids without a mask.

        Other tokens stay as they are. When a row's end token is committed and no mask is left before it, the masks after it
        become end tokens.

        Raises:
            ValueError: there is nothing to fill.
        """
        ids = batch["input_ids"].to(self.device)
        attention_mask = batch.get("attention_mask")
        attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask.to(self.device)
        if not ((ids == self.settings["mask_token_id"]) & attention_mask.bool()).any():
            raise UserError(
                f"`input_ids`: the batch has no mask token (id {self.settings['mask_token_id']}), so there is nothing to fill."
            )
        return fill_masks(self.model, ids, attention_mask, DiffusionGenerationConfig(**self.settings)).sequences

    def generate(self, prompts: list[str] | str, **settings: Any) -> list[str]:
        """Continues plain texts; returns the answers alone."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        encoded = [self._tokenizer()(prompt)["input_ids"] for prompt in prompts]
        return self._answer(encoded, settings)

    def chat(self, messages: list[dict] | list[list[dict]], **settings: Any) -> str | list[str]:
        """Answers one conversation (a list of messages) or several."""
        several = bool(messages) and isinstance(messages[0], list)
        encoded = [
            self._tokenizer().apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
            for conversation in (messages if several else [messages])
        ]
        answers = self._answer(encoded, settings)
        return answers if several else answers[0]

    def infill(self, text: str | list[str], max_gap_length: int = 16, **settings: Any) -> str:
        """Fills the mask tokens written into `text`, one token each; or the gaps of any length between several pieces of text.

        `infill("12<|mask|>45=57")` says how long a gap is; `infill(["def add(a, b):", "return c"])` leaves it open, up to
        `max_gap_length` tokens, and each further piece is a further gap.
        """
        # Text follows the gap: it cannot end there.
        chosen = {
            **self.settings,
            "eos_token_id": None,
            "suppress_tokens": [self._tokenizer().eos_token_id],
            **settings,
        }
        chosen |= {"block_length": None, "grow_canvas": False}  # both sides of a gap are seen from the start
        if not isinstance(text, str):
            pieces = [self.tokenizer(piece, add_special_tokens=not i)["input_ids"] for i, piece in enumerate(text)]
            gaps = fill_gaps(self.model, pieces, DiffusionGenerationConfig(**chosen), max_gap_length)
            ids = pieces[0] + [token for gap, piece in zip(gaps, pieces[1:], strict=True) for token in gap + piece]
            return self.tokenizer.decode(ids, skip_special_tokens=True)
        encoded = self.tokenizer([text], return_tensors="pt").to(self.device)
        if not (encoded["input_ids"] == self.settings["mask_token_id"]).any():
            raise UserError(f"`text`: no {self.tokenizer.mask_token} in it, so there is nothing to fill.")
        filled = fill_masks(
            self.model, encoded["input_ids"], encoded["attention_mask"], DiffusionGenerationConfig(**chosen)
        )
        return self.tokenizer.decode(filled.sequences[0], skip_special_tokens=True)

    def _answer(self, encoded: list[list[int]], settings: dict[str, Any]) -> list[str]:
        if not encoded:
            return []
        batch = self.tokenizer.pad({"input_ids": encoded}, padding_side="left", return_tensors="pt").to(self.device)
        sequences = generate(self.model, **batch, **{**self.settings, **settings, "return_dict_in_generate": False})
        return self.tokenizer.batch_decode(sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def continue_autoregressive(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **settings: Any
) -> list[str]:
    """Continues texts from left to right by transformers' own `generate`; `settings` are its settings, and `seed`.

    Raises:
        UserError: an empty prompt, no room for the answer, or a setting that transformers does not know.
    """
    check_autoregressive(settings)
    if not all(prompts):
        raise UserError(
            f"`prompts`: an empty prompt has nothing to continue; start with {tokenizer.eos_token!r} for one."
        )
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(base_of(model).device)
    width = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": 128, **settings}
    limit = getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and width + settings["max_new_tokens"] > limit:
        raise UserError(
            f"`max_new_tokens`: prompt ({width}) and answer ({settings['max_new_tokens']}) exceed the model's {limit} positions."
        )
    # As in unmasking: a temperature above 0 samples, 0 is greedy.
    temperature = settings.pop("temperature", None)
    sampling = settings.pop("do_sample", bool(temperature)) and temperature != 0
    settings |= {"do_sample": sampling, **({"temperature": temperature} if sampling and temperature else {})}
    with torch.random.fork_rng():
        torch.manual_seed(settings.pop("seed", 0))
        sequences = model.generate(**batch, pad_token_id=tokenizer.pad_token_id, **settings)
    return tokenizer.batch_decode(sequences[:, width:], skip_special_tokens=True)


def check_autoregressive(settings: dict[str, Any]) -> None:
    """Raises UserError for settings that `continue_autoregressive` does not know, those of unmasking for one."""
    if unknown := sorted(set(settings) - set(vars(GenerationConfig())) - {"seed"}):
        raise UserError(f"`generation`: {unknown} are no settings of left-to-right decoding; leave them out.")
