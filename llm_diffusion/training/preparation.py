"""What trainers do to models, adapters and collators before the first step."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, prepare_model_for_kbit_training
from transformers import AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, TrainerState

from .. import UserError
from ..data.tokens import read_dataset
from ..models.attention import check_block_attention
from ..models.checkpoints import from_hub, resolve_path
from ..models.conversion import convert_to_diffusion
from ..models.forward import forward_state
from ..models.loading import load_diffusion_model
from ..models.patching import Patch, base_of
from ..models.record import CONVERSION_OPTIONS, DiffusionRecord, read_record, record_of, update_record
from ..models.special_tokens import end_token_ids, grow, turn_end_id
from ..objective.forward_process import NoiseSettings
from ..speculative.training import check_drafter
from .adapters import has_converted_weights, keep_mask_row, prepare_adapter
from .collator import DataCollatorForDiffusionPreference, DataCollatorForMaskedDiffusion
from .config import DiffusionSFTConfig
from .distillation import check_base_stays, check_teacher

logger = logging.getLogger(__name__)


def converted(
    model: torch.nn.Module | str,
    processing_class: PreTrainedTokenizerBase | None,
    args: Any,
    quantization_config: BitsAndBytesConfig | None,
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model and its tokenizer, loaded where they are not given, and converted as `args` want it."""
    if isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning:
        raise UserError(
            f"`model`: the virtual tokens of {type(model.active_peft_config).__name__} move every token away from the hidden state that "
            "predicts it; use LoRA."
        )
    conversion = {name: getattr(args, name) for name in CONVERSION_OPTIONS}
    remote = {"trust_remote_code": bool(getattr(args, "trust_remote_code", False))}
    if isinstance(model, str):
        options = remote | (args.model_init_kwargs or {}) | {"quantization_config": quantization_config}
        model, tokenizer = load_diffusion_model(model, **conversion, **options)
        processing_class = processing_class or tokenizer
    if processing_class is None:
        name = base_of(model).config.name_or_path
        if not name:
            raise UserError("`processing_class`: pass the tokenizer of the model.")
        processing_class = from_hub(AutoTokenizer, resolve_path(name), **remote)
    for name in ("eos_token", "pad_token"):  # TRL sets the first, and the second for its own collator alone
        token = getattr(args, name, None)
        if token is not None and token not in processing_class.get_vocab():
            raise UserError(f"`{name}`: {token!r} is no token of the tokenizer; choose one of its vocabulary.")
        if token is not None:
            setattr(processing_class, name, token)
    convert_to_diffusion(model, processing_class, **conversion)
    if isinstance(model, PeftModel) and not has_converted_weights(model):
        keep_mask_row(model)
    return model, processing_class


REFUSED = {
    "data_collator": "the trainer pads rows and draws their noise itself; its settings are in `args`",
    "compute_loss_func": "the loss is a bound over noisy text, which has no such function; subclass the trainer",
    "compute_metrics": "it would be given logits of noisy text, which no label belongs to",
}


def refuse_arguments(**given: Any) -> None:
    """Refuses arguments of TRL's that mean nothing here."""
    for name, value in given.items():
        if value is not None:
            raise UserError(f"`{name}`: {REFUSED[name]}; leave it out.")


def check_optimizer(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
    """Refuses one that was built before the vocabulary grew: it would move tensors that are no longer the model's."""
    of_model = {id(parameter) for parameter in model.parameters()}
    groups = [] if optimizer is None else optimizer.param_groups
    if any(id(parameter) not in of_model for group in groups for parameter in group["params"]):
        raise UserError(
            "`optimizers`: the optimizer holds parameters that the model lost when its vocabulary grew by the mask token; convert the "
            "model with `convert_to_diffusion` first, or name the optimizer by `optim` or `optimizer_cls_and_kwargs`."
        )


@contextmanager
def model_is_loaded(args: Any) -> Iterator[None]:
    """While TRL constructs itself around a model that is there, with its template: it would apply these again, or call them ignored."""
    with Patch() as patch:
        for name in ("model_init_kwargs", "chat_template_path"):
            patch.set(args, name, None)
        yield


def dataset_field(name: str) -> str:
    """How a user calls a trainer's dataset: TRL names it "train", "eval", or by its key among several."""
    return f"{name}_dataset" if name in ("train", "eval") else f"eval_dataset[{name!r}]"


def read_datasets(train: Any, evaluation: Any, args: Any) -> tuple[Any, Any]:
    """What trainers are given as data, as TRL can look at it: lists become datasets; refused if there is nothing to read."""
    is_prepared = bool((getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset"))
    train = None if train is None else read_dataset(train, "train_dataset", is_prepared)
    if isinstance(evaluation, dict):
        return train, {name: read_dataset(part, dataset_field(name), is_prepared) for name, part in evaluation.items()}
    return train, None if evaluation is None else read_dataset(evaluation, "eval_dataset", is_prepared)


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
    added = cloned_tokens(model, processing_class, args)
    if peft_config is not None:
        peft_config = prepare_adapter(model, peft_config, record, added)
    adapted, converted_base = peft_config is not None or isinstance(model, PeftModel), has_converted_weights(model)
    if args.uses_teacher or record.mode.drafts:
        given = list(model.peft_config.values()) if isinstance(model, PeftModel) else []
        check_base_stays(given + ([peft_config] if peft_config is not None else []))
    check_teacher(model, adapted, converted_base, args)
    check_drafter(record, adapted, converted_base, args)
    no_router_loss(model, args)
    return peft_config


def cloned_tokens(
    model: torch.nn.Module, processing_class: PreTrainedTokenizerBase, args: DiffusionSFTConfig
) -> list[int]:
    """Takes the chat template of `chat_template_path`; the tokens that it brings. TRL would cut a padded vocabulary, and untie it."""
    if args.chat_template_path is None:
        return []
    if args.chat_template_path.endswith((".jinja", ".j2")):
        processing_class.chat_template = Path(args.chat_template_path).read_text()
        return []
    source, known = from_hub(AutoTokenizer, args.chat_template_path), processing_class.get_vocab()
    new = [token for token in source.added_tokens_decoder.values() if token.content not in known]
    processing_class.add_tokens(new)
    processing_class.chat_template, processing_class.eos_token = source.get_chat_template(), source.eos_token
    grow(base_of(model), len(processing_class) - 1)
    return processing_class.convert_tokens_to_ids([token.content for token in new])


def make_collator(
    processing_class: PreTrainedTokenizerBase, model: torch.nn.Module, args: DiffusionSFTConfig
) -> DataCollatorForMaskedDiffusion:
    record = record_of(model)
    return DataCollatorForMaskedDiffusion(
        record,
        pad_token_id=processing_class.pad_token_id,
        eos_token_id=end_token_ids(model, processing_class),
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
    if turn_end_id(processing_class) is None and processing_class.eos_token_id is None:
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


def make_score_collator(
    processing_class: PreTrainedTokenizerBase, model: torch.nn.Module, args: Any, texts: int
) -> DataCollatorForDiffusionPreference:
    layout = DataCollatorForMaskedDiffusion(
        record_of(model),
        pad_token_id=processing_class.pad_token_id,
        eos_token_id=end_token_ids(model, processing_class),
        settings=NoiseSettings(eos_tail=0, random_canvas=0.0),
        pad_to_multiple_of=args.pad_to_multiple_of,
    )
    return DataCollatorForDiffusionPreference(layout, max_length=getattr(args, "max_length", None), texts=texts)


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
