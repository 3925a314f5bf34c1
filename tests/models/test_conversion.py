"""Conversion, what it leaves alone, and the special tokens that it needs."""

import copy
import logging
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertLMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import llm_diffusion as ld
from llm_diffusion import convert_to_diffusion, load_diffusion_model, probe_attention
from llm_diffusion.models.special_tokens import MASK_TOKEN, set_mask_token, use_tokens

IDS = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def logits_of(model):
    return model.eval()(IDS).logits


@pytest.mark.parametrize("right_shift", [None, True, False])
def test_the_record_says_what_was_done(random_llama, tokenizer, right_shift):
    model = random_llama()
    assert ld.convert_to_diffusion(model, tokenizer, right_shift_logits=right_shift) is model
    record = model.config.diffusion
    assert record["mask_token_id"] == tokenizer.mask_token_id
    assert record["right_shift_logits"] is (right_shift is not False)
    assert record["attention"] == "bidirectional"
    assert record["noise_schedule"] == "linear"
    assert {"base_model", "conversion_steps", "training_tokens", "created_at", "version"} < set(record)
    assert ld.probe_attention(model) == "bidirectional"


def test_the_rest_of_the_config_stays_as_it_was(random_llama, tokenizer):
    model = random_llama()
    before = copy.deepcopy(model.config.to_dict())
    generation = copy.deepcopy(model.generation_config.to_dict())
    ld.convert_to_diffusion(model, tokenizer)
    after = model.config.to_dict()
    assert {key for key in after if key not in before or after[key] != before[key]} == {"is_causal", "diffusion"}
    assert not set(before) - set(after)
    assert model.generation_config.to_dict() == generation


@pytest.mark.parametrize(
    ("vocab", "rows"),
    [(512, 512), (432, 432), (431, 448), (1000, 1000)],  # the tokenizer has 431 tokens
    ids=["padded", "one row free", "full", "far larger"],
)
@pytest.mark.parametrize("tied", [True, False])
def test_the_mask_token_takes_the_first_free_id(random_llama, tokenizer, vocab, rows, tied):
    """The embedding is grown only where there is no row left, to a multiple of 64, and is never shrunk."""
    model = random_llama(vocab_size=vocab, tie_word_embeddings=tied)
    known = len(tokenizer)
    old = model.get_input_embeddings().weight.detach().clone()
    head = model.get_output_embeddings().weight.detach().clone()
    ld.convert_to_diffusion(model, tokenizer)
    new = model.get_input_embeddings().weight
    assert model.config.diffusion["mask_token_id"] == tokenizer.mask_token_id == known == 431
    assert new.shape[0] == model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == rows
    others = [i for i in range(vocab) if i != 431]
    assert torch.equal(new[others], old[others])
    torch.testing.assert_close(new[431], old[:431].mean(0))
    if not tied:
        assert torch.equal(model.get_output_embeddings().weight[:vocab], head)
    else:
        assert model.get_output_embeddings().weight is new


def test_an_existing_mask_token_and_its_embedding_are_kept(random_llama, tokenizer):
    tokenizer.add_special_tokens({"mask_token": "[M]"})
    model = random_llama()
    before = model.get_input_embeddings().weight.detach().clone()
    ld.convert_to_diffusion(model, tokenizer)
    assert tokenizer.mask_token == "[M]"
    assert model.config.diffusion["mask_token_id"] == tokenizer.convert_tokens_to_ids("[M]")
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_token_of_the_masks_name_keeps_its_row(random_llama, tokenizer):
    tokenizer.add_tokens([MASK_TOKEN], special_tokens=True)
    model = random_llama(vocab_size=576)
    before = model.get_input_embeddings().weight.detach().clone()
    ld.convert_to_diffusion(model, tokenizer)
    assert tokenizer.mask_token == MASK_TOKEN
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_the_mask_token_is_one_token_in_text(random_llama, tokenizer):
    ld.convert_to_diffusion(random_llama(), tokenizer)
    ids = tokenizer(f"3 6 {tokenizer.mask_token} 12")["input_ids"]
    assert ids.count(tokenizer.mask_token_id) == 1
    assert tokenizer.decode(ids) == f"3 6 {tokenizer.mask_token} 12"


