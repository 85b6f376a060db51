"""A capacity plan with replicas that come and go, prefix caching and faults: it finds what studies of fleets find."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capacity_example import CAPACITY, example
from command_line import write_study
from helios_sim.errors import UserError
from helios_sim.report.capacity import CapacityResult, plan_table
from helios_sim.study.capacity import capacity
from helios_sim.study.capacity_plan import plan_capacity
from helios_sim.study.command import run
from helios_sim.study.modes import CapacityConfig
from helios_sim.study.schema import AutoscaleConfig, Config, CostConfig
from helios_sim.vary.settings import with_settings

pytestmark = pytest.mark.slow
AUTO = {"least": 1, "requests_per_replica": 6.0, "start_s": 0.1, "every_s": 0.1, "down_after_s": 1.0}
CARD = "a100-40gb"


def burst(folder: Path, settings: dict[str, Any] | None = None, **more: Any) -> Config:
    """From 10 requests a second to 150 and back, in ten seconds, twice: 1,600 of them."""
    moments = np.interp(np.arange(1600), *[
        np.cumsum([0, *np.diff(np.cumsum(80 - 70 * np.cos(np.linspace(0, 4 * np.pi, 2001))) * 0.01)]),
        np.linspace(0, 20, 2001),
    ])  # fmt: skip
    rows = "".join(f"{at:.4f},{200 + n % 50},{20 + n % 9}\n" for n, at in enumerate(moments))
    (folder / "burst.csv").write_text(f"arrived_at,num_prefill_tokens,num_decode_tokens\n{rows}")
    trace = str(folder / "burst.csv")
    given = {
        "workload.arrivals.kind": "trace", "workload.arrivals.trace": trace, "workload.arrivals.rate_per_s": None,
        "workload.lengths.kind": "trace", "workload.lengths.trace": trace, "workload.n_requests": 1600,
        "slo.tpot_s": 0.05, "capacity.attainment": 0.95,
    }  # fmt: skip
    config = example(jobs=1, seeds=[0], capacity={"cards": [CARD], "most_replicas": 8}, profile_band="none", **more)
    return with_settings(config, {**given, **(settings or {})})


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> CapacityResult:
    config = burst(tmp_path_factory.mktemp("burst"), autoscale=AutoscaleConfig(**AUTO))
    return capacity(with_settings(config, {"cost.usd_per_card_hour": 2.0}))


def metrics_of(config: Config, **settings: Any) -> dict[str, dict[str, Any]]:
    """Of each arm."""
    study = with_settings(replace(config, capacity=CapacityConfig()), {"hardware": CARD, **settings})
    return {name: dict(arm.metrics) for name, arm in run(study).arms.items()}


def test_each_arm_is_planned_both_ways_and_as_studies_of_every_number_find(
    planned: CapacityResult, tmp_path: Path
) -> None:
    config = burst(tmp_path)
    served: dict[tuple[bool, int], dict[str, dict[str, Any]]] = {}  # of both arms in one study
    plans = {plan.arm: plan for plan in planned.plans}
    assert set(plans) == {"full_depth", "full_depth_autoscaled", "static_cap", "static_cap_autoscaled"}
    for name, plan in plans.items():
        arm = name.removesuffix("_autoscaled")
        kept = []
        for n in range(1, 9):
            auto = {f"autoscale.{key}": value for key, value in AUTO.items()} | {"autoscale.first": n}
            if (plan.scaled, n) not in served:
                settings = {"server.replicas": n, **(auto if plan.scaled else {})}
                served[plan.scaled, n] = metrics_of(config, **settings)
            found = served[plan.scaled, n][arm]
            kept.append(found["slo_attainment"] >= 0.95)
            if n == plan.replicas:
                assert plan.at is not None
                assert plan.at.metrics["replicas_on_mean"] == found["replicas_on_mean"]
        assert plan.replicas == 1 + max((n for n, holds in enumerate(kept, 1) if not holds), default=0), kept
        assert (plan.of, plan.scaled) == ((arm, True) if name != arm else (None, False))


def test_what_is_on_is_what_is_paid_for(planned: CapacityResult) -> None:
    for plan in planned.plans:
        assert plan.usd_per_hour == pytest.approx(2.0 * plan.cards_on)
        assert plan.cards_on == plan.cards or (plan.scaled and 1 <= plan.cards_on < plan.cards)
    assert any(plan.scaled and plan.cards_on < plan.cards for plan in planned.plans)
    (advice,) = planned.advice
    good = [plan for plan in planned.plans if plan.at.metrics["agreement"] >= 0.95]
    assert advice.plan.usd_per_hour <= 1.01 * min(plan.usd_per_hour for plan in good)


def test_it_is_said_what_comes_and_goes_and_what_that_saves(planned: CapacityResult) -> None:
    said = "\n".join(planned.verdict)
    assert "Autoscaled, full_depth takes up to" in said
    assert "card time than" in said
    assert "autoscaled: at least 1, one for each 6 requests in the system, 0.1 s to start" in planned.conditions
    for width in (80, 140):
        lines = plan_table(planned, 1.0).lines(width=width)
        assert max(map(len, lines)) <= width
        assert any(" on " in f"{line} " for line in lines)


def test_a_start_that_takes_too_long_is_named(tmp_path: Path) -> None:
    slow = AutoscaleConfig(**{**AUTO, "start_s": 60.0, "down_after_s": 0.0})
    result = capacity(burst(tmp_path, autoscale=slow))
    scaled = [plan for plan in result.plans if plan.scaled]
    assert all(plan.replicas is None or plan.replicas == 1 for plan in scaled)
    assert any("autoscale.least" in sentence for sentence in result.verdict)


def test_of_several_numbers_of_requests_the_cheapest_is_told(planned: CapacityResult, tmp_path: Path) -> None:
    arms = {"full_depth": {"policy": "full_depth"}}
    several = AutoscaleConfig(**{**AUTO, "requests_per_replica": [3, 6, 400]})
    result = capacity(burst(tmp_path, autoscale=several, arms=arms))
    plans = {plan.arm: plan for plan in result.plans}
    each = [plans[f"full_depth_autoscaled_{number}"] for number in (3, 6, 400)]
    assert [(plan.of, plan.scaled) for plan in each] == [("full_depth", True)] * 3
    (alone,) = [plan for plan in planned.plans if plan.arm == "full_depth_autoscaled"]
    assert (each[1].replicas, each[1].cards_on) == (alone.replicas, alone.cards_on)
    best = min((plan for plan in each if plan.replicas), key=lambda plan: plan.cards_on)
    (said,) = [sentence for sentence in result.verdict if sentence.startswith("Autoscaled")]
    assert f"{best.fleet} as {best.arm}: " in said
    assert all(plan.arm in said for plan in each)
    assert "one for each 3 or 6 or 400 requests" in result.conditions
    for width in (80, 140):
        assert max(map(len, plan_table(result, 1.0).lines(width=width))) <= width


@pytest.mark.parametrize("wrong", [[], [3, 3], [0], "a", [True], None])
def test_wrong_numbers_of_requests_are_one_message(wrong: Any) -> None:
    with pytest.raises(UserError, match=r"autoscale\.requests_per_replica"):
        AutoscaleConfig(**{**AUTO, "requests_per_replica": wrong})


def test_several_numbers_are_for_a_plan_alone(tmp_path: Path) -> None:
    several = AutoscaleConfig(**{**AUTO, "requests_per_replica": [3, 6]})
    config = replace(burst(tmp_path, autoscale=several), capacity=CapacityConfig())
    with pytest.raises(UserError, match="a list is for autoscale of a whole capacity plan"):
        run(with_settings(config, {"hardware": CARD, "server.replicas": 2}))


def test_an_arm_may_say_itself_how_its_replicas_come_and_go(tmp_path: Path) -> None:
    own = {f"autoscale.{name}": value for name, value in AUTO.items()}
    arms = {
        "fixed": {"policy": "full_depth"},
        "early": {"policy": "full_depth", "overrides": {**own, "autoscale.requests_per_replica": 3.0}},
    }
    result = capacity(burst(tmp_path, arms=arms))
    assert [(plan.arm, plan.scaled, plan.of) for plan in result.plans] == [
        ("fixed", False, None), ("early", True, None),
    ]  # fmt: skip


def test_the_command_writes_it(command, tmp_path: Path) -> None:
    words = [f"autoscale.{name}={value}" for name, value in AUTO.items()]
    said = command(*write_study(tmp_path, CAPACITY), *words, "seeds=[0]", "jobs=1", "cost.usd_per_card_hour=2")
    assert said.status == 0, said.err
    plans = said.summary["capacity"]["loads"][0]["plans"]
    assert [plan.get("autoscaled", False) for plan in plans] == [False, True] * 4
    assert all("replicas_on_mean" in plan["metrics"] for plan in plans if plan.get("autoscaled"))
    assert "leave an autoscaler little to save" in said.out
    page = (Path(said.summary["folder"]) if "folder" in said.summary else tmp_path / "out") / "report.html"
    assert "on average" in page.read_text()


# --- prefix caching and faults

CACHED = {"server.enable_prefix_caching": True, "workload.system_prompts": {"gsm8k": 800}, "slo.tpot_s": 0.05}


def test_prefixes_that_are_shared_need_fewer_replicas_and_it_is_said_so() -> None:
    with_cache = capacity(with_settings(example(jobs=1, seeds=[0], capacity={"cards": [CARD]}), CACHED))
    without = capacity(
        with_settings(
            example(jobs=1, seeds=[0], capacity={"cards": [CARD]}), {**CACHED, "server.enable_prefix_caching": False}
        )
    )
    for plan, plain in zip(with_cache.plans, without.plans, strict=True):
        assert plan.replicas is not None
        assert plain.replicas is None or plan.replicas < plain.replicas
        assert plan.at.metrics["prefix_cache_hit_rate"] > 0.5
    assert any("tokens" in said and "were cached" in said for said in with_cache.verdict)
    assert "equal beginnings of prompts are cached" in with_cache.conditions
    assert not any("were cached" in said for said in without.verdict)


def test_an_arm_may_do_without_the_cache() -> None:
    arms = {
        "cached": {"policy": "full_depth"},
        "plain": {"policy": "full_depth", "overrides": {"server.enable_prefix_caching": False}},
    }
    config = example(jobs=1, seeds=[0], capacity={"cards": [CARD]}, arms=arms)
    found = {plan.arm: plan for plan in capacity(with_settings(config, CACHED)).plans}
    assert found["cached"].replicas is not None
    assert found["plain"].replicas is None or found["plain"].replicas > found["cached"].replicas
    assert found["plain"].at.metrics["prefix_cache_hit_rate"] is None


def test_autoscaling_goes_with_prefix_caching() -> None:
    config = example(jobs=1, seeds=[0], capacity={"cards": [CARD]}, autoscale=AutoscaleConfig(**AUTO))
    result = capacity(with_settings(config, CACHED))
    assert any(plan.scaled and plan.replicas is not None for plan in result.plans)


def test_a_replica_that_dies_takes_one_more() -> None:
    config = example(jobs=1, seeds=[0], capacity={"cards": [CARD]})
    dies = {"workload.faults.replica_dies.at_s": [1.0], "workload.faults.replica_dies.replicas": [0]}
    results = [capacity(with_settings(config, settings)) for settings in ({}, dies)]
    plain, struck = ({plan.arm: plan.replicas for plan in result.plans} for result in results)
    assert any("faults that are set (replica dies)" in said for said in results[1].verdict)
    assert "faults: replica dies." in results[1].conditions
    assert not any("faults" in said for said in results[0].verdict)
    assert all(struck[arm] is not None and struck[arm] > number for arm, number in plain.items())


# --- what is refused


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"server.router": "prefix_aware", "server.enable_prefix_caching": True}, "where replicas come and go"),
        ({"workload.faults.replica_dies.rate_per_hour": 3.0}, "no replica that may be off is struck by faults"),
        ({"autoscale.least": 99}, "at most capacity.most_replicas=12"),
    ],
)
def test_what_cannot_be_planned_is_one_message(settings: dict[str, Any], part: str) -> None:
    config = example(jobs=1, autoscale=AutoscaleConfig(**AUTO))
    with pytest.raises(UserError) as error:
        plan_capacity(with_settings(config, settings))
    assert part in str(error.value)


def test_several_kinds_of_replicas_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"cluster\.kinds"):
        plan_capacity(with_settings(example(), {"cluster.kinds": {"old": {"count": 1}}}))


def test_json_of_a_plan_without_any_is_as_it_was() -> None:
    from helios_sim.report.capacity import summarise_plans

    told = json.dumps(summarise_plans(capacity(example(jobs=1, seeds=[0], cost=CostConfig()))))
    assert "autoscaled" not in told
    assert "replicas_on_mean" not in told
