"""`python -m calibrate.prompts [TASK ...]`: writes the held-out texts of the tasks as plain files, for live serving.

They are the passages that reference traces are measured on, in the same order, so that a position in a task's text
means the same in both. The files go to the folder `prompts` of the cache, where `helios_sim/live/texts.py` reads them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from calibrate.exits.texts import TASKS, Split, passages
from calibrate.exits.traces import HELDOUT_CHARS, PASSAGE_CHARS
from helios_sim.errors import UserError
from helios_sim.live.checkpoint.known import cache_folder
from helios_sim.live.served import FOLDER
from helios_sim.report import files


def write_prompts(tasks: Sequence[str], folder: Path) -> list[Path]:
    """Write TASK.txt for each task. Raises UserError for an unknown task, or a package that cannot be fetched."""
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
