"""`generate` where other libraries call it: checkpoints that transformers loads itself, TRL's callback, between training steps."""

import copy

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainerCallback, pipeline
from trl import LogCompletionsCallback

import llm_diffusion as ld
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.record import save_custom_generate


@pytest.fixture(scope="module", params=["bidirectional", "block"])
def saved(request, tmp_path_factory, random_llama):
    """A full checkpoint as the trainers save it, and what our own loader decodes from it."""
    folder = tmp_path_factory.mktemp("saved")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    options = {"attention": "block", "block_length": 4} if request.param == "block" else {}
    model = ld.convert_to_diffusion(random_llama(), tokenizer, **options)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_custom_generate(folder)
    ours, _ = ld.load_diffusion_model(str(folder), device="cpu")
    return str(folder), ours, tokenizer


SETTINGS = {"max_new_tokens": 9, "eos_token_id": None, "threshold": 0.5}


def test_a_plain_loader_decodes_by_unmasking(saved):
    folder, ours, tokenizer = saved
    batch = tokenizer(["Sort the letters: k d e a", "3 6"], return_tensors="pt", padding=True, padding_side="left")
    want = ours.generate(**batch, **SETTINGS)
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert torch.equal(theirs.generate(**batch, **SETTINGS), want)
    ids = batch.pop("input_ids")
    assert torch.equal(
        theirs.generate(ids, **batch, **SETTINGS), want
    )  # attention is set once, and prompts may come first
    batch["input_ids"] = ids
    plain = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(plain.generate(**batch, **SETTINGS, custom_generate=folder, trust_remote_code=True), want)
    with pytest.raises(ValueError, match="`stopping_criteria`"):
        theirs.generate(**batch, stopping_criteria=[lambda ids, scores: True])


def test_a_pipeline_decodes_a_saved_model(saved):
    folder, ours, tokenizer = saved
    batch = tokenizer("3 6", return_tensors="pt")
    want = ours.generate(**batch, max_new_tokens=6, temperature=0.0)[0, batch["input_ids"].shape[1] :]
    pipe = pipeline("text-generation", folder, trust_remote_code=True, device="cpu")
    answer = pipe("3 6", return_full_text=False, max_new_tokens=6, do_sample=False)
    assert answer == [{"generated_text": tokenizer.decode(want, skip_special_tokens=True)}]


def test_what_the_loader_cannot_bring_is_refused(random_llama, tokenizer):
    from llm_diffusion.generation.generate import generate_as_loaded

    model = random_llama()
    with pytest.raises(ValueError, match="not a converted checkpoint"):
        generate_as_loaded(model=model, input_ids=torch.tensor([[11]]))
    ld.convert_to_diffusion(model, tokenizer, time_embedding=True)
    with pytest.raises(ValueError, match="time embedding"):
        generate_as_loaded(model=model, input_ids=torch.tensor([[11]]))


class Decoding(TrainerCallback):
    """Answers a prompt after every step, through whatever wraps the model."""

    def __init__(self, batch):
        self.batch, self.answers, self.modes = batch, [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.answers.append(model.generate(**self.batch, max_new_tokens=6, eos_token_id=None).tolist())
        self.modes.append(model.training)


def train(tmp_path, tokenizer, random_llama, peft_config, callback=None, **own):
    rows = Dataset.from_dict({"prompt": ["Sort: k d e a", "3 6"] * 4, "completion": [" a d e k", " 9 12"] * 4})
    arguments = ld.DiffusionSFTConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=4,
        learning_rate=1e-3,
        report_to="none",
        logging_steps=1,
        use_cpu=True,
        save_strategy="no",
        **own,
    )
    torch.manual_seed(0)
    trainer = ld.DiffusionSFTTrainer(
        random_llama(),
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=copy.deepcopy(tokenizer),
        peft_config=peft_config,
        callbacks=[callback] if callback else None,
    )
    return trainer


LORA = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")


@pytest.mark.parametrize("peft_config", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_decoding_between_steps_changes_nothing_of_training(
    tmp_path, tokenizer, random_llama, peft_config, checkpointing
):
    batch = tokenizer("Sort: k d e a", return_tensors="pt")
    decoding = Decoding(batch)
    own = {"gradient_checkpointing": checkpointing}
    with_ = train(tmp_path, tokenizer, random_llama, peft_config, decoding, **own)
    with_.train()
    without = train(tmp_path, tokenizer, random_llama, peft_config, **own)
    without.train()
    losses = [[row["loss"] for row in run.state.log_history if "loss" in row] for run in (with_, without)]
    assert losses[0] == losses[1] and len(losses[0]) == 3
    assert decoding.modes == [True] * 3
    answer = with_.model.generate(**batch, max_new_tokens=6, eos_token_id=None)
    assert decoding.answers[-1] == answer.tolist()  # the same, once training is over


@pytest.mark.filterwarnings(
    "ignore:`gradient_checkpointing_.*` is deprecated:FutureWarning"
)  # TRL asks by the old name
def test_trls_callback_logs_completions(tmp_path, tokenizer, random_llama):
    trainer = train(tmp_path, tokenizer, random_llama, LORA)
    settings = GenerationConfig(max_new_tokens=5, threshold=0.5, eos_token_id=None)
    trainer.eval_dataset = Dataset.from_dict({"prompt": ["Sort: k d e a", "3 6"]})
    callback = LogCompletionsCallback(trainer, settings, freq=3)
    trainer.add_callback(callback)
    trainer.train()
    assert [row[0] for row in callback.table] == ["3", "3"]
    batch = tokenizer(["Sort: k d e a", "3 6"], return_tensors="pt", padding=True, padding_side="left")
    answers = trainer.model.generate(**batch, generation_config=settings)[:, batch["input_ids"].shape[1] :]
    assert [row[2] for row in callback.table] == tokenizer.batch_decode(answers, skip_special_tokens=True)
