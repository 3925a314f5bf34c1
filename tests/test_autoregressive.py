"""`pipeline: arm`: TRL's own training, an ordinary causal model as its result, and on from there to diffusion."""

import json

import pytest
import torch
from click.testing import CliRunner
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer

from llm_diffusion import load_diffusion_model, probe_attention
from llm_diffusion.autoregressive import trainer
from llm_diffusion.data.datasets import PLAIN_CHAT_TEMPLATE
from llm_diffusion.main import cli

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


def test_it_is_an_ordinary_causal_model_with_the_hosts_loss(trained):
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
    said = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert said[-1] == pytest.approx(total / count, abs=2e-3)
    assert (root / "out" / "pretrain" / "checkpoint-2").is_dir() and (root / "out" / "loss.png").exists()


def test_a_finished_run_resumes_to_the_same_and_another_is_refused(trained):
    root, _ = trained
    before = (root / "out" / "sft_model" / "model.safetensors").read_bytes()
    assert run("--config", str(root / "config.json"), "--resume").exit_code == 0
    assert (root / "out" / "sft_model" / "model.safetensors").read_bytes() == before
    other = run("--config", str(root / "config.json"), "--resume", "--hyper-parameters-json", '{"seed": 1}')
    assert other.exit_code == 2 and "`--resume`" in other.stderr


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
        said = run("generate", f"{out}/sft_model", "--config", str(file), "--pipeline", pipeline)
        assert said.exit_code == 0 and len(said.stdout.splitlines()) >= 2, said.output
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


def test_the_trainer_is_the_hosts_and_prompts_are_clean(tmp_path, tokenizer, random_llama):

    tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Tom"}]}] * 2
    )
    made = trainer(
        random_llama(),
        SFTConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none", activation_checkpointing=False),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )
    assert type(made) is SFTTrainer
    batch = next(iter(made.get_train_dataloader()))
    assert tokenizer.decode(batch["labels"][0][batch["labels"][0] != -100]).startswith(" Tom")
