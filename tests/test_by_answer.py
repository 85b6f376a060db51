"""Cascades and routers that learn: closed forms, a reference of twenty lines, brute force, and books that balance."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from numpy.random import PCG64, Generator, SeedSequence

import rig
from helios_sim.by_answer import Bandit, BestAnswer, ByAnswer, Cascade, Mixed
from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence
from helios_sim.profile.synthetic import flat_profile
from helios_sim.report.metrics import OF_CASCADES
from helios_sim.request import Request, RequestRecord, Status
from helios_sim.serve.settings import ServeConfig, served_job
from helios_sim.study.command import run_study
from helios_sim.study.fleet import build_fleet
from helios_sim.study.jobs import make_job, run_job
from helios_sim.study.schema import (
    ArrivalsConfig,
    BanditConfig,
    CascadeConfig,
    ClusterConfig,
    Config,
    FaultConfig,
    FaultsConfig,
    ServerConfig,
)
from helios_sim.workload import AllAtOnce, Arrivals, ClosedLoop, Constant, Exponential, Poisson, generate
from rig import Served, full_depth, serve
from test_study_build import measured
from test_study_fleet import with_bits

MS = 1_000_000
SMALL_MS, LARGE_MS = 2, 5
PROFILES = {"small": flat_profile(SMALL_MS / 1000, name="small"), "large": flat_profile(LARGE_MS / 1000, name="large")}
SLOW = settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def by_number(request: Request, record: RequestRecord) -> float:
    """A confidence that looks arbitrary and hangs on the request alone."""
    return (request.request_id * 37 % 100) / 100


def cascade(below: float, confidence=by_number, stages=((0,), (1,))) -> Cascade:
    return Cascade(stages, below, confidence)


def two_kinds(
    arrivals: Arrivals, router: ByAnswer, n: int = 60, batch: int = 1, models=("small", "large"), **others
) -> Served:
    work = rig.workload(n, output=Exponential(12), arrivals=arrivals)
    deployments = [full_depth(model, batch_limit=batch) for model in models]
    return serve(
        work, deployments[0], PROFILES, replicas=len(models), by_answer=router, deployments=deployments, **others
    )


# What a cascade takes, by hand.


def test_both_answers_of_a_tandem_follow_lindleys_recursion_twice() -> None:
    """One request at a time on each machine, all escalated: two servers in a row, each first come first served."""
    served = two_kinds(Poisson(25.0), cascade(1.01), n=300)
    alone = {r.request_id: r for r in two_kinds(Poisson(25.0), cascade(0.0), n=300).records}
    free_ns, ends_ns = 0, {}
    for r in served.by_request():
        free_ns = max(free_ns, r.arrival_ns) + SMALL_MS * MS * alone[r.request_id].output_tokens
        ends_ns[r.request_id] = free_ns
    free_ns = 0
    for r in sorted(served.records, key=lambda r: ends_ns[r.request_id]):
        starts_ns = max(free_ns, ends_ns[r.request_id])
        assert r.first_token_ns == starts_ns + LARGE_MS * MS
        free_ns = starts_ns + LARGE_MS * MS * r.output_tokens
        assert r.last_token_ns == free_ns
    assert max(np.diff(sorted(ends_ns.values()))) < 10**9  # a load at which both have queues


@pytest.mark.parametrize("arrivals", [Poisson(25.0), Constant(9.0), AllAtOnce(), ClosedLoop(4)])
def test_a_threshold_of_0_is_the_first_kind_alone(arrivals: Arrivals) -> None:
    served = two_kinds(arrivals, cascade(0.0), batch=3)
    alone = two_kinds(arrivals, Mixed(((0,), (1,)), (1.0, 0.0)), batch=3)
    assert served.records == alone.records
    assert served.run.answered is not None
    assert (served.run.answered.escalations, served.run.answered.replaced_tokens) == (0, 0)


def test_above_1_every_request_takes_the_time_of_both_when_nobody_waits() -> None:
    slowly = Constant(0.5)
    both = two_kinds(slowly, cascade(1.01)).by_request()
    small, large = (two_kinds(slowly, Mixed(((0,), (1,)), shares)).by_request() for shares in ((1.0, 0.0), (0.0, 1.0)))
    for r, first, second in zip(both, small, large, strict=True):
        e2e_ns = [it.last_token_ns - it.arrival_ns for it in (r, first, second)]
        assert e2e_ns[0] == e2e_ns[1] + e2e_ns[2]
        assert r.first_token_ns - r.arrival_ns == e2e_ns[1] + LARGE_MS * MS
        assert replace(r, last_token_ns=0, first_token_ns=0, scheduled_ns=0) == replace(
            second, last_token_ns=0, first_token_ns=0, scheduled_ns=0
        )


def test_an_answer_that_might_have_been_replaced_comes_whole_and_the_one_that_replaces_it_as_it_is_made() -> None:
    served = two_kinds(Constant(0.5), cascade(0.4))
    for r in served.records:
        escalated = r.request_id * 37 % 100 < 40
        assert (r.model, r.replica) == (("large", 1) if escalated else ("small", 0))
        assert (r.first_token_ns == r.last_token_ns) == (not escalated or r.output_tokens == 1)
    answered = served.run.answered
    assert answered is not None
    assert answered.escalated == answered.escalations == sum(r.model == "large" for r in served.records)
    small = two_kinds(Constant(0.5), cascade(0.0)).by_request()
    replaced = [r.output_tokens for r in small if r.request_id * 37 % 100 < 40]
    assert answered.replaced_tokens == sum(replaced)
    busy_ms = [server.stats.busy_ns // MS for server in served.run.servers]
    assert busy_ms[0] == SMALL_MS * sum(r.output_tokens for r in small)  # every request, whether or not it counts
    assert busy_ms[1] == LARGE_MS * sum(r.output_tokens for r in served.records if r.model == "large")


def test_what_the_next_kind_cannot_run_keeps_the_answer_that_is_there() -> None:
    short = PROFILES | {"large": flat_profile(0.005, name="large", max_context_tokens=20)}
    work = rig.workload(60, output=Exponential(12), arrivals=Constant(1.0))
    deployments = [full_depth(model, batch_limit=1) for model in short]
    arguments = {"replicas": 2, "deployments": deployments}
    served = serve(work, deployments[0], short, by_answer=cascade(1.01), **arguments)
    models = {r.model for r in served.records}
    assert models == {"small", "large"}
    assert all(r.status is Status.COMPLETED for r in served.records)
    kept = [r for r in served.records if r.model == "small"]
    assert served.run.answered is not None
    assert served.run.answered.refused == len(kept)
    other_way = serve(work, deployments[0], short, by_answer=cascade(1.01, stages=((1,), (0,))), **arguments)
    assert {r.model for r in other_way.records} == {"small"}  # refused at first, and answered by the other


def test_three_kinds_are_asked_in_turn() -> None:
    models = ("small", "large", "small")
    router = cascade(0.5, lambda request, record: 0.3 if record.replica == 0 else 0.7 * (request.request_id % 2),
                     stages=((0,), (1,), (2,)))  # fmt: skip
    served = two_kinds(Constant(1.0), router, models=models)
    assert [r.replica for r in served.by_request()] == [1 if r.request_id % 2 else 2 for r in served.by_request()]
    assert served.run.answered is not None
    assert (served.run.answered.escalated, served.run.answered.escalations) == (60, 90)


# The bandit.


def reference(rewards: np.ndarray, z: np.ndarray, spread: float) -> list[int]:
    """Which arm is pulled each time: rewards (n, arms) of what each would give, z (n, arms) normal draws."""
    seen: list[list[float]] = [[] for _ in range(rewards.shape[1])]
    pulled = []
    for reward, draw in zip(rewards, z, strict=True):
        unseen = [arm for arm, values in enumerate(seen) if not values]
        if unseen:
            arm = unseen[0]
        else:
            ends = []
            for values, normal in zip(seen, draw, strict=True):
                variance = (spread**2 + len(values) * np.var(values)) / len(values)
                ends.append(np.mean(values) + normal * np.sqrt(variance / len(values)))
            arm = int(np.argmax(ends))
        seen[arm].append(float(reward[arm]))
        pulled.append(arm)
    return pulled


def record_of(number: int, task: int, replica: int, bits: float, status: Status = Status.COMPLETED) -> RequestRecord:
    return RequestRecord(
        number, replica, task, "m", status, None, 0, 0, 0, 0, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, round(bits * 1e6)
    )


def pulls(rewards: np.ndarray, seed: int, spread: float = 0.5, costs: tuple[float, ...] = ()) -> list[int]:
    """What the bandit does where each answer has ended when the next request comes; an arm is a replica."""
    arms = rewards.shape[1]
    kinds = {f"arm {arm}": (arm,) for arm in range(arms)}
    told = dict(zip(kinds, costs, strict=False))
    judging, found = Bandit(kinds, True, spread, told).begin([0] * arms, seed), []
    for number, reward in enumerate(rewards):
        arm = judging.choose(Request(number, 0, 1, 1, 0, 0))
        judging.judge(record_of(number, 0, arm, -float(reward[arm])), 0)
        found.append(arm)
    return found


def bernoulli(seed: int, n: int = 400, chances: tuple[float, ...] = (0.4, 0.5, 0.7)) -> np.ndarray:
    return (np.random.default_rng(seed).random((n, len(chances))) < chances).astype(float)


@pytest.mark.parametrize("seed", range(4))
def test_thompson_pulls_the_arms_that_the_reference_pulls_with_the_same_draws(seed: int) -> None:
    rewards = bernoulli(seed)
    draws = Generator(PCG64(SeedSequence(seed, spawn_key=tuple(b"bandit")))).standard_normal(rewards.shape)
    assert pulls(rewards, seed) == reference(rewards, draws, 0.5)


def test_its_regret_on_bernoulli_arms_grows_ever_slower() -> None:
    """Of 400 pulls by chance alone the regret is 400 (0.7 - (0.4 + 0.5 + 0.7) / 3) = 67."""
    lost = np.array([0.3, 0.2, 0.0])
    regret = np.array([np.cumsum(lost[pulls(bernoulli(seed), seed)]) for seed in range(20)]).mean(axis=0)
    assert regret[-1] < 67 / 4
    assert regret[399] - regret[199] < (regret[199] - regret[0]) / 2


def test_a_cost_is_what_a_kind_has_to_be_better_by() -> None:
    rewards = bernoulli(1, chances=(0.5, 0.7))
    dear = pulls(rewards, 1, costs=(0.0, 0.4))
    assert dear[200:].count(0) > 180
    assert pulls(rewards, 1)[200:].count(1) > 150


def test_until_answers_have_ended_kinds_are_tried_in_turn_and_a_refusal_is_as_bad_as_the_worst() -> None:
    judging = Bandit({"a": (0,), "b": (1, 2), "c": (3,)}, True, 0.1, {}).begin([0, 5, 2, 0], 7)
    assert [judging.choose(Request(n, 0, 1, 1, 0, 0)) for n in range(6)] == [0, 2, 3, 0, 2, 3]
    assert judging.choose(Request(6, 0, 1, 1, 1, 0)) == 0  # of another task
    for number, (replica, bits) in enumerate([(0, 1.0), (2, 3.0)]):
        judging.judge(record_of(number, 0, replica, bits), 5)
    judging.judge(record_of(2, 0, 3, 0.0, Status.DROPPED), 5)
    judging.judge(record_of(3, 0, 3, 0.0, Status.UNFINISHED), 6)
    (favoured,) = judging.answered.favoured
    assert (favoured.time_ns, favoured.task, favoured.kind) == (5, 0, 0)
    assert favoured.verdicts["c"] == {"answers": 1, "bits_per_char": 3.0}


# Books and bits, whatever router.

CHOICES: dict[str, Callable[[], ByAnswer]] = {
    "cascade": lambda: cascade(0.5, stages=((0, 1), (2,))),
    "mixed": lambda: Mixed(((0, 1), (2,)), (0.3, 0.7)),
    "thompson": lambda: Bandit({"a": (0, 1), "b": (2,)}, True, 0.3, {}),
    "best_answer": lambda: BestAnswer(((0, 1), (2,)), lambda kind, request: (request.request_id + kind) % 3),
}
ANY_ARRIVALS = st.sampled_from([Poisson(90.0), Constant(200.0), AllAtOnce(), ClosedLoop(5)])


@pytest.mark.slow
@SLOW
@given(st.sampled_from(sorted(CHOICES)), ANY_ARRIVALS, st.integers(1, 4), st.integers(0, 99), st.booleans())
def test_every_request_is_answered_once_memory_comes_back_and_the_same_again(
    name: str, arrivals: Arrivals, batch: int, seed: int, small_pool: bool
) -> None:
    models = ("small", "small", "large")
    hbm = PROFILES["small"].weight_bytes(4) + 16 * 10 * PROFILES["small"].kv_bytes_per_token(4)
    others = {"utilisation": 1.0, "hbm_bytes": hbm} if small_pool else {}
    served, again = (
        two_kinds(arrivals, CHOICES[name](), n=20, batch=batch, models=models, seed=seed, block_tokens=16, **others)
        for _ in range(2)
    )
    assert sorted(r.request_id for r in served.records) == list(range(20))
    assert [server.used_blocks for server in served.run.servers] == [0, 0, 0]
    assert [server.requests_in_system for server in served.run.servers] == [0, 0, 0]
    assert served.records == again.records
    answered, other = served.run.answered, again.run.answered
    assert answered == other
    assert answered is not None
    arrived = sum(server.books[2] for server in served.run.servers)
    assert arrived == 20 + answered.escalations == served.run.requests + answered.escalations


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_compiled_is_the_same_to_the_bit(name: str) -> None:
    models = ("small", "small", "large")
    plain, compiled = (
        two_kinds(Poisson(150.0), CHOICES[name](), batch=3, models=models, compiled=how) for how in (False, True)
    )
    assert plain.records == compiled.records
    assert plain.run.answered == compiled.run.answered


# From settings.

KINDS = {"quick": {"count": 1, "models": ["small"]}, "deep": {"count": 2, "models": ["large"]}}
FULL_DEPTH = {"policy": "full_depth"}


def study(folder: Path, router: str, n: int = 40, **cluster) -> Config:
    base = measured(folder)
    with_bits(folder, {"small": (1.0, 0.9), "large": (1.2, 0.5)})
    work = replace(base.workload, n_requests=n, arrivals=ArrivalsConfig("poisson", 8.0))
    kinds = cluster.pop("kinds", KINDS)
    server = ServerConfig(router=router, max_running_requests=1)
    return replace(base, workload=work, server=server, cluster=ClusterConfig(dict(kinds), **cluster))


def result(config: Config, entry=FULL_DEPTH):
    return run_job(make_job("arm", entry, config, 0))


ORDER = CascadeConfig(["quick", "deep"], 1.01)


def test_the_confidence_of_an_answer_is_the_mean_over_its_tokens(tmp_path: Path) -> None:
    config = study(tmp_path, "cascade", cascade=ORDER)
    fleet = build_fleet(config, 0)
    trace = fleet.models["small"].trace
    recorded = trace.trace.recorded(Confidence.MAX_PROBABILITY)[:, -1].astype(float)
    (block,) = generate(fleet.parts.workload, 0)
    spans = [trace.locate(r.task, r.text_start, r.output_chars) for r in block.rows()]
    sure = [np.mean(recorded[span.indices()]) for span in spans]
    between = float(np.mean(sorted(sure)[14:16]))
    found = result(replace(config, cluster=replace(config.cluster, cascade=CascadeConfig(["quick", "deep"], between))))
    models = list(found.replicate.records.model)
    assert models == ["small" if it >= between else "large" for it in sure]
    assert models.count("large") == found.replicate.metrics["escalations"] == 15
    assert found.replicate.metrics["escalated_fraction"] == 15 / 40


def test_the_bits_of_an_answer_are_those_of_the_model_that_gave_the_one_that_counts(tmp_path: Path) -> None:
    for below, model in ((0.0, "small"), (1.01, "large")):
        found = result(study(tmp_path, "cascade", cascade=CascadeConfig(["quick", "deep"], below)))
        alone = {name: entry for name, entry in KINDS.items() if entry["models"] == [model]}
        only = result(study(tmp_path, "mixed", kinds=alone, shares=dict.fromkeys(alone, 1.0)))
        assert found.replicate.metrics["bits_per_char"] == only.replicate.metrics["bits_per_char"]


def test_the_best_mix_in_hindsight_is_that_of_brute_force(tmp_path: Path) -> None:
    """Of all ways to send 8 requests to the two kinds none has fewer bits than best_answer, of all ways to send the two
    tasks none fewer than by_task, and every mix lies at or above."""
    alone = {}
    for name in KINDS:
        shares = {kind: float(kind == name) for kind in KINDS}
        alone[name] = result(study(tmp_path, "mixed", n=8, shares=shares)).replicate.records
    bits = np.stack([records.microbits.values for records in alone.values()])
    task = alone["quick"].task

    def of(router: str, **cluster) -> int:
        return int(result(study(tmp_path, router, n=8, **cluster)).replicate.records.microbits.values.sum())

    each = min(int(bits[list(way), range(8)].sum()) for way in product(range(2), repeat=8))
    by_task = min(int(bits[np.array(way)[task], range(8)].sum()) for way in product(range(2), repeat=2))
    assert of("best_answer") == each
    assert of("by_task") == by_task
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        assert of("mixed", shares={"quick": share, "deep": 1 - share}) >= by_task >= each


def test_thompson_learns_what_the_traces_know_and_says_so_in_its_log(tmp_path: Path) -> None:
    config = study(tmp_path, "thompson", n=200)
    found = result(config)
    homes = build_fleet(replace(config, server=replace(config.server, router="by_task")), 0).routing.homes
    records = found.replicate.records
    late = [(t, r) for t, r in zip(records.task.tolist(), records.replica.tolist(), strict=True)][100:]
    assert sum(replica in homes[task] for task, replica in late) > 90
    judged = [d for d in found.decisions if "bandit" in d.deployment.reason]
    assert {d.cause.task for d in judged} == {"prose", "code"}
    assert [d.time_ns for d in found.decisions] == sorted(d.time_ns for d in found.decisions)
    assert judged[0].deployment.evidence["quick"]["answers"] >= 1
    assert [found.replicate.metrics[name] for name in OF_CASCADES] == [None] * 3


def test_shares_are_kept_and_drawn_the_same_again(tmp_path: Path) -> None:
    config = study(tmp_path, "mixed", n=400, shares={"quick": 0.8, "deep": 0.2})
    models = list(result(config).replicate.records.model)
    assert models.count("small") / 400 == pytest.approx(0.8, abs=0.05)
    assert models == list(result(config).replicate.records.model)


FAULTS = FaultsConfig(iteration_fails=FaultConfig(at_s=[1.0]))


@pytest.mark.parametrize(
    ("router", "cluster", "told"),
    [
        ("cascade", {}, r"cluster\.cascade\.kinds.*every kind of the cluster once.*add quick"),
        ("cascade", {"cascade": CascadeConfig(["quick"])}, "add deep"),
        ("cascade", {"cascade": CascadeConfig(["quick", "quick", "deep"])}, "every kind of the cluster once"),
        ("cascade", {"cascade": CascadeConfig(["quick", "dep"])}, "every kind of the cluster once"),
        ("cascade", {"kinds": {"a": {}}, "cascade": CascadeConfig(["a"])}, "two kinds or more"),
        ("cascade", {"kinds": {}, "cascade": ORDER}, r"name kinds of replicas in cluster\.kinds"),
        ("mixed", {"shares": {"quick": 0.5, "deep": 0.6}}, r"cluster\.shares.*sum to 1"),
        ("mixed", {"shares": {"quick": 1.5, "deep": -0.5}}, r"cluster\.shares\.deep.*at least 0"),
        ("mixed", {"shares": {"quick": 1.0}}, "add deep"),
        ("thompson", {"bandit": BanditConfig(costs={"dep": 1.0})}, r"cluster\.bandit\.costs\.dep.*quick, deep"),
        ("thompson", {"cascade": ORDER}, r"cluster\.cascade\.kinds.*set server\.router=cascade"),
        ("round_robin", {"shares": {"quick": 1.0, "deep": 0.0}}, r"cluster\.shares.*set server\.router=mixed"),
        ("thomson", {}, r"server\.router.*you may have meant thompson"),
    ],
)
def test_settings_that_do_not_fit_are_told_with_their_fix(tmp_path: Path, router: str, cluster, told: str) -> None:
    with pytest.raises(UserError, match=told):
        build_fleet(study(tmp_path, router, **cluster), 0)


def test_faults_bits_and_early_tokens_are_refused(tmp_path: Path) -> None:
    config = study(tmp_path, "cascade", cascade=ORDER)
    with pytest.raises(UserError, match=r"workload\.faults.*leave faults out"):
        build_fleet(replace(config, workload=replace(config.workload, faults=FAULTS)), 0)
    capped = KINDS | {"quick": KINDS["quick"] | {"policy": "static_cap", "cap_layers": 2}}
    early = study(tmp_path, "cascade", cascade=ORDER, kinds=capped)
    with pytest.raises(UserError, match="whole answers of small"):
        result(early)
    measured(tmp_path, bits=False)
    for router in ("thompson", "best_answer"):
        other = replace(config, server=replace(config.server, router=router), cluster=ClusterConfig(dict(KINDS)))
        with pytest.raises(UserError, match="know none of human text"):
            build_fleet(other, 0)
    with pytest.raises(UserError, match=r"cluster\.cascade\.escalate_below"):
        CascadeConfig(["a", "b"], -0.1)
    with pytest.raises(UserError, match=r"cluster\.bandit\.spread"):
        BanditConfig(spread=0.0)


def test_a_server_and_a_device_refuse_such_routers(tmp_path: Path) -> None:
    config = study(tmp_path, "thompson")
    with pytest.raises(UserError, match=r"server\.router.*clients' texts are not recorded"):
        served_job(replace(config, arms={"full": FULL_DEPTH}, seeds=[0]), ServeConfig())
    bound = replace(config, server=replace(config.server, router="best_answer"), mode="live")
    with pytest.raises(UserError, match=r"server\.router.*no knowledge of what will come.*set server\.router=thompson"):
        result(bound)


def test_a_study_writes_what_its_cascade_and_its_bandit_did(tmp_path: Path) -> None:
    base = study(tmp_path, "cascade", cascade=ORDER)
    arms = {
        "cascade": FULL_DEPTH,
        "thompson": FULL_DEPTH | {"overrides": {"server.router": "thompson", "cluster.cascade.kinds": []}},
    }
    run_study(replace(base, arms=arms, baseline="cascade", pictures=False, seeds=[0]), tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["arms"]["cascade"]["metrics"]["escalations"] > 0
    assert "escalated_fraction" in summary["headline_metrics"]
    rows = pq.read_table(tmp_path / "out" / "decisions.parquet").to_pylist()
    assert any(row["cause"] == "judged (task code)" and row["arm"] == "thompson" for row in rows)
    assert pq.read_table(tmp_path / "out" / "requests.parquet").num_rows == 80
