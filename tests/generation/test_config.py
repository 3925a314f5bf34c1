"""Settings of decoding: what is refused by name, and the defaults that every way of decoding a saved model starts from."""

import json

import pytest
import torch
from click.testing import CliRunner
from peft import LoraConfig
from small_trainers import make
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import llm_diffusion as ld
from llm_diffusion.config import build
from llm_diffusion.evaluation.answers import evaluate_answers
from llm_diffusion.evaluation.report import decoding
from llm_diffusion.generation.config import decoding_settings, saved_settings
from llm_diffusion.main import cli
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.decoding_defaults import (
    autoregressive_config,
    decoding_defaults,
    layered,
    save_generation_config,
)
from llm_diffusion.models.patching import base_of
from llm_diffusion.models.record import DiffusionRecord

LOOPED = {"revision": "remdm-loop", "steps": 8, "remasking": "random", "eta": 0.1}
QUESTION = [{"role": "user", "content": "Sort the letters: k d e a c b"}]
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(
    scope="module",
    params=[("bidirectional", False), ("bidirectional", True), ("block", False), ("block", True), ("lossless", True)],
    ids=lambda param: f"{param[0]}-{'adapter' if param[1] else 'full'}",
)
def saved(request, tmp_path_factory):
    """The embedded model after one step, as the trainer saves it."""
    attention, adapter = request.param
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32)
    peft_config = LoraConfig(**LORA) if adapter else None
    trainer = make(folder, tokenizer, base, peft_config, attention=attention, learning_rate=1e-4)
    trainer.train()
    trainer.save_model(str(folder))
    return str(folder), attention, adapter


def test_every_way_of_decoding_gives_the_same_answer(saved):
    """Python's chat, `generate` of a loaded model, the command line, transformers' own loader, and the main job's table."""
    folder, attention, adapter = saved
    model, tokenizer = ld.load_diffusion_model(folder, device="cpu")
    batch = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**batch, return_dict_in_generate=True)
    start = batch["input_ids"].shape[1]
    want = tokenizer.decode(output.sequences[0, start:], skip_special_tokens=True)
    if attention != "lossless":  # which has no rule
        assert output.nfe[0] < output.sequences.shape[1] - start, "one token a pass needs no defaults"
    assert ld.DiffusionInference.from_pretrained(folder, device="cpu").chat(QUESTION) == want
    result = CliRunner().invoke(cli, ["chat", folder, QUESTION[0]["content"]], catch_exceptions=False)
    assert result.stdout == want + "\n"
    example = {"messages": [*QUESTION, {"role": "assistant", "content": "a b c d e k"}]}
    report = evaluate_answers(model, tokenizer, [example], **decoding(build({"model": "tiny"}), model))
    assert report.answers == [want]
    if not adapter:
        theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
        assert torch.equal(theirs.generate(**batch), output.sequences)


