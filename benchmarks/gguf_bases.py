"""Peak memory of the host while a base is loaded from a GGUF file: transformers' own loader beside `load_diffusion_model`.

    python benchmarks/gguf_bases.py [--kind Q8_0] [--output benchmarks/results/gguf-cpu.md]

A Qwen3-shaped model of 332 million random weights is written to a GGUF file and loaded by each in a process of its own. The figure is
`ru_maxrss` after loading less what it was before; a small file is loaded first, so that imports are not counted, and the C allocator
gives freed blocks back at once. The pages of the mapped file are in it: the kernel takes them back when memory is short.
The name is not `gguf.py`, because a script's folder comes first where Python looks for modules.
Trade-off: random weights; memory does not depend on their values. Alternative: real files, which need a hub.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MIB = 2**20
SHAPE = {"vocab_size": 32768, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 19}
SMALL = {"vocab_size": 1024, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1}
# name: (whose loader, type of the weights, quantization); transformers refuses to quantise a GGUF file while it reads it
CASES: dict[str, tuple[str, str, str | None]] = {
    "transformers, fp32": ("transformers", "float32", None),
    "llm_diffusion, fp32": ("llm_diffusion", "float32", None),
    "transformers, bf16": ("transformers", "bfloat16", None),
    "llm_diffusion, bf16": ("llm_diffusion", "bfloat16", None),
    "llm_diffusion, nf4, the rest bf16": ("llm_diffusion", "bfloat16", "nf4"),
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "TQDM_DISABLE": "1",
}


def write_tokenizer(writer: Any, tokenizer: Any) -> None:
    import gguf

    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    tokens = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].get)
    special = {token["content"] for token in spec["added_tokens"]}
    kinds = gguf.TokenType
    writer.add_tokenizer_model("gpt2")  # byte-level BPE
    writer.add_tokenizer_pre("qwen2")  # a GGUF names its pre-tokenizer, it does not hold it
    writer.add_token_list(tokens)
    writer.add_token_types([kinds.CONTROL if token in special else kinds.NORMAL for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in spec["model"]["merges"]])
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_chat_template(tokenizer.chat_template)


def write_gguf(path: Path, model: Any, tokenizer: Any, kind: str = "F32", arch: str = "qwen3") -> None:
    """Writes a Qwen3 to a GGUF file, its matrices in the type `kind`."""
    import gguf

    config, kind = model.config, gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)  # else the tokenizer's, and the embedding has more rows
    write_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config.num_hidden_layers)
    for key, value in model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        stored = gguf.GGMLQuantizationType.F32 if value.dim() == 1 else kind
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        writer.add_tensor(name, gguf.quants.quantize(value.float().numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_model(path: Path, shape: dict[str, int], kind: str) -> int:
    """A random model of this shape, with the embedded tokenizer; how many parameters it has."""
    import torch
    from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

    from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

    torch.manual_seed(0)
    # The head size of 128 is Qwen3's default: GGUF metadata do not have it.
    config = Qwen3Config(**shape, num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True)
    model = Qwen3ForCausalLM(config)
    path.parent.mkdir(exist_ok=True)
    write_gguf(path, model, AutoTokenizer.from_pretrained(TINY_MODEL_PATH), kind)
    return model.num_parameters()


def load(case: str, file: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    from llm_diffusion import load_diffusion_model

    loader, dtype, quantization = CASES[case]
    options = {"gguf_file": str(file), "dtype": getattr(torch, dtype)}
    if loader == "transformers":
        return AutoModelForCausalLM.from_pretrained(str(file.parent), **options)
    return load_diffusion_model(str(file.parent), quantization=quantization, device="cpu", **options)[0]


def measure(case: str, folder: Path) -> dict[str, int]:
    """Loads in this process -> bytes of the weights, and by how much the resident set's high-water mark grew."""
    load(case, folder / "small" / "model.gguf")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load(case, folder / "large" / "model.gguf")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"weights": model.get_memory_footprint(), "peak": 1024 * (peak - before)}


def in_a_process(*arguments: str) -> Any:
    """What this script prints when it is called with `arguments`: this process stays small, because a child inherits its mark."""
    done = subprocess.run(
        [sys.executable, __file__, *arguments], env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(kind: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        parameters = in_a_process("--kind", kind, "--write", folder)
        size = (Path(folder) / "large" / "model.gguf").stat().st_size
        rows = {case: in_a_process("--measure", case, "--folder", folder) for case in CASES}
    lines = [
        f"`python benchmarks/gguf_bases.py {shlex.join(sys.argv[1:])}` on {parameters / 1e6:.0f} million parameters in a GGUF file of",
        f"{size / MIB:.0f} MiB ({kind}), whose mapped pages are in the peak.",
        "",
        "| loader | weights, MiB | peak, MiB | bytes a parameter | peak against transformers in fp32 |",
        "|---|--:|--:|--:|--:|",
    ]
    first = next(iter(rows.values()))["peak"]
    for case, row in rows.items():
        peak = row["peak"]
        cells = (
            f"{row['weights'] / MIB:,.0f}",
            f"{peak / MIB:,.0f}",
            f"{peak / parameters:.2f}",
            f"{peak / first:.2f}",
        )
        lines.append(f"| {case} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", default="Q8_0", help="type of the matrices in the file: F32, F16, Q8_0, …")
    parser.add_argument("--output", type=Path, help="write the table to this file too")
    for inner in ("--write", "--measure", "--folder"):
        parser.add_argument(inner, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.write:
        write_model(Path(arguments.write) / "small" / "model.gguf", SMALL, arguments.kind)
        print(write_model(Path(arguments.write) / "large" / "model.gguf", SHAPE, arguments.kind))
        return
    if arguments.measure:
        print(json.dumps(measure(arguments.measure, Path(arguments.folder))))
        return
    text = table(arguments.kind)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
