"""What decoding is given and cannot use is refused in words that name the argument; non-finite logits end it with an error."""

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GenerationConfig
from transformers.tokenization_utils_base import BatchEncoding

import llm_diffusion as ld
from llm_diffusion import UserError
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.patching import base_of

MODES = ("bidirectional", "block", "lossless")
MASK, EOS, ROWS = 431, 2, 512
IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])


def build(random_llama, attention):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    model = ld.convert_to_diffusion(random_llama(vocab_size=ROWS), tokenizer, attention=attention)
    if attention == "lossless":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    return model, tokenizer


@pytest.fixture(scope="module")
def modes(random_llama):
    """Models of every mode and their tokenizer, by name. Shared: tests must leave them as they are."""
    return {attention: build(random_llama, attention) for attention in MODES}


def changed(row, column, value):
    ids = IDS.clone()
    ids[row, column] = value
    return ids


BAD_IDS = {
    "a list": IDS.tolist(),
    "numpy": IDS.numpy(),
    "a string": "Tom has",
    "a batch": BatchEncoding({"input_ids": IDS}),
    "a dict": {"input_ids": IDS},
    "floats": IDS.float(),
    "half": IDS.half(),
    "bools": IDS.bool(),
    "complex": IDS.to(torch.complex64),
    "none": None,
    "one dimension": IDS[0],
    "three dimensions": IDS[None],
    "no dimension": torch.tensor(5),
    "no rows": IDS[:0],
    "negative": changed(1, 2, -1),
    "ignored": changed(0, 0, -100),
    "beyond the vocabulary": changed(1, 3, ROWS),
    "far beyond": changed(0, 3, 2**40),
    "meta": torch.empty((2, 4), dtype=torch.long, device="meta"),
    "too long": torch.full((1, 60), 5),
}


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("name", BAD_IDS)
def test_ids_that_are_none(modes, attention, name):
    named = "`max_new_tokens`" if name == "too long" else "`input_ids`"
    with pytest.raises(UserError, match=named):
        ld.generate(modes[attention][0], BAD_IDS[name], max_new_tokens=8)


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8])
def test_whole_numbers_of_any_type_are_ids(modes, attention, dtype):
    model, _ = modes[attention]
    want = ld.generate(model, IDS, max_new_tokens=4)
    found = ld.generate(model, IDS.to(dtype), torch.ones_like(IDS, dtype=dtype), max_new_tokens=4)
    assert torch.equal(found, want)


BAD_MASKS = {
    "a hole": [[1, 0, 1, 1], [1, 1, 1, 1]],
    "on the right": [[1, 1, 1, 0], [1, 1, 1, 1]],
    "nothing": [[0, 0, 0, 0], [1, 1, 1, 1]],
    "fractions": [[0.5, 1, 1, 1], [1, 1, 1, 1]],
    "not a number": [[torch.nan, 1, 1, 1], [1, 1, 1, 1]],
    "infinite": [[torch.inf, 1, 1, 1], [1, 1, 1, 1]],
    "negative": [[-1, 1, 1, 1], [1, 1, 1, 1]],
    "twos": [[2, 2, 2, 2], [1, 1, 1, 1]],
    "another shape": [[1, 1, 1], [1, 1, 1]],
    "one row": [[1, 1, 1, 1]],
    "one dimension": [1, 1, 1, 1],
}


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize("name", BAD_MASKS)
def test_masks_that_are_none(modes, attention, name):
    with pytest.raises(UserError, match="`attention_mask`|padded on the left"):
        ld.generate(modes[attention][0], IDS, torch.tensor(BAD_MASKS[name]), max_new_tokens=4)


def test_an_empty_prompt_beside_another_is_told_from_padding_on_the_right(modes):
    model, tokenizer = modes["bidirectional"]
    inference = ld.DiffusionInference(model, MASK, None, steps=None, tokenizer=tokenizer, max_new_tokens=4)
    assert len(inference.generate("")) == 1
    with pytest.raises(UserError, match="empty prompt by itself"):
        inference.generate(["", "Tom has"])


@pytest.mark.parametrize("mask", [[[1] * 4] * 2, "x", 1, numpy.ones((2, 4))])
def test_masks_of_another_type(modes, mask):
    with pytest.raises(UserError, match="`attention_mask` must be a tensor"):
        ld.generate(modes["bidirectional"][0], IDS, mask, max_new_tokens=4)


@pytest.mark.parametrize("attention", MODES)
def test_a_missing_mask_is_inferred_from_padding_on_the_left(modes, attention):
    model, _ = modes[attention]
    ids, mask = torch.nn.functional.pad(IDS, (3, 0)), torch.nn.functional.pad(torch.ones_like(IDS), (3, 0))
    ids[1, :3], mask[1, :3] = torch.tensor([0, 13, 0]), torch.tensor([0, 1, 1])  # a pad token in the text is text
    want = ld.generate(model, ids, mask, max_new_tokens=6, pad_token_id=0)
    assert torch.equal(ld.generate(model, ids, max_new_tokens=6, pad_token_id=0), want)
    alone = torch.zeros((1, 1), dtype=torch.long)
    assert ld.generate(model, alone, max_new_tokens=6, pad_token_id=0).shape[1] > 1
    # Where it is an end token too, as in transformers, nothing can be told.
    open_ = ld.generate(model, ids, torch.ones_like(ids), max_new_tokens=6, pad_token_id=0, eos_token_id=0)
    assert torch.equal(ld.generate(model, ids, max_new_tokens=6, pad_token_id=0, eos_token_id=0), open_)


