"""The gate: whatever form and source rows come in, the same tokens are trained; what is left out is counted; faults are named."""

import json
import logging

import pytest
from datasets import Dataset, DatasetDict, disable_progress_bars
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows import THINKING_TEMPLATE, appending_its_end, as_source, with_other_end, with_template

from llm_diffusion import UserError
from llm_diffusion.data.tokens import Tokenising, tokenised, tokenised_pairs

disable_progress_bars()
SOURCES = ("map", "generator", "mapped", "parquet")
TEXTS = st.text(st.sampled_from("ab 12\n{}'\"äß中🙂<|"), max_size=6)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "required": ["x"]}}}
CALL = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
# Beside every drawn row, so that Arrow fills the keys of each with nulls of the other.
OTHER_CALL = {"type": "function", "function": {"name": "look", "arguments": {"y": "z"}}}
OTHER_TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "title": "t"}}}
USER, ANSWER = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
OTHER = [
    USER,
    {"role": "assistant", "content": "", "tool_calls": [OTHER_CALL]},
    {"role": "tool", "content": "4"},
    ANSWER,
]


@pytest.fixture(scope="module")
def tools():
    from transformers import AutoTokenizer

    from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

    return with_template(AutoTokenizer.from_pretrained(TINY_MODEL_PATH))


def how(tokenizer, ends=(2,), **options):
    return Tokenising(tokenizer, ends, **options)


@st.composite
def chats(draw):
    """1 to 6 turns after an optional system turn, the last one an assistant's that says something."""
    turns = [{"role": "system", "content": draw(TEXTS)}] if draw(st.booleans()) else []
    for number in range(draw(st.integers(1, 6))):
        turns.append({"role": ("user", "assistant")[number % 2], "content": draw(TEXTS)})
        if number % 2 and draw(st.booleans()):
            turns[-1]["tool_calls"] = [CALL]
            turns.append({"role": "tool", "content": draw(TEXTS)})
    last = {"role": "assistant", "content": draw(TEXTS)}
    if draw(st.booleans()):
        last["tool_calls"] = [CALL]
    elif not last["content"].strip():
        last["content"] += "4"
    return [*turns, last]


def in_form(turns, form, parts, tools):
    """The same conversation as people write it."""
    turns = [dict(turn) for turn in turns]
    for turn in turns:
        if parts:
            middle = len(turn["content"]) // 2
            pieces = turn["content"][:middle], turn["content"][middle:]
            turn["content"] = [{"type": "text", "text": piece} for piece in pieces]
    row = {"tools": tools} if tools else {}
    if form == "messages":
        return row | {"messages": turns}
    if form == "completion":
        return row | {"prompt": turns[:-1], "completion": turns[-1:]}
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    for turn in turns:
        turn["from"], turn["value"] = names.get(turn["role"], turn["role"]), turn.pop("content")
        del turn["role"]
    return row | {"conversations": turns}


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    turns=chats(),
    form=st.sampled_from(["messages", "completion", "conversations"]),
    source=st.sampled_from(SOURCES),
    name=st.sampled_from(["train_dataset", "eval_dataset"]),
    parts=st.booleans(),
    with_tools=st.booleans(),
)
def test_every_form_and_source_trains_the_same_tokens(
    tools, tmp_path_factory, turns, form, source, name, parts, with_tools
):
    offered = [[TOOL], [OTHER_TOOL]] if with_tools else [None, None]
    rows = [in_form(chat, form, parts, tool) for chat, tool in zip((turns, OTHER), offered, strict=True)]
    folder = tmp_path_factory.getbasetemp()
    (folder / "rows.parquet").unlink(missing_ok=True)
    found = list(tokenised(as_source(rows, source, folder), how(tools), name))
    for row, chat, tool in zip(found, (turns, OTHER), offered, strict=True):
        whole = tools.apply_chat_template(chat, tools=tool, return_dict=False)
        prompt = tools.apply_chat_template(chat[:-1], tools=tool, add_generation_prompt=True, return_dict=False)
        assert whole[: len(prompt)] == prompt
        assert row == {"input_ids": whole, "labels": [-100] * len(prompt) + whole[len(prompt) :]}


