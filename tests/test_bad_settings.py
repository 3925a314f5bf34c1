"""Settings that mean nothing: each is refused before anything is loaded, in one line that names it; and no text makes another error."""

import json
import math
import os
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from peft import LoraConfig
from transformers import GenerationConfig

from llm_diffusion import DiffusionDPOConfig, DiffusionGenerationConfig, DiffusionSFTConfig, UserError
from llm_diffusion.config import OWN_KEYS, as_dict, build, resolve, stages_of, training_hints
from llm_diffusion.data.prepare import Preparation
from llm_diffusion.job import lora, make_stage
from llm_diffusion.main import cli
from llm_diffusion.objective.settings import read_path
from llm_diffusion.presets import read_preset
from llm_diffusion.presets.files import DEEPEST, read_mapping
from llm_diffusion.training.adapters import prepare_adapter

NAN, INFINITE, HUGE = math.nan, math.inf, 10**30
MANY = max(8, 4 * os.cpu_count()) + 1  # processes


def checked(source):
    """What a run does to its settings before it loads anything."""
    hp = resolve(hyper_parameters=source)
    for stage in stages_of(hp):
        make_stage(hp, stage, Path(hp.output_dir), "cpu", "none")
    return hp


def refusal(source):
    with pytest.raises((UserError, FileNotFoundError)) as caught:
        checked(source)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 1200
    return message


