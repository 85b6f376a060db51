"""What iterations would take at the card's ceilings, and which were priced beyond the measured grid.

Nothing waits for these figures, so many iterations are priced at once. Knows no request and no time.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import whole_ns
from helios_sim.serving.stats import RunStats

_BUFFERED_ITERATIONS = 4096

# Of a composition, by iteration; what a deployment or a profile has no use for is None.
_COLUMNS = (
    "decode_tokens", "decode_kv_tokens", "sampled_tokens", "check_tokens", "classifier_tokens", "decode_kv_least",
    "decode_kv_most", "propagated_tokens",
)  # fmt: skip

_Key = tuple[Profile, tuple[int, ...], tuple[str, ...]]  # with the columns that are there


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
        columns = tuple(name for name in _COLUMNS if getattr(composition, name) is not None)
        key = (profile, composition.bounds, columns)
        self._waiting.setdefault(key, []).append((composition, iterations))
        self._iterations += iterations
        if self._iterations >= _BUFFERED_ITERATIONS:
            self.flush()

    def flush(self) -> None:
        for (profile, _, columns), parts in self._waiting.items():
            self._price(profile, _joined(parts, columns))
        self._waiting.clear()
        self._iterations = 0

    def _price(self, profile: Profile, composition: Composition) -> None:
        self._stats.floor_ns += int(whole_ns(profile.iteration_floor_s(composition)).sum())
        self._stats.outside_grid_iterations += int(np.count_nonzero(profile.outside_grid(composition)))


def _joined(parts: list[tuple[Composition, int]], columns: tuple[str, ...]) -> Composition:
    """The first iterations of each part, one after the other. All parts have the same bounds and these columns."""
    joined: dict[str, Any] = {
        name: np.concatenate([getattr(composition, name)[:iterations] for composition, iterations in parts])
        for name in columns
    }
    return replace(parts[0][0], **joined)
