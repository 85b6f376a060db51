"""Batches that are split at exits: when, what it takes, and a reference that goes token by token."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import Confidence, FullDepth, PerToken
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import (
    BatchingRule,
    Completed,
    Deployment,
    KvRule,
    Placement,
    Regrouping,
)
from helios_sim.policy.registry import make_policy, policy_config
from helios_sim.policy.regroup import split_shares
from helios_sim.report.metrics import OF_SPLITS, compute_metrics
from helios_sim.report.records import Records
from helios_sim.request import Slo
from helios_sim.serving.server import Produced, Server
from helios_sim.workload import AllAtOnce, Exponential, Workload
from policy_example import layered_profile, seen, situation
from priced import priced_profile
from rig import Scripted, Served, full_depth, rows_of, serve, workload

EXITS, N_LAYERS = (1, 3, 8), 8
COSTS = {
    "layer_s": 1.1e-3, "row_s": 7e-5, "kv_projection_s": 3e-5, "kv_token_s": 3e-6, "prefill_token_s": 4e-6,
    "head_s": 9e-4, "sync_s": 2e-5, "host_s": 2.5e-4,
}  # fmt: skip
REGROUP_S = 3e-4
BOTH = [KvRule.PROPAGATE, KvRule.COPY]


def profile_of(regroup_s: float = REGROUP_S, **costs: float):
    profile = priced_profile("flat", n_layers=N_LAYERS, **{**COSTS, **costs})
    return profile.with_runtime(replace(profile.runtime, regroup_s=regroup_s))


PRICED = profile_of()


def leaving(shares: tuple[float, float], tokens: int = 3000, seed: int = 0) -> ExitTrace:
    """Of all tokens these shares are confident at the first and at the second exit, each whatever the others are."""
    rng, trace = np.random.default_rng(seed), synthetic_trace("flat", EXITS, tokens=tokens, chars_per_token=1)
    sure = np.ones((tokens, len(EXITS)), np.float32)
    for place, share in enumerate(shares):
        sure[:, place] = np.where(rng.uniform(size=tokens) < share, 0.9, 0.1)
    return replace(trace, confidences={Confidence.MAX_PROBABILITY: sure})


def exiting(
    batching: BatchingRule = BatchingRule.REBATCH, how: Regrouping | None = None, **others: object
) -> Deployment:  # fmt: skip
    others = {"kv_rule": KvRule.PROPAGATE, **others}
    return Deployment(
        Placement("flat", N_LAYERS), PerToken(0.7), batching=batching, regrouping=how or Regrouping(), **others
    )


def run(work: Workload, deployment: Deployment | Scripted, trace: ExitTrace, **how: object) -> Served:
    return serve(work, deployment, {"flat": how.pop("profile", PRICED)}, {"flat": trace}, **how)


def alike(a: Served, b: Served) -> bool:
    return a.by_request() == b.by_request() and asdict(a.run.stats) == asdict(b.run.stats)


# --- closed forms and limits


def test_where_too_few_can_leave_it_is_lazy() -> None:
    """With a share of 1 a batch leaves all together or not at all, prompts beside it or not."""
    work = workload(40, Exponential(12), Exponential(30))
    for kv_rule in BOTH[:1]:
        for trace in (leaving((0.2, 0.5)), leaving((0.9, 0.95)), leaving((1.0, 0.0))):
            how = {"max_running_requests": 5, "max_batch_tokens": 16}
            lazy = run(work, exiting(BatchingRule.LAZY, kv_rule=kv_rule), trace, **how)
            never = run(work, exiting(how=Regrouping(1.0), kv_rule=kv_rule), trace, **how)
            assert alike(never, lazy)
            assert never.run.stats.splits == 0


def test_one_request_leaves_as_it_would_alone() -> None:
    """A batch of one is never split, so it is as if each token left alone."""
    work = workload(3, 9, Exponential(40))
    for kv_rule in (*BOTH, KvRule.RECOMPUTE):
        trace = leaving((0.4, 0.6))
        alone = run(work, exiting(BatchingRule.EACH_TOKEN, kv_rule=kv_rule), trace, max_running_requests=1)
        split = run(work, exiting(kv_rule=kv_rule), trace, max_running_requests=1)
        assert alike(split, alone)


def test_without_a_cost_every_token_leaves_where_it_wants_to() -> None:
    """A free split of every batch, and the rest runs on at once: the work of exits that each token takes alone.

    With two exits, no host and no regrouping the time is the same, since rows leave a batch at no cost there.
    """
    free = profile_of(0.0, host_s=0.0, sync_s=0.0, kv_projection_s=0.0)
    trace = leaving((0.5, 0.0))
    work = workload(6, 5, 60)
    alone = run(work, exiting(BatchingRule.EACH_TOKEN, kv_rule=KvRule.COPY), trace, profile=free)
    split = run(work, exiting(how=Regrouping(0.0, 1), kv_rule=KvRule.COPY), trace, profile=free)
    assert split.run.stats.tokens_by_depth == alone.run.stats.tokens_by_depth
    assert [r.layers_run for r in split.by_request()] == [r.layers_run for r in alone.by_request()]
    assert split.run.stats.busy_ns == pytest.approx(alone.run.stats.busy_ns, rel=0.02)  # contexts differ by a token
    assert split.run.stats.splits > 40


def test_the_share_is_that_of_the_break_even() -> None:
    """c / t_deep by hand: regrouping and the host's part of one more iteration, over the layers after the exit."""
    batch, context, c = 6, 50, COSTS
    cost_s = REGROUP_S + c["host_s"]
    for place, share in enumerate(split_shares(PRICED, EXITS, batch, context)):
        layers = N_LAYERS - EXITS[place]
        deep_s = layers * (c["layer_s"] + (batch - 1) * c["row_s"] + batch * context * c["kv_token_s"])
        assert share == pytest.approx(cost_s / deep_s, rel=1e-9)
    assert split_shares(profile_of(1.0), EXITS, batch, context) == (1.0, 1.0)
    assert split_shares(profile_of(0.0, host_s=0.0), EXITS, batch, context) == (0.0, 0.0)


