"""The mask and the padding token: any id of the vocabulary, kept by everything that is saved."""

import logging

import pytest
import torch
from transformers import AutoTokenizer

from llm_diffusion import convert_to_diffusion, load_diffusion_model, probe_attention
from llm_diffusion.models.conversion import MASK_TOKEN, set_mask_token, use_tokens


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


def test_decoding_never_says_it(random_llama, tokenizer):
    model = random_llama(vocab_size=len(tokenizer))
    convert_to_diffusion(model, tokenizer, mask_token_id=300)
    head = model.get_output_embeddings()
    with torch.no_grad():
        head.weight[300] = 100 * head.weight.abs().max()  # by itself the model would say little else
    prompt = torch.tensor([[300, 5, 6]])  # a prompt may speak of it
    answer = model.generate(prompt, max_new_tokens=8, eos_token_id=None)
    assert (answer[:, :3] == prompt).all() and not (answer[:, 3:] == 300).any()


def test_the_number_behind_the_last_token_is_a_new_one(random_llama, tokenizer):
    model = random_llama(vocab_size=len(tokenizer))
    mean = model.get_input_embeddings().weight.mean(0)
    assert set_mask_token(model, tokenizer, 431) == 431 and tokenizer.mask_token == MASK_TOKEN
    assert torch.allclose(model.get_input_embeddings().weight[431], mean)


@pytest.mark.parametrize(
    ("token", "expected"), [(-1, "is no token"), (432, "0 to 430, and 431"), (2, "ends, starts or pads")]
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
