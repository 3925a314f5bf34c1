"""DiffusionSFTTrainer: the loss against a second formula, seeded noise, equal gradients, resuming, saving."""

import copy

import pytest
import torch
import trl
from accelerate import Accelerator
from datasets import Dataset
from small_trainers import LORA, make, step_batch, tiny_model
from transformers import AutoTokenizer, OPTConfig, OPTForCausalLM

from llm_diffusion import (
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    load_diffusion_model,
    patch_causal_attention,
    probe_attention,
)
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.objective.attention_masks import annealed, positions
from llm_diffusion.objective.modes import IGNORE_INDEX
from llm_diffusion.training.preparation import by_length
from llm_diffusion.training.trainer import numbered_rows


def losses(trainer):
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize("shift", [True, False])
def test_loss_is_the_nelbo_of_a_second_formula(tmp_path, tokenizer, shift):
    trainer = make(tmp_path, tokenizer, right_shift_logits=shift, evaluation=tiny_dataset(6, split="test"))
    batch = next(iter(trainer.get_eval_dataloader()))
    trainer.model.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(trainer.model, dict(batch))
        noisy = trainer.diffusion_collator.corrupt(batch, seed=trainer.args.seed, step=0)
        logits = trainer.model(input_ids=noisy["inputs"]["input_ids"], attention_mask=batch["attention_mask"]).logits
    total, maskable = 0.0, 0
    for row in range(len(logits)):  # token by token, full logits, no helper of the library
        for place in range(logits.shape[1]):
            if batch["labels"][row, place] == IGNORE_INDEX:
                continue
            maskable += 1
            if noisy["inputs"]["input_ids"][row, place] == tokenizer_mask(trainer):
                read = logits[row, place - 1 if shift else place].double()
                total -= read.log_softmax(-1)[batch["input_ids"][row, place]] / noisy["times"][row, place]
    assert maskable > 50
    assert loss.item() == pytest.approx(float(total) / maskable, rel=1e-5)


def tokenizer_mask(trainer):
    return trainer.processing_class.mask_token_id


@pytest.mark.skipif(trl.__version__.startswith("1.15."), reason="TRL 1.15 projects by a Triton kernel alone")
def test_fused_head_of_the_host_gives_the_same_loss(tmp_path, tokenizer):
    """Against TRL's fused head, which projects in tiles of its own."""
    trainer = make(tmp_path, tokenizer, peft_config=LORA)
    # It reads a bias, which PEFT's wrapper of a tied head has none of.
    trainer.model.get_output_embeddings().register_parameter("bias", None)
    batch = next(iter(trainer.get_train_dataloader()))
    noisy = trainer.diffusion_collator.corrupt(batch, seed=1, step=3)
    scores = trainer._score(trainer.model, noisy)
    fused = trainer.model(
        input_ids=noisy["inputs"]["input_ids"],
        attention_mask=noisy["inputs"]["attention_mask"],
        labels=noisy["targets"],
        shift_labels=noisy["targets"],
        fused_lm_head=True,
    )
    torch.testing.assert_close(-fused.log_probs[scores.keep], scores.nll, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(fused.entropy[scores.keep], scores.entropy, rtol=1e-4, atol=1e-5)
    assert torch.equal(fused.is_top1[scores.keep], scores.right)


@pytest.mark.parametrize(
    ("peft_config", "settings"),
    [
        (None, {}),
        (LORA, {}),
        (LORA, {"normalization": "sequence"}),
        (LORA, {"normalization": "length"}),
        (LORA, {"normalization": "masked"}),
        (LORA, {"exact_mask_count": True}),
        (LORA, {"complementary_masks": True}),
        (LORA, {"attention": "block", "ar_loss_weight": 0.5, "normalization": "sequence"}),
        (None, {"normalization": "sequence"}),
        (None, {"normalization": "length"}),
        (None, {"normalization": "masked"}),
        (LORA, {"random_replacement": 0.2, "attention": "block"}),
        (LORA, {"attention": "lossless", "distillation_weight": 0.5}),
        (LORA, {"distillation_weight": 0.5, "distillation_hidden_weight": 0.1, "attention": "block"}),
        (LORA, {"distillation_weight": 1.0, "distillation_targets": "all", "on_policy_share": 0.5}),
    ],
)
def test_one_batch_of_8_and_eight_of_1_give_the_same_gradient(tmp_path, tokenizer, peft_config, settings):
    after = []
    for batch_size, accumulation in ((8, 1), (1, 8)):
        trainer = make(
            tmp_path,
            tokenizer,
            peft_config=peft_config,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=1.0,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            weight_decay=0.0,
            **settings,
        )
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
        trainer.train()
        now = dict(trainer.model.named_parameters())
        after.append(torch.cat([(now[name].detach() - before[name]).flatten() for name in before]))
    assert after[0].norm() > 1e-3
    assert (after[0] - after[1]).norm() / after[0].norm() < 1e-5


@pytest.mark.parametrize("normalization", ["token", "sequence", "length", "masked"])
def test_normalizations_are_their_formulas(tmp_path, tokenizer, normalization):
    trainer = make(tmp_path, tokenizer, normalization=normalization)
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    batch = batches[0]
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=count).item()
    noisy = trainer.diffusion_collator.corrupt(
        batch, seed=trainer.args.seed, step=0, rows=batch["noise_rows"], n_rows=batch["n_noise_rows"]
    )
    logits = trainer.model(**noisy["inputs"], use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), noisy["targets"], reduction="none")
    rows, n = (nll * noisy["weights"]).sum(-1), (batch["labels"] != IGNORE_INDEX).sum(-1)
    want = {
        "token": rows.sum() / n.sum(),
        "sequence": (rows / n).mean(),
        "length": rows.sum() / batch["attention_mask"].sum(),
        "masked": rows.sum() / noisy["masked"].sum(),
    }
    assert got == pytest.approx(want[normalization].item(), rel=1e-4)
    assert len({round(value.item(), 4) for value in want.values()}) == 4  # the test can tell them apart


