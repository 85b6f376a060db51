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
        """Priced over taken, less 1: the part of a difference that is the profile's, not the path's."""
        taken_ns = self.device_ns + self.host_ns
        return self.priced_ns / taken_ns - 1 if taken_ns else None

    def sentence(self) -> str:
        if not self.iterations or self.price_error is None or self.host_s_per_iteration is None:
            return "nothing ran"
        return (
            f"{self.iterations} iterations of {self.device_ns / self.iterations / 1e6:.2f} ms, "
            f"{self.host_s_per_iteration * 1e3:.2f} ms of the host between them; the profile prices these very "
            f"iterations {self.price_error:+.1%}"
        )
