"""Predictors in place of the head, and exits that look at each token alone: what leaves where, and what it takes."""

from __future__ import annotations

from collections import deque
from dataclasses import asdict, replace

import numpy as np
import pytest

from helios_sim import study_config
from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import replay
from helios_sim.exits.rule import WORDS, Confidence, FixedCap, Near, PerToken
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule, Placement
from helios_sim.policy.registry import make_policy, policy_config
from helios_sim.profile.predictor import NAME, WIDTH, with_predictor
from helios_sim.profile.resolve import find_profile
from helios_sim.profile.store import read_profile, write_profile
from helios_sim.study.build import build_profile
from helios_sim.study.plan import check_study, plan_study
from helios_sim.workload import AllAtOnce, Exponential
from priced import line, priced_profile
from rig import Served, full_depth, rows_of, serve, workload

EXITS, N_LAYERS = (2, 3, 4, 6, 7, 9), 9
LAYER_S, HEAD_S, CHECK_S, LOOK_S, SYNC_S, HOST_S = 1e-3, 9e-4, 7e-4, 1e-4, 5e-5, 3e-4
PRICED = replace(
    priced_profile(
        "flat", n_layers=N_LAYERS, layer_s=LAYER_S, head_s=HEAD_S, check_s=CHECK_S, classifier_s=5e-4, sync_s=SYNC_S,
        host_s=HOST_S,
    ),
    check_predictor=line(LOOK_S),
)  # fmt: skip
PREDICTOR, HEAD, CLASSIFIER = Confidence.PREDICTOR, Confidence.MAX_PROBABILITY, Confidence.CLASSIFIER
NEAR = Near(tokens=3, layers=1)


def looked_at(tokens: int = 800, sure: float = 0.35, in_vain: float = 0.2) -> ExitTrace:
    """Each exit is sure of a share of the tokens, and of another in vain; the first exit of none in vain."""
    rng, trace = np.random.default_rng(4), synthetic_trace("flat", EXITS, tokens=tokens, chars_per_token=1)
    drawn = rng.uniform(size=(tokens, len(EXITS)))
    values = np.where(drawn < sure, 0.9, np.where(drawn < sure + in_vain, -0.9, 0.1)).astype(np.float32)
    values[:, 0] = np.abs(values[:, 0]) * np.where(drawn[:, 0] < sure, 1, 0.1)
    agree = rng.uniform(size=drawn.shape) < 0.7
    values[:, -1], agree[:, -1] = 1.0, True
    recorded = {PREDICTOR: values, HEAD: values.clip(0), CLASSIFIER: values}
    return replace(trace, confidences=recorded, agree=agree)


def exiting(rule: PerToken, **others) -> Deployment:
    return Deployment(Placement("flat", N_LAYERS), rule, kv_rule=others.pop("kv_rule", KvRule.COPY), **others)


def run(work, deployment, trace: ExitTrace, **how) -> Served:
    return serve(work, deployment, {"flat": PRICED}, {"flat": trace}, **how)


def reference(rule: PerToken, trace: ExitTrace, rows: list[int]) -> tuple[float, int, int]:
    """Nanoseconds, layers and agreeing tokens of one request, token by token, by the words of the rule's docstring."""
    values, proposes = trace.confidences[rule.confidence], rule.confidence is PREDICTOR
    total_ns, layers, agreed = 0.0, 0, 0
    latest: deque[int] = deque(maxlen=rule.near.tokens if rule.near else 0)
    for row in rows:
        took_s, leaves = HOST_S, N_LAYERS
        for e, depth in enumerate(EXITS[:-1]):
            named = rule.checkpoints is None and rule.near is None
            named = named or depth in (rule.checkpoints or ()) or (proposes and e == 0)
            close = rule.near is not None and any(abs(depth - at) <= rule.near.layers for at in latest)
            sure, in_vain = values[row, e] >= rule.threshold, proposes and values[row, e] <= -rule.threshold
            if proposes and e == 0:
                took_s += CHECK_S  # the head proposes the words
            if not named and not close:
                continue
            took_s += SYNC_S + {PREDICTOR: LOOK_S, HEAD: CHECK_S, CLASSIFIER: 5e-4}[rule.confidence]
            if proposes and e and (sure or in_vain):
                took_s += CHECK_S
            if sure:
                leaves = depth
                break
        if leaves == N_LAYERS or rule.confidence is CLASSIFIER:
            took_s += HEAD_S
        latest.append(leaves)
        total_ns += 1e9 * (took_s + leaves * LAYER_S)
        layers += leaves
        agreed += bool(trace.agree[row, EXITS.index(leaves)])
    return total_ns, layers, agreed


