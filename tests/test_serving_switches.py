"""Switches in closed form: what drains, moves, loads and waits while another model takes over."""

from __future__ import annotations

from dataclasses import replace

import pytest
import simpy

from flat_rig import MS, WHOLE, capped, flat, run
from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.policy.deployment import AtTime, Completed, InFlight, Placement
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import Status
from helios_sim.workload import ClosedLoop, Constant
from rig import full_depth, workload


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
