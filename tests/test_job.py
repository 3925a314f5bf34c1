"""The main job's parts: settings as the trainer gets them, data, LoRA's targets; and the whole job of the pipeline `arm`.

The whole job of the pipeline `diffusion`: see test_main.
"""

import json
import subprocess
import sys

import pytest
import torch
from click.testing import CliRunner
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from llm_diffusion import DiffusionDPOConfig, UserError, load_diffusion_model, probe_attention
from llm_diffusion.config import as_dict, build, stages_of
from llm_diffusion.data.rows import source_row
from llm_diffusion.job import check_start, load_data, loader_options, lora, make_stage, self_generated_data
from llm_diffusion.main import cli
from llm_diffusion.models.files import write_text


def test_debug_limits_the_data_and_marks_the_run(tmp_path):
    hp = build({"model": "tiny", "debug": True})
    assert make_stage(hp, stages_of(hp)[1], tmp_path, "cpu", "none").arguments.run_name == "debug-tiny-sft"


def test_the_column_of_texts_is_a_setting_of_the_run(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a b c", "text": null}\n' * 4)
    given = {"dataset": str(tmp_path / "a.jsonl"), "dataset_text_field": "body"}
    assert load_data(build(given)).train["text"][:] == ["a b c"] * 3
    hp = build(given)
    assert make_stage(hp, stages_of(hp)[1], tmp_path, "cpu", "none").arguments.dataset_text_field == "text"
    with pytest.raises(UserError, match=r"`sft_config.dataset_text_field`: all stages share it"):
        build({"sft_config": {"dataset_text_field": "body"}})


def test_settings_reach_the_trainer(tmp_path):
    hp = build({"warmup_steps": 7, "max_grad_norm": 0.5, "sft_config": {"learning_rate": 1e-5}})
    pretrain, sft = (make_stage(hp, stage, tmp_path, "cpu", "none").arguments for stage in stages_of(hp))
    assert (pretrain.warmup_steps, pretrain.max_grad_norm) == (7, 0.5)
    assert (pretrain.learning_rate, sft.learning_rate) == (2e-4, 1e-5)
    assert pretrain.completion_only_loss is False and sft.completion_only_loss is None


def test_preferences_have_a_learning_rate_of_their_own(tmp_path):
    """What runs of all phases share is handed on; what means something else to a loss of preferences is not."""
    hp = build({"phases": ["sft", "dpo"], "batch_size": 3, "learning_rate": 1e-2, "attention": "block", "eos_tail": 4})
    sft, dpo = (make_stage(hp, stage, tmp_path, "cpu", "none").arguments for stage in stages_of(hp))
    assert (sft.learning_rate, sft.eos_tail) == (1e-2, 4)
    assert (dpo.learning_rate, dpo.per_device_train_batch_size, dpo.attention) == (1e-6, 3, "block")
    assert isinstance(dpo, DiffusionDPOConfig)


def test_data_that_the_model_writes_itself_is_held_out_from_and_kept(tmp_path):
    model, tokenizer = load_diffusion_model("tiny", attention="lossless")
    hp = build(
        {"model": "tiny", "dataset": "self", "max_examples": 6, "test_size": 2, "generation": {"max_new_tokens": 8}}
    )
    data = self_generated_data(hp, model, tokenizer, tmp_path / "out")
    assert (len(data.train), len(data.test)) == (4, 2)
    assert len((tmp_path / "out-self-generated.jsonl").read_text().splitlines()) == 1 + 6  # a round of prompts
    assert list(self_generated_data(hp, model, tokenizer, tmp_path / "out").train) == list(data.train)


def test_a_model_writes_no_preferences(tmp_path):
    with pytest.raises(UserError, match="`dataset`: 'self'"):
        check_start(build({"model": "tiny", "dataset": "self", "phases": ["sft", "dpo"]}), "cpu", tmp_path, False)


def test_lora_targets_are_resolved_for_other_architectures():
    phi = PhiForCausalLM(
        PhiConfig(vocab_size=64, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    )
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    for model in (phi, gpt2):
        adapted = get_peft_model(model, lora(build({}), model))
        assert adapted.get_nb_trainable_parameters()[0] > 0
    with pytest.raises(UserError, match="target_modules"):
        lora(build({"lora_config": {"target_modules": ["query_proj"]}}), phi)
    with pytest.raises(UserError, match="lora_config"):
        lora(build({"lora_config": {"bias": "some", "target_modules": ["q_proj"]}}), phi)


def test_lora_on_attention_alone_by_its_real_names():
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64))
    config = lora(build({"lora_config": {"target_modules": "attention"}}), model)
    adapted = {name for name, _ in get_peft_model(model, config).named_parameters() if "lora_A" in name}
    assert len(adapted) == 4 and all(".attn." in name for name in adapted)  # two layers, c_attn and c_proj


