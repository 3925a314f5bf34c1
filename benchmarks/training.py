"""Steps of `DiffusionSFTTrainer` beside those of TRL's `SFTTrainer`: the same model, rows and settings, every figure a ratio in one run.

    python benchmarks/training.py                  # CPU, fp32 (Linux)
    python benchmarks/training.py --only wide
    python benchmarks/training.py --output benchmarks/results/training-cpu.md
    python benchmarks/training.py --device cuda    # real shapes, random weights, bf16: tokens a second, MFU, memory; 48 GB

On a CPU every case is run by three trainers in turn, again and again in one process, and their fastest steps are compared: ours, TRL's,
and ours with a loss that builds full logits. A step's time is that of its one thread on the processor: what neighbours on the machine
add to it, they add to the slower steps. Memory is the growth of the
resident set's high-water mark, each trainer in a process of its own (see memory.py). All rows are as long as the others: the three
do the same forward positions a step. `outside` is the share of a step that is not spent in the model's forward, in backward or in the
optimiser: collating, noise, metrics, the host's loop.
Trade-off: random tokens and weights; neither time nor memory depends on them. Alternative: real checkpoints, which need a hub.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from memory import ALLOCATOR, GIB, QUIET, SHAPES, build_model, config_of, resident

TRAINERS = ("ours", "sft", "full")
SHAPES["tiny"] = (
    "qwen3",
    {
        "vocab_size": 512,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
)
SHAPES["wide"] = (
    "qwen3",
    {
        "vocab_size": 151936,
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "tie_word_embeddings": True,
    },
)
# name: (shape, kind, rows, tokens a row, settings)
CASES: dict[str, tuple[str, str, int, int, dict[str, Any]]] = {
    "tiny-lora": ("tiny", "lora", 16, 128, {}),
    "tiny-full": ("tiny", "full", 16, 128, {}),
    "tiny-checkpointing": ("tiny", "lora", 16, 128, {"gradient_checkpointing": True}),
    "wide-lora": ("wide", "lora", 1, 128, {}),
    "wide-full": ("wide", "full", 1, 128, {}),
    "wide-half-masked": ("wide", "lora", 1, 128, {"min_mask_probability": 0.499, "max_mask_probability": 0.501}),
}
GPU_CASES = {
    f"{shape}-{kind}-{length}{'' if checkpointing else '-no-checkpointing'}": (
        shape,
        kind,
        rows * 768 // length,
        length,
        {"gradient_checkpointing": checkpointing},
    )
    for shape, rows in (("qwen3-0.6b", 32), ("qwen3-4b", 8), ("llama-8b", 8))
    for kind in ("lora", "qlora")
    for length, checkpointing in ((768, True), (2048, True), (2048, False))
}
# Dense bf16 FLOP/s, by a part of the device's name.
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "RTX A6000": 155e12, "RTX 4090": 165e12}
OURS = ("min_mask_probability", "max_mask_probability", "attention")


def trainer_of(which: str, case: str, device: str, steps: int, small: bool = False) -> Any:
    """A trainer of `which` kind, ready to train `steps` steps; `small`: on a model that only warms the process up."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
    from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

    shape, kind, rows, length, settings = {**CASES, **GPU_CASES}[case]
    changes = {"num_hidden_layers": 1, "vocab_size": 1024} if small else {}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(10, 400, (rows * steps, length), generator=generator).tolist()
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    common = {
        "output_dir": tempfile.mkdtemp(),
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "max_length": length,
        "gradient_checkpointing": False,
        "use_cpu": device == "cpu",
        "bf16": device == "cuda",
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 10,
        "disable_tqdm": True,
        "dataloader_pin_memory": device == "cuda",
        "optim": "paged_adamw_8bit" if kind == "qlora" else "adamw_torch",
        **{key: value for key, value in settings.items() if key not in OURS or which != "sft"},
    }
    host, config = (SFTTrainer, SFTConfig) if which == "sft" else (DiffusionSFTTrainer, DiffusionSFTConfig)
    if which == "full":
        host = full_logits(host)
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    return host(
        build_model(config_of(shape, **changes), kind, device),
        config(**common),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        processing_class=tokenizer,
        peft_config=None if kind == "full" else lora,
    )


