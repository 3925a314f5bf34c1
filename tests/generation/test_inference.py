"""Text in, text out: filling masks, the verbs over it, and gaps of unknown length."""

import pytest
import torch

import llm_diffusion as ld
from llm_diffusion import UserError
from llm_diffusion.generation.config import decoding_settings
from llm_diffusion.generation.inference import continue_autoregressive, fill_gaps

MASK = 31


@pytest.fixture(scope="module")
def inference(tiny):
    model, tokenizer = tiny
    return ld.DiffusionInference(
        model, tokenizer.mask_token_id, tokenizer.eos_token_id, steps=None, tokenizer=tokenizer, max_new_tokens=8
    )


@pytest.fixture(params=["left", "right"])
def ragged(request):
    """Rows of unlike length with masks at their end and in between; where their tokens are."""
    rows = [
        [14, 15, MASK, 16, MASK, MASK],
        [17, MASK, MASK, MASK, MASK, MASK, MASK, MASK, MASK],
        [18, 19, MASK],
        [20, 21, 22, 23, MASK, 24, MASK, MASK, MASK, MASK],
    ]
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    if request.param == "left":
        ids, real = (
            [p + r for p, r in zip(pads, rows, strict=True)],
            [[0] * len(p) + [1] * len(r) for p, r in zip(pads, rows, strict=True)],
        )
    else:
        ids, real = (
            [r + p for p, r in zip(pads, rows, strict=True)],
            [[1] * len(r) + [0] * len(p) for p, r in zip(pads, rows, strict=True)],
        )
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real)}


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 10, None])
@pytest.mark.parametrize("end", [None, 5])
def test_masks_are_filled_and_nothing_else_is_touched(random_diffuser, ragged, right_shift, steps, end):
    ids, real = ragged["input_ids"], ragged["attention_mask"].bool()
    before = ids.clone()
    filled = ld.DiffusionInference(random_diffuser(right_shift), MASK, end, steps=steps)(ragged)
    assert filled.shape == ids.shape
    assert not (filled[real] == MASK).any()
    assert torch.equal(filled[ids != MASK], ids[ids != MASK])
    assert torch.equal(ids, before), "the batch given must stay as it was"


@pytest.mark.parametrize("settings", [{}, {"block_length": 3}, {"block_length": 3, "steps": 9}], ids=str)
@pytest.mark.parametrize("right_shift", [True, False])
def test_a_row_does_not_depend_on_the_others(random_diffuser, ragged, right_shift, settings):
    inference = ld.DiffusionInference(random_diffuser(right_shift), MASK, None, **{"steps": None, **settings})
    together = inference(ragged)
    for i in range(4):
        keep = ragged["attention_mask"][i].bool()
        alone = inference({"input_ids": ragged["input_ids"][i : i + 1, keep]})
        assert torch.equal(together[i, keep], alone[0])


def test_after_the_end_token_the_rest_is_end_tokens(random_diffuser):
    """Masks right of a committed end token become that token; without an end token every mask gets its own."""
    batch = {"input_ids": torch.tensor([[14 + i, 15, *[MASK] * 8] for i in range(12)])}
    model, stopped = random_diffuser(True, seed=1), 0
    free = ld.DiffusionInference(model, MASK, None, steps=None)(batch)
    for end in free[:, 2:].unique().tolist():  # tokens that do come up
        rows = ld.DiffusionInference(model, MASK, end, steps=None)(batch)[:, 2:].tolist()
        for row, unstopped in zip(rows, free[:, 2:].tolist(), strict=True):
            assert MASK not in row
            if end not in unstopped:
                assert row == unstopped
                continue
            first = row.index(end)
            assert row[: first + 1] == unstopped[: first + 1]
            # What was committed before the stop is kept, what was not is the end token.
            assert all(a in (end, b) for a, b in zip(row[first:], unstopped[first:], strict=True))
            stopped += row != unstopped
    assert stopped, "no row was filled with end tokens"


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": torch.tensor([[14, 15, 16]])},
        {"input_ids": torch.tensor([[14, 15, MASK]]), "attention_mask": torch.tensor([[1, 1, 0]])},
    ],
    ids=["no mask", "mask under padding"],
)
def test_nothing_to_fill_is_an_error(random_diffuser, batch):
    with pytest.raises(ValueError, match="`input_ids`.*31.*nothing to fill"):
        ld.DiffusionInference(random_diffuser(True), MASK, None)(batch)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"steps": 0}, "`steps`"),
        ({"stepz": 4}, "stepz"),
        ({"threshold": 2.0}, "`threshold`"),
        ({"block_length": -1}, "`block_length`"),
    ],
)
def test_a_wrong_setting_fails_at_construction(random_diffuser, settings, named):
    with pytest.raises(ValueError, match=named):
        ld.DiffusionInference(random_diffuser(True), MASK, None, **settings)


# -- the verbs


