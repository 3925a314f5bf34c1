"""Training SmolLM2-135M-Instruct on a CPU: QLoRA beside LoRA, Diffusion-DPO, and what blocks keep of the model at three budgets.

    python benchmarks/smollm2_training.py qlora --rows /tmp/rows --questions gsm8k/train.jsonl
    python benchmarks/smollm2_training.py dpo --rows /tmp/rows --questions gsm8k/train.jsonl     after `qlora`: from its adapter of blocks
    python benchmarks/smollm2_training.py blocks --rows /tmp/rows --questions gsm8k/train.jsonl --texts wikitext2/test.txt \
        --lambada lambada/lambada_test.jsonl

Rows are those of `drafter.py`, made once and kept: the base's own greedy answers, half to prompts that it writes itself, half to the questions.
Settings are those of the presets `smollm2` and `smollm2-block`, but for the batch. Every case of `qlora` and `dpo` runs in a process of its
own; its memory is the high-water mark of the resident set, and what of it was there before the first step.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from drafter import on_this_machine, rows_of
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from llm_diffusion import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    generate,
    load_diffusion_model,
    preference_pairs,
)
from llm_diffusion.config import resolve
from llm_diffusion.evaluation.likelihood import autoregressive_rows, bound_rows, text_rows, windows
from llm_diffusion.evaluation.metrics import overlap
from llm_diffusion.generation.generate import generate_autoregressive
from llm_diffusion.models.loading import load_autoregressive
from llm_diffusion.models.packing import has_fast_bfloat16
from llm_diffusion.models.special_tokens import end_token_ids
from llm_diffusion.objective.modes import IGNORE_INDEX

MODES = {"lossless": "smollm2", "block": "smollm2-block"}
QUIET = {"save_strategy": "no", "eval_strategy": "no", "report_to": "none", "use_cpu": True, "disable_tqdm": True}


def peak() -> float:
    """GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def rows(args: argparse.Namespace) -> tuple[Dataset, Dataset]:
    args.output = args.rows
    args.output.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_diffusion_model("smollm2", attention="lossless", **on_this_machine())
    kinds, held_out = rows_of(model, tokenizer, args)
    return concatenate_datasets(kinds).shuffle(seed=args.seed), held_out


def trainer_of(
    mode: str,
    steps: int,
    train: Dataset,
    args: argparse.Namespace,
    quantization: str | None = None,
    held_out: Dataset | None = None,
    **changes: Any,
) -> DiffusionSFTTrainer:
    preset = resolve(MODES[mode] + ("+qlora" if quantization else ""))
    dtype = torch.bfloat16 if has_fast_bfloat16() and not quantization else torch.float32
    model, tokenizer = load_diffusion_model(
        "smollm2",
        attention=mode,
        block_length=preset.training["block_length"],
        device="cpu",
        quantization=quantization,
        dtype=changes.pop("dtype", dtype),
    )
    settings = {
        **preset.training,
        "learning_rate": preset.learning_rate,
        **QUIET,
        "per_device_train_batch_size": args.batch_size,
        "per_device_eval_batch_size": args.batch_size,
        "max_length": preset.max_length,
        "max_steps": steps,
        "logging_steps": steps,
        "seed": args.seed,
        **changes,
    }
    return DiffusionSFTTrainer(
        model,
        DiffusionSFTConfig(str(args.rows / "out"), **settings),
        train_dataset=train,
        eval_dataset=held_out,
        processing_class=tokenizer,
        peft_config=LoraConfig(**preset.lora_config, task_type="CAUSAL_LM"),
    )


# -- QLoRA


def one_qlora(mode: str, kind: str, args: argparse.Namespace) -> dict[str, Any]:
    train, held_out = (Dataset.load_from_disk(str(args.rows / name)) for name in ("train", "held_out"))
    how = {"quantization": "nf4"} if kind == "nf4" else {"dtype": getattr(torch, kind), "bf16": kind == "bfloat16"}
    trainer = trainer_of(mode, args.steps, train, args, held_out=held_out, **how)
    loaded, start, began = peak(), trainer.evaluate(), time.process_time()
    trainer.train()
    seconds, most = (time.process_time() - began) / args.steps, peak()
    end, figure = trainer.evaluate(), "eval_accepted_length" if mode == "lossless" else "eval_nelbo"
    trainer.save_model(str(args.rows / f"{mode}-{kind}"))
    return {"start": start[figure], "end": end[figure], "seconds": seconds, "loaded": loaded, "peak": most}


