"""The kernel patch: every argument passes through, causal masks become symmetric, and no other model sees it."""

import copy
import tempfile

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from llm_diffusion.models.attention import BidirectionalSDPA, patch_causal_attention
from llm_diffusion.models.probing import probe_attention
from llm_diffusion.objective.attention_masks import block_causal, symmetric

IDS = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))


def test_the_sdpa_patch_passes_every_argument_through():
    torch.manual_seed(0)
    q, kv = torch.randn(1, 4, 6, 8), torch.randn(1, 2, 6, 8)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    want = sdpa(q, kv, kv, scale=0.3, enable_gqa=True)
    with BidirectionalSDPA():
        assert torch.equal(sdpa(q, kv, kv, is_causal=True, scale=0.3, enable_gqa=True), want)
        assert torch.equal(sdpa(q, kv, kv, None, 0.0, True, scale=0.3, enable_gqa=True), want)
        assert torch.equal(sdpa(query=q, key=kv, value=kv, is_causal=True, scale=0.3, enable_gqa=True), want)
        torch.manual_seed(1)
        dropped = sdpa(q, kv, kv, dropout_p=0.5, is_causal=True, enable_gqa=True)
    torch.manual_seed(1)
    assert torch.equal(dropped, sdpa(q, kv, kv, dropout_p=0.5, enable_gqa=True))


@pytest.mark.parametrize("additive_mask", [False, True])
@pytest.mark.parametrize("open_rows", [False, True])
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


def test_the_sdpa_patch_is_of_one_model(random_llama):
    patched, plain, ids = random_llama(), random_llama(), IDS[:, :7]
    kernel, want = torch.nn.functional.scaled_dot_product_attention, plain(ids).logits
    with patch_causal_attention(patched, "sdpa"):
        assert torch.nn.functional.scaled_dot_product_attention is kernel
        assert torch.equal(plain(ids).logits, want)
        assert not torch.equal(patched(ids).logits, want)
    assert torch.equal(patched(ids).logits, want)


def test_the_sdpa_patch_under_4_bit(random_llama):
    pytest.importorskip("bitsandbytes")
    with tempfile.TemporaryDirectory() as folder:
        random_llama().save_pretrained(folder)
        quantized = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
        model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantized)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    assert patch_causal_attention(model, "sdpa").mechanism == "sdpa"
    gradients = []
    for checkpointing in (False, True):
        peft = get_peft_model(copy.deepcopy(model), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        assert probe_attention(peft) == "bidirectional"
        if checkpointing:
            peft.get_base_model().activation_checkpointing_enable({"use_reentrant": False})
            peft.enable_input_require_grads()
        torch.manual_seed(5)
        for parameter in peft.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        torch.nn.functional.cross_entropy(
            peft.train()(IDS, use_cache=False).logits[:, 0].float(), IDS[:, -1]
        ).backward()
        gradients.append(torch.cat([p.grad.flatten().float() for p in peft.parameters() if p.grad is not None]))
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)
    assert gradients[0].abs().max() > 0
