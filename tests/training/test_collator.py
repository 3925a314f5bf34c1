"""The collator: padding, what may be masked, canvases, and the corruption of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from collators import collator_of
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_diffusion.objective.modes import IGNORE_INDEX
from llm_diffusion.objective.noise import MIN_TIME
from llm_diffusion.training.collator import DataCollatorForMaskedDiffusion

PAD, MASK, EOS, NEWLINE = 0, 1, 2, 3
few = settings(max_examples=25, deadline=None, derandomize=True)
tokens = st.lists(st.integers(4, 40), min_size=1, max_size=8)
both_conventions = pytest.mark.parametrize("right_shift", [False, True])

Row = dict[str, list[int]]


def collator_with(**options: Any) -> DataCollatorForMaskedDiffusion:
    return collator_of(**{"pad_token_id": PAD, "mask_token_id": MASK, "eos_token_id": EOS} | options)


def answer_row(prompt: list[int], answer: list[int], after: tuple[int, ...] = (), trained_after: bool = False) -> Row:
    """Prompt, answer and what the chat template puts after it."""
    tail = list(after) if trained_after else [IGNORE_INDEX] * len(after)
    return {"input_ids": prompt + answer + list(after), "labels": [IGNORE_INDEX] * len(prompt) + answer + tail}


def many_answers(n: int, ended: bool = True) -> list[Row]:
    """`n` different rows of 3 prompt tokens and 6 answer tokens, the last one the EOS if `ended`."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 1000, (n, 9), generator=generator).tolist()
    return [answer_row(row[:3], row[3:8] + [EOS] if ended else row[3:]) for row in ids]


def unpadded(batch: dict[str, torch.Tensor], row: int, key: str = "input_ids") -> list[int]:
    inputs = batch.get("inputs", batch)  # a corrupted batch keeps what the model sees apart
    values = batch[key] if key in batch else inputs[key]
    return values[row][inputs["attention_mask"][row].bool()].tolist()


def ragged_batch(n: int = 8) -> list[Row]:
    """`n` rows of different lengths, prompts among them."""
    return [answer_row(list(range(10, 11 + i % 3)), list(range(20 + i, 30 + 2 * i)) + [EOS]) for i in range(n)]


@few
@given(rows=st.lists(tokens, min_size=1, max_size=5), multiple=st.sampled_from([None, 1, 8]))
def test_padding(rows: list[list[int]], multiple: int | None) -> None:
    batch = collator_with(right_shift_logits=False, pad_to_multiple_of=multiple)([{"input_ids": row} for row in rows])
    length = max(map(len, rows))
    length = -(-length // (multiple or 1)) * (multiple or 1)
    for i, row in enumerate(rows):
        rest = length - len(row)
        assert batch["input_ids"][i].tolist() == row + [PAD] * rest
        assert batch["labels"][i].tolist() == row + [IGNORE_INDEX] * rest  # no labels: everything may be masked
        assert batch["attention_mask"][i].tolist() == [1] * len(row) + [0] * rest
    assert all(value.dtype == torch.int64 for value in batch.values())


@both_conventions
def test_labels_decide_what_may_be_masked(right_shift: bool) -> None:
    labels = [4, IGNORE_INDEX, 6, IGNORE_INDEX]
    batch = collator_with(right_shift_logits=right_shift)([{"input_ids": [4, 5, 6, 7], "labels": labels}])
    # With the right shift no hidden state stands before the first token.
    assert batch["labels"].tolist() == [[IGNORE_INDEX, *labels[1:]] if right_shift else labels]
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7]]


def test_a_word_that_serves_as_the_mask_is_never_asked_for() -> None:
    rows = [{"input_ids": [5, MASK, 6, MASK, 7, EOS]}] * 64
    batch = collator_with(right_shift_logits=False)(rows)
    assert (batch["labels"][0] == IGNORE_INDEX).tolist() == [False, True, False, True, False, False]
    noisy = collator_with(right_shift_logits=False).corrupt(batch, seed=0, step=0, rows=torch.arange(64), n_rows=64)
    assert (noisy["targets"] != MASK).all() and (noisy["targets"][:, [0, 2, 4, 5]] != IGNORE_INDEX).any(0).all()


def test_collating_leaves_the_rows_alone() -> None:
    rows = many_answers(4)
    copy = [{key: list(value) for key, value in row.items()} for row in rows]
    collator_with(eos_tail=4, random_canvas=0.5)(rows)
    assert rows == copy


