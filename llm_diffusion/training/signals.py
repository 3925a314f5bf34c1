"""The command line under SIGTERM and Ctrl-C: what is open is closed, and the exit code is the one that shells know."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled as Ctrl-C is."""


@contextmanager
def exit_codes_of_signals() -> Iterator[None]:
    """Ends the process with 143 after SIGTERM and 130 after Ctrl-C, and says so in one line."""
    _default_in_forks()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    except KeyboardInterrupt as error:
        number = signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT
        print(f"stopped by {number.name}", file=sys.stderr)
        sys.exit(128 + number)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: Any) -> None:
    raise Terminated


@cache  # once a process
def _default_in_forks() -> None:
    """SIGTERM ends forked workers by the system's own handling: one that is about to block would never come to run a handler of
    Python's, and the pool that ends it waits for ever. It is blocked while they are forked, so that none is lost in between."""

    def mask(how: int) -> None:
        signal.pthread_sigmask(how, [signal.SIGTERM])

    def in_child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        mask(signal.SIG_UNBLOCK)

    os.register_at_fork(
        before=lambda: mask(signal.SIG_BLOCK),
        after_in_parent=lambda: mask(signal.SIG_UNBLOCK),
        after_in_child=in_child,
    )
