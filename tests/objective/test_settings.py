"""Declared settings: every bound of every declaration holds, and messages name the field."""

import dataclasses
import enum
import typing
from pathlib import Path

import numpy as np
import pytest

from llm_diffusion import UserError
from llm_diffusion.models.record import ConversionSettings
from llm_diffusion.objective.annealing import AnnealingSettings
from llm_diffusion.objective.forward_process import NoiseSettings
from llm_diffusion.objective.settings import (
    SEEDS,
    allowed,
    check_settings,
    check_value,
    merge,
    read_path,
    read_setting,
    read_value,
    redacted,
    setting,
    settings_table,
    user_settings,
)

DECLARED = [
    (kind, field)
    for kind in (NoiseSettings, AnnealingSettings, ConversionSettings)
    for field in dataclasses.fields(kind)
]


@dataclasses.dataclass
class Everything:
    share: float = setting(0.5, "A share.", min=0, max=1)
    rate: float = setting(0.5, "A rate.", above=0, below=1)
    steps: int | None = setting(None, "Steps.", min=1)
    kind: str = setting("a", "A kind.", choices=("a", "b"))
    names: list = setting(["x"], "Free.")


@pytest.mark.parametrize(
    ("values", "wrong"),
    [
        ({}, None),
        ({"share": 0, "rate": 0.1, "steps": 1, "kind": "b"}, None),
        ({"share": 1.0, "steps": None}, None),
        ({"share": 1.01}, "share"),
        ({"share": None}, "share"),
        ({"share": "0.5"}, "share"),
        ({"share": True}, "share"),
        ({"share": float("nan")}, "share"),
        ({"rate": 0}, "rate"),
        ({"rate": 1}, "rate"),
        ({"steps": 0}, "steps"),
        ({"steps": 1.5}, "steps"),
        ({"kind": "c"}, "kind"),
        ({"kind": None}, "kind"),
    ],
)
def test_values_are_held_against_their_declaration(values, wrong):
    settings = Everything(**values)
    if wrong is None:
        check_settings(settings)
        return
    with pytest.raises(UserError, match=f"`{wrong}`"):
        check_settings(settings)


def test_what_is_allowed_is_said_in_words():
    fields, hints = {f.name: f for f in dataclasses.fields(Everything)}, typing.get_type_hints(Everything)
    words = {name: allowed(hints[name], fields[name].metadata) for name in ("share", "rate", "steps", "kind")}
    assert words == {
        "share": "a number in [0, 1]",
        "rate": "a number in (0, 1)",
        "steps": "a whole number, at least 1, or None",
        "kind": "one of ('a', 'b')",
    }
    assert Everything().names is not Everything().names


@pytest.mark.parametrize(("kind", "field"), DECLARED, ids=lambda x: getattr(x, "name", getattr(x, "__name__", None)))
def test_every_setting_has_help_a_default_that_is_allowed_and_bounds_that_hold(kind, field):
    assert field.metadata["help"].strip()
    check_settings(kind())
    beyond = {"choices": object(), "min": -1e9, "max": 1e9, "above": -1e9, "below": 1e9}
    for bound in set(beyond) & set(field.metadata):
        settings = kind()
        setattr(settings, field.name, beyond[bound])
        with pytest.raises(UserError, match=f"`{field.name}`"):
            check_settings(settings)


def test_what_is_shown_has_no_secrets():
    shown = redacted(
        {
            "hub_token": "a",
            "model_init_kwargs": {"token": "b", "revision": "c"},
            "stages": [{"hub_token": "d"}],
            "eos_token": "</s>",
        }
    )
    assert shown == {
        "hub_token": None,
        "model_init_kwargs": {"token": None, "revision": "c"},
        "stages": [{"hub_token": None}],
        "eos_token": "</s>",
    }
    text = "GET http://me:pass@host:80/v1?a=b@c failed with hf_ABCDEFGHIJKLMNOPQRSTUVWX, hf_transfer is off; a@b"
    assert redacted(text) == "GET http://***@host:80/v1?a=b@c failed with ***, hf_transfer is off; a@b"


@pytest.mark.parametrize(("error", "said"), [(ValueError("no\n  good"), "no good"), (KeyError(), "KeyError")])
def test_what_a_library_refuses_is_one_line(error, said):
    with pytest.raises(UserError, match=f"^`here`: {said}$"), user_settings("`here`"):
        raise error


class Colour(enum.Enum):
    RED = "red"
    BLUE = "blue"


