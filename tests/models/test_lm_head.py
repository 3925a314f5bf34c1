"""The vocabulary in pieces: against whole logits and autograd, on architectures that treat their logits in their own ways."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3ForCausalLM

from llm_diffusion.models import lm_head
from llm_diffusion.models.forward import add_row_scores, forward_state
from llm_diffusion.models.lm_head import NAMES, train_rows_alone, trained_rows

V, D = 97, 32
SHAPE = {
    "hidden_size": D,
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
    "qwen3": {},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0},
    "gemma2": {"final_logit_softcapping": 30.0},
    "phi": {},  # a bias
    "gpt2": {"n_embd": D, "n_head": 2, "n_layer": 1},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    },  # a backbone with more outputs
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(lm_head, "PIECE", 4 * V)


def random_model(kind, tied=False):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**SHAPE, **MODELS[kind]})
    config.tie_word_embeddings = tied
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(5) if parameter.dim() > 1 else parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def some_targets(seed=1):
    """(2, 9) ids, and targets at about half of them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, V, (2, 9), generator=generator)
    targets = torch.randint(3, V, (2, 9), generator=generator)
    return ids, targets.masked_fill(torch.rand((2, 9), generator=generator) < 0.5, -100)


def from_logits(model, ids, targets):
    """The scores, from full logits and by autograd alone."""
    keep = targets != -100
    logits = model(input_ids=ids).logits[keep]
    logs = logits.log_softmax(-1)
    nll = -logs.gather(1, targets[keep][:, None])[:, 0]
    return dict(
        zip(
            NAMES, (nll, logits.argmax(-1) == targets[keep], -(logs.exp() * logs).sum(-1), logits.mean(-1)), strict=True
        )
    )


def gradients(model, nll):
    """Of the NLL weighed as differently as 1 / t weighs it."""
    weights = torch.rand(nll.shape, generator=torch.Generator().manual_seed(4))
    model.zero_grad()
    (nll * weights).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(model, reference=None, pieces=True):
    """That scores and gradients of a model, readied here, are those of full logits."""
    ids, targets = some_targets()
    want = from_logits(model if reference is None else reference, ids, targets)
    wanted = gradients(model if reference is None else reference, want["nll"])
    add_row_scores(model)
    assert forward_state(model).scores_in_pieces is pieces
    found = model(input_ids=ids, score_targets=targets)
    assert torch.equal(torch.stack(found.pop("at")), (targets != -100).nonzero().T)
    found_gradients = gradients(model, found["nll"])
    torch.testing.assert_close(found, want, rtol=1e-4, atol=1e-4)
    assert found_gradients.keys() == wanted.keys() and wanted
    torch.testing.assert_close(found_gradients, wanted, rtol=1e-3, atol=1e-4)
    # The forward without targets is what it was.
    torch.testing.assert_close(from_logits(model, ids, targets), want, rtol=1e-4, atol=1e-4)
    return wanted


@pytest.mark.parametrize("trains", ["everything", "all but the head", "adapters"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_architecture_keeps_what_it_does_to_its_logits(kind, trains):
    model = random_model(kind)
    if trains == "all but the head":
        model.get_output_embeddings().requires_grad_(False)
    if trains == "adapters":
        options = {"target_modules": r".*(v_proj|c_attn)", "fan_in_fan_out": kind == "gpt2"}
        model = get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, **options)).eval()
    check(model)


def test_an_adapted_head():
    check(
        get_peft_model(
            random_model("qwen3"), LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False)
        ).eval()
    )


