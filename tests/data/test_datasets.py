"""Datasets by name: every source, the splits, and one clear error for what cannot be trained on."""

import codecs
import json
import os
import random
import re
from collections import Counter
from contextlib import suppress

import pyarrow as pa
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from loguru import logger
from transformers import AutoTokenizer

from llm_diffusion import UserError
from llm_diffusion.data.datasets import load_examples, load_preference_splits, load_splits, readable
from llm_diffusion.data.rows import source_row
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.data.tokens import Tokenising, tokenised
from llm_diffusion.evaluation.answers import encode_prompts
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

TEXTS = [f"line {i}" for i in range(20)]
ROWS = [{"text": text} for text in TEXTS]


def as_txt(folder, rows):
    (folder / "data.txt").write_text("".join(row["text"] + "\n" for row in rows))
    return folder / "data.txt"


def as_jsonl(folder, rows):
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "data.jsonl"


def as_json(folder, rows):
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def as_parquet(folder, rows):
    Dataset.from_list(rows).to_parquet(folder / "data.parquet")
    return folder / "data.parquet"


def as_folder_of_txt(folder, rows):
    for part in (0, 1):
        (folder / f"part{part}.txt").write_text("".join(row["text"] + "\n" for row in rows[part::2]))
    (folder / "README.md").write_text("not data")
    return folder


def as_folder_of_jsonl(folder, rows):
    for part in (0, 1):
        (folder / f"part{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[part::2]))
    return folder


def as_folder_of_parquet(folder, rows):
    for part in (0, 1):
        Dataset.from_list(rows[part::2]).to_parquet(folder / f"part{part}.parquet")
    return folder


def as_saved(folder, rows):
    Dataset.from_list(rows).save_to_disk(folder / "saved")
    return folder / "saved"


def as_saved_dict(folder, rows):
    DatasetDict(train=Dataset.from_list(rows)).save_to_disk(folder / "saved")
    return folder / "saved"


SOURCES = [
    as_txt,
    as_jsonl,
    as_json,
    as_parquet,
    as_folder_of_txt,
    as_folder_of_jsonl,
    as_folder_of_parquet,
    as_saved,
    as_saved_dict,
]


def load(name, **options):
    train, test = load_splits(str(name), **{"test_size": 0.2, "seed": 0, **options})
    return train["text"][:], test["text"][:]


@pytest.mark.parametrize("source", SOURCES)
def test_every_source_gives_disjoint_seeded_splits(tmp_path, source):
    path = source(tmp_path, ROWS)
    train, test = load(path)
    assert (len(train), len(test)) == (16, 4)
    assert sorted(train + test) == sorted(TEXTS)
    assert load(path) == (train, test)
    assert set(load(path, seed=1)[1]) != set(test)


@pytest.mark.parametrize(
    ("test_size", "held_out"), [(0.5, 10), (0.05, 1), (0.99, 19), (3, 3), (1, 1), (19, 19), (500, 19)]
)
def test_the_test_size_is_a_share_or_a_number(tmp_path, test_size, held_out):
    train, test = load(as_txt(tmp_path, ROWS), test_size=test_size)
    assert (len(train), len(test)) == (20 - held_out, held_out)


def test_the_limit_takes_the_first_of_the_split(tmp_path):
    path = as_txt(tmp_path, ROWS)
    train, _ = load(path)
    for limit in (1, 5, 16, 100):
        assert load(path, limit=limit)[0] == train[:limit]


@pytest.mark.parametrize("name", ["test", "validation"])
def test_an_own_test_split_is_used(tmp_path, name):
    held = [{"text": "held out"}] * 3
    DatasetDict({"train": Dataset.from_list(ROWS), name: Dataset.from_list(held)}).save_to_disk(tmp_path / "saved")
    train, test = load(tmp_path / "saved")
    assert train == TEXTS
    assert test == ["held out"] * 3


def test_tiny_is_generated():
    train, test = load_splits("tiny", test_size=18, seed=4, limit=30)
    assert train.to_list() == tiny_dataset(30, 4).to_list()
    assert test.to_list() == tiny_dataset(18, 4, "test").to_list()
    assert load_splits("tiny", test_size=18, seed=5, limit=30)[0].to_list() != train.to_list()


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
SHARED = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]


@pytest.mark.parametrize("row", [{"messages": CHAT}, {"conversations": SHARED}, {"prompt": "a", "completion": "b"}])
def test_other_trainable_columns_pass(tmp_path, row):
    train, test = load_splits(str(as_jsonl(tmp_path, [row] * 4)), test_size=1, seed=0)
    assert set(train.column_names) == set(row)
    assert (len(train), len(test)) == (3, 1)


