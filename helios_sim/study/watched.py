"""Notes what every iteration of an engine took, and leaves it as it is. Knows the clock, no server and no policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as SequenceOf
from dataclasses import dataclass
from typing import Any

from helios_sim.exits.rule import ExitRule
from helios_sim.exits.trace import TokenSpan
from helios_sim.live.clock import WallClock
from helios_sim.policy.telemetry import Observation
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import Request, whole_ns
from helios_sim.serving.batch import Sequence
from helios_sim.serving.iteration import Engine, Outcome, Plan
from helios_sim.study.live_notes import LiveNotes


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration."""

    profile: Profile
    composition: Composition  # what ran
    host_ns: int  # from when it was due until the engine was asked
    device_ns: int


class WatchedEngine:
    """Follows the `Engine` protocol by handing everything on."""

    def __init__(self, inner: Engine, clock: WallClock) -> None:
        self.inner, self._clock = inner, clock
        self.steps: list[Step] = []

    def tell(self, faults: Any) -> None:
        """Who hears of what goes wrong."""
        if hasattr(self.inner, "faults"):
            self.inner.faults = faults

    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        asked_ns = self._clock.wall_ns
        outcome = self.inner.execute(plan, now_ns)
        end_ns = int(outcome.end_ns[-1])
        self.steps.append(Step(outcome.profile, outcome.composition, max(asked_ns - now_ns, 0), end_ns - asked_ns))
        return outcome

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        return self.inner.tokenize(model, request, answered_chars)

    def hold(self, layers: Mapping[str, int]) -> None:
        self.inner.hold(layers)

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        self.inner.start_transfer(n_bytes, model, on_done)

    def observe(self, sequence: Sequence, n_tokens: int, exit_rule: ExitRule) -> Observation:
        return self.inner.observe(sequence, n_tokens, exit_rule)

    def probe(
        self, model: str, requests: SequenceOf[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        return self.inner.probe(model, requests, exit_rule)

    def close(self) -> None:
        if hasattr(self.inner, "close"):
            self.inner.close()

    def notes(self) -> LiveNotes:
        """Prices what ran: only now, since that takes the host's time too."""
        priced_ns = sum(int(whole_ns(s.profile.iteration_time_s(s.composition))[0]) for s in self.steps)
        return LiveNotes(
            iterations=len(self.steps),
            device_ns=sum(step.device_ns for step in self.steps),
            host_ns=sum(step.host_ns for step in self.steps),
            priced_ns=priced_ns,
            behind_ns=self._clock.wall_ns - int(self._clock.now),
        )
