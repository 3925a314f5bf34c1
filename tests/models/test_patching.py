"""Changes that can be taken back, and wrapped forwards: against the model without them."""

import copy
import functools
import inspect

import pytest
import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model

from llm_diffusion.models.forward import ForwardState
from llm_diffusion.models.patching import Patch, embedding_table, wrap_forward


class Plain(torch.nn.Module):
    """A model without `logits_to_keep`."""

    class Output:
        def __init__(self, logits):
            self.logits = logits

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(4, 7)
        self.register_buffer("table", torch.arange(3))

    def forward(self, hidden, scale=1.0):
        return self.Output(self.head(hidden) * scale)


def doubled(self, *args, **kwargs):
    output = self.diffusion_forward.original(*args, **kwargs)
    output.logits = 2 * output.logits
    return output


def test_attributes_and_buffers_are_put_back():
    model, patch = Plain(), Patch()
    before = set(vars(model))
    with patch:
        patch.set(model, "table", torch.zeros(3))
        patch.set(model, "note", "new")
        assert not model.table.any() and model.note == "new"
    assert model.table.tolist() == [0, 1, 2] and set(vars(model)) == before


@pytest.mark.parametrize("hooked", [False, True])
def test_a_wrapped_forward_has_the_signature_of_the_class(hooked):
    """accelerate's hooks put a partial in the forward's place; names must still fit positions."""
    model, hidden = Plain(), torch.randn(2, 3, 4)
    want = model(hidden, 3.0).logits
    if hooked:
        model.forward = functools.update_wrapper(functools.partial(Plain.forward, model), Plain.forward.__get__(model))
    patch = Patch()
    wrap_forward(patch, model, doubled, ForwardState())
    assert list(inspect.signature(model.forward).parameters) == ["hidden", "scale"]
    torch.testing.assert_close(model(hidden, 3.0).logits, 2 * want)
    twin = copy.deepcopy(model)
    torch.nn.init.zeros_(twin.head.weight)
    torch.testing.assert_close(model(hidden, 3.0).logits, 2 * want)  # a copy has weights and forward of its own
    assert not torch.equal(twin(hidden).logits, model(hidden).logits)
    patch.undo()
    assert torch.equal(model(hidden, 3.0).logits, want)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(target_modules="all-linear"),
        LoraConfig(target_modules="all-linear", trainable_token_indices=[5]),
        LoraConfig(target_modules=["q_proj", "embed_tokens"]),
        TrainableTokensConfig(token_indices=[5], target_modules=["embed_tokens"]),
    ],
    ids=["linear layers", "a row", "the embedding", "rows alone"],
)
def test_the_embedding_is_the_bases_own_matrix(random_llama, config):
    base = random_llama()
    matrix = base.get_input_embeddings().weight
    assert embedding_table(base) is matrix
    assert embedding_table(get_peft_model(base, config)) is matrix
