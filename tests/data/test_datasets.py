"""Datasets by name: every source, the splits, and one clear error for what cannot be trained on."""

import json

import pytest
from datasets import Dataset, DatasetDict

from llm_diffusion import UserError
from llm_diffusion.data.datasets import load_examples, load_preference_splits, load_splits
from llm_diffusion.data.tiny import tiny_dataset

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


@pytest.mark.parametrize(("test_size", "held_out"), [(0.5, 10), (0.05, 1), (3, 3), (1, 1), (19, 19), (500, 19)])
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


def written(name, text):
    def write(folder):
        (folder / name).write_text(text)
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


# -- rows


def test_a_folder_with_a_test_file_keeps_its_test_rows_apart(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n' * 5)
    (tmp_path / "test.jsonl").write_text('{"text": "c"}\n' * 3)
    train, test = load_splits(str(tmp_path), test_size=0.2, seed=0)
    assert set(train["text"]) == {"a", "b"} and set(test["text"]) == {"c"}


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


def test_examples_come_from_the_test_split_where_there_is_one(tmp_path):
    assert [row["text"] for row in load_examples(str(as_txt(tmp_path, ROWS)), 3)] == TEXTS[:3]
    splits = {"train": ROWS, "validation": [{"text": "held out"}, {"text": " "}]}
    DatasetDict({name: Dataset.from_list(rows) for name, rows in splits.items()}).save_to_disk(tmp_path / "saved")
    assert load_examples(str(tmp_path / "saved")) == [{"text": "held out"}]
    assert load_examples("tiny", 6) == tiny_dataset(6, split="test").to_list()
    (tmp_path / "blank.jsonl").write_text('{"text": " "}\n')
    with pytest.raises(UserError, match="`dataset`"):
        load_examples(str(tmp_path / "blank.jsonl"))
