"""Memory over 3,000 calls of `generate` and 1,000 training steps of the embedded model: flat, or a leak.

    python benchmarks/soak.py                   # some minutes on two cores
    python benchmarks/soak.py --share 0.1 --only training

Prints a table of each part's memory in its middle (when caches are full, and the largest shapes were there) and at its end, and the
slope of a straight line through what was measured in between, in KiB a call. More than `--limit` ends it with an error, which means
something for whole runs alone: over a few dozen calls the allocator has not seen all shapes.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset


def resident() -> float:
    """MiB of this process that are in memory; on a GPU those that torch holds there are added."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    return pages * 4096 / 2**20 + torch.cuda.memory_allocated() / 2**20


def slope(measured: list[tuple[int, float]]) -> float:
    """Least squares, KiB a call, of (call, MiB)."""
    x, y = torch.tensor(measured, dtype=torch.float64).T
    x = x - x.mean()
    return float((x * (y - y.mean())).sum() / (x * x).sum()) * 1024


def generate_calls(attention: str, n: int) -> Iterator[int]:
    """One call after another, of other lengths, rows and rules."""
    model, tokenizer = ld.load_diffusion_model("tiny", attention=attention)
    if attention == "lossless":
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    rules = [{}, {"temperature": 0.7}] + ([] if attention == "lossless" else [{"threshold": 0.9}, {"steps": 8}])
    for call in range(n):
        texts = ["Tom has 3 apples"] * (1 + call % 3)
        batch = tokenizer(texts, return_tensors="pt", padding=True).to(model.device)
        model.generate(**batch, max_new_tokens=8 + call % 9, seed=call, **rules[call % len(rules)])
        yield call


class _Measure(TrainerCallback):
    def __init__(self, measure: Callable[[int], None]) -> None:
        self.measure = measure

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.measure(state.global_step)


def train(attention: str, n: int, measure: Callable[[int], None]) -> None:
    """Steps of LoRA over rows of many lengths."""
    rows = Dataset.from_list(list(tiny_dataset(256)))
    settings = {"max_steps": n, "per_device_train_batch_size": 2, "report_to": "none", "save_strategy": "no"}
    with tempfile.TemporaryDirectory() as folder:
        args = ld.DiffusionSFTConfig(folder, attention=attention, disable_tqdm=True, logging_steps=n, **settings)
        lora = LoraConfig(r=4, target_modules="all-linear")
        ld.DiffusionSFTTrainer(
            "tiny", args, train_dataset=rows, peft_config=lora, callbacks=[_Measure(measure)]
        ).train()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the calls and steps")
    parser.add_argument("--limit", type=float, default=8.0, help="KiB a call that are no leak")
    parser.add_argument("--only", choices=("generate", "training"), nargs="*", default=("generate", "training"))
    given = parser.parse_args()
    modes, worst = ("bidirectional", "block", "lossless"), 0.0
    print("| part | calls | MiB half way | MiB at the end | KiB a call |\n|---|--:|--:|--:|--:|")
    for kind, attention in itertools.product(given.only, modes):
        whole = {"generate": 3000, "training": 1000}[kind]
        n, measured = max(20, int(whole * given.share / len(modes))), []

        def measure(call: int, n: int = n, measured: list = measured) -> None:
            if call >= n // 2 and call % max(1, n // 100) == 0:
                gc.collect()
                measured.append((call, resident()))

        if kind == "generate":
            for call in generate_calls(attention, n):
                measure(call)
        else:
            train(attention, n, measure)
        found = slope(measured)
        worst = max(worst, found)
        print(
            f"| {kind}, {attention} | {n} | {measured[0][1]:.1f} | {measured[-1][1]:.1f} | {found:+.2f} |",
            flush=True,
        )
    if worst > given.limit:
        sys.exit(f"memory grows by {worst:.2f} KiB a call")


if __name__ == "__main__":
    main()
