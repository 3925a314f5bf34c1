"""The flat config.json of DiffuGPT experiments: every key becomes one of ours, with the same meaning, or is refused with a reason."""

import json
from pathlib import Path

import pytest
import torch
from transformers import get_scheduler

from llm_diffusion import UserError
from llm_diffusion.config import OWN_KEYS, build, layers, read_mapping, resolve, training_hints
from llm_diffusion.generation.commit_rules import CONFIDENCES
from llm_diffusion.presets import is_diffugpt_config, left_aside, read_diffugpt_config, table
from llm_diffusion.presets.files import strip_comments

KEYS, SHARED = table()["keys"], set(table()["shared"])

STOCK = """// model, training and sampling
{
  "pipeline": "arm",                        // (str) arm or diffusion
  "init_from":"",                           // (str) empty: from nothing
  "memmap_path": "./data/train_7K.bin",     // (str)
  "padded_dataset": false,                  // (bool)
  "pad_masked_perc": 0.15,                  // (float)
  "pad_annealing_steps": 100,               // (int)
  "context_length": 1024,                   // (int)

  "n_embd": 768,                            // (int)
  "n_layer": 12,                            // (int)
  "n_head": 12,                             // (int)
  "resume_training": false,                 // (bool)

  "attn_annealing_steps": 1000,             // (int)
  "mask_id": 10541,                         // (int)
  "eos_token_id": 50256,                    // (int)
  "pad_token_id": 50257,                    // (int)

  "n_epochs": 1,                            // (int)
  "n_steps": 100,                           // (int)
  "val_check_interval": 100,                // (int)
  "val_test_perc": 0.05,                    // (float)

  "batch_size": 8,                          // (int)
  "accumulate_grad": 16,                    // (int)
  "grad_clip": 1.0,                         // (float)

  "betas": [0.9,0.95],                      // (list)
  "weight_decay": 0.01,                     // (float)
  "max_lr": 6e-4,                           // (float)
  "warmup_pct": 0.1,                        // (float)
  "div_factor": 25.0,                       // (float)
  "final_div_factor": 1e4,                  // (float)

  "enable_checkpointing": true,             // (bool)
  "save_dir": "./checkpoints/",             // (str)
  "wandb": true,                            // (bool)
  "run_name": "gpt2-scratch-openwebtext",   // (str)
  "project_name": "diffusion-llms",         // (str)

  "user_prompt": "Once upon a time",        // (str)
  "n_samples": 1,                           // (int)
  "temperature": 1.0,                       // (float)
  "max_new_tokens": 10,                     // (int)
  "top_k": null,                            // (int or null)
  "diffusion_steps": 4,                     // (int)
  "repetition_penalty": 1.2,                // (float)
  "do_sample": false,                       // (bool)
  "denoising_strategy": "random"            // (str)
}
"""
ARM = {"pipeline": "arm", "init_from": "gpt2"}
DIFFUSION = {"pipeline": "diffusion", "init_from": "gpt2"}
PADDED = {**DIFFUSION, "padded_dataset": True, "context_length": 64, "eos_token_id": 2}


def test_comments_are_stripped_and_strings_are_not():
    text = '// first\n{"a": "http://x // y", // "b": 1\n "c": "\\"// no", "d": 2} // last'
    assert json.loads(strip_comments(text)) == {"a": "http://x // y", "c": '"// no', "d": 2}
    assert [len(line) for line in strip_comments(text).splitlines()] == [len(line) for line in text.splitlines()]


def test_the_column_of_an_error_is_the_files(tmp_path):
    (tmp_path / "c.json").write_text('{"a": 1, // one\n "b" 2}')
    with pytest.raises(ValueError, match="line 2 column 6"):
        read_mapping(str(tmp_path / "c.json"), "--config")


def test_yaml_keeps_its_slashes(tmp_path):
    (tmp_path / "c.yaml").write_text("model: http://host//model\n")
    assert read_mapping(str(tmp_path / "c.yaml"), "--config") == {"model": "http://host//model"}


