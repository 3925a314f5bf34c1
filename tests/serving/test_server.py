"""The endpoint as its clients meet it: a real server on a free port, and OpenAI's own client."""

import asyncio
import json
import re
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
import uvicorn
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer

import llm_diffusion as ld
from llm_diffusion.main import cli
from llm_diffusion.models.checkpoints import TINY_MODEL_PATH
from llm_diffusion.models.patching import base_of
from llm_diffusion.serving import server
from llm_diffusion.serving.batching import Batch, Done, Engine, Job

LONG = "a"  # what follows does not end
QUESTIONS = [[{"role": "user", "content": f"Sort the letters: {' '.join(w)}"}] for w in ("kdea", "zx", "qrtsb", "mno")]
LIMITS = {"batch_size": 16, "max_tokens": 200}
TOKENIZER = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
END = 168  # a token that random weights come to in the first of these answers, and in no other
SETTINGS = {"bidirectional": {"block_length": 8, "grow_canvas": True}, "block": {}, "lossless": {}}


@contextmanager
def serving(inference, **limits):
    """The app and its address."""
    app = server.build_app(inference, "tiny", **{**LIMITS, **limits})
    with server.listen("127.0.0.1", 0) as listening:
        running = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield app, f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            running.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def inference_of(random_llama, attention="bidirectional", **options):
    """The smallest model there is with the TOKENIZER tokenizer; its answers end where it says `END`."""
    tokenizer = AutoTokenizer.from_pretrained(TINY_MODEL_PATH)
    model = random_llama(max_position_embeddings=1024, initializer_range=0.5, eos_token_id=None)
    model = ld.convert_to_diffusion(model, tokenizer, attention=attention, **options)
    if attention == "lossless":
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).eval()
    return ld.DiffusionInference(model, None, END, None, tokenizer, max_new_tokens=20, **SETTINGS[attention])


@pytest.fixture(scope="module")
def inference(random_llama):
    return inference_of(random_llama)


@pytest.fixture(scope="module")
def running(inference):
    with serving(inference) as found:
        yield found


@pytest.fixture(scope="module")
def plain(running):
    with httpx.Client(base_url=running[1]) as client:
        yield client


@pytest.fixture(scope="module")
def client(running):
    with openai.OpenAI(base_url=running[1], api_key="none", max_retries=0) as client:
        yield client


def test_the_one_model_is_named(client):
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.8, "top_p": 0.9, "seed": 3}], ids=str)
def test_answers_are_those_of_the_library(client, inference, settings):
    for question in QUESTIONS[:2]:
        answer = client.chat.completions.create(model="tiny", messages=question, **settings)
        assert answer.choices[0].message.content == inference.chat(question, **settings)
        assert answer.usage.prompt_tokens == len(
            inference.tokenizer.apply_chat_template(question, add_generation_prompt=True)["input_ids"]
        )
    answer = client.completions.create(model="tiny", prompt="Tom has", max_tokens=10, **settings)
    assert answer.choices[0].text == inference.generate("Tom has", max_new_tokens=10, **settings)[0]


def test_tokens_are_counted_and_the_end_is_named(client, inference):
    answer = client.completions.create(model="tiny", prompt="Tom has", max_tokens=3)
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")
    answer = client.chat.completions.create(model="tiny", messages=QUESTIONS[0], max_completion_tokens=100)
    ids = inference.tokenizer.apply_chat_template(QUESTIONS[0], add_generation_prompt=True)["input_ids"]
    n = inference.answer_ids([ids], max_new_tokens=100)[0].tolist().index(END) + 1
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (n, "stop")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + n


def test_the_longest_answer_bounds_those_that_ask_for_no_length(inference):
    """The model's own setting is 20."""
    for longest, found in ((5, 5), (20, 20), (30, 20)):
        settings = server.read(inference, server.AskedText(prompt="a"), longest)["settings"]
        assert settings["max_new_tokens"] == found


