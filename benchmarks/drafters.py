"""Which drafter of SmolLM2 learns fastest: held-out accepted length at matched training tokens, one thing changed at a time.

    python benchmarks/drafters.py --rows /tmp/rows --questions gsm8k/train.jsonl --tokens 50000 --output benchmarks/results/drafters
    python benchmarks/drafters.py … --only "rank 64" "rank 4" --tokens 250000        # some of them, for longer
    python benchmarks/drafters.py … --report                                       # the table of what is there

Rows are those of `drafter.py`, made once and kept: the base's own greedy answers, half to prompts that it writes itself, half to the questions.
Every run starts from fresh adapters with the settings of the preset `smollm2`, at half of its learning rate, but for what its name says. It sees
its rows in an order of the seed until it has the tokens, at a rate that falls to zero along a cosine, and is then given the same held-out rows
under the same noise.
Finished runs are kept in `<output>.jsonl` and not run again.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from drafter import on_this_machine, rows_of
from peft import LoraConfig

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, load_diffusion_model
from llm_diffusion.config import resolve
from llm_diffusion.models.patching import base_of
from llm_diffusion.models.probing import CleanPrefix
from llm_diffusion.models.record import record_of

RATE = 2e-3  # of all runs but those that name another one; the preset's was chosen by them
HELD_OUT = 40  # rows of each kind: with a dozen, drafters differ by less than chance
# name -> what differs from the preset: settings of training, of `LoraConfig`, or the rows.
DRAFTERS: dict[str, dict[str, Any]] = {
    "the preset at learning rate 2e-3": {},
    "labels alone, no distribution": {"distillation_weight": 0.0},
    "labels and distribution, half each": {"distillation_weight": 0.5},
    "places weigh the same": {"draft_decay": 1.0},
    "places weigh 0.6 of the one before": {"draft_decay": 0.6},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "learning rate 4e-3": {"learning_rate": 4e-3},
    "rank 4": {"r": 4, "lora_alpha": 8},
    "rank 64": {"r": 64, "lora_alpha": 128},
    "attention layers alone": {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]},
    "blocks of 4": {"block_length": 4},
    "blocks of 16": {"block_length": 16},
    "its own prompts alone": {"rows": "own"},
    "the questions alone": {"rows": "questions"},
    "the questions, with the data's answers": {"rows": "data"},
    "two anchors a token": {"anchors": 2},
    "told the base's last hidden state": {"told": True},
}


class LastHiddenState(torch.nn.Module):
    """Adds to the embedding of the mask a projection of the base's hidden state before the block, at the last token that it read.

    The base's pass over clean text comes first in training, and leaves its hidden states here. Blocks whose first token is a mask
    too are drafted in the pass that verifies the text before them, which has no hidden state for them yet: those are told nothing.
    """

    def __init__(self, model: torch.nn.Module, mask_token_id: int) -> None:
        super().__init__()
        inner, self.mask_token_id = model.get_decoder(), mask_token_id
        self.projection = torch.nn.Linear(model.config.hidden_size, model.config.hidden_size, bias=False)
        torch.nn.init.zeros_(self.projection.weight)
        inner.register_forward_pre_hook(self._reads, with_kwargs=True)
        inner.norm.register_forward_hook(self._keeps)
        model.get_input_embeddings().register_forward_hook(self._tells)

    def _reads(self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.states = None
        if not isinstance(kwargs.get("past_key_values"), CleanPrefix):
            return
        ids, seen = kwargs["input_ids"], kwargs["attention_mask"][:, 0] == 0  # (B, N), (B, N, L + N)
        prefix, block = seen[..., : -ids.shape[1]], seen[..., -ids.shape[1] :]
        before = prefix.shape[-1] - 1 - prefix.flip(-1).long().argmax(-1)  # (B, N)
        known = ids.gather(-1, block.long().argmax(-1)) != self.mask_token_id
        told = known & prefix.any(-1) & (ids == self.mask_token_id)
        rows = torch.arange(len(ids))[:, None]
        self.states = (
            self.projection(torch.nn.functional.normalize(self.kept[rows, before].float(), dim=-1)) * told[..., None]
        )

    def _keeps(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        if self.states is None:
            self.kept = output.detach()

    def _tells(self, module: torch.nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
        return output if self.states is None else output + self.states.to(output.dtype)


def answers_of_data(args: argparse.Namespace) -> Dataset:
    lines = map(json.loads, args.questions.read_text().splitlines()[args.skip : args.skip + args.prompts])
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": line["question"]}],
                "completion": [{"role": "assistant", "content": line["answer"]}],
            }
            for line in lines
        ]
    )


def run(name: str, rows: dict[str, Dataset], held_out: Dataset, args: argparse.Namespace) -> dict[str, Any]:
    changes, preset = dict(DRAFTERS[name]), resolve("smollm2")
    train = rows[changes.pop("rows", "both")]
    block_length, anchors, told = changes.pop("block_length", 8), changes.pop("anchors", 1), changes.pop("told", False)
    if anchors > 1:  # a row that stands twice in a batch is cut into blocks at two places
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed))
        train = train.select(order.repeat_interleave(anchors).tolist())
    lora = {key: changes.pop(key) for key in ("r", "lora_alpha", "target_modules") if key in changes}
    options = on_this_machine()
    model, tokenizer = load_diffusion_model("smollm2", attention="lossless", block_length=block_length, **options)
    with tempfile.TemporaryDirectory() as folder:
        settings = {
            **preset.training,
            "learning_rate": RATE,
            "per_device_train_batch_size": args.batch_size * anchors,
            "train_sampling_strategy": "random" if anchors == 1 else "sequential",
            "per_device_eval_batch_size": args.batch_size,
            "max_length": preset.max_length,
            "seed": args.seed,
            "logging_steps": 10,
            "save_strategy": "no",
            "eval_strategy": "no",
            "report_to": "none",
            "use_cpu": options["device"] == "cpu",
            "bf16": options["dtype"] == torch.bfloat16,
            **changes,
            "block_length": block_length,
        }
        trainer = DiffusionSFTTrainer(
            model,
            DiffusionSFTConfig(folder, **settings, max_steps=1),
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=tokenizer,
            peft_config=LoraConfig(**preset.lora_config | lora, task_type="CAUSAL_LM"),
        )
        if told:
            hidden = LastHiddenState(base_of(trainer.model), record_of(trainer.model).mask_token_id)
            base_of(trainer.model).add_module("last_hidden_state", hidden)  # the optimiser looks for parameters here
        lengths = [len(row) for row in trainer.train_dataset["input_ids"]]
        trainer.args.max_steps = round(args.tokens / (args.batch_size * sum(lengths) / len(lengths)))
        began = time.time()
        trainer.train()
        minutes = (time.time() - began) / 60
        tokens = next(row["num_tokens"] for row in reversed(trainer.state.log_history) if "num_tokens" in row)
        return {
            "name": name,
            "asked": args.tokens,
            "seed": args.seed,
            "tokens": tokens / anchors,
            "steps": trainer.args.max_steps,
            "accepted": trainer.evaluate()["eval_accepted_length"],
            "minutes": minutes,
        }


def report(found: list[dict[str, Any]], args: argparse.Namespace) -> str:
    budgets = sorted({row["asked"] for row in found})
    lines = [
        "| | " + " | ".join(f"{budget / 1000:g}k tokens" for budget in budgets) + " |",
        "|---|" + "--:|" * len(budgets),
    ]
    for name in DRAFTERS:
        cells = []
        for budget in budgets:
            values = [row["accepted"] for row in found if (row["name"], row["asked"]) == (name, budget)]
            cells.append(f"{sum(values) / len(values):.2f}" if values else "")
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", dest="rows_folder", type=Path, help="where the base's answers are kept")
    parser.add_argument("--questions", type=Path, help="JSONL file with `question` and `answer`")
    parser.add_argument("--skip", type=int, default=0, help="questions of the file to leave out")
    parser.add_argument("--prompts", type=int, default=256, help="of each kind")
    parser.add_argument("--tokens", type=int, default=50_000)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=DRAFTERS, default=list(DRAFTERS))
    parser.add_argument("--output", type=Path, required=True, help="of the runs, without its ending")
    parser.add_argument("--report", action="store_true")
    args = parser.parse_args()
    file = args.output.with_suffix(".jsonl")
    found = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    if not args.report:
        args.output = args.rows_folder
        args.output.mkdir(parents=True, exist_ok=True)
        model, tokenizer = load_diffusion_model("smollm2", attention="lossless", **on_this_machine())
        (questions, own), held_out = rows_of(model, tokenizer, args, HELD_OUT)
        rows = {"questions": questions, "own": own, "both": concatenate_datasets([questions, own])}
        rows["data"] = answers_of_data(args)
        for name in args.only:
            if any((row["name"], row["asked"], row["seed"]) == (name, args.tokens, args.seed) for row in found):
                continue
            found.append(run(name, rows, held_out, args))
            print(found[-1], flush=True)
            with file.open("a") as out:
                out.write(json.dumps(found[-1]) + "\n")
    print(report(found, args))


if __name__ == "__main__":
    main()
