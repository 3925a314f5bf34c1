"""Settings of the trainers: flat dataclasses over TRL's, so that every tool that reads TRL's configs reads these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from accelerate.utils import parse_flag_from_env
from transformers import TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import DPOConfig, GRPOConfig, KTOConfig, SFTConfig

from .. import UserError
from ..models.record import ConversionSettings
from ..objective.annealing import Annealing, AnnealingSettings
from ..objective.estimators import SCORES
from ..objective.forward_process import NoiseSettings, check_noise
from ..objective.modes import MODES
from ..objective.settings import check_settings, check_value, redacted, setting
from .arguments import INHERITED, PREFERENCE_LOSSES, check_trainer, set_trl_defaults


def own_config(args: TrainingArguments | None, kind: type[TrainingArguments], name: str) -> TrainingArguments:
    """Arguments as `kind`, one of ours: TRL's config that it extends, and transformers' own, are read as one; None: its defaults."""
    if args is None or isinstance(args, kind):
        return args or kind(name)
    if not isinstance(args, TrainingArguments) or type(args) not in kind.__mro__:
        raise TypeError(f"`args` must be a {kind.__name__}, got {type(args).__name__}.")
    values = args.to_dict()
    if issubclass(kind, GRPOConfig):
        # TRL has set the first beside `steps_per_generation`, and takes one; its dropout is on.
        values |= {"generation_batch_size": None, "disable_dropout": True}
    hidden = {name: getattr(args, name) for name in values if name.endswith("_token")}  # eos_token for one
    return kind(**{**values, **hidden})


class WithoutSecrets:
    """Settings whose tokens no logger gets, those in `model_init_kwargs` neither."""

    def to_dict(self) -> dict[str, Any]:
        return redacted(super().to_dict())


class CausalSFTConfig(WithoutSecrets, SFTConfig):
    """TRL's own settings, for training from left to right."""

    evaluated = ("loss", "entropy", "mean_token_accuracy", "num_tokens")  # metrics to choose the best model by

    def __post_init__(self) -> None:
        super().__post_init__()
        check_trainer(self)