@pytest.mark.parametrize("dataset", ["tiny", "tiny:36"])
def test_preferences_are_errors_in_the_training_answers(dataset):
    data = load_data(build({"dataset": dataset, "phases": ["sft", "dpo"], "test_size": 12, "max_examples": 24}))
    pairs, held_out = data.pairs
    answers = {source_row(example)["messages"][-1]["content"] for example in data.train}
    assert 12 <= len(pairs) <= len(data.train) and 6 <= len(held_out) <= len(data.test)
    for pair in pairs:
        assert pair["chosen"][0]["content"] in answers and pair["rejected"] != pair["chosen"]


@pytest.mark.parametrize(
    ("row", "named"),
    [
        (None, "`preference_dataset`"),
        ({"prompt": "a", "chosen": "b"}, "`rejected`"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "`rejected`"),
    ],
)
def test_pairs_are_checked_before_the_phases_before_them_begin(tmp_path, row, named):
    file = tmp_path / "pairs.jsonl"
    if row is not None:
        file.write_text("\n".join([json.dumps(row)] * 3))
    with pytest.raises((UserError, FileNotFoundError), match=named):
        load_data(build({"dataset": "tiny", "max_examples": 8, "phases": ["dpo"], "preference_dataset": str(file)}))


def test_turns_without_an_answer_are_read_where_every_token_is_trained(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n' * 4)
    given = {"dataset": str(tmp_path / "a.jsonl"), "test_size": 1}
    assert len(load_data(build({**given, "phases": ["pretrain"]})).train) == 3
    for other in (
        {"phases": ["pretrain", "sft"]},
        {"phases": ["pretrain"], "pretrain_config": {"completion_only_loss": True}},
    ):
        with pytest.raises(UserError, match="`messages` of row 0 has no assistant turn"):
            load_data(build({**given, **other}))


# -- what is refused before anything long begins


def held(folder, work, **changed):
    """A folder in which a run with the default settings has trained."""
    if work:
        write_text(folder / "sft" / "checkpoint-1" / "trainer_state.json", "{}")
    write_text(folder / "hyper_parameters.json", json.dumps(as_dict(build({})) | changed))
    return folder


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"learning_rate": 1e-5}, "learning_rate"),
        ({"lora_config": {"r": 4}}, "lora_config"),
        ({"stages": [{"name": "a"}]}, "stages"),
        ({"warmup_steps": 3}, "warmup_steps"),
        ({"num_threads": 2, "device": "cpu", "output_dir": "elsewhere", "dataloader_num_workers": 2}, None),
        ({"logging_steps": 1, "report_to": "tensorboard", "eval_examples": 3, "hub_model_id": "a/b"}, None),
        ({"sft_config": {"logging_steps": 1}}, None),
        ({}, None),
    ],
)
def test_a_folder_of_another_run_is_left_alone(tmp_path, change, named):
    output, hp = held(tmp_path, True), build(change)
    for resume in (False, True):
        if named is None:
            check_start(hp, "cpu", output, resume)
            continue
        key = "`--resume`" if resume else "`output_dir`"
        with pytest.raises(UserError, match=f"{key}: .* holds other settings than this run: `{named}`"):
            check_start(hp, "cpu", output, resume)
    if named:
        check_start(hp, "cpu", held(tmp_path / "other", False), False)  # nothing was trained there


@pytest.mark.parametrize("text", ["", '{"seed": 1', "[]", None])
def test_settings_that_cannot_be_read_are_named(tmp_path, text):
    file = held(tmp_path, True) / "hyper_parameters.json"
    file.unlink() if text is None else file.write_text(text)
    for resume in (False, True):
        with pytest.raises(
            UserError, match="not its settings" if text is None else r"hyper_parameters\.json' is damaged"
        ):
            check_start(build({}), "cpu", tmp_path, resume)


