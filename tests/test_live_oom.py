"""Out of memory in the middle of serving: fewer run together, nobody is lost without a reason, memory returns."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from helios_sim.exits.rule import Confidence, FullDepth, PerToken
from helios_sim.live.device import oom_message
from helios_sim.live.engine import LiveEngine
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from helios_sim.serving.iteration import Plan
from live_rig import LAYERS, Live, live_model, requests, serve_live
from tiny_models import write_tiny

LENGTHS = [(12, 20), (40, 9), (5, 30), (70, 12), (25, 14), (33, 24), (8, 16), (19, 27)]
N, SLOTS = len(LENGTHS), 4
FULL = Deployment(Placement("tiny", LAYERS), FullDepth(), kv_rule=KvRule.NONE)
EARLY = Deployment(
    Placement("tiny", LAYERS), PerToken(0.15, Confidence.MAX_PROBABILITY), kv_rule=KvRule.RECOMPUTE
)  # fmt: skip
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB.\nProcess 1 has it all."
Fails = Callable[[Plan, int], bool]  # the plan, and which iteration it is


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LiveModel]:
    return {"tiny": live_model(write_tiny("llama", tmp_path_factory.mktemp("tiny")))}


@pytest.fixture(scope="module")
def undisturbed(tiny: dict[str, LiveModel]) -> dict[str, Live]:
    return {
        name: serve_live(tiny, deployment, requests(LENGTHS), N, slots=SLOTS)
        for name, deployment in (("full", FULL), ("early", EARLY))
    }


class Fault:
    """Lets the iterations' forward passes run and then fail where it is told to. Notes who ran together."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: Fails, error: Exception) -> None:
        self.together: list[int] = []
        self.left_over: list[weakref.ref[Any]] = []
        forward = LiveEngine._forward

        def failing(engine: LiveEngine, plan: Plan, *rest: Any) -> Any:
            assert all(ref() is None for ref in self.left_over)  # what a failed pass had is free
            self.together.append(len(plan.members))
            tally = forward(engine, plan, *rest)
            if fails(plan, len(self.together)):
                activations = torch.zeros(8)
                self.left_over.append(weakref.ref(activations))
                raise type(error)(*error.args)  # anew: one that is kept keeps what its frames held
            return tally

        monkeypatch.setattr(LiveEngine, "_forward", failing)


def check(live: Live, undisturbed: Live, dropped: set[int]) -> None:
    """Whoever was not dropped wrote what it always writes, and nothing is held any more."""
    for record in live.records:
        if record.request_id in dropped:
            assert record.status.value == "dropped"
            assert record.drop_reason == "out of memory twice in a row while it ran alone: " + CUDA.splitlines()[0]
        else:
            assert record.status.value == "completed"
            assert live.tokens(record.request_id) == undisturbed.tokens(record.request_id)
    assert live.server.used_blocks == 0
    assert live.server.requests_in_system == 0
    assert len(live.engine.work.slots) == 0


@pytest.mark.parametrize("name", ["full", "early"])
@pytest.mark.parametrize("at", [1, 7, 20])
def test_one_failed_iteration(
    tiny: dict[str, LiveModel], undisturbed: dict[str, Live], monkeypatch: pytest.MonkeyPatch, name: str, at: int
) -> None:
    fault = Fault(monkeypatch, lambda plan, number: number == at, RuntimeError(CUDA))
    live = serve_live(tiny, FULL if name == "full" else EARLY, requests(LENGTHS), N, slots=SLOTS)
    check(live, undisturbed[name], dropped=set())
    assert live.engine.shortages == 1
    assert live.run.stats.preemptions == fault.together[at - 1]
    assert fault.together[at] == fault.together[at - 1] // 2
    assert max(fault.together[at:]) > fault.together[at]  # it is tried again with more


@pytest.mark.parametrize("most", [1, 3])
def test_memory_that_suffices_for_few(
    tiny: dict[str, LiveModel], undisturbed: dict[str, Live], monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    fault = Fault(monkeypatch, lambda plan, number: len(plan.members) > most, MemoryError())
    live = serve_live(tiny, FULL, requests(LENGTHS), N, slots=SLOTS)
    check(live, undisturbed["full"], dropped=set())
    assert most in fault.together
    assert live.engine.shortages == sum(running > most for running in fault.together)


def test_a_request_that_never_fits_leaves_and_the_others_do_not_notice(
    tiny: dict[str, LiveModel], undisturbed: dict[str, Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    def large(plan: Plan, number: int) -> bool:
        return any(member.request.request_id == 5 for member in plan.members)

    Fault(monkeypatch, large, RuntimeError(CUDA))
    live = serve_live(tiny, FULL, requests(LENGTHS), N, slots=SLOTS)
    check(live, undisturbed["full"], dropped={5})


def test_where_nothing_fits_the_run_ends_with_reasons(
    tiny: dict[str, LiveModel], undisturbed: dict[str, Live], monkeypatch: pytest.MonkeyPatch
) -> None:
    fault = Fault(monkeypatch, lambda plan, number: True, RuntimeError(CUDA))
    live = serve_live(tiny, FULL, requests(LENGTHS), N, slots=SLOTS)
    check(live, undisturbed["full"], dropped=set(range(N)))
    assert fault.together == [4, 2, 1, *[1] * (2 * N - 1)]


def test_other_errors_are_not_taken_for_it(tiny: dict[str, LiveModel], monkeypatch: pytest.MonkeyPatch) -> None:
    Fault(monkeypatch, lambda plan, number: number == 3, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        serve_live(tiny, FULL, requests(LENGTHS), N, slots=SLOTS)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError(CUDA), CUDA.splitlines()[0]),
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:118] . DefaultCPUAllocator: can't allocate memory"), "[enforce"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUDA error"),
        (RuntimeError("an illegal memory access was encountered"), None),
    ],
)  # fmt: skip
def test_what_says_that_memory_ran_out(error: Exception, reason: str | None) -> None:
    found = oom_message(error)
    assert found is None if reason is None else found is not None and found.startswith(reason)
