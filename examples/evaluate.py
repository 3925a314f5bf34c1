"""Measures a converted model beside the autoregressive base that is under its adapters: one report, report.html.

    python examples/sft.py && python examples/evaluate.py

On the command line: `llm-diffusion evaluate output/sft --prompts tiny --sweep`; with `--tasks gsm8k,mbpp` lm-evaluation-harness too.
"""

from pathlib import Path

import llm_diffusion as ld
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.report import write_report

MODEL = "output/sft"
OUTPUT = "output/evaluation"
N_PROMPTS, N_TEXTS, N_SAMPLES = 60, 20, 128  # questions, texts for the likelihood, noise samples of each text


def main() -> None:
    model, tokenizer = ld.load_diffusion_model(MODEL)
    examples = list(tiny_dataset(max(N_PROMPTS, N_TEXTS), split="test"))  # rows with answers to compare with
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in examples[:N_TEXTS]]
    results = ld.evaluate(
        model,
        tokenizer,
        examples=examples[:N_PROMPTS],
        texts=texts,
        n_samples=N_SAMPLES,
        decoding={"max_new_tokens": 64, "threshold": 0.9},
    )
    for name, figures in results["models"].items():
        likelihood, answers = figures["likelihood"], figures["answers"]
        print(f"{name}: {likelihood['nats_per_token']:.3f} nats a token; {answers['exact match, mean, %']:.0f} % right")
    for row in results["paired"]:  # the same prompts, so differences are known better than either
        print(row["what"], row["differences"][0])
    write_report(results, Path(OUTPUT))


if __name__ == "__main__":
    main()
