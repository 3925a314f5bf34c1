"""Declared settings: every bound of every declaration holds, and messages name the field."""

import dataclasses
import typing

import pytest

from llm_diffusion import UserError
from llm_diffusion.models.record import ConversionSettings
from llm_diffusion.objective.annealing import AnnealingSettings
from llm_diffusion.objective.forward_process import NoiseSettings
from llm_diffusion.objective.settings import allowed, check_settings, redacted, setting, user_settings

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