BAD_SETTINGS = [
    *((name, value) for name in ("eos_token_id", "pad_token_id") for value in (ROWS, 10**9, MASK, -5)),
    *(("eos_token_id", value) for value in ([ROWS], [EOS, MASK], [-1])),
    *(("mask_token_id", value) for value in (ROWS, -1)),
    *(("suppress_tokens", value) for value in ([ROWS], [-1])),
    *(("bad_words_ids", value) for value in ([[ROWS]], [[5, -1]])),
    *(("max_new_tokens", value) for value in (10**9, 61, 0)),
    *(("max_length", value) for value in ("x", 3, -1, 10**9)),
    *(("generation_config", value) for value in ({"max_new_tokens": 4}, "x", 5, GenerationConfig(eos_token_id=10**6))),
    *(("logits_processor", value) for value in (5, "x", [5], [None], {"a": 1})),
    *(("streamer", value) for value in ("x", 5, object())),
    *(("thresholdd", value) for value in (0.5,)),
    *(("stopping_criteria", value) for value in ([1],)),
]


@pytest.mark.parametrize("attention", MODES)
@pytest.mark.parametrize(("name", "value"), BAD_SETTINGS)
def test_settings_that_the_model_cannot_use(modes, attention, name, value):
    named = {"generation_config": "generation_config|eos_token_id", "max_length": "max_length|max_new_tokens"}
    with pytest.raises(ValueError, match=named.get(name, name)):
        ld.generate(
            modes[attention][0], IDS, **{"max_new_tokens": 4, name: value} if name != "max_length" else {name: value}
        )


@pytest.mark.parametrize("returned", [lambda s: s[0], lambda s: s[:, :5], lambda s: None, lambda s: 5])
def test_a_processor_that_returns_another_shape(modes, returned):
    with pytest.raises(UserError, match="`logits_processor` must return scores"):
        ld.generate(modes["bidirectional"][0], IDS, max_new_tokens=4, logits_processor=[lambda ids, s: returned(s)])


# -- non-finite logits

RULES = {
    "one a pass": {},
    "threshold": {"threshold": 0.5},
    "factor": {"factor": 1.0},
    "entropy bound": {"entropy_bound": 0.5},
    "steps": {"steps": 4},
    "sampled": {"temperature": 1.0},
    "nucleus": {"temperature": 1.0, "top_p": 0.9, "top_k": 5},
    "margin": {"remasking": "margin"},
    "entropy": {"remasking": "entropy"},
    "random": {"remasking": "random"},
    "left to right": {"remasking": "left_to_right"},
    "p2": {"steps": 4, "revision": "p2"},
    "remdm": {"steps": 4, "revision": "remdm", "eta": 0.5, "remasking": "random"},
    "editing": {"editing_threshold": 0.9},
    "guided": {"guidance_scale": 2.0},
    "sized": {"length_quantile": 0.9, "initial_length": 4},
    "grown": {"block_length": 2, "grow_canvas": True},
    "cached": {"block_length": 4, "approximate_cache": "dual"},
    "uncached": {"use_cache": False},
}
OF_MODES = {
    "bidirectional": list(RULES),
    "block": [name for name in RULES if name not in ("sized", "grown", "cached")],
    "lossless": ["one a pass", "sampled", "nucleus", "in advance", "alone"],
}
RULES |= {"in advance": {"draft_outcomes": 4}, "alone": {"draft_outcomes": 0}}


@pytest.fixture(scope="module")
def broken(random_llama):
    """The same models with a NaN in the last norm."""
    models = {attention: build(random_llama, attention)[0] for attention in MODES}
    for attention, model in models.items():
        # What the cache of a canvas and the drafts of this machine are probed for is known by then.
        ld.generate(
            model, IDS, max_new_tokens=2, **({"approximate_cache": "dual"} if attention == "bidirectional" else {})
        )
        torch.nn.init.constant_(base_of(model).model.norm.weight, torch.nan)
    return models


@pytest.mark.parametrize(("attention", "rule"), [(mode, rule) for mode, rules in OF_MODES.items() for rule in rules])
def test_weights_that_are_not_finite_end_decoding(broken, attention, rule):
    for n in (1, 6):
        with pytest.raises(UserError, match="`model`: its logits are not finite"):
            ld.generate(broken[attention], IDS, max_new_tokens=n, **RULES[rule])