def test_resumed_run_has_the_same_losses(tmp_path, tokenizer):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-2}
    straight = make(tmp_path / "a", tokenizer, peft_config=LORA, **settings)
    straight.train()
    again = make(tmp_path / "b", tokenizer, peft_config=LORA, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(straight)[2:] == losses(again)[-2:]


def test_noise_does_not_depend_on_loader_workers(tmp_path, tokenizer):
    runs = []
    for workers in (0, 2):
        trainer = make(tmp_path, tokenizer, max_steps=3, dataloader_num_workers=workers)
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == runs[1]


def test_evaluation_is_fixed_whatever_the_batch_size(tmp_path, tokenizer):
    found = []
    for size in (2, 3, 8):
        trainer = make(
            tmp_path, tokenizer, evaluation=tiny_dataset(8, split="test"), per_device_eval_batch_size=size, seed=1
        )
        found += [trainer.evaluate()["eval_loss"], trainer.evaluate()["eval_loss"]]
    assert max(found) - min(found) < 1e-5
    assert found[0] > 0


@pytest.mark.parametrize("tied", [True, False])
def test_mask_row_trains_under_lora_and_other_rows_do_not(tmp_path, tokenizer, tied):
    model = tiny_model(tied)
    trainer = make(tmp_path, tokenizer, model=model, peft_config=LORA, learning_rate=1e-2, max_steps=2)
    base = trainer.model.get_base_model()
    probe = torch.arange(512)[None]
    before = base.get_input_embeddings()(probe)[0].detach().clone()
    trainer.train()
    moved = (base.get_input_embeddings()(probe)[0] - before).abs().amax(-1) > 0
    assert moved.nonzero().flatten().tolist() == [tokenizer_mask(trainer)]


def test_prompt_stays_clean_and_pretraining_masks_everything(tmp_path, tokenizer):
    tuned = make(tmp_path, tokenizer, random_canvas=0.0, eos_tail=0)
    pretrained = make(tmp_path, tokenizer, completion_only_loss=False)
    for trainer, share in ((tuned, 0.6), (pretrained, 1.0)):
        batch = next(iter(trainer.get_train_dataloader()))
        trained = batch["labels"] != IGNORE_INDEX
        ratio = trained.sum() / batch["attention_mask"].sum()
        assert (ratio > 0.9) if share == 1.0 else (0.1 < ratio < share)
    row = next(iter(tuned.get_train_dataloader()))
    answer = tokenizer.decode(row["labels"][0][row["labels"][0] != IGNORE_INDEX])
    assert answer.endswith("<|im_end|>") and "assistant" not in answer and "user" not in answer


TWO_TURNS = [
    {"role": "user", "content": "Sort the letters: b a"},
    {"role": "assistant", "content": "a b"},
    {"role": "user", "content": "Sort the letters: d c"},
    {"role": "assistant", "content": "c d"},
]


@pytest.mark.parametrize("attention", ["bidirectional", "block"])
@pytest.mark.parametrize(
    ("row", "settings", "want"),
    [
        ({"messages": TWO_TURNS}, {}, "c d<|im_end|>"),
        ({"messages": TWO_TURNS}, {"assistant_only_loss": True}, "a b<|im_end|>c d<|im_end|>"),
        ({"prompt": TWO_TURNS[:1], "completion": TWO_TURNS[1:2]}, {}, "a b<|im_end|>"),
        ({"prompt": "2+2=", "completion": "4"}, {}, "4<|im_end|>"),
        ({"text": "2+2=4"}, {}, "+2=4<|im_end|>"),
    ],
    ids=["last turn", "every turn", "prompt and completion", "plain", "text"],
)
def test_what_is_trained(tmp_path, tokenizer, attention, row, settings, want):
    dataset = Dataset.from_list([row] * 4)
    trainer = make(tmp_path, tokenizer, dataset=dataset, eos_tail=0, random_canvas=0.0, attention=attention, **settings)
    labels = next(iter(trainer.get_train_dataloader()))["labels"][0]
    found = tokenizer.decode(labels[labels != IGNORE_INDEX])
    tail = found.removeprefix(want)
    assert found.startswith(want) and set(tail.split("<|im_end|>")) == {""}
    assert not tail or attention == "block"  # blocks are filled up


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
def test_saved_model_reloads_bidirectional_with_the_same_logits(tmp_path, tokenizer, peft_config):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    tokenizer.save_pretrained(base)
    model, own_tokenizer = load_diffusion_model(str(base))
    trainer = make(tmp_path, own_tokenizer, model=model, peft_config=peft_config, max_steps=2, learning_rate=1e-2)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    reloaded, _ = load_diffusion_model(str(tmp_path / "saved"))
    ids = torch.randint(0, 400, (2, 9))
    trainer.model.eval()
    torch.testing.assert_close(reloaded(ids).logits, trainer.model(ids).logits, rtol=1e-5, atol=1e-5)
    assert probe_attention(reloaded) == "bidirectional"
    record = (reloaded.get_base_model() if peft_config else reloaded).config.diffusion
    assert record["conversion_steps"] == 2
    assert record["training_tokens"] > 100


def test_a_name_and_defaults_are_enough(tmp_path):
    trainer = DiffusionSFTTrainer(
        "tiny",
        DiffusionSFTConfig(str(tmp_path), max_steps=1, per_device_train_batch_size=2, report_to="none", use_cpu=True),
        train_dataset=tiny_dataset(4),
        peft_config=LORA,
    )
    trainer.train()
    log = trainer.state.log_history[-1]
    assert log["train_loss"] > 0


def test_metrics_are_logged(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, max_steps=2)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["nelbo"] == pytest.approx(row["loss"], rel=1e-4)
    assert row["perplexity_bound"] == pytest.approx(torch.tensor(row["nelbo"]).exp().item(), rel=1e-4)
    assert 0.2 < row["mask_ratio"] < 0.8
    assert 0 <= row["masked_accuracy"] <= 1
    assert 0 < row["masked_entropy"] < torch.tensor(512.0).log()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"noise_schedule": "sigmoid"}, "noise_schedule"),
        ({"loss_weight": "mean"}, "loss_weight"),
        ({"normalization": "batch"}, "normalization"),
        ({"exact_mask_count": True, "max_mask_probability": 0.9}, "exact_mask_count"),
        ({"exact_mask_count": True, "complementary_masks": True}, "complementary_masks"),
        ({"min_mask_probability": 0.9, "max_mask_probability": 0.1}, "min_mask_probability"),
        ({"max_mask_probability": 1.5}, "max_mask_probability"),
        ({"eos_tail": -1}, "eos_tail"),
        ({"random_canvas": 2.0}, "random_canvas"),
        ({"padding_free": True}, "padding_free"),
        ({"packing": True, "packing_strategy": "wrapped"}, "packing_strategy"),
        ({"annealing": "block", "max_length": None}, "max_length"),
        ({"annealing": "hard"}, "annealing"),
        ({"final_causal_ratio": 0.2}, "final_causal_ratio"),
        ({"attention": "block", "annealing": "soft"}, "annealing"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"distillation_weight": 1.5}, "distillation_weight"),
        ({"distillation_hidden_weight": -1.0}, "distillation_hidden_weight"),
        ({"distillation_targets": "right"}, "distillation_targets"),
        ({"on_policy_share": 2.0, "distillation_weight": 1.0}, "on_policy_share"),
        ({"on_policy_share": 0.5}, "on_policy_share"),
        ({"random_replacement": 1.0}, "random_replacement"),
    ],
)
def test_bad_settings_are_refused_at_construction(tmp_path, settings, message):
    with pytest.raises(ValueError, match=message):
        DiffusionSFTConfig(str(tmp_path), **settings)


