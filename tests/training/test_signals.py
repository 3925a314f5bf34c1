"""Signals end the command line with the exit codes that shells know, and the workers that it forks at once."""

import multiprocessing
import os
import signal
import time

import pytest

from llm_diffusion.training.signals import exit_codes_of_signals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_exit_codes(number, code, capsys):
    handlers = [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)]
    closed = []
    with pytest.raises(SystemExit) as ended, exit_codes_of_signals():
        try:
            os.kill(os.getpid(), number)
            time.sleep(10)
        finally:
            closed.append(True)
    assert ended.value.code == code and closed
    assert capsys.readouterr().err == f"stopped by {number.name}\n"
    assert [signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)] == handlers


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("wait", [0, 0.2])
def test_forked_workers_die_of_sigterm_at_once(wait):
    """Not by a handler of Python's; also if they are ended while they start."""
    with exit_codes_of_signals():
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        time.sleep(wait)
        worker.terminate()
        worker.join(30)
    assert worker.exitcode == -signal.SIGTERM