# (value, hint, bounds, default, right)
CHECKED = [
    (2**31 - 1, int, {}, ..., True),
    (2**31, int, {}, ..., False),  # more than 32 bits
    (-(2**40), int, {}, ..., True),
    (2**31, int, {"max": 2**40}, ..., True),
    (2**31, int, {"below": 2**40}, ..., True),
    (2**40, int, {"below": 2**40}, ..., False),
    (2**31, int, {"min": 0}, ..., False),
    (2**32 - 1, int, SEEDS, ..., True),
    (2**32, int, SEEDS, ..., False),
    (1e300, float, {}, ..., True),
    (float("inf"), float, {}, ..., False),
    (float("-inf"), float, {"max": 1}, ..., False),
    (1, float, {"min": 0}, ..., True),
    (1.0, int, {"min": 0}, ..., False),
    (1.0, int | None, {"min": 0}, ..., False),
    (1.0, int | float, {"min": 0}, ..., True),
    (1.0, typing.Any, {"min": 0}, ..., True),
    (True, int, {"min": 0}, ..., False),
    (True, bool, {}, ..., True),
    ("x", str, {}, ..., True),
    ("x", int, {"min": 0}, ..., False),
    ("x", str, {"help": "Free."}, ..., True),
    (0.5, float, {"min": 0, "whole": True}, ..., True),
    (1.5, float, {"min": 0, "whole": True}, ..., False),
    (1.0, float, {"min": 0, "whole": True}, ..., True),
    (7.0, float, {"min": 0, "whole": True}, ..., True),
    (2.0**31, float, {"min": 0, "whole": True}, ..., False),
    (1.5, float, {"min": 0, "whole": False}, ..., True),
    (None, int | None, {"min": 1}, ..., True),
    (None, typing.Optional[int], {"min": 1}, ..., True),  # noqa: UP045
    (None, int, {"min": 1}, ..., False),
    (-1, int, {"min": 1}, -1, True),  # a default is right
    (-1.0, int, {"min": 1}, -1, False),  # of its own type
    (-2, int, {"min": 1}, -1, False),
    ([1, 2], list[int], {"min": 1}, ..., True),
    ([1, 0], list[int], {"min": 1}, ..., False),
    ([], list[int], {"min": 1}, ..., True),
    (["a"], list[str], {"choices": ("a", "b")}, ..., True),
    (["c"], list[str], {"choices": ("a", "b")}, ..., False),
    ("red", Colour, {}, ..., True),
    ("green", Colour, {}, ..., False),
    ("green", Colour | str, {"choices": ("green",)}, ..., True),
    (Colour.RED, Colour, {}, ..., True),
]


@pytest.mark.parametrize(("value", "hint", "bounds", "default", "right"), CHECKED)
def test_values_by_hint_and_bounds(value, hint, bounds, default, right):
    if right:
        check_value("x", value, hint, bounds, default)
        return
    with pytest.raises(UserError, match=r"^`x(\[1\]|\[0\])?` must be .*, got "):
        check_value("x", value, hint, bounds, default)


def test_the_wrong_element_of_a_list_is_named():
    with pytest.raises(UserError, match=r"^`x\[1\]` must be a number, at least 1, got 0\.$"):
        check_value("x", [1, 0], float, {"min": 1})


def test_a_long_value_is_cut():
    with pytest.raises(UserError) as caught:
        check_value("x", "y" * 500, int, {"min": 1})
    assert len(str(caught.value)) < 150


def test_seeds_are_those_of_numpy():
    np.random.RandomState(SEEDS["max"])
    with pytest.raises(ValueError):
        np.random.RandomState(SEEDS["max"] + 1)


def test_other_libraries_settings_inherit_bounds():
    declared = dataclasses.make_dataclass("Foreign", [("rate", float, 0.5), ("steps", int, 1)])
    check_settings(declared(rate=9.0))
    check_settings(declared(rate=0.9), inherited={"rate": {"max": 1}})
    with pytest.raises(UserError, match="^`rate` must be a number, at most 1, got 9.0.$"):
        check_settings(declared(rate=9.0), inherited={"rate": {"max": 1}})
    with pytest.raises(UserError, match="`share`"):  # of the declared class alone
        check_settings(Everything(share=2, names=[]), Everything)


@pytest.mark.parametrize(
    ("hint", "bounds", "words"),
    [
        (bool, {}, "true or false"),
        (int | str | None, {}, "a whole number or text or None"),
        (list[int] | tuple, {}, "a list"),
        (Colour, {}, "Colour"),
        (float, {"min": 0, "below": 1}, "a number in [0, 1)"),
        (float, {"above": 0, "max": 1}, "a number in (0, 1]"),
        (float, {"above": 0}, "a number above 0"),
        (float | None, {"max": 1}, "a number, at most 1, or None"),
        (int, {"below": 1}, "a whole number below 1"),
        (int | float, {"min": 0}, "a number, at least 0"),
        (float, {"min": 0, "whole": True}, "a number, at least 0, whole from 1 on"),
        (float | None, {"above": 0, "whole": True}, "a number above 0, whole from 1 on, or None"),
        (str | None, {"choices": ("a", "b")}, "one of ('a', 'b'), or None"),
    ],
)
def test_words_for_what_is_allowed(hint, bounds, words):
    assert allowed(hint, bounds) == words


