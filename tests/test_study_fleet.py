"""Replicas of several kinds: what each is made of, who gets which task, and what is refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.store import load_trace, write_trace
from helios_sim.profile.store import load_profile, write_profile
from helios_sim.report.records import RecordLog, Records
from helios_sim.routing import Router
from helios_sim.simulation import Run
from helios_sim.study.fleet import Fleet, build_fleet
from helios_sim.study.jobs import make_job, run_job, serve
from helios_sim.study.schema import ArrivalsConfig, ClusterConfig, Config, ExitsConfig, LengthConfig, ServerConfig
from test_study_build import EXITS, measured

KINDS = {
    "quick": {"count": 2, "models": ["small"], "server": {"max_running_requests": 1}},
    "deep": {"count": 1, "models": ["large"], "policy": "static_cap", "cap_layers": 4},
}
FULL_DEPTH = {"policy": "full_depth"}


def study(folder: Path, kinds=KINDS, router: str = "round_robin", tasks=None, **other) -> Config:
    base = measured(folder)
    return replace(
        base, server=ServerConfig(router=router), cluster=ClusterConfig(dict(kinds), dict(tasks or {})), **other
    )


def served(config: Config, entry=FULL_DEPTH, seed: int = 0) -> tuple[Records, Run, Fleet]:
    fleet, log = build_fleet(config, seed), RecordLog()
    run = serve(make_job("arm", entry, config, seed), fleet, log.add)
    return log.records(), run, fleet


def test_each_kind_has_its_own_models_policy_and_limits(tmp_path: Path) -> None:
    records, run, fleet = served(study(tmp_path))
    assert [(kind.name, kind.numbers) for kind in fleet.kinds] == [("quick", range(2)), ("deep", range(2, 3))]
    models = {(replica, model) for replica, model in zip(records.replica.tolist(), records.model, strict=True)}
    assert models == {(0, "small"), (1, "small"), (2, "large")}
    first = [server.decisions[0].deployment for server in run.servers]
    assert [(d.active.model, d.active.layers) for d in first] == [("small", 4), ("small", 4), ("large", 4)]
    batches = [server.stats.decode_batch_ns / server.stats.decode_ns for server in run.servers]
    assert batches[:2] == [1.0, 1.0]  # the kind's own limit
    assert batches[2] > 1


def test_a_single_kind_is_the_same_as_so_many_replicas(tmp_path: Path) -> None:
    alike = replace(measured(tmp_path), server=ServerConfig(replicas=3, router="least_loaded"))
    named = study(tmp_path, {"all": {"count": 3}}, "least_loaded")
    one, other = (run_job(make_job("full", FULL_DEPTH | {"model": "small"}, config, 0)) for config in (alike, named))
    assert one.replicate.metrics == other.replicate.metrics
    assert one.replicate.records.replica.tolist() == other.replicate.records.replica.tolist()


def test_cards_of_several_kinds_are_priced_each_by_its_own_profile(tmp_path: Path) -> None:
    """The same request, alone: on each kind it takes what a study of that card alone says."""
    config = Config(
        models=["opt-1.3b"],
        workload=replace(measured(tmp_path).workload, n_requests=2, arrivals=ArrivalsConfig("constant", 0.1)),
        exits=replace(Config().exits, source="none"),
        cluster=ClusterConfig({"old": {}, "new": {"hardware": "h100-80gb"}}),
    )
    records, _, fleet = served(config)
    assert [kind.card.name for kind in fleet.kinds] == ["a100-40gb", "h100-80gb"]
    for place, hardware in enumerate(["a100-40gb", "h100-80gb"]):
        alone, _, _ = served(replace(config, hardware=hardware, cluster=ClusterConfig()))
        assert records.e2e_ns()[place] == alone.e2e_ns()[place]
    assert records.e2e_ns()[1] < records.e2e_ns()[0]


def test_tasks_go_where_the_map_says_and_nowhere_else(tmp_path: Path) -> None:
    config = study(tmp_path, router="by_task", tasks={"prose": "quick", "code": "deep"})
    records, _, fleet = served(config)
    assert {(t, r) for t, r in zip(records.task.tolist(), records.replica.tolist(), strict=True)} == {
        (0, 0), (0, 1), (1, 2),
    }  # fmt: skip
    assert [kind.tasks for kind in fleet.kinds] == [("prose",), ("code",)]
    whole = build_fleet(measured(tmp_path), 0).parts.situation.candidates["small"].offline
    quick = fleet.kinds[0].parts.situation.candidates["small"].offline
    assert len(quick.prompt_tokens) < len(whole.prompt_tokens)  # told of the exits of its own task alone


def with_bits(folder: Path, bits: dict[str, tuple[float, float]]) -> None:
    """Traces whose text costs so many bits per character at full depth, for prose and code."""
    for seed, (name, exits) in enumerate(EXITS.items()):
        trace = synthetic_trace(name, exits, ("prose", "code"), tokens=400, seed=seed)
        each = np.repeat(np.array(bits[name])[trace.task] * trace.chars, len(exits)).reshape(-1, len(exits))
        write_trace(replace(trace, bits=each.astype(np.float32), human_text=True), folder / "exits" / name)


@pytest.mark.parametrize(
    ("bits", "homes"),
    [
        ({"small": (1.0, 0.9), "large": (1.2, 0.5)}, ((0, 1), (2,))),
        ({"small": (2.0, 0.9), "large": (1.2, 0.5)}, ((2,), (2,))),
        ({"small": (1.0, 0.9), "large": (1.0, 1.0)}, ((0, 1, 2), (0, 1))),
    ],
)
def test_without_a_map_a_task_goes_to_the_kind_that_knows_its_text_best(tmp_path: Path, bits, homes) -> None:
    config = study(tmp_path, router="by_task")
    with_bits(tmp_path, bits)
    assert build_fleet(config, 0).routing.homes == homes
    records, _, _ = served(config)
    assert all(replica in homes[task] for task, replica in zip(records.task, records.replica, strict=True))


@pytest.mark.parametrize(
    ("right", "homes"), [((0.9, 0.4), ((0,), (1,))), ((0.2, 0.4), ((1,), (1,))), ((0.5, 0.5), ((0,), (0,)))]
)
def test_without_a_map_a_task_goes_to_the_drafter_that_is_right_most_often(tmp_path: Path, right, homes) -> None:
    """Of prose and code the first drafter predicts these shares, the other one 0.3 and 0.45 of them."""
    config = study(tmp_path, router="by_task")
    trace = load_trace("large", str(tmp_path / "exits" / "large"))
    place = np.arange(trace.n_tokens) - trace.task_first[trace.task]
    shares = {"small": np.array(right), "other": np.array((0.3, 0.45))}
    drafters = {name: place < share[trace.task] * 400 for name, share in shares.items()}
    write_trace(replace(trace, drafters=drafters), tmp_path / "exits" / "large")
    small = load_profile("small@box", tmp_path / "profiles")
    write_profile(replace(small, model=replace(small.model, name="other")), tmp_path / "profiles" / "other@box")
    own = load_trace("small", str(tmp_path / "exits" / "small"))
    write_trace(replace(own, model="other"), tmp_path / "exits" / "other")
    kinds = {name: {"models": [name, "large"], "policy": "draft_model", "model": "large"} for name in drafters}
    found = build_fleet(replace(config, cluster=ClusterConfig(kinds)), 0)
    assert found.routing.homes == homes
    wrong = {**kinds, "small": {**kinds["small"], "models": ["large", "small"], "drafter": "nobody"}}
    with pytest.raises(UserError, match=r"cluster\.kinds\.small.*drafter='nobody'"):
        build_fleet(replace(config, cluster=ClusterConfig(wrong)), 0)


def test_stated_shares_give_each_drafter_its_task_and_are_what_is_accepted(tmp_path: Path) -> None:
    base = study(tmp_path, router="by_task")
    small = load_profile("small@box", tmp_path / "profiles")
    write_profile(replace(small, model=replace(small.model, name="other")), tmp_path / "profiles" / "other@box")
    shares = {"small": {"prose": 0.9, "code": 0.2}, "other": {"prose": 0.4, "code": 0.7}}
    kinds = {n: {"models": [n, "large"], "policy": "draft_model", "model": "large", "draft_tokens": 1} for n in shares}
    exits = ExitsConfig(source="stated", parameters={"drafted": shares})
    lengths = replace(base.workload.lengths, output=LengthConfig(value=4000))
    config = replace(base, exits=exits, cluster=ClusterConfig(kinds), workload=replace(base.workload, lengths=lengths))
    records, run, fleet = served(config)
    assert fleet.routing.homes == ((0,), (1,))
    for server, (name, task) in zip(run.servers, (("small", "prose"), ("other", "code")), strict=True):
        stats = server.stats
        assert stats.accepted_drafts / stats.drafted_tokens == pytest.approx(shares[name][task], abs=0.03)
    assert len(records) == 24


def test_without_a_map_and_without_bits_it_says_what_to_do(tmp_path: Path) -> None:
    config = study(tmp_path, router="by_task")
    measured(tmp_path, bits=False)
    with pytest.raises(UserError, match=r"cluster\.tasks.*no bits.*say which kind"):
        build_fleet(config, 0)


def test_every_replica_expects_its_share_and_the_shares_are_the_whole(tmp_path: Path) -> None:
    def expected(config: Config) -> list[tuple[int, float, float]]:
        kinds = build_fleet(config, 0).kinds
        told = [(len(kind.numbers), kind.parts.situation.expected) for kind in kinds]
        return [(n, e.arrival_rate_per_s or e.closed_loop_users, e.prompt_chars) for n, e in told]

    base = measured(tmp_path)
    arrivals = replace(base.workload, n_requests=400, arrivals=ArrivalsConfig("poisson", 8.0))
    ((_, rate, _),) = expected(replace(base, workload=arrivals))
    ((_, each, _),) = expected(replace(base, workload=arrivals, server=ServerConfig(replicas=4)))
    assert each == pytest.approx(rate / 4)
    shares = expected(study(tmp_path, router="by_task", tasks={"prose": "quick", "code": "deep"}, workload=arrivals))
    assert sum(n * share for n, share, _ in shares) == pytest.approx(rate)
    assert shares[1][1] == pytest.approx(rate / 2, rel=0.15)  # half of the requests are code, and one replica has them
    users = replace(base.workload, arrivals=ArrivalsConfig("closed_loop", users=12))
    assert [share for _, share, _ in expected(study(tmp_path, workload=users))] == [4, 4]


@pytest.mark.parametrize("router", ["round_robin", "least_loaded", "power_of_two", "by_task"])
@pytest.mark.parametrize("arrivals", [ArrivalsConfig("closed_loop", users=5), ArrivalsConfig("poisson", 30.0)])
def test_a_cluster_serves_everybody_and_the_same_again(tmp_path: Path, router: str, arrivals) -> None:
    tasks = {"prose": "quick", "code": "deep"} if router == "by_task" else {}
    config = study(tmp_path, router=router, tasks=tasks)
    config = replace(config, workload=replace(config.workload, n_requests=40, arrivals=arrivals))
    job = make_job("arm", FULL_DEPTH, config, 3)
    first, again = run_job(job), run_job(job)
    assert first.replicate.metrics == again.replicate.metrics
    assert first.replicate.metrics["requests_completed"] == 40
    assert first.replicate.records.replica.tolist() == again.replicate.records.replica.tolist()
    assert len(Counter(first.replicate.records.replica.tolist())) == 3


def test_the_router_by_prefixes_needs_prefixes(tmp_path: Path) -> None:
    config = study(tmp_path, router="prefix_aware")
    with pytest.raises(UserError, match=r"server\.router='prefix_aware'.*server\.enable_prefix_caching=true"):
        build_fleet(config, 0)
    config = replace(config, server=replace(config.server, enable_prefix_caching=True))
    assert build_fleet(config, 0).routing.router is Router.PREFIX_AWARE


REFUSED = {
    "kinds that are no mapping": ({"a": 3}, {}, {}, r"cluster\.kinds\.a=3"),
    "no replicas": ({"a": {"count": 0}}, {}, {}, r"cluster\.kinds\.a\.count=0"),
    "half a replica": ({"a": {"count": 0.5}}, {}, {}, r"cluster\.kinds\.a\.count=0\.5"),
    "an unknown key": ({"a": {"cards": 2}}, {}, {}, r"cluster\.kinds\.a\.cards=2.*count, hardware, models"),
    "an unknown policy": ({"a": {"policy": "magic"}}, {}, {}, r"cluster\.kinds\.a\.policy='magic'"),
    "an unknown setting": (
        {"a": {"policy": "static_cap", "depth": 2}}, {}, {}, r"cluster\.kinds\.a\.policy\.depth=2.*cap_layers"),
    "an unknown model": ({"a": {"models": ["huge"]}}, {}, {}, r"cluster\.kinds\.a.*huge@box"),
    "no model": ({"a": {"models": []}}, {}, {}, r"cluster\.kinds\.a\.models=\[\]"),
    "a number for a list": ({"a": {"models": 7}}, {}, {}, r"cluster\.kinds\.a\.models=7"),
    "a name for a list": ({"a": {"models": "small"}}, {}, {}, r"cluster\.kinds\.a\.models='small'.*\[opt-1.3b\]"),
    "an unknown card": ({"a": {"hardware": "tpu"}}, {}, {}, r"cluster\.kinds\.a.*small@tpu"),
    "a setting of the whole": ({"a": {"server": {"router": "x"}}}, {}, {}, r"cluster\.kinds\.a\.server.*max_batch"),
    "a limit that cannot be": (
        {"a": {"server": {"max_batch_tokens": 0}}}, {}, {}, r"cluster\.kinds\.a\.server\.max_batch_tokens=0"),
    "counts that do not add up": (KINDS, {"replicas": 4}, {}, r"server\.replicas=4.*add up to 3"),
    "a map for nobody": (KINDS, {}, {"code": "deep"}, r"cluster\.tasks.*server\.router=by_task"),
    "a task without a kind": (KINDS, {"router": "by_task"}, {"code": "deep"}, r"cluster\.tasks.*without one: prose"),
    "a kind without a task": (
        KINDS, {"router": "by_task"}, {"code": "deep", "prose": "deep"}, r"cluster\.tasks.*without one: quick"),
    "an unknown task": (KINDS, {"router": "by_task"}, {"sums": "deep"}, r"cluster\.tasks\.sums='deep'.*prose, code"),
    "an unknown kind": (KINDS, {"router": "by_task"}, {"code": "wide"}, r"cluster\.tasks\.code='wide'.*quick, deep"),
    "tasks for replicas that are alike": ({}, {"router": "by_task"}, {}, r"server\.router='by_task'.*cluster\.kinds"),
}  # fmt: skip


@pytest.mark.parametrize(("kinds", "server", "tasks", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_is_refused_with_its_key(tmp_path: Path, kinds, server, tasks, message: str) -> None:
    base = measured(tmp_path)
    with pytest.raises(UserError, match=message):
        build_fleet(replace(base, server=ServerConfig(**server), cluster=ClusterConfig(kinds, tasks)), 0)
