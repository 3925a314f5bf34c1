"""Modes against loops over tokens: the canvas of an answer, the layout of a noisy batch, what may be seen, and the read-out."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch

from llm_diffusion.objective.forward_process import NoiseSettings
from llm_diffusion.objective.modes import (
    IGNORE_INDEX,
    MODES,
    Bidirectional,
    Block,
    Lossless,
    NoisyRows,
    align_with_readout,
)

MASK = 99
# One text and padding, three packed texts, padding on the left.
ROWS = {
    "right": [[1] * 12, [1] * 9 + [0] * 3],
    "packed": [[1] * 4 + [2] * 7 + [3], [1] * 2 + [2] * 5 + [3] * 4 + [0]],
    "left": [[1] * 12, [0] * 2 + [1] * 10],
}
every_row = pytest.mark.parametrize("documents", ROWS.values(), ids=ROWS)


def noisy_rows(documents: list[list[int]], prompt: int = 0, offset: Any = 0, seed: int = 0) -> NoisyRows:
    """Random rows; the first `prompt` columns are not maskable. Weights, rates and ids are all different numbers."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.tensor(documents)
    shape = ids.shape

    def chance(p: float) -> torch.Tensor:
        return torch.rand(shape, generator=generator) < p

    maskable = (ids > 0) & chance(0.8) & (torch.arange(shape[1]) >= prompt)
    maskable[0, prompt : prompt + 4] |= ids[0, prompt : prompt + 4] > 0
    masked = maskable & chance(0.6)
    return NoisyRows(
        input_ids=torch.randint(10, 50, shape, generator=generator),
        document_ids=ids,
        segment_ids=torch.zeros_like(ids),
        maskable=maskable,
        text=maskable & chance(0.8),
        masked=masked,
        probability=torch.rand(shape, generator=generator),
        weights=1 + torch.rand(shape, generator=generator),
        extra_weights=3 + torch.rand(shape, generator=generator),
        seen=torch.randint(50, 90, shape, generator=generator),
        hidden=masked | chance(0.2),
        teacher_mask=chance(0.5),
        offset=offset,
    )


class Token(NamedTuple):
    """A column of a row: its text, its place there, the number of its block and its place in that."""

    text: int
    place: int
    block: int
    inside: int