@pytest.mark.parametrize("inline", [False, True])
def test_the_stock_file_is_read_whole(tmp_path, inline):
    (tmp_path / "config.json").write_text(STOCK)
    hp = resolve(hyper_parameters=STOCK) if inline else resolve(config=str(tmp_path / "config.json"))
    assert set(json.loads(strip_comments(STOCK))) == set(KEYS)
    assert hp.pipeline == "arm" and hp.model == "openai-community/gpt2"
    assert hp.scratch == {"n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
    assert (hp.batch_size, hp.gradient_accumulation_steps, hp.learning_rate, hp.max_length) == (8, 16, 6e-4, 1024)
    assert hp.dataset == "./data/train_7K.bin" and hp.phases == ["pretrain"] and not hp.use_lora
    assert hp.generation == {
        "max_new_tokens": 10,
        "temperature": 1.0,
        "top_k": None,
        "repetition_penalty": 1.2,
        "do_sample": False,
    }


# key -> (the file beside it, value, what becomes of it)
READINGS = {
    "pipeline": ({"init_from": "x"}, "arm", {"pipeline": "arm"}),
    "init_from": ({"pipeline": "arm"}, "gpt2-medium", {"model": "openai-community/gpt2-medium"}),
    "memmap_path": (ARM, "data/a.bin", {"dataset": "data/a.bin"}),
    "padded_dataset": (
        {**PADDED, "pad_token_id": 7},
        True,
        {"text_tails": True, "tail": "pad", "max_canvas": 64, "random_canvas": 0.0},
    ),
    "pad_masked_perc": (PADDED, 0.15, {"pad_mask_ratio": 0.15}),
    "pad_annealing_steps": (PADDED, 100, {"pad_annealing_steps": 100}),
    "context_length": (ARM, 64, {"max_length": 64}),
    "n_embd": ({"pipeline": "arm", "init_from": "", "n_head": 4}, 32, {"scratch": "n_embd"}),
    "n_layer": ({"pipeline": "arm", "init_from": ""}, 2, {"scratch": "n_layer"}),
    "n_head": ({"pipeline": "arm", "init_from": ""}, 4, {"scratch": "n_head"}),
    "resume_training": (ARM, False, {}),
    "attn_annealing_steps": (
        DIFFUSION,
        1000,
        {"annealing": "stochastic", "annealing_schedule": "linear", "annealing_steps": 1000},
    ),
    "mask_id": (DIFFUSION, 10541, {"mask_token_id": 10541}),
    "eos_token_id": (ARM, 2, {"token_ids": {"eos": 2}}),
    "pad_token_id": (PADDED, 7, {"token_ids": {"eos": 2, "pad": 7}}),
    "n_epochs": (ARM, 3, {"epochs": 3}),
    "n_steps": ({**ARM, "n_epochs": 3}, 100, {"max_steps": 300}),
    "val_check_interval": (ARM, 50, {"eval_strategy": "steps", "eval_steps": 50}),
    "val_test_perc": (ARM, 0.05, {"test_size": 0.05}),
    "batch_size": (ARM, 8, {"batch_size": 8}),
    "accumulate_grad": (ARM, 16, {"gradient_accumulation_steps": 16}),
    "grad_clip": (ARM, 1.0, {"max_grad_norm": 1.0}),
    "betas": (ARM, [0.9, 0.95], {"adam_beta1": 0.9, "adam_beta2": 0.95}),
    "weight_decay": (ARM, 0.01, {"weight_decay": 0.01}),
    "max_lr": (ARM, 6e-4, {"learning_rate": 6e-4}),
    "warmup_pct": (ARM, 0.1, {"warmup_steps": 0.1, "lr_scheduler_type": "cosine_warmup_with_min_lr"}),
    "div_factor": (ARM, 20.0, {"lr_scheduler_kwargs": {"warmup_lr_rate": 0.05, "min_lr_rate": 0.05 / 1e4}}),
    "final_div_factor": (ARM, 10.0, {"lr_scheduler_kwargs": {"warmup_lr_rate": 0.04, "min_lr_rate": 0.004}}),
    "enable_checkpointing": ({**ARM, "val_check_interval": 7}, True, {"save_strategy": "steps", "save_steps": 7}),
    "save_dir": (ARM, "./c", {"output_dir": "./c"}),
    "wandb": (ARM, True, {"use_wandb": True}),
    "run_name": (ARM, "a", {"run_name": "a"}),
    "project_name": (ARM, "p", {"wandb_config": {"project": "p"}}),
    "user_prompt": ({**ARM, "n_samples": 2}, "Once", {"prompts": ["Once", "Once"]}),
    "n_samples": ({**ARM, "user_prompt": "Once"}, 2, {"prompts": ["Once", "Once"]}),
    "temperature": (ARM, 0.7, {"generation": {"temperature": 0.7}}),
    "max_new_tokens": (ARM, 10, {"generation": {"max_new_tokens": 10}}),
    "top_k": (ARM, None, {"generation": {"top_k": None}}),
    "diffusion_steps": (DIFFUSION, 4, {"generation": {"steps": 4, "block_length": None}}),
    "repetition_penalty": (ARM, 1.2, {"generation": {"repetition_penalty": 1.2}}),
    "do_sample": (ARM, False, {"generation": {"do_sample": False}}),
    "denoising_strategy": (DIFFUSION, "entropy", {"generation": {"remasking": "entropy"}}),
}


@pytest.mark.parametrize("key", KEYS)
def test_every_key_becomes_ours(key):
    beside, value, expected = READINGS[key]
    settings = read_diffugpt_config({**beside, key: value})
    if "scratch" in expected:
        assert settings["scratch"][expected["scratch"]] == value
    else:
        assert {name: settings[name] for name in expected} == expected
    assert set(settings) <= OWN_KEYS | set(training_hints())
    if expected:  # it is this key that made the difference
        assert settings != read_diffugpt_config({name: beside[name] for name in beside if name != key} | {"model": "m"})
    build(settings)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({**ARM, "resume_training": True}, "resume_training.*--resume"),
        ({**ARM, "init_from": "a/last.ckpt"}, "init_from"),
        ({"pipeline": "arm", "n_embd": 8}, "init_from"),
        ({**DIFFUSION, "denoising_strategy": "deterministic"}, "denoising_strategy"),
        ({**PADDED, "pad_annealing_steps": 0}, "pad_annealing_steps"),
        ({**DIFFUSION, "attn_annealing_steps": -1}, "attn_annealing_steps"),
        ({**PADDED, "pad_masked_perc": 1.5}, "pad_masked_perc"),
        ({**PADDED, "pad_masked_perc": 0}, "pad_masked_perc"),
        ({**ARM, "betas": [0.9]}, "betas"),
        ({**ARM, "max_lr": 0}, "max_lr"),
        ({**ARM, "grad_clip": float("inf")}, "grad_clip"),
        ({**ARM, "warmup_pct": 1.0}, "warmup_pct"),
        ({**ARM, "n_steps": "100"}, "n_steps"),
        ({**ARM, "n_steps": True}, "n_steps"),
        ({**ARM, "max_new_tokens": None}, "max_new_tokens"),
        ({**ARM, "pipeline": "diffusion_length_head"}, "pipeline"),
        ({**DIFFUSION, "repetition_penalty": -1.0}, "repetition_penalty"),
        ({**ARM, "init_from": "", "n_embd": 10, "n_head": 4}, "n_head"),
        ({**ARM, "context_lenght": 5, "max_lr": 1e-3}, "context_lenght"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(given, named):
    with pytest.raises(UserError, match=named):
        build(read_diffugpt_config(given))


def test_every_strategy_is_an_order_of_ours():
    assert set(KEYS["denoising_strategy"]["choices"]) == set(CONFIDENCES)


def test_the_example_and_the_docs_name_every_key():
    root = Path(__file__).parent.parent
    example = read_mapping(str(root / "examples" / "config.json"), "--config")
    assert set(KEYS) <= set(example)
    for pipeline in ("arm", "diffusion"):
        build(read_diffugpt_config({**example, "pipeline": pipeline, "padded_dataset": pipeline == "diffusion"}))
    docs = (root / "docs" / "quickstart.md").read_text()
    assert not [key for key in KEYS if f"`{key}`" not in docs]


def test_annealing_over_no_steps_starts_at_the_target():
    assert "annealing" not in read_diffugpt_config({**DIFFUSION, "attn_annealing_steps": 0})


def test_padding_that_is_the_end_token_is_told_from_one_of_its_own():
    assert read_diffugpt_config({**PADDED, "pad_token_id": 2})["tail"] == "eos"


def test_keys_without_a_meaning_are_named():
    stock = json.loads(strip_comments(STOCK))
    assert set(left_aside(stock)) == {
        *(
            "attn_annealing_steps",
            "mask_id",
            "padded_dataset",
            "pad_masked_perc",
            "pad_annealing_steps",
            "pad_token_id",
        ),
        *("diffusion_steps", "denoising_strategy"),
    }
    padded = {**stock, "pipeline": "diffusion", "init_from": "gpt2", "padded_dataset": True}
    assert set(left_aside(padded)) == {"n_embd", "n_layer", "n_head"}


def test_whose_file_it_is():
    assert SHARED == set(KEYS) & (OWN_KEYS | set(training_hints()))
    assert is_diffugpt_config({"pipeline": "arm", "max_lr": 1e-3}) and is_diffugpt_config({"init_from": ""})
    ours = {"pipeline": "arm", "model": "tiny", "batch_size": 4, "diffusion_steps": 3, "pad_annealing_steps": 2}
    assert not is_diffugpt_config(ours)
    assert layers(None, None, json.dumps(ours)) == ours


def test_our_keys_beside_it_win(tmp_path):
    (tmp_path / "config.json").write_text(STOCK)
    given = layers(None, str(tmp_path / "config.json"), '{"init_from": "gpt2", "learning_rate": 1e-3, "device": "cpu"}')
    assert given["learning_rate"] == 1e-3 and given["device"] == "cpu"
    assert given["model"] == "openai-community/gpt2" and "scratch" not in given


def test_a_model_beside_an_empty_start_is_whose_tokenizer_is_taken():
    assert read_diffugpt_config({"init_from": "", "model": "tiny", "n_embd": 24})["model"] == "tiny"
    assert read_diffugpt_config({"init_from": "gpt2", "model": "tiny"})["model"] == "openai-community/gpt2"


def test_the_rate_is_that_of_one_cycle():
    """Start, top and end are `OneCycleLR`'s; while it rises, transformers' line takes the place of a cosine."""
    settings = read_diffugpt_config(
        {**ARM, "max_lr": 6e-4, "warmup_pct": 0.1, "div_factor": 25.0, "final_div_factor": 100.0}
    )
    rates = {}
    for ours in (True, False):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=6e-4)
        if ours:
            kwargs = {"scheduler_specific_kwargs": settings["lr_scheduler_kwargs"]}
            schedule = get_scheduler(settings["lr_scheduler_type"], optimizer, 100, 1000, **kwargs)
        else:
            options = {"total_steps": 1000, "pct_start": 0.1, "div_factor": 25.0, "final_div_factor": 100.0}
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-4, **options)
        rates[ours] = [schedule.get_last_lr()[0]]
        for _ in range(999):
            optimizer.step()
            schedule.step()
            rates[ours].append(schedule.get_last_lr()[0])
    for step in (0, 99, 100, 400, 550, 900, 999):
        assert rates[True][step] == pytest.approx(rates[False][step], rel=0.02, abs=1e-7), step
