"""What iterations would take at the card's ceilings, and which were priced beyond the measured grid.

Nothing waits for these figures, so many iterations are priced at once. Knows no request and no time.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import whole_ns
from helios_sim.serving.stats import RunStats

_BUFFERED_ITERATIONS = 4096

_Key = tuple[Profile, tuple[int, ...], bool, bool]


class Utilisation:
    """Adds to `floor_ns` and `outside_grid_iterations` of the stats; `flush` brings them up to date."""

    def __init__(self, stats: RunStats) -> None:
        self._stats = stats
        self._waiting: dict[_Key, list[tuple[Composition, int]]] = {}
        self._iterations = 0

    def add(self, profile: Profile, composition: Composition, iterations: int) -> None:
        """Counts the first `iterations` of the composition."""
        if composition.prefill:  # always a single iteration
            self._price(profile, composition)
            return
        checked, propagated = composition.check_tokens is not None, composition.propagated_tokens is not None
        key = (profile, composition.bounds, checked, propagated)
        self._waiting.setdefault(key, []).append((composition, iterations))
        self._iterations += iterations
        if self._iterations >= _BUFFERED_ITERATIONS:
            self.flush()

    def flush(self) -> None:
        for (profile, *_), parts in self._waiting.items():
            self._price(profile, _joined(parts))
        self._waiting.clear()
        self._iterations = 0

    def _price(self, profile: Profile, composition: Composition) -> None:
        self._stats.floor_ns += int(whole_ns(profile.iteration_floor_s(composition)).sum())
        self._stats.outside_grid_iterations += int(np.count_nonzero(profile.outside_grid(composition)))


def _joined(parts: list[tuple[Composition, int]]) -> Composition:
    """The first iterations of each part, one after the other."""

    def column(name: str) -> NDArray[np.int64]:
        return np.concatenate([getattr(composition, name)[:iterations] for composition, iterations in parts])

    first = parts[0][0]
    return Composition(
        bounds=first.bounds,
        decode_tokens=column("decode_tokens"),
        decode_kv_tokens=column("decode_kv_tokens"),
        sampled_tokens=column("sampled_tokens"),
        check_tokens=None if first.check_tokens is None else column("check_tokens"),
        propagated_tokens=None if first.propagated_tokens is None else column("propagated_tokens"),
    )
