"""Fine-tunes an autoregressive model into a diffusion model by LoRA, asks what was saved, and fills a gap.

    python examples/sft.py

Full bidirectional attention, which `infilling.py` needs; `block.py` keeps more of what the model knew.
"""

from datasets import load_dataset
from peft import LoraConfig

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset

MODEL = "tiny"  # "Qwen/Qwen3-0.6B", or any causal language model
CHATS = None  # "chats.jsonl", rows of `messages`, of `prompt` and `completion`, or of `text`
OUTPUT = "output/sft"
STEPS = 200  # minutes on a CPU
BATCH_SIZE = 16
N_CHATS = 8000


def main() -> None:
    chats = tiny_dataset(N_CHATS) if CHATS is None else load_dataset("json", data_files=CHATS, split="train")
    splits = chats.train_test_split(test_size=min(64, len(chats) // 2), seed=0)
    trainer = ld.DiffusionSFTTrainer(
        MODEL,
        ld.DiffusionSFTConfig(
            OUTPUT,
            max_steps=STEPS,
            learning_rate=2e-3,
            per_device_train_batch_size=BATCH_SIZE,
            max_length=256,
            eval_strategy="steps",
            eval_steps=100,
            logging_steps=20,
            report_to="none",  # "wandb", "tensorboard", "trackio"
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["test"],
        peft_config=LoraConfig(r=32, lora_alpha=64, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model(OUTPUT)
    print(f"held-out bound: {trainer.evaluate()['eval_nelbo']:.3f} nats a token")

    inference = ld.DiffusionInference.from_pretrained(OUTPUT, max_new_tokens=32)
    question = {"role": "user", "content": "Sort the letters: k d e a"}
    print(question["content"], "->", inference.chat([question]))


if __name__ == "__main__":
    main()
