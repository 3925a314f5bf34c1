"""The habits of TRL's users: what works unchanged, what means something else here, and what is refused in words."""

import copy
import json
import math
import re
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import HfApi
from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from small_trainers import LORA, make, pairs, tiny_model
from small_trainers import SETTINGS as COMMON
from transformers import AutoModelForCausalLM, HfArgumentParser, TrainingArguments
from trl import DPOConfig, ModelConfig, ScriptArguments, SFTConfig, TrlParser

from llm_diffusion import (
    DiffusionDPOConfig,
    DiffusionDPOTrainer,
    DiffusionSFTConfig,
    DiffusionSFTTrainer,
    UserError,
    load_diffusion_model,
)
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.models.checkpoints import from_hub
from llm_diffusion.models.record import read_record, record_of
from llm_diffusion.objective.modes import IGNORE_INDEX
from llm_diffusion.training.config import own_config

SETTINGS = COMMON | {"per_device_eval_batch_size": 3}


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
    args = DiffusionSFTConfig(str(folder), **{**SETTINGS, **(settings or {})})
    return DiffusionSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, **keywords)


def dpo(folder, model, tokenizer=None, settings=None, **keywords):
    keywords.setdefault("train_dataset", pairs(8))
    args = DiffusionDPOConfig(str(folder), **{**SETTINGS, "num_draws": 2, **(settings or {})})
    return DiffusionDPOTrainer(model, args=args, processing_class=tokenizer, **keywords)


@pytest.mark.parametrize(("build", "config"), [(sft, PromptTuningConfig), (dpo, PrefixTuningConfig)])
def test_virtual_tokens_are_refused_in_a_model_too(tmp_path, tokenizer, build, config):
    model = get_peft_model(tiny_model(), config(task_type="CAUSAL_LM", num_virtual_tokens=8))
    with pytest.raises(UserError, match="virtual tokens"):
        build(tmp_path, model, tokenizer)


@pytest.mark.parametrize(("build", "tied"), [(sft, True), (sft, False), (dpo, True)])
def test_the_mask_row_of_adapters_that_a_user_made_is_trained_and_saved(tmp_path, tokenizer, build, tied):
    model = get_peft_model(small(tmp_path / "base", tokenizer, rows=len(tokenizer), tied=tied), copy.deepcopy(LORA))
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
    ("settings", "reduced"),
    [({}, False), ({"attention": "block", "ar_loss_weight": 0.5}, False), ({"eval_accumulation_steps": 1}, True)],
)
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


WHOLE = [{"modules_to_save": [name]} for name in ("embed_tokens", "lm_head")] + [
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": r".*(q_proj|embed_tokens)"},
]


def reloads_exactly(trainer, folder):
    """Trained, saved and loaded, the logits are the same, those of all tokens that the tokenizer has."""
    trainer.train()
    trainer.save_model(folder)
    again, tokenizer = load_diffusion_model(str(folder), device="cpu")
    ids = torch.arange(len(tokenizer) - 6, len(tokenizer))[None]
    trainer.model.eval()
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    return tokenizer


