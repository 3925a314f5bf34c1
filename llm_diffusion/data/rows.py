"""Rows as people keep them, in the one shape of their kind; or one line that says which row and column cannot be read, and why.

    a row                                    read as
    `messages`, `conversations`              a conversation: ShareGPT's keys and names too, contents of text parts joined
    `prompt` and `completion`                both text or both turns
    `text`                                   a text
    `input_ids`                              tokens, with their `labels` or masks
    `chosen` and `rejected`                  a pair, with a `prompt` of its own or as their common beginning

What Arrow adds, a null in place of every key that other rows have, is taken away.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .. import UserError
from ..models.special_tokens import shared_length
from ..objective.modes import IGNORE_INDEX

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
_NAMES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"} | {
    "observation": "tool"
}
MEDIA = ("image", "images", "audio", "audios", "video", "videos")
CONVERSATIONS = ("messages", "conversations")
LONGEST = 10_000_000  # characters; tokenizers take hundreds of bytes of memory for each, and end the process when there is none left
MIXED = "mixed_row"  # the one column of a mixture: rows of its sources as JSON, because their columns differ
SHAPES = "`messages`, `prompt` with `completion`, `text` or `input_ids` (`llm-diffusion prepare-data`)"


@dataclass(frozen=True)
class Place:
    """Where a row is from: the name of its dataset as the user knows it, its number there, and which of several splits that is."""

    field: str
    row: int | None = None
    split: str = ""

    def error(self, column: str, found: str, wanted: str) -> UserError:
        of_row = "" if self.row is None else f" of row {self.row}{self.split and f' of split `{self.split}`'}"
        return UserError(f"`{self.field}`: `{column}`{of_row} {found}; {wanted}.")


def form_of(columns: Any, text_field: str = "text") -> str | None:
    """Which columns a row is read from, by the names it has: of several forms the first of this order; None: of none."""
    columns = set(columns)
    for name in (MIXED, "input_ids", *CONVERSATIONS):
        if name in columns:
            return name
    if {"prompt", "completion"} <= columns:
        return "completion"
    return text_field if text_field in columns else None


def source_row(example: dict[str, Any]) -> dict[str, Any]:
    """A row as its source has it, whether or not it came in a mixture."""
    return json.loads(example[MIXED]) if isinstance(example, Mapping) and MIXED in example else example


def read_row(example: dict[str, Any], form: str, place: Place) -> dict[str, Any]:
    """A row in the shape of its form: `messages`, `prompt` and `completion`, `text`, or `input_ids` with `labels`; and what its
    template reads, under `template`.

    Raises:
        UserError: what is there cannot be read, or is no text.
    """
    _refuse_media(example, place)
    if form == "input_ids":
        return _tokens(example, place)
    if form in CONVERSATIONS:
        row: dict[str, Any] = {"messages": read_turns(example.get(form), form, place)}
    elif form == "completion":
        row = {name: _side(example.get(name), name, place) for name in ("prompt", "completion")}
        if isinstance(row["prompt"], str) != isinstance(row["completion"], str):
            raise place.error("completion", "is of another kind than `prompt`", "both must be text, or both turns")
        _check_last(row["completion"], "completion", place)
    else:
        if not isinstance(example.get(form), str):
            raise place.error(form, f"is {_kind(example.get(form))}", "a text is needed")
        row = {"text": _short(example[form], form, place)}
    return row | {"template": template_of(example, place)}


def _refuse_media(example: dict[str, Any], place: Place) -> None:
    for name in MEDIA:
        if example.get(name) not in (None, []):
            raise place.error(name, f"holds {name}", "these models read text alone; leave the row out")


def template_of(example: dict[str, Any], place: Place) -> dict[str, Any]:
    """Keywords for the chat template that a row brings: its `tools` and `chat_template_kwargs`."""
    tools = _parsed(example.get("tools"))
    if isinstance(tools, list):
        tools = [_parsed(tool) for tool in tools]
    if tools and not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise place.error("tools", f"is {_kind(tools)}", "a list of functions is needed, or one as JSON")
    options = example.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise place.error("chat_template_kwargs", f"is {_kind(options)}", "a mapping is needed")
    return without_nulls(options) | ({"tools": without_nulls(tools)} if tools else {})


def _side(value: Any, column: str, place: Place) -> str | list[dict]:
    return _short(value, column, place) if isinstance(value, str) else read_turns(value, column, place)


def _short(text: str, column: str, place: Place) -> str:
    if len(text) > LONGEST:
        raise place.error(column, f"has {len(text):,} characters", f"split it; {LONGEST:,} can be read at once")
    return text


def read_turns(turns: Any, column: str, place: Place) -> list[dict]:
    """Messages with known roles and text for content.

    Raises:
        UserError: no list of turns, an unknown role, or content that is no text.
    """
    if isinstance(turns, dict):
        turns = [turns]
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise place.error(column, f"is {_kind(turns)}", "turns with `role` and `content` are needed")
    return [_read_turn(without_nulls(turn), column, place) for turn in turns]


def _read_turn(turn: dict[str, Any], column: str, place: Place) -> dict[str, Any]:
    if "role" not in turn and "from" in turn:  # ShareGPT, as TRL renames it
        turn = {"role": turn.pop("from"), "content": turn.pop("value", None)} | turn
    if "role" not in turn:
        raise place.error(column, f"has a turn with the keys {sorted(turn)}", "`role` and `content` are needed")
    role = turn["role"] if isinstance(turn["role"], str) else None
    if (role := _NAMES.get(role, role)) not in ROLES:
        raise place.error(column, f"has a turn of the role {turn['role']!r:.40}", f"the roles are {', '.join(ROLES)}")
    calls = turn.pop("tool_calls", None) or []
    if not isinstance(calls, list) or not all(isinstance(_inner(call), dict) for call in calls):
        raise place.error(column, f"has `tool_calls` that are {_kind(calls)}", "a list of calls is needed")
    calls = [_read_call(call) for call in calls]
    content = _read_content(turn.get("content"), column, place)
    if content is None and not calls and role != "tool":  # a tool may give nothing back
        raise place.error(column, f"has a turn of the role {role!r} without content", "a text is needed")
    return turn | {"role": role, "content": content or ""} | ({"tool_calls": calls} if calls else {})


def _inner(call: Any) -> Any:
    return call.get("function", call) if isinstance(call, dict) else None


def _read_call(call: dict[str, Any]) -> dict[str, Any]:
    """Arguments as JSON are what OpenAI's servers give; templates would quote them again."""
    inner = _inner(call)
    if "arguments" in inner:
        inner = {**inner, "arguments": _parsed(inner["arguments"])}
    return {**call, "function": inner} if "function" in call else inner