# A setting, its mappings joined by dots, and values that it cannot have.
BAD = {
    # counts and sizes
    "max_steps": (-5, 0, 1.5, "x", True, HUGE, NAN),
    "batch_size": (0, -1, 1.5, None, HUGE, "many"),
    "gradient_accumulation_steps": (0, HUGE, 1e30, NAN),
    "max_length": (1, 0, HUGE, 1e30, None),
    "max_examples": (0, 1, -1, "x"),
    "diffusion_steps": (0, HUGE, 1e30),
    "eval_examples": (-1, HUGE, 1e30),
    "eval_answers": (-1, HUGE, True),
    "seed": (-1, 2**32, 1.5, "x"),
    "data_seed": (-1, 2**32, NAN),
    "num_threads": (0, MANY, HUGE),
    "dataloader_num_workers": (-1, MANY, HUGE, 1e30),
    "dataset_num_proc": (0, MANY, HUGE),
    "save_total_limit": (-1, 0),
    "annealing_steps": (0, -1, 1.5),
    "pad_to_multiple_of": (0, -8, HUGE, "some"),
    "eos_tail": (-1, 10**9, HUGE),
    "max_canvas": (0, 10**9),
    "block_length": (0, -3, 2.5),
    "mask_token_id": (-1, "x", 1.5),
    "per_device_eval_batch_size": (0, -1),
    "torch_empty_cache_steps": (0,),
    "eval_accumulation_steps": (0, -2),
    "dataloader_prefetch_factor": (0,),
    "ddp_timeout": (0, -1),
    # a number of steps, or a share of them
    "save_steps": (NAN, 0, -1, 1.5, INFINITE, HUGE),
    "eval_steps": (0, -1, NAN, 2.5),
    "logging_steps": (0, -1, NAN, 2.5),
    "warmup_steps": (-1, 1.5, NAN),
    "test_size": (1.5, 0, -1, NAN, INFINITE, 1e30),
    # rates and shares
    "epochs": (0, -1, NAN, INFINITE, 1e30, HUGE, "soon"),
    "learning_rate": (0, -1, NAN, INFINITE, 1e30, True, "x", "nan"),
    "weight_decay": (-1, NAN, INFINITE),
    "adam_beta1": (1, -0.1, NAN),
    "adam_beta2": (1.5, "x"),
    "adam_epsilon": (-1,),
    "max_grad_norm": (-1, NAN, INFINITE),
    "label_smoothing_factor": (5, 1, -1, NAN, 0.1),
    "neftune_noise_alpha": (NAN, -1, INFINITE),
    "min_mask_probability": (1, -0.1, NAN),
    "max_mask_probability": (0, 2),
    "annealing_points": ("x", [1], [[1]], [["a", "b"]]),
    "router_aux_loss_coef": (-1, 2),
    # words
    "pipeline": ("", "ar", 5),
    "device": ("tpu", "", 0),
    "model": ("", "  ", None, 5),
    "dataset": ("", [], None),
    "output_dir": ("", " ", None, 5, "~nobody123/x", "a\0b"),
    "preference_dataset": ("", "a\0b", "\ud800", 5, "tiny"),
    "prompts": ("x", [1], [None], ["\ud800"]),
    "lr_scheduler_type": ("sudden", 5),
    "optim": ("sudden",),
    "eval_strategy": ("sometimes",),
    "save_strategy": ("sometimes", 5),
    "hub_strategy": ("x",),
    "log_level": ("loud", []),
    "noise_schedule": ("x",),
    "loss_type": ("dft", "x"),
    "packing_strategy": ("wrong",),
    "report_to": (5, [1]),
    # flags
    "use_lora": ("no", None, 1),
    "debug": ("yes", 1),
    "bf16": ("x",),
    "gradient_checkpointing": ("no",),
    "fp16": (True, "yes"),
    "load_best_model_at_end": (True,),
    # lists of names
    "phases": ([[]], [1], [], ["x"], "sft", None),
    "stages": ([1], ["sft"], [[]], [{}], {"name": "a"}, [{"name": 1}], [{"name": "sft", "output_dir": "x"}]),
    "stages.a": (1,),
    "sft_config.output_dir": ("x",),
    "sft_config.use_cpu": (True,),
    "sft_config.max_steps": (-5, NAN),
    "sft_config": ([1], "x"),
    "pretrain_config.save_steps": (0, NAN),
    "dpo_config.beta": (0, -1, NAN),
    "dpo_config.num_draws": (0,),
    "dpo_config.label_smoothing": (0.5, -1),
    "dpo_config.loss_weights": (["a"], 1),
    "dpo_config.ref_model_mixup_alpha": (2,),
    "dpo_config.ref_model_sync_steps": (0,),
    "dpo_config.f_divergence_type": ("x",),
    # adapters and quantisation
    "lora_config.r": (0, -1, 10**7, True, "16", None),
    "lora_config.lora_alpha": (0, -1, 10**9, NAN, "x"),
    "lora_config.lora_dropout": (1.0, -0.5, NAN),
    "lora_config.target_modules": ("(unclosed", [], [1], 5),
    "lora_config.exclude_modules": ("*", []),
    "lora_config.bias": ("sometimes", True),
    "lora_config.task_type": ("SEQ_CLS", 5),
    "lora_config.modules_to_save": ("x", [1]),
    "lora_config.inference_mode": (True, "no"),
    "lora_config.use_dora": ("no",),
    "lora_config.init_lora_weights": ("nonsense", 5),
    "lora_config": ([1], "x", None),
    "qlora_config.load_in_4bit": ("yes",),
    "qlora_config.bnb_4bit_compute_dtype": ("float7", "int8", 5),
    "qlora_config.bnb_4bit_quant_type": ("nf5",),
    "qlora_config.bnb_4bit_use_double_quant": ("no",),
    "qlora_config.llm_int8_threshold": ("x", -1, NAN),
    # other mappings
    "wandb_config.project": (7, [], True),
    "wandb_config.wandb_log_path": (7,),
    "wandb_config.log_path": ("x",),
    "token_ids.pad": (-1, 1.5, None),
    "token_ids.eos": ("x",),
    "scratch.n_embd": (0, HUGE),
    "model_init_kwargs": ("x", [1]),
    "gradient_checkpointing_kwargs": (5, {"x": 1}, "x", '{"x": 1}'),
    "activation_checkpointing_kwargs": ({"x": 1}, "x"),
    "gradient_checkpointing_kwargs.use_reentrant": ("no", 1),
    "gradient_checkpointing_kwargs.every_n_layers": (0, True),
    "parallelism_config": ({}, {"tp_size": 2}, "x", 5),
    "metric_for_best_model": (5, "nonsense", "eval_", "runtime", "exact_match"),
    "torch_compile_mode": ("x",),
    "lr_scheduler_kwargs": ({"x": 1}, "x"),
    "optim_args": ("x", "a=1,b"),
    # decoding
    "generation.top_k": (-1, 1.5, "x"),
    "generation.top_p": (0, 2, NAN),
    "generation.temperature": (INFINITE, -1, NAN, "hot"),
    "generation.max_new_tokens": (0, -1, HUGE, 1.5, "8"),
    "generation.guidance_scale": (INFINITE, -1),
    "generation.cfg_scale": (INFINITE, -1, True),
    "generation.threshold": (2, 0, NAN),
    "generation.steps": (0, HUGE),
    "generation.seed": (-1, 1e30),
    "generation.suppress_tokens": ("x", ["a"], [-1], 5),
    "generation.bad_words_ids": ([["a"]], [[-1]], [1]),
    "generation.eos_token_id": ("x", -1, [-1]),
    "generation.pad_token_id": ("x", -1, [1]),
    "generation.mask_token_id": (-1,),
    "generation.do_sample": ("no", 1),
    "generation.use_cache": ("no",),
    "generation.return_dict_in_generate": ("no",),
    "generation.grow_canvas": ("no",),
    "generation.remasking": ("x",),
    "generation.num_beams": (2,),
    "generation.cache_implementation": ("x",),
}
CASES = [(name, value) for name, values in BAD.items() for value in values]


