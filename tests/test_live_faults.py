"""What goes wrong on a device: serving goes on or stops cleanly, nobody is lost without a reason, memory returns."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Sequence

import pytest

from helios_sim.errors import UserError
from helios_sim.exits.rule import FixedCap, FullDepth
from helios_sim.live.clock import between_events
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.served import LiveModel
from helios_sim.policy.deployment import Completed, Deployment, Drained, KvRule, LoadFailed, Placement
from helios_sim.serving.server import Server
from helios_sim.workload.faults import FaultKind, FaultPlan, FaultSpec, Struck
from live_rig import LAST, LAYERS, Live, live_model, requests, serve_live
from rig import Scripted
from test_live_residency import Failing
from tiny_models import write_tiny

LENGTHS = [(12, 20), (40, 9), (5, 30), (70, 12), (25, 14), (33, 24), (8, 16), (19, 27)]
N = len(LENGTHS)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, LiveModel]:
    return {
        family: live_model(write_tiny(family, tmp_path_factory.mktemp(family)), name=family)
        for family in ("llama", "qwen2")
    }


@pytest.fixture(scope="module")
def undisturbed(two: dict[str, LiveModel]) -> Live:
    return serve_live(two, whole("llama"), requests(LENGTHS), N)


def whole(model: str, layers: int = LAYERS, **more) -> Deployment:
    rule = FullDepth() if layers == LAYERS else FixedCap(0.5)
    return Deployment(Placement(model, layers), rule, kv_rule=KvRule.NONE, **more)


def one_model_bytes(models: dict[str, LiveModel], kv_tokens: int = 400) -> int:
    """Memory for one of the models beside its KV, not for both."""
    profiles = [m.profile for m in models.values()]
    return max(p.weight_bytes(LAYERS) + kv_tokens * p.kv_bytes_per_token(LAYERS) for p in profiles)


def check_empty(live: Live) -> None:
    assert live.server.used_blocks == 0
    assert live.server.requests_in_system == 0


def reasons(live: Live) -> dict[int, str | None]:
    return {r.request_id: r.drop_reason for r in live.records if r.status.value == "dropped"}


@pytest.mark.parametrize("after_tokens", [0, 1, 4])
def test_a_cancelled_request_leaves_and_the_others_do_not_notice(
    two: dict[str, LiveModel], undisturbed: Live, after_tokens: int
) -> None:
    """Cancelled while it waits, as it begins to decode, and later."""
    gone, seen = 3, []

    def act(env, engine, server: Server) -> None:
        execute = engine.execute

        def counted(plan, now_ns):
            answer = engine.answers.get(gone)
            if not seen and (after_tokens == 0 or (answer is not None and len(answer.tokens) >= after_tokens)):
                seen.append(True)
                env.call(lambda: server.cancel(gone))
            return execute(plan, now_ns)

        engine.execute = counted

    live = serve_live(two, whole("llama"), requests(LENGTHS), N, slots=3, act=act)
    assert reasons(live) == {gone: "cancelled"}
    assert after_tokens <= live.records[gone].output_tokens < LENGTHS[gone][1]
    for record in live.records:
        if record.request_id != gone:
            assert live.tokens(record.request_id) == undisturbed.tokens(record.request_id)
    check_empty(live)


def test_a_request_that_gets_no_number_leaves_alone(
    two: dict[str, LiveModel], undisturbed: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its K and V are no numbers either, and the next request gets its slot."""
    run, calls = SegmentedModel.run, []

    def once_no_number(self, hidden, start, end, attend):
        calls.append(len(hidden))
        if len(calls) == 12:
            hidden = hidden.clone()
            hidden[1] = math.nan
        return run(self, hidden, start, end, attend)

    monkeypatch.setattr(SegmentedModel, "run", once_no_number)
    live = serve_live(two, whole("llama"), requests(LENGTHS), N, slots=3)
    ((hit, reason),) = reasons(live).items()
    assert "no number (NaN or infinity)" in str(reason)
    for record in live.records:
        if record.request_id != hit:
            assert live.tokens(record.request_id) == undisturbed.tokens(record.request_id)
    check_empty(live)


