"""Sweeps as a user runs them: what is said and written, processes, a search, a kill in the middle, failed designs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from joblib.externals.loky import get_reusable_executor

import helios_sim
from command_line import CommandLine, write_study
from helios_sim.errors import UserError
from helios_sim.report.designs_table import designs_table
from helios_sim.sweep.backends import Workers
from helios_sim.sweep.journal import Journal
from helios_sim.sweep.plan import plan_sweep
from helios_sim.sweep.run import run_plan, sweep
from helios_sim.sweep.schema import DesignsConfig, ParameterConfig
from sweep_example import SWEEP, example

FREE = {"cap_bound": ParameterConfig(settings=["objective.max_disagreement"], low=0.01, high=0.3),
        "limit": ParameterConfig(settings=["arms.helios.limit"], low=10, high=90, whole=True),
        "prompts": ParameterConfig(settings=["arms.helios.prompts_per_candidate"], values=[1, 2, 5]),
        "on_breach": ParameterConfig(settings=["arms.helios.on_breach"], values=["cheaper", "load_only"])}  # fmt: skip
SEARCH: dict[str, Any] = {"method": "search", "parameters": FREE, "designs": 24, "generation": 6}


@pytest.fixture
def helios(capsys, monkeypatch, tmp_path) -> CommandLine:
    return CommandLine(capsys, monkeypatch, tmp_path)


def test_what_is_said_and_written(helios, tmp_path):
    said = helios(*write_study(tmp_path, SWEEP))
    folder = tmp_path / "out"
    assert said.status == 0, said.err
    assert said.summary == json.loads((folder / "summary.json").read_text())
    assert said.out.splitlines()[-2] == f"output folder: {folder}"
    assert {path.name for path in folder.iterdir()} == {
        ".hydra", "designs.parquet", "pareto.png", "figures", "report.html", "summary.json", "provenance.json",
        "finished.jsonl",
    }  # fmt: skip
    table = pq.read_table(folder / "designs.parquet").to_pylist()
    assert [(row["cap_bound"], row["limit"]) for row in table] == [
        (0.01, 20), (0.01, 80), (0.2, 20), (0.2, 80), (None, None), (None, None),
    ]  # fmt: skip
    assert [row["arm"] for row in table] == ["helios"] * 4 + ["full_depth", "helios"]
    front = [row["design"] for row in table if row["front"]]
    assert sorted(entry["design"] for entry in said.summary["sweep"]["front"]) == sorted(front) != []
    assert said.summary["sweep"]["designs"] == 4
    assert list(said.summary["arms"]) == ["full_depth", "helios"]
    assert table[4]["agreement"] == said.summary["arms"]["full_depth"]["metrics"]["agreement"] == 1.0
    page = (folder / "report.html").read_text()
    for sentence in said.summary["verdict"]:
        assert sentence in said.out
    assert "http" not in page.replace("http://www.w3.org", "").replace("https://github.com", "")
    assert page.count("<svg ") == 2
    assert "\x1b" not in said.out + said.err


def test_every_design_sees_the_same_requests(helios, tmp_path):
    """At full depth a HELIOS setting changes nothing, to the last bit of every metric."""
    text = SWEEP.replace("arms.helios.limit", "objective.max_bits_per_char").replace("[20, 80]", "[5, 9]")
    assert helios(*write_study(tmp_path, text), "sweep.arm=full_depth").status == 0
    table = pq.read_table(tmp_path / "out" / "designs.parquet").drop_columns(["design", "cap_bound", "limit"])
    rows = table.to_pylist()
    assert rows[0] == rows[1] == rows[2] == rows[3]


def test_processes_do_not_change_a_bit():
    assert designs_table(sweep(example(backend="processes", workers=2))).equals(designs_table(sweep(example())))


@pytest.mark.parametrize("sampler", ["nsga2", "tpe"])
def test_a_search_is_the_same_on_any_number_of_workers(sampler):
    pytest.importorskip("optuna")
    one = designs_table(sweep(example(**SEARCH, sampler=sampler)))
    two = designs_table(sweep(example(**SEARCH, sampler=sampler, backend="processes", workers=2)))
    other = designs_table(sweep(example(**SEARCH, sampler=sampler, seed=1)))
    assert one.equals(two)
    assert not one.equals(other)
    assert 12 < len(one) - 2 <= 24  # the same design is not run or named twice


def test_a_search_gets_closer_than_its_first_generation():
    pytest.importorskip("optuna")
    result = sweep(example(**(SEARCH | {"designs": 48, "objectives": ["throughput_requests_per_s"]})))
    best = [design.metrics["throughput_requests_per_s"] for design in result.designs if design.metrics]
    assert max(best) == result.front[0].metrics["throughput_requests_per_s"]
    assert sum(best[-12:]) / 12 > sum(best[:6]) / 6


class Stopped(Exception):
    pass


def counting(after: int | None) -> tuple[Callable[..., None], list[bool]]:
    """Notes whether each run was kept from before; stops the sweep after so many that were not."""
    kept: list[bool] = []

    def note(outcome: object, was_kept: bool) -> None:
        kept.append(was_kept)
        if after is not None and kept.count(False) == after:
            raise Stopped

    return note, kept


@pytest.mark.parametrize("settings", [{}, SEARCH], ids=["grid", "search"])
def test_a_sweep_stopped_half_way_goes_on_with_nothing_repeated(tmp_path, settings):
    plan = plan_sweep(lambda changes: example(**settings))
    whole = designs_table(run_plan(plan, None, {}, lambda outcome, kept: None))
    note, _ = counting(after=10)
    with pytest.raises(Stopped):
        run_plan(plan, tmp_path, {}, note)
    (tmp_path / "finished.jsonl").open("a").write('{"key": "half a li')  # as a kill while writing leaves it
    note, kept = counting(after=None)
    resumed = designs_table(run_plan(plan, tmp_path, {}, note))
    assert resumed.equals(whole)
    assert kept.count(True) == 10
    assert kept.count(False) == len(whole) - 10
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
        assert err.splitlines()[-1].startswith("helios_sim: stopped")
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
def test_a_failed_design_is_reported_and_the_rest_finishes(helios, tmp_path, monkeypatch, backend):
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.syspath_prepend(tmp_path)
    get_reusable_executor().shutdown()  # processes of other tests do not look there
    text = SWEEP.replace("{policy: helios}", "{policy: custom, object: 'broken:Broken', settings: {number: 0}}")
    text = text.replace("arms.helios.limit", "arms.helios.settings.number").replace("[20, 80]", "[1, 2, 3]")
    said = helios(*write_study(tmp_path, text), f"sweep.backend={backend}", "sweep.workers=2")
    assert said.status == 0, said.err
    failed = said.summary["sweep"]["failed"]
    assert [entry["parameters"] for entry in failed] == [{"cap_bound": c, "limit": 2} for c in (0.01, 0.2)]
    assert all(entry["error"].startswith("ZeroDivisionError: no such luck (") for entry in failed)
    assert "2 failed" in said.out
    assert "no such luck" in (tmp_path / "out" / "report.html").read_text()
    table = pq.read_table(tmp_path / "out" / "designs.parquet").to_pylist()
    assert [row["design"] for row in table if row["error"]] == ["#2", "#5"]
    assert all((row["agreement"] is None) == bool(row["error"]) for row in table)
    again = helios(*write_study(tmp_path, text), f"sweep.backend={backend}")
    assert len(lines(tmp_path / "out")) == 6  # a defect may be mended: its designs are tried again, the rest is kept
    assert again.summary["sweep"] == said.summary["sweep"]


def test_a_design_that_cannot_be_is_one_failed_design():
    result = sweep(example(parameters={
        "limit": ParameterConfig(settings=["arms.helios.limit"], values=[50, 100, 20]),
        "bound": ParameterConfig(settings=["objective.max_disagreement"], values=[0.1, 7.0]),
    }))  # fmt: skip
    errors = {tuple(d.parameters.values()): d.error for d in result.designs}
    assert [key for key, error in errors.items() if error is None] == [(50, 0.1), (20, 0.1)]
    assert "below the window of 100 tokens" in errors[100, 0.1]
    assert "from 0 to 1" in errors[50, 7.0]


def test_a_sweep_of_which_every_design_fails_is_a_mistake(helios, tmp_path):
    text = SWEEP.replace("[20, 80]", "[120, 180]")
    said = helios(*write_study(tmp_path, text))
    assert said.status == 1
    assert said.out == ""
    assert "below the window of 100 tokens" in said.err
    assert "Traceback" not in said.err


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("sweep.backend=cloud", ["sweep.backend='cloud'", "serial, processes, ray"]),
        ("sweep.backends=ray", ["sweep.backends='ray'", "sweep.backend"]),
        ("sweep.parameters.limit.settings=[arms.helios.limmit]", ["sweep.parameters.limit", "limmit"]),
        ("sweep.parameters.limit.values=[x]", ["limit", "'x'"]),
        ("sweep.parameters.limit.low=x", ["sweep.parameters.limit.low='x'"]),
        ("sweep.objectives=[joy]", ["sweep.objectives='joy'", "no such metric"]),
        ("sweep.arm=nobody", ["sweep.arm='nobody'", "full_depth, helios"]),
        ("'gates=[{arm: helios, metric: agreement, low: 1}]'", ["gates", "a sweep of designs has none"]),
    ],
)
def test_one_message_for_a_mistake_and_nothing_left(helios, tmp_path, arguments, parts):
    said = helios(*write_study(tmp_path, SWEEP), arguments.strip("'"))
    assert said.status == 1, said.out
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    for part in parts:
        assert part in said.err
    assert not (tmp_path / "out").exists()


def test_settings_of_a_sweep_are_refused_where_nothing_is_swept(helios, tmp_path):
    said = helios(*write_study(tmp_path), "sweep.backend=ray")
    assert said.status == 1
    assert "sweep.backend='ray': does nothing" in said.err


def test_a_parameter_from_the_command_line(helios, tmp_path):
    more = "+sweep.parameters={k: {settings: [arms.helios.shortlist], values: [1, 2]}}"
    fewer = "sweep.parameters.limit.values=[30]"
    said = helios(*write_study(tmp_path, SWEEP), more, fewer)
    assert said.status == 0, said.err
    table = pq.read_table(tmp_path / "out" / "designs.parquet").to_pylist()
    assert [(row["cap_bound"], row["limit"], row["k"]) for row in table[:-2]] == [
        (0.01, 30, 1), (0.01, 30, 2), (0.2, 30, 1), (0.2, 30, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("library", "settings"),
    [("joblib", {"backend": "processes"}), ("ray", {"backend": "ray"}), ("optuna", {"method": "search"})],
)
def test_a_missing_extra_is_named(monkeypatch, library, settings):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}.*make sweep"):
        sweep(example(**settings))


def test_several_sweeps_in_one_command(helios, tmp_path):
    said = helios(*write_study(tmp_path, SWEEP), "-m", "server.max_running_requests=1,2")
    assert said.status == 0, said.err
    summaries = [json.loads(line) for line in said.out.splitlines() if line.startswith('{"schema_version"')]
    limits = [summary["provenance"]["configuration"]["server"]["max_running_requests"] for summary in summaries]
    assert limits == [1, 2]
    assert summaries[0]["sweep"]["front"] != summaries[1]["sweep"]["front"]


def test_a_damaged_journal_says_where(tmp_path):
    (tmp_path / "finished.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(UserError, match=r"finished\.jsonl, line 1"):
        Journal(tmp_path)


def test_a_killed_worker_is_a_message(monkeypatch):
    workers = Workers(DesignsConfig(backend="processes", workers=2), run=_killed)
    with pytest.raises(UserError, match=r"sweep\.workers=2.*killed from outside"):
        list(workers({"a": (), "b": ()}))


def _killed(jobs: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