def nested(name, value):
    for part in reversed(name.split(".")):
        value = {part: value}
    return value


@pytest.mark.parametrize(("name", "value"), CASES, ids=[f"{name}={value!r:.20}" for name, value in CASES])
def test_a_value_that_means_nothing_is_refused_by_name(name, value):
    message = refusal(json.dumps(nested(name, value)))
    assert all(part in message for part in name.split("."))


TOGETHER = [
    ({"use_wandb": True, "report_to": "tensorboard"}, "`report_to`"),
    ({"use_wandb": True, "report_to": ["none"]}, "`report_to`"),
    ({"use_qlora": True, "qlora_config": {"load_in_4bit": False}}, "`qlora_config`"),
    ({"phases": ["dpo"], "dpo_config": {"loss_type": ["nope"]}}, "`loss_type[0]`"),
    ({"phases": ["dpo"], "dpo_config": {"loss_type": ["ipo"], "loss_weights": [1, 2]}}, "`loss_weights`"),
    ({"phases": ["dpo"], "dpo_config": {"metric_for_best_model": "nelbo"}}, "rewards/accuracies"),
    ({"attention": "lossless", "metric_for_best_model": "nelbo"}, "accepted_length"),
    ({"attention": "block", "metric_for_best_model": "accepted_length"}, "nelbo"),
    ({"pipeline": "arm", "metric_for_best_model": "nelbo"}, "`metric_for_best_model`"),
    ({"pipeline": "arm", "lr_scheduler_kwargs": {"x": 1}}, "`lr_scheduler_kwargs`"),
    ({"pipeline": "arm", "generation": {"suppress_tokens": "x"}}, "`suppress_tokens`"),
    ({"pipeline": "arm", "generation": {"top_k": -1}}, "`top_k`"),
    ({"stages": [{"name": "a", "save_steps": 0}]}, "`stages.a.save_steps`"),
    ({"stages": [{"name": "a", "resume_from_checkpoint": "x"}]}, "`stages.a.resume_from_checkpoint`"),
]


@pytest.mark.parametrize(("given", "named"), TOGETHER)
def test_settings_that_mean_nothing_together(given, named):
    assert named in refusal(json.dumps(given))


@pytest.mark.parametrize("kind", [DiffusionSFTConfig, DiffusionDPOConfig])
@pytest.mark.parametrize(
    ("name", "value"),
    [(name, value) for name in ("max_steps", "save_steps", "eval_steps", "seed") for value in (-5, 0.5j, NAN, HUGE)]
    + [("eval_steps", 0), ("pad_to_multiple_of", -8), ("lr_scheduler_kwargs", {"x": 1}), ("fp16", True)],
)
def test_trainers_in_python_refuse_the_same(kind, name, value, tmp_path):
    with pytest.raises(UserError, match=f"`{name}`"):
        kind(str(tmp_path), use_cpu=True, **{name: value})


