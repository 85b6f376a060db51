"""Watches the deployment's triggers and asks the policy when one fires. Keeps the decision log."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helios_sim.core import layout
from helios_sim.core.layout import NEVER, TRIGGER, WINDOW, Watch
from helios_sim.core.power import drawn_since
from helios_sim.core.triggers import first_fired, next_alarm_ns, watches_queue
from helios_sim.errors import UserError
from helios_sim.policy.deployment import (
    AtTime,
    BreachLimit,
    Cause,
    Completed,
    Deployment,
    Drained,
    Faulted,
    KvAbove,
    LoadFailed,
    Placement,
    PowerAbove,
    Probed,
    QueueAbove,
    RunningAbove,
    SloBelow,
    Started,
    Trigger,
)
from helios_sim.policy.telemetry import Energy, Policy, Telemetry
from helios_sim.request import NS_PER_S
from helios_sim.serving.handover import latest_completed, tell
from helios_sim.serving.replica import Replica

MOST_DECISIONS = 10_000  # in a replica's log, so that it does not grow with the length of a run
POWER_WINDOW_NS = 10 * NS_PER_S  # window over which telemetry averages power
_SHAPES = 8  # shapes of triggers and windows for which arrays are kept
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
        self._failed: LoadFailed | None = None  # a failed load that the policy has not been told of
        self._ask_ns = 0  # the policy is told of it then, or when one of its triggers fires earlier
        self._answers_failure = False  # the latest decision was the policy's answer to a failed load
        self._stays = False  # the deployment that comes into force next was in force before
        self._triggers: tuple[Trigger, ...] = ()
        self._watched: Placement | None = None  # placement that the breach windows watch
        self._flags: NDArray[np.uint8]
        self._seen: Watch  # `watch` for plain Python
        self._kept: dict[tuple[int, ...], tuple[Watch, Watch, NDArray[np.uint8]]] = {}  # by shapes
        self.watch = self._watch([], [], np.zeros((0, 0), np.uint8))

    def start(self) -> Deployment:
        deployment = self._policy.start(self._replica.situation)
        self._log(Started(), deployment)
        return deployment

    def arm(self) -> None:
        """Start to watch the triggers of a deployment that has come into force.

        A window keeps its content if the same limit watched the same placement before.
        """
        deployment = self._replica.deployment
        self.probe_left = list(deployment.probe.models) if deployment.probe is not None else []
        limits = [t for t in deployment.triggers if isinstance(t, BreachLimit | SloBelow)]
        before = self._seen.windows
        same = deployment.active == self._watched
        known = [t for t in self._triggers if isinstance(t, BreachLimit | SloBelow)] if same else []
        sizes = [_window(limit)[0] for limit in limits]
        flags = np.zeros((len(limits), max(sizes, default=0)), np.uint8)
        windows = []
        for k, limit in enumerate(limits):
            size, most = _window(limit)
            row = [size, most, 0, 0, 0, int(isinstance(limit, SloBelow))]
            if limit in known:
                old = known.index(limit)
                row = [int(getattr(before[old], name)) for name in WINDOW.dtype.names or ()]
                flags[k, :size] = self._flags[old, :size]
            windows.append(row)
        spent = [int(row.spent) for row in self._seen.triggers] if self._stays else [0] * len(deployment.triggers)
        rows = [
            [*_numbers(trigger), spent[k], limits.index(trigger) if trigger in limits else 0, _span_ns(trigger)]
            for k, trigger in enumerate(deployment.triggers)
        ]
        if self._failed is not None and self._ask_ns > self._replica.now_ns:
            rows.append([layout.AT_TIME, self._ask_ns, 0, 0, 0])
        self._stays = False
        self._triggers, self._watched = deployment.triggers, deployment.active
        self.watch = self._watch(rows, windows, flags)
        self.note_probe()

    def _watch(self, triggers: list[list[int]], windows: list[list[int]], flags: NDArray[np.uint8]) -> Watch:
        """Write triggers and windows into arrays, reusing those of the same shape, which the loop knows already."""
        storage, shape = self._replica.storage, (len(triggers), *flags.shape)
        if shape in self._kept:
            watch, self._seen, self._flags = self._kept[shape]
            for t, row in zip(self._seen.triggers, triggers, strict=True):
                t.kind, t.argument, t.spent, t.window, t.span_ns = row
            for w, row in zip(self._seen.windows, windows, strict=True):
                w.length, w.limit, w.filled, w.next, w.breaches, w.of_requests = row
            self._flags[:] = flags
            return watch
        of_triggers, of_windows = storage.filled(TRIGGER, triggers), storage.filled(WINDOW, windows)
        watch, self._flags = Watch(of_triggers, of_windows, storage.array(flags)), flags
        self._seen = Watch(storage.views(TRIGGER, of_triggers), storage.views(WINDOW, of_windows), watch.flags)
        if len(self._kept) == _SHAPES:
            self._kept.clear()
        self._kept[shape] = watch, self._seen, flags
        return watch

    def note_probe(self) -> None:
        """Let a probe's trigger fire when every candidate has been scored."""
        done = self._replica.deployment.probe is not None and not self.probe_left
        for row in self._seen.triggers:
            if row.kind == layout.PROBED:
                row.argument = int(done)

    def decide(self) -> Deployment | None:
        """Ask the policy if a load has failed or a trigger has fired. Returns its decision, or None."""
        replica, s = self._replica, self._replica.state
        self._answers_failure = False
        first = NEVER if self._failed is None or replica.now_ns >= self._ask_ns else self._fired(0)
        if self._failed is not None and (replica.now_ns >= self._ask_ns or first != NEVER):
            failed, self._failed = self._failed, None
            deployment = self._policy.decide(failed, self._telemetry(failed))
            replica.observations.clear()
            if deployment is not None:
                s.completed_before = s.completed
                self._answers_failure = True
                if first != NEVER:
                    self._spend(first)
                self._log(failed, deployment)
                return deployment
        k = NEVER
        while (k := self._fired(k + 1)) != NEVER:
            if k == len(self._triggers):  # the alarm for a failed load, which the policy has been told of
                self._seen.triggers[k].spent = 1
                continue
            trigger = self._triggers[k]
            deployment = self._policy.decide(trigger, self._telemetry(trigger))
            replica.observations.clear()
            self._spend(k)
            if deployment is not None:
                s.completed_before = s.completed
                self._log(trigger, deployment)
                return deployment
        return None

    def _spend(self, k: int) -> None:
        """Note that the policy has been asked because of this trigger."""
        trigger, row = self._triggers[k], self._seen.triggers[k]
        if isinstance(trigger, BreachLimit | SloBelow):
            window = self._seen.windows[int(row.window)]
            window.filled = window.next = window.breaches = 0
        elif isinstance(trigger, Completed):
            self._replica.state.completed_before = self._replica.state.completed
        else:
            row.spent = 1

    def _fired(self, start: int) -> int:
        replica = self._replica
        return int(
            first_fired(
                replica.state, replica.rules, replica.request_views, replica.line, self._seen, replica.marks, start
            )
        )

    def note_failed_load(self, model: str, reason: str, deployment: Deployment) -> None:
        """Log the deployment that stays in force after a failed load. The policy is asked as soon as it is in force."""
        self._failed, self._ask_ns, self._stays = LoadFailed(model, reason), 0, True
        self._log(self._failed, deployment)

    def note_refused(self, model: str, reason: str, deployment: Deployment, until_ns: int) -> None:
        """Log a decision that is refused, since the model is not loaded before `until_ns`, like a failed load.

        If the decision was itself the answer to a failed load, the policy is asked again when the model may be loaded,
        or when one of its triggers fires.
        """
        self.note_failed_load(model, reason, deployment)
        self._ask_ns = until_ns if self._answers_failure else 0

    def note_fault(self, what: str) -> None:
        """Log a fault. The deployment in force does not change."""
        self._log(Faulted(what), self._replica.deployment)

    @property
    def next_time_ns(self) -> int | None:
        alarm_ns = int(next_alarm_ns(self._replica.state, self._seen))
        return None if alarm_ns == layout.FOREVER_NS else alarm_ns

    @property
    def rests(self) -> bool:
        """Whether no trigger waits for a point in time."""
        now_ns, rows = self._replica.now_ns, self._seen.triggers[: len(self._triggers)]
        return not any(row.kind == layout.AT_TIME and row.argument > now_ns for row in rows)

    @property
    def watches_queue(self) -> bool:
        return bool(watches_queue(self._seen))

    @property
    def watches_power(self) -> bool:
        return any(isinstance(trigger, PowerAbove) for trigger in self._triggers)

    def energy(self) -> Energy | None:
        """The energy that the replica's card has drawn so far, or None if it is not known."""
        replica, s, r = self._replica, self._replica.state, self._replica.rules
        if not replica.read_counter():
            return None
        now_ns, unit_w, idle_w = int(s.now_ns), int(r.drawn_mw) / 1000, int(r.idle_mw) / 1000
        joules = idle_w * now_ns / NS_PER_S + unit_w * int(s.drawn_ns) / NS_PER_S
        since_ns = max(0, now_ns - POWER_WINDOW_NS)
        drawn_ns = int(drawn_since(s, replica.marks, since_ns))
        return Energy(joules, idle_w + unit_w * drawn_ns / (now_ns - since_ns) if now_ns else idle_w)

    def _telemetry(self, cause: Cause) -> Telemetry:
        replica, s = self._replica, self._replica.state
        tell(replica)
        replica.recent.completed(latest_completed(replica))
        decode_ns, decode_batch_ns = int(s.placed_decode_ns), int(s.placed_decode_batch_ns)
        return Telemetry(
            now_ns=replica.now_ns,
            completed_requests=replica.completed_requests,
            queued_requests=replica.waiting_requests,
            running_requests=replica.running_requests,
            batch_mean=decode_batch_ns / decode_ns if decode_ns else None,
            prompt_tokens_mean=replica.recent.prompt_tokens_mean,
            output_tokens_mean=replica.recent.output_tokens_mean,
            arrival_rate_per_s=replica.arrival_rate_per_s,
            breaches_in_window=self._breaches(cause),
            observations=tuple(replica.observations),
            kv_used_share=replica.used_blocks / max(1, int(s.total_blocks)),
            latest=replica.recent.latest,
            prefix_hit_share=replica.recent.hit_share if replica.prefix.shares else None,
            prefix_cached_tokens=replica.prefix.free_tokens(int(replica.rules.block_tokens)),
            tested_drafts=replica.stats.tested_drafts + int(s.tested_drafts),
            accepted_drafts=replica.stats.accepted_drafts + int(s.accepted_drafts),
            read_energy=self._read_energy(),
        )

    def _breaches(self, cause: Cause) -> int:
        """Breaches in the window of the trigger that fired, or of the first breach limit."""
        limits = [trigger for trigger in self._triggers if isinstance(trigger, BreachLimit)]
        if not limits:
            return 0
        limit = cause if isinstance(cause, BreachLimit) else limits[0]
        row = self._seen.triggers[self._triggers.index(limit)]
        return int(self._seen.windows[int(row.window)].breaches)

    def _read_energy(self) -> Callable[[], Energy | None]:
        """A function that returns the energy drawn. A device is read only when the policy calls it."""
        if not self._replica.foresees:
            return self.energy
        found = self.energy()
        return lambda: found

    def _log(self, cause: Cause, deployment: Deployment) -> None:
        now_ns = self._replica.now_ns
        self.decisions.append(Decision(now_ns, self._replica.number, cause, deployment))
        if len(self.decisions) > MOST_DECISIONS:
            del self.decisions[MOST_DECISIONS // 2]
            self.decisions_left_out += 1
        if len(self.decisions) > DECISIONS_AT_ONE_TIME and self.decisions[-DECISIONS_AT_ONE_TIME].time_ns == now_ns:
            raise UserError(
                "policy",
                getattr(self._policy, "name", type(self._policy).__name__),
                f"a policy may decide at most {DECISIONS_AT_ONE_TIME} times at one moment",
                "do not return a deployment whose own triggers already hold",
            )


def _window(limit: BreachLimit | SloBelow) -> tuple[int, int]:
    """The size of a window in tokens or requests, and the number of breaches or misses above which it fires."""
    match limit:
        case BreachLimit(tokens, most):
            return tokens, most
        case SloBelow(share, requests):
            return requests, requests * (layout.MILLIONTHS - round(share * layout.MILLIONTHS)) // layout.MILLIONTHS


def _span_ns(trigger: Trigger) -> int:
    return round(trigger.window_s * NS_PER_S) if isinstance(trigger, PowerAbove) else 0


def _numbers(trigger: Trigger) -> tuple[int, int]:
    """The kind and argument of a trigger in the loop's records."""
    match trigger:
        case BreachLimit() | SloBelow():
            return layout.BREACHES, 0
        case Completed(requests):
            return layout.COMPLETIONS, requests
        case Drained():
            return layout.DRAINED, 0
        case AtTime(time_ns):
            return layout.AT_TIME, time_ns
        case QueueAbove(requests):
            return layout.QUEUE_ABOVE, requests
        case RunningAbove(requests):
            return layout.RUNNING_ABOVE, requests
        case KvAbove(share):
            return layout.KV_ABOVE, round(share * layout.MILLIONTHS)
        case PowerAbove(watts):
            return layout.POWER_ABOVE, round(watts * 1000)
        case Probed():
            return layout.PROBED, 0
