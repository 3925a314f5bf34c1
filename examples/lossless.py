"""A drafter for a model that stays what it is: the adapter drafts a block in one pass, the base accepts what it would have written.

    python examples/lossless.py

Answers are the base's own, token for token, in fewer forward passes; training decides how many fewer.
"""

import torch
from peft import LoraConfig

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset

MODEL = "tiny"  # "Qwen/Qwen3-0.6B"
OUTPUT = "output/lossless"
STEPS = 300
BATCH_SIZE = 16
N_CHATS = (
    8000  # for a model of your own: rows that it wrote itself, as the main job makes them with `"dataset": "self"`
)


def main() -> None:
    settings = ld.DiffusionSFTConfig(
        OUTPUT,
        attention="lossless",
        block_length=8,
        max_steps=STEPS,
        learning_rate=2e-3,
        per_device_train_batch_size=BATCH_SIZE,
        max_length=256,
        logging_steps=20,
        report_to="none",
    )
    lora = LoraConfig(r=64, lora_alpha=128, target_modules="all-linear")
    trainer = ld.DiffusionSFTTrainer(MODEL, settings, train_dataset=tiny_dataset(N_CHATS), peft_config=lora)
    trainer.train()
    trainer.save_model(OUTPUT)

    model, tokenizer = ld.load_diffusion_model(OUTPUT)
    chat = [{"role": "user", "content": "Reverse the letters: k d e a"}]
    batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    batch = batch.to(model.device)
    drafted = model.generate(**batch, max_new_tokens=32, return_dict_in_generate=True)
    alone = ld.generate_autoregressive(model, **batch, max_new_tokens=32, do_sample=False)
    print(tokenizer.decode(drafted.sequences[0, batch["input_ids"].shape[1] :], skip_special_tokens=True))
    same = torch.equal(drafted.sequences[0][: alone.shape[1]], alone[0])
    print(
        f"{drafted.tokens_per_forward.item():.2f} tokens a forward pass; as the base alone: {'yes' if same else 'no'}"
    )


if __name__ == "__main__":
    main()
