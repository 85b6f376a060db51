"""Notes what every iteration of an engine took, and leaves it as it is. Knows the clock, no server and no policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as SequenceOf
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from helios_sim.exits.rule import ExitRule
from helios_sim.exits.trace import TokenSpan
from helios_sim.live.clock import WallClock
from helios_sim.policy.telemetry import Observation
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import Request, whole_ns
from helios_sim.serving.iteration import Executes, Outcome, Places, Plan
from helios_sim.study.live_notes import LiveNotes

_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # Linux: ns on a processor, ns waited for one, times


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration."""

    profile: Profile
    composition: Composition  # what ran
    host_ns: int  # from when it was due until the engine was asked
    engine_ns: int  # from then on until it was done
    forward_ns: int  # of `engine_ns`, inside the model's forward pass
    waited_ns: int  # of `engine_ns`, while others had the processor

    @property
    def overhead_ns(self) -> int:
        """The host's part, while the device waits: whatever is not the forward pass."""
        return self.host_ns + self.engine_ns - self.forward_ns


class Computes(Executes, Protocol):
    """An engine that really computes, and tells for how long it has."""

    @property
    def forward_ns(self) -> int: ...

    @property
    def loading(self) -> int:
        """Transfers that are under way."""
        ...


class WatchedEngine:
    """Follows the `Executes` protocol by handing everything on."""

    def __init__(
        self, inner: Computes, clock: WallClock, before: Callable[[str], None] | None = None, kept: int | None = None
    ) -> None:
        """`before` is called with the model of the next iteration, while nothing is loading. `kept` (None: all): so
        many steps are kept, before they are added up while the clock is stopped.
        """
        self._inner, self._clock, self._before, self._kept = inner, clock, before, kept
        self._added_up: list[LiveNotes] = []  # one at most
        self.steps: list[Step] = []

    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        if not self._inner.loading:
            if self._kept is not None and len(self.steps) >= self._kept:
                with self._clock.stopped():
                    self._added_up = [LiveNotes.together([*self._added_up, self._sums()])]
                    self.steps.clear()
            if self._before is not None:
                self._before(plan.model)
        asked_ns, forward_ns, waited_ns = self._clock.wall_ns, self._inner.forward_ns, waited_for_processor_ns()
        outcome = self._inner.execute(plan, now_ns)
        waited_ns = waited_for_processor_ns() - waited_ns
        forward_ns = self._inner.forward_ns - forward_ns
        host_ns, engine_ns = max(asked_ns - now_ns, 0), outcome.end_ns - asked_ns
        self.steps.append(Step(outcome.profile, outcome.composition, host_ns, engine_ns, forward_ns, waited_ns))
        return outcome

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        return self._inner.tokenize(model, request, answered_chars)

    def places(self, model: str) -> Places | None:
        return self._inner.places(model)

    def hold(self, layers: Mapping[str, int]) -> None:
        self._inner.hold(layers)

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        self._inner.start_transfer(n_bytes, model, on_done)

    def observe(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        return self._inner.observe(model, request_id, span, n_tokens, exit_rule, time_ns)

    def forget(self, request_id: int) -> None:
        self._inner.forget(request_id)

    def probe(
        self, model: str, requests: SequenceOf[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        return self._inner.probe(model, requests, exit_rule)

    def notes(self) -> LiveNotes:
        """Of everything that ran."""
        return LiveNotes.together([*self._added_up, self._sums()])

    def _sums(self) -> LiveNotes:
        """Prices the steps that are kept, which takes the host's time too."""
        priced_ns = [int(whole_ns(s.profile.iteration_time_s(s.composition))[0]) for s in self.steps]
        with_prompts = [i for i, step in enumerate(self.steps) if step.composition.prefill]
        return LiveNotes(
            iterations=len(self.steps),
            engine_ns=sum(step.engine_ns for step in self.steps),
            host_ns=sum(step.host_ns for step in self.steps),
            forward_ns=sum(step.forward_ns for step in self.steps),
            waited_ns=sum(step.waited_ns for step in self.steps),
            priced_ns=sum(priced_ns),
            prompts_taken_ns=sum(self.steps[i].engine_ns + self.steps[i].host_ns for i in with_prompts),
            prompts_priced_ns=sum(priced_ns[i] for i in with_prompts),
        )


def waited_for_processor_ns() -> int:
    """A counter: how long this thread was ready to run and had no processor. 0 where the system keeps none."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
