"""What tests find out in two processes, started once for all of them: the start takes longer than the finding out.

    python -m torch.distributed.run --standalone --nproc_per_node=2 tests/two_processes.py FOLDER

Each of `PIECES`, a function of a test module, is called in both processes with a folder that they share; what it returns and prints is in
FOLDER/RANK.json. The fixture `in_two_processes` runs this and reads it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from importlib import import_module
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PIECES = (
    "training.test_sft:losses_of_settings",
    "training.test_sft:bound_of_five",
    "training.test_dpo:steps_of_pairs",
    "training.test_kto:steps_of_answers",
    "training.test_grpo:steps_of_rollouts",
    "training.test_scaling:split_weights",
    "training.test_scaling:main_job",
    "evaluation.test_evaluate:evaluated",
)


def launch(folder: Path) -> list[dict[str, Any]]:
    """Runs all pieces, and reads what the first and the second process found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr[:5000] + done.stderr[-1000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def main(folder: Path) -> None:
    from accelerate import PartialState

    rank, found = PartialState(cpu=True).process_index, {}
    for piece in PIECES:
        module, name = piece.split(":")
        shared, said = folder / name, StringIO()
        shared.mkdir(exist_ok=True)
        with redirect_stdout(said):
            result = getattr(import_module(module), name)(shared)
        found[name] = {"result": result, "said": said.getvalue()}
    (folder / f"{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