def test_a_missing_padding_token_becomes_the_end_token(random_llama, tokenizer):
    tokenizer.pad_token = None
    ld.convert_to_diffusion(random_llama(), tokenizer)
    assert tokenizer.pad_token == tokenizer.eos_token


@pytest.mark.parametrize("vocab", [512, 431])
def test_converting_twice_is_converting_once(random_llama, tokenizer, vocab):
    model = ld.convert_to_diffusion(random_llama(vocab_size=vocab), tokenizer, right_shift_logits=False)
    record, logits, tokens = dict(model.config.diffusion), logits_of(model), len(tokenizer)
    ld.convert_to_diffusion(model, tokenizer)
    ld.convert_to_diffusion(model, tokenizer, right_shift_logits=False, attention="bidirectional")
    assert model.config.diffusion == record
    assert len(tokenizer) == tokens
    assert torch.equal(logits_of(model), logits)


def test_conversion_under_lora(random_llama, tokenizer):
    peft = get_peft_model(
        random_llama(), LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    )
    assert ld.convert_to_diffusion(peft, tokenizer) is peft
    assert ld.probe_attention(peft) == "bidirectional"
    assert peft.get_base_model().config.diffusion["mask_token_id"] == 431
    answer = peft.generate(input_ids=IDS, max_new_tokens=4, steps=2, eos_token_id=None)
    assert answer.shape == (2, 13)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"attention": "sideways"}, "`attention`.*'sideways'"),
        ({"noise_schedule": "quadratic"}, "'quadratic'"),
    ],
)
def test_unknown_options_are_refused_and_leave_the_model(random_llama, tokenizer, options, named):
    model = random_llama()
    before = copy.deepcopy(model.config.to_dict())
    with pytest.raises(ValueError, match=named):
        ld.convert_to_diffusion(model, tokenizer, **options)
    assert model.config.to_dict() == before
    assert tokenizer.mask_token is None
    assert ld.probe_attention(model) == "causal"


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"right_shift_logits": False}, "`right_shift_logits`.*True.*False"),
        ({"attention": "block"}, "`attention`.*'bidirectional'.*'block'"),
        ({"noise_schedule": "cosine"}, "`noise_schedule`.*'linear'.*'cosine'"),
    ],
)
def test_options_against_the_record_are_refused(random_llama, tokenizer, options, named):
    model = ld.convert_to_diffusion(random_llama(), tokenizer)
    record = dict(model.config.diffusion)
    with pytest.raises(ValueError, match=named):
        ld.convert_to_diffusion(model, tokenizer, **options)
    assert model.config.diffusion == record


def test_a_foreign_tokenizer_is_refused(random_llama, tokenizer):
    model = ld.convert_to_diffusion(random_llama(), tokenizer)
    tokenizer.mask_token = "a"
    with pytest.raises(ValueError, match=f"`tokenizer`.*{tokenizer.convert_tokens_to_ids('a')}.*431"):
        ld.convert_to_diffusion(model, tokenizer)


def test_a_model_that_stays_causal_is_not_converted(tokenizer):
    config = MambaConfig(vocab_size=512, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = MambaForCausalLM(config).eval()
    with pytest.raises(ValueError, match="`model`"):
        ld.convert_to_diffusion(model, tokenizer)
    assert getattr(model.config, "diffusion", None) is None
    assert tokenizer.mask_token is None


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_decodes_with_its_own_weights(random_llama, tokenizer, copied):
    model = ld.convert_to_diffusion(random_llama(), tokenizer)
    settings = {"max_new_tokens": 6, "eos_token_id": None}
    before = model.generate(IDS, **settings)
    twin = copied(model)
    assert torch.equal(twin.generate(IDS, **settings), before)
    with torch.no_grad():
        twin.lm_head.weight.zero_()  # all tokens alike: the first one wins
    assert set(twin.generate(IDS, **settings)[:, 9:].flatten().tolist()) == {0}
    assert torch.equal(model.generate(IDS, **settings), before)
    assert twin.generate.__self__ is twin


def test_encoders_are_refused_for_blocks_too(tokenizer):
    config = BertConfig(
        vocab_size=512, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    with pytest.raises(ValueError, match="it is an encoder"):
        ld.convert_to_diffusion(BertLMHeadModel(config).eval(), tokenizer, attention="block")


def test_the_mask_token_of_qwen3_is_its_first_free_row():
    """151,669 tokens in an embedding of 151,936 rows: the next id is also SDAR's mask, and nothing is resized."""
    words = WordLevel({f"w{i}": i for i in range(151_669)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), eos_token="w1", pad_token="w1")
    shape = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "head_dim": 8,
    }
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=151_936, intermediate_size=8, initializer_range=0.5, **shape))
    ld.convert_to_diffusion(model, tokenizer)
    assert tokenizer.mask_token_id == model.config.diffusion["mask_token_id"] == 151_669
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size == 151_936


