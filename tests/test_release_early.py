"""Answers that leave at a ramp while the model goes on: when they are delivered, and how thresholds are tuned."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import Confidence, ReleaseEarly
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import Completed, Deployment, KvRule, Placement
from helios_sim.policy.registry import make_policy, policy_config
from helios_sim.policy.release_early import CLOSED, released_shares, tuned
from helios_sim.policy.telemetry import Released
from helios_sim.report.metrics import OF_RELEASES, compute_metrics
from helios_sim.report.records import Records
from helios_sim.workload import AllAtOnce, Exponential, Workload
from policy_example import seen, situation
from priced import line, priced_profile
from rig import Scripted, Served, full_depth, rows_of, serve, workload

EXITS, N_LAYERS = (1, 3, 8), 8
COSTS = {
    "layer_s": 1.1e-3, "row_s": 7e-5, "kv_token_s": 3e-6, "prefill_token_s": 4e-6, "head_s": 9e-4, "sync_s": 2e-5,
    "host_s": 2.5e-4, "check_s": 3e-4, "classifier_s": 1e-4,
}  # fmt: skip
PRICED = priced_profile("flat", n_layers=N_LAYERS, **COSTS)
BOTH = [Confidence.MAX_PROBABILITY, Confidence.CLASSIFIER]


def sure(shares: tuple[float, float], tokens: int = 3000, seed: int = 0, wrong: float = 0.0) -> ExitTrace:
    """Of all tokens these shares are confident at the two ramps; of those some differ from the whole model's."""
    rng, trace = np.random.default_rng(seed), synthetic_trace("flat", EXITS, tokens=tokens, chars_per_token=1)
    values, agree = np.ones((tokens, len(EXITS)), np.float32), np.ones((tokens, len(EXITS)), np.bool_)
    for place, share in enumerate(shares):
        values[:, place] = np.where(rng.uniform(size=tokens) < share, 0.9, 0.1)
        agree[:, place] = (values[:, place] > 0.5) & (rng.uniform(size=tokens) >= wrong)
    return replace(trace, confidences=dict.fromkeys(BOTH, values), agree=agree)


def releasing(
    ramps: tuple[int, ...] = (1, 3), at: float = 0.5, confidence: Confidence = BOTH[0], tells_all: bool = False,
    **others: object,
) -> Deployment:  # fmt: skip
    rule = ReleaseEarly(ramps, (at,) * len(ramps), confidence, tells_all)
    return Deployment(Placement("flat", N_LAYERS), rule, kv_rule=KvRule.NONE, **others)


def run(work: Workload, deployment: Deployment | Scripted, trace: ExitTrace, **how: object) -> Served:
    return serve(work, deployment, {"flat": PRICED}, {"flat": trace}, **how)


# --- delivery


@pytest.mark.parametrize("confidence", BOTH)
@pytest.mark.parametrize("ramp", [0, 1, 2])
def test_one_token_is_delivered_as_by_hand(ramp: int, confidence: Confidence) -> None:
    """After the host's part, the layers and checks up to its ramp, and the way back; the iteration goes on."""
    c, by_head = COSTS, confidence.by_head
    trace = sure(((1.0, 0.0), (0.0, 1.0), (0.0, 0.0))[ramp])
    served = run(workload(1, 5, 2), releasing(confidence=confidence), trace)
    (record,) = served.records
    layer_s = c["layer_s"] + 6 * c["kv_token_s"]
    check_s = c["check_s"] if by_head else c["classifier_s"]
    at_ramp_s = 0.0 if by_head or ramp == 2 else c["check_s"]  # which token it is
    whole_s = N_LAYERS * layer_s + 2 * check_s + at_ramp_s + c["head_s"] + c["host_s"]
    delivered_s = whole_s
    if ramp < 2:
        delivered_s = EXITS[ramp] * layer_s + (ramp + 1) * check_s + at_ramp_s + c["host_s"] + c["sync_s"]
    assert record.last_token_ns - record.first_token_ns == pytest.approx(1e9 * delivered_s, abs=2)
    assert served.run.stats.busy_ns == pytest.approx(record.first_token_ns + 1e9 * whole_s, abs=2)
    assert served.run.stats.released_ns == pytest.approx(1e9 * (whole_s - delivered_s), abs=2)
    assert served.run.stats.released_tokens == (ramp < 2)