@pytest.mark.parametrize(("leavers", "of"), [(1, 4), (2, 4), (3, 4), (2, 5), (4, 8)])
def test_a_batch_is_split_only_above_the_break_even(leavers: int, of: int) -> None:
    """b' > share x b: at equality nothing is split. In a repeating batch the split then pays or costs as it says."""
    trace = leaving((0.0, 0.0), tokens=of)
    sure = trace.confidences[Confidence.MAX_PROBABILITY].copy()
    sure[:leavers, 0] = 0.9
    trace = replace(trace, confidences={Confidence.MAX_PROBABILITY: sure})
    rows = workload(of, 1, 2)  # every request has one token to decode; which row it reads is drawn
    wants = [int(replay(trace, PerToken(0.7), N_LAYERS).exit_index[r[1]]) == 0 for r in rows_of(rows, trace)]
    share = sum(wants) / of
    below = run(rows, exiting(how=Regrouping(share)), trace)
    assert below.run.stats.splits == 0
    above = run(rows, exiting(how=Regrouping(max(0.0, share - 1e-6))), trace)
    assert above.run.stats.splits == (0 < sum(wants) < of)


def test_splits_pay_where_they_are_cheap() -> None:
    """Half of the tokens leave after one layer of 8, whatever the rows. By the rule a split pays up to half of t_deep.

    It does while it is free, and costs time where it takes as long as the layers that it saves. Between the two the
    rule errs on the side of splits: it takes the rest to fill a batch, which it does not where no others come.
    """
    trace, work, deep_s = leaving((0.5, 0.0)), workload(8, 5, 200), 7 * COSTS["layer_s"]
    only = {"host_s": 0.0, "kv_projection_s": 0.0, "row_s": 0.0, "kv_token_s": 0.0, "sync_s": 0.0, "head_s": 0.0}

    def gain(regroup_s: float) -> float:
        profile = profile_of(regroup_s, **only)
        assert split_shares(profile, EXITS, 8, 50)[0] == pytest.approx(min(1.0, regroup_s / deep_s))
        runs = [
            run(work, exiting(how=Regrouping(share), kv_rule=KvRule.COPY), trace, profile=profile)
            for share in (1.0, 0.0)
        ]
        return runs[0].run.stats.busy_ns / runs[1].run.stats.busy_ns

    assert gain(0.0) > 1.1
    assert gain(deep_s) < 0.7