def test_settings_of_an_older_version_are_the_same_run(tmp_path):
    output = held(tmp_path, True)
    older = as_dict(build({}))
    del older["token_ids"]
    write_text(output / "hyper_parameters.json", json.dumps(older))
    check_start(build({}), "cpu", output, True)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"lr_scheduler_type": "sudden"}, "`lr_scheduler_type`"),
        ({"sft_config": {"debug": "sudden"}}, "settings of `sft`"),
        ({"min_mask_probability": 0.9, "max_mask_probability": 0.1}, "`min_mask_probability`"),
        ({"annealing": "soft", "annealing_schedule": "sudden"}, "`annealing_schedule`"),
        ({"phases": ["dpo"], "dpo_config": {"num_draws": 0}}, "`dpo_config.num_draws`"),
        ({"phases": ["dpo"], "dpo_config": {"beta": 0}}, "`dpo_config.beta`"),
    ],
)
def test_settings_that_a_trainer_refuses_are_named(given, named, tmp_path):
    with pytest.raises(UserError, match=named):
        hp = build(given)
        for stage in stages_of(hp):
            make_stage(hp, stage, tmp_path, "cpu", "none")


@pytest.mark.parametrize(
    ("given", "device", "named"),
    [
        ({}, "mps", "`quantization`"),
        ({"qlora_config": {"bnb_4bit_compute_dtype": "bfloat17"}}, "cpu", "`qlora_config.bnb_4bit_compute_dtype`"),
        ({"qlora_config": {"load_in_4bit": "yes"}}, "cpu", "`qlora_config`"),
    ],
)
def test_quantisation_that_cannot_be_is_named(given, device, named):
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match=named):
        loader_options(build({"use_qlora": True, **given}), device)


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has one")
def test_a_device_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="`device`"):
        check_start(build({}), "mps", tmp_path, resume=False)


# -- the pipeline `arm`: TRL's own training, an ordinary causal model as its result, and on from there to diffusion


CONFIG = """{
  "pipeline": "arm",          // left to right
  "init_from": "",            // from nothing
  "model": "tiny",            // whose tokenizer
  "memmap_path": "DATA",
  "context_length": 32, "n_embd": 16, "n_layer": 1, "n_head": 2,
  "mask_id": 300, "eos_token_id": 2, "attn_annealing_steps": 2,
  "n_epochs": 1, "n_steps": 2, "val_check_interval": 2, "batch_size": 2, "accumulate_grad": 1, "max_lr": 1e-2,
  "enable_checkpointing": true, "save_dir": "OUT", "wandb": false,
  "user_prompt": "Tom has", "n_samples": 2, "max_new_tokens": 4, "do_sample": false, "diffusion_steps": 2,
  "denoising_strategy": "entropy", "device": "cpu"
}"""


def run(*arguments):
    return CliRunner().invoke(cli, list(arguments), catch_exceptions=False)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model from nothing, trained from left to right by a config.json with comments."""
    root = tmp_path_factory.mktemp("arm")
    rows = [{"text": f"Tom has {i} apples and Ann has {i + 1} books."} for i in range(12)]
    (root / "train.jsonl").write_text("\n".join(json.dumps(row) for row in rows[:8]))
    (root / "test.jsonl").write_text("\n".join(json.dumps(row) for row in rows[8:]))
    (root / "data").mkdir()
    for split in ("train", "test"):
        (root / f"{split}.jsonl").rename(root / "data" / f"{split}.jsonl")
    file = root / "config.json"
    file.write_text(CONFIG.replace("DATA", str(root / "data")).replace("OUT", str(root / "out")))
    result = run("--config", str(file))
    assert result.exit_code == 0, result.output
    return root, result


def test_it_is_an_ordinary_causal_model_with_the_loss_of_transformers(trained):
    root, result = trained
    (aside,) = [line for line in result.stderr.splitlines() if "left aside" in line]
    assert "`mask_id`" in aside and aside.endswith("belongs to the pipeline 'diffusion'")
    model = AutoModelForCausalLM.from_pretrained(root / "out" / "sft_model").eval()
    assert isinstance(model, GPT2LMHeadModel) and probe_attention(model) == "causal"
    tokenizer = AutoTokenizer.from_pretrained(root / "out" / "sft_model")
    assert tokenizer.mask_token is None and model.config.vocab_size == len(tokenizer)  # nothing of a diffusion model
    total = count = 0
    for line in (root / "data" / "test.jsonl").read_text().splitlines():
        ids = torch.tensor([[*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]])
        with torch.no_grad():
            nll = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum")
        total, count = total + nll.item(), count + ids.shape[1] - 1
    history = json.loads((root / "out" / "sft_model" / "stage.json").read_text())
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] == pytest.approx(total / count, abs=2e-3)
    assert (root / "out" / "pretrain" / "checkpoint-2").is_dir() and (root / "out" / "loss.png").exists()


def test_a_finished_run_resumes_to_the_same_and_another_is_refused(trained):
    root, _ = trained
    before = (root / "out" / "sft_model" / "model.safetensors").read_bytes()
    assert run("--config", str(root / "config.json"), "--resume").exit_code == 0
    assert (root / "out" / "sft_model" / "model.safetensors").read_bytes() == before
    other = run("--config", str(root / "config.json"), "--resume", "--hyper-parameters-json", '{"seed": 1}')
    assert other.exit_code == 2 and "`--resume`" in other.stderr
    before = contents(root / "out")
    other = run("--config", str(root / "config.json"), "--hyper-parameters-json", '{"seed": 1}')
    assert other.exit_code == 2 and "`seed` is 42 there, 1 here" in other.stderr.splitlines()[-1]
    assert contents(root / "out") == before


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


HOLDER = """
import sys
from pathlib import Path
from llm_diffusion.models.files import locked
with locked(Path(sys.argv[1]), ""):
    print(flush=True)
    sys.stdin.read()
