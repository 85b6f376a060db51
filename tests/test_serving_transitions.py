"""Loads and the room that they need, in closed form: raises, standby models, and memory that is never exceeded."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings

from flat_rig import HALF, MS, WHOLE, capped, flat, run
from helios_sim.errors import UserError
from helios_sim.policy.deployment import AtTime, InFlight, Placement
from helios_sim.serving.server import Server
from helios_sim.workload import Constant
from priced import priced_profile
from rig import Scripted, full_depth, serve, workload
from serving_cases import cases, profiles as two_profiles

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


# --- room while a change is on its way


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


@pytest.mark.slow
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
        bytes_there = residency.weight_bytes(residency.layers) + replica.state.total_blocks * 16 * 4 * active.layers
        assert bytes_there <= usable
        assert residency.layers.get(active.model, active.layers) >= 2
        assert replica.used_blocks <= replica.state.total_blocks
        running = [replica.requests[slot] for slot in replica.lists.batch[: replica.running_requests]]
        assert sum(-(-(r.context_tokens + r.prefill_left) // 16) for r in running) == replica.used_blocks

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
