"""DiffusionDPOTrainer: equal policies at the start, the exact gradient of all draws, seeded noise, references, saving."""

import copy
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel, get_peft_model
from small_trainers import LORA, SETTINGS, pairs, preference_rows, tiny_model
from transformers import AutoTokenizer

from llm_diffusion import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    convert_to_diffusion,
    load_diffusion_model,
)
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

LOG2 = math.log(2)
TIMES = {"epoch", *(f"eval_{name}" for name in ("runtime", "samples_per_second", "steps_per_second"))}
# What each loss is where policy and reference say the same, beta = 0.1 and label smoothing 0.001.
AT_START = {
    "sigmoid": LOG2,
    "hinge": 1.0,
    "ipo": 25.0,
    "exo_pair": 0.5 * (math.log(0.5) - math.log(0.999)) + 0.5 * (math.log(0.5) - math.log(0.001)),
    "nca_pair": 2 * LOG2,
    "robust": LOG2,
    "bco_pair": 2 * LOG2,
    "sppo_hard": 50.0,
    "aot": LOG2,
    "aot_unpaired": LOG2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "discopop": 0.5 * (LOG2 + 1),
    "sigmoid_norm": LOG2,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL_PATH)


def converted(tokenizer, seed=0, **options):
    """A small converted model and its tokenizer."""
    model, own = tiny_model(seed=seed), copy.deepcopy(tokenizer)
    return convert_to_diffusion(model, own, **options), own


def with_adapters(model, mask_id, seed=1):
    """Adapters that say something, the mask token's row among them, as fine-tuning leaves them."""
    config = LoraConfig(**{**vars_of(LORA), "trainable_token_indices": [mask_id]})
    model = get_peft_model(model, config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def vars_of(config):
    return {"r": config.r, "lora_alpha": config.lora_alpha, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def make(tmp_path, model, tokenizer, dataset=None, **settings):
    keywords = {name: settings.pop(name) for name in ("ref_model", "peft_config", "eval_dataset") if name in settings}
    settings = SETTINGS | {"per_device_eval_batch_size": 4, "learning_rate": 1e-3, "num_draws": 3} | settings
    return DiffusionDPOTrainer(
        model,
        args=DiffusionDPOConfig(str(tmp_path), **settings),
        train_dataset=pairs(8) if dataset is None else dataset,
        processing_class=tokenizer,
        **keywords,
    )


def first_batch(trainer):
    batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    return batches[0]


REFERENCES = ("fresh adapter", "ref adapter", "frozen copy", "given", "stored")


def start(tmp_path, tokenizer, reference, attention="bidirectional", **settings):
    model, own = converted(tokenizer, attention=attention)
    if reference == "fresh adapter":
        settings["peft_config"] = LORA
    elif reference == "ref adapter":
        model = with_adapters(model, own.mask_token_id)
    elif reference == "given":
        settings["ref_model"] = converted(tokenizer, attention=attention)[0]
    elif reference == "stored":
        model = with_adapters(model, own.mask_token_id)
        settings["precompute_ref_log_probs"] = True
    return make(tmp_path, model, own, **settings)


@pytest.mark.parametrize(
    "reference, attention, score",
    [(reference, "bidirectional", "elbo") for reference in REFERENCES]
    + [
        ("ref adapter", "block", "elbo"),
        ("frozen copy", "block", "trajectory"),
        ("stored", "bidirectional", "trajectory"),
    ],
)
def test_every_loss_starts_at_equal_policies(tmp_path, tokenizer, reference, attention, score):
    trainer = start(tmp_path, tokenizer, reference, attention, score=score, initial_diffusion_steps=3)
    batch = first_batch(trainer)
    trainer.model.train()
    with torch.no_grad():
        assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(LOG2, abs=2e-6)
        policy = trainer._score(trainer.model, batch)
        scores = policy.log_probs.sum(-1).chunk(2)
        if reference != "stored":
            scores = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
        scores = dict(zip(("ref_chosen_logps", "ref_rejected_logps"), scores, strict=True))
        trainer.label_smoothing = 0.001
        for loss_type, expected in AT_START.items():
            trainer.loss_types = [loss_type]
            assert trainer._trl_loss(policy, batch, scores).item() == pytest.approx(expected, abs=2e-6), loss_type
        trainer.loss_types = ["sigmoid"]
        for divergence in ("forward_kl", "js_divergence", "alpha_divergence"):
            trainer.f_divergence_type = divergence
            assert trainer._trl_loss(policy, batch, scores).item() == pytest.approx(LOG2, abs=2e-6), divergence


def test_supervised_term_is_the_nelbo_a_token(tmp_path, tokenizer):
    trainer = start(
        tmp_path, tokenizer, "fresh adapter", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5], num_draws=2
    )
    batch = first_batch(trainer)
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model.train(), batch).item()
        scores = trainer._score(trainer.model, batch).log_probs.sum(-1)
    chosen = batch["completion_mask"].chunk(2)[0].sum()
    assert loss == pytest.approx(LOG2 - 0.5 * (scores.chunk(2)[0].sum() / chosen).item(), rel=1e-5)


