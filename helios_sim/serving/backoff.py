"""The delay before a model is loaded again after failed loads, the same in a simulation and live.

The rule is Kubernetes' for containers that crash (kubernetes.io, "Pod Lifecycle", CrashLoopBackOff): the first retry is
at once, the next after 10 s, 20 s, 40 s and so on, at most 300 s. A successful load resets the delay.
"""

from __future__ import annotations

from dataclasses import dataclass

from helios_sim.request import NS_PER_S

FIRST_S, MOST_S = 10, 300


@dataclass(slots=True)
class _Failed:
    """Failed loads of one model, and the time before which it is not loaded again."""

    in_a_row: int = 0
    until_ns: int = 0


class Backoff:
    def __init__(self) -> None:
        self._failed: dict[str, _Failed] = {}

    def note_failed(self, model: str, now_ns: int) -> None:
        failed = self._failed.setdefault(model, _Failed())
        failed.in_a_row += 1
        if failed.in_a_row > 1:
            waits_s = min(FIRST_S * 2 ** min(failed.in_a_row - 2, 10), MOST_S)
            failed.until_ns = now_ns + waits_s * NS_PER_S

    def note_loaded(self, model: str) -> None:
        self._failed.pop(model, None)

    def until_ns(self, model: str, now_ns: int) -> int | None:
        """The time before which the model is not loaded, or None if it may be loaded."""
        failed = self._failed.get(model)
        return failed.until_ns if failed is not None and failed.until_ns > now_ns else None

    def told(self, model: str, now_ns: int) -> str:
        """Text for the log on a model that is not loaded now; "" if it may be loaded."""
        until_ns = self.until_ns(model, now_ns)
        if until_ns is None:
            return ""
        return f"{self._failed[model].in_a_row} times in a row, not tried before {until_ns / NS_PER_S:.3f} s"