def test_a_token_of_the_vocabulary_keeps_its_row_and_is_found_again(tmp_path, random_llama, tokenizer):
    model = random_llama(vocab_size=len(tokenizer))
    row = model.get_input_embeddings().weight[300].clone()
    texts = ["Sort the letters: k d e a", "Tom has 23 apples."]
    before = tokenizer(texts)["input_ids"]
    convert_to_diffusion(model, tokenizer, mask_token_id=300)
    assert model.config.diffusion["mask_token_id"] == tokenizer.mask_token_id == 300
    assert model.get_input_embeddings().weight.shape[0] == len(tokenizer) == 431  # no row was added
    assert torch.equal(model.get_input_embeddings().weight[300], row)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, its_tokenizer = load_diffusion_model(str(tmp_path), device="cpu")
    assert again.config.diffusion["mask_token_id"] == its_tokenizer.mask_token_id == 300
    assert AutoTokenizer.from_pretrained(tmp_path).mask_token_id == 300
    assert its_tokenizer(texts)["input_ids"] == before and len(its_tokenizer) == 431
    with pytest.raises(ValueError, match="`mask_token_id`"):
        load_diffusion_model(str(tmp_path), device="cpu", mask_token_id=301)


def test_decoding_never_predicts_it(random_llama, tokenizer):
    model = random_llama(vocab_size=len(tokenizer))
    convert_to_diffusion(model, tokenizer, mask_token_id=300)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[300] = 100 * head.weight.abs().max()  # by itself the model would predict little else
    prompt = torch.tensor([[300, 5, 6]])  # a prompt may speak of it
    answer = model.generate(prompt, max_new_tokens=8, eos_token_id=None)
    assert (answer[:, :3] == prompt).all() and not (answer[:, 3:] == 300).any()


def test_the_number_behind_the_last_token_is_a_new_one(random_llama, tokenizer):
    model = random_llama(vocab_size=len(tokenizer))
    mean = model.get_input_embeddings().weight.mean(0)
    assert set_mask_token(model, tokenizer, 431) == 431 and tokenizer.mask_token == MASK_TOKEN
    assert torch.allclose(model.get_input_embeddings().weight[431], mean)


@pytest.mark.parametrize(
    ("token", "expected"), [(-1, "is no token|at least 0"), (432, "0 to 430, and 431"), (2, "ends, starts or pads")]
)
def test_ids_that_cannot_be_the_mask(random_llama, tokenizer, token, expected):
    with pytest.raises(ValueError, match=expected):
        set_mask_token(random_llama(vocab_size=512), tokenizer, token)
    model = random_llama(vocab_size=512)
    with pytest.raises(ValueError, match=expected):
        convert_to_diffusion(model, tokenizer, mask_token_id=token)
    assert probe_attention(model) == "causal" and tokenizer.mask_token is None  # nothing was changed


def test_a_mask_that_stands_in_ordinary_text_is_warned_of(random_llama, tokenizer, caplog):
    with caplog.at_level(logging.WARNING):
        set_mask_token(random_llama(vocab_size=512), tokenizer, tokenizer.convert_tokens_to_ids("tam"))
    assert "'tam' may stand in ordinary text" in caplog.text


def test_padding_of_its_own(random_llama, tokenizer):
    model = random_llama(vocab_size=len(tokenizer))
    set_mask_token(model, tokenizer, 300)
    use_tokens(model, tokenizer, {"eos": 2, "pad": 431})
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id, model.config.pad_token_id) == (431, 2, 431)
    assert model.get_input_embeddings().weight.shape[0] >= 432
    for ids, expected in (({"pad": 500}, "is no token"), ({"eos": 300}, "is the mask token")):
        with pytest.raises(ValueError, match=expected):
            use_tokens(model, tokenizer, ids)