@pytest.mark.parametrize("shift", [True, False])
def test_score_is_the_elbo_of_a_second_formula(tmp_path, tokenizer, shift):
    """Token by token from full logits, in a row of its own without padding."""
    model, own = converted(tokenizer, right_shift_logits=shift)
    trainer = make(tmp_path, model, own)
    batch = first_batch(trainer)
    trainer.model.eval()
    with torch.no_grad():
        policy = trainer._score(trainer.model, batch)
    for row in range(len(batch["input_ids"])):
        total, length = 0.0, int(batch["attention_mask"][row].sum())
        ids, scored = batch["input_ids"][row, :length], batch["completion_mask"][row, :length].bool()
        n = int(scored.sum())
        for noisy in trainer._draws(batch):
            masked = noisy["masked"][row, :length]
            assert not (masked & ~scored).any() and 1 <= masked.sum() <= n
            with torch.no_grad():
                logits = trainer.model(input_ids=ids.masked_fill(masked, own.mask_token_id)[None]).logits[0]
            for place in masked.nonzero().flatten().tolist():
                read = logits[place - 1 if shift else place].double().log_softmax(-1)
                total += n / int(masked.sum()) * read[ids[place]].item()
        assert policy.log_probs[row].sum().item() == pytest.approx(total / 3, rel=1e-4)


@pytest.mark.parametrize("loss_type", [["sigmoid"], ["apo_zero", "sft"], ["aot"]])
@pytest.mark.parametrize("attention, score", [("bidirectional", "elbo"), ("block", "elbo"), ("block", "trajectory")])
def test_gradient_of_one_draw_at_a_time_is_the_gradient_of_all(tmp_path, tokenizer, attention, score, loss_type):
    trainer = start(
        tmp_path, tokenizer, "given", attention, score=score, loss_type=loss_type, num_draws=4,
        initial_diffusion_steps=4, gradient_accumulation_steps=2,
    )  # fmt: skip
    model = trainer.model.train()
    with torch.no_grad():  # away from the reference, so that no slope is that of the start
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(parameter))))
    batch = first_batch(trainer)
    trainer.current_gradient_accumulation_steps = 2
    (trainer.compute_loss(model, batch) / 2).backward()
    one_by_one = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    reference = trainer.compute_ref_log_probs(trainer.ref_model, batch)
    policy = trainer._score(model, batch)
    names = ("ref_chosen_logps", "ref_rejected_logps")
    (trainer._trl_loss(policy, batch, dict(zip(names, reference, strict=True))) / 2).backward()
    largest = max(parameter.grad.abs().max() for parameter in model.parameters())
    assert largest > 1e-3
    for name, parameter in model.named_parameters():
        assert (one_by_one[name] - parameter.grad).abs().max() <= 1e-6 * max(1.0, largest), name