@dataclass
class DiffusionSFTConfig(WithoutSecrets, ConversionSettings, AnnealingSettings, NoiseSettings, SFTConfig):
    """Settings of `DiffusionSFTTrainer`: every keyword of `trl.SFTConfig`, and these; docs/settings.md has them in tables.

    > Parameters that control the conversion of a model that is not converted yet: see `ConversionSettings`

    > Parameters that control annealing from causal attention: see `AnnealingSettings`

    > Parameters that control noise, objective and canvas: see `NoiseSettings`, and `complementary_masks` and `normalization` here

    > Parameters that control what the autoregressive model teaches (the base without its adapters, causal, one forward more):
        `distillation_…` and `on_policy_share`

    > Parameters whose default differs from TRL's: `bf16` is off where there is no CUDA (bf16 is emulated on most CPUs);
        `logging_nan_inf_filter` is off: that filter hides a non-finite loss, while its gradient ruins the weights.
    """

    logging_nan_inf_filter: bool = setting(False, "Hide non-finite losses.")
    complementary_masks: bool = setting(
        False, "Score every row twice, the second time with the other tokens masked: each token once, two forwards."
    )
    normalization: str = setting(
        "token",
        "What the loss of an optimiser step is divided by: `token` (its maskable tokens; the NELBO a token), `sequence` (every row "
        "by its own maskable tokens, then by rows; LLaDA's fine-tuning), `length` (all tokens, prompts too) or `masked` (its masked "
        "tokens; no bound). In each, 1 x 8 and 8 x 1 rows give the same gradient.",
        choices=("token", "sequence", "length", "masked"),
    )
    distillation_weight: float = setting(
        0.0, "Share of the labels that the AR model's distribution takes the place of.", min=0, max=1
    )
    distillation_divergence: str = setting(
        "kl",
        "`kl`, or `tv`: total variation, which is the share of drafted tokens that the base rejects.",
        choices=("kl", "tv"),
    )
    distillation_hidden_weight: float = setting(
        0.0,
        "Weight of the relative squared distance to the hidden state that the AR model reads the token from.",
        min=0,
    )
    on_policy_share: float = setting(
        0.0,
        "Share of rows in which masked text is replaced by what the model itself predicts, one more forward; they are masked again and "
        "learn from the teacher alone. Needs `distillation_weight`.",
        min=0,
        max=1,
    )

    def __post_init__(self) -> None:
        set_trl_defaults(self)
        check_settings(self, inherited=INHERITED)
        super().__post_init__()
        check_trainer(self)
        self._check_noise()
        self._check_annealing()
        if self.on_policy_share and not self.distillation_weight:
            raise UserError(
                "`on_policy_share`: the model's own tokens have no labels, only the AR model can judge them; set "
                "`distillation_weight` too."
            )
        if self.packing and self.packing_strategy == "wrapped":
            raise UserError(
                "`packing_strategy`: 'wrapped' forgets where texts end, so they would see each other; use 'bfd'."
            )
        if self.padding_free and not self.packing:
            raise UserError("`padding_free` is not supported: rows without padding come from `packing`.")
        if self.loss_type != "nll":
            raise UserError(f"`loss_type` must be 'nll' (the ELBO replaces it), got {self.loss_type!r}.")

    @property
    def evaluated(self) -> tuple[str, ...]:
        """Names of the metrics that an evaluation gives, to choose the best model by; without `attention` those of every mode."""
        names = "loss masked_accuracy masked_nll masked_nll_low_noise masked_nll_middle_noise masked_nll_high_noise masked_entropy mask_ratio"
        of_all = (*names.split(), "entropy", "mean_token_accuracy")
        drafts = self.attention and MODES[self.attention].drafts
        return of_all + ("nelbo", "perplexity_bound") * (not drafts) + ("accepted_length",) * (drafts is not False)

    @property
    def sizes_canvases(self) -> bool:
        """Whether anything is set that teaches where texts end."""
        plain = self.max_canvas is None and self.pad_annealing_steps is None and self.tail == "eos"
        return not plain or self.text_tails or self.pad_mask_ratio < 1 or self.first_step_share > 0

    @property
    def uses_teacher(self) -> bool:
        """Whether the autoregressive model is run as a teacher."""
        return bool(self.distillation_weight or self.distillation_hidden_weight)

    def _check_noise(self) -> None:
        check_noise(self)
        low, high = self.min_mask_probability, self.max_mask_probability
        if self.exact_mask_count and (low, high) != (0.0, 1.0):
            raise UserError(
                "`exact_mask_count` draws every count from one to all; leave the mask probabilities at 0 and 1."
            )
        if self.exact_mask_count and self.complementary_masks:
            # A row with every token masked has an empty complement, so the second pass never sees a full mask.
            raise UserError("`exact_mask_count` and `complementary_masks` together are biased; choose one of them.")
        for name in ("exact_mask_count", "complementary_masks"):
            if getattr(self, name) and (self.pad_mask_ratio < 1 or self.pad_annealing_steps or self.first_step_share):
                raise UserError(
                    f"`{name}` counts masks at one rate for all tokens; leave it, or leave `pad_mask_ratio`, `pad_annealing_steps` and "
                    "`first_step_share` out."
                )

    def _check_annealing(self) -> None:
        self.check_annealing()
        if self.annealing == "block" and self.max_length is None:
            raise UserError("`annealing`='block' needs a `max_length`, at which blocks stop growing.")
        blocks = self.attention is not None and MODES[self.attention].has_blocks
        if blocks and self.annealing not in (None, "block"):
            raise UserError(f"`annealing`: block attention anneals by growing blocks, 'block', got {self.annealing!r}.")

    def annealing_to(self, last_step: int = 1) -> Annealing | None:
        """Annealing in a run that ends at `last_step`; None: there is none."""
        if self.annealing is None:
            return None
        return Annealing(self, max(last_step, 1) if self.annealing_steps is None else self.annealing_steps)


