"""An interrupt is neither lost in a library nor left to the interpreter."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from helios_sim.interrupt import remembered, stop_if_asked


def test_an_interrupt_that_was_swallowed_is_remembered() -> None:
    with remembered():
        stop_if_asked()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    stop_if_asked()  # it belongs to what was interrupted


INTERRUPTED = """
import os, signal, sys
from helios_sim.interrupt import leave_by_status
try:
    exec("os.kill(os.getpid(), signal.SIGINT)")
except KeyboardInterrupt:
    leave_by_status()
    sys.exit(1)
"""


def test_an_interrupt_inside_exec_ends_with_the_chosen_status(tmp_path, repository) -> None:
    (tmp_path / "interrupted.py").write_text(INTERRUPTED)
    command = [sys.executable, "-m", "interrupted"]
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    assert subprocess.run(command, cwd=tmp_path, env=environment, check=False).returncode == 1


def made_into_an_error() -> None:
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()
    except KeyboardInterrupt as stopped:
        raise RuntimeError("Error calling __set_name__") from stopped


def test_an_error_that_something_made_of_a_signal_is_one_again() -> None:
    """OmegaConf, and a class body of Python 3.11, raise an error of their own where a signal comes."""
    with pytest.raises(KeyboardInterrupt), remembered():
        made_into_an_error()
    with pytest.raises(RuntimeError), remembered():
        raise RuntimeError("of its own")