@pytest.mark.parametrize("together", [1, 2, 3])
def test_after_a_classifier_the_head_reads_all_rows_that_leave_at_a_ramp(together: int) -> None:
    c, each_s = COSTS, 1e-4
    priced = replace(PRICED, check=line(c["check_s"], each_s))
    deployment = releasing(confidence=Confidence.CLASSIFIER)
    served = serve(workload(together, 5, 2, AllAtOnce()), deployment, {"flat": priced}, {"flat": sure((1.0, 0.0))})
    layers_s = N_LAYERS * (c["layer_s"] + (together - 1) * c["row_s"] + together * 6 * c["kv_token_s"])
    head_s = c["check_s"] + (together - 1) * each_s  # of the ramp at which all leave, beside that of the last layer
    whole_s = layers_s + 2 * c["classifier_s"] + head_s + c["head_s"] + c["host_s"]
    first_ns = served.records[0].first_token_ns
    assert served.run.stats.busy_ns == pytest.approx(first_ns + 1e9 * whole_s, abs=2)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    requests=st.integers(1, 6),
    outputs=st.integers(2, 30),
    shares=st.sampled_from([(0.0, 0.0), (0.3, 0.3), (0.8, 0.5), (1.0, 1.0)]),
    ramps=st.sampled_from([(1,), (3,), (1, 3)]),
)
def test_every_token_comes_when_the_reference_says(
    requests: int, outputs: int, shares: tuple[float, float], ramps: tuple[int, ...]
) -> None:
    """Requests that are all there at once, token by token, from the rule and the costs alone."""
    c, trace = COSTS, sure(shares, seed=outputs, wrong=0.2)
    work = workload(requests, 7, Exponential(outputs), AllAtOnce())
    served = run(work, releasing(ramps), trace)
    records, rows = served.by_request(), rows_of(work, trace)
    confident = trace.confidences[BOTH[0]] >= 0.5
    now_ns = records[0].first_token_ns
    left = {r.request_id: rows[r.request_id][1:] for r in records}
    context = {r.request_id: r.prompt_tokens for r in records}
    last_ns, agreed, earlier_ns = dict.fromkeys(left, now_ns), dict.fromkeys(left, 1), 0
    while running := [n for n in left if left[n]]:
        for n in running:
            context[n] += 1
        layer_s = c["layer_s"] + (len(running) - 1) * c["row_s"] + sum(context[n] for n in running) * c["kv_token_s"]
        whole_ns = round(1e9 * (N_LAYERS * layer_s + len(ramps) * c["check_s"] + c["head_s"] + c["host_s"]))
        for n in running:
            row, done_ns, exit_ = left[n].pop(0), whole_ns, N_LAYERS
            for place, ramp in enumerate(ramps):
                if confident[row, EXITS.index(ramp)]:
                    here_s = ramp * layer_s + (place + 1) * c["check_s"] + c["host_s"] + c["sync_s"]
                    done_ns, exit_ = min(whole_ns, round(1e9 * here_s)), ramp
                    break
            last_ns[n] = now_ns + done_ns
            earlier_ns += whole_ns - done_ns
            agreed[n] += bool(trace.agree[row, EXITS.index(exit_)])
        now_ns += whole_ns
    slack = 3 * sum(map(len, rows))  # sums in another order may round to another nanosecond
    for record in records:
        assert record.last_token_ns == pytest.approx(last_ns[record.request_id], abs=slack)
        assert record.agreed_tokens == agreed[record.request_id]
        assert record.layers_run == N_LAYERS * record.output_tokens
    assert served.run.stats.released_ns == pytest.approx(earlier_ns, abs=slack)


@pytest.mark.slow
def test_however_it_is_run_it_is_the_same() -> None:
    """Compiled or not, stepwise or not; memory, tokens and layers are those of full depth; gaps are never negative."""
    work, trace = workload(30, Exponential(12), Exponential(25), AllAtOnce()), sure((0.4, 0.6), 500)
    memory = PRICED.weight_bytes(N_LAYERS) + 200 * PRICED.kv_bytes_per_token(N_LAYERS)
    how = {"max_running_requests": 6, "hbm_bytes": memory, "utilisation": 1.0, "block_tokens": 3, "vllm_v1": True}
    runs = [
        run(work, releasing(), trace, **how, **way) for way in ({}, {"compiled": True}, {"stepwise": True})
    ]
    full = run(work, full_depth(layers=N_LAYERS), trace, **how)
    for served in runs:
        assert served.by_request() == runs[0].by_request()
        assert asdict(served.run.stats) == asdict(runs[0].run.stats)
        assert served.run.servers[0]._replica.used_blocks == 0
        assert [r.output_tokens for r in served.by_request()] == [r.output_tokens for r in full.by_request()]
        assert served.run.stats.itl.total_count == full.run.stats.itl.total_count
    assert runs[0].run.stats.preemptions > 0


