"""Whether lossless answers are the base's own, over many prompts: SmolLM2-135M-Instruct in fp32, and the drafter that ships.

    python benchmarks/same_text.py --questions gsm8k/test.jsonl chat/question.jsonl --limit 420 80

Both sides answer the same batches greedily, the drafter as it decodes by default: trees, copies, or without drafts where none pay, as in large
batches. An answer that differs is a fault, or a tie: it is shown with the gap between the base's two best logits where the two part.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from pathlib import Path

import torch
from smollm2 import read_questions
from tqdm import tqdm

from llm_diffusion import generate
from llm_diffusion.evaluation.answers import encode_prompts
from llm_diffusion.evaluation.speed import first_gap
from llm_diffusion.generation.generate import generate_autoregressive
from llm_diffusion.generation.inference import DiffusionInference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2", help="the drafter; a folder, or the embedded one")
    parser.add_argument(
        "--questions", nargs="+", required=True, help='JSONL files ("question", or the first of "turns")'
    )
    parser.add_argument("--limit", nargs="+", type=int, required=True, help="questions of each file")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    args = parser.parse_args()
    inference = DiffusionInference.from_pretrained(args.model, dtype=torch.float32)
    model, tokenizer, found = inference.model, inference.tokenizer, Counter()
    seconds: Counter[str] = Counter()
    for path, limit in zip(args.questions, args.limit, strict=True):
        chats = [[{"role": "user", "content": question}] for question in read_questions(path, limit)]
        chats.sort(key=lambda chat: len(chat[0]["content"]))  # of prompts alike in length little is padding
        for first in tqdm(range(0, len(chats), args.batch_size), desc=Path(path).name):
            batch = encode_prompts(tokenizer, chats[first : first + args.batch_size])
            common = {"max_new_tokens": args.max_new_tokens, "pad_token_id": tokenizer.pad_token_id}
            began = time.perf_counter()
            want = generate_autoregressive(model, **batch, do_sample=False, **common)
            middle = time.perf_counter()
            got = generate(model, **batch, return_dict_in_generate=True, **common)
            seconds["base"] += middle - began
            seconds["lossless"] += time.perf_counter() - middle
            for row in range(len(want)):
                same = torch.equal(want[row], got.sequences[row])
                found[Path(path).name, "same" if same else "different"] += 1
                found[Path(path).name, "tokens"] += int((got.accepted[row].clamp(min=0)).sum())
                found[Path(path).name, "passes"] += int(got.nfe[row])
                if not same:
                    start = int((1 - batch["attention_mask"][row]).sum())
                    gap = first_gap(model, want[row : row + 1, start:], got.sequences[row : row + 1, start:])
                    tqdm.write(f"{Path(path).name}, question {first + row} by length: gap {gap:.2e}")
        name = Path(path).name
        n, tokens, passes = found[name, "same"] + found[name, "different"], found[name, "tokens"], found[name, "passes"]
        print(
            f"{name}: {found[name, 'same']} of {n} answers the same, {tokens} tokens, {tokens / passes:.2f} a forward"
        )
    print(f"fp32, batches of {args.batch_size}, {torch.get_num_threads()} threads; seconds: {dict(seconds)}")


if __name__ == "__main__":
    main()