# --- a reference that goes token by token


@dataclass
class Answer:
    rows: list[int]  # of the trace, of the tokens that are left
    context: int
    held: int = 0  # the band before which its next token waits
    since_ns: int = 0
    first_ns: int = 0
    exits: list[int] = field(default_factory=list)
    ended_ns: int = 0


class Reference:
    """Requests that are all there at once and all fit. It knows the rules, the exits and the costs; no arrays."""

    def __init__(
        self, exit_of: list[int], how: Regrouping, kv_rule: KvRule, tpot_ns: int | None, answers: list[Answer]
    ) -> None:
        self.exit_of, self.how, self.answers, self.tpot_ns = exit_of, how, answers, tpot_ns
        self.projects = kv_rule is KvRule.PROPAGATE
        self.now_ns = self.latest_ns = self.splits = 0

    def band_to_run(self, running: list[Answer]) -> int:
        fresh, chosen = sum(a.held == 0 for a in running), 0
        for band in range(1, len(EXITS)):
            waiting = [a for a in running if a.held == band]
            if not waiting:
                continue
            limit = fresh if self.how.flush_requests is None or not fresh else self.how.flush_requests
            due = len(waiting) >= limit
            if self.how.flush_s is not None:
                due |= any(self.now_ns - a.since_ns >= round(self.how.flush_s * 1e9) for a in waiting)
            for a in waiting:
                if self.tpot_ns is not None:
                    late = a.first_ns + (1 + len(a.exits)) * self.tpot_ns
                    due |= self.now_ns <= late < self.now_ns + 2 * self.latest_ns
            chosen = band if due else chosen
        return chosen

    def iterate(self) -> None:
        running = [a for a in self.answers if a.rows]
        band = self.band_to_run(running)
        group = [a for a in running if a.held == band]
        wants, c, seconds = [self.exit_of[a.rows[0]] for a in group], COSTS, 0.0
        if band == 0:
            for a in group:
                a.context += 1
        rows, kv = len(group), sum(a.context for a in group)
        for leaf in range(band, len(EXITS)):
            layers = EXITS[leaf] - (EXITS[leaf - 1] if leaf else 0)
            seconds += layers * (c["layer_s"] + (rows - 1) * c["row_s"] + kv * c["kv_token_s"]) + c["head_s"]
            if leaf == len(EXITS) - 1:
                break
            seconds += c["sync_s"]
            out = sum(want <= leaf for want in wants)
            if out == rows or out > self.how.split_above[leaf] * rows:
                break
        last = leaf == len(EXITS) - 1
        leavers = [a for a, want in zip(group, wants, strict=True) if last or want <= leaf]
        if self.projects and leavers:
            seconds += (N_LAYERS - EXITS[leaf]) * c["kv_projection_s"]
        if len(leavers) < rows:
            seconds += REGROUP_S
            self.splits += 1
        self.latest_ns = round((seconds + c["host_s"]) * 1e9)
        self.now_ns += self.latest_ns
        for a in group:
            if a in leavers:
                a.held, a.ended_ns, a.rows = 0, self.now_ns, a.rows[1:]
                a.exits.append(leaf)
            else:
                a.held, a.since_ns = leaf + 1, self.now_ns


