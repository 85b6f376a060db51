"""Reruns a decision with its next best option, and compares both over the time until the next decision.

The rerun, called a branch, is the same to the last bit up to the decision. From there on it serves with the other
option and its policy is not asked again; both runs are compared from this decision until the replica's next one. A
policy names its second choice (`Deployment.next_best`); if it never does, the other option is to go on as before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from helios_sim.policy.deployment import Cause, Deployment, Faulted, Judged, LoadFailed
from helios_sim.policy.telemetry import Policy, Situation, Telemetry
from helios_sim.report.decisions import SHOWN_DECISIONS
from helios_sim.report.records import RecordLog, Records
from helios_sim.report.result import Instead, Over
from helios_sim.request import NS_PER_S
from helios_sim.serving.decider import Decision
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.jobs import Job, JobResult, serve
from helios_sim.study.modes import SIMULATE
from helios_sim.study.runner import place_of
from helios_sim.study.schema import AUTO, NONE
from helios_sim.vary.workers import FORKS, Place, Workers

MOST_REQUESTS = 30_000  # most requests, of all branches of a study together, that next_best=auto runs: a second or two


@dataclass(frozen=True, slots=True)
class Branch:
    """An option to serve in place of the `place`-th decision in the log, until the replica's next decision."""

    place: int
    decision: Decision
    option: Deployment
    until_ns: int


def run_instead(
    arms: Mapping[str, Job], results: Mapping[str, JobResult], subject: str, processes: int | None = 1
) -> dict[str, dict[int, Instead]]:
    """Run branches and return the comparisons by arm and place in its log. With `auto`, the subject's come first and
    branches with too many requests in all are left out.

    `processes` is as in `run_jobs`, but many branches run one after the other.
    """
    found: dict[str, dict[int, Instead]] = {}
    asked: dict[str, tuple[str, Job, Branch]] = {}
    left = MOST_REQUESTS
    for name in sorted(arms, key=lambda arm: arm != subject):
        job, result = arms[name], results[arms[name].key]
        found[name] = {}
        if job.config.next_best == NONE or job.config.mode != SIMULATE or job.arm.policy.kind.is_bound:
            continue
        for branch in branches(result):
            left -= len(result.replicate.records)
            if job.config.next_best == AUTO and left < 0:
                break
            asked[f"{name}/{branch.place}"] = name, job, branch
    where = place_of([job for _, job, _ in asked.values()], processes)
    with closing(Workers(where if where.backend == FORKS else Place())) as workers:
        for key, other in workers(_of_branch, {key: (job, branch) for key, (_, job, branch) in asked.items()}):
            name, job, branch = asked[key]
            if other is not None:
                found[name][branch.place] = _instead(branch, results[job.key].replicate.records, other)
    return found


def _of_branch(asked: tuple[Job, Branch]) -> Records | None:
    return _served(*asked)


def branches(result: JobResult) -> Iterator[Branch]:
    """Yield a branch for each decision that a page shows and that had another option."""
    log = result.decisions
    ends_ns = _ends_ns(result.replicate.records)
    weighs = any(decision.deployment.next_best is not None for decision in log)
    before: dict[int, Deployment] = {}
    for place, decision in enumerate(log[:SHOWN_DECISIONS]):
        if isinstance(decision.cause, Faulted | LoadFailed | Judged):
            continue
        last, before[decision.replica] = before.get(decision.replica), decision.deployment
        option = decision.deployment.next_best
        if option is None and not weighs and last is not None and last.active != decision.deployment.active:
            option = replace(last, reason="as before", evidence={})
        later = (d.time_ns for d in log[place + 1 :] if d.replica == decision.replica and d.time_ns > decision.time_ns)
        until_ns = next(later, ends_ns)
        if option is not None and until_ns > decision.time_ns:
            yield Branch(place, decision, option, until_ns)


class _Branching:
    """A policy that takes the other option at one decision, and decides nothing after it."""

    def __init__(self, policy: Policy, branch: Branch) -> None:
        self._policy, self._branch, self.taken = policy, branch, False

    def start(self, situation: Situation) -> Deployment:
        return self._other(self._policy.start(situation), 0)

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        if self.taken:
            return None
        decided = self._policy.decide(cause, telemetry)
        return None if decided is None else self._other(decided, telemetry.now_ns)

    def _other(self, decided: Deployment, now_ns: int) -> Deployment:
        at = self._branch.decision
        same = (decided.active, decided.reason) == (at.deployment.active, at.deployment.reason)
        self.taken = now_ns == at.time_ns and same
        return replace(self._branch.option, triggers=(), next_best=None) if self.taken else decided


def _served(job: Job, branch: Branch) -> Records | None:
    """Return the records of a branch, as far as they are compared. None if its policy, which then does not repeat
    itself, never came to the decision."""
    log = RecordLog()
    branching: list[_Branching] = []

    def policy_of(number: int, policy: Policy) -> Policy:
        if number != branch.decision.replica:
            return policy
        branching.append(_Branching(policy, branch))
        return branching[-1]

    fleet = shared_fleet(job.config, job.seed)
    serve(
        job, fleet, log.add, pictures=False, block_sink=log.add_block, policy_of=policy_of, until_ns=branch.until_ns
    )  # fmt: skip
    return log.records() if any(policy.taken for policy in branching) else None


def _instead(branch: Branch, records: Records, other: Records) -> Instead:
    window_ns = (branch.decision.time_ns, branch.until_ns)
    return Instead(
        option=branch.option.active,
        window_s=(window_ns[1] - window_ns[0]) / NS_PER_S,
        chosen=over(records, *window_ns),
        other=over(other, *window_ns),
    )


def over(records: Records, from_ns: int, until_ns: int) -> Over:
    """Return what was completed in (from, until], and how many requests were there and not done at the end."""

    def e2e_s(part: Records) -> NDArray[np.float64]:
        done_ns = part.last_token_ns.values
        here = part.completed & (done_ns > from_ns) & (done_ns <= until_ns)
        return np.asarray((done_ns - part.arrival_ns)[here] / NS_PER_S)

    def unfinished(part: Records) -> int:  # no user waits for a dropped request
        left = part.completed & (part.last_token_ns.values > until_ns)
        return int((left & (part.arrival_ns <= until_ns)).sum())

    served = records.series(e2e_s)
    return Over(len(served), served.mean() if len(served) else None, sum(map(unfinished, records.parts())))


def _ends_ns(records: Records) -> int:
    ends_ns = records.ends_ns()
    return 0 if ends_ns is None else ends_ns[1]

