"""What decode attention takes longer when the contexts of a batch differ in length. Knows batches of two lengths.

A batch is measured with some contexts long and the rest short, beside the same rows without attention. The excess is
over the time of equal lengths with the same mean, read from the table of those.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibrate.grid import geometric
from calibrate.latency import Latency
from calibrate.points import Point
from calibrate.sampling import Job
from helios_sim.profile.lookup import DecodeLookup
from helios_sim.profile.tables import GridTable
from helios_sim.profile.terms import UnequalTable

SHORT_TOKENS = 16
SHARES = (0.0, 1 / 32, 1 / 8, 1 / 4, 1 / 2, 7 / 8, 1.0)  # of the long ones; at both ends all lengths are equal
LEAST_FACTOR = 0.1  # of equal lengths' time: below is noise


@dataclass(frozen=True, slots=True)
class Mixture:
    """`long` of `batch` requests have contexts of `longest` tokens, the others SHORT_TOKENS."""

    batch: int
    longest: int
    long: int

    @property
    def share(self) -> float:
        return self.long / self.batch

    @property
    def kv_tokens(self) -> list[int]:
        """Long and short ones spread over the slots."""
        at = np.floor(np.arange(self.long) * self.batch / self.long).astype(int)
        return [self.longest if i in set(at.tolist()) else SHORT_TOKENS for i in range(self.batch)]

    def point(self, layer_class: int) -> Point:
        return Point(f"unequal_kv_{self.longest}", layer_class, self.batch, self.long)


def mixtures(latency: Latency) -> list[Mixture]:
    """All that the pool holds; none where contexts cannot differ."""
    limits, holds = latency.subject.limits, latency.subject.holds
    found = []
    for batch in _batches(latency):
        for longest in _lengths(latency):
            counts = {min(batch - 1, max(1, round(share * batch))) for share in SHARES[1:-1]}
            found += [Mixture(batch, longest, n) for n in sorted(counts) if holds(batch, longest)]
    return found if limits.max_kv_tokens > 2 * SHORT_TOKENS else []


def jobs(latency: Latency) -> list[Job]:
    return [_job(latency, mixture) for mixture in mixtures(latency)]


def unequal_table(latency: Latency, layer_class: int, equal: GridTable) -> UnequalTable | None:
    """None where too little was measured."""
    batches, lengths = _batches(latency), _lengths(latency)
    known = [m for m in mixtures(latency) if latency.points.known(m.point(layer_class))]
    if len(batches) < 2 or len(lengths) < 2 or not known:
        return None
    lookup = DecodeLookup(equal)
    excess = np.zeros((1, len(batches), len(lengths), len(SHARES)))
    for g, longest in enumerate(lengths):
        for b, batch in enumerate(batches):
            # a batch that no pool holds is taken to be like the largest one that it does
            fitting = [m for m in known if m.longest == longest and m.batch <= batch]
            if not fitting:
                return None
            same = [m for m in fitting if m.batch == max(f.batch for f in fitting)]
            at = [0.0, *(m.share for m in same), 1.0]
            values = [0.0, *(_excess(latency, m, layer_class, lookup) for m in same), 0.0]
            excess[0, b, g] = np.interp(SHARES, at, values)
    return UnequalTable(
        np.array([0]), np.array(batches, dtype=np.int64), np.array(lengths, dtype=np.int64), np.array(SHARES), excess
    )


def _excess(latency: Latency, mixture: Mixture, layer_class: int, equal: DecodeLookup) -> float:
    equal_s = equal.scalar(mixture.batch, sum(mixture.kv_tokens))
    measured_s = latency.points.figure(mixture.point(layer_class)).median_s
    return max(measured_s / equal_s, LEAST_FACTOR) - 1.0 if equal_s > 0 else 0.0


def _batches(latency: Latency) -> tuple[int, ...]:
    most = latency.subject.limits.max_batch
    return geometric(2, most, 4.0) if most > 2 else ()


def _lengths(latency: Latency) -> tuple[int, ...]:
    most = latency.subject.limits.max_kv_tokens
    return tuple(sorted({max(2 * SHORT_TOKENS, most // 6), most}))


def _job(latency: Latency, mixture: Mixture) -> Job:
    points = tuple(mixture.point(i) for i in range(len(latency.subject.classes)))
    return latency.attention_job(points, mixture.batch, lambda: latency.subject.decode_step(mixture.kv_tokens))
