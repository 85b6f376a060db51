"""`python -m calibrate.prompts [TASK ...]`: the held-out texts of the tasks as plain files, for live serving.

They are the passages that reference traces are measured on, in the same order, so a place in a task's text means the
same in both. The files lie in the folder `prompts` of the cache: `helios_sim/live/texts.py` reads them from there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from calibrate.texts import TASKS, Split, passages
from calibrate.traces import HELDOUT_CHARS, PASSAGE_CHARS
from helios_sim.errors import UserError
from helios_sim.live.checkpoint.known import cache_folder
from helios_sim.live.texts import FOLDER
from helios_sim.report import files


def write_prompts(tasks: Sequence[str], folder: Path) -> list[Path]:
    """TASK.txt for each of the tasks. UserError for an unknown task, or a package that cannot be fetched."""
    files.make_folder(folder)
    written = []
    for task in tasks:
        text = "".join(passages(task, Split.HELDOUT, HELDOUT_CHARS.get(task, 0), PASSAGE_CHARS))
        files.write_text(folder / f"{task}.txt", text)
        written.append(folder / f"{task}.txt")
    return written


def main(tasks: Sequence[str]) -> int:
    try:
        for path in write_prompts(tasks or TASKS, cache_folder() / FOLDER):
            print(f"{path}: {path.stat().st_size:,} bytes")
    except UserError as error:
        print(f"calibrate.prompts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
