"""A language model behind an OpenAI-style URL as the judge of worked answers: right or wrong, and the first wrong step.

    judge = LLMJudge("http://localhost:8000/v1", "some-model")
    judge(question, answer, reference)          # {"right": False, "first_wrong_step": 1}

It reads what re-evaluating equations leaves unjudged, and is sometimes wrong itself: the report shows how often both agree.
References: judging with a model, the reference answer given: Zheng et al. 2023 (arXiv 2306.05685), section 3.4.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import time
import urllib.error
import urllib.request
from typing import Any

from .. import UserError
from .worked_answers import step_spans

INSTRUCTIONS = """You check a worked answer to a question. Its steps are numbered. A right solution is given for comparison; \
another way to the same result is right too.
Reply with one JSON object and nothing else: {"right": true or false, "first_wrong_step": a step number or null}.
"right" says whether the final result is right, "first_wrong_step" is the first step with a mistake in reasoning or arithmetic."""
TRIES = 4
AGAIN = {408, 409, 429, 500, 502, 503, 504}  # statuses that may pass


class LLMJudge:
    """One label an answer, at temperature 0.

    Args:
        url: of the API, up to `/v1` or to `/chat/completions`.
        model: its name there.
        key: sent as a bearer token; default: the environment's OPENAI_API_KEY, or none.
        timeout: seconds to wait for one reply.
        pause: seconds before the second try; doubled before each further one.
    """

    def __init__(self, url: str, model: str, *, key: str | None = None, timeout: float = 120, pause: float = 1) -> None:
        if not re.match(r"https?://[^/\s]+", url):
            raise UserError(f"`judge`: {url!r} is no URL; give one such as 'http://localhost:8000/v1'.")
        if not model:
            raise UserError("`judge_model` is needed with `judge`: the name of the model there.")
        self.url = url.rstrip("/").removesuffix("/chat/completions") + "/chat/completions"
        self.model, self.timeout, self.pause = model, timeout, pause
        self.key = os.environ.get("OPENAI_API_KEY") if key is None else key

    def __call__(self, question: str, answer: str, reference: str) -> dict[str, Any]:
        """`right` and `first_wrong_step`, counted from 0, None where every step is right.

        Raises:
            ConnectionError: no reply, or none that is a label, after some tries.
        """
        steps = [f"{i}. {answer[a:b].strip()}" for i, (a, b) in enumerate(step_spans(answer), start=1)]
        task = "\n".join([f"Question:\n{question}\n\nRight solution:\n{reference}\n\nAnswer to check:", *steps])
        messages = [{"role": "system", "content": INSTRUCTIONS}, {"role": "user", "content": task}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "seed": 0}
        for attempt in range(TRIES):
            time.sleep(self.pause * 2 ** (attempt - 1) if attempt else 0)
            try:
                return _label(self._post(body), max(1, len(steps)))
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(error) or type(error).__name__
                if isinstance(error, urllib.error.HTTPError) and error.code not in AGAIN:
                    break
        raise ConnectionError(f"`judge`: no label from {self.model!r} at {self.url}, try {attempt + 1}: {reason}.")

    def _post(self, body: dict[str, Any]) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            reply = response.read().decode()
        try:
            return json.loads(reply)["choices"][0]["message"]["content"] or ""
        except (ValueError, LookupError, TypeError) as error:
            raise ValueError(f"the reply is no chat completion: {reply[:80]!r}") from error


def _label(reply: str, n_steps: int) -> dict[str, Any]:
    """The last JSON object of a reply, which may stand in a fence or behind the judge's own reasoning."""
    for found in reversed(re.findall(r"\{[^{}]*\}", reply)):
        try:
            label = json.loads(found)
        except ValueError:
            continue
        right, step = label.get("right"), label.get("first_wrong_step")
        if isinstance(right, bool) and (step is None or type(step) is int and 1 <= step <= n_steps):
            return {"right": right, "first_wrong_step": None if step is None else step - 1}
    raise ValueError(f"the reply holds no label: {reply[:80]!r}")