def full_logits(host: type) -> type:
    """Our trainer with the loss that most write first: logits of all tokens, then the masked ones among them."""
    from llm_diffusion.objective.losses import entropy, token_nll
    from llm_diffusion.training.scoring import Scores

    class FullLogits(host):
        def _score(self, model: Any, noisy: dict[str, Any], with_teacher: bool = False) -> Any:
            targets = noisy["targets"]
            keep = targets != -100
            logits = model(**noisy["inputs"], use_cache=False).logits
            nll = token_nll(logits.flatten(0, 1), targets.clamp(min=0).flatten()).view(targets.shape)[keep]
            plain = logits.detach()[keep]
            right = plain.argmax(-1) == targets[keep]
            return Scores(keep, nll, right, entropy(plain), keep.nonzero(as_tuple=True))

    return FullLogits


class StepTimes:
    """A callback that notes how long steps take, and how much of that is forward, backward and optimiser."""

    def __init__(self, trainer: Any) -> None:
        from transformers import TrainerCallback

        notes = self

        class Callback(TrainerCallback):
            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                notes.mark()

        self.seconds: list[float] = []
        self.inside: list[float] = []
        self._cuda = trainer.args.device.type == "cuda"
        self._now = time.perf_counter if self._cuda else time.process_time
        self._last, self._inside = None, 0.0
        trainer.add_callback(Callback())
        trainer.model.forward = self._timed(trainer.model.forward)
        trainer.accelerator.backward = self._timed(trainer.accelerator.backward)
        trainer.create_optimizer()
        trainer.optimizer.step = self._timed(trainer.optimizer.step)

    def _timed(self, function: Any) -> Any:
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self._now()
            result = function(*args, **kwargs)
            self._inside += self._now() - started
            return result

        return timed

    def mark(self) -> None:
        if self._cuda:
            import torch

            torch.cuda.synchronize()
        now = self._now()
        if self._last is not None:  # the first step of a run warms up
            self.seconds.append(now - self._last)
            self.inside.append(self._inside)
        self._last, self._inside = now, 0.0

    def start(self) -> None:
        self._last = None


def compare_times(case: str, rounds: int, steps: int = 3) -> dict[str, dict[str, float]]:
    """Seconds of the fastest step and the median share outside, by trainer; rounds of all trainers in turn."""
    trainers = {which: trainer_of(which, case, "cpu", steps) for which in TRAINERS}
    times = {which: StepTimes(trainer) for which, trainer in trainers.items()}
    for _ in range(rounds):
        for which, trainer in trainers.items():
            times[which].start()
            trainer.train()
    return {
        which: {
            "seconds": min(found.seconds),
            "outside": 1 - statistics.median(i / s for i, s in zip(found.inside, found.seconds, strict=True)),
        }
        for which, found in times.items()
    }


def peak_memory(case: str, which: str, device: str) -> dict[str, float]:
    """GiB that training adds to this process, weights among them; on CUDA also seconds a step."""
    import torch

    trainer_of(which, case, device, 2, small=True).train()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        trainer = trainer_of(which, case, device, 8)
        torch.cuda.reset_peak_memory_stats()
        times = StepTimes(trainer)
        trainer.train()
        return {
            "peak": (torch.cuda.max_memory_allocated() - before) / GIB,
            "seconds": statistics.median(times.seconds),
            "outside": 1 - sum(times.inside) / sum(times.seconds),
        }
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = resident("VmRSS")
    trainer = trainer_of(which, case, device, 2)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # From here on, as on CUDA: a model that is built from its config holds a tied head twice for a moment.
    Path("/proc/self/clear_refs").write_text("5")
    trainer.train()
    return {"peak": (resident("VmHWM") - before) / GIB}


def in_process(*arguments: str, device: str) -> dict[str, Any]:
    environment = {**os.environ, **QUIET, **(ALLOCATOR if device == "cpu" else {})}
    command = [sys.executable, __file__, "--device", device, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["killed"])[-1])
    return json.loads(done.stdout.strip().splitlines()[-1])


