"""DiffusionKTOTrainer: exact zeros at the start, TRL's loss by a second formula, noise that knows its rows, resuming, refusals."""

import copy

import pytest
import torch
from datasets import Dataset, IterableDataset
from small_trainers import LORA, SETTINGS, preference_rows, tiny_model
from transformers import AutoTokenizer

from llm_diffusion import DiffusionKTOConfig, DiffusionKTOTrainer, convert_to_diffusion
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL_PATH)


def unpaired(n=8):
    rows = preference_rows(n)
    sides = ["chosen" if i % 3 else "rejected" for i in range(n)]
    return [
        {"prompt": row["prompt"], "completion": row[side], "label": side == "chosen"}
        for row, side in zip(rows, sides, strict=True)
    ]


def make(tmp_path, tokenizer, rows=None, attention="bidirectional", **settings):
    own = copy.deepcopy(tokenizer)
    model = convert_to_diffusion(tiny_model(attention_dropout=0.5), own, attention=attention)
    adapters = settings.pop("peft_config", None)
    settings = SETTINGS | {"learning_rate": 1e-2, "num_draws": 2} | settings
    return DiffusionKTOTrainer(
        model,
        args=DiffusionKTOConfig(str(tmp_path), **settings),
        train_dataset=unpaired() if rows is None else rows,
        processing_class=own,
        peft_config=adapters,
    )


def step_batches(trainer):
    loader = iter(trainer.get_train_dataloader())
    batches, _ = trainer.get_batch_samples(loader, trainer.args.gradient_accumulation_steps, torch.device("cpu"))
    trainer.current_gradient_accumulation_steps = len(batches)
    trainer.model.train()
    return batches


@pytest.mark.parametrize("attention, adapted", [("bidirectional", True), ("block", False)])
def test_policy_and_reference_agree_exactly_at_the_start(tmp_path, tokenizer, attention, adapted):
    trainer = make(tmp_path, tokenizer, attention=attention, peft_config=LORA if adapted else None)
    (batch,) = step_batches(trainer)
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() == 0.5
    for name in ("kl", "rewards/chosen", "rewards/rejected"):
        assert trainer._metrics["train"][name] == [0.0], name
    # TRL's mismatched pairs: the same prompts, the left neighbour's answer.
    for row in range(4):
        prompts = [ids[: int(mask.argmax())] for ids, mask in (
            (batch[f"{kl}input_ids"][row], batch[f"{kl}completion_mask"][row]) for kl in ("", "KL_"))]  # fmt: skip
        assert torch.equal(*prompts)
        left = batch["completion_mask"][row - 1].bool(), batch["KL_completion_mask"][row].bool()
        assert torch.equal(batch["input_ids"][row - 1][left[0]], batch["KL_input_ids"][row][left[1]])


def elbo(model, trainer, batch, mask_id):
    """-NELBO of every row by the masks of its draws, from full logits, a second time."""
    total = 0.0
    for noisy in trainer._draws(batch):
        masked, scored = noisy["masked"], batch["completion_mask"].bool()
        logits = model(
            input_ids=batch["input_ids"].masked_fill(masked, mask_id), attention_mask=batch["attention_mask"]
        ).logits
        read = torch.cat([logits[:, :1], logits[:, :-1]], 1).log_softmax(-1)  # hidden state i - 1 predicts token i
        log_probs = read.gather(-1, batch["input_ids"][..., None])[..., 0] * masked
        total = total + log_probs.sum(-1) * scored.sum(-1) / masked.sum(-1)
    return total / trainer.args.num_draws


@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_gradient_is_that_of_the_written_out_loss(tmp_path, tokenizer, loss_type):
    weights = {"desirable_weight": 1.5, "undesirable_weight": 0.5, "beta": 0.3}
    trainer = make(tmp_path, tokenizer, loss_type=loss_type, right_shift_logits=True, **weights)
    model, reference = trainer.model, trainer.ref_model
    with torch.no_grad():  # away from the reference
        for parameter in model.parameters():
            parameter.sub_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    (batch,) = step_batches(trainer)
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()

    mask_id = model.config.diffusion["mask_token_id"]
    with torch.no_grad():
        theirs = elbo(reference, trainer, batch, mask_id)
        kl = torch.zeros(())
        if loss_type == "kto":
            other = {name[3:]: value for name, value in batch.items() if name.startswith("KL_")}
            other |= {name: batch[name] for name in ("noise_rows", "n_noise_rows")}
            log_ratios = [elbo(m, trainer, other, mask_id) for m in (model, reference)]
            kl = (log_ratios[0] - log_ratios[1]).mean()
            assert kl > 0.1  # which TRL would not clamp
    ratio, good = elbo(model, trainer, batch, mask_id) - theirs, batch["label"]
    if loss_type == "kto":
        losses = torch.where(
            good, 1.5 * (1 - (0.3 * (ratio - kl)).sigmoid()), 0.5 * (1 - (0.3 * (kl - ratio)).sigmoid())
        )
    else:
        losses = torch.where(good, 1.5 * (1 - (0.3 * ratio).sigmoid()), 0.5 * (0.3 * ratio).sigmoid())
    losses.mean().backward()
    assert loss.item() == pytest.approx(losses.mean().item(), rel=1e-4)
    largest = max(parameter.grad.abs().max() for parameter in model.parameters())
    assert largest > 1e-3
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-4 * float(largest), rtol=0, msg=name)


