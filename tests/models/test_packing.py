"""Packed weights give the model's own outputs, follow every change of the weights, and leave nothing behind."""

import copy

import pytest
import torch

from llm_diffusion.models.packing import OPERATORS, SUPPORT, can_pack, has_fast_bfloat16, packed

needs_bf16 = pytest.mark.skipif(not has_fast_bfloat16(), reason="this processor does not multiply bf16")


@pytest.fixture
def model(random_llama):
    return random_llama(hidden_size=64).to(torch.bfloat16)


def logits(model, rows: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 5 + rows)[None]).logits


def test_the_private_names_of_torch_are_there():
    assert all(hasattr(torch.cpu, name) for name in SUPPORT)
    assert all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)


@needs_bf16
@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_outputs_are_the_model_s_own(model, rows):
    want = logits(model, rows)
    with torch.no_grad(), packed(model):
        assert "forward" in vars(model.lm_head)
        found = logits(model, rows)
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(found.float(), want.float(), rtol=0.02, atol=0.02 * float(want.abs().max()))


@needs_bf16
def test_changed_weights_are_packed_again(model):
    with torch.no_grad(), packed(model):
        before = logits(model, 4)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)  # in place
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 3)  # replaced
    want = logits(model, 4)
    with torch.no_grad(), packed(model):
        found = logits(model, 4)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found.float(), want.float(), rtol=0.02, atol=0.02 * float(want.abs().max()))
    copy.deepcopy(model)  # packed weights themselves cannot be copied


def test_training_and_other_types_run_as_they_are(model, random_llama):
    with packed(model):  # with gradients
        assert "forward" not in vars(model.lm_head)
    assert not can_pack(random_llama().lm_head)  # fp32