@pytest.mark.parametrize(
    "rule",
    [
        PerToken(0.5, PREDICTOR), PerToken(0.5, PREDICTOR, (2, 6)), PerToken(0.5, PREDICTOR, None, NEAR),
        PerToken(0.5, PREDICTOR, (2, 4), Near(5, 2)), PerToken(0.5, HEAD, (3,), NEAR),
        PerToken(0.5, CLASSIFIER, (2,), Near(10, 3)), PerToken(0.5, HEAD, (2, 7), Near(1, 0)),
    ],
)  # fmt: skip
def test_tokens_leave_and_cost_what_the_reference_says(rule: PerToken) -> None:
    trace, work = looked_at(), workload(1, 5, 120)
    served = run(work, exiting(rule), trace)
    record, (rows,) = served.records[0], rows_of(work, trace)
    total_ns, layers, agreed = reference(rule, trace, rows[1:])
    assert record.last_token_ns - record.first_token_ns == pytest.approx(total_ns, abs=120)
    assert (record.layers_run, record.agreed_tokens) == (layers + N_LAYERS, agreed + 1)


def test_a_model_that_is_never_sure_costs_full_depth_and_its_checks() -> None:
    """In closed form: proposed words, a look and a wait at each exit, and nothing else."""
    values = np.tile(np.float32([0.1] * 5 + [1.0]), (800, 1))
    trace = replace(looked_at(), confidences={PREDICTOR: values, HEAD: values})
    whole, served = (run(workload(1, 5, 11), d, trace) for d in (full_depth(layers=N_LAYERS), exiting(
        PerToken(0.5, PREDICTOR))))  # fmt: skip
    more_ns = 10 * 1e9 * (CHECK_S + 5 * (LOOK_S + SYNC_S))
    assert served.run.end_ns - whole.run.end_ns == pytest.approx(more_ns, abs=10)
    assert served.records[0].early_tokens == 0


def test_exits_near_everything_are_all_exits() -> None:
    trace, work = looked_at(), workload(12, Exponential(9), Exponential(30), AllAtOnce())
    rules = [PerToken(0.5, HEAD), PerToken(0.5, HEAD, EXITS[:-1], NEAR)]
    each = [run(work, exiting(rule), trace, max_running_requests=4) for rule in rules]
    assert each[0].by_request() == each[1].by_request()
    assert asdict(each[0].run.stats) == asdict(each[1].run.stats)


def test_every_request_has_latest_tokens_of_its_own() -> None:
    """Side by side, and in slots that others had before, requests leave where they would alone."""
    trace, rule = looked_at(), PerToken(0.5, PREDICTOR, (2,), NEAR)
    work = workload(15, Exponential(9), Exponential(25), AllAtOnce())
    served = run(work, exiting(rule), trace, max_running_requests=3)
    for record, rows in zip(sorted(served.records, key=lambda r: r.request_id), rows_of(work, trace), strict=True):
        _, layers, agreed = reference(rule, trace, rows[1:])
        assert (record.layers_run, record.agreed_tokens) == (
            layers + N_LAYERS, agreed + 1)  # fmt: skip


@pytest.mark.slow
def test_compiled_and_interpreted_are_the_same_to_the_bit() -> None:
    trace, work = looked_at(), workload(30, Exponential(9), Exponential(25), AllAtOnce())
    for rule in (PerToken(0.5, PREDICTOR, (2, 6), NEAR), PerToken(0.5, HEAD, (3,), Near(10, 2))):
        for kv_rule in (KvRule.PROPAGATE, KvRule.RECOMPUTE):
            deployment = exiting(rule, kv_rule=kv_rule)
            each = [run(work, deployment, trace, max_running_requests=4, compiled=code) for code in (False, True)]
            assert each[0].by_request() == each[1].by_request()
            assert asdict(each[0].run.stats) == asdict(each[1].run.stats)


def test_the_policy_chooses_where_most_tokens_leave() -> None:
    trace = looked_at()
    values = np.full((800, 6), 0.1, np.float32)
    values[:100, 1] = values[100:700, 3] = values[700:, 4] = 0.9
    trace = replace(trace, confidences={PREDICTOR: values, HEAD: values})
    for parameters, found in (
        ({"most_checks": 1}, PerToken(0.5, HEAD, (6,))),
        ({"most_checks": 2, "near_tokens": 4}, PerToken(0.5, HEAD, (3, 6), Near(4, 2))),
        ({"near_tokens": 4, "near_layers": 0, "checkpoints": [2]}, PerToken(0.5, HEAD, (2,), Near(4, 0))),
        ({"near_tokens": 4, "confidence": "predictor"}, PerToken(0.5, PREDICTOR, None, Near(4, 2))),
        ({"most_checks": 1, "confidence": "predictor"}, PerToken(0.5, PREDICTOR, (2, 6))),
    ):
        served = run(workload(1, 5, 4), make_policy("early_exit", {"threshold": 0.5, **parameters}), trace)
        first = served.run.servers[0].decisions[0].deployment
        assert first.exit_rule == found
        assert fault_of(first, served.run.servers[0]._replica.situation) is None
        told = None if found.near is None else f"within {found.near.layers} layers of where the last 4 tokens left"
        assert told is None or told in first.reason