def test_masks_and_steps_do_not_depend_on_how_they_are_cut_up(tmp_path, tokenizer):
    masks, moved = [], []
    for size, accumulated in ((8, 1), (3, 3)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = make(
            tmp_path,
            tokenizer,
            peft_config=LORA,
            loss_type="apo_zero_unpaired",
            optim="sgd",
            max_grad_norm=0,
            **settings,
        )
        parts = step_batches(trainer)
        masks.append([row[: int(n)].tolist() for part in parts for noisy in trainer._draws(part)
                      for row, n in zip(noisy["masked"], part["attention_mask"].sum(-1), strict=True)])  # fmt: skip
        masks[-1].sort()
        trainer.train()
        moved.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name})
    assert masks[0] == masks[1]
    largest = max(float(value.abs().max()) for value in moved[0].values())
    assert largest > 1e-5
    for name, value in moved[1].items():
        torch.testing.assert_close(value, moved[0][name], atol=1e-3 * largest, rtol=0)


def test_training_tells_good_from_bad_and_resumes(tmp_path, tokenizer):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "peft_config": LORA, "num_draws": 1}
    whole = make(tmp_path, tokenizer, **settings)
    whole.train()
    history = [(row["loss"], row["kl"]) for row in whole.state.log_history if "loss" in row]
    assert history[0] == (0.5, 0.0) and history[-1][0] < 0.5
    resumed = make(tmp_path, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [(row["loss"], row["kl"]) for row in resumed.state.log_history if "loss" in row] == history
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name


def test_stored_scores_pairs_and_streams(tmp_path, tokenizer):
    """Pairs are taken apart as TRL does it; scores that are stored are those of the noise they are used with."""
    trainer = make(tmp_path, tokenizer, Dataset.from_list(preference_rows(4)), precompute_ref_log_probs=True)
    assert trainer.train_dataset["label"] == [True] * 4 + [False] * 4
    (batch,) = step_batches(trainer)
    fresh = trainer.compute_ref_log_probs(trainer.model, batch)
    torch.testing.assert_close(batch["ref_logps"].float(), fresh[0])
    torch.testing.assert_close(batch["ref_KL_logps"].float(), fresh[1])
    stream = IterableDataset.from_generator(lambda: iter(unpaired(4)))
    make(tmp_path, tokenizer, stream, max_steps=1).train()


def test_rows_that_are_tokenised_already(tmp_path, tokenizer):
    """They get mismatched answers too, unless they have them; labels may be numbers, as in TRL."""
    numbered = [row | {"label": int(row["label"])} for row in unpaired(4)]
    ours = make(tmp_path, tokenizer, numbered).train_dataset
    assert list(map(bool, ours["label"])) == [row["label"] for row in unpaired(4)]
    tokenised = make(tmp_path, tokenizer, ours.remove_columns("KL_completion_ids"))
    assert tokenised.train_dataset.to_list() == ours.to_list() and step_batches(tokenised)[0]["label"].sum() == 2
    own = ours.map(lambda row: {"KL_completion_ids": row["completion_ids"]})
    assert make(tmp_path, tokenizer, own).train_dataset.to_list() == own.to_list()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"label": None}, "`label` of row 0 is None; true"),
        ({"label": 2}, "`label` of row 0 is 2; true"),
        ({"completion": None}, "`completion` of row 0"),
    ],
)
def test_bad_rows_are_refused(tmp_path, tokenizer, change, message):
    rows = unpaired(2)
    with pytest.raises(ValueError, match=message):
        make(tmp_path, tokenizer, [row | change for row in rows])
    with pytest.raises(ValueError, match="`train_dataset` lacks `label`"):
        make(tmp_path, tokenizer, [{"prompt": "a", "completion": "b"}])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, "beta"),
        ({"loss_type": "dpo"}, "loss_type"),
        ({"undesirable_weight": -1.0}, "undesirable_weight"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"score": "trajectory", "fsdp": "full_shard"}, "score"),
        ({"num_draws": 0}, "num_draws"),
        ({"initial_draws": 9}, "initial_draws"),
        ({"precompute_ref_log_probs": True, "initial_draws": 2}, "precompute_ref_log_probs"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"`{message}`"):
        DiffusionKTOConfig(str(tmp_path), **settings)


def steps_of_answers(folder, batch=2):
    """Four answers a step, each beside a mismatched one of its own; every draw but the last one is sent back without waiting."""
    rows = [{"prompt_ids": [10 + i, 9], "completion_ids": [20 + i, 5, i + 7], "KL_completion_ids": [40 - i, 8], "label": i % 3 > 0}
            for i in range(8)]  # fmt: skip
    settings = {"per_device_train_batch_size": batch, "max_steps": 3, "learning_rate": 0.1, "optim": "sgd"}
    trainer = make(folder, AutoTokenizer.from_pretrained(TINY_MODEL_PATH), rows, peft_config=LORA, **settings)
    trainer.train()
    sums = {name: p.double().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return sums, [[row[name] for name in ("loss", "kl")] for row in trainer.state.log_history if "loss" in row]


def test_two_processes_take_the_steps_of_one(tmp_path, in_two_processes):
    one, logged = steps_of_answers(tmp_path, 4)
    for process in in_two_processes["steps_of_answers"]:
        two, logged_of_two = process["result"]
        assert torch.tensor(logged_of_two).allclose(torch.tensor(logged), rtol=1e-3, atol=1e-6) and logged[-1][1] > 1e-6
        assert two == pytest.approx(one, rel=1e-4, abs=1e-4)