def _read_content(content: Any, column: str, place: Place) -> str | None:
    """The text of a content, of its parts if it has some."""
    if content is None or isinstance(content, str):
        return content and _short(content, column, place)
    if not isinstance(content, list):
        raise place.error(column, f"has a content that is {_kind(content)}", "a text is needed, or text parts")
    texts = []
    for part in content:
        if isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str):
            part = part["text"]
        if not isinstance(part, str):
            kind = part.get("type") if isinstance(part, dict) else type(part).__name__
            raise place.error(column, f"has a content part of the type {kind!r}", "these models read text alone")
        texts.append(part)
    return _short("".join(texts), column, place)


def _tokens(example: dict[str, Any], place: Place) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name in ("input_ids", "labels", "completion_mask", "assistant_masks", "attention_mask"):
        if name not in example:
            continue
        is_mask = "mask" in name
        try:
            row[name] = [operator.index(value) for value in example[name]]
            if not is_mask and isinstance(next(iter(example[name]), None), bool):
                raise TypeError
        except (TypeError, ValueError):
            wanted = "a list of whole numbers is needed, one a token"
            raise place.error(name, f"is {_kind(example[name])}", wanted) from None
        if not row[name] or len(row[name]) != len(row["input_ids"]):
            found = f"has {len(row[name])} values beside {len(row['input_ids'])} tokens"
            raise place.error(name, found, "one a token is needed, and at least one")
        known = {0, 1} if is_mask else {IGNORE_INDEX} if name == "labels" else set()
        for value in set(row[name]) - known:
            if is_mask or value < 0:
                wanted = "tokens are 0 or more, labels tokens or -100, masks 0 and 1"
                raise place.error(name, f"has the value {value}", wanted)
    if 0 in row.get("attention_mask", ()):
        raise place.error("attention_mask", "hides tokens", "rows are needed as they are without padding")
    return row


# -- prompts and answers