@pytest.mark.parametrize(("tied", "room"), [(True, False), (False, True)])
@pytest.mark.parametrize("kept", WHOLE, ids=str)
def test_adapters_that_train_the_vocabulary_itself(tmp_path, tokenizer, kept, tied, room):
    small(tmp_path / "base", tokenizer, 512 if room else len(tokenizer), tied)
    config = LoraConfig(**kept)
    trainer = sft(tmp_path / "out", str(tmp_path / "base"), None, {"learning_rate": 0.05}, peft_config=config)
    reloads_exactly(trainer, tmp_path / "saved")
    assert config.trainable_token_indices is None and not config.ensure_weight_tying


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_whose_vocabulary_grew_is_saved_without_the_vocabulary(tmp_path, tokenizer, tied):
    small(tmp_path / "base", tokenizer, len(tokenizer), tied)
    trainer = sft(tmp_path / "out", str(tmp_path / "base"), None, {"learning_rate": 0.05}, peft_config=LORA)
    reloads_exactly(trainer, tmp_path / "saved")
    adapters = sum(p.numel() * 4 for p in trainer.model.parameters() if p.requires_grad)
    weights = tmp_path / "saved" / "adapter_model.safetensors"
    assert weights.stat().st_size < adapters + 20_000
    # One that was saved with the whole vocabulary, as PEFT does it by itself, still loads.
    trainer.model.save_pretrained(tmp_path / "saved", save_embedding_layers=True)
    assert weights.stat().st_size > adapters + 50_000
    reloads_exactly_as = load_diffusion_model(str(tmp_path / "saved"), device="cpu")[0]
    ids = torch.arange(5, 12)[None]
    assert torch.equal(reloads_exactly_as(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_rows_that_a_user_added_are_saved_with_the_vocabulary(tmp_path, tokenizer):
    model = small(tmp_path / "base", tokenizer, len(tokenizer))
    tokenizer.add_tokens(["<a>", "<b>"])
    model.resize_token_embeddings(len(tokenizer))
    reloads_exactly(sft(tmp_path / "out", model, tokenizer, peft_config=LORA), tmp_path / "saved")


@pytest.mark.parametrize(
    ("peft_config", "tied", "room"),
    [
        (None, True, True),
        (LORA, True, False),
        (LORA, False, True),
        (LORA, True, True),
        (LoraConfig(modules_to_save=["lm_head"]), False, True),
    ],
)
def test_a_chat_template_is_cloned_with_its_tokens(tmp_path, tokenizer, peft_config, tied, room):
    small(tmp_path / "base", tokenizer, 512 if room else len(tokenizer), tied)
    source = copy.deepcopy(tokenizer)
    source.add_special_tokens({"additional_special_tokens": ["<|a|>", "<|b|>"]})
    source.chat_template = source.chat_template.replace("<|im_start|>", "<|a|>")
    source.save_pretrained(tmp_path / "source")
    settings = {"learning_rate": 0.05, "chat_template_path": str(tmp_path / "source")}
    trainer = sft(tmp_path / "out", str(tmp_path / "base"), None, settings, peft_config=peft_config)
    new = trainer.processing_class.convert_tokens_to_ids("<|a|>")
    assert (
        new in trainer.train_dataset[0]["input_ids"]
        and trainer.args.chat_template_path == settings["chat_template_path"]
    )
    vocabulary = [trainer.model.get_input_embeddings(), trainer.model.get_output_embeddings()]
    before = [module.weight[new].detach().clone() for module in vocabulary]
    again = reloads_exactly(trainer, tmp_path / "saved")
    assert again.chat_template == source.chat_template and again.convert_tokens_to_ids("<|a|>") == new
    assert all(not module.weight[new].equal(row) for module, row in zip(vocabulary, before, strict=True))


@pytest.mark.parametrize("reference", ["name", "model", "without room"])
def test_an_autoregressive_reference_is_converted_as_the_policy_is(tmp_path, tokenizer, reference):
    small(tmp_path / "base", tokenizer, len(tokenizer) if reference == "without room" else None)
    given = str(tmp_path / "base") if reference == "name" else AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    trainer = dpo(tmp_path / "out", str(tmp_path / "base"), None, {"attention": "block"}, ref_model=given)
    assert record_of(trainer.ref_model).attention == "block"
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


@pytest.mark.parametrize("build", [sft, dpo])
def test_metrics_have_the_names_of_the_host(tmp_path, build):
    trainer = build(tmp_path, "tiny", eval_dataset=(tiny_dataset if build is sft else pairs)(4))
    trainer.train()
    logged, evaluated = trainer.state.log_history[0], trainer.evaluate()
    batch = next(iter(trainer.get_train_dataloader()))
    assert logged["num_tokens"] > 0 and batch["attention_mask"].dim() == 2
    for name in ("entropy", "mean_token_accuracy"):
        assert name in logged and f"eval_{name}" in evaluated
    if build is sft:
        assert (
            logged["entropy"] == logged["masked_entropy"] and logged["mean_token_accuracy"] == logged["masked_accuracy"]
        )
        record = record_of(trainer.model)
        assert logged["num_tokens"] == record.training_tokens


@pytest.mark.parametrize("build", [sft, dpo])
def test_records_count_every_trainer(tmp_path, build):
    trainer = build(
        tmp_path / "out", "tiny", None, {"max_steps": 2}, eval_dataset=(tiny_dataset if build is sft else pairs)(4)
    )
    trainer.train()
    trainer.evaluate()
    trainer.save_model(tmp_path / "saved")
    again = build(tmp_path / "again", str(tmp_path / "saved"))
    again.save_model(tmp_path / "same")  # saved before any step of its own
    for folder in ("saved", "same"):
        record = read_record(tmp_path / folder)
        assert record.conversion_steps == 2 and record.training_tokens > 0
    card = (tmp_path / "saved" / "README.md").read_text()
    assert "2 steps" in card and re.search(r"\| loss \| [\d.]+ \|", card) and "runtime" not in card


@pytest.mark.parametrize("peft_config", [None, LORA])
def test_what_is_pushed_during_training_loads(tmp_path, monkeypatch, peft_config):
    """The hub is a folder that everything that is uploaded is copied to."""

    def upload(self, repo_id, folder_path, path_in_repo=None, run_as_future=False, ignore_patterns=(), **options):
        ignore = shutil.ignore_patterns(*ignore_patterns)
        shutil.copytree(folder_path, tmp_path / "hub" / (path_in_repo or ""), ignore=ignore, dirs_exist_ok=True)
        done = Future()
        done.set_result(None)
        return done if run_as_future else SimpleNamespace(repo_url="")

    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **options: SimpleNamespace(repo_id=repo_id))
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    settings = {
        "push_to_hub": True,
        "hub_model_id": "me/mine",
        "max_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
    }
    settings |= {"save_strategy": "steps", "save_steps": 1}
    args = DiffusionSFTConfig(str(tmp_path / "out"), **{**SETTINGS, **settings})
    data = {"train_dataset": tiny_dataset(8), "eval_dataset": tiny_dataset(4)}
    trainer = DiffusionSFTTrainer("tiny", args, **data, peft_config=peft_config)
    trainer.train()
    card = (tmp_path / "hub" / "README.md").read_text()
    assert 'from_pretrained("me/mine")' in card and "2 steps" in card and "| nelbo |" in card
    again, tokenizer = load_diffusion_model(str(tmp_path / "hub"), device="cpu")
    assert record_of(again).conversion_steps == 2
    ids = torch.arange(5, 12)[None]
    trainer.model.eval()
    assert torch.equal(again(input_ids=ids).logits, trainer.model(input_ids=ids).logits)
    assert again.generation_config.mask_token_id == tokenizer.mask_token_id
    assert (tmp_path / "hub" / "custom_generate" / "generate.py").is_file() == (peft_config is None)
    if peft_config is None:
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "hub", trust_remote_code=True)
        assert torch.equal(plain.generate(ids, max_new_tokens=8), again.generate(ids, max_new_tokens=8))
    else:  # `trainer.model.push_to_hub` uploads this
        trainer.model.save_pretrained(tmp_path / "own")
        assert read_record(tmp_path / "own") == record_of(again)
    trainer.push_to_hub(dataset_name="me/rows", tags=["trl", "own"])
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "datasets:\n- me/rows\n" in card and card.count("\n- trl\n") == 1 and "\n- own\n" in card


