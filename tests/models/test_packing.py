"""Packed weights give the model's own outputs, follow every change of the weights, and leave nothing behind."""

import copy
import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from transformers import GPT2Config, GPT2LMHeadModel

from llm_diffusion.models import packing
from llm_diffusion.models.packing import (
    INT8_OPERATORS,
    OPERATORS,
    SUPPORT,
    can_pack,
    can_quantise,
    has_fast_bfloat16,
    int8_linear,
    packed,
)

BF16 = pytest.mark.skipif(not has_fast_bfloat16(), reason="this processor does not multiply bf16")
OFF_BY = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest


@pytest.fixture(params=[torch.float32, pytest.param(torch.bfloat16, marks=BF16)], ids=["fp32", "bf16"])
def model(random_llama, request):
    return random_llama(hidden_size=64).to(request.param)


def logits(model, rows: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(5, 5 + rows)[None]).logits


def test_the_private_names_of_torch_are_there():
    assert all(hasattr(torch.cpu, name) for name in SUPPORT)
    assert all(hasattr(torch.ops.mkldnn, name) for name in OPERATORS)
    assert all(hasattr(torch.ops.quantized, name) for name in INT8_OPERATORS)


@pytest.mark.parametrize("rows", [1, 2, 8, 33])
def test_outputs_are_the_model_s_own(model, rows):
    want = logits(model, rows)
    with torch.no_grad(), packed(model):
        assert "forward" in vars(model.lm_head)
        found = logits(model, rows)
    assert "forward" not in vars(model.lm_head)
    assert float((found - want).abs().max()) <= OFF_BY[model.dtype] * float(want.abs().max())


def in_place(model):
    model.model.layers[0].mlp.up_proj.weight.mul_(2)


def replaced(model):
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight * 3)


def as_peft_merges(model):
    model.model.layers[0].mlp.up_proj.weight.data += 1  # which counts no version


@pytest.mark.parametrize("change", [in_place, replaced, as_peft_merges])
def test_changed_weights_are_packed_again(model, change):
    with torch.no_grad(), packed(model):
        before = logits(model, 4)
    with torch.no_grad():
        change(model)
    want = logits(model, 4)
    with torch.no_grad(), packed(model):
        found = logits(model, 4)
    assert not torch.equal(found, before)
    assert float((found - want).abs().max()) <= OFF_BY[model.dtype] * float(want.abs().max())
    copy.deepcopy(model)  # packed weights themselves cannot be copied


