"""Windows: every token is scored once, behind as much text as promised; blocks are cut where decoding cuts them."""

import itertools

import pytest

from llm_diffusion.evaluation.windows import (
    Row,
    block_rows,
    pair_row,
    windows,
)


@pytest.mark.parametrize(
    ("n", "first", "length", "stride"), list(itertools.product((2, 5, 6, 7, 20), (1, 4), (6, 7), (1, 3, 5)))
)
def test_every_token_is_scored_once_behind_its_own_past(n: int, first: int, length: int, stride: int) -> None:
    first = min(first, n - 1)
    ids = tuple(range(100, 100 + n))
    parts = windows(Row(ids, first, 9), length, stride)
    assert [token for part in parts for token in part.ids[part.first :]] == list(ids[first:])
    for part in parts:
        start = part.ids[0] - 100
        assert part.ids == ids[start : start + len(part.ids)] and part.text == 9
        assert len(part.ids) <= length and part.first >= min(length - stride, first)
    for part in parts[1:]:
        assert len(part.ids) == length and len(part.ids) - part.first <= stride


def test_the_example_of_the_documentation() -> None:
    parts = windows(Row(tuple("abcdefghij"), 1), 6, 3)
    assert ["".join(p.ids[: p.first]) + "".join(p.ids[p.first :]).upper() for p in parts] == [
        "aBCDEF",
        "defGHI",
        "efghiJ",
    ]


def test_a_short_text_is_one_window() -> None:
    assert windows(Row((1, 2, 3), 1), 6, 3) == [Row((1, 2, 3), 1)]


def test_blocks_see_all_before_and_nothing_behind() -> None:
    assert block_rows([Row((1, 2, 3, 4, 5, 6, 7), 2, 5)], 3) == [
        Row((1, 2, 3), 2, 5),
        Row((1, 2, 3, 4, 5, 6), 3, 5),
        Row((1, 2, 3, 4, 5, 6, 7), 6, 5),
    ]


def test_blanks_between_prompt_and_completion_are_scored(tokenizer) -> None:
    for prompt, completion in (("ab cd ", "ef"), ("ab cd", " ef")):
        row = pair_row(tokenizer, prompt, completion)
        assert tokenizer.decode(row.ids[: row.first]) == "ab cd" and tokenizer.decode(row.ids[row.first :]) == " ef"
    assert pair_row(tokenizer, "", "abc").first == 1
