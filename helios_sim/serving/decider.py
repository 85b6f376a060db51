"""Watches the deployment's triggers and asks the policy when one fires. Keeps the decision log."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.policy.deployment import Deployment, Placement
from helios_sim.policy.telemetry import Policy, Telemetry
from helios_sim.policy.trigger import (
    AtTime,
    BreachLimit,
    Cause,
    Completed,
    Drained,
    LoadFailed,
    Probed,
    QueueAbove,
    Started,
)
from helios_sim.serving.batch import Column
from helios_sim.serving.iteration import Outcome, Plan
from helios_sim.serving.meters import BreachWindow
from helios_sim.serving.replica import Replica

MOST_DECISIONS = 10_000  # in the log of a replica, which must not grow with the length of a run
DECISIONS_AT_ONE_TIME = 1000  # more than any policy needs; beyond it the policy contradicts its own triggers


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the decision log."""

    time_ns: int
    replica: int
    cause: Cause
    deployment: Deployment


class Decider:
    def __init__(self, replica: Replica, policy: Policy) -> None:
        self._replica = replica
        self._policy = policy
        self.decisions: list[Decision] = []  # at most MOST_DECISIONS: the first half of them and the latest
        self.decisions_left_out = 0
        self.probe_left: list[str] = []  # models that the deployment's probe has not scored yet
        self.windows: dict[BreachLimit, BreachWindow] = {}
        self._watched: Placement | None = None  # by these windows
        self.spent: set[Cause] = set()  # triggers that fire once
        self.completed_before = 0

    def start(self) -> Deployment:
        deployment = self._policy.start(self._replica.situation)
        self._log(Started(), deployment)
        return deployment

    def arm(self) -> None:
        """A deployment came into force: its triggers start to watch."""
        deployment = self._replica.deployment
        self.spent.clear()
        self.probe_left = list(deployment.probe.models) if deployment.probe is not None else []
        known = self.windows if deployment.active == self._watched else {}
        limits = [t for t in deployment.triggers if isinstance(t, BreachLimit)]
        self.windows = {t: known.get(t) or BreachWindow(t.window_tokens, t.limit) for t in limits}
        self._watched = deployment.active

    def decide(self) -> Deployment | None:
        """What the policy decides now, if a trigger has fired and it decides anything."""
        for trigger in self._replica.deployment.triggers:
            if not self._fired(trigger):
                continue
            deployment = self._policy.decide(trigger, self._telemetry(trigger))
            self._replica.observations.clear()
            if isinstance(trigger, BreachLimit):
                self.windows[trigger].clear()
            elif isinstance(trigger, Completed):
                self.completed_before = self._replica.completed_requests
            else:
                self.spent.add(trigger)
            if deployment is not None:
                self.completed_before = self._replica.completed_requests
                self._log(trigger, deployment)
                return deployment
        return None

    def note_failed_load(self, model: str, reason: str, deployment: Deployment) -> None:
        """The log tells what stays in force; the policy finds out when it is asked next."""
        self._log(LoadFailed(model, reason), deployment)

    @property
    def next_time_ns(self) -> int | None:
        times = [t.time_ns for t in self._replica.deployment.triggers if isinstance(t, AtTime)]
        return min((t for t in times if t > self._replica.now_ns), default=None)

    @property
    def watches_queue(self) -> bool:
        return any(isinstance(t, QueueAbove) for t in self._replica.deployment.triggers)

    def iterations_until_trigger(self, plan: Plan, outcome: Outcome) -> int:
        """How many of the iterations run before the policy is to be asked (all of them if none fires)."""
        iterations = len(outcome.end_ns)
        for trigger in self._replica.deployment.triggers:
            if isinstance(trigger, BreachLimit):
                breach = counted_breaches(plan, outcome, iterations)
                first = self.windows[trigger].first_over_limit(breach) if breach.shape[1] else None
                if first is not None:
                    iterations = first + 1
            elif isinstance(trigger, AtTime) and trigger not in self.spent:
                iterations = min(iterations, outcome.iterations_until(trigger.time_ns))
        return iterations

    def count_breaches(self, plan: Plan, outcome: Outcome, iterations: int) -> None:
        if self.windows:
            breach = counted_breaches(plan, outcome, iterations)
            for window in self.windows.values():
                window.add(breach)

    def _fired(self, trigger: Cause) -> bool:
        replica = self._replica
        if isinstance(trigger, BreachLimit):
            return self.windows[trigger].over_limit
        if isinstance(trigger, Completed):
            return replica.completed_requests - self.completed_before >= trigger.requests
        if isinstance(trigger, QueueAbove):
            above = len(replica.waiting) > trigger.requests
            if not above:
                self.spent.discard(trigger)
            return above and trigger not in self.spent
        if trigger in self.spent:
            return False
        if isinstance(trigger, AtTime):
            return replica.now_ns >= trigger.time_ns
        if isinstance(trigger, Drained):
            in_flight = len(replica.batch) or any(sequence.started for sequence in replica.waiting.known())
            return replica.starts_left == 0 and not in_flight
        return isinstance(trigger, Probed) and replica.deployment.probe is not None and not self.probe_left

    def _telemetry(self, cause: Cause) -> Telemetry:
        replica, recent = self._replica, self._replica.recent
        windows = [self.windows[cause]] if isinstance(cause, BreachLimit) else list(self.windows.values())
        return Telemetry(
            now_ns=replica.now_ns,
            completed_requests=replica.completed_requests,
            queued_requests=len(replica.waiting),
            running_requests=len(replica.batch),
            batch_mean=replica.decode_batch_ns / replica.decode_ns if replica.decode_ns else None,
            prompt_tokens_mean=recent.prompt_tokens_mean,
            output_tokens_mean=recent.output_tokens_mean,
            arrival_rate_per_s=recent.arrival_rate_per_s,
            breaches_in_window=windows[0].breaches if windows else 0,
            observations=tuple(replica.observations),
        )

    def _log(self, cause: Cause, deployment: Deployment) -> None:
        now_ns = self._replica.now_ns
        self.decisions.append(Decision(now_ns, self._replica.number, cause, deployment))
        if len(self.decisions) > MOST_DECISIONS:
            del self.decisions[MOST_DECISIONS // 2]
            self.decisions_left_out += 1
        if len(self.decisions) > DECISIONS_AT_ONE_TIME and self.decisions[-DECISIONS_AT_ONE_TIME].time_ns == now_ns:
            raise UserError(
                "policy",
                type(self._policy).__name__,
                f"a policy may decide at most {DECISIONS_AT_ONE_TIME} times at one moment",
                "do not return a deployment whose own triggers already hold",
            )


def counted_breaches(plan: Plan, outcome: Outcome, iterations: int) -> NDArray[np.bool_]:
    """Breaches of the decode tokens that the counter sees, shape (iterations, requests): observed tokens are left
    out, because they ran deeper than the cap."""
    if plan.observe_tokens is not None:
        seen = plan.batch.decoding_column(Column.GENERATED) >= plan.observe_tokens
    else:
        seen = np.ones(plan.decoding, bool)
    if outcome.decoded.breach is None:
        return np.zeros((iterations, int(seen.sum())), bool)
    return outcome.decoded.breach[:iterations, seen]
