"""Notes how long every iteration of an engine took, and how long it takes by the profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol, Self

from helios_sim.live.clock import WallClock
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import whole_ns
from helios_sim.serving.iteration import Around, Executes, Outcome, Plan

_SCHEDSTAT = Path("/proc/thread-self/schedstat")  # Linux: ns on a processor, ns waited for one, times


@dataclass(frozen=True, slots=True)
class LiveNotes:
    """Sums over a live run, and how many requests its memory held."""

    iterations: int
    engine_ns: int  # inside the engine
    forward_ns: int  # of that, inside the model's forward pass
    waited_ns: int  # of `engine_ns`, ready to run while others had the processor; 0 if the system does not tell
    host_ns: int  # between the end of an iteration and the begin of the next, scheduler and policy included
    priced_ns: int  # time of these iterations by the profile, its own host overhead included
    prompts_taken_ns: int  # engine and host time of the iterations with prompts in them
    prompts_priced_ns: int
    shortages: int = 0  # further iterations for which memory did not suffice
    kv_bytes: int = 0  # size of the block that holds all caches
    places: int = 0  # requests that fit into it at once, by the model of which the fewest fit
    places_wanted: int = 0
    pace: float | None = None  # time of a decode step here over its time when the profile was measured; above 1: slower
    prompt_pace: float | None = None  # the pace of a prompt step

    @classmethod
    def together(cls, runs: Sequence[Self]) -> Self:
        joined: dict[str, Callable[[list[Any]], Any]] = {
            "kv_bytes": max, "places": min, "places_wanted": max, "pace": _mean,
            "prompt_pace": _mean,
        }  # fmt: skip
        return cls(*(joined.get(f.name, sum)([getattr(run, f.name) for run in runs]) for f in fields(cls)))

    @property
    def price_error(self) -> float | None:
        """Priced over taken time, less 1: the error of profile or machine alone, since the iterations are the same."""
        taken_ns = self.engine_ns + self.host_ns
        return self.priced_ns / taken_ns - 1 if taken_ns else None

    @property
    def price_errors_by_kind(self) -> tuple[float | None, float | None]:
        """`price_error` of iterations with prompts in them, and of iterations without."""
        taken_ns, priced_ns = self.prompts_taken_ns, self.prompts_priced_ns
        others_ns = self.engine_ns + self.host_ns - taken_ns
        return (
            priced_ns / taken_ns - 1 if taken_ns else None,
            (self.priced_ns - priced_ns) / others_ns - 1 if others_ns else None,
        )

    @property
    def price_error_undisturbed(self) -> float | None:
        """`price_error` without the time in which others had the processor, which no profile can know."""
        taken_ns = self.engine_ns + self.host_ns - self.waited_ns
        return self.priced_ns / taken_ns - 1 if taken_ns > 0 else None

    def sentence(self) -> str:
        if not self.iterations:
            return "nothing ran"
        spent_ns = (self.forward_ns, self.engine_ns - self.forward_ns, self.host_ns, self.waited_ns)
        forward_ms, around_ms, between_ms, waited_ms = (ns / self.iterations / 1e6 for ns in spent_ns)
        told = (
            f"{self.iterations} iterations of {forward_ms:.2f} ms in the model, {around_ms:.2f} ms of the engine "
            f"around it and {between_ms:.2f} ms of the host between them"
        )
        if self.waited_ns:
            told += f", of which others had the processor for {waited_ms:.2f} ms"
        prompts, decodes = map(_signed, self.price_errors_by_kind)
        priced = f"the profile prices these very iterations {_signed(self.price_error)}"
        if self.waited_ns:
            priced += f" ({_signed(self.price_error_undisturbed)} without that time)"
        pace = ""
        if self.pace is not None:
            pace = f"; a decode step that the calibration timed took {self.pace:.2f} of its time beside the profile"
            pace += "" if self.prompt_pace is None else f", a prompt {self.prompt_pace:.2f}"
        return f"{told}; {priced}: {prompts} with prompts in them, {decodes} without{pace}{self._memory()}"

    def _memory(self) -> str:
        told = ""
        if self.places:
            told = f"; KV memory of {self.kv_bytes / 2**20:.0f} MiB for {self.places} requests at once"
            told += "" if self.places == self.places_wanted else f", {self.places_wanted} were wanted"
        return told + (f"; memory ran out in {self.shortages} further iterations" if self.shortages else "")


def _mean(known: Sequence[float | None]) -> float | None:
    values = [value for value in known if value is not None]
    return sum(values) / len(values) if values else None


def _signed(share: float | None) -> str:
    return "nothing" if share is None else f"{share:+.1%}"


@dataclass(frozen=True, slots=True)
class Step:
    """One iteration."""

    profile: Profile
    composition: Composition  # what ran
    host_ns: int  # from when it was due until the engine was asked
    engine_ns: int  # from then on until it was done
    forward_ns: int  # of `engine_ns`, inside the model's forward pass
    waited_ns: int  # of `engine_ns`, while others had the processor
    drafted: Sequence[Composition] = ()  # the drafting steps that ran before
    draft_ns: int = 0  # of `forward_ns`, inside drafting steps
    drafter: Profile | None = None  # of the model that drafted, if it is another one

    @property
    def priced_ns(self) -> int:
        """Time of the iteration by the profile, drafts included."""
        drafter = self.drafter or self.profile
        parts = [*((drafter, step) for step in self.drafted), (self.profile, self.composition)]
        return sum(int(whole_ns(profile.iteration_time_s(part))[0]) for profile, part in parts)

    @property
    def overhead_ns(self) -> int:
        """Host time while the device waits: everything but the forward pass."""
        return self.host_ns + self.engine_ns - self.forward_ns


class Computes(Executes, Protocol):
    """An engine that really computes, and tells how much time it has spent in forward passes."""

    @property
    def forward_ns(self) -> int: ...

    @property
    def loading(self) -> int:
        """Number of transfers that are under way."""
        ...


class WatchedEngine(Around):
    """An engine that notes the iterations of another one; it follows the `Executes` protocol."""

    _inner: Computes

    def __init__(
        self, inner: Computes, clock: WallClock, before: Callable[[str], None] | None = None, kept: int | None = None
    ) -> None:
        """Wrap an engine. `before` is called with the model of the next iteration, while nothing is loading. `kept`:
        steps to keep before they are added up, with the clock stopped; None for all.
        """
        super().__init__(inner)
        self._clock, self._before, self._kept = clock, before, kept
        self._added_up: list[LiveNotes] = []  # at most one: sums over steps that are no longer kept
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
        self.steps.append(Step(
            outcome.profile, outcome.composition, host_ns, engine_ns, forward_ns, waited_ns, outcome.drafted,
            outcome.draft_ns, outcome.drafter,
        ))  # fmt: skip
        return outcome

    def notes(self) -> LiveNotes:
        """Return sums over everything that ran."""
        return LiveNotes.together([*self._added_up, self._sums()])

    def _sums(self) -> LiveNotes:
        """Return sums over the steps that are kept. Pricing them takes host time."""
        priced_ns = [step.priced_ns for step in self.steps]
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
    """Read the counter of the time that this thread was ready to run but had no processor; 0 if there is no counter."""
    try:
        return int(_SCHEDSTAT.read_text().split()[1])
    except (OSError, IndexError, ValueError):
        return 0
