"""`python -m helios_sim repro FOLDER`: runs the study of an output folder once more and compares the results.

Settings come from the folder's provenance.json, all other inputs are the present ones: the program, the files that the
settings name, relative to the current folder, and the user's own policies. Inputs that differ are printed first.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_sim.cli import runner_of
from helios_sim.config import saved_config
from helios_sim.errors import UserError
from helios_sim.opened import opened_now
from helios_sim.report.format import visible
from helios_sim.report.terminal import say
from helios_sim.study.inputs import inputs_of
from helios_sim.study.modes import LIVE
from helios_sim.untrusted import read_json, reading

if TYPE_CHECKING:
    import pyarrow

USAGE = "repro FOLDER"
PROVENANCE, SUMMARY = "provenance.json", "summary.json"
TABLES = ("requests.parquet", "decisions.parquet", "designs.parquet", "fleets.parquet")
NOT_COMPARED = ("provenance",)  # of summary.json: when, where and by which command
SHOWN = 10  # differences


def main(arguments: Sequence[str]) -> int:
    """Return 0 if results are the same to the last bit, 2 if any differs. Raises UserError if it cannot be run."""
    if len(arguments) != 1:
        raise UserError("command line", " ".join(arguments), f"python -m helios_sim {USAGE}", "name an output folder")
    return repeat(Path(arguments[0]))


def repeat(folder: Path) -> int:
    """Run the folder's study into a new folder, which is kept if a result differs. Returns the exit status."""
    fix = "name the output folder of a finished study or sweep"
    before = read_json(folder / PROVENANCE, fix)
    summary = read_json(folder / SUMMARY, fix)
    config = saved_config(before.get("configuration"), str(folder / PROVENANCE))
    if config.mode == LIVE or config.fidelity_live.loads:
        allowed = "a study that is simulated: what a device takes is never twice the same"
        raise UserError(str(folder), "live serving", allowed, "run its command again, and compare the two pages")
    made_of = before.get("made_of")
    opened = opened_now(map(str, made_of)) if isinstance(made_of, Mapping) else {}
    for line in _changed(made_of, inputs_of(config) | opened):
        say(line)
    again = Path(tempfile.mkdtemp(prefix=f"{folder.resolve().name}-again-"))
    with redirect_stdout(StringIO()):
        runner_of(config)(config, again)
    differences = list(_differences(folder, summary, again))
    if not differences:
        shutil.rmtree(again, ignore_errors=True)
        say(f"the same to the last bit: {folder}")
        return 0
    for difference in differences[:SHOWN]:
        say(difference)
    if len(differences) > SHOWN:
        say(f"and {len(differences) - SHOWN} more")
    say(f"NOT the same: {folder} and what it gives here, {again}")
    return 2


def _changed(before: Any, now: Mapping[str, str]) -> Iterator[str]:
    if not isinstance(before, Mapping):
        yield "the folder does not say what it was made of"
        return
    for name in sorted({*map(str, before), *now}):
        if before.get(name) != now.get(name):
            what = "not among its inputs" if name not in before else "not here" if name not in now else "another one"
            yield f"{name}: {what}"


def _differences(folder: Path, summary: Mapping[str, Any], again: Path) -> Iterator[str]:
    import pyarrow.parquet as pq

    for name in TABLES:
        old, new = folder / name, again / name
        if not new.is_file():
            continue
        with reading(str(old), "unreadable", "a Parquet table that a study wrote", "run the study again"):
            table = pq.read_table(old)
        yield from _rows_that_differ(name, table, pq.read_table(new))
    now = read_json(again / SUMMARY, "report this as a defect")
    yield from _values_that_differ("", _compared(summary), _compared(now))


def _compared(summary: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in summary.items() if name not in NOT_COMPARED}


def _rows_that_differ(name: str, old: pyarrow.Table, new: pyarrow.Table) -> Iterator[str]:
    if old.num_rows != new.num_rows or set(old.column_names) != set(new.column_names):
        sizes = [f"{table.num_rows} rows of {table.num_columns} columns" for table in (old, new)]
        yield f"{name}: {sizes[0]} before, {sizes[1]} now"
        return
    for column in old.column_names:
        a, b = old[column].to_pylist(), new[column].to_pylist()
        places = [i for i, pair in enumerate(zip(a, b, strict=True)) if repr(pair[0]) != repr(pair[1])]
        if places:
            values = _before_and_now(a[places[0]], b[places[0]])
            yield f"{name}: {column} differs in {len(places)} rows, first in row {places[0]}: {values}"


def _values_that_differ(path: str, old: Any, new: Any) -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted({*map(str, old), *map(str, new)}):
            yield from _values_that_differ(f"{path}.{key}".lstrip("."), old.get(key), new.get(key))
    elif old != new:
        yield f"{SUMMARY}: {path}: {_before_and_now(old, new)}"


def _before_and_now(old: Any, new: Any) -> str:
    shown = [text if len(text := visible(repr(value))) <= 60 else f"{text[:57]}..." for value in (old, new)]
    return f"{shown[0]} before, {shown[1]} now"
