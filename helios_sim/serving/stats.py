"""Measurements of one replica: integrals over the run, gaps between tokens, sliding means, samples for pictures.

Integrals are whole numbers, so they add up to the same bits in any order.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from helios_sim.policy.telemetry import LatestRequests
from helios_sim.request import Slo

_LONGEST_NS = 10**15  # 11.6 days; anything longer falls into one last bucket


@cache
def bucket_edges_ns() -> NDArray[np.int64]:
    """Upper edges in ns, inclusive: 0, 1, 2, ... then 0.1 % apart. Built from integers alone, hence portable."""
    edges, edge = list(range(1000)), 1000
    while edge < _LONGEST_NS:
        edges.append(edge)
        edge += edge // 1000
    edges += [edge, np.iinfo(np.int64).max]
    array = np.array(edges, dtype=np.int64)
    array.flags.writeable = False
    return array


class GapHistogram:
    """Counts of gaps by length, with the exact sum, shortest and longest."""

    __slots__ = ("counts", "longest_ns", "shortest_ns", "total_count", "total_ns")
    counts: NDArray[np.int64]  # by bucket
    total_count: int
    total_ns: int
    shortest_ns: int | None
    longest_ns: int | None

    def __init__(self) -> None:
        self.counts = np.zeros(len(bucket_edges_ns()), dtype=np.int64)
        self.total_count = self.total_ns = 0
        self.shortest_ns = self.longest_ns = None

    def add(self, gaps_ns: ArrayLike, counts: int | ArrayLike = 1) -> None:
        """Count each gap (>= 0 ns) as often as `counts` says (>= 0; one for all, or one of each)."""
        gaps = np.asarray(gaps_ns, dtype=np.int64).ravel()
        times: Any = counts
        if isinstance(counts, int):  # the hot path: no array of equal counts is made
            n, n_least = counts * gaps.size, counts
        else:
            times = np.broadcast_to(np.asarray(counts, dtype=np.int64), np.shape(gaps_ns)).ravel()
            gaps, times = gaps[times != 0], times[times != 0]
            n, n_least = int(times.sum()), int(times.min(initial=1))
        if n == 0:
            return
        shortest, longest = int(gaps.min()), int(gaps.max())
        if shortest < 0 or n_least < 0:
            raise ValueError(f"gap {shortest} ns, count {n_least}: neither may be negative")
        np.add.at(self.counts, bucket_edges_ns().searchsorted(gaps), times)
        self.total_count += n
        self.total_ns += int((gaps * times).sum())
        self._widen(shortest, longest)

    def add_counted(self, n: int, total_ns: int, shortest_ns: int, longest_ns: int) -> None:
        """Take note of n gaps that are in `counts` already."""
        if n:
            self.total_count += n
            self.total_ns += total_ns
            self._widen(shortest_ns, longest_ns)

    def merge(self, other: GapHistogram) -> None:
        """Add all that another histogram has counted."""
        self.counts += other.counts
        self.total_count += other.total_count
        self.total_ns += other.total_ns
        if other.shortest_ns is not None and other.longest_ns is not None:
            self._widen(other.shortest_ns, other.longest_ns)

    def _widen(self, shortest_ns: int, longest_ns: int) -> None:
        self.shortest_ns = shortest_ns if self.shortest_ns is None else min(self.shortest_ns, shortest_ns)
        self.longest_ns = longest_ns if self.longest_ns is None else max(self.longest_ns, longest_ns)

    @property
    def mean_ns(self) -> float | None:
        """Exact mean; None without gaps."""
        return self.total_ns / self.total_count if self.total_count else None

    def percentile_ns(self, q: float) -> int | None:
        """The gap that at least q per cent of the gaps do not exceed (nearest rank); None without gaps.

        The upper edge of its bucket, so at most 0.1 % (or 1 ns) too long, and never beyond the longest gap seen.
        """
        if not 0 <= q <= 100:
            raise ValueError(f"q={q}: a percentile lies between 0 and 100")
        if self.longest_ns is None:
            return None
        rank = max(1, int(np.ceil(q / 100 * self.total_count)))
        bucket = int(np.searchsorted(np.cumsum(self.counts), rank))
        return min(int(bucket_edges_ns()[bucket]), self.longest_ns)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, GapHistogram):
            return NotImplemented
        mine = (self.total_count, self.total_ns, self.shortest_ns, self.longest_ns)
        theirs = (other.total_count, other.total_ns, other.shortest_ns, other.longest_ns)
        return mine == theirs and np.array_equal(self.counts, other.counts)

    __hash__ = None  # type: ignore[assignment]  # mutable


@dataclass(slots=True)
class RunStats:
    """Counts and time integrals in ns. `merge` adds another replica's."""

    busy_ns: int = 0  # iterations in progress
    floor_ns: int = 0  # roofline floor of the same iterations
    iterations: int = 0
    outside_grid_iterations: int = 0
    decode_iterations: int = 0
    decode_ns: int = 0  # iterations with decodes
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
    prefix_caching: int = 0  # replicas with prefix caching
    prefix_cache_queries: int = 0  # prompt tokens looked up, and those that were found
    prefix_cache_hits: int = 0
    prefix_cache_refound: int = 0  # tokens that preempted requests found again
    verifications: int = 0  # verifications of one request's drafts
    drafted_tokens: int = 0
    tested_drafts: int = 0  # drafts up to the first rejected one of each verification
    accepted_drafts: int = 0
    draft_ns: int = 0  # time of drafting; on a drafter's own card, its prompts included
    verify_ns: int = 0  # with a drafter on its own card: time of the other card, and floor of the drafter's work
    draft_floor_ns: int = 0
    splits: int = 0  # batches split at an exit
    held_tokens: int = 0  # waits of tokens at an exit, and their total time
    held_token_ns: int = 0
    released_tokens: int = 0  # tokens released at a ramp while the model went on
    released_ns: int = 0  # total time by which tokens came before the end of their iteration
    late_layers: int = 0  # layers that came from host memory for an iteration, and the time that this added
    late_ns: int = 0
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
            elif name == "hbm_peak_bytes":  # the fullest card counts
                self.hbm_peak_bytes = max(mine, theirs)
            else:
                setattr(self, name, mine + theirs)