@dataclass
class ScoreSettings:
    """The estimate that takes the place of a text's log-probability, of `DiffusionDPOConfig` and `DiffusionKTOConfig`."""

    evaluated = tuple(  # metrics to choose the best model by
        "loss entropy mean_token_accuracy num_tokens draws rewards/accuracies rewards/margins rewards/chosen rewards/rejected "
        "logps/chosen logps/rejected logits/chosen logits/rejected".split()
    )

    score: str = setting(
        "elbo",
        "`elbo` (unbiased for the NELBO) or `trajectory` (one denoising run, every token scored once when it is revealed: a looser "
        "bound with less noise).",
        choices=SCORES,
    )
    num_draws: int = setting(8, "Of `elbo`: masks at stratified times, one forward each.", min=1)
    initial_draws: int | None = setting(
        None,
        "Of `elbo`: draws at the first step, which grow geometrically to `num_draws`: the noise of a score difference grows with the "
        "distance of the policy from its reference. None: all from the start.",
        min=1,
    )
    initial_diffusion_steps: int = setting(20, "Of `trajectory`: its steps at first.", min=1)
    num_steps: int | None = setting(
        None, "Of `trajectory`: its steps at the end of the run and in evaluation; None: as at first.", min=1
    )

    def check_score(self) -> None:
        """Raises UserError for settings that contradict each other, and for those of TRL that mean nothing to a score."""
        for first, last in (("initial_draws", "num_draws"), ("initial_diffusion_steps", "num_steps")):
            low, high = getattr(self, first), getattr(self, last)
            if low is not None and high is not None and low > high:
                raise UserError(f"`{first}` ({low}) must not be above `{last}` ({high}).")
        check_dropout(self)
        if self.score == "trajectory":
            check_forwards(self, "`score`='trajectory'", "use 'elbo', or weights that are not split")
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


def check_dropout(args: TrainingArguments) -> None:
    why = "policy and reference are compared under the same masks and without noise of their own"
    if not args.disable_dropout:
        raise UserError(f"`disable_dropout` must be true: {why}.")
    if args.neftune_noise_alpha:
        raise UserError(f"`neftune_noise_alpha`: {why}; leave it out.")


def check_forwards(args: TrainingArguments, what: str, remedy: str, zero3: bool = True) -> None:
    """Refuses split weights, of which every forward waits for all processes, where these do different numbers of forwards."""
    fsdp = args.fsdp or parse_flag_from_env("ACCELERATE_USE_FSDP")  # the second by `accelerate launch`
    if fsdp or (zero3 and is_deepspeed_zero3_enabled()):
        raise UserError(
            f"{what} takes as many forwards as the texts of a process need, and under {'FSDP' if fsdp else 'ZeRO-3'} each of them waits "
            f"for all processes; {remedy}."
        )


@dataclass
class DiffusionDPOConfig(WithoutSecrets, ConversionSettings, ScoreSettings, DPOConfig):
    """Settings of `DiffusionDPOTrainer`: every keyword of `trl.DPOConfig`, and these; docs/settings.md has them in tables.

    > Parameters that control the score, the estimate that takes the place of a text's log-probability: see `ScoreSettings`

    > Parameters that control the conversion of a policy that carries no record of one: see `ConversionSettings`

    > Parameters whose default differs from TRL's: `bf16` is off where there is no CUDA (bf16 is emulated on most CPUs).

    Raises:
        UserError: a value out of range, or a setting of TRL that means nothing here: `ld_alpha` and `use_weighting` (weights of
            single tokens by their autoregressive probability), dropout (policy and reference would see different models).
    """

    def __post_init__(self) -> None:
        set_trl_defaults(self)
        check_settings(self, inherited=INHERITED)
        if self.truncation_mode != "keep_start":
            raise UserError(
                f"`truncation_mode`={self.truncation_mode!r} would cut prompts away; leave it at 'keep_start' and set `max_length`."
            )
        super().__post_init__()
        check_trainer(self)
        check_value("loss_type", self.loss_type, list[str], {"choices": PREFERENCE_LOSSES})
        self.check_score()
        self._check_trl_settings()

    def _check_trl_settings(self) -> None:
        if self.ld_alpha is not None or self.use_weighting:
            name = "use_weighting" if self.use_weighting else "ld_alpha"
            raise UserError(
                f"`{name}` weighs tokens by autoregressive probabilities, which a score has none of; leave it out."
            )
        if self.padding_free:
            raise UserError("`padding_free` is not supported: rows of a pair are padded to one length.")


