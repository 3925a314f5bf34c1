"""Training drafters: two passes against one with gated adapters, what is drafted, what is asked, and reloading."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from small_trainers import LORA, make, moved, step_batch, tiny_model
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.loading import load_diffusion_model
from llm_diffusion.models.patching import base_of
from llm_diffusion.models.probing import probe_attention
from llm_diffusion.objective.modes import IGNORE_INDEX
from llm_diffusion.speculative.adapters import AdapterSwitch
from llm_diffusion.speculative.training import accepted_lengths


def drafter(tmp_path: Any, tokenizer: Any, **settings: Any) -> Any:
    return make(tmp_path, tokenizer, peft_config=LORA, attention="lossless", **{"block_length": 4, **settings})


def gradient(trainer: Any) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("settings", [{}, {"packing": True, "max_length": 96, "packing_strategy": "bfd"}])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_two_passes_are_one_with_gated_adapters(tmp_path, tokenizer, settings, checkpointing) -> None:
    """The loss and its gradient, also where layers are run twice."""
    trainer = moved(drafter(tmp_path, tokenizer, gradient_checkpointing=checkpointing, **settings))
    batch = step_batch(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    loss.backward()
    ours = gradient(trainer)
    trainer.model.zero_grad()
    noisy = trainer._corrupt(batch, "train")
    keep, length = noisy["targets"] != IGNORE_INDEX, batch["input_ids"].shape[1]
    base_of(trainer.model).activation_checkpointing_disable()
    with AdapterSwitch(trainer.model) as switch:
        width = noisy["inputs"]["input_ids"].shape[1]
        # The switch gates the last rows: clean ones first.
        order = torch.cat([torch.arange(width - length, width), torch.arange(width - length)])
        inputs = {name: value[:, order] for name, value in noisy["inputs"].items() if value.dim() == 2}
        inputs["attention_mask"] = noisy["inputs"]["attention_mask"][:, :, order][:, :, :, order]
        switch.first = length
        logits = torch.empty(*noisy["targets"].shape, 512).index_copy(1, order, trainer.model(**inputs).logits)[keep]
        want = torch.nn.functional.cross_entropy(logits, noisy["targets"][keep], reduction="sum")
        want.backward()
    assert keep.sum() > 30
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    torch.testing.assert_close(ours, gradient(trainer), rtol=1e-3, atol=1e-3 * float(ours.abs().max()))


def test_what_is_drafted_and_what_is_asked(tmp_path, tokenizer) -> None:
    """Blocks start anywhere; their first token is never asked, nor what stands behind the answer; most are masked whole."""
    trainer = drafter(tmp_path, tokenizer, full_mask_share=0.8)
    collator = trainer.diffusion_collator
    rows = [trainer.train_dataset[i] for i in range(16)]
    batch, b = collator(rows), 4
    starts, whole, blocks, known = set(), 0, 0, 0
    for step in range(20):
        noisy = collator.corrupt(batch, seed=0, step=step, rows=torch.arange(16), n_rows=16)
        n = noisy["inputs"]["input_ids"].shape[1] - batch["input_ids"].shape[1]
        assert (noisy["targets"][:, n:] == IGNORE_INDEX).all()  # the clean half is the base's
        sees = noisy["inputs"]["attention_mask"][:, 0] == 0
        for row, labels in enumerate(batch["labels"]):
            ids = batch["input_ids"][row]
            answer = (labels != IGNORE_INDEX).nonzero().flatten()
            end = next(int(i) for i in answer if int(ids[i]) in collator.end_token_ids)
            asked = set(noisy["tokens"][row, :n][noisy["targets"][row, :n] != IGNORE_INDEX].tolist())
            assert max(asked, default=0) <= end
            place = noisy["inputs"]["position_ids"][row, :n].tolist()
            # Of the mask itself: whoever sees each other in the noisy half is a block.
            groups = {tuple(sorted(place[k] for k in sees[row, q, :n].nonzero().flatten().tolist())) for q in range(n)}
            for group in groups:
                if not group or group[0] < answer[0] or group[-1] > end:
                    continue
                starts.add(group[0] % b)
                assert len(group) <= b and group[0] not in asked
                masked = noisy["masked"][row, list(group)]
                blocks += len(group) == b
                whole += len(group) == b and bool(masked[1:].all())
                known += len(group) == b and bool(masked[1:].all()) and not masked[0]
    assert starts == {0, 1, 2, 3}
    assert 0.8 < whole / blocks < 0.95  # 0.8, and some of the others by chance
    assert 0.3 < known / whole < 0.7


@pytest.mark.parametrize("divergence", ["kl", "tv"])
def test_the_base_teaches_from_the_clean_pass(tmp_path, tokenizer, divergence) -> None:
    settings = {"distillation_weight": 1.0, "distillation_divergence": divergence, "full_mask_share": 1.0}
    trainer = moved(drafter(tmp_path, tokenizer, **settings))
    batch = step_batch(trainer)
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    noisy = trainer._corrupt(batch, "train")
    keep = noisy["targets"] != IGNORE_INDEX
    assert noisy["teacher_mask"][keep].all()  # whole blocks see nothing to the right
    scores = trainer._score(trainer.model, noisy)
    rows, tokens = keep.nonzero()[:, 0], noisy["tokens"][keep]
    logits = tiny_model().eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    logits = logits[rows, tokens - 1]
    logits[:, trainer.diffusion_collator.record.mask_token_id] = -torch.inf
    p, q = logits.softmax(-1), trainer._score(trainer.model, noisy, with_teacher=True).logits.softmax(-1)
    want = -(p * q.log()).sum(-1) if divergence == "kl" else (p - q).clamp(min=0).sum(-1)
    assert loss.item() == pytest.approx(want.sum().item(), rel=1e-3)
    assert scores.logits is None


def test_the_loss_is_a_mean_over_what_is_asked(tmp_path, tokenizer) -> None:
    """So that training and evaluation, short and long answers can be compared."""
    trainer = drafter(tmp_path, tokenizer, block_length=8)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(row["masked_nll"], rel=1e-4)


def test_growing_drafts_start_with_something_to_draft(tmp_path, tokenizer) -> None:
    settings = {"annealing": "block", "max_steps": 6, "distillation_weight": 0.5}
    trainer = drafter(tmp_path, tokenizer, block_length=8, **settings)
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert [row["annealed_block_length"] for row in rows][0] == 2
    assert all(row["grad_norm"] > 0 and row.get("accepted_length", 1) >= 1 for row in rows)


def test_the_next_question_is_not_seen(tmp_path, tokenizer) -> None:
    """In decoding only masks stand behind a draft, also in the middle of a conversation."""
    collator = drafter(tmp_path, tokenizer, block_length=8, full_mask_share=1.0).diffusion_collator
    end = collator.end_token_ids[0]
    ids = [5, 6, 7, 11, 12, 13, end, 21, 22, 23, 24, 25, 31, 32, 33, 34, 35, end]
    labels = [-100] * 3 + ids[3:7] + [-100] * 5 + ids[12:]
    batch = collator([{"input_ids": ids, "labels": labels}])
    asked = 0
    for step in range(30):
        noisy = collator.corrupt(batch, seed=0, step=step, rows=torch.arange(1), n_rows=1)
        inputs, n = noisy["inputs"], noisy["inputs"]["input_ids"].shape[1] - batch["input_ids"].shape[1]
        for q in (noisy["targets"][0, :n] != IGNORE_INDEX).nonzero().flatten().tolist():
            seen = (inputs["attention_mask"][0, 0, q, :n] == 0).nonzero().flatten()
            later = inputs["position_ids"][0, seen] > noisy["tokens"][0, q]
            assert (inputs["input_ids"][0, seen][later] == collator.record.mask_token_id).all()
            asked += 1
    assert asked > 100


def test_tails_end_where_the_model_does(tmp_path, tokenizer) -> None:
    config = GPT2Config(
        vocab_size=512, n_embd=32, n_layer=1, n_head=4, n_positions=64, eos_token_id=2, bos_token_id=None
    )
    rows = Dataset.from_list([{"prompt": "a " * 20, "completion": "b " * 60}] * 4)
    for attention in ("bidirectional", "lossless"):
        settings = {
            "attention": attention,
            "dataset": rows,
            "max_length": 64,
            "eos_tail": 16,
            "gradient_checkpointing": False,
        }
        make(tmp_path, tokenizer, model=GPT2LMHeadModel(copy.deepcopy(config)), peft_config=LORA, **settings).train()
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        settings["gradient_checkpointing"] = True
        make(tmp_path, tokenizer, model=GPT2LMHeadModel(copy.deepcopy(config)), peft_config=LORA, **settings)


def test_mixtures_of_experts_train_their_attention(tmp_path, tokenizer) -> None:
    """Experts see no rows and are refused; the host's load-balancing loss is off."""
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
    }
    config = Qwen3MoeConfig(
        vocab_size=512, intermediate_size=64, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, **sizes
    )
    attention = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    for settings in ({"attention": "lossless"}, {"attention": "block"}):
        make(
            tmp_path, tokenizer, model=Qwen3MoeForCausalLM(copy.deepcopy(config)), peft_config=attention, **settings
        ).train()
    with pytest.raises(ValueError, match="lossless"):
        make(
            tmp_path,
            tokenizer,
            model=Qwen3MoeForCausalLM(copy.deepcopy(config)),
            peft_config=LORA,
            attention="lossless",
        )


