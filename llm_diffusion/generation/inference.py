"""Text in, text out: a converted model and its tokenizer behind four verbs; and gaps of unknown length between pieces of text."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from .. import UserError
from ..data.rows import Place, read_turns
from ..models.checkpoints import best_device
from ..models.loading import load_diffusion_model
from ..models.patching import base_of
from ..models.record import layered, record_of
from ..models.sampling import OnStep
from ..models.smollm2 import answering
from ..models.special_tokens import end_token_ids, prompt_ids, text_ids
from .canvas import fill_masks
from .config import DiffusionGenerationConfig, check_given, check_room, decoding_settings
from .generate import generate
from .inputs import checked_inputs, checked_texts

logger = logging.getLogger(__name__)


class DiffusionInference:
    """Iterative unmasking with a diffusion language model.

    Args:
        model: a converted model.
        mask_token_id: its mask token.
        end_token_id: token that ends a row, or several; None: rows end when no mask is left.
        steps: denoising steps; None: none are set.
        tokenizer: needed by `generate`, `chat` and `infill`; `from_pretrained` brings it.
        settings: further ones of `UnmaskingSettings`; those of a call win over them.

    Example:

        inference = DiffusionInference(model, mask_token_id, end_token_id, steps=10)
        filled = inference(tokenizer(["2+2=<|mask|>"], return_tensors="pt"))
    """

    def __init__(
        self,
        model: torch.nn.Module,
        mask_token_id: int,
        end_token_id: int | list[int] | None,
        steps: int | None = 10,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **settings: Any,
    ) -> None:
        if not isinstance(model, torch.nn.Module):
            raise UserError(f"`model` must be a converted model, got {type(model).__name__}.")
        if not isinstance(tokenizer, PreTrainedTokenizerBase | None):
            raise UserError(f"`tokenizer` must be one of transformers, got {type(tokenizer).__name__}.")
        mask_token_id = record_of(model).mask_token_id if mask_token_id is None else mask_token_id
        if mask_token_id is None:
            raise UserError(
                "`mask_token_id` is missing: the model is not converted; pass it, or convert the model first."
            )
        self.model, self.tokenizer = model, tokenizer
        self.settings = {"mask_token_id": mask_token_id, "eos_token_id": end_token_id, **settings}
        if steps is not None:
            self.settings["steps"] = steps
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
        """Loads a converted model, see `load_diffusion_model`; `settings` are over those of `decoding_settings`.

        "smollm2" is the embedded drafter over its base, by default in bf16 where the processor multiplies that itself.
        """
        name_or_path, dtype = answering(name_or_path, dtype, device or best_device())
        model, tokenizer = load_diffusion_model(
            name_or_path, device=device, quantization=quantization, dtype=dtype, trust_remote_code=trust_remote_code
        )
        if not record_of(model).trained:
            logger.warning("%r is converted but not trained yet: its answers mean nothing", name_or_path)
        chosen = decoding_settings(model, settings if steps is None else {**settings, "steps": steps})
        steps, _ = chosen.pop("steps", None), chosen.pop("mask_token_id")
        ends = end_token_ids(model, tokenizer) or None
        return cls(model, tokenizer.mask_token_id, ends, steps, tokenizer, **chosen)

    @property
    def device(self) -> torch.device:
        return base_of(self.model).device

    def __call__(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Fills the masks of a batch: (B, L) `input_ids` (and `attention_mask`) -> (B, L) ids without a mask.

        Other tokens stay as they are. When a row's end token is committed and no mask is left before it, the masks after it
        become end tokens.
        """
        if not isinstance(batch, Mapping) or "input_ids" not in batch:
            raise UserError(f"`batch` must be a mapping with `input_ids`, got {batch!r:.80}.")
        given = (batch["input_ids"], batch.get("attention_mask"))
        given = (
            value.to(self.device) if isinstance(value, torch.Tensor) and not value.is_meta else value for value in given
        )
        ids, mask = checked_inputs(self.model, *given, left_padded=False)
        check_room(self.model, ids.shape[1], 0, "input_ids")
        if not ((ids == self.settings["mask_token_id"]) & mask.bool()).any():
            raise UserError(f"`input_ids`: no mask token (id {self.settings['mask_token_id']}), nothing to fill.")
        # What follows a gap is seen from the start, and decoded behind an end too.
        whole = BOTH_SIDES if self.settings.get("grow_canvas") else {"length_quantile": None}
        return fill_masks(self.model, ids, mask, DiffusionGenerationConfig(**self.settings | whole)).sequences

    def generate(self, prompts: list[str] | str, **settings: Any) -> list[str]:
        """Continues plain texts; returns the answers alone."""
        prompts = checked_texts(prompts, "prompts")
        return self._answer([prompt_ids(self._tokenizer(), prompt) for prompt in prompts], settings)

    def chat(
        self,
        messages: list[dict] | list[list[dict]],
        tools: list[dict] | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        **settings: Any,
    ) -> str | list[str]:
        """Answers one conversation (a list of messages) or several; `tools` and `chat_template_kwargs` are for the chat template."""
        several = isinstance(messages, list) and bool(messages) and isinstance(messages[0], list)
        template = (chat_template_kwargs or {}) | ({"tools": tools} if tools else {})
        encoded = [
            prompt_ids(self._tokenizer(), read_turns(turns, "messages", Place("chat", row)), **template)
            for row, turns in enumerate(messages if several else [messages])
        ]
        answers = self._answer(encoded, settings)
        return answers if several or len(answers) > 1 else answers[0]

    def infill(self, text: str | list[str], max_gap_length: int = 16, **settings: Any) -> str:
        """Fills the mask tokens in `text`, one token each; or gaps of up to `max_gap_length` tokens between several pieces of it.

        infill("12<|mask|>45=57")    infill(["def add(a, b):", "return c"])
        """
        return self._tokenizer().decode(self.infill_ids(text, max_gap_length, **settings), skip_special_tokens=True)

    def infill_ids(
        self, text: str | list[str], max_gap_length: int = 16, on_step: OnStep | None = None, **settings: Any
    ) -> list[int]:
        """The same as tokens; `on_step` sees them being filled, see `fill_masks`, once the lengths of the gaps are known."""
        tokenizer, pieces, mask = self._tokenizer(), checked_texts(text, "text"), self.settings["mask_token_id"]
        _check_both_sides(self.model)
        # Text follows the gap: it cannot end there, and is seen from the start.
        config = DiffusionGenerationConfig(**layered({**self.settings, "eos_token_id": None}, settings) | BOTH_SIDES)
        config.suppress_tokens = [*(config.suppress_tokens or []), *end_token_ids(self.model, tokenizer)]
        if isinstance(text, str):
            ids = text_ids(tokenizer, text)
        else:
            pieces = [text_ids(tokenizer, piece, add_special_tokens=not i) for i, piece in enumerate(pieces)]
            gaps = fill_gaps(self.model, pieces, config, max_gap_length)
            again = on_step is not None or any(mask in piece for piece in pieces)
            gaps = [[mask] * len(gap) for gap in gaps] if again else gaps
            ids = pieces[0] + [token for gap, piece in zip(gaps, pieces[1:], strict=True) for token in gap + piece]
            if not again:
                return ids
        if mask not in ids:
            raise UserError(f"`text`: no {tokenizer.mask_token} in it, so there is nothing to fill.")
        check_room(self.model, len(ids), 0, "text")
        canvas = torch.tensor([ids], device=self.device)
        return fill_masks(self.model, canvas, torch.ones_like(canvas), config, on_step=on_step).sequences[0].tolist()

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        if self.tokenizer is None:
            raise UserError("`tokenizer` is missing: pass it to DiffusionInference, or use `from_pretrained`.")
        return self.tokenizer

    def _answer(self, encoded: list[list[int]], settings: dict[str, Any]) -> list[str]:
        if not encoded:
            return []
        return self.tokenizer.batch_decode(self.answer_ids(encoded, **settings), skip_special_tokens=True)

    def answer_ids(self, encoded: list[list[int]], **settings: Any) -> torch.Tensor:
        """(B, n) tokens that answer prompts given as tokens, at least one, padded behind their ends."""
        batch = self._tokenizer().pad({"input_ids": encoded}, padding_side="left", return_tensors="pt").to(self.device)
        chosen = layered(self.settings, {**settings, "return_dict_in_generate": False})
        return generate(self.model, **batch, **chosen)[:, batch["input_ids"].shape[1] :]


