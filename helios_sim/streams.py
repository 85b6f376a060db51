"""Standard streams that the caller has closed, as a service manager does with `>&-`."""

from __future__ import annotations

import os
import sys
from contextlib import suppress


def open_streams() -> None:
    """Let /dev/null stand for each of stdin, stdout and stderr that is closed.

    Otherwise the next file that is opened takes its place, and what a library prints is written into it.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                place = os.open(os.devnull, os.O_RDWR)
                if place != number:
                    os.dup2(place, number)
                    os.close(place)
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 - as long as the process
