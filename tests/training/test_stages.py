"""The staged recipe: what trains when, that stages follow each other over the same weights, and that a stopped run goes on."""

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from models.test_attention import CONFIGS
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from llm_diffusion import DiffusionSFTConfig, DiffusionSFTTrainer, UserError, load_diffusion_model
from llm_diffusion.data.datasets import PLAIN_CHAT_TEMPLATE
from llm_diffusion.data.tiny import tiny_dataset
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.record import read_record
from llm_diffusion.training.stages import Stage, run_stages, select_parameters

# With dropout, whose draws must not depend on which stages this process has trained.
LORA = LoraConfig(r=2, lora_alpha=4, lora_dropout=0.2, target_modules="all-linear", task_type="CAUSAL_LM")


def arguments(folder, **settings):
    settings = {
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 1e-2,
        "max_length": 64,
        "save_strategy": "steps",
        "save_steps": 1,
        "random_canvas": 0.0,
        **settings,
    }
    return DiffusionSFTConfig(str(folder), **settings)


def recipe(folder, last="adapters"):
    return [
        Stage("attention", "attention", arguments(folder / "attention", annealing="soft", completion_only_loss=False)),
        Stage("diffusion", "adapters", arguments(folder / "diffusion", completion_only_loss=False)),
        Stage("recovery", last, arguments(folder / "recovery")),
    ]