def test_bad_data_is_refused_before_any_step(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="max_length"):
        make(tmp_path, tokenizer, max_length=4)
    with pytest.raises(ValueError, match="longer than `max_length`"):
        make(tmp_path, tokenizer, attention="block", block_length=64, max_length=32)
    prompts_only = Dataset.from_list([{"input_ids": [5, 6, 7], "labels": [IGNORE_INDEX] * 3}] * 4)
    with pytest.raises(ValueError, match="every label is -100"):
        make(tmp_path, tokenizer, dataset=prompts_only)
    empty = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}])
    with pytest.raises(ValueError, match="row 0"):
        make(tmp_path, tokenizer, dataset=empty)
    with pytest.raises(TypeError, match="DiffusionSFTConfig"):
        DiffusionSFTTrainer(tiny_model(), object(), train_dataset=tiny_dataset(2), processing_class=tokenizer)


def losses_of_settings(folder, batch=2, accumulation=2):
    """Eight rows a step, as two processes of `batch` and `accumulation`, or one, take them."""
    found = []
    for settings in (
        {},
        {"normalization": "sequence"},
        {"normalization": "length"},
        {"normalization": "masked"},
        {"distillation_weight": 1.0, "distillation_targets": "all", "on_policy_share": 0.5},
    ):
        settings = {"max_steps": 2, "learning_rate": 1e-2, "gradient_accumulation_steps": accumulation, **settings}
        tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
        trainer = make(folder, tokenizer, peft_config=LORA, per_device_train_batch_size=batch, **settings)
        trainer.train()
        found += [[row["nelbo"], row["grad_norm"]] for row in trainer.state.log_history if "nelbo" in row][:2]
    return found


