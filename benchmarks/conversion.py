"""What conversion costs: the probe in milliseconds, and a training step of a converted model against a native one.

    python benchmarks/conversion.py [--device cuda] [--rounds 30] [--output benchmarks/results/conversion-cpu.md]

The native call is the same kernel without a mask: the unpatched model, told `is_causal=False` call by call. Both take turns in one run,
and the ratio of each pair is taken, so that a busy machine slows both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from llm_diffusion import load_diffusion_model, patch_causal_attention, probe_attention
from llm_diffusion.models.attention import METHODS
from llm_diffusion.objective.attention_masks import annealed

SHAPES = {
    "cpu": {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 6, "num_attention_heads": 8},
    "cuda": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 16},
}


def seconds(step: Callable[[], None], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def step_of(model: LlamaForCausalLM, ids: torch.Tensor, **inputs: object) -> Callable[[], None]:
    """A forward and a backward pass over `ids`, scored at a few places."""
    keep = torch.arange(16, device=ids.device)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        model(input_ids=ids, use_cache=False, logits_to_keep=keep, **inputs).logits.float().square().mean().backward()

    return step


def steps(device: str, rows: int, length: int) -> dict[str, Callable[[], None]]:
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    native = LlamaForCausalLM(LlamaConfig(vocab_size=4096, max_position_embeddings=4096, **SHAPES[device]))
    native = native.to(device, dtype).train()
    ids = torch.randint(0, 4096, (rows, length), device=device)
    found = {"native non-causal call": step_of(native, ids, is_causal=False)}
    for method in METHODS:
        model = copy.deepcopy(native)
        patch_causal_attention(model, method)
        found[f"converted, {method}"] = step_of(model, ids)
    way = annealed(torch.ones(rows, length, dtype=torch.long, device=device), 0.5, dtype)
    found["on the way (soft mask)"] = step_of(native, ids, attention_mask=way)
    return found


def table(device: str, rounds: int, rows: int, length: int) -> str:
    """Markdown: median ratio over rounds in which all take turns."""
    candidates = steps(device, rows, length)
    for step in candidates.values():
        step()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, step in candidates.items():
            times[name].append(seconds(step, device))
    native = times["native non-causal call"]
    lines = [f"| step of {rows} x {length} tokens on {device} | ms | against native |", "|---|---|---|"]
    for name, own in times.items():
        ratio = statistics.median(a / b for a, b in zip(own, native, strict=True))
        lines.append(f"| {name} | {1000 * statistics.median(own):.1f} | {ratio:.3f} |")
    return "\n".join(lines)


def probe(device: str) -> str:
    model, _ = load_diffusion_model("tiny", device=device)
    probe_attention(model)
    best = min(seconds(lambda: probe_attention(model), device) for _ in range(20))
    return f"`probe_attention` on the tiny model: {1000 * best:.1f} ms (asked: under 50), padded and unpadded."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=sorted(SHAPES))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    text = (
        probe(arguments.device) + "\n\n" + table(arguments.device, arguments.rounds, arguments.rows, arguments.length)
    )
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
