"""Loaders and their errors; and GGUF bases: read as they were written, quantised again, and found again by the adapters trained on them."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

import llm_diffusion as ld
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH, from_hub
from llm_diffusion.models.loading import load_diffusion_model as load
from llm_diffusion.models.record import save_record

PATH = Path(__file__).parents[2] / "benchmarks" / "gguf_bases.py"
spec = importlib.util.spec_from_file_location("gguf_bases", PATH)
gguf_bases = importlib.util.module_from_spec(spec)
spec.loader.exec_module(gguf_bases)

IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits


def save_adapter(model, tokenizer, folder):
    options = {"r": 4, "target_modules": ["q_proj"], "trainable_token_indices": [tokenizer.mask_token_id]}
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, **options))
    peft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_record(peft, folder)
    return peft


@pytest.fixture(scope="module")
def causal():
    return AutoModelForCausalLM.from_pretrained(TINY_MODEL_PATH, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def write_gguf():
    pytest.importorskip("gguf")
    return gguf_bases.write_gguf


@pytest.fixture(scope="module")
def folder(causal, write_gguf, tmp_path_factory):
    """GGUF files of the embedded base, beside the config.json that has its head size (metadata of Qwen3 do not)."""
    folder = tmp_path_factory.mktemp("gguf")
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    for kind in ("F32", "F16", "Q8_0"):
        write_gguf(folder / f"{kind}.gguf", causal, tokenizer, kind)
    causal.config.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reference(tiny):
    return logits_of(tiny[0])


class Failing:
    def __init__(self, error):
        self.error = error

    def from_pretrained(self, name):
        raise self.error


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), ImportError("run pip install")])
def test_what_is_not_the_checkpoints_fault_passes_through(error):
    with pytest.raises(type(error), match=str(error)):
        from_hub(Failing(error), "tiny")
    with pytest.raises(OSError, match="`model`: '.' is not a loadable checkpoint: size mismatch"):
        from_hub(Failing(RuntimeError("size mismatch\nfor many weights")), ".")


def test_unquantised_weights_come_back_exactly(folder, reference):
    for kind in ("F32", "F16"):  # the embedded base is fp16
        model, _ = load(str(folder), gguf_file=f"{kind}.gguf", device="cpu")
        assert torch.equal(logits_of(model), reference)
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.diffusion["gguf_file"] == "F16.gguf"
    assert ld.probe_attention(model) == "bidirectional"


def test_quantised_weights_come_back_closely(folder, reference):
    model, _ = load(str(folder), gguf_file="Q8_0.gguf", device="cpu")
    assert 0 < (logits_of(model) - reference).std() / reference.std() < 0.05


def test_metadata_alone_make_a_model(causal, write_gguf, tmp_path):
    """No config.json: a Qwen3 of the usual head size, 128."""
    torch.manual_seed(0)
    config = type(causal.config)(
        **{**causal.config.to_dict(), "head_dim": 128, "num_hidden_layers": 1, "layer_types": None}
    )
    model = type(causal)(config).eval()
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    write_gguf(tmp_path / "x.gguf", model, tokenizer)
    again, _ = load(str(tmp_path), gguf_file="x.gguf", device="cpu")
    expected = ld.convert_to_diffusion(model, tokenizer)
    assert torch.equal(logits_of(again), logits_of(expected))


@pytest.mark.parametrize("beside", [False, True], ids=["in the GGUF", "beside it"])
def test_the_tokenizer(folder, tiny, tmp_path, beside):
    known = tiny[1]
    for name in ("F16.gguf", "config.json"):
        (tmp_path / name).symlink_to(folder / name)
    if beside:
        AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(tmp_path)
    _, tokenizer = load(str(tmp_path), gguf_file="F16.gguf", device="cpu")
    texts = ["3 6 12", "the cat sat, 3 times.\n\nYes!", f"<|im_start|>user\nhi {known.mask_token}<|im_end|>\n"]
    for text in texts + ["a,\n\nb"] * beside:  # cut otherwise by the pre-tokenizer "qwen2"
        assert tokenizer(text)["input_ids"] == known(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    for name in ("eos_token", "pad_token", "mask_token", "mask_token_id", "chat_template"):
        assert getattr(tokenizer, name) == getattr(known, name), name


def test_nf4_is_that_of_the_bf16_weights(causal, folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    causal.to(torch.bfloat16).save_pretrained(tmp_path)
    causal.float()
    AutoTokenizer.from_pretrained(TINY_MODEL_PATH).save_pretrained(tmp_path)
    ours, _ = load(str(folder), gguf_file="F32.gguf", quantization="nf4", device="cpu")
    theirs, _ = load(str(tmp_path), quantization="nf4", device="cpu")
    assert type(ours.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
    assert torch.equal(logits_of(ours), logits_of(theirs))


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_an_adapter_finds_its_file(folder, tmp_path, quantization):
    if quantization:
        pytest.importorskip("bitsandbytes")
    model, tokenizer = load(str(folder), gguf_file="Q8_0.gguf", quantization=quantization, device="cpu")
    peft = save_adapter(model, tokenizer, tmp_path)
    assert peft.peft_config["default"].base_model_name_or_path == str(folder)
    again, its_tokenizer = load(str(tmp_path), quantization=quantization, device="cpu")
    torch.testing.assert_close(
        logits_of(again), logits_of(peft), rtol=1e-6, atol=1e-5
    )  # the mask's row by a product of its own
    assert its_tokenizer.mask_token_id == tokenizer.mask_token_id


def test_a_full_checkpoint_is_an_ordinary_one(folder, tmp_path):
    model, tokenizer = load(str(folder), gguf_file="Q8_0.gguf", device="cpu")
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    again, _ = load(str(tmp_path), device="cpu")
    assert torch.equal(logits_of(again), logits_of(model))


def test_an_adapter_over_a_checkpoint_that_came_from_a_file(folder, tmp_path):
    """The checkpoint has weights of its own: neither it nor what is trained on it needs the file again."""
    model, tokenizer = load(str(folder), gguf_file="Q8_0.gguf", device="cpu")
    assert model.config.diffusion["gguf_file"] == "Q8_0.gguf"
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "full")
    full, tokenizer = load(str(tmp_path / "full"), device="cpu")
    assert "gguf_file" not in full.config.diffusion
    peft = save_adapter(full, tokenizer, tmp_path / "adapter")
    record = json.loads((tmp_path / "adapter" / "diffusion_config.json").read_text())
    assert "gguf_file" not in record and record["mask_token_id"] == tokenizer.mask_token_id
    again, _ = load(str(tmp_path / "adapter"), device="cpu")
    torch.testing.assert_close(
        logits_of(again), logits_of(peft), rtol=1e-6, atol=1e-5
    )  # the mask's row by a product of its own
    assert again.peft_config["default"].base_model_name_or_path == str(tmp_path / "full")


def test_the_working_directory_is_not_searched(folder, reference, tmp_path, monkeypatch):
    (tmp_path / "F32.gguf").write_bytes(b"other")
    monkeypatch.chdir(tmp_path)
    assert torch.equal(logits_of(load(str(folder), gguf_file="F32.gguf", device="cpu")[0]), reference)


def test_a_missing_file_is_named_with_those_that_are_there(folder):
    with pytest.raises(FileNotFoundError, match="`gguf_file`.*'Q4.gguf'.*F16.gguf, F32.gguf, Q8_0.gguf"):
        load(str(folder), gguf_file="Q4.gguf", device="cpu")


@pytest.mark.parametrize("length", [0, 3, 30, 2_000, 20_000, -100])
def test_a_truncated_file_is_refused(folder, tmp_path, length):
    (tmp_path / "x.gguf").write_bytes((folder / "F16.gguf").read_bytes()[:length])
    with pytest.raises(OSError, match="`model`.*not a loadable checkpoint"):
        load(str(tmp_path), gguf_file="x.gguf", device="cpu")


def test_an_unknown_architecture_is_refused(causal, write_gguf, tmp_path):
    write_gguf(tmp_path / "x.gguf", causal, AutoTokenizer.from_pretrained(TINY_MODEL_PATH), arch="plm")
    with pytest.raises(OSError, match="`model`.*architecture plm is not supported"):
        load(str(tmp_path), gguf_file="x.gguf", device="cpu")
