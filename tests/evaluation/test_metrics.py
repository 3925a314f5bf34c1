"""Figures worked out by hand, and the libraries' where they are installed."""

import pytest

from llm_diffusion.evaluation.metrics import (
    distinct_n,
    ngrams,
    overlap,
    repetition_rate,
    variety,
    word_repetition_rate,
)


def test_figures_by_hand() -> None:
    assert ngrams("a b  c\nd", 2) == [("a", "b"), ("b", "c"), ("c", "d")]
    assert distinct_n(["a b a", "a c"], 1) == 3 / 5
    assert distinct_n(["a b a", "a c"], 2) == 1.0
    assert distinct_n(["a b a b"], 2) == 2 / 3
    assert distinct_n([""], 1) == 0.0
    assert repetition_rate(["a b a b", "x"], 2) == pytest.approx(
        1 / 3
    )  # "a b" came before; a text of one word has no pair
    assert repetition_rate(["the cat sat on the cat sat on the mat"]) == pytest.approx(2 / 7)
    assert word_repetition_rate(["the the cat", "a a"]) == pytest.approx(2 / 3)
    assert word_repetition_rate(["a"]) == 0.0


def test_variety_has_them_all() -> None:
    assert variety(["a b a b", "x x"]) == {
        "distinct_1": 3 / 6,
        "distinct_2": 3 / 4,
        "repetition": 0.0,
        "word_repetition": 1 / 4,
    }


def test_references_are_checked() -> None:
    with pytest.raises(ValueError, match="one for each of the 2 texts"):
        overlap(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="number 1 is empty"):
        overlap(["a", "b"], ["a", " "])


def test_libraries() -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    texts = ["the cat sat on the mat today", "it is what it is said he"]
    same = overlap(texts, texts)
    assert same["bleu"] == pytest.approx(100) and same["rougeL"] == 1.0 and same["chrf"] == pytest.approx(100)
    assert "version:" in same["sacrebleu"]
    half = overlap(["a b c d", "w x"], ["a b e f", "y z"])
    assert half["rouge1"] == pytest.approx(0.25) and half["rouge2"] == pytest.approx(1 / 6)
    assert half["rougeL"] == pytest.approx(0.25) and half["bleu"] < 50
