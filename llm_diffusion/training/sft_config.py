"""Settings of `DiffusionSFTTrainer`, checked when they are made.

Trade-off: one flat dataclass over the host's, so that every tool that reads TRL's configs reads this. Alternative: nested groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments
from trl import SFTConfig

from .. import UserError
from ..objective.annealing import Annealing
from ..objective.losses import WEIGHTS
from ..objective.noise_schedules import get_noise_schedule

TARGETS = ("causal", "all")
DIVERGENCES = ("kl", "tv")
TAILS = ("eos", "pad")
NORMALIZATIONS = ("token", "sequence", "length", "masked")


def set_trl_defaults(args: TrainingArguments) -> None:
    """What every config of ours does before the host looks at it."""
    if args.bf16 is None and not torch.cuda.is_available():
        args.bf16 = False
    # TRL still sets the old names, which transformers deprecates: handed over here, both names keep working.
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if getattr(args, new) is None:
            setattr(args, new, getattr(args, old))


@dataclass
class DiffusionSFTConfig(SFTConfig):
    """Settings of `DiffusionSFTTrainer`: every keyword of `trl.SFTConfig`, and these.

    > Parameters that control the conversion (of a model that is not converted yet)

        attention: "bidirectional" (the default), "block" or "lossless" (adapters draft, the base verifies).
        block_length: tokens of a block (default 4; 8 of a lossless draft).
        clean_context: how finished blocks see themselves: "causal" (the default) or "block".
        right_shift_logits: whether hidden state i - 1 predicts token i; None is the recommended read-out.
        time_embedding: whether the model is told the noise level (default False).
        mask_token_id: any token of the vocabulary as the mask; None is the tokenizer's own, or a new one.

    > Parameters that control the way from causal attention, see `annealing.Annealing`

        annealing: "soft", "stochastic" or "block" (blocks that grow; the one way for block attention); None: the target at once.
        annealing_steps: optimiser steps since the model was autoregressive until the target is reached; None: to the end of this run.
        annealing_schedule: "linear", "cosine", "exponential" or "step".
        initial_causal_ratio, final_causal_ratio: 1 is causal, 0 bidirectional; evaluation and generation are at the final one.
        annealing_decay: of "exponential".
        annealing_points: of "step": [[step, share of the way still to go], …].

    > Parameters that control the objective

        noise_schedule: "linear", "cosine", "beta_linear" or "beta_cosine"; None is the one the model was converted with.
        loss_weight: "elbo" (w(t), an unbiased bound), "uniform" (1), "clipped", "snr" or "cart", see `losses.loss_weights`.
        min_mask_probability, max_mask_probability: range of the mask probability; narrower than (0, 1) is not the ELBO.
        exact_mask_count: draw how many tokens are masked, then which; the same bound with less noise, whatever the schedule.
        complementary_masks: score every row twice, the second time with the other tokens masked: each token once, two forwards.
        random_replacement: probability that a trained token that is seen is replaced by a random one, in [0, 1): context as flawed as
            the model's own; still a bound, see `DataCollatorForMaskedDiffusion.corrupt`.
        ar_loss_weight: weight of next-token prediction on the clean half, beside the bound (block attention only).
        normalization: what the loss of an optimiser step is divided by: "token" (its maskable tokens; the NELBO a token), "sequence"
            (every row by its own maskable tokens, then by rows; LLaDA's fine-tuning), "length" (all tokens, prompts too) or "masked"
            (its masked tokens; no bound). In each, 1 x 8 and 8 x 1 rows give the same gradient.

    > Parameters that control what the autoregressive model teaches: the base without its adapters, causal, one forward more

        distillation_weight: share of the labels that its distribution takes the place of, in [0, 1].
        distillation_targets: "causal" (only tokens whose right-hand context is hidden, where it is right) or "all" masked tokens.
        distillation_divergence: "kl", or "tv": total variation, which is the share of drafted tokens that the base rejects.
        distillation_hidden_weight: weight of the relative squared distance to the hidden state that it reads the token from.
        on_policy_share: share of rows in which masked text is replaced by what the model itself says, one more forward; they are
            masked again and learn from the teacher alone. Needs `distillation_weight`.

    > Parameters that control the canvas

        full_mask_share: of lossless drafts, the share of blocks that are masked whole; the others are masked as in diffusion.
        eos_tail: longest tail of end tokens after an answer.
        random_canvas: share of answers cut at a random place, so that a canvas may end before its answer does.
        max_canvas: tokens of a canvas whatever the answer's length is, in a share `random_canvas` of the rows 1 to this many: what teaches
            where answers end (bidirectional attention); None: answer and tail.
        text_tails: whether whole texts that come to their end get tails and canvases too, not answers alone.
        tail: what stands behind the end: "eos" (the end token again) or "pad" (the tokenizer's padding token, which must be another).
        eos_tail_weight: what a token of the tail weighs, of 1.
        pad_mask_ratio: mask rate of the tail over that of the text, in (0, 1]; every token is weighed by the inverse of its own.
        pad_annealing_steps: optimiser steps in which that ratio grows from nothing to `pad_mask_ratio`; None: it starts there.
        first_step_share: share of rows masked whole, as at the first step of decoding, beside the bound.

    > Parameters whose default differs from the host's: `bf16` is off where there is no CUDA (bf16 is emulated on most CPUs);
        `logging_nan_inf_filter` is off: the host's filter hides a loss that is no number, while its gradient ruins the weights.
    """

    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Hide losses that are no numbers."})
    attention: str | None = field(default=None, metadata={"help": "bidirectional, block or lossless."})
    block_length: int | None = field(default=None, metadata={"help": "Tokens of a block."})
    clean_context: str | None = field(
        default=None, metadata={"help": "How finished blocks see themselves: causal or block."}
    )
    right_shift_logits: bool | None = field(default=None, metadata={"help": "Hidden state i-1 predicts token i."})
    time_embedding: bool | None = field(default=None, metadata={"help": "Tell the model the noise level."})
    mask_token_id: int | None = field(default=None, metadata={"help": "A token of the vocabulary as the mask."})
    annealing: str | None = field(default=None, metadata={"help": "soft, stochastic or block."})
    annealing_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps until the target is reached; None: this run's."}
    )
    annealing_schedule: str = field(default="cosine", metadata={"help": "linear, cosine, exponential or step."})
    initial_causal_ratio: float = field(default=1.0, metadata={"help": "1 is causal."})
    final_causal_ratio: float = field(default=0.0, metadata={"help": "0 is bidirectional."})
    annealing_decay: float = field(default=5.0, metadata={"help": "Decay of the exponential schedule."})
    annealing_points: list | None = field(default=None, metadata={"help": "[[step, share], ...] of the step schedule."})
    noise_schedule: str | None = field(default=None, metadata={"help": "See noise_schedules; None: as converted."})
    loss_weight: str = field(default="elbo", metadata={"help": "elbo, uniform, clipped, snr or cart."})
    min_mask_probability: float = field(
        default=0.0, metadata={"help": "Lowest mask probability; above 0 is not the ELBO."}
    )
    max_mask_probability: float = field(
        default=1.0, metadata={"help": "Highest mask probability; below 1 is not the ELBO."}
    )
    exact_mask_count: bool = field(default=False, metadata={"help": "Draw the number of masks, then which."})
    complementary_masks: bool = field(default=False, metadata={"help": "Score every row twice, under opposite masks."})
    ar_loss_weight: float = field(default=0.0, metadata={"help": "Weight of next-token prediction on the clean half."})
    random_replacement: float = field(default=0.0, metadata={"help": "Share of seen tokens replaced by random ones."})
    distillation_weight: float = field(default=0.0, metadata={"help": "Share of the AR model's word in the labels."})
    distillation_targets: str = field(default="causal", metadata={"help": "causal or all."})
    distillation_divergence: str = field(default="kl", metadata={"help": "kl or tv."})
    full_mask_share: float = field(default=0.7, metadata={"help": "Share of lossless drafts that are masked whole."})
    distillation_hidden_weight: float = field(default=0.0, metadata={"help": "Weight of the AR model's hidden states."})
    on_policy_share: float = field(default=0.0, metadata={"help": "Share of rows with the model's own words."})
    normalization: str = field(default="token", metadata={"help": "token, sequence, length or masked."})
    eos_tail: int = field(default=16, metadata={"help": "Longest tail of end tokens after an answer."})
    random_canvas: float = field(default=0.5, metadata={"help": "Share of answers cut at a random place."})
    max_canvas: int | None = field(default=None, metadata={"help": "Tokens of a canvas, whatever the answer's length."})
    text_tails: bool = field(default=False, metadata={"help": "Give whole texts tails and canvases too."})
    tail: str = field(default="eos", metadata={"help": "What stands behind the end: eos or pad."})
    eos_tail_weight: float = field(default=1.0, metadata={"help": "What a token of the tail weighs."})
    pad_mask_ratio: float = field(default=1.0, metadata={"help": "Mask rate of the tail over that of the text."})
    pad_annealing_steps: int | None = field(default=None, metadata={"help": "Steps in which that ratio grows."})
    first_step_share: float = field(default=0.0, metadata={"help": "Share of rows masked whole, beside the bound."})

    def __post_init__(self) -> None:
        set_trl_defaults(self)
        super().__post_init__()
        self._check_noise()
        self._check_teaching()
        if self.ar_loss_weight < 0:
            raise UserError(f"`ar_loss_weight` must not be negative, got {self.ar_loss_weight}.")
        self._check_canvas()
        if self.packing and self.packing_strategy == "wrapped":
            raise UserError(
                "`packing_strategy`: 'wrapped' forgets where texts end, so they would see each other; use 'bfd'."
            )
        if self.padding_free and not self.packing:
            raise UserError("`padding_free` is not supported: rows without padding come from `packing`.")
        self.annealing_to()
        if self.loss_type != "nll":
            raise UserError(f"`loss_type` must be 'nll' (the ELBO replaces it), got {self.loss_type!r}.")

    def _check_noise(self) -> None:
        if self.noise_schedule is not None:
            get_noise_schedule(self.noise_schedule)
        if self.normalization not in NORMALIZATIONS:
            raise UserError(f"`normalization` must be one of {NORMALIZATIONS}, got {self.normalization!r}.")
        if self.loss_weight not in WEIGHTS:
            raise UserError(f"`loss_weight` must be one of {WEIGHTS}, got {self.loss_weight!r}.")
        if not 0 <= self.min_mask_probability < self.max_mask_probability <= 1:
            raise UserError(
                "`min_mask_probability` and `max_mask_probability` must satisfy 0 <= min < max <= 1, got "
                f"{self.min_mask_probability} and {self.max_mask_probability}."
            )
        if self.exact_mask_count and (self.min_mask_probability, self.max_mask_probability) != (0.0, 1.0):
            raise UserError(
                "`exact_mask_count` draws every count from one to all; leave the mask probabilities at 0 and 1."
            )
        if self.exact_mask_count and self.complementary_masks:
            # A row with every token masked has an empty complement, so the second pass never sees a full mask.
            raise UserError("`exact_mask_count` and `complementary_masks` together are biased; choose one of them.")

    def _check_canvas(self) -> None:
        for name, least in (("eos_tail", 0), ("eos_tail_weight", 0), ("max_canvas", 1), ("pad_annealing_steps", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"`{name}` must be at least {least}, got {value}.")
        for name in ("random_canvas", "first_step_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if not 0 < self.pad_mask_ratio <= 1:
            raise UserError(f"`pad_mask_ratio` must be in (0, 1], got {self.pad_mask_ratio}.")
        if self.tail not in TAILS:
            raise UserError(f"`tail` must be one of {TAILS}, got {self.tail!r}.")
        for name in ("exact_mask_count", "complementary_masks"):
            if getattr(self, name) and (self.pad_mask_ratio < 1 or self.pad_annealing_steps or self.first_step_share):
                raise UserError(
                    f"`{name}` counts masks at one rate for all tokens; leave it, or leave `pad_mask_ratio`, `pad_annealing_steps` and "
                    "`first_step_share` out."
                )

    @property
    def sizes_canvases(self) -> bool:
        """Whether anything is asked that teaches where texts end."""
        plain = self.max_canvas is None and self.pad_annealing_steps is None and self.tail == "eos"
        return not plain or self.text_tails or self.pad_mask_ratio < 1 or self.first_step_share > 0

    @property
    def uses_teacher(self) -> bool:
        """Whether the autoregressive model is asked anything."""
        return bool(self.distillation_weight or self.distillation_hidden_weight)

    def _check_teaching(self) -> None:
        for name in ("distillation_weight", "on_policy_share", "full_mask_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"`{name}` must be in [0, 1], got {getattr(self, name)}.")
        if not 0 <= self.random_replacement < 1:
            raise UserError(f"`random_replacement` must be in [0, 1), got {self.random_replacement}.")
        if self.distillation_hidden_weight < 0:
            raise UserError(
                f"`distillation_hidden_weight` must not be negative, got {self.distillation_hidden_weight}."
            )
        if self.distillation_divergence not in DIVERGENCES:
            raise UserError(
                f"`distillation_divergence` must be one of {DIVERGENCES}, got {self.distillation_divergence!r}."
            )
        if self.distillation_targets not in TARGETS:
            raise UserError(f"`distillation_targets` must be one of {TARGETS}, got {self.distillation_targets!r}.")
        if self.on_policy_share and not self.distillation_weight:
            raise UserError(
                "`on_policy_share`: the model's own words have no labels, only the AR model can judge them; set "
                "`distillation_weight` too."
            )

    def annealing_to(self, last_step: int = 1) -> Annealing | None:
        """The checked settings of annealing, if there is any; `last_step` is where this run ends."""
        if self.annealing is None:
            if self.final_causal_ratio:
                raise UserError("`final_causal_ratio` belongs to `annealing`; set that to 'soft' or 'stochastic'.")
            return None
        annealing = Annealing(
            mode=self.annealing,
            total_steps=max(last_step, 1) if self.annealing_steps is None else self.annealing_steps,
            schedule=self.annealing_schedule,
            initial=self.initial_causal_ratio,
            final=self.final_causal_ratio,
            decay=self.annealing_decay,
            points=self.annealing_points,
        )
        if annealing.mode == "block" and self.max_length is None:
            raise UserError("`annealing`='block' needs a `max_length`, at which blocks stop growing.")
        if self.attention in ("block", "lossless") and annealing.mode != "block":
            raise UserError(f"`annealing`: block attention anneals by growing blocks, 'block', got {annealing.mode!r}.")
        return annealing