@pytest.mark.slow
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.integers(1, 7),
    outputs=st.integers(2, 30),
    shares=st.sampled_from([(0.0, 0.0), (0.3, 0.3), (0.8, 0.5), (0.95, 0.2), (1.0, 1.0)]),
    split_above=st.sampled_from([(0.0, 0.0), (0.5, 0.2), (0.25, 1.0), (1.0, 0.0)]),
    flush_requests=st.sampled_from([None, 1, 2, 5]),
    flush_s=st.sampled_from([None, 0.004, 0.03]),
    tpot_s=st.sampled_from([None, 0.012, 0.03]),
    kv_rule=st.sampled_from(BOTH),
)
def test_every_token_comes_when_the_reference_says(
    requests: int, outputs: int, shares: tuple[float, float], split_above: tuple[float, float],
    flush_requests: int | None, flush_s: float | None, tpot_s: float | None, kv_rule: KvRule,
) -> None:  # fmt: skip
    trace, how = leaving(shares, seed=outputs), Regrouping(split_above, flush_requests, flush_s)
    unequal = workload(requests, 7, Exponential(outputs), AllAtOnce())
    served = run(unequal, exiting(how=how, kv_rule=kv_rule), trace, others={"slo": Slo(tpot_s=tpot_s)})
    records = served.by_request()
    rows, start_ns = rows_of(unequal, trace), records[0].first_token_ns  # one iteration has computed all prompts
    exit_of = replay(trace, PerToken(0.7), N_LAYERS).exit_index.tolist()
    answers = [Answer(rows[r.request_id][1:], r.prompt_tokens, first_ns=start_ns) for r in records]
    reference = Reference(exit_of, how, kv_rule, None if tpot_s is None else round(tpot_s * 1e9), answers)
    reference.now_ns = reference.latest_ns = start_ns
    while any(a.rows for a in answers):
        reference.iterate()
    assert served.run.stats.splits == reference.splits
    for record, answer in zip(records, answers, strict=True):
        assert record.layers_run == N_LAYERS + sum(EXITS[e] for e in answer.exits)
        agreed = [bool(trace.agree[row, e]) for row, e in zip(rows[record.request_id][1:], answer.exits, strict=True)]
        assert record.agreed_tokens == 1 + sum(agreed)
        if answer.exits:  # sums in another order may round to another nanosecond
            assert record.last_token_ns == pytest.approx(answer.ended_ns, abs=3 * sum(map(len, rows)))


# --- what always holds


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    split_above=st.sampled_from([0.0, 0.3, 1.0]),
    flush_requests=st.sampled_from([None, 1, 3]),
    shares=st.sampled_from([(0.2, 0.4), (0.7, 0.8)]),
    room=st.sampled_from([90, 200, 5000]),
    block=st.sampled_from([1, 3, 16]),
    budget=st.sampled_from([8, 64, 2048]),
    other=st.sampled_from([{}, {"prefill_first": True}, {"keeps_answers": True}, {"whole_prompts": True}]),
    vllm_v1=st.booleans(),
    kv_rule=st.sampled_from([*BOTH, KvRule.RECOMPUTE]),
)
def test_tokens_and_memory_balance(
    split_above: float, flush_requests: int | None, shares: tuple[float, float], room: int, block: int, budget: int,
    other: dict, vllm_v1: bool, kv_rule: KvRule,
) -> None:  # fmt: skip
    """Whatever is scheduled how: every token once, none before it wants to, within the memory, all of it returned."""
    trace = leaving(shares, 500)
    memory = {"hbm_bytes": PRICED.weight_bytes(N_LAYERS) + room * PRICED.kv_bytes_per_token(N_LAYERS)}
    unequal = workload(14, Exponential(12), Exponential(25), AllAtOnce())
    how = {
        **memory, "utilisation": 1.0, "block_tokens": block, "max_running_requests": 6, "max_batch_tokens": budget,
        "others": other, "vllm_v1": vllm_v1, "schedule_ahead": int(vllm_v1),
    }  # fmt: skip
    told: dict[int, list[int]] = {}

    def note(server: Server, produced: list[Produced]) -> None:
        for one in produced:
            told.setdefault(one.request_id, []).append(one.number)

    def watch(server: Server) -> None:
        server.on_tokens = note
        if hasattr(server, "_replica"):
            s, r = server._replica.state, server._replica
            assert 0 <= s.used_blocks <= s.total_blocks
            held = [r.requests[slot].held for slot in r.lists.batch[: int(s.decoding)]]
            assert all(0 <= band < len(EXITS) for band in held)

    deployment = exiting(how=Regrouping(split_above, flush_requests), kv_rule=kv_rule)
    runs = [
        run(unequal, deployment, trace, **how, **way)
        for way in ({"stepwise": True, "watch": watch}, {"stepwise": False})
    ]
    full = serve(unequal, full_depth(layers=N_LAYERS), {"flat": PRICED}, {"flat": trace}, **how)
    exit_of = replay(trace, PerToken(0.7), N_LAYERS).exit_index
    rows = rows_of(unequal, trace)
    for served in runs:
        assert served.run.servers[0]._replica.used_blocks == 0
        assert [r.output_tokens for r in served.by_request()] == [r.output_tokens for r in full.by_request()]
        for record in (r for r in served.by_request() if r.drop_reason is None):
            least = sum(EXITS[e] for e in exit_of[rows[record.request_id]][1:])
            assert least <= record.layers_run <= N_LAYERS * record.output_tokens
        done = [r for r in served.records if r.drop_reason is None]
        gaps = sum(r.output_tokens - 1 for r in done)
        assert served.run.stats.itl.total_count == gaps
    assert told == {r.request_id: list(range(r.output_tokens)) for r in runs[0].records if r.drop_reason is None}
    assert alike(*runs)