@pytest.mark.parametrize("value", [torch.nan, -torch.inf, torch.inf])
@pytest.mark.parametrize(("attention", "rule"), [(m, r) for m in MODES[:2] for r in OF_MODES[m] if r != "editing"])
def test_processors_that_leave_no_token_end_decoding(modes, attention, rule, value):
    def processor(ids, scores):
        return torch.full_like(scores, value)

    with pytest.raises(UserError, match="`logits_processor` leaves no token"):
        ld.generate(modes[attention][0], IDS, max_new_tokens=4, logits_processor=[processor], **RULES[rule])


def test_a_processor_may_leave_one_token(modes):
    def only_seven(ids, scores):
        return torch.full_like(scores, -torch.inf).index_fill_(-1, torch.tensor([7]), 0.0)

    found = ld.generate(modes["bidirectional"][0], IDS, max_new_tokens=3, logits_processor=[only_seven])
    assert found[:, 4:].eq(7).all()


# -- DiffusionInference


@pytest.fixture(scope="module")
def inference(modes):
    model, tokenizer = modes["bidirectional"]
    return ld.DiffusionInference(model, MASK, EOS, tokenizer=tokenizer, max_new_tokens=4)


CONSTRUCT = [
    ({"model": None}, "`model`"),
    ({"model": "tiny"}, "`model`"),
    ({"tokenizer": "tiny"}, "`tokenizer`"),
    ({"thresh": 1}, "thresh"),
    ({"steps": 0}, "`steps`"),
    ({"mask_token_id": -1}, "`mask_token_id`"),
]


@pytest.mark.parametrize(("given", "named"), CONSTRUCT)
def test_inference_that_cannot_be(modes, given, named):
    with pytest.raises(UserError, match=named):
        ld.DiffusionInference(
            **{"model": modes["bidirectional"][0], "mask_token_id": MASK, "end_token_id": EOS, **given}
        )


def test_a_mask_token_is_the_models_own_or_missing(modes, random_llama):
    masked = {"input_ids": torch.tensor([[5, MASK, 7]])}
    found = ld.DiffusionInference(modes["bidirectional"][0], None, EOS)(masked)
    assert torch.equal(found, ld.DiffusionInference(modes["bidirectional"][0], MASK, EOS)(masked))
    with pytest.raises(UserError, match="`mask_token_id` is missing"):
        ld.DiffusionInference(random_llama(), None, EOS)


BAD_BATCHES = [
    (None, "`batch`"),
    ({}, "`batch`"),
    ([], "`batch`"),
    (5, "`batch`"),
    (IDS, "`batch`"),
    ({"input_ids": None}, "`input_ids`"),
    ({"input_ids": IDS.tolist()}, "`input_ids`"),
    ({"input_ids": IDS}, "`input_ids`: no mask token"),
    ({"input_ids": IDS[0]}, "`input_ids`"),
    ({"input_ids": IDS.float()}, "`input_ids`"),
    ({"input_ids": changed(0, 0, ROWS)}, "`input_ids`"),
    ({"input_ids": changed(0, 0, -1)}, "`input_ids`"),
    ({"input_ids": torch.full((1, 65), MASK)}, "`input_ids`: 65 tokens"),
    ({"input_ids": changed(0, 1, MASK), "attention_mask": torch.tensor([[1, 0, 1, 1]] * 2)}, "`attention_mask`"),
    ({"input_ids": changed(0, 1, MASK), "attention_mask": [[1] * 4] * 2}, "`attention_mask`"),
]


@pytest.mark.parametrize(("batch", "named"), BAD_BATCHES)
def test_batches_that_cannot_be_filled(inference, batch, named):
    with pytest.raises(UserError, match=named):
        inference(batch)


def test_rows_padded_on_either_side_are_filled_alike(inference):
    row = [5, MASK, 7, MASK]
    ids = torch.tensor([[0, 0, *row], [*row, 0, 0]])
    found = inference({"input_ids": ids, "attention_mask": (ids != 0).float()})
    assert torch.equal(found[0, 2:], found[1, :4])


BAD_TEXTS = [None, 5, {}, [None], [5], ["a", None], "\ud800", ["\udfff"], b"x"]
BAD_CHATS = [None, 5, {}, "hello", [], [[]], ["hello"], [5], [{"role": "user"}], [{"content": "x"}], [[{}]]]
BAD_CHATS += [[{"role": "user", "content": value}] for value in (None, 5, {})]
BAD_CHATS += [[{"role": "user", "content": "a"}, "b"], [[{"role": "user", "content": "a"}], "b"]]


@pytest.mark.parametrize("prompts", BAD_TEXTS)
def test_prompts_that_are_no_texts(inference, prompts):
    with pytest.raises(UserError, match="`prompts`"):
        inference.generate(prompts)
    with pytest.raises(UserError, match="`text`"):
        inference.infill(prompts)


@pytest.mark.parametrize("messages", BAD_CHATS)
def test_conversations_that_are_none(inference, messages):
    with pytest.raises(UserError, match="messages"):
        inference.chat(messages)


def test_texts_beyond_the_positions_are_refused(inference):
    for call in (
        inference.generate,
        lambda text: inference.infill(text + "<|mask|>"),
        lambda t: inference.infill([t, t]),
    ):
        with pytest.raises(UserError, match="exceed the model's 64 positions"):
            call("a b c " * 40)