def test_two_processes_have_the_losses_of_one(tmp_path, in_two_processes):
    one, two = torch.tensor(losses_of_settings(tmp_path, 8, 1)), in_two_processes["losses_of_settings"][0]["result"]
    assert one.shape == (10, 2)
    assert len(set(one[::2, 1].tolist())) == 5  # the test can tell the settings apart
    torch.testing.assert_close(torch.tensor(two), one, rtol=1e-4, atol=1e-5)


def bound_of_five(folder):
    """Of rows that two processes, in batches of two, can share out only if some are dealt twice."""
    evaluation = {"evaluation": tiny_dataset(5, split="test"), "per_device_eval_batch_size": 2}
    return make(folder, AutoTokenizer.from_pretrained(TINY_MODEL_PATH), **evaluation).evaluate()["eval_nelbo"]


def test_rows_that_a_loader_repeats_are_evaluated_once(tmp_path, in_two_processes):
    one = pytest.approx(bound_of_five(tmp_path), rel=1e-5)
    assert [found["result"] for found in in_two_processes["bound_of_five"]] == [one, one]


def test_places_of_rows_are_on_the_device_of_their_batch():
    """Where loaders put it: what a step's loss is divided by may be counted from the noise, before anything else is moved."""
    batch = {"input_ids": torch.ones(4, 8, dtype=torch.long, device="meta")}
    numbered_rows([batch], Accelerator(cpu=True))
    assert batch["noise_rows"].device == batch["input_ids"].device


def test_the_mask_row_joins_the_rows_that_a_user_trains(tmp_path, tokenizer):
    own = copy.deepcopy(LORA)
    own.trainable_token_indices = [5]
    trainer = make(tmp_path, tokenizer, peft_config=own)
    assert trainer.model.peft_config["default"].trainable_token_indices == [5, tokenizer_mask(trainer)]


@pytest.mark.parametrize("settings", [{}, {"attention": "block", "clean_context": "block"}])
def test_co_loss_needs_a_causal_clean_half(tmp_path, tokenizer, settings):
    """A block-causal clean half already sees the next token: the co-loss would teach copying."""
    with pytest.raises(ValueError, match="ar_loss_weight"):
        make(tmp_path, tokenizer, ar_loss_weight=0.5, **settings)


def test_co_loss_is_next_token_prediction_on_answers(tmp_path, tokenizer):
    """Its gradient is that of the plain causal loss of the same answer tokens."""
    trainer = make(tmp_path, tokenizer, attention="block", ar_loss_weight=1.0)
    batch = next(iter(trainer.get_train_dataloader()))
    noisy = trainer.diffusion_collator.corrupt(batch, seed=0, step=0)
    scores = trainer._score(trainer.model, noisy)
    labels = batch["labels"]
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX, reduction="sum"
    )
    torch.testing.assert_close((scores.nll * noisy["extra_weights"][scores.keep]).sum(), expected, rtol=1e-4, atol=1e-3)


