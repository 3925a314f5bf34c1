"""Checkpoints, adapters, records and templates that are damaged are refused in one sentence that names them."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from llm_diffusion import UserError, load_diffusion_model
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.conversion import fingerprint
from llm_diffusion.models.loading import load_autoregressive
from llm_diffusion.models.record import DiffusionRecord, read_record, save_record
from llm_diffusion.models.special_tokens import prompt_ids


@pytest.fixture(scope="module")
def saved(tmp_path_factory, random_llama):
    """A base, an adapter over it that draws from all its layers, an AR adapter, and a full checkpoint with a time embedding."""
    root, tokenizer = tmp_path_factory.mktemp("whole"), AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    random_llama(tie_word_embeddings=False).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for name, load in (("adapter", load_diffusion_model), ("ar", load_autoregressive)):
        model, its_tokenizer = load(str(root / "base"), device="cpu")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
        adapted.save_pretrained(root / name)
        its_tokenizer.save_pretrained(root / name)
        if name == "adapter":
            save_record(adapted, root / name)
    model, tokenizer = load_diffusion_model(str(root / "base"), device="cpu", time_embedding=True)
    model.save_pretrained(root / "timed")
    tokenizer.save_pretrained(root / "timed")
    return root


@pytest.fixture
def copied(saved, tmp_path):
    """Copies of these folders by name; an adapter's base is the copy's."""

    def copy(name):
        shutil.copytree(saved / name, tmp_path / name)
        if name in ("adapter", "ar"):
            shutil.copytree(saved / "base", tmp_path / "base")
            edit_json(tmp_path / name / "adapter_config.json", base_model_name_or_path=str(tmp_path / "base"))
        return tmp_path / name

    return copy


def edit_json(file, drop=(), **changes):
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in values.items() if name not in drop}))


def edit_weights(file, edit):
    state = load_file(file)
    edit(state)
    save_file(state, file, {"format": "pt"})


def drop(name):
    return lambda state: state.pop(name)


def rename(state):
    state["base_model.model.model.layers.0.self_attn.q_proj.lora_X.weight"] = state.pop(
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    )


def shorten(state):
    state["model.norm.weight"] = state["model.norm.weight"][:5].clone()


def poison(state):
    next(iter(state.values())).view(-1)[0] = torch.nan


BASE_DAMAGE = {
    "a tensor of a layer": (drop("model.layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight"),
    "an untied head": (drop("lm_head.weight"), "lm_head.weight"),
    "the embedding": (drop("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "another shape": (shorten, r"model.norm.weight \(is \(5,\), must be \(32,\)\)"),
}


@pytest.mark.parametrize("load", [load_diffusion_model, load_autoregressive])
@pytest.mark.parametrize("damage", BASE_DAMAGE)
def test_a_base_that_would_be_random_in_part_is_refused(copied, load, damage):
    folder, (edit, named) = copied("base"), BASE_DAMAGE[damage]
    edit_weights(folder / "model.safetensors", edit)
    with pytest.raises(OSError, match=f"`model`: '{folder}' is not a loadable checkpoint: tensors .*: {named}"):
        load(str(folder), device="cpu")


def test_the_base_of_an_adapter_is_checked_too(copied, tmp_path):
    for name in ("adapter", "ar"):
        folder = copied(name)
        edit_weights(tmp_path / "base" / "model.safetensors", drop("lm_head.weight"))
        with pytest.raises(OSError, match="tensors missing: lm_head.weight"):
            (load_diffusion_model if name == "adapter" else load_autoregressive)(str(folder), device="cpu")
        shutil.rmtree(tmp_path / "base")


def test_a_time_embedding_that_the_record_promises_must_be_there(copied):
    folder = copied("timed")
    load_diffusion_model(str(folder), device="cpu")
    edit_weights(folder / "model.safetensors", drop("time_embedding.up.weight"))
    with pytest.raises(OSError, match="tensors missing: time_embedding.up.weight"):
        load_diffusion_model(str(folder), device="cpu")


@pytest.mark.parametrize("load", [load_diffusion_model, load_autoregressive])
def test_a_vocabulary_smaller_than_the_tokenizers_is_refused(random_llama, tokenizer, tmp_path, load):
    random_llama(vocab_size=100).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"`model`: .* vocabulary of 100 tokens, and its tokenizer goes up to id 430"):
        load(str(tmp_path), device="cpu")


def test_a_tokenizer_without_an_end_token_works(random_llama, tokenizer, tmp_path):
    random_llama(eos_token_id=None, pad_token_id=None).save_pretrained(tmp_path)
    tokenizer.eos_token = tokenizer.pad_token = tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path)
    model, tokenizer = load_diffusion_model(str(tmp_path), device="cpu")
    assert tokenizer.eos_token is None and tokenizer.pad_token is not None
    ids = torch.tensor([prompt_ids(tokenizer, "Tom has")])
    assert model.generate(ids, max_new_tokens=4).shape == (1, ids.shape[1] + 4)


# -- adapters

ADAPTER_DAMAGE = {
    "a tensor missing": (drop("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"), "missing: .*lora_A"),
    "all missing": (dict.clear, r"missing: .* and 5 more"),
    "a tensor renamed": (rename, "missing: .*lora_A"),
    "not a number": (poison, "non finite: .*lora_A"),
}


@pytest.mark.parametrize("name", ["adapter", "ar"])
@pytest.mark.parametrize("damage", ADAPTER_DAMAGE)
def test_a_damaged_adapter_is_refused(copied, name, damage):
    folder, (edit, named) = copied(name), ADAPTER_DAMAGE[damage]
    load = load_diffusion_model if name == "adapter" else load_autoregressive
    edit_weights(folder / "adapter_model.safetensors", edit)
    with pytest.raises(OSError, match=f"`model`: '{folder}' is not a loadable checkpoint: tensors {named}"):
        load(str(folder), device="cpu")


def test_an_adapter_that_names_fewer_targets_than_it_trained_is_refused(copied):
    folder = copied("adapter")
    edit_json(folder / "adapter_config.json", target_modules=["q_proj"])
    with pytest.raises(OSError, match="tensors without a place: .*v_proj"):
        load_diffusion_model(str(folder), device="cpu")


def test_an_adapter_whose_record_has_a_time_embedding_must_bring_it(copied):
    folder = copied("adapter")
    edit_json(folder / "diffusion_config.json", time_embedding=True)
    with pytest.raises(OSError, match="tensors missing: time_embedding"):
        load_diffusion_model(str(folder), device="cpu")


@pytest.mark.parametrize("part", ["mlp.up_proj", "self_attn.k_proj"])
def test_a_base_with_other_matrices_and_the_same_norms_is_another_base(copied, tmp_path, part):
    def replace(state):
        for name in state:
            if part in name:
                state[name] = state[name].roll(1, 0).clone()

    folder = copied("adapter")
    edit_weights(tmp_path / "base" / "model.safetensors", replace)
    with pytest.raises(UserError, match="trained on another base"):
        load_diffusion_model(str(folder), device="cpu")
    # What an earlier version wrote of a base does not tell.
    numbers = json.loads((folder / "diffusion_config.json").read_text())["base_fingerprint"]
    edit_json(folder / "diffusion_config.json", base_fingerprint=numbers[:16])
    load_diffusion_model(str(folder), device="cpu")


def test_the_fingerprint_is_the_same_under_adapters(saved):
    model, _ = load_diffusion_model(str(saved / "base"), device="cpu")
    before = fingerprint(model)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[431]))
    assert fingerprint(model) == before and len(before) == 8 + 8 + 14


# -- records

SIDECAR_DAMAGE = [
    *(("drop", name) for name in ("mask_token_id", "attention", "block_length", "clean_context", "right_shift_logits")),
    *(("drop", name) for name in ("time_embedding", "base_model")),
    *(("mask_token_id", value) for value in ("x", None, 10**9, -1, 1.5, True, [431])),
    *(("attention", value) for value in ("nonsense", None, "block", "lossless", 5, [])),
    *(("block_length", value) for value in (-3, 0, 3, "4", 2.5)),
    *(("clean_context", value) for value in ("nonsense", 5, [])),
    *(("right_shift_logits", value) for value in ("x", 1, None)),
    *(("time_embedding", value) for value in ("x", 1, None)),
    *(("noise_schedule", value) for value in ("nonsense", None, 5)),
    *(("base_model", value) for value in (5, None, [])),
    *(("conversion_steps", value) for value in ("x", -1, 1.5, None)),
    *(("training_tokens", value) for value in ("x", -1, [])),
    *(("final_causal_ratio", value) for value in ("x", -0.1, 1.0, None)),
    *(("base_fingerprint", value) for value in ("x", 5, [None] * 6, ["a"])),
    *(("tail_token_id", value) for value in ("x", -1)),
    *(("annealed", value) for value in ("x", 1, None)),
    *(("gguf_file", value) for value in (5, [])),
]


@pytest.mark.parametrize(("key", "value"), SIDECAR_DAMAGE)
def test_a_damaged_sidecar_is_refused(saved, tmp_path, key, value):
    """The checker reads the file alone; an id beyond the vocabulary shows when the model is there."""
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "diffusion_config.json"
    edit_json(file, **({"drop": [value]} if key == "drop" else {key: value}))
    named = value if key == "drop" else key
    with pytest.raises(UserError, match=f"{file}.*{named}" if value != 10**9 else "mask token id"):
        read_record(tmp_path / "adapter")
        load_diffusion_model(str(tmp_path / "adapter"), device="cpu")


@pytest.mark.parametrize("text", ["[]", "5", "null", '"x"', "{", ""])
def test_a_sidecar_that_is_no_mapping_is_refused(saved, tmp_path, text):
    shutil.copytree(saved / "adapter", tmp_path / "adapter")
    (tmp_path / "adapter" / "diffusion_config.json").write_text(text)
    with pytest.raises(UserError, match=r"diffusion_config\.json"):
        read_record(tmp_path / "adapter")


def test_a_lossless_record_has_the_bases_read_out():
    record = DiffusionRecord(431, "lossless", 8, "causal", True).to_dict()
    assert DiffusionRecord.from_dict(record, complete=True).mode.drafts
    for wrong in ({"right_shift_logits": False}, {"clean_context": "block"}, {"block_length": 1}):
        with pytest.raises(UserError, match="lossless"):
            DiffusionRecord.from_dict(record | wrong, complete=True)


@pytest.mark.parametrize("text", ["[]", '"x"', "null", "5"])
def test_a_config_that_is_no_mapping_is_refused(copied, text):
    folder = copied("base")
    (folder / "config.json").write_text(text)
    with pytest.raises((OSError, UserError), match=f"{folder}"):
        load_diffusion_model(str(folder), device="cpu")


@pytest.mark.parametrize("value", [[], "x", 5, {}, {"attention": "bidirectional"}])
def test_a_full_checkpoint_whose_record_is_damaged_is_refused(copied, value):
    folder = copied("timed")
    edit_json(folder / "config.json", diffusion=value)
    with pytest.raises(UserError, match=f"config.diffusion of '{folder}'"):
        load_diffusion_model(str(folder), device="cpu")


# -- chat templates

BROKEN = ["{% for m in messages", "{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}{% endfor %}"]


@pytest.mark.parametrize("template", BROKEN)
def test_a_template_that_can_render_nothing_is_refused_with_the_model(copied, template):
    folder = copied("base")
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match="^`model`: its chat template does not take"):
        load_diffusion_model(str(folder), device="cpu")


def test_a_template_that_refuses_a_conversation_is_named(copied):
    folder = copied("base")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('only system turns') }}")
    _, tokenizer = load_diffusion_model(str(folder), device="cpu")
    with pytest.raises(UserError, match="its chat template .*only system turns"):
        prompt_ids(tokenizer, [{"role": "user", "content": "a"}])