@pytest.mark.parametrize("source", SOURCES)
def test_what_is_left_out_is_counted_in_one_line(tools, tmp_path, source, caplog):
    long = {"role": "user", "content": "1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 1 2 3 4 5 6"}
    cut = [USER, {"role": "assistant", "content": "1 2 3 4 5 6 7 8 9 1 2 3 4 5 6 7 8 9 1"}]
    rows = [{"messages": turns, "kind": "a"} for turns in ([USER, ANSWER], [long, ANSWER]) for _ in range(4)]
    rows[0]["messages"] = cut
    reports = []
    found = list(tokenised(as_source(rows, source, tmp_path), how(tools, max_length=40), "train_dataset", reports))
    for row_counts in reports:  # of a stream, when it has flowed
        row_counts.report()
    assert len(found) == 4 and all(len(row["input_ids"]) <= 40 for row in found)
    (line,) = [record.getMessage() for record in caplog.records if "of 8 rows" in record.getMessage()]
    assert line.startswith(
        "train_dataset: 4 of 8 rows: nothing left to train on after `max_length`=40; 1 of 8 rows: cut to"
    )
    assert line.endswith("columns not read: kind")


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("name", ["train_dataset", "eval_dataset"])
def test_a_dataset_of_which_nothing_is_left_is_refused(tools, tmp_path, source, name):
    with pytest.raises(UserError, match=f"`{name}`: 3 of 3 rows: nothing left.*`max_length`=4"):
        tokenised(as_source([{"messages": [USER, ANSWER]}] * 3, source, tmp_path), how(tools, max_length=4), name)


@pytest.mark.parametrize(
    "rows, wanted",
    [
        ([{"text": "a b"}], "a b<|im_end|>"),
        ([{"text": "a b<|im_end|>"}], "a b<|im_end|>"),
        ([{"prompt": "2+2=", "completion": "4"}], "4<|im_end|>"),
        ([{"prompt": "", "completion": "4 5"}], "4 5<|im_end|>"),
        ([{"text": " "}, {"text": "a b"}], "a b<|im_end|>"),
        ([{"input_ids": [5, 6, 7], "completion_mask": [0, 1, 1]}], [6, 7]),
        ([{"input_ids": [5, 6, 7], "assistant_masks": [1, 0, 1]}], [5, 7]),
        ([{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}], [6, 7]),
        ([{"input_ids": [5, 6, 7]}], [5, 6, 7]),
        ([{"messages": [USER, ANSWER], "prompt": "x", "completion": "y"}], "4<|im_end|>\n"),
    ],
)
@pytest.mark.parametrize("appends", [False, True])
def test_what_is_trained_of_every_form(tokenizer, rows, wanted, appends):
    """Whether the tokenizer appends its end token or not: there is one, behind the answer, and none behind the prompt."""
    tokenizer = appending_its_end(tokenizer) if appends else tokenizer
    (row,) = tokenised(Dataset.from_list(rows), how(tokenizer), "train_dataset")
    labels = [label for label in row["labels"] if label != -100]
    assert labels == wanted or tokenizer.decode(labels) == wanted


