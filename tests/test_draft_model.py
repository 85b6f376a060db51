"""A model that drafts for another one: what a pass takes and yields, memory of both, and a reference token by token."""

from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest

from helios_sim.errors import UserError
from helios_sim.exits.artificial import stated_exits, synthetic_trace
from helios_sim.exits.rule import DraftModel
from helios_sim.exits.store import read_trace, write_trace
from helios_sim.exits.trace import ANY_DRAFTER, ExitTrace
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import AtTime, Completed, Deployment, KvRule, Placement
from helios_sim.policy.drafts import best_drafts_of, pass_time_with, tokens_per_pass
from helios_sim.policy.registry import make_policy, policy_config
from helios_sim.report.metrics import OF_DRAFTS, compute_metrics
from helios_sim.report.records import Records
from helios_sim.workload import AllAtOnce, Exponential
from priced import priced_profile
from rig import Scripted, Served, full_depth, rows_of, serve, workload

LARGE, SMALL = "large", "small"
OF = {  # layers and seconds of each model
    LARGE: {"n_layers": 8, "layer_s": 2e-3, "row_s": 4e-5, "kv_token_s": 1e-6, "prefill_token_s": 2e-6, "head_s": 9e-4},
    SMALL: {"n_layers": 3, "layer_s": 3e-4, "row_s": 1e-5, "kv_token_s": 4e-7, "prefill_token_s": 1e-6, "head_s": 2e-4},
}
HOST_S = 5e-4
PROFILES = {name: priced_profile(name, host_s=HOST_S, **of) for name, of in OF.items()}


def drafted(share: float, tokens: int = 4000, seed: int = 0) -> dict[str, ExitTrace]:
    """The small model predicts this share of the large one's tokens, each whatever the others are."""
    rng = np.random.default_rng(seed)
    how = {"tokens": tokens, "chars_per_token": 1}
    traces = {name: synthetic_trace(name, (2, of["n_layers"]), **how) for name, of in OF.items()}
    return traces | {LARGE: replace(traces[LARGE], drafters={SMALL: rng.uniform(size=tokens) < share})}


def drafting(drafts: int, largest_batch: int | None = None, **others) -> Deployment:
    return Deployment(
        Placement(LARGE, 8), DraftModel(SMALL, drafts, largest_batch), standby=(Placement(SMALL, 3),),
        kv_rule=KvRule.NONE, **others,
    )  # fmt: skip


def run(work, deployment, traces, **how) -> Served:
    return serve(work, deployment, how.pop("profiles", PROFILES), traces, **how)


def step_s(name: str, rows: int, kv_tokens: int, heads: int, more: int = 0) -> float:
    """One iteration of a model's decodes, without the host."""
    c = OF[name]
    layer_s = c["layer_s"] + (rows + more - 1) * c["row_s"] + kv_tokens * c["kv_token_s"]
    return c["n_layers"] * layer_s + c["head_s"] * (heads > 0)


@pytest.mark.parametrize("drafts", [1, 3])
def test_a_pass_takes_the_drafters_steps_and_one_verification(drafts: int) -> None:
    """All drafts are accepted: each pass yields one token more. With its first draft of the next pass the drafter also
    reads the last one, a row more."""
    passes, prompt = 4, 5
    served = run(workload(1, prompt, 1 + passes * (drafts + 1)), drafting(drafts), drafted(1.0))
    record, total_s, context = served.records[0], 0.0, prompt
    for n in range(passes):
        for k in range(1, drafts + 1):
            total_s += step_s(SMALL, 1, context + k, 1, more=int(k == 1 and n > 0))
        total_s += step_s(LARGE, 1, context + drafts + 1, 1, more=drafts) + HOST_S
        context += drafts + 1
    assert record.last_token_ns - record.first_token_ns == pytest.approx(1e9 * total_s, abs=60)
    stats = served.run.stats
    assert (stats.verifications, stats.drafted_tokens) == (passes, passes * drafts)
    assert stats.accepted_drafts == stats.drafted_tokens
    assert record.layers_run == 8 * record.output_tokens
    assert record.agreed_tokens == record.output_tokens


