"""The page to play with: what its functions yield, that it builds, and how it is used in a browser."""

import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from html import unescape
from itertools import cycle, groupby, islice

import pytest
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import llm_diffusion as ld
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.record import save_generation_config, save_record

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


# What the answer said since, one text after the other.
WATCH = """() => {
    const answer = document.querySelector("#answer"), seen = window.seen = [];
    new MutationObserver(() => {
        const text = answer.querySelector(".prose").innerText;
        if (text && text !== seen.at(-1)) seen.push(text);
    }).observe(answer, {subtree: true, childList: true, characterData: true});
}"""
COLOURS = "spans => spans.map(span => [span.textContent, getComputedStyle(span).color])"


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if (chromium := shutil.which("chromium")) is None:
        pytest.skip("there is no `chromium` on the PATH")
    with api.sync_playwright() as driver, driver.chromium.launch(executable_path=chromium) as started:
        yield started


@contextmanager
def opened(browser, model):
    """The page that `llm-diffusion demo` shows; nothing on it may come from elsewhere."""
    command = [sys.executable, "-um", "llm_diffusion.main", "demo", model, "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            address = next(found[0] for line in process.stdout if (found := re.search(r"http://[\w.:]+", line)))
            page, requested = browser.new_page(), []
            page.set_default_timeout(60_000)
            page.on("request", lambda request: requested.append(request.url))
            page.goto(address)
            yield page
            assert requested and all(url.startswith((address, "data:", "blob:")) for url in requested), requested
            page.close()
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
        assert process.returncode == 0


def asked(page, text, want):
    """What the answer says while it forms, and its tokens with their colours, once it says `want`."""
    from playwright.sync_api import expect

    page.locator("#text textarea").fill(text)
    page.evaluate(WATCH)
    page.locator("#go").click()
    expect(page.locator("#answer .prose")).to_have_text(want, timeout=60_000)
    assert page.locator("#answer .prose").inner_text() == want
    return page.evaluate("window.seen"), page.eval_on_selector_all("#answer .prose span", COLOURS)


def rgb(colours):
    return [f"rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:7], 16)})" for c in colours]


def choose(page, **values):
    for label, value in values.items():
        box = page.get_by_role("spinbutton", name=re.compile(f"for {label}"))
        box.fill(str(value))
        box.press("Tab")


def refused(page, text):
    page.locator("#text textarea").fill(text)
    page.locator("#go").click()
    toast = page.get_by_test_id("toast-body")
    words = toast.inner_text()
    toast.get_by_test_id("toast-close").click()
    return words


@pytest.mark.slow  # the tests above ask the same of the functions
def test_in_a_browser(browser, inference):
    question = [{"role": "user", "content": QUESTION}]
    with opened(browser, "tiny") as page:
        want = inference.chat(question, max_new_tokens=64, threshold=0.9, block_length=16, grow_canvas=True)
        seen, tokens = asked(page, QUESTION, want)
        hidden = [text.count(demo.HIDDEN) for text in seen]
        assert len(seen) > 3 and hidden[0] > 20 and hidden[-1] == 0 and hidden == sorted(hidden, reverse=True)
        assert len({colour for _, colour in tokens} & {*rgb(colour for _, _, colour in demo.SHADES)}) > 1

        choose(page, passes=4, block=8, longest=12)
        want = inference.chat(question, max_new_tokens=12, steps=4, block_length=8, grow_canvas=True)
        asked(page, QUESTION, want)

        choose(page, passes=0, threshold=1)
        want = inference.infill(["3 6 ", " 12 15"], threshold=1)
        seen, tokens = asked(page, "3 6 ____ 12 15", want)
        assert len(seen) > 1 and demo.HIDDEN in seen[-2]
        (given,) = rgb([demo.GIVEN])
        assert "".join(text for text, colour in tokens if colour == given) == "3 6  12 15"
        assert {colour for _, colour in tokens if colour != given} <= {*rgb(colour for _, _, colour in demo.SHADES)}
        assert "`text` is empty" in refused(page, " ")


@pytest.mark.slow  # the tests above ask the same of the functions
def test_a_drafter_in_a_browser(browser, tmp_path):
    model, tokenizer = ld.load_diffusion_model("tiny", attention="lossless", block_length=4, device="cpu")
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    save_record(model, tmp_path)
    save_generation_config(model, tmp_path, {"draft_outcomes": 4})  # left out: what is fastest at the moment
    inference = ld.DiffusionInference.from_pretrained(tmp_path, device="cpu")
    with opened(browser, str(tmp_path)) as page:
        want = inference.chat([{"role": "user", "content": QUESTION}], max_new_tokens=64)
        seen, tokens = asked(page, QUESTION, want)
        passes = [colour for colour, _ in groupby(colour for _, colour in tokens)]
        assert passes == [*islice(cycle(rgb(demo.PASSES)), len(passes))]
        assert 1 < len(passes) < len(tokens) and len(seen) > 1  # some passes brought several
        assert "lossless" in refused(page, "3 6 ____ 12")