def test_a_text_that_a_template_wrote_gets_no_second_start(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.add_special_tokens({"bos_token": "<|im_start|>"})
    start = ("<|im_start|>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{start[0]} $A", special_tokens=[start])
    rows = Dataset.from_list([{"text": "<|im_start|>a"}, {"text": "a"}])
    one, other = tokenised(rows, how(tokenizer), "train_dataset")
    assert one == other and one["input_ids"].count(start[1]) == 1


@pytest.mark.parametrize(
    "row, named",
    [
        ({"messages": [USER, {"role": "critic", "content": "x"}]}, "`messages` of row 1 .*'critic'"),
        ({"messages": [USER]}, "`messages` of row 1 has no assistant"),
        ({"messages": [USER, ANSWER, USER]}, "`messages` of row 1 ends with .*'user'"),
        ({"messages": [ANSWER]}, "`messages` of row 1 has an answer without a prompt"),
        ({"messages": [USER, {"role": "assistant", "content": " \n"}]}, "`messages` of row 1 has an empty answer"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "`messages` of row 1 .*without content"),
        ({"messages": []}, "`messages` of row 1 is empty"),
        ({"messages": None}, "`messages` of row 1 is null"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, ANSWER]}, "`messages` of row 1 .*'image'"),
        ({"messages": [USER, ANSWER], "audio": "a.wav"}, "`audio` of row 1 holds audio"),
        ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "`messages` of row 1 .*5, a int"),
        ({"messages": [{"speaker": "user"}, ANSWER]}, "`messages` of row 1 .*speaker"),
    ],
)
def test_a_bad_row_is_named_with_its_column(tools, row, named):
    """As a stream, whose rows need not agree; the number is that of the row in the data."""
    rows = as_source([{"messages": [USER, ANSWER]}, row], "generator", None)
    with pytest.raises(UserError, match="`train_dataset`: " + named):
        list(tokenised(rows, how(tools), "train_dataset"))


@pytest.mark.parametrize(
    "row, named",
    [
        ({"prompt": "a", "completion": None}, "`completion` of row 1 is null"),
        ({"prompt": "a", "completion": ""}, "`completion` of row 1 has an empty answer"),
        ({"prompt": "a", "completion": [ANSWER]}, "`completion` of row 1 is of another kind"),
        ({"prompt": [USER], "completion": [USER]}, "`completion` of row 1 ends with"),
        ({"prompt": ["a"], "completion": ["b"]}, "`prompt` of row 1 is"),
    ],
)
def test_a_bad_prompt_with_completion_is_named(tools, row, named):
    rows = as_source([{"prompt": "a", "completion": "b"}, row], "generator", None)
    with pytest.raises(UserError, match="`eval_dataset`: " + named):
        list(tokenised(rows, how(tools), "eval_dataset"))


@pytest.mark.parametrize(
    "row, named",
    [
        ({"text": None}, "`text` of row 0 is null"),
        ({"text": ["a", "b"]}, "`text` of row 0 is"),
        ({"input_ids": [5, 6], "labels": 1}, "`labels` of row 0 is 1"),
        ({"input_ids": [5, 6], "labels": [1]}, "`labels` of row 0 has 1 values beside 2"),
        ({"input_ids": "5 6"}, "`input_ids` of row 0"),
        ({"words": "a"}, r"has the columns \['words'\]"),
        ({"instruction": "a", "output": "b"}, "`messages`, `prompt` with `completion`"),
    ],
)
def test_other_bad_rows_are_named(tools, row, named):
    with pytest.raises(UserError, match=named):
        tokenised([row], how(tools), "train_dataset")


@pytest.mark.parametrize(
    "data",
    [
        [],
        "rows.jsonl",
        DatasetDict(train=Dataset.from_list([{"text": "a"}])),
        Dataset.from_list([{"text": "a"}]).with_transform(lambda batch: batch),
    ],
    ids=["empty", "a name", "splits", "a transform"],
)
def test_what_is_no_dataset_is_refused(tools, data):
    with pytest.raises(UserError, match="`train_dataset`"):
        tokenised(data, how(tools), "train_dataset")


def test_a_template_that_refuses_a_row_names_it(tools):
    strict = with_template(
        tools,
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + tools.chat_template,
    )
    rows = [{"messages": [USER, ANSWER]}, {"messages": [{"role": "system", "content": "s"}, USER, ANSWER]}]
    with pytest.raises(UserError, match="`messages` of row 1 is refused by the chat template .no system"):
        tokenised(rows, how(strict), "train_dataset")
    strict.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        tokenised(rows, how(strict), "train_dataset")


