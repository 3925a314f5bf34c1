"""Rows that mean nothing: each is refused in one line with its number, its column and what was found; and no row makes another error."""

import json
import math

import pytest
from datasets import Dataset, DatasetDict
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from llm_diffusion import UserError
from llm_diffusion.data.datasets import load_examples, load_preference_splits, load_splits, readable
from llm_diffusion.data.rows import LONGEST, Place, form_of, prompt_and_answer, read_pair, read_row, split_row
from llm_diffusion.data.tokens import Tokenising, tokenised, tokenised_row

LONG = "a" * (LONGEST + 1)


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


CHAT = [user("hi"), assistant("ho")]
# A column, the row, and what is said of it.
ROWS = [
    ("messages", {"messages": turns}, found)
    for turns, found in [
        (None, "is null"),
        ([], "is empty"),
        ("hello", "'hello', a str"),
        (5, "5, a int"),
        ({}, "`role` and `content`"),
        (["a"], "a list"),
        ([1, 2], "a list"),
        ([None, assistant("x")], "a list"),
        ([[user("a")]], "a list"),
        ([{}], "`role` and `content`"),
        ([{"role": None, "content": "a"}], "keys ['content']"),
        ([{"content": "a"}], "keys ['content']"),
        ([{"role": 3, "content": "a"}], "role 3"),
        ([{"role": ["user"], "content": "a"}], "role ['user']"),
        ([{"role": {"a": 1}, "content": "a"}], "role {'a': 1}"),
        ([{"role": "king", "content": "a"}], "role 'king'"),
        ([{"role": "", "content": "a"}], "role ''"),
        ([user(None), assistant("b")], "role 'user' without content"),
        ([{"role": "user"}, assistant("b")], "role 'user' without content"),
        ([user("a"), assistant(None)], "role 'assistant' without content"),
        ([user(5), assistant("b")], "content that is 5"),
        ([user({"a": 1}), assistant("b")], "content that is {'a': 1}"),
        ([user(True), assistant("b")], "content that is True"),
        ([user([1]), assistant("b")], "type 'int'"),
        ([user([{"type": "image", "url": "x"}]), assistant("b")], "type 'image'"),
        ([user([{"type": "text", "text": 5}]), assistant("b")], "type 'text'"),
        ([user([None]), assistant("b")], "type 'NoneType'"),
        ([user(LONG), assistant("b")], "10,000,001 characters"),
        ([user(["a" * (LONGEST // 2)] * 3), assistant("b")], "15,000,000 characters"),
        ([user("a"), assistant(None, tool_calls="x")], "`tool_calls` that are 'x'"),
        ([user("a"), assistant(None, tool_calls=[1])], "`tool_calls` that are [1]"),
        ([user("a"), assistant(None, tool_calls={"a": 1})], "`tool_calls` that are {'a': 1}"),
        ([user("a"), assistant(None, tool_calls=[{"function": "x"}])], "`tool_calls` that are"),
        ([user("a")], "no assistant turn"),
        ([user("a"), user("b")], "no assistant turn"),
        ([{"role": "system", "content": "a"}], "no assistant turn"),
        ([*CHAT, user("again")], "ends with a turn of the role 'user'"),
        ([*CHAT, {"role": "tool", "content": "7"}], "ends with a turn of the role 'tool'"),
        ([assistant("b")], "an answer without a prompt"),
        ([user("a"), assistant("")], "an empty answer"),
        ([user("a"), assistant(" \n")], "an empty answer"),
        ([user("a"), assistant([])], "an empty answer"),
    ]
]
ROWS += [
    ("conversations", {"conversations": turns}, found)
    for turns, found in [
        ("x", "'x', a str"),
        ([{"from": "king", "value": "a"}], "role 'king'"),
        ([{"from": None, "value": "a"}], "keys ['value']"),
        ([{"from": "human", "value": None}], "without content"),
        ([{"from": "human", "value": 7}], "content that is 7"),
        ([{"from": "human", "value": "a"}], "no assistant turn"),
    ]
]
ROWS += [
    ("text", {"text": text}, found)
    for text, found in [
        (None, "is null"),
        (5, "5, a int"),
        (1.5, "a float"),
        (True, "a bool"),
        (["a"], "a list"),
        ([], "is empty"),
        ({"a": 1}, "a dict"),
        (LONG, "10,000,001 characters"),
    ]
]
ROWS += [
    (column, {"prompt": prompt, "completion": completion}, found)
    for prompt, completion, column, found in [
        ("a", None, "completion", "is null"),
        (None, "b", "prompt", "is null"),
        ("a", 5, "completion", "5, a int"),
        (5, "b", "prompt", "5, a int"),
        ("a", "", "completion", "an empty answer"),
        ("a", "  ", "completion", "an empty answer"),
        ("a", [], "completion", "is empty"),
        ("a", ["b"], "completion", "a list"),
        ("a", LONG, "completion", "10,000,001 characters"),
        (LONG, "b", "prompt", "10,000,001 characters"),
        ([user("a")], "b", "completion", "another kind than `prompt`"),
        ("a", [assistant("b")], "completion", "another kind than `prompt`"),
        ([user("a")], [user("b")], "completion", "ends with a turn of the role 'user'"),
        ([user("a")], [assistant("")], "completion", "an empty answer"),
        ([user(None)], [assistant("b")], "prompt", "without content"),
        ([], [assistant("b")], "prompt", "is empty"),
    ]
]
ROWS += [
    (column, {"input_ids": ids, **more}, found)
    for ids, more, column, found in [
        (None, {}, "input_ids", "is null"),
        ([], {}, "input_ids", "0 values"),
        ("12", {}, "input_ids", "'12', a str"),
        (7, {}, "input_ids", "7, a int"),
        (["1"], {}, "input_ids", "a list"),
        ([1.5, 2], {}, "input_ids", "a list"),
        ([1.0, 2.0], {}, "input_ids", "a list"),
        ([math.nan], {}, "input_ids", "a list"),
        ([1, None], {}, "input_ids", "a list"),
        ([True, False], {}, "input_ids", "a list"),
        ([[1]], {}, "input_ids", "a list"),
        ([3, -5], {}, "input_ids", "the value -5"),
        ([3, -100], {}, "input_ids", "the value -100"),
        ([3, 10**6], {}, "input_ids", "the token 1000000"),
        ([3, 2**70], {}, "input_ids", "the token 1180591620717411303424"),
        ([3, 4], {"labels": [3]}, "labels", "1 values beside 2 tokens"),
        ([3, 4], {"labels": [3, 4, 5]}, "labels", "3 values beside 2 tokens"),
        ([3, 4], {"labels": None}, "labels", "is null"),
        ([3, 4], {"labels": [3, -5]}, "labels", "the value -5"),
        ([3, 4], {"labels": [3.5, 4]}, "labels", "a list"),
        ([3, 4], {"labels": [3, 10**6]}, "input_ids", "the token 1000000"),
        ([3, 4], {"completion_mask": [0]}, "completion_mask", "1 values beside 2 tokens"),
        ([3, 4], {"completion_mask": [0, 7]}, "completion_mask", "the value 7"),
        ([3, 4], {"assistant_masks": [0, -1]}, "assistant_masks", "the value -1"),
        ([3, 4], {"assistant_masks": "01"}, "assistant_masks", "a str"),
        ([3, 4], {"attention_mask": [0, 1]}, "attention_mask", "hides tokens"),
        ([3, 4], {"attention_mask": [1]}, "attention_mask", "1 values beside 2 tokens"),
    ]
]
ROWS += [
    (column, {"messages": CHAT, column: value}, found)
    for column, value, found in [
        ("images", ["x"], "holds images"),
        ("image", "x", "holds image"),
        ("audio", {"path": "x"}, "holds audio"),
        ("videos", ["x"], "holds videos"),
        ("tools", "x", "'x', a str"),
        ("tools", 5, "5, a int"),
        ("tools", [5], "[5], a list"),
        ("tools", {"a": 1}, "a dict"),
        ("chat_template_kwargs", "x", "'x', a str"),
        ("chat_template_kwargs", [1], "[1], a list"),
    ]
]
PAIRS = [
    (column, {"chosen": chosen, "rejected": rejected, **more}, found)
    for chosen, rejected, more, column, found in [
        (1, 2, {}, "chosen", "1, a int"),
        ("a", 2, {}, "rejected", "2, a int"),
        ("a", None, {}, "rejected", "is empty"),
        (None, "a", {}, "chosen", "is empty"),
        ("", "a", {}, "chosen", "is empty"),
        ("a", " ", {}, "rejected", "is empty"),
        ("a", [], {}, "rejected", "is empty"),
        ("a", "a", {}, "rejected", "are the same"),
        (["a"], ["b"], {}, "chosen", "a list"),
        ({"a": 1}, {"a": 2}, {}, "chosen", "keys ['a']"),
        (LONG, "a", {}, "chosen", "10,000,001 characters"),
        ([*CHAT], "b", {}, "rejected", "another kind than `chosen`"),
        ("b", [*CHAT], {}, "rejected", "another kind than `chosen`"),
        ([user("q"), assistant(5)], [user("q"), assistant("b")], {}, "chosen", "content that is 5"),
        ([user("q"), {"role": None, "content": "a"}], [*CHAT], {}, "chosen", "keys ['content']"),
        ([user("q"), user("a")], [*CHAT], {}, "chosen", "ends with a turn of the role 'user'"),
        ([*CHAT], [*CHAT, user("b")], {}, "rejected", "ends with a turn of the role 'user'"),
        ([assistant("")], [assistant("b")], {}, "chosen", "is empty"),
        ("a", "b", {"prompt": 5}, "prompt", "5, a int"),
        ("a", "b", {"prompt": [user("q")]}, "prompt", "another kind than its answers"),
        ([assistant("a")], [assistant("b")], {"prompt": "q"}, "prompt", "another kind than its answers"),
        ("a", "b", {"images": ["x"]}, "images", "holds images"),
        ("a", "b", {"tools": 5}, "tools", "5, a int"),
    ]
]


def one_line(message, *parts):
    assert "\n" not in message and len(message) < 400, message
    for part in parts:
        assert part in message, message


@pytest.mark.parametrize(
    ("column", "row", "found"), ROWS, ids=[f"{i}-{found[:30]}" for i, (_, _, found) in enumerate(ROWS)]
)
def test_a_row_that_means_nothing_is_refused_with_its_number(column, row, found, tokenizer):
    with pytest.raises(UserError) as caught:
        tokenised_row(row, form_of(row), Tokenising(tokenizer), Place("dataset", 17))
    one_line(str(caught.value), f"`dataset`: `{column}` of row 17 ", found)


@pytest.mark.parametrize(
    ("column", "row", "found"), PAIRS, ids=[f"{i}-{found[:30]}" for i, (_, _, found) in enumerate(PAIRS)]
)
def test_a_pair_that_means_nothing_is_refused_with_its_number(column, row, found):
    with pytest.raises(UserError) as caught:
        read_pair(row, Place("pairs", 17))
    one_line(str(caught.value), "`pairs`: ", f"`{column}` of row 17 ", found)


# -- files and lists


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = {"messages": CHAT}
FILES = [
    ([GOOD, GOOD, {"messages": None}], "`messages` of row 2 is null"),
    ([{"messages": None}, GOOD, GOOD], "`messages` of row 0 is null"),
    ([GOOD, {"messages": "x"}], "`messages` of row 1 is 'x'"),
    ([GOOD, {"messages": [user(5), assistant("a")]}], "`messages` of row 1 has a content that is 5"),
    ([GOOD, {"text": "a"}], "`messages` of row 1 is null"),
    ([{"text": "a"}, {"text": 5}], "`text` of row 1 is 5"),
    ([{"text": "a"}, {"prompt": "a", "completion": "b"}], "`prompt` of row 0 is null"),
    ([{"prompt": "a", "completion": ""}] * 3, "`completion` of row 0 has an empty answer"),
    ([{"input_ids": [3]}, {"input_ids": [-1]}], "`input_ids` of row 1 has the value -1"),
    ([{"other": "a"}] * 2, "has the columns ['other']"),
    ([{"text": ""}] * 2, "is empty"),
    ([{"text": "a\ud800"}] * 2, "could not be loaded"),
]


@pytest.mark.parametrize(("rows", "found"), FILES, ids=[found[:40] for _, found in FILES])
def test_files_are_read_whole_before_anything_begins(rows, found, tmp_path):
    with pytest.raises(UserError) as caught:
        load_splits(write(tmp_path / "a.jsonl", rows), test_size=1, seed=0)
    one_line(str(caught.value).replace(str(tmp_path), ""), "`dataset`: ", found)


LISTS = [
    ([GOOD, {"messages": "x"}], "`messages` of row 1 is 'x'"),
    ([{"text": "a"}, {"text": 5}], "`text` of row 1 is 5"),
    ([GOOD, {"messages": [user(5), assistant("a")]}], "`messages` of row 1 has a content that is 5"),
    ([GOOD, {"messages": [{"role": ["user"], "content": "a"}]}], "role ['user']"),
    ([GOOD, "text"], "row 1 is 'text'"),
    ([{"other": 1}, {"other": "a"}], "rows are not of one kind"),
    ([{"text": "a\ud800"}], "rows are not of one kind"),
    ([{"input_ids": [3, 2**40]}], "the token 1099511627776"),
]


@pytest.mark.parametrize(("rows", "found"), LISTS, ids=[found[:40] for _, found in LISTS])
def test_lists_that_make_no_table_name_their_row(rows, found, tokenizer):
    with pytest.raises(UserError) as caught:
        tokenised(rows, Tokenising(tokenizer), "train_dataset")
    one_line(str(caught.value), "`train_dataset`: ", found)


def test_splits_say_which_of_them_is_wrong(tmp_path):
    write(tmp_path / "train.jsonl", [GOOD] * 3)
    write(tmp_path / "test.jsonl", [GOOD, {"messages": [user("a")]}])
    with pytest.raises(UserError, match="`messages` of row 1 of split `test` has no assistant turn"):
        load_splits(str(tmp_path), test_size=1, seed=0)
    write(tmp_path / "test.jsonl", [{"text": "a"}])
    with pytest.raises(UserError, match="messages.*text.*column names don't match"):
        load_splits(str(tmp_path), test_size=1, seed=0)
    saved = DatasetDict(train=Dataset.from_list([GOOD] * 3), test=Dataset.from_list([{"text": "a"}]))
    saved.save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"rows of `messages`, but its split 'test' has the columns \['text'\]"):
        load_splits(str(tmp_path / "saved"), test_size=1, seed=0)


def test_pairs_of_a_file_are_all_read(tmp_path):
    rows = [{"chosen": "a b", "rejected": "a c"}] * 2 + [{"chosen": "a", "rejected": None}]
    with pytest.raises(UserError, match="`preference_dataset`: `rejected` of row 2 is empty"):
        load_preference_splits(write(tmp_path / "a.jsonl", rows), test_size=1, seed=0)


@pytest.mark.parametrize(
    ("row", "found"),
    [
        ({"messages": [*CHAT, user("b")]}, "`messages` of row 0 ends with a turn of the role 'user'"),
        ({"messages": [user("b")]}, "`messages` of row 0 has no assistant turn"),
        ({"prompt": "a", "completion": ""}, "`completion` of row 0 is empty"),
        ({"input_ids": [3, 4]}, "text is needed"),
        ({"messages": CHAT, "images": ["x"]}, "`images` of row 0 holds images"),
    ],
)
def test_rows_to_evaluate_on_have_a_prompt_and_an_answer(row, found, tmp_path):
    with pytest.raises(UserError) as caught:
        load_examples(write(tmp_path / "a.jsonl", [row]))
    one_line(str(caught.value), "`dataset`: ", found)


def test_conversations_without_an_answer_where_every_token_is_trained(tmp_path, tokenizer):
    """They are texts there; what is shown of them is their text, continued."""
    rows = [{"messages": [user("a")]}, {"messages": [*CHAT, user("b")]}, GOOD, {"messages": [assistant("c")]}]
    file = write(tmp_path / "a.jsonl", rows)
    train, test = load_splits(file, test_size=1, seed=0, every_token=True)
    assert len(train) + len(test) == 4
    tokens = tokenised(Dataset.from_list(rows), Tokenising(tokenizer, completion_only=False), "train_dataset")
    assert len(tokens) == 4 and tokens["labels"] == tokens["input_ids"]
    for row, shown in zip(rows, readable(Dataset.from_list(rows), 4, tokenizer), strict=True):
        prompt, answer, _ = prompt_and_answer(shown, Place("dataset"))
        assert (shown == row) == (row == GOOD) and prompt and answer
    with pytest.raises(UserError, match="without content"):
        load_splits(
            write(tmp_path / "b.jsonl", [{"messages": [user(None)]}] * 2), test_size=1, seed=0, every_token=True
        )


def test_what_is_right_stays_right(tokenizer):
    rows = [
        {"messages": [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]), assistant("c")]},
        {"messages": [user("a"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": "{}"}}])]},
        {"input_ids": [3, 4], "labels": [-100, 4], "attention_mask": [1, 1]},
        {"input_ids": [3, 4], "completion_mask": [False, True]},
        {"prompt": [user("a")], "completion": assistant("b")},
        {"text": ""},
        {"text": "a" * 1000, "images": []},
    ]
    for row in rows:
        tokenised_row(row, form_of(row), Tokenising(tokenizer), Place("dataset", 0))
    as_arrays = Dataset.from_list([rows[2]]).with_format("numpy")
    assert list(tokenised(as_arrays, Tokenising(tokenizer), "train_dataset")[0]["labels"]) == [-100, 4]


# -- any row at all


LEAVES = st.none() | st.booleans() | st.integers(-200, 600) | st.floats() | st.text(max_size=6)
COLUMNS = (
    "messages",
    "conversations",
    "prompt",
    "completion",
    "text",
    "input_ids",
    "labels",
    "completion_mask",
    "tools",
)
COLUMNS += (
    "chosen",
    "rejected",
    "images",
    "chat_template_kwargs",
    "attention_mask",
    "role",
    "content",
    "tool_calls",
    "function",
)
ROLES = st.sampled_from(["user", "assistant", "system", "tool", "human", "king", None, 5])
TURNS = st.lists(
    st.fixed_dictionaries({}, optional={"role": ROLES, "content": LEAVES, "from": ROLES, "value": LEAVES}), max_size=3
)
VALUES = st.recursive(
    LEAVES | TURNS | st.lists(st.integers(-2, 500), max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(COLUMNS), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.dictionaries(st.sampled_from(COLUMNS), VALUES, min_size=1, max_size=4))
@example({"messages": [{"role": "user", "content": "a", "tool_calls": [{"function": None}]}]})
@example({"messages": [{"role": "assistant", "content": ["", ""]}]})
def test_any_row_is_read_or_refused_in_one_line(tokenizer, row):
    """What is read is text, or tokens of the vocabulary; what is trained on says something."""
    place = Place("dataset", 3)
    for work in (
        read_pair,
        lambda row, place: tokenised_row(row, form_of(row) or "text", Tokenising(tokenizer), place),
    ):
        try:
            read = work(row, place)
        except UserError as error:
            one_line(str(error), "3", "`dataset`")
            continue
        if "input_ids" in read:
            assert all(0 <= token < len(tokenizer) for token in read["input_ids"])
            assert all(0 <= label < len(tokenizer) or label == -100 for label in read["labels"])
            assert len(read["labels"]) == len(read["input_ids"])
    form = form_of(row)
    if form in ("messages", "completion"):
        try:
            prompt, answer = split_row(read_row(row, form, place), form, place)
        except UserError:
            return
        assert answer and (isinstance(prompt, str) or all(isinstance(turn["content"], str) for turn in prompt))
