"""Sweeps that do not run through: stopped half way, killed, with failed designs or a damaged journal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from joblib.externals.loky import get_reusable_executor

import helios_sim
from command_line import write_study
from helios_sim.errors import UserError
from helios_sim.report.designs import designs_table
from helios_sim.study.designs import plan_sweep
from helios_sim.study.sweep import Outcome, OutcomeLines, run_plan, sweep
from helios_sim.vary.axis import AxisConfig
from helios_sim.vary.runner import Journal, Task
from helios_sim.vary.workers import Place, Workers
from sweep_example import SEARCH, SWEEP, example

pytestmark = pytest.mark.slow


class Stopped(Exception):
    pass


def counting(after: int | None) -> tuple[Callable[..., None], list[bool]]:
    """Notes whether each run was kept from before; stops the sweep after so many that were not."""
    kept: list[bool] = []

    def note(task: object, outcome: object, was_kept: bool) -> None:
        kept.append(was_kept)
        if after is not None and kept.count(False) == after:
            raise Stopped

    return note, kept


@pytest.mark.parametrize(("settings", "again"), [({}, 1), (SEARCH, 0)], ids=["grid", "search"])
def test_a_sweep_stopped_half_way_goes_on_with_nothing_repeated(tmp_path, settings, again):
    """`again`: one design of the grid is the arm as it was set."""
    plan = plan_sweep(example(**settings))
    whole = designs_table(run_plan(plan, None, {}, lambda task, outcome, kept: None))
    note, _ = counting(after=10)
    with pytest.raises(Stopped):
        run_plan(plan, tmp_path, {}, note)
    (tmp_path / "finished.jsonl").open("a").write('{"key": "half a li')  # as a kill while writing leaves it
    note, kept = counting(after=None)
    resumed = designs_table(run_plan(plan, tmp_path, {}, note))
    assert resumed.equals(whole)
    assert kept.count(True) == 10 + again
    assert kept.count(False) == len(whole) - 10 - again
    note, kept = counting(after=None)
    assert designs_table(run_plan(plan, tmp_path, {}, note)).equals(whole)
    assert all(kept)


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[str]:
    text = SWEEP.replace("values: [20, 80]", "low: 10, high: 90, step: 4, whole: true")
    return subprocess.Popen(
        [sys.executable, "-m", "helios_sim", *write_study(tmp_path, text), "sweep.backend=processes",
         "sweep.workers=2", *arguments],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(Path(helios_sim.__file__).parents[1])},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def lines(folder: Path) -> list[str]:
    journal = folder / "finished.jsonl"
    return [json.loads(line)["key"] for line in journal.read_text().splitlines()] if journal.is_file() else []


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_command_goes_on_where_it_was(tmp_path, how):
    process = start(tmp_path, "hydra.run.dir=out")
    deadline = time.monotonic() + 90
    while len(lines(tmp_path / "out")) < 10:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(how)
    out, err = process.communicate(timeout=30)
    assert out == ""
    if how is signal.SIGINT:
        assert process.returncode == 1
        assert err.splitlines()[-2].startswith("helios_sim: stopped")
    before = lines(tmp_path / "out")
    assert len(before) < 44
    process = start(tmp_path, "hydra.run.dir=out")
    _, err = process.communicate(timeout=90)
    assert process.returncode == 0, err
    after = lines(tmp_path / "out")
    assert after[: len(before)] == before
    assert len(after) == len(set(after)) == 42 + 2  # each design and arm ran once
    if how is signal.SIGKILL:
        other = start(tmp_path, "hydra.run.dir=undisturbed")
        assert other.communicate(timeout=90) is not None
        tables = [(tmp_path / folder / "designs.parquet").read_bytes() for folder in ("out", "undisturbed")]
        assert tables[0] == tables[1]


BROKEN = """
from helios_sim.policy.full_depth import FullDepthParameters, FullDepthPolicy

class Broken(FullDepthPolicy):
    def __init__(self, number=0):
        super().__init__(FullDepthParameters())
        self.number = number
    def start(self, situation):
        if self.number == 2:
            raise ZeroDivisionError("no such luck")
        return super().start(situation)
