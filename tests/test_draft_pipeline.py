"""Drafts that are made on a card of their own, beside the verification of others: stages, memory, power and price."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise

import numpy as np
import pytest

from helios_sim import simulate
from helios_sim.errors import UserError
from helios_sim.exits.rule import DraftModel, OwnCard
from helios_sim.policy.answers import fault_of
from helios_sim.policy.deployment import AtTime, Deployment, KvRule, Placement, require_one_card
from helios_sim.policy.drafts import best_drafts_of, pass_time_apart, stage_time, tokens_per_pass
from helios_sim.policy.registry import make_policy, policy_config
from helios_sim.report.metrics import compute_metrics
from helios_sim.report.records import Records
from helios_sim.workload import AllAtOnce, Exponential
from rig import Scripted, full_depth, rows_of, workload
from test_draft_model import HOST_S, LARGE, OF, PROFILES, SMALL, drafted, drafting, run, step_s

EXCHANGE_S = 3e-4


def apart(drafts: int, parts: int = 2, largest_batch: int | None = None, **others) -> Deployment:
    rule = DraftModel(SMALL, drafts, largest_batch, OwnCard(EXCHANGE_S, parts))
    return Deployment(Placement(LARGE, 8), rule, kv_rule=KvRule.NONE, **others)


def draft_s(batch: int, context: int, drafts: int, unread: int = 0) -> float:
    """A stage of drafting on the card of its own: a step for each draft, and its host once."""
    steps = (step_s(SMALL, batch, batch * (context + k), 1, unread * (k == 1)) for k in range(1, drafts + 1))
    return sum(steps) + HOST_S * (drafts > 0)


def verify_s(batch: int, context: int, drafts: int) -> float:
    return step_s(LARGE, batch, batch * (context + drafts + 1), 1, more=batch * drafts) + HOST_S


@pytest.mark.parametrize("parts", [1, 2])
def test_a_single_request_waits_for_both_cards_in_turn(parts: int) -> None:
    """Nothing can be pipelined: drafts, exchange, verification, exchange."""
    drafts, passes, prompt = 3, 4, 5
    served = run(workload(1, prompt, 1 + passes * (drafts + 1)), apart(drafts, parts), drafted(1.0))
    total_s, context = 0.0, prompt
    for n in range(passes):
        total_s += draft_s(1, context, drafts, unread=int(n > 0)) + verify_s(1, context, drafts) + 2 * EXCHANGE_S
        context += drafts + 1
    record, stats = served.records[0], served.run.stats
    assert record.last_token_ns - record.first_token_ns == pytest.approx(1e9 * total_s, abs=90)
    assert (stats.verifications, stats.accepted_drafts) == (passes, passes * drafts)
    assert record.agreed_tokens == record.output_tokens


@pytest.mark.parametrize("drafts", [2, 40])
def test_in_steady_state_a_stage_takes_the_slower_card(drafts: int) -> None:
    """Two halves of a batch of four, all drafts accepted: each stage max(draft, verify) and the exchange; verification
    is the longer one with 2 drafts, drafting with 40."""
    passes, prompt = 3, 5
    served = run(workload(4, prompt, 1 + passes * (drafts + 1)), apart(drafts), drafted(1.0), max_batch_tokens=256)
    began_ns = served.records[0].first_token_ns
    drafting_s = [draft_s(2, prompt + n * (drafts + 1), drafts, unread=2 * (n > 0)) for n in range(passes)]
    verifying_s = [verify_s(2, prompt + n * (drafts + 1), drafts) for n in range(passes)]
    assert (drafting_s[1] > verifying_s[1]) == (drafts == 40)
    stages_s = [drafting_s[0]]
    for n in range(passes):  # the first half is verified while the second drafts, and the other way round
        stages_s.append(max(verifying_s[n], drafting_s[n]))
        stages_s.append(max(verifying_s[n], drafting_s[n + 1] if n + 1 < passes else 0.0))
    by_half = [served.by_request()[:2], served.by_request()[2:]]
    total_s = sum(stages_s) + len(stages_s) * EXCHANGE_S
    assert by_half[1][1].last_token_ns - began_ns == pytest.approx(1e9 * total_s, abs=200)
    first_s = total_s - stages_s[-1] - EXCHANGE_S
    assert {r.last_token_ns for r in by_half[0]} == {by_half[0][0].last_token_ns}
    assert by_half[0][0].last_token_ns - began_ns == pytest.approx(1e9 * first_s, abs=200)


@pytest.mark.parametrize("batch", [1, 2, 5, 6])
@pytest.mark.parametrize("parts", [1, 2])
def test_what_a_pass_takes_is_predicted(batch: int, parts: int) -> None:
    own, both, drafts = OwnCard(EXCHANGE_S, parts), (PROFILES[LARGE], PROFILES[SMALL]), 3
    found = stage_time(*both, drafts, batch, 20)
    assert (found.draft_s, found.verify_s) == (
        pytest.approx(draft_s(batch, 20, drafts)), pytest.approx(verify_s(batch, 20, drafts)),
    )  # fmt: skip
    more, fewer = (batch + 1) // 2, batch // 2
    stages_s = max(draft_s(more, 20, drafts), verify_s(fewer, 20, drafts))
    stages_s += max(draft_s(fewer, 20, drafts), verify_s(more, 20, drafts))
    if batch == 1 or parts == 1:
        stages_s = draft_s(batch, 20, drafts) + verify_s(batch, 20, drafts)
    assert pass_time_apart(*both, drafts, batch, 20, own) == pytest.approx(stages_s + 2 * EXCHANGE_S)
    rates = [tokens_per_pass(0.8, k) / pass_time_apart(*both, k, batch, 20, own) for k in range(9)]
    assert best_drafts_of(*both, 0.8, 8, batch, 20, own) == int(np.argmax(rates))


@pytest.mark.parametrize("largest_batch", [None, 2])
@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("parts", [1, 2])
def test_token_by_token_it_is_the_reference(share: float, largest_batch: int | None, parts: int) -> None:
    traces, drafts = drafted(share, seed=3), 3
    work = workload(5, 7, Exponential(30), AllAtOnce())
    served = run(work, apart(drafts, parts, largest_batch), traces)
    agrees, rows = traces[LARGE].drafters[SMALL], rows_of(work, traces[LARGE])
    records = served.by_request()
    now_ns = records[0].first_token_ns
    left = {n: each[1:] for n, each in enumerate(rows)}
    context, unread, last_ns = dict.fromkeys(left, 7), dict.fromkeys(left, 0), dict.fromkeys(left, now_ns)
    line, ready = [n for n in left if left[n]], {}  # who waits for drafts, by how long; how many drafts are there
    while line or ready:
        most = 0 if largest_batch is not None and len(line) + len(ready) > largest_batch else drafts
        ready |= {n: 0 for n in line if min(most, len(left[n]) - 1) == 0}
        line = [n for n in line if n not in ready]
        at = line[: -(-(len(line) + len(ready)) // parts)]
        asked = {n: min(most, len(left[n]) - 1) for n in at}
        draft_ns = 0
        for k in range(1, max(asked.values(), default=0) + 1):
            who = [n for n in at if asked[n] >= k]
            more = sum(unread[n] for n in who) if k == 1 else 0
            step = step_s(SMALL, len(who), sum(context[n] + k for n in who), 1, more) + HOST_S * (k == 1)
            draft_ns += round(1e9 * step)
        verify_ns = 0
        if ready:
            kv_tokens = sum(context[n] + ready[n] + 1 for n in ready)
            verify_ns = round(1e9 * (step_s(LARGE, len(ready), kv_tokens, 1, sum(ready.values())) + HOST_S))
        now_ns += max(draft_ns, verify_ns) + round(1e9 * EXCHANGE_S) * (bool(at) or any(ready.values()))
        for n, many in ready.items():
            taken = 0
            while taken < many and agrees[left[n][taken]]:
                taken += 1
            unread[n] = unread[n] + 1 if many == 0 else int(taken == many)
            left[n], context[n], last_ns[n] = left[n][taken + 1 :], context[n] + taken + 1, now_ns
        line, ready = [*(n for n in ready if left[n]), *(n for n in line if n not in asked)], asked
    slack = 6 * sum(map(len, rows))  # sums in another order may round to another nanosecond
    for record in records:
        assert record.last_token_ns == pytest.approx(last_ns[record.request_id], abs=slack)
        assert record.agreed_tokens == record.output_tokens


@pytest.mark.slow
def test_compiled_and_interpreted_are_the_same_to_the_bit() -> None:
    work = workload(30, Exponential(30), Exponential(25), AllAtOnce())
    how = {"max_running_requests": 5, "max_batch_tokens": 16, "hbm_bytes": 6000, "utilisation": 1.0}
    each = [run(work, apart(3, 2, 4), drafted(0.7), compiled=code, **how) for code in (False, True)]
    assert each[0].by_request() == each[1].by_request()
    assert asdict(each[0].run.stats) == asdict(each[1].run.stats)
    assert each[0].run.stats.preemptions > 0


def test_prompts_run_on_both_cards_at_once() -> None:
    """The larger model's prompt takes longer than the smaller one's, which costs nothing beside it but the exchange."""
    both, alone = (run(workload(1, 40, 1), d, drafted(0.5)) for d in (apart(2), full_depth(LARGE, 8)))
    assert both.run.end_ns - alone.run.end_ns == pytest.approx(1e9 * EXCHANGE_S, abs=3)
    c = OF[SMALL]
    own_s = c["n_layers"] * (c["layer_s"] + 39 * c["row_s"] + 40 * c["prefill_token_s"]) + HOST_S
    assert both.run.stats.draft_ns == pytest.approx(1e9 * own_s, abs=3)
    assert both.run.stats.verify_ns == alone.run.stats.busy_ns


def test_the_verifiers_card_holds_no_drafter_and_both_limit_the_batch() -> None:
    """A token's K and V take 4 bytes of a layer."""
    blocks: list[int] = []
    seen = {"watch": lambda server: blocks.append(int(server._replica.state.total_blocks))}
    held = PROFILES[LARGE].weight_bytes(8)
    rig = {"hbm_bytes": held + 1000, "utilisation": 1.0, "block_tokens": 1, "max_running_requests": 4}
    run(workload(1, 5, 9), apart(2), drafted(0.5), **seen, **rig)
    assert set(blocks) == {1000 // (4 * 8)}
    blocks.clear()
    small_held = PROFILES[SMALL].weight_bytes(3)
    more = {LARGE: replace(PROFILES[LARGE], activation_reserve_bytes=0), SMALL: replace(
        PROFILES[SMALL], activation_reserve_bytes=held + 1000 - small_held - 12 * 35)}  # fmt: skip
    run(workload(1, 5, 9), apart(2), drafted(0.5), profiles=more, **seen, **rig)
    assert set(blocks) == {35 - 4 * 3}  # without what four requests may have drafted beside


@pytest.mark.parametrize("parts", [1, 2])
def test_stages_of_many_requests_that_come_and_go_add_up(parts: int) -> None:
    """Lossless whatever the memory; every iteration lasts at least as long as each of its two stages."""
    work = workload(40, Exponential(30), Exponential(25))
    how = {"max_running_requests": 6, "max_batch_tokens": 32, "block_tokens": 4, "hbm_bytes": 9000, "utilisation": 1.0}
    served = run(work, apart(3, parts), drafted(0.7), **how)
    stats, plain = served.run.stats, run(work, full_depth(LARGE, 8), drafted(0.7))
    assert [r.output_tokens for r in served.by_request()] == [r.output_tokens for r in plain.by_request()]
    assert all(r.agreed_tokens == r.output_tokens for r in served.records if r.preemptions == 0)
    assert max(stats.draft_ns, stats.verify_ns) <= stats.busy_ns <= stats.draft_ns + stats.verify_ns + round(
        1e9 * EXCHANGE_S * stats.iterations
    )
    assert stats.draft_floor_ns <= stats.draft_ns
    assert stats.floor_ns <= stats.verify_ns
    found = compute_metrics(Records.of(served.records), stats)
    assert found["drafting_fraction"] == stats.draft_ns / stats.busy_ns
    assert found["verifying_fraction"] == stats.verify_ns / stats.busy_ns
    if parts == 1:
        return
    rounds = sorted({r.last_token_ns for r in served.records})
    assert all(later > earlier for earlier, later in pairwise(rounds))


def test_a_change_of_card_computes_texts_again_and_another_number_of_drafts_costs_nothing() -> None:
    then = [apart(3, triggers=(AtTime(200_000_000),)), apart(1, triggers=(AtTime(400_000_000),)), drafting(2)]
    first = drafting(2, triggers=(AtTime(50_000_000),))
    served = run(workload(3, 5, 60), Scripted(first, list(then)), drafted(0.5))
    assert served.run.stats.preemptions == 6
    assert all(r.output_tokens == 60 for r in served.records)
    plain = replace(full_depth(LARGE, 8))
    served = run(workload(3, 5, 60), Scripted(then[0], [plain]), drafted(0.5))
    assert served.run.stats.preemptions == 0
    assert {d.held for d in served.run.servers[0]._replica.requests if d.generated} <= {0}


def test_two_cards_are_paid_and_draw(tmp_path) -> None:
    """Two sets of cards an hour; idle power of both over the span; what each does beyond it by its own time."""
    one = ("exits.source=stated", "+exits.parameters.drafted=0.7", "policy=draft_model")
    more = ("policy.drafter=opt-1.3b", "policy.model=opt-6.7b", "cost.usd_per_card_hour=2", "workload.n_requests=12")
    paid = {}
    for on in ((), ("policy.drafter_on=pipelined", "policy.exchange_s=0.0001")):
        result = simulate("quickstart", *one, *more, *on)
        arm = list(result.arms.values())[-1]
        paid[bool(on)] = arm.replicates[0]
    pair, single = paid[True], paid[False]
    assert (single.metrics["usd_per_hour"], pair.metrics["usd_per_hour"]) == (2.0, 4.0)
    assert (single.metrics["replicas_on_mean"], pair.metrics["replicas_on_mean"]) == (1, 1)
    assert pair.metrics["busy_fraction"] <= 1
    assert [a.change for a in result.assumptions].count("policy.exchange_s") == 1
    stats, span_s = pair.stats, pair.metrics["span_s"]
    card = next(p for name, p in result.inputs.items() if name.startswith("profile"))
    assert card is not None
    joules = pair.metrics["energy_wh_per_request"].high * 3600 * pair.metrics["requests_completed"]
    idle_w, tdp_w = 50.0, 400.0
    busy_s = (stats.draft_ns + stats.verify_ns) / 1e9
    assert joules == pytest.approx(2 * idle_w * span_s + (tdp_w - idle_w) * busy_s)


def test_what_may_be_asked_for() -> None:
    policy = make_policy("draft_model", {"draft_tokens": 2, "drafter_on": "pipelined", "exchange_s": 0.0})
    served = run(workload(1, 5, 4), policy, drafted(0.5))
    deployment = served.run.servers[0].decisions[0].deployment
    assert (deployment.exit_rule, deployment.standby) == (DraftModel(SMALL, 2, None, OwnCard(0.0, 2)), ())
    assert make_policy("draft_model", {"drafter_on": "own", "exchange_s": 1}).parameters.own_card == OwnCard(1.0, 1)
    known, good = served.run.servers[0]._replica.situation, apart(2)
    assert fault_of(good, known) is None
    for text, own in (("exchange_s", OwnCard(-1.0)), ("1 or 2 parts", OwnCard(0.0, 3)), ("OwnCard", 0.1)):
        field, _, allowed = fault_of(replace(good, exit_rule=replace(good.exit_rule, own_card=own)), known)
        assert (field, text in allowed) == ("exit_rule", True), allowed
    _, _, allowed = fault_of(replace(good, standby=(Placement(SMALL, 3),)), known)
    assert "on its own card" in allowed
    for parts, value in ((1, "own"), (2, "pipelined")):
        with pytest.raises(UserError, match=f"drafter_on='{value}': .*a server has one card.*exchange_s out"):
            require_one_card(replace(good.exit_rule, own_card=OwnCard(0.0, parts)))
    require_one_card(DraftModel(SMALL, 2))
    for settings in ({"drafter_on": "pipelined"}, {"exchange_s": 0.1}, {"drafter_on": "own", "exchange_s": -1}):
        with pytest.raises(UserError, match=r"policy\.exchange_s"):
            policy_config("draft_model", settings)
    with pytest.raises(UserError, match=r"policy\.drafter_on"):
        policy_config("draft_model", {"drafter_on": "moon", "exchange_s": 0})
