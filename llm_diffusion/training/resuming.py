"""A run that stops at any moment goes on to the same weights: checkpoints that are whole or not there, and the last whole one found."""

from __future__ import annotations

import json
import logging
import os
import shlex
import shutil
import signal
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from .. import UserError
from ..models.files import UNFINISHED, read_json, replace_synced
from ..models.patching import Patch
from ..objective.settings import redacted
from .signals import Terminated

logger = logging.getLogger(__name__)

WEIGHTS = ADAPTER_SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME


class ResumableTrainerMixin:
    """Goes before a trainer of TRL in the bases of a class."""

    _saving = False

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        return super().train(resume_from_checkpoint=checkpoint_of(self, resume_from_checkpoint), **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """As there; nothing when the run is at its end, where transformers would go one step beyond it."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """As there, before the optimiser's step; a non-finite gradient stops the run, unless a scaler of fp16 skips that step."""
        norm = super()._get_grad_norm(*args, **kwargs)
        scaled = getattr(self.accelerator, "scaler", None) is not None
        if norm is not None and not scaled and not torch.isfinite(torch.as_tensor(norm)):
            raise FloatingPointError(
                f"the gradient is {float(norm)} at step {self.state.global_step}, though the loss is finite; the weights are as they were "
                "before it. Lower `learning_rate`, or compute in fp32 instead of a shorter type."
            )
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return str(Path(folder) / UNFINISHED) if self._saving else folder

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """As there; `training_args.bin` gets no token."""
        with Patch() as patch:
            for name, value in redacted(vars(self.args)).items():
                if value != vars(self.args)[name]:
                    patch.set(self.args, name, value)
            super()._save(output_dir, state_dict)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        if self.args.push_to_hub:  # TRL uploads from where it writes, in its own time
            super()._save_checkpoint(model, trial)
            return
        folder, self._saving = Path(super()._get_output_dir(trial)), True
        try:
            save_atomically(self, lambda: super(ResumableTrainerMixin, self)._save_checkpoint(model, trial), folder)
        finally:
            self._saving = False
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )


class StopCallback(TrainerCallback):
    """On SIGTERM or Ctrl-C a trainer saves at the end of its step, says how to go on, and stops; a second one ends the process at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.say, self.signal, self.process, self.before = say, 0, os.getpid(), {}

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.before = {number: signal.signal(number, self._stop) for number in (signal.SIGTERM, signal.SIGINT)}

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if self.signal:
            raise Terminated if self.signal == signal.SIGTERM else KeyboardInterrupt

    def _stop(self, number: int, frame: Any) -> None:
        if os.getpid() != self.process:
            return  # Ctrl-C, which data workers get too
        if self.signal:
            os._exit(128 + number)
        self.signal = number
        os.write(2, b"stopping when this step is saved; once more to end at once\n")  # a logger may be at work

    def _is_asked(self, args: Any) -> bool:
        """Whether any process got a signal: all of them stop at the same step."""
        if args.world_size > 1:
            asked = torch.tensor(self.signal, device=args.device)
            torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
            self.signal = int(asked)
        return bool(self.signal)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save = self._is_asked(args) or control.should_save

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._is_asked(args):
            command = shlex.join([*sys.orig_argv, *({"--resume"} - set(sys.orig_argv))])
            command = "the same command and `--resume`" if args.world_size > 1 else command
            self.say(f"step {state.global_step} is saved; go on with: {command}")
            self.on_train_end()


def save_atomically(trainer: Any, write: Callable[[], None], folder: Path) -> None:
    """Lets all processes `write` to `folder / UNFINISHED`, and moves what is there up when it is whole.

    A process that dies, or a disk that is full, leaves what was there before.
    """
    aside, accelerator = folder / UNFINISHED, trainer.accelerator
    if accelerator.is_local_main_process:
        shutil.rmtree(aside, ignore_errors=True)
    accelerator.wait_for_everyone()
    try:
        write()
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk has room again
        raise
    accelerator.wait_for_everyone()
    best = trainer.state.best_model_checkpoint
    if best is not None and Path(best).parent == aside:
        trainer.state.best_model_checkpoint = str(folder / Path(best).name)
        if trainer.args.should_save:
            trainer.state.save_to_json(str(Path(best) / TRAINER_STATE_NAME))
    if accelerator.is_local_main_process and aside.is_dir():
        for written in aside.iterdir():
            replace_synced(written, folder / written.name)
        aside.rmdir()
    accelerator.wait_for_everyone()


def checkpoint_of(trainer: Any, given: str | bool | None) -> str | None:
    """The checkpoint to go on from; for True the last whole one.

    Raises:
        UserError: the one that was named is damaged, or there is none.
    """
    if given is True:
        if (found := last_checkpoint(trainer)) is None:
            raise UserError(f"`resume_from_checkpoint`: there is no checkpoint in {trainer.args.output_dir!r} yet.")
        return found
    if given and (fault := damage(Path(given), trainer)):
        raise UserError(f"`resume_from_checkpoint`: {str(given)!r} cannot be resumed from: {fault}.")
    return str(given) if given else None


def last_checkpoint(trainer: Any) -> str | None:
    """The last checkpoint in the trainer's folder that is whole; None where there is none."""
    found = [path for path in Path(trainer.args.output_dir).glob("checkpoint-*") if path.name[11:].isdecimal()]
    for path in sorted(found, key=lambda path: int(path.name[11:]), reverse=True):
        if not (fault := damage(path, trainer)):
            if trainer.args.save_only_model:
                logger.warning("`save_only_model`: %s has no optimizer, which starts anew", path)
            return str(path)
        logger.warning("%s is passed over: %s", path, fault)
    return None


