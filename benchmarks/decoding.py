"""Decoding measured, each figure a ratio of two ways in one run, in turns.

    python benchmarks/decoding.py canvas                                  # LLaDA's loop against ours, Qwen3-0.6B's shape: minutes
    python benchmarks/decoding.py blocks                                  # dLLM's block sampler against ours, SmolLM2 and 6 x 256
    python benchmarks/decoding.py adapters                                # SmolLM2 with LoRA, with packed weights and without
    python benchmarks/decoding.py batch                                   # 64 ragged prompts together against one by one
    python benchmarks/decoding.py tiny output/tiny/sft_model              # a trained model against its AR base, same prompts
    python benchmarks/decoding.py shapes                                  # a GPU: against AR with a static cache, and the bandwidth

`canvas`: random weights, as many steps for all, so the ratio is that of the work of a step: the whole canvas against the vocabulary or one
block of it, and the whole text or one block through the layers. How far an approximate cache goes astray there is the worst case: random
weights are sure of nothing. `tiny --approximate-cache dual` says what it costs a trained model. `shapes`: random weights too, tokens per
forward dealt out by `steps`.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from llm_diffusion import convert_to_diffusion, generate, load_diffusion_model
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import encode_prompts, evaluate_answers
from llm_diffusion.models import packing
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

# hidden size, layers, heads, heads of keys, intermediate size, tied
SHAPES = {
    "0.6b": (1024, 28, 16, 8, 3072, True),
    "4b": (2560, 36, 32, 8, 9728, True),
    "8b": (4096, 36, 32, 8, 12288, False),
}
PLAIN, PLAIN_64, OURS = "LLaDA's loop", "LLaDA's loop, float64", "ours"
BANDWIDTH = 4.8e12  # bytes a second of an H200


def model_of(shape: str, device: str, dtype: torch.dtype, layers: int | None = None, **options: Any) -> Any:
    """A converted Qwen3 with random weights."""
    hidden, depth, heads, kv_heads, intermediate, tied = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden,
        num_hidden_layers=layers or depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=128,
        intermediate_size=intermediate,
        tie_word_embeddings=tied,
        max_position_embeddings=4096,
        eos_token_id=None,
        dtype=dtype,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen3ForCausalLM(config).to(dtype).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    return convert_to_diffusion(model, tokenizer, **options)


@torch.no_grad()
def llada(
    model: Any, prompt: torch.Tensor, new: int, steps: int, block_length: int, dtype: torch.dtype
) -> torch.Tensor:
    """LLaDA's `generate`, low-confidence remasking, greedy, read as the model's read-out asks; the mask token is banned."""
    record = model.config.diffusion
    mask_id, shift = record["mask_token_id"], int(record["right_shift_logits"])
    x = torch.cat([prompt, torch.full((len(prompt), new), mask_id, device=prompt.device)], -1)
    per_block = steps // (new // block_length)
    for start in range(prompt.shape[1], x.shape[1], block_length):
        for step in range(per_block):
            masked = x == mask_id
            logits = model(input_ids=x, use_cache=False).logits
            if shift:
                logits = torch.cat([logits[:, :1], logits[:, :-1]], 1)
            logits[..., mask_id] = -1e9
            token = logits.argmax(-1)
            confidence = logits.to(dtype).softmax(-1).gather(-1, token[..., None]).squeeze(-1)
            confidence[:, start + block_length :] = -torch.inf
            confidence = confidence.masked_fill(~masked, -torch.inf)
            left = masked[:, start : start + block_length].sum(-1)
            for row in range(len(x)):
                chosen = confidence[row].topk(int(-(-left[row] // (per_block - step)))).indices
                x[row, chosen] = token[row, chosen]
    return x


@torch.no_grad()
def dllm(model: Any, prompt: torch.Tensor, new: int, per_block: int, block_length: int) -> torch.Tensor:
    """dLLM's `BD3LMSampler`, greedy, for prompts of whole blocks: the text so far is encoded anew for every block, its cache copied for
    every step; the mask token is banned."""
    record, x = model.config.diffusion, prompt
    mask_id, shift = record["mask_token_id"], record["right_shift_logits"]
    for _ in range(new // block_length):
        width = x.shape[1] + block_length
        block_of = torch.arange(width) // block_length
        allowed = (block_of[None] <= block_of[:, None]).expand(len(x), 1, -1, -1)
        allowed = torch.zeros(allowed.shape, dtype=model.dtype).masked_fill(~allowed, torch.finfo(model.dtype).min)
        places = torch.arange(width).expand(len(x), -1)
        start = x.shape[1]
        prefix = model(
            x,
            attention_mask=allowed[:, :, :start, :start],
            position_ids=places[:, :start],
            past_key_values=DynamicCache(),
        )
        block = torch.full((len(x), block_length), mask_id)
        for step in range(per_block):
            logits = model(
                block,
                attention_mask=allowed[:, :, start:],
                position_ids=places[:, start:],
                past_key_values=copy.deepcopy(prefix.past_key_values),
            ).logits
            if shift:
                logits = torch.cat([prefix.logits[:, -1:], logits[:, :-1]], 1)
            logits[..., mask_id] = -1e9
            token, masked = logits.argmax(-1), block == mask_id
            confidence = logits.softmax(-1).gather(-1, token[..., None]).squeeze(-1).masked_fill(~masked, -torch.inf)
            for row in range(len(x)):
                chosen = confidence[row].topk(int(-(-masked[row].sum() // (per_block - step)))).indices
                block[row, chosen] = token[row, chosen]
        x = torch.cat([x, block], 1)
    return x


def clock() -> float:
    """Seconds; on one CPU thread those that it was at work, which neighbours on the machine do not change."""
    alone = torch.get_num_threads() == 1 and not torch.cuda.is_available()
    return time.thread_time() if alone else time.perf_counter()


def seconds(
    ways: dict[str, Callable[[], Any]], rounds: int, device: str = "cpu"
) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way, in turns, and what each returned."""
    took: dict[str, list[float]] = {name: [] for name in ways}
    results = {}
    for _ in range(rounds):
        for name, run in ways.items():
            started = clock()
            results[name] = run()
            if device == "cuda":
                torch.cuda.synchronize()
            took[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in took.items()}, results


