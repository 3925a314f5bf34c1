"""What changes logits: penalties, the host's processors, forbidden words, guidance; and several answers to one prompt."""

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

import llm_diffusion as ld
from llm_diffusion.generation.logits import Window, ban_words, guide, penalise_repetition, without_bad_words
from llm_diffusion.models.sampling import BANNED

MASK = 31


def window_of(canvas, open_, columns=None):
    canvas, open_ = torch.tensor(canvas), torch.tensor(open_).bool()
    columns = torch.arange(canvas.shape[1]).expand(len(canvas), -1) if columns is None else torch.tensor(columns)
    zero = torch.zeros(len(canvas), dtype=torch.long)
    masked = (canvas == MASK) & open_
    return Window(
        columns=columns,
        open=open_.gather(-1, columns),
        masked=masked.gather(-1, columns),
        canvas=canvas,
        visible=(canvas != 0) & ~masked,  # 0 is padding here
        confidence=torch.zeros(columns.shape),
        keys=zero,
        places=columns,
        step=zero,
        steps_left=zero,
        post_steps=zero,
        block_steps=0,
    )


def left_padded(rows):
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }


@pytest.mark.parametrize("penalty", [1.7, 0.6])
def test_repetition_is_the_hosts_on_what_is_committed(penalty):
    """Position by position against the host's own processor, fed the committed text without the position itself."""
    window = window_of(
        [[5, 6, 5, MASK, 7, MASK, 9], [0, 0, 8, 8, MASK, 6, MASK]], [[0, 0, 0, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
    )
    logits = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))
    got = penalise_repetition(logits, window, penalty)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)
    for row in range(2):
        for column in range(7):
            seen = [
                int(token)
                for i, token in enumerate(window.canvas[row])
                if window.visible[row, i] and not (i == column and window.open[row, i])
            ]
            want = theirs(torch.tensor([seen]), logits[row, column][None].clone())
            torch.testing.assert_close(got[row, column][None], want)


def test_a_forbidden_sequence_is_seen_from_every_side():
    words = [[3, 4, 5], [9]]
    window = window_of([[3, MASK, 5, MASK, 4, 5, MASK, 3, 4, MASK, MASK, 5]], [[0, 1, 0, 1, 0, 0, 1, 0, 0, 1, 1, 0]])
    logits = ban_words(torch.zeros(1, 12, 32), window, words)
    banned = {(int(i), int(token)) for i, token in (logits[0] == BANNED).nonzero()}
    assert banned == {(1, 4), (3, 3), (9, 5)} | {(i, 9) for i in range(12)}


def test_commits_that_would_write_it_together_are_taken_back():
    window = window_of([[MASK, MASK, MASK, 3, MASK, 8]] * 2, [[1, 1, 1, 0, 1, 0]] * 2)
    tokens = torch.tensor([[3, 4, 6, 0, 4, 0], [3, 4, 6, 0, 5, 0]])
    chosen = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 0]]).bool()
    score = torch.tensor([[0.1, 0.9, 0.2, 0, 0.5, 0], [0.2, 0.1, 0.3, 0, 0.9, 0]])
    kept = without_bad_words(chosen, tokens, score, window, [[3, 4]])
    assert kept.tolist() == [[False, True, True, False, False, False], [False, False, False, False, True, False]]


def contains(row, word):
    return any(row[i : i + len(word)] == word for i in range(len(row)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"steps": 1}, {"threshold": 0.05}, {"factor": 2.0, "block_length": 3}, {"temperature": 1.5}],
    ids=str,
)
def test_forbidden_words_never_appear(random_diffuser, settings):
    """Sequences and tokens of the free answers are forbidden one by one, the seam to the prompt included."""
    model, found = random_diffuser(True), 0
    prompts = [[11 + i, 12, 13] for i in range(6)]
    common = {"max_new_tokens": 8, "eos_token_id": None, **settings}
    free = ld.generate(model, **left_padded(prompts), **common)
    for row in range(6):
        for start in (2, 4, 6):  # the first one begins in the prompt
            word = free[row, start : start + 2 + row % 2].tolist()
            answers = ld.generate(model, **left_padded(prompts), bad_words_ids=[word, [int(free[0, 5])]], **common)
            assert not (answers == MASK).any()
            for prompt, answer in zip(prompts, answers.tolist(), strict=True):
                assert not contains(answer, word)
                assert free[0, 5] not in answer[len(prompt) :]
            found += 1
    assert found == 18


