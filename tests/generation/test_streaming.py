"""Streamers: the host's own, and what each is told and when."""

import pytest
import torch
from transformers import TextDiffusionStreamer, TextStreamer
from transformers.generation.streamers import BaseStreamer

import llm_diffusion as ld

MASK = 31


class Recorder(BaseStreamer):
    """Keeps what is put, in order, and the drafts with their confidence."""

    def __init__(self):
        self.puts, self.drafts, self.order, self.ended = [], [], [], 0

    def put(self, value):
        self.puts.append(value.tolist())
        self.order.append("put")

    def put_draft(self, value, confidence=None):
        self.drafts.append((value.tolist(), confidence))
        self.order.append("draft")

    def end(self):
        self.ended += 1


RULES = [
    {},
    {"threshold": 0.3},
    {"threshold": 0.05, "editing_threshold": 0.1},
    {"revision": "p2", "steps": 24},
]


@pytest.mark.parametrize("settings", RULES, ids=str)
def test_blocks_are_put_when_nothing_changes_them(random_diffuser, settings):
    prompt = torch.tensor([[11, 12, 13]])
    common = {"max_new_tokens": 10, "block_length": 4, "eos_token_id": None, "output_history": True}
    for seed in range(4):
        recorder = Recorder()
        output = ld.generate(
            random_diffuser(True, seed), prompt, streamer=recorder, return_dict_in_generate=True, **common, **settings
        )
        first, *blocks = recorder.puts
        assert first == prompt.tolist() and recorder.ended == 1
        ends = [sum(len(block[0]) for block in blocks[: i + 1]) for i in range(len(blocks))]
        assert ends[0] == 4 and set(ends) <= {4, 8, 10}
        assert sum((block[0] for block in blocks), []) == output.sequences[0, 3:].tolist()
        assert recorder.order[-1] == "put"
        lengths = [len(draft[0]) for draft, _ in recorder.drafts]
        assert set(lengths) <= {10, 6, 2} and 6 in lengths, "blocks came late"
        # Every draft is of what was not put yet, with a probability for whatever is no mask.
        for (draft, confidence), canvas in zip(recorder.drafts, output.history, strict=True):
            assert canvas[0, -len(draft[0]) :].tolist() == draft[0]
            assert torch.equal(confidence > 0, torch.tensor(draft) != MASK)


@pytest.mark.parametrize("block_length", [None, 4])
def test_the_hosts_text_streamer_prints_the_answer(tiny, capsys, block_length):
    model, tokenizer = tiny
    batch = tokenizer("Sort the letters: k d e a", return_tensors="pt")
    settings = {"max_new_tokens": 10, "block_length": block_length}
    answer = model.generate(**batch, **settings)[0, batch["input_ids"].shape[1] :]
    model.generate(**batch, **settings, streamer=TextStreamer(tokenizer, skip_prompt=True))
    assert capsys.readouterr().out == tokenizer.decode(answer) + "\n"


def test_the_hosts_diffusion_streamer_prints_drafts_and_the_answer(tiny, capsys):
    model, tokenizer = tiny
    batch = tokenizer("Sort the letters: k d e a", return_tensors="pt")
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    answer = model.generate(**batch, **settings)[0, batch["input_ids"].shape[1] :]
    model.generate(**batch, **settings, streamer=TextDiffusionStreamer(tokenizer, skip_prompt=True))
    out = capsys.readouterr().out
    assert out.count("\033[33m") == 6  # yellow drafts, one a step
    assert "<|mask|>" in out.split("\0338")[0]
    assert out.split("\033[J")[-1] == tokenizer.decode(answer) + "\n"  # what stays


def test_several_rows_are_put_at_the_end(random_diffuser):
    recorder, ids = Recorder(), torch.tensor([[11, 12], [13, 14]])
    answer = ld.generate(random_diffuser(True), ids, streamer=recorder, max_new_tokens=8, block_length=2)
    assert recorder.puts == [ids.tolist(), answer[:, 2:].tolist()]


def test_blocks_of_a_block_model_are_counted_from_the_start_of_the_text(random_llama, tokenizer):
    model = ld.convert_to_diffusion(random_llama(), tokenizer, attention="block", block_length=4)
    recorder = Recorder()
    ids, mask = torch.tensor([[0, 0, 21, 22, 23]]), torch.tensor([[0, 0, 1, 1, 1]])
    answer = ld.generate(model, ids, mask, streamer=recorder, max_new_tokens=10, eos_token_id=None)
    assert [len(block[0]) for block in recorder.puts[1:]] == [1, 4, 4, 1]
    assert sum((block[0] for block in recorder.puts[1:]), []) == answer[0, 5:].tolist()
