"""Atomic writes, synced and renamed, so that no file or folder is ever half there; and locks, so that one run at a time has a folder."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from .. import UserError
from ..objective.settings import read_path

UNFINISHED = ".unfinished"  # begins the names of folders in which something is written


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Where to write what is the file, or the folder, `path` when the block ends; all of it, or what was there before."""
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(mkdtemp(prefix=f"{UNFINISHED}-{path.name}-", dir=path.parent))
    try:
        yield aside / path.name
        replace_synced(aside / path.name, path)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # a full disk has room again


def replace_synced(written: Path, path: Path) -> None:
    """Gives a file or folder of the same disk its name, once all of it would survive a power cut."""
    for part in (written, *written.rglob("*")):
        _sync(part)
    old = None
    if path.is_dir():  # which no rename replaces; removing it takes its time, in which there would be neither
        old = path.replace(written.with_name(f"{written.name}.old"))
    written.replace(path)
    _sync(path.parent)
    if old is not None:
        shutil.rmtree(old)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError:
        if not path.is_dir():  # which some network disks do not sync
            raise
    finally:
        os.close(number)


def write_text(path: str | Path, text: str) -> None:
    with atomic(path) as aside:
        aside.write_text(text, encoding="utf-8")


def read_json(path: Path, kind: type = object) -> Any:
    """Raises UserError, naming the file, where it does not hold JSON of a `kind`."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, kind):
            raise ValueError(f"no {kind.__name__} is in it")
        return found
    except ValueError as error:
        raise UserError(f"{str(path)!r} is damaged ({error}); remove it, or bring a whole copy back.") from error


@contextmanager
def locked(file: Path, what: str) -> Iterator[None]:
    """Refuses a second process while the first is in the block; the lock is the system's, so no crash leaves it behind.

    Raises:
        UserError: `what` is in use, by which process.
    """
    import fcntl  # Windows has none

    made = [folder for folder in file.parents if not folder.exists()]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a+") as held:
        try:
            # Unlike flock's, not inherited by data workers, which outlive a kill.
            fcntl.lockf(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            busy = not os.path.samestat(os.fstat(held.fileno()), file.stat())
        except (BlockingIOError, PermissionError, FileNotFoundError):
            busy = True
        except OSError:  # a disk that knows no locks
            busy = False
        if busy:
            held.seek(0)
            raise UserError(f"{what} is in use by process {held.read()}; wait for its end, or choose another folder.")
        held.truncate(0)
        print(os.getpid(), end="", file=held, flush=True)
        try:
            yield
        finally:
            file.unlink(missing_ok=True)
            with suppress(OSError):  # something is in them
                for folder in made:
                    folder.rmdir()


def check_writable(folder: Path, key: str) -> None:
    """Refuses a folder that cannot be written, without making it: nothing is left behind when the run fails to start."""
    existing = folder
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise OSError(f"`{key}`: {str(folder)!r} cannot be written; choose another folder.")


def writable(path: str, option: str, folder: bool = False) -> Path:
    """Where an option's file, or folder, goes; refused now, not after the work, if it cannot be written there."""
    target = read_path(option, path)
    check_writable(target if folder else target.parent, option)
    return target