# -- errors


def mixed_folder(folder):
    as_txt(folder, ROWS)
    as_jsonl(folder, ROWS)
    return folder


def written(name, text, encoding="utf-8"):
    def write(folder):
        (folder / name).write_text(text, encoding)
        return folder / name

    return write


def saved_without_train(folder):
    DatasetDict(extra=Dataset.from_list(ROWS)).save_to_disk(folder / "saved")
    return folder / "saved"


def saved_without_rows(folder):
    Dataset.from_dict({"text": []}).save_to_disk(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize(
    "make",
    [
        mixed_folder,
        lambda folder: folder,
        written("data.csv", "text\na\n"),
        written("data.txt", ""),
        written("data.jsonl", "\n\n"),
        written("data.jsonl", '{"words": "a"}\n{"words": "b"}\n'),
        written("data.jsonl", '{"prompt": "a"}\n{"prompt": "b"}\n'),
        written("data.jsonl", '{"text": "a"}\n{"text": \n{"text": "c"}\n'),
        written("data.json", "not json"),
        written("data.parquet", "not parquet"),
        written("data.txt", "a\ncafé\n", "latin-1"),
        written("data.jsonl", '{"text": "a"}\n{"text": "café"}\n', "latin-1"),
        written("data.jsonl", '{"text": "a"}\n'),
        written("tokens.bin", "ab"),
        saved_without_train,
        saved_without_rows,
    ],
)
def test_what_cannot_be_trained_on_is_named(tmp_path, make):
    path = make(tmp_path)
    with pytest.raises(UserError, match=f"`dataset`: '{path}'"):
        load(path)


@pytest.mark.parametrize(
    "name", ["./nothing", "/nothing/here.jsonl", "nothing.txt", "~/nothing-here", "some/data.parquet"]
)
def test_a_missing_file_is_named_and_the_hub_not_asked(name):
    with pytest.raises(FileNotFoundError, match=f"`dataset`: '{name}' "):
        load_splits(name, test_size=0.2, seed=0)


def damaged_json(folder, file, text):
    DatasetDict(train=Dataset.from_list(ROWS)).save_to_disk(folder)
    (folder / file).write_text(text)


@pytest.mark.parametrize("text", ["{}", "[]", "null", '{"_data_files'])
@pytest.mark.parametrize("file", ["dataset_dict.json", "train/state.json", "train/dataset_info.json"])
def test_a_saved_dataset_with_damaged_json_is_refused_or_whole(tmp_path, file, text):
    damaged_json(tmp_path / "saved", file, text)
    try:
        assert sorted(sum(load(tmp_path / "saved"), [])) == sorted(TEXTS)
    except UserError as error:
        assert f"`dataset`: '{tmp_path / 'saved'}' is damaged" in str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A saved dataset of several batches: its file, what is in it, and where the batches end."""
    folder = tmp_path_factory.mktemp("cut") / "saved"
    Dataset.from_list([{"text": f"line {i}"} for i in range(1100)]).save_to_disk(folder)
    (file,) = folder.glob("*.arrow")
    ends = []
    with pa.memory_map(str(file)) as source, suppress(StopIteration):
        batches = pa.ipc.open_stream(source)
        while batches.read_next_batch():
            ends.append(source.tell())
    return file, file.read_bytes(), ends


@given(st.data())
def test_a_saved_dataset_that_is_cut_off_is_refused_by_its_file(saved, data):
    file, whole, ends = saved
    assert len(ends) > 1  # at these `datasets` sees no damage
    file.write_bytes(whole[: data.draw(st.sampled_from(ends) | st.integers(0, len(whole) - 1))])
    with pytest.raises(UserError, match=re.escape(f"{str(file)!r} is damaged")):
        load_splits(str(file.parent), test_size=1, seed=0)


@settings(max_examples=50)
@given(st.data())
def test_a_saved_dataset_with_flipped_bytes_neither_ends_the_process_nor_loses_rows(saved, data):
    file, whole, ends = saved
    place, change = data.draw(st.integers(0, ends[-1])), data.draw(st.integers(1, 255))
    file.write_bytes(whole[:place] + bytes([whole[place] ^ change]) + whole[place + 1 :])
    try:
        train, test = load_splits(str(file.parent), test_size=1, seed=0)
    except UserError as error:
        assert "`dataset`" in str(error)
    else:
        assert len(train) + len(test) == 1100


# -- rows


@pytest.mark.parametrize("names", [("train", "test"), ("train-00000-of-00001", "validation-00000-of-00001")])
def test_a_folder_with_a_test_file_keeps_its_test_rows_apart(tmp_path, names):
    for name, texts in zip((*names, "more"), ("ab" * 5, "ccc", "d"), strict=True):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    lines = []
    sink = logger.add(lines.append, format="{message}")
    train, test = load_splits(str(tmp_path), test_size=0.2, seed=0)
    logger.remove(sink)
    assert set(train["text"]) == {"a", "b"} and set(test["text"]) == {"c"}
    assert any("not read" in line and "more.jsonl" in line for line in lines)


def test_a_name_is_no_pattern(tmp_path):
    folder = tmp_path / "[ab]*"
    folder.mkdir()
    for name, text in (("*.txt", "a\nb\n"), ("other.txt", "c\n"), (".hidden.txt", "d\n")):
        (folder / name).write_text(text)
    assert sorted(sum(load(folder / "*.txt"), [])) == ["a", "b"]
    assert sorted(sum(load(folder), [])) == ["a", "b", "c"]


@pytest.mark.parametrize("source", [as_txt, as_jsonl, as_json])
def test_a_byte_order_mark_and_line_ends_of_windows_are_no_text(tmp_path, source):
    path = source(tmp_path, ROWS)
    path.write_bytes(codecs.BOM_UTF8 + path.read_bytes().replace(b"\n", b"\r\n"))
    assert sorted(sum(load(path), [])) == sorted(TEXTS)


def test_texts_of_another_column_are_called_text(tmp_path):
    path = as_jsonl(tmp_path, [{"body": text, "text": None} for text in TEXTS])
    assert sorted(sum(load(path, text_field="body"), [])) == sorted(TEXTS)
    with pytest.raises(UserError, match="`dataset`"):
        load(path, text_field="words")


def test_blank_lines_are_no_examples(tmp_path):
    (tmp_path / "a.txt").write_text("a\n\nb\n \n")
    train, test = load_splits(str(tmp_path / "a.txt"), test_size=1, seed=0)
    assert sorted([*train["text"], *test["text"]]) == ["a", "b"]


def test_pairs_are_split_and_other_columns_refused(tmp_path):
    path = as_jsonl(tmp_path, [{"prompt": "q", "chosen": f"a{i}", "rejected": "b"} for i in range(10)])
    train, test = load_preference_splits(str(path), test_size=0.2, seed=0, limit=5)
    assert len(train) == 5 and len(test) == 2 and not set(train["chosen"]) & set(test["chosen"])
    for name in (str(as_txt(tmp_path, ROWS)), str(tmp_path / "none.jsonl")):
        with pytest.raises((ValueError, FileNotFoundError), match="`preference_dataset`"):
            load_preference_splits(name, test_size=0.2, seed=0)
    with pytest.raises(UserError, match="`preference_dataset`.* one example"):
        load_preference_splits(str(as_jsonl(tmp_path, [train[0]])), test_size=0.2, seed=0)


def test_examples_come_from_the_test_split_where_there_is_one(tmp_path):
    assert [row["text"] for row in load_examples(str(as_txt(tmp_path, ROWS)), 3)] == TEXTS[:3]
    splits = {"train": ROWS, "validation": [{"text": "held out"}, {"text": " "}]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "saved")
    assert load_examples(str(tmp_path / "saved")) == [{"text": "held out"}]
    assert load_examples("tiny", 6) == tiny_dataset(6, split="test").to_list()
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="`dataset`"):
        load_examples(str(tmp_path / "blank.jsonl"))


# -- mixtures

FORMS = {
    "chats": lambda i: {"messages": [{"role": "user", "content": f"chats {i}"}, {"role": "assistant", "content": "5"}]},
    "shared": lambda i: {"conversations": [{"from": "human", "value": f"shared {i}"}, {"from": "gpt", "value": "a"}]},
    "pairs": lambda i: {"prompt": f"pairs {i}", "completion": "5", "id": i},
    "turns": lambda i: {"prompt": FORMS["chats"](i)["messages"][:1], "completion": CHAT[1:], "id": f"turns {i}"},
    "texts": lambda i: {"text": f"texts {i}"},
    "tokens": lambda i: {"input_ids": [4, 5, i + 6], "labels": [-100, 5, i + 6]},
}
N_ROWS = 40


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """A file of each form, 40 rows each; the names are relative to the folder."""
    folder, before = tmp_path_factory.mktemp("sources"), os.getcwd()
    for name, form in FORMS.items():
        rows = [json.dumps(form(i)) + "\n" for i in range(N_ROWS)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    os.chdir(folder)
    yield folder
    os.chdir(before)


def rows_of(*splits):
    return [json.dumps(source_row(row), sort_keys=True) for split in splits for row in split]


def announced(amount):
    return N_ROWS if amount is None else min(amount, N_ROWS) if isinstance(amount, int) else round(amount * N_ROWS)


AMOUNTS = [None, 2, 15, 60, 0.05, 0.5, 1.0]
MIXTURES = [random.Random(i) for i in range(6)]


@pytest.mark.parametrize("draw", MIXTURES, ids=range(len(MIXTURES)))
def test_a_mixture_has_exactly_the_announced_rows(kept, draw):
    amounts = {source: draw.choice(AMOUNTS) for source in draw.sample(sorted(FORMS), draw.randrange(2, 4))}
    seed, test_size = draw.randrange(2**31), draw.choice([0.1, 0.3, 4, 12])
    written = {name: "" if amount is None else f":{amount}" for name, amount in amounts.items()}
    name = ", ".join(f"{source}.jsonl{amount}" for source, amount in written.items())
    train, test = load_splits(name, test_size=test_size, seed=seed)
    found = rows_of(train, test)
    assert len(set(found)) == len(found)  # nothing twice, and nothing held out is trained on
    total = sum(announced(amount) for amount in amounts.values())
    for source, amount in amounts.items():
        own = {json.dumps(FORMS[source](i), sort_keys=True) for i in range(N_ROWS)}
        n, held = announced(amount), len(own & set(rows_of(test)))
        assert len(own & set(found)) == n
        assert held == min(max(1, round(test_size * n / (1 if test_size < 1 else total))), n - 1)
    again = load_splits(name, test_size=test_size, seed=seed)
    assert [rows_of(split) for split in again] == [rows_of(train), rows_of(test)]


def test_a_mixture_is_shuffled_by_its_seed_and_counted_in_a_line_a_source(kept):
    lines = []
    sink = logger.add(lambda line: lines.append(line.rstrip()), format="{message}", level="INFO")
    train, test = load_splits("chats.jsonl:20, tiny:25, texts.jsonl", test_size=0.1, seed=3, limit=50)
    logger.remove(sink)
    of = Counter("chats" if "chats" in row else "texts" if "texts" in row else "tiny" for row in rows_of(train))
    held = Counter("chats" if "chats" in row else "texts" if "texts" in row else "tiny" for row in rows_of(test))
    assert len(train) == 50 and lines == [
        f"`dataset`: {name!r}: {of[key]} rows to train on, {held[key]} held out"
        for name, key in (("chats.jsonl", "chats"), ("tiny", "tiny"), ("texts.jsonl", "texts"))
    ]
    assert min(of.values()) > 5 and held == {"chats": 2, "tiny": 2, "texts": 4}
    assert len({"texts" in row for row in rows_of(train)[:10]}) == 2  # one source does not come after the other
    other = load_splits("chats.jsonl:20, tiny:25, texts.jsonl", test_size=0.1, seed=4, limit=50)[0]
    assert set(rows_of(other)) != set(rows_of(train))


def test_a_source_keeps_its_own_held_out_rows(kept, tmp_path):
    splits = {"train": ROWS, "validation": [{"text": f"held out {i}"} for i in range(9)]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "a")
    train, test = load_splits(f"{tmp_path}/a:10, chats.jsonl:10", test_size=0.3, seed=0)
    assert sum("line" in row for row in rows_of(train)) == 10 and sum("chats" in row for row in rows_of(train)) == 7
    assert sum("held out" in row for row in rows_of(test)) == sum("chats" in row for row in rows_of(test)) == 3


def test_the_limit_cuts_a_mixture_as_a_whole(kept, monkeypatch):
    monkeypatch.setattr("llm_diffusion.data.datasets.TINY_ROWS", 60)
    whole, some = (load_splits("texts.jsonl, tiny", test_size=4, seed=0, limit=n)[0] for n in (None, 10))
    assert rows_of(some) == rows_of(whole)[:10]


def test_a_saved_dataset_of_tensors_is_mixed_as_plain_rows(kept, tmp_path):
    rows = [{"input_ids": [4, 5, i], "text": "Größe"} for i in range(9)]
    Dataset.from_list(rows).with_format("numpy").save_to_disk(tmp_path / "a")
    found = [row for split in load_splits(f"{tmp_path}/a, texts.jsonl:5", test_size=0.3, seed=0) for row in split]
    assert all(row in map(source_row, found) for row in rows)
    assert sum("Größe" in row["mixed_row"] for row in found) == len(rows)  # as it is: files of rows stay readable


def test_rows_of_a_mixture_are_trained_on_as_those_of_their_sources(kept):
    """Every form, through the gate: prompts stay clean, texts and given tokens stay what they are; also for whoever reads them."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    how = Tokenising(tokenizer, ends=(tokenizer.eos_token_id,), max_length=64)
    train, test = load_splits(", ".join(f"{name}.jsonl" for name in FORMS), test_size=0.1, seed=0)
    alone = [Dataset.from_list([form(i) for i in range(N_ROWS)]) for form in FORMS.values()]
    columns = ("input_ids", "labels")
    expected = [tuple(map(tuple, map(row.get, columns))) for rows in alone for row in tokenised(rows, how, "a")]
    found = [tuple(map(tuple, map(row.get, columns))) for rows in (train, test) for row in tokenised(rows, how, "a")]
    assert sorted(found) == sorted(expected)
    assert {tuple(row)[0] for row in readable(test, len(test), tokenizer)} == {
        "messages",
        "conversations",
        "prompt",
        "text",
    }


@pytest.mark.parametrize("name", ["a,b", "a:5", "a, b:0.5", "tiny:3"])
def test_a_path_that_exists_is_no_mixture(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir()
    as_txt(tmp_path / name, ROWS)
    train, test = load(name)
    assert sorted(train + test) == sorted(TEXTS)
    (tmp_path / "other.txt").write_text("x\ny\n")
    mixed = rows_of(*load_splits(f"other.txt, {name}:10", test_size=0.2, seed=0))
    assert len(mixed) == 12 and '{"text": "x"}' in mixed


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("chats.jsonl:0, texts.jsonl", "'chats.jsonl' has the amount '0'"),
        ("chats.jsonl:-3", "'chats.jsonl' has the amount '-3'"),
        ("chats.jsonl:1.5", "'chats.jsonl' has the amount '1.5'"),
        ("chats.jsonl:50%, tiny", "'chats.jsonl' has the amount '50%'"),
        ("chats.jsonl:2k, tiny", "'chats.jsonl' has the amount '2k'"),
        ("texts.jsonl:1, tiny:9", "'texts.jsonl' has one example"),
        ("chats.jsonl, chats.jsonl:3", "each source once"),
        ("chats.jsonl:20, ./chats.jsonl", "each source once"),
        ("chats.jsonl,", "none is empty"),
        ("self:0.5, tiny", "'self' cannot be part of a mixture"),
        ("C:\\data\\none.jsonl:3, tiny", r"'C:\\data\\none.jsonl' does not exist"),
        ("C:\\data\\none.jsonl", r"'C:\\data\\none.jsonl' does not exist"),
        ("texts.jsonl:5, bad.jsonl", "`bad.jsonl`: `messages` of row 2 is null"),
        ("texts.jsonl:5, none.jsonl:0.5", "'none.jsonl' does not exist"),
    ],
)
def test_what_cannot_be_mixed_is_named(kept, name, named):
    (kept / "bad.jsonl").write_text("".join(json.dumps({"messages": m}) + "\n" for m in (CHAT, CHAT, None)))
    with pytest.raises((UserError, FileNotFoundError)) as found:
        load_splits(name, test_size=0.2, seed=0)
    assert "`dataset`" in str(found.value) and named in str(found.value), found.value


