"""The autoregressive teacher: what it says, whom it teaches, and what the objective becomes."""

from __future__ import annotations

import huggingface_hub
import pytest
import torch
from small_trainers import LORA, make, moved, step_batch, tiny_model
from transformers import MistralConfig, MistralForCausalLM

from llm_diffusion.models.attention import causal_attention
from llm_diffusion.models.loading import load_diffusion_model
from llm_diffusion.objective.modes import IGNORE_INDEX
from llm_diffusion.training import distillation
from llm_diffusion.training.distillation import head_inputs, teacher_scores, with_own_tokens

LAYOUTS = [
    {"attention": "bidirectional"},
    {"attention": "bidirectional", "right_shift_logits": False},
    {"attention": "bidirectional", "annealing": "soft", "annealing_steps": 4},
    {"attention": "block", "ar_loss_weight": 0.5},
    {"attention": "block", "clean_context": "block"},
]


@pytest.mark.parametrize("settings", LAYOUTS)
def test_the_teacher_is_the_base_as_it_was(tmp_path, tokenizer, settings) -> None:
    trainer = moved(make(tmp_path, tokenizer, peft_config=LORA, distillation_weight=1.0, **settings))
    batch = step_batch(trainer)
    rows, tokens = (batch["labels"] != IGNORE_INDEX).nonzero().unbind(-1)
    trainer.model.train()
    logits, hidden = teacher_scores(trainer.model, trainer.model, batch, rows, tokens)
    assert trainer.model.training and not logits.requires_grad
    plain = tiny_model().eval()  # never converted, no adapters
    with torch.no_grad(), head_inputs(plain) as caught:
        expected = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected[..., trainer.diffusion_collator.record.mask_token_id] = torch.finfo(torch.float32).min
    torch.testing.assert_close(logits, expected[rows, tokens - 1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(hidden, caught[0][rows, tokens - 1], rtol=1e-4, atol=1e-4)


def test_texts_of_a_packed_row_are_taught_as_if_alone(tmp_path, tokenizer) -> None:
    settings = {"peft_config": LORA, "distillation_weight": 1.0, "packing": True, "max_length": 200, "eos_tail": 0}
    trainer = moved(make(tmp_path, tokenizer, random_canvas=0.0, **settings))
    batch = step_batch(trainer)
    documents = batch["attention_mask"]
    assert documents.max() > 1
    rows, tokens = (documents == 2).nonzero().unbind(-1)
    rows, tokens = rows[rows == 0], tokens[rows == 0]
    logits, _ = teacher_scores(trainer.model, trainer.model, batch, rows[1:], tokens[1:], packed=True)
    mask = trainer.diffusion_collator.record.mask_token_id
    alone = tiny_model().eval()(input_ids=batch["input_ids"][0, tokens][None]).logits[0, :-1]
    others = [token for token in range(512) if token != mask]
    torch.testing.assert_close(logits[:, others], alone[:, others], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", ["causal", "all"])
@pytest.mark.parametrize("settings", LAYOUTS)
def test_the_objective_is_its_formula(tmp_path, tokenizer, settings, targets) -> None:
    """Term by term, from full logits of a student and of a base that never was converted."""
    weights = {"distillation_weight": 0.7, "distillation_hidden_weight": 0.3, "distillation_targets": targets}
    trainer = moved(make(tmp_path, tokenizer, peft_config=LORA, per_device_train_batch_size=8, **weights, **settings))
    batch = step_batch(trainer)
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    noisy = trainer._corrupt(batch, "train")
    with torch.no_grad(), head_inputs(trainer.model) as student_hidden:
        student = trainer.model(**noisy["inputs"]).logits.log_softmax(-1)
    plain = tiny_model().eval()
    with torch.no_grad(), head_inputs(plain) as hidden:
        teacher = plain(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    teacher[..., trainer.diffusion_collator.record.mask_token_id] = -torch.inf
    teacher = teacher.softmax(-1)
    want, teacher_mask = 0.0, 0
    for row, place in (noisy["targets"] != IGNORE_INDEX).nonzero().tolist():
        target, token = noisy["targets"][row, place], int(noisy["tokens"][row, place])
        assert batch["input_ids"][row, token] == target
        term = -student[row, place, target]
        if noisy["teacher_mask"][row, place]:
            teacher_mask += 1
            soft = -(teacher[row, token - 1] * student[row, place]).sum()
            far = student_hidden[0][row, place] - hidden[0][row, token - 1]
            term = 0.3 * term + 0.7 * soft + 0.3 * far.square().sum() / hidden[0][row, token - 1].square().sum()
        want += term * (noisy["weights"] + noisy["extra_weights"])[row, place]
    assert teacher_mask > 0
    assert got.item() == pytest.approx(want.item(), rel=1e-4)


def test_what_is_learnt_from_the_teacher_is_logged(tmp_path, tokenizer) -> None:
    trainer = make(tmp_path, tokenizer, peft_config=LORA, distillation_weight=1.0, attention="block", max_steps=1)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["distillation_loss"] > 0 and 0.3 < row["teacher_ratio"] < 1


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tmp_path, tokenizer) -> None:
    """Blocks of one token with a causal clean half are the AR model itself: only the mask token's own share is left."""
    settings = {"attention": "block", "block_length": 1, "eos_tail": 0}
    trainer = make(tmp_path, tokenizer, peft_config=LORA, distillation_weight=1.0, **settings)
    batch = step_batch(trainer)
    rows, tokens = (batch["labels"] != IGNORE_INDEX).nonzero().unbind(-1)
    with causal_attention(trainer.model):
        output = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    logits = output.logits[rows, tokens - 1]
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    sums = trainer._sums["train"]
    assert sums["from_teacher"] == sums["targets"] == len(rows)
    masks_share = logits.softmax(-1)[:, trainer.diffusion_collator.record.mask_token_id]
    assert sums["distillation"].item() == pytest.approx(-(1 - masks_share).log().sum().item(), rel=1e-3)


def test_frozen_adapters_stay_frozen(tmp_path, tokenizer) -> None:
    trainer = make(tmp_path, tokenizer, peft_config=LORA, distillation_weight=1.0)
    for name, parameter in trainer.model.named_parameters():
        parameter.requires_grad_("q_proj" in name and "lora" in name)
    want = [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad]
    trainer.model.train()
    trainer.compute_loss(trainer.model, step_batch(trainer), num_items_in_batch=torch.tensor(1))
    assert [name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad] == want


def test_packed_texts_of_a_windowed_base_are_refused(tmp_path, tokenizer) -> None:
    config = MistralConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=8,
    )
    with pytest.raises(ValueError, match="sliding windows"):
        make(
            tmp_path,
            tokenizer,
            model=MistralForCausalLM(config),
            peft_config=LORA,
            distillation_weight=1.0,
            packing=True,
        )


def test_own_words_stand_where_another_noise_had_masks(tmp_path, tokenizer) -> None:
    trainer = moved(make(tmp_path, tokenizer, peft_config=LORA, distillation_weight=1.0, on_policy_share=0.5))
    trainer.model.train()
    batch = step_batch(trainer)
    part, own = trainer._on_policy(trainer.model, batch)
    again, _ = trainer._on_policy(trainer.model, batch)
    assert trainer.model.training and 0 < own.sum() < len(own)
    assert torch.equal(part["input_ids"], again["input_ids"])  # seeded
    eos = trainer.diffusion_collator.eos_token_id
    changed = (part["input_ids"] != batch["input_ids"]) & (part["input_ids"] != eos)
    masked = trainer._corrupt(batch, "train", seed=trainer.args.seed + 1)["masked"]
    assert not (changed & ~(masked & own[:, None])).any()
    assert changed.sum() > 0.5 * (masked & own[:, None]).sum()  # a random student is rarely right
    assert not (part["input_ids"] == trainer.diffusion_collator.record.mask_token_id).any()


def test_own_words_follow_the_students_distribution() -> None:
    """4,000 draws of one masked token of a vocabulary of 5, the mask token never."""
    n = 4000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, 9.0]).expand(n, -1)
    ids = torch.full((n, 2), 4)
    masked = torch.tensor([[False, True]]).expand(n, -1)
    noisy = {"tokens": torch.tensor([[1, 0]]).expand(n, -1), "masked": masked, "weights": torch.ones(n, 2)}
    keep, chosen = torch.tensor([[True, False]]).expand(n, -1), torch.ones(n, dtype=torch.bool)
    rows = {"input_ids": ids, "labels": ids}
    part = with_own_tokens(rows, noisy, logits, keep, chosen, (0, 0, torch.arange(n)), 4, ())
    assert (part["input_ids"][:, 0] == 4).all()
    share = torch.bincount(part["input_ids"][:, 1], minlength=5) / n
    torch.testing.assert_close(share[:4], logits[0, :4].softmax(-1), atol=0.03, rtol=0)
    assert share[4] == 0


