"""The two pipelines, `arm` (left to right) and `diffusion`, from any start: nothing, an AR checkpoint, a diffusion checkpoint.

    start                  arm                                     diffusion
    nothing (`scratch`)    a GPT-2 from its shape                  the same, converted
    AR checkpoint          as it is                                converted when it is loaded; untrained, its answers mean nothing
    diffusion checkpoint   its weights, causal again               as it was saved
    diffusion adapter      the base under it (decoding only)       as it was saved

Trade-off: left to right is the hosts' own `generate` and TRL's own trainer, so nothing of it is written here. Alternative:
`generate_autoregressive`, for a converted model that is in memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from rich.table import Table
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from . import UserError
from .generation.inference import DiffusionInference
from .models.checkpoints import (
    adapter_base,
    best_device,
    check_device,
    from_hub,
    is_adapter,
    loader_options,
    local_file,
    resolve_path,
)
from .models.diffugpt import load_published, name_mask
from .models.patching import base_of
from .models.probing import probe_attention
from .models.record import SIDECAR

PIPELINES = ("arm", "diffusion")
SCRATCH = ("n_embd", "n_layer", "n_head", "n_positions")
# Decoding settings that both pipelines know; the others are of unmasking alone.
SHARED_SETTINGS = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "repetition_penalty", "seed")


def check_pipeline(pipeline: str) -> str:
    if pipeline not in PIPELINES:
        raise UserError(f"`pipeline` must be one of {PIPELINES}, got {pipeline!r}.")
    return pipeline


def check_scratch(scratch: dict[str, Any], max_length: int) -> None:
    """Raises ValueError, naming the value, for a shape that cannot be built or is too short for the data."""
    if set(scratch) != set(SCRATCH):
        raise UserError(f"`scratch` must have the keys {list(SCRATCH)}, got {sorted(scratch)}.")
    for name, value in scratch.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"`scratch.{name}` must be a whole number above 0, got {value!r}.")
    if scratch["n_embd"] % scratch["n_head"]:
        raise UserError(f"`scratch`: `n_head` ({scratch['n_head']}) must divide `n_embd` ({scratch['n_embd']}).")
    if max_length > scratch["n_positions"]:
        raise UserError(f"`max_length` ({max_length}) exceeds the {scratch['n_positions']} positions of `scratch`.")


def check_positions(model: torch.nn.Module, max_length: int) -> None:
    """Refuses rows that are longer than the positions a model has learned; others count on, more or less well."""
    positions = getattr(base_of(model).config, "n_positions", None)
    if positions is not None and max_length > positions:
        raise UserError(f"`max_length` ({max_length}) exceeds the {positions} positions of the model; shorten it.")


def scratch_model(
    scratch: dict[str, int], tokenizer_of: str, *, seed: int = 0, device: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A GPT-2 with random weights and the vocabulary of another model's tokenizer, autoregressive as any start.

    Args:
        scratch: `n_embd`, `n_layer`, `n_head`, `n_positions`.
        tokenizer_of: hub name, folder or "tiny".
        seed: of the weights.
    """
    device = device or best_device()
    check_device(device)
    tokenizer = from_hub(AutoTokenizer, resolve_path(tokenizer_of))
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(vocab_size=len(tokenizer), **scratch, **ends, name_or_path="scratch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def load_autoregressive(
    name_or_path: str, *, device: str | None = None, trust_remote_code: bool = False, **options: Any
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """A causal model, whatever it was saved as: an AR checkpoint or adapter as it is, a diffusion checkpoint causal again.

    Args:
        options: keywords of `from_pretrained`.

    Raises:
        ValueError: a diffusion adapter, whose weights mean nothing without its attention; or attention that stays open.
    """
    path, device = resolve_path(name_or_path), device or best_device()
    remote = {"trust_remote_code": trust_remote_code}
    options = loader_options(device, **options, **remote)
    tokenizer = from_hub(AutoTokenizer, path, **remote)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if is_adapter(path):
        if local_file(path, SIDECAR) is not None:
            raise UserError(
                f"`model`: {name_or_path!r} is an adapter of a diffusion model, which `pipeline`='arm' cannot train; name its base, "
                f"{adapter_base(path)!r}, or merge it first."
            )
        model = from_hub(AutoPeftModelForCausalLM, path, is_trainable=True, **options)
    else:
        config = from_hub(AutoConfig, path, **remote)
        if (model := load_published(path, config, **options)) is not None:
            name_mask(model, tokenizer)
        else:
            vars(config).pop("diffusion", None)
            config.is_causal = True
            model = from_hub(AutoModelForCausalLM, path, config=config, **options)
        if tokenizer.mask_token_id is not None:
            model.generation_config.suppress_tokens = [tokenizer.mask_token_id]
    if "device_map" not in options:
        model = model.to(device)
    if (attention := probe_attention(model)) != "causal":
        raise UserError(f"`model`: {name_or_path!r} attends {attention} from left to right, not causally.")
    return model.eval(), tokenizer


def continue_from_left(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], **settings: Any
) -> list[str]:
    """Continues texts by the host's own `generate`; `settings` are its settings, and `seed`.

    Raises:
        ValueError: an empty prompt, no room for the answer, or a setting that the host does not know.
    """
    ids = [tokenizer(check_prompt(prompt, tokenizer))["input_ids"] for prompt in prompts]
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