def test_generate_continues_texts(inference):
    tokenizer = inference.tokenizer
    prompts = ["Sort the letters: k d e a", "3 6"]
    answers = inference.generate(prompts)
    assert len(answers) == 2
    for prompt, answer in zip(prompts, answers, strict=True):
        encoded = tokenizer(prompt, return_tensors="pt")
        ids = ld.generate(inference.model, **encoded, max_new_tokens=8)[0, encoded["input_ids"].shape[1] :]
        assert answer == tokenizer.decode(ids, skip_special_tokens=True)
        assert inference.generate(prompt) == [answer]


def test_settings_of_a_call_win(inference):
    assert len(inference.tokenizer(inference.generate("3 6", max_new_tokens=3, eos_token_id=None)[0])["input_ids"]) <= 3
    with pytest.raises(ValueError, match="`steps`"):
        inference.generate("3 6", steps=0)


def test_chat_goes_through_the_template(inference):
    tokenizer = inference.tokenizer
    conversations = [
        [{"role": "user", "content": "Reverse the letters: a b c d"}],
        [{"role": "user", "content": "Which is greater, 45 or 37?"}],
    ]
    answers = inference.chat(conversations)
    assert isinstance(answers, list)
    for conversation, answer in zip(conversations, answers, strict=True):
        single = inference.chat(conversation)
        assert single == answer
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
        assert inference.generate(text) == [answer]
        assert "<|" not in answer


def test_all_answers_to_one_conversation_come_back(inference):
    turns, settings = [{"role": "user", "content": "Sort the letters: k d e a"}], {"temperature": 1.0}
    answers = inference.chat(turns, num_return_sequences=3, **settings)
    assert answers == inference.chat([turns], num_return_sequences=3, **settings) and len(answers) == 3


def test_tokens_that_a_user_bans_are_banned_beside_the_ends(inference):
    """By a call, or for all of them; an end has no place in a gap in any case."""
    tokenizer, text = inference.tokenizer, "12" + 8 * "<|mask|>" + "45=57"
    few = {20, 21}
    others = [token for token in range(512) if token not in {*few, tokenizer.eos_token_id}]
    always = ld.DiffusionInference(
        inference.model, tokenizer.mask_token_id, None, steps=None, tokenizer=tokenizer, suppress_tokens=others
    )
    assert set(always.infill_ids(text, temperature=5.0)[2:10]) <= few
    assert set(inference.infill_ids(text, temperature=5.0, suppress_tokens=others)[2:10]) <= few


def test_masks_in_pieces_are_filled_too(inference):
    tokenizer = inference.tokenizer
    ids = inference.infill_ids(["12<|mask|>45", "=57"], max_gap_length=2)
    assert tokenizer.mask_token_id not in ids and tokenizer.decode(ids).startswith("12")


def test_a_sized_canvas_is_a_matter_of_answers(random_diffuser, ragged):
    """Masks behind an end that another mask stands before are filled like others."""
    model, ends = random_diffuser(False), list(range(5, 20))
    want = ld.DiffusionInference(model, MASK, ends, steps=None)(ragged)
    assert torch.equal(ld.DiffusionInference(model, MASK, ends, steps=None, length_quantile=0.5)(ragged), want)


def test_infill_fills_the_gaps_of_a_text(inference):
    tokenizer = inference.tokenizer
    for text in ("3 6 <|mask|> 12 15", "12<|mask|>45=57", "a <|mask|> c <|mask|> e"):
        filled = inference.infill(text)
        given, ids = tokenizer(text)["input_ids"], tokenizer(filled)["input_ids"]
        assert "<|" not in filled
        left, right = text.split("<|mask|>")[0], text.split("<|mask|>")[-1]
        assert filled.startswith(left)
        assert filled.endswith(right)
        assert ids != given
    with pytest.raises(ValueError, match=r"`text`: no <\|mask\|>"):
        inference.infill("3 6 9")


def test_infill_finds_the_length_of_gaps_between_pieces(inference):
    for pieces in (["3 6 ", " 12 15"], ["a b", " d", " f"]):
        filled = inference.infill(pieces, max_gap_length=3)
        assert filled.startswith(pieces[0]) and filled.endswith(pieces[-1]) and pieces[1] in filled[len(pieces[0]) :]
        assert len(filled) > len("".join(pieces)) and "<|" not in filled
    with pytest.raises(ValueError, match="`max_gap_length`"):
        inference.infill(["a", "b"], max_gap_length=0)
    with pytest.raises(ValueError, match="`pieces`"):
        inference.infill(["a"])


def test_from_pretrained_brings_everything(inference):
    fresh = ld.DiffusionInference.from_pretrained("tiny", device="cpu", max_new_tokens=8)
    assert fresh.settings["mask_token_id"] == inference.settings["mask_token_id"]
    defaults = decoding_settings(inference.model, {"max_new_tokens": 8})
    assert fresh.generate("3 6 9") == inference.generate("3 6 9", **defaults) != inference.generate("3 6 9")
    with pytest.raises(ValueError, match="stepz"):
        ld.DiffusionInference.from_pretrained("tiny", device="cpu", stepz=1)