def test_record_counts_every_step_and_token_once(tmp_path, tokenizer):
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = make(tmp_path / "a", tokenizer, peft_config=LORA, **settings)
    straight.train()
    counted = dict(straight.model.get_base_model().config.diffusion)
    assert counted["conversion_steps"] == 4
    again = make(tmp_path / "b", tokenizer, peft_config=LORA, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    resumed = again.model.get_base_model().config.diffusion
    for name in ("conversion_steps", "training_tokens"):
        assert resumed[name] == counted[name]


def test_streams_leave_their_prompts_clean_too(tmp_path, tokenizer):
    found = []
    for dataset in (tiny_dataset(8), tiny_dataset(8).to_iterable_dataset()):
        trainer = make(tmp_path, tokenizer, dataset=dataset, shuffle_dataset=False)
        found.append(sum((next(iter(trainer.train_dataset))["labels"][i] != IGNORE_INDEX) for i in range(8)))
    assert found == [0, 0]


def test_several_evaluation_sets_have_their_own_figures(tmp_path, tokenizer):
    sets = {"a": tiny_dataset(4, split="test"), "b": tiny_dataset(4, seed=5, split="test")}
    trainer = make(tmp_path, tokenizer, evaluation=sets)
    found = trainer.evaluate()
    alone = make(tmp_path, tokenizer, evaluation=sets["b"]).evaluate()
    assert found["eval_b_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
    assert found["eval_a_loss"] != found["eval_b_loss"]


# -- annealing, packing, time embedding


@pytest.mark.parametrize(
    ("settings", "want"),
    [
        ({"annealing": "soft", "annealing_schedule": "linear"}, {"causal_ratio": [0.75, 0.5, 0.25, 0.0]}),
        (
            {"annealing": "stochastic", "annealing_steps": 2, "final_causal_ratio": 0.2},
            {"causal_ratio": [0.6, 0.2, 0.2, 0.2]},
        ),
        ({"attention": "block", "annealing": "block"}, {"annealed_block_length": [1, 2, 2, 4]}),
    ],
)
def test_the_way_from_causal_attention_is_logged(tmp_path, tokenizer, settings, want):
    trainer = make(tmp_path, tokenizer, max_steps=4, **settings)
    trainer.train()
    for name, values in want.items():
        logged = [row[name] for row in trainer.state.log_history if name in row and "loss" in row]
        assert logged == pytest.approx(values)
    record = trainer.model.config.diffusion
    assert record["final_causal_ratio"] == settings.get("final_causal_ratio", 0.0)


@pytest.mark.parametrize("mode", ["soft", "stochastic", "block"])
def test_annealed_steps_follow_their_mask_and_evaluation_the_target(tmp_path, tokenizer, mode):
    """Against the same batch scored by hand: under the step's mask in training, without one in evaluation."""
    trainer = make(tmp_path, tokenizer, annealing=mode, annealing_steps=10, evaluation=tiny_dataset(6, split="test"))
    plain = make(tmp_path, tokenizer, evaluation=tiny_dataset(6, split="test"))
    assert trainer.evaluate()["eval_nelbo"] == plain.evaluate()["eval_nelbo"]
    trainer.state.global_step = 5
    batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, dict(batches[0]), num_items_in_batch=count)
    batch = batches[0]
    noisy = trainer.diffusion_collator.corrupt(
        batch, seed=trainer.args.seed, step=5, rows=batch["noise_rows"], n_rows=batch["n_noise_rows"]
    )
    way = trainer.args.annealing_to()
    bias = way.mask(batch["attention_mask"], 5, trainer.args.seed, trainer.args.max_length)
    logits = trainer.model(input_ids=noisy["inputs"]["input_ids"], attention_mask=bias, use_cache=False).logits
    nll = torch.nn.functional.cross_entropy(logits.transpose(1, 2), noisy["targets"], reduction="none")
    torch.testing.assert_close(got, (nll * noisy["weights"]).sum() / count, atol=1e-4, rtol=1e-5)


def test_a_model_that_counts_positions_by_its_mask_is_annealed(tmp_path, tokenizer):
    """The last of very many steps is as good as the target, which needs no 4-D mask."""
    losses = []
    for settings in ({}, {"annealing": "soft", "annealing_schedule": "linear", "annealing_steps": 10**6}):
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 64, "num_attention_heads": 2}
        model = OPTForCausalLM(OPTConfig(vocab_size=512, num_hidden_layers=2, dropout=0.0, **sizes))
        trainer = make(tmp_path, tokenizer, model, **settings)
        trainer.state.global_step = 10**6 - 1
        batch = step_batch(trainer)
        losses.append(trainer.compute_loss(trainer.model.train(), batch, num_items_in_batch=trainer.items).item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_annealing_resumes_where_it_was(tmp_path, tokenizer):
    settings = {
        "annealing": "stochastic",
        "annealing_steps": 5,
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = make(tmp_path / "a", tokenizer, peft_config=LORA, **settings)
    whole.train()
    again = make(tmp_path / "a", tokenizer, peft_config=LORA, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(again)[-2:] == losses(whole)[-2:]


def packed_and_single(lengths=((9, 5, 12), (7, 14))):
    """The same texts, several a row and one a row."""
    generator, texts, rows = torch.Generator().manual_seed(2), [], []
    for group in lengths:
        own = [torch.randint(3, 400, (n,), generator=generator).tolist() for n in group]
        texts += own
        rows.append({"input_ids": sum(own, []), "labels": sum(own, []), "seq_lengths": list(group)})
    return rows, [{"input_ids": text, "labels": text} for text in texts]


@pytest.mark.parametrize("settings", [{}, {"attention": "block"}, {"attention": "block", "clean_context": "block"}])
@torch.no_grad()
def test_packed_texts_are_scored_as_if_alone(tmp_path, tokenizer, settings):
    """The leak test: the same noise on the same texts, in packed rows and in rows of their own, gives the same log-probabilities."""
    trainer = make(tmp_path, tokenizer, packing=True, dataset=tiny_dataset(16), **settings)
    collator, model = trainer.diffusion_collator, trainer.model.eval()
    rows, singles = packed_and_single()
    noisy = collator.corrupt(collator(rows), seed=0, step=0, rows=torch.arange(2), n_rows=2)
    terms = trainer._score(model, noisy).nll
    places = positions(collator(rows)["attention_mask"])
    texts = collator(rows)["attention_mask"]
    got = []
    for row in range(2):
        for number in range(1, int(texts[row].max()) + 1):
            got.append(noisy["masked"][row][texts[row] == number])
    # The same texts alone, masked at the same places.
    alone = collator(singles)
    masked = torch.zeros_like(alone["labels"], dtype=torch.bool)
    for row, mask in enumerate(got):
        masked[row, : len(mask)] = mask
    ones = torch.ones(alone["labels"].shape)
    alone["attention_mask"] = (alone["attention_mask"] > 0).long()
    laid = collator.process.lay_out(alone, masked, ones, ones)
    want = trainer._score(model, laid).nll
    assert len(want) == len(terms) and places.max() == 13
    torch.testing.assert_close(terms.sort().values, want.sort().values, atol=1e-4, rtol=1e-4)


def test_packing_wastes_little_and_learns(tmp_path, tokenizer):
    """At most 5 % of what the model is handed holds no text, canvases and all; every canvas is packed once, whole."""
    texts = tiny_dataset(300)
    settings = {"max_length": 512, "max_steps": 2, "dataset": texts, "per_device_train_batch_size": 2}
    trainer = make(tmp_path, tokenizer, packing=True, **settings)
    batches = list(trainer.get_train_dataloader())
    parts = [part for batch in batches for part in by_length(batch)]
    real = sum(int((part["attention_mask"] > 0).sum()) for part in parts)
    assert 1 - real / sum(part["attention_mask"].numel() for part in parts) < 0.05
    alone = make(tmp_path, tokenizer, **settings)
    assert real == sum(int((batch["attention_mask"] > 0).sum()) for batch in alone.get_train_dataloader())
    assert max(int(batch["attention_mask"].max()) for batch in batches) > 1
    trainer.train()
    assert all(loss > 0 for loss in losses(trainer))


def test_rows_of_like_length_share_batches(tmp_path, tokenizer):
    """The host's `length` sampling: less padding than in random order."""

    def padding(**settings):
        trainer = make(tmp_path, tokenizer, dataset=tiny_dataset(128), random_canvas=0.0, eos_tail=0, **settings)
        batches = list(trainer.get_train_dataloader())
        return sum(int((batch["attention_mask"] == 0).sum()) for batch in batches)

    assert padding(train_sampling_strategy="group_by_length") < 0.5 * padding()


def test_texts_of_a_packed_row_have_times_of_their_own(tmp_path, tokenizer):
    collator = make(tmp_path, tokenizer, packing=True).diffusion_collator
    batch = collator(packed_and_single()[0])
    times = collator.corrupt(batch, seed=0, step=0, rows=torch.arange(2), n_rows=2)["times"]
    for row in range(2):
        values = [times[row][batch["attention_mask"][row] == number].unique() for number in (1, 2)]
        assert len(values[0]) == len(values[1]) == 1 and values[0] != values[1]


@pytest.mark.parametrize("quantized", [False, True])
def test_a_time_embedding_trains_under_lora(tmp_path, tokenizer, quantized):
    model = tiny_model()
    if quantized:
        pytest.importorskip("bitsandbytes")
        model.save_pretrained(tmp_path / "base")
        tokenizer.save_pretrained(tmp_path / "base")
        model, tokenizer = load_diffusion_model(
            str(tmp_path / "base"), quantization="nf4", time_embedding=True, device="cpu"
        )
    settings = {"time_embedding": True, "learning_rate": 1e-2, "max_steps": 3}
    trainer = make(tmp_path / "out", tokenizer, model, peft_config=LORA, **settings)
    assert not any("lora" in name and "time_embedding" in name for name, _ in trainer.model.named_parameters())
    trainer.train()
    embedding = trainer.model.get_base_model().time_embedding
    assert embedding.modules_to_save.default.down.weight.abs().max() > 0
    assert embedding.original_module.down.weight.abs().max() == 0
    trainer.save_model(str(tmp_path / "saved"))
    if not quantized:
        return
    again, _ = load_diffusion_model(str(tmp_path / "saved"), quantization="nf4", device="cpu")
    for one, other in zip(
        again.get_base_model().time_embedding.modules_to_save.default.parameters(),
        embedding.modules_to_save.default.parameters(),
        strict=True,
    ):
        torch.testing.assert_close(one.float(), other.float())


def test_a_reloaded_adapter_on_a_4_bit_base_is_readied_for_training(tmp_path, tokenizer):
    pytest.importorskip("bitsandbytes")
    tiny_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    options = {"quantization": "nf4", "device": "cpu", "dtype": torch.bfloat16}
    model, tokenizer = load_diffusion_model(str(tmp_path / "base"), **options)
    trainer = make(tmp_path / "out", tokenizer, model, peft_config=LORA)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again, _ = load_diffusion_model(str(tmp_path / "saved"), **options)
    second = make(tmp_path / "more", tokenizer, again)
    norms = [p for name, p in second.model.named_parameters() if "norm" in name]
    assert norms and all(p.dtype == torch.float32 and not p.requires_grad for p in norms)
    before = {name: p.clone() for name, p in second.model.named_parameters() if "lora_B" in name}
    second.train()
    assert any(not torch.equal(p, before[name]) for name, p in second.model.named_parameters() if name in before)


def test_models_that_ignore_masks_are_not_annealed(tmp_path, tokenizer):
    model = tiny_model()
    patch_causal_attention(model, "sdpa")
    model.config.is_causal = None
    with pytest.raises(ValueError, match="does not follow 4-D attention masks, which `annealing` needs"):
        make(tmp_path, tokenizer, model, annealing="soft")


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"attention": "block"}, "gives the causal model: block attention"),
        ({"time_embedding": True}, "ignores the time embedding"),
        ({"annealing": "soft", "final_causal_ratio": 0.5}, "not what was trained"),
        ({}, "honours `config.is_causal`"),
    ],
)
def test_the_card_says_what_plain_loaders_make_of_it(tmp_path, tokenizer, settings, said):
    trainer = make(tmp_path / "out", tokenizer, max_steps=1, **settings)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    card = (tmp_path / "saved" / "README.md").read_text()
    assert said in card and "ld.DiffusionInference.from_pretrained" in card and "1 steps" in card
    trainer.create_model_card(model_name="mine", tags="own")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "# mine" in card and "- own" in card and "- masked-diffusion" in card


