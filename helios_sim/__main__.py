"""`python -m helios_sim`: answers for help and the version by itself, and leaves studies to `cli`."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Sequence
from io import TextIOWrapper

from helios_sim.streams import open_streams


def main(arguments: Sequence[str] | None = None) -> int:
    """0: done; 1: a mistake of the user, in one message, or stopped; 2: a gate failed."""
    command = sys.argv[1:] if arguments is None else list(arguments)
    open_streams()
    try:
        status = _run(command)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # the reader of a page left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:  # before any study has begun
        from helios_sim.interrupt import leave_by_status

        leave_by_status()
        print("helios_sim: stopped", file=sys.stderr)
        return 1
    except Exception as error:
        from helios_sim.errors import lacking

        if (message := lacking(error)) is None:
            raise
        print(f"helios_sim: {message}", file=sys.stderr)
        return 1


def _run(command: list[str]) -> int:
    """Imports are here, so that a signal that comes while they load is handled too."""
    from helios_sim.interrupt import remembered

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without umlauts shows a ? and is no error
    with remembered():
        import helios_sim
        from helios_sim.help import help_text, is_asked

        if is_asked(command):
            print(help_text("helios_sim", command))
            return 0
        if "--version" in command:
            print(f"helios_sim {helios_sim.__version__}")
            return 0
        if sys.stderr.isatty():
            print("Reading programs, settings and inputs ...", file=sys.stderr)
        from helios_sim.cli import repeat_study, run_command  # Hydra and what it needs, which neither of these does

        collect_rarely()
        return repeat_study(command[1:]) if command[:1] == ["repro"] else run_command(command)


def collect_rarely() -> None:
    """To look often through all that was imported for cycles takes a tenth of a run."""
    gc.set_threshold(100_000, 20, 20)


if __name__ == "__main__":
    sys.exit(main())
