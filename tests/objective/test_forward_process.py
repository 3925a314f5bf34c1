"""Segments of rows, against loops over their tokens."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llm_diffusion.objective.attention_masks import segments
from llm_diffusion.objective.forward_process import ForwardProcess, NoiseSettings, behind_first, nothing_shown_behind
from llm_diffusion.objective.losses import WEIGHTS
from llm_diffusion.objective.modes import Bidirectional, Lossless
from llm_diffusion.objective.noise import NOISE_SCHEDULES, stratified_times

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