def test_a_sum_that_rounds_below_1_draws_no_mask(monkeypatch) -> None:
    """Of the highest number that noise can be."""
    monkeypatch.setattr(distillation, "uniform", lambda *_: torch.full((1,), 1 - 2.0**-24))
    torch.manual_seed(8)  # whose sum is below that
    logits, one = torch.randn(1, 151_936), torch.ones(1, 1, dtype=torch.bool)
    noisy = {"tokens": torch.zeros(1, 1, dtype=torch.long), "masked": one, "weights": torch.ones(1, 1)}
    rows = {name: torch.full((1, 1), 7) for name in ("input_ids", "labels")}
    keys = (0, 0, torch.zeros(1, dtype=torch.long))
    part = with_own_tokens(rows, noisy, logits, one, one[0], keys, logits.shape[1] - 1, ())
    assert part["input_ids"].item() < logits.shape[1] - 1


def test_an_end_token_of_its_own_ends_the_answer() -> None:
    """The next answer of the row goes on."""
    ids = torch.tensor([[7, 5, 5, 5, 7, 5, 5]])
    labels = torch.tensor([[-100, 5, 5, 5, -100, 5, 5]])
    keep = torch.tensor([[False, True, True, False, False, False, True]])
    says_end = torch.full((3, 8), -torch.inf)
    says_end[[0, 1, 2], [2, 6, 6]] = 0.0  # end at 1, a word at 2 and at 6
    noisy = {"tokens": torch.arange(7)[None], "masked": keep, "weights": torch.ones(1, 7)}
    part = with_own_tokens(
        {"input_ids": ids, "labels": labels},
        noisy,
        says_end,
        keep,
        torch.tensor([True]),
        (0, 0, torch.arange(1)),
        1,
        (2, 3),
    )
    assert part["input_ids"].tolist() == [[7, 2, 2, 2, 7, 5, 6]]


