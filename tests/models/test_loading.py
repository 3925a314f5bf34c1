"""Files and back: bases, checkpoints, adapters and the hub; and autoregressive models from every start."""

import copy
import shutil

import huggingface_hub
import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    T5Config,
)

import llm_diffusion as ld
from llm_diffusion import UserError, convert_to_diffusion, load_diffusion_model, probe_attention
from llm_diffusion.analysis import load_config
from llm_diffusion.generation.inference import continue_autoregressive
from llm_diffusion.models.lm_head import train_rows_alone
from llm_diffusion.models.loading import (
    autoregressive_base,
    check_positions,
    check_scratch,
    load_autoregressive,
    scratch_model,
)
from llm_diffusion.models.loading import load_diffusion_model as load
from llm_diffusion.models.patching import adapters_off, base_of
from llm_diffusion.models.record import SIDECAR, keep_record, save_custom_generate, save_record
from llm_diffusion.objective.attention_masks import annealed

SHAPE = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
PROMPTS = ["Tom has", "Sort the letters: k d"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One set of random weights as an AR checkpoint and as a diffusion checkpoint, and an adapter over the first."""
    root = tmp_path_factory.mktemp("starts")
    model, tokenizer = scratch_model(SHAPE, "tiny", seed=1, device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)  # far from equally likely tokens
    model.save_pretrained(root / "ar")
    tokenizer.save_pretrained(root / "ar")
    convert_to_diffusion(model, tokenizer)
    model.save_pretrained(root / "diffusion")
    tokenizer.save_pretrained(root / "diffusion")
    converted, tokenizer = load_diffusion_model(str(root / "ar"), device="cpu")
    adapter = get_peft_model(converted, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    adapter.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    save_record(adapter, root / "adapter")
    return root


def test_a_diffusion_checkpoint_is_causal_again(folders):
    assert probe_attention(AutoModelForCausalLM.from_pretrained(folders / "diffusion")) == "bidirectional"
    model, tokenizer = load_autoregressive(str(folders / "diffusion"), device="cpu")
    original = AutoModelForCausalLM.from_pretrained(folders / "ar").eval()
    ids = tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    with torch.no_grad():
        rows = original.config.vocab_size
        assert torch.allclose(model(ids).logits[..., :rows], original(ids).logits, atol=1e-5)
    assert probe_attention(model) == "causal" and not hasattr(model.config, "diffusion")
    # The row of the mask is there and is never generated.
    ours = continue_autoregressive(model, tokenizer, PROMPTS[:1], max_new_tokens=8)
    first = tokenizer(PROMPTS[0], return_tensors="pt")
    theirs = original.generate(**first, max_new_tokens=8, do_sample=False)[:, first["input_ids"].shape[1] :]
    assert ours == tokenizer.batch_decode(theirs, skip_special_tokens=True)


def test_a_diffusion_adapter_is_decoded_by_its_base_and_not_trained_from_left_to_right(folders):
    assert autoregressive_base(str(folders / "adapter")) == str(folders / "ar")
    assert autoregressive_base(str(folders / "ar")) == str(folders / "ar")
    with pytest.raises(UserError, match="`model`"):
        load_autoregressive(str(folders / "adapter"), device="cpu")


def test_a_model_from_nothing_is_a_gpt2_of_that_shape():
    model, tokenizer = scratch_model(SHAPE, "tiny", seed=1, device="cpu")
    config, width, layers = model.config, 32, 2
    assert (config.model_type, config.n_positions, config.vocab_size) == ("gpt2", 64, len(tokenizer))
    # Embeddings, the final norm, and in every layer two norms, attention and a perceptron four times as wide, with biases.
    layer = 4 * width + (3 * width * width + 3 * width) + (width * width + width) + 8 * width * width + 5 * width
    assert model.num_parameters() == (len(tokenizer) + 64) * width + 2 * width + layers * layer
    same, other = (scratch_model(SHAPE, "tiny", seed=seed, device="cpu")[0] for seed in (1, 2))
    weights = [m.transformer.h[1].attn.c_attn.weight for m in (model, same, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({**SHAPE, "n_head": 3}, "n_head"),
        ({**SHAPE, "n_layer": 0}, "scratch.n_layer"),
        ({**SHAPE, "n_layer": True}, "scratch.n_layer"),
        ({**SHAPE, "n_positions": 32}, "max_length"),
        ({"n_embd": 32}, "scratch"),
    ],
)
def test_shapes_that_cannot_be(shape, named):
    with pytest.raises(UserError, match=f"`{named}`"):
        check_scratch(shape, max_length=64)


def test_rows_longer_than_learned_positions_are_refused(folders, tiny):
    model, _ = load_autoregressive(str(folders / "ar"), device="cpu")
    check_positions(model, 64)
    with pytest.raises(UserError, match="`max_length`"):
        check_positions(model, 65)
    check_positions(tiny[0], 1024)
    with pytest.raises(UserError, match="1024 positions"):  # rotary ones would count on, less and less well
        check_positions(tiny[0], 1025)


IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits


@pytest.fixture
def base(random_llama, tokenizer, tmp_path):
    """A folder with a causal base model and its tokenizer."""

    def save(**options):
        folder = tmp_path / "base"
        random_llama(**options).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


def perturbed(model, mask_id, seed=3):
    """Under LoRA with a trainable mask token, every trained weight moved away from its start."""
    options = {"r": 4, "target_modules": ["q_proj", "v_proj"], "trainable_token_indices": [mask_id]}
    torch.manual_seed(seed)  # of PEFT's own start too
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return peft


def save_adapter(peft, tokenizer, folder):
    peft.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_record(peft, folder)
    return folder


def test_the_embedded_model(tiny):
    model, tokenizer = tiny
    record = model.config.diffusion
    assert record["base_model"] == "tiny"
    assert record["mask_token_id"] == tokenizer.mask_token_id == 431
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert ld.probe_attention(model) == "bidirectional"
    assert tokenizer.decode(tokenizer("3 6 12")["input_ids"]) == "3 6 12"


@pytest.mark.parametrize("right_shift", [True, False])
@pytest.mark.parametrize("vocab", [512, 431])
def test_a_full_checkpoint_comes_back_as_it_was(base, tmp_path, right_shift, vocab):
    model, tokenizer = load(str(base(vocab_size=vocab)), right_shift_logits=right_shift, device="cpu")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    again, its_tokenizer = load(str(tmp_path / "saved"), device="cpu")
    assert again.config.diffusion == model.config.diffusion
    assert again.config.diffusion["right_shift_logits"] is right_shift
    assert torch.equal(logits_of(again), logits_of(model))
    assert ld.probe_attention(again) == "bidirectional"
    assert its_tokenizer.mask_token_id == tokenizer.mask_token_id
    assert len(its_tokenizer) == len(tokenizer)
    settings = {"max_new_tokens": 4, "eos_token_id": None}
    assert torch.equal(again.generate(IDS, **settings), model.generate(IDS, **settings))
    # A plain loader gives the same numbers.
    torch.testing.assert_close(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits_of(model))


def test_a_checkpoint_refuses_other_options(base, tmp_path):
    model, tokenizer = load(str(base()), device="cpu")
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="`right_shift_logits`"):
        load(str(tmp_path / "saved"), right_shift_logits=False, device="cpu")


@pytest.mark.parametrize("vocab", [512, 431])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT's, that it saves a grown embedding
def test_an_adapter_comes_back_as_it_was(base, tmp_path, vocab, tied):
    model, tokenizer = load(
        str(base(vocab_size=vocab, tie_word_embeddings=tied)), right_shift_logits=False, device="cpu"
    )
    peft = perturbed(model, tokenizer.mask_token_id)
    with peft.disable_adapter():
        assert (logits_of(peft) - logits_of(model)).abs().max() < 1e-6
        bare = logits_of(peft)
    want = logits_of(peft)
    assert (want - bare).abs().max() > 0.1
    again, its_tokenizer = load(str(save_adapter(peft, tokenizer, tmp_path / "adapter")), device="cpu")
    torch.testing.assert_close(logits_of(again), want, atol=1e-6, rtol=1e-6)
    assert ld.probe_attention(again) == "bidirectional"
    assert again.get_base_model().config.diffusion == model.config.diffusion
    assert its_tokenizer.mask_token_id == 431
    assert not again.training
    trainable = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in peft.named_parameters() if parameter.requires_grad}
    settings = {"max_new_tokens": 4, "eos_token_id": None}
    masked = {"input_ids": torch.nn.functional.pad(IDS, (0, 3), value=431)}
    with torch.no_grad():
        torch.testing.assert_close(again(**masked).logits, peft(**masked).logits, atol=1e-6, rtol=1e-6)
    assert torch.equal(again.generate(input_ids=IDS, **settings), peft.generate(input_ids=IDS, **settings))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """`hub(name, folder)`: the folder as a repository in a cache of its own, without a connection."""
    cache = tmp_path / "hub"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # PEFT reads both
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))

    def put(name, folder, revision="main"):
        repository, commit = cache / f"models--{name.replace('/', '--')}", f"{abs(hash(revision)):040x}"
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        return repository / "snapshots" / commit

    return put


@pytest.mark.filterwarnings("ignore:Could not find a config file")  # PEFT saves the adapter, without a connection
def test_an_adapter_on_the_hub_is_found_by_its_name(base, hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub("user/base", base())
    model, tokenizer = load("user/base", device="cpu")
    peft = perturbed(model, tokenizer.mask_token_id)
    there = hub("user/adapter", save_adapter(peft, tokenizer, tmp_path / "saved"))
    again, its_tokenizer = load("user/adapter", device="cpu")
    torch.testing.assert_close(logits_of(again), logits_of(peft), atol=1e-6, rtol=1e-6)
    assert ld.probe_attention(again) == "bidirectional"
    assert again.get_base_model().config.diffusion["base_model"] == "user/base"
    assert its_tokenizer.mask_token_id == tokenizer.mask_token_id
    assert load_config("user/adapter").num_hidden_layers == model.config.num_hidden_layers
    (there / "diffusion_config.json").unlink()
    with pytest.raises(ValueError, match="`model`: 'user/adapter' holds an adapter without diffusion_config.json"):
        load("user/adapter", device="cpu")


def test_a_checkpoint_on_the_hub_is_found_by_its_name(base, hub, tmp_path):
    model, tokenizer = load(str(base()), time_embedding=True, device="cpu")
    randomise_time(model)
    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    hub("user/full", tmp_path / "saved")
    again, _ = load("user/full", device="cpu")
    assert torch.equal(logits_of(again), logits_of(model))


def test_a_revision_is_that_of_every_file(base, hub, tmp_path):
    """Weights, attention, time embedding and tokenizer; those of `main` are others."""
    for revision, options in (("main", {}), ("v2", {"attention": "block", "block_length": 4, "time_embedding": True})):
        model, tokenizer = load(str(base()), device="cpu", **options)
        tokenizer.add_tokens([f"<{revision}>"])
        if options:
            randomise_time(model)
        model.save_pretrained(tmp_path / revision)
        tokenizer.save_pretrained(tmp_path / revision)
        hub("user/model", tmp_path / revision, revision)
    again, tokenizer = load("user/model", revision="v2", device="cpu")
    assert torch.equal(logits_of(again), logits_of(model))
    assert perturbed(again, tokenizer.mask_token_id).peft_config["default"].base_model_name_or_path == "user/model"
    assert ld.probe_attention(again, 4) == "block"
    assert "<v2>" in tokenizer.get_vocab() and "<main>" not in tokenizer.get_vocab()
    assert "<main>" in load("user/model", device="cpu")[1].get_vocab()
    with pytest.raises(OSError, match="`model`: 'user/model' is neither a folder here nor available"):
        load("user/model", revision="v3", device="cpu")


def test_an_adapter_of_the_embedded_model_comes_back(tmp_path):
    """Its base is a name, not a path: the folder moves with the installed package."""
    model, tokenizer = load("tiny", device="cpu")
    peft = perturbed(model, tokenizer.mask_token_id)
    again, _ = load(str(save_adapter(peft, tokenizer, tmp_path / "adapter")), device="cpu")
    torch.testing.assert_close(logits_of(again), logits_of(peft), atol=1e-6, rtol=1e-6)
    assert ld.probe_attention(again) == "bidirectional"
    assert again.get_base_model().config.diffusion["base_model"] == "tiny"


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def broken_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize("damage", [no_weights, broken_config])
def test_a_damaged_folder_is_named(base, damage):
    folder = base()
    damage(folder)
    with pytest.raises(OSError, match=f"`model`: '{folder}' is not a loadable checkpoint"):
        load(str(folder), device="cpu")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "some/where/deep", "~/nowhere-at-all"])
def test_a_missing_folder_is_named_and_the_hub_not_queried(name):
    with pytest.raises(FileNotFoundError, match=f"`model`.*'{name}' does not exist"):
        load(name, device="cpu")


def test_a_hub_name_without_a_hub(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="`model`: 'no-such-organisation/no-such-model' is neither a folder here nor"):
        load("no-such-organisation/no-such-model", device="cpu")


def test_an_encoder_decoder_is_refused(tmp_path):
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"`model`: .* encoder-decoder \(t5\)"):
        load(str(tmp_path), device="cpu")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here")
    with pytest.raises((OSError, ValueError), match=f"`model`: '{tmp_path}'"):
        load(str(tmp_path), device="cpu")


def test_an_adapter_needs_its_record_and_its_base(base, tmp_path):
    folder = base()
    model, tokenizer = load(str(folder), device="cpu")
    adapter = save_adapter(perturbed(model, tokenizer.mask_token_id), tokenizer, tmp_path / "adapter")
    with pytest.raises(ValueError, match="`right_shift_logits`"):
        load(str(adapter), right_shift_logits=False, device="cpu")
    shutil.move(folder, tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=f"`model`: the base '{folder}' of the adapter '{adapter}'"):
        load(str(adapter), device="cpu")
    shutil.move(tmp_path / "elsewhere", folder)
    assert load(str(adapter), device="cpu")
    (adapter / "diffusion_config.json").unlink()
    with pytest.raises(ValueError, match=f"`model`: '{adapter}' holds an adapter without diffusion_config.json"):
        load(str(adapter), device="cpu")


@pytest.mark.parametrize(
    ("kind", "device", "named"), [("int3", "cpu", "`quantization`.*'int3'"), ("nf4", "mps", "`quantization`.*MPS")]
)
def test_impossible_quantizations_are_refused(kind, device, named):
    with pytest.raises(ValueError, match=named):
        load("tiny", quantization=kind, device=device)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_quantized_models_load_bidirectional(base, kind):
    pytest.importorskip("bitsandbytes")
    folder = base(hidden_size=64, intermediate_size=128)
    model, _ = load(str(folder), quantization=kind, device="cpu")
    full, _ = load(str(folder), device="cpu")
    assert ld.probe_attention(model) == "bidirectional"
    assert logits_of(model).isfinite().all()
    assert {type(layer.self_attn.q_proj).__name__ for layer in model.model.layers} == {
        {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    }
    assert model.config.diffusion["mask_token_id"] == full.config.diffusion["mask_token_id"]


def test_nf4_trains_with_the_gradients_of_the_dequantised_model(random_llama, tokenizer, tmp_path):
    """Also after the probe at load: bitsandbytes repacks weights at the first evaluation unless it is told not to."""
    bnb = pytest.importorskip("bitsandbytes")
    random_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    quantized, _ = load(str(tmp_path), quantization="nf4", device="cpu")
    plain, _ = load(str(tmp_path), device="cpu")
    for name, module in quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = dense.float()
    ids, gradients = torch.randint(3, 400, (2, 9)), []
    for model in (quantized, plain):
        targets = ["q_proj", "v_proj", "down_proj"]
        adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
        torch.manual_seed(1)
        with torch.no_grad():
            for name, weight in adapted.named_parameters():
                if "lora" in name:
                    weight.normal_(std=0.1)
            adapted.eval()(ids)
        adapted.train()(ids).logits.float().log_softmax(-1)[..., 5].mean().backward()
        gradients.append(torch.cat([w.grad.float().flatten() for n, w in adapted.named_parameters() if "lora" in n]))
    assert (gradients[0] - gradients[1]).norm() / gradients[1].norm() < 0.02


@pytest.mark.parametrize("size", [0, 1000])
def test_truncated_weights_are_named(random_llama, tokenizer, tmp_path, size):
    random_llama().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:size])
    with pytest.raises(OSError, match="`model`: .* is not a loadable checkpoint"):
        load(str(tmp_path), device="cpu")


@pytest.mark.parametrize("text", ["{", "{}"])
def test_a_broken_sidecar_is_named(tmp_path, text):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "diffusion_config.json").write_text(text)
    with pytest.raises(ValueError, match="diffusion_config.json"):
        load(tmp_path, device="cpu")


def randomise_time(model, seed=4):
    torch.manual_seed(seed)
    for parameter in base_of(model).time_embedding.parameters():
        torch.nn.init.normal_(parameter, std=0.3)


def test_a_time_embedding_is_saved_and_loaded_with_a_full_model(base, tmp_path):
    model, tokenizer = load(str(base()), time_embedding=True, device="cpu")
    randomise_time(model)
    model.save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    again, _ = load(str(tmp_path / "full"), device="cpu")
    assert again.config.diffusion["time_embedding"] is True
    assert torch.equal(logits_of(again), logits_of(model))
    for one, other in zip(again.time_embedding.parameters(), model.time_embedding.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="`time_embedding`"):
        load(str(tmp_path / "full"), time_embedding=False, device="cpu")


def test_a_time_embedding_is_saved_and_loaded_with_an_adapter(base, tmp_path):
    model, tokenizer = load(str(base()), time_embedding=True, device="cpu")
    options = {"modules_to_save": ["time_embedding"], "target_modules": ["q_proj"]}
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    randomise_time(peft)
    want = logits_of(peft)
    again, _ = load(str(save_adapter(peft, tokenizer, tmp_path / "adapter")), device="cpu")
    assert torch.equal(logits_of(again), want)
    merged = again.merge_and_unload()
    assert torch.equal(logits_of(merged), want)
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(load(str(tmp_path / "merged"), device="cpu")[0]), want)


def test_the_ar_base_is_untouched_by_a_trained_time_embedding(base):
    model, tokenizer = load(str(base()), time_embedding=True, device="cpu")
    plain = AutoModelForCausalLM.from_pretrained(base(), device_map="cpu")
    want = plain.generate(IDS, max_new_tokens=6, do_sample=False)
    options = {"modules_to_save": ["time_embedding"], "target_modules": ["q_proj"]}
    peft = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    assert torch.equal(ld.generate_autoregressive(peft, IDS, max_new_tokens=6, do_sample=False), want)


@pytest.mark.parametrize("attention", ["bidirectional", "block"])
def test_merging_gives_a_plain_checkpoint(base, tmp_path, attention):
    model, tokenizer = load(str(base()), attention=attention, device="cpu")
    peft = perturbed(model, tokenizer.mask_token_id)
    want = logits_of(peft)
    peft.merge_and_unload().save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    again, _ = load(str(tmp_path / "merged"), device="cpu")
    torch.testing.assert_close(logits_of(again), want, atol=1e-4, rtol=1e-4)
    assert again.config.diffusion["attention"] == attention
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert torch.equal(logits_of(plain), logits_of(again))
    assert sorted(path.suffix for path in (tmp_path / "merged").glob("model*")) == [".safetensors"]


def test_what_stays_of_the_causal_mask_is_saved(base, tmp_path):
    model, tokenizer = load(str(base()), device="cpu")
    full = logits_of(model)
    model.config.diffusion["final_causal_ratio"] = 0.4
    model.save_pretrained(tmp_path / "half")
    tokenizer.save_pretrained(tmp_path / "half")
    again, _ = load(str(tmp_path / "half"), device="cpu")
    bias = annealed(torch.ones(2, 9, dtype=torch.long), 0.4)
    with torch.no_grad():
        want = model(IDS, attention_mask=bias).logits
    torch.testing.assert_close(logits_of(again), want, atol=1e-5, rtol=1e-5)
    assert (want - full).abs().max() > 1e-2


def test_plain_loaders_take_adapters_over_a_converted_base(base, tmp_path):
    model, tokenizer = load(str(base()), device="cpu")
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    model, tokenizer = load(str(tmp_path / "converted"), device="cpu")
    peft = perturbed(model, tokenizer.mask_token_id)
    want, folder = logits_of(peft), save_adapter(peft, tokenizer, tmp_path / "adapter")
    automatic = AutoPeftModelForCausalLM.from_pretrained(folder)
    by_hand = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "converted"), folder)
    for again in (automatic, by_hand, load(str(folder), device="cpu")[0]):
        assert ld.probe_attention(again) == "bidirectional"
        torch.testing.assert_close(logits_of(again), want, atol=1e-5, rtol=1e-5)


def test_an_adapter_over_a_converted_base_decodes_by_unmasking_through_peft(base, tmp_path):
    model, tokenizer = load(str(base()), attention="block", device="cpu")
    model.save_pretrained(tmp_path / "converted")
    tokenizer.save_pretrained(tmp_path / "converted")
    save_custom_generate(tmp_path / "converted")
    model, tokenizer = load(str(tmp_path / "converted"), device="cpu")
    folder = save_adapter(perturbed(model, tokenizer.mask_token_id), tokenizer, tmp_path / "adapter")
    automatic = AutoPeftModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ours, _ = load(str(folder), device="cpu")
    for settings in ({"max_new_tokens": 9}, {"max_new_tokens": 9, "threshold": 0.3, "eos_token_id": None}):
        want = ours.generate(input_ids=IDS, **settings)
        assert torch.equal(automatic.generate(input_ids=IDS, **settings), want)
    left_to_right = ld.generate_autoregressive(ours, IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
    assert not torch.equal(left_to_right, want)


def test_an_adapter_saves_and_pushes_itself_with_its_record(base, tmp_path):
    """`push_to_hub` of transformers and PEFT uploads what `save_pretrained` writes."""
    model, tokenizer = load(str(base()), device="cpu")
    first = save_adapter(perturbed(model, tokenizer.mask_token_id), tokenizer, tmp_path / "first")
    model, tokenizer = load(str(first), device="cpu")
    copy.deepcopy(model).save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    again, _ = load(str(tmp_path / "again"), device="cpu")
    assert torch.equal(logits_of(again), logits_of(model))
    assert again.generation_config.mask_token_id == tokenizer.mask_token_id


def test_adapters_of_any_name_come_back(base, tmp_path):
    """PEFT gives all but the default one a folder of its own."""
    model, tokenizer = load(str(base()), device="cpu")
    first = save_adapter(perturbed(model, tokenizer.mask_token_id), tokenizer, tmp_path / "first")
    model, _ = load(str(first), device="cpu")
    model.load_adapter(str(first), "other", is_trainable=True)
    model.set_adapter("other")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    model.save_pretrained(tmp_path / "both")
    for name, folder in (("other", "both/other"), ("default", "both")):
        model.set_adapter(name)
        again, _ = load(str(tmp_path / folder), device="cpu")
        assert torch.equal(logits_of(again), logits_of(model)), name


def test_a_compiled_model_has_adapters_that_can_be_switched_off(base):
    model, tokenizer = load(str(base()), device="cpu")
    adapted = perturbed(model, tokenizer.mask_token_id)
    with adapters_off(adapted):
        want = logits_of(adapted)
    with adapters_off(torch.compile(adapted, backend="eager")):
        assert torch.equal(logits_of(adapted), want)
    assert not torch.equal(logits_of(adapted), want)


def test_a_pickled_model_has_its_time_embedding_and_its_adapters(base, tmp_path):
    model, tokenizer = load(str(base()), device="cpu", time_embedding=True)
    with torch.no_grad():
        model.time_embedding.down.bias.fill_(1)  # it matters
    adapted = perturbed(model, tokenizer.mask_token_id)
    keep_record(adapted)
    train_rows_alone(adapted)
    torch.save(adapted, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(logits_of(again), logits_of(adapted))
    again.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / SIDECAR).exists()


def test_a_windowed_model_is_causal_within_its_window_again(tokenizer, tmp_path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    original = MistralForCausalLM(
        MistralConfig(vocab_size=576, num_key_value_heads=2, sliding_window=8, initializer_range=0.2, **sizes)
    ).eval()
    want = logits_of(original)
    convert_to_diffusion(original, tokenizer)
    original.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_autoregressive(str(tmp_path), device="cpu")
    assert model.config.sliding_window == 8  # one less than the text is long
    torch.testing.assert_close(logits_of(model), want)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_a_type_is_taken_by_its_older_name_too(base, name):
    assert load(str(base()), device="cpu", **{name: torch.bfloat16})[0].dtype == torch.bfloat16


def test_an_adapter_of_another_base_is_refused(base, random_llama, tmp_path):
    folder = base()
    model, tokenizer = load(str(folder), device="cpu")
    adapter = save_adapter(perturbed(model, tokenizer.mask_token_id), tokenizer, tmp_path / "adapter")
    load(str(adapter), device="cpu", dtype=torch.bfloat16)  # another type is no other base
    random_llama(seed=5).save_pretrained(folder)
    with pytest.raises(ValueError, match="trained on another base"):
        load(str(adapter), device="cpu")


def test_an_adapter_whose_base_was_moved_is_refused(tmp_path):
    """Even when it descends from the embedded model, which is another one by now."""
    model, tokenizer = load("tiny", device="cpu")
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    model, tokenizer = load(str(tmp_path / "base"), device="cpu")
    adapter = save_adapter(perturbed(model, tokenizer.mask_token_id), tokenizer, tmp_path / "adapter")
    load(str(adapter), device="cpu")
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="does not exist; put it back"):
        load(str(adapter), device="cpu")


def test_a_truncated_file_is_refused(base):
    weights = base() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(OSError, match="is not a loadable checkpoint"):
        load(str(weights.parent), device="cpu")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_length": 8}, "`block_length`"),
        (
            {"right_shift_logits": False},
            "`right_shift_logits`",
        ),
        ({"attention": "bidirectional"}, "`attention`"),
        ({"time_embedding": True}, "`time_embedding`"),
    ],
)
def test_a_checkpoint_that_disagrees_is_refused(base, tmp_path, options, match):
    model, tokenizer = load(str(base()), attention="block", device="cpu")
    model.save_pretrained(tmp_path / "block")
    tokenizer.save_pretrained(tmp_path / "block")
    with pytest.raises(ValueError, match=match):
        load(str(tmp_path / "block"), device="cpu", **options)
