"""Faults as settings: what is refused, what a study says of them, and that they leave everything else as it is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from command_line import CommandLine
from helios_sim import UserError, study_config
from helios_sim.report.faults import fault_sentences
from helios_sim.report.figures.arms import without_dead
from helios_sim.request import NS_PER_S
from helios_sim.study.command import run
from helios_sim.study.fleet import build_fleet
from helios_sim.study.schema import Config, FaultsConfig
from helios_sim.vary.settings import with_settings
from helios_sim.workload.faults import FaultKind, Struck

SMALL = ("workload.n_requests=60", "pictures=true")
DIES = {"workload.faults.replica_dies.at_s": [5.0], "workload.faults.replica_dies.lasts_s": 4.0}


def quickstart(**changes: object) -> Config:
    config = study_config("quickstart", "workload.n_requests=60")
    wanted = {name: config.arms[name] for name in ("full_depth_opt-1.3b", "helios")}
    return with_settings(replace(config, arms=wanted, figures=[], sweeps=[], seeds=[0]), changes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("workload.faults.replica_dies.at_s=[0]",), ["workload.faults.replica_dies.at_s", "above 0"]),
        (("workload.faults.replica_dies.at_s=[1,1]",), ["workload.faults.replica_dies.at_s", "different"]),
        (("workload.faults.load_fails.rate_per_hour=0",), ["workload.faults.load_fails.rate_per_hour=0.0"]),
        (("workload.faults.load_fails.rate_per_hour=nan",), ["workload.faults.load_fails.rate_per_hour=nan"]),
        (("workload.faults.slow_card={at_s: [1], factor: 0.5}",), ["workload.faults.slow_card.factor=0.5", "from 1"]),
        (("workload.faults.replica_dies={at_s: [1], lasts_s: -1}",), ["workload.faults.replica_dies.lasts_s=-1.0"]),
        (("workload.faults.replica_dies={at_s: [1], replicas: [1]}",), ["replica_dies.replicas=[1]", "from 0 to 0"]),
        (("workload.faults.replica_dies={at_s: [1], replicas: []}",), ["replica_dies.replicas=[]"]),
        (("workload.faults.retries=-1",), ["workload.faults.retries=-1", "from 0 to 1000"]),
        (("workload.faults.retries=1",), ["workload.faults.retries='1'", "does nothing here", "replica_dies"]),
        (("workload.faults.slow_card.factor=3",), ["workload.faults.slow_card.factor='3'", "does nothing here"]),
        (("workload.faults.iteration_fails.lasts_s=3",), ["lasts_s"]),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_a_mistake_is_one_message(command: CommandLine, words: tuple[str, ...], parts: list[str]) -> None:
    said = command("+experiment=quickstart", *words)
    assert said.status == 1
    assert "Traceback" not in said.err
    assert all(part in said.err for part in parts), said.err


@pytest.mark.slow
@pytest.mark.usefixtures("sketched")
def test_what_a_study_says_of_faults(command: CommandLine, tmp_path: Path) -> None:
    said = command("+experiment=faults", "workload.n_requests=160", "jobs=1", into="out")
    assert said.status == 0, said.err
    arms = said.summary["arms"]
    assert all(arm["faults"]["without"]["requests_completed"] == 160 for arm in arms.values())
    assert all(arm["metrics"]["availability"] < 1 for arm in arms.values())
    assert all(f"{name}: " in said.out for name in arms)
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<section id="faults">' in page
    assert "replica dies on replica 0 at 30 s, for 20 s; iteration fails 60 per hour and replica; " in page
    causes = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pydict()["cause"]
    assert any("faulted (what replica dies for 20 s: " in cause for cause in causes)
    without = command("+experiment=quickstart", "workload.n_requests=14", "jobs=1", into="none")
    assert '<section id="faults">' not in (tmp_path / "none" / "report.html").read_text()
    assert {arm["metrics"]["availability"] for arm in without.summary["arms"].values()} == {None}


@pytest.mark.slow
def test_sentences_follow_the_figures() -> None:
    result = run(quickstart(**DIES))
    told = dict(sentence.split(": ", 1) for sentence in fault_sentences(result))
    for name, arm in result.arms.items():
        metrics = arm.metrics
        assert f"sent again: {metrics['requests_retried']}, lost: {metrics['requests_lost']}" in told[name]
        assert told[name].startswith(f"{sum(arm.faults.hits.values())} fault")
        assert arm.faults.without == run(quickstart()).arms[name].metrics
    assert fault_sentences(run(quickstart())) == []


@pytest.mark.slow
def test_faults_move_no_request() -> None:
    """Arrivals, lengths, tasks and exits are those without faults."""
    plain, faulty = run(quickstart()), run(quickstart(**DIES))
    for name in plain.arms:
        one, other = (result.arms[name].replicates[0].records for result in (plain, faulty))
        for column in ("request_id", "arrival_ns", "task", "prompt_chars", "output_chars"):
            assert (getattr(one, column) == getattr(other, column)).all(), column


@pytest.mark.slow
def test_the_plan_is_of_the_seed_alone() -> None:
    changes = {"workload.faults.slow_card.rate_per_hour": 100.0, "workload.arrivals.rate_per_s": 7.0}
    plans = [build_fleet(quickstart(**c), 3).faults for c in (changes, changes | {"objective.goal": "energy"})]
    assert plans[0] == plans[1]
    assert build_fleet(quickstart(), 3).faults is None


def test_defaults_strike_nothing() -> None:
    assert FaultsConfig().strikes == {}
    assert json.loads(json.dumps(list(FaultsConfig().by_kind))) == [
        "replica_dies", "iteration_fails", "out_of_memory", "load_fails", "transfer_stalls", "slow_card",
    ]  # fmt: skip


def test_a_config_from_python_is_checked_too() -> None:
    with pytest.raises(UserError, match="retries=-2"):
        FaultsConfig(retries=-2)


@pytest.mark.slow
def test_the_timeline_of_a_dead_replica_shows_nothing_that_runs() -> None:
    """From 5 to 9 s it is dead; before it had something to do."""
    result = run(quickstart(**DIES))
    for arm in result.arms.values():
        assert arm.timeline is not None
        (fault,) = arm.timeline_faults
        rows = without_dead(arm.timeline.rows, arm.timeline_faults)
        times = [row[0] for row in rows]
        assert times == sorted(times)
        assert (fault.time_ns, fault.until_ns) == (5 * NS_PER_S, 9 * NS_PER_S)
        dead = [row for row in rows if fault.time_ns <= row[0] < fault.until_ns and row[2] == 0]
        assert [(row[2], row[3], row[5], row[6]) for row in dead] == [(0, 0, 0, 0)]
        at = rows.index(dead[0])
        assert rows[at - 1][3] > 0
        assert rows[at + 1][0] == fault.until_ns
        assert [row for row in rows if row[0] > fault.until_ns] == [
            row for row in arm.timeline.rows if row[0] > fault.until_ns
        ]


def test_faults_before_and_after_a_timeline_change_nothing() -> None:
    rows = [(10, "m", 24, 3, 1, 5, 6), (20, "m", 24, 2, 0, 4, 6)]
    for time_ns, kind in ((5, FaultKind.REPLICA_DIES), (25, FaultKind.REPLICA_DIES), (12, FaultKind.SLOW_CARD)):
        assert without_dead(rows, [Struck(time_ns, kind, 0, True, time_ns + 3)]) == rows
    until_the_end = without_dead(rows, [Struck(12, FaultKind.REPLICA_DIES, 0, True, 99)])
    assert [row[:4] for row in until_the_end] == [(10, "m", 24, 3), (12, "m", 0, 0)]
