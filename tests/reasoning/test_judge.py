"""The judge against a real server in a thread: what is asked, what is read, what is tried again."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from llm_diffusion.reasoning.pairs import TRIES, LLMJudge

ANSWER = "He had 3*12=35. Then 35-6=29.\n#### 29"
LABEL = '{"right": false, "first_wrong_step": 1}'


class Server(ThreadingHTTPServer):
    """Replies in turn with what it is given, a content or a status; the last one for ever."""

    def __init__(self, *replies: str | int | bytes) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.replies, self.asked = list(replies), []
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:  # what a redirected request becomes
        self.do_POST()

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        reply = self.server.replies.pop(0) if len(self.server.replies) > 1 else self.server.replies[0]
        if reply == 302:
            self.send_response(reply)
            self.send_header("Location", self.server.elsewhere)
            self.end_headers()
            return
        if isinstance(reply, int):
            self.send_error(reply)
            return
        if isinstance(reply, str):
            reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": reply}}]}).encode()
        self.send_response(200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def serve():
    servers = []

    def start(*replies: str | int | bytes) -> Server:
        servers.append(Server(*replies))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def judge_at(server: Server, **options: object) -> LLMJudge:
    return LLMJudge(server.url, "wise", pause=0.001, **options)


def test_one_question_an_answer(serve, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve(LABEL)
    assert judge_at(server)("How many?", ANSWER, "36-6=30\n#### 30") == {"right": False, "first_wrong_step": 0}
    ((path, key, body),) = server.asked
    assert path == "/v1/chat/completions" and key == "Bearer secret"
    assert body["temperature"] == 0 and body["model"] == "wise"
    question = body["messages"][-1]["content"]
    assert "How many?" in question and "#### 30" in question
    assert question.endswith("1. He had 3*12=35.\n2. Then 35-6=29.\n3. #### 29")
    monkeypatch.delenv("OPENAI_API_KEY")
    judge_at(server)("How many?", ANSWER, "30")
    assert server.asked[1][1] is None and server.asked[1][2]["messages"][0] == body["messages"][0]


def test_a_redirect_takes_the_key_nowhere(serve) -> None:
    other = serve(LABEL)
    server = serve(302)
    server.elsewhere = other.url
    with contextlib.suppress(ConnectionError):
        judge_at(server, key="secret")("q", ANSWER, "30")
    assert server.asked[0][1] == "Bearer secret"
    assert [key for _, key, _ in other.asked] == [None] * len(other.asked) and other.asked


@pytest.mark.parametrize(
    ("reply", "label"),
    [
        ('{"right": true, "first_wrong_step": null}', (True, None)),
        ('Step 3 is off {so it is}.\n```json\n{"first_wrong_step": 3, "right": false}\n```', (False, 2)),
        ('First {"right": true, "first_wrong_step": null}, no: ' + LABEL, (False, 0)),
        ('{"right": true}', (True, None)),
    ],
)
def test_replies_as_models_write_them(serve, reply, label) -> None:
    assert tuple(judge_at(serve(reply))("q", ANSWER, "30").values()) == label


@pytest.mark.parametrize(
    "failure", [429, 503, "I cannot say.", b"<html>", b"{}", LABEL.replace("1", "9"), '{"right": 1}']
)
def test_what_may_pass_is_tried_again(serve, failure) -> None:
    server = serve(failure, failure, LABEL)
    assert judge_at(server)("q", ANSWER, "30")["first_wrong_step"] == 0
    assert len(server.asked) == 3 and server.asked[0] == server.asked[2]


@pytest.mark.parametrize(
    ("failure", "tries", "message"),
    [
        (500, TRIES, "500"),
        (401, 1, "401"),
        ("nonsense", TRIES, "no label: 'nonsense'"),
        (b"<html>", TRIES, "no chat completion: '<html>'"),
    ],
)
def test_one_clear_error_in_the_end(serve, failure, tries, message) -> None:
    server = serve(failure)
    with pytest.raises(ConnectionError, match=f"`judge`: .* try {tries}: .*{message}"):
        judge_at(server)("q", ANSWER, "30")
    assert len(server.asked) == tries


def test_nobody_there_and_nobody_answering() -> None:
    with socket.socket() as bound:  # nobody is there
        bound.bind(("127.0.0.1", 0))
        judge = LLMJudge(f"http://127.0.0.1:{bound.getsockname()[1]}", "wise", pause=0.001, timeout=0.1)
        with pytest.raises(ConnectionError, match="refused"):
            judge("q", ANSWER, "30")
        bound.listen()  # and now nobody answers
        with pytest.raises(ConnectionError, match="timed out"):
            judge("q", ANSWER, "30")


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="`judge`"):
        LLMJudge("localhost", "wise")
    with pytest.raises(ValueError, match="`judge_model`"):
        LLMJudge("http://localhost", "")
    with pytest.raises(ValueError, match="OPENAI_API_KEY") as refused:
        LLMJudge("http://me:secret@localhost/v1", "wise")
    assert "secret" not in str(refused.value)