class Recent:
    """Latest completed requests of a replica."""

    def __init__(self, slo: Slo) -> None:
        self._slo = slo
        self.completed(np.zeros((0, 7), np.int64))

    def completed(self, rows: NDArray[np.int64]) -> None:
        """Set the latest completed requests, oldest first, (n, 7): arrival, scheduling, first and last token in ns,
        output tokens, prompt tokens, and cached prompt tokens."""
        self._rows, self._sums = rows, np.add.reduce(rows, 0).tolist()

    @property
    def latest(self) -> LatestRequests:
        return LatestRequests(self._rows[:, :5], self._slo)

    @property
    def prompt_tokens_mean(self) -> float | None:
        return self._sums[5] / len(self._rows) if len(self._rows) else None

    @property
    def hit_share(self) -> float | None:
        """The share of their prompt tokens found in the prefix cache; None before a request has completed."""
        return self._sums[6] / self._sums[5] if len(self._rows) else None

    @property
    def output_tokens_mean(self) -> float | None:
        return self._sums[4] / len(self._rows) if len(self._rows) else None


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
        """Keep only the first row of each placement from now on, for runs without pictures."""
        self.interval_ns = FOREVER_NS

    def sample(
        self, time_ns: int, model: str, layers: int, running: int, queued: int, kv_used_bytes: int, weight_bytes: int
    ) -> None:
        if self.rows:
            last = self.rows[-1]
            if time_ns - last[0] < self.interval_ns and last[1:3] == (model, layers):
                return
        self.keep([(time_ns, model, layers, running, queued, kv_used_bytes, weight_bytes)])

    def keep(self, rows: Iterable[tuple[int, str, int, int, int, int, int]]) -> None:
        """Add rows. At most the last of them may make the timeline too long."""
        self.rows.extend(rows)
        if len(self.rows) > SAMPLES:
            self.interval_ns *= 2
            del self.rows[1::2]
