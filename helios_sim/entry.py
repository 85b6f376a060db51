"""Start and end of every command of this project: an exit status, and one message for an error that stopped it.

Nothing heavy is imported here: help and the version are answered before anything else is loaded.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from helios_sim.streams import open_streams


def run(name: str, work: Callable[[list[str]], int], arguments: Sequence[str] | None = None) -> int:
    """Run `work` with the words of the command line and return its status; 1 after a mistake of the user, or a stop.

    A reader that closes the pipe early, as `head` does, is no error.
    """
    open_streams()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without umlauts shows a ? and is no error
    try:
        status = work(sys.argv[1:] if arguments is None else list(arguments))
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        from helios_sim.interrupt import leave_by_status

        leave_by_status()
        print(f"{name}: stopped", file=sys.stderr)
        return 1
    except Exception as error:
        from helios_sim.errors import UserError, lacking

        message = str(error) if isinstance(error, UserError) else lacking(error)
        if message is None:
            raise
        print(f"{name}: {message}", file=sys.stderr)
        return 1


def script(file: str, work: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a script as commands are run. A missing input file gives a message too."""

    def told(words: list[str]) -> int:
        try:
            return work(words) or 0
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            from helios_sim.errors import UserError

            fix = "name one that is there; the head of the script says what it reads"
            raise UserError("file", error.filename or str(error), "must be there", fix) from error

    sys.exit(run(Path(file).stem, told))


def answers(page: str, command: Sequence[str]) -> bool:
    """Whether the command asks for its help or for the version, which are printed then."""
    from helios_sim.help import help_text, is_asked

    if is_asked(command):
        print(help_text(page, command))
        return True
    if "--version" in command:
        package = sys.modules["helios_sim"]  # not by import, which would count as one of all its modules
        print(f"helios_sim {package.__version__}")
        return True
    return False