@pytest.fixture(scope="module")
def base(random_llama, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    random_llama().save_pretrained(folder)
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """The recipe run to its end: where, and the log of every stage."""
    output = tmp_path_factory.mktemp("whole")
    return output, run(base, output, recipe(output))


def load(path):
    return load_diffusion_model(path, device="cpu")


def run(base, output, stages, peft_config=LORA, **options):
    model, tokenizer = load(base)
    data = tiny_dataset(12)
    data = (data, data.select(range(4)))
    return run_stages(model, tokenizer, stages, data, output, peft_config=peft_config, **options)


# -- what trains


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_is_found_by_its_real_names(name):
    """Against the shapes themselves: with attention alone, no parameter outside of attention modules trains, and some do."""
    model = AutoModelForCausalLM.from_config(CONFIGS[name]())
    select_parameters(model, "attention", set())
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    modules = {
        key
        for key, module in model.named_modules()
        if type(module).__name__.endswith(("Attention", "SdpaAttention")) and any(True for _ in module.parameters())
    }
    want = {key for key, _ in model.named_parameters() if any(key.startswith(f"{module}.") for module in modules)}
    assert trained == want and trained
    for trains in ("adapters", "everything"):  # without adapters all weights, the mask token's row among them
        select_parameters(model, trains, set())
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_of_adapters_too(base):
    model, tokenizer = load(base)
    config = copy.deepcopy(LORA)
    config.trainable_token_indices = [tokenizer.mask_token_id]
    model = get_peft_model(model, config)
    every = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    select_parameters(model, "attention", every)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("self_attn" in name for name in trained) and not any("mlp" in name for name in trained)
    assert any("token" in name for name in trained)  # the mask token's row
    assert any("mlp" in name for name in every)
    select_parameters(model, "adapters", every)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == every


def test_nothing_to_train_is_an_error(base):
    model, _ = load(base)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM"))
    every = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(UserError, match="`stages.trains`"):
        select_parameters(model, "attention", every)


# -- stages


def test_each_stage_moves_what_it_trains_and_nothing_else(whole):
    output, histories = whole
    assert list(histories) == ["attention", "diffusion", "recovery"]
    assert all("eval_nelbo" in history[-1] or "eval_nelbo" in history[-2] for history in histories.values())
    first, second, third = (
        dict(load(str(output / name))[0].named_parameters())
        for name in ("attention_model", "diffusion_model", "sft_model")
    )
    for name, weight in first.items():
        if "lora_B" in name:
            assert bool(weight.any()) == ("self_attn" in name)  # fresh adapters start at zero
            assert not torch.equal(weight, second[name]) and not torch.equal(second[name], third[name])
    record = load(str(output / "sft_model"))[0].get_base_model().config.diffusion
    assert record["conversion_steps"] == 6


def test_everything_trains_the_merged_weights(base, tmp_path):
    output = tmp_path / "out"
    run(base, output, recipe(output, last="everything"))
    assert not (output / "sft_model" / "adapter_config.json").exists()
    final, _ = load(str(output / "sft_model"))
    before = load(str(output / "diffusion_model"))[0].merge_and_unload()
    for (name, weight), old in zip(final.named_parameters(), before.parameters(), strict=True):
        assert not torch.equal(weight, old), name


def test_everything_cannot_train_a_quantised_base(base, tmp_path):
    pytest.importorskip("bitsandbytes")
    model, tokenizer = load_diffusion_model(base, device="cpu", quantization="nf4")
    data = tiny_dataset(12)
    stages = [Stage("all", "everything", arguments(tmp_path / "all"))]
    with pytest.raises(UserError, match="`stages.trains`"):
        run_stages(model, tokenizer, stages, (data, data), tmp_path, peft_config=LORA)


def test_full_fine_tuning_needs_no_adapters(base, tmp_path):
    output = tmp_path / "out"
    run(base, output, recipe(output, last="everything"), peft_config=None)
    assert (output / "sft_model" / "model.safetensors").exists()


class Stop(TrainerCallback):
    """Ends the process' work in the middle of a stage, after its first checkpoint."""

    def on_save(self, args, state, control, **kwargs):
        raise KeyboardInterrupt


def stopping(name):
    return lambda trainer, stage: trainer.add_callback(Stop()) if stage.name == name else None


def stopping_when_saved(name):
    """Ends it when the stage's model is written, and what says that the stage is finished is not."""

    def on_built(trainer, stage):
        def save(path, _internal_call=False, plain=trainer.save_model):
            plain(path, _internal_call=_internal_call)
            if not _internal_call:
                raise KeyboardInterrupt

        if stage.name == name:
            trainer.save_model = save

    return on_built


@pytest.mark.parametrize(
    "stops",
    [stopping("attention"), stopping("diffusion"), stopping("recovery"), stopping_when_saved("attention")],
    ids=["first", "second", "third", "first is saved"],
)
def test_a_stopped_run_goes_on_to_the_same_end(base, whole, tmp_path, stops):
    output = tmp_path / "parts"
    with pytest.raises(KeyboardInterrupt):
        run(base, output, recipe(output), on_built=stops)
    resumed = run(base, output, recipe(output), load=load)
    losses = [[row["loss"] for row in history if "loss" in row] for history in whole[1].values()]
    assert [[row["loss"] for row in history if "loss" in row] for history in resumed.values()] == losses
    for name in ("attention_model", "diffusion_model", "sft_model"):
        one, other = (folder / name / "adapter_model.safetensors" for folder in (output, whole[0]))
        assert one.read_bytes() == other.read_bytes(), name
    # And once more: all stages are finished.
    assert json.dumps(run(base, output, recipe(output), load=load)) == json.dumps(resumed)


def test_the_best_checkpoint_of_a_stage_is_kept(base, tmp_path):
    """The second step is made to ruin the model; the first one's weights must be what is saved."""

    class Ruin(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 1:
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if "lora_B" in name:
                            parameter.fill_(5.0)

    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True}
    best |= {"metric_for_best_model": "eval_nelbo", "greater_is_better": False}
    stages = [Stage("only", "adapters", arguments(tmp_path / "only", **best))]
    calm = replace(LORA, lora_dropout=0.0)
    built = {"on_built": lambda trainer, stage: trainer.add_callback(Ruin())}
    history = run(base, tmp_path, stages, peft_config=calm, **built)["only"]
    bounds = [row["eval_nelbo"] for row in history if "eval_nelbo" in row]
    assert bounds[1] > bounds[0]
    assert bounds[-1] == bounds[0]  # the evaluation at the end is of the kept one


def test_everything_first_makes_no_adapters(base, tmp_path):
    stages = [Stage("all", "everything", arguments(tmp_path / "all", learning_rate=1e-3))]
    history = run(base, tmp_path, stages)["all"]
    assert not (tmp_path / "sft_model" / "adapter_config.json").exists()
    bounds = [row["eval_nelbo"] for row in history if "eval_nelbo" in row]
    model, tokenizer = load(str(tmp_path / "sft_model"))
    data = tiny_dataset(12).select(range(4))
    again = DiffusionSFTTrainer(
        model, arguments(tmp_path / "eval"), train_dataset=data, eval_dataset=data, processing_class=tokenizer
    )
    assert again.evaluate()["eval_nelbo"] == pytest.approx(bounds[-1], rel=1e-5)


def test_a_fresh_run_forgets_an_earlier_one(base, whole, tmp_path):
    """Stopped and resumed, it must not go on with what the earlier run left."""
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    left = []  # when the settings of the new run are written
    started = {"on_start": lambda: left.extend([*tmp_path.glob("*/stage.json"), *tmp_path.glob("*/checkpoint-*")])}
    with pytest.raises(KeyboardInterrupt):
        run(base, tmp_path, recipe(tmp_path), on_built=stopping("attention"), **started)
    assert not left and not list(tmp_path.glob("*_model/stage.json"))
    assert [path.name for path in tmp_path.glob("*/checkpoint-*")] == ["checkpoint-1"]


def test_a_half_written_checkpoint_is_passed_over(base, whole, tmp_path):
    output, histories = whole
    shutil.copytree(output, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sft_model" / "stage.json").unlink()
    (tmp_path / "recovery" / "checkpoint-2" / "trainer_state.json").unlink()
    again = run(base, tmp_path, recipe(tmp_path), load=load)
    losses = [[row["loss"] for row in runs["recovery"] if "loss" in row] for runs in (histories, again)]
    assert losses[0] == losses[1]


def test_only_the_last_stage_may_be_called_sft(base, tmp_path):
    stages = [Stage(name, "adapters", arguments(tmp_path / name)) for name in ("sft", "polish")]
    with pytest.raises(UserError, match="`stages`"):
        run(base, tmp_path, stages)


def test_stages_keep_their_own_records(base, tmp_path):
    first = arguments(tmp_path / "one", annealing="soft", final_causal_ratio=0.5, noise_schedule="cosine")
    second = arguments(tmp_path / "two", noise_schedule="linear")
    run(base, tmp_path, [Stage("one", "adapters", first), Stage("two", "adapters", second)])
    record = read_record(tmp_path / "one_model")
    assert (record.final_causal_ratio, record.noise_schedule) == (0.5, "cosine")
    assert read_record(tmp_path / "sft_model").noise_schedule == "linear"


def plain(folder, **settings):
    quiet = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "activation_checkpointing": False}
    return SFTConfig(str(folder), use_cpu=True, bf16=False, max_steps=1, **quiet, **settings)


def test_a_plain_config_is_trained_by_trl_and_prompts_are_clean(random_llama, tokenizer, tmp_path):
    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Tom"}]
    rows, seen = Dataset.from_list([{"messages": turns}] * 2), []
    stages = [Stage("sft", "everything", plain(tmp_path / "sft"))]
    run_stages(random_llama(), tokenizer, stages, (rows, rows), tmp_path, on_built=lambda *built: seen.append(built[0]))
    assert type(seen[0]).compute_loss is SFTTrainer.compute_loss
    (batch,) = seen[0].get_train_dataloader()
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]).startswith(" Tom")


def test_what_trl_refuses_in_a_stage_is_an_error_of_the_user(random_llama, tokenizer, tmp_path):
    rows = Dataset.from_list([{"text": "Tom has"}] * 2)
    stages = [Stage("sft", "everything", plain(tmp_path / "sft", assistant_only_loss=True))]
    with pytest.raises(UserError, match="stage `sft`"):
        run_stages(random_llama(), tokenizer, stages, (rows, rows), tmp_path)
