"""lm-evaluation-harness: the model behind it, registered as `llm_diffusion`, and running its tasks, on local files too (`tasks`).

`loglikelihood` is a bound, so perplexities are upper bounds and choices are ranked by bounds; `generate_until` is the model's own decoding.
A model that was not trained to fill masks is evaluated as the AR model it is; of a drafter the likelihood is its base's.

References: LLaDA (arXiv 2502.09992, appendix B.5) for scoring choices by a bound.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import Collator, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..generation.config import DiffusionGenerationConfig, UnmaskingSettings, check_one_answer
from ..generation.generate import generate, generate_autoregressive
from ..models.loading import load_diffusion_model
from ..models.patching import base_of
from ..models.record import record_of
from ..models.special_tokens import end_token_ids, text_ids
from .answers import over_processes, place
from .likelihood import Row, autoregressive_rows, bound_rows, is_diffusion, window_length, windows
from .tasks import LOCAL_TASKS, local_tasks, names_of

logger = logging.getLogger(__name__)


@register_model("llm_diffusion")
class DiffusionLM(TemplateLM):
    """A converted model in the harness: `lm_eval --model llm_diffusion --model_args pretrained=output/tiny/sft_model`.

    Args:
        pretrained: name or folder, or a loaded model with its `tokenizer`.
        autoregressive: score and decode as the AR model of the same weights; None: where it was not trained to be anything else.
        estimator, n_samples, seed: of the bound, see `likelihood.bound_rows`.
        max_gen_toks: longest answer where neither the task nor `settings` set it.
        split: split the requests between the processes that `accelerate launch` started; each runs the tasks and has all results.
        settings: decoding settings, which win over the task's.
    """

    def __init__(
        self,
        pretrained: str | torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        autoregressive: bool | None = None,
        estimator: str = "exact_count",
        n_samples: int = 128,
        seed: int = 0,
        batch_size: int | str = 16,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        device: str | None = None,
        trust_remote_code: bool = False,
        split: bool = True,
        progress: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__()
        DiffusionGenerationConfig(**settings)  # a wrong setting fails here, not after an hour
        check_one_answer(settings)
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(f"`batch_size` must be a whole number from 1, got {batch_size!r}.")
        if isinstance(pretrained, str):
            options = {"device": _device(device), "trust_remote_code": trust_remote_code}
            pretrained, tokenizer = load_diffusion_model(pretrained, **options)
        self.model, self.tokenizer, self.batch_size = pretrained.eval(), tokenizer, int(batch_size)
        self.bound = {"estimator": estimator, "n_samples": n_samples, "seed": seed}
        if estimator == "per_block":
            self.bound["block_length"] = settings.get("block_length")
        self.autoregressive = not record_of(pretrained).trained if autoregressive is None else autoregressive
        if autoregressive is None and self.autoregressive:
            logger.warning("not trained as a diffusion model: it is evaluated as the autoregressive model it is")
        self.exact = self.autoregressive or not is_diffusion(pretrained)  # a drafter writes its base's text
        positions = getattr(base_of(pretrained).config.get_text_config(), "max_position_embeddings", None)
        self.max_length = window_length(pretrained, max_length or positions)
        self.max_gen_toks, self.settings = max_gen_toks, {"seed": seed, **settings}
        self.split, self.progress = split, progress

    # -- what the harness expects of every model

    @property
    def eot_token_id(self) -> int:
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.tokenizer.name_or_path.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:  # a chat template may have written the BOS
            add_special_tokens = not (self.tokenizer.bos_token and string.startswith(self.tokenizer.bos_token))
        return text_ids(self.tokenizer, string, add_special_tokens)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        turn = {"add_generation_prompt": add_generation_prompt, "continue_final_message": not add_generation_prompt}
        return self.tokenizer.apply_chat_template(chat_history, tokenize=False, **turn)

    def get_model_info(self) -> dict[str, Any]:
        """Every setting that a figure depends on, for the results file."""
        return {
            "diffusion": getattr(base_of(self.model).config, "diffusion", None),
            "autoregressive": self.autoregressive,
            "likelihood": "exact" if self.exact else self.bound | {"batch_size": self.batch_size},
            "decoding": self.settings,
            "max_length": self.max_length,
            "max_gen_toks": self.max_gen_toks,
            "dtype": str(base_of(self.model).dtype),
        }

    # -- likelihood

    def _log_likelihoods(self, rows: list[Row]) -> list[float]:
        parts = [part for row in rows for part in windows(row, self.max_length)]
        options = {"split": self.split, "progress": self.progress, "batch_size": self.batch_size}
        measure, options = (autoregressive_rows, options) if self.exact else (bound_rows, options | self.bound)
        found = measure(self.model, parts, **options).nats if parts else []
        return [-nats for nats in found] + [0.0] * (len(rows) - len(found))  # the last texts may be empty

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **kwargs: Any) -> list[tuple]:
        rows = []
        for number, (_, context, completion) in enumerate(requests):
            ids = tuple(context + completion)
            if len(completion) < self.max_length:
                ids = ids[-self.max_length :]
            rows.append(Row(ids, max(len(ids) - len(completion), 1), number))
        return list(zip(self._log_likelihoods(rows), over_processes(self._greedy, rows, self.split), strict=True))

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        texts = [self.tok_encode(request.args[0], add_special_tokens=False) for request in requests]
        return self._log_likelihoods([Row((self.prefix_token_id, *ids), 1, i) for i, ids in enumerate(texts)])

    def _greedy(self, rows: list[Row]) -> list[bool]:
        """Whether greedy decoding, one token a step, writes exactly the completion."""

        def length(row: Row) -> dict[str, int]:
            return {"max_new_tokens": len(row.ids) - row.first}

        groups, same = Collator(rows, lambda row: -len(row.ids), length, "gen_kwargs"), []
        for batch in groups.get_batched(n=self.batch_size):
            n = length(batch[0])["max_new_tokens"]
            written = [()] * len(batch)  # a completion as long as the window is not tried
            if n < self.max_length:
                # The defaults, over what the model was saved with: a threshold commits several tokens a step.
                settings = {**vars(UnmaskingSettings()), "max_new_tokens": n}
                written = self._decode([row.ids[: row.first] for row in batch], settings)
            same += [tuple(ids[:n]) == row.ids[row.first :] for ids, row in zip(written, batch, strict=True)]
        return groups.get_original(same)

    # -- generation

    def _decode(self, prompts: list[Sequence[int]], settings: dict[str, Any]) -> list[list[int]]:
        batch = self.tokenizer.pad({"input_ids": list(map(list, prompts))}, padding_side="left", return_tensors="pt")
        inputs = {name: batch[name].to(base_of(self.model).device) for name in ("input_ids", "attention_mask")}
        ends = end_token_ids(self.model, self.tokenizer)
        settings = ({"eos_token_id": ends} if ends else {}) | settings
        if self.autoregressive:
            sampled = settings.get("temperature", 0.0) > 0
            names = ("max_new_tokens", "eos_token_id", *(("temperature", "top_p", "top_k") if sampled else ()))
            chosen = {name: settings[name] for name in names if name in settings}
            ids = generate_autoregressive(self.model, **inputs, do_sample=sampled, **chosen)
        else:
            ids = generate(self.model, **inputs, **{**settings, "return_dict_in_generate": False})
        return ids[:, inputs["input_ids"].shape[1] :].tolist()

    def _answer_settings(self, given: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Decoding settings of a request, the user's over the task's, and what ends an answer."""
        given = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        until, length = given.pop("until"), given.pop("max_gen_toks")
        if not given.pop("do_sample"):
            given["temperature"] = 0.0
        return {"max_new_tokens": length, **given, **self.settings}, until

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return over_processes(self._answers, requests, self.split)

    def _answers(self, requests: list[Any]) -> list[str]:
        items = [(self.tok_encode(request.args[0]), *request.args) for request in requests]
        groups, answers = Collator(items, lambda item: -len(item[0]), lambda item: item[2], "gen_kwargs"), []
        with tqdm(total=len(requests), desc="answers", disable=None if self.progress else True) as bar:
            for batch in groups.get_batched(n=self.batch_size):
                settings, until = self._answer_settings(batch[0][2])
                length = settings["max_new_tokens"]
                if length >= self.max_length:
                    raise UserError(
                        f"`max_new_tokens`={length} leaves no prompt in {self.max_length} tokens; lower it."
                    )
                room = self.max_length - length
                written = self._decode([ids[-room:] for ids, _, _ in batch], settings)
                texts = self.tokenizer.batch_decode(written, skip_special_tokens=True)
                for (_, *request), text in zip(batch, texts, strict=True):
                    answers.append(postprocess_generated_text(text, until, None))
                    self.cache_hook.add_partial("generate_until", tuple(request), answers[-1])
                bar.update(len(batch))
        return groups.get_original(answers)


