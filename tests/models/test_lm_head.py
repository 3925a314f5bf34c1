"""The vocabulary in pieces: against whole logits and autograd, on architectures that treat their logits in their own ways."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from llm_diffusion.models import lm_head as vocabulary_head
from llm_diffusion.models.lm_head import LogitRule, add_row_scores, row_scores
from llm_diffusion.models.token_rows import train_rows_alone

V, D, N = 97, 16, 40


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(vocabulary_head, "PIECE", 7 * V)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    return hidden, weight, bias, torch.randint(0, V, (N,), generator=generator)


def whole(hidden, weight, bias, targets, rows=None, index=None, rule=None):
    """Full logits and autograd."""
    if rows is not None:
        weight = weight.index_copy(0, index, rows)
    z = F.linear(hidden, weight, bias) * (rule.scale if rule else 1)
    if rule and rule.cap:
        z = rule.cap * torch.tanh(z / rule.cap)
    logs = z.log_softmax(-1)
    nll = -logs.gather(1, targets[:, None])[:, 0]
    return nll, z.argmax(-1) == targets, -(logs.exp() * logs).sum(-1), z.mean(-1)


@pytest.mark.parametrize("rule", [LogitRule(), LogitRule(0.25), LogitRule(2.0, 5.0)])
@pytest.mark.parametrize("with_rows", [False, True])
@pytest.mark.parametrize("trains", ["hidden", "everything"])
def test_scores_and_gradients_are_those_of_whole_logits(rule, with_rows, trains):
    hidden, weight, bias, targets = tensors()
    index = torch.tensor([5, 60]) if with_rows else None
    rows = torch.randn(2, D, generator=torch.Generator().manual_seed(3)) if with_rows else None
    targets[:3] = 60
    given = torch.rand(N, generator=torch.Generator().manual_seed(4))  # as different as 1 / t makes them
    found = []
    for function in (row_scores, whole):
        leaves = [x.clone() for x in (hidden, weight, bias, *((rows,) if with_rows else ()))]
        for i, leaf in enumerate(leaves):
            leaf.requires_grad_(trains == "everything" or i in (0, 3))
        own = {"rows": leaves[3], "index": index} if with_rows else {}
        if function is row_scores:
            nll, right, *others = row_scores(leaves[0], leaves[1], targets, bias=leaves[2], rule=rule, **own)
        else:
            nll, right, *others = whole(leaves[0], leaves[1], leaves[2], targets, rule=rule, **own)
        (nll * given).sum().backward()
        found.append([nll, right.float(), *others, *(leaf.grad for leaf in leaves if leaf.grad is not None)])
    assert len(found[0]) == len(found[1]) == 4 + (3 if trains == "everything" else 1) + with_rows
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=2e-5)


def test_no_row_at_all_still_has_a_gradient():
    hidden, weight, _, targets = tensors()
    hidden.requires_grad_(True)
    nll, *_ = row_scores(hidden[:0], weight, targets[:0])
    nll.sum().backward()
    assert hidden.grad.abs().sum() == 0


class _Widest(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.dim() and tensor.shape[-1] == V and tensor.shape != (D, V):
                self.rows = max(self.rows, tensor.numel() // V)
        return output


def test_nothing_is_as_large_as_the_logits():
    hidden, weight, _, targets = tensors()
    hidden.requires_grad_(True)
    for function, rows in (
        (lambda: row_scores(hidden, weight, targets)[0], 7),
        (lambda: whole(hidden, weight, None, targets)[0], N),
    ):
        with _Widest() as widest:
            function().sum().backward()
        assert widest.rows == rows


SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": V,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MODELS = {
    "qwen3": ({}, LogitRule()),
    "cohere": ({"logit_scale": 0.0625}, LogitRule(0.0625)),
    "granite": ({"logits_scaling": 8.0}, LogitRule(0.125)),
    "gemma2": ({"final_logit_softcapping": 30.0}, LogitRule(1.0, 30.0)),
    "phi": ({}, LogitRule()),  # a bias
    "gpt2": ({"n_embd": 32, "n_head": 2, "n_layer": 1}, LogitRule()),
}


def random_model(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind][0]})
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def scores_of_logits(model, ids, targets):
    keep = targets != -100
    logs = model(input_ids=ids).logits[keep].log_softmax(-1)
    return -logs.gather(1, targets[keep][:, None])[:, 0]


@pytest.mark.parametrize("kind", MODELS)
def test_every_architecture_keeps_what_it_does_to_its_logits(kind):
    model = random_model(kind)
    ids = torch.randint(3, V, (2, 9))
    targets = torch.randint(3, V, (2, 9)).masked_fill(torch.rand(2, 9) < 0.5, -100)
    want = scores_of_logits(model, ids, targets)
    add_row_scores(model)
    assert model.logit_rule.scale == pytest.approx(MODELS[kind][1].scale)
    assert model.logit_rule.cap == pytest.approx(MODELS[kind][1].cap)
    torch.testing.assert_close(model(input_ids=ids, score_targets=targets)["nll"], want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        scores_of_logits(model, ids, targets), want
    )  # the forward without targets is what it was


def test_what_a_rule_cannot_say_is_scored_by_logits():
    """A forward that changes its logits token by token, and a head under LoRA."""

    class Strange(Qwen3ForCausalLM):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * torch.linspace(0.5, 1, V)
            return output

    strange = random_model("qwen3")
    strange.__class__ = Strange
    adapted = get_peft_model(
        random_model("qwen3"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
    )
    ids = torch.randint(3, V, (1, 9))
    for model in (strange, adapted.eval()):
        want = scores_of_logits(model, ids, ids)
        add_row_scores(model)
        torch.testing.assert_close(model(input_ids=ids, score_targets=ids)["nll"], want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_both_ways_say_the_same(kind):
    """The same model in pieces, and by whole logits of the rows with a target."""
    model = random_model(kind)
    add_row_scores(model)
    ids = torch.randint(3, V, (2, 9))
    targets = torch.randint(3, V, (2, 9)).masked_fill(torch.rand(2, 9) < 0.5, -100)
    pieces = model(input_ids=ids, score_targets=targets)
    model.logit_rule = None
    whole = model(input_ids=ids, score_targets=targets)
    assert pieces.keys() == whole.keys() == {"nll", "right", "entropy", "mean_logits", "at"}
    torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2"])
def test_a_trained_row_of_a_tied_vocabulary(kind):
    """Beside its matrix, in both its places: the scores and gradients of PEFT's own copy of the matrix."""
    model = random_model(kind)
    model.tie_weights()
    lora = LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=[7, 90])
    if kind == "gpt2":
        lora.fan_in_fan_out = True
    peft = get_peft_model(model, lora).eval()
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lean = copy.deepcopy(peft)
    train_rows_alone(lean)
    add_row_scores(lean)
    ids = torch.randint(3, V, (2, 9))
    ids[0, 4] = ids[1, 0] = 7
    targets = torch.randint(3, V, (2, 9)).masked_fill(torch.rand(2, 9) < 0.5, -100)
    targets[0, 3] = 90
    want = scores_of_logits(peft, ids, targets)
    got = lean(input_ids=ids, score_targets=targets)["nll"]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    want.sum().backward()
    got.sum().backward()
    grads = {name: p.grad for name, p in peft.named_parameters() if p.requires_grad}
    assert any("trainable_tokens" in name and grad.norm() > 0.1 for name, grad in grads.items())
    for name, parameter in lean.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, grads[name], rtol=1e-3, atol=1e-4)