def continue_autoregressive(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **settings: Any
) -> list[str]:
    """Continues texts from left to right by transformers' own `generate`; `settings` are its settings, and `seed`.

    Raises:
        UserError: an empty prompt, no room for the answer, or a setting that transformers does not know.
    """
    check_autoregressive(settings)
    if not all(prompts):
        raise UserError(f"`prompts`: an empty one has nothing to continue; start with {tokenizer.eos_token!r} for one.")
    ids = [prompt_ids(tokenizer, prompt) for prompt in prompts]
    settings = {"eos_token_id": end_token_ids(model, tokenizer) or None, **settings}
    batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt").to(base_of(model).device)
    width = batch["input_ids"].shape[1]
    settings = {"max_new_tokens": 128, **settings}
    check_room(model, width, settings["max_new_tokens"])
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
        raise UserError(f"{unknown} are no settings of left-to-right decoding; leave them out.")
    check_given(settings)


# Of a canvas with text on both sides of its masks.
BOTH_SIDES = {"block_length": None, "grow_canvas": False, "length_quantile": None}


def _check_both_sides(model: torch.nn.Module) -> None:
    record = record_of(model)
    if record.mode.has_blocks:
        raise UserError(
            f"`attention`={record.attention!r} does not see the text behind a gap; use a bidirectional model."
        )


