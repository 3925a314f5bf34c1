"""Block diffusion: from left to right in blocks of four tokens, each denoised at once. The recipe that keeps most of the base.

    python examples/block.py

Blocks see what was written before them through a cache, as in autoregressive decoding, and text streams block by block.
"""

from peft import LoraConfig

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset

MODEL = "tiny"  # "Qwen/Qwen3-0.6B"
OUTPUT = "output/block"
STEPS = 200
BATCH_SIZE = 16
N_CHATS = 8000
QUESTION = "Tom has 23 apples. Tom gets 45 more. How many apples does Tom have now?"


def main() -> None:
    settings = ld.DiffusionSFTConfig(
        OUTPUT,
        attention="block",
        block_length=4,
        clean_context="causal",  # the prompt and what is written are read as the base reads them
        ar_loss_weight=0.5,  # next-token prediction beside it, at no further forward pass
        max_steps=STEPS,
        learning_rate=2e-3,
        per_device_train_batch_size=BATCH_SIZE,
        max_length=256,
        logging_steps=20,
        report_to="none",
    )
    lora = LoraConfig(r=32, lora_alpha=64, target_modules="all-linear")
    trainer = ld.DiffusionSFTTrainer(MODEL, settings, train_dataset=tiny_dataset(N_CHATS), peft_config=lora)
    trainer.train()
    trainer.save_model(OUTPUT)

    model, tokenizer = ld.load_diffusion_model(OUTPUT)
    chat = [{"role": "user", "content": QUESTION}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    for threshold in (0.5, 0.95):  # tokens that are at least so likely are committed together
        output = model.generate(
            **batch.to(model.device), max_new_tokens=48, threshold=threshold, return_dict_in_generate=True
        )
        answer = tokenizer.decode(output.sequences[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        print(f"threshold {threshold}: {output.tokens_per_forward.item():.2f} tokens a forward pass: {answer}")


if __name__ == "__main__":
    main()
