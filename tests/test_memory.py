"""KV memory and the scheduler: who runs, who is preempted, who is refused, and in what order."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import Status
from helios_sim.workload import ClosedLoop, Constant, Exponential, Fixed, Workload
from rig import Scripted, Served, full_depth, serve, workload

MS = 1_000_000
WEIGHTS, TOKEN = 228, 16  # bytes of the flat model and of one token's K and V


def run(work: Workload, blocks: int, block_tokens: int = 1, **rig) -> Served:
    """Serves at full depth with room for so many blocks; `plans` is what every iteration ran."""
    plans: list[tuple] = []

    def note(server, plan, start_ns: int, end_ns: int) -> None:
        members = [m.request.request_id for m in plan.members]
        parts = [(members[p.index], p.tokens, p.context_tokens, p.finishes) for p in plan.prefill]
        plans.append((end_ns, members, parts))

    hbm_bytes = WEIGHTS + blocks * block_tokens * TOKEN
    policy = rig.pop("policy", full_depth())
    rig.setdefault("on_plan", note)
    served = serve(work, policy, hbm_bytes=hbm_bytes, utilisation=1.0, block_tokens=block_tokens, **rig)
    served.plans = plans
    return served


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompt=st.sampled_from([1, 15, 16, 17, Exponential(30)]),
    output=st.sampled_from([1, 2, 16, 17, 33, Exponential(30)]),
    requests=st.integers(1, 15),
    blocks=st.integers(2, 12),
    block_tokens=st.sampled_from([1, 4, 16]),
    ahead_of_clock=st.booleans(),
)
def test_a_request_completes_if_and_only_if_it_fits_alone(
    prompt, output, requests, blocks, block_tokens, ahead_of_clock
) -> None:
    """However often it is preempted. The last token's K and V are never needed."""
    on_plan = {"on_plan": None} if ahead_of_clock else {}
    served = run(workload(requests, prompt, output), blocks, block_tokens, **on_plan)
    for record in served.records:
        asked = record.prompt_chars + record.output_chars - 1
        if asked <= blocks * block_tokens:
            assert record.status is Status.COMPLETED
            assert record.output_tokens == record.output_chars
            assert record.layers_run == 4 * record.output_tokens
        else:
            assert (record.status, record.output_tokens) == (Status.DROPPED, 0)
            assert record.drop_reason == "larger than the KV pool beside flat"
    assert served.run.servers[0].used_blocks == 0


def test_preemption_is_newest_first_and_loses_no_token() -> None:
    """Room for 20 tokens; two requests need 14 each. With 10 tokens each, after 6 iterations, the pool is full: the
    newer goes. It comes back when the older is done, with one prefill in place of a decode."""
    served = run(workload(2, 5, 10), 20)
    older, newer = served.by_request()
    assert (older.preemptions, older.last_token_ns) == (0, 10 * MS)
    assert (newer.preemptions, newer.first_token_ns, newer.last_token_ns) == (1, MS, 14 * MS)
    assert served.run.stats.preemptions == 1
    assert [parts for _, _, parts in served.plans if parts][-1] == [(1, 11, 0, True)]
    assert served.run.stats.itl.longest_ns == 5 * MS


@pytest.mark.parametrize("spare", [0, 1])
def test_a_decode_that_finds_no_block_preempts_the_newer(spare: int) -> None:
    """Blocks of 4. Two prompts of 4 tokens take one each; both need a second in the first decode and a third in the
    fifth. With 5 blocks in all the newer goes then; with 6 nobody does."""
    served = run(workload(2, 4, 8), 5 + spare, 4)
    assert [r.preemptions for r in served.by_request()] == [0, 0 if spare else 1]
    assert served.by_request()[0].last_token_ns == 8 * MS
    # It has 5 tokens, one from its prompt and 4 decoded, waits for 3 iterations, and has 3 to go.
    assert served.by_request()[1].last_token_ns == (8 if spare else 11) * MS


def test_longer_than_the_context_is_dropped_with_a_reason() -> None:
    profiles = {"flat": flat_profile(0.001, max_context_tokens=20)}
    served = run(workload(1, 10, 10), 1000, profiles=profiles)
    assert served.records[0].status is Status.COMPLETED
    served = run(workload(1, 10, 11), 1000, profiles=profiles)
    assert served.records[0].drop_reason == "context of flat exceeded"


