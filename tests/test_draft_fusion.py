"""Drafts of several models, of which the surest one's is taken: the rule, its trace, what it takes and costs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim import simulate
from helios_sim.errors import UserError
from helios_sim.exits.artificial import stated_exits, synthetic_trace
from helios_sim.exits.guarantee import split
from helios_sim.exits.rule import DraftModel, OwnCard
from helios_sim.exits.store import read_trace, write_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import Deployment, KvRule, Placement
from helios_sim.policy.drafts import pass_time_apart, slowest_drafter
from helios_sim.policy.registry import make_policy, policy_config
from priced import priced_profile
from rig import Served, rows_of, serve, workload
from test_draft_model import HOST_S, LARGE, PROFILES, SMALL, step_s
from test_draft_pipeline import EXCHANGE_S, draft_s, verify_s

QUICK = "quick"  # the other drafter, of a layer
ALL = {**PROFILES, QUICK: priced_profile(QUICK, n_layers=1, layer_s=2e-4, row_s=1e-5, kv_token_s=1e-7, host_s=HOST_S)}


def joint(tokens: int = 4000, seed: int = 0) -> dict[str, ExitTrace]:
    """Each drafter is right where it says that it is sure, the more so the surer, whatever the other does."""
    rng = np.random.default_rng(seed)
    how = {"tokens": tokens, "chars_per_token": 1}
    traces = {name: synthetic_trace(name, (it.model.n_layers,), **how) for name, it in ALL.items()}
    sure = {name: rng.uniform(size=tokens).astype(np.float32).round(2) for name in (SMALL, QUICK)}
    right = {name: rng.uniform(size=tokens) < values for name, values in sure.items()}
    return traces | {LARGE: replace(traces[LARGE], drafters=right, drafters_sure=sure)}


def fusing(drafts: int, parts: int = 1, drafters: tuple[str, ...] = (SMALL, QUICK)) -> Deployment:
    rule = DraftModel(drafters[0], drafts, None, OwnCard(EXCHANGE_S, parts), drafters[1:])
    return Deployment(Placement(LARGE, 8), rule, kv_rule=KvRule.NONE)


def run(work, deployment, traces, **how) -> Served:
    return serve(work, deployment, ALL, traces, **how)


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0]), st.booleans()] * 3), min_size=1, max_size=20))
def test_of_each_token_the_draft_of_the_surest_counts(tokens: list[tuple[float | bool, ...]]) -> None:
    trace, names = synthetic_trace(LARGE, (8,), tokens=len(tokens), chars_per_token=1), ("a", "b", "c")
    sure = {name: np.array([each[2 * k] for each in tokens], np.float32) for k, name in enumerate(names)}
    right = {name: np.array([each[2 * k + 1] for each in tokens], np.bool_) for k, name in enumerate(names)}
    trace = replace(trace, drafters=right, drafters_sure=sure)
    for order in (names, names[::-1], names[:2]):
        found = []
        for t in range(len(tokens)):
            best = order[0]
            for name in order[1:]:
                if sure[name][t] > sure[best][t]:
                    best = name
            found.append(right[best][t])
        assert trace.drafted_by_all(order).tolist() == found
    assert (trace.drafted_by_all(("b",)) == right["b"]).all()


def test_where_models_know_how_sure_they_are_fused_drafts_are_better_than_either() -> None:
    """Right with probability equal to what it says: each alone 1/2, the surer of two 2/3."""
    trace = joint()[LARGE]
    alone = [float(trace.drafters[name].mean()) for name in (SMALL, QUICK)]
    assert alone == pytest.approx([0.5, 0.5], abs=0.02)
    assert trace.drafted_by_all((SMALL, QUICK)).mean() == pytest.approx(2 / 3, abs=0.02)


def test_a_joint_trace_is_kept_and_split(tmp_path) -> None:
    trace = joint(200)[LARGE]
    write_trace(trace, tmp_path / "t")
    found = read_trace(tmp_path / "t")
    both = SMALL, QUICK
    assert (found.drafted_by_all(both) == trace.drafted_by_all(both)).all()
    parts = split(replace(trace, prompt=np.arange(200, dtype=np.int32) // 10), 0.5, 0)
    assert sum(int(part.drafted_by_all(both).sum()) for part in parts) == trace.drafted_by_all(both).sum()
    for wrong in ({SMALL: np.full(200, 1.5, np.float32)}, {"other": np.zeros(200, np.float32)}):
        with pytest.raises(UserError, match="how sure"):
            replace(trace, drafters_sure=wrong)


@pytest.mark.parametrize("order", [(SMALL, QUICK), (QUICK, SMALL)])
def test_the_slowest_drafter_counts_and_each_draft_is_exchanged(order: tuple[str, ...]) -> None:
    """One request, token by token: a pass keeps drafts as long as the surest one of each was right."""
    traces, drafts, prompt, work = joint(seed=2), 3, 5, workload(1, 5, 40)
    served = run(work, fusing(drafts, drafters=order), traces)
    right, (rows,) = traces[LARGE].drafted_by_all(order), rows_of(work, traces[LARGE])
    left, context, unread, total_s, accepted = list(rows[1:]), prompt, 0, 0.0, 0
    while left:
        asked = min(drafts, len(left) - 1)
        steps = [step_s(SMALL, 1, context + k, 1, unread * (k == 1)) for k in range(1, asked + 1)]
        drafting_s = sum(steps) + HOST_S + asked * EXCHANGE_S + EXCHANGE_S if asked else 0.0
        total_s += drafting_s + verify_s(1, context, asked) + (EXCHANGE_S if asked else 0.0)
        taken = 0
        while taken < asked and right[left[taken]]:
            taken += 1
        unread = int(taken == asked) if asked else unread + 1
        left, context, accepted = left[taken + 1 :], context + taken + 1, accepted + taken
    record = served.records[0]
    assert record.last_token_ns - record.first_token_ns == pytest.approx(1e9 * total_s, abs=500)
    assert served.run.stats.accepted_drafts == accepted
    assert record.agreed_tokens == record.output_tokens == 40


def test_a_pass_of_fused_drafts_is_predicted() -> None:
    own = OwnCard(EXCHANGE_S, 2)
    assert slowest_drafter({name: ALL[name] for name in (QUICK, SMALL)}) == SMALL
    drafting_s = {n: draft_s(n, 9, 30) + 30 * EXCHANGE_S for n in (1, 2)}
    found = [pass_time_apart(ALL[LARGE], ALL[SMALL], 30, batch, 9, own, fused=True) for batch in (1, 4)]
    assert found[0] == pytest.approx(drafting_s[1] + verify_s(1, 9, 30) + 2 * EXCHANGE_S)
    assert found[1] == pytest.approx(2 * (max(drafting_s[2], verify_s(2, 9, 30)) + EXCHANGE_S))


def test_without_a_joint_trace_fusion_is_refused_or_stated() -> None:
    traces = joint(200)
    apart = {**traces, LARGE: replace(traces[LARGE], drafters_sure={})}
    with pytest.raises(UserError, match="joint trace"):
        run(workload(1, 5, 4), fusing(2), apart)
    stated = stated_exits(ALL[LARGE].model, (), (), drafted={f"{SMALL}+{QUICK}": 0.8})
    assert stated.drafted_by_all((SMALL, QUICK)).mean() == pytest.approx(0.8, abs=1e-3)
    with pytest.raises(UserError, match="joint trace"):
        stated.drafted_by_all((QUICK, SMALL, "other"))
    one_share = stated_exits(ALL[LARGE].model, (), (), drafted=0.8)
    with pytest.raises(UserError, match="joint trace"):
        one_share.drafted_by_all((SMALL, QUICK))


def test_each_card_is_paid() -> None:
    words = (
        "models=[opt-1.3b,opt-125m,opt-6.7b]", "exits.source=stated", "workload.n_requests=8", "policy=draft_model",
        "+exits.parameters.drafted={opt-1.3b+opt-125m: 0.8}", "policy.drafter=opt-1.3b", "policy.model=opt-6.7b",
        "policy.fused_with=[opt-125m]", "policy.drafter_on=pipelined", "policy.exchange_s=0.0001",
        "cost.usd_per_card_hour=2",
    )  # fmt: skip
    arm = list(simulate("quickstart", *words).arms.values())[-1].replicates[0]
    assert arm.metrics["usd_per_hour"] == 6.0
    assert arm.metrics["agreement"] == 1.0
    done, span_s = arm.metrics["requests_completed"], arm.metrics["span_s"]
    busy_s = (arm.stats.verify_ns + 2 * arm.stats.draft_ns) / 1e9
    assert arm.metrics["energy_wh_per_request"].high * 3600 * done == pytest.approx(3 * 50 * span_s + 350 * busy_s)


def test_what_may_be_asked_for() -> None:
    asked = {"drafter": SMALL, "drafter_on": "own", "exchange_s": 0.0, "fused_with": [QUICK]}
    served = run(workload(1, 5, 4), make_policy("draft_model", asked), joint())
    deployment = served.run.servers[0].decisions[0].deployment
    assert deployment.exit_rule.drafters == (SMALL, QUICK)
    known, good = served.run.servers[0]._replica.situation, fusing(2)
    assert fault_of(good, known) is None
    for text, rule in {
        "each once": replace(good.exit_rule, fused_with=(SMALL,)),
        "among": replace(good.exit_rule, fused_with=(LARGE,)),
    }.items():
        assert text in fault_of(replace(good, exit_rule=rule), known)[2]
    alone = replace(good, exit_rule=replace(good.exit_rule, own_card=None), standby=(Placement(SMALL, 3),))
    assert "only with own_card" in fault_of(alone, known)[2]
    for wrong, fix in {
        "with": "set both", "": "leave it out, or name another drafter", SMALL: "leave it out, or name another",
        f"{QUICK} {SMALL} {QUICK} more": rf"set policy\.fused_with=\[{QUICK},more\]",
    }.items():  # fmt: skip
        changed = {"fused_with": [QUICK]} if wrong == "with" else {**asked, "fused_with": wrong.split()}
        with pytest.raises(UserError, match=rf"policy\.fused_with.*{fix}"):
            policy_config("draft_model", changed)
    with pytest.raises(UserError, match=r"policy\.fused_with"):
        run(workload(1, 5, 4), make_policy("draft_model", {**asked, "fused_with": ["other"]}), joint())
