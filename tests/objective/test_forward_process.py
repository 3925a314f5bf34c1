"""The forward process: segments, rates, weights and additions, against loops over tokens and against what they must come to."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_diffusion import UserError
from llm_diffusion.objective.attention_masks import segments
from llm_diffusion.objective.forward_process import (
    ForwardProcess,
    NoiseSettings,
    behind_first,
    check_noise,
    nothing_shown_behind,
)
from llm_diffusion.objective.losses import WEIGHTS
from llm_diffusion.objective.modes import IGNORE_INDEX, Bidirectional, Block, Lossless
from llm_diffusion.objective.noise import MIN_TIME, NOISE_SCHEDULES, content_keys, stratified_times, uniform

few = settings(max_examples=40, deadline=None, derandomize=True)
documents = st.lists(st.integers(1, 6), min_size=1, max_size=4)


def row_of(lengths: list[int], padding: int) -> torch.Tensor:
    return torch.tensor([[number for number, n in enumerate(lengths, 1) for _ in range(n)] + [0] * padding])


@few
@given(lengths=documents, padding=st.integers(0, 3), block=st.integers(1, 4))
def test_segments_are_blocks_of_every_text(lengths: list[int], padding: int, block: int) -> None:
    row, want, number = row_of(lengths, padding), [], -1
    for n in lengths:
        for place in range(n):
            number += place % block == 0
            want.append(number)
    ids = segments(row, block)
    assert ids[0].tolist() == want + [number] * padding
    assert segments(row, None)[0].tolist() == [max(n - 1, 0) for n in row[0].tolist()]


@few
@given(lengths=documents, marks=st.integers(0, 2**24))
@example(lengths=[3, 2], marks=0)
def test_what_stands_before_and_behind_in_the_same_segment(lengths: list[int], marks: int) -> None:
    ids = segments(row_of(lengths, 0), None)
    n = ids.shape[1]
    marked = torch.tensor([[bool(marks >> i & 1) for i in range(n)]])
    same = ids[0][:, None] == ids[0]
    index = torch.arange(n)
    behind = [not any(marked[0, j] and same[i, j] and j >= i for j in range(n)) for i in range(n)]
    before = [any(marked[0, j] and same[i, j] and j < i for j in range(n)) for i in range(n)]
    assert nothing_shown_behind(marked, ids)[0].tolist() == behind
    # A segment without a mark has nothing to stand behind.
    assert behind_first(marked, ids)[0].tolist() == before, index


def test_weights_of_a_draft_fall_with_the_place_in_its_block():
    batch = {"input_ids": torch.arange(5, 45)[None].repeat(3, 1), "attention_mask": torch.ones(3, 40, dtype=torch.long)}
    batch["labels"] = batch["input_ids"].masked_fill(torch.arange(40) < 9, -100)
    process = ForwardProcess(Lossless(block_length=8), 63, NoiseSettings(full_mask_share=1.0, draft_decay=0.5))
    found = process.corrupt(batch, seed=0, step=0, rows=torch.arange(3), n_rows=3)
    for row in range(3):
        at = found["targets"][row] != -100
        tokens, weights = found["tokens"][row][at].tolist(), found["weights"][row][at].tolist()
        places = {token % 8 for token in tokens}
        assert len(places) == 7  # the block's first token is never drafted
        (first,) = set(range(8)) - places
        assert weights == [0.5 ** ((token - first) % 8 - 1) for token in tokens]


@pytest.mark.parametrize("schedule", NOISE_SCHEDULES)
@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("length", [1, 2, 1000])
def test_weights_are_finite_at_every_time_and_length(schedule: str, kind: str, length: int) -> None:
    """`n_rows` this large takes the times to their ends, 0.001 and 1; what is masked weighs something."""
    process = ForwardProcess(Bidirectional(right_shift_logits=False), 1, NoiseSettings(loss_weight=kind), schedule)
    ids = torch.full((8, length), 5)
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    order = torch.arange(10_000)
    times = stratified_times(0, 0, order, 10_000)
    ends = torch.cat([times.argsort()[:4], times.argsort()[-4:]])
    noisy = process.corrupt(batch, seed=0, step=0, rows=ends, n_rows=10_000)
    assert noisy["times"].min() < 0.0015 and noisy["times"].max() > 0.999
    assert noisy["weights"].isfinite().all() and noisy["extra_weights"].isfinite().all()
    assert (noisy["weights"] >= 0).all() and not noisy["weights"][noisy["masked"]].isnan().any()


# -- the steps one by one; state i predicts token i, so that every output is in the order of the tokens

MASK, END, N = 63, 3, 64
WHOLE = Bidirectional(right_shift_logits=False)


def rows_of(n: int = N, length: int = 12, prompt: int = 0, tail: int = 0) -> dict[str, torch.Tensor]:
    """Rows of different words between 10 and 60; `prompt` tokens are not trained, and behind the end token `tail` more of it stand."""
    ids = 10 + (torch.arange(n)[:, None] * 7 + torch.arange(length) * 11) % 50
    if tail:
        ids[:, -tail - 1 :] = END
    labels = ids.masked_fill(torch.arange(length) < prompt, IGNORE_INDEX)
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def corrupted(batch: dict, mode: Bidirectional = WHOLE, step: int = 0, training: bool = True, **options: Any) -> dict:
    """Options of the noise, of the process and of `corrupt` alike."""
    of_corrupt = {name: options.pop(name) for name in ("complement", "block_length") if name in options}
    of_process = {name: options.pop(name) for name in ("vocab_size", "packing", "time_embedding") if name in options}
    process = ForwardProcess(mode, MASK, NoiseSettings(**options), end_token_ids=(END,), **of_process)
    n = len(batch["input_ids"])
    keys = {"rows": torch.arange(n), "n_rows": n} if training else {}
    return process.corrupt(batch, seed=0, step=step, **keys, **of_corrupt)


def test_times_of_training_are_strata_and_of_evaluation_of_the_content() -> None:
    batch = rows_of()
    times = corrupted(batch)["times"]
    assert (times == times[:, :1]).all()
    assert sorted(((times[:, 0] - MIN_TIME) / (1 - MIN_TIME) * N).long().tolist()) == list(range(N))
    times = corrupted(batch, training=False)["times"][:, 0]
    draws = uniform(0, 0, content_keys(batch["input_ids"], batch["attention_mask"]), 1)
    torch.testing.assert_close(times, 0.001 + 0.999 * draws, atol=1e-6, rtol=0)


def test_a_range_of_rates_is_crossed_evenly() -> None:
    found = corrupted(rows_of(), min_mask_probability=0.2, max_mask_probability=0.6)
    torch.testing.assert_close(found["levels"], 0.2 + 0.4 * found["times"])
    torch.testing.assert_close(found["weights"], 1 / found["levels"])
    # A full range is no range: the weight is the schedule's own, here zero where all is masked.
    found = corrupted(rows_of(2048), noise_schedule="cosine")
    assert (found["weights"] * found["levels"]).min() < 0.01
    for low, high in ((0.2, 1.0), (0.0, 0.6)):
        found = corrupted(rows_of(), noise_schedule="cosine", min_mask_probability=low, max_mask_probability=high)
        torch.testing.assert_close(found["weights"], 1 / found["levels"])
        assert low <= found["levels"].min() and found["levels"].max() <= high


def test_the_models_schedule_is_taken_where_the_settings_name_none() -> None:
    own = ForwardProcess(WHOLE, MASK, noise_schedule="cosine")
    found = own.corrupt(rows_of(), seed=0, step=0, rows=torch.arange(N), n_rows=N)
    torch.testing.assert_close(found["levels"], torch.cos(torch.pi / 2 * (1 - found["times"])))
    assert torch.equal(found["levels"], corrupted(rows_of(), noise_schedule="cosine")["levels"])


@pytest.mark.parametrize(("step", "grown"), [(0, 0.0), (5, 0.5), (10, 1.0), (40, 1.0)])
@pytest.mark.parametrize("steps", [10, None])
def test_tails_have_a_rate_and_a_weight_of_their_own(step: int, grown: float, steps: int | None) -> None:
    batch, tail = rows_of(tail=3), torch.arange(12) >= 9
    options = {"pad_mask_ratio": 0.5, "pad_annealing_steps": steps, "eos_tail_weight": 0.25}
    found = corrupted(batch, step=step, **options)
    ratio = 0.5 if steps is None else 0.5 * grown
    torch.testing.assert_close(found["levels"], torch.where(tail, ratio, 1.0) * found["times"])
    if ratio:
        # Unbiased: every token's rate times its weight is one, or the tail's share.
        share = found["levels"] * found["weights"]
        torch.testing.assert_close(share, torch.where(tail, 0.25, 1.0).expand_as(share))
    else:
        assert not found["masked"][:, tail].any() and found["weights"].isfinite().all()
    found = corrupted(batch, step=step, training=False, **options)  # evaluation knows no tails
    torch.testing.assert_close(found["levels"], found["times"])
    torch.testing.assert_close(found["weights"], 1 / found["times"])


@few
@given(st.data())
def test_a_tail_is_every_end_token_behind_another_one(data: st.DataObject) -> None:
    flags = st.lists(st.booleans(), min_size=8, max_size=8)
    ends, trained = data.draw(flags), data.draw(flags)
    lengths = data.draw(st.integers(1, 8))
    ids = torch.tensor([[END if end else 10 + i for i, end in enumerate(ends)]])
    real = torch.arange(8)[None] < lengths
    labels = ids.masked_fill(~torch.tensor([trained]), IGNORE_INDEX)
    found = corrupted({"input_ids": ids, "labels": labels, "attention_mask": real.long()}, pad_mask_ratio=0.5)
    for i in range(lengths):
        both = all(ends[j] and trained[j] and j < lengths for j in (i - 1, i)) if i else False
        assert found["levels"][0, i] == pytest.approx(found["times"][0, i].item() * (0.5 if both else 1.0))
        # The tail was never text to a teacher.
        assert not (both and found["teacher_mask"][0, i])


def test_complements_mask_the_rest_at_the_other_rate() -> None:
    batch = rows_of(prompt=4)
    first, second = corrupted(batch), corrupted(batch, complement=True)
    assert torch.equal(second["masked"], ~first["masked"] & (batch["labels"] != IGNORE_INDEX))
    torch.testing.assert_close(second["levels"], 1 - first["levels"])
    torch.testing.assert_close(second["weights"], 1 / (1 - first["levels"]))
    # At a time of one nothing is left to mask, and what would weigh infinitely weighs something finite.
    ends = stratified_times(0, 0, torch.arange(2**17), 2**17).argsort()[-2:]
    process = ForwardProcess(WHOLE, MASK, NoiseSettings())
    last = process.corrupt(rows_of(2), seed=0, step=0, rows=ends, n_rows=2**17, complement=True)
    assert last["times"].max() > 1 - 1e-4 and last["weights"].isfinite().all() and last["weights"].max() <= 1e6


def test_exact_counts_are_of_the_time_and_weigh_n_over_k() -> None:
    batch = rows_of(prompt=2)
    found = corrupted(batch, exact_mask_count=True)
    k = found["masked"].sum(-1, keepdim=True)
    assert torch.equal(k, (10 * (found["times"][:, :1] - MIN_TIME) / (1 - MIN_TIME)).ceil().long())
    torch.testing.assert_close(found["levels"], (k / 10).expand(-1, 12))
    torch.testing.assert_close(found["weights"], (10 / k).expand(-1, 12))


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("prompt", [0, 1, 5])
def test_first_steps_see_nothing_of_an_answer(share: float, prompt: int) -> None:
    """Of a text without a prompt, where only the first token may be untrained, nothing behind a uniform place."""
    n, length = 2000, 10
    batch = rows_of(n, length, prompt, tail=2)
    maskable = batch["labels"] != IGNORE_INDEX
    found, plain = corrupted(batch, first_step_share=share, eos_tail_weight=0.5), corrupted(batch, eos_tail_weight=0.5)
    first = found["first_step"]
    assert abs(first.float().mean() - share) <= 4 * (share * (1 - share) / n) ** 0.5
    for name in ("masked", "weights", "levels"):
        assert torch.equal(found[name][~first], plain[name][~first])
    assert (found["extra_weights"][~first] == 0).all()
    if first.any():
        masked = found["masked"][first]
        assert (found["weights"][first] == 0).all() and (found["levels"][first] == 1).all()
        weight = torch.where(torch.arange(length) >= length - 2, 0.5, 1.0)
        torch.testing.assert_close(found["extra_weights"][first], masked * weight)
        if prompt > 1:
            assert torch.equal(masked, maskable[first])
        else:
            assert (masked[:, prompt:].int().diff(dim=-1) >= 0).all() and not masked[:, :prompt].any()
            # A cut in (i - 1, i] shows i tokens: each number as likely.
            shown = (length - masked.sum(-1)).bincount(minlength=length + 1)
            assert shown[0] == 0
            assert (shown[1:] / len(masked) - 1 / length).abs().max() < 4 * (1 / length / len(masked)) ** 0.5
    assert not corrupted(batch, training=False, first_step_share=1.0)["first_step"].any()


def test_replacements_are_any_word_but_the_mask() -> None:
    """Only where a trained token is seen; every word as often as the others."""
    batch = rows_of(4000, prompt=3)
    found = corrupted(batch, vocab_size=66, random_replacement=0.4)
    plain = corrupted(batch)
    for name in ("masked", "targets", "weights", "levels"):
        assert torch.equal(found[name], plain[name])
    ids, seen = batch["input_ids"], found["inputs"]["input_ids"]
    at = (batch["labels"] != IGNORE_INDEX) & ~found["masked"]
    assert torch.equal(seen[~at], plain["inputs"]["input_ids"][~at])
    changed = seen[at] != ids[at]
    n, chance = int(at.sum()), 0.4 * 64 / 65
    assert abs(changed.float().mean() - chance) < 4 * (chance * (1 - chance) / n) ** 0.5
    counts = seen[at][changed].bincount(minlength=66)
    assert len(counts) == 66 and counts[MASK] == 0
    even = counts.sum() / 65
    assert (counts[torch.arange(66) != MASK] - even).abs().max() < 4.5 * even**0.5
    evaluated = corrupted(batch, training=False, vocab_size=66, random_replacement=0.4)["inputs"]["input_ids"]
    assert set((evaluated[evaluated != ids]).tolist()) == {MASK}


DRAFTS = Lossless(block_length=4, clean_context="causal")


def drafts(n: int, prompt: int, **options: Any) -> tuple[dict[str, torch.Tensor], list[dict[int, tuple[bool, float]]]]:
    """The batch and, for every row, the tokens that the noisy half holds: column -> (stands as a mask, noise level)."""
    batch = rows_of(n, 16, prompt)
    found, held = corrupted(batch, DRAFTS, **options), []
    ids = found["inputs"]["input_ids"]
    width = ids.shape[1] - 16  # of the noisy half
    levels = found["levels"]
    for r in range(n):
        held.append(
            {16 - width + c: (ids[r, c].item() == MASK, levels[r, c - 1].item() if c else -1.0) for c in range(width)}
        )
    return {**batch, **found}, held


def test_drafts_start_anywhere_and_are_masked_whole() -> None:
    found, held = drafts(400, 0, full_mask_share=1.0)
    starts, known, blocks = Counter(), 0, 0
    for row in held:
        shown = [column for column, (hidden, _) in row.items() if not hidden]
        # Only first tokens of blocks are shown: all in one place of the block.
        places = {column % 4 for column in shown if column}
        assert len(places) <= 1
        starts.update(places)
        known += len([column for column in shown if column >= 4])
        blocks += 3
    assert set(starts) == {0, 1, 2, 3} and min(starts.values()) > 60
    assert abs(known / blocks - 0.5) < 4 * 0.5 / blocks**0.5
    assert all(level == 1.0 for row in held for column, (_, level) in row.items() if column > 1 and column % 4 == 2)


def test_a_share_of_drafts_is_masked_as_in_diffusion() -> None:
    """A block of the share has three masks or four; of the others, at a rate between 0 and 1, few do."""
    masked = {}
    for share in (0.0, 0.6, 1.0):
        found, held = drafts(300, 0, full_mask_share=share)
        masked[share] = sum(level == 1.0 for row in held for _, level in row.values()) / sum(
            len(row) - 1 for row in held
        )
    assert masked[0.0] == 0.0 and masked[1.0] == 1.0
    assert masked[0.6] == pytest.approx(0.6, abs=0.05)


def test_a_draft_hides_what_follows_its_first_trained_token() -> None:
    """Words that are not trained, such as the next question, are not seen from a block that has begun to answer."""
    n, length = 60, 16
    batch = rows_of(n, length)
    trained = torch.tensor([i in (2, 3, 4, 9, 10) for i in range(length)])
    batch["labels"] = batch["input_ids"].masked_fill(~trained, IGNORE_INDEX)
    batch["attention_mask"][:, 14:] = 0
    found = corrupted(batch, DRAFTS, full_mask_share=1.0)
    ids = found["inputs"]["input_ids"]
    width = ids.shape[1] - length
    seen_before = hidden_behind = 0
    for r in range(n):
        tokens = set(found["tokens"][r][found["targets"][r] != IGNORE_INDEX].tolist())
        missing = {2, 3, 4, 9, 10} - tokens  # first tokens of blocks
        firsts = {column % 4 for column in missing}
        if len(firsts) != 1:
            continue
        first = firsts.pop()
        for c in range(width):
            column = length - width + c
            if trained[column]:
                continue
            start = column - (column - first) % 4
            behind = any(trained[j] for j in range(max(start, 0), column)) and column < 14
            assert (ids[r, c] == MASK) == behind
            hidden_behind += behind
            seen_before += not behind
    assert hidden_behind > 20 and seen_before > 20


def test_the_teacher_knows_what_nothing_is_seen_behind() -> None:
    """By the ids that the model sees, of whole texts and of the noisy half of blocks."""
    batch = rows_of(40, 12, prompt=3)
    batch["attention_mask"][20:, 9:] = 0
    for mode in (WHOLE, Block(block_length=4, clean_context="causal", right_shift_logits=False)):
        found, every = (corrupted(batch, mode, distillation_targets=kind) for kind in ("causal", "all"))
        start = 24 - found["inputs"]["input_ids"].shape[1] if mode.has_blocks else 0
        maskable = (batch["labels"] != IGNORE_INDEX) & (batch["attention_mask"] > 0)
        for r in range(40):
            length = 9 if r >= 20 else 12
            for i in range(start, length):
                end = min(length, i - i % 4 + 4) if mode.has_blocks else length
                seen = any(not found["masked"][r, j] for j in range(i, end))
                assert found["teacher_mask"][r, i - start] == (bool(maskable[r, i]) and not seen)
                assert every["teacher_mask"][r, i - start] == maskable[r, i]


def test_given_noise_is_laid_out_as_drawn_noise_is() -> None:
    batch = rows_of(8, prompt=3)
    process = ForwardProcess(WHOLE, MASK, NoiseSettings(distillation_targets="all"))
    drawn = process.corrupt(batch, seed=0, step=0, rows=torch.arange(8), n_rows=8)
    given = process.lay_out(batch, drawn["masked"], drawn["weights"], drawn["levels"])
    for name in set(given) - {"inputs"}:
        assert torch.equal(given[name], drawn[name]), name
    assert given["inputs"].keys() == drawn["inputs"].keys()
    for name, value in given["inputs"].items():
        assert torch.equal(value, drawn["inputs"][name]), name


def test_what_the_model_is_told_beside_the_ids() -> None:
    batch = rows_of(8)
    plain = corrupted(batch)
    assert list(plain["inputs"]) == ["input_ids", "attention_mask"]
    told = corrupted(batch, time_embedding=True)["inputs"]
    assert torch.equal(told["timesteps"], plain["levels"])
    assert "position_ids" in corrupted(batch, packing=True)["inputs"]


def test_blocks_may_be_shorter_while_they_grow() -> None:
    batch, mode = rows_of(8), Block(block_length=4, clean_context="causal", right_shift_logits=False)
    short = corrupted(batch, mode, block_length=2)
    want = corrupted(batch, Block(block_length=2, clean_context="causal", right_shift_logits=False))
    assert torch.equal(short["times"], want["times"])
    assert torch.equal(short["inputs"]["attention_mask"], want["inputs"]["attention_mask"])
    assert not torch.equal(corrupted(batch, mode)["times"], short["times"])


def test_bad_keys_and_ranges_are_named() -> None:
    batch, process = rows_of(4), ForwardProcess(WHOLE, MASK)
    rows = torch.arange(4)
    process.corrupt(batch, seed=0, step=0, rows=rows, n_rows=4)
    process.corrupt(batch, seed=0, step=0)
    for seed, keys, named in [
        (-1, {}, "seed"),
        (1.5, {}, "seed"),
        (0, {"rows": rows}, "rows"),
        (0, {"rows": rows[:3], "n_rows": 4}, "rows"),
        (0, {"rows": rows[:, None], "n_rows": 4}, "rows"),
    ]:
        with pytest.raises(UserError, match=f"`{named}`"):
            process.corrupt(batch, seed=seed, step=0, **keys)
    check_noise(NoiseSettings(min_mask_probability=0.5, max_mask_probability=0.5))
    with pytest.raises(UserError, match="`min_mask_probability`"):
        check_noise(NoiseSettings(min_mask_probability=0.6, max_mask_probability=0.5))
    with pytest.raises(UserError, match="`eos_tail`"):
        check_noise(NoiseSettings(eos_tail=-1))