def test_the_card_of_an_adapter_tells_whether_its_base_is_converted(tmp_path, tokenizer):
    model, own = load_diffusion_model("tiny", device="cpu")
    model.save_pretrained(tmp_path / "converted")
    own.save_pretrained(tmp_path / "converted")
    for source, said in (
        ("tiny", "because the base of this adapter is one"),
        ("converted", "honours `config.is_causal`"),
    ):
        path = source if source == "tiny" else str(tmp_path / source)
        model, own = load_diffusion_model(path, device="cpu")
        trainer = make(tmp_path / "out", own, model, peft_config=LORA)
        trainer.save_model(str(tmp_path / "saved"))
        assert said in (tmp_path / "saved" / "README.md").read_text()


@pytest.mark.parametrize("settings", [{"attention": "bidirectional"}, {"attention": "block", "ar_loss_weight": 0.5}])
def test_the_loss_by_noise_level_is_logged(tmp_path, tokenizer, settings):
    """Against the terms of the same batch, sorted by hand into thirds of the mask probability."""
    trainer = make(tmp_path, tokenizer, evaluation=tiny_dataset(24, split="test"), **settings)
    logged = trainer.evaluate()
    assert {f"eval_{name}" for name in trainer.args.evaluated} <= set(logged)
    terms, levels = [], []
    trainer.model.eval()
    with torch.no_grad():
        for batch in trainer.get_eval_dataloader():
            noisy = trainer.diffusion_collator.corrupt(batch, seed=trainer.args.seed, step=0)
            scores = trainer._score(trainer.model, noisy)
            terms.append(scores.nll)
            levels.append(noisy["levels"][scores.keep])
    terms, levels = torch.cat(terms), torch.cat(levels)
    for name, low, high in (("low", 1e-9, 1 / 3), ("middle", 1 / 3, 2 / 3), ("high", 2 / 3, 2)):
        want = terms[(levels >= low) & (levels < high)].mean().item()
        assert logged[f"eval_masked_nll_{name}_noise"] == pytest.approx(want, rel=1e-4)


