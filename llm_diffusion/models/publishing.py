"""The model card that is saved with a converted model: what it is, and what which loader makes of it.

Trade-off: a few facts from the record. Alternative: the host's card, whose quick start decodes from left to right.
"""

from __future__ import annotations

from pathlib import Path

from .record import DiffusionRecord

# Three lines beside the weights send the `generate` of transformers here.
FILE = '''"""Decoding by iterative unmasking; needs the package llm_diffusion."""

from llm_diffusion.generation.generate import generate_as_loaded as generate  # noqa: F401
'''


def plain_loader(record: DiffusionRecord, adapter: bool, converted_base: bool) -> str:
    """What `AutoModelForCausalLM`, or `PeftModel` for an adapter, gives without llm_diffusion.

    Args:
        record: `config.diffusion`.
        converted_base: whether an adapter's base folder is a converted model itself.
    """
    if record.mode.drafts:
        return "A plain loader puts the adapter under every token, which makes the base worse: load it with llm_diffusion, or the base alone."
    if record.mode.has_blocks:
        return "A plain loader gives the causal model: block attention is handed in as a mask by llm_diffusion."
    if record.time_embedding:
        return "A plain loader ignores the time embedding, so its outputs are wrong: load it with llm_diffusion."
    if record.final_causal_ratio:
        return "A plain loader attends fully in both directions, which is not what was trained: load it with llm_diffusion."
    if adapter and not converted_base:
        return (
            "A plain loader gives a causal model, because the base of this adapter is one: load it with llm_diffusion."
        )
    return (
        "A plain loader gives the bidirectional model where transformers (5.2 or newer) honours `config.is_causal`, as for Qwen, "
        "Llama, Mistral, Phi and GPT-2, but not for StableLM, Nemotron, GPT-Neo and MPT; its own `generate` would still decode from left to right."
    )


def model_card(record: DiffusionRecord, name: str, tags: list[str], adapter: bool, converted_base: bool) -> str:
    """Markdown with the hub's metadata."""
    base = record.base_model
    what = "A masked-diffusion language model, converted from"
    if record.mode.drafts:
        what = (
            "A lossless drafter: this adapter proposes tokens by diffusion, the untouched base accepts those that it would have said "
            "itself, so the text is the base's own in fewer forward passes. Trained for"
        )
    kind = f"blocks of {record.block_length}" if record.mode.has_blocks else "full attention"
    read_out = "right-shifted" if record.right_shift_logits else "own position"
    header = ["---", f"library_name: {'peft' if adapter else 'transformers'}"]
    if "/" in base and not base.startswith(("/", ".")):
        header.append(f"base_model: {base}")
    header += ["tags:", *[f"- {tag}" for tag in tags], "---"]
    return "\n".join(
        [
            *header,
            f"\n# {name}\n",
            f"{what} `{base}` with llm_diffusion {record.version}: {kind}, "
            f"{read_out} read-out, {record.conversion_steps:,} steps, {record.training_tokens:,} tokens.\n",
            "```python",
            "import llm_diffusion as ld\n",
            f'inference = ld.DiffusionInference.from_pretrained("{name}")',
            'print(inference.chat([{"role": "user", "content": "…"}]))',
            "```\n",
            plain_loader(record, adapter, converted_base),
            "",
        ]
    )


def save_custom_generate(folder: str | Path) -> None:
    """Writes `custom_generate/generate.py` beside a full checkpoint, so that the host's loaders decode it by unmasking."""
    (Path(folder) / "custom_generate").mkdir(exist_ok=True)
    (Path(folder) / "custom_generate" / "generate.py").write_text(FILE)