def weights(trainer):
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.mark.parametrize("loss", [{}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 2.0]}])
def test_steps_do_not_depend_on_how_they_are_cut_up(tmp_path, tokenizer, loss):
    results = []
    for size, accumulated, workers in ((8, 1, 0), (2, 4, 0), (3, 3, 1)):
        trainer = start(
            tmp_path, tokenizer, "fresh adapter", per_device_train_batch_size=size, max_steps=1, max_grad_norm=0,
            gradient_accumulation_steps=accumulated, dataloader_num_workers=workers, optim="sgd", learning_rate=0.1,
            **loss,
        )  # fmt: skip
        before = weights(trainer)
        trainer.train()
        results.append(weights(trainer))
    moved = max((results[0][name] - before[name]).abs().max() for name in before)
    assert moved > 1e-3
    for other in results[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name], atol=1e-4 * float(moved), rtol=0)


def test_resumed_run_is_the_uninterrupted_one(tmp_path, tokenizer):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_draws": 4, "initial_draws": 1}
    whole = start(tmp_path, tokenizer, "ref adapter", **settings)
    whole.train()
    resumed = start(tmp_path, tokenizer, "ref adapter", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    history = [(row["loss"], row["draws"]) for row in whole.state.log_history if "loss" in row]
    assert [(row["loss"], row["draws"]) for row in resumed.state.log_history if "loss" in row] == history
    assert [draws for _, draws in history] == [1, 1, 2, 3]  # grows from the first number to the last
    for name, value in weights(resumed).items():
        torch.testing.assert_close(value, weights(whole)[name])


def test_a_loss_that_is_no_number_stops_before_the_weights(tmp_path, tokenizer):
    trainer = start(tmp_path, tokenizer, "fresh adapter", max_steps=2)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    plain = trainer._trl_loss
    trainer._trl_loss = lambda *args: plain(*args) * float("nan")
    with pytest.raises(FloatingPointError, match="nan at step 0"):
        trainer.train()
    assert all(torch.equal(one, other) for one, other in zip(before, trainer.model.parameters(), strict=True))


def test_evaluation_noise_is_fixed(tmp_path, tokenizer):
    trainer = start(tmp_path, tokenizer, "fresh adapter", eval_dataset=pairs(4, seed=5), max_steps=3)
    trainer.train()
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == again["eval_loss"] != LOG2
    trainer.args.per_device_eval_batch_size = 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(first["eval_loss"], rel=1e-5)
    assert {f"eval_{name}" for name in trainer.args.evaluated} == set(first) - TIMES


@pytest.mark.parametrize("reference", REFERENCES)
def test_training_prefers_the_chosen_and_leaves_the_reference(tmp_path, tokenizer, reference):
    settings = {"learning_rate": 3e-3, "max_steps": 12, "num_draws": 2, "gradient_checkpointing": reference == "given"}
    trainer = start(tmp_path, tokenizer, reference, **settings)
    batch = first_batch(trainer)
    before = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
    trainer.train()
    trainer.model.train()
    after = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, {**batch})
    if trainer.ref_model is not None or isinstance(trainer.model, PeftModel):
        # The step has moved on, the noise with it: the same step again.
        trainer.state.global_step = 0
        after = trainer.compute_ref_log_probs(trainer.ref_model or trainer.model, batch)
        torch.testing.assert_close(torch.stack(after), torch.stack(before), atol=1e-4, rtol=1e-5)
    history = [row for row in trainer.state.log_history if "loss" in row]
    assert history[0]["loss"] == pytest.approx(LOG2, abs=1e-5) and history[0]["rewards/margins"] == pytest.approx(
        0, abs=1e-5
    )
    assert sum(row["loss"] for row in history[-4:]) / 4 < 0.9 * LOG2
    assert sum(row["rewards/accuracies"] for row in history[-4:]) / 4 > 0.7