@few
@given(prompt=tokens, answer=tokens, eos_tail=st.integers(0, 6))
def test_eos_tail_is_bounded_and_maskable(prompt: list[int], answer: list[int], eos_tail: int) -> None:
    batch = collator_with(eos_tail=eos_tail)([answer_row(prompt, answer + [EOS])])
    tail = batch["input_ids"].shape[1] - len(prompt) - len(answer) - 1
    assert 0 <= tail <= eos_tail
    assert batch["input_ids"][0].tolist() == prompt + answer + [EOS] * (1 + tail)
    assert batch["labels"][0].tolist() == [IGNORE_INDEX] * len(prompt) + answer + [EOS] * (1 + tail)
    assert batch["attention_mask"].all()


def test_every_tail_length_is_as_likely() -> None:
    n, eos_tail = 1000, 4
    batch = collator_with(eos_tail=eos_tail)(many_answers(n))
    counts = (batch["attention_mask"].sum(-1) - 9).bincount(minlength=eos_tail + 1)
    assert len(counts) == eos_tail + 1
    assert ((counts - n / 5).abs() < 4 * (n * 0.2 * 0.8) ** 0.5).all()


@pytest.mark.parametrize("after", [(), (NEWLINE,), (NEWLINE, NEWLINE)])
@pytest.mark.parametrize("trained_after", [False, True])
def test_what_follows_the_eos_is_dropped(after: tuple[int, ...], trained_after: bool) -> None:
    batch = collator_with()([answer_row([10, 11], [20, 21, EOS], after, trained_after)])
    assert batch["input_ids"].tolist() == [[10, 11, 20, 21, EOS]]
    assert batch["labels"].tolist() == [[IGNORE_INDEX, IGNORE_INDEX, 20, 21, EOS]]


@pytest.mark.parametrize(
    "row",
    [
        answer_row([10, 11], [20, 21, 22]),
        answer_row([10, EOS, 11], [20, 21, 22]),  # the EOS of the prompt ends no answer
        answer_row([10], [20, EOS, 21, 22, 23, 24]),  # an EOS inside a longer truncated answer neither
        {"input_ids": [10, 11, 12, EOS]},  # a text without a prompt
        {"input_ids": [10, 11], "labels": [IGNORE_INDEX, IGNORE_INDEX]},
    ],
)
def test_what_is_no_ended_answer_gets_no_canvas(row: Row) -> None:
    batch = collator_with(eos_tail=5, random_canvas=1.0, right_shift_logits=False)([row])
    assert batch["input_ids"].tolist() == [row["input_ids"]]
    assert batch["labels"].tolist() == [row.get("labels", row["input_ids"])]


def test_without_an_eos_id_rows_are_left_as_they_are() -> None:
    row = answer_row([10], [20, EOS], (NEWLINE,))
    batch = collator_with(eos_token_id=None, eos_tail=5, random_canvas=1.0)([row])
    assert batch["input_ids"].tolist() == [row["input_ids"]]


@few
@given(prompt=tokens, answer=tokens)
def test_random_cut_keeps_the_prompt_and_an_answer_token(prompt: list[int], answer: list[int]) -> None:
    row = answer_row(prompt, answer + [EOS], (NEWLINE,))
    batch = collator_with(eos_tail=5, random_canvas=1.0)([row])
    length = batch["input_ids"].shape[1]
    assert len(prompt) + 1 <= length <= len(prompt) + len(answer) + 1
    assert batch["input_ids"][0].tolist() == row["input_ids"][:length]
    assert batch["labels"][0].tolist() == row["labels"][:length]


def test_cuts_fall_everywhere_and_as_often_as_asked() -> None:
    n, rows = 1000, many_answers(1000)
    lengths = collator_with(random_canvas=1.0)(rows)["attention_mask"].sum(-1)
    counts = (lengths - 4).bincount(minlength=6)
    assert len(counts) == 6 and ((counts - n / 6).abs() < 4 * (n / 6 * 5 / 6) ** 0.5).all()
    shorter = (collator_with(random_canvas=0.25)(rows)["attention_mask"].sum(-1) < 9).float().mean()
    share = 0.25 * 5 / 6  # one cut in six takes nothing away
    assert abs(shorter - share) < 4 * (share * (1 - share) / n) ** 0.5