def tokens_of(documents: list[int], b: int = 1, offset: int = 0) -> list[Token | None]:
    """None is padding."""
    places = [documents[:column].count(text) for column, text in enumerate(documents)]
    return [
        Token(text, place, (place + offset) // b, (place + offset) % b) if text else None
        for text, place in zip(documents, places, strict=True)
    ]


def terms(laid_out: dict[str, Any], row: int) -> dict[int, tuple[float, ...]]:
    """What every column of the model predicts: column -> (its target, the column of that token, weight, extra weight, level)."""
    names = ("targets", "tokens", "weights", "extra_weights", "levels")
    values = zip(*(laid_out[name][row].tolist() for name in names), strict=True)
    return {column: value for column, value in enumerate(values) if value[0] != IGNORE_INDEX}


# -- canvases


def test_a_share_of_canvases_is_cut_at_random() -> None:
    """Of a thousand numbers in a row exactly that share, and every length alike."""
    mode, choices = Bidirectional(), range(987_000, 988_000)
    for share in (0.0, 0.25, 1.0):
        settings = NoiseSettings(random_canvas=share, eos_tail=0)
        ends = Counter(mode.canvas_end(10, 7, settings, choice, 0) for choice in choices)
        assert ends == Counter({8: round(1000 * share), 10: round(1000 * (1 - share))})
    at_random, whole = NoiseSettings(random_canvas=1.0), NoiseSettings(random_canvas=0.0, eos_tail=5)
    assert Counter(mode.canvas_end(10, 6, at_random, 0, draw) for draw in range(40)) == dict.fromkeys(range(7, 11), 10)
    assert Counter(mode.canvas_end(10, 6, whole, 0, draw) for draw in range(60)) == dict.fromkeys(range(10, 16), 10)


def test_canvases_of_one_length_start_behind_the_prompt() -> None:
    mode, answer = Bidirectional(), (10, 6)
    fixed, at_random = (NoiseSettings(max_canvas=3, random_canvas=share) for share in (0.0, 1.0))
    assert {mode.canvas_end(*answer, fixed, choice, draw) for choice in range(9) for draw in range(9)} == {9}
    assert Counter(mode.canvas_end(*answer, at_random, 0, draw) for draw in range(30)) == {7: 10, 8: 10, 9: 10}


@pytest.mark.parametrize("length", range(1, 14))
def test_canvases_in_blocks_end_with_a_block(length: int) -> None:
    settings = NoiseSettings()
    want = next(end for end in range(length, length + 4) if end % 4 == 0)
    assert Block(block_length=4).canvas_end(length, 1, settings, 5, 6) == want
    # A draft of three masks may start behind the last token.
    assert Lossless(block_length=4).canvas_end(length, 1, settings, 5, 6) == length + 3


# -- layouts


@every_row
@pytest.mark.parametrize("shift", [False, True])
def test_layout_of_whole_texts(documents: list[list[int]], shift: bool) -> None:
    rows = noisy_rows(documents)
    found = Bidirectional(right_shift_logits=shift).lay_out(rows, MASK, 0.0, packing=False)
    assert list(found["inputs"]) == ["input_ids", "attention_mask"]
    assert found["inputs"]["attention_mask"].tolist() == documents
    assert torch.equal(found["noise_levels"], rows.probability)
    for r, texts in enumerate(documents):
        want = {}
        for i in range(len(texts)):
            assert found["inputs"]["input_ids"][r, i] == (MASK if rows.hidden[r, i] else rows.seen[r, i])
            state = i - shift  # the first token has none, and what padding predicts does not count
            if state >= 0:
                assert found["teacher_mask"][r, state] == rows.teacher_mask[r, i]
            if state >= 0 and rows.masked[r, i] and texts[state]:
                values = (rows.input_ids, rows.weights, rows.extra_weights, rows.probability)
                target, *numbers = (value[r, i].item() for value in values)
                want[state] = (target, i, *numbers)
        assert terms(found, r) == want


@every_row
def test_packed_texts_do_not_see_each_other(documents: list[list[int]]) -> None:
    inputs = Bidirectional().lay_out(noisy_rows(documents), MASK, 0.0, packing=True)["inputs"]
    assert (inputs["position_ids"] >= 0).all()
    for r, texts in enumerate(documents):
        tokens = tokens_of(texts)
        for q, query in enumerate(tokens):
            if query is not None:
                sees = (inputs["attention_mask"][r, 0, q] == 0).tolist()
                assert sees == [key is not None and key.text == query.text for key in tokens]
                assert inputs["position_ids"][r, q] == query.place


BLOCKS = {
    "own position": (Block(block_length=3, clean_context="causal", right_shift_logits=False), 0.0, [0, 0]),
    "own position, ar": (Block(block_length=3, clean_context="block", right_shift_logits=False), 0.25, [0, 0]),
    "shifted": (Block(block_length=4, clean_context="causal"), 0.0, [0, 0]),
    "shifted, ar": (Block(block_length=4, clean_context="block"), 0.25, [0, 0]),
    "lossless": (Lossless(block_length=3, clean_context="causal"), 0.25, [2, 1]),
    "lossless, own position": (Lossless(block_length=3, clean_context="causal", right_shift_logits=False), 0.0, [1, 0]),
}
every_block_mode = pytest.mark.parametrize(("mode", "ar", "offsets"), BLOCKS.values(), ids=BLOCKS)
every_prompt = pytest.mark.parametrize("prompt", [0, 7, 12])


def kept_columns(rows: NoisyRows, every: list[list[Token | None]]) -> list[int]:
    """Of [noisy ; clean] all but the noisy ones before the first block in which some row masks anything."""
    length, used = rows.maskable.shape[1], rows.maskable.any(0).tolist()
    starts = [0]
    if any(used):
        first = used.index(True)
        # Where the block of that column begins, in the row in which it begins first.
        starts = [first - tokens[first].inside if tokens[first] else first for tokens in every]
    return [column for column in range(2 * length) if column >= min(starts)]


@every_row
@every_prompt
@every_block_mode
def test_terms_of_blocks(documents: Any, prompt: int, mode: Block, ar: float, offsets: list[int]) -> None:
    """The noisy half predicts what is masked; the clean half the first tokens of blocks, and next tokens with weight `ar`."""
    rows = noisy_rows(documents, prompt, torch.tensor(offsets)[:, None])
    found = mode.lay_out(rows, MASK, ar, packing=False)
    every = [tokens_of(texts, mode.block_length, offset) for texts, offset in zip(documents, offsets, strict=True)]
    kept, length = kept_columns(rows, every), len(documents[0])
    for r, tokens in enumerate(every):
        want = {}
        for i, token in enumerate(tokens):
            target = rows.input_ids[r, i].item()
            maskable, masked, text = (bool(x[r, i]) for x in (rows.maskable, rows.masked, rows.text))
            read_clean = mode.right_shift_logits and maskable and token.inside == 0
            noisy, clean = i - mode.right_shift_logits, length + i - 1
            if masked and not read_clean and noisy in kept and (text or not mode.drafts):
                want[noisy] = (target, i, rows.weights[r, i].item(), 0.0, rows.probability[r, i].item())
            if i > 0 and not mode.drafts and (read_clean or (maskable and ar > 0)):
                want[clean] = (target, i, float(read_clean), ar, 0.0)
            if noisy in want:
                assert found["teacher_mask"][r, kept.index(noisy)] == rows.teacher_mask[r, i]
            if clean in want:
                assert found["teacher_mask"][r, kept.index(clean)] == text
        assert {kept[place]: term for place, term in terms(found, r).items()} == want


@every_row
@every_prompt
@every_block_mode
def test_inputs_of_blocks(documents: Any, prompt: int, mode: Block, ar: float, offsets: list[int]) -> None:
    rows = noisy_rows(documents, prompt, torch.tensor(offsets)[:, None])
    found = mode.lay_out(rows, MASK, ar, packing=False)
    every = [tokens_of(texts, mode.block_length, offset) for texts, offset in zip(documents, offsets, strict=True)]
    kept, length = kept_columns(rows, every), len(documents[0])
    causal = mode.clean_context == "causal"
    for r, tokens in enumerate(every):
        halves = [(tokens[column % length], column < length) for column in kept]
        ids = [MASK if c < length and rows.hidden[r, c] else rows.seen[r, c % length].item() for c in kept]
        assert found["inputs"]["input_ids"][r].tolist() == ids
        levels = [rows.probability[r, c].item() if c < length else 0.0 for c in kept]
        assert found["noise_levels"][r].tolist() == levels
        places = found["inputs"]["position_ids"][r].tolist()
        for q, (query, noisy) in enumerate(halves):
            if query is None:
                continue
            want = []
            for key, key_noisy in halves:
                if key is None or key.text != query.text or (key_noisy and not noisy):
                    want.append(False)
                elif noisy:
                    want.append(key.block == query.block if key_noisy else key.block < query.block)
                else:
                    want.append(key.place <= query.place if causal else key.block <= query.block)
            assert (found["inputs"]["attention_mask"][r, 0, q] == 0).tolist() == want
            assert places[q] == query.place


@pytest.mark.parametrize("mode", MODES.values())
def test_the_shortest_block_is_the_shortest_in_which_a_mask_is_scored(mode: type[Bidirectional]) -> None:
    documents = [[1] * 12, [1] * 12]

    def scored(length: int) -> bool:
        found = mode(block_length=length, clean_context="causal").lay_out(noisy_rows(documents), MASK, 0.0, False)
        return bool((found["targets"] != IGNORE_INDEX).any())

    assert scored(mode.min_block_length)
    assert mode.min_block_length == 1 or not scored(mode.min_block_length - 1)


# -- what decoding sees and reads


@every_row
@pytest.mark.parametrize("clean", ["causal", "block"])
def test_what_finished_blocks_see_of_each_other(documents: list[list[int]], clean: str) -> None:
    mode, ids = Block(block_length=3, clean_context=clean), torch.tensor(documents)
    seen = mode.clean_mask(ids)
    active = torch.tensor([1, 0])
    decoding = mode.decoding_mask(ids.clamp(max=1), active)
    assert Bidirectional().decoding_mask(ids, active) is None
    for r, texts in enumerate(documents):
        one_text = tokens_of([min(text, 1) for text in texts], 3)
        for q, query in enumerate(tokens_of(texts, 3)):
            if query is None:
                continue
            for k, key in enumerate(tokens_of(texts, 3)):
                before = key is not None and (
                    key.place <= query.place if clean == "causal" else key.block <= query.block
                )
                assert seen[r, q, k] == (before and key.text == query.text)
            if one_text[q].block == active[r]:
                assert decoding[r, q].tolist() == [key is not None and key.block <= active[r] for key in one_text]


def test_blocks_are_counted_from_the_text_or_from_the_answer() -> None:
    prompts = torch.tensor([3, 5])
    starts = {name: mode(block_length=4).block_start(prompts).tolist() for name, mode in MODES.items()}
    assert starts == {"bidirectional": [3, 5], "block": [0, 0], "lossless": [3, 5]}


def test_labels_that_are_ignored_are_those_that_torch_ignores() -> None:
    loss = torch.nn.functional.cross_entropy(torch.ones(1, 3), torch.tensor([IGNORE_INDEX]), reduction="sum")
    assert loss == 0


@pytest.mark.parametrize("right_shift", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7])
def test_both_conventions_name_the_same_hidden_state(right_shift: bool, length: int) -> None:
    """The state that the sampler reads for position p is the state on which the loss puts the target of p."""
    tokens = torch.arange(3 * length).view(3, length) + 10
    targets = align_with_readout(tokens, right_shift, IGNORE_INDEX)
    assert targets.shape == tokens.shape
    predicted = torch.arange(int(right_shift), length).expand(3, -1)  # shifted, token 0 has no predictor
    states = Bidirectional(right_shift_logits=right_shift).readout_positions(predicted, predicted)
    assert torch.equal(targets.gather(-1, states), tokens.gather(-1, predicted))
    # Every other state has no target.
    rest = torch.ones_like(targets, dtype=torch.bool).scatter(-1, states, False)
    assert (targets[rest] == IGNORE_INDEX).all() and rest.sum() == 3 * int(right_shift)


def test_position_0_reads_a_valid_state() -> None:
    positions = torch.tensor([[0, 3, 1]])
    assert Bidirectional(right_shift_logits=True).readout_positions(positions, positions).tolist() == [[0, 2, 0]]
    assert Bidirectional(right_shift_logits=False).readout_positions(positions, positions).tolist() == [[0, 3, 1]]


def test_shifted_values_keep_type_and_fill() -> None:
    weights = torch.full((2, 1), math.pi).expand(2, 3)
    shifted = align_with_readout(weights, True, 0.0)
    assert shifted.dtype == weights.dtype and shifted[:, -1].eq(0).all() and shifted[:, :-1].eq(weights[:, 1:]).all()