def qlora(args: argparse.Namespace) -> None:
    for name, part in zip(("train", "held_out"), rows(args), strict=True):
        part.save_to_disk(str(args.rows / name))
    print(f"{args.steps} steps of {args.batch_size} rows, {torch.get_num_threads()} thread(s)\n", flush=True)
    print("| attention | base | held-out figure, before | after | CPU seconds a step | GiB, loaded | at most |")
    print("|---|---|--:|--:|--:|--:|--:|", flush=True)
    for mode in MODES:
        for kind in args.kinds:
            found = in_process(f"{mode}/{kind}", args)
            print(
                f"| {mode} | {kind} | {found['start']:.2f} | {found['end']:.2f} | {found['seconds']:.1f} | {found['loaded']:.2f} | "
                f"{found['peak']:.2f} |",
                flush=True,
            )


def in_process(case: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, args.what, "--case", case, "--rows", str(args.rows)]
    command += ["--steps", str(args.steps), "--batch-size", str(args.batch_size), "--seed", str(args.seed)]
    command += ["--questions", str(args.questions)] if args.questions else []
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# -- Diffusion-DPO


def one_dpo(args: argparse.Namespace) -> dict[str, Any]:
    lines = args.questions.read_text().splitlines()[-8 * args.batch_size * args.steps :]
    pairs = preference_pairs([json.loads(line) for line in lines], seed=args.seed)
    model, tokenizer = load_diffusion_model(args.case, device="cpu", dtype=torch.float32)
    settings = {"learning_rate": 2e-4, "lr_scheduler_type": "constant", "num_draws": 4, "max_length": 384}
    settings |= {"per_device_train_batch_size": args.batch_size, "max_steps": args.steps, "logging_steps": 1}
    trainer = DiffusionDPOTrainer(
        model,
        args=DiffusionDPOConfig(str(args.rows / "out"), **QUIET, **settings, seed=args.seed, bf16=False),
        train_dataset=pairs,
        processing_class=tokenizer,
    )
    before, began = peak(), time.process_time()
    trainer.train()
    log = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "pairs": len(pairs),
        "losses": [float(row["loss"]) for row in log],
        "margins": [float(row["rewards/margins"]) for row in log],
        "preferred": [float(row["rewards/accuracies"]) for row in log],
        "seconds": (time.process_time() - began) / args.steps,
        "loaded": before,
        "peak": peak(),
    }


def dpo(args: argparse.Namespace) -> None:
    found = in_process(str(args.rows / "block-float32"), args)
    print(
        f"{args.steps} steps of {args.batch_size} pairs of {found['pairs']}, {found['seconds']:.1f} CPU seconds a step"
    )
    print(f"loss {found['losses'][0]:.6f} at first (log 2 = {math.log(2):.6f}), mean of the last five", end=" ")
    print(", ".join(f"{name} {sum(found[name][-5:]) / 5:.3f}" for name in ("losses", "margins", "preferred")))
    print(f"GiB: {found['loaded']:.2f} loaded, {found['peak']:.2f} at most")


# -- blocks, beside the base and a model trained as AR on the same rows


def answered(model: Any, tokenizer: Any, held_out: Dataset, autoregressive: bool, **how: Any) -> dict[str, float]:
    """Agreement with the base's own answers: tokens until the first that differs, ROUGE-L; tokens a forward and a second."""
    ends = end_token_ids(model, tokenizer)
    how |= {"max_new_tokens": 64, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": ends}
    same, texts, references, tokens, passes, seconds = [], [], [], 0, 0, 0.0
    for row in held_out:
        n = sum(label == IGNORE_INDEX for label in row["labels"])
        want, prompt = row["input_ids"][n : n + 64], torch.tensor([row["input_ids"][:n]])
        began = time.perf_counter()
        if autoregressive:
            ids = generate_autoregressive(model, prompt, do_sample=False, **how)[0, n:]
            passes += len(ids)
        else:
            output = generate(model, prompt, return_dict_in_generate=True, **how)
            ids = output.sequences[0, n:]
            passes += int(output.nfe[0])
        seconds += time.perf_counter() - began
        got = ids.tolist()
        got = got[: next((i for i, token in enumerate(got, start=1) if token in ends), len(got))]
        tokens += len(got)
        same.append(
            next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), min(len(got), len(want)))
        )
        texts.append(tokenizer.decode(got, skip_special_tokens=True))
        references.append(tokenizer.decode(want, skip_special_tokens=True))
    rouge = overlap(texts, references)["rougeL"]
    return {"prefix": sum(same) / len(same), "rougeL": rouge, "per_forward": tokens / passes, "speed": tokens / seconds}


def last_words(model: Any, tokenizer: Any, texts: list[str], autoregressive: bool, **how: Any) -> float:
    """Per cent of LAMBADA's last words that greedy decoding writes."""
    right = 0
    for text in texts:
        start, _, word = text.rpartition(" ")
        prompt = torch.tensor([tokenizer(start).input_ids])
        n = len(tokenizer(" " + word, add_special_tokens=False).input_ids)
        write = generate_autoregressive if autoregressive else generate
        options = {"max_new_tokens": n, "pad_token_id": tokenizer.pad_token_id, **how}
        ids = write(model, prompt, **options, **({"do_sample": False} if autoregressive else {}))
        right += tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip() == word
    return 100 * right / len(texts)


