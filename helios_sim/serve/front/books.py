"""The books of the front: counts of requests for an answer, by outcome."""

from __future__ import annotations

from collections.abc import Mapping


class Books:
    """Counts of requests. At any time received = answered + refused + cancelled + failed + open."""

    def __init__(self) -> None:
        self.received = self.answered = self.refused = self.cancelled = self.failed = 0

    @property
    def open(self) -> int:
        return self.received - self.answered - self.refused - self.cancelled - self.failed

    def told(self) -> Mapping[str, int]:
        return {
            "received": self.received, "answered": self.answered, "refused": self.refused,
            "cancelled": self.cancelled, "failed": self.failed, "open": self.open,
        }  # fmt: skip
