"""What several test files share: small random models, and the embedded tokenizer and model."""

import gc
import json
import os
import signal

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from filelock import FileLock
from hypothesis import settings
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from two_processes import launch

from llm_diffusion.models.attention import patch_causal_attention
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.loading import load_diffusion_model

# A shell's background jobs ignore it, and so would every process started here.
signal.signal(signal.SIGINT, signal.default_int_handler)
# No deadlines: a busy machine is no defect.
settings.register_profile("fast", deadline=None)
settings.load_profile("fast")
settings.register_profile("slow", max_examples=2000, deadline=None)


def pytest_collection_finish() -> None:
    """Every training run ends in a collection of garbage, which takes a third of a second through all that was imported."""
    gc.collect()
    gc.freeze()


def _random_llama(seed: int = 0, **options: object) -> LlamaForCausalLM:
    defaults = {
        "vocab_size": 512,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        # Ten times the usual width: logits far apart, so that rounding cannot reorder them.
        "initializer_range": 0.2,
        "bos_token_id": None,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**defaults, **options})).eval()


@pytest.fixture(scope="session")
def random_llama():
    """Builds a causal Llama with random weights: `random_llama(seed=0, vocab_size=512, …)`."""
    return _random_llama


@pytest.fixture(scope="session")
def random_diffuser():
    """Builds a bidirectional one of 32 tokens, the last of them the mask: `random_diffuser(right_shift, seed=0, …)`."""

    def build(right_shift: bool, seed: int = 0, **options: object) -> LlamaForCausalLM:
        model = _random_llama(seed, **{"vocab_size": 32, "initializer_range": 0.3, **options})
        patch_causal_attention(model)
        model.config.diffusion = {
            "attention": "bidirectional",
            "right_shift_logits": right_shift,
            "mask_token_id": model.config.vocab_size - 1,
        }
        return model

    return build


@pytest.fixture
def tokenizer():
    """The embedded tokenizer as shipped, without a mask token."""
    return AutoTokenizer.from_pretrained(TINY_MODEL_PATH)


@pytest.fixture(scope="session")
def tiny():
    """The embedded model, converted, and its tokenizer. Shared: tests must leave both as they are."""
    return load_diffusion_model("tiny", device="cpu")


@pytest.fixture(scope="session")
def in_two_processes(tmp_path_factory, worker_id):
    """What each piece of two_processes.py found, and printed, in the first process and in the second; pytest's own workers share it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "two_processes"
    folder.mkdir(exist_ok=True)
    found = folder / "found.json"
    with FileLock(folder / "lock"):
        if not found.exists():
            found.write_text(json.dumps(launch(folder)))
    first, second = json.loads(found.read_text())
    return {name: (first[name], second[name]) for name in first}