@few
@given(order=st.permutations(range(12)), size=st.integers(1, 12))
def test_canvases_do_not_depend_on_the_batch(order: list[int], size: int) -> None:
    collator, rows = collator_with(eos_tail=6, random_canvas=0.5), many_answers(12)
    batch = collator([rows[i] for i in order[:size]])
    for place, i in enumerate(order[:size]):
        assert unpadded(batch, place) == collator([rows[i]])["input_ids"][0].tolist()


@both_conventions
@few
@given(seed=st.integers(0, 2**31 - 1), step=st.integers(0, 1000))
def test_corruption_hides_exactly_the_targets(right_shift: bool, seed: int, step: int) -> None:
    collator = collator_with(right_shift_logits=right_shift, eos_tail=3)
    batch = collator(ragged_batch())
    before = {key: value.clone() for key, value in batch.items()}
    noisy = collator.corrupt(batch, seed=seed, step=step, rows=torch.arange(8), n_rows=8)
    assert all(torch.equal(batch[key], before[key]) for key in batch)
    assert torch.equal(noisy["inputs"]["attention_mask"], batch["attention_mask"])
    ids, masked = batch["input_ids"], noisy["inputs"]["input_ids"] == MASK
    assert torch.equal(noisy["inputs"]["input_ids"][~masked], ids[~masked])
    assert (batch["labels"][masked] != IGNORE_INDEX).all()  # prompt, padding and a token without predictor stay clean
    row, position = masked.nonzero().unbind(-1)
    expected = torch.full_like(ids, IGNORE_INDEX)
    expected[row, position - int(right_shift)] = ids[row, position]
    assert torch.equal(noisy["targets"], expected)


@both_conventions
def test_mask_rate_is_the_time_and_the_weight_its_inverse(right_shift: bool) -> None:
    collator = collator_with(right_shift_logits=right_shift)
    n, length = 64, 400
    batch = collator([{"input_ids": [4 + i % 9] * length} for i in range(n)])
    noisy = collator.corrupt(batch, seed=0, step=0, rows=torch.arange(n), n_rows=n)
    times, scored = noisy["times"][:, 0], noisy["targets"] != IGNORE_INDEX
    rate = scored.sum(-1) / (length - right_shift)
    assert ((rate - times).abs() <= 4.5 * (times * (1 - times) / length) ** 0.5 + 1e-6).all()
    assert noisy["weights"].dtype == torch.float32 and noisy["weights"].shape == scored.shape
    assert torch.equal(noisy["weights"][scored], (1 / times)[:, None].expand(n, length)[scored])
    assert (times >= MIN_TIME).all() and (times <= 1).all()


@both_conventions
def test_uniform_weight_is_one(right_shift: bool) -> None:
    collator = collator_with(loss_weight="uniform", right_shift_logits=right_shift)
    noisy = collator.corrupt(collator(ragged_batch()), seed=0, step=0, rows=torch.arange(8), n_rows=8)
    assert (noisy["weights"][noisy["targets"] != IGNORE_INDEX] == 1).all()


def corrupted_one_by_one(collator: DataCollatorForMaskedDiffusion, rows: list[Row], **keys: Any) -> list[dict]:
    """Every row in a batch of its own, with its own place in the global batch."""
    places = [{"rows": torch.tensor([i]), "n_rows": len(rows)} if keys["placed"] else {} for i in range(len(rows))]
    return [
        collator.corrupt(collator([row]), seed=keys["seed"], step=keys["step"], **place)
        for row, place in zip(rows, places, strict=True)
    ]


