"""Preference pairs: rows in TRL's format, the same whatever the order, in the declared mix; what is refused."""

import random

import pytest
from datasets import Dataset

from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.reasoning.pairs import FEATURES, KINDS, preference_pairs
from llm_diffusion.reasoning.text_errors import WEIGHTS


def test_the_same_pairs_in_any_order_and_any_share_of_the_work():
    records = list(tiny_dataset(60, 3))
    whole = {str(row["prompt"]): row for row in preference_pairs(records, 5)}
    shuffled = random.Random(1).sample(records, len(records))
    parts = [preference_pairs(shuffled[i::3], 5) for i in range(3)]
    assert {str(row["prompt"]): row for part in parts for row in part} == whole
    assert {str(row["prompt"]): row for row in preference_pairs(Dataset.from_list(records + records[:9]), 5)} == whole
    other = {str(row["prompt"]): row for row in preference_pairs(records, 6)}
    assert sum(other[key]["rejected"] != row["rejected"] for key, row in whole.items()) > 30


def test_rows_are_trls_and_the_chosen_side_is_untouched():
    records = list(tiny_dataset(60, 4))
    pairs = preference_pairs(records, 0)
    assert pairs.features == FEATURES and len(pairs) == 60
    for record, row in zip(records, pairs, strict=True):
        assert row["prompt"] == record["messages"][:1] and row["chosen"] == record["messages"][1:]
        text, (start, end) = row["rejected"][0]["content"], row["span"]
        assert row["kind"] in KINDS and 0 <= start <= end <= len(text)
        chosen = row["chosen"][0]["content"]
        assert text[:start] == chosen[:start] and abs(len(text) - len(chosen)) <= len(chosen) / 10


def test_kinds_come_in_the_declared_proportions():
    """Among two kinds that always apply (a row of letters), the shares are those of their weights, within four deviations."""
    records = list(tiny_dataset(1500, 0, kinds=("sort",)))
    kinds = preference_pairs(records)["kind"]
    share = WEIGHTS["repetition"] / (WEIGHTS["repetition"] + WEIGHTS["swapped_items"])
    deviation = (len(kinds) * share * (1 - share)) ** 0.5
    assert abs(kinds.count("repetition") - share * len(kinds)) < 4 * deviation
    assert set(preference_pairs(records[:50], kinds=["repetition"])["kind"]) == {"repetition"}


def test_bad_input(caplog):
    with pytest.raises(ValueError, match="`kinds` must be a non-empty list .*, got .'slip'"):
        preference_pairs("tiny", kinds=["slip"])
    with pytest.raises(ValueError, match="`kinds`"):
        preference_pairs("tiny", kinds=[])
    with pytest.raises(ValueError, match="row 1: .*columns"):
        preference_pairs([*tiny_dataset(1), {"a": 1}])
    with pytest.raises(ValueError, match="row 0: .*empty"):
        preference_pairs([{"question": " ", "answer": "#### 1"}])
    with pytest.raises(ValueError, match="no record gives a pair"):
        preference_pairs([{"question": "q", "answer": "2+2=5.\n#### 5"}])  # does not hold itself
    assert "1 do not hold themselves" in caplog.text