def test_full_model_keeps_its_fine_tuned_self_as_reference(tmp_path, tokenizer):
    """The host would load the checkpoint again; and a fine-tuned model's bound forwards survive in a deep copy of it."""
    model, own = converted(tokenizer)
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}
    data = Dataset.from_list([{"messages": row["prompt"] + row["chosen"]} for row in preference_rows(8)])
    args = DiffusionSFTConfig(str(tmp_path), max_steps=2, learning_rate=1e-2, save_strategy="no", **settings)
    DiffusionSFTTrainer(model, args, train_dataset=data, processing_class=own).train()
    trainer = make(tmp_path, model, own, max_steps=3, learning_rate=1e-2)
    assert trainer.ref_model is not None and not any(p.requires_grad for p in trainer.ref_model.parameters())
    ids = {"input_ids": torch.arange(20)[None]}
    before = trainer.ref_model(**ids).logits
    torch.testing.assert_close(before, model.eval()(**ids).logits)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LOG2, abs=1e-5)
    torch.testing.assert_close(trainer.ref_model(**ids).logits, before, atol=0, rtol=0)
    assert not torch.allclose(model.eval()(**ids).logits, before, atol=1e-2)


def test_stored_scores_are_those_of_the_noise_they_are_used_with(tmp_path, tokenizer):
    """Another seed is other noise, so what the host has cached for the first one must not be taken."""
    stored = []
    for seed in (1, 2):
        trainer = start(tmp_path, tokenizer, "stored", seed=seed)
        batch = first_batch(trainer)
        fresh = trainer.compute_ref_log_probs(trainer.model, batch)
        torch.testing.assert_close(batch["ref_chosen_logps"].float(), fresh[0], atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(batch["ref_rejected_logps"].float(), fresh[1], atol=1e-4, rtol=1e-5)
        stored.append(sorted(trainer.train_dataset["ref_chosen_logps"]))
    assert stored[0] != stored[1]


def test_frozen_adapters_stay_frozen(tmp_path, tokenizer):
    """Asking the reference switches adapters, after which PEFT lets all of them train."""
    for reference in ("fresh adapter", "ref adapter"):
        trainer = start(tmp_path, tokenizer, reference)
        frozen = [p for name, p in trainer.model.named_parameters() if "mlp" in name]
        for parameter in frozen:
            parameter.requires_grad_(False)
        trainer.compute_ref_log_probs(trainer.model, first_batch(trainer))
        assert not any(parameter.requires_grad for parameter in frozen)
        assert not any(p.requires_grad for name, p in trainer.model.named_parameters() if "ref" in name.split("."))


@pytest.mark.parametrize("form", ["standard", "implicit prompt", "conversational implicit", "stream"])
def test_formats_of_the_host(tmp_path, tokenizer, form):
    rows = preference_rows(4)
    if form in ("standard", "implicit prompt"):
        rows = [{name: row[name][0]["content"] for name in row} for row in rows]
    if form == "implicit prompt":
        rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    if form == "conversational implicit":
        rows = [{side: row["prompt"] + row[side] for side in ("chosen", "rejected")} for row in rows]
    data = IterableDataset.from_generator(lambda: iter(rows)) if form == "stream" else Dataset.from_list(rows)
    model, own = converted(tokenizer)
    trainer = make(tmp_path, model, own, data, num_draws=1, per_device_train_batch_size=2)
    batch = first_batch(trainer)
    assert len(batch["input_ids"]) == 4 and batch["completion_mask"].any(-1).all()
    ends = [ids[mask.bool()][-1] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    assert all(end == own.eos_token_id for end in ends)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(LOG2, abs=1e-5)


def test_answers_fill_their_last_block(tmp_path, tokenizer):
    model, own = converted(tokenizer, attention="block")
    batch = first_batch(make(tmp_path, model, own))
    assert (batch["attention_mask"].sum(-1) % 4 == 0).all()


ROW = preference_rows(1)[0]


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{**ROW, "rejected": ROW["chosen"]}], "`chosen` and `rejected` of row 0 are the same"),
        ([ROW, {**ROW, "rejected": [{"role": "assistant", "content": " "}]}], "`rejected` of row 1 is empty"),
        ([{"prompt": "a", "chosen": "b"}], r"lacks \['rejected'\]"),
        ([], "`train_dataset` is empty"),
    ],
)
def test_bad_pairs_are_refused(tmp_path, tokenizer, rows, message):
    model, own = converted(tokenizer)
    data = Dataset.from_list(rows) if rows else Dataset.from_dict({"chosen": [], "rejected": []})
    with pytest.raises(ValueError, match=message):
        make(tmp_path, model, own, data)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 0.0}, "beta"),
        ({"beta": float("nan")}, "beta"),
        ({"num_draws": 0}, "num_draws"),
        ({"initial_draws": 9}, "initial_draws"),
        ({"score": "trajectory", "num_steps": 0}, "num_steps"),
        ({"num_steps": 4}, "initial_diffusion_steps"),
        ({"score": "exact"}, "score"),
        ({"ld_alpha": 0.5}, "ld_alpha"),
        ({"use_weighting": True}, "use_weighting"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"truncation_mode": "keep_end"}, "truncation_mode"),
        ({"precompute_ref_log_probs": True, "initial_draws": 2}, "precompute_ref_log_probs"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionDPOConfig(str(tmp_path), **settings)


def test_prompts_that_fill_the_length_are_refused(tmp_path, tokenizer):
    model, own = converted(tokenizer)
    with pytest.raises(ValueError, match="8 of 8 rows: no answer left after `max_length`=4"):
        make(tmp_path, model, own, max_length=4)


def test_references_that_cannot_be_asked_are_refused(tmp_path, tokenizer):
    model, own = converted(tokenizer)
    other, _ = converted(tokenizer, attention="block")
    with pytest.raises(ValueError, match="`ref_model`: its `attention` is 'block'"):
        make(tmp_path, model, own, ref_model=other)
    drafter, own = converted(tokenizer, attention="lossless")
    with pytest.raises(ValueError, match="`model`: a drafter's words"):
        make(tmp_path, drafter, own)
    with pytest.raises(TypeError, match="`args` must be a DiffusionDPOConfig"):
        DiffusionDPOTrainer(model, args=DiffusionSFTConfig(str(tmp_path)))


@pytest.mark.parametrize("attention", ["bidirectional", "block"])
def test_saved_policy_comes_back(tmp_path, attention):
    """The record goes with the adapter; the frozen copy beside it is left where it lies."""
    model, own = load_diffusion_model("tiny", attention=attention, device="cpu")
    model = with_adapters(model, own.mask_token_id)
    trainer = make(tmp_path, model, own, pairs(4), num_draws=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again, tokenizer = load_diffusion_model(str(tmp_path / "saved"), device="cpu")
    assert tokenizer.mask_token_id == own.mask_token_id
    assert again.get_base_model().config.diffusion["attention"] == attention
    ids = {"input_ids": torch.arange(20)[None], "use_cache": False}
    torch.testing.assert_close(again(**ids).logits, trainer.model.eval()(**ids).logits, atol=1e-4, rtol=1e-4)
    assert "dpo" in (tmp_path / "saved" / "README.md").read_text()


def steps_of_pairs(folder, batch=1, accumulation=2):
    """Four pairs a step; every draw but the last one is sent back without waiting for the other process."""
    model, own = converted(AutoTokenizer.from_pretrained(TINY_MODEL_PATH))
    settings = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_steps": 3}
    trainer = make(folder, model, own, peft_config=LORA, learning_rate=0.1, optim="sgd", **settings)
    trainer.train()
    sums = {name: p.double().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return sums, [row["rewards/margins"] for row in trainer.state.log_history if "loss" in row]


def test_two_processes_take_the_steps_of_one(tmp_path, in_two_processes):
    one, rewards = steps_of_pairs(tmp_path, 4, 1)
    two, rewards_of_two = in_two_processes["steps_of_pairs"][0]["result"]
    assert one.keys() == two.keys() and max(map(abs, rewards)) > 1e-3
    assert rewards_of_two == pytest.approx(rewards, rel=1e-2, abs=1e-5)
    for name, value in one.items():
        assert two[name] == pytest.approx(value, rel=1e-4, abs=1e-4), name
