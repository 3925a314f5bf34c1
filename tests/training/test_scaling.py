"""Several processes: shipped launch configurations, split weights, and the main job."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from small_trainers import tiny_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from llm_diffusion.main import cli
from llm_diffusion.models.forward import add_row_scores
from llm_diffusion.training.scoring import score

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_reads_every_shipped_configuration(path):
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "multi-node": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type.value == kind and config.num_processes >= 2
    known = {action.dest for action in launch_command_parser()._actions}
    for group in ("fsdp_config", "deepspeed_config"):
        assert set(getattr(config, group) or {}) <= known  # a misspelt key is ignored in silence


def test_the_page_names_every_configuration():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert {path.name for path in CONFIGS} == set(re.findall(r"examples/accelerate/([\w-]+\.yaml)", page))


def split_weights(folder):
    """FSDP2 over two gloo processes, the head with the rest and by itself: scores and gradients of the whole model and of the split one."""
    mesh, found = init_device_mesh("cpu", (2,)), []
    for tied in (True, False):
        model = tiny_model(tied)
        add_row_scores(model)
        plain = copy.deepcopy(model)
        for part in [*model.model.layers, *(() if tied else (model.lm_head,)), model]:
            fully_shard(part, mesh=mesh)
        ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
        scores = []
        for each in (plain, model):
            scored = score(each, {"input_ids": ids, "use_cache": False}, ids.masked_fill(ids % 2 == 0, -100))
            scored.nll.sum().backward()
            scores.append(scored.nll.tolist())
        parts = zip(plain.parameters(), model.parameters(), strict=True)
        off = [float((p.grad - q.grad.full_tensor()).norm() / p.grad.norm()) for p, q in parts]
        found.append((scores, max(off)))
    return found


def test_split_weights_give_the_scores_and_gradients_of_whole_ones(in_two_processes):
    for found in in_two_processes["split_weights"]:
        for (whole, split), off in found["result"]:
            assert len(whole) > 4 and split == pytest.approx(whole, rel=1e-5)
            assert off < 1e-4


def main_job(folder):
    settings = {
        "model": "tiny",
        "dataset": "tiny",
        "max_examples": 16,
        "test_size": 6,
        "batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_length": 128,
        "device": "cpu",
        "pretrain_config": {"max_steps": 1},
        "sft_config": {"max_steps": 2},
        "generation": {"max_new_tokens": 8, "block_length": 8},
        "lora_config": {"r": 4},
        "output_dir": str(folder / "out"),
    }
    cli(["--hyper-parameters-json", json.dumps(settings)], standalone_mode=False)
    PartialState().wait_for_everyone()  # one writes
    return json.loads((folder / "out" / "sft_model" / "diffusion_config.json").read_text())


def test_the_main_job_runs_in_two_processes(in_two_processes):
    first, second = in_two_processes["main_job"]
    assert (first["said"] + second["said"]).count("from_pretrained") == 1  # one speaks
    assert first["result"]["conversion_steps"] == 3