@torch.no_grad()
def fill_gaps(
    model: torch.nn.Module,
    pieces: list[list[int]],
    settings: DiffusionGenerationConfig,
    max_gap_length: int = 16,
    batch_size: int = 16,
) -> list[list[int]]:
    """The tokens of every gap between neighbouring pieces, [piece, gap, piece, gap, piece].

    A mask stands for one token, so every length is tried, and the filling with the highest mean log-probability of its tokens when
    committed is taken, as beam search compares hypotheses of different lengths. Of several gaps the leftmost is chosen first, with the
    text up to the next gap; then all are filled together once more, where each sees everything.

    Args:
        pieces: token ids; the first and the last may be empty, which leaves an open end.
        settings: how each candidate is filled. End tokens end nothing here.
        max_gap_length: most tokens of a gap, at least 1.
        batch_size: candidates filled at once.

    Returns:
        One list of tokens for each of the `len(pieces) - 1` gaps.
    """
    _check_both_sides(model)
    if len(pieces) < 2:
        raise UserError(f"`pieces`: a gap lies between two pieces of text, got {len(pieces)}.")
    if isinstance(max_gap_length, bool) or not isinstance(max_gap_length, int) or max_gap_length < 1:
        raise UserError(f"`max_gap_length` must be a whole number, at least 1, got {max_gap_length!r}.")
    check_room(model, sum(map(len, pieces)), max_gap_length * (len(pieces) - 1), "max_gap_length")
    settings = copy.copy(settings)
    vars(settings).update(**BOTH_SIDES, output_history=True, eos_token_id=None)
    before, lengths = list(pieces[0]), []
    for behind in pieces[1:]:
        fillings = []
        for first in range(1, max_gap_length + 1, batch_size):
            candidates = [[n] for n in range(first, min(first + batch_size, max_gap_length + 1))]
            fillings += _fill(model, [before, behind], candidates, settings)
        gap = max(fillings, key=lambda filling: filling[0])[1][0]
        lengths.append(len(gap))
        before += gap + list(behind)
    return [gap] if len(lengths) == 1 else _fill(model, pieces, [lengths], settings)[0][1]


def _fill(
    model: torch.nn.Module, pieces: list[list[int]], candidates: list[list[int]], settings: DiffusionGenerationConfig
) -> list[tuple[float, list[list[int]]]]:
    """For each choice of lengths, how sure the filling is and its gaps."""
    rows = []
    for lengths in candidates:
        row = list(pieces[0])
        for n, piece in zip(lengths, pieces[1:], strict=True):
            row += [settings.mask_token_id] * n + list(piece)
        rows.append(torch.tensor(row, device=base_of(model).device))
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    # A mask token in a piece is one gap more, of one token.
    output = fill_masks(model, ids, mask, settings)
    filled = (ids == settings.mask_token_id) & mask.bool()
    sure = torch.where(filled, output.confidence[-1].clamp(min=1e-9).log(), 0.0).sum(-1) / filled.sum(-1)
    result = []
    for row, lengths, score in zip(output.sequences.tolist(), candidates, sure.tolist(), strict=True):
        gaps, start = [], len(pieces[0])
        for n, piece in zip(lengths, pieces[1:], strict=True):
            gaps.append(row[start : start + n])
            start += n + len(piece)
        result.append((score, gaps))
    return result
