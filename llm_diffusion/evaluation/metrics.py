"""Metrics of generated texts: agreement with references (sacreBLEU, ROUGE), and how varied the texts are (distinct-n, repetition).

Trade-off: overlap with one reference says little of open questions, where distinct-n and repetition catch what unmasking too many tokens
at once does first: the same word twice in a row. Alternative: an LLM judge.

References: distinct-n (arXiv 1510.03055, section 5.2), repetition rate as in unlikelihood training (arXiv 1908.04319, section 4, seq-rep-n).
"""

from __future__ import annotations

from collections.abc import Sequence

from .. import UserError

NGRAM = 4  # of the repetition rate


def ngrams(text: str, n: int) -> list[tuple[str, ...]]:
    """Runs of n words, blanks between them ignored."""
    words = text.split()
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def distinct_n(texts: Sequence[str], n: int) -> float:
    """Share of different n-grams among all of the texts together; 0 where there are none."""
    found = [gram for text in texts for gram in ngrams(text, n)]
    return len(set(found)) / len(found) if found else 0.0


def repetition_rate(texts: Sequence[str], n: int = NGRAM) -> float:
    """Share of n-grams that stood earlier in the same text, mean over the texts that have one."""
    rates = [1 - len(set(found)) / len(found) for text in texts if (found := ngrams(text, n))]
    return sum(rates) / len(rates) if rates else 0.0


def word_repetition_rate(texts: Sequence[str]) -> float:
    """Share of words that are the same as the one before them, over all texts."""
    pairs = [gram for text in texts for gram in ngrams(text, 2)]
    return sum(a == b for a, b in pairs) / len(pairs) if pairs else 0.0


def variety(texts: Sequence[str]) -> dict[str, float]:
    """`distinct_1`, `distinct_2`, `repetition` and `word_repetition` of texts, shares from 0 to 1."""
    return {
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
        "repetition": repetition_rate(texts),
        "word_repetition": word_repetition_rate(texts),
    }


def check_references(references: Sequence[str]) -> None:
    """Raises ValueError where a reference says nothing, so that nothing can agree with it."""
    empty = [i for i, reference in enumerate(references) if not reference.strip()]
    if empty:
        raise UserError(f"`references`: number {empty[0]} is empty; leave its prompt out.")


def overlap(texts: Sequence[str], references: Sequence[str]) -> dict[str, float | str]:
    """Agreement with references: `bleu` and `chrf` (sacreBLEU, 0 to 100), `rouge1`, `rouge2`, `rougeL` (F, 0 to 1), and `sacrebleu`, the
    signature that makes the BLEU comparable.

    Raises:
        ValueError: no texts, another number of references, or an empty one.
        ImportError: the extra `eval` is not installed.
    """
    if len(texts) != len(references) or not texts:
        raise UserError(f"`references`: one for each of the {len(texts)} texts is needed, got {len(references)}.")
    check_references(references)
    try:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF
    except ImportError as error:
        raise ImportError(f"{error}; run `pip install 'llm-diffusion[eval]'`.") from error
    bleu, kinds = BLEU(), ["rouge1", "rouge2", "rougeL"]
    values = {
        metric: scorer.corpus_score(list(texts), [list(references)]).score
        for metric, scorer in (("bleu", bleu), ("chrf", CHRF()))
    }
    scorer = RougeScorer(kinds)
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    values |= {kind: sum(score[kind].fmeasure for score in scores) / len(scores) for kind in kinds}
    return {**values, "sacrebleu": str(bleu.get_signature())}