def test_complementary_masks_are_two_passes(tmp_path, tokenizer):
    def loss(complementary):
        trainer = make(tmp_path, tokenizer, complementary_masks=complementary)
        batches, count = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
        trainer.model.train()
        value = trainer.compute_loss(trainer.model, dict(batches[0]), num_items_in_batch=count)
        return value.item(), trainer, batches[0], count

    both, trainer, batch, count = loss(True)
    single, *_ = loss(False)
    noisy = trainer.diffusion_collator.corrupt(
        batch,
        seed=trainer.args.seed,
        step=0,
        rows=batch["noise_rows"],
        n_rows=batch["n_noise_rows"],
        complement=True,
    )
    scores = trainer._score(trainer.model, noisy)
    other = ((scores.nll * noisy["weights"][scores.keep]).sum() / count).item()
    assert both == pytest.approx((single + other) / 2, rel=1e-5)


def test_both_passes_of_complementary_masks_are_counted(tmp_path, tokenizer):
    """Together they mask every token once; the first alone may have masked none."""
    trainer = make(tmp_path, tokenizer, normalization="masked", complementary_masks=True, per_device_train_batch_size=1)
    for step in range(5):
        trainer.state.global_step = step
        batch = step_batch(trainer)
        assert trainer.items == (batch["labels"] != IGNORE_INDEX).sum() / 2


def test_what_stays_of_the_causal_mask_stays_in_later_runs(tmp_path, tokenizer):
    first = make(tmp_path, tokenizer, annealing="soft", final_causal_ratio=0.5)
    first.train()
    model, own = first.model.eval(), first.processing_class
    assert model.config.diffusion["final_causal_ratio"] == 0.5
    with pytest.raises(ValueError, match="packing"):
        make(tmp_path, own, model, packing=True)
    ids = torch.arange(3, 12)[None]
    want = model(ids, attention_mask=annealed(torch.ones(1, 9, dtype=torch.long), 0.5)).logits
    torch.testing.assert_close(model(ids).logits, want, atol=1e-5, rtol=1e-5)


def test_annealing_does_not_start_again(tmp_path, tokenizer, caplog):
    """Two phases with the same settings: the second one's model has reached its target."""
    settings = {"annealing": "soft", "annealing_schedule": "linear", "max_steps": 2}
    first = make(tmp_path, tokenizer, **settings)
    first.train()
    second = make(tmp_path, first.processing_class, first.model, **settings)
    second.train()
    assert not any("causal_ratio" in row for row in second.state.log_history)
    assert "`annealing` is skipped" in caplog.text


def test_a_model_that_was_annealed_keeps_its_target(tmp_path, tokenizer):
    first = make(tmp_path, tokenizer, annealing="soft", final_causal_ratio=0.5)
    first.train()
    model, own = first.model, first.processing_class
    with pytest.raises(ValueError, match="final_causal_ratio"):
        make(tmp_path, own, model, annealing="soft")
    with pytest.raises(ValueError, match="packing"):
        make(tmp_path, own, model, packing=True, annealing="soft", final_causal_ratio=0.5)