def test_closed_ramps_cost_their_checks_alone() -> None:
    work = workload(10, 8, 20)
    closed = run(work, releasing(at=CLOSED), sure((1.0, 1.0)))
    full = run(work, full_depth(layers=N_LAYERS), sure((1.0, 1.0)))
    iterations = full.run.stats.decode_iterations
    assert closed.run.stats.busy_ns - full.run.stats.busy_ns == pytest.approx(1e9 * iterations * 6e-4, rel=1e-4)
    found = compute_metrics(Records.of(closed.records), closed.run.stats)
    assert [found[name] for name in OF_RELEASES] == [None, None]
    assert all(r.agreed_tokens == r.output_tokens for r in closed.records)


def test_a_policy_that_is_told_of_all_tokens_asks_the_head_of_all() -> None:
    """A check on the hidden state does not say whether the ramp is right: two heads more in each iteration."""
    work, trace = workload(4, 5, 20), sure((1.0, 0.0))
    told, alone = (
        run(work, releasing(at=CLOSED, confidence=BOTH[1], tells_all=tells_all), trace).run.stats
        for tells_all in (True, False)
    )
    more_s = 2 * COSTS["check_s"] * alone.decode_iterations
    assert told.busy_ns - alone.busy_ns == pytest.approx(1e9 * more_s, rel=1e-4)


def test_the_rate_is_no_better_and_the_report_says_by_how_much_tokens_are_earlier() -> None:
    work = workload(8, 5, 40)
    early = run(work, releasing((1,)), sure((1.0, 0.0)))
    full = run(work, full_depth(layers=N_LAYERS), sure((1.0, 0.0)))
    assert early.run.stats.busy_ns > full.run.stats.busy_ns
    found = compute_metrics(Records.of(early.records), early.run.stats)
    assert found["released_fraction"] == pytest.approx(39 / 40)  # the first token is the prompt's
    assert found["released_earlier_s"] == pytest.approx(early.run.stats.released_ns / 1e9 / (8 * 40))


# --- thresholds


