"""Mappings of settings as people write them: inline JSON, JSON files with comments, YAML files; or one line that says what is wrong."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from os.path import isfile
from typing import Any

import yaml

from .. import UserError
from ..objective.settings import read_path

NO_TEXT = re.compile("[\0\ud800-\udfff]")  # what no file can hold as UTF-8, or as its name
DEEPEST = 20  # a list or mapping within another


def read_mapping(source: str, what: str) -> dict[str, Any]:
    """A mapping from inline JSON or from a JSON or YAML file; JSON may have `//` comments.

    Raises:
        UserError, FileNotFoundError: malformed, saying where; holds what no setting is; not there.
    """
    text, name = source, "the inline JSON"
    if not strip_comments(source).lstrip().startswith("{"):
        if not isfile(path := read_path(what, source)):
            raise FileNotFoundError(f"`{what}`: {source!r:.200} is neither inline JSON nor an existing file.")
        text, name = path.read_bytes().decode("utf-8-sig", "surrogateescape"), str(path)
    bare = strip_comments(text)
    try:
        is_json = bare.lstrip().startswith("{")
        loaded = json.loads(bare, object_pairs_hook=_once) if is_json else yaml.load(text, YAMLLoader)
    except Exception as error:  # the parsers raise half a dozen types
        raise UserError(f"`{what}`: {name} is malformed: {' '.join(str(error).split())}.") from error
    if not isinstance(loaded, dict | None):
        raise UserError(f"`{what}`: {name} must hold a mapping of settings, found {type(loaded).__name__}.")
    _check_tree(loaded or {}, what)
    return loaded or {}


def strip_comments(text: str) -> str:
    """JSON without `// …`, which become blanks, so that errors still name the right column; strings stay as they are."""
    strings_and_comments = r'"(?:\\.|[^"\\\n])*"|//[^\n]*'
    return re.sub(strings_and_comments, lambda found: found[0] if found[0][0] == '"' else " " * len(found[0]), text)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, whose later keys would silently win over earlier ones."""
    if twice := [key for key, n in Counter(key for key, _ in pairs).items() if n > 1]:
        raise ValueError(f"the key {twice[0]!r} is there twice")
    return dict(pairs)


class YAMLLoader(yaml.SafeLoader):
    """As JSON has it: keys are there once and are text, and 2e-4 is a number, which YAML 1.1 takes for text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[str, Any]:
        _once([(key.value, None) for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        read = super().construct_mapping(node, deep)
        return {str(key) if type(key) is int else key: value for key, value in read.items()}


YAMLLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def _check_tree(value: Any, name: str, depth: int = 0) -> None:
    """Whatever a setting is, its keys are text, its numbers finite, its text can be written down, and it has an end."""
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"`{name}` must be a finite number, got {value}.")
    if isinstance(value, str) and NO_TEXT.search(value):
        raise UserError(f"`{name}` holds what is no letter, got {value!r:.80}.")
    if not isinstance(value, dict | list | str | int | float | None):
        raise UserError(f"`{name}` must be text, a number, a list or a mapping, got {value!r:.80}; quote it.")
    if depth > DEEPEST:
        raise UserError(f"`{name}` is nested more than {DEEPEST} times.")
    for place, inner in enumerate(value) if isinstance(value, list) else ():
        _check_tree(inner, f"{name}[{place}]", depth + 1)
    for key, inner in value.items() if isinstance(value, dict) else ():
        if not isinstance(key, str) or not key.isprintable():
            raise UserError(f"`{name}`: keys must be text, got {key!r:.80}; quote it.")
        _check_tree(inner, f"{name}.{key}" if depth else key, depth + 1)
