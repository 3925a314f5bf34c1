"""Attention masks against rules written out position by position."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_diffusion.objective.attention_masks import (
    additive,
    annealed,
    bidirectional,
    block_causal,
    block_decoding,
    block_diffusion,
    column_index,
    positions,
    segments,
    symmetric,
)


def padded(lengths, left):
    width = max(lengths)
    rows = [[0] * (width - n) + [1] * n if left else [1] * n + [0] * (width - n) for n in lengths]
    return torch.tensor(rows)


def each_pair(mask, rule):
    """(B, L, L) bool by calling `rule(i, j)` with places in the text; padding is seen by nobody."""
    allowed = torch.zeros(*mask.shape, mask.shape[1], dtype=torch.bool)
    for row in range(len(mask)):
        columns = mask[row].nonzero().flatten().tolist()
        for i, q in enumerate(columns):
            for j, k in enumerate(columns):
                allowed[row, q, k] = rule(row, i, j)
    return allowed


def only_real(allowed, mask):
    """Rows of padding queries do not matter."""
    return allowed & mask[:, :, None].bool()


@pytest.mark.parametrize("left", [True, False])
@pytest.mark.parametrize("b", [1, 2, 3, 16])
def test_block_causal(left, b):
    mask = padded([7, 4], left)
    expected = each_pair(mask, lambda row, i, j: j // b <= i // b)
    assert torch.equal(only_real(block_causal(mask, b), mask), expected)


@pytest.mark.parametrize("clean", ["causal", "block"])
@pytest.mark.parametrize("b", [1, 2, 4])
def test_block_diffusion(clean, b):
    mask = padded([8, 5], left=False)
    length = mask.shape[1]
    found = block_diffusion(mask, b, clean)
    assert found.shape == (2, 2 * length, 2 * length)
    noisy_noisy = each_pair(mask, lambda row, i, j: i // b == j // b)
    noisy_clean = each_pair(mask, lambda row, i, j: j // b < i // b)
    clean_clean = each_pair(mask, lambda row, i, j: j <= i if clean == "causal" else j // b <= i // b)
    assert torch.equal(only_real(found[:, :length, :length], mask), noisy_noisy)
    assert torch.equal(only_real(found[:, :length, length:], mask), noisy_clean)
    assert torch.equal(only_real(found[:, length:, length:], mask), clean_clean)
    assert not found[:, length:, :length].any()  # clean text never sees noise


@pytest.mark.parametrize("clean", ["causal", "block"])
@pytest.mark.parametrize("left", [True, False])
def test_block_decoding(clean, left):
    mask, b, active = padded([9, 6], left), 3, [2, 0]

    def rule(row, i, j):
        if i // b == active[row]:
            return j // b <= i // b
        return j <= i if clean == "causal" else j // b <= i // b

    found = block_decoding(mask, b, clean, torch.tensor(active))
    assert torch.equal(only_real(found, mask), each_pair(mask, rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_additive_is_finite_and_in_the_models_dtype(dtype):
    allowed = torch.tensor([[[True, False], [False, False]]])
    bias = additive(allowed, dtype)
    assert bias.shape == (1, 1, 2, 2) and bias.dtype == dtype and bias.isfinite().all()
    assert bias[0, 0, 0, 0] == 0 and bias[0, 0, 0, 1] == torch.finfo(dtype).min
    assert bias[0, 0, 1].softmax(-1).isfinite().all()  # a row that sees nothing is no NaN


# -- several texts in a row


def packed(lengths, padding=2):
    numbers = [number for number, n in enumerate(lengths, start=1) for _ in range(n)]
    return torch.tensor([numbers + [0] * padding])


@pytest.mark.parametrize("lengths", [[5], [3, 4], [1, 2, 6, 1]])
def test_positions_are_counted_in_every_text(lengths):
    want = [i for n in lengths for i in range(n)]
    assert positions(packed(lengths))[0, : sum(lengths)].tolist() == want


def test_positions_of_a_plain_padding_mask_count_real_tokens():
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 1, 1, 0]])
    assert torch.equal(positions(mask)[mask.bool()], (mask.cumsum(-1) - 1)[mask.bool()])


@pytest.mark.parametrize("lengths", [[3, 4], [1, 2, 6, 1], [8]])
@pytest.mark.parametrize("b", [1, 2, 3])
def test_a_packed_mask_is_the_masks_of_its_texts_along_the_diagonal(lengths, b):
    documents = packed(lengths)
    single = [torch.ones(1, n, dtype=torch.long) for n in lengths]
    for make in (bidirectional, lambda d: block_causal(d, b)):
        want = torch.block_diag(*[make(text)[0].int() for text in single]).bool()
        n = sum(lengths)
        assert torch.equal(make(documents)[0, :n, :n], want)
        assert not make(documents)[0, :, n:].any()


@pytest.mark.parametrize("clean", ["causal", "block"])
def test_block_diffusion_of_a_packed_row(clean):
    lengths, b = [3, 4], 2
    documents, n = packed(lengths, padding=0), 7
    whole = block_diffusion(documents, b, clean)[0].view(2, n, 2, n)
    start = 0
    for length in lengths:
        text = block_diffusion(torch.ones(1, length, dtype=torch.long), b, clean)[0].view(2, length, 2, length)
        place = slice(start, start := start + length)
        assert torch.equal(whole[:, place, :, place], text)
        whole[:, place, :, place] = False
    assert not whole.any()


@pytest.mark.parametrize("additive_mask", [False, True])
@pytest.mark.parametrize("open_rows", [False, True])
@settings(max_examples=40)
@given(data=st.data())
def test_symmetric_masks(additive_mask, open_rows, data):
    """Against the rule written out: same text, and no padding key. Host code may let rows of padding look everywhere."""
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    left, right = data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))
    text = torch.tensor([0] * left + [i + 1 for i, n in enumerate(lengths) for _ in range(n)] + [0] * right)
    same = (text[:, None] == text) | (text[:, None] == 0)
    causal = same & (text > 0) & torch.ones(len(text), len(text), dtype=torch.bool).tril()
    if open_rows:
        causal[~causal.any(-1)] = True
    mask = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min) if additive_mask else causal
    got = symmetric(mask[None, None])[0, 0]
    got = got == 0 if additive_mask else got
    real = text > 0
    want = (text[:, None] == text) & real
    assert torch.equal(got[real], want[real])


def test_masks_that_are_not_causal_pass_unchanged():
    block = block_causal(torch.ones(1, 6, dtype=torch.long), 2)
    assert torch.equal(symmetric(block[:, None]), block[:, None])
    rectangle = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    assert symmetric(rectangle) is rectangle
    sloped = torch.arange(6.0).expand(6, 6).masked_fill(torch.ones(6, 6).triu(1).bool(), torch.finfo(torch.float32).min)
    with pytest.raises(ValueError, match="position biases"):
        symmetric(sloped[None, None])


def test_padding_on_the_left_is_before_the_text() -> None:
    assert positions(torch.tensor([[0, 0, 1, 1, 0]]))[0, :4].tolist() == [-1, -1, 0, 1]
    assert column_index(torch.tensor([[7, 7, 7], [7, 7, 7]])).tolist() == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("offset", [0, 1, 2, 3])
@pytest.mark.parametrize("lengths", [[5], [3, 4], [1, 2, 6, 1]])
def test_first_blocks_may_be_shortened(lengths: list[int], offset: int) -> None:
    """Segments, and the blocks of the training mask, of three tokens of which the first has `offset` less (or none)."""
    want, texts, number = [], [], 0
    for text, n in enumerate(lengths):
        numbers = [(place + offset) // 3 for place in range(n)]
        want += [number + value - numbers[0] for value in numbers]
        texts += [text] * n
        number = want[-1] + 1
    offsets = torch.tensor([[offset]])
    documents, n = packed(lengths, padding=0), sum(lengths)
    assert segments(documents, 3, offsets)[0].tolist() == want
    found = block_diffusion(documents, 3, "causal", offsets)[0]
    for q in range(n):
        for k in range(n):
            assert found[q, k] == (want[q] == want[k])
            assert found[q, n + k] == (want[k] < want[q] and texts[q] == texts[k])


def test_segments_of_padding_have_a_number_of_a_text() -> None:
    documents = torch.tensor([[0, 0, 1, 1, 2, 0]])
    assert segments(documents, 1)[0].tolist() == [0, 0, 0, 1, 2, 2]
    assert segments(documents, None)[0].tolist() == [0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_causal_ratios_are_shares(ratio: float) -> None:
    with pytest.raises(ValueError, match="causal_ratio"):
        annealed(torch.ones(1, 2, dtype=torch.long), ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_annealed_masks_written_out(dtype: torch.dtype, ratio: float) -> None:
    least = torch.finfo(dtype).min
    found = annealed(torch.tensor([[1, 1, 2, 0]]), ratio, dtype)
    future = {0.0: 0.0, 0.5: torch.tensor(0.5).log().to(dtype).item(), 1.0: least}[ratio]
    assert found.dtype == dtype
    assert found[0, 0, :3].tolist() == [[0, future, least, least], [0, 0, least, least], [least, least, 0, least]]


def test_rows_of_padding_stay_open_and_hide_nothing() -> None:
    """transformers lets padding on the left see everything; what it sees must not become visible to the text."""
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    causal[:, 0] = False
    causal[0] = True
    want = torch.tensor([[1, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]).bool()
    assert torch.equal(symmetric(causal[None, None])[0, 0], want)
    least = torch.finfo(torch.float32).min
    found = symmetric(torch.zeros(1, 1, 4, 4).masked_fill(~causal, least))
    assert torch.equal(found[0, 0], torch.zeros(4, 4).masked_fill(~want, least))


def test_rows_of_padding_that_see_nothing_see_nothing() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    causal[:, 0] = False
    want = torch.tensor([[0, 0, 0, 0], [0, 1, 1, 1], [0, 1, 1, 1], [0, 1, 1, 1]]).bool()
    assert torch.equal(symmetric(causal[None, None])[0, 0], want)
    assert torch.equal(symmetric(additive(causal[None]))[0, 0] == 0, want)


def test_of_a_batch_only_the_causal_masks_change() -> None:
    """Also with biases on the mask that is not causal."""
    causal, full = torch.ones(4, 4).tril().bool(), block_causal(torch.ones(1, 4, dtype=torch.long), 2)[0]
    both = torch.stack([causal, full])[:, None]
    assert torch.equal(symmetric(both)[0, 0], torch.ones(4, 4).bool()) and torch.equal(symmetric(both)[1, 0], full)
    biased = torch.full((1, 1, 4, 4), -0.5).masked_fill(~full, torch.finfo(torch.float32).min)
    assert torch.equal(symmetric(biased), biased)
    single = torch.tensor([[[[True]]]])
    assert torch.equal(symmetric(single), single)
