"""The habits of TRL's users: what works unchanged, what means something else here, and what is refused in words."""

import copy

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_trainers import LORA, make, pairs, tiny_model
from transformers import AutoModelForCausalLM

from llm_diffusion import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    UserError,
    load_diffusion_model,
)
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.objective.modes import IGNORE_INDEX

SETTINGS = {
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 3,
    "max_steps": 1,
    "use_cpu": True,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "gradient_checkpointing": False,
}


def small(folder, tokenizer, rows=None, tied=True):
    """An autoregressive checkpoint of random weights; `rows` of its vocabulary, which may end where the tokenizer's does."""
    model = tiny_model(tied)
    if rows is not None:
        model.resize_token_embeddings(rows)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def sft(folder, model, tokenizer=None, settings=None, **keywords):
    data = keywords.pop("train_dataset", tiny_dataset(8))
    args = DiffusionSFTConfig(str(folder), **SETTINGS, **(settings or {}))
    return DiffusionSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, **keywords)


def dpo(folder, model, tokenizer=None, settings=None, **keywords):
    args = DiffusionDPOConfig(str(folder), **SETTINGS, num_draws=2, **(settings or {}))
    return DiffusionDPOTrainer(model, args=args, train_dataset=pairs(8), processing_class=tokenizer, **keywords)


@pytest.mark.parametrize("build", [sft, dpo])
@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_virtual_tokens_are_refused_in_a_model_too(tmp_path, tokenizer, build, config):
    model = get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=8))
    with pytest.raises(UserError, match="virtual tokens"):
        build(tmp_path, model, tokenizer)


@pytest.mark.parametrize("build", [sft, dpo])
@pytest.mark.parametrize("tied", [True, False])
def test_the_mask_row_of_adapters_that_a_user_made_is_trained_and_saved(tmp_path, tokenizer, build, tied):
    model = get_peft_model(small(tmp_path / "base", tokenizer, rows=len(tokenizer), tied=tied), LORA)
    trainer = build(tmp_path / "out", model, tokenizer, {"learning_rate": 0.05, "weight_decay": 0.0})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [name for name, p in trainer.model.named_parameters() if name in before and not p.equal(before[name])]
    assert any("trainable_tokens_delta" in name for name in moved)
    trainer.save_model(tmp_path / "saved")
    again, _ = load_diffusion_model(str(tmp_path / "saved"), device="cpu")
    ids = torch.tensor([[5, 6, trainer.processing_class.mask_token_id, 7]])
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_rows_that_a_user_trains_without_the_mask_are_refused(tmp_path, tokenizer):
    config = LoraConfig(target_modules="all-linear", trainable_token_indices=[5])
    with pytest.raises(UserError, match="add the mask token's"):
        sft(tmp_path, get_peft_model(tiny_model(), config), tokenizer)


@pytest.mark.parametrize(
    "settings", [{}, {"attention": "block", "ar_loss_weight": 0.5}, {"eval_accumulation_steps": 1}]
)
@pytest.mark.parametrize("reduced", [False, True])
def test_metrics_are_computed_of_masked_tokens_alone(tmp_path, tokenizer, settings, reduced):
    seen = []

    def metrics(prediction):
        logits, labels = torch.tensor(prediction.predictions), torch.tensor(prediction.label_ids)
        masked = labels != IGNORE_INDEX
        guess = logits if reduced else logits.argmax(-1)
        seen.append(masked.sum().item())
        right = (guess[masked] == labels[masked]).float().mean()
        if reduced:
            return {"right": right}
        return {"right": right, "nll": torch.nn.functional.cross_entropy(logits[masked], labels[masked])}

    reduce = {"preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1)} if reduced else {}
    data = tiny_dataset(8, split="test")  # batches of 3, 3 and 2 rows
    trainer = sft(tmp_path, "tiny", None, settings, eval_dataset=data, compute_metrics=metrics, **reduce)
    values = trainer.evaluate()
    assert values["eval_right"] == pytest.approx(values["eval_masked_accuracy"], abs=1e-6) and values["eval_right"] > 0
    if not reduced:
        assert values["eval_nll"] == pytest.approx(values["eval_masked_nll"], rel=1e-5)
    trainer.evaluate()
    assert seen[0] == seen[1] > 50  # the noise is fixed


def test_resuming_without_a_checkpoint_is_refused(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer)
    with pytest.raises(UserError, match="no checkpoint"):
        trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("name", ["tiny", "tuned"])
def test_preferences_of_a_model_that_never_saw_noise_are_warned_of(tmp_path, tokenizer, caplog, name):
    if name == "tuned":
        trainer = sft(tmp_path / "sft", "tiny")
        trainer.train()
        trainer.save_model(tmp_path / name)
        name = str(tmp_path / name)
    dpo(tmp_path, name)
    assert ("seen no noise" in caplog.text) == (name == "tiny")


@pytest.mark.parametrize("build", [sft, dpo])
def test_an_optimizer_that_lost_the_vocabulary_is_refused(tmp_path, tokenizer, build):
    grows, room = (small(tmp_path / str(rows), tokenizer, rows, tied=False) for rows in (len(tokenizer), 512))
    with pytest.raises(UserError, match="`optimizers`"):
        build(tmp_path, grows, tokenizer, optimizers=(torch.optim.SGD(grows.parameters(), lr=0.1), None))
    build(tmp_path, room, copy.deepcopy(tokenizer), optimizers=(torch.optim.SGD(room.parameters(), lr=0.1), None))
