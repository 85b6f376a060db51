"""Sweeps as a user runs them: what is said and written, on processes, as a search, and mistakes."""

from __future__ import annotations

import json
import sys

import pyarrow.parquet as pq
import pytest

from command_line import write_study
from helios_sim.errors import UserError
from helios_sim.report.designs import designs_table
from helios_sim.study.sweep import sweep
from sweep_example import SEARCH, SWEEP, example

pytestmark = pytest.mark.slow


def test_figures_are_as_asked(command, tmp_path):
    study = write_study(tmp_path, SWEEP)
    assert command(*study, "pictures=false", into="none").status == 0
    assert not {"report.html", "pareto.png", "figures"} & {path.name for path in (tmp_path / "none").iterdir()}
    assert command(*study, "report.style=paper", into="paper").status == 0
    assert (tmp_path / "paper" / "pareto.pdf").read_bytes().startswith(b"%PDF")


def test_what_is_said_and_written(command, tmp_path):
    said = command(*write_study(tmp_path, SWEEP))
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


@pytest.mark.usefixtures("sketched")
def test_every_design_sees_the_same_requests(command, tmp_path):
    """At full depth a HELIOS setting changes nothing, to the last bit of every metric."""
    text = SWEEP.replace("arms.helios.limit", "objective.max_bits_per_char").replace("[20, 80]", "[5, 9]")
    assert command(*write_study(tmp_path, text), "sweep.arm=full_depth").status == 0
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


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("sweep.backend=cloud", ["sweep.backend='cloud'", "serial, processes, ray"]),
        ("sweep.backends=ray", ["sweep.backends='ray'", "sweep.backend"]),
        ("sweep.parameters.limit.settings=[arms.helios.limmit]", ["sweep.parameters.limit", "limmit"]),
        ("sweep.parameters.limit.values=[x]", ["limit", "'x'"]),
        ("sweep.parameters.limit.low=x", ["sweep.parameters.limit.low='x'"]),
        ("sweep.objectives=[joy]", ["sweep.objectives='joy'", "one of "]),
        ("sweep.arm=nobody", ["sweep.arm='nobody'", "full_depth, helios"]),
        ("'gates=[{arm: helios, metric: agreement, low: 1}]'", ["gates", "a sweep of designs has none"]),
    ],
)
def test_one_message_for_a_mistake_and_nothing_left(command, tmp_path, arguments, parts):
    said = command(*write_study(tmp_path, SWEEP), arguments.strip("'"))
    assert said.status == 1, said.out
    assert said.out == ""
    assert len(said.err.strip().splitlines()) == 1
    for part in parts:
        assert part in said.err
    assert not (tmp_path / "out").exists()


def test_settings_of_a_sweep_are_refused_where_nothing_is_swept(command, tmp_path):
    said = command(*write_study(tmp_path), "sweep.backend=ray")
    assert said.status == 1
    assert "sweep.backend='ray': does nothing" in said.err


@pytest.mark.usefixtures("sketched")
def test_a_parameter_from_the_command_line(command, tmp_path):
    more = "+sweep.parameters={k: {settings: [arms.helios.shortlist], values: [1, 2]}}"
    fewer = "sweep.parameters.limit.values=[30]"
    said = command(*write_study(tmp_path, SWEEP), more, fewer)
    assert said.status == 0, said.err
    table = pq.read_table(tmp_path / "out" / "designs.parquet").to_pylist()
    assert [(row["cap_bound"], row["limit"], row["k"]) for row in table[:-2]] == [
        (0.01, 30, 1), (0.01, 30, 2), (0.2, 30, 1), (0.2, 30, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("library", "settings"),
    [("ray", {"backend": "ray"}), ("optuna", {"method": "search"})],
)
def test_a_missing_extra_is_named(monkeypatch, library, settings):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"needs {library}.*make sweep"):
        sweep(example(**settings))


@pytest.mark.usefixtures("sketched")
def test_several_sweeps_in_one_command(command, tmp_path):
    said = command(*write_study(tmp_path, SWEEP), "-m", "server.max_running_requests=1,2")
    assert said.status == 0, said.err
    summaries = [json.loads(line) for line in said.out.splitlines() if line.startswith('{"schema_version"')]
    limits = [summary["provenance"]["configuration"]["server"]["max_running_requests"] for summary in summaries]
    assert limits == [1, 2]
    assert summaries[0]["sweep"]["front"] != summaries[1]["sweep"]["front"]
