"""Exits of which only some check: what leaves where, what the checks take, and a reference that goes token by token."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule, Placement
from helios_sim.policy.registry import make_policy, policy_config
from helios_sim.workload import AllAtOnce, Exponential
from priced import priced_profile
from rig import Served, full_depth, rows_of, serve, workload

EXITS, N_LAYERS = (2, 4, 6, 8), 8
LAYER_S, HEAD_S, CHECK_S, SYNC_S, HOST_S = 1e-3, 9e-4, 1e-4, 5e-5, 3e-4
PRICED = priced_profile(
    "flat", n_layers=N_LAYERS, layer_s=LAYER_S, head_s=HEAD_S, classifier_s=CHECK_S, sync_s=SYNC_S, host_s=HOST_S
)
BOTH = [Confidence.MAX_PROBABILITY, Confidence.CLASSIFIER]


def sure(share: float = 0.4, tokens: int = 800) -> ExitTrace:
    """Each exit is sure of a share of the tokens, whatever the others say, and right of as many."""
    rng, trace = np.random.default_rng(2), synthetic_trace("flat", EXITS, tokens=tokens, chars_per_token=1)
    values = np.where(rng.uniform(size=(tokens, 4)) < share, 0.9, 0.1).astype(np.float32)
    agree = rng.uniform(size=(tokens, 4)) < 0.7
    values[:, -1], agree[:, -1] = 1.0, True
    return replace(trace, confidences=dict.fromkeys(BOTH, values), agree=agree)


def exiting(checkpoints: tuple[int, ...] | None, confidence: Confidence = BOTH[0], **others) -> Deployment:
    rule = PerToken(0.7, confidence, checkpoints)
    return Deployment(Placement("flat", N_LAYERS), rule, kv_rule=others.pop("kv_rule", KvRule.COPY), **others)


def run(work, deployment, trace: ExitTrace, **how) -> Served:
    return serve(work, deployment, {"flat": PRICED}, {"flat": trace}, **how)


@pytest.mark.parametrize("confidence", BOTH)
@pytest.mark.parametrize("checkpoints", [None, (2,), (4, 6), (2, 4, 6)])
def test_tokens_leave_and_cost_what_the_reference_says(checkpoints, confidence: Confidence) -> None:
    """Token by token: the layers up to the first checkpoint that is sure, a check and a wait at each on the way."""
    trace, work = sure(), workload(1, 5, 120)
    served = run(work, exiting(checkpoints, confidence), trace)
    record, (rows,) = served.records[0], rows_of(work, trace)
    checks, total_ns, layers, agreed = checkpoints or EXITS[:-1], 0.0, N_LAYERS, 1
    for row in rows[1:]:
        passed = 0
        for depth in checks:
            passed += 1
            if trace.confidences[confidence][row, EXITS.index(depth)] >= 0.7:
                break
        else:
            depth = N_LAYERS
        check_s = HEAD_S if confidence.by_head else CHECK_S
        head_s = 0.0 if confidence.by_head and depth < N_LAYERS else HEAD_S
        total_ns += 1e9 * (depth * LAYER_S + passed * (check_s + SYNC_S) + head_s + HOST_S)
        layers += depth
        agreed += bool(trace.agree[row, EXITS.index(depth)])
    assert record.last_token_ns - record.first_token_ns == pytest.approx(total_ns, abs=120)
    assert (record.layers_run, record.agreed_tokens) == (layers, agreed)


def test_all_exits_named_are_all_exits() -> None:
    trace, work = sure(), workload(12, Exponential(9), Exponential(30), AllAtOnce())
    for batching in BatchingRule:
        kv_rule = KvRule.PROPAGATE
        each = [
            run(work, exiting(checkpoints, batching=batching, kv_rule=kv_rule), trace, max_running_requests=4)
            for checkpoints in (None, EXITS[:-1])
        ]
        assert each[0].by_request() == each[1].by_request()
        assert asdict(each[0].run.stats) == asdict(each[1].run.stats)


def test_without_a_checkpoint_that_is_sure_it_is_full_depth_and_its_checks() -> None:
    trace = replace(sure(), confidences={BOTH[0]: np.tile(np.float32([0.9, 0.1, 0.9, 1.0]), (800, 1))})
    whole, served = (run(workload(1, 5, 11), d, trace) for d in (full_depth(layers=N_LAYERS), exiting((4,))))
    more_ns = 10 * 1e9 * (HEAD_S + SYNC_S)
    assert served.run.end_ns - whole.run.end_ns == pytest.approx(more_ns, abs=10)
    assert served.records[0].early_tokens == 0


@pytest.mark.slow
def test_compiled_and_interpreted_are_the_same_to_the_bit() -> None:
    trace, work = sure(), workload(30, Exponential(9), Exponential(25), AllAtOnce())
    for batching in BatchingRule:
        deployment = exiting((2, 6), batching=batching, kv_rule=KvRule.PROPAGATE)
        each = [run(work, deployment, trace, max_running_requests=4, compiled=code) for code in (False, True)]
        assert each[0].by_request() == each[1].by_request()
        assert asdict(each[0].run.stats) == asdict(each[1].run.stats)


def test_at_a_cap_its_own_exit_counts_for_breaches() -> None:
    """Loaded up to the third exit, checked at the first: what is sure at the cap is no breach."""
    trace = sure()
    found = replay(trace, PerToken(0.7, BOTH[0], (2,)), 6)
    values = trace.confidences[BOTH[0]] >= 0.7
    assert (found.exit_index == np.where(values[:, 0], 0, 2)).all()
    assert (found.breach == ~(values[:, 0] | values[:, 2])).all()


def test_what_may_be_asked_for() -> None:
    trace, work = sure(), workload(1, 5, 4)
    served = run(work, make_policy("early_exit", {"threshold": 0.7, "checkpoints": [2, 6]}), trace)
    first = served.run.servers[0].decisions[0].deployment
    assert first.exit_rule == PerToken(0.7, BOTH[0], (2, 6))
    assert "exits 2, 6, 8" in first.reason
    known = served.run.servers[0]._replica.situation
    assert fault_of(exiting((2, 6)), known) is None
    for wrong in ((6, 2), (3,), (8,), [2]):
        assert fault_of(exiting(wrong), known)[0] == "exit_rule"
    with pytest.raises(UserError, match=r"policy.checkpoints.*exits before its last layer at 2, 4, 6"):
        run(work, make_policy("early_exit", {"threshold": 0.7, "checkpoints": [3]}), trace)
    with pytest.raises(UserError, match="checkpoints"):
        replay(trace, PerToken(0.7, BOTH[0], (3,)), N_LAYERS)
    for wrong in ([], [6, 2], [2, 2], "2"):
        with pytest.raises(UserError, match=r"policy\.checkpoints"):
            policy_config("early_exit", {"threshold": 0.7, "checkpoints": wrong})