def test_what_a_user_chooses_wins_everywhere(saved):
    folder, attention, _ = saved
    model, tokenizer = ld.load_diffusion_model(folder, device="cpu")
    batch = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    inference = ld.DiffusionInference.from_pretrained(folder, device="cpu", max_new_tokens=12)
    for chosen in ({"steps": 3}, {"factor": 1.0}, {"remasking": "entropy"}, {"threshold": None}, {"max_new_tokens": 9}):
        settings = {"max_new_tokens": 12, **chosen}
        output = model.generate(**batch, **settings)
        answer = tokenizer.decode(output[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        assert inference.chat(QUESTION, **chosen) == answer
        if "steps" in chosen:  # the command line loads the model each time
            command = ["chat", folder, QUESTION[0]["content"], "--settings", json.dumps(settings)]
            assert CliRunner().invoke(cli, command, catch_exceptions=False).stdout == answer + "\n"
        config = GenerationConfig(max_new_tokens=settings["max_new_tokens"])
        rest = {name: value for name, value in chosen.items() if name != "max_new_tokens"}
        assert torch.equal(model.generate(**batch, generation_config=config, **rest), output)


def test_the_settings_of_the_main_job_are_saved_with_the_model(saved):
    folder, attention, _ = saved
    model, _ = ld.load_diffusion_model(folder, device="cpu")
    chosen = decoding(build({"model": "tiny", "generation": {"max_new_tokens": 20, "factor": 0.5}}), model)
    save_generation_config(model, folder, chosen)
    again, _ = ld.load_diffusion_model(folder, device="cpu")
    assert saved_settings(again) == chosen == decoding_settings(again)
    assert {"max_new_tokens": 20, "factor": 0.5}.items() <= chosen.items() and "threshold" not in chosen
    save_generation_config(again, folder)  # as a trainer does that goes on from it
    assert saved_settings(ld.load_diffusion_model(folder, device="cpu")[0]) == chosen
    save_generation_config(model, folder)  # for the other tests


def test_the_autoregressive_model_keeps_its_own_settings(saved):
    folder, _, adapter = saved
    model, tokenizer = ld.load_diffusion_model(folder, device="cpu")
    ids = tokenizer("Sort the letters: k d e a", return_tensors="pt")["input_ids"]
    model_config = base_of(model).generation_config
    model_config.repetition_penalty = 1.2
    answer = ld.generate_autoregressive(model, ids, do_sample=False)
    assert base_of(model).generation_config is model_config
    assert answer.shape[1] <= ids.shape[1] + 20  # transformers' default, not ours
    if adapter:
        base = AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32)
        assert torch.equal(base.generate(ids, do_sample=False, repetition_penalty=1.2), answer)


def test_a_model_that_was_never_saved_has_no_defaults(tiny):
    assert saved_settings(tiny[0]) == {}
    assert decoding_settings(tiny[0])["threshold"] == 0.95


def test_defaults_by_attention():
    names = {
        attention: set(decoding_defaults(DiffusionRecord(31, attention, 4))) - {"mask_token_id", "max_new_tokens"}
        for attention in ("bidirectional", "block", "lossless")
    }
    blocks = {"block_length", "grow_canvas"}
    assert names == {"bidirectional": {"threshold", *blocks}, "block": {"threshold"}, "lossless": set()}
    for attention in names:
        settings = ld.DiffusionGenerationConfig(**decoding_defaults(DiffusionRecord(31, attention)))
        assert (settings.max_new_tokens, settings.temperature) == (128, 0.0)


@pytest.mark.parametrize(
    ("above", "left"),
    [
        ({}, {"threshold", "block_length", "grow_canvas", "seed"}),
        ({"steps": 4}, {"block_length", "grow_canvas", "seed"}),
        ({"alg_temp": 0.5}, {"block_length", "grow_canvas", "seed"}),
        ({"remasking": "left_to_right"}, {"block_length", "grow_canvas", "seed"}),
        ({"remasking": "margin"}, {"threshold", "block_length", "grow_canvas", "seed"}),
        ({"revision": "p2", "steps": 4}, {"block_length", "grow_canvas", "seed"}),
        ({"block_length": None}, {"threshold", "seed"}),
        ({"length_quantile": 0.9}, {"threshold", "seed"}),
        ({"seed": 3}, {"threshold", "block_length", "grow_canvas"}),
    ],
    ids=lambda value: str(sorted(value)),
)
def test_a_rule_displaces_the_default_one(above, left):
    below = {"threshold": 0.95, "block_length": 16, "grow_canvas": True, "seed": 1}
    found = layered(below, above)
    assert found == {**{name: below[name] for name in left}, **above}
    ld.DiffusionGenerationConfig(**found)


def test_settings_survive_transformers_own_files(tmp_path):
    config = ld.DiffusionGenerationConfig(threshold=0.9, block_length=8, mask_token_id=31, max_new_tokens=7)
    (tmp_path / "generation_config.json").write_text(config.to_json_string())
    plain = GenerationConfig.from_pretrained(tmp_path)
    assert (plain.threshold, plain.block_length, plain.max_new_tokens) == (0.9, 8, 7)
    bare, saved = autoregressive_config(plain)
    assert not {"threshold", "block_length", "mask_token_id"} & set(vars(bare)) and bare.max_new_tokens is None
    assert {"threshold": 0.9, "block_length": 8, "mask_token_id": 31, "max_new_tokens": 7}.items() <= saved.items()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"max_length_of_answer": 3}, "max_length_of_answer"),
        ({"blocks": 3, "nsteps": 4}, "blocks.*nsteps"),
        ({"steps": 0}, "steps"),
        ({"steps": 2.5}, "steps"),
        ({"block_length": 0}, "block_length"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"threshold": 0.0}, "threshold"),
        ({"threshold": 1.01}, "threshold"),
        ({"threshold": -0.5}, "threshold"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": None}, "seed"),
        ({"remasking": "confidence"}, "remasking"),
        ({"threshold": 0.9, "factor": 1.0}, "threshold.*factor"),
        ({"factor": 1.0, "entropy_bound": 0.1}, "factor.*entropy_bound"),
        ({"factor": 0}, "factor"),
        ({"factor": "1"}, "factor"),
        ({"entropy_bound": -0.1}, "entropy_bound"),
        ({"alg_temp": -1.0}, "alg_temp"),
        ({"alg_temp": 0.5, "threshold": 0.9}, "alg_temp.*threshold"),
        ({"alg_temp": 0.5, "remasking": "random"}, "alg_temp.*random"),
        ({"threshold": 0.9, "remasking": "entropy"}, "threshold.*entropy"),
        ({"factor": 0.9, "remasking": "left_to_right"}, "factor.*left_to_right"),
        ({"revision": "p3", "steps": 8}, "revision"),
        ({"revision": "p2"}, "revision.*steps"),
        ({"revision": "p2", "steps": 8, "threshold": 0.5}, "threshold.*revision"),
        ({"revision": "p2", "steps": 8, "remasking": "random"}, "revision.*random"),
        ({"revision": "remdm", "steps": 8, "eta": 0.1}, "revision.*remasking"),
        ({"revision": "remdm", "steps": 8, "remasking": "random"}, "eta"),
        ({"revision": "remdm-conf", "steps": 8, "eta": 0.1}, "revision.*remasking"),
        ({"remdm_loop": [0.5, 0.1, 0.9]}, "remdm_loop.*revision"),
        ({**LOOPED, "remdm_loop": [0.1, 0.5, 0.9]}, "remdm_loop"),
        ({**LOOPED, "remdm_loop": 0.5}, "remdm_loop"),
        ({**LOOPED, "remdm_loop": [0.5, 0.1, 1.0]}, "remdm_loop"),
        ({"eta": 0.1}, "eta"),
        ({"revision": "remdm", "steps": 8, "remasking": "random", "eta": 1.5}, "eta"),
        ({"revision": "p2", "steps": 8, "editing_threshold": 0.5}, "editing_threshold"),
        ({"editing_threshold": 1.5}, "editing_threshold"),
        ({"max_post_steps": -1}, "max_post_steps"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"cfg_scale": -1.0}, "cfg_scale"),
        ({"cfg_scale": 1.0, "guidance_scale": 2.0}, "cfg_scale.*guidance_scale"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"num_return_sequences": 3}, "num_return_sequences.*temperature"),
        ({"length_quantile": 1.0}, "length_quantile"),
        ({"approximate_cache": "both"}, "approximate_cache"),
        ({"approximate_cache": True}, "approximate_cache"),
        ({"approximate_cache": "dual", "use_cache": False}, "use_cache"),
        ({"cache_refresh_steps": 2}, "cache_refresh_steps.*approximate_cache"),
        ({"approximate_cache": "dual", "cache_refresh_steps": 0}, "cache_refresh_steps"),
        ({"bad_words_ids": [[]]}, "bad_words_ids"),
        ({"bad_words_ids": [3]}, "bad_words_ids"),
        ({"bad_words_ids": 3}, "bad_words_ids"),
        ({"bad_words_ids": [[3, 4]], "editing_threshold": 0.5}, "bad_words_ids"),
        ({"num_beams": 4}, "num_beams"),
        ({"length_penalty": 1.3}, "length_penalty"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size"),
        ({"min_new_tokens": 5}, "min_new_tokens"),
    ],
    ids=str,
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(ld.UserError if "max_new_tokens" not in settings else ValueError, match=named):
        ld.DiffusionGenerationConfig(**settings)


def test_do_sample_keeps_its_meaning():
    assert ld.DiffusionGenerationConfig(do_sample=False, temperature=0.7).temperature == 0.0
    assert ld.DiffusionGenerationConfig(do_sample=True).temperature == 1.0
    assert ld.DiffusionGenerationConfig().temperature == 0.0
