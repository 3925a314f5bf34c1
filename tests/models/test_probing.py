"""Clean keys and values that noisy rows read: against one pass over both, under checkpointing, and which models are refused."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    DynamicCache,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MptConfig,
    MptForCausalLM,
)

from llm_diffusion.models.probing import CleanPrefix, check_clean_prefix
from llm_diffusion.objective.attention_masks import additive, block_diffusion
from llm_diffusion.speculative.training import allow_prefix_under_checkpointing

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}


def halves(model, checkpointing: bool):
    """Gradient of the input embeddings of the noisy half, read beside a clean prefix, and its logits."""
    ids = torch.randint(5, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = additive(block_diffusion(torch.ones_like(ids), 4, "causal"))
    place = torch.arange(12)[None].expand(2, -1)
    noisy = model.get_input_embeddings()(ids.flip(-1)).detach().requires_grad_()
    cache = DynamicCache()
    model.eval()
    with torch.no_grad():
        model(
            input_ids=ids,
            attention_mask=mask[:, :, 12:, 12:],
            position_ids=place,
            past_key_values=cache,
            use_cache=True,
        )
    model.train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
        allow_prefix_under_checkpointing(model)
    rows = torch.cat([mask[:, :, :12, 12:], mask[:, :, :12, :12]], -1)
    logits = model(
        inputs_embeds=noisy,
        attention_mask=rows,
        position_ids=place,
        past_key_values=CleanPrefix(cache),
        use_cache=False,
    ).logits
    logits.square().mean().backward()
    whole = torch.cat([noisy.detach(), model.get_input_embeddings()(ids).detach()], 1).requires_grad_()
    together = model(inputs_embeds=whole, attention_mask=mask, position_ids=place.repeat(1, 2), use_cache=False).logits
    together[:, :12].square().mean().backward()
    return logits, together[:, :12], noisy.grad, whole.grad[:, :12]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_passes_are_one(random_llama, checkpointing) -> None:
    logits, together, gradient, gradient_together = halves(random_llama(vocab_size=64), checkpointing)
    torch.testing.assert_close(logits, together, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient, gradient_together, rtol=1e-4, atol=1e-7)


def test_who_can_hold_clean_text(random_llama) -> None:
    model = random_llama().train()
    check_clean_prefix(model)
    assert model.training
    windowed = MistralForCausalLM(
        MistralConfig(**SMALL, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, sliding_window=8)
    )
    with pytest.raises(ValueError, match="sliding-window"):
        check_clean_prefix(windowed)
    with pytest.raises(ValueError, match="lossless"):
        check_clean_prefix(MambaForCausalLM(MambaConfig(**SMALL)))
    with pytest.raises(
        ValueError, match="counts columns"
    ):  # ALiBi: what a wrong draft leaves would move the text behind it
        check_clean_prefix(MptForCausalLM(MptConfig(vocab_size=64, d_model=32, n_layers=2, n_heads=4, max_seq_len=64)))