def test_what_a_loader_refuses_is_not_said_to_be_missing(monkeypatch):
    def nonsense(name, **options):
        raise TypeError("got an unexpected keyword argument 'nonsense'")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", nonsense)
    with pytest.raises(OSError, match="not a loadable checkpoint: got an unexpected keyword argument 'nonsense'"):
        from_hub(AutoModelForCausalLM, "me/mine", nonsense=1)


LORA_HEAD = LoraConfig(target_modules=["lm_head"])
VIRTUAL = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)


@pytest.mark.parametrize(
    ("build", "name", "value"),
    [
        (sft, "loss_type", "dft"),
        (sft, "label_smoothing_factor", 0.1),
        (sft, "compute_loss_func", print),
        (sft, "data_collator", print),
        (sft, "packing_strategy", "wrapped"),
        (sft, "padding_free", True),
        (sft, "router_aux_loss_coef", 0.1),
        (sft, "peft_config", VIRTUAL),
        (sft, "peft_config", IA3Config()),
        (sft, "lm_head", LORA_HEAD),
        (sft, "with_transform", tiny_dataset(4).with_transform(dict)),
        (dpo, "use_weighting", True),
        (dpo, "ld_alpha", 0.5),
        (dpo, "compute_metrics", print),
        (dpo, "data_collator", print),
        (dpo, "truncation_mode", "keep_end"),
        (dpo, "disable_dropout", False),
        (dpo, "padding_free", True),
        (dpo, "label_smoothing_factor", 0.1),
    ],
)
def test_what_is_refused(tmp_path, build, name, value):
    """In one line that names it; the page says why."""
    keyword = {"lm_head": "peft_config", "with_transform": "train_dataset"}.get(name, name)
    arguments = {"peft_config", "train_dataset", "compute_loss_func", "data_collator", "compute_metrics"}
    given = {keyword: value} if keyword in arguments else {}
    settings = {} if given else {name: value, **({"packing": True} if name == "packing_strategy" else {})}
    with pytest.raises(ValueError, match=re.escape(name)) as error:
        build(tmp_path, "tiny", None, settings, **given)
    refused = (Path(__file__).parents[2] / "docs" / "trl.md").read_text().partition("## Refused")[2]
    assert f"`{name}" in refused and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("task", ["sft", "dpo"])
