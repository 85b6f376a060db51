"""Figures of single replicas and of kinds: they add up to the run's, and the page and the summary show them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from command_line import write_study
from helios_sim.report.breakdown import ReplicaFigures, Spread, by_kind
from helios_sim.study.jobs import make_job, run_job
from helios_sim.study.schema import ArrivalsConfig, ServerConfig
from test_study_fleet import FULL_DEPTH, study

CLUSTER = """# @package _global_
name: cluster_of_two_kinds
models: [opt-1.3b]
server: {router: least_loaded}
cluster:
  kinds:
    old: {count: 2}
    new: {hardware: h100-80gb, policy: early_exit}
workload:
  n_requests: 30
  lengths: {output: {p50: 12, p95: 30, maximum: 40}}
arms:
  full_depth: {policy: full_depth}
"""


def one(replica: int, kind: str, requests: int, mean: float | None, e2e_s: float | None) -> ReplicaFigures:
    return ReplicaFigures(replica, kind, "card", ("m",), requests, mean, mean, 1.0, e2e_s, e2e_s, 1, 2, 5)


def test_kinds_weigh_their_replicas_by_what_they_served() -> None:
    rows = by_kind([one(0, "a", 3, 0.5, 2.0), one(1, "a", 1, 1.0, 6.0), one(2, "b", 0, None, None)])
    assert [(row.kind, row.replicas, row.requests_completed, row.switches, row.loads) for row in rows] == [
        ("a", 2, 4, 2, 4), ("b", 1, 0, 1, 2),
    ]  # fmt: skip
    assert rows[0].busy_fraction == Spread(0.75, 0.5, 1.0)
    assert rows[0].e2e_s == Spread(3.0, 2.0, 6.0)
    assert (rows[1].busy_fraction, rows[1].e2e_s) == (None, None)


def test_replicas_add_up_to_the_run(tmp_path: Path) -> None:
    config = study(tmp_path, router="least_loaded")
    config = replace(config, workload=replace(config.workload, n_requests=40, arrivals=ArrivalsConfig("poisson", 9.0)))
    result = run_job(make_job("arm", FULL_DEPTH, config, 1))
    metrics, replicas = result.replicate.metrics, result.replicas
    assert [(it.replica, it.kind, it.models) for it in replicas] == [
        (0, "quick", ("small",)), (1, "quick", ("small",)), (2, "deep", ("large",)),
    ]  # fmt: skip
    assert sum(it.requests_completed for it in replicas) == metrics["requests_completed"] == 40
    assert sum(it.busy_fraction for it in replicas) / 3 == pytest.approx(metrics["busy_fraction"])
    assert sum(it.throughput_tokens_per_s for it in replicas) == pytest.approx(metrics["throughput_tokens_per_s"])
    assert max(it.hbm_peak_bytes for it in replicas) == metrics["hbm_peak_bytes"]
    in_system = metrics["throughput_requests_per_s"] * metrics["e2e_s_mean"]  # Little's law
    assert sum(it.requests_in_it_mean for it in replicas) == pytest.approx(in_system)
    assert result.timeline_transitions_ns == ()
    whole = sum(it.e2e_s_mean * it.requests_completed for it in replicas) / 40
    assert whole == pytest.approx(metrics["e2e_s_mean"])


def test_one_replica_is_its_own_run(tmp_path: Path) -> None:
    config = replace(study(tmp_path, {}), server=ServerConfig())
    result = run_job(make_job("arm", FULL_DEPTH | {"model": "small"}, config, 0))
    (only,) = result.replicas
    assert only.e2e_s_p99 == result.replicate.metrics["e2e_s_p99"]
    assert (only.kind, only.card) == ("", "box")


@pytest.mark.slow
def test_a_cluster_is_shown_on_the_page_and_in_the_summary(command, tmp_path: Path) -> None:
    said = command(*write_study(tmp_path, CLUSTER))
    assert said.status == 0, said.err
    replicas = json.loads((tmp_path / "out" / "summary.json").read_text())["arms"]["full_depth"]["replicas"]
    assert [(it["kind"], it["card"]) for it in replicas] == [
        ("old", "a100-40gb"), ("old", "a100-40gb"), ("new", "h100-80gb"),
    ]  # fmt: skip
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("old: 2 x a100-40gb", "new: 1 x h100-80gb", "the first of 3 replicas", "2 x a100-40gb (old)"):
        assert text in page, text
    assert (tmp_path / "out" / "figures" / "replicas.png").stat().st_size > 0


@pytest.mark.slow
def test_a_single_card_has_no_word_of_replicas(command, tmp_path: Path) -> None:
    said = command(*write_study(tmp_path))
    assert said.status == 0, said.err
    assert "replicas" not in said.summary["arms"]["full_depth"]
    assert "Replicas" not in (tmp_path / "out" / "report.html").read_text()
    assert not (tmp_path / "out" / "figures" / "replicas.png").exists()
