"""Integrals over one replica's run. All are integers, so they add up to the same bits in any order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from helios_sim.serving.histogram import GapHistogram


@dataclass(slots=True)
class RunStats:
    """Counts and time integrals in ns. `merge` adds another replica's."""

    busy_ns: int = 0  # iterations in progress
    floor_ns: int = 0  # what the same iterations would take at the card's ceilings
    iterations: int = 0
    outside_grid_iterations: int = 0
    decode_iterations: int = 0
    decode_ns: int = 0  # iterations in which something decodes
    decode_batch_ns: int = 0  # decoding requests x time
    kv_block_ns: int = 0  # used blocks x busy time
    kv_pool_block_ns: int = 0  # pool blocks x busy time
    batch_capacity_blocks: int = 0  # blocks of the pool at the end, for the capacity in requests
    block_tokens: int = 16
    hbm_peak_bytes: int = 0
    switches: int = 0  # the active model changed
    loads: int = 0  # transfers of weights
    switch_time_ns: int = 0  # from a decision to change the placement until it is in force
    load_ns: int = 0  # transfers in progress
    evaluation_ns: int = 0  # time under deployments that observe or probe
    preemptions: int = 0
    tokens_by_depth: dict[str, dict[int, int]] = field(default_factory=dict)  # by model, then by layers run
    transitions_ns: list[int] = field(default_factory=list)  # when a changed placement came into force
    itl: GapHistogram = field(default_factory=GapHistogram)

    def count_by_depth(self, model: str, tokens: NDArray[np.int64]) -> None:
        """Add tokens of a model, (layers + 1,) by the layers that they ran."""
        counts = self.tokens_by_depth.setdefault(model, {})
        for depth in np.flatnonzero(tokens).tolist():
            counts[depth] = counts.get(depth, 0) + int(tokens[depth])

    def merge(self, other: RunStats) -> None:
        for name in self.__slots__:
            mine, theirs = getattr(self, name), getattr(other, name)
            if isinstance(mine, GapHistogram):
                mine.merge(theirs)
            elif isinstance(mine, list):
                mine[:] = sorted(mine + theirs)
            elif isinstance(mine, dict):
                for model, counts in theirs.items():
                    ours = mine.setdefault(model, {})
                    for depth, n in counts.items():
                        ours[depth] = ours.get(depth, 0) + n
            elif name == "block_tokens":
                continue
            elif name == "hbm_peak_bytes":  # of the fullest card
                self.hbm_peak_bytes = max(mine, theirs)
            else:
                setattr(self, name, mine + theirs)
