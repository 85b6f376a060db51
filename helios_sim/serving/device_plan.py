"""Translates between the loop's records and a device: the plan of an iteration, and its outcome."""

from __future__ import annotations

from collections.abc import Sequence

from helios_sim.core.layout import Record
from helios_sim.exits.rule import PerToken
from helios_sim.exits.schedule import schedule_of
from helios_sim.exits.trace import TokenSpan
from helios_sim.serving.iteration import Member, Plan, PrefillPart, Token
from helios_sim.serving.replica import Replica


def plan_of(replica: Replica, loading: bool) -> Plan:
    """The scheduled iteration as a plan for a device."""
    s, it, deployment = replica.state, replica.iteration, replica.deployment
    slots = [int(slot) for slot in replica.lists.batch[: int(s.running)]]
    place = {slot: index for index, slot in enumerate(slots)}
    chunks = [replica.chunks[p] for p in range(int(it.chunks))]
    return Plan(
        model=deployment.active.model,
        loaded_layers=deployment.active.layers,
        run_layers=replica.run_layers,
        exit_rule=deployment.exit_rule,
        batching=deployment.batching,
        kv_rule=deployment.kv_rule,
        members=tuple(_member(replica, replica.requests[slot]) for slot in slots),
        decoding=int(it.decodes),
        prefill=tuple(
            PrefillPart(place[int(c.slot)], int(c.tokens), int(c.context_tokens), finishes=p < it.finishing)
            for p, c in enumerate(chunks)
        ),
        observe_tokens=deployment.observe_tokens,
        service_plan=deployment.plan,
        host_ahead=bool(replica.rules.ahead),
        loading=loading,
        drafts=int(it.drafts),
        regrouping=deployment.regrouping,
        first_band=int(it.first_band),
        resident_layers=deployment.active.resident_layers,
        waiting=int(s.decoding - it.decodes) if replica.rules.regroups and it.decodes else 0,
    )


def note_outcome(replica: Replica, decoded: Sequence[Token], prefilled: Sequence[Token]) -> None:
    """Write the outcome of each token into the loop's records, before the iteration is committed.

    Whether a token that left early agrees with full depth is not known while serving, unless it ran on; it is scored
    afterwards.
    """
    it = replica.iteration
    slots = [int(slot) for slot in replica.lists.batch[: int(it.decodes)]]
    slots += [int(replica.chunks[p].slot) for p in range(int(it.finishing))]
    limit, rule = replica.deployment.observe_tokens, replica.deployment.exit_rule
    exits = replica.situation.candidates[replica.deployment.active.model].offline.exits
    schedule = schedule_of(exits, rule) if isinstance(rule, PerToken) and rule.near is not None else None
    it.alike, it.splits = 0, int(any(token.held for token in decoded))
    for place, (slot, token) in enumerate(zip(slots, (*decoded, *prefilled), strict=True)):
        request = replica.requests[slot]
        request.token_layers, request.token_breach = token.layers, int(token.breach)
        request.token_agrees, request.token_microbits = int(token.agrees), 0
        request.token_exit = exits.index(token.ramp) if token.ramp else replica.rules.rule_exit
        request.earlier_ns = token.earlier_ns
        request.drafted, request.accepted = token.drafted, token.accepted
        request.held = token.held
        request.observed = int(limit is not None and request.generated < limit)
        if schedule is not None and place < it.decodes and not request.observed:
            request.recent = schedule.remembered(int(request.recent), exits.index(token.layers))
        if token.last:
            request.remaining = 1 + token.accepted
            request.output_tokens = request.generated + request.remaining


def _member(replica: Replica, row: Record) -> Member:
    span = TokenSpan(int(row.trace_first), int(row.trace_start), int(row.trace_length), int(row.output_tokens))
    return Member(
        replica.request_of(row), replica.models[int(row.model)], int(row.prompt_tokens), int(row.output_tokens), span,
        int(row.generated), int(row.context_tokens), int(row.recent), int(row.held),
    )  # fmt: skip