@pytest.mark.parametrize("next_model", ["llama", "qwen2"])
def test_a_load_that_fails_leaves_what_is_in_force(two: dict[str, LiveModel], next_model: str) -> None:
    """A raise and a switch, each half-way through its layers; both models fit into memory."""
    device = Failing(10**6)

    def act(env, engine, server) -> None:
        device.good = 1

    policy = Scripted(whole("llama", 4, triggers=(Completed(2),)), [whole(next_model)])
    live = serve_live(two, policy, requests(LENGTHS), N, slots=3, device=device, act=act)
    assert [r.status.value for r in live.records] == ["completed"] * N
    assert {depth for r in live.records for depth in live.depths(r.request_id)} == {4}
    cause = live.server.decisions[-1].cause
    assert isinstance(cause, LoadFailed)
    assert "out of memory" in cause.reason
    assert live.engine.residents.layers == {"llama": 4}
    assert live.engine.loading == 0
    check_empty(live)


def test_a_policy_that_loads_again_and_again_lets_requests_be_served(two: dict[str, LiveModel]) -> None:
    """The rule is the simulation's: once more at once, then not within ten seconds. The log says why."""
    device = Failing(10**6)

    def act(env, engine, server) -> None:
        device.copy = fails

    def fails(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    policy = Scripted(whole("llama", triggers=(Completed(2),)), [whole("qwen2")] * 50)
    live = serve_live(two, policy, requests(LENGTHS), N, slots=2, device=device, act=act)
    assert [r.status.value for r in live.records] == ["completed"] * N
    assert live.run.stats.loads == 2
    assert any("failed 2 times in a row, not tried before" in d.deployment.reason for d in live.server.decisions)
    assert len(policy.asked) < 3 * N
    check_empty(live)


def test_a_round_that_cannot_load_its_candidate_ends(two: dict[str, LiveModel]) -> None:
    """The old model had left to make room and its admission was closed: it comes back and serves on."""
    device = Failing(10**6)

    def act(env, engine, server) -> None:
        device.good = 3

    closes = whole("llama", admit_limit=2, triggers=(Drained(),))
    policy = Scripted(closes, [whole("qwen2", admit_limit=2, triggers=(Drained(),))])
    live = serve_live(
        two, policy, requests(LENGTHS), N, slots=3, device=device, act=act, budget_bytes=one_model_bytes(two)
    )
    assert [r.status.value for r in live.records] == ["completed"] * N
    assert {r.model for r in live.records} == {"llama"}
    assert live.engine.residents.layers == {"llama": LAYERS}
    assert live.run.stats.loads == 2
    check_empty(live)


def test_it_stops_cleanly_where_nothing_can_be_loaded(two: dict[str, LiveModel]) -> None:
    class Broken(Failing):
        def copy(self, pairs, after=None):
            self.good = min(self.good, 10**5) - 1 if self.good < 10**6 else self.good
            if self.good < 0:
                raise RuntimeError("CUDA error: out of memory")
            return super(Failing, self).copy(pairs, after)

    device = Broken(10**6)

    def act(env, engine, server) -> None:
        device.good = 3

    policy = Scripted(whole("llama", admit_limit=2, triggers=(Drained(),)), [whole("qwen2")])
    with pytest.raises(UserError, match="weights that can be loaded"):
        serve_live(two, policy, requests(LENGTHS), N, device=device, act=act, budget_bytes=one_model_bytes(two))
    check_all_have_records()


# --- the injector of simulations, around the live engine

S = 1_000_000_000


def plan(*specs: FaultSpec, retries: int = 100) -> FaultPlan:
    return FaultPlan(specs, retries, seed=3)


def hits(live: Live, kind: FaultKind) -> list[Struck]:
    return [fault for fault in live.run.faults or () if fault.hit and fault.kind is kind]


@pytest.mark.parametrize("kept_answers", [None, 4])
@pytest.mark.parametrize("kind", [FaultKind.ITERATION_FAILS, FaultKind.OUT_OF_MEMORY, FaultKind.REPLICA_DIES])
def test_injected_faults_change_no_answer(
    two: dict[str, LiveModel], undisturbed: Live, kind: FaultKind, kept_answers: int | None
) -> None:
    """Requests start anew, or go on from their text, and come to the same tokens."""
    apart_ns = S // 1000  # closer than any device answers, so that there is always something to strike
    spec = FaultSpec(kind, tuple(S // 200 * i for i in range(1, 9)), rate_per_hour=3600 * 4.0, lasts_ns=S // 100)
    live = serve_live(
        two, whole("llama"), requests(LENGTHS, apart_ns), N, slots=3, faults=plan(spec), kept_answers=kept_answers
    )
    assert hits(live, kind)
    assert [r.status.value for r in live.records] == ["completed"] * N
    assert [r.arrival_ns for r in live.records] == [i * apart_ns for i in range(N)]
    for record in live.records[-2:] if kept_answers else live.records:
        if record.request_id in live.engine.answers:
            assert live.tokens(record.request_id) == undisturbed.tokens(record.request_id)
    assert sum(fault.retried for fault in live.run.faults) == (
        sum(fault.retried for fault in hits(live, kind)) if kind is not FaultKind.OUT_OF_MEMORY else 0
    )
    check_empty(live)


def test_without_retries_those_who_ran_are_dropped_with_a_reason(two: dict[str, LiveModel]) -> None:
    spec = FaultSpec(FaultKind.ITERATION_FAILS, tuple(S // 200 * i for i in range(1, 12)))
    live = serve_live(two, whole("llama"), requests(LENGTHS), N, slots=2, faults=plan(spec, retries=0))
    assert set(reasons(live).values()) == {"its iteration failed, not sent again"}
    assert len(reasons(live)) == sum(fault.lost for fault in live.run.faults)
    check_empty(live)


def test_nothing_runs_while_the_replica_is_down(two: dict[str, LiveModel]) -> None:
    spec = FaultSpec(FaultKind.REPLICA_DIES, (S // 100,), lasts_ns=S // 3)
    live = serve_live(two, whole("llama"), requests(LENGTHS), N, slots=3, faults=plan(spec))
    (died,) = hits(live, FaultKind.REPLICA_DIES)
    tokens_ns = [t for r in live.records for t in (r.scheduled_ns, r.first_token_ns, r.last_token_ns)]
    assert all(t <= died.time_ns or t >= died.until_ns for t in tokens_ns)
    assert [r.status.value for r in live.records] == ["completed"] * N
    check_empty(live)


def test_an_injected_load_fault_leaves_what_is_in_force(two: dict[str, LiveModel]) -> None:
    """The policy is asked, and loads again what then comes late."""
    policy = Scripted(whole("llama", 4, triggers=(Completed(2),)), [whole("llama"), whole("llama")])
    specs = (FaultSpec(FaultKind.LOAD_FAILS, (1000,)), FaultSpec(FaultKind.TRANSFER_STALLS, (1000,), lasts_ns=S // 500))
    live = serve_live(two, policy, requests(LENGTHS), N, slots=2, faults=plan(*specs))
    assert [r.status.value for r in live.records] == ["completed"] * N
    assert [type(cause) for cause, _ in policy.asked][:2] == [Completed, LoadFailed]
    assert hits(live, FaultKind.LOAD_FAILS)
    assert hits(live, FaultKind.TRANSFER_STALLS)
    assert {depth for r in live.records for depth in live.depths(r.request_id)} == {4, LAYERS}
    check_empty(live)


def test_a_slow_card_takes_so_much_longer_live(two: dict[str, LiveModel]) -> None:
    busy_ns = []
    for faults in (None, plan(FaultSpec(FaultKind.SLOW_CARD, (1,), lasts_ns=100 * S, factor=4.0))):
        live = serve_live(two, whole("llama"), requests(LENGTHS[:3]), 3, slots=3, faults=faults)
        busy_ns.append(live.run.stats.busy_ns / live.run.stats.iterations)
    assert busy_ns[1] > 2 * busy_ns[0]


@pytest.mark.skipif(threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread")
def test_ctrl_c_stops_between_two_iterations(two: dict[str, LiveModel], undisturbed: Live) -> None:
    iterations: list[int] = []

    def act(env, engine, server) -> None:
        execute = engine.execute

        def interrupted(plan, now_ns):
            iterations.append(plan.decoding)
            outcome = execute(plan, now_ns)
            if len(iterations) == 9:
                os.kill(os.getpid(), signal.SIGINT)
            return outcome

        engine.execute = interrupted
        guard = between_events(env)
        guard.__enter__()
        guards.append(guard)

    guards: list = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        serve_live(two, whole("llama"), requests(LENGTHS), N, slots=3, act=act)
    guards[0].__exit__(None, None, None)
    assert signal.getsignal(signal.SIGINT) is before
    assert len(iterations) <= 10
    records = check_all_have_records()
    engine = LAST[2]
    for record in records:  # at most the iteration that ran when the signal came is not in the books
        if record.output_tokens:
            written = engine.answers[record.request_id].tokens
            assert len(written) - record.output_tokens in (0, 1)
            assert written == undisturbed.tokens(record.request_id)[: len(written)]


def check_all_have_records() -> Sequence:
    records, server, engine = LAST
    server.finish()
    engine.close()
    assert sorted(r.request_id for r in records) == list(range(N))
    assert {r.status.value for r in records} <= {"completed", "unfinished"}
    assert server.used_blocks == 0
    return records
