"""Weights & Biases and the hub: reached within seconds, or done without in one line; and what trackers show beside figures."""

from __future__ import annotations

import importlib
import os
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pandas
from huggingface_hub import constants
from loguru import logger
from PIL import Image
from transformers import Trainer

from .. import UserError
from ..models.files import check_writable
from ..objective.settings import read_path


def start_wandb(config: dict[str, Any], debug: bool) -> str:
    """What to report to; without a login or a network Weights & Biases goes on offline.

    Args:
        config: `project`, `entity`, `wandb_log_path`.

    Raises:
        UserError: the key is wrong.
    """
    try:
        import wandb
    except ImportError as error:
        raise ImportError("`use_wandb`: wandb is not installed; run `pip install 'llm-diffusion[wandb]'`.") from error
    project, entity, path = (config.get(name) for name in ("project", "entity", "wandb_log_path"))
    os.environ["WANDB_PROJECT"] = ("debug-" if debug else "") + (project or "llm-diffusion")
    if entity:
        os.environ["WANDB_ENTITY"] = entity
    if path:
        folder = read_path("wandb_config.wandb_log_path", path)
        check_writable(folder, "wandb_config.wandb_log_path")
        os.environ["WANDB_DIR"] = str(folder)
    if "WANDB_MODE" in os.environ:
        return "wandb"
    url, why = wandb.setup().settings.base_url, ""
    if not reachable(url):
        why = f"{url} cannot be reached"
    else:
        try:
            why = "" if wandb.login(prompt=False, verify=True) else "not logged in"
        except wandb.Error as error:
            raise UserError(f"`use_wandb`: {error} Run `wandb login --relogin`, or set WANDB_MODE=offline.") from error
    if why:
        logger.warning(f"wandb: {why}; going on offline. Run `wandb login`, and `wandb sync` to upload.")
        os.environ["WANDB_MODE"] = "offline"
        wandb.teardown()  # it has read the mode by now
    return "wandb"


def show(trainer: Trainer, name: str, shown: list[dict[str, str]] | Path) -> None:
    """Rows of a table, or a picture, as `eval/NAME` of this step in the trackers of `report_to` that take it; call it after `trainer.log`,
    which starts them. TensorBoard takes no tables."""
    if not trainer.is_world_process_zero():
        return
    step, picture = trainer.state.global_step, Image.open(shown).convert("RGB") if isinstance(shown, Path) else None
    for tracker in (importlib.import_module(n) for n in ("wandb", "trackio") if n in trainer.args.report_to):
        if tracker.__name__ == "wandb" and tracker.run is None:  # by WANDB_DISABLED
            continue
        media = tracker.Image(picture) if picture else tracker.Table(dataframe=pandas.DataFrame(shown))
        tracker.log({f"eval/{name}": media, "train/global_step": step})
    for callback in trainer.callback_handler.callbacks:
        if picture and (writer := getattr(callback, "tb_writer", None)):
            writer.add_image(f"eval/{name}", np.asarray(picture), step, dataformats="HWC")


def check_hub() -> None:
    """Raises UserError where `push_to_hub` cannot work."""
    if constants.HF_HUB_OFFLINE or not reachable(constants.ENDPOINT):
        raise UserError(
            f"`push_to_hub`: {constants.ENDPOINT} cannot be reached; set it to false, and upload what is saved later."
        )


def reachable(url: str, seconds: float = 4) -> bool:
    """Whether anybody answers there in time, by whatever proxy is set."""
    answered = threading.Event()

    def ask() -> None:
        try:
            urllib.request.urlopen(url, timeout=seconds).close()
        except urllib.error.HTTPError:  # an answer too
            pass
        except (OSError, ValueError):
            return
        answered.set()

    thread = threading.Thread(target=ask, daemon=True)  # a name server takes its time
    thread.start()
    thread.join(seconds)
    return answered.is_set()