def check_prompt(prompt: str, tokenizer: PreTrainedTokenizerBase) -> str:
    if not prompt:
        raise UserError(
            f"an empty prompt has nothing to continue; start with a token, {tokenizer.eos_token!r} for one."
        )
    return prompt


def for_left_to_right(name_or_path: str) -> str:
    """What is decoded from left to right: the model itself, or the base under a diffusion adapter."""
    path = resolve_path(name_or_path)
    if is_adapter(path) and local_file(path, SIDECAR) is not None:
        return adapter_base(path)
    return name_or_path


@dataclass
class Continuations:
    """What one model said by one pipeline.

    Args:
        texts: answers, in the order of the prompts.
        tokens_per_forward: answer tokens over forward passes, mean over answers; 1 from left to right.
        seconds: for all answers, loading left out.
        nll_per_token: nats a token of the answers, prompts given, under the judge; infinite where nothing was said.
    """

    model: str
    pipeline: str
    texts: list[str] = field(default_factory=list)
    tokens_per_forward: float = 1.0
    seconds: float = 0.0
    nll_per_token: float = float("inf")


def continued(
    models: list[str],
    prompts: list[str],
    load: Callable[[str], DiffusionInference],
    settings: dict[str, Any],
    chat: bool = False,
) -> list[Continuations]:
    """Every model by both pipelines; the first one, from left to right, is the judge of how likely the answers are.

    Args:
        models: hub names or folders, of AR or diffusion models.
        load: of a name, how it is decoded by unmasking.
        settings: left to right takes those of `SHARED_SETTINGS`.
        chat: whether the prompts are questions, which every model's chat template puts.
    """
    shared = {name: value for name, value in settings.items() if name in SHARED_SETTINGS}
    judge, judges_tokenizer = load_autoregressive(for_left_to_right(models[0]))
    rows = []
    for number, name in enumerate(models):
        model, tokenizer = (judge, judges_tokenizer) if number == 0 else load_autoregressive(for_left_to_right(name))
        started = time.perf_counter()
        texts = continue_from_left(model, tokenizer, put(prompts, tokenizer, chat), **shared)
        rows.append(Continuations(name, "arm", texts, seconds=time.perf_counter() - started))
        inference = load(name)
        rows.append(_by_diffusion(name, inference, put(prompts, inference.tokenizer, chat)))
    for row in rows:
        row.nll_per_token = nll_per_token(judge, judges_tokenizer, put(prompts, judges_tokenizer, chat), row.texts)
    return rows


def put(prompts: list[str], tokenizer: PreTrainedTokenizerBase, chat: bool) -> list[str]:
    """The prompts as they are, or as questions in a conversation."""
    if not chat:
        return prompts
    turns = ([{"role": "user", "content": prompt}] for prompt in prompts)
    return [tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True) for turn in turns]


def figures(rows: list[Continuations]) -> Table:
    table = Table(title=f"{len(rows[0].texts)} text(s) continued")
    for column in ("model", "pipeline", "nats/token, judged by the first", "tokens/forward", "seconds"):
        table.add_column(column, justify="left" if column in ("model", "pipeline") else "right")
    for row in rows:
        judged = f"{row.nll_per_token:.2f}" if any(row.texts) else "nothing said"
        table.add_row(row.model, row.pipeline, judged, f"{row.tokens_per_forward:.2f}", f"{row.seconds:.1f}")
    return table


def _by_diffusion(name: str, inference: DiffusionInference, prompts: list[str]) -> Continuations:
    started = time.perf_counter()
    batch = inference.tokenizer(prompts, padding=True, padding_side="left", return_tensors="pt").to(inference.device)
    output = inference.model.generate(**batch, **{**inference.settings, "return_dict_in_generate": True})
    answers = output.sequences[:, batch["input_ids"].shape[1] :]
    texts = inference.tokenizer.batch_decode(answers, skip_special_tokens=True)
    per_forward = output.tokens_per_forward.float().mean().item()
    return Continuations(name, "diffusion", texts, per_forward, time.perf_counter() - started)


@torch.no_grad()
def nll_per_token(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: list[str], answers: list[str]
) -> float:
    """Nats a token that a causal model needs for the answers, prompts given; infinite if no answer says anything."""
    total, count = 0.0, 0
    for prompt, answer in zip(prompts, answers, strict=True):
        start = tokenizer(prompt)["input_ids"]
        ids = torch.tensor([start + tokenizer(answer, add_special_tokens=False)["input_ids"]], device=model.device)
        logits = model(input_ids=ids).logits[0, len(start) - 1 : -1].float()
        total += torch.nn.functional.cross_entropy(logits, ids[0, len(start) :], reduction="sum").item()
        count += ids.shape[1] - len(start)
    return total / count if count else float("inf")