def split_row(row: dict[str, Any], form: str, place: Place) -> tuple[str | list[dict], str | list[dict]]:
    """The prompt of a row that was read, and its answer; of a conversation all turns but the last, and the last one.

    Raises:
        UserError: there is no answer, or it says nothing.
    """
    if "messages" not in row:
        prompt, answer = row["prompt"], row["completion"]
    else:
        *prompt, last = row["messages"]
        if not any(turn["role"] == "assistant" for turn in row["messages"]):
            raise place.error(form, "has no assistant turn", "a prompt and an answer to it are needed")
        _check_last([last], form, place)
        if not prompt:
            raise place.error(form, "has an answer without a prompt", "turns before it are needed")
        answer = [last]
    if not says_something(answer):
        raise place.error(form, "has an empty answer", "an answer is needed to learn from; leave the row out")
    return prompt, answer


def _check_last(answer: str | list[dict], column: str, place: Place) -> None:
    if isinstance(answer, list) and answer[-1]["role"] != "assistant":
        found = f"ends with a turn of the role {answer[-1]['role']!r}"
        raise place.error(column, found, "it must end with an assistant's")


def says_something(answer: str | list[dict]) -> bool:
    """Whether there is a text, or a tool is called."""
    if isinstance(answer, str):
        return bool(answer.strip())
    return bool(answer) and bool(answer[-1]["content"].strip() or answer[-1].get("tool_calls"))


def prompt_and_answer(
    example: dict[str, Any], place: Place
) -> tuple[str | list[dict], str | list[dict], dict[str, Any]]:
    """The prompt of a row of any form but tokens, its answer, and the keywords of its template; of a text the two halves."""
    form = form_of(name for name, value in example.items() if value is not None)
    if form in (None, "input_ids"):
        wanted = f"one of {SHAPES.replace(' or `input_ids`', '')} is needed" if form is None else "text is needed"
        raise UserError(f"`{place.field}`: row {place.row} has the columns {sorted(example)}; {wanted}.")
    row = read_row(example, form, place)
    if "text" in row:
        half = len(row["text"]) // 2
        return row["text"][:half], row["text"][half:], {}
    prompt, answer = split_row(row, form, place) if "messages" in row else (row["prompt"], row["completion"])
    return prompt, answer, row["template"]


def read_pair(example: dict[str, Any], place: Place) -> dict[str, Any]:
    """`prompt`, `chosen`, `rejected`, all text or all turns, and `template`.

    Raises:
        UserError: an answer is missing or empty, or both are the same.
    """
    _refuse_media(example, place)
    chosen, rejected = (_pair_side(example.get(name), name, place) for name in ("chosen", "rejected"))
    if chosen == rejected:
        where = "" if place.row is None else f" of row {place.row}"
        raise UserError(
            f"`{place.field}`: `chosen` and `rejected`{where} are the same; leave the pair out, it prefers nothing."
        )
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise place.error("rejected", "is of another kind than `chosen`", "both must be text, or both turns")
    prompt = example.get("prompt")
    if isinstance(prompt, str) and isinstance(chosen, list) and chosen[0]["role"] != "assistant":
        prompt = None  # beside whole conversations some datasets keep the question's text
    if prompt is None:
        prompt, chosen, rejected = _common_prompt(chosen, rejected)
    else:
        prompt = [] if prompt == [] else _side(prompt, "prompt", place)
        if isinstance(prompt, str) != isinstance(chosen, str):
            raise place.error("prompt", "is of another kind than its answers", "all must be text, or all turns")
        if isinstance(prompt, list) and chosen[: len(prompt)] == prompt == rejected[: len(prompt)]:
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "template": template_of(example, place)}


def _pair_side(value: Any, column: str, place: Place) -> str | list[dict]:
    side = value if value is None or value == [] else _side(value, column, place)
    if not side or not says_something(side):
        raise place.error(column, "is empty", "an answer is needed to compare")
    _check_last(side, column, place)
    return side


def _common_prompt(chosen: Any, rejected: Any) -> tuple[Any, Any, Any]:
    """What two answers begin with, text or turns, and what is left of each, which is not nothing."""
    n = min(shared_length(chosen, rejected), len(chosen) - 1, len(rejected) - 1)
    if isinstance(chosen, str) and n and chosen[n - 1] == " ":
        n -= 1  # a blank belongs to the word behind it
    return chosen[:n], chosen[n:], rejected[n:]


# -- values


def without_nulls(value: Any) -> Any:
    """The value without the keys of dicts that hold nothing, at any depth."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _parsed(value: Any) -> Any:
    """What a string of JSON holds, if it is an object or a list; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        parsed = json.loads(value)
    except ValueError:
        return value
    return parsed if isinstance(parsed, dict | list) else value


def _kind(value: Any) -> str:
    if value is None:
        return "null"
    if value == [] or value == "":
        return "empty"
    return f"{value!r:.40}, a {type(value).__name__}"
