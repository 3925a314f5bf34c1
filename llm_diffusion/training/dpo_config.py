"""Settings of `DiffusionDPOTrainer`, checked when they are made.

Trade-off: one flat dataclass over the host's, so that every tool that reads TRL's configs reads this. Alternative: nested groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig

from .. import UserError
from ..objective.preference_noise import SCORES
from .sft_config import set_trl_defaults


@dataclass
class DiffusionDPOConfig(DPOConfig):
    """Settings of `DiffusionDPOTrainer`: every keyword of `trl.DPOConfig`, and these.

    > Parameters that control the score, the estimate that takes the place of a text's log-probability

        score: "elbo" (the default; unbiased for the NELBO) or "trajectory" (one denoising run, every token scored once when it is
            revealed: a looser bound with less noise), see `preference_noise`.
        num_draws: of "elbo": masks at stratified times, one forward each.
        initial_draws: of "elbo": draws at the first step, which grow geometrically to `num_draws` over the run; None: all from the start.
            The noise of a score difference grows with the distance of the policy from its reference, so few are enough at first.
        initial_diffusion_steps: of "trajectory": its steps at first.
        num_steps: of "trajectory": its steps at the end of the run and in evaluation; None: as at first.

    > Parameters that control the conversion (of a policy that carries no record of one, see `load_diffusion_model`)

        attention, block_length, clean_context, right_shift_logits, time_embedding, mask_token_id: as in `DiffusionSFTConfig`.

    > Parameters whose default differs from the host's: `bf16` is off where there is no CUDA (bf16 is emulated on most CPUs).

    Raises:
        ValueError: a value out of range, or a setting of the host that means nothing here: `ld_alpha` and `use_weighting` (weights of
            single tokens by their autoregressive probability), dropout (policy and reference would not be asked alike).
    """

    score: str = field(default="elbo", metadata={"help": "elbo or trajectory."})
    num_draws: int = field(default=8, metadata={"help": "Masks that an ELBO score is the mean of."})
    initial_draws: int | None = field(default=None, metadata={"help": "Draws at the first step; None: num_draws."})
    initial_diffusion_steps: int = field(default=20, metadata={"help": "Steps of a trajectory score at first."})
    num_steps: int | None = field(default=None, metadata={"help": "Steps of a trajectory score at the end."})
    attention: str | None = field(default=None, metadata={"help": "bidirectional or block."})
    block_length: int | None = field(default=None, metadata={"help": "Tokens of a block."})
    clean_context: str | None = field(
        default=None, metadata={"help": "How finished blocks see themselves: causal or block."}
    )
    right_shift_logits: bool | None = field(default=None, metadata={"help": "Hidden state i-1 predicts token i."})
    time_embedding: bool | None = field(default=None, metadata={"help": "Tell the model the noise level."})
    mask_token_id: int | None = field(default=None, metadata={"help": "A token of the vocabulary as the mask."})

    def __post_init__(self) -> None:
        set_trl_defaults(self)
        if self.truncation_mode != "keep_start":
            raise UserError(
                f"`truncation_mode`={self.truncation_mode!r} would cut prompts away; leave it at 'keep_start' and set `max_length`."
            )
        super().__post_init__()
        if not self.beta > 0:
            raise UserError(f"`beta` must be above 0, got {self.beta}.")
        if self.score not in SCORES:
            raise UserError(f"`score` must be one of {SCORES}, got {self.score!r}.")
        for name in ("num_draws", "initial_draws", "initial_diffusion_steps", "num_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"`{name}` must be at least 1, got {value}.")
        for first, last in (("initial_draws", "num_draws"), ("initial_diffusion_steps", "num_steps")):
            low, high = getattr(self, first), getattr(self, last)
            if low is not None and high is not None and low > high:
                raise UserError(f"`{first}` ({low}) must not be above `{last}` ({high}).")
        self._check_trl_settings()

    def _check_trl_settings(self) -> None:
        if self.ld_alpha is not None or self.use_weighting:
            name = "use_weighting" if self.use_weighting else "ld_alpha"
            raise UserError(
                f"`{name}` weighs tokens by autoregressive probabilities, which a score has none of; leave it out."
            )
        if not self.disable_dropout:
            raise UserError(
                "`disable_dropout` must be true: policy and reference are asked about the same masks alike."
            )
        if self.padding_free:
            raise UserError("`padding_free` is not supported: rows of a pair are padded to one length.")
        if self.precompute_ref_log_probs and self.draws_at(0.0) != self.draws_at(1.0):
            raise UserError(
                "`precompute_ref_log_probs` stores scores of a fixed number of draws; leave `initial_draws` and `num_steps` out."
            )

    def draws_at(self, progress: float) -> int:
        """Forwards that a score takes when this share of the run is done."""
        if self.score == "elbo":
            first, last = self.initial_draws or self.num_draws, self.num_draws
        else:
            first, last = self.initial_diffusion_steps, self.num_steps or self.initial_diffusion_steps
        return round(first * (last / first) ** progress)