@contextmanager
def timed_forwards(model: Any) -> Any:
    """Seconds spent in the model's forwards."""
    spent, inner = [], model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        started = clock()
        output = inner(*args, **kwargs)
        spent.append(clock() - started)
        return output

    model.forward = forward
    try:
        yield spent
    finally:
        model.forward = inner


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    return table


def canvas(prompt_length: int, new: int, steps: int, block_length: int, rounds: int, layers: int | None) -> list[Table]:
    prompt = torch.randint(5, 1000, (1, prompt_length), generator=torch.Generator().manual_seed(0))
    settings = {"max_new_tokens": new, "steps": steps, "eos_token_id": None}
    model = model_of("0.6b", "cpu", torch.float32, layers, right_shift_logits=False)
    mode = {"attention": "block", "block_length": block_length, "clean_context": "causal"}
    blocks = model_of("0.6b", "cpu", torch.float32, layers, **mode)
    loop = partial(llada, model, prompt, new, steps, block_length)
    ways = {
        PLAIN: partial(loop, torch.float32),
        PLAIN_64: partial(loop, torch.float64),
        OURS: partial(generate, model, prompt, block_length=block_length, **settings),
        **{
            f"ours, approximate cache, {reach}": partial(
                generate, model, prompt, block_length=block_length, approximate_cache=reach, **settings
            )
            for reach in ("prefix", "dual")
        },
        "ours, block-causal, cached": partial(generate, blocks, prompt, **settings),
    }
    generate(
        model, prompt, max_new_tokens=8, steps=1, eos_token_id=None, approximate_cache="dual"
    )  # warms up, and probes
    took, results = seconds(ways, rounds)
    title = f"Qwen3-0.6B's shape, fp32, CPU: prompt {prompt_length}, {new} new tokens, blocks of {block_length}, {steps} steps"
    table = table_of(title, "", "seconds", "times ours", "times the loop", "times the float64 loop", "same tokens")
    for name, value in took.items():
        same = (results[name] == results[PLAIN]).sum().item() - prompt_length
        ratios = f"{took[PLAIN] / value:.2f}", f"{took[PLAIN_64] / value:.2f}"
        same = "" if "cached" in name else f"{same} of {new}, {100 * same / new:.0f} %"
        table.add_row(name, f"{value:.1f}", f"{took[OURS] / value:.2f}", *ratios, same)
    started = clock()
    with timed_forwards(model) as spent:
        ways[OURS]()
    share = 1 - sum(spent) / (clock() - started)
    table.caption = f"outside the model's forwards, ours: {100 * share:.1f} % of the time"
    return [table]


