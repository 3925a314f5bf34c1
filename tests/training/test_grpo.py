"""DiffusionGRPOTrainer: rollouts, advantages and the loss by a second formula, noise, resuming, refusals."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from small_trainers import LORA, SETTINGS, tiny_model
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForSequenceClassification
from trl import GRPOConfig

from llm_diffusion import DiffusionGRPOConfig, DiffusionGRPOTrainer, convert_to_diffusion
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.training.config import own_config

PROMPTS = Dataset.from_list(
    [{"prompt": text, "wanted": i} for i, text in enumerate(("2+3=", "10+40=", "7*", "9-1-2="))]
)
ROLLOUTS = {"num_generations": 4, "max_completion_length": 6, "generation_kwargs": {"steps": 3}}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY_MODEL_PATH)


def brevity(completions, **_):
    return [-float(len(text)) for text in completions]


def make(tmp_path, tokenizer, rewards=brevity, data=PROMPTS, attention="bidirectional", seed=0, **settings):
    own = copy.deepcopy(tokenizer)
    shift = settings.get("right_shift_logits")
    model = tiny_model(attention_dropout=settings.pop("attention_dropout", 0.0))
    model = convert_to_diffusion(model, own, attention=attention, right_shift_logits=shift)
    others = {name: settings.pop(name) for name in ("peft_config", "eval_dataset", "tools") if name in settings}
    others |= {
        name: settings.pop(name)
        for name in ("rollout_func", "reward_processing_classes", "ref_model")
        if name in settings
    }
    settings = (
        SETTINGS | {"per_device_train_batch_size": 8, "learning_rate": 1e-2, "num_draws": 2} | ROLLOUTS | settings
    )
    args = DiffusionGRPOConfig(str(tmp_path), seed=seed, **settings)
    return DiffusionGRPOTrainer(model, rewards, args, data, processing_class=own, **others)


def micro_batches(trainer):
    """Those of the first optimiser step, rolled out."""
    loader, n = iter(trainer.get_train_dataloader()), trainer.args.gradient_accumulation_steps
    raw, _ = trainer.get_batch_samples(loader, n, torch.device("cpu"))
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = n
    batches = []
    for rows in raw:
        batches.append(trainer._prepare_inputs(rows))
        trainer._step += 1
    trainer._step = 0
    return batches


def nudge(model, scale=0.05):
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
            parameter.add_(scale * noise * parameter.requires_grad)


def test_rollouts_and_advantages(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, attention="block", generation_kwargs={})
    (batch,) = micro_batches(trainer)
    ends, mask_id = set(trainer.eos_token_ids), trainer.model.config.diffusion["mask_token_id"]
    texts, groups = [], {}
    for i, (ids, seen) in enumerate(zip(batch["completion_ids"], batch["completion_mask"].bool(), strict=True)):
        answer = ids[seen].tolist()
        assert mask_id not in answer and not ends & set(answer[:-1])
        assert answer[-1] in ends or len(answer) == 6
        texts.append(tokenizer.decode(answer, skip_special_tokens=True))
        groups.setdefault(tuple(batch["prompt_ids"][i].tolist()), []).append(i)
    assert [len(rows) for rows in groups.values()] == [4, 4] and len(set(texts)) > 2
    for rows in groups.values():
        rewards = torch.tensor(brevity([texts[row] for row in rows]))
        expected = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
        torch.testing.assert_close(batch["advantages"][rows], expected)


def elbo_a_token(model, trainer, batch):
    """From full logits, the right shift and the masks alone."""
    mask_id, total = model.config.diffusion["mask_token_id"], 0.0
    for noisy in trainer._draws(batch):
        masked = noisy["masked"]
        ids = noisy["inputs"]["input_ids"].clone()
        assert (ids[masked] == mask_id).all()
        seen = noisy["inputs"]["attention_mask"]
        logits = model(input_ids=ids, attention_mask=seen).logits
        read = torch.cat([logits[:, :1], logits[:, :-1]], 1).log_softmax(-1)
        for row, places in enumerate(masked):
            prompt, answer = (batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()] for name in ("prompt", "completion"))  # fmt: skip
            clean = torch.cat([prompt, answer])
            assert not places[: len(prompt)].any() and places.any() and not places[len(clean) :].any()
            chosen = read[row, : len(clean)].gather(-1, clean[:, None])[:, 0][places[: len(clean)]]
            share = torch.zeros(len(masked)).index_fill(0, torch.tensor(row), 1.0)
            total = total + share * chosen.mean() / trainer.args.num_draws
    return total


def gradients(model, loss_of):
    model.zero_grad()
    loss = loss_of()  # which sends all draws but the last one back itself
    loss.backward(retain_graph=True)
    return loss.item(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_gradient_is_that_of_the_written_out_loss(tmp_path, tokenizer):
    trainer = make(tmp_path, tokenizer, num_iterations=2, right_shift_logits=True, epsilon=0.02, beta=0.1)
    model = trainer.model
    (batch,) = micro_batches(trainer)
    with torch.no_grad():
        first = elbo_a_token(model.train(), trainer, batch)
    n, a = batch["completion_mask"].sum(-1), batch["advantages"]
    for name in ("old_per_token_logps", "ref_per_token_logps"):
        torch.testing.assert_close(batch[name][:, 0], first, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(batch[name].sum(-1), first * n, atol=1e-4, rtol=1e-5)
    nudge(model)
    score = elbo_a_token(model, trainer, batch)
    ratio = (score - first).exp()
    clipped = ratio.clamp(0.98, 1.02)
    assert (ratio * a > clipped * a).any() and (ratio * a < clipped * a).any()
    kl = ((first - score).exp() - (first - score) - 1) * ratio
    clip = -torch.minimum(ratio * a, clipped * a) + 0.1 * kl
    cispo = -ratio.clamp(max=1.01).detach() * a * score + 0.1 * kl
    written_out = {
        "grpo": clip.mean(), "dapo": (clip * n).sum() / n.sum(), "dr_grpo": (clip * n).sum() / (8 * 6),
        "cispo": (cispo * n).sum() / n.sum(),
    }  # fmt: skip
    for trainer.loss_type, expected in written_out.items():
        trainer.epsilon_high = 1.01 if trainer.loss_type == "cispo" else 0.02
        loss, found = gradients(model, lambda: trainer.compute_loss(model, batch))
        value, wanted = gradients(model, lambda expected=expected: expected)
        assert loss == pytest.approx(value, rel=1e-4, abs=1e-6)
        largest = max(float(gradient.abs().max()) for gradient in wanted.values())
        assert largest > 1e-4
        for name, gradient in wanted.items():
            torch.testing.assert_close(found[name], gradient, atol=1e-3 * largest, rtol=0, msg=name)


def test_a_block_model_divides_by_all_that_is_scored(tmp_path, tokenizer):
    """Behind an answer's end the end tokens up to the end of the block are scored too; written out from full logits."""
    trainer = make(tmp_path, tokenizer, attention="block", right_shift_logits=False)
    end, model = trainer.eos_token_ids[0], trainer.model
    ids = torch.tensor([[0, 11, 12, 31, 32, end, 0], [21, 22, 23, 41, 42, 43, 44]])
    seen = torch.tensor([[0, 1, 1, 1, 1, 1, 0], [1] * 7])
    scored = torch.tensor([6.0, 4.0])  # of two blocks behind two tokens; the cut answer gets no end
    expected = torch.zeros(2, 2)
    with torch.no_grad():
        found = trainer._get_per_token_logps_and_entropies(model, ids, seen, 4, None, True)
        for noisy in trainer._draws({"input_ids": ids, "attention_mask": seen, "prompt_ids": ids[:, :3]}):
            read = model(**trainer._model_inputs(noisy)).logits.log_softmax(-1)
            chosen = read.gather(-1, noisy["targets"].clamp(min=0)[..., None])[..., 0]
            weights = noisy["weights"] * (noisy["targets"] != -100)
            terms = torch.stack([chosen, -(read.exp() * read).sum(-1)])
            expected += (terms * weights).sum(-1) / scored / trainer.args.num_draws
    for values, wanted in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(values, wanted[:, None] * seen[:, 3:])
    assert found[1].max() <= math.log(model.config.vocab_size)


