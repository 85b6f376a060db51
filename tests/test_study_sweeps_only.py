"""Arms that are for certain sweeps only: a study's own table is without them."""

from __future__ import annotations

from typing import Any

import pytest

from helios_sim import UserError, study_config
from helios_sim.study.plan import entries_of, plan_study
from helios_sim.study.schema import Config

ARMS = {"whole": {"policy": "full_depth"}, "other": {"policy": "full_depth", "batch_limit": 1, "sweeps_only": True}}
AXIS = "axes: [{name: users, settings: [server.max_running_requests], values: [1, 2]}]"


def config(arms: dict[str, Any], *sweeps: str) -> Config:
    found = study_config("own", "policy=none", f"sweeps=[{', '.join(sweeps)}]", "workload.n_requests=2")
    found.arms = arms
    return found


def test_it_runs_where_a_sweep_names_it_and_nowhere_else() -> None:
    plan = plan_study(config(ARMS, f"{{arms: [whole, other], {AXIS}}}", f"{{{AXIS}}}"))
    assert list(plan.headline.jobs) == ["whole"]
    assert [list(point.jobs) for point in plan.points] == [["whole", "other"]] * 2 + [["whole"]] * 2
    alone = plan_study(config(ARMS, f"{{arms: [other], baseline: other, {AXIS}}}"))
    assert [(list(point.jobs), point.baseline) for point in alone.points] == [(["other"], "other")] * 2


@pytest.mark.parametrize(
    ("entry", "sweeps", "says"),
    [
        ({}, (), "an arm that a sweep names"),
        ({}, (f"{{{AXIS}}}",), "an arm that a sweep names"),
        ({"sweeps_only": "yes"}, (), "true or false"),
        ({"baseline": "whole"}, (f"{{arms: [whole, other], {AXIS}}}",), "a sweep's arms are compared with the sweep's"),
    ],
)
def test_what_would_do_nothing_is_told(entry: dict[str, Any], sweeps: tuple[str, ...], says: str) -> None:
    with pytest.raises(UserError, match=says):
        entries_of(config({**ARMS, "other": {**ARMS["other"], **entry}}, *sweeps))


def test_a_study_has_arms_of_its_own() -> None:
    alone = {"other": ARMS["other"]}
    with pytest.raises(UserError, match="at least one arm"):
        entries_of(config(alone, f"{{arms: [other], baseline: other, {AXIS}}}"))
    two = config({**ARMS, "third": {"policy": "full_depth"}}, f"{{arms: [whole, other], {AXIS}}}")
    two.subject = "other"
    with pytest.raises(UserError, match="subject"):
        plan_study(two)
