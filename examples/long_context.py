"""Long rows: positions beyond those of the base by rope scaling, and what keeps a step of them in memory.

    python examples/long_context.py

Logits are computed of masked tokens alone, so a row's length costs hidden states, not vocabulary. With `attention="block"` a long prompt is
read once, into a cache.
"""

from datasets import Dataset
from peft import LoraConfig

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_examples

MODEL = "tiny"  # "Qwen/Qwen3-0.6B"
OUTPUT = "output/long"
STEPS = 100
BASE_LENGTH, LENGTH = 1024, 2048  # positions of the base, and ours
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "original_max_position_embeddings": BASE_LENGTH}


def documents(n: int, characters: int) -> Dataset:
    """Many chats, one after the other, are a long text."""
    rows, text = [], ""
    for example in tiny_examples():
        text += "".join(f"{turn['role']}: {turn['content']}\n" for turn in example["messages"])
        if len(text) > characters:
            rows.append({"text": text[:characters]})
            text = ""
        if len(rows) == n:
            return Dataset.from_list(rows)


def main() -> None:
    scaling = {"rope_parameters": YARN | {"factor": LENGTH / BASE_LENGTH}, "max_position_embeddings": LENGTH}
    model, tokenizer = ld.load_diffusion_model(MODEL, **scaling)
    settings = ld.DiffusionSFTConfig(
        OUTPUT,
        max_steps=STEPS,
        max_length=LENGTH,
        packing=True,  # short rows fill the long ones up; texts do not see each other
        gradient_checkpointing=True,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=4,
        learning_rate=1e-3,
        logging_steps=10,
        report_to="none",
    )
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear")
    texts = documents(4 * STEPS, 3 * LENGTH)
    trainer = ld.DiffusionSFTTrainer(model, settings, train_dataset=texts, processing_class=tokenizer, peft_config=lora)
    print(f"longest row: {max(map(len, trainer.train_dataset['input_ids'])):,} tokens")
    trainer.train()
    trainer.save_model(OUTPUT)


if __name__ == "__main__":
    main()
