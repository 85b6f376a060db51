"""Designs of a configuration: settings by path, parameters, grids; and which of them no other beats."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.errors import UserError
from helios_sim.report.designs import cost, on_front, plain_value
from helios_sim.report.metrics import Band
from helios_sim.report.records import RecordLog
from helios_sim.study.fleet import build_fleet
from helios_sim.study.job import Job, make_job, measure, serve
from helios_sim.study.schema import Config
from helios_sim.sweep.plan import plan_sweep
from helios_sim.sweep.run import evaluate
from helios_sim.sweep.schema import DesignsConfig
from helios_sim.vary.axis import AxisConfig, axes_of, grid
from helios_sim.vary.settings import with_settings
from sweep_example import example


def test_settings_by_path_change_a_copy() -> None:
    config = Config(arms={"helios": {"policy": "helios", "limit": 50}}, policy={"name": "helios"})
    changes = {
        "objective.max_disagreement": 0.1,
        "workload.arrivals.rate_per_s": 3,
        "arms.helios.limit": 60,
        "policy.window_tokens": 200,
        "exits.parameters.unchanged": 0.9,
        "models": ["opt-6.7b"],
    }
    changed = with_settings(config, changes)
    assert changed.objective.max_disagreement == 0.1
    assert type(changed.workload.arrivals.rate_per_s) is float
    assert changed.arms["helios"] == {"policy": "helios", "limit": 60}
    assert changed.policy == {"name": "helios", "window_tokens": 200}
    assert changed.exits.parameters == {"unchanged": 0.9}
    assert changed.models == ["opt-6.7b"]
    assert config == Config(arms={"helios": {"policy": "helios", "limit": 50}}, policy={"name": "helios"})


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("objective.epsilon", 0.1, "no such setting"),
        ("objectiv.goal", "energy", "no such setting"),
        ("arms.nobody.limit", 3, "no such setting"),
        ("policy.limit", 3, "settings of a policy need policy=NAME"),
        ("server.block_tokens", 1.5, "must be a whole number"),
        ("server.block_tokens", True, "must be a whole number"),
        ("objective.goal", 3, "must be a text"),
        ("slo.ttft_s", "soon", "must be a number or null"),
        ("objective.max_disagreement", 3.0, "from 0 to 1"),
        ("server.replicas", 0, "at least 1"),
        ("models", [], "at least one model"),
    ],
)
def test_a_path_or_value_that_cannot_be_is_said(path: str, value: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_settings(Config(arms={"helios": {"policy": "helios"}}), {path: value})


def test_a_grid_is_every_combination_the_last_parameter_fastest() -> None:
    parameters = axes_of(
        "sweep.parameters",
        {
            "bound": AxisConfig(settings=["objective.max_disagreement"], low=0.1, high=0.3, step=0.1),
            "breaches": AxisConfig(
                settings=["policy.limit", "policy.window_tokens"], values=[[50, 100], [200, 400]], labels=["a", "b"]
            ),
        }
    )
    points = grid(parameters)
    assert [tuple(p.shown.values()) for p in points] == [
        (0.1, "a"), (0.1, "b"), (0.2, "a"), (0.2, "b"), (0.3, "a"), (0.3, "b"),
    ]  # fmt: skip
    assert points[-1].changes == {
        "objective.max_disagreement": 0.3, "policy.limit": 200, "policy.window_tokens": 400,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("parameter", "said"),
    [
        (AxisConfig(values=[1]), "at least one setting"),
        (AxisConfig(settings=["policy.limit"]), "needs values, or a range"),
        (AxisConfig(settings=["policy.limit"], values=[]), "at least one value"),
        (AxisConfig(settings=["policy.limit"], values=[1], low=3), "not both"),
        (AxisConfig(settings=["policy.limit"], low=3), "both ends"),
        (AxisConfig(settings=["policy.limit"], low=3, high=2), "at least low, 3"),
        (AxisConfig(settings=["policy.limit"], low=1, high=2, step=-1), "null or above 0"),
        (AxisConfig(settings=["policy.limit"], low=0, high=2, log=True), "above 0"),
        (AxisConfig(settings=["policy.limit"], low=0, high=2.5, whole=True), "whole low, high and step"),
        (AxisConfig(settings=["policy.limit"], low=0, high=2), "a grid needs a step"),
        (AxisConfig(settings=["policy.limit"], values=[1, 2], labels=["a"]), "2 labels, one a value"),
        (AxisConfig(settings=["a", "b"], values=[[1]]), "one entry for each of 2 settings"),
        (AxisConfig(settings=["a", "a"], values=[1]), "sets this already"),
    ],
)
def test_an_incomplete_parameter_is_said(parameter: AxisConfig, said: str) -> None:
    with pytest.raises(UserError, match=said):
        grid(axes_of("sweep.parameters", {"it": parameter}))


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


def test_what_designs_share_changes_no_bit() -> None:
    """A design's metrics are those of the same job run from nothing, in whatever order designs come."""
    plan = plan_sweep(replace(example(), seeds=[0, 1]))
    assert plan.designs is not None
    for design in (plan.designs[0], plan.designs[-1], plan.designs[10], plan.designs[0]):
        for job in plan.jobs(design):
            assert evaluate([job]).metrics == from_nothing(job)


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
        ({"objectives": ["speed"]}, "sweep.objectives='speed': no such metric"),
        ({"objectives": ["batch_mean"]}, "a metric of which more or less is better"),
        ({"arm": "nobody"}, "one of the arms full_depth, helios"),
        ({"parameters": {"agreement": AxisConfig(settings=["arms.helios.limit"], values=[1])}}, "is a column"),
        ({"parameters": {"s": AxisConfig(settings=["seeds"], values=[[1]])}}, "the same requests"),
        ({"parameters": {"s": AxisConfig(settings=["arms.helios.limmit"], values=[1])}}, "limmit"),
        ({"parameters": {"s": AxisConfig(settings=["exits.threshold"], values=[0.3, 0.4])}}, "answers only"),
    ],
)
def test_a_sweep_is_checked_before_anything_runs(change: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_sweep(example(**change))