def test_defaults_and_what_stands_for_unset_are_right():
    hp = build(
        {"max_steps": -1, "pad_to_multiple_of": "auto", "eval_steps": None, "warmup_steps": 0.1, "test_size": 2.0}
    )
    assert hp.training["max_steps"] == -1 and hp.test_size == 2
    build(
        {"lora_config": {"task_type": "CAUSAL_LM", "inference_mode": False}, "save_steps": 0.5, "report_to": ["none"]}
    )
    assert build({"model_init_kwargs": {"max_memory": {0: "1GiB"}}})
    checked(
        '{"metric_for_best_model": "eval_exact_match_copy", "eval_answers": 2, "gradient_checkpointing_kwargs": {"use_reentrant": true}}'
    )
    checked('{"pipeline": "arm", "label_smoothing_factor": 0.1}')


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"inference_mode": True}, "`inference_mode`"),
        ({"r": 10**4}, "`r`"),
        ({"modules_to_save": ["nowhere"]}, "`modules_to_save`"),
        ({"trainable_token_indices": [10**6]}, "`trainable_token_indices`"),
    ],
)
def test_adapters_that_do_not_fit_the_model(config, named, tiny):
    from llm_diffusion.models.record import record_of

    with pytest.raises(UserError, match=named):
        prepare_adapter(tiny[0], LoraConfig(target_modules="all-linear", **config), record_of(tiny[0]))
    if "inference_mode" not in config and "trainable" not in named:
        with pytest.raises(UserError, match=named):
            lora(build({"lora_config": config}), tiny[0])


def test_types_of_transformers_own_decoding_settings():
    kept = {
        "suppress_tokens": [1, 2],
        "bad_words_ids": [[1], [2]],
        "eos_token_id": [2, 3],
        "do_sample": True,
        "pad_token_id": 0,
    }
    config = DiffusionGenerationConfig(**kept)
    assert {name: getattr(config, name) for name in kept} == kept
    assert set(kept) <= set(vars(GenerationConfig()))


# -- text