@pytest.mark.slow
def test_compiled_it_is_the_same() -> None:
    work = workload(30, Exponential(12), Exponential(25), AllAtOnce())
    memory = PRICED.weight_bytes(N_LAYERS) + 200 * PRICED.kv_bytes_per_token(N_LAYERS)
    how = {"max_running_requests": 6, "hbm_bytes": memory, "utilisation": 1.0, "vllm_v1": True, "block_tokens": 3}
    for kv_rule in (*BOTH, KvRule.RECOMPUTE):
        deployment = exiting(how=Regrouping((0.2, 0.4), 3, 0.02), kv_rule=kv_rule)
        runs = [run(work, deployment, leaving((0.5, 0.5), 500), compiled=each, **how) for each in (False, True)]
        assert runs[0].run.stats.splits > 10
        assert runs[0].run.stats.preemptions > 0
        assert alike(*runs)


def test_a_change_of_the_rule_takes_nothing_away() -> None:
    """What waits is computed from the first layer again where batches are no longer split."""
    every = {"triggers": (Completed(3),)}
    lazy, each = exiting(BatchingRule.LAZY, **every), exiting(BatchingRule.EACH_TOKEN, **every)
    whole = Deployment(Placement("flat", N_LAYERS), FullDepth(), kv_rule=KvRule.NONE, **every)
    split = exiting(how=Regrouping(0.1, 2, 0.05), **every)
    script = Scripted(exiting(how=Regrouping(0.0, 9), **every), [lazy, split, whole, split, each, exiting(**every)])
    work = workload(30, 8, Exponential(20), AllAtOnce())
    for block in (1, 16):
        again = Scripted(script.first, list(script.then))
        served = run(work, again, leaving((0.5, 0.5)), max_running_requests=5, block_tokens=block)
        assert served.run.servers[0]._replica.used_blocks == 0
        assert len(served.run.servers[0].decisions) >= 6
        full = serve(work, full_depth(layers=N_LAYERS), {"flat": PRICED}, {"flat": leaving((0.5, 0.5))})
        assert [r.output_tokens for r in served.by_request()] == [r.output_tokens for r in full.by_request()]


def test_no_token_waits_for_longer_than_it_may() -> None:
    """All but one request leave at the first exit: alone it would wait until they are done."""
    trace = leaving((0.97, 0.0))
    work = workload(12, 5, 60)
    waits = {
        flush_s: run(work, exiting(how=Regrouping(0.0, 9, flush_s)), trace).run.stats.held_token_ns
        for flush_s in (0.0, 0.01, None)
    }
    assert waits[0.0] < waits[0.01] < waits[None]