def test_a_prompt_runs_through_both_models() -> None:
    prompt = 40
    both, alone = (run(workload(1, prompt, 1), d, drafted(0.5)) for d in (drafting(2), full_depth(LARGE, 8)))
    c = OF[SMALL]
    own_s = c["n_layers"] * (c["layer_s"] + (prompt - 1) * c["row_s"] + prompt * c["prefill_token_s"])
    assert both.run.end_ns - alone.run.end_ns == pytest.approx(1e9 * own_s, abs=5)


@pytest.mark.parametrize(("share", "drafts"), [(0.8, 2), (0.8, 5), (0.4, 3)])
def test_tokens_of_a_pass_are_those_of_the_closed_form(share: float, drafts: int) -> None:
    """(1 - a^(K+1)) / (1 - a) with the recorded share; runs of the trace differ from independence by chance."""
    traces = drafted(share)
    served = run(workload(4, 5, 3000), drafting(drafts), traces)
    found = compute_metrics(Records.of(served.records), served.run.stats)
    exact = traces[LARGE].drafters[SMALL].mean()
    assert 1 + found[OF_DRAFTS[0]] == pytest.approx(tokens_per_pass(float(exact), drafts), rel=0.03)


@pytest.mark.parametrize("largest_batch", [None, 2])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_token_by_token_it_is_the_reference(share: float, largest_batch: int | None) -> None:
    """Requests that are all there at once. Where more decode than may draft, the drafter reads the tokens later."""
    traces, drafts = drafted(share, seed=3), 3
    work = workload(4, 7, Exponential(30), AllAtOnce())
    served = run(work, drafting(drafts, largest_batch), traces)
    agrees, rows = traces[LARGE].drafters[SMALL], rows_of(work, traces[LARGE])
    records = served.by_request()
    now_ns = records[0].first_token_ns
    left = {n: each[1:] for n, each in enumerate(rows)}
    context, unread, last_ns = dict.fromkeys(left, 7), dict.fromkeys(left, 0), dict.fromkeys(left, now_ns)
    while running := [n for n in left if left[n]]:
        most = 0 if largest_batch is not None and len(running) > largest_batch else drafts
        asked = {n: min(most, len(left[n]) - 1) for n in running}
        total_ns = 0
        for k in range(1, max(asked.values()) + 1):
            at = [n for n in running if asked[n] >= k]
            more = sum(unread[n] for n in at) if k == 1 else 0
            total_ns += round(1e9 * step_s(SMALL, len(at), sum(context[n] + k for n in at), 1, more))
        kv_tokens = sum(context[n] + asked[n] + 1 for n in running)
        total_ns += round(1e9 * (step_s(LARGE, len(running), kv_tokens, 1, sum(asked.values())) + HOST_S))
        now_ns += total_ns
        for n in running:
            taken = 0
            while taken < asked[n] and agrees[left[n][taken]]:
                taken += 1
            unread[n] = unread[n] + 1 if asked[n] == 0 else int(taken == asked[n])
            left[n], context[n], last_ns[n] = left[n][taken + 1 :], context[n] + taken + 1, now_ns
    slack = 4 * sum(map(len, rows))  # sums in another order may round to another nanosecond
    for record in records:
        assert record.last_token_ns == pytest.approx(last_ns[record.request_id], abs=slack)
    assert served.run.stats.preemptions == 0


@pytest.mark.slow
def test_compiled_and_interpreted_are_the_same_to_the_bit() -> None:
    work = workload(30, Exponential(30), Exponential(25), AllAtOnce())
    how = {"max_running_requests": 5, "max_batch_tokens": 16, "hbm_bytes": 6000, "utilisation": 1.0}
    each = [run(work, drafting(3, 4), drafted(0.7), compiled=code, **how) for code in (False, True)]
    assert each[0].by_request() == each[1].by_request()
    assert asdict(each[0].run.stats) == asdict(each[1].run.stats)
    assert each[0].run.stats.preemptions > 0


