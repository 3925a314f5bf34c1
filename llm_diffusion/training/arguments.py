"""What the arguments that ours inherit from TRL's and transformers' configs may be: they declare no ranges, and check little."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import TrainingArguments, get_scheduler

from .. import UserError
from ..models.record import ConversionSettings
from ..objective.settings import SEEDS, read_setting, user_settings

PROCESSES = max(8, 4 * (os.cpu_count() or 1))
# What the numbers of TRL's and transformers' configs may be, which declare it nowhere. Their defaults are always right.
_RANGES: list[tuple[dict, str]] = [
    (
        {"min": 1},
        "max_steps save_total_limit gradient_accumulation_steps eval_accumulation_steps torch_empty_cache_steps",
    ),
    (
        {"min": 1},
        "per_device_train_batch_size per_device_eval_batch_size precompute_ref_batch_size ref_model_sync_steps",
    ),
    ({"min": 1}, "dataloader_prefetch_factor ddp_bucket_cap_mb ddp_timeout"),
    ({"above": 0, "whole": True}, "save_steps eval_steps logging_steps"),  # below 1 a share of the run
    ({"min": 0, "whole": True}, "warmup_steps"),
    ({"min": 0}, "weight_decay adam_epsilon max_grad_norm neftune_noise_alpha eval_delay"),
    ({"min": 0}, "desirable_weight undesirable_weight epsilon epsilon_high delta"),
    (
        {"min": 1},
        "num_iterations steps_per_generation generation_batch_size max_completion_length num_generations_eval",
    ),
    ({"min": 2}, "num_generations"),
    ({"above": 0}, "temperature"),  # greedy answers to a prompt are all the same
    ({"min": 0, "below": 1}, "adam_beta1 adam_beta2 label_smoothing_factor"),
    ({"min": 0, "max": 1}, "router_aux_loss_coef ld_alpha ref_model_mixup_alpha"),
    ({"above": 0}, "beta discopop_tau"),
    ({"min": 0, "below": 0.5}, "label_smoothing"),  # at a half both answers are preferred alike
    ({"above": 0, "max": 1_000_000}, "num_train_epochs"),
    ({"above": 0, "max": 1000}, "learning_rate"),
    ({"min": 2}, "max_length"),
    ({"min": 1, "max": 4096}, "pad_to_multiple_of"),
    ({"min": 0, "max": PROCESSES}, "dataloader_num_workers"),
    ({"min": 1, "max": PROCESSES}, "dataset_num_proc num_threads"),
    (SEEDS, "seed data_seed"),
    ({"choices": ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")}, "f_divergence_type"),
    (
        {"choices": ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")},
        "torch_compile_mode",
    ),
]
INHERITED = {name: bounds for bounds, names in _RANGES for name in names.split()}
PREFERENCE_LOSSES = tuple(
    "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down discopop sft "
    "sigmoid_norm".split()
)
# Keys of `gradient_checkpointing_kwargs`: of torch's `checkpoint`, and two of transformers.
_CHECKPOINTING: dict[str, tuple[Any, dict]] = {
    **dict.fromkeys(("use_reentrant", "preserve_rng_state", "early_stop", "debug", "offload"), (bool, {})),
    "determinism_check": (str, {"choices": ("default", "none")}),
    "every_n_layers": (int, {"min": 1}),
    "context_fn": (Any, {}),
}


def check_trainer(args: TrainingArguments) -> None:
    """Raises UserError for settings of transformers that would do nothing here, or end in an error of its own."""
    given = args.activation_checkpointing_kwargs or {}  # by either name
    name = "`activation_checkpointing_kwargs`, or `gradient_checkpointing_kwargs`,"
    if not isinstance(given, dict) or given.keys() - _CHECKPOINTING.keys():
        raise UserError(f"{name} must be a mapping with keys of {sorted(_CHECKPOINTING)}, got {given!r:.80}.")
    for key, value in given.items():
        read_setting(f"gradient_checkpointing_kwargs.{key}", value, *_CHECKPOINTING[key])
    if args.parallelism_config is not None and getattr(args.parallelism_config, "non_data_parallel_size", 2) > 1:
        raise UserError(
            "`parallelism_config` gives processes parts of the same rows, whose noise is drawn by whole rows of a process; leave it out, "
            "and split the weights (docs/scaling.md)."
        )
    if args.label_smoothing_factor and isinstance(args, ConversionSettings):
        raise UserError("`label_smoothing_factor` belongs to a loss that is not computed here; leave it out.")
    with user_settings("`optim_args`"):  # as transformers reads it
        dict(part.split("=") for part in (args.optim_args or "a=1").split(","))
    with user_settings("`lr_scheduler_kwargs`"):
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)])
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 10**9, args.lr_scheduler_kwargs)
    if args.fp16 and args.device.type == "cpu":
        raise UserError("`fp16` needs a GPU; leave it out, or set `bf16`.")
    if args.load_best_model_at_end and args.eval_strategy == "no":
        raise UserError("`load_best_model_at_end` needs evaluations to find the best by; set `eval_strategy` too.")


def set_trl_defaults(args: TrainingArguments) -> None:
    """What every config of ours does before TRL looks at it."""
    if args.bf16 is None and not torch.cuda.is_available():
        args.bf16 = False
    if str(args.pad_to_multiple_of).isdecimal():  # TRL's own command line hands text over
        args.pad_to_multiple_of = int(args.pad_to_multiple_of)
    # TRL still sets the old names, which transformers deprecates: handed over here, both names keep working.
    for old, new in (
        ("gradient_checkpointing", "activation_checkpointing"),
        ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
    ):
        if getattr(args, new) is None:
            setattr(args, new, getattr(args, old))