@pytest.mark.parametrize("attention, adapted", [("block", True), ("bidirectional", False)])
def test_ratios_are_one_at_the_start(tmp_path, tokenizer, attention, adapted):
    settings = {"peft_config": LORA} if adapted else {}
    settings |= {"attention_dropout": 0.5}  # which no module of dropout applies
    trainer = make(tmp_path, tokenizer, attention=attention, beta=0.1, num_iterations=2, **settings)
    assert (trainer.ref_model is None) == adapted
    (batch,) = micro_batches(trainer)
    with torch.no_grad():
        scores, entropies, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, batch["input_ids"], batch["attention_mask"], batch["completion_ids"].shape[1], None, True
        )
        loss = trainer.compute_loss(trainer.model, batch)
    assert torch.equal(scores, batch["old_per_token_logps"]) and torch.equal(scores, batch["ref_per_token_logps"])
    assert (scores < 0).equal(batch["completion_mask"].bool()) and (entropies > 0).equal(scores < 0)
    assert trainer._metrics["train"]["kl"] == [0.0] and loss.item() == pytest.approx(0, abs=1e-6)


def test_masks_and_steps_do_not_depend_on_how_they_are_cut_up(tmp_path, tokenizer):
    masks, moved = [], []
    for size, accumulated in ((16, 1), (4, 4)):
        settings = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated}
        trainer = make(tmp_path, tokenizer, peft_config=LORA, optim="sgd", max_grad_norm=0, **settings)
        own = {}
        for part in micro_batches(trainer):
            for noisy in trainer._draws(part):
                for ids, seen, row in zip(part["input_ids"], part["attention_mask"], noisy["masked"], strict=True):
                    own.setdefault(tuple(ids[seen.bool()].tolist()), []).append(row[: int(seen.sum())].tolist())
        masks.append({text: sorted(map(str, rows)) for text, rows in own.items()})
        trainer._buffered_inputs = None
        trainer.train()
        moved.append({name: p.detach().clone() for name, p in trainer.model.named_parameters() if "lora_B" in name})
    assert masks[0] == masks[1]
    largest = max(float(value.abs().max()) for value in moved[0].values())
    assert largest > 1e-6
    for name, value in moved[1].items():
        torch.testing.assert_close(value, moved[0][name], atol=1e-3 * largest, rtol=0)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, tokenizer):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2, "peft_config": LORA, "num_draws": 1}
    # Four micro-batches an epoch: the second step has one alone.
    settings |= {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 3, "steps_per_generation": 1}
    whole = make(tmp_path, tokenizer, **settings)
    whole.train()
    history = [(row.get("reward"), row["loss"]) for row in whole.state.log_history if "loss" in row]
    resumed = make(tmp_path, tokenizer, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert [(row.get("reward"), row["loss"]) for row in resumed.state.log_history if "loss" in row] == history
    moved = 0.0
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
        moved += float(one.detach().abs().sum()) * ("lora_B" in name)
    assert moved > 0


async def loudness(completions, log_metric, **_):
    log_metric("asked", len(completions))
    return [None if i % 2 else 1.0 for i, _ in enumerate(completions)]


def test_rewards_are_those_of_trl(tmp_path, tokenizer):
    """Functions, async ones and reward models, with columns of the data; truncated answers left out; evaluation, whose noise is fixed."""
    config = Qwen3Config(vocab_size=512, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, head_dim=16, num_labels=1)  # fmt: skip

    def wanted(prompts, completions, wanted, **_):
        return [float(number) for number in wanted]

    trainer = make(
        tmp_path, tokenizer, [wanted, loudness, Qwen3ForSequenceClassification(config), brevity], mask_truncated_completions=True,
        reward_processing_classes=[None, None, copy.deepcopy(tokenizer), None], reward_weights=[1.0, 0.5, 2.0, 1.0], loss_type="grpo",
        eval_dataset=PROMPTS.select([0, 1]), per_device_eval_batch_size=4,
    )  # fmt: skip
    trainer.train()
    logged = trainer.state.log_history[0]
    assert logged["rewards/loudness/mean"] == 1.0 and logged["asked"] == 8 and "draws" in logged
    trainer.mask_truncated_completions = False
    first = trainer.evaluate()
    trainer._step += 1  # as after another step
    again = trainer.evaluate()
    same = ("eval_entropy", "eval_rewards/brevity/mean", "eval_reward", "eval_loss")
    assert [first[name] for name in same] == [again[name] for name in same] and first["eval_entropy"] > 0
    assert first["eval_rewards/wanted/mean"] == 0.5


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"use_vllm": True}, "use_vllm`: vLLM cannot"),
        ({"vllm_importance_sampling_correction": False}, "vllm_importance_sampling_correction"),
        ({"use_transformers_paged": True}, "use_transformers_paged`: continuous"),
        ({"use_transformers_continuous_batching": True}, "use_transformers_continuous_batching"),
        ({"transformers_continuous_batching_config": {}}, "transformers_continuous_batching_config"),
        ({"cache_implementation": "static"}, "cache_implementation"),
        ({"cast_lm_head_to_fp32": True}, "cast_lm_head_to_fp32"),
        ({"top_entropy_quantile": 0.5}, "top_entropy_quantile"),
        ({"entropy_coef": 0.1}, "entropy_coef"),
        ({"use_adaptive_entropy": True}, "use_adaptive_entropy"),
        ({"entropy_target": 0.1}, "entropy_target"),
        ({"max_tool_calling_iterations": 1}, "max_tool_calling_iterations"),
        ({"log_multimodal": False}, "log_multimodal"),
        ({"disable_dropout": False}, "disable_dropout"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha"),
        ({"generation_kwargs": {"seed": 3}}, "generation_kwargs`: every generation"),
        ({"fsdp": "full_shard"}, "fsdp`, `deepspeed`: a rollout takes"),
        ({"temperature": 0.0}, "temperature"),
        ({"num_generations": 1}, "num_generations"),
        ({"num_draws": 0}, "num_draws"),
    ],
)
def test_bad_settings_are_refused(tmp_path, settings, message):
    with pytest.raises(ValueError, match=f"`{message}"):
        DiffusionGRPOConfig(str(tmp_path), **settings)