class Scaled(Qwen3ForCausalLM):
    """Changes its logits token by token."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        output = super().forward(*args, logits_to_keep=logits_to_keep, **kwargs)
        output.logits = output.logits * torch.linspace(0.5, 1, V)
        return output


class Mixing(Qwen3ForCausalLM):
    """Changes its logits by those of other positions, which no head alone can."""

    def forward(self, *args, logits_to_keep=0, **kwargs):
        output = super().forward(*args, **kwargs)
        logits = output.logits + output.logits.mean(1, keepdim=True)
        output.logits = logits[logits_to_keep] if isinstance(logits_to_keep, torch.Tensor) else logits
        return output


class Unkeeping(Qwen3ForCausalLM):
    """Computes all logits."""

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, **kwargs)


@pytest.mark.parametrize(("kind", "pieces"), [(Scaled, True), (Mixing, False), (Unkeeping, False)])
def test_forwards_of_their_own_kind(kind, pieces):
    model = random_model("qwen3")
    model.__class__ = kind
    check(model, pieces=pieces)


def test_no_target_at_all_still_has_a_gradient():
    model = random_model("qwen3")
    model.get_output_embeddings().requires_grad_(False)
    add_row_scores(model)
    ids = some_targets()[0]
    nll = model(input_ids=ids, score_targets=torch.full_like(ids, -100))["nll"]
    assert nll.shape == (0,)
    assert all(not grad.any() for grad in gradients(model, nll).values())


class Tables(TorchDispatchMode):
    """The most rows of any tensor as wide as the vocabulary, and how many new tensors have the vocabulary's own shape."""

    rows = copies = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(output):
            if not isinstance(x, torch.Tensor) or V not in x.shape:
                continue
            if {*x.shape} == {V, D}:
                self.copies += x.untyped_storage()._cdata not in known
            elif x.shape[-1] == V:
                self.rows = max(self.rows, x.numel() // V)
        return output


@pytest.mark.parametrize("trains_head", [False, True])
def test_nothing_is_as_large_as_the_logits(trains_head):
    model = random_model("qwen3")
    model.get_output_embeddings().requires_grad_(trains_head)
    ids, _ = some_targets()
    for pieces in (True, False):
        add_row_scores(model)
        forward_state(model).scores_in_pieces = pieces
        with Tables() as tables:
            model(input_ids=ids, score_targets=ids)["nll"].sum().backward()
        assert tables.rows == (4 if pieces else ids.numel())


# -- trained rows of a tied vocabulary

ROWS = [7, 90]


def with_rows(kind="qwen3"):
    """PEFT's own way, and a copy that trains its rows alone; adapters away from their start."""
    lora = LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=ROWS, fan_in_fan_out=kind == "gpt2")
    plain = get_peft_model(random_model(kind, tied=True), lora).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lean = copy.deepcopy(plain)
    train_rows_alone(lean)
    return plain, lean


IDS = torch.tensor([[7, 3, 90, 7, 5], [4, 90, 11, 12, 13]])


@pytest.mark.parametrize("kind", ["qwen3", "gemma2", "gpt2", "cohere"])
def test_rows_beside_the_matrix_have_pefts_scores_and_gradients(kind):
    plain, lean = with_rows(kind)
    wanted = check(lean, reference=plain)
    assert any("trainable_tokens" in name and grad.norm() > 0.1 for name, grad in wanted.items())
    found = []
    for model in (plain, lean):
        logits = model(input_ids=IDS).logits
        found.append((logits.detach(), gradients(model, logits.square().sum(-1).flatten())))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_no_copy_of_the_matrix():
    counts = []
    for model in with_rows():
        with Tables() as tables:
            model(input_ids=IDS).logits.sum().backward()
        counts.append(tables.copies)
    assert counts[0] > 0 == counts[1]


def test_switched_off_and_merged_rows():
    """With adapters off the base has its own rows, and a merged model has the trained ones in its matrix."""
    plain, lean = with_rows()
    head, rows, index = trained_rows(lean.get_base_model().get_output_embeddings())
    assert type(head) is torch.nn.Linear and index.tolist() == ROWS and rows.shape == (2, D)
    with torch.no_grad():
        with plain.disable_adapter(), lean.disable_adapter():
            assert trained_rows(lean.get_base_model().get_output_embeddings())[1] is None
            torch.testing.assert_close(lean(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        want = plain(input_ids=IDS).logits
        torch.testing.assert_close(lean.merge_and_unload()(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)