class Recording(LogitsProcessor):
    """Keeps what it is shown, and changes nothing."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen += [row.tolist() for row in input_ids]
        return scores


def test_processors_see_the_text_on_the_left(random_diffuser):
    model, recording = random_diffuser(True), Recording()
    rows = [[11, 12, 13], [14]]
    settings = {"max_new_tokens": 3, "eos_token_id": None, "remasking": "left_to_right"}
    free = ld.generate(model, **left_padded(rows), **settings)
    with_ = ld.generate(model, **left_padded(rows), logits_processor=LogitsProcessorList([recording]), **settings)
    assert torch.equal(free, with_)
    for row in free.tolist():  # left to right, the text before the token to be committed is complete
        for n in (3, 4, 5):
            assert row[:n] in recording.seen
    assert [11, 12, 13, MASK] in recording.seen  # a later position still has masks on its left
    assert all(len(row) in (3, 4, 5) for row in recording.seen)


@pytest.mark.parametrize("attention", ["bidirectional", "block"])
def test_a_processor_of_the_host_has_its_way(random_llama, tokenizer, attention):
    options = {"attention": "block", "block_length": 4} if attention == "block" else {}
    model = ld.convert_to_diffusion(random_llama(initializer_range=0.3), tokenizer, **options)
    batch = left_padded([[21, 22, 23], [24]])
    settings = {"max_new_tokens": 9, "eos_token_id": None}
    free = ld.generate(model, **batch, **settings)
    unwanted = free[:, 3:].unique().tolist()
    processed = ld.generate(model, **batch, logits_processor=[SuppressTokensLogitsProcessor(unwanted)], **settings)
    assert not set(unwanted) & set(processed[:, 3:].unique().tolist())
    assert torch.equal(processed, ld.generate(model, **batch, suppress_tokens=unwanted, **settings))


def test_guidance_by_formula():
    conditional, unconditional = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    w = 1.5  # LLaDA's cfg_scale
    want = unconditional + (w + 1) * (conditional - unconditional)
    torch.testing.assert_close(guide(torch.cat([conditional, unconditional]), w + 1), want)


def test_llada_and_host_name_guidance_alike(random_diffuser):
    model, prompt = random_diffuser(True), torch.tensor([[11, 12, 13]])
    settings = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
    ours = ld.generate(model, prompt, guidance_scale=2.5, **settings)
    lladas = ld.generate(model, prompt, cfg_scale=1.5, **settings)
    free = ld.generate(model, prompt, cfg_scale=0.0, **settings)
    assert torch.equal(ours.sequences, lladas.sequences)
    assert not torch.equal(ours.sequences, free.sequences)
    # Both passes of a step count.
    assert ours.nfe.tolist() == [12] and free.nfe.tolist() == [6]
    assert ours.tokens_per_forward.tolist() == [0.5] and free.tokens_per_forward.tolist() == [1.0]


# -- several answers


def test_several_answers_to_one_prompt(random_diffuser):
    model, rows = random_diffuser(True), [[11, 12, 13], [14]]
    settings = {"max_new_tokens": 6, "eos_token_id": None, "temperature": 1.0, "seed": 5}
    several = ld.generate(model, **left_padded(rows), num_return_sequences=4, **settings)
    assert several.shape == (8, 9)
    for i, row in enumerate(rows):
        own = several[4 * i : 4 * i + 4]
        assert all(answer[3 - len(row) : 3].tolist() == row for answer in own)
        assert len({tuple(answer.tolist()) for answer in own}) == 4
        # The same whatever the batch, and however the copies are asked for.
        alone = ld.generate(model, torch.tensor([row]), num_return_sequences=4, **settings)
        assert torch.equal(alone[:, len(row) :], own[:, 3:])
        assert torch.equal(ld.generate(model, torch.tensor([row] * 4), **settings), alone)
    other = ld.generate(model, **left_padded(rows), num_return_sequences=4, **{**settings, "seed": 6})
    assert not torch.equal(other, several)


@pytest.mark.parametrize(
    "settings", [{"alg_temp": 0.5}, {"remasking": "random"}, {"do_sample": True, "top_p": 0.9}], ids=str
)
def test_answers_differ_by_their_order_too(random_diffuser, settings):
    common = {"max_new_tokens": 12, "eos_token_id": None, "num_return_sequences": 8}
    answers = ld.generate(random_diffuser(True), torch.tensor([[11, 12]]), **common, **settings)
    assert len({tuple(answer.tolist()) for answer in answers}) > 3