@pytest.mark.parametrize(
    ("parameters", "told"),
    [
        ({"most_checks": 0}, "most_checks"), ({"most_checks": 2, "checkpoints": [2]}, "most_checks"),
        ({"near_layers": 1}, "near_layers"), ({"near_tokens": 11, "most_checks": 1}, "from 1 to 10"),
        ({"near_tokens": 0}, "near_tokens"), ({"near_tokens": 5}, "no token leaves"),
        ({"near_tokens": 5, "most_checks": 1, "batching": "lazy"}, "each_token"),
        ({"confidence": "predictor", "batching": "rebatch"}, "each_token"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(parameters, told: str) -> None:
    with pytest.raises(UserError, match=told):
        policy_config("early_exit", {"threshold": 0.5, **parameters})


@pytest.mark.parametrize("most", [5, 9])
def test_as_many_checks_as_there_are_exits_leave_nothing_out(most: int) -> None:
    policy = make_policy("early_exit", {"threshold": 0.5, "confidence": "max_probability", "most_checks": most})
    with pytest.raises(UserError, match=f"policy.most_checks={most}: below 5: flat has no more exits"):
        run(workload(1, 5, 4), policy, looked_at())


def test_what_a_predictor_cannot_tell_is_refused_by_name() -> None:
    trace = looked_at()
    with pytest.raises(UserError, match=r"exits.confidence='predictor'.*one by one"):
        replay(trace, FixedCap(0.5, PREDICTOR), 4)
    with pytest.raises(UserError, match="its head proposes the words"):
        run(
            workload(1, 5, 4), make_policy(
                "early_exit", {"threshold": 0.5, "confidence": "predictor", "checkpoints": [3]}), trace,
        )  # fmt: skip
    known = run(workload(1, 5, 4), full_depth(layers=N_LAYERS), trace).run.servers[0]._replica.situation
    for wrong in (
        exiting(PerToken(0.5, HEAD, (2,), Near(11, 1))), exiting(PerToken(0.5, HEAD, (2,), Near(2, -1))),
        exiting(PerToken(0.5, HEAD, None, NEAR)),
        exiting(PerToken(0.5, PREDICTOR, (3,))), exiting(PerToken(0.5, PREDICTOR), batching=BatchingRule.LAZY),
        replace(exiting(PerToken(0.5, HEAD, (2,), NEAR)), active=Placement("flat", 6)),
        exiting(FixedCap(0.5, PREDICTOR)),
    ):  # fmt: skip
        assert fault_of(wrong, known)[0] == "exit_rule"
    unknown = replace(PRICED, check_predictor=None)
    with pytest.raises(UserError, match=r"check_predictor.*measure the profile"):
        serve(workload(1, 5, 4), exiting(PerToken(0.5, PREDICTOR)), {"flat": unknown}, {"flat": trace})


def test_a_cost_that_nobody_measured_follows_from_bytes_and_says_so() -> None:
    profile = find_profile("llama-2-7b", "a100-80gb")
    found = with_predictor(profile)
    table, model, runtime = found.check_predictor, profile.model, profile.runtime
    first, last = (float(t) for t in table.time_s)
    per_token_s = (WORDS + 2) * model.d_model * 2 / profile.hardware.hbm_bytes_per_s
    assert (last - first) / (table.rows[-1] - 1) == pytest.approx(per_token_s)
    network_s = ((3 * WORDS + 2) * WIDTH + 1) * 2 / profile.hardware.hbm_bytes_per_s
    assert first == pytest.approx(runtime.launch_s_per_layer + network_s + per_token_s)
    assert [a.name for a in found.provenance.assumptions if a not in profile.provenance.assumptions] == [NAME]
    assert with_predictor(PRICED) is PRICED


@pytest.mark.parametrize(
    ("model", "card", "assumed"), [("opt-1.3b", "h100-80gb", True), ("smollm2-135m", "epyc-2core", False)]
)
def test_a_study_lists_what_it_derived(model: str, card: str, assumed: bool) -> None:
    for confidence in (PREDICTOR, HEAD):
        config = study_config("own", f"models=[{model}]", f"hardware={card}", f"exits.confidence={confidence}")
        listed = NAME in [a.name for a in build_profile(config, model).provenance.assumptions]
        assert listed == (assumed and confidence is PREDICTOR)
    measured = find_profile("smollm2-135m", "epyc-2core")
    assert measured.check_predictor.time_s[0] < measured.check.time_s[0] / 5


def test_a_measured_cost_is_kept_with_the_profile(tmp_path) -> None:
    write_profile(PRICED, tmp_path / "p")
    back = read_profile(tmp_path / "p").check_predictor
    assert back.rows.tolist() == PRICED.check_predictor.rows.tolist()
    assert np.array_equal(back.time_s, PRICED.check_predictor.time_s)


def test_a_promise_for_checks_at_every_exit_is_not_one_for_a_schedule() -> None:
    for own, key in ((("policy.most_checks=1", "policy.near_tokens=3"), "near_tokens"),
                     (("policy.checkpoints=[8]",), "checkpoints")):  # fmt: skip
        with pytest.raises(UserError, match=rf"policy\.{key}.*exits\.guarantee"):
            check_study(plan_study(study_config("guarantee", "policy=early_exit", "workload.n_requests=20", *own)))
