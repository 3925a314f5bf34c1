"""Half precision: every objective gives the loss and the gradient of fp32, up to rounding."""

import pytest
import torch
from peft import LoraConfig
from small_trainers import make, tiny_model

from llm_diffusion import UserError
from llm_diffusion.data.tiny import tiny_dataset

OBJECTIVES = {
    "bidirectional": {},
    "time embedding": {"time_embedding": True},
    "complements": {"complementary_masks": True},
    "first steps": {"first_step_share": 0.5},
    "snr": {"loss_weight": "snr"},
    "soft annealing": {"annealing": "soft", "annealing_steps": 4},
    "random annealing": {"annealing": "stochastic", "annealing_steps": 4},
    "growing blocks": {"annealing": "block", "annealing_steps": 4, "max_length": 32},
    "packed": {"packing": True, "max_length": 64},
    "blocks": {"attention": "block"},
    "blocks and next tokens": {"attention": "block", "ar_loss_weight": 1.0},
    "block-causal context": {"attention": "block", "clean_context": "block"},
    "lossless": {"attention": "lossless"},
    "distilled": {"distillation_weight": 0.5},
}
ADAPTED = ("lossless", "distilled")


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """Loss and gradient norm of a first step, by objective and type."""
    found = {}

    def loss(tokenizer, name, dtype):
        if (name, dtype) not in found:
            lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"]) if name in ADAPTED else None
            trainer = make(
                tmp_path_factory.mktemp("run"),
                tokenizer,
                tiny_model().to(dtype),
                lora,
                tiny_dataset(8),
                optim="sgd",
                **OBJECTIVES[name],
            )
            trainer.train()
            logged = trainer.state.log_history[0]
            found[name, dtype] = (logged["loss"], logged["grad_norm"])
        return torch.tensor(found[name, dtype])

    return loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_first_step_in_half_precision(losses, tokenizer, name, dtype):
    want, found = losses(tokenizer, name, torch.float32), losses(tokenizer, name, dtype)
    assert want.isfinite().all() and want.abs().min() > 0
    torch.testing.assert_close(found, want, rtol=0.04 if dtype == torch.bfloat16 else 0.01, atol=0)


def test_float16_weights_are_not_trained_and_adapters_over_them_are(tmp_path, tokenizer):
    make(tmp_path, tokenizer, tiny_model().half(), LoraConfig(r=2, target_modules=["q_proj"]), tiny_dataset(8)).train()
    with pytest.raises(UserError, match="`model`: its float16 weights"):
        make(tmp_path, tokenizer, tiny_model().half(), None, tiny_dataset(8)).train()
