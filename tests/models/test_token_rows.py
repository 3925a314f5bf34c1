"""A trained row of a tied vocabulary: PEFT's scores, gradients and file, without its copies of the matrix."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config, Qwen3ForCausalLM

from llm_diffusion.models.token_rows import train_rows_alone, trained_rows

V, D = 97, 32
ROWS = [7, 90]


class Copies(TorchDispatchMode):
    """New tensors of the shape of the vocabulary."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        known = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(output):
            if isinstance(x, torch.Tensor) and {*x.shape} == {V, D}:
                self.count += x.untyped_storage()._cdata not in known
        return output


@pytest.fixture
def pair():
    """PEFT's own way, and a copy that trains its rows alone; adapters away from their start."""
    torch.manual_seed(0)
    shape = {
        "hidden_size": D,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
    }
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=V, num_key_value_heads=1, tie_word_embeddings=True, **shape))
    lora = LoraConfig(r=2, target_modules="all-linear", trainable_token_indices=ROWS, init_lora_weights=False)
    plain = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "trainable_tokens" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    lean = copy.deepcopy(plain)
    train_rows_alone(lean)
    return plain, lean


IDS = torch.tensor([[7, 3, 90, 7, 5], [4, 90, 11, 12, 13]])


def test_logits_and_gradients_are_pefts(pair):
    found = []
    for model in pair:
        logits = model(input_ids=IDS).logits
        logits.square().sum().backward()
        found.append((logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.requires_grad}))
    (one, grads), (other, lean_grads) = found
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert any("trainable_tokens" in name and grad.abs().sum() > 0 for name, grad in grads.items())
    torch.testing.assert_close(lean_grads, grads, rtol=1e-3, atol=1e-3)


def test_no_copy_of_the_matrix(pair):
    counts = []
    for model in pair:
        with Copies() as copies:
            model(input_ids=IDS).logits.sum().backward()
        counts.append(copies.count)
    assert counts[0] > 0 == counts[1]


def test_switched_off_and_merged_rows(pair):
    """The base is heard without its rows, and a merged model has them in its matrix."""
    plain, lean = pair
    with torch.no_grad():
        with plain.disable_adapter(), lean.disable_adapter():
            assert trained_rows(lean.get_base_model().get_output_embeddings())[1] is None
            torch.testing.assert_close(lean(input_ids=IDS).logits, plain(input_ids=IDS).logits)
        want = plain(input_ids=IDS).logits
        torch.testing.assert_close(lean.merge_and_unload()(input_ids=IDS).logits, want, rtol=1e-4, atol=1e-4)


def test_rows_and_their_numbers(pair):
    _, lean = pair
    head, rows, index = trained_rows(lean.get_base_model().get_output_embeddings())
    assert type(head) is torch.nn.Linear and index.tolist() == ROWS and rows.shape == (2, D)