def test_split_weights_of_accelerate_launch_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="`fsdp`, `deepspeed`: a rollout takes .* under FSDP"):
        DiffusionGRPOConfig(str(tmp_path), use_cpu=True)


def test_what_the_trainer_cannot_do_is_refused(tmp_path, tokenizer):
    for name in ("tools", "rollout_func"):
        with pytest.raises(ValueError, match=f"`{name}`: rollouts are one answer"):
            make(tmp_path, tokenizer, **{name: [print]})
    with pytest.raises(ValueError, match="`ref_model`: the reference is the model as it is"):
        make(tmp_path, tokenizer, ref_model="somewhere")
    with pytest.raises(ValueError, match="`model`: a drafter's words"):
        make(tmp_path, tokenizer, attention="lossless")


def test_memory_may_run_out_in_a_rollout(tmp_path, tokenizer):
    calls = []

    def burst(completions, **_):
        calls.append(completions)
        if len(calls) == 2:  # behind a step, whose batch is not to blame
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return brevity(completions)

    with pytest.raises(torch.OutOfMemoryError, match="^CUDA out of memory. Tried to allocate 2.00 GiB.$"):
        make(tmp_path, tokenizer, burst, max_steps=2, num_draws=1).train()


def test_decoding_settings_that_mean_nothing_are_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="`min_p` is not supported when decoding by unmasking"):
        make(tmp_path, tokenizer, min_p=0.1).train()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own configs set it
