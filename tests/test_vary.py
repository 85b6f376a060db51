"""Settings by path, axes and grids: what sweeps and designs and overrides are made of."""

from __future__ import annotations

import pytest

from helios_sim.errors import UserError
from helios_sim.study.schema import Config
from helios_sim.vary.axis import AxisConfig, axes_of, grid
from helios_sim.vary.settings import with_settings


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
        ("server.replicas", 0, "from 1 to"),
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


@pytest.mark.parametrize(("low", "high", "step"), [(0.0, 1e9, 1.0), (0.0, 1e300, 1e-300), (1.0, 1e5, 0.5)])
def test_a_grid_of_more_than_can_be_planned_is_refused_at_once(low: float, high: float, step: float) -> None:
    axes = axes_of("sweep.parameters", {"a": AxisConfig(settings=["b"], low=low, high=high, step=step)})
    with pytest.raises(UserError, match=r"sweep\.parameters\.a=.*at most 100,000 combinations"):
        grid(axes)
    many = {name: AxisConfig(settings=[name], values=list(range(50))) for name in "abc"}
    with pytest.raises(UserError, match="125,000"):
        grid(axes_of("sweeps", many))


def test_ranges_are_checked_when_all_changes_are_made() -> None:
    config = with_settings(Config(), {"models": ["a"], "seeds": [3, 4], "server.replicas": 2})
    assert (config.models, config.seeds, config.server.replicas) == (["a"], [3, 4], 2)


def test_a_mapping_changes_what_it_names() -> None:
    config = Config(arms={"a": {"policy": "helios", "limit": 3}})
    changed = with_settings(config, {"server": {"replicas": 2}, "arms": {"a": {"limit": 4}, "b": {"policy": "oracle"}}})
    assert (changed.server.replicas, changed.server.block_tokens) == (2, 16)
    assert changed.arms == {"a": {"policy": "helios", "limit": 4}, "b": {"policy": "oracle"}}
    assert (config.server.replicas, config.arms) == (1, {"a": {"policy": "helios", "limit": 3}})


def test_shares_of_a_mix_take_the_place_of_what_was_there() -> None:
    """As on the command line: what is not named is not served."""
    config = with_settings(Config(), {"workload.mix": {"tasks": {"a": 1.0, "b": 2.0}, "after": {"b": 1.0}}})
    changed = with_settings(config, {"workload.mix.tasks": {"c": 3}, "workload.mix.after.d": 2.0})
    assert changed.workload.mix.tasks == {"c": 3.0}
    assert changed.workload.mix.after == {"b": 1.0, "d": 2.0}
    assert config.workload.mix.tasks == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("models", ["a", 3], "models=3: must be a text"),
        ("workload.mix.tasks", {"a": "much"}, "must be a number"),
        ("workload.n_request", 3, "you may have meant workload.n_requests"),
    ],
)
def test_a_mistake_inside_a_value_and_a_near_name_are_said(path: str, value: object, said: str) -> None:
    with pytest.raises(UserError, match=said):
        with_settings(Config(), {path: value})


def test_one_setting_takes_a_list_as_it_is_and_several_take_an_entry_each() -> None:
    one, both = axes_of(
        "axes",
        [
            AxisConfig("models", ["models"], values=[["a", "b"]]),
            AxisConfig("pair", ["x", "y"], values=[[1, 2], 3]),
        ],
    )
    assert one.changes(one.values[0]) == {"models": ["a", "b"]}
    assert [both.changes(value) for value in both.values] == [{"x": 1, "y": 2}, {"x": 3, "y": 3}]


def test_an_arm_with_dots_in_its_name_is_set_by_path() -> None:
    config = Config(name="a", arms={"full_opt-1.3b": {"policy": "full_depth"}, "full_opt-1": {"policy": "x"}})
    changed = with_settings(config, {"arms.full_opt-1.3b.batch_limit": 2, "arms.full_opt-1.policy": "y"})
    assert changed.arms == {"full_opt-1.3b": {"policy": "full_depth", "batch_limit": 2}, "full_opt-1": {"policy": "y"}}
    assert config.arms["full_opt-1.3b"] == {"policy": "full_depth"}