def test_a_way_that_is_over_before_it_starts_is_said_to_be_skipped(tmp_path, tokenizer, caplog):
    first = make(tmp_path, tokenizer, max_steps=3)
    first.train()
    second = make(tmp_path, first.processing_class, first.model, max_steps=1, annealing="soft", annealing_steps=2)
    second.train()
    assert "`annealing` is skipped" in caplog.text
    assert not any("causal_ratio" in row for row in second.state.log_history)


def test_annealing_goes_on_in_a_second_phase(tmp_path, tokenizer):
    settings = {"annealing": "soft", "annealing_schedule": "linear", "annealing_steps": 4, "max_steps": 2}
    first = make(tmp_path, tokenizer, **settings)
    first.train()
    second = make(tmp_path, first.processing_class, first.model, **settings)
    second.train()
    ratios = [row["causal_ratio"] for row in second.state.log_history if "loss" in row]
    assert ratios == pytest.approx([0.25, 0.0])


def test_evaluation_rows_may_be_packed_alone(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, eval_packing=True, evaluation=tiny_dataset(24, split="test"), max_length=128)
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch["attention_mask"].max() > 1
    noisy = trainer.diffusion_collator.corrupt(batch, seed=0, step=0)
    assert noisy["inputs"]["attention_mask"].dim() == 4


def test_an_adapter_over_a_fully_trained_model_is_loaded_on_it(tmp_path, tokenizer):
    """The base's fingerprint is of the weights that the adapter was made on."""
    model, own = load_diffusion_model("tiny", device="cpu")
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    model.save_pretrained(tmp_path / "full")
    own.save_pretrained(tmp_path / "full")
    model, own = load_diffusion_model(str(tmp_path / "full"), device="cpu")
    make(tmp_path / "out", own, model, peft_config=LORA).save_model(str(tmp_path / "adapter"))
    load_diffusion_model(str(tmp_path / "adapter"), device="cpu")


CANVASES = {
    "max_canvas": 24,
    "first_step_share": 0.5,
    "eos_tail_weight": 0.5,
    "pad_mask_ratio": 0.8,
    "pad_annealing_steps": 2,
}


def test_first_steps_stand_beside_the_bound(tmp_path, tokenizer):
    """The objective from full logits, and a logged bound that leaves whole first-step rows out."""
    trainer = make(tmp_path, tokenizer, per_device_train_batch_size=16, **CANVASES)
    trainer.state.global_step = 1  # the tail's rate is on its way
    (batch,), items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, torch.device("cpu"))
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=items)
    noisy = trainer._corrupt(batch, "train")
    assert 0 < noisy["first_step"].sum() < 16
    with torch.no_grad():
        logits = trainer.model(**noisy["inputs"]).logits.double().log_softmax(-1)
    objective, bound = 0.0, 0.0
    for row, place in (noisy["targets"] != IGNORE_INDEX).nonzero().tolist():
        term = -logits[row, place, noisy["targets"][row, place]]
        bound += term * noisy["weights"][row, place]
        objective += term * (noisy["weights"] + noisy["extra_weights"])[row, place]
    assert loss.item() == pytest.approx(float(objective / items), rel=1e-5)
    counted = (batch["labels"] != IGNORE_INDEX)[~noisy["first_step"]].sum()
    assert trainer._metric_values("train")["nelbo"] == pytest.approx(float(bound / counted), rel=1e-5)


def test_a_tail_of_its_own_token_is_trained_and_remembered(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, peft_config=LORA, tail="pad", max_canvas=24)
    record = trainer.model.get_base_model().config.diffusion
    assert record["tail_token_id"] == tokenizer.pad_token_id != tokenizer.eos_token_id
    rows = trainer.model.peft_config["default"].trainable_token_indices
    assert set(rows) >= {record["mask_token_id"], tokenizer.pad_token_id}
    batch = next(iter(trainer.get_train_dataloader()))
    behind = (batch["input_ids"] == tokenizer.pad_token_id) & (batch["labels"] != IGNORE_INDEX)
    assert behind.any()


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"max_canvas": 0}, "max_canvas"),
        ({"eos_tail_weight": -1.0}, "eos_tail_weight"),
        ({"pad_annealing_steps": 0}, "pad_annealing_steps"),
        ({"pad_mask_ratio": 0.0}, "pad_mask_ratio"),
        ({"first_step_share": 1.5}, "first_step_share"),
        ({"tail": "mask"}, "tail"),
        ({"first_step_share": 0.2, "exact_mask_count": True}, "exact_mask_count"),
        ({"pad_mask_ratio": 0.5, "complementary_masks": True}, "complementary_masks"),
        ({"max_canvas": 16, "attention": "block"}, "max_canvas"),
        ({"first_step_share": 0.2, "packing": True, "max_length": 64}, "packing"),
    ],
)
def test_canvases_that_cannot_be(tmp_path, tokenizer, settings, field):
    with pytest.raises(ValueError, match=f"`{field}`"):
        make(tmp_path, tokenizer, **settings)


def test_ends_need_tokens_of_their_own(tmp_path, tokenizer):
    same = copy.deepcopy(tokenizer)
    same.pad_token = same.eos_token
    with pytest.raises(ValueError, match="`tail`='pad'"):
        make(tmp_path, same, tail="pad")