def test_plain_configs_become_ours(tmp_path):
    plain = GRPOConfig(str(tmp_path), num_generations=4, per_device_train_batch_size=8, use_cpu=True, bf16=False)
    args = own_config(plain, DiffusionGRPOConfig, "")
    assert type(args) is DiffusionGRPOConfig and args.generation_batch_size == 8


def steps_of_rollouts(folder):
    """Two steps of two prompts each; the answers of this process, and sums of the weights."""
    answers = []

    def lengths(completions, **_):
        answers.extend(completions)
        return brevity(completions)

    tokenizer, settings = AutoTokenizer.from_pretrained(TINY_MODEL_PATH), {"max_steps": 2, "learning_rate": 0.1}
    trainer = make(folder, tokenizer, lengths, peft_config=LORA, per_device_train_batch_size=4, optim="sgd", **settings)
    trainer.train()
    sums = {name: p.double().sum().item() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return answers, sums, [row["reward"] for row in trainer.state.log_history if "loss" in row]


def test_two_processes_train_one_model(in_two_processes):
    """The processes roll out answers of their own, and take the same steps."""
    (first, weights, rewards), (second, others, _) = (
        found["result"] for found in in_two_processes["steps_of_rollouts"]
    )
    assert weights == others and max(abs(value) for name, value in weights.items() if "lora_B" in name) > 1e-6
    assert len(first) == len(second) == 8 and first != second
    assert rewards == pytest.approx([sum(brevity(first[i : i + 4] + second[i : i + 4])) / 8 for i in (0, 4)])
