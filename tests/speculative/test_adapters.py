"""The switch: off is the base, gated rows are the base's beside the adapter's, and nothing stays behind."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import BioGptConfig, BioGptForCausalLM, GPT2Config, GPT2LMHeadModel

from llm_diffusion.speculative.adapters import AdapterSwitch, check_adapters

MASK = 63


def adapted(random_llama, dtype=torch.float32, **options):
    model = random_llama(vocab_size=64).to(dtype)
    model.config.diffusion = {"mask_token_id": MASK}
    settings = {"r": 4, "target_modules": "all-linear", "trainable_token_indices": [MASK], **options}
    model = get_peft_model(model, LoraConfig(**settings))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            parameter.data.normal_(std=0.2)
    return model.eval()


@torch.no_grad()
def test_off_and_on_are_what_peft_says(random_llama) -> None:
    model, ids = adapted(random_llama), torch.tensor([[5, 6, MASK, 7]])
    on = model(ids).logits
    with model.disable_adapter():
        off = model(ids).logits
    with AdapterSwitch(model) as switch:
        torch.testing.assert_close(model(ids).logits, off)
        switch.first = 0
        others = [token for token in range(64) if token != MASK]  # the head stays the base's
        torch.testing.assert_close(model(ids).logits[..., others], on[..., others], rtol=1e-5, atol=1e-5)
    assert torch.equal(model(ids).logits, on)  # given back, without hooks
    assert not any(module._forward_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@torch.no_grad()
def test_a_base_in_bf16_is_rounded_as_peft_rounds(random_llama) -> None:
    """Once: another rounding grows through a deep model, until drafts in training and in decoding are not the same any more."""
    model, ids = adapted(random_llama, torch.bfloat16), torch.tensor([[5, 6, MASK, 7]])
    on = model(ids).logits
    with AdapterSwitch(model) as switch:
        switch.first = 0
        others = [token for token in range(64) if token != MASK]
        assert torch.equal(model(ids).logits[..., others], on[..., others])


@torch.no_grad()
def test_gated_rows_are_the_base_beside_the_adapter(random_llama) -> None:
    """Rows [clean ; noisy] of which no clean one sees a noisy one: the clean ones are the base's, to the digit of a pass without."""
    model = adapted(random_llama)
    ids = torch.randint(5, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    ids[:, 6:] = MASK
    ids[0, 2] = MASK  # a prompt may speak of it
    with model.disable_adapter():
        clean = model(ids[:, :6]).logits
    with AdapterSwitch(model) as switch:
        switch.first = 6
        both = model(ids).logits
        other = ids.clone()
        other[:, 5] = 9
        moved = model(other).logits
    torch.testing.assert_close(both[:, :6], clean, rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        base = model(ids).logits
    assert (both[:, 6:] - base[:, 6:]).abs().max() > 0.01  # the noisy ones hear the adapter
    assert (both[:, 6:] - moved[:, 6:]).abs().max() > 0.01  # and see the clean ones


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_whole_drafts_in_int8_are_close_and_nothing_else_changes(random_llama, architecture) -> None:
    if architecture == "llama":
        model = adapted(random_llama)
    else:
        torch.manual_seed(0)
        config = GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32)
        model = adapted(lambda vocab_size: GPT2LMHeadModel(config), fan_in_fan_out=True)
    ids, others = torch.tensor([[5, 6, MASK, 7]]), [token for token in range(64) if token != MASK]
    exact = {}
    with AdapterSwitch(model) as switch:
        for switch.first in (None, 0, 2):
            exact[switch.first] = model(ids).logits[..., others]
    with AdapterSwitch(model, in_int8=True) as switch:
        for switch.first in (None, 2):
            assert torch.equal(model(ids).logits[..., others], exact[switch.first])
        switch.first = 0
        found = model(ids).logits[..., others]
    assert not torch.equal(found, exact[0])
    assert (found - exact[0]).norm() < 0.1 * (exact[None] - exact[0]).norm()
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "variant"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [5, MASK]}, "trainable_token_indices"),
        ({"target_modules": ["q_proj", "lm_head"]}, "vocabulary"),
    ],
)
def test_adapters_that_change_the_base_are_refused(random_llama, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdapterSwitch(adapted(random_llama, **options))


def test_without_adapters_nothing_is_left_to_verify_with(random_llama) -> None:
    with pytest.raises(ValueError, match="no autoregressive model"):
        check_adapters(random_llama())
    merged = adapted(random_llama, trainable_token_indices=None)
    with pytest.raises(ValueError, match="no autoregressive model"):
        AdapterSwitch(copy.deepcopy(merged).merge_and_unload())
    merged.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        AdapterSwitch(merged)
    with pytest.raises(ValueError, match="LoRA"):
        check_adapters(get_peft_model(random_llama(), IA3Config(target_modules=["q_proj"], feedforward_modules=[])))


@torch.no_grad()
def test_one_call_at_a_time_and_nothing_left_after_a_refusal(random_llama) -> None:
    model = adapted(random_llama)
    before = model(torch.full((1, 3), MASK)).logits
    with AdapterSwitch(model), pytest.raises(RuntimeError, match="one call at a time"):
        AdapterSwitch(model)
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear"))  # without a row for the mask token
    model.set_adapter("other")
    with AdapterSwitch(model) as switch:
        switch.first = 0
        model(torch.full((1, 3), MASK))
    model.set_adapter("default")
    assert torch.equal(model(torch.full((1, 3), MASK)).logits, before)


def test_the_mask_row_is_scaled_as_the_embedding_scales() -> None:
    config = BioGptConfig(
        vocab_size=64,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        intermediate_size=64,
        scale_embedding=True,
    )
    model = BioGptForCausalLM(config).eval()
    model.config.diffusion = {"mask_token_id": MASK}
    model = get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[MASK]))
    embedding, ids = model.get_base_model().get_input_embeddings(), torch.tensor([[5, MASK]])
    want = embedding(ids)
    with AdapterSwitch(model) as switch:
        switch.first = 0
        torch.testing.assert_close(embedding(ids), want)


def test_a_switch_that_is_broken_off_leaves_nothing_behind(random_llama, monkeypatch) -> None:
    """By Ctrl-C or for want of memory, while the int8 copies are made."""
    model, copies = adapted(random_llama), iter(range(5))

    def broken_off(*args: object) -> None:
        if next(copies) == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr("llm_diffusion.speculative.adapters.int8_linear", broken_off)
    with pytest.raises(KeyboardInterrupt):
        AdapterSwitch(model, in_int8=True)
    assert not any("forward" in vars(module) for module in model.modules())
    with AdapterSwitch(model):
        pass