@pytest.mark.parametrize(("row", "block_length"), [([31, 5, 6, 31], None), ([7, *[31] * 8, 9], 4)])
def test_left_padding_changes_nothing(random_diffuser, row, block_length):
    """Neither a mask on the first token of a text nor the place of its blocks depends on padding."""
    inference = ld.DiffusionInference(random_diffuser(True), 31, None, steps=None, block_length=block_length)
    ids = torch.tensor([row])
    pad = torch.nn.functional.pad
    padded = {"input_ids": pad(ids, (3, 0)), "attention_mask": pad(torch.ones_like(ids), (3, 0))}
    assert torch.equal(inference({"input_ids": ids})[0], inference(padded)[0, 3:])


PROMPTS = ["Tom has", "Sort the letters: k d"]


def test_continuing_from_left_is_seeded_and_leaves_the_generator_alone(random_llama, tokenizer):
    model = random_llama()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    drawn = [
        continue_autoregressive(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.rand(1) == expected
    greedy = continue_autoregressive(model, tokenizer, PROMPTS, max_new_tokens=8)
    told = {"max_new_tokens": 8, "do_sample": False, "temperature": 1.0}
    assert greedy == continue_autoregressive(model, tokenizer, PROMPTS, **told)
    alone = [continue_autoregressive(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert greedy == alone  # padding on the left changes nothing


@pytest.mark.parametrize(
    ("prompt", "settings", "named"),
    [("", {}, "prompts"), ("Tom has", {"max_new_tokens": 64}, "max_new_tokens"), ("Tom has", {"steps": 4}, "steps")],
)
def test_what_left_to_right_refuses(random_llama, tokenizer, prompt, settings, named):
    with pytest.raises(UserError, match=named):
        continue_autoregressive(random_llama(), tokenizer, [prompt], **settings)


@pytest.fixture(scope="module")
def counter(random_diffuser):
    """A bidirectional model of texts n, n + 1, n + 2, … (mod 30), trained by masked prediction for a few seconds."""
    model = random_diffuser(False, hidden_size=48, intermediate_size=96, initializer_range=0.08).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(400):
        start = torch.randint(30, (48, 1), generator=generator)
        length = int(torch.randint(4, 15, (), generator=generator))
        ids = (start + torch.arange(length)) % 30
        hidden = torch.rand(ids.shape, generator=generator) < torch.rand(48, 1, generator=generator)
        logits = model(torch.where(hidden, MASK, ids)).logits
        loss = torch.nn.functional.cross_entropy(logits[hidden], ids[hidden])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def gap_settings(**own):
    return ld.DiffusionGenerationConfig(mask_token_id=MASK, eos_token_id=None, max_new_tokens=1, **own)


@pytest.mark.parametrize("own", [{}, {"threshold": 0.9}], ids=str)
@pytest.mark.parametrize(
    ("pieces", "want"),
    [
        ([[3, 4, 5], [7, 8, 9]], [[6]]),
        ([[3, 4, 5], [9, 10, 11]], [[6, 7, 8]]),
        ([[12, 13, 14], [20, 21, 22]], [[15, 16, 17, 18, 19]]),
        ([[3, 4, 5], [7, 8, 9], [13, 14, 15]], [[6], [10, 11, 12]]),
    ],
    ids=str,
)
def test_the_length_that_fits_is_found(counter, pieces, want, own):
    assert fill_gaps(counter, pieces, gap_settings(**own), max_gap_length=7) == want


def test_candidates_do_not_depend_on_the_batch(counter):
    pieces = [[3, 4, 5], [9, 10, 11]]
    assert fill_gaps(counter, pieces, gap_settings(), 7, batch_size=2) == fill_gaps(counter, pieces, gap_settings(), 7)


@pytest.mark.parametrize(
    ("pieces", "longest", "named"),
    [
        ([[3, 4]], 4, "`pieces`.*1"),
        ([[3], [4]], 0, "`max_gap_length`.*0"),
        ([[3], [4]], 2.5, "`max_gap_length`.*2.5"),
        ([[3] * 30, [4] * 30], 8, "max_gap_length"),
    ],
    ids=["one piece", "no room", "half a token", "too long"],
)
def test_bad_gaps_are_named(counter, pieces, longest, named):
    with pytest.raises(ValueError, match=named):
        fill_gaps(counter, pieces, gap_settings(), longest)


def test_models_that_do_not_see_what_follows_are_refused(random_llama, tokenizer):
    model = ld.convert_to_diffusion(random_llama(), tokenizer, attention="block", block_length=4)
    with pytest.raises(ValueError, match="`attention`='block'.*behind a gap"):
        fill_gaps(model, [[3], [4]], gap_settings())
    inference = ld.DiffusionInference(model, None, None, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="`attention`='block'.*behind a gap"):
        inference.infill(f"12{tokenizer.mask_token}45")