def test_one_request_gets_one_answer(inference):
    settings = {"num_return_sequences": 2, "temperature": 1.0}
    several = ld.DiffusionInference(inference.model, None, END, None, inference.tokenizer, **settings)
    with pytest.raises(ld.UserError, match="`num_return_sequences`=2"):
        server.build_app(several, "tiny")


@pytest.mark.parametrize("n", [8, 60])
def test_pieces_come_by_blocks_and_make_the_whole(client, inference, n):
    asked = {"model": "tiny", "stream": True, "stream_options": {"include_usage": True}}
    *chunks, last = client.completions.create(prompt=LONG, max_tokens=n, **asked)
    pieces = [chunk.choices[0].text for chunk in chunks]
    whole = client.completions.create(model="tiny", prompt=LONG, max_tokens=n)
    assert "".join(pieces) == whole.choices[0].text
    assert n == 8 or len([piece for piece in pieces if piece]) >= 4, "blocks came late"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, whole.choices[0].finish_reason]
    assert last.usage == whole.usage and not last.choices
    roles = [
        chunk.choices[0].delta.role
        for chunk in client.chat.completions.create(model="tiny", messages=QUESTIONS[0], stream=True)
    ]
    assert roles[0] == "assistant" and not any(roles[1:])


@pytest.mark.parametrize("stream", [True, False])
def test_a_stop_word_ends_an_answer_before_it(client, inference, stream):
    whole = inference.generate(LONG, max_new_tokens=60)[0]
    word = whole[20:23]
    asked = {"model": "tiny", "prompt": LONG, "max_tokens": 60, "stop": ["never", word], "stream": stream}
    answer = client.completions.create(**asked)
    chunks = list(answer) if stream else [answer]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole[: whole.index(word)]
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_requests_that_come_together_are_decoded_together(running, client, inference):
    """Every other question is sampled: the same ones get the same answer."""
    engine = running[0].state.engine
    before = engine.batches

    def ask(i):
        asked = {"max_tokens": 12 + 8 * (i % 2), "temperature": i % 2, "stream": i % 3 == 0}
        answer = client.chat.completions.create(model="tiny", messages=QUESTIONS[i % 4], **asked)
        if asked["stream"]:
            return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        return answer.choices[0].message.content

    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(ask, range(32)))
    for i, answer in enumerate(answers):
        asked = {"max_new_tokens": 12 + 8 * (i % 2), "temperature": float(i % 2)}
        assert answer == (answers[i - 4] if i >= 4 else inference.chat(QUESTIONS[i], **asked))
    assert 2 <= engine.batches - before < 16  # two settings, of 16 requests each
    assert not engine.waiting


@pytest.fixture
def passes(inference):
    """Counts the forward passes, and makes them slow enough for a client to hang up between two of them."""
    counted = []

    def count(*_):
        counted.append(1)
        time.sleep(0.01)

    handle = inference.model.register_forward_pre_hook(count)
    yield counted
    handle.remove()


def until(condition, seconds=10):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_is_not_decoded_on(running, passes, stream):
    app, url = running
    engine, body = app.state.engine, {"prompt": LONG, "max_tokens": 200, "stream": stream}
    until(lambda: not engine.running)
    with httpx.Client() as client:
        if stream:
            with client.stream("POST", f"{url}/completions", json=body) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post(f"{url}/completions", json=body, timeout=0.2)
    until(lambda: not engine.running)
    assert 0 < len(passes) < 100  # of 200


def test_one_that_hangs_up_while_it_waits_is_not_decoded_at_all(running, passes):
    app, url = running
    engine, body = app.state.engine, {"prompt": LONG, "max_tokens": 200}
    with httpx.stream("POST", f"{url}/completions", json={**body, "stream": True}) as response:
        lines = response.iter_lines()  # when it goes out of use, the client hangs up
        next(lines)
        before = engine.batches
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/completions", json={**body, "max_tokens": 199}, timeout=0.2)
        until(lambda: not engine.waiting)
        assert len(engine.running) == 1
    until(lambda: not engine.running)
    assert engine.batches == before