@both_conventions
@pytest.mark.parametrize("placed", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_one_batch_of_8_and_eight_of_1_get_the_same_noise(right_shift: bool, placed: bool, schedule: str) -> None:
    collator = collator_with(right_shift_logits=right_shift, noise_schedule=schedule, eos_tail=4, random_canvas=0.3)
    rows = ragged_batch()
    place = {"rows": torch.arange(8), "n_rows": 8} if placed else {}
    together = collator.corrupt(collator(rows), seed=5, step=3, **place)
    for i, alone in enumerate(corrupted_one_by_one(collator, rows, seed=5, step=3, placed=placed)):
        for key in ("input_ids", "targets"):
            assert unpadded(together, i, key) == unpadded(alone, 0, key)
        scored = alone["targets"][0] != IGNORE_INDEX
        assert torch.equal(together["weights"][i][: len(scored)][scored], alone["weights"][0][scored])
        assert together["times"][i, 0] == alone["times"][0, 0]


@few
@given(order=st.permutations(range(8)), left=st.integers(0, 5), right=st.integers(0, 5))
def test_evaluation_noise_follows_the_content(order: list[int], left: int, right: int) -> None:
    """Neither the place in the batch nor the padding on either side changes it."""
    collator = collator_with(right_shift_logits=False)
    batch = collator(ragged_batch())
    noisy = collator.corrupt(batch, seed=0, step=0)
    fill = {"input_ids": PAD, "labels": IGNORE_INDEX, "attention_mask": 0}
    moved = {key: torch.nn.functional.pad(batch[key][order], (left, right), value=fill[key]) for key in fill}
    noisy_moved = collator.corrupt(moved, seed=0, step=0)
    for place, i in enumerate(order):
        assert unpadded(noisy_moved, place) == unpadded(noisy, i)
        assert noisy_moved["times"][place, 0] == noisy["times"][i, 0]


def test_noise_is_repeatable_and_changes_with_step_seed_and_place() -> None:
    collator = collator_with()
    batch = collator([{"input_ids": list(range(10, 60))}] * 4)

    def draw(seed: int = 0, step: int = 0, first: int = 0) -> torch.Tensor:
        rows = torch.arange(first, first + 4)
        return collator.corrupt(batch, seed=seed, step=step, rows=rows, n_rows=8)["inputs"]["input_ids"]

    assert torch.equal(draw(), draw())
    for other in (draw(seed=1), draw(step=1), draw(first=4)):
        assert not torch.equal(draw(), other)
    assert len({tuple(row) for row in draw().tolist()}) == 4  # equal rows get noise of their own
    evaluation = collator.corrupt(batch, seed=0, step=0)["inputs"]["input_ids"]
    assert (evaluation == evaluation[0]).all()
    assert not torch.equal(evaluation, collator.corrupt(batch, seed=1, step=0)["inputs"]["input_ids"])


@pytest.mark.parametrize("low, high", [(0.1, 0.95), (0.0, 0.5), (0.6, 1.0), (0.3, 0.3)])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_mask_probability_stays_in_its_range(low: float, high: float, schedule: str) -> None:
    collator = collator_with(
        min_mask_probability=low, max_mask_probability=high, noise_schedule=schedule, right_shift_logits=False
    )
    n, length = 64, 400
    batch = collator([{"input_ids": [4] * length}] * n)
    noisy = collator.corrupt(batch, seed=0, step=0, rows=torch.arange(n), n_rows=n)
    probability = 1 / noisy["weights"][:, 0]
    assert low - 1e-6 <= probability.min() and probability.max() <= high + 1e-6
    # It spans the range, and the masks are drawn with it.
    assert (
        probability.min() < low + 0.05 * (high - low) + 1e-6 and probability.max() > high - 0.05 * (high - low) - 1e-6
    )
    rate = (noisy["inputs"]["input_ids"] == MASK).float().mean(-1)
    assert (
        (rate - probability).abs() <= 4.5 * (probability * (1 - probability) / length).clamp(min=0) ** 0.5 + 1e-6
    ).all()


def seen_to_the_right(noisy: dict, row: int, place: int, length: int, right_shift: bool) -> bool:
    """From the model's own inputs and mask: does the hidden state see a token of the text behind the one it predicts?"""
    allowed = noisy["inputs"]["attention_mask"][row, 0, place] == 0
    token = int(noisy["tokens"][row, place])
    width = len(allowed)
    for key in range(width):
        text = int(noisy["inputs"]["position_ids"][row, key])
        if allowed[key] and text > token and noisy["inputs"]["input_ids"][row, key] != MASK:
            return True
    return False


@both_conventions
@pytest.mark.parametrize("clean_context", ["causal", "block"])
def test_the_teacher_speaks_where_nothing_to_the_right_is_seen(right_shift: bool, clean_context: str) -> None:
    collator = collator_with(
        right_shift_logits=right_shift, attention="block", block_length=4, clean_context=clean_context, eos_tail=0
    )
    batch = collator(ragged_batch(6))
    noisy = collator.corrupt(batch, seed=0, step=0, rows=torch.arange(6), n_rows=6)
    places = (noisy["targets"] != IGNORE_INDEX).nonzero().tolist()
    found = set()
    for row, place in places:
        token, answer = int(noisy["tokens"][row, place]), batch["input_ids"][row].tolist()
        assert answer[token] == noisy["targets"][row, place]
        want = EOS not in answer[:token] and not seen_to_the_right(noisy, row, place, len(answer), right_shift)
        assert bool(noisy["teacher_mask"][row, place]) == want
        found.add(want)
    assert found == {True, False}


def test_the_teacher_of_a_whole_canvas_speaks_behind_its_last_visible_token() -> None:
    """Two answers in one row: what follows an end token is tail, the next answer is text again."""
    ids = [9, 10, 11, 12, EOS, EOS, 20, 21, 22, EOS]
    labels = [IGNORE_INDEX, 10, 11, 12, EOS, EOS, IGNORE_INDEX, 21, 22, EOS]
    batch = {"input_ids": torch.tensor([ids]), "labels": torch.tensor([labels]), "attention_mask": torch.ones(1, 10)}
    batch["attention_mask"] = batch["attention_mask"].long()
    for targets in ("causal", "all"):
        collator = collator_with(right_shift_logits=False, distillation_targets=targets)
        for step in range(20):
            noisy = collator.corrupt(batch, seed=0, step=step, rows=torch.arange(1), n_rows=1)
            masked = noisy["masked"][0]
            last = max(i for i in range(10) if not masked[i])
            want = [i for i in (1, 2, 3, 4, 7, 8, 9) if masked[i] and (targets == "all" or i > last)]
            assert (noisy["teacher_mask"][0] & masked).nonzero().flatten().tolist() == want


@pytest.mark.parametrize("attention", ["bidirectional", "block"])
def test_replacements_change_what_is_seen_and_not_what_is_asked(attention: str) -> None:
    length = None if attention == "bidirectional" else 4
    options = {"attention": attention, "block_length": length, "vocab_size": 50, "eos_tail": 0}
    plain, noisy = (collator_with(**options, random_replacement=share) for share in (0.0, 0.5))
    batch = plain(many_answers(200))
    key = {"seed": 0, "step": 3, "rows": torch.arange(200), "n_rows": 200}
    one, other = plain.corrupt(batch, **key), noisy.corrupt(batch, **key)
    for name in ("targets", "weights", "masked", "levels", "teacher_mask"):
        assert torch.equal(one[name], other[name])
    before, after = one["inputs"]["input_ids"], other["inputs"]["input_ids"]
    assert torch.equal(before == MASK, after == MASK)  # a replacement is never the mask token
    position = one["inputs"].get("position_ids", torch.arange(before.shape[1]).expand_as(before))
    trained = (before != MASK) & (position >= 3)  # three tokens of prompt
    assert torch.equal(before[~trained], after[~trained])
    share = (before != after)[trained].float().mean().item()
    assert 0.4 < share < 0.55 and after[before != after].max() < 50
    fixed = {"seed": 0, "step": 0}
    assert torch.equal(
        plain.corrupt(batch, **fixed)["inputs"]["input_ids"], noisy.corrupt(batch, **fixed)["inputs"]["input_ids"]
    )


@few
@given(prompt=tokens, answer=tokens, size=st.integers(1, 20))
def test_a_sized_canvas_says_nothing_of_the_answer(prompt: list[int], answer: list[int], size: int) -> None:
    """`max_canvas` tokens stand behind the prompt, whatever the answer is: cut, or filled up with end tokens."""
    row = answer_row(prompt, answer + [EOS])
    batch = collator_with(max_canvas=size)([row])
    assert unpadded(batch, 0) == prompt + (answer + [EOS] * size)[:size]
    assert (batch["labels"] != IGNORE_INDEX).sum() == size


def test_random_canvases_have_every_length() -> None:
    batch = collator_with(max_canvas=12, random_canvas=1.0)(many_answers(1200))
    lengths = batch["attention_mask"].sum(-1) - 3
    counts = torch.bincount(lengths, minlength=13)[1:]
    assert counts.sum() == 1200 and counts.min() > 60 and counts.max() < 140


def test_texts_get_tails_when_asked_and_truncated_ones_none() -> None:
    rows = [{"input_ids": [5, 6, 7, EOS]}, {"input_ids": [5, 6, 7, 8, 9]}]
    assert unpadded(collator_with(max_canvas=8)(rows), 0) == [5, 6, 7, EOS]
    batch = collator_with(max_canvas=8, text_tails=True)(rows)
    assert unpadded(batch, 0) == [5, 6, 7] + [EOS] * 5 and unpadded(batch, 1) == [5, 6, 7, 8, 9]
    own = collator_with(max_canvas=8, text_tails=True, tail_token_id=PAD)(rows)
    assert unpadded(own, 0) == [5, 6, 7, EOS] + [PAD] * 4


def padded_texts(**options: Any) -> tuple[DataCollatorForMaskedDiffusion, dict, torch.Tensor]:
    """400 texts of 6 tokens and their tails of 6; which tokens are tail."""
    collator = collator_with(max_canvas=12, **options)
    batch = collator(many_answers(400))
    place = torch.arange(batch["input_ids"].shape[1])
    return collator, batch, (place >= 9).expand_as(batch["labels"])


def test_text_and_tail_have_mask_rates_of_their_own() -> None:
    """Each token is weighed by the inverse of its own rate; the tail's grows with the optimiser steps, and not in evaluation."""
    collator, batch, tail = padded_texts(pad_mask_ratio=0.5, pad_annealing_steps=10, right_shift_logits=False)
    text = (batch["labels"] != IGNORE_INDEX) & ~tail
    rates = []
    for step in (0, 5, 10, 50):
        noisy = collator.corrupt(batch, seed=0, step=step, rows=torch.arange(400), n_rows=400)
        ratio = 0.5 * min(1.0, step / 10)
        rates.append(noisy["masked"][tail].float().mean().item())
        assert noisy["masked"][text].float().mean().item() == pytest.approx(0.5, abs=0.02)
        assert rates[-1] == pytest.approx(0.5 * ratio, abs=0.03)
        times = noisy["times"]
        torch.testing.assert_close(noisy["weights"][text], 1 / times[text])
        masked = tail & noisy["masked"]
        torch.testing.assert_close(noisy["weights"][masked], 1 / (ratio * times[masked]))
        assert torch.equal(noisy["weights"] * noisy["masked"] > 0, noisy["masked"])
    assert rates[0] == 0
    fixed = collator.corrupt(batch, seed=0, step=0)
    assert fixed["masked"][tail].float().mean().item() == pytest.approx(0.5, abs=0.05)


def test_the_tails_weight_is_of_training_alone() -> None:
    (light, batch, tail), (plain, _, _) = padded_texts(eos_tail_weight=0.25), padded_texts()
    keys = {"seed": 0, "step": 3, "rows": torch.arange(400), "n_rows": 400}
    got, want = light.corrupt(batch, **keys)["weights"], plain.corrupt(batch, **keys)["weights"]
    factor = torch.where(tail, 0.25, 1.0).roll(-1, -1)  # weights stand where a token is read from
    torch.testing.assert_close(got, want * factor)
    assert torch.equal(light.corrupt(batch, seed=0, step=0)["weights"], plain.corrupt(batch, seed=0, step=0)["weights"])


@both_conventions
def test_first_steps_hide_the_whole_canvas_beside_the_bound(right_shift: bool) -> None:
    collator, batch, tail = padded_texts(first_step_share=0.3, right_shift_logits=right_shift)
    keys = {"seed": 0, "step": 3, "rows": torch.arange(400), "n_rows": 400}
    noisy = collator.corrupt(batch, **keys)
    plain = padded_texts(right_shift_logits=right_shift)[0].corrupt(batch, **keys)
    first = noisy["first_step"]
    assert 80 < first.sum() < 160
    maskable = batch["labels"] != IGNORE_INDEX
    assert torch.equal(noisy["masked"][first], maskable[first])
    for name in ("masked", "weights", "targets"):
        assert torch.equal(noisy[name][~first], plain[name][~first])
    assert (noisy["weights"][first] == 0).all() and (noisy["extra_weights"][~first] == 0).all()
    asked = noisy["targets"] != IGNORE_INDEX
    assert torch.equal(noisy["extra_weights"][first], asked[first].float())
    assert not collator.corrupt(batch, seed=0, step=0)["first_step"].any()


def test_first_steps_of_a_text_without_a_prompt_show_its_start() -> None:
    collator = collator_with(first_step_share=1.0, text_tails=True, max_canvas=12)
    generator = torch.Generator().manual_seed(0)
    rows = [{"input_ids": torch.randint(4, 1000, (8,), generator=generator).tolist() + [EOS]} for _ in range(600)]
    batch = collator(rows)
    masked = collator.corrupt(batch, seed=0, step=1, rows=torch.arange(600), n_rows=600)["masked"]
    shown = (~masked).sum(-1)
    assert (masked.long().diff(dim=-1) >= 0).all()  # seen, then hidden to the end
    assert shown.min() == 1 and shown.unique().numel() == 12  # the first token has nothing to be read from