def test_accepted_lengths_are_runs_from_the_start() -> None:
    """Of blocks of four: three tokens are asked, the first is the base's own."""
    agrees = [[1, 1, 0], [0, 1, 1], [1, 1, 1], [1, 1], [1, 1, 1]]
    whole = [True, True, True, True, False]  # the last but one is cut short by the end of the answer
    rows, tokens = [0, 0, 1, 1, 2], [1, 5, 2, 6, 1]
    flat = [
        torch.tensor([value for block, n in zip(column, agrees, strict=True) for value in make_list(block, n)])
        for column in (rows, whole)
    ]
    places = torch.tensor([t + i for t, n in zip(tokens, agrees, strict=True) for i in range(len(n))])
    right = torch.tensor([bool(value) for block in agrees for value in block])
    total, blocks = accepted_lengths(right, flat[0], places, flat[1].bool(), 4)
    assert (int(total), int(blocks)) == (3 + 1 + 4, 3)


def make_list(value: Any, like: list[int]) -> list[Any]:
    return [value] * len(like)


def test_a_drafter_learns_reloads_and_changes_nothing(tmp_path, tokenizer) -> None:
    """Logged without a bound, saved as a small adapter, reloaded on its base, whose words it keeps."""
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    settings = {"max_steps": 6, "per_device_train_batch_size": 8, "learning_rate": 2e-3}
    trainer = make(
        tmp_path,
        tokenizer,
        base,
        lora,
        tiny_dataset(48),
        tiny_dataset(8, split="test"),
        attention="lossless",
        **settings,
    )
    trainer.train()
    log = trainer.state.log_history
    assert "nelbo" not in log[0] and "perplexity_bound" not in log[0]
    assert log[4]["masked_nll"] < log[0]["masked_nll"]
    evaluated = trainer.evaluate()
    assert evaluated["eval_loss"] == pytest.approx(evaluated["eval_masked_nll"])
    assert 1 <= evaluated["eval_accepted_length"] <= 8
    trainer.save_model(str(tmp_path / "saved"))
    model, own_tokenizer = load_diffusion_model(str(tmp_path / "saved"))
    assert base_of(model).config.diffusion["attention"] == "lossless"
    assert base_of(model).config.diffusion["block_length"] == 8
    with model.disable_adapter():
        assert probe_attention(model) == "causal"
    examples = list(tiny_dataset(6, seed=1, split="test"))
    want = evaluate_answers(model, own_tokenizer, examples, autoregressive=True, max_new_tokens=24)
    got = evaluate_answers(model, own_tokenizer, examples, max_new_tokens=24, draft_outcomes=2)
    assert got.answers == want.answers
    assert sum(got.accepted.values()) > 6 and max(got.accepted) <= 8


