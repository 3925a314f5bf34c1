"""Both pipelines from every start: a diffusion checkpoint is causal again, a model from nothing is a GPT-2, both say the same as the host."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llm_diffusion import (
    DiffusionInference,
    convert_to_diffusion,
    load_diffusion_model,
    probe_attention,
)
from llm_diffusion.models.record import save_record
from llm_diffusion.pipelines import (
    check_positions,
    check_scratch,
    continue_from_left,
    continued,
    for_left_to_right,
    load_autoregressive,
    nll_per_token,
    scratch_model,
)

SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PROMPTS = ["Tom has", "Sort the letters: k d"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One set of random weights as an AR checkpoint and as a diffusion checkpoint, and an adapter over the first."""
    root = tmp_path_factory.mktemp("starts")
    model, tokenizer = scratch_model(SHAPE, "tiny", seed=1, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from equally likely tokens
    model.save_pretrained(root / "ar")
    tokenizer.save_pretrained(root / "ar")
    convert_to_diffusion(model, tokenizer)
    model.save_pretrained(root / "diffusion")
    tokenizer.save_pretrained(root / "diffusion")
    converted, tokenizer = load_diffusion_model(str(root / "ar"), device="cpu")
    adapter = get_peft_model(converted, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapter.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    save_record(adapter, root / "adapter")
    return root


def test_a_diffusion_checkpoint_is_causal_again(folders):
    assert probe_attention(AutoModelForCausalLM.from_pretrained(folders / "diffusion")) == "bidirectional"
    model, tokenizer = load_autoregressive(str(folders / "diffusion"), device="cpu")
    original = AutoModelForCausalLM.from_pretrained(folders / "ar").eval()
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        rows = original.config.vocab_size
        assert torch.allclose(model(ids).logits[..., :rows], original(ids).logits, atol=1e-5)
    assert probe_attention(model) == "causal" and not hasattr(model.config, "diffusion")
    # The row of the mask is there and is never said.
    ours = continue_from_left(model, tokenizer, PROMPTS[:1], max_new_tokens=8)
    first = tokenizer(PROMPTS[0], return_tensors="pt")
    theirs = original.generate(**first, max_new_tokens=8, do_sample=False)[:, first["input_ids"].shape[1] :]
    assert ours == tokenizer.batch_decode(theirs, skip_special_tokens=True)


def test_a_diffusion_adapter_is_decoded_by_its_base_and_not_trained_from_left_to_right(folders):
    assert for_left_to_right(str(folders / "adapter")) == str(folders / "ar")
    assert for_left_to_right(str(folders / "ar")) == str(folders / "ar")
    with pytest.raises(ValueError, match="is an adapter of a diffusion model"):
        load_autoregressive(str(folders / "adapter"), device="cpu")


def test_a_model_from_nothing_is_a_gpt2_of_that_shape():
    model, tokenizer = scratch_model(SHAPE, "tiny", seed=1, device="cpu")
    config, width, layers = model.config, 32, 2
    assert (config.model_type, config.n_positions, config.vocab_size) == ("gpt2", 64, len(tokenizer))
    # Embeddings, the final norm, and in every layer two norms, attention and a perceptron four times as wide, with biases.
    layer = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + 8 * width * width + 5 * width
    assert model.num_parameters() == (len(tokenizer) + 64) * width + 2 * width + layers * layer
    same, other = (scratch_model(SHAPE, "tiny", seed=seed, device="cpu")[0] for seed in (1, 2))
    weights = [m.transformer.h[1].attn.c_attn.weight for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ({**SHAPE, "n_head": 3}, "`n_head` .3. must divide"),
        ({**SHAPE, "n_layer": 0}, "`scratch.n_layer`"),
        ({**SHAPE, "n_layer": True}, "`scratch.n_layer`"),
        ({**SHAPE, "n_positions": 32}, "`max_length` .64. exceeds the 32"),
        ({"n_embd": 32}, "must have the keys"),
    ],
)
def test_shapes_that_cannot_be(shape, said):
    with pytest.raises(ValueError, match=said):
        check_scratch(shape, max_length=64)


def test_rows_longer_than_learned_positions_are_refused(folders, tiny):
    model, _ = load_autoregressive(str(folders / "ar"), device="cpu")
    check_positions(model, 64)
    with pytest.raises(ValueError, match="`max_length` .65. exceeds the 64 positions"):
        check_positions(model, 65)
    check_positions(tiny[0], 10**6)  # rotary: counts on


def test_sampling_is_seeded_and_leaves_the_generator_alone(folders):
    model, tokenizer = load_autoregressive(str(folders / "ar"), device="cpu")
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    drawn = [
        continue_from_left(model, tokenizer, PROMPTS, max_new_tokens=8, temperature=2.0, seed=seed)
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert torch.rand(1) == expected
    greedy = continue_from_left(model, tokenizer, PROMPTS, max_new_tokens=8)
    assert greedy == continue_from_left(model, tokenizer, PROMPTS, max_new_tokens=8, do_sample=False, temperature=1.0)
    alone = [continue_from_left(model, tokenizer, [prompt], max_new_tokens=8)[0] for prompt in PROMPTS]
    assert greedy == alone  # padding on the left changes nothing


@pytest.mark.parametrize(
    ("prompt", "settings", "said"),
    [
        ("", {}, "empty prompt"),
        ("Tom has", {"max_new_tokens": 64}, "exceed the model's 64 positions"),
        ("Tom has", {"max_new_tokens": 4, "remasking": "random"}, "remasking"),
    ],
)
def test_what_left_to_right_refuses(folders, prompt, settings, said):
    model, tokenizer = load_autoregressive(str(folders / "ar"), device="cpu")
    with pytest.raises(ValueError, match=said):
        continue_from_left(model, tokenizer, [prompt], **settings)


def test_surprise_is_the_hosts_loss(folders):
    model, tokenizer = load_autoregressive(str(folders / "ar"), device="cpu")
    start, ids = (
        len(tokenizer("Tom has")["input_ids"]),
        tokenizer("Tom has 23 apples", return_tensors="pt")["input_ids"],
    )
    labels = ids.clone()
    labels[:, :start] = -100
    with torch.no_grad():
        expected = model(ids, labels=labels).loss.item()
    assert nll_per_token(model, tokenizer, ["Tom has"], [" 23 apples"]) == pytest.approx(expected, rel=1e-5)
    assert nll_per_token(model, tokenizer, ["Tom has"], [""]) == float("inf")


def test_side_by_side_tells_an_untrained_conversion_from_its_base(caplog):
    """The embedded base answers; decoded by unmasking without any training it does not, and the figures say so."""
    prompts = ["Sort the letters: k d e a", "Which is greater, 45 or 37?"]
    settings = {"max_new_tokens": 12, "block_length": 4}

    def load(name):
        return DiffusionInference.from_pretrained(name, device="cpu", **settings)

    rows = continued(["tiny"], prompts, load, settings, chat=True)
    assert [(row.model, row.pipeline) for row in rows] == [("tiny", "arm"), ("tiny", "diffusion")]
    arm, diffusion = rows
    assert arm.texts == ["a d e k", "45 is greater than 37."] != diffusion.texts
    assert arm.tokens_per_forward == 1.0 and diffusion.tokens_per_forward > 0
    assert diffusion.nll_per_token > arm.nll_per_token + 1
    assert caplog.text.count("its answers mean nothing") == 1
