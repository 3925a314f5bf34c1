"""QLoRA: adapters over a base in 4 bit, so that an 8B model trains on a card of 16 GB.

    pip install 'llm-diffusion[qlora]' && python examples/qlora.py

`llm-diffusion analyze MODEL` says what a model needs, and which cards hold it. CUDA; on a CPU it is slow, and good for trying.
"""

import torch
from peft import LoraConfig

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset

MODEL = "tiny"  # "Qwen/Qwen3-8B"
OUTPUT = "output/qlora"
STEPS = 200
N_CHATS = 8000
MICRO_BATCH, ACCUMULATION = 4, 4  # rows at once, and how often before a step


def main() -> None:
    model, tokenizer = ld.load_diffusion_model(MODEL, quantization="nf4")
    print(f"weights: {model.get_memory_footprint() / 2**20:,.1f} MiB")
    trainer = ld.DiffusionSFTTrainer(
        model,
        ld.DiffusionSFTConfig(
            OUTPUT,
            max_steps=STEPS,
            learning_rate=2e-3,
            per_device_train_batch_size=MICRO_BATCH,
            gradient_accumulation_steps=ACCUMULATION,
            gradient_checkpointing=True,
            bf16=torch.cuda.is_available(),
            optim="paged_adamw_8bit" if torch.cuda.is_available() else "adamw_torch",
            max_length=256,
            logging_steps=20,
            report_to="none",
        ),
        train_dataset=tiny_dataset(N_CHATS),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(OUTPUT)  # the adapters alone, some MB

    inference = ld.DiffusionInference.from_pretrained(OUTPUT, quantization="nf4", max_new_tokens=32)
    print(inference.chat([{"role": "user", "content": "Which is greater, 45 or 37?"}]))


if __name__ == "__main__":
    main()