def test_both_models_and_their_caches_are_in_memory() -> None:
    """A token's K and V take 4 bytes of a layer, of 8 layers and of 3."""
    held = PROFILES[LARGE].weight_bytes(8) + PROFILES[SMALL].weight_bytes(3)
    blocks: list[int] = []
    rig = {"hbm_bytes": held + 1000, "utilisation": 1.0, "block_tokens": 1}
    seen = {"watch": lambda server: blocks.append(int(server._replica.state.total_blocks))}
    run(workload(1, 5, 9), drafting(2), drafted(0.5), **seen, **rig)
    assert set(blocks) == {1000 // (4 * (8 + 3))}
    with pytest.raises(UserError, match="one KV block"):
        run(workload(1, 1, 1), drafting(2), drafted(0.5), **{**rig, "hbm_bytes": held + 43})


def test_who_begins_to_draft_computes_texts_in_flight() -> None:
    """The large model's text is computed again with it. To draft another number of tokens costs nothing."""
    plain = replace(full_depth(LARGE, 8), triggers=(AtTime(0),))
    then = [drafting(3, triggers=(AtTime(200_000_000),)), drafting(1)]
    served = run(workload(1, 5, 60), Scripted(plain, list(then)), drafted(0.5))
    stats = served.run.stats
    assert (stats.preemptions, stats.loads, stats.switches) == (1, 1, 0)
    assert stats.load_ns == round(PROFILES[SMALL].load_time_s(PROFILES[SMALL].weight_bytes(3)) * 1e9)
    assert stats.accepted_drafts > 0


def test_what_is_recorded_of_a_drafter_is_kept_and_stated_ones_have_their_share(tmp_path) -> None:
    trace = drafted(0.6, tokens=200)[LARGE]
    write_trace(trace, tmp_path / "t")
    assert (read_trace(tmp_path / "t").drafted_by(SMALL) == trace.drafters[SMALL]).all()
    with pytest.raises(UserError, match="models whose drafts were recorded: small"):
        trace.drafted_by("other")
    stated = stated_exits(PROFILES[LARGE].model, (), (), drafted=0.7)
    assert stated.drafted_by("whichever").mean() == pytest.approx(0.7, abs=1e-3)
    assert (stated.exits, list(stated.drafters)) == ((8,), [ANY_DRAFTER])
    for wrong in (1.5, True, "0.7", {"a": {"x": 0.1}, "b": {"y": 0.1}}, {"a": {}}, {"a": 1.2}):
        with pytest.raises(UserError, match="drafted"):
            stated_exits(PROFILES[LARGE].model, (), (), drafted=wrong)
    with pytest.raises(UserError, match=r"exits\.parameters=\[\]: layers and unchanged missing.*drafted=0\.7"):
        stated_exits(PROFILES[LARGE].model, (), ())


def test_shares_may_be_stated_by_drafter_and_task() -> None:
    shares = {"coder": {"code": 0.8, "prose": 0.3}, "writer": 0.5}
    stated = stated_exits(PROFILES[LARGE].model, (2,), (0.4,), drafted=shares)
    assert (stated.tasks, list(stated.drafters)) == (("code", "prose"), ["coder", "writer"])
    bound = stated.bind(("prose", "code"))
    spans = [bound.locate(task, 70, 500) for task in (0, 1)]
    many = bound.locate_many(np.array([0, 1]), np.array([70, 70]), np.array([500, 500]))
    assert [tuple(row) for row in many.tolist()] == [(s.first, s.start, s.length, s.n_tokens) for s in spans]
    for name, span in zip(("prose", "code"), spans, strict=True):
        rows = slice(span.first, span.first + span.length)
        assert stated.drafters["coder"][rows].mean() == pytest.approx(shares["coder"][name], abs=1e-3)
        assert stated.drafters["writer"][rows].mean() == pytest.approx(0.5, abs=1e-3)
        assert stated.agree[rows, 0].mean() == pytest.approx(0.4, abs=1e-3)
        assert stated.tasks[stated.task[span.first]] == name
    with pytest.raises(UserError, match=r"workload\.mix\.tasks.*code, prose"):
        stated.bind(("sums",))
    with pytest.raises(UserError, match="models whose drafts were recorded: coder, writer"):
        stated.drafted_by("nobody")


@pytest.mark.parametrize("batch", [1, 3])
def test_a_pass_is_predicted_as_it_is_served(batch: int) -> None:
    """All drafts are accepted, and in its first pass the drafter has read everything."""
    drafts, prompt = 3, 6
    own_s = sum(step_s(SMALL, batch, batch * (prompt + k), 1) for k in range(1, drafts + 1))
    verify_s = step_s(LARGE, batch, batch * (prompt + drafts + 1), 1, more=batch * drafts) + HOST_S
    found = pass_time_with(PROFILES[LARGE], PROFILES[SMALL], drafts, batch, prompt)
    assert (found.draft_s, found.verify_s) == (pytest.approx(own_s), pytest.approx(verify_s))
    served = run(workload(batch, prompt, 1 + drafts + 1), drafting(drafts), drafted(1.0), max_batch_tokens=64)
    for record in served.records:
        assert record.last_token_ns - record.first_token_ns == pytest.approx(1e9 * found.total_s, abs=9)
    plain = pass_time_with(PROFILES[LARGE], PROFILES[SMALL], 0, batch, prompt)
    assert plain.total_s == pytest.approx(step_s(LARGE, batch, batch * (prompt + 1), 1) + HOST_S)


def test_the_number_of_drafts_is_the_best_of_the_closed_form() -> None:
    both = PROFILES[LARGE], PROFILES[SMALL]
    for share in (0.0, 0.3, 0.6, 0.9, 1.0):
        rates = [tokens_per_pass(share, k) / pass_time_with(*both, k, 2, 30).total_s for k in range(7)]
        assert best_drafts_of(*both, share, 6, 2, 30) == int(np.argmax(rates))
    assert best_drafts_of(*both, 0.0, 6, 2, 30) == 0
    assert best_drafts_of(*both, 1.0, 6, 2, 30) == 6


def test_drafts_follow_what_is_accepted() -> None:
    """Full acceptance keeps the most; where no draft is right none is made, but for one that listens now and then."""
    settings = {"draft_tokens": 5, "review_requests": 4}
    for share, last in ((1.0, {5}), (0.0, {0, 1})):
        served = run(workload(60, 5, 20), make_policy("draft_model", settings), drafted(share), max_running_requests=2)
        rules = [d.deployment.exit_rule.draft_tokens for d in served.run.servers[0].decisions]
        assert rules[0] == 5
        assert set(rules[1:]) | {rules[-1]} == last
        assert served.run.stats.preemptions == 0
    assert served.run.servers[0].decisions[0].deployment.triggers == (Completed(4),)
    with pytest.raises(UserError, match=r"policy\.review_requests"):
        policy_config("draft_model", {"review_requests": 0})


def test_what_may_be_asked_for() -> None:
    served = run(workload(1, 5, 4), make_policy("draft_model", {"draft_tokens": 2}), drafted(0.5))
    assert served.run.servers[0].decisions[0].deployment.exit_rule == DraftModel(SMALL, 2)
    known = served.run.servers[0]._replica.situation
    assert fault_of(drafting(2), known) is None
    good = drafting(2)
    wrong = {
        "standby": replace(good, standby=()), "another model": replace(good, exit_rule=DraftModel(LARGE, 2)),
        "draft_tokens": drafting(-1), "largest_batch": drafting(2, -1), "all 8 layers": replace(good, run_layers=2),
        "at most the 3 layers": Deployment(
            Placement(SMALL, 3), DraftModel(LARGE, 2), standby=(Placement(LARGE, 8),), kv_rule=KvRule.NONE
        ),
    }  # fmt: skip
    for text, deployment in wrong.items():
        field, _, allowed = fault_of(deployment, known)
        assert (field, text in allowed) == ("exit_rule", True), allowed
    with pytest.raises(UserError, match="no tokens are observed"):
        drafting(2, observe_tokens=3)
    for settings, text in (({"drafter": LARGE}, r"policy\.drafter"), ({"model": SMALL}, r"policy\.drafter")):
        with pytest.raises(UserError, match=text):
            run(workload(1, 5, 4), make_policy("draft_model", settings), drafted(0.5))
    with pytest.raises(UserError, match="two models"):
        run(workload(1, 5, 4), make_policy("draft_model"), None, profiles={LARGE: PROFILES[LARGE]})
    with pytest.raises(UserError, match="draft_tokens"):
        policy_config("draft_model", {"draft_tokens": 0})
    with pytest.raises(UserError, match="enable_prefix_caching"):
        run(workload(1, 5, 4), drafting(2), drafted(0.5), shares=True)