def stream(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Confidences that mean what they say: a token agrees with that probability; the second ramp is surer."""
    confidences = np.sort(rng.beta(3.0, 0.6, size=(n, 2)), axis=1).astype(np.float32)
    return confidences, rng.uniform(size=(n, 2)) < confidences


@pytest.mark.parametrize("budget", [0.01, 0.05])
def test_the_budget_is_held_on_streams_that_do_not_change(budget: float) -> None:
    """Of fresh tokens no more differ than the budget says, on average over resamples, and seldom many more."""
    rng, found = np.random.default_rng(5), []
    saved_s = np.array([0.7, 0.4])
    for _ in range(40):
        thresholds = tuned(*stream(rng, 4000), saved_s, budget)
        confidences, agrees = stream(rng, 20_000)
        first, second = (confidences[:, k] >= np.float32(thresholds[k]) for k in range(2))
        leaf = np.where(first, 0, np.where(second, 1, 2))
        known = np.column_stack([agrees, np.ones(len(agrees), bool)])
        found.append(1 - known[np.arange(len(agrees)), leaf].mean())
        assert released_shares(confidences, thresholds) == pytest.approx([(leaf == 0).mean(), (leaf == 1).mean()])
    assert np.mean(found) <= budget
    assert np.mean(np.array(found) <= 1.25 * budget) >= 0.95
    assert np.mean(found) >= 0.4 * budget  # it is used, not left


def test_thresholds_by_hand() -> None:
    """Ten tokens at one ramp: those from 0.80 up agree, the next two do not."""
    confidences = np.repeat(np.array([[0.95], [0.85], [0.8], [0.7], [0.6]], np.float32), 2, axis=0)
    agrees = np.repeat(np.array([[True], [True], [True], [False], [True]]), 2, axis=0)
    # Down to just above the tokens that differ: steps that release nothing cost nothing.
    assert tuned(confidences, agrees, np.array([1.0]), 0.01) == (0.71,)
    assert tuned(confidences, agrees, np.array([1.0]), 0.5) == (0.0,)  # 2 + sqrt(2) of 10
    assert tuned(confidences, ~agrees, np.array([1.0]), 0.0) == (0.96,)


def observed(values: np.ndarray, agrees: np.ndarray) -> Released:
    return Released("large", 0, 0, values > 0.5, agrees, None, len(values), values)


def test_the_policy_tunes_and_reviews() -> None:
    """Thresholds follow the whole model's verdicts."""
    base = situation()
    policy = make_policy("release_early", {"model": "large", "ramps": 1, "review_requests": 3})
    first = policy.start(base)
    assert first.exit_rule == ReleaseEarly((2,), (CLOSED,), tells_all=True)
    assert first.triggers == (Completed(3),)
    assert fault_of(first, base) is None
    assert policy.decide(Completed(3), seen(3)) is None  # nothing was heard
    rng = np.random.default_rng(0)
    values = rng.uniform(size=(400, 1)).astype(np.float32)
    heard = replace(seen(3), observations=(observed(values, values > 0.6),))
    lower = policy.decide(Completed(3), heard)
    assert lower is not None
    assert lower.exit_rule.thresholds[0] == pytest.approx(0.6, abs=0.02)  # 2 of 400 may differ: 2 + sqrt(2) < 4
    fixed = make_policy("release_early", {"model": "large", "fixed_threshold": 0.8}).start(base)
    assert fixed.exit_rule.thresholds == (0.8,) * len(fixed.exit_rule.ramps)
    assert not fixed.triggers


def test_a_policy_in_service_keeps_its_budget() -> None:
    """The first exit is wrong in 30 % of the cases, the second below a confidence of 0.4: that is what is left out."""
    trace = sure((0.5, 0.5), 4000, wrong=0.3)
    rng = np.random.default_rng(1)
    values = trace.confidences[BOTH[0]].copy()
    values[:, 1] = rng.uniform(size=len(values))
    agree = trace.agree.copy()
    agree[:, 1] = values[:, 1] > 0.4
    trace = replace(trace, confidences={BOTH[0]: values}, agree=agree)
    policy = make_policy("release_early", {"model": "flat", "review_requests": 10})
    served = serve(workload(200, 5, 40), policy, {"flat": PRICED}, {"flat": trace}, max_running_requests=8)
    tokens = sum(r.output_tokens for r in served.records)
    assert 1 - sum(r.agreed_tokens for r in served.records) / tokens <= 0.01
    assert served.run.stats.released_tokens > 0.3 * tokens  # ramp 3 above 0.4


def test_a_ramp_that_frees_nothing_is_given_up() -> None:
    """Its checks cost every token, so that the other exit takes its place."""
    policy = make_policy("release_early", {"model": "flat", "review_requests": 10, "ramps": 1})
    served = serve(workload(100, 5, 40), policy, {"flat": PRICED}, {"flat": sure((0.9, 0.0))}, max_running_requests=8)
    rules = [decision.deployment.exit_rule for decision in served.run.servers[0].decisions]
    assert [rules[0].ramps, rules[-1].ramps] == [(3,), (1,)]
    assert rules[-1].thresholds[0] < 0.9
    assert served.run.stats.released_tokens > 0


# --- what cannot be


@pytest.mark.parametrize(
    ("own", "key"),
    [
        ({"max_disagreement": 1.5}, "policy.max_disagreement"), ({"ramps": 0}, "policy.ramps"),
        ({"fixed_threshold": 80.0}, "policy.fixed_threshold"), ({"window_tokens": 0}, "policy.window_tokens"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_refused(own: dict[str, object], key: str) -> None:
    with pytest.raises(UserError) as caught:
        policy_config("release_early", own)
    assert caught.value.key == key


def test_rules_that_cannot_be_are_refused() -> None:
    trace, base = sure((0.5, 0.5), 100), situation()
    for rule in (ReleaseEarly((2,), (0.5,)), ReleaseEarly((8,), (0.5,)), ReleaseEarly((1,), (0.5, 0.5))):
        with pytest.raises(UserError, match="exits before the last"):
            replay(trace, rule, N_LAYERS)
    with pytest.raises(UserError, match="tells_all"):
        releasing(observe_tokens=3)
    for rule in (ReleaseEarly((3,), (0.5,)), ReleaseEarly((2,), ()), ReleaseEarly((2,), (5.0,))):
        found = fault_of(Deployment(Placement("large", 8), rule, kv_rule=KvRule.NONE), base)
        assert found is not None
        assert found[0] == "exit_rule"
