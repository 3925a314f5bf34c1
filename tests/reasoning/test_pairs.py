"""Preference pairs: rows in TRL's format, the same whatever the order, in the declared mix; out to JSONL and back; what is refused."""

import json
import random
from contextlib import suppress

import pytest
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from llm_diffusion import UserError
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.reasoning.pairs import (
    KINDS,
    checked_pairs,
    labelled_answer,
    pairs_from_answers,
    pairs_of,
    preference_pairs,
    write_rows,
)
from llm_diffusion.reasoning.problems import load_records, read_problem
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
    assert list(pairs.features) == ["prompt", "chosen", "rejected", "kind", "step", "span"] and len(pairs) == 60
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
    with pytest.raises(ValueError, match="`kinds`.*slip"):
        preference_pairs("tiny", kinds=["slip"])
    with pytest.raises(ValueError, match="`kinds`"):
        preference_pairs("tiny", kinds=[])
    for wrong in (None, 5):
        with pytest.raises(ValueError, match=f"`records` must be rows, .* got {wrong}"):
            preference_pairs(wrong)
    for wrong in (1, None, {"question": 5, "answer": "#### 5"}):
        with pytest.raises(ValueError, match="`records`: row 0 "):
            preference_pairs([wrong])
    with pytest.raises(ValueError, match="`records`: row 1"):
        preference_pairs([*tiny_dataset(1), {"a": 1}])
    with pytest.raises(ValueError, match="`records`: row 0"):
        preference_pairs([{"question": " ", "answer": "#### 1"}])
    with pytest.raises(ValueError, match="`records`"):
        preference_pairs([{"question": "q", "answer": "2+2=5.\n#### 5"}])  # does not hold itself
    assert "1 do not hold themselves" in caplog.text


# -- out to people or a judge, and back

QUESTION = "Tom has 23 apples. Tom gets 45 more. Tom gives away 19. How many apples does Tom have now?"
RIGHT = "23+45=68. 68-19=49. The answer is 49."
SLIP = "23+45=78. 78-19=59. The answer is 59."
PAIR = {"prompt": QUESTION, "chosen": RIGHT, "rejected": SLIP}


def test_pairs_come_back_as_they_went(tmp_path):
    pairs = preference_pairs("tiny", 1, ["swapped_items", "calculation_slip", "truncation", "misread_number"])
    write_rows(tmp_path / "new" / "pairs.jsonl", pairs)
    again = checked_pairs(load_records(str(tmp_path / "new" / "pairs.jsonl")))
    assert list(again) == list(pairs) and again.features == pairs.features
    assert [f.name for f in (tmp_path / "new").iterdir()] == ["pairs.jsonl"]


def test_a_failed_write_leaves_nothing_of_that_name(tmp_path):
    def rows():
        yield {"a": 1}
        raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        write_rows(tmp_path / "a.jsonl", rows())
    assert not (tmp_path / "a.jsonl").exists()


def test_plain_texts_get_kind_step_and_span():
    (row,) = checked_pairs([PAIR])
    assert row["kind"] == "labelled" and row["step"] == 0 and row["prompt"] == [{"role": "user", "content": QUESTION}]
    assert row["span"] == [6, len(SLIP) - 2]  # from the first to the last changed digit


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "chosen": "a"}, "row 0.*'rejected'"),
        ({**PAIR, "rejected": " "}, "`rejected`"),
        ({**PAIR, "rejected": []}, "`rejected`"),
        ({**PAIR, "rejected": RIGHT + " "}, "`chosen` and `rejected`"),
        ({**PAIR, "chosen": [{"from": "a"}]}, "`chosen`"),
        ({**PAIR, "kind": "slip"}, "`kind`.*slip"),
        ({**PAIR, "span": [3, 99]}, "`span`"),
        ({**PAIR, "kind": "operator_swap"}, "operator_swap"),
        ({**PAIR, "rejected": SLIP.replace("59", "49"), "kind": "calculation_slip"}, "calculation_slip"),
    ],
)
def test_what_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        checked_pairs([row])


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text("ab "),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "from"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    st.fixed_dictionaries(
        {"prompt": ANYTHING}, optional=dict.fromkeys(("chosen", "rejected", "kind", "span", "reference"), ANYTHING)
    ),
    st.dictionaries(st.sampled_from(["answer", "right", "chosen", "rejected"]), ANYTHING | st.just("b")),
)
def test_any_row_gives_a_pair_or_is_refused(row, more):
    with suppress(UserError):
        assert len(pairs_of([row | more])) == 1


def test_an_injected_kind_is_checked_and_let_through():
    (row,) = checked_pairs([{**PAIR, "kind": "calculation_slip", "span": [6, 8], "step": 0}])
    assert row["kind"] == "calculation_slip" and row["span"] == [6, 8]
    with pytest.raises(ValueError, match="`pairs`"):
        checked_pairs([])


def test_labelled_answers_become_pairs(caplog):
    problem = read_problem({"question": QUESTION, "answer": RIGHT})
    other = RIGHT.replace("The", "So the")
    given = [(RIGHT, True), (SLIP, False), (SLIP, False), (other, True), ("no", False), ("23+45=67.", None)]
    rows = json.loads(json.dumps([labelled_answer(problem, *g) for g in given]))
    assert [row["first_wrong_step"] for row in rows] == [None, 0, 0, None, 0, 0]
    (pair,) = pairs_from_answers(rows)  # each wrong answer once, with the right one nearest in length
    assert pair["chosen"][0]["content"] == RIGHT and pair["rejected"][0]["content"] == SLIP
    assert (pair["kind"], pair["step"]) == ("sampled", 0)
    assert "1 wrong answers" in caplog.text  # "no" is too short
    rows[0]["right"] = None
    for row in rows:
        del row["reference"]
    (pair,) = pairs_from_answers(rows)
    assert pair["chosen"][0]["content"] == other
    with pytest.raises(ValueError, match="`answers`: row 0"):
        pairs_from_answers([{"prompt": "q", "answer": "a"}])
    with pytest.raises(ValueError, match="`answers`"):
        pairs_from_answers(rows[:1])


def test_pairs_are_made_by_what_the_columns_are():
    problem = read_problem({"question": QUESTION, "answer": RIGHT})
    assert pairs_of([labelled_answer(problem, SLIP, False)])["kind"] == ["sampled"]
    assert pairs_of([PAIR])["kind"] == ["labelled"]
    assert pairs_of([{"question": QUESTION, "answer": RIGHT}], kinds=["operator_swap"])["kind"] == ["operator_swap"]