def blocks(args: argparse.Namespace) -> None:
    train, held_out = rows(args)
    texts = [json.loads(line)["text"] for line in args.lambada.read_text().splitlines()[: args.limit]]
    base, tokenizer = load_autoregressive("smollm2", device="cpu", dtype=torch.float32)
    whole = text_rows(tokenizer, [args.texts.read_text()[:100_000]])[0]
    held_out_text = windows(whole, 256)[: args.windows]
    preset = resolve("smollm2-block")
    print(
        f"budgets of {args.budgets} steps of {args.batch_size} rows; {args.windows} windows of 256 tokens, {len(texts)} of"
    )
    print(
        f"LAMBADA's texts, {len(held_out)} held-out answers of 64 tokens, threshold {preset.generation['threshold']}\n"
    )
    print(
        "| model | steps | tokens | wikitext-2, nats a token | LAMBADA, % | same tokens at first, of 64 | ROUGE-L | tokens a forward | tokens/s |"
    )
    print("|---|--:|--:|--:|--:|--:|--:|--:|--:|", flush=True)

    def line(name: str, steps: int, tokens: float, model: Any, autoregressive: bool, **how: Any) -> None:
        model.eval()
        if autoregressive:
            nll = autoregressive_rows(model, held_out_text, batch_size=4).nats_per_token
        else:
            nll = bound_rows(model, held_out_text, n_samples=8, batch_size=4).nats_per_token
        word = last_words(model, tokenizer, texts, autoregressive, **how)
        said = answered(model, tokenizer, held_out, autoregressive, **how)
        print(
            f"| {name} | {steps} | {tokens:,.0f} | {'' if autoregressive else '≤ '}{nll:.3f} | {word:.0f} | {said['prefix']:.1f} | "
            f"{said['rougeL']:.3f} | {said['per_forward']:.2f} | {said['speed']:.1f} |",
            flush=True,
        )

    def tokens_of(trainer: Any) -> float:
        return next(row["num_tokens"] for row in reversed(trainer.state.log_history) if "num_tokens" in row)

    line("base, AR", 0, 0, base, True)
    for steps in args.budgets:
        trainer = trainer_of("block", steps, train, args)
        trainer.train()
        how = {"threshold": preset.generation["threshold"]}
        line("blocks of 4", steps, tokens_of(trainer), trainer.model.float(), False, **how)
        line("blocks of 4, a token a pass", steps, tokens_of(trainer), trainer.model, False, threshold=1.0)
        twin = SFTTrainer(
            copy.deepcopy(base),
            SFTConfig(
                str(args.rows / "out"),
                **QUIET,
                per_device_train_batch_size=args.batch_size,
                learning_rate=preset.learning_rate,
                lr_scheduler_type="cosine",
                warmup_steps=5,
                max_steps=steps,
                logging_steps=steps,
                seed=args.seed,
                bf16=has_fast_bfloat16(),
                gradient_checkpointing=False,
            ),
            train_dataset=train,
            processing_class=tokenizer,
            peft_config=LoraConfig(**preset.lora_config, task_type="CAUSAL_LM"),
        )
        twin.train()
        line("AR, trained on the same rows", steps, tokens_of(twin), twin.model.merge_and_unload(), True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("qlora", "dpo", "blocks"))
    parser.add_argument("--rows", type=Path, required=True, help="folder where the base's answers are kept")
    parser.add_argument("--questions", type=Path, help="JSONL file with `question` and `answer`")
    parser.add_argument("--skip", type=int, default=0, help="questions of the file to leave out")
    parser.add_argument("--prompts", type=int, default=256, help="of each kind")
    parser.add_argument("--steps", type=int, help="100 of `qlora`, 20 of `dpo`")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--kinds", nargs="+", default=["float32", "nf4"], help="of the base in `qlora`")
    parser.add_argument("--budgets", nargs="+", type=int, default=[20, 60, 120], help="steps of `blocks`")
    parser.add_argument("--texts", type=Path, help="a text file")
    parser.add_argument("--lambada", type=Path, help="JSONL file with `text`")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--limit", type=int, default=60, help="of LAMBADA's texts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.steps = args.steps or {"qlora": 100, "dpo": 20}.get(args.what)
    if args.case:
        found = one_dpo(args) if args.what == "dpo" else one_qlora(*args.case.split("/"), args)
        print(json.dumps(found))
    else:
        {"qlora": qlora, "dpo": dpo, "blocks": blocks}[args.what](args)


if __name__ == "__main__":
    main()
