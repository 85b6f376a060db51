"""Random designs under random faults: what must hold of each, and that every way to run it gives the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict
from typing import Any

from helios_sim.request import Status
from helios_sim.workload.faults import FaultKind, FaultPlan, FaultSpec
from rig import Served, serve
from serving_cases import Choose

MS = 1_000_000
STEPS: tuple[dict[str, bool], ...] = ({"stepwise": True}, {"stepwise": False})
ALL_WAYS: tuple[dict[str, bool], ...] = (*STEPS, {"compiled": True})


def choose_plan(choose: Choose, seed: int) -> FaultPlan:
    """Each kind or none of it, at times that meet runs of a second or less, some of them ties, and at a rate."""
    specs = []
    for kind in FaultKind:
        if choose([False, True]):
            times = {choose(range(1, 400)) * MS // choose([1, 1, 3]) for _ in range(choose(range(1, 6)))}
            specs.append(
                FaultSpec(
                    kind,
                    at_ns=tuple(sorted(times)),
                    rate_per_hour=choose([None, 18_000.0, 108_000.0]),
                    replicas=choose([None, (0,)]),
                    lasts_ns=choose([3, 40, 200]) * MS + choose([0, 12_345]),
                    factor=choose([1.5, 3.0]),
                )
            )
    return FaultPlan(tuple(specs), choose([0, 1, 3]), seed)


def checked(arguments: dict[str, Any], plan: FaultPlan, ways: Sequence[dict[str, bool]] = STEPS) -> Served:
    """Serves a design of `serving_cases.choose_case` in each way. AssertionError where a request or a bit is lost."""
    runs = [serve(**deepcopy(arguments), **way, faults=plan) for way in ways]
    first = runs[0]
    check_accounts(first)
    expected = signature(first)
    for way, other in zip(ways[1:], runs[1:], strict=True):
        for part, (one, found) in enumerate(zip(expected, signature(other), strict=True)):
            assert one == found, f"part {part} differs {way}"
    return first


def check_accounts(served: Served) -> None:
    """Every request that arrived ends exactly once, with a reason where it was dropped, and memory is returned."""
    assert sorted(record.request_id for record in served.records) == list(range(served.run.requests))
    for record in served.records:
        assert (record.drop_reason is not None) == (record.status is Status.DROPPED)
        if record.status is Status.COMPLETED:
            assert record.arrival_ns <= record.scheduled_ns < record.first_token_ns <= record.last_token_ns
    told = [record.drop_reason for record in served.records if record.drop_reason is not None]
    lost = [reason for reason in told if reason.startswith(("its replica died", "its iteration failed"))]
    assert sum(fault.lost for fault in served.run.faults or ()) == len(lost)
    for server in served.run.servers:
        assert server.used_blocks == 0
        assert server.requests_in_system == 0


def signature(served: Served) -> list[Any]:
    """All that a run holds, part by part; its end only where nothing was left, or else a forgotten alarm is the end."""
    run = served.run
    parts: list[Any] = [served.by_request(), [asdict(server.stats) for server in run.servers]]
    parts.append([[(d.time_ns, d.cause, d.deployment.active) for d in server.decisions] for server in run.servers])
    unfinished = any(record.status is Status.UNFINISHED for record in served.records)
    faults = run.faults
    if unfinished and faults is not None:  # those that found nothing are noted when the run ends
        faults = tuple(fault for fault in faults if fault.hit)
    parts.append((run.requests, run.presence_ns, faults, None if unfinished else run.end_ns))
    return parts
