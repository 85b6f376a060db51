"""Rules of other engines than vLLM v1: prompts first, memory for whole answers, prompts that wait for more of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import RequestRecord
from helios_sim.serving.iteration import Plan
from helios_sim.workload import (
    AllAtOnce,
    ClosedLoop,
    Constant,
    DrawnLengths,
    Exponential,
    Fixed,
    TaskMix,
    Uniform,
    Workload,
)
from priced import priced_profile
from rig import Served, full_depth, serve

ITERATION_NS = 1_000_000
FIRST, WHOLE = {"prefill_first": True}, {"keeps_answers": True}
WAIT = {"wait_iterations": 3, "wait_tokens": 60}


def work(arrivals: Any, n: int, prompt: Any, output: Any) -> Workload:
    return Workload(arrivals, DrawnLengths(prompt, output), TaskMix.single("text"), n, chars_per_token=None)


def run(workload: Workload, others: dict[str, Any], blocks: int = 1000, **rig: Any) -> Served:
    profile = flat_profile(0.001)
    hbm_bytes = profile.weight_bytes(4) + profile.activation_reserve_bytes + blocks * 16 * profile.kv_bytes_per_token(4)
    return serve(workload, full_depth(), hbm_bytes=hbm_bytes, utilisation=1.0, others=others, **rig)


def test_decodes_wait_until_the_last_prompt_is_computed() -> None:
    """Four prompts, two of which fit into an iteration: the first two wait while the others are computed."""
    served = run(work(AllAtOnce(), 4, Fixed(32), Fixed(3)), FIRST, max_batch_tokens=64).by_request()
    assert [record.first_token_ns // ITERATION_NS for record in served] == [1, 1, 2, 2]
    assert {record.last_token_ns // ITERATION_NS for record in served} == {4}
    mixed = run(work(AllAtOnce(), 4, Fixed(32), Fixed(3)), {}, max_batch_tokens=66).by_request()
    assert [record.last_token_ns // ITERATION_NS for record in mixed] == [3, 3, 4, 4]


def test_an_iteration_has_prompts_or_decodes() -> None:
    plans: list[Plan] = []
    run(
        work(Constant(400.0), 30, Exponential(30), Exponential(20)), FIRST, max_batch_tokens=64,
        on_plan=lambda server, plan, start_ns, end_ns: plans.append(plan),
    )  # fmt: skip
    assert all(bool(plan.prefill) != bool(plan.decoding) for plan in plans)
    assert {bool(plan.prefill) for plan in plans} == {True, False}


def test_none_enters_without_memory_for_its_answer() -> None:
    """Six blocks, requests that end with three: two run at a time, and none loses its place."""
    workload = work(AllAtOnce(), 6, Fixed(16), Fixed(32))
    kept, plain = run(workload, WHOLE, blocks=6), run(workload, {}, blocks=6)
    assert kept.run.stats.preemptions == 0 < plain.run.stats.preemptions
    began = [record.scheduled_ns for record in kept.by_request()]
    assert began[0] == began[1] < began[2] == began[3] < began[4] == began[5]


@pytest.mark.parametrize(("tokens", "iterations"), [(60, 3), (20, 0)])
def test_prompts_wait_beside_decodes_for_so_long_or_until_there_are_enough(tokens: int, iterations: int) -> None:
    """The second request comes while the first decodes: it waits three iterations, unless 20 tokens are enough."""
    workload = work(Constant(180.0), 2, Fixed(32), Fixed(40))
    served = run(workload, WAIT | {"wait_tokens": tokens}).by_request()
    arrival = served[1].arrival_ns - served[0].arrival_ns
    seen = -(-arrival // ITERATION_NS) * ITERATION_NS + served[0].arrival_ns
    assert served[1].scheduled_ns == seen + iterations * ITERATION_NS


def test_with_nothing_to_decode_prompts_do_not_wait() -> None:
    served = run(work(AllAtOnce(), 1, Fixed(8), Fixed(4)), WAIT).by_request()
    assert served[0].scheduled_ns == served[0].arrival_ns


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    others=st.sampled_from([FIRST, WHOLE, WAIT, FIRST | WHOLE, WHOLE | WAIT | {"whole_prompts": True}]),
    arrivals=st.sampled_from([AllAtOnce(), Constant(300.0), ClosedLoop(5)]),
    blocks=st.sampled_from([9, 40, 1000]), ahead=st.sampled_from([0, 1]), vllm_v1=st.booleans(), n=st.integers(1, 40),
)  # fmt: skip
def test_all_ways_to_run_give_the_same_bits(others, arrivals, blocks, ahead, vllm_v1, n) -> None:
    profile = priced_profile("flat", layer_s=2.1e-4, row_s=3.1e-5, kv_token_s=1.3e-6, prefill_token_s=2.9e-6)
    hbm_bytes = profile.weight_bytes(4) + profile.activation_reserve_bytes + blocks * 16 * profile.kv_bytes_per_token(4)
    found: list[list[RequestRecord]] = []
    for way in ({}, {"stepwise": True}, {"compiled": True}):
        served = serve(
            work(arrivals, n, Exponential(30), Exponential(20)), full_depth(), {"flat": profile}, hbm_bytes=hbm_bytes,
            utilisation=1.0, max_batch_tokens=64, max_running_requests=8, schedule_ahead=ahead, vllm_v1=vllm_v1,
            others=others, **way,
        )  # fmt: skip
        found.append(served.by_request())
    assert found[0] == found[1] == found[2]


def test_uniform_lengths_have_both_ends() -> None:
    drawn = Uniform(3, 6).sampler(np.random.default_rng(0))(4000)
    assert np.bincount(drawn, minlength=7)[3:] == pytest.approx(np.full(4, 1000), rel=0.1)
    assert drawn.min() == 3
    assert drawn.max() == 6
