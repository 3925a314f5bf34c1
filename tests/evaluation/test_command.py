"""What the command reads before it measures; the command itself is run in test_main.py."""

import pytest

from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.command import read_prompts, read_texts


def test_texts(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "completion": "x"}\n')
    assert read_texts(str(tmp_path / "a.txt"), 1) == ["one\n\ntwo"]
    assert read_texts(str(tmp_path / "a.jsonl"), 1) == ["one"]
    with pytest.raises(ValueError, match="`--text`.*no `text`"):
        read_texts(str(tmp_path / "b.jsonl"), None)
    with pytest.raises(FileNotFoundError, match="`--text`"):
        read_texts(str(tmp_path / "none"), None)


def test_prompts(tmp_path) -> None:
    assert read_prompts("tiny", 3) == list(tiny_dataset(3, split="test"))
    (tmp_path / "a.jsonl").write_text('{"input": "1,2,3", "output": "1+2=3"}\n' * 3)
    (tmp_path / "b.jsonl").write_text('{"prompt": "one", "completion": "x"}\n' * 3)
    assert read_prompts(str(tmp_path / "a.jsonl"), 2) == [{"input": "1,2,3", "output": "1+2=3"}] * 2
    assert read_prompts(str(tmp_path / "b.jsonl"), 2) == [{"prompt": "one", "completion": "x"}] * 2
    (tmp_path / "c.jsonl").write_text('{"odd": 1}\n')
    with pytest.raises(ValueError, match="columns .'odd'."):
        read_prompts(str(tmp_path / "c.jsonl"), None)
