"""prepare-data: every token of every document is where it belongs, from every source and in every form; and the job takes it."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from datasets import Dataset, load_from_disk

from llm_diffusion.data.prepare import Preparation, prepare
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.main import cli

TEXTS = [" ".join("abcdefgh"[(i + j) % 8] for j in range(3 + 5 * i % 11)) for i in range(40)]


@pytest.fixture
def ids(tokenizer):
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]


def sources(path, ids, tokenizer):
    (path / "t.txt").write_text("\ufeff" + "\n".join(TEXTS[:20] + ["", "  "] + TEXTS[20:]) + "\n")
    (path / "j.jsonl").write_text("".join(json.dumps({"text": text, "url": "x"}) + "\n" for text in TEXTS))
    Dataset.from_dict({"text": TEXTS}).to_parquet(str(path / "p.parquet"))
    flat = [token for row in ids for token in [*row, tokenizer.eos_token_id]]
    np.array(flat, dtype=np.uint16).tofile(path / "b.bin")
    return ["t.txt", "j.jsonl", "p.parquet", "b.bin"]


def test_joined_rows_hold_every_token_in_order(tmp_path, tokenizer, ids):
    flat = [token for row in ids for token in [*row, tokenizer.eos_token_id]]
    for file in sources(tmp_path, ids, tokenizer):
        plan = Preparation(str(tmp_path / file), "tiny", length=16, test=0)
        splits = prepare(plan, tmp_path / f"out-{file}")
        got = [token for row in splits["train"]["input_ids"] for token in row]
        assert got == flat[: len(flat) // 16 * 16]
        assert plan.counts == {"train": {"documents": 40, "rows": len(flat) // 16, "tokens": len(flat) - 40}}
        assert all(len(row) == 16 for row in splits["train"]["input_ids"])
        assert not list(tmp_path.glob(".unfinished*"))


def test_what_a_killed_process_left_goes_and_a_neighbours_stays(tmp_path, tokenizer, ids):
    sources(tmp_path, ids, tokenizer)
    left, neighbours = tmp_path / ".unfinished-out-abc_1234", tmp_path / ".unfinished-out-2-abc_1234"
    for folder in (left, neighbours):
        (folder / "out").mkdir(parents=True)
    prepare(Preparation(str(tmp_path / "t.txt"), "tiny", length=16), tmp_path / "out")
    assert list(tmp_path.glob(".*")) == [neighbours]


def test_padded_rows_are_a_document_each(tmp_path, tokenizer, ids):
    sources(tmp_path, ids, tokenizer)
    plan = Preparation(str(tmp_path / "j.jsonl"), "tiny", form="padded", length=10, train=20, test=10)
    splits = prepare(plan, tmp_path / "out")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    assert any(len(row) > 10 for row in ids[:30]) and any(len(row) < 8 for row in ids[:30])
    for split, documents in (("test", ids[:10]), ("train", ids[10:30])):
        want = [([*row, tokenizer.eos_token_id] + [pad] * 10)[:10] for row in documents]
        assert splits[split]["input_ids"] == want
        lost = sum(max(0, len(row) + 1 - 10) for row in documents)
        assert plan.counts[split]["tokens cut off"] == lost > 0
    assert json.loads((tmp_path / "out" / "prepared.json").read_text())["counts"]["test"]["documents"] == 10


def test_a_share_is_held_out_and_nothing_is_lost(tmp_path, tokenizer, ids):
    sources(tmp_path, ids, tokenizer)
    splits = prepare(Preparation(str(tmp_path / "t.txt"), "tiny", form="documents", test=0.25), tmp_path / "out")
    train, test = ([tuple(row[:-1]) for row in splits[name]["input_ids"]] for name in ("train", "test"))
    assert 4 <= len(test) <= 16
    assert sorted(train + test) == sorted(tuple(row) for row in ids)


def test_tokens_without_an_end_token_are_one_document(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("llm_diffusion.data.prepare._CHUNK", 7)  # documents are longer than what is read at once
    tokens = np.arange(10, 60, dtype=np.uint16)
    tokens[30] = tokenizer.eos_token_id
    tokens.tofile(tmp_path / "b.bin")
    rows = prepare(Preparation(str(tmp_path / "b.bin"), "tiny", form="documents", test=0), tmp_path / "out")["train"]
    assert [row[:-1] for row in rows["input_ids"]] == [list(range(10, 40)), list(range(41, 60))]


def test_chats_are_rendered(tmp_path, tokenizer):
    tiny_dataset(4).select_columns(["messages"]).to_json(str(tmp_path / "chats.jsonl"))
    rows = prepare(Preparation(str(tmp_path / "chats.jsonl"), "tiny", form="documents", test=0), tmp_path / "out")[
        "train"
    ]
    assert "assistant" in tokenizer.decode(rows[0]["input_ids"])


def run(*arguments):
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


def test_the_job_trains_on_what_was_prepared(tmp_path, tokenizer, ids):
    sources(tmp_path, ids, tokenizer)
    out = str(tmp_path / "data")
    done = run(
        "prepare-data", str(tmp_path / "t.txt"), "--model", "tiny", "--output", out, "--length", "16", "--test", "8"
    )
    assert done.exit_code == 0, done.output
    assert "train: 32 documents" in done.stdout and "40 documents" in done.stderr
    assert set(load_from_disk(out)) == {"train", "test"}
    settings = {
        "model": "tiny",
        "dataset": out,
        "phases": ["pretrain"],
        "pretrain_config": {"max_steps": 1},
        "batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_length": 16,
        "device": "cpu",
        "generation": {"max_new_tokens": 8, "block_length": 8},
        "lora_config": {"r": 4},
        "output_dir": str(tmp_path / "run"),
    }
    done = run("--hyper-parameters-json", json.dumps(settings))
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(
    ("source", "options", "said"),
    [
        ("none.txt", (), "does not exist"),
        ("none.bin", (), "does not exist"),
        ("t.txt", ("--form", "cut"), "`form`"),
        ("t.txt", ("--length", "1"), "`length`"),
        ("t.txt", ("--test", "2.5"), "`test`"),
        ("t.txt", ("--train", "0"), "`train`"),
        ("t.txt", ("--dtype", "float"), "`dtype`"),
        ("t.txt", ("--length", "5000"), "too short"),
        ("t.txt", ("--test", "50"), "`test`: all 40 documents"),
        ("j.jsonl", ("--text-field", "body"), "--text-field"),
        ("b.bin", ("--dtype", "uint32"), "`--dtype` is another"),
        ("odd.bin", (), "set `--dtype`"),
        ("empty.jsonl", (), "is empty"),
        ("bad.jsonl", (), "could not be read"),
        ("late", (), "could not be read"),
        ("late.bin", (), "has token 60000"),
        ("ints.jsonl", (), "`text` of row 1 is 5"),
        ("turns.jsonl", (), "`messages` of row 0 is 'x'"),
        ("roles.jsonl", (), "`messages` of row 0 has a turn of the role 'king'"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, tokenizer, ids, monkeypatch, source, options, said):
    monkeypatch.setattr("llm_diffusion.data.prepare._CHUNK", 64)
    sources(tmp_path, ids, tokenizer)
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "bad.jsonl").write_text('{"text": \n')
    (tmp_path / "ints.jsonl").write_text('{"text": null}\n{"text": 5}\n')
    (tmp_path / "turns.jsonl").write_text('{"messages": "x"}\n')
    (tmp_path / "roles.jsonl").write_text('{"messages": [{"role": "king", "content": "a"}]}\n')
    # Far behind what is read first.
    (tmp_path / "late").mkdir()
    (tmp_path / "late" / "1.jsonl").write_text('{"text": "a b"}\n' * 300)
    (tmp_path / "late" / "2.jsonl").write_text('{"text": \n')
    np.array([9, tokenizer.eos_token_id] * 2**9 + [60000], dtype=np.uint16).tofile(tmp_path / "late.bin")
    done = run(
        "prepare-data", str(tmp_path / source), "--model", "tiny", "--output", str(tmp_path / "out" / "a"), *options
    )
    assert done.exit_code == 2 and said in done.stderr.splitlines()[-1], done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert not list((tmp_path / "out").rglob("*"))


def test_a_folder_in_use_is_left_alone(tmp_path, tokenizer, ids):
    sources(tmp_path, ids, tokenizer)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ValueError, match="--output"):
        prepare(Preparation(str(tmp_path / "t.txt"), "tiny"), tmp_path / "out")
    assert (tmp_path / "out" / "mine").read_text() == "x"
