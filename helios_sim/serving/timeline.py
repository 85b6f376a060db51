"""Samples of a replica's state for pictures: bounded in number, never used for a metric."""

from __future__ import annotations

from dataclasses import dataclass, field

SAMPLES = 2000
FOREVER_NS = 2**62


@dataclass(slots=True)
class Timeline:
    """Rows (time_ns, model, layers, running, queued, kv_used_bytes, weight_bytes).

    A row is kept when at least `interval_ns` have passed since the last one or the placement changed; the interval
    doubles, and every other row is dropped, whenever there are too many.
    """

    rows: list[tuple[int, str, int, int, int, int, int]] = field(default_factory=list)
    interval_ns: int = 1_000_000

    def keep_few(self) -> None:
        """From now on only the first row of each placement: for runs of which nobody will see a picture."""
        self.interval_ns = FOREVER_NS

    def sample(
        self, time_ns: int, model: str, layers: int, running: int, queued: int, kv_used_bytes: int, weight_bytes: int
    ) -> None:
        if self.rows:
            last = self.rows[-1]
            if time_ns - last[0] < self.interval_ns and last[1:3] == (model, layers):
                return
        self.rows.append((time_ns, model, layers, running, queued, kv_used_bytes, weight_bytes))
        if len(self.rows) > SAMPLES:
            self.interval_ns *= 2
            del self.rows[1::2]