@pytest.mark.parametrize(
    ("settings", "peft_config", "message"),
    [
        ({}, None, "peft_config"),
        ({"block_length": 1}, LORA, "at least 2"),
        ({"clean_context": "block"}, LORA, "clean_context"),
        ({"right_shift_logits": False}, LORA, "right_shift_logits"),
        ({"time_embedding": True}, LORA, "time_embedding"),
        ({"complementary_masks": True}, LORA, "complementary_masks"),
        ({"random_replacement": 0.1}, LORA, "random_replacement"),
        ({"full_mask_share": 1.5}, LORA, "full_mask_share"),
        ({"ar_loss_weight": 0.5}, LORA, "ar_loss_weight"),
        ({}, LoraConfig(target_modules="all-linear", use_dora=True), "variant"),
        ({}, LoraConfig(target_modules="all-linear", trainable_token_indices=[7]), "trainable_token_indices"),
        ({}, LoraConfig(target_modules="all-linear", bias="all"), "bias"),
        ({}, LoraConfig(target_modules="all-linear", init_lora_weights="pissa"), "init_lora_weights"),
        ({"loss_weight": "cart"}, LORA, "loss_weight"),
        ({"router_aux_loss_coef": 0.1}, LORA, "router_aux_loss_coef"),
    ],
)
def test_what_cannot_be_lossless_is_refused(tmp_path, tokenizer, settings, peft_config, message) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, peft_config=peft_config, attention="lossless", **settings)


def test_adapters_of_other_modes_are_no_drafters(tmp_path, tokenizer) -> None:
    trainer = make(tmp_path, tokenizer, peft_config=LORA)
    with pytest.raises(ValueError, match="converted with 'bidirectional'"):
        make(tmp_path, tokenizer, model=trainer.model, attention="lossless")
    full = make(tmp_path / "full", tokenizer, attention="block", block_length=4)
    full.save_model(str(tmp_path / "full"))
    rows = Dataset.from_list([{"text": "2+2=4"}] * 4)
    with pytest.raises(ValueError, match="converted with 'block'"):
        model, own = load_diffusion_model(str(tmp_path / "full"))
        make(tmp_path, own, model=model, peft_config=LORA, attention="lossless", dataset=rows)