DEEP = 20_000
MALFORMED = {
    "a key twice": '{"seed": 1, "seed": 2}',
    "a nested key twice": '{"lora_config": {"r": 1, "r": 2}}',
    "deep": '{"a":' * DEEP,
    "deep and closed": '{"a":' * DEEP + "1" + "}" * DEEP,
    "deep lists": '{"a":' + "[" * DEEP + "]" * DEEP + "}",
    "rather deep": '{"model_init_kwargs":' + '{"a":' * DEEPEST + "1" + "}" * (DEEPEST + 1),
    "a lone surrogate": '{"model": "\\ud800"}',
    "a lone surrogate as key": '{"model_init_kwargs": {"\\ud800": 1}}',
    "NUL": '{"dataset": "a\\u0000"}',
    "infinite": '{"model_init_kwargs": {"a": [1e999]}}',
    "digits": '{"seed": ' + "9" * 5000 + "}",
    "a comma": '{"seed": 1,}',
    "a list": "[1]",
    "nobody's home": "~nobody123/x.json",
    "nothing": "",
    "a folder": ".",
    "long": "x" * 5000,
}
MALFORMED_FILES = {
    "a key twice": "seed: 1\nseed: 2\n",
    "a nested key twice": "lora_config: {r: 1, r: 2}\n",
    "a null key": "null: 1\n",
    "a key that is a flag": "lora_config:\n  yes: 1\n",
    "a key that is a list": "? [a]\n: 1\n",
    "a key that is a number": "1: 2\n",
    "deep": "a: " + "[" * 2000,
    "itself": "model_init_kwargs: &a {a: *a}\n",
    "a date": "model: 2024-01-01\n",
    "no date": "model: 2024-99-99\n",
    "a set": "model_init_kwargs: !!set {a, b}\n",
    "bytes": "model: !!binary aGk=\n",
    "an object": "model: !!python/object:os.system {}\n",
    "no number": "seed: !!int x\n",
    "infinite": "learning_rate: .inf\n",
    "a tab": "a:\n\t- b\n",
    "a list": "- a\n",
    "text": "hello\n",
    "Latin-1": b"model: caf\xe9\n",
    "binary": bytes(range(256)),
    "UTF-16": "seed: 1\n".encode("utf-16"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_json_is_one_line(case):
    refusal(MALFORMED[case])


@pytest.mark.parametrize("case", MALFORMED_FILES)
def test_malformed_files_are_one_line(case, tmp_path):
    text = MALFORMED_FILES[case]
    (tmp_path / "a.yaml").write_bytes(text.encode() if isinstance(text, str) else text)
    refusal(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        b'\xef\xbb\xbf{"learning_rate": 2e-4}',
        b"\xef\xbb\xbflearning_rate: 2e-4\r\n",
        b'{ // a comment\r\n"learning_rate": 2e-4\r\n}',
        b"learning_rate: 2.0e-04\n",
        b"learning_rate: +.2e-3\n",
        b'learning_rate: "2e-4"\n',
        b"learning_rate: 0.0002\n# 2e-3\n",
    ],
)
def test_numbers_byte_order_marks_and_line_ends(text, tmp_path):
    (tmp_path / "a").write_bytes(text)
    assert resolve(config=str(tmp_path / "a")).learning_rate == 2e-4


def test_numbers_in_yaml_are_numbers_wherever_they_stand(tmp_path):
    (tmp_path / "a.yaml").write_text("a: {b: [1e3, -2E-2, 1e, e3, 'x1e3']}\nc: 1_0\nd: {0: x}\n")
    found = read_mapping(str(tmp_path / "a.yaml"), "here")
    assert found == {"a": {"b": [1000.0, -0.02, "1e", "e3", "x1e3"]}, "c": 10, "d": {"0": "x"}}


@pytest.mark.parametrize(
    "name", ["tiny*", "*", "?iny", "[t]iny", "", "+", "tiny+", "../model/tiny", "tiny.yaml", "TINY"]
)
def test_names_of_presets_are_no_patterns(name):
    with pytest.raises(UserError, match="preset .* is unknown"):
        read_preset(name)


@pytest.mark.parametrize("path", ["", " ", "a\0", "~nobody123", "~nobody123/a"])
def test_paths(path):
    with pytest.raises(UserError, match="`here`"):
        read_path("here", path)
    assert read_path("here", "~/a") == Path.home() / "a"


# -- any text at all


KEYS = sorted(OWN_KEYS | set(training_hints()) | set(training_hints(True)) | set(vars(GenerationConfig())))
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["nan", "1e400", "~x", "a\0"])
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
    max_leaves=5,
)
EXAMPLES = max(200, settings.default.max_examples)  # more with `--hypothesis-profile=slow`
FUZZ = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)


def only_our_errors(source):
    """Refused in one line, or settings that are finite, that can be written, and that mean the same when read again."""
    try:
        hp = resolve(hyper_parameters=source)
    except (UserError, FileNotFoundError) as error:
        assert "\n" not in str(error) and str(error)
        return
    again = build(json.loads(json.dumps(as_dict(hp), allow_nan=False)))
    assert as_dict(again) == as_dict(hp)


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
@example({"stages": [{"name": "a", "trains": []}]})
@example({"a\nb": 1})
@example({"scratch": {"n_embd": 10**9, "n_layer": [], "n_head": 0, "n_positions": None}})
def test_any_json_is_settings_or_one_line(given):
    only_our_errors(json.dumps(given))


@FUZZ
@given(st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=5), VALUES, max_size=3), st.data())
def test_any_yaml_is_settings_or_one_line(tmp_path_factory, given, data):
    text = yaml.safe_dump(given, allow_unicode=False)
    place = data.draw(st.integers(0, len(text)))
    text = data.draw(
        st.sampled_from([text, text[:place], text[:place] + "\0" + text[place:], text + text, text.upper()])
    )
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_text(text)
    only_our_errors(str(path))


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(sorted({*vars(GenerationConfig()), *vars(DiffusionGenerationConfig())})), VALUES, max_size=3
    )
)
def test_any_decoding_settings_are_settings_or_one_line(given):
    only_our_errors(json.dumps({"generation": given}))


