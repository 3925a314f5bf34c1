"""The page to play with: what its functions yield, and that it builds."""

import re
import threading
import time
from html import unescape

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import llm_diffusion as ld
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH

pytest.importorskip("gradio", reason="the extra `demo` is not installed")
from llm_diffusion.serving import demo  # noqa: E402

QUESTION = "Sort the letters: k d e a"


def text_of(page):
    return unescape(re.sub(r"<[^>]*>", "", page))


@pytest.fixture(scope="module")
def inference(tiny):
    model, tokenizer = tiny
    return ld.DiffusionInference(model, None, tokenizer.eos_token_id, None, tokenizer)


@pytest.fixture(scope="module")
def drafter(random_llama):
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    model = ld.convert_to_diffusion(
        random_llama(max_position_embeddings=256), tokenizer, attention="lossless", block_length=4
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    return ld.DiffusionInference(model, None, tokenizer.eos_token_id, None, tokenizer)


@pytest.mark.parametrize("settings", [{"threshold": 0.9}, {"steps": 4, "block_length": 8}], ids=str)
def test_an_answer_forms_pass_by_pass(inference, settings):
    pages = list(demo.play(inference, QUESTION, 12, **settings))
    chosen = {"grow_canvas": True, "block_length": 16, **settings}
    assert text_of(pages[-1]) == inference.chat([{"role": "user", "content": QUESTION}], max_new_tokens=12, **chosen)
    hidden = [text_of(page).count(demo.HIDDEN) for page in pages]
    assert len(pages) > 3 and hidden[0] > 0 and hidden[-1] == 0
    assert any(colour in pages[-1] for _, _, colour in demo.SHADES)


@pytest.mark.parametrize("gap", ["____", "[…]", "[...]"])
def test_gaps_are_filled_pass_by_pass(inference, gap):
    pages = list(demo.play(inference, f"3 6 {gap} 12 15"))
    assert text_of(pages[-1]) == inference.infill(["3 6 ", " 12 15"], threshold=0.9)
    assert len(pages) > 1 and demo.GIVEN in pages[-1]
    assert any(f"color:{colour}" in pages[-1] for _, _, colour in demo.SHADES)


def test_a_drafter_is_coloured_by_pass(drafter):
    pages = list(demo.play(drafter, QUESTION, 20))
    assert text_of(pages[-1]) == drafter.chat([{"role": "user", "content": QUESTION}], max_new_tokens=20)
    assert len({colour for colour in demo.PASSES if colour in pages[-1]}) > 1
    with pytest.raises(ld.UserError, match="lossless"):
        list(demo.play(drafter, "3 6 ____ 12"))


def test_what_a_model_says_is_escaped(inference):
    view = demo.Pages(inference.tokenizer, inference.settings["mask_token_id"], False, print)
    words = "<script>alert('&')</script>"
    frame = [(token, 0.9) for token in inference.tokenizer(words)["input_ids"]]
    for page in (view.page(frame), view.page(frame, f"{words}!")):
        assert "<script" not in page and text_of(page).rstrip("!") == words
    assert "<b>" not in list(demo.play(inference, "<b>3</b> 6 ____ 12"))[-1]


def test_nobody_looks_any_more(inference):
    passes, before = [], set(threading.enumerate())
    handle = inference.model.register_forward_pre_hook(lambda *_: passes.append(time.sleep(0.02)))
    pages = demo.play(inference, "a", 64)
    next(pages)
    pages.close()
    assert set(threading.enumerate()) == before
    handle.remove()
    assert len(passes) < 40


def test_an_empty_text_is_refused(inference):
    with pytest.raises(ld.UserError, match="`text` is empty"):
        next(demo.play(inference, " "))


def test_the_page_builds_and_sends_nothing(inference):
    page = demo.build_demo(inference, "a <b> model")
    assert page.analytics_enabled is False and "<b>" not in str(page.get_config_file()["components"])
