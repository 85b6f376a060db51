"""`python -m helios_sim`: answers for help and the version by itself, and leaves studies to `cli`."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from helios_sim.entry import answers, run

_statuses: list[int] = []  # the exit status of this process, once it is known


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns 0 if done, 1 after a mistake of the user (one message) or a stop, 2 if a gate failed."""
    status = run("helios_sim", _run, arguments)
    if arguments is None:  # the process was started for this command, and ends with it
        _statuses.append(status)
    return status


def _run(command: list[str]) -> int:
    """Run the command. Imports are inside, so that a signal that comes while they load is handled too."""
    from helios_sim.interrupt import remembered

    with remembered():
        if answers("helios_sim", command):
            return 0
        if sys.stderr.isatty():
            print("Reading programs, settings and inputs ...", file=sys.stderr)
        collect_rarely()
        from helios_sim.cli import repeat_study, run_command  # imports Hydra, which help and version do not need

        return repeat_study(command[1:]) if command[:1] == ["repro"] else run_command(command)


def collect_rarely() -> None:
    """Collect garbage rarely: searching all that was imported takes a tenth of a run, and another tenth at its end."""
    gc.set_threshold(300_000, 20, 20)
    atexit.register(_leave)  # before imported modules register theirs, so it is called after them


def _leave() -> None:
    """End a process that has done its work at once, without tearing down its modules one by one."""
    gc.freeze()
    if _statuses:
        with suppress(OSError, ValueError):  # a stream that cannot be written: Python says so in its own way
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_statuses[-1])


if __name__ == "__main__":
    sys.exit(main())
