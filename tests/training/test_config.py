"""The trainers' settings as TRL's own tools read them."""

import copy
import dataclasses
import pickle

import pytest
from trl import DPOConfig, SFTConfig, TrlParser

from llm_diffusion import DiffusionDPOConfig, DiffusionSFTConfig


@pytest.mark.parametrize(
    ("kind", "base", "chosen"),
    [
        (DiffusionSFTConfig, SFTConfig, {"eos_tail": 4, "attention": "block", "loss_weight": "clipped"}),
        (DiffusionDPOConfig, DPOConfig, {"num_draws": 4, "score": "elbo", "attention": "block"}),
    ],
)
def test_trls_parser_reads_them(tmp_path, kind, base, chosen):
    words = [word for name, value in chosen.items() for word in (f"--{name}", str(value))]
    (args,) = TrlParser((kind,)).parse_args_and_config(["--output_dir", str(tmp_path), *words])
    assert isinstance(args, base)
    for again in (args, copy.deepcopy(args), pickle.loads(pickle.dumps(args)), dataclasses.replace(args)):
        assert {name: getattr(again, name) for name in chosen} == chosen


def test_a_copy_of_the_settings_keeps_its_tokens_and_no_logger_gets_them(tmp_path):
    secret = "hf_abcdefghijklmnopqrstuvwxyz"
    config = DiffusionSFTConfig(str(tmp_path), use_cpu=True, hub_token=secret, model_init_kwargs={"token": secret})
    again = copy.deepcopy(config)
    assert again.hub_token == again.model_init_kwargs["token"] == secret
    assert secret not in str(config.to_dict())