PROMPT = {"prompt": "a"}


@pytest.mark.parametrize(
    ("asked", "status", "param", "said"),
    [
        ({}, 400, "prompt", "required"),
        ({"prompt": 5}, 400, "prompt", "5"),
        ({"prompt": ""}, 400, "prompt", "no token"),
        ({"prompt": ["a", "b"]}, 400, "prompt", "'b'"),
        ({"prompt": "\ud800"}, 400, "prompt", "UTF-8"),
        ({"prompt": "a " * 1100}, 400, "max_tokens", "1024 positions"),
        ({**PROMPT, "model": "gpt-9"}, 404, "model", "'tiny'"),
        ({**PROMPT, "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1, got 0"),
        ({**PROMPT, "max_tokens": "5"}, 400, "max_tokens", "integer, got '5'"),
        ({**PROMPT, "max_tokens": 201}, 400, "max_tokens", "at most 200 tokens, got 201"),
        ({**PROMPT, "temperature": -1}, 400, "temperature", "-1"),
        ({**PROMPT, "temperature": float("nan")}, 400, "temperature", "nan"),
        ({**PROMPT, "top_p": 0}, 400, "top_p", "greater than 0"),
        ({**PROMPT, "seed": -1}, 400, "seed", "-1"),
        ({**PROMPT, "stop": ["a"] * 5}, 400, "stop", "at most 4"),
        ({**PROMPT, "stop": ""}, 400, "stop.0", "at least 1 character"),
        ({**PROMPT, "stop": 0}, 400, "stop", "got 0"),
        ({**PROMPT, "stop": {}}, 400, "stop", "got {}"),
        ({**PROMPT, "stream": 1}, 400, "stream", "got 1"),
        ({**PROMPT, "stream_options": {"include_usage": True}}, 400, "stream_options", "`stream`=true"),
        ({**PROMPT, "stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "not permitted"),
        ({**PROMPT, "n": 2}, 400, "n", "not supported"),
        ({**PROMPT, "logprobs": 0}, 400, "logprobs", "not supported"),
        ({**PROMPT, "echo": True}, 400, "echo", "not supported"),
        ({**PROMPT, "best_of": 3}, 400, "best_of", "not supported"),
        ({**PROMPT, "no_such": 1}, 400, "no_such", "not supported"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "king", "content": "a"}]}, 400, "messages", "'king'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "messages", "'image_url'"),
        ({"messages": QUESTIONS[0], "tools": [{"type": "function"}]}, 400, "tools", "not supported"),
        ({"messages": QUESTIONS[0], "max_completion_tokens": 201}, 400, "max_completion_tokens", "got 201"),
        ({"messages": QUESTIONS[0], "max_tokens": 5, "max_completion_tokens": 9}, 400, "max_tokens", "give one"),
        ({"messages": QUESTIONS[0], "response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_refusals_name_the_field_what_was_found_and_what_is_right(plain, asked, status, param, said):
    kind = "chat/completions" if "messages" in asked else "completions"
    response = plain.post(kind, content=json.dumps(asked), headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (status, param, "invalid_request_error")
    assert said in error["message"] and f"`{param}`" in error["message"].replace("`request`: ", "")


def test_what_changes_nothing_is_taken(client, inference):
    neutral = {
        "user": "me",
        "n": 1,
        "presence_penalty": 0.0,
        "logprobs": False,
        "tools": [],
        "stop": None,
        "seed": None,
    }
    answer = client.chat.completions.create(model="tiny", messages=QUESTIONS[1], extra_body=neutral)
    assert answer.choices[0].message.content == inference.chat(QUESTIONS[1])


def test_refusals_of_http(plain):
    huge = b'{"prompt": "' + b"a" * server.MAX_BODY + b'"}'
    sent = {"headers": {"content-type": "application/json"}}
    for response, status, said in (
        (plain.get("nothing"), 404, "Not Found"),
        (plain.get("completions"), 405, "Method Not Allowed"),
        (plain.post("completions", content=b'{"prompt', **sent), 400, "JSON"),
        (plain.post("completions", content=b"[" * 100_000, **sent), 400, ""),
        (plain.post("completions", content=huge, **sent), 413, str(server.MAX_BODY)),
        (plain.post("completions", content=iter([huge]), **sent), 413, str(server.MAX_BODY)),
        (plain.post("completions", data={"prompt": "a"}), 400, "`body`"),
    ):
        assert response.status_code == status and said in response.json()["error"]["message"]


def test_too_many_waiting_is_refused(plain, monkeypatch):
    monkeypatch.setattr(server, "MAX_WAITING", 0)
    response = plain.post("completions", json=PROMPT)
    assert response.status_code == 429 and "waiting" in response.json()["error"]["message"]


def test_requests_being_read_are_among_those_that_wait(inference, monkeypatch):
    """20 at once."""
    monkeypatch.setattr(server, "MAX_WAITING", 2)
    endpoint, asked = server.Endpoint(inference, "tiny", 16, 200), server.AskedText(prompt="a", stream=True)

    async def burst():
        return await asyncio.gather(*(endpoint.answer(None, asked) for _ in range(20)), return_exceptions=True)

    assert [getattr(found, "status_code", found) for found in asyncio.run(burst())] == [200] * 2 + [429] * 18
    assert not endpoint.reading


def test_a_fault_in_decoding_is_told_and_the_next_request_answered(running, client, inference):
    def broken(*_):
        raise RuntimeError("a secret")

    handle = inference.model.register_forward_pre_hook(broken)
    try:
        with pytest.raises(openai.InternalServerError, match="log") as raised:
            client.completions.create(model="tiny", prompt="a")
        assert "secret" not in str(raised.value)
        with pytest.raises(openai.APIError, match="log"):
            list(client.completions.create(model="tiny", prompt="a", stream=True))
    finally:
        handle.remove()
    assert client.completions.create(model="tiny", prompt="a").choices[0].text == inference.generate("a")[0]


def test_one_bad_row_of_a_batch_fails_alone(inference):
    """A token that the embedding does not have."""
    engine, prompts = Engine(inference, 4), [[5, 6], [7, 10**6], [8, 9, 10]]
    jobs = [told(inference.tokenizer, prompt) for prompt in prompts]
    engine._decode(jobs)
    assert isinstance(jobs[1].kept[-1], Exception)
    for job in (jobs[0], jobs[2]):
        *pieces, done = job.kept
        assert isinstance(done, Done)
        assert "".join(pieces) == job.decode(inference.answer_ids([job.ids])[0].tolist())


def test_what_the_page_shows_is_answered(running, plain, inference, capsys):
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text().split("## A page to play with")[0]
    exec(re.search(r"```python\n(.*?)```", page, re.DOTALL)[1].replace("http://127.0.0.1:8000/v1", running[1]), {})
    assert capsys.readouterr().out == inference.chat(QUESTIONS[0])
    url, body = re.search(r"curl http://127.0.0.1:8000/v1/(\S+) .*?-d '(.*?)'", page, re.DOTALL).groups()
    said = plain.post(url, json=json.loads(body)).json()["choices"][0]["message"]["content"]
    assert said == inference.chat(QUESTIONS[0], max_new_tokens=32)


def test_a_port_that_is_taken_is_one_line(running):
    port = running[1].split(":")[2].split("/")[0]
    result = CliRunner().invoke(cli, ["serve", "tiny", "--port", port])
    assert result.exit_code == 2 and "`--port`" in result.stderr and result.stderr.count("\n") == 1


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "fastapi", None)
    monkeypatch.delitem(sys.modules, "llm_diffusion.serving.server")
    monkeypatch.delattr("llm_diffusion.serving.server")
    result = CliRunner().invoke(cli, ["serve", "tiny"])
    assert result.exit_code == 2 and "llm-diffusion[serve]" in result.stderr and result.stderr.count("\n") == 1


# -- without a server


class Told(Job):
    """A job whose pieces are kept."""

    def tell(self, item):
        self.kept = [*getattr(self, "kept", []), item]


def told(tokenizer, ids=(1,), **options):
    def decode(ids):
        return tokenizer.decode(ids, skip_special_tokens=True)

    return Told(list(ids), {}, **{"ends": {2}, "stop": [], **options}, decode=decode, loop=None)


@given(st.lists(st.integers(3, 430), max_size=30), st.lists(st.integers(0, 30), max_size=5), st.data())
def test_any_cut_of_an_answer_makes_the_same_text(ids, cuts, data):
    """Half characters and halves of stop words included; what a stop word ends is counted through its last token."""
    whole = TOKENIZER.decode(ids, skip_special_tokens=True)
    at = data.draw(st.integers(0, len(whole)))
    words = [whole[at : at + 3] or "a", "never"], [whole[at : at + 4] or "a", whole[at + 1 : at + 3] or "b"]
    stop = data.draw(st.sampled_from([[], *words]))
    job, places = told(TOKENIZER, stop=stop), sorted(min(cut, len(ids)) for cut in cuts)
    for place in places:
        job.feed(ids[:place], False)
    job.feed(ids, True)
    *pieces, done = job.kept
    stopped = any(word in whole for word in stop)
    assert done.finish_reason == ("stop" if stopped else "length")
    if not stopped:
        assert ("".join(pieces), done.tokens) == (whole, len(ids))
    else:
        before, text = (TOKENIZER.decode(ids[:n], skip_special_tokens=True) for n in (done.tokens - 1, done.tokens))
        assert not any(word in before for word in stop)
        assert "".join(pieces) == text[: min(text.index(word) for word in stop if word in text)]


def test_a_hang_up_while_the_text_is_read_is_kept():
    job = told(TOKENIZER, stop=["never"])
    read, hang_ups = job.decode, iter([True])

    def decode(ids):
        job.over = next(hang_ups, job.over)
        return read(ids)

    job.decode = decode
    job.feed([5, 6], False)
    assert job.over


@pytest.mark.parametrize("attention", ["bidirectional", "block", "lossless"])
def test_rows_are_told_apart_and_leave_when_nobody_waits(random_llama, attention):
    """A batch of unlike prompts: each row as alone; of one that is given up, no more than what it had."""
    options = {} if attention == "bidirectional" else {"block_length": 4}
    inference = inference_of(random_llama, attention, **options)
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13, 14], [15]]
    jobs = [told(inference.tokenizer, prompt, ends={END}) for prompt in prompts]
    forwards = []
    base_of(inference.model).register_forward_pre_hook(lambda *_: forwards.append(1))
    answers = inference.answer_ids(prompts, streamer=Batch(jobs))
    for job, prompt, answer in zip(jobs, prompts, answers.tolist(), strict=True):
        job.feed(answer, True)
        *pieces, done = job.kept
        alone = inference.answer_ids([prompt])[0]
        assert "".join(pieces) == inference.tokenizer.decode(alone, skip_special_tokens=True)
        assert done.tokens == len(alone) and len(pieces) > 1
    together = len(forwards)
    forwards.clear()
    jobs = [told(inference.tokenizer, prompt, ends={END}) for prompt in prompts]
    jobs[0].over = jobs[2].over = True
    inference.answer_ids(prompts, streamer=Batch(jobs))
    assert not hasattr(jobs[0], "kept") and isinstance(jobs[1].kept[-1], Done)
    forwards.clear()
    jobs[1].over = True
    inference.answer_ids(prompts, streamer=Batch(jobs))
    assert len(forwards) < together / 3
