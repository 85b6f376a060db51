"""Metrics against numbers that can be worked out by hand, and what must hold whatever was served."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.report.breakdown import by_task
from helios_sim.report.compare import compare
from helios_sim.report.figures.arms import bits_over_run
from helios_sim.report.metrics import (
    DEFINITIONS,
    Band,
    Cards,
    MetricValue,
    Power,
    compute_metrics,
    energy_band_j,
    mean_metrics,
)
from helios_sim.report.records import Records
from helios_sim.request import NS_PER_S, RequestRecord, Slo, Status
from helios_sim.serving.stats import RunStats


def record(request_id: int, arrival_s: float, first_s: float, last_s: float, tokens: int) -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        replica=0,
        task=0,
        model="m",
        status=Status.COMPLETED,
        drop_reason=None,
        arrival_ns=round(arrival_s * NS_PER_S),
        scheduled_ns=round(arrival_s * NS_PER_S),
        first_token_ns=round(first_s * NS_PER_S),
        last_token_ns=round(last_s * NS_PER_S),
        prompt_tokens=90,
        output_tokens=tokens,
        prompt_chars=360,
        output_chars=4 * tokens,
        layers_run=6 * tokens,
        early_tokens=tokens,
        breach_tokens=tokens // 2,
        agreed_tokens=tokens - 1,
        evaluated_tokens=0,
        preemptions=0,
    )


def scored(request_id: int, task: int, bits: float | None, tokens: int, model: str = "m") -> RequestRecord:
    """`tokens` tokens of 4 characters each."""
    microbits = None if bits is None else round(bits * 1e6)
    return replace(record(request_id, 0, 1, 2, tokens), task=task, microbits=microbits, model=model)


def dropped(request_id: int) -> RequestRecord:
    return RequestRecord(
        request_id=request_id,
        replica=0,
        task=0,
        model="m",
        status=Status.DROPPED,
        drop_reason="prompt beyond the model's context",
        arrival_ns=0,
        scheduled_ns=None,
        first_token_ns=None,
        last_token_ns=None,
        prompt_tokens=9000,
        output_tokens=0,
        prompt_chars=36000,
        output_chars=0,
        layers_run=0,
        early_tokens=0,
        breach_tokens=0,
        agreed_tokens=0,
        evaluated_tokens=0,
        preemptions=0,
    )


TWO = Records.of([record(1, 1.0, 1.5, 3.5, 11), record(0, 0.0, 0.25, 0.25, 1), dropped(2)])


def test_every_metric_is_defined_in_the_report_and_the_other_way_round() -> None:
    assert set(compute_metrics(TWO, RunStats())) == set(DEFINITIONS)


def test_latencies_by_hand() -> None:
    metrics = compute_metrics(TWO, RunStats())
    assert metrics["ttft_s_mean"] == pytest.approx(0.375)
    assert metrics["e2e_s_p50"] == pytest.approx((0.25 + 2.5) / 2)
    assert metrics["tpot_s_mean"] == metrics["tpot_s_p99"] == pytest.approx(0.2)  # the one-token request is left out
    assert metrics["span_s"] == pytest.approx(3.5)
    assert metrics["throughput_tokens_per_s"] == pytest.approx(12 / 3.5)
    assert metrics["throughput_chars_per_s"] == pytest.approx(48 / 3.5)
    assert metrics["layers_per_token"] == 6
    assert metrics["agreement"] == pytest.approx(10 / 12)
    assert (metrics["requests_completed"], metrics["requests_dropped"], metrics["requests_unfinished"]) == (2, 1, 0)


def test_bits_per_char_weighs_requests_by_their_characters() -> None:
    rows = [scored(0, 0, 10.0, 2), scored(1, 1, 50.0, 10), replace(dropped(2), microbits=7)]
    assert compute_metrics(Records.of(rows), RunStats())["bits_per_char"] == pytest.approx(60 / 48)
    rows[0] = scored(0, 0, None, 2)
    assert compute_metrics(Records.of(rows), RunStats())["bits_per_char"] is None
    assert Records.of(rows).to_table("arm", 0)["bits"].to_pylist() == [None, 50.0, 7e-6]


def test_each_task_has_figures_of_its_own_over_all_replicates() -> None:
    first = Records.of([scored(0, 0, 10.0, 2), scored(1, 2, 50.0, 10), dropped(2)])
    second = Records.of([scored(0, 0, 30.0, 8, "n"), scored(1, 0, 8.0, 2)])
    figures = by_task([first, second], ("prose", "dialogue", "code"))
    assert list(figures) == ["prose", "code"]  # nobody asked for dialogue
    prose = figures["prose"]
    assert prose.requests == 3
    assert prose.bits_per_char == pytest.approx(48 / (4 * 12))
    assert prose.layers_per_token == 6
    assert prose.agreement == pytest.approx((12 - 3) / 12)
    assert prose.e2e_s_mean == 2
    assert prose.models == pytest.approx({"m": 2 / 3, "n": 1 / 3})
    assert figures["code"].bits_per_char == pytest.approx(50 / 40)
    unknown = Records.of([scored(0, 0, None, 2)])
    assert by_task([first, unknown], ("prose",))["prose"].bits_per_char is None


def test_quality_over_the_run_is_that_of_consecutive_requests() -> None:
    rows = [scored(i, 0, 4.0 * (i // 2 + 1), 2) for i in range(6)]
    assert bits_over_run(Records.of(rows), 3) == pytest.approx([0.5, 1.0, 1.5])
    rows[3] = replace(dropped(3), microbits=0)
    assert bits_over_run(Records.of(rows), 6)[3] is None


def test_bits_are_compared_over_the_requests_that_both_arms_completed() -> None:
    ours = Records.of([scored(0, 0, 8.0, 2), scored(1, 0, 20.0, 10), dropped(2)])
    theirs = Records.of([scored(0, 0, 10.0, 2), scored(1, 0, 25.0, 10), scored(2, 0, 9.0, 3)])
    found = compare([(ours, compute_metrics(ours, RunStats()))], [(theirs, compute_metrics(theirs, RunStats()))])[
        "bits_per_char"
    ]
    assert found.ratio == pytest.approx(0.8)
    unknown = Records.of([scored(0, 0, None, 2), scored(1, 0, None, 10)])
    assert "bits_per_char" not in compare(
        [(ours, compute_metrics(ours, RunStats()))], [(unknown, compute_metrics(unknown, RunStats()))]
    )


def test_what_is_undefined_is_none() -> None:
    metrics = compute_metrics(Records.of([dropped(0)]), RunStats())
    for name in ("ttft_s_p99", "tpot_s_mean", "itl_s_p50", "throughput_requests_per_s", "agreement", "batch_mean"):
        assert metrics[name] is None, name
    assert metrics["goodput_requests_per_s"] is None  # no SLO was asked for
    assert metrics["energy_j_per_char"] is None
    assert compute_metrics(Records.of([record(0, 0, 1, 1, 1)]), RunStats())["tpot_s_mean"] is None


def test_goodput_counts_only_requests_that_meet_every_slo() -> None:
    metrics = compute_metrics(TWO, RunStats(), slo=Slo(ttft_s=1.0, e2e_s=1.0))
    assert metrics["goodput_requests_per_s"] == pytest.approx(1 / 3.5)
    assert metrics["slo_attainment"] == pytest.approx(1 / 3)  # the dropped request counts against it
    assert compute_metrics(TWO, RunStats(), slo=Slo(tpot_s=0.2))["slo_attainment"] == pytest.approx(2 / 3)


def test_p99_near_transitions_sees_only_requests_in_the_system_then() -> None:
    rows = [record(i, 20.0 * i, 20.0 * i + (2 if i == 3 else 1), 20.0 * i + 4, 5) for i in range(6)]
    stats = RunStats(transitions_ns=[66 * NS_PER_S])
    metrics = compute_metrics(Records.of(rows), stats)
    assert metrics["ttft_s_p99_near_transition"] == pytest.approx(2.0)
    assert compute_metrics(Records.of(rows), RunStats())["ttft_s_p99_near_transition"] is None
    # Of two replicas only the one that changed counts, and the request that it served.
    rows[4] = replace(rows[4], replica=1, first_token_ns=rows[4].last_token_ns)
    by_replica = {0: [66 * NS_PER_S], 1: []}
    metrics = compute_metrics(Records.of(rows), stats, transitions=by_replica)
    assert metrics["ttft_s_p99_near_transition"] == pytest.approx(2.0)
    metrics = compute_metrics(Records.of(rows), stats, transitions={0: [], 1: [86 * NS_PER_S]})
    assert metrics["ttft_s_p99_near_transition"] == pytest.approx(4.0)


def test_batch_and_memory_come_from_integrals() -> None:
    stats = RunStats(
        decode_ns=10,
        decode_batch_ns=25,
        kv_block_ns=30,
        kv_pool_block_ns=120,
        batch_capacity_blocks=100,
        block_tokens=16,
    )
    metrics = compute_metrics(Records.of([record(0, 0, 1, 2, 6)]), stats)  # 96 tokens: 6 blocks
    assert metrics["batch_mean"] == 2.5
    assert metrics["kv_utilisation_mean"] == 0.25
    assert metrics["batch_capacity"] == 16


def test_energy_is_a_band_between_idle_and_the_board_limit() -> None:
    stats = RunStats(busy_ns=6 * NS_PER_S, floor_ns=2 * NS_PER_S)
    cards = Cards(Power(idle_w=50, tdp_w=400), 1, stats.busy_ns, stats.floor_ns)
    assert energy_band_j([cards], 10.0) == Band(50 * 10 + 350 * 2, 50 * 10 + 350 * 6)
    smaller = Cards(Power(idle_w=10, tdp_w=20), 2, 4 * NS_PER_S, NS_PER_S)
    assert energy_band_j([cards, smaller], 10.0) == Band(1200 + 200 + 10, 2600 + 200 + 40)
    assert energy_band_j([cards, replace(smaller, power=None)], 10.0) is None
    measured = replace(cards, power=Power(50, 400, (120, 380)))
    assert energy_band_j([measured], 10.0) == Band(50 * 4 + 120 * 6, 50 * 4 + 380 * 6)
    energy = compute_metrics(TWO, stats, power=Power(50, 400))["energy_wh_per_request"]
    assert isinstance(energy, Band)
    assert 50 * 3.5 / 7200 <= energy.low < energy.high <= 400 * 3.5 / 7200 * 2


def test_mean_over_seeds_is_undefined_where_one_seed_is() -> None:
    runs: list[dict[str, MetricValue]] = [{"a": 1.0, "b": None, "c": Band(1, 2)}, {"a": 3, "b": 2.0, "c": Band(3, 4)}]
    assert mean_metrics(runs) == {"a": 2.0, "b": None, "c": Band(2, 3)}


@pytest.mark.slow
@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0, 5), st.floats(0, 50), st.integers(1, 500)), min_size=1))
def test_percentiles_are_ordered_and_within_range(rows: list[tuple[float, float, float, int]]) -> None:
    records = Records.of([record(i, a, a + f, a + f + d, n) for i, (a, f, d, n) in enumerate(rows)])
    metrics = compute_metrics(records, RunStats())
    for name in ("ttft_s", "e2e_s"):
        ordered = [metrics[f"{name}_{p}"] for p in ("p50", "p90", "p95", "p99")]
        assert all(isinstance(v, float) for v in ordered)
        assert np.all(np.diff(np.array(ordered, dtype=float)) >= 0)
    e2e, ttft = metrics["e2e_s_mean"], metrics["ttft_s_mean"]
    assert isinstance(e2e, float)
    assert isinstance(ttft, float)
    assert e2e >= ttft * (1 - 1e-12)


def test_records_are_sorted_and_become_a_table_with_nulls() -> None:
    table = TWO.to_table("arm", 7)
    assert table["request_id"].to_pylist() == [0, 1, 2]
    assert table["first_token_ns"].to_pylist() == [250_000_000, 1_500_000_000, None]
    assert table["status"].to_pylist() == ["completed", "completed", "dropped"]
    assert table["drop_reason"].to_pylist()[2] == "prompt beyond the model's context"
    assert set(table["arm"].to_pylist()) == {"arm"}