def _device(wanted: str | None) -> str | None:
    """Of what the harness passes on, which is "cuda:0" where the user chose nothing."""
    kind, _, number = (wanted or "").partition(":")
    if kind != "cuda":
        return wanted
    if not torch.cuda.is_available():
        return None
    if number and place()[1] == 1:  # of several processes each has its own
        torch.cuda.set_device(int(number))
    return "cuda"


# -- running tasks


@cache
def _task_manager(data: str | None, include_defaults: bool) -> TaskManager:
    """Tasks by name, those that `data` has files for on these; made once, as the harness reads thousands of definitions of its own."""
    folder = tempfile.TemporaryDirectory()
    for name, definition in (local_tasks(Path(data)) if data else {}).items():
        (Path(folder.name) / f"{name}.yaml").write_text(yaml.safe_dump(definition))
    manager = TaskManager(include_path=folder.name, include_defaults=include_defaults)
    manager.definitions = folder  # read when a task is loaded
    return manager


def run_tasks(
    lm: DiffusionLM, names: Sequence[str], *, data: str | None = None, chat_template: bool = False, **options: Any
) -> dict[str, Any] | None:
    """Runs tasks of the harness; those that the `data` folder has files for on these, the others on the hub's.

    Args:
        options: of `simple_evaluate`: `limit`, `num_fewshot`, …

    Returns:
        What the harness returns: `results`, `configs`, `samples`, … by task; None in all but the first of several processes.
    """
    local = names_of(local_tasks(Path(data))) if data else set()
    manager = _task_manager(data, include_defaults=not set(names) <= local)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown or not names:
        raise UserError(
            f"`tasks`: {', '.join(unknown) or 'none'} unknown to lm-evaluation-harness; with files in `data`: "
            f"{sorted(local) or 'none'} (it can hold {', '.join(LOCAL_TASKS)})."
        )
    for name in names:
        try:
            manager.load(name)
        except Exception as error:  # the loaders raise a dozen types for "offline" and "not there"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            advice = f"give its files with `data`, which can hold {sorted(LOCAL_TASKS)}, or go online"
            raise UserError(f"`tasks`: {name!r} cannot be loaded: {reason}; {advice}.") from error
    seeds = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")
    return simple_evaluate(
        model=lm,
        tasks=list(names),
        apply_chat_template=chat_template,
        task_manager=manager,
        bootstrap_iters=1000,
        **options,
        **dict.fromkeys(seeds, lm.settings["seed"]),
    )


if __name__ == "__main__":
    # The harness's own command line, which then knows the model: `python -m llm_diffusion.evaluation.harness --model llm_diffusion …`
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
