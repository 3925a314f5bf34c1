"""An OpenAI-compatible endpoint: `/v1/models`, `/v1/chat/completions` and `/v1/completions`.

Answers are those of `DiffusionInference`. What a request asks for and gets nothing of is refused; `top_p` and `seed` of a greedy answer,
which has no use for them, are taken.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from contextlib import aclosing, asynccontextmanager
from typing import Annotated, Any

import anyio
import uvicorn
from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from loguru import logger
from pydantic import BaseModel, BeforeValidator, Field
from starlette.exceptions import HTTPException as AnyHTTPException

from .. import UserError
from ..data.rows import Place, read_turns
from ..generation.config import DiffusionGenerationConfig, check_one_answer, check_room
from ..generation.inference import DiffusionInference
from ..generation.inputs import checked_texts
from ..models.record import layered, record_of
from ..models.special_tokens import prompt_ids
from ..objective.settings import LARGEST
from .batching import Done, Engine, Job

MAX_BODY, MAX_WAITING = 2**20, 256  # bytes of a request, and requests
# Of OpenAI's parameters: what changes no answer; and the values with which others change none, which are taken.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
NEUTRAL = {"n": 1, "best_of": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "echo": False}
NEUTRAL |= {"tools": [], "tool_choice": "none", "logit_bias": {}, "response_format": {"type": "text"}}
SAMPLING = {"temperature", "top_p", "seed"}

Words = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
Count = Annotated[int | None, Field(ge=1)]


class StreamOptions(BaseModel, extra="forbid", strict=True):
    include_usage: bool = False


class Asked(BaseModel, extra="allow", strict=True):
    """What both kinds of request have."""

    model: str | None = None
    max_tokens: Count = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, le=LARGEST)
    stop: Annotated[
        Words, BeforeValidator(lambda given: [given] if isinstance(given, str) else [] if given is None else given)
    ] = []
    stream: bool | None = False
    stream_options: StreamOptions | None = None


class AskedChat(Asked):
    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: Count = None


class AskedText(Asked):
    prompt: Annotated[
        str, BeforeValidator(lambda given: given[0] if isinstance(given, list) and len(given) == 1 else given)
    ]


def refusal(message: str, param: str | None = None, status: int = 400, code: str | None = None) -> HTTPException:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return HTTPException(status, {"message": message, "type": kind, "param": param, "code": code})


def read(inference: DiffusionInference, asked: AskedChat | AskedText, max_tokens: int) -> dict[str, Any]:
    """Tokens and settings of a `Job`.

    Raises:
        HTTPException: 400, with the field.
    """
    for name, value in asked.model_extra.items():
        neutral = NEUTRAL.get(name)
        fits = value is None or (value == neutral and isinstance(value, bool) == isinstance(neutral, bool))
        if not fits and name not in IGNORED:
            raise refusal(f"`{name}`={value!r:.80} is not supported; leave it out.", name)
    chat = isinstance(asked, AskedChat)
    longest = "max_completion_tokens" if chat and asked.max_completion_tokens else "max_tokens"
    given = {"max_new_tokens": getattr(asked, longest), **asked.model_dump(include=SAMPLING)}
    given = {name: value for name, value in given.items() if value is not None}
    if chat and asked.max_tokens and asked.max_completion_tokens:
        raise refusal("`max_tokens` and `max_completion_tokens` are one setting; give one of them.", "max_tokens")
    if asked.stream_options and not asked.stream:
        raise refusal("`stream_options` belongs to `stream`=true; leave it out.", "stream_options")
    if (found := given.get("max_new_tokens", 0)) > max_tokens:
        raise refusal(f"`{longest}`: this server gives at most {max_tokens} tokens, got {found}.", longest)
    field = "messages" if chat else "prompt"
    try:
        prompt = read_turns(asked.messages, field, Place("request")) if chat else checked_texts(asked.prompt, field)[0]
        ids = prompt_ids(inference.tokenizer, prompt)
        if not ids:
            raise UserError(f"`{field}`: there is no token in it, and the first to answer is needed.")
        field = longest
        settings = DiffusionGenerationConfig(**layered(inference.settings, given))
        settings.max_new_tokens = given["max_new_tokens"] = min(settings.max_new_tokens, max_tokens)
        settings.check_model(record_of(inference.model))
        check_room(inference.model, len(ids), settings.max_new_tokens, longest)
    except UserError as error:
        raise refusal(str(error), field) from error
    ends = settings.eos_token_id if settings.eos_early_stop else None
    return {"ids": ids, "settings": given, "ends": {ends} if isinstance(ends, int) else set(ends or ())}


class OpenAIResponse:
    """The answer to one request, whole or in pieces, in OpenAI's words."""

    def __init__(self, name: str, asked: AskedChat | AskedText, prompt_tokens: int) -> None:
        self.asked, self.chat, self.prompt_tokens = asked, isinstance(asked, AskedChat), prompt_tokens
        kind = ("chat.completion.chunk" if asked.stream else "chat.completion") if self.chat else "text_completion"
        number = f"{'chatcmpl' if self.chat else 'cmpl'}-{uuid.uuid4().hex}"
        self.common = {"id": number, "object": kind, "created": int(time.time()), "model": name}

    def _body(self, text: str | None, finish_reason: str | None = None, **message: str) -> dict[str, Any]:
        said: dict[str, Any] = {"text": text or ""}
        if self.chat:
            said = {"delta" if self.asked.stream else "message": message | ({} if text is None else {"content": text})}
        return {**self.common, "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}]}

    def _usage(self, done: Done) -> dict[str, int]:
        n, m = self.prompt_tokens, done.tokens
        return {"prompt_tokens": n, "completion_tokens": m, "total_tokens": n + m}

    async def whole(self, items: AsyncIterator[str | Done]) -> dict[str, Any]:
        *pieces, done = [item async for item in items]
        return self._body("".join(pieces), done.finish_reason, role="assistant") | {"usage": self._usage(done)}

    async def events(self, items: AsyncIterator[str | Done]) -> AsyncIterator[str]:
        """Server-sent events; an error is one of them, since the status has been sent."""
        async with aclosing(items):
            try:
                if self.chat:
                    yield _event(self._body("", role="assistant"))
                async for item in items:
                    yield _event(self._body(item) if isinstance(item, str) else self._body(None, item.finish_reason))
                if self.asked.stream_options and self.asked.stream_options.include_usage:
                    yield _event({**self.common, "choices": [], "usage": self._usage(item)})
                yield "data: [DONE]\n\n"
            except Exception as error:
                yield _event({"error": _fault(error).detail})


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


def _fault(error: Exception) -> HTTPException:
    """What a client is told of an error in decoding."""
    return refusal(str(error) if isinstance(error, UserError) else "a fault of the server; see its log", status=500)


async def _unless_gone(request: Request, work: Coroutine) -> Any:
    """What `work` returns. When the client hangs up it is cancelled."""
    work, hangup = asyncio.ensure_future(work), asyncio.ensure_future(request.receive())
    try:
        await asyncio.wait({work, hangup}, return_when=asyncio.FIRST_COMPLETED)
        return work.result() if work.done() else Response(status_code=499)
    finally:
        work.cancel()
        hangup.cancel()


class BodyLimit:
    """Stops reading a request that is too long, whatever its headers say."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        size = 0

        async def counted() -> Any:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY:
                raise refusal(f"the body has more than {MAX_BODY} bytes", status=413)
            return message

        await self.app(scope, counted, send)


class Endpoint:
    """Requests of both kinds, answered by one model."""

    def __init__(self, inference: DiffusionInference, name: str, batch_size: int, max_tokens: int) -> None:
        self.inference, self.name, self.max_tokens = inference, name, max_tokens
        self.engine, self.one_at_a_time, self.reading = Engine(inference, batch_size), anyio.CapacityLimiter(1), 0

    def _decode(self, ids: list[int]) -> str:
        return self.inference.tokenizer.decode(ids, skip_special_tokens=True)

    async def answer(self, request: Request, asked: AskedChat | AskedText) -> Any:
        if asked.model not in (None, self.name):
            why = f"`model`: {asked.model!r:.80} is not here; {self.name!r} is."
            raise refusal(why, "model", 404, "model_not_found")
        if self.reading + len(self.engine.waiting) >= MAX_WAITING:
            raise refusal(f"{MAX_WAITING} requests are waiting; try again later", status=429)
        self.reading += 1
        try:  # off the event loop: a long prompt takes its time
            given = (read, self.inference, asked, self.max_tokens)
            found = await anyio.to_thread.run_sync(*given, limiter=self.one_at_a_time)
        finally:
            self.reading -= 1
        job = Job(**found, stop=asked.stop, decode=self._decode, loop=asyncio.get_running_loop())
        response, items = OpenAIResponse(self.name, asked, len(job.ids)), self.engine.answer(job)
        if asked.stream:
            return StreamingResponse(response.events(items), media_type="text/event-stream")
        try:
            return await _unless_gone(request, response.whole(items))
        except Exception as error:
            raise _fault(error) from error


def build_app(inference: DiffusionInference, name: str, batch_size: int = 32, max_tokens: int = 1024) -> FastAPI:
    """The endpoint of a converted model.

    Args:
        name: of the model, as clients know it.
        batch_size: most requests decoded at once.
        max_tokens: most tokens of an answer.

    Raises:
        UserError: settings that give a request several answers.
    """
    check_one_answer(inference.settings)
    endpoint, started = Endpoint(inference, name, batch_size, max_tokens), int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(endpoint.engine.run())
        yield
        running.cancel()
        await asyncio.wait({running})

    app = FastAPI(title="llm-diffusion", lifespan=lifespan)
    app.state.engine = endpoint.engine
    app.add_middleware(BodyLimit)

    @app.exception_handler(AnyHTTPException)
    async def refused(request: Request, error: AnyHTTPException) -> JSONResponse:
        detail = (
            error.detail if isinstance(error.detail, dict) else refusal(error.detail, None, error.status_code).detail
        )
        return JSONResponse({"error": detail}, error.status_code, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        found = error.errors()[0]
        param = None if found["type"] == "json_invalid" else ".".join(map(str, found["loc"][1:])) or None
        why = f"`{param or 'body'}`: {found['msg']}, got {found['input']!r:.80}."
        return await refused(request, refusal(why, param))

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        model = {"id": name, "object": "model", "created": started, "owned_by": "llm-diffusion"}
        return {"object": "list", "data": [model]}

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, asked: AskedChat) -> Any:
        return await endpoint.answer(request, asked)

    @app.post("/v1/completions")
    async def completions(request: Request, asked: AskedText) -> Any:
        return await endpoint.answer(request, asked)

    return app


def listen(host: str, port: int) -> socket.socket:
    """A socket of the server's, port 0 for any that is free. Raises UserError where there is none to be had."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise UserError(
            f"`--host` and `--port`: cannot listen on {host}:{port} ({error.strerror or error})."
        ) from error


def serve(app: FastAPI, listening: socket.socket) -> None:
    """Answers until the process is told to stop; what is being decoded then has five seconds."""
    host, port = listening.getsockname()[:2]
    logger.info("http://{}:{}/v1 answers; stop with Ctrl-C", f"[{host}]" if ":" in host else host, port)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    uvicorn.Server(config).run(sockets=[listening])
