"""The model behind lm-evaluation-harness, and running the harness's tasks, on local files too (`tasks`).

`llm_diffusion` is a model of the harness: `loglikelihood` by a bound with stratified exact counts, `generate_until` by the model's
own decoding. A model that was not trained to fill masks is evaluated as the AR model it is; of a drafter for its base the likelihood is the base's.
Trade-off: the harness counts a bound as a likelihood, so perplexities are upper bounds and choices are ranked by bounds. Alternative: own
loops over every benchmark, with own prompts, whose figures compare with nobody's.

References: LLaDA (arXiv 2502.09992, appendix B.5) for scoring choices by a bound.
"""

from __future__ import annotations

import logging
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .. import UserError
from ..generation.config import DiffusionGenerationConfig
from ..generation.generate import generate, generate_autoregressive
from ..models.loading import load_diffusion_model
from ..models.patching import base_of
from ..models.record import record_of
from .likelihood import autoregressive_rows, bound_rows, is_diffusion
from .processes import over_processes, place
from .tasks import LOCAL_TASKS, local_tasks, names_of
from .windows import Row, window_length, windows

logger = logging.getLogger(__name__)

RENAMED = {
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
}  # a task's names for the longest answer


@register_model("llm_diffusion")
class DiffusionLM(TemplateLM):
    """A converted model in the harness: `lm_eval --model llm_diffusion --model_args pretrained=output/tiny/sft_model`.

    Args:
        pretrained: name or folder, or a loaded model with its `tokenizer`.
        autoregressive: score and decode as the AR model of the same weights; None: where it was not trained to be anything else.
        estimator, n_samples, seed: of the bound, see `likelihood.bound_rows`.
        max_gen_toks: longest answer where neither the task nor `settings` say it.
        split: deal the requests out to the processes that `accelerate launch` started; each runs the tasks and has all results.
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
        if isinstance(pretrained, str):
            pretrained, tokenizer = load_diffusion_model(
                pretrained, device=_device(device), trust_remote_code=trust_remote_code
            )
        self.model, self.tokenizer = pretrained.eval(), tokenizer
        self.batch_size = _whole_number("batch_size", batch_size)
        self.bound = {"estimator": estimator, "n_samples": n_samples, "seed": seed, "batch_size": self.batch_size}
        record = record_of(pretrained)
        if estimator == "per_block":
            self.bound["block_length"] = settings.get("block_length")
        self.autoregressive = not record.trained if autoregressive is None else autoregressive
        if autoregressive is None and self.autoregressive:
            logger.warning(
                "the model is not trained as a diffusion model: it is evaluated as the autoregressive model it is"
            )
        self.exact = self.autoregressive or not is_diffusion(pretrained)  # what a drafter's base says is its text
        positions = getattr(base_of(pretrained).config.get_text_config(), "max_position_embeddings", None)
        self.max_length, self.stride = window_length(pretrained, max_length or positions, None)
        self.max_gen_toks, self.settings, self.progress = max_gen_toks, {"seed": seed, **settings}, progress
        self.split = split

    # -- what the harness asks of every model

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
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def get_model_info(self) -> dict[str, Any]:
        """Every setting that a figure depends on, for the results file."""
        return {
            "diffusion": getattr(base_of(self.model).config, "diffusion", None),
            "autoregressive": self.autoregressive,
            "likelihood": "exact" if self.exact else self.bound,
            "decoding": self.settings,
            "max_length": self.max_length,
            "max_gen_toks": self.max_gen_toks,
            "dtype": str(base_of(self.model).dtype),
        }

    # -- likelihood

    def _nats(self, rows: list[Row]) -> list[float]:
        shared = {"split": self.split, "progress": self.progress}
        if self.exact:
            return autoregressive_rows(self.model, rows, batch_size=self.batch_size, **shared).nats
        return bound_rows(self.model, rows, **shared, **self.bound).nats

    def _loglikelihood_tokens(self, requests: list[tuple], disable_tqdm: bool = False, **kwargs: Any) -> list[tuple]:
        rows = []
        for number, (_, context, completion) in enumerate(requests):
            ids = tuple(context + completion)
            if len(completion) < self.max_length:
                ids = ids[-self.max_length :]
            rows.append(Row(ids, max(len(ids) - len(completion), 1), number))
        parts = [part for row in rows for part in windows(row, self.max_length, self.stride)]
        same = over_processes(self._greedy, rows) if self.split else self._greedy(rows)
        return [(-nats, each) for nats, each in zip(self._nats(parts), same, strict=True)]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        rows = [
            Row((self.prefix_token_id, *self.tok_encode(request.args[0], add_special_tokens=False)), 1, number)
            for number, request in enumerate(requests)
        ]
        return [-nats for nats in self._nats([p for row in rows for p in windows(row, self.max_length, self.stride)])]

    def _greedy(self, rows: Sequence[Row]) -> list[bool]:
        """Whether greedy decoding, one token a step, writes exactly the completion."""
        groups, same = defaultdict(list), [False] * len(rows)
        for number, row in enumerate(rows):
            if len(row.ids) <= self.max_length:
                groups[len(row.ids) - row.first].append((number, row))
        for length, group in groups.items():
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                written = self._decode(
                    [list(row.ids[: row.first]) for _, row in batch], {"max_new_tokens": length, "seed": 0}
                )
                for (number, row), answer in zip(batch, written, strict=True):
                    same[number] = answer[:length] == list(row.ids[row.first :])
        return same

    # -- generation

    def _decode(self, prompts: list[list[int]], settings: dict[str, Any]) -> list[list[int]]:
        batch = self.tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")
        batch = {
            name: value.to(base_of(self.model).device) for name, value in batch.items() if name != "token_type_ids"
        }
        if self.autoregressive:
            sampled = settings.get("temperature", 0.0) > 0
            chosen = {
                name: settings[name] for name in ("temperature", "top_p", "top_k") if sampled and name in settings
            }
            ids = generate_autoregressive(
                self.model, **batch, max_new_tokens=settings["max_new_tokens"], do_sample=sampled, **chosen
            )
        else:
            ids = generate(self.model, **batch, **{**settings, "return_dict_in_generate": False})
        return ids[:, batch["input_ids"].shape[1] :].tolist()

    def _answer_settings(self, asked: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Decoding settings of a request, the user's over the task's, and what ends an answer."""
        asked = dict(asked)
        until = asked.pop("until", None) or []
        lengths = [asked.pop(name) for name in sorted(RENAMED & set(asked))]
        if not asked.pop("do_sample", asked.get("temperature", 0.0) > 0):
            asked["temperature"] = 0.0
        settings = {"max_new_tokens": lengths[0] if lengths else self.max_gen_toks, **asked, **self.settings}
        return settings, [until] if isinstance(until, str) else list(until)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        return over_processes(self._answers, requests) if self.split else self._answers(requests)

    def _answers(self, requests: Sequence[Any]) -> list[str]:
        answers, groups = [""] * len(requests), defaultdict(list)
        for number, request in enumerate(requests):
            groups[repr(request.args[1])].append((number, self.tok_encode(request.args[0]), request.args[1]))
        bar = tqdm(total=len(requests), desc="answers", disable=None if self.progress else True)
        for group in groups.values():
            settings, until = self._answer_settings(group[0][2])
            room = self.max_length - settings["max_new_tokens"]
            if room < 1:
                raise UserError(
                    f"`max_new_tokens`={settings['max_new_tokens']} leaves no room for a prompt in {self.max_length} tokens; lower it."
                )
            group.sort(key=lambda entry: -len(entry[1]))
            for start in range(0, len(group), self.batch_size):
                batch = group[start : start + self.batch_size]
                written = self._decode([prompt[-room:] for _, prompt, _ in batch], settings)
                for (number, _, asked), ids in zip(batch, written, strict=True):
                    answers[number] = _cut(self.tokenizer.decode(ids, skip_special_tokens=True), until)
                    self.cache_hook.add_partial("generate_until", (requests[number].args[0], asked), answers[number])
                bar.update(len(batch))
        bar.close()
        return answers