def small_model(**options: Any) -> Any:
    """A converted Llama of six layers of 256, with random weights."""
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8192, eos_token_id=None, **sizes)).eval()
    return convert_to_diffusion(model, AutoTokenizer.from_pretrained(TINY_MODEL_PATH), **options)


def blocks(prompt_length: int, new: int, per_block: int, block_length: int, rounds: int) -> list[Table]:
    """The same weights and steps, so the same tokens: what is left is the work of a step."""
    title = f"prompt {prompt_length}, {new} new tokens, blocks of {block_length}, {per_block} steps each, fp32, CPU"
    table = table_of(title, "model", "rows", "dLLM's sampler, s", "ours, s", "times", "same tokens")
    options = {"attention": "block", "block_length": block_length, "clean_context": "block"}
    models = {
        "SmolLM2-135M": load_diffusion_model("smollm2", device="cpu", dtype=torch.float32, **options)[0],
        "6 x 256": small_model(**options),
    }
    for name, model in models.items():
        for rows in (1, 8):
            prompt = torch.randint(5, 1000, (rows, prompt_length), generator=torch.Generator().manual_seed(0))
            settings = {"max_new_tokens": new, "steps": per_block * new // block_length, "eos_token_id": None}
            ways = {
                "dllm": partial(dllm, model, prompt, new, per_block, block_length),
                "ours": partial(generate, model, prompt, **settings),
            }
            generate(model, prompt, max_new_tokens=block_length, steps=1, eos_token_id=None)  # warms up
            took, results = seconds(ways, rounds)
            same = (results["dllm"] == results["ours"])[:, prompt_length:].sum().item()
            figures = f"{took['dllm']:.2f}", f"{took['ours']:.2f}", f"{took['dllm'] / took['ours']:.2f}"
            table.add_row(name, str(rows), *figures, f"{same} of {rows * new}")
    return [table]


def adapters(rounds: int) -> list[Table]:
    """LoRA of rank 32 on every layer, away from its start; the same calls with copies of the weights and without."""
    title = "SmolLM2-135M with LoRA of rank 32, prompt 32, 48 new tokens, CPU"
    table = table_of(title, "attention", "type", "rows", "as it is, s", "packed and merged, s", "times", "same tokens")
    room, types = packing.ROOM, [torch.float32] + [torch.bfloat16] * packing.has_fast_bfloat16()
    for options, dtype in itertools.product(({}, {"attention": "block", "block_length": 4}), types):
        packing.ROOM = room
        model, _ = load_diffusion_model("smollm2", device="cpu", dtype=dtype, **options)
        model = get_peft_model(model, LoraConfig(r=32, target_modules="all-linear")).eval()
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=1e-3)
        plain = copy.deepcopy(model)
        generate(model, torch.ones(1, 4, dtype=torch.long), max_new_tokens=4, steps=1)  # makes its copies
        packing.ROOM = 0.0  # and the other gets none
        for rows in (1, 8):
            prompt = torch.randint(5, 1000, (rows, 32), generator=torch.Generator().manual_seed(0))
            settings = {"max_new_tokens": 48, "steps": 12, "eos_token_id": None}
            ways = {"plain": partial(generate, plain, prompt, **settings)}
            ways["packed"] = partial(generate, model, prompt, **settings)
            took, results = seconds(ways, rounds)
            same = (results["plain"] == results["packed"])[:, 32:].sum().item()
            figures = f"{took['plain']:.2f}", f"{took['packed']:.2f}", f"{took['plain'] / took['packed']:.2f}"
            table.add_row(
                options.get("attention", "bidirectional"), str(dtype)[6:], str(rows), *figures, f"{same} of {rows * 48}"
            )
    return [table]