@pytest.mark.parametrize(
    ("value", "hint", "want"),
    [
        (1, int, 1),
        (True, bool, True),
        (None, int | None, None),
        (1, float, 1.0),
        ("1e-3", float, 1e-3),
        ("1e-3", float | None, 1e-3),
        ("1e-3", str | float, "1e-3"),
        (3, int | float, 3),
        ([1, "2"], list[float], [1.0, 2.0]),
        ([[1, 2.5]], list[list[float]] | None, [[1.0, 2.5]]),
        ([1, "a"], list, [1, "a"]),
        ([1], list[int] | list[str], [1]),
        ("auto", typing.Literal["auto", 1] | None, "auto"),
        ("auto", typing.Literal["auto"] | int, "auto"),
        ({"a": 1}, dict, {"a": 1}),
        (object, typing.Any, object),
        ("red", Colour, "red"),
        ("red", Colour | None, "red"),
    ],
)
def test_values_are_read_by_their_type(value, hint, want):
    found = read_value("x", value, hint)
    assert found == want and type(found) is type(want)


@pytest.mark.parametrize(
    ("value", "hint", "words"),
    [
        (True, int, "a whole number, got True (bool)"),
        (True, float, "a number, got True (bool)"),
        (1, bool, "true or false, got 1 (int)"),
        ("1", int, "a whole number, got '1' (str)"),
        ("x", float, "a number, got 'x' (str)"),
        (10**400, float, f"a number, got {'1' + 79 * '0'} (int)"),
        (1.0, int, "a whole number, got 1.0 (float)"),
        (None, int, "a whole number, got None (NoneType)"),
        ("x", list[int], "a list, got 'x' (str)"),
        ("no", typing.Literal["auto"] | int, "Literal or a whole number, got 'no' (str)"),
        ([1], dict | None, "a mapping or None, got [1] (list)"),
    ],
)
def test_other_types_are_refused(value, hint, words):
    with pytest.raises(UserError) as caught:
        read_value("x", value, hint)
    assert str(caught.value) == f"`x` must be {words}."


def test_elements_and_bounds_of_what_is_read():
    with pytest.raises(UserError, match=r"^`x\[0\]\[1\]` must be a number"):
        read_value("x", [[1, "y"]], list[list[float]])
    assert read_setting("x", "0.5", float, {"max": 1}) == 0.5
    assert read_setting("x", 7, int, {"max": 1}, 7) == 7
    with pytest.raises(UserError, match="at most 1"):
        read_setting("x", "2", float, {"max": 1})


@pytest.mark.parametrize("text", ["", " ", "\n", "a\0b"])
def test_what_is_no_path_is_refused(text):
    with pytest.raises(UserError, match="^`here` must be a path"):
        read_path("here", text)


def test_paths_know_their_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_path("here", "~/a b") == tmp_path / "a b"
    assert read_path("here", Path("x")) == Path("x")
    with pytest.raises(UserError, match="there is no home of '~nobody-of-this-name'"):
        read_path("here", "~nobody-of-this-name/a")


def test_nested_mappings_are_merged():
    low = {"a": 1, "b": {"c": 2, "d": {"e": 3}}, "f": {"g": 4}, "h": 5}
    high = {"a": 9, "b": {"d": {"i": 6}}, "f": 7, "h": {"j": 8}}
    assert merge(low, high) == {"a": 9, "b": {"c": 2, "d": {"e": 3, "i": 6}}, "f": 7, "h": {"j": 8}}
    assert low["b"]["d"] == {"e": 3}  # nothing is changed in place


def test_the_table_of_settings_has_a_row_for_each_of_its_own():
    @dataclasses.dataclass
    class Child(Everything):
        depth: int | None = setting(None, "How a|b deep.", max=3)
        plain: int = 0

    table = settings_table(Child).splitlines()
    assert table[0].count("|") == table[1].count("|") == 5
    assert table[2:] == ["| `depth` | `None` | a whole number, at most 3, or None | How a\\|b deep. |"]
    assert [row.split("`")[1] for row in settings_table(Everything).splitlines()[2:]] == [
        "share",
        "rate",
        "steps",
        "kind",
        "names",
    ]


def test_errors_of_the_user_pass_and_others_only_of_the_kind_asked_for():
    with pytest.raises(UserError, match="^mine$"), user_settings("`here`"):
        raise UserError("mine")
    with pytest.raises(KeyError), user_settings("`here`", ValueError):
        raise KeyError("theirs")


def test_parsers_of_hosts_see_help_and_choices_alone():
    """argparse knows no bounds: whichever way they copy the metadata, it must not meet any."""
    steps, kind = (next(f for f in dataclasses.fields(Everything) if f.name == name) for name in ("steps", "kind"))
    assert dict(steps.metadata) == steps.metadata.copy() == {"help": "Steps."}
    assert dict(kind.metadata) == kind.metadata.copy() == {"help": "A kind.", "choices": ("a", "b")}
    assert dict(steps.metadata.items()) == {"help": "Steps.", "min": 1}
