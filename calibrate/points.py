"""Raw timings by point, kept on disk as they come. Knows quantities by name only, and nothing of what they time.

One Parquet file holds every sample of every point and is replaced as a whole, so that an interrupted campaign leaves
the last whole one and the next call goes on from there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from helios_sim.errors import UserError

OUTLIER_IQRS = 3.0  # beyond the quartiles by that many: Tukey's "far out"


class Point(NamedTuple):
    """One place in one table. Tables by rows have `second` 0; tables of the whole model have layer class -1."""

    table: str
    layer_class: int
    first: int
    second: int = 0


@dataclass(frozen=True, slots=True)
class Figure:
    """What the samples of a point say."""

    median_s: float
    iqr_s: float
    samples: int
    outliers: int  # counted, never removed: a median does not mind them
    contended: int = 0  # taken while other processes had the cores

    @property
    def standard_error_s(self) -> float:
        """Of the median, were the samples normal: 1.253 sigma / sqrt(n), and sigma IQR / 1.349."""
        return float(0.929 * self.iqr_s / np.sqrt(self.samples))


def figure(samples_s: Iterable[float]) -> Figure:
    values = np.asarray(list(samples_s), dtype=np.float64)
    low, median, high = np.percentile(values, [25, 50, 75])
    reach = OUTLIER_IQRS * (high - low)
    outliers = int(np.count_nonzero((values < low - reach) | (values > high + reach)))
    return Figure(float(median), float(high - low), len(values), outliers)


class Points:
    """All samples of a campaign, in seconds. `save` is cheap enough to call after every few measurements."""

    def __init__(self, path: Path) -> None:
        """Reads what an earlier call left. Raises UserError when the file is no table of points."""
        self.path = path
        self._samples: dict[Point, list[float]] = {}
        self._contended: dict[Point, int] = {}
        self._figures: dict[Point, Figure] = {}  # until a sample is added
        if path.exists():
            try:
                table = pq.read_table(path, use_threads=False)
                columns = [table[name].to_pylist() for name in (*Point._fields, "contended", "samples_s")]
            except (pa.ArrowException, OSError, KeyError) as error:
                fix = "delete it to measure anew"
                raise UserError(str(path), str(error).splitlines()[0], "a table of points", fix) from error
            for name, layer_class, first, second, contended, samples in zip(*columns, strict=True):
                point = Point(name, layer_class, first, second)
                self._samples[point], self._contended[point] = samples, contended

    def add(self, samples: Mapping[Point, float], contended: bool = False) -> None:
        for point, time_s in samples.items():
            self._samples.setdefault(point, []).append(time_s)
            self._figures.pop(point, None)
            self._contended[point] = self._contended.get(point, 0) + contended

    def count(self, point: Point) -> int:
        return len(self._samples.get(point, ()))

    def samples_s(self, point: Point) -> tuple[float, ...]:
        return tuple(self._samples[point])

    def figure(self, point: Point) -> Figure:
        """KeyError where the point was not measured."""
        found = self._figures.get(point)
        if found is None:
            found = replace(figure(self._samples[point]), contended=self._contended[point])
            self._figures[point] = found
        return found

    def of(self, table: str, layer_class: int) -> dict[tuple[int, int], Figure]:
        """(first, second) -> figure, ascending."""
        found = [p for p in self._samples if p.table == table and p.layer_class == layer_class]
        return {(p.first, p.second): self.figure(p) for p in sorted(found)}

    def everything(self) -> dict[Point, Figure]:
        return {point: self.figure(point) for point in sorted(self._samples)}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ordered = sorted(self._samples)
        figures = [self.figure(p) for p in ordered]
        table = pa.table(
            {
                "table": pa.array([p.table for p in ordered]),
                "layer_class": pa.array([p.layer_class for p in ordered], pa.int16()),
                "first": pa.array([p.first for p in ordered], pa.int64()),
                "second": pa.array([p.second for p in ordered], pa.int64()),
                "median_s": pa.array([f.median_s for f in figures], pa.float64()),
                "iqr_s": pa.array([f.iqr_s for f in figures], pa.float64()),
                "samples": pa.array([f.samples for f in figures], pa.int64()),
                "outliers": pa.array([f.outliers for f in figures], pa.int64()),
                "contended": pa.array([f.contended for f in figures], pa.int64()),
                "samples_s": pa.array([self._samples[p] for p in ordered], pa.list_(pa.float64())),
            }
        )
        partial = self.path.with_name(self.path.name + ".partial")
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, self.path)
