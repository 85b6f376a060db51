"""What the iterations of a live run took beside what the profile says the same iterations take. Knows no engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self


@dataclass(frozen=True, slots=True)
class LiveNotes:
    """Sums over a run."""

    iterations: int
    device_ns: int  # inside the engine
    waited_ns: int  # of that, ready to run while others had the processor; 0 where the system does not tell
    host_ns: int  # between the end of an iteration and the begin of the next, scheduler and policy included
    priced_ns: int  # of the very same iterations, by the profile, its own host overhead included
    behind_ns: int  # by which the environment's clock was behind the wall clock when the run ended

    @classmethod
    def together(cls, runs: Sequence[Self]) -> Self:
        return cls(*(sum(getattr(run, f.name) for run in runs) for f in fields(cls)))

    @property
    def host_s_per_iteration(self) -> float | None:
        return self.host_ns / self.iterations / 1e9 if self.iterations else None

    @property
    def price_error(self) -> float | None:
        """Priced over taken, less 1: what of a difference is the profile's or the machine's, not the path's."""
        taken_ns = self.device_ns + self.host_ns
        return self.priced_ns / taken_ns - 1 if taken_ns else None

    @property
    def price_error_undisturbed(self) -> float | None:
        """The same without the time in which others had the processor, which no profile can know."""
        taken_ns = self.device_ns + self.host_ns - self.waited_ns
        return self.priced_ns / taken_ns - 1 if taken_ns > 0 else None

    def sentence(self) -> str:
        if not self.iterations:
            return "nothing ran"
        each_ms = [ns / self.iterations / 1e6 for ns in (self.device_ns, self.host_ns, self.waited_ns)]
        told = f"{self.iterations} iterations of {each_ms[0]:.2f} ms and {each_ms[1]:.2f} ms of the host between them"
        if self.waited_ns:
            told += f", of which others had the processor for {each_ms[2]:.2f} ms"
        return f"{told}; the profile prices these very iterations {_signed(self.price_error)}" + (
            f", {_signed(self.price_error_undisturbed)} without that time" if self.waited_ns else ""
        )


def _signed(share: float | None) -> str:
    return "at nothing" if share is None else f"{share:+.1%}"