def _device(asked: str | None) -> str | None:
    """Of what the harness asks for, which is "cuda:0" wherever nobody says anything."""
    kind, _, number = (asked or "").partition(":")
    if kind != "cuda":
        return asked
    if not torch.cuda.is_available():
        return None
    if number and place()[1] == 1:  # of several processes each has its own
        torch.cuda.set_device(int(number))
    return "cuda"


def _whole_number(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise UserError(f"`{name}` must be a whole number from 1, got {value!r}.")
    return int(value)


def _cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the strings that end it."""
    ends = [text.find(end) for end in until if end and end in text]
    return text[: min(ends)] if ends else text


# -- running tasks


def run_tasks(
    lm: DiffusionLM,
    names: Sequence[str],
    *,
    data: str | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
    chat_template: bool = False,
) -> dict[str, Any] | None:
    """Runs tasks of the harness; those that the `data` folder has files for on these, the others on the hub's.

    Returns:
        What the harness returns: `results`, `configs`, `samples`, … by task; None in all but the first of several processes.

    Raises:
        ValueError, OSError: unknown task, or one whose data is neither here nor to be had.
    """
    local = local_tasks(Path(data).expanduser()) if data else {}
    with tempfile.TemporaryDirectory() as folder:
        for name, definition in local.items():
            (Path(folder) / f"{name}.yaml").write_text(yaml.safe_dump(definition))
        manager = TaskManager(include_path=folder, include_defaults=not set(names) <= names_of(local))
        unknown = [name for name in names if not manager.match_tasks([name])]
        if unknown or not names:
            raise UserError(
                f"`tasks`: {', '.join(unknown) or 'none'} unknown to lm-evaluation-harness; with files in `data`: {sorted(names_of(local)) or 'none'} "
                f"(it can hold {', '.join(LOCAL_TASKS)})."
            )
        for name in names:
            try:
                manager.load(name)
            except Exception as error:  # the loaders raise a dozen types for "offline" and "not there"
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise OSError(
                    f"`tasks`: {name!r} cannot be loaded: {reason}; give its files with `data`, which can hold {sorted(LOCAL_TASKS)}, or "
                    "go online."
                ) from error
        return simple_evaluate(
            model=lm,
            tasks=list(names),
            limit=limit,
            num_fewshot=num_fewshot,
            apply_chat_template=chat_template,
            task_manager=manager,
            bootstrap_iters=1000,
            random_seed=lm.settings["seed"],
            numpy_random_seed=lm.settings["seed"],
            torch_random_seed=lm.settings["seed"],
            fewshot_random_seed=lm.settings["seed"],
        )


if __name__ == "__main__":
    # The harness's own command line, which then knows the model: `python -m llm_diffusion.harness --model llm_diffusion …`
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