def test_data_without_an_end_says_what_to_set(tools, caplog):
    plain = with_template(tools, "{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    rows = [{"messages": [USER, ANSWER]}]
    tokenised(rows, how(plain), "train_dataset")
    assert "train_dataset: none of 1 rows has an end token (<|im_end|>)" in caplog.text and "`eos_token`" in caplog.text
    caplog.clear()
    tokenised(rows, how(plain), "eval_dataset")  # of which nothing is learned
    tokenised(rows, how(tools), "train_dataset")
    tokenised(rows, how(with_other_end(tools), ends=(2, 0)), "train_dataset")
    assert "end token" not in caplog.text


def test_an_answer_behind_a_thinking_prompt_starts_where_prompts_end(tools):
    """The opened thought is no part of what is trained, so it is none of what is asked with either."""
    from llm_diffusion.models.special_tokens import prompt_ids

    thinking = with_template(tools, THINKING_TEMPLATE)
    (row,) = tokenised([{"messages": [USER, ANSWER]}], how(thinking), "train_dataset")
    asked = prompt_ids(thinking, [USER])
    assert row["labels"][: len(asked)] == [-100] * len(asked) and row["labels"][len(asked)] != -100
    assert row["input_ids"][: len(asked)] == asked and thinking.decode(asked).endswith("<|im_start|>assistant\n")


def test_calls_as_json_and_tools_as_json_are_what_they_say(tools):
    """OpenAI's servers give arguments as a string, which a template would quote once more."""
    as_text = {"type": "function", "function": {"name": "add", "arguments": '{"x": 1}'}}
    rows = [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [CALL]}], "tools": [TOOL]},
        {"messages": [USER, {"role": "assistant", "tool_calls": [as_text]}], "tools": json.dumps([TOOL])},
    ]
    one, other = (next(iter(tokenised([row], how(tools), "train_dataset"))) for row in rows)
    assert one == other and '"arguments": {"x": 1}' in tools.decode(one["input_ids"])


def test_a_tool_may_give_nothing_back(tools):
    rows = [{"messages": [USER, {"role": "tool", "content": content}, ANSWER]} for content in (None, "")]
    one, other = (next(iter(tokenised([row], how(tools), "train_dataset"))) for row in rows)
    assert one == other


def test_the_template_reads_the_keywords_of_the_row(tools):
    titled = with_template(tools, "{{ title }}" + tools.chat_template)
    rows = [{"messages": [USER, ANSWER], "chat_template_kwargs": {"title": "12"}}, {"messages": [USER, ANSWER]}]
    one, other = tokenised(Dataset.from_list(rows), how(titled), "train_dataset")
    assert titled.decode(one["input_ids"]) == "12" + titled.decode(other["input_ids"])
    assert [label for label in one["labels"] if label != -100] == [label for label in other["labels"] if label != -100]


@pytest.mark.parametrize("options, count", [({}, 2), ({"completion_only": False}, 23), ({"completion_only": True}, 2)])
def test_prompts_stay_clean_unless_all_is_trained(tools, options, count):
    (row,) = tokenised([{"messages": [USER, ANSWER]}], how(tools, **options), "train_dataset")
    trained = [label for label in row["labels"] if label != -100]
    assert (len(trained) == len(row["input_ids"])) == (count == 23)
    assert tools.decode(trained[-3:]) == "4<|im_end|>\n"


def test_a_formatting_function_makes_the_text(tools):
    rows = [{"messages": [USER, ANSWER], "tools": None}]
    (row,) = tokenised(rows, how(tools, formatting_func=lambda row: row["messages"][1]["content"]), "train_dataset")
    assert tools.decode(row["input_ids"]) == "4<|im_end|>"
    with pytest.raises(UserError, match="`formatting_func` returned a list for row 0"):
        tokenised(rows, how(tools, formatting_func=lambda row: ["a"]), "train_dataset")


# -- pairs


