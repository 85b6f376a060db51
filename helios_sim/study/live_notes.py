"""What the iterations of a live run took beside what the profile says the same iterations take. Knows no engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class LiveNotes:
    """Sums over a run, and what memory allowed."""

    iterations: int
    engine_ns: int  # inside the engine
    forward_ns: int  # of that, inside the model's forward pass
    waited_ns: int  # of `engine_ns`, ready to run while others had the processor; 0 where the system does not tell
    host_ns: int  # between the end of an iteration and the begin of the next, scheduler and policy included
    priced_ns: int  # of the very same iterations, by the profile, its own host overhead included
    prompts_taken_ns: int  # by the iterations with prompts in them, engine and host
    prompts_priced_ns: int
    shortages: int = 0  # further iterations that memory did not suffice for
    kv_bytes: int = 0  # the block in which all caches lie
    places: int = 0  # requests that fit into it at once, of the model that fits least
    places_wanted: int = 0
    pace: float | None = None  # of a decode step beside the run, over that beside the profile: above 1 is slower
    prompt_pace: float | None = None  # of a prompt

    @classmethod
    def together(cls, runs: Sequence[Self]) -> Self:
        joined: dict[str, Callable[[list[Any]], Any]] = {
            "kv_bytes": max, "places": min, "places_wanted": max, "pace": _mean,
            "prompt_pace": _mean,
        }  # fmt: skip
        return cls(*(joined.get(f.name, sum)([getattr(run, f.name) for run in runs]) for f in fields(cls)))

    @property
    def price_error(self) -> float | None:
        """Priced over taken, less 1: what of a difference is the profile's or the machine's, not the path's."""
        taken_ns = self.engine_ns + self.host_ns
        return self.priced_ns / taken_ns - 1 if taken_ns else None

    @property
    def price_errors_by_kind(self) -> tuple[float | None, float | None]:
        """The same of iterations with prompts in them, and of those without."""
        taken_ns, priced_ns = self.prompts_taken_ns, self.prompts_priced_ns
        others_ns = self.engine_ns + self.host_ns - taken_ns
        return (
            priced_ns / taken_ns - 1 if taken_ns else None,
            (self.priced_ns - priced_ns) / others_ns - 1 if others_ns else None,
        )

    @property
    def price_error_undisturbed(self) -> float | None:
        """The same without the time in which others had the processor, which no profile can know."""
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