def batch(prompts: int, rounds: int) -> list[Table]:
    return [
        batch_table("bidirectional", {}, prompts, rounds),
        batch_table("blocks of 4, cached", {"attention": "block", "block_length": 4}, prompts, rounds),
    ]


def batch_table(name: str, options: dict[str, Any], prompts: int, rounds: int) -> Table:
    examples = list(tiny_dataset(prompts, seed=1, split="test"))
    model, tokenizer = load_diffusion_model("tiny", device="cpu", **options)
    encoded = [encode_prompts(tokenizer, [example["messages"][:-1]]) for example in examples]
    together = encode_prompts(tokenizer, [example["messages"][:-1] for example in examples])
    settings = {"max_new_tokens": 16, "steps": 8, "eos_token_id": None} | ({} if options else {"block_length": 8})
    ways = {
        "one by one": lambda: [generate(model, **row, **settings)[0, -16:] for row in encoded],
        "together": lambda: generate(model, **together, **settings)[:, -16:],
    }
    took, results = seconds(ways, rounds)
    same = sum(torch.equal(a, b) for a, b in zip(results["one by one"], results["together"], strict=True))
    lengths = [row["input_ids"].shape[1] for row in encoded]
    title = f"{name}: {prompts} prompts of {min(lengths)} to {max(lengths)} tokens"
    table = table_of(title, "", "seconds", "times", "same rows")
    for way, value in took.items():
        table.add_row(way, f"{value:.2f}", f"{took['one by one'] / value:.2f}", f"{same} of {prompts}")
    return table


def tiny(folder: str, prompts: int, settings: dict[str, Any]) -> list[Table]:
    model, tokenizer = load_diffusion_model(folder, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32).eval()
    examples = list(tiny_dataset(prompts, seed=1, split="test"))
    new = {"max_new_tokens": 80}
    base = evaluate_answers(plain, tokenizer, examples, autoregressive=True, **new)
    ours = evaluate_answers(model, tokenizer, examples, **new, **settings)
    encoded = [encode_prompts(tokenizer, [example["messages"][:-1]]) for example in examples[:100]]
    ways = {
        "AR base, cached": lambda: [plain.generate(**row, do_sample=False, use_cache=True, **new) for row in encoded],
        "unmasking": lambda: [generate(model, **row, **new, **settings) for row in encoded],
    }
    took, _ = seconds(ways, 3)
    table = table_of(
        f"{folder}, {prompts} held-out prompts, batch 1",
        "",
        "exact match",
        "tokens/forward",
        "seconds",
        "times the base",
    )
    for name, report in zip(ways, (base, ours), strict=True):
        figures = f"{took[name]:.2f}", f"{took['AR base, cached'] / took[name]:.2f}"
        table.add_row(name, f"{report.mean:.1f}", f"{report.tokens_per_forward:.2f}", *figures)
    return [table]