# --- the policy and its settings


def test_the_policy_splits_where_it_pays() -> None:
    """Layers of 2 ms, whatever the batch: regrouping of 1 ms pays above 1/12 after layer 2 of 8."""
    large = layered_profile("large", 0.002, 8)
    costly = large.with_runtime(replace(large.runtime, regroup_s=1e-3))
    base = situation()
    base = replace(base, candidates={**base.candidates, "large": replace(base.candidates["large"], profile=costly)})
    policy = make_policy("early_exit_rebatch", {"model": "large", "threshold": 0.7, "review_requests": 5})
    deployment = policy.start(base)
    assert deployment.batching is BatchingRule.REBATCH
    assert deployment.triggers == (Completed(5),)
    exits = base.candidates["large"].offline.exits
    expected = tuple(1e-3 / (0.002 * (8 - layers)) for layers in exits[:-1])
    assert deployment.regrouping.split_above == pytest.approx(expected, abs=1e-6)
    assert deployment.regrouping.flush_s == pytest.approx(10 * 8 * 0.002)
    assert fault_of(deployment, base) is None
    assert policy.decide(Completed(5), seen(5)) is None  # it takes as long as it did
    assert "split where more of it leaves than" in deployment.reason


@pytest.mark.parametrize(
    ("own", "key"),
    [
        ({"batching": "lazy", "flush_requests": 3}, "policy.flush_requests"),
        ({"flush_s": 0.1}, "policy.flush_s"),
        ({"review_requests": 3}, "policy.review_requests"),
        ({"batching": "rebatch", "flush_s": 1e9}, "policy.flush_s"),
        ({"batching": "rebatch", "flush_requests": 0}, "policy.flush_requests"),
        ({"batching": "rebatch", "kv_rule": "none"}, "policy.kv_rule"),
    ],
)
def test_settings_that_cannot_be_are_refused(own: dict[str, object], key: str) -> None:
    with pytest.raises(UserError) as caught:
        policy_config("early_exit", {"threshold": 0.5, **own})
    assert caught.value.key == key


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (Regrouping((0.1, 0.1)), "1 of them"), (Regrouping(1.5), "split_above"), (Regrouping(0.1, 0), "flush_requests"),
        (Regrouping(0.1, None, -1.0), "flush_s"), ("half", "Regrouping"),
    ],
)  # fmt: skip
def test_what_no_server_can_carry_out_is_refused(how: object, said: str) -> None:
    base = situation()
    own = Deployment(Placement("large", 8), PerToken(0.5), batching=BatchingRule.REBATCH, regrouping=how)
    found = fault_of(own, base)
    assert found is not None
    assert found[0] == "regrouping"
    assert said in found[2]


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(UserError, match="no tokens are observed"):
        exiting(observe_tokens=4)
    with pytest.raises(UserError, match="enable_prefix_caching"):
        run(workload(1), exiting(), leaving((0.5, 0.5)), shares=True)


def test_the_report_says_how_often_and_how_long() -> None:
    served = run(workload(8, 5, 50), exiting(how=Regrouping(0.1, 4)), leaving((0.5, 0.5)))
    stats = served.run.stats
    found = compute_metrics(Records.of(served.records), stats)
    assert found["split_fraction"] == pytest.approx(stats.splits / stats.decode_iterations)
    assert found["held_per_token"] == pytest.approx(stats.held_tokens / (8 * 50))
    assert found["held_wait_s"] == pytest.approx(stats.held_token_ns / 1e9 / stats.held_tokens)
    lazy = run(workload(2), exiting(BatchingRule.LAZY), leaving((0.5, 0.5)))
    none = compute_metrics(Records.of(lazy.records), lazy.run.stats)
    assert [none[name] for name in OF_SPLITS] == [None] * 3