def test_a_prompt_beyond_the_budget_goes_in_chunks_and_decodes_go_first() -> None:
    """A budget of 10. The first prompt, of 25 tokens, takes 3 iterations; the second gets what is left of the third,
    then 9 beside one decode, then the rest."""
    served = run(workload(2, 25, 6), 1000, max_batch_tokens=10)
    assert [(members, parts) for _, members, parts in served.plans[:6]] == [
        ([0], [(0, 10, 0, False)]),
        ([0], [(0, 10, 10, False)]),
        ([0, 1], [(0, 5, 20, True), (1, 5, 0, False)]),
        ([0, 1], [(1, 9, 5, False)]),
        ([0, 1], [(1, 9, 14, False)]),
        ([0, 1], [(1, 2, 23, True)]),
    ]
    assert [r.first_token_ns for r in served.by_request()] == [3 * MS, 6 * MS]
    assert served.by_request()[0].last_token_ns == 8 * MS


def test_first_come_first_served_even_if_a_later_one_would_fit() -> None:
    """Prompts of 10, 25 and 2 tokens, room for 30: the third waits behind the second, which waits for the first."""
    sizes = {1: [10, 25, 2], 5: [5, 5, 5]}  # by the value asked for: prompts, answers
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Fixed, "sampler", lambda self, rng: lambda n: np.array(sizes[self.value][:n]))
        served = run(workload(3, 1, 5), 30)
    assert [r.prompt_tokens for r in served.by_request()] == [10, 25, 2]
    assert [r.scheduled_ns for r in served.by_request()] == [0, 5 * MS, 5 * MS]


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(requests=st.integers(2, 20), blocks=st.integers(3, 40), seed=st.integers(0, 1000))
def test_requests_start_in_the_order_of_their_arrival(requests, blocks, seed) -> None:
    served = run(workload(requests, Exponential(10), Exponential(10), Constant(400.0)), blocks, 4, seed=seed)
    started = [r for r in served.by_request() if r.scheduled_ns is not None]
    assert [r.scheduled_ns for r in started] == sorted(r.scheduled_ns for r in started)
    first = [r.first_token_ns for r in started]
    assert first == sorted(first)


@pytest.mark.slow
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(requests=st.integers(2, 20), budget=st.integers(4, 40), limit=st.integers(1, 6), seed=st.integers(0, 1000))
def test_the_token_budget_and_the_batch_limit_hold(requests, budget, limit, seed) -> None:
    policy = Scripted(full_depth(batch_limit=limit))
    served = run(
        workload(requests, Exponential(20), Exponential(10)), 1000, max_batch_tokens=budget, policy=policy, seed=seed
    )
    for _, members, parts in served.plans:
        decoding = len(members) - len(parts)
        prefilled = sum(tokens for _, tokens, _, _ in parts)
        assert len(members) <= limit
        assert prefilled == 0 or prefilled + max(0, decoding) <= budget + len(parts)
    assert {r.status for r in served.records} == {Status.COMPLETED}


def test_lowering_the_batch_limit_stops_nobody_who_runs() -> None:
    from helios_sim.policy.deployment import AtTime

    first = replace(full_depth(), triggers=(AtTime(3 * MS),))
    policy = Scripted(first, [full_depth(batch_limit=1)])
    served = run(workload(4, 5, 10, Constant(500.0)), 1000, policy=policy)
    assert served.run.stats.preemptions == 0
    assert [r.scheduled_ns for r in served.by_request()] == [0, 2 * MS, 12 * MS, 22 * MS]


def test_the_pool_is_not_made_smaller_than_what_is_used() -> None:
    def shrink(server, plan, start_ns: int, end_ns: int) -> None:
        if start_ns == 2 * MS:  # two requests with 5 and 2 tokens each in blocks of one token
            with pytest.raises(RuntimeError, match="KV pool of 3 blocks while 12 are used"):
                server._replica.resize_pool(3)

    run(workload(2, 5, 4), 100, on_plan=shrink)


def test_used_memory_over_time_is_what_the_tokens_held() -> None:
    """One request, blocks of one token: 5 in its prompt's iteration, then one more in each: 5 + 6 + 7 + 8."""
    served = run(workload(1, 5, 4), 100)
    assert served.run.stats.kv_block_ns == (5 + 6 + 7 + 8) * MS
    assert served.run.stats.kv_pool_block_ns == 4 * 100 * MS
    assert served.run.stats.hbm_peak_bytes == WEIGHTS + 8 * TOKEN


def test_the_queue_of_a_closed_loop_keeps_the_server_busy() -> None:
    served = run(workload(30, 5, 10, ClosedLoop(4)), 1000)
    assert served.run.stats.busy_ns == served.run.end_ns
    assert served.run.stats.decode_batch_ns == 30 * 9 * MS
    assert np.isclose(served.run.stats.itl.mean_ns, MS)
