"""Tokenizers and datasets for the tests of rows: templates with tools and thoughts, tokenizers that append their end, kinds of streams."""

from __future__ import annotations

import copy
from typing import Any

from datasets import Dataset, IterableDataset, load_dataset
from tokenizers.processors import TemplateProcessing

TOOL_TEMPLATE = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}{% for message in messages %}<|im_start|>"
    "{{ message['role'] }}\n{{ message['content'] }}{% for call in message['tool_calls'] %}{{ call['function'] | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening }}{% endif %}"
)
# Opens a thought where it asks for an answer, of which finished conversations have nothing.
THINKING_TEMPLATE = TOOL_TEMPLATE.replace("{{ opening }}", "<think>\n")


def with_template(tokenizer: Any, template: str = TOOL_TEMPLATE) -> Any:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = template
    return tokenizer


def with_other_end(tokenizer: Any) -> Any:
    """Its end token is <|endoftext|>, its template ends turns with <|im_end|>, as Qwen's and Llama's base models do."""
    tokenizer = with_template(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"})
    return tokenizer


def appending_its_end(tokenizer: Any) -> Any:
    """Its post-processor puts the end token behind every text."""
    tokenizer = copy.deepcopy(tokenizer)
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {end[0]}", special_tokens=[end])
    return tokenizer


def as_source(rows: list[dict], source: str, folder: Any) -> Any:
    """Rows as a dataset: "map", or a stream from a "generator", "mapped", or from a "parquet" file."""
    if source == "map":
        return Dataset.from_list(rows)
    if source == "generator":
        return IterableDataset.from_generator(lambda: (copy.deepcopy(row) for row in rows))
    if source == "mapped":
        return Dataset.from_list(rows).to_iterable_dataset().map(lambda row: row)
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    return load_dataset("parquet", data_files=str(folder / "rows.parquet"), split="train", streaming=True)
