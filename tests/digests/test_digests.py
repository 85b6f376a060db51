"""Results are those that were recorded, to the bit. The docstring of this package says what to do if they are not."""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest

from digests import record
from digests.canonical import difference
from digests.experiments import NEEDS_SHARED_DATA, SLOW, experiment_digests
from digests.prices import BLOCKS, block_digests, profile_names
from digests.serving import CASES, PARTS, WAYS, case, case_digests, features, outcomes, run_case

recorded = cache(record.recorded)
QUICK_CASES, AT_A_TIME = 120, 20
LEAST = 10  # cases that have each feature

FEATURES = {
    "policy OraclePolicy", "policy HeliosPolicy", "policy Scripted",
    "replicas 1", "replicas 2", "replicas 3",
    "router round_robin", "router least_loaded", "router power_of_two", "router by_task",
    "schedule_ahead 0", "schedule_ahead 1", "vllm_v1 with schedule_ahead 0", "vllm_v1 with schedule_ahead 1",
    "arrivals AllAtOnce", "arrivals ClosedLoop", "arrivals Constant", "arrivals Poisson", "tasks 1", "tasks 2",
    "term mixed_attention", "term unequal_kv", "term padded_kv", "term mixed_factor", "term unequal_kv_factor",
    "term load_slowdown", "term time_factor", "term two layer classes", "term graph_batch_sizes", "term gap_s",
    "term prefill_gap_s", "term sync_s", "term launch_s_per_layer", "term launch_s_per_graph", "term short context",
    "rule FullDepth", "rule FixedCap", "rule PerToken", "rule Clairvoyant",
    "FixedCap with kv none", "FixedCap with kv propagate", "FixedCap with kv recompute",
    "PerToken with kv propagate", "PerToken with kv recompute",
    "Clairvoyant with kv none", "Clairvoyant with kv propagate", "Clairvoyant with kv recompute",
    "confidence max_probability", "confidence margin", "confidence classifier", "classifier and observed tokens",
    "batching each_token", "batching lazy", "in flight drain", "in flight migrate",
    "trigger BreachLimit", "trigger Completed", "trigger AtTime", "trigger QueueAbove", "trigger Drained",
    "trigger Probed",
    "observe_tokens", "admit_limit", "batch_limit", "run_layers", "probe", "standby",
}  # fmt: skip
OUTCOMES = {
    "came: preemptions", "came: switches", "came: loads", "came: beyond the grid", "came: evaluation",
    "came: dropped: context", "came: dropped: pool", "came: unfinished", "came: breaches", "came: evaluated tokens",
    "came: several depths", "came: observations told",
    "came: decided on BreachLimit", "came: decided on Completed", "came: decided on AtTime",
    "came: decided on QueueAbove", "came: decided on Drained", "came: decided on Probed",
    "came: raise of a cap decided", "came: switch decided with drain", "came: switch decided with migrate",
}  # fmt: skip


def too_rare(wanted: set[str], found: Counter[str], least: int = LEAST) -> dict[str, int]:
    return {name: found[name] for name in sorted(wanted) if found[name] < least}


def check_cases(first: int, way: str) -> None:
    wrong = []
    for seed in range(first, first + AT_A_TIME):
        pairs = zip(PARTS, recorded("serving")[str(seed)].split(), case_digests(seed, **WAYS[way]), strict=True)
        changed = [part for part, expected, found in pairs if expected != found]
        if changed:
            wrong.append(f"case {seed}: {', '.join(changed)}")
    assert not wrong, "\n".join(wrong)


def check_prices(name: str, block: int) -> None:
    found = block_digests(name, block)
    assert dict(zip(found, recorded("prices")[name][block].split(), strict=True)) == found


def check_experiment(name: str) -> None:
    assert difference(recorded("experiments")[name], experiment_digests(name)) == []


def quick_and_slow(names: list[str], slow: set[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.exhaustive) if name in slow else name for name in names]


FIRST_AND_OTHERS = [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(AT_A_TIME, QUICK_CASES, AT_A_TIME))]


@pytest.mark.parametrize("way", ["step_by_step", "ahead"])
@pytest.mark.parametrize("first", FIRST_AND_OTHERS)
def test_quick_cases_of_serving(first: int, way: str) -> None:
    check_cases(first, way)


@pytest.mark.exhaustive
@pytest.mark.parametrize("first", range(0, QUICK_CASES, AT_A_TIME))
def test_quick_cases_of_serving_compiled(first: int) -> None:
    check_cases(first, "compiled")


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("first", range(QUICK_CASES, CASES, AT_A_TIME))
def test_the_other_cases_of_serving(first: int, way: str) -> None:
    check_cases(first, way)


@pytest.mark.slow
@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(1001084, id="a request that is dropped when it is planned releases one that comes after the plan"),
        pytest.param(1001430, id="requests of a closed loop that leave at once, more than there are slots"),
        pytest.param(1001422, id="the only request leaves before the second replica had its first turn"),
    ],
)
def test_all_ways_to_run_agree(seed: int) -> None:
    found = {way: case_digests(seed, **arguments) for way, arguments in WAYS.items()}
    assert found["ahead"] == found["step_by_step"]
    assert found["compiled"] == found["step_by_step"]


@pytest.mark.slow
@pytest.mark.parametrize("name", profile_names())
def test_some_prices(name: str) -> None:
    check_prices(name, 0)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", profile_names())
def test_the_other_prices(name: str) -> None:
    for block in range(1, BLOCKS):
        check_prices(name, block)


@pytest.mark.slow
@pytest.mark.parametrize("name", quick_and_slow(sorted(recorded("experiments")), SLOW))
def test_shipped_experiments(name: str, request: pytest.FixtureRequest) -> None:
    if name in NEEDS_SHARED_DATA:
        request.getfixturevalue("shared_data")
    check_experiment(name)


@pytest.mark.slow
def test_quick_cases_ask_for_every_feature() -> None:
    found = Counter(feature for seed in range(QUICK_CASES) for feature in features(case(seed)))
    assert too_rare(FEATURES, found, 1) == {}


@pytest.mark.exhaustive
def test_cases_ask_for_every_feature() -> None:
    found = Counter(feature for seed in range(CASES) for feature in features(case(seed)))
    assert too_rare(FEATURES, found) == {}


@pytest.mark.exhaustive
def test_everything_that_can_happen_does() -> None:
    found = Counter(outcome for seed in range(CASES) for outcome in outcomes(run_case(seed)))
    assert too_rare(OUTCOMES, found) == {}