# -- the command line


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (
            ("--hyper-parameters-json", '{"model": "tiny", "dataset": "tiny", "seed": -1, "output_dir": "out"}'),
            "`seed`",
        ),
        (("--hyper-parameters-json", '{"model": "tiny", "output_dir": "~nobody123/out"}'), "`output_dir`"),
        (("--hyper-parameters-json", ""), "`--hyper-parameters-json`"),
        (("--config", ""), "`--config`"),
        (("--config", "~nobody123/a.yaml"), "`--config`"),
        (("--preset", "tiny*"), "'tiny*'"),
        (("--preset", ""), "preset ''"),
        (("",), "preset ''"),
        (("tiny*",), "'tiny*'"),
        (("chat", "tiny", "\ud800"), "is no text"),
        (("chat", "~nobody123/a", "hi"), "`model`"),
        (("chat", "", "hi"), "`model`"),
        (("chat", "tiny", "hi", "--settings", '{"top_k": -1}'), "`top_k`"),
        (("chat", "tiny", "hi", "--settings", '{"max_new_tokens": 1000000000}'), "`max_new_tokens`"),
        (("generate", "tiny", "hi", "--svg", ""), "`--svg`"),
        (("generate", "tiny", "hi", "--settings", '{"temperature": Infinity}'), "`temperature`"),
        (("side-by-side", "tiny", "--prompt", "hi", "--settings", '{"seed": -1}'), "`seed`"),
        (("analyze", "tiny", "--batch-size", "0"), "`batch_size`"),
        (("analyze", "tiny", "--length", str(HUGE)), "`length`"),
        (("analyze", "tiny", "--lora-rank", "-1"), "--lora-rank"),
        (("analyze", "tiny", "--json", ""), "`--json`"),
        (("convert", "tiny", "--hyper-parameters-json", '{"lora_config": {"r": 0}}'), "`lora_config.r`"),
        (("prefer", "tiny", "--output", ""), "`--output`"),
        (("prefer", "tiny", "--output", "o", "--seed", "-1"), "--seed"),
        (("prefer", "tiny", "--output", "o", "--kinds", ""), "`kinds`"),
        (("prefer", "tiny", "--output", "o", "--from-model", "tiny", "--samples", "0"), "--samples"),
        (("evaluate", "tiny", "--text", "t", "--seed", "-1"), "--seed"),
        (("evaluate", "tiny", "--text", "t", "--samples", "0"), "--samples"),
        (("evaluate", "tiny", "--text", "t", "--max-length", "0"), "--max-length"),
        (("evaluate", "tiny", "--text", "t", "--limit", str(HUGE)), "--limit"),
        (("evaluate", "tiny", "--text", "t", "--num-fewshot", "-1"), "--num-fewshot"),
        (("evaluate", "tiny", "--text", "~nobody123/a", "--output", "o"), "`--text`"),
        (("evaluate", "tiny", "--prompts", "tiny", "--output", "o", "--sweep", '{"steps": [0]}'), "`steps`"),
        (("prepare-data", "t", "--model", "tiny", "--output", "~nobody123/a"), "`--output`"),
        (("prepare-data", "", "--model", "tiny", "--output", "o"), "`source`"),
    ],
)
def test_one_line_exit_code_2_and_nothing_left_behind(arguments, named, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, list(arguments), catch_exceptions=False)
    last = result.stderr.splitlines()[-1]
    assert result.exit_code == 2 and last.lower().startswith("error: ") and named in last
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("length", 1),
        ("length", HUGE),
        ("train", 0),
        ("test", -1),
        ("test", 1.5),
        ("test", NAN),
        ("test", 1e30),
        ("form", "x"),
    ],
)
def test_preparation(name, value):
    with pytest.raises(UserError, match=f"`{name}`"):
        Preparation("a.txt", "tiny", **{name: value})
