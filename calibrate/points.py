"""Timings by point, kept on disk as they come. Knows quantities by name only, and nothing of what they time.

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

STANDARD_ERROR = 0.929  # of a median, in IQR / sqrt(n), were the samples normal: 1.253 sigma, and sigma IQR / 1.349
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
    contended: bool = False  # all samples were taken while other processes had the cores: none is clean

    @property
    def standard_error_s(self) -> float:
        return float(STANDARD_ERROR * self.iqr_s / np.sqrt(self.samples))


def figure(samples_s: Iterable[float]) -> Figure:
    values = np.asarray(list(samples_s), dtype=np.float64)
    low, median, high = np.percentile(values, [25, 50, 75])
    reach = OUTLIER_IQRS * (high - low)
    outliers = int(np.count_nonzero((values < low - reach) | (values > high + reach)))
    return Figure(float(median), float(high - low), len(values), outliers)


class Points:
    """All samples of a campaign, in seconds. `save` is cheap enough to call after every few measurements.

    Samples taken while other processes had the cores are kept apart and speak only where there are no others. A point
    belongs to the anchor that was timed beside its samples; figures are that anchor's scale times the samples.
    """

    def __init__(self, path: Path) -> None:
        """Reads what an earlier call left. Raises UserError when the file is no table of points."""
        self.path = path
        self._scales: Mapping[str, float] = {}
        self._anchors: dict[Point, str] = {}
        self._clean: dict[Point, list[float]] = {}
        self._contended: dict[Point, list[float]] = {}
        self._figures: dict[Point, Figure] = {}  # until a sample is added
        if path.exists():
            try:
                table = pq.read_table(path, use_threads=False)
                columns = [table[name].to_pylist() for name in (*Point._fields, "anchor", "samples_s", "contended_s")]
            except (pa.ArrowException, OSError, KeyError) as error:
                fix = "delete it to measure anew"
                raise UserError(str(path), str(error).splitlines()[0], "a table of points", fix) from error
            for name, layer_class, first, second, anchor, clean, contended in zip(*columns, strict=True):
                point = Point(name, layer_class, first, second)
                self._anchors[point] = anchor
                for of, samples in ((self._clean, clean), (self._contended, contended)):
                    if samples:
                        of[point] = samples

    def add(self, samples: Mapping[Point, float], contended: bool = False, anchor: str = "") -> None:
        for point, time_s in samples.items():
            self._anchors.setdefault(point, anchor)
            (self._contended if contended else self._clean).setdefault(point, []).append(time_s)
            self._figures.pop(point, None)

    def count(self, point: Point) -> int:
        """Clean samples."""
        return len(self._clean.get(point, ()))

    def known(self, point: Point) -> bool:
        """Whether there is any sample, clean or not."""
        return point in self._clean or point in self._contended

    def samples_s(self, point: Point) -> tuple[float, ...]:
        return tuple(self._clean.get(point) or self._contended[point])

    def figure(self, point: Point) -> Figure:
        """KeyError where the point was not measured."""
        found = self._figures.get(point)
        if found is None:
            scale = self._scales.get(self._anchors[point], 1.0)
            scaled_s = (scale * time_s for time_s in self.samples_s(point))
            found = replace(figure(scaled_s), contended=point not in self._clean)
            self._figures[point] = found
        return found

    def rescale(self, scales: Mapping[str, float]) -> None:
        """By anchor; 1 for those that are not named."""
        self._scales = scales
        self._figures.clear()

    def of(self, table: str, layer_class: int) -> dict[tuple[int, int], Figure]:
        """(first, second) -> figure, ascending."""
        found = [p for p in self._points() if p.table == table and p.layer_class == layer_class]
        return {(p.first, p.second): self.figure(p) for p in found}

    def everything(self) -> dict[Point, Figure]:
        return {point: self.figure(point) for point in self._points()}

    def _points(self) -> list[Point]:
        return sorted({*self._clean, *self._contended})

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ordered = self._points()
        figures = [self.figure(p) for p in ordered]
        table = pa.table(
            {
                "table": pa.array([p.table for p in ordered]),
                "layer_class": pa.array([p.layer_class for p in ordered], pa.int16()),
                "first": pa.array([p.first for p in ordered], pa.int64()),
                "second": pa.array([p.second for p in ordered], pa.int64()),
                "anchor": pa.array([self._anchors[p] for p in ordered]),
                "median_s": pa.array([f.median_s for f in figures], pa.float64()),
                "iqr_s": pa.array([f.iqr_s for f in figures], pa.float64()),
                "samples": pa.array([f.samples for f in figures], pa.int64()),
                "outliers": pa.array([f.outliers for f in figures], pa.int64()),
                "samples_s": pa.array([self._clean.get(p, []) for p in ordered], pa.list_(pa.float64())),
                "contended_s": pa.array([self._contended.get(p, []) for p in ordered], pa.list_(pa.float64())),
            }
        )
        partial = self.path.with_name(self.path.name + ".partial")
        pq.write_table(table, partial, compression="zstd")
        os.replace(partial, self.path)