def test_training_and_other_types_run_as_they_are(random_llama):
    model = random_llama()
    with packed(model):  # with gradients
        assert "forward" not in vars(model.lm_head)
    for shape in ((16384,), (0,)):  # as FSDP and DeepSpeed leave them between forwards
        layer = torch.nn.Linear(128, 128)
        assert can_pack(layer)
        layer.weight.data = torch.zeros(shape)
        assert not can_pack(layer)
    assert not can_pack(model.half().lm_head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_int8_products_are_close_and_follow_every_change(dtype, bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(96, 80, bias=bias, dtype=dtype), torch.randn(2, 5, 96, dtype=dtype)
    assert can_quantise(layer.weight) and not can_quantise(layer.weight.to("meta"))

    def off_by() -> float:
        found, want = int8_linear(layer, [layer.weight], lambda: layer.weight, layer.bias)(x), layer(x)
        assert found.dtype == want.dtype and found.shape == want.shape
        return float((found - want).float().norm() / want.float().norm())

    with torch.no_grad():
        assert 0 < off_by() < 0.03
        layer.weight.mul_(-2)
        assert 0 < off_by() < 0.03


@pytest.mark.parametrize("rows", [1, 8, 33])
def test_int8_products_of_the_largest_numbers_do_not_overflow(rows):
    layer, x = torch.nn.Linear(128, 48, bias=False), torch.ones(rows, 128)
    with torch.no_grad():
        layer.weight.fill_(1)
        found = int8_linear(layer, [layer.weight], lambda: layer.weight, None)(x)
    torch.testing.assert_close(found, torch.full((rows, 48), 128.0), rtol=0.01, atol=0)


def adapted(base, **options):
    fan_in_fan_out = base.config.model_type == "gpt2"
    lora = LoraConfig(**{"r": 4, "target_modules": "all-linear", "fan_in_fan_out": fan_in_fan_out, **options})
    model = get_peft_model(base, lora, adapter_name="one")
    if not lora.target_parameters:  # PEFT has one such adapter at most
        model.add_adapter("two", lora)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_magnitude" in name:
            parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def as_it_is(model):
    pass


def the_other(model):
    model.set_adapter("two")


def scaled(model):
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.scale_layer(0.5)


def off(model):
    model.base_model.disable_adapter_layers()


def trained(model):
    for name, parameter in model.named_parameters():
        if "lora_A.one" in name:
            parameter.data.mul_(2)


def merged(model):
    model.merge_adapter()


CHANGES = [as_it_is, the_other, scaled, off, trained]
KINDS = {
    "plain": {},
    "dora": {"use_dora": True},
    "parameters": {"target_modules": [], "target_parameters": ["up_proj.weight"]},
    "bias": {"lora_bias": True},  # which PEFT cannot merge itself
}


@pytest.mark.filterwarnings("ignore:.*lora_bias=True.*:UserWarning")
@pytest.mark.parametrize(
    ("kind", "change"),
    [
        *itertools.product(["plain", "dora", "bias"], CHANGES),
        *(("plain", merged), ("dora", merged), ("parameters", as_it_is), ("parameters", trained)),
    ],
)
def test_adapters_are_merged_into_the_copy_and_followed(model, kind, change):
    options = KINDS[kind]
    model = adapted(model, **options)
    with torch.no_grad(), packed(model, merge=True):
        first = logits(model, 4)
        layer = model.get_base_model().model.layers[0].mlp.up_proj
        assert ("forward" in vars(layer)) == (kind == "plain")
        assert ("forward" in vars(layer.base_layer)) == (kind in ("dora", "bias"))
    with torch.no_grad():
        change(model)
    want = logits(model, 4)
    with torch.no_grad(), packed(model, merge=True):
        found = logits(model, 4)
    assert change is merged or torch.equal(found, first) == (change is as_it_is)
    assert float((found - want).abs().max()) <= OFF_BY[model.dtype] * float(want.abs().max())


def test_adapters_of_transposed_layers_are_merged_too():
    config = GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=64, n_positions=32, bos_token_id=0, eos_token_id=0)
    model = adapted(GPT2LMHeadModel(config))
    want = logits(model, 4)
    with torch.no_grad(), packed(model, merge=True):
        assert "forward" in vars(model.get_base_model().transformer.h[0].attn.c_attn)
        torch.testing.assert_close(logits(model, 4), want, rtol=1e-4, atol=1e-4)


def test_without_room_the_weights_are_not_copied(random_llama, monkeypatch, caplog):
    packing._warn_of_no_room.cache_clear()
    model = random_llama()
    for share, wanted in (
        (0, False),
        (1e-9, False),
        (0.5, True),
        (0, True),
    ):  # at last: what was copied is there already
        monkeypatch.setattr(packing, "ROOM", share)
        with torch.no_grad(), packed(model):
            assert ("forward" in vars(model.lm_head)) == wanted, share
    assert caplog.text.count("without a packed copy of the weights") == 1


@pytest.mark.parametrize("first_out", [0, 1])
def test_calls_that_overlap_leave_nothing_behind(random_llama, first_out):
    model = adapted(random_llama())
    with torch.no_grad():
        want = logits(model, 4)
        calls = [packed(model, merge=True) for _ in range(2)]
        for call in calls:
            call.__enter__()
        calls[first_out].__exit__(None, None, None)
        torch.testing.assert_close(logits(model, 4), want)
        calls[1 - first_out].__exit__(None, None, None)
    assert not [name for name, module in model.named_modules() if "forward" in vars(module)]