"""


@pytest.mark.parametrize("backend", ["serial", "processes"])
def test_a_failed_design_is_reported_and_the_rest_finishes(command, tmp_path, monkeypatch, backend):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    get_reusable_executor().shutdown()  # processes of other tests do not look there
    text = SWEEP.replace("{policy: helios}", "{policy: custom, object: 'broken:Broken', settings: {number: 0}}")
    text = text.replace("arms.helios.limit", "arms.helios.settings.number").replace("[20, 80]", "[1, 2, 3]")
    workers = ["sweep.workers=2"] if backend == "processes" else []
    said = command(*write_study(tmp_path, text), f"sweep.backend={backend}", *workers)
    assert said.status == 0, said.err
    failed = said.summary["sweep"]["failed"]
    assert [entry["parameters"] for entry in failed] == [{"cap_bound": c, "limit": 2} for c in (0.01, 0.2)]
    assert all("raised ZeroDivisionError: no such luck (" in entry["error"] for entry in failed)
    assert "2 failed" in said.out
    assert "no such luck" in (tmp_path / "out" / "report.html").read_text()
    table = pq.read_table(tmp_path / "out" / "designs.parquet").to_pylist()
    assert [row["design"] for row in table if row["error"]] == ["#2", "#5"]
    assert all((row["agreement"] is None) == bool(row["error"]) for row in table)
    again = command(*write_study(tmp_path, text), f"sweep.backend={backend}")
    assert len(lines(tmp_path / "out")) == 6  # a defect may be mended: its designs are tried again, the rest is kept
    assert again.summary["sweep"] == said.summary["sweep"]


def test_a_design_that_cannot_be_is_one_failed_design():
    result = sweep(example(parameters={
        "limit": AxisConfig(settings=["arms.helios.limit"], values=[50, 100, 20]),
        "bound": AxisConfig(settings=["objective.max_disagreement"], values=[0.1, 7.0]),
    }))  # fmt: skip
    errors = {tuple(d.parameters.values()): d.error for d in result.designs}
    assert [key for key, error in errors.items() if error is None] == [(50, 0.1), (20, 0.1)]
    assert "below the window of 100 tokens" in errors[100, 0.1]
    assert "from 0 to 1" in errors[50, 7.0]


def test_a_sweep_of_which_every_design_fails_is_a_mistake(command, tmp_path):
    text = SWEEP.replace("[20, 80]", "[120, 180]")
    said = command(*write_study(tmp_path, text))
    assert said.status == 1
    assert said.out == ""
    assert "below the window of 100 tokens" in said.err
    assert "Traceback" not in said.err


def test_a_line_of_a_journal_is_on_the_disk_when_it_counts(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append((tmp_path / "finished.jsonl").read_bytes()))
    journal, outcome = Journal(tmp_path, OutcomeLines()), Outcome(None, "no such luck", 1.0)
    for n, key in enumerate("ab"):
        journal.add(Task(key, {"design": key}, ()), outcome)
        assert len(synced) == n + 1
        assert synced[-1] == (tmp_path / "finished.jsonl").read_bytes()
        assert synced[-1].count(b"\n") == n + 1


EDITED = '{"key": "a", "error": 3, "metrics": null, "wall_s": 1, "sha256": "0"}'


@pytest.mark.parametrize("text", ['{"key": "a"}', EDITED, "[" * 100_000, "\xff", ""])
def test_a_damaged_line_of_a_journal_is_cut_out_and_said(tmp_path, capsys, text):
    (tmp_path / "finished.jsonl").write_text(f"{text}\n", encoding="latin-1")
    assert Journal(tmp_path, OutcomeLines()).get(Task("a", {}, ())) is None
    assert "a line is damaged" in capsys.readouterr().err
    assert (tmp_path / "finished.jsonl").read_text() == ""
    Journal(tmp_path, OutcomeLines())
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("change", [{"error": 3}, {"error": None}, {"metrics": {"switches": "many"}}, {"wall_s": None}])
def test_an_outcome_that_cannot_be_is_run_anew(tmp_path, capsys, change):
    line = {"wall_s": 1.0, "error": "no such luck", "metrics": None} | change

    class Edited(OutcomeLines):
        def save(self, folder, key, result):
            return line

    task = Task("a", {"design": "x"}, ())
    Journal(tmp_path, Edited()).add(task, Outcome(None, "no such luck", 1.0))
    assert Journal(tmp_path, OutcomeLines()).get(task) is None
    assert "design x is run anew" in capsys.readouterr().err


def test_a_killed_worker_is_a_message(monkeypatch):
    workers = Workers(Place("processes", 2))
    with pytest.raises(UserError, match=r"sweep\.workers=2.*killed from outside"):
        list(workers(_killed, {"a": (), "b": ()}))


def _killed(jobs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