def shapes(names: list[str], new: int = 256, prompt_length: int = 128) -> list[Table]:
    """On a GPU: tokens a second by shape, batch and block, at fixed tokens per forward, against AR and what the memory allows."""
    if not torch.cuda.is_available():
        raise SystemExit("error: `shapes` needs a CUDA device, and there is none.")
    table = table_of(
        "bf16", "shape", "batch", "way", "tokens/forward", "tokens/s", "times AR", "of the bandwidth's floor"
    )
    for shape in names:
        for rows in (1, 16):
            prompt = torch.randint(5, 1000, (rows, prompt_length), device="cuda")
            model = model_of(shape, "cuda", torch.bfloat16, attention="block", block_length=4)
            weights = sum(parameter.numel() for parameter in model.parameters()) * 2
            host = type(model).generate
            ar = partial(
                host,
                model,
                prompt,
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                cache_implementation="static",
            )
            ar()  # compiles
            took, _ = seconds({"AR": ar}, 3, "cuda")
            table.add_row(*row_of(shape, rows, "AR, static cache, compiled", 1.0, took["AR"], took["AR"], new, weights))
            del model
            for block in (4, 8, 16, 32):
                model = model_of(shape, "cuda", torch.bfloat16, attention="block", block_length=block)
                for rate in (2, 4):
                    run = partial(generate, model, prompt, max_new_tokens=new, steps=new // rate, eos_token_id=None)
                    run()
                    ours, _ = seconds({"ours": run}, 3, "cuda")
                    table.add_row(
                        *row_of(shape, rows, f"blocks of {block}", rate, ours["ours"], took["AR"], new, weights)
                    )
                del model
    return [table]


def row_of(shape: str, rows: int, way: str, rate: float, took: float, ar: float, new: int, weights: int) -> list[str]:
    floor = new / rate * weights / BANDWIDTH
    return [
        shape,
        str(rows),
        way,
        f"{rate:g}",
        f"{rows * new / took:.0f}",
        f"{ar / took:.2f}",
        f"{100 * floor / took:.0f} %",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("canvas")
    one.add_argument("--prompt", type=int, default=128)
    one.add_argument("--new", type=int, default=256)
    one.add_argument("--steps", type=int, default=8)
    one.add_argument("--block-length", type=int, default=32)
    one.add_argument("--rounds", type=int, default=1)
    one.add_argument("--layers", type=int, help="fewer layers than the shape has")
    five = commands.add_parser("blocks")
    five.add_argument("--prompt", type=int, default=128)
    five.add_argument("--new", type=int, default=64)
    five.add_argument("--per-block", type=int, default=4, help="steps of a block")
    five.add_argument("--block-length", type=int, default=16)
    five.add_argument("--rounds", type=int, default=3)
    six = commands.add_parser("adapters")
    six.add_argument("--rounds", type=int, default=3)
    two = commands.add_parser("batch")
    two.add_argument("--prompts", type=int, default=64)
    two.add_argument("--rounds", type=int, default=3)
    three = commands.add_parser("tiny")
    three.add_argument("model")
    three.add_argument("--prompts", type=int, default=300)
    three.add_argument("--threshold", type=float, default=0.9)
    three.add_argument("--block-length", type=int)
    three.add_argument("--approximate-cache", choices=("prefix", "dual"))
    four = commands.add_parser("shapes")
    four.add_argument("names", nargs="*", default=list(SHAPES))
    given = parser.parse_args()
    if given.command == "canvas":
        tables = canvas(given.prompt, given.new, given.steps, given.block_length, given.rounds, given.layers)
    elif given.command == "blocks":
        tables = blocks(given.prompt, given.new, given.per_block, given.block_length, given.rounds)
    elif given.command == "adapters":
        tables = adapters(given.rounds)
    elif given.command == "batch":
        tables = batch(given.prompts, given.rounds)
    elif given.command == "tiny":
        settings = {"threshold": given.threshold, "block_length": given.block_length}
        settings["approximate_cache"] = given.approximate_cache
        tables = tiny(given.model, given.prompts, settings)
    else:
        tables = shapes(given.names)
    console = Console(width=None if sys.stdout.isatty() else 130)
    for table in tables:
        console.print(table)


if __name__ == "__main__":
    main()
