"""Measures the peak memory of real training steps beside the estimates of `llm_diffusion.analysis`.

    python benchmarks/memory.py                  # CPU, fp32, random models of 80 to 90 million parameters, ten minutes (Linux)
    python benchmarks/memory.py --device cuda    # CUDA, bf16: Qwen3-0.6B, Qwen3-4B and Llama-3.1-8B shapes; 48 GB, 20 GB of disk
    python benchmarks/memory.py --only qwen3-lora
    python benchmarks/memory.py --output benchmarks/results/memory-cpu.md

Every case runs in a process of its own: two optimiser steps of `DiffusionSFTTrainer`, two micro-batches each, random tokens, all of
them masked, rows of unequal length. A small model is trained first, so that imports, thread pools and code caches are not counted.
On a CPU the figure is the growth of the resident set's high-water mark, with a C allocator that gives freed blocks back at once
(fixed mmap threshold, one arena): the default one keeps and splits them, and its figure depends on the order of frees. On CUDA it is
`torch.cuda.max_memory_allocated`; what the caching allocator reserves beyond it is shown beside, to be compared with the reserve
that the analysis adds.
Trade-off: random weights; memory does not depend on their values. Alternative: real checkpoints, which need a hub.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

GIB = 2**30
ALLOCATOR = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
}
PARTS = ("weights", "gradients", "optimizer", "activations", "logits", "masks")
HEADS = {"optimizer": "optimiser", "peak": "measured"}
QUIET = {"HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": (
        "qwen3",
        {
            "vocab_size": 16384,
            "hidden_size": 640,
            "intermediate_size": 1920,
            "num_hidden_layers": 12,
            "num_attention_heads": 10,
            "num_key_value_heads": 5,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
    ),
    "llama": (
        "llama",
        {
            "vocab_size": 16384,
            "hidden_size": 768,
            "intermediate_size": 2048,
            "num_hidden_layers": 10,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": ("gpt2", {"vocab_size": 16384, "n_embd": 768, "n_layer": 10, "n_head": 12}),
    "qwen3-0.6b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3-4b": (
        "qwen3",
        {
            "vocab_size": 151936,
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "tie_word_embeddings": True,
        },
    ),
    "llama-8b": (
        "llama",
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": False,
        },
    ),
}

# name: (shape, kind, rows, tokens, attention, gradient checkpointing)
Case = tuple[str, str, int, int, str, bool]
CASES: dict[str, dict[str, Case]] = {
    "cpu": {
        "qwen3-lora": ("qwen3", "lora", 4, 128, "bidirectional", False),
        "qwen3-lora-checkpointing": ("qwen3", "lora", 4, 256, "bidirectional", True),
        "qwen3-lora-block": ("qwen3", "lora", 4, 64, "block", False),
        "qwen3-lora-block-checkpointing": ("qwen3", "lora", 4, 256, "block", True),
        "qwen3-full": ("qwen3", "full", 4, 64, "bidirectional", False),
        "qwen3-full-checkpointing": ("qwen3", "full", 4, 256, "bidirectional", True),
        "llama-lora": ("llama", "lora", 4, 128, "bidirectional", False),
        "llama-lora-checkpointing": ("llama", "lora", 4, 256, "bidirectional", True),
        "llama-full": ("llama", "full", 4, 64, "bidirectional", False),
        "gpt2-lora": ("gpt2", "lora", 4, 128, "bidirectional", False),
        "gpt2-lora-checkpointing": ("gpt2", "lora", 4, 256, "bidirectional", True),
        "gpt2-full": ("gpt2", "full", 4, 64, "bidirectional", False),
    },
    "cuda": {
        f"{shape}-{kind}{'-block' if attention == 'block' else ''}{'' if checkpointing else '-no-checkpointing'}": (
            shape,
            kind,
            rows,
            768,
            attention,
            checkpointing,
        )
        for shape, kind, rows, attention, checkpointing in (
            ("qwen3-0.6b", "lora", 16, "bidirectional", True),
            ("qwen3-0.6b", "lora", 4, "bidirectional", False),
            ("qwen3-0.6b", "lora", 8, "block", True),
            ("qwen3-0.6b", "qlora", 16, "bidirectional", True),
            ("qwen3-0.6b", "full", 8, "bidirectional", True),
            ("qwen3-0.6b", "full", 4, "bidirectional", False),
            ("qwen3-4b", "lora", 16, "bidirectional", True),
            ("qwen3-4b", "lora", 4, "block", True),
            ("qwen3-4b", "qlora", 4, "bidirectional", True),
            ("llama-8b", "lora", 8, "bidirectional", True),
            ("llama-8b", "qlora", 8, "bidirectional", True),
        )
    },
}


def config_of(shape: str, **changes: Any) -> Any:
    from transformers import AutoConfig

    family, values = SHAPES[shape]
    ends = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    return AutoConfig.for_model(family, **{**values, **ends, **changes})


def build_model(config: Any, kind: str, device: str) -> Any:
    """A model with random weights, as `load_diffusion_model` gives it on `device`; full fine-tuning in fp32."""
    import torch
    from transformers import AutoModelForCausalLM

    from llm_diffusion.models.checkpoints import quantization_config

    torch.manual_seed(0)
    if device == "cpu":
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dtype = torch.float32 if kind == "full" else torch.bfloat16
    with torch.device("cuda" if kind != "qlora" else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if kind != "qlora":
        return model
    with tempfile.TemporaryDirectory() as folder:  # quantisation is a matter of loading
        model.save_pretrained(folder)
        del model
        options = {
            "quantization_config": quantization_config("nf4", "cuda"),
            "dtype": dtype,
            "device_map": {"": "cuda"},
        }
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def random_rows(case: Case) -> Any:
    """Random tokens; neighbouring rows differ in length by one, so that both parts of a batch are padded, as text is."""
    import torch
    from datasets import Dataset

    _, _, rows, length, _, _ = case
    generator = torch.Generator().manual_seed(0)
    lengths = [length - i % 2 for i in range(4 * rows)]
    return Dataset.from_list(
        [{"input_ids": torch.randint(10, 500, (n,), generator=generator).tolist()} for n in lengths]
    )


def train(model: Any, case: Case, device: str) -> None:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
    from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

    _, kind, rows, length, attention, checkpointing = case
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        settings = DiffusionSFTConfig(
            folder,
            max_steps=2,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=rows,
            max_length=length,
            attention=attention,
            gradient_checkpointing=checkpointing,
            min_mask_probability=0.99,
            use_cpu=device == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        DiffusionSFTTrainer(
            model,
            settings,
            train_dataset=random_rows(case),
            processing_class=AutoTokenizer.from_pretrained(TINY_MODEL_PATH),
            peft_config=None if kind == "full" else lora,
        ).train()


def resident(field: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (high-water mark) of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def measure(name: str, device: str) -> dict[str, float]:
    """Runs one case in this process -> peak bytes of weights and training together (`peak`), and `reserved` on CUDA."""
    import torch

    case = CASES[device][name]
    shape, kind, *_ = case
    small = {"num_hidden_layers": 2, "vocab_size": 1024}
    train(build_model(config_of(shape, **small), kind, device), (shape, kind, 4, 16, *case[4:]), device)
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        model = build_model(config_of(shape), kind, device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        train(model, case, device)
        return {
            "peak": torch.cuda.max_memory_allocated() - before,
            "reserved": torch.cuda.max_memory_reserved() - before,
        }
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # what the small model left behind would be used again, uncounted
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    train(build_model(config_of(shape), kind, device), case, device)
    return {"peak": resident("VmHWM") - before}


def run_case(name: str, device: str) -> dict[str, Any]:
    """Measures a case in a fresh process and estimates it in this one."""
    from llm_diffusion.analysis import ModelMemory, TrainingSetup

    shape, kind, rows, length, attention, checkpointing = CASES[device][name]
    setup = TrainingSetup(kind, rows, length, 16, attention, checkpointing)
    estimate = ModelMemory(config_of(shape)).training(setup, device)
    environment = {**os.environ, **QUIET, **(ALLOCATOR if device == "cpu" else {})}
    command = [sys.executable, __file__, "--device", device, "--measure", name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        return {"case": name, **estimate, "error": (done.stderr.strip().splitlines() or ["killed"])[-1]}
    measured = {key: value / GIB for key, value in json.loads(done.stdout.strip().splitlines()[-1]).items()}
    return {"case": name, **estimate, **measured, "ratio": estimate["total"] / measured["peak"]}


def print_row(row: dict[str, Any]) -> None:
    parts = " ".join(f"{row[key]:7.2f}" for key in PARTS)
    end = row["error"] if "error" in row else f"{row['peak']:8.2f}  {row['ratio']:.2f}"
    reserved = f"  (reserved {row['reserved']:.2f})" if "reserved" in row else ""
    print(f"{row['case']:<32} {parts} {row['total']:8.2f} {end}{reserved}", flush=True)


def markdown(rows: list[dict[str, Any]], device: str) -> str:
    """The rows as a table, under the command that made them."""
    how = "on a CPU, fp32: GiB of a training step, estimated part by part, and the measured growth of the resident set."
    if device == "cuda":
        how = "on CUDA, bf16: GiB of a training step, estimated part by part, and what was allocated and reserved at the peak."
    measured = ["peak", "reserved"] if device == "cuda" else ["peak"]
    heads = ["case", *PARTS, "estimate", *measured, "ratio"]
    lines = [f"`python benchmarks/memory.py {shlex.join(sys.argv[1:])}`", how, ""]
    lines += [
        "| " + " | ".join(HEADS.get(head, head) for head in heads) + " |",
        "|---" + "|--:" * (len(heads) - 1) + "|",
    ]
    for row in rows:
        sizes = [f"{row[key]:.2f}" if key in row else "-" for key in (*PARTS, "total", *measured, "ratio")]
        name = f"{row['case']} ({row['error']})" if "error" in row else row["case"]
        lines.append(f"| {' | '.join([name, *sizes])} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", help="run the cases whose name contains this")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    parser.add_argument("--output", type=Path, help="write the rows to this file as a Markdown table")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, arguments.device)))
        return
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: there is no CUDA device here")
    names = [name for name in CASES[arguments.device] if (arguments.only or "") in name]
    print(f"GiB{'':<29} weights   grads   optim  activ.  logits   masks estimate measured ratio")
    rows = []
    for name in names:
        rows.append(run_case(name, arguments.device))
        print_row(rows[-1])
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(markdown(rows, arguments.device))


if __name__ == "__main__":
    main()