def packing_waste(max_length: int = 512, examples: int = 2000) -> float:
    """Share of the slots of packed batches that hold no text, over an epoch of the embedded tasks."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer
    from llm_diffusion.data.tiny import tiny_dataset
    from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

    trainer = DiffusionSFTTrainer(
        AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH),
        DiffusionSFTConfig(tempfile.mkdtemp(), packing=True, max_length=max_length, use_cpu=True, report_to="none"),
        train_dataset=tiny_dataset(examples),
        processing_class=AutoTokenizer.from_pretrained(TINY_MODEL_PATH),
    )
    slots = real = 0
    for batch in trainer.get_train_dataloader():
        slots += batch["attention_mask"].numel()
        real += int((batch["attention_mask"] > 0).sum())
    return 1 - real / slots


def model_flops(case: str, scored: float) -> float:
    """FLOPs of a step that the model needs, recomputation not counted. Frozen weights have no gradient: 4 a weight and token, not 6."""
    shape, _, rows, length, _ = GPU_CASES[case]
    values = SHAPES[shape][1]
    hidden, layers = values["hidden_size"], values["num_hidden_layers"]
    heads, kv = values["num_attention_heads"], values["num_key_value_heads"]
    width = values.get("head_dim", hidden // heads)
    layer = hidden * width * (2 * heads + 2 * kv) + 3 * hidden * values["intermediate_size"]
    attention = 3 * 4 * length * heads * width
    return rows * length * (layers * (4 * layer + attention) + scored * 4 * hidden * values["vocab_size"])


def cpu_row(case: str, rounds: int) -> dict[str, Any]:
    times = in_process("--times", case, "--rounds", str(rounds), device="cpu")
    peaks = {which: in_process("--peak", case, which, device="cpu")["peak"] for which in TRAINERS}
    ours = times["ours"]["seconds"]
    return {
        "case": case,
        "ms a step": f"{1000 * ours:.0f}",
        "throughput / TRL": f"{times['sft']['seconds'] / ours:.2f}",
        "throughput / full logits": f"{times['full']['seconds'] / ours:.2f}",
        "peak, GiB": f"{peaks['ours']:.2f}",
        "peak / TRL": f"{peaks['ours'] / peaks['sft']:.2f}",
        "peak / full logits": f"{peaks['ours'] / peaks['full']:.2f}",
        "outside, %": f"{100 * times['ours']['outside']:.1f}",
        "outside, TRL, %": f"{100 * times['sft']['outside']:.1f}",
    }


def gpu_row(case: str) -> dict[str, Any]:
    import torch

    _, _, rows, length, _ = GPU_CASES[case]
    found = {}
    for which in ("ours", "sft"):
        try:
            found[which] = in_process("--peak", case, which, device="cuda")
        except RuntimeError as error:
            return {"case": case, "tokens/s": f"{which}: {error}"}
    name = torch.cuda.get_device_name()
    peak = next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
    ours, sft = found["ours"], found["sft"]
    mfu = model_flops(case, 0.5) / ours["seconds"] / peak if peak else float("nan")
    return {
        "case": case,
        "tokens/s": f"{rows * length / ours['seconds']:,.0f}",
        "MFU, %": f"{100 * mfu:.0f}",
        "peak, GiB": f"{ours['peak']:.1f}",
        "throughput / TRL": f"{sft['seconds'] / ours['seconds']:.2f}",
        "peak / TRL": f"{ours['peak'] / sft['peak']:.2f}",
        "outside, %": f"{100 * ours['outside']:.1f}",
    }


def markdown(rows: list[dict[str, Any]], notes: list[str]) -> str:
    heads = list(rows[0])
    lines = [f"`python benchmarks/training.py {shlex.join(sys.argv[1:])}`", *notes, ""]
    lines += ["| " + " | ".join(heads) + " |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    lines += ["| " + " | ".join(str(row.get(head, "-")) for head in heads) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", default="", help="run the cases whose name contains this")
    parser.add_argument("--rounds", type=int, default=3, help="of the three trainers in turn, on a CPU")
    parser.add_argument("--output", type=Path, help="write the rows to this file as a Markdown table")
    parser.add_argument("--times", help=argparse.SUPPRESS)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.times:
        print(json.dumps(compare_times(arguments.times, arguments.rounds)))
        return
    if arguments.peak:
        print(json.dumps(peak_memory(*arguments.peak, arguments.device)))
        return
    cases = CASES if arguments.device == "cpu" else GPU_CASES
    if arguments.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: there is no CUDA device here")
    rows = []
    for case in (name for name in cases if arguments.only in name):
        rows.append(cpu_row(case, arguments.rounds) if arguments.device == "cpu" else gpu_row(case))
        print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    waste = packing_waste()
    notes = [
        f"on {'a CPU, fp32, its time on one thread' if arguments.device == 'cpu' else 'CUDA, bf16'}: `throughput` is steps a second over the other's, "
        f"`peak` the memory of training, weights among it. Packed rows of 512 tokens: {100 * waste:.1f} % of the slots hold no text."
    ]
    print(notes[0])
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(markdown(rows, notes))


if __name__ == "__main__":
    main()
