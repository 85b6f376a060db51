"""Self-speculation: what it yields and costs, against closed forms and a reference that goes token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import FullDepth, SelfSpeculation
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.deployment import Completed, Deployment, KvRule, LoadFailed, Placement, Started
from helios_sim.policy.drafts import best_drafting, pass_time, tokens_per_pass
from helios_sim.policy.registry import make_policy
from helios_sim.report.metrics import OF_DRAFTS, compute_metrics
from helios_sim.report.records import Records
from helios_sim.serving.iteration import Plan
from helios_sim.serving.server import Produced, Server
from helios_sim.workload import AllAtOnce, Exponential
from policy_example import layered_profile, offline, seen, situation
from priced import priced_profile
from rig import EXITS, Scripted, Served, full_depth, rows_of, serve, workload

EXIT, N_LAYERS = EXITS
COSTS = {
    "layer_s": 1.1e-3, "row_s": 7e-5, "kv_token_s": 3e-6, "prefill_token_s": 4e-6, "head_s": 9e-4,
    "launch_s_per_layer": 1e-5, "launch_s_per_graph": 2e-5, "host_s": 2.5e-4,
}  # fmt: skip
PRICED = priced_profile("flat", **COSTS)


def speculating(drafts: int, largest_batch: int | None = None, **others: object) -> Deployment:
    rule = SelfSpeculation(EXIT, drafts, largest_batch)
    return Deployment(Placement("flat", N_LAYERS), rule, kv_rule=KvRule.NONE, **others)


def agreeing(share: float, tokens: int = 20_000, seed: int = 0) -> ExitTrace:
    """Each token of the exit agrees with full depth with this probability, whatever came before."""
    trace = synthetic_trace("flat", EXITS, tokens=tokens, chars_per_token=1)
    agree = np.ones((tokens, 2), np.bool_)
    agree[:, 0] = np.random.default_rng(seed).uniform(size=tokens) < share
    return replace(trace, agree=agree)


def metrics_of(served: Served) -> dict[str, object]:
    return compute_metrics(Records.of(served.records), served.run.stats)


# --- closed forms


@pytest.mark.slow
@pytest.mark.parametrize(("share", "drafts"), [(0.0, 3), (0.3, 1), (0.8, 3), (0.8, 7), (1.0, 3)])
def test_a_pass_yields_so_many_tokens(share: float, drafts: int) -> None:
    """(1 - a^(K+1)) / (1 - a) of drafts that agree independently of each other."""
    served = serve(workload(1, 5, 8000), speculating(drafts), {"flat": PRICED}, {"flat": agreeing(share)})
    stats = served.run.stats
    found = 1 + stats.accepted_drafts / stats.verifications
    assert found == pytest.approx(sum(share**k for k in range(drafts + 1)), rel=0.04)
    assert tokens_per_pass(share, drafts) == pytest.approx(sum(share**k for k in range(drafts + 1)))
    assert stats.accepted_drafts / stats.tested_drafts == pytest.approx(share, abs=0.02)


def test_an_iteration_takes_its_drafts_and_one_verification() -> None:
    """Of one request, in whole nanoseconds, by the costs of a layer, a row, a token of context and the head."""
    served = serve(workload(1, 5, 5), speculating(3), {"flat": PRICED}, {"flat": agreeing(0.0)})
    c, k = COSTS, 3
    drafts = [EXIT * (c["layer_s"] + c["kv_token_s"] * (5 + j)) + c["head_s"] for j in range(1, k + 1)]
    of_one_row = EXIT * (c["layer_s"] + c["kv_token_s"] * (5 + k + 1))
    of_all = (N_LAYERS - EXIT) * (c["layer_s"] + k * c["row_s"] + c["kv_token_s"] * (5 + k + 1))
    expected_s = sum(drafts) + of_one_row + of_all + c["head_s"] + c["host_s"]
    first = served.records[0].first_token_ns
    one = serve(workload(1, 5, 2), full_depth(), {"flat": PRICED}, {"flat": agreeing(0.0)})
    assert first == one.records[0].first_token_ns  # the prompt runs as ever
    times = pass_time(PRICED, EXIT, k, 1, 5)
    assert times.total_s == pytest.approx(expected_s, rel=1e-12)
    assert times.draft_s == pytest.approx(sum(drafts), rel=1e-12)
    served = serve(workload(1, 5, 5), speculating(3), {"flat": PRICED}, {"flat": agreeing(1.0)})
    assert served.records[0].last_token_ns - first == round(expected_s * 1e9)
    assert served.run.stats.draft_ns == sum(round(s * 1e9) for s in drafts)


def test_launches_bound_drafts_as_they_bound_decoding() -> None:
    """With nothing but launches, a draft takes its share of the layers, and K + 1 tokens the time of 1 + K e / L."""
    layered = layered_profile("flat", 0.002, N_LAYERS)
    for drafts in (1, 2, 5):
        times = pass_time(layered, EXIT, drafts, 1, 10)
        assert times.draft_s == pytest.approx(drafts * EXIT * 0.002)
        assert times.verify_s == pytest.approx(N_LAYERS * 0.002)


# --- a reference that goes token by token


@dataclass
class Answer:
    rows: list[int]  # of the trace, of the tokens that are left
    context: int
    tokens: list[tuple[int, int]] = field(default_factory=list)  # rows, and when in ns


class Reference:
    """Requests that are all there at once and all fit. It knows the rules, a trace and four costs; no arrays."""

    def __init__(self, trace: ExitTrace, drafts: int, largest_batch: int | None, answers: list[Answer]) -> None:
        self.agrees = trace.agree[:, 0].tolist()
        self.drafts, self.largest, self.answers, self.now_ns = drafts, largest_batch, answers, 0
        self.accepted = self.drafted = 0

    def step_s(self, layers: int, rows: int, batch_kv: int) -> float:
        """So many layers, each with so many rows that read so many KV tokens."""
        return layers * (COSTS["layer_s"] + (rows - 1) * COSTS["row_s"] + batch_kv * COSTS["kv_token_s"])

    def iterate(self) -> None:
        running = [a for a in self.answers if a.rows]
        most = self.drafts if self.largest is None or len(running) <= self.largest else 0
        drafts = [min(most, len(a.rows) - 1) for a in running]
        spent_ns, c = 0, COSTS
        for j in range(1, max(drafts) + 1):
            taking = [a for a, k in zip(running, drafts, strict=True) if k >= j]
            seconds = self.step_s(EXIT, len(taking), sum(a.context + j for a in taking)) + c["head_s"]
            spent_ns += round(seconds * 1e9)
        kv = sum(a.context + k + 1 for a, k in zip(running, drafts, strict=True))
        seconds = self.step_s(EXIT, len(running), kv)
        seconds += self.step_s(N_LAYERS - EXIT, len(running) + sum(drafts), kv) + c["head_s"] + c["host_s"]
        self.now_ns += spent_ns + round(seconds * 1e9)
        for a, k in zip(running, drafts, strict=True):
            self.drafted += k
            taken = 0
            while taken < k and self.agrees[a.rows[taken]]:
                taken += 1
            self.accepted += taken
            a.tokens += [(row, self.now_ns) for row in a.rows[: taken + 1]]
            a.rows, a.context = a.rows[taken + 1 :], a.context + taken + 1


@pytest.mark.slow
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    drafts=st.integers(1, 6),
    largest=st.sampled_from([None, 1, 2, 3]),
    requests=st.integers(1, 5),
    outputs=st.integers(2, 40),
    share=st.sampled_from([0.0, 0.5, 0.9, 1.0]),
)
def test_every_token_comes_when_the_reference_says(
    drafts: int, largest: int | None, requests: int, outputs: int, share: float
) -> None:
    trace = agreeing(share, 3000, seed=drafts)
    unequal = workload(requests, 7, Exponential(outputs), AllAtOnce())
    served = serve(unequal, speculating(drafts, largest), {"flat": PRICED}, {"flat": trace})
    before = serve(unequal, Deployment(Placement("flat", N_LAYERS), FullDepth()), {"flat": PRICED}, {"flat": trace})
    rows = rows_of(unequal, trace)
    records = served.by_request()
    answers = [Answer(rows[r.request_id][1:], r.prompt_tokens) for r in records]
    reference = Reference(trace, drafts, largest, answers)
    reference.now_ns = records[0].first_token_ns  # one iteration has computed all prompts
    assert {r.first_token_ns for r in records} == {r.first_token_ns for r in before.records} == {reference.now_ns}
    while any(a.rows for a in answers):
        reference.iterate()
    stats = served.run.stats
    assert (stats.accepted_drafts, stats.drafted_tokens) == (reference.accepted, reference.drafted)
    assert (stats.itl.shortest_ns == 0) == (reference.accepted > 0)  # an accepted draft comes with the token before it
    for record, answer in zip(records, answers, strict=True):
        last_ns = answer.tokens[-1][1] if answer.tokens else record.first_token_ns
        assert record.last_token_ns == pytest.approx(last_ns, abs=1)  # of sums in another order
        # The text of full depth: every row of the trace once, in order, each as the whole model has it.
        assert [row for row, _ in answer.tokens] == rows[record.request_id][1:]
        assert record.agreed_tokens == record.output_tokens
        assert record.layers_run == N_LAYERS * record.output_tokens
    assert [r.microbits for r in records] == [r.microbits for r in before.by_request()]


# --- what always holds


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    drafts=st.integers(0, 9),
    largest=st.sampled_from([None, 1, 3, 8]),
    room=st.sampled_from([90, 200, 5000]),
    block=st.sampled_from([1, 3, 16]),
    budget=st.sampled_from([8, 64, 2048]),
    other=st.sampled_from([{}, {"prefill_first": True}, {"keeps_answers": True}, {"whole_prompts": True}]),
    vllm_v1=st.booleans(),
    share=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_tokens_and_memory_are_those_of_full_depth(
    drafts: int, largest: int | None, room: int, block: int, budget: int, other: dict, vllm_v1: bool, share: float
) -> None:
    """Whatever is scheduled how: as many tokens, all of full depth, within the memory there is, all of it returned."""
    profile = priced_profile("flat", **COSTS)
    trace = agreeing(share, 500)
    memory = {"hbm_bytes": profile.weight_bytes(N_LAYERS) + room * profile.kv_bytes_per_token(N_LAYERS)}
    unequal = workload(14, Exponential(12), Exponential(25), AllAtOnce())
    how = {
        **memory, "utilisation": 1.0, "block_tokens": block, "max_running_requests": 6, "max_batch_tokens": budget,
        "others": other, "vllm_v1": vllm_v1, "schedule_ahead": int(vllm_v1),
    }  # fmt: skip
    most = []

    def watch(server) -> None:
        if hasattr(server, "_replica"):
            s = server._replica.state
            assert 0 <= s.used_blocks <= s.total_blocks
            most.append(int(s.used_blocks))

    runs = [
        serve(unequal, speculating(drafts, largest), {"flat": profile}, {"flat": trace}, **how, **way)
        for way in ({"stepwise": True, "watch": watch}, {"stepwise": False})
    ]
    full = serve(unequal, full_depth(), {"flat": profile}, {"flat": trace}, **how)
    for served in runs:
        server = served.run.servers[0]
        assert server._replica.used_blocks == 0
        assert [r.output_tokens for r in served.by_request()] == [r.output_tokens for r in full.by_request()]
        assert [r.drop_reason for r in served.by_request()] == [r.drop_reason for r in full.by_request()]
        done = [r for r in served.records if r.drop_reason is None]
        assert all(r.agreed_tokens == r.output_tokens for r in done)
        assert sum(r.layers_run for r in done) == N_LAYERS * sum(r.output_tokens for r in done)
        stats = served.run.stats
        assert stats.accepted_drafts <= stats.tested_drafts <= stats.drafted_tokens
        assert stats.draft_ns <= stats.busy_ns
        gaps = sum(r.output_tokens - 1 for r in done)
        assert stats.itl.total_count == gaps == stats.itl.counts.sum()
    assert asdict(runs[0].run.stats) == asdict(runs[1].run.stats)
    assert runs[0].by_request() == runs[1].by_request()


@pytest.mark.parametrize("rule", [SelfSpeculation(EXIT, 0), SelfSpeculation(EXIT, 4, 0)])
def test_without_drafts_it_is_full_depth(rule: SelfSpeculation) -> None:
    work = workload(20, Exponential(12), Exponential(25), AllAtOnce())
    drafts = Deployment(Placement("flat", N_LAYERS), rule, kv_rule=KvRule.NONE)
    runs = [serve(work, each, {"flat": PRICED}, max_running_requests=6) for each in (drafts, full_depth())]
    assert runs[0].records == runs[1].records
    assert asdict(runs[0].run.stats) == asdict(runs[1].run.stats)
    found = metrics_of(runs[0])
    assert [found[name] for name in OF_DRAFTS] == [None] * len(OF_DRAFTS)


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    work = workload(30, Exponential(12), Exponential(25), AllAtOnce())
    how = {"max_running_requests": 6, "hbm_bytes": 3000, "utilisation": 1.0, "vllm_v1": True}
    runs = [
        serve(work, speculating(4, 5), {"flat": PRICED}, {"flat": agreeing(0.7, 500)}, compiled=compiled, **how)
        for compiled in (False, True)
    ]
    assert runs[0].by_request() == runs[1].by_request()
    assert asdict(runs[0].run.stats) == asdict(runs[1].run.stats)


def test_a_change_of_the_drafts_takes_nothing_away() -> None:
    """A policy may change them, and the rule, while requests run."""
    script = Scripted(
        speculating(4, triggers=(Completed(3),)),
        [speculating(1, triggers=(Completed(3),)), full_depth(), speculating(2)],
    )
    served = serve(workload(30, 8, Exponential(20), AllAtOnce()), script, {"flat": PRICED}, max_running_requests=5)
    assert all(r.agreed_tokens == r.output_tokens for r in served.records)
    assert len(served.run.servers[0].decisions) == 3
    assert script.asked[0][1].tested_drafts >= script.asked[0][1].accepted_drafts > 0


def test_prompts_are_computed_beside_the_verification() -> None:
    """The budget leaves 3 tokens of the second prompt for the iteration in which the first request drafts."""
    chunks = []

    def watch(server: Server, plan: Plan, start_ns: int, end_ns: int) -> None:
        if plan.prefill and plan.decoding:
            it = server._replica.iteration
            chunks.append((int(it.chunks), int(it.draft_ns), end_ns - start_ns))

    two, costs = workload(2, 5, 9), COSTS
    serve(two, speculating(1), {"flat": PRICED}, {"flat": agreeing(0.0)}, max_batch_tokens=7, on_plan=watch)
    draft_s = EXIT * (costs["layer_s"] + costs["kv_token_s"] * 6) + costs["head_s"]
    of_prompt_s = N_LAYERS * (3 * (costs["row_s"] + costs["prefill_token_s"]) + 2 * costs["kv_token_s"])
    times = pass_time(PRICED, EXIT, 1, 1, 5)
    (found,) = chunks
    assert found[:2] == (1, round(draft_s * 1e9))
    assert found[2] == pytest.approx(1e9 * (times.total_s + of_prompt_s), rel=1e-6)


def test_every_token_of_a_pass_is_told_as_it_ends() -> None:
    """To whoever streams answers: each once, in order, with how many of the same pass follow it."""
    told: dict[int, list[int]] = {}
    follow = []

    def note(server: Server, produced: Sequence[Produced]) -> None:
        for one in produced:
            told.setdefault(one.request_id, []).append(one.number)
            follow.append(one.after)

    def watch(server: Server) -> None:
        server.on_tokens = note

    work = workload(6, 5, Exponential(20), AllAtOnce())
    traces = {"flat": agreeing(0.8)}
    served = serve(work, speculating(4), {"flat": PRICED}, traces, max_running_requests=3, stepwise=True, watch=watch)
    assert told == {r.request_id: list(range(r.output_tokens)) for r in served.records}
    assert set(follow) == {0, 1, 2, 3, 4}
    assert sum(n > 0 for n in follow) == served.run.stats.accepted_drafts


# --- the policy


def test_the_policy_drafts_at_the_exit_that_pays_most() -> None:
    policy = make_policy("self_speculation", {"model": "large", "draft_tokens": 3})
    deployment = policy.start(situation())
    assert deployment.exit_rule == SelfSpeculation(2, 3)
    assert deployment.active == Placement("large", 8)
    assert policy.decide(Started(), seen(5)) is None
    given_exit = make_policy("self_speculation", {"model": "small", "exit_layer": 2, "largest_batch": 4})
    assert given_exit.start(situation()).exit_rule == SelfSpeculation(2, 4, 4)


def test_drafts_follow_what_was_accepted() -> None:
    """A pass of 8 layers at 2 ms takes 16 ms, a draft at layer 2 takes 4 ms, whatever the batch."""
    settings_ = {"model": "large", "draft_tokens": 6, "review_requests": 10}
    policy = make_policy("self_speculation", settings_)
    first = policy.start(situation())
    assert first.triggers == (Completed(10),)
    assert first.exit_rule.draft_tokens == 6
    cause = Completed(10)
    assert policy.decide(LoadFailed("large", "no"), seen(10)) is None
    poor = policy.decide(cause, replace(seen(10, running=2), tested_drafts=1000, accepted_drafts=450))
    assert poor is not None
    found = best_drafting(layered_profile("large", 0.002, 8), [(2, 0.45)], 6, 2, 20).drafts
    assert poor.exit_rule.draft_tokens == found == 1
    none = policy.decide(cause, replace(seen(20, running=2), tested_drafts=2000, accepted_drafts=500))
    assert none is not None
    assert none.exit_rule.draft_tokens == 0


def test_after_a_rest_it_listens_again() -> None:
    """Rests without drafts double, up to 16 reviews."""
    policy = make_policy("self_speculation", {"model": "large", "draft_tokens": 4, "review_requests": 1})
    deployment = policy.start(situation())
    drafts, tested = [], 0
    for review in range(60):
        tested += 100 if deployment.exit_rule.draft_tokens else 0
        deployment = policy.decide(Completed(1), replace(seen(review, running=1), tested_drafts=tested)) or deployment
        drafts.append(deployment.exit_rule.draft_tokens)
    listens = [i for i, n in enumerate(drafts) if n]
    assert set(drafts) == {0, 1}
    assert np.diff([-1, *listens]).tolist() == [2, 3, 5, 9, 17, 17]


@pytest.mark.parametrize(
    ("settings_", "key"),
    [
        ({"draft_tokens": 0}, "policy.draft_tokens"),
        ({"draft_tokens": 65}, "policy.draft_tokens"),
        ({"exit_layer": 3, "model": "small"}, "policy.exit_layer"),
        ({"exit_layer": 4, "model": "small"}, "policy.exit_layer"),
        ({"review_requests": 0}, "policy.review_requests"),
        ({}, "policy.model"),
    ],
)
def test_wrong_settings_are_told(settings_: dict[str, object], key: str) -> None:
    with pytest.raises(UserError) as caught:
        make_policy("self_speculation", settings_).start(situation())
    assert caught.value.key == key


def test_what_cannot_draft_is_refused() -> None:
    trace = agreeing(0.5, 100)
    with pytest.raises(UserError, match="verifies with all 4 layers"):
        replay(trace, SelfSpeculation(2, 3), 2)
    with pytest.raises(UserError, match="exits before its last layer at 2"):
        replay(trace, SelfSpeculation(4, 3), 4)
    with pytest.raises(UserError, match="no tokens are observed"):
        speculating(2, observe_tokens=4)
    with pytest.raises(UserError, match="enable_prefix_caching"):
        serve(workload(1), speculating(2), {"flat": PRICED}, shares=True)
    one = replace(situation().candidates["small"], offline=offline("small", (4,), (0.0,), (1.0,)))
    with pytest.raises(UserError, match="a model with exits"):
        make_policy("self_speculation", {"model": "small"}).start(situation(one))


# --- the report


def test_the_report_says_what_became_of_drafts() -> None:
    served = serve(workload(4, 5, 100), speculating(3), {"flat": PRICED}, {"flat": agreeing(1.0)})
    found = metrics_of(served)
    stats = served.run.stats
    assert found["draft_acceptance"] == 1.0
    assert found["accepted_per_pass"] == stats.accepted_drafts / stats.verifications == pytest.approx(3, rel=0.02)
    assert found["drafting_fraction"] == stats.draft_ns / stats.busy_ns
    assert 0 < found["drafting_fraction"] < 1