def test_rows_of_tokens_are_shown_as_their_prompts_and_answers():
    """A prompt is encoded to the tokens that it came from; of several answers the last one is asked for; without labels it is text."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    chats = [{"messages": row["messages"]} for row in tiny_dataset(3)]
    chats.append({"messages": chats[0]["messages"] + chats[1]["messages"]})
    rows = tokenised(Dataset.from_list(chats), Tokenising(tokenizer, ends=(tokenizer.eos_token_id,)), "train_dataset")
    for chat, shown in zip(chats, readable(rows, len(rows), tokenizer), strict=True):
        assert shown["completion"] == chat["messages"][-1]["content"]
        asked = [
            encode_prompts(tokenizer, [prompt])["input_ids"] for prompt in (shown["prompt"], chat["messages"][:-1])
        ]
        assert torch.equal(*asked)
    ids = rows["input_ids"][3]
    answers = [i for i, row in enumerate(rows["labels"][3]) if row != -100]
    two = {"input_ids": ids, "completion_mask": [int(i in answers or i < 8) for i in range(len(ids))]}
    assert readable(Dataset.from_list([two]), 1, tokenizer)[0]["completion"] == chats[1]["messages"][-1]["content"]
    for labels in (ids, [-100] * len(ids)):
        (shown,) = readable(Dataset.from_list([{"input_ids": ids, "labels": labels}]), 1, tokenizer)
        assert shown == {"text": tokenizer.decode(ids, skip_special_tokens=True)}