"""


def test_a_second_run_into_the_folder_is_refused(tmp_path):
    """Of the main job, and of the preparation of data."""
    (tmp_path / "a.txt").write_text("Tom has 2 apples.")
    prepare = ["prepare-data", str(tmp_path / "a.txt"), "--model", "tiny", "--output", str(tmp_path / "out")]
    main = ["tiny", "--hyper-parameters-json", json.dumps({"output_dir": str(tmp_path / "out"), "device": "cpu"})]
    for lock, command in ((tmp_path / "out" / ".lock", main), (tmp_path / ".out.lock", prepare)):
        holder = [sys.executable, "-c", HOLDER, str(lock)]
        with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as first:
            first.stdout.readline()
            refused = run(*command)
            assert refused.exit_code == 2, refused.output
            assert f"is in use by process {first.pid};" in refused.stderr.splitlines()[-1]
            first.stdin.close()
    assert not (tmp_path / "out").exists()


def test_on_to_diffusion_and_back(trained):
    """The AR checkpoint is converted and trained by the same file, then trained from left to right again."""
    root, _ = trained
    start, out = str(root / "out" / "sft_model"), str(root / "diffusion")
    change = {"pipeline": "diffusion", "init_from": start, "save_dir": out}
    file = root / "diffusion.json"
    settings = json.loads("\n".join(line.split("//")[0] for line in (root / "config.json").read_text().splitlines()))
    file.write_text(json.dumps(settings | change))
    result = run("--config", str(file))
    assert result.exit_code == 0, result.output
    model, tokenizer = load_diffusion_model(f"{out}/sft_model", device="cpu")
    record = model.config.diffusion
    assert (record["mask_token_id"], tokenizer.mask_token_id) == (300, 300)
    assert record["annealed"] and record["conversion_steps"] == 2 and record["base_model"] == start
    # Sampled by the file's own words, by both pipelines, each prompt `n_samples` times.
    for pipeline in ("arm", "diffusion"):
        answered = run("generate", f"{out}/sft_model", "--config", str(file), "--pipeline", pipeline)
        assert answered.exit_code == 0 and len(answered.stdout.splitlines()) >= 2, answered.output
    compared = run(
        *("side-by-side", start, f"{out}/sft_model", "--prompt", "Tom has"),
        *("--settings", '{"max_new_tokens": 4, "steps": 2, "block_length": 4}'),
    )
    assert compared.exit_code == 0, compared.output
    assert compared.stdout.count(f"{out}/sft_model, ") == 2 and compared.stdout.count(f"{start}, ") == 2
    assert compared.stdout.count(", arm: ") == 2 and "nats/token" in compared.stdout
    again = run(
        "--config",
        str(file),
        "--hyper-parameters-json",
        json.dumps({**change, "pipeline": "arm", "init_from": f"{out}/sft_model", "save_dir": str(root / "again")}),
    )
    assert again.exit_code == 0, again.output
    assert probe_attention(AutoModelForCausalLM.from_pretrained(root / "again" / "sft_model")) == "causal"