@dataclass
class DiffusionKTOConfig(WithoutSecrets, ConversionSettings, ScoreSettings, KTOConfig):
    """Settings of `DiffusionKTOTrainer`: every keyword of `trl.KTOConfig`, and those of `DiffusionDPOConfig`.

    Raises:
        UserError: a value out of range, or dropout (policy and reference would see different models).
    """

    def __post_init__(self) -> None:
        set_trl_defaults(self)
        check_settings(self, inherited=INHERITED)
        super().__post_init__()
        check_trainer(self)
        self.check_score()
        check_value("loss_type", self.loss_type, str, {"choices": ("kto", "apo_zero_unpaired")})


# Of TRL's GRPO, by the beginning of their names: why they mean nothing here.
_NOT_OF_GRPO = {
    "use_vllm": "vLLM cannot decode by unmasking",
    "vllm_": "vLLM cannot decode by unmasking",
    "use_transformers_": "continuous batching decodes from left to right",
    "transformers_continuous": "continuous batching decodes from left to right",
    "cache_implementation": "decoding by unmasking has a cache of its own; see `approximate_cache` of `generation_kwargs`",
    "cast_lm_head_to_fp32": "scores are computed in fp32 already",
    "top_entropy_quantile": "it chooses tokens by their own entropy, and a score is one number of the whole answer",
    "entropy_coef": "the entropy of masked tokens is measured without a gradient",
    "use_adaptive_entropy": "the entropy of masked tokens is measured without a gradient",
    "entropy_target": "the entropy of masked tokens is measured without a gradient",
    "max_tool_calling_iterations": "a rollout calls no tools",
    "log_multimodal": "the models read text alone",
}


@dataclass
class DiffusionGRPOConfig(WithoutSecrets, ConversionSettings, GRPOConfig):
    """Settings of `DiffusionGRPOTrainer`: every keyword of `trl.GRPOConfig`, and `num_draws`.

    > Parameters that control the rollouts: `generation_kwargs` takes the settings of `DiffusionGenerationConfig`; what is not given is as
        the model was saved.

    > Parameters whose default differs from TRL's: `disable_dropout` is on (old and current policy are compared without noise of their
        own), `bf16` is off where there is no CUDA.

    Raises:
        UserError: a value out of range, or a setting of TRL that means nothing here.
    """

    num_draws: int = setting(4, "Masks that a score is the mean of, at stratified ratios, one forward each.", min=1)
    disable_dropout: bool = setting(True, "Turn dropout off in the policy and its reference.")

    def __post_init__(self) -> None:
        set_trl_defaults(self)
        check_settings(self, inherited=INHERITED)
        for name, field in self.__dataclass_fields__.items():
            reasons = [why for start, why in _NOT_OF_GRPO.items() if name.startswith(start)]
            if reasons and getattr(self, name) != field.default:
                raise UserError(f"`{name}`: {reasons[0]}; leave it out.")
        super().__post_init__()
        check_trainer(self)
        check_dropout(self)
        remedy = "use DDP, ZeRO-2, or ZeRO-3 with `ds3_gather_for_generation`"
        check_forwards(self, "`fsdp`, `deepspeed`: a rollout", remedy, zero3=not self.ds3_gather_for_generation)
        if "seed" in (self.generation_kwargs or {}):
            raise UserError(
                "`generation_kwargs`: every generation has a seed of its own, drawn from `seed`; leave `seed` out of it."
            )

    def draws_at(self, progress: float) -> int:
        """Forwards that a score takes, from the first step to the last."""
        return self.num_draws
