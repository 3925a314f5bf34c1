"""What trainers do to models, adapters and collators before the first step."""

from __future__ import annotations

import copy
import json
import logging
import re
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerState

from .. import UserError
from ..data.datasets import as_prompt_completion
from ..models.attention import check_block_attention
from ..models.conversion import convert_to_diffusion, fingerprint
from ..models.forward import TIME_EMBEDDING, forward_state
from ..models.loading import load_diffusion_model
from ..models.patching import base_of
from ..models.record import CONVERSION_OPTIONS, DiffusionRecord, read_record, record_of, update_record
from ..objective.forward_process import NoiseSettings
from ..speculative.training import check_drafter
from .collator import DataCollatorForDiffusionPreference, DataCollatorForMaskedDiffusion
from .config import DiffusionDPOConfig, DiffusionSFTConfig
from .distillation import check_base_stays, check_teacher

logger = logging.getLogger(__name__)


def converted(
    model: torch.nn.Module | str,
    processing_class: PreTrainedTokenizerBase | None,
    args: Any,
    quantization_config: BitsAndBytesConfig | None,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded if it is given by name, and converted as `args` want it."""
    conversion = {name: getattr(args, name) for name in CONVERSION_OPTIONS}
    if isinstance(model, str):
        options = {**(args.model_init_kwargs or {}), "quantization_config": quantization_config}
        model, tokenizer = load_diffusion_model(model, **conversion, **options)
        processing_class, args.model_init_kwargs = processing_class or tokenizer, None
    if processing_class is None:
        raise UserError("`processing_class`: pass the tokenizer of the model.")
    convert_to_diffusion(model, processing_class, **conversion)
    return model, processing_class


def prepare_adapter(model: torch.nn.Module, peft_config: PeftConfig, record: DiffusionRecord) -> PeftConfig:
    """Trains the rows of the mask token and of a tail's own token, and the time embedding if there is one, beside the adapters."""
    peft_config = copy.deepcopy(peft_config)
    if not hasattr(peft_config, "trainable_token_indices"):
        raise UserError(
            f"`peft_config`: {type(peft_config).__name__} cannot train the mask token's embedding row; use a LoraConfig."
        )
    rows = peft_config.trainable_token_indices
    groups = rows if isinstance(rows, dict) else {"all": list(rows or [])}
    new = [token for token in (record.mask_token_id, record.tail_token_id) if token is not None]
    for group in groups.values():
        group += [token for token in new if token not in group]
    peft_config.trainable_token_indices = groups if isinstance(rows, dict) else groups["all"]
    if hasattr(base_of(model), TIME_EMBEDDING):
        peft_config.modules_to_save = sorted({*(peft_config.modules_to_save or []), TIME_EMBEDDING})
    if peft_config.exclude_modules is None and peft_config.target_modules == "all-linear":
        # The time embedding is trained whole; routers of experts return tuples, which adapters cannot.
        unfit = re.compile(rf"(.*\.)?({TIME_EMBEDDING}|router|gate)(\..*)?")
        if any(unfit.fullmatch(name) for name, _ in model.named_modules()):
            peft_config.exclude_modules = unfit.pattern
    update_record(model, base_fingerprint=fingerprint(base_of(model)))  # full training may have moved it
    return peft_config


def prepare_quantised(model: torch.nn.Module, args: DiffusionSFTConfig) -> None:
    """Readies a quantised base for training, once; adapters that were loaded on it stay trainable."""
    base = base_of(model)
    if not getattr(base, "is_quantized", False) or forward_state(base).prepared_for_training:
        return
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    prepare_model_for_kbit_training(
        base,
        use_gradient_checkpointing=args.gradient_checkpointing,
        gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
    )
    for parameter in trainable if isinstance(model, PeftModel) else []:
        parameter.requires_grad_(True)
    forward_state(base).prepared_for_training = True


def no_router_loss(model: torch.nn.Module, args: DiffusionSFTConfig) -> None:
    """Turns off the load-balancing loss of mixtures of experts, which TRL adds to its own objective, not ours."""
    if args.router_aux_loss_coef:
        raise UserError(
            f"`router_aux_loss_coef`={args.router_aux_loss_coef} belongs to TRL's own objective; leave it out."
        )
    if hasattr(base_of(model).config.get_text_config(), "output_router_logits"):
        args.router_aux_loss_coef = 0.0


def prepare_model(
    model: torch.nn.Module,
    processing_class: PreTrainedTokenizerBase,
    peft_config: PeftConfig | None,
    args: DiffusionSFTConfig,
) -> PeftConfig | None:
    """Checks what `DiffusionSFTTrainer` is to train, and readies it; returns the adapters' config with the rows that train too."""
    record = record_of(model)
    check_ar_loss(record, args)
    check_annealing(model, record, args)
    check_canvas(processing_class, record, args)
    if args.tail == "pad":
        record = update_record(model, tail_token_id=processing_class.pad_token_id)
    prepare_quantised(model, args)
    if peft_config is not None:
        peft_config = prepare_adapter(model, peft_config, record)
    adapted, converted_base = peft_config is not None or isinstance(model, PeftModel), has_converted_weights(model)
    if args.uses_teacher or record.mode.drafts:
        given = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
        check_base_stays(given + ([peft_config] if peft_config is not None else []))
    check_teacher(model, adapted, converted_base, args)
    check_drafter(record, adapted, converted_base, args)
    no_router_loss(model, args)
    return peft_config


def make_collator(
    processing_class: PreTrainedTokenizerBase, model: torch.nn.Module, args: DiffusionSFTConfig
) -> DataCollatorForMaskedDiffusion:
    record = record_of(model)
    return DataCollatorForMaskedDiffusion(
        record,
        pad_token_id=processing_class.pad_token_id,
        eos_token_id=processing_class.eos_token_id,
        settings=args,
        vocab_size=max(len(processing_class), record.mask_token_id + 1),
        max_positions=getattr(base_of(model).config.get_text_config(), "max_position_embeddings", None),
        pad_to_multiple_of=args.pad_to_multiple_of,
        packing=args.packing or bool(args.eval_packing),
    )


def check_canvas(processing_class: PreTrainedTokenizerBase, record: DiffusionRecord, args: DiffusionSFTConfig) -> None:
    """Refuses canvases that could not teach where texts end."""
    if not args.sizes_canvases:
        return
    if record.mode.has_blocks:
        raise UserError(
            "`max_canvas`, `text_tails`, `tail`, `pad_mask_ratio`, `pad_annealing_steps` and `first_step_share` teach where a canvas "
            f"ends; with `attention`={record.attention!r} answers have no canvas, they end where a block does; leave them out."
        )
    if args.packing:
        raise UserError("`packing`: canvases are sized row by row; leave it off, or leave out what sizes them.")
    if processing_class.eos_token_id is None:
        raise UserError("`processing_class`: the tokenizer has no end token, so no text can end; set `eos_token`.")
    if args.tail == "pad":
        pad = processing_class.pad_token_id
        if pad is None or pad == processing_class.eos_token_id:
            raise UserError(
                f"`tail`='pad': the tokenizer's padding token ({processing_class.pad_token!r}) is its end token or missing; say "
                "tail='eos', or give it a padding token of its own."
            )


def check_ar_loss(record: DiffusionRecord, args: DiffusionSFTConfig) -> None:
    """Refuses next-token prediction where it would be copying: a block-causal clean half already sees the next token. ValueError."""
    if args.ar_loss_weight and (not record.mode.has_blocks or record.mode.drafts or record.clean_context != "causal"):
        raise UserError(
            "`ar_loss_weight` needs block attention with a causal clean half, the model has "
            f"attention={record.attention!r}, clean_context={record.clean_context!r}; set it to 0, or convert so."
        )


def counts_before(checkpoint: Path) -> dict[str, int]:
    """Steps and tokens that the model had seen when the run that is resumed from `checkpoint` was started."""
    saved = read_record(str(checkpoint))
    done = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")).global_step
    return {
        "conversion_steps": saved.conversion_steps - done,  # transformers counts these steps again
        "training_tokens": saved.training_tokens,
    }


def has_converted_weights(model: torch.nn.Module) -> bool:
    """Whether the weights under any adapters come from a converted checkpoint, and not from an autoregressive one."""
    file = Path(base_of(model).config._name_or_path) / "config.json"
    return file.is_file() and "diffusion" in json.loads(file.read_text())


def check_annealing(model: torch.nn.Module, record: DiffusionRecord, args: DiffusionSFTConfig) -> None:
    """Refuses a model that does not follow the masks of annealing or packing."""
    annealing = args.annealing_to()
    if record.mode.has_blocks:
        if args.max_length is not None and record.block_length > args.max_length:
            raise UserError(
                f"`block_length` ({record.block_length}) is longer than `max_length` ({args.max_length}): no row would have a "
                "second block; shorten the blocks or raise `max_length`."
            )
        if annealing is not None and not annealing.grows_blocks:
            raise UserError(f"`annealing`: block attention anneals by growing blocks, 'block', got {args.annealing!r}.")
    elif annealing is not None or args.packing or args.eval_packing:
        check_block_attention(model, 1, "`annealing`" if annealing is not None else "`packing`")
    kept = record.final_causal_ratio
    if annealing is not None and record.annealed and args.final_causal_ratio != kept:
        raise UserError(
            f"`final_causal_ratio`: the model was annealed to {kept}, got {args.final_causal_ratio}; leave it so."
        )
    if kept and (args.packing or args.eval_packing):
        raise UserError(
            f"`packing`: the model keeps a causal ratio of {kept}, which packed rows would lose; leave it off."
        )


def make_preference_collator(
    processing_class: PreTrainedTokenizerBase, record: DiffusionRecord, args: DiffusionDPOConfig
) -> DataCollatorForDiffusionPreference:
    layout = DataCollatorForMaskedDiffusion(
        record,
        pad_token_id=processing_class.pad_token_id,
        eos_token_id=processing_class.eos_token_id,
        settings=NoiseSettings(eos_tail=0, random_canvas=0.0),
        pad_to_multiple_of=args.pad_to_multiple_of,
    )
    return DataCollatorForDiffusionPreference(layout, max_length=args.max_length)


def clean_prompts(dataset: Any, split: bool) -> Any:
    """`messages` -> prompt and completion, for one dataset or a dict of them."""
    if isinstance(dataset, dict):
        return {name: clean_prompts(part, split) for name, part in dataset.items()}
    if dataset is None or "messages" not in (dataset.column_names or []):
        return dataset
    # TRL takes any `prompt` column for prompt and completion; chats are told by `messages` alone.
    dataset = dataset.remove_columns([name for name in ("prompt", "completion") if name in dataset.column_names])
    return as_prompt_completion(dataset) if split else dataset


def with_canvases(dataset: Any, collator: DataCollatorForMaskedDiffusion, num_proc: int | None) -> Any:
    """Tokenised texts as canvases, so that they can be packed."""

    def canvas(example: dict[str, Any]) -> dict[str, list[int]]:
        ids, labels = collator.canvas(list(example["input_ids"]), list(example["labels"]))
        return {"input_ids": ids, "labels": labels}

    options = (
        {"num_proc": num_proc, "desc": "Making canvases"} if isinstance(dataset, Dataset) else {}
    )  # streams take none
    return dataset.map(canvas, **options)


def report_dropped(given: Any, kept: Any, args: DiffusionSFTConfig) -> None:
    if isinstance(given, Dataset) and isinstance(kept, Dataset) and 0 < len(kept) < len(given):
        logger.warning(
            "%d of %d rows have nothing left to train on after truncation to `max_length`=%s and are dropped",
            len(given) - len(kept),
            len(given),
            args.max_length,
        )


def check_rows_left(dataset: Any, args: DiffusionSFTConfig) -> None:
    """Refuses data that truncation has left nothing of. ValueError."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise UserError(
            f"`train_dataset`: no row has a token left to train on: after truncation to `max_length`={args.max_length} every "
            "label is -100; raise it, shorten the prompts, or look at the labels."
        )


def check_columns(dataset: Any, name: str) -> None:
    """Refuses data without rows, or without the two answers of a pair.

    Raises:
        ValueError: no row, or a missing column.
    """
    if (first := next(iter(dataset), None)) is None:
        raise UserError(f"`{name}_dataset` is empty.")
    if missing := [side for side in ("chosen", "rejected") if side not in first]:
        raise UserError(
            f"`{name}_dataset` lacks {missing}, its columns are {sorted(first)}; a pair has `chosen` and `rejected`, and a `prompt` "
            "of its own or as their common beginning."
        )


def check_pairs(dataset: Any, name: str) -> Any:
    """The data, refused where it holds no preference; a stream is checked as it flows.

    Raises:
        ValueError: see `check_columns`; an empty answer, or two equal ones.
    """
    check_columns(dataset, name)
    return dataset.filter(_is_pair, with_indices=True, fn_kwargs={"name": name})


def _is_pair(example: dict[str, Any], row: int, name: str) -> bool:
    for side in ("chosen", "rejected"):
        text, acts = _last_words(example[side])
        if not acts and not (text if isinstance(text, str) else repr(text)).strip():
            raise UserError(f"`{name}_dataset`: `{side}` of row {row} is empty; an answer is needed to compare.")
    if example["chosen"] == example["rejected"]:
        raise UserError(
            f"`{name}_dataset`: `chosen` and `rejected` of row {row} are the same; leave the pair out, it prefers nothing."
        )
    return True


def _last_words(side: Any) -> tuple[str, bool]:
    """The text of an answer, or of a conversation's last turn; and whether it does something else than speak."""
    if isinstance(side, str):
        return side, False
    if not side:
        return "", False
    return side[-1].get("content") or "", bool(side[-1].get("tool_calls"))


def by_length(batch: dict[str, Any], multiple: int = 1) -> list[dict[str, Any]]:
    """The shorter two thirds and the longer third of a batch's rows, each cut to its own longest row.

    Text lengths are skewed: this saves a third or more of the padding, and changes nothing else, because noise belongs to rows
    and losses are sums.
    """
    lengths = (batch["attention_mask"] > 0).sum(-1)
    n = len(lengths)
    if n < 3:
        return [batch]
    (ordered, order), parts, first = lengths.sort(stable=True), [], 2 * n // 3
    ends = torch.stack([ordered[first - 1], ordered[-1]]).tolist()  # both by one wait for the device
    for rows, longest in zip((order[:first], order[first:]), ends, strict=True):
        longest = -(-longest // multiple) * multiple
        part = {name: batch[name][rows, :longest] for name in ("input_ids", "labels", "attention_mask")}
        if "noise_rows" in batch:
            part |= {"noise_rows": batch["noise_rows"][rows], "n_noise_rows": batch["n_noise_rows"]}
        parts.append(part)
    return parts
