"""Weights & Biases and the hub: what is not there, or does not let us in, is one line within seconds."""

import os
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from llm_diffusion import UserError
from llm_diffusion.training.services import check_hub, reachable, start_wandb


@pytest.fixture
def answering():
    """A server that knows nobody."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_error(401)

        do_POST = do_GET

        def log_message(self, *arguments):
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture
def silent():
    """Somebody who never answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        bound.listen()
        yield f"http://127.0.0.1:{bound.getsockname()[1]}"


def test_what_answers_is_reached(answering, silent):
    started = time.perf_counter()
    assert reachable(answering)
    assert not reachable(silent, 0.1) and not reachable("http://127.0.0.1:9") and not reachable("nowhere")
    assert time.perf_counter() - started < 3


def test_a_hub_that_is_not_there_is_one_line(monkeypatch, answering):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    for endpoint, offline in (("http://127.0.0.1:9", False), (answering, True)):
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
        with pytest.raises(UserError, match="`push_to_hub`: .* cannot be reached"):
            check_hub()


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield wandb
    wandb.teardown()
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_DIR"):
        os.environ.pop(name, None)


@pytest.mark.parametrize("key", [None, "a" * 40], ids=["no login", "no network"])
def test_without_a_login_or_a_network_it_goes_on_offline(key, wandb, answering, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9" if key else answering)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    (tmp_path / "w").mkdir()
    assert start_wandb({"wandb_log_path": str(tmp_path / "w")}, debug=True) == "wandb"
    assert os.environ["WANDB_PROJECT"] == "debug-llm-diffusion"
    assert wandb.setup().settings.mode == "offline"  # what a run reads, and not the environment alone


def test_a_wrong_key_is_one_line(wandb, answering, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", answering)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    with pytest.raises(UserError, match="`use_wandb`: "):
        start_wandb({}, debug=False)