def test_the_quick_start_of_the_host(tmp_path, tokenizer, monkeypatch, task):
    """https://huggingface.co/docs/trl, after changing the import and the class name; a small model and few rows."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    small(tmp_path / "Qwen" / "Qwen3-0.6B", tokenizer, len(tokenizer))
    (tiny_dataset if task == "sft" else pairs)(8).to_json(tmp_path / "rows.jsonl")
    source = {
        "sft": """
from llm_diffusion import DiffusionSFTTrainer
from datasets import load_dataset

trainer = DiffusionSFTTrainer(
    model="Qwen/Qwen3-0.6B",
    train_dataset=load_dataset("json", data_files="rows.jsonl", split="train"),
)
trainer.train()
""",
        "dpo": """
from llm_diffusion import DiffusionDPOTrainer
from datasets import load_dataset

trainer = DiffusionDPOTrainer(
    model="Qwen/Qwen3-0.6B",
    train_dataset=load_dataset("json", data_files="rows.jsonl", split="train"),
)
trainer.train()
""",
    }
    names: dict = {}
    exec(source[task], names)
    assert names["trainer"].state.global_step == 3 and record_of(names["trainer"].model).conversion_steps == 3


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")  # TRL's own configs set it
def test_plain_configs_become_ours(tmp_path):
    given = {"learning_rate": 0.01, "max_length": 32, "hub_token": "secret", "bf16": False}
    for build, own in ((SFTConfig, DiffusionSFTConfig), (DPOConfig, DiffusionDPOConfig)):
        args = own_config(build(str(tmp_path), **SETTINGS, **given), own, "")
        assert type(args) is own and getattr(args, "eos_token", None) is None
        assert {name: getattr(args, name) for name in given} == given
    assert (
        own_config(TrainingArguments(str(tmp_path), use_cpu=True, max_steps=7), DiffusionSFTConfig, "").max_steps == 7
    )
    with pytest.raises(TypeError, match="must be a DiffusionDPOConfig, got DiffusionSFTConfig"):
        own_config(DiffusionSFTConfig(str(tmp_path)), DiffusionDPOConfig, "")


def test_recipes_in_yaml(tmp_path):
    (tmp_path / "recipe.yaml").write_text(
        "model_name_or_path: tiny\ndataset_name: rows\nlearning_rate: 2.0e-4\nuse_cpu: true\nannealing: soft\n"
        f"annealing_schedule: step\nannealing_points: [[0, 1.0], [4, 0.5]]\noutput_dir: {tmp_path}\n"
    )
    parser = TrlParser((ScriptArguments, DiffusionSFTConfig, ModelConfig))
    command = ["--config", str(tmp_path / "recipe.yaml"), "--max_mask_probability", "0.9"]
    script, args, model = parser.parse_args_and_config(command)
    assert (script.dataset_name, model.model_name_or_path, args.learning_rate) == ("rows", "tiny", 2e-4)
    assert args.annealing_points == [[0, 1.0], [4, 0.5]] and args.max_mask_probability == 0.9
    (args,) = HfArgumentParser(DiffusionDPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "true", "--num_draws", "2"]
    )
    assert args.num_draws == 2


def test_custom_code_is_run_when_the_settings_trust_it(tmp_path, tokenizer):
    (tmp_path / "modeling_own.py").write_text(
        "from transformers import Qwen3Config, Qwen3ForCausalLM\n\n\nclass OwnConfig(Qwen3Config):\n    model_type = 'of_the_folder'\n\n\n"
        "class OwnForCausalLM(Qwen3ForCausalLM):\n    config_class = OwnConfig\n"
    )
    small(tmp_path, tokenizer)
    config = json.loads((tmp_path / "config.json").read_text())
    auto = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "of_the_folder", "auto_map": auto}))
    with pytest.raises(ValueError, match="custom code"):
        sft(tmp_path / "out", str(tmp_path))
    trainer = sft(tmp_path / "out", str(tmp_path), None, {"trust_remote_code": True})
    assert type(trainer.model).__name__ == "OwnForCausalLM"


def test_keywords_of_servers_are_taken_and_those_without_effect_refused(tiny):
    model, tokenizer = tiny
    ids = torch.arange(5, 9)[None]
    want = model.generate(ids, max_new_tokens=4)
    assert torch.equal(model.generate(ids, max_new_tokens=4, tokenizer=tokenizer, cache_implementation=None), want)
    for refused in ({"cache_implementation": "static"}, {"stop_strings": ["a"]}):
        with pytest.raises(UserError, match=f"`{next(iter(refused))}`"):
            model.generate(ids, tokenizer=tokenizer, **refused)
