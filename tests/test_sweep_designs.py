"""Designs of a configuration: which of them no other beats, what they share, and what is checked beforehand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.errors import UserError
from helios_sim.report.designs import cost, on_front, plain_value
from helios_sim.report.metrics import Band
from helios_sim.report.records import RecordLog
from helios_sim.study.designs import plan_sweep
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import Job, make_job, measure, serve
from helios_sim.study.modes import DesignsConfig
from helios_sim.study.sweep import evaluate
from helios_sim.vary.axis import AxisConfig
from helios_sim.vary.settings import with_settings
from sweep_example import example


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 1.0, 2.0, float("inf")])] * 3), max_size=30))
def test_the_front_is_what_no_other_beats(rows: list[tuple[float, ...]]) -> None:
    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    expected = [float("inf") not in row and not any(beats(other, row) for other in rows) for row in rows]
    assert on_front(np.array(rows, dtype=float).reshape(len(rows), 3)).tolist() == expected


def test_a_band_counts_with_its_less_favourable_end() -> None:
    assert plain_value("energy_wh_per_request", Band(1.0, 2.0)) == 2.0
    assert cost("energy_wh_per_request", Band(1.0, 2.0)) == 2.0
    assert cost("throughput_requests_per_s", 3.0) == -3.0
    assert cost("agreement", None) == float("inf")


def from_nothing(job: Job) -> dict:
    """Its metrics, with nothing shared with any other job."""
    fleet, log = build_fleet(job.config, job.seed), RecordLog()
    run = serve(job, fleet, log.add)
    return measure(job, fleet, log.records(), run)


@pytest.mark.slow
def test_what_designs_share_changes_no_bit() -> None:
    """A design's metrics are those of the same job run from nothing, in whatever order designs come."""
    plan = plan_sweep(replace(example(), seeds=[0, 1]))
    assert plan.designs is not None
    for design in (plan.designs[0], plan.designs[-1], plan.designs[10], plan.designs[0]):
        for job in plan.jobs(design):
            assert evaluate([job]).metrics == from_nothing(job)


@pytest.mark.slow
def test_a_threshold_reaches_what_is_known_of_exits_too(tmp_path) -> None:
    from helios_sim.exits.artificial import synthetic_trace
    from helios_sim.exits.store import write_trace

    write_trace(synthetic_trace("opt-1.3b", exits=(6, 12, 24), tasks=("gsm8k",), tokens=3000), tmp_path)
    config = with_settings(example(), {"exits.source": str(tmp_path), "exits.threshold": 0.6})
    layers = []
    for threshold in (0.6, 0.9, 0.6, 0.75):
        own = with_settings(config, {"exits.threshold": threshold})
        job = make_job("early_exit", {"policy": "early_exit"}, own, 0)
        helios = make_job("helios", {"policy": "helios"}, own, 0)
        assert evaluate([helios]).metrics == from_nothing(helios)
        metrics = evaluate([job]).metrics
        assert metrics == from_nothing(job)
        layers.append(metrics["layers_per_token"])
    assert layers[0] == layers[2] < layers[3] < layers[1]


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"method": "guess"}, "one of grid, search"),
        ({"backend": "cloud"}, "one of serial, processes, ray"),
        ({"sampler": "luck"}, "one of nsga2, tpe"),
        ({"workers": 0}, "sweep.workers=0"),
        ({"designs": 0}, "sweep.designs=0"),
        ({"seed": -1}, "sweep.seed=-1"),
        ({"objectives": []}, "at least one metric"),
    ],
)
def test_a_setting_of_the_sweep_that_cannot_be_is_said(sweep: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        DesignsConfig(**sweep)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"objectives": ["speed"]}, "sweep.objectives='speed': one of "),
        ({"objectives": ["batch_mean"]}, "a metric of which more or less is better"),
        ({"arm": "nobody"}, "one of full_depth, helios"),
        ({"parameters": {"agreement": AxisConfig(settings=["arms.helios.limit"], values=[1])}}, "is a column"),
        ({"parameters": {"s": AxisConfig(settings=["seeds"], values=[[1]])}}, "the same for all"),
        ({"parameters": {"s": AxisConfig(settings=["arms.helios.limmit"], values=[1])}}, "limmit"),
        ({"parameters": {"s": AxisConfig(settings=["exits.threshold"], values=[0.3, 0.4])}}, "answers only"),
    ],
)
def test_a_sweep_is_checked_before_anything_runs(change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_sweep(example(**change))


def test_settings_of_the_policy_that_is_added_design_its_arm() -> None:
    parameters = {"limit": AxisConfig(settings=["policy.limit"], values=[20, 80])}
    config = replace(example(parameters=parameters), policy={"name": "helios"}, subject="helios")
    plan = plan_sweep(config)
    assert plan.arm == "helios_added"
    assert len({plan.jobs(design)[0].key for design in plan.designs or ()}) == 2


def test_a_parameter_that_changes_nothing_of_the_arm_is_refused() -> None:
    parameters = {"limit": AxisConfig(settings=["arms.helios.limit"], values=[20, 80])}
    with pytest.raises(UserError, match="they change nothing of full_depth") as error:
        plan_sweep(example(parameters=parameters, arm="full_depth"))
    assert "sweep.arm" in str(error.value)
