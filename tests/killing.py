"""The command line in a process of its own that signals itself at a chosen moment, without the seconds of importing everything."""

from __future__ import annotations

import io
import multiprocessing
import os
import sys
from pathlib import Path

processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(
    ["llm_diffusion.main", "llm_diffusion.job", "matplotlib.figure", "matplotlib.backends.backend_agg"]
)


def command_line(arguments: list[str], log: Path, moments: dict[str, int]) -> int:
    """The exit code, negative for a signal.

    Args:
        log: where what it prints goes.
        moments: signals that it sends to itself when a file whose path has this in it is opened or renamed, or when it prints this.
    """
    process = processes.Process(target=_run, args=(arguments, str(log), moments))
    process.start()
    process.join()
    return process.exitcode


def _run(arguments: list[str], log: str, moments: dict[str, int]) -> None:
    file = os.open(log, os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
    os.dup2(file, 1)
    os.dup2(file, 2)
    left, process = dict(moments), os.getpid()

    def look_at(text: str) -> None:
        for part in [part for part in left if part in text and os.getpid() == process]:
            os.kill(process, left.pop(part))

    def watch(event: str, given: tuple) -> None:
        if event in ("open", "os.rename") and isinstance(given[0], str | os.PathLike):
            look_at(os.fspath(given[0]))

    class Printed(io.TextIOWrapper):
        def write(self, text: str) -> int:
            written = super().write(text)
            look_at(text)
            return written

    sys.addaudithook(watch)
    sys.stderr = Printed(sys.stderr.buffer, line_buffering=True)
    from llm_diffusion.main import cli

    cli(arguments)
