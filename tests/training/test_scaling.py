"""Several processes: shipped launch configurations, split weights, and the main job."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def launched(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    done = subprocess.run([*TORCHRUN, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


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


SPLIT = """
import copy, torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from small_trainers import tiny_model
from llm_diffusion.training.scoring import score
from llm_diffusion.models.forward import add_row_scores
dist.init_process_group("gloo")
for tied in (True, False):
    model = tiny_model(tied)
    add_row_scores(model)
    plain = copy.deepcopy(model)
    mesh = init_device_mesh("cpu", (2,))
    for part in [*model.model.layers, *(() if tied else (model.lm_head,)), model]:
        fully_shard(part, mesh=mesh)
    ids = torch.randint(3, 400, (2, 9), generator=torch.Generator().manual_seed(0))
    targets = ids.masked_fill(ids % 2 == 0, -100)
    found = []
    for each in (plain, model):
        scores = score(each, {"input_ids": ids, "use_cache": False}, targets)
        scores.nll.sum().backward()
        found.append(scores.nll.detach())
    torch.testing.assert_close(*found)
    assert found[0].numel() > 4
    for one, other in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad.full_tensor(), rtol=1e-4, atol=1e-5)
print("same")
"""


@pytest.mark.slow
def test_split_weights_give_the_scores_and_gradients_of_whole_ones(tmp_path):
    """FSDP2 over two gloo processes, the head with the rest and by itself."""
    script = tmp_path / "split.py"
    script.write_text(SPLIT)
    assert launched(str(script)).count("same") == 2


@pytest.mark.slow
def test_the_main_job_runs_in_two_processes(tmp_path):
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
        "output_dir": str(tmp_path / "out"),
    }
    said = launched("-m", "llm_diffusion.main", "--hyper-parameters-json", json.dumps(settings))
    assert said.count("from_pretrained") == 1  # one speaks
    record = json.loads((tmp_path / "out" / "sft_model" / "diffusion_config.json").read_text())
    assert record["conversion_steps"] == 3
