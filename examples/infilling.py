"""Fills gaps in the middle of a text, which sees both sides: gaps of known and of unknown length, and whole files with a hole.

python examples/sft.py && python examples/infilling.py
"""

import llm_diffusion as ld

MODEL = "output/sft"  # full attention: of sft.py, or "GSAI-ML/LLaDA-8B-Instruct", "Dream-org/Dream-v0-Instruct-7B"
BEFORE, AFTER = "Fill the gap: 3 6", "12 15"


def main() -> None:
    inference = ld.DiffusionInference.from_pretrained(MODEL)
    mask = inference.tokenizer.mask_token

    # One mask is one token.
    print(inference.infill(f"{BEFORE} {mask}{mask} {AFTER}"))

    # How long a gap is, the model decides: the length at which the filled text is most likely.
    print(inference.infill([BEFORE, AFTER], max_gap_length=4))

    # Several gaps at once. Code models fill a function between its first and last line in the same way.
    print(inference.infill(["Sort the letters: k d e a\na", " e", ""], max_gap_length=3))

    # What may not stand in a gap, and how sure a token must be before it is committed.
    print(inference.infill(f"12{mask}45=57", suppress_tokens=[inference.tokenizer.pad_token_id], threshold=0.9))


if __name__ == "__main__":
    main()
