"""`python -m helios_sim.vary.guard MARK`: waits until its standard input closes, then ends every process with the mark.

The process that holds the other end of standard input closes it by ending, however that happens. The mark is the value
of an environment variable, which child processes inherit.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from time import sleep

VARIABLE = "HELIOS_STARTED_BY"
ROUNDS = 20  # searches for processes, since one that is killed may just have started another
PAUSE_S = 0.1
NOTHING = 3  # searches in a row that find none before it stops: a process shows no environment during exec


def marked(mark: str) -> list[int]:
    """Return the ids of processes with the mark; none if the system has no /proc."""
    wanted, found = f"{VARIABLE}={mark}\0".encode(), []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if wanted in (folder / "environ").read_bytes() + b"\0":
                found.append(int(folder.name))
    return [pid for pid in found if pid != os.getpid()]


def end_all(mark: str) -> None:
    empty = 0
    for _ in range(ROUNDS):
        there = marked(mark)
        empty = 0 if there else empty + 1
        for pid in there:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        if empty == NOTHING:
            return
        sleep(PAUSE_S)


if __name__ == "__main__":
    sys.stdin.read()
    end_all(sys.argv[1])