def test_own_words_have_no_labels(tmp_path, tokenizer) -> None:
    """With every row on policy nothing is left of the data: no bound, and an objective that is the teacher's alone."""
    settings = {"distillation_weight": 0.5, "distillation_targets": "all", "on_policy_share": 1.0}
    trainer = moved(make(tmp_path, tokenizer, peft_config=LORA, **settings))
    trainer.model.train()
    batch = step_batch(trainer)
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(1))
    assert trainer._sums["train"]["maskable"] == 0 and trainer._sums["train"]["nll"] == 0
    part, _ = trainer._on_policy(trainer.model, batch)
    noisy = trainer._corrupt(part, "train")
    rows, places = (noisy["teacher_mask"] & (noisy["targets"] != IGNORE_INDEX)).nonzero().unbind(-1)
    logits, _ = teacher_scores(trainer.model, trainer.model, part, rows, noisy["tokens"][rows, places])
    student = trainer.model(**noisy["inputs"]).logits[rows, places].log_softmax(-1)
    terms = -(logits.softmax(-1) * student).sum(-1)
    assert loss.item() == pytest.approx((terms * noisy["weights"][rows, places]).sum().item(), rel=1e-4)


def test_without_an_autoregressive_model_there_is_no_teacher(tmp_path, tokenizer) -> None:
    with pytest.raises(ValueError, match="peft_config"):
        make(tmp_path, tokenizer, distillation_weight=1.0)
    full = make(tmp_path / "full", tokenizer)
    full.save_model(str(tmp_path / "full"))
    model, own_tokenizer = load_diffusion_model(str(tmp_path / "full"))
    with pytest.raises(ValueError, match="converted themselves"):
        make(tmp_path, own_tokenizer, model=model, peft_config=LORA, distillation_hidden_weight=1.0)


def test_a_converted_base_on_the_hub_is_no_teacher(tmp_path, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--user--converted"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("abc")
    model, own = load_diffusion_model("tiny", device="cpu")
    model.config.save_pretrained(repository / "snapshots" / "abc")
    model.config.name_or_path = "user/converted"
    with pytest.raises(ValueError, match="the weights under the adapters are converted themselves"):
        make(tmp_path / "out", own, model, peft_config=LORA, distillation_weight=0.5)