def damage(checkpoint: Path, trainer: Any) -> str | None:
    """What is wrong with a checkpoint, as far as its files say; None if nothing is."""
    needed = [(TRAINER_STATE_NAME,)]
    if not (trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled):  # which have layouts of their own
        needed += [WEIGHTS] + ([] if trainer.args.save_only_model else [(OPTIMIZER_NAME,), (SCHEDULER_NAME,)])
    for names in needed:
        if not any((checkpoint / name).is_file() for name in names):
            return f"it has no {' or '.join(names[:2])}"
    broken = [file.name for file in sorted(checkpoint.rglob("*")) if not _is_whole(file)]
    return f"{broken[0]} is damaged" if broken else None


def _is_whole(file: Path) -> bool:
    """Whether a file ends where its own header, or its syntax, says that it does."""
    try:
        if file.suffix == ".json":
            found = read_json(file)
            shards = found["weight_map"].values() if file.name == SAFE_WEIGHTS_INDEX_NAME else ()
            return all((file.parent / shard).is_file() for shard in shards)
        if file.suffix == ".safetensors":
            with safe_open(file, framework="pt"):
                return True
        return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)
    except (UserError, SafetensorError, OSError):
        return False


# Settings that the weights do not depend on, so that a run may go on with others; those of logging and of the hub too.
HARMLESS = {"output_dir", "device", "num_threads", "dataloader_num_workers", "use_wandb", "wandb_config", "report_to"}
HARMLESS |= {"run_name", "disable_tqdm", "log_level", "prompts", "eval_examples", "push_to_hub", "save_total_limit"}


def check_same_run(settings: dict[str, Any], defaults: dict[str, Any], file: Path, key: str) -> None:
    """Refuses a folder in which another run has trained, whose checkpoints this one would mix with its own or forget.

    Args:
        settings: of this run.
        defaults: of settings that are not in `file`, which an older version wrote.
        file: the settings of the run in its folder.
        key: begins the error.
    """
    folder = file.parent
    if not any(folder.glob("*_model/stage.json")) and not any(folder.glob(f"*/checkpoint-*/{TRAINER_STATE_NAME}")):
        return
    if not file.exists():
        raise UserError(
            f"{key}: {str(folder)!r} holds what a run has trained, but not its settings; choose another folder, or remove it."
        )
    there, here = (_decisive(json.loads(json.dumps(given))) for given in (defaults | read_json(file, dict), settings))
    for name in sorted(there.keys() | here.keys()):
        if (one := there.get(name)) != (other := here.get(name)):
            raise UserError(
                f"{key}: {str(file)!r} holds other settings than this run: `{name}` is {one!r} there, {other!r} here; give the same, "
                "choose another `output_dir`, or remove that folder."
            )


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings, nested ones too, on which the weights depend."""
    kept = {k: v for k, v in redacted(settings).items() if k not in HARMLESS and not k.startswith(("logging_", "hub_"))}
    return {key: _decisive(value) if isinstance(value, dict) else value for key, value in kept.items()}
