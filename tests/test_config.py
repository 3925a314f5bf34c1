"""Settings: defaults, layers, types, presets, and every setting that is refused."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import yaml

from llm_diffusion import UserError
from llm_diffusion.config import (
    HyperParameters,
    as_dict,
    build,
    config_yaml,
    layers,
    read_mapping,
    resolve,
    settings_page,
    stages_of,
    training_hints,
)
from llm_diffusion.objective.settings import check_settings, merge, read_value
from llm_diffusion.presets import PRESETS, preset_names, read_preset

ROOT = Path(__file__).parent.parent


def test_config_yaml_holds_exactly_the_defaults():
    from_file = as_dict(resolve(config=str(ROOT / "config.yaml")))
    assert from_file == as_dict(HyperParameters())


@pytest.mark.parametrize(("name", "written"), [("config.yaml", config_yaml), ("docs/settings.md", settings_page)])
def test_what_is_written_from_the_declarations_is_up_to_date(name, written):
    """`python -m llm_diffusion.config > docs/settings.md`, and with `--yaml` for config.yaml."""
    assert (ROOT / name).read_text() == written()


def test_every_setting_is_declared_with_help():
    declared = {f.name: f.metadata for f in dataclasses.fields(HyperParameters) if f.name != "training"}
    assert all(metadata["help"].endswith(".") or "…" in metadata["help"] for metadata in declared.values())
    check_settings(HyperParameters())


def test_layers_win_in_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("batch_size: 7\nlearning_rate: 3e-4\nlora_config: {r: 8}\n")
    hp = resolve("tiny", str(file), '{"learning_rate": 5e-5, "warmup_steps": 3}')
    assert (hp.batch_size, hp.learning_rate, hp.training["warmup_steps"]) == (7, 5e-5, 3)  # file, JSON, JSON
    assert hp.model == "tiny"  # preset
    assert (hp.lora_config["r"], hp.lora_config["lora_alpha"]) == (8, 64)  # merged key by key
    assert hp.gradient_accumulation_steps == 1 and HyperParameters().gradient_accumulation_steps == 4


def test_json_may_be_a_file(tmp_path):
    file = tmp_path / "c.json"
    file.write_text(json.dumps({"epochs": 2}))
    assert resolve(hyper_parameters=str(file)).epochs == 2


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_valid(name):
    hp = resolve(name)
    assert hp.model and hp.dataset
    assert build(as_dict(hp)) == hp  # what is saved can be read again


def test_presets_are_joined_from_left_to_right():
    joined = read_preset("qwen3-0.6b+tiny")
    assert joined["model"] == "tiny" and joined["lora_config"]["r"] == read_preset("tiny")["lora_config"]["r"]


@pytest.mark.parametrize("model", sorted(path.stem for path in (PRESETS / "model").glob("*.yaml")))
def test_models_join_with_every_training_and_hardware_preset(model):
    for training in (PRESETS / "training").glob("*.yaml"):
        for hardware in (PRESETS / "hardware").glob("*.yaml"):
            hp = resolve(f"{model}+{training.stem}+{hardware.stem}")
            assert hp.model == read_preset(model)["model"]
            for key, value in read_preset(hardware.stem).items():
                if isinstance(value, int | str):
                    assert getattr(hp, key, hp.training.get(key)) == value
    assert read_preset(f"{model}+3stage") == read_preset(f"{model}-3stage") or f"{model}-3stage" in preset_names()


def test_every_key_of_a_preset_is_explained():
    """In its own line, or in config.yaml."""
    known = set(re.findall(r"^(\w+):.*#", (ROOT / "config.yaml").read_text(), flags=re.M)) | {
        "output_dir",
        "generation",
    }
    for path in PRESETS.glob("*/*.yaml"):
        text = path.read_text()
        assert text.startswith("# "), path.name
        for line in text.splitlines():
            if key := re.match(r"(\w+):", line):
                assert "#" in line or key[1] in known, (path.name, line)


def test_gradual_is_the_long_recipe():
    hp = resolve("llama-3.2-3b+gradual")
    assert hp.use_qlora and hp.phases == ["pretrain"] and hp.lora_config["target_modules"] == "attention"
    assert (hp.lora_config["r"], hp.lora_config["lora_alpha"]) == (32, 64)
    names = ("warmup_steps", "annealing_steps", "max_steps", "annealing", "annealing_schedule", "time_embedding")
    assert [hp.training[name] for name in names] == [1000, 20000, 50000, "soft", "cosine", True]
    assert (hp.batch_size, hp.gradient_accumulation_steps, hp.learning_rate) == (8, 4, 1e-4)


def test_unequal_cards_are_numbered_by_integers():
    assert resolve("mistral-7b+a6000-a4500").model_init_kwargs["max_memory"] == {0: "40GiB", 1: "14GiB"}
    given = build({"model_init_kwargs": {"max_memory": {"0": "1GiB", "cpu": "2GiB"}}})
    assert given.model_init_kwargs["max_memory"] == {0: "1GiB", "cpu": "2GiB"}


def test_stages_stand_for_phases():
    hp = build({"pretrain_config": {"max_steps": 3}, "sft_config": {"max_steps": 4}})
    assert stages_of(hp) == [
        {"name": "pretrain", "trains": "adapters", "completion_only_loss": False, "max_steps": 3},
        {"name": "sft", "trains": "adapters", "max_steps": 4},
    ]
    assert all(stage["trains"] == "everything" for stage in stages_of(resolve("gpt2")))
    hp = resolve("phi-2-3stage")
    assert [(stage["name"], stage["trains"], stage["num_train_epochs"]) for stage in stages_of(hp)] == [
        ("attention", "attention", 2),
        ("diffusion", "adapters", 4),
        ("recovery", "adapters", 2),
    ]


def test_three_stages_keep_the_best_checkpoint():
    hp = build(merge(read_preset("3stage"), layers("qwen3-0.6b", None, None)))
    assert [stage["name"] for stage in stages_of(hp)] == ["attention", "diffusion", "recovery"]
    assert hp.training["load_best_model_at_end"] is True


def test_preferences_are_a_phase_with_settings_of_their_own():
    hp = build({"phases": ["sft", "dpo"], "dpo_config": {"beta": "2e-1", "loss_type": ["ipo"]}, "learning_rate": 1e-3})
    assert stages_of(hp)[1] == {"name": "dpo", "trains": "adapters", "beta": 0.2, "loss_type": ["ipo"]}
    hp = resolve("mistral-7b+dpo-rtx4080")
    assert [stage["name"] for stage in stages_of(hp)] == ["pretrain", "sft", "dpo"]
    assert (hp.batch_size, hp.use_qlora, hp.training["gradient_checkpointing"]) == (1, True, True)


def test_every_field_of_the_trainer_is_a_key():
    names = {"warmup_steps", "lr_scheduler_type", "max_grad_norm", "weight_decay", "save_total_limit"}
    assert names <= set(training_hints())
    assert build({"max_grad_norm": 0.5}).training == {"max_grad_norm": 0.5}
    assert build({"sft_config": {"max_steps": 3}}).sft_config == {"max_steps": 3}


def test_yaml_numbers_written_as_text_are_numbers():
    assert yaml.safe_load("2e-4") == "2e-4"  # YAML 1.1; the reason for this rule
    assert read_value("learning_rate", "2e-4", float) == 2e-4
    assert read_value("learning_rate", 1, float) == 1.0


@pytest.mark.parametrize(
    ("value", "hint"), [("x", int), (1.5, int), (True, int), ("1", bool), (1, str), ([1], dict), ("many", float)]
)
def test_wrong_types_are_refused(value, hint):
    with pytest.raises(ValueError, match="`key` must be"):
        read_value("key", value, hint)


def test_merge_leaves_its_arguments_alone():
    low, high = {"a": {"b": 1}}, {"a": {"c": 2}}
    assert merge(low, high) == {"a": {"b": 1, "c": 2}}
    assert (low, high) == ({"a": {"b": 1}}, {"a": {"c": 2}})


def test_defaults_are_not_shared_between_objects():
    assert dataclasses.asdict(HyperParameters()) == dataclasses.asdict(HyperParameters())
    HyperParameters().lora_config["r"] = 1
    assert HyperParameters().lora_config["r"] == 16


SHAPE = {"n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 128}
# what is set -> the field that the error names
REFUSED = [
    ({"modle": "tiny"}, "`modle`; did you mean `model`"),
    ({"sft_config": {"max_step": 1}}, "`max_step` in `sft_config`"),
    ({"dpo_config": {"num_drawz": 4}}, "`num_drawz` in `dpo_config`; did you mean `num_draws`"),
    ({"num_train_epochs": 1}, "`epochs`"),
    ({"resume_from_checkpoint": "x"}, "`--resume`"),
    ({"batch_size": "many"}, "`batch_size`"),
    ({"batch_size": -1}, "`batch_size`"),
    ({"warmup_steps": "soon"}, "`warmup_steps`"),
    ({"epochs": 0}, "`epochs`"),
    ({"learning_rate": "nan"}, "`learning_rate`"),
    ({"learning_rate": float("inf")}, "`learning_rate`"),
    ({"device": "tpu"}, "`device`"),
    ({"lora_config": {"rank": 4}}, "`lora_config`.*rank"),
    ({"lora_config": {"r": "16"}}, "`lora_config.r`"),
    ({"wandb_config": {"projet": "a"}}, "`wandb_config`"),
    ({"qlora_config": {"bnb_4bit_quant_typ": "fp4"}}, "`qlora_config`"),
    ({"token_ids": {"bos": 1}}, "`token_ids`"),
    ({"token_ids": {"pad": "0"}}, "`token_ids.pad`"),
    ({"generation": {"block_len": 4}}, "block_len"),
    ({"generation": {"threshold": "0.9"}}, "`threshold`"),
    ({"phases": ["warm"]}, "`phases`"),
    ({"phases": ["sft", "sft"]}, "`phases`"),
    ({"phases": ["dpo", "sft"]}, "`phases`"),
    ({"phases": ["sft", "pretrain"]}, "`phases`"),
    ({"stages": ["sft"]}, r"`stages\[0\]`"),
    ({"stages": [{"trains": "adapters"}]}, "`stages`"),
    ({"stages": [{"name": "sft"}, {"name": "a"}]}, "`stages`"),
    ({"stages": [{"name": "a"}, {"name": "a"}]}, "`stages`"),
    ({"stages": [{"name": "../a"}]}, "`stages`"),
    ({"stages": [{"name": "a", "trains": "most"}]}, "`stages.a.trains`"),
    ({"stages": [{"name": "a", "max_stepz": 1}]}, "`max_stepz` in `stages.a`"),
    ({"stages": [{"name": "a", "max_steps": "many"}]}, "`stages.a.max_steps`"),
    ({"attention": "lossless", "use_lora": False}, "`attention`"),
    ({"attention": "lossless", "stages": [{"name": "sft", "trains": "everything"}]}, "`attention`"),
    ({"attention": "lossless", "phases": ["sft", "dpo"]}, "`attention`"),
    ({"pipeline": "ar"}, "`pipeline`"),
    ({"pipeline": "arm", "phases": ["dpo"]}, "`pipeline`"),
    ({"pipeline": "arm", "attention": "block"}, "attention"),
    ({"pipeline": "arm", "generation": {"steps": 4}}, "`generation`.*steps"),
    ({"scratch": SHAPE, "max_length": 64}, "`use_lora`"),
    ({"scratch": {**SHAPE, "n_embd": 9}, "use_lora": False, "max_length": 64}, "`n_head`"),
    ({"init_from": "last.ckpt", "pipeline": "arm"}, "`init_from`"),
]


@pytest.mark.parametrize(("given", "match"), REFUSED)
def test_what_cannot_be_is_refused_by_name(given, match):
    with pytest.raises(UserError, match=match):
        resolve(hyper_parameters=json.dumps(given))


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ('{"model": "tiny",}', "line 1"),
        ("[1]", "`here`"),
        ("none.yaml", "`here`"),
        ("BAD", "`here`"),
        ("LIST", "`here`"),
    ],
)
def test_malformed_settings_say_where(source, match, tmp_path):
    for name, text in (("BAD", "a: [1\n"), ("LIST", "- a\n")):
        (tmp_path / name).write_text(text)
    with pytest.raises((UserError, FileNotFoundError), match=match):
        read_mapping(str(tmp_path / source) if source.isupper() else source, "here")


def test_an_unknown_preset_is_refused_with_a_suggestion():
    with pytest.raises(UserError, match="'tinny'.*did you mean 'tiny'"):
        read_preset("tinny+qlora")