def pair_forms():
    """One preference, in every way it is written."""
    bad = [{"role": "assistant", "content": "5"}]
    yield {"prompt": [USER], "chosen": [ANSWER], "rejected": bad}
    yield {"chosen": [USER, ANSWER], "rejected": [USER, *bad]}
    yield {"prompt": [USER], "chosen": [USER, ANSWER], "rejected": [USER, *bad]}  # the prompt twice
    yield {"prompt": "2+2?", "chosen": [USER, ANSWER], "rejected": [USER, *bad]}  # its text beside it
    shared = [{"from": "human", "value": "2+2?"}], [{"from": "gpt", "value": "4"}], [{"from": "gpt", "value": "5"}]
    yield dict(zip(("prompt", "chosen", "rejected"), shared, strict=True))


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("row", list(pair_forms()), ids=["explicit", "implied", "twice", "text", "sharegpt"])
def test_pairs_of_every_form_are_the_same(tools, tmp_path, source, row):
    (found,) = tokenised_pairs(as_source([row], source, tmp_path), how(tools), "train_dataset")
    assert tools.decode(found["prompt_ids"]) == "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    assert [tools.decode(found[f"{side}_ids"]) for side in ("chosen", "rejected")] == ["4<|im_end|>\n", "5<|im_end|>\n"]


@pytest.mark.parametrize("appends", [False, True])
@pytest.mark.parametrize(
    "row, wanted",
    [
        ({"prompt": "2+2=", "chosen": "4", "rejected": "5"}, ("2+2=", "4", "5")),
        ({"chosen": "2+2= 4", "rejected": "2+2= 5"}, ("2+2=", " 4", " 5")),
        ({"chosen": "b a ", "rejected": "1 2"}, ("", "b a ", "1 2")),
    ],
)
def test_pairs_of_text_have_one_end(tokenizer, row, wanted, appends):
    tokenizer = appending_its_end(tokenizer) if appends else tokenizer
    (found,) = tokenised_pairs([row], how(tokenizer), "train_dataset")
    texts = [tokenizer.decode(found[f"{name}_ids"]) for name in ("prompt", "chosen", "rejected")]
    assert texts == [wanted[0], wanted[1] + "<|im_end|>", wanted[2] + "<|im_end|>"]


@pytest.mark.parametrize("source", SOURCES)
def test_pairs_that_truncation_makes_equal_are_dropped_and_counted(tools, tmp_path, source, caplog):
    def answer(end):
        return [{"role": "assistant", "content": "1 2 3 4 5 6 7 8 " + end}]

    rows = [{"prompt": [USER], "chosen": answer(a), "rejected": answer("9")} for a in "567"]
    rows.append({"prompt": [USER], "chosen": [ANSWER], "rejected": answer("9")})
    rows.append(
        {"prompt": [{"role": "user", "content": "1 2 3 4 5 6 7 8 9 1"}], "chosen": [ANSWER], "rejected": answer("")}
    )
    reports = []
    n = len(tools.apply_chat_template([USER], add_generation_prompt=True, return_dict=False)) + 6
    found = list(tokenised_pairs(as_source(rows, source, tmp_path), how(tools, max_length=n), "train_dataset", reports))
    for row_counts in reports:
        row_counts.report()
    assert len(found) == 1
    assert f"3 of 5 rows: both answers are the same after `max_length`={n}" in caplog.text
    assert f"1 of 5 rows: no answer left after `max_length`={n}" in caplog.text
    with pytest.raises(UserError, match="no row is left"):
        tokenised_pairs(as_source(rows[:3], source, tmp_path), how(tools, max_length=n), "eval_dataset")


@pytest.mark.parametrize(
    "row, named",
    [
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "`rejected` of row 0 is empty"),
        ({"prompt": "a", "chosen": None, "rejected": "b"}, "`chosen` of row 0 is empty"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "of row 0 are the same"),
        (
            {"prompt": "a", "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "5"}]},
            "`prompt` of row 0 is of another",
        ),
        ({"chosen": "a", "rejected": [ANSWER]}, "`rejected` of row 0 is of another kind"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "images": ["x.png"]}, "`images` of row 0"),
        ({"chosen": "b"}, r"lacks \['rejected'\]"),
    ],
)
def test_bad_pairs_are_named(tools, row, named):
    with pytest.raises(UserError, match=named):
        tokenised_pairs([row], how(tools), "train_dataset")


def test_lost_columns_alone_are_no_warning(tools, caplog):
    caplog.set_level(logging.INFO, "llm_diffusion")
    tokenised([{"text": "a b", "id": 1}], how(tools), "train_dataset")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("INFO", "train_dataset: columns not read: id")
    ]
