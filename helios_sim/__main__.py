"""`python -m helios_sim`: answers for help and the version by itself, and leaves studies to `cli`."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Sequence
from contextlib import suppress

from helios_sim.entry import answers, run

_statuses: list[int] = []  # with which this process is to end, once that is known


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: a mistake of the user, in one message, or stopped; 2: a gate failed."""
    status = run("helios_sim", _run, arguments)
    if arguments is None:  # the process was started for this, and ends by it
        _statuses.append(status)
    return status


def _run(command: list[str]) -> int:
    """Imports are here, so that a signal that comes while they load is handled too."""
    from helios_sim.interrupt import remembered

    with remembered():
        if answers("helios_sim", command):
            return 0
        if sys.stderr.isatty():
            print("Reading programs, settings and inputs ...", file=sys.stderr)
        collect_rarely()
        from helios_sim.cli import repeat_study, run_command  # Hydra and what it needs, which neither of these does

        return repeat_study(command[1:]) if command[:1] == ["repro"] else run_command(command)


def collect_rarely() -> None:
    """To look often through all that was imported for cycles takes a tenth of a run, and at its end a tenth more."""
    gc.set_threshold(300_000, 20, 20)
    atexit.register(_leave)  # before anything that is imported registers its own end, so it is called after those


def _leave() -> None:
    """End a process whose work is done without taking apart, module by module, what goes with it anyway."""
    gc.freeze()
    if _statuses:
        with suppress(OSError, ValueError):  # a stream that cannot be written: Python says so in its own way
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(_statuses[-1])


if __name__ == "__main__":
    sys.exit(main())
