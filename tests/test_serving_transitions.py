"""Loads and switches in closed form, on profiles whose iterations take 1 ms and whose bytes can be counted.

The flat model weighs 68 bytes and 40 for each layer; a token's K and V weigh 4 bytes in each layer.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import simpy
from hypothesis import HealthCheck, given, settings

from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.errors import UserError
from helios_sim.exits.rule import FixedCap
from helios_sim.exits.synthetic import synthetic_trace
from helios_sim.policy.deployment import Deployment, InFlight, KvRule, Placement
from helios_sim.policy.trigger import AtTime, Completed
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import Status
from helios_sim.serving.batch import Column
from helios_sim.serving.server import Server
from helios_sim.workload import AllAtOnce, ClosedLoop, Constant, DrawnLengths, Fixed, TaskMix, Workload
from priced import priced_profile
from rig import Scripted, Served, full_depth, serve
from test_serving_properties import cases, profiles as two_profiles

MS = 1_000_000
WHOLE, HALF = 228, 148  # bytes of 4 and of 2 layers


def workload(requests: int, prompt: int, output: int, arrivals=AllAtOnce()) -> Workload:  # noqa: B008
    lengths = DrawnLengths(Fixed(prompt), Fixed(output))
    return Workload(arrivals, lengths, TaskMix.single("text"), requests, chars_per_token=None)


def capped(model: str = "a", layers: int = 2, **other) -> Deployment:
    return Deployment(Placement(model, layers), FixedCap(0.7), kv_rule=KvRule.NONE, **other)


def run(first: Deployment, then: list[Deployment], work: Workload, profiles: dict, **rig) -> Served:
    """Serves, and keeps (time, KV blocks, model) whenever the last two change in `log`."""
    log: list[tuple[int, int, str]] = []

    def watch(server: Server) -> None:
        replica = server._replica
        state = (replica.pool.total_blocks, replica.deployment.active.model)
        if not log or log[-1][1:] != state:
            log.append((replica.now_ns, *state))

    policy = Scripted(first, list(then))
    served = serve(work, policy, profiles, watch=watch, utilisation=1.0, **rig)
    served.log, served.policy = log, policy
    return served


def flat(name: str = "a", load_ms: float = 10.0, n_bytes: int = WHOLE, **other):
    """Loads n_bytes in load_ms."""
    return {name: flat_profile(0.001, name=name, load_bytes_per_s=n_bytes / load_ms * 1000, **other)}


# --- raising and lowering the cap


def test_a_raise_takes_its_bytes_over_bandwidth_and_computes_the_text_again() -> None:
    """Asked at 6 ms; 80 bytes take 10.4 ms, to 16.4; in force at the end of that iteration. One prefill replaces one
    decode, so no token is late; 17 tokens left at layer 2."""
    first = capped(triggers=(AtTime(5_500_000),))
    served = run(first, [full_depth("a")], workload(1, 10, 100), flat(load_ms=10.4, n_bytes=80))
    stats, record = served.run.stats, served.records[0]
    assert stats.transitions_ns == [17 * MS]
    assert (stats.loads, stats.load_ns, stats.switch_time_ns, stats.switches) == (1, 10_400_000, 11 * MS, 0)
    assert record.last_token_ns == 100 * MS
    assert (record.preemptions, record.early_tokens, record.layers_run) == (1, 17, 17 * 2 + 83 * 4)


def test_serving_is_slowed_while_weights_load() -> None:
    """2 ms an iteration at layer 2; asked at 6 ms; the load of 9 ms doubles the 3 iterations that begin within it, the
    last of which goes on to 18 ms; then 4 ms each."""
    profile = priced_profile("a", layer_s=1e-3, load_slowdown=2.0, load_bytes_per_s=80 / 0.009)
    served = run(capped(triggers=(AtTime(6 * MS),)), [full_depth("a")], workload(1, 10, 20), {"a": profile})
    assert served.run.stats.transitions_ns == [18 * MS]
    assert served.records[0].last_token_ns == (18 + (20 - 6) * 4) * MS


def test_a_raise_shrinks_the_pool_and_preempts_the_newest() -> None:
    """Blocks of one token. 90 fit beside 2 layers; while 2 more load 80; with 4 layers, of which a token needs twice
    the bytes, 40. Three requests hold 28 blocks each when it is decided at 9 ms: the newest goes. At 11 ms all are to
    be computed again, and one fits at a time."""
    first = capped(triggers=(AtTime(9 * MS),))
    rig = {"hbm_bytes": WHOLE + 640, "block_tokens": 1}
    served = run(first, [full_depth("a")], workload(3, 20, 15), flat(load_ms=1.4, n_bytes=80), **rig)
    assert [(t, blocks) for t, blocks, _ in served.log] == [(0, 90), (9 * MS, 80), (11 * MS, 40)]
    assert [r.last_token_ns for r in served.by_request()] == [15 * MS, 19 * MS, 25 * MS]
    assert [r.preemptions for r in served.by_request()] == [1, 1, 1]
    assert [r.early_tokens for r in served.by_request()] == [11, 11, 9]


def test_lowering_the_cap_is_immediate_and_preempts_nobody() -> None:
    rig = {"hbm_bytes": WHOLE + 640, "block_tokens": 1}
    first = replace(full_depth("a"), triggers=(AtTime(4 * MS),))
    served = run(first, [capped()], workload(1, 10, 20), flat(), **rig)
    stats = served.run.stats
    assert [(t, blocks) for t, blocks, _ in served.log] == [(0, 40), (4 * MS, 90)]
    assert (stats.loads, stats.preemptions, stats.switch_time_ns, stats.transitions_ns) == (0, 0, 0, [4 * MS])
    assert served.records[0].early_tokens == 16
    assert served.records[0].last_token_ns == 20 * MS


# --- switching


@pytest.mark.parametrize(
    ("hbm_bytes", "load_begins_ms", "switched_ms"),
    [(10_000, 5, 20), (2 * WHOLE + 48 * 16, 5, 20), (2 * WHOLE + 48 * 16 - 1, 20, 30), (WHOLE + 48 * 16, 20, 30)],
)
def test_a_switch_drains_and_loads_meanwhile_if_there_is_room(
    hbm_bytes: int, load_begins_ms: int, switched_ms: int
) -> None:
    """Two of four run at once, for 20 ms, in the end with 24 blocks each; asked at 5 ms, when they hold 9 each. The
    load takes 10 ms. It begins at once if what they will need until they are done fits beside both models."""
    both = flat("a") | flat("b")
    first = replace(full_depth("a", batch_limit=2), triggers=(AtTime(5 * MS),))
    rig = {"hbm_bytes": hbm_bytes, "block_tokens": 1}
    served = run(first, [full_depth("b")], workload(4, 5, 20), both, **rig)
    stats = served.run.stats
    assert [r.model for r in served.by_request()] == ["a", "a", "b", "b"]
    assert [r.scheduled_ns for r in served.by_request()] == [0, 0, switched_ms * MS, switched_ms * MS]
    assert (stats.switches, stats.loads, stats.preemptions, stats.load_ns) == (1, 1, 0, 10 * MS)
    assert stats.switch_time_ns == (switched_ms - 5) * MS
    assert served.run.end_ns == (switched_ms + 20) * MS
    assert switched_ms in (load_begins_ms + 10, 20)


@pytest.mark.parametrize("standby", [(), (Placement("b", 4),)])
def test_a_request_that_loses_its_place_during_the_drain_still_finishes_where_it_began(standby) -> None:
    """Room for 40 tokens; two requests that need 29 each. The newer is preempted, during the drain, and comes back,
    whether or not b is there already."""
    first = replace(full_depth("a", batch_limit=2), standby=standby, triggers=(AtTime(5 * MS),))
    rig = {"hbm_bytes": (2 if standby else 1) * WHOLE + 40 * 16, "block_tokens": 1}
    served = run(first, [full_depth("b")], workload(3, 10, 20), flat("a") | flat("b"), **rig)
    assert [r.model for r in served.by_request()] == ["a", "a", "b"]
    assert [r.preemptions for r in served.by_request()] == [0, 1, 0]
    assert [r.prompt_tokens for r in served.by_request()] == [10, 10, 10]


def test_nothing_starts_while_draining_although_places_are_free() -> None:
    first = replace(full_depth("a"), triggers=(AtTime(5 * MS),))
    served = run(first, [full_depth("b")], workload(8, 5, 20, Constant(500.0)), flat("a") | flat("b"))
    switched_ns = served.run.stats.transitions_ns[0]
    assert served.run.stats.switches == 1
    assert not [r for r in served.records if 5 * MS < r.scheduled_ns < switched_ns]
    assert {r.model for r in served.records if r.scheduled_ns < switched_ns} == {"a"}


@pytest.mark.parametrize("asked_ms", range(1, 30, 4))
def test_migration_keeps_the_answer_and_prefills_the_text_so_far(asked_ms: int) -> None:
    """b's tokens cover 2 characters. Loads take 3 ms. The answer has 40 characters on a, one a token; b continues
    after the characters that a has given, whole tokens only."""
    both = {
        "a": flat_profile(0.001, name="a"),
        "b": flat_profile(0.001, name="b", chars_per_token=2, load_bytes_per_s=WHOLE / 0.003),
    }
    traces = {
        name: synthetic_trace(name, (2, 4), tokens=n, chars_per_token=c) for name, n, c in (("a", 100, 1), ("b", 50, 2))
    }
    first = replace(full_depth("a"), triggers=(AtTime(asked_ms * MS),))
    to = replace(full_depth("b"), in_flight=InFlight.MIGRATE)
    served = run(first, [to], workload(1, 10, 40), both, traces=traces)
    record = served.records[0]
    on_a = asked_ms + 3
    on_b = record.output_tokens - on_a
    assert (record.model, record.status, record.preemptions) == ("b", Status.COMPLETED, 1)
    assert abs(on_a + 2 * on_b - 40) <= 1
    assert record.prompt_tokens == round((10 + on_a) / 2)
    assert record.last_token_ns == (on_a + on_b) * MS
    assert record.first_token_ns == 1 * MS


def test_an_answer_may_move_twice() -> None:
    """5 tokens of one character on a, 4 of two on b, the rest on a again: 40 characters in all, within one of b's
    tokens, since b began inside of one."""
    both = {"a": flat_profile(0.001, name="a"), "b": flat_profile(0.001, name="b", chars_per_token=2)}
    traces = {
        name: synthetic_trace(name, (2, 4), tokens=n, chars_per_token=c) for name, n, c in (("a", 100, 1), ("b", 50, 2))
    }
    there = (Placement("a", 4), Placement("b", 4))
    first = replace(full_depth("a"), standby=there, triggers=(AtTime(5 * MS),))
    to_b = replace(full_depth("b"), standby=there, in_flight=InFlight.MIGRATE, triggers=(AtTime(9 * MS),))
    back = replace(full_depth("a"), standby=there, in_flight=InFlight.MIGRATE)
    served = run(first, [to_b, back], workload(1, 10, 40), both, traces=traces)
    record = served.records[0]
    assert (record.model, record.preemptions, served.run.stats.switches) == ("a", 2, 2)
    assert abs(5 + 4 * 2 + (record.output_tokens - 9) - 40) <= 2
    assert record.layers_run == 4 * record.output_tokens
    assert record.last_token_ns == record.output_tokens * MS


def test_a_standby_model_is_there_at_once() -> None:
    standby = (Placement("b", 4),)
    first = replace(full_depth("a"), standby=standby, triggers=(Completed(1),))
    served = run(first, [full_depth("b")], workload(3, 5, 10, ClosedLoop(1)), flat("a") | flat("b"))
    stats = served.run.stats
    assert [r.model for r in served.by_request()] == ["a", "b", "b"]
    assert (stats.loads, stats.load_ns, stats.switch_time_ns, stats.switches) == (0, 0, 0, 1)
    assert served.run.end_ns == 30 * MS


def test_an_instant_deployment_costs_nothing() -> None:
    first = replace(full_depth("a"), instant=True, triggers=(Completed(1),))
    to = replace(full_depth("b"), instant=True)
    served = run(first, [to], workload(3, 5, 10, ClosedLoop(1)), flat("a") | flat("b"))
    assert (served.run.stats.loads, served.run.stats.switch_time_ns, served.run.end_ns) == (0, 0, 30 * MS)
    assert [r.model for r in served.by_request()] == ["a", "b", "b"]


def test_transfers_queue_on_one_channel() -> None:
    """A raise and a standby together: 80 bytes and 228 bytes, one after the other."""
    both = flat("a", 8.0, 80) | flat("b", 10.0)
    first = capped(triggers=(AtTime(2 * MS),))
    to = replace(full_depth("a"), standby=(Placement("b", 4),))
    served = run(first, [to], workload(1, 5, 50), both)
    assert served.run.stats.transitions_ns == [20 * MS]
    assert (served.run.stats.loads, served.run.stats.load_ns) == (2, 18 * MS)

    env = simpy.Environment(initial_time=0)
    bound = synthetic_trace("a", (2, 4)).bind(("text",))
    engine = SimulatedEngine(env, {"a": ModelData(both["a"], bound)})
    done: list[int] = []
    for n_bytes in (80, 40):
        engine.start_transfer(n_bytes, "a", lambda: done.append(int(env.now)))
    env.run()
    assert done == [8 * MS, 12 * MS]


@pytest.mark.parametrize("in_flight", InFlight)
def test_nobody_is_dropped_for_room_that_is_short_only_while_weights_load(in_flight: InFlight) -> None:
    """Room for 93 tokens beside one model, for 78 beside both. A request that needs 79 and comes while b loads waits
    for the change, after which there is room again."""
    first = replace(full_depth("a"), triggers=(AtTime(3 * MS),))
    to = replace(full_depth("b"), in_flight=in_flight)
    rig = {"hbm_bytes": WHOLE + 93 * 16, "block_tokens": 1}
    served = run(first, [to], workload(3, 60, 20, Constant(125.0)), flat("a") | flat("b"), **rig)
    assert [r.drop_reason for r in served.by_request()] == [None] * 3
    assert min(blocks for _, blocks, _ in served.log) == 78 or in_flight is InFlight.DRAIN


def test_nobody_is_dropped_while_a_raise_waits_for_a_standby_to_leave() -> None:
    """Tokens of 8 bytes at 2 layers, of 16 at 4. 21 fit while a loads its rest beside b, 25 when b has left. A request
    that needs 23 comes in between."""
    both = flat("a", 10.0, 80) | flat("b")
    first = capped(standby=(Placement("b", 4),), triggers=(AtTime(3 * MS),))
    rig = {"hbm_bytes": WHOLE + 25 * 16, "block_tokens": 1}
    served = run(first, [full_depth("a")], workload(2, 15, 9, Constant(200.0)), both, **rig)
    assert [blocks for _, blocks, _ in served.log] == [31, 21, 25]
    assert [r.drop_reason for r in served.by_request()] == [None] * 2


def test_a_deployment_that_leaves_no_room_is_refused_even_if_its_weights_are_there() -> None:
    """b whole stands by a at layer 2, and what is left, 12 bytes, holds a block of a's 2 layers but none of b's 4."""
    both = flat("a") | flat("b")
    first = capped(standby=(Placement("b", 4),), triggers=(AtTime(0),))
    to = replace(full_depth("b"), standby=(Placement("a", 2),))
    with pytest.raises(UserError, match="one KV block"):
        run(first, [to], workload(1, 1, 1), both, hbm_bytes=HALF + WHOLE + 12, block_tokens=1)


# --- memory is never exceeded


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(**cases)
def test_weights_and_cache_never_exceed_the_budget(workload, script, replicas, router, pool_blocks) -> None:
    made = two_profiles(0.001, 2**30)
    usable = 2 * WHOLE + pool_blocks * 16 * 16

    def watch(server: Server) -> None:
        replica, residency = server._replica, server._transitions.residency
        if replica.deployment.instant:
            return
        active = replica.deployment.active
        bytes_there = residency.weight_bytes(residency.layers) + replica.pool.total_blocks * 16 * 4 * active.layers
        assert bytes_there <= usable
        assert residency.layers.get(active.model, active.layers) >= 2
        assert replica.pool.used_blocks <= replica.pool.total_blocks
        cached = replica.batch.column(Column.CONTEXT) + replica.batch.column(Column.PREFILL_LEFT)
        held = int(sum(-(-cached // 16)))
        assert held == replica.pool.used_blocks

    served = serve(
        workload, Scripted(script.first, list(script.then)), made, hbm_bytes=usable, utilisation=1.0,
        max_batch_tokens=64, max_running_requests=32, replicas=replicas, router=router, watch=watch,
    )  # fmt: skip
    for server in served.run.servers:
        assert 0 < server.stats.hbm_peak_bytes <= usable


def test_the_peak_counts_caches_that_live_for_one_iteration() -> None:
    """Three requests whose answer is their prompt's token: 5 blocks of 16 bytes each, never a decode."""
    served = run(full_depth("a"), [], workload(3, 5, 1), flat(), hbm_bytes=10_000, block_tokens=1)
    assert served.run.stats.hbm_peak_bytes == WHOLE + 3 * 5 * 16
