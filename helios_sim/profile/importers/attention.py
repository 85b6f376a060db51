"""Attention tables of a layer-wise profiler: the grid of attention.csv, and batches of two lengths of skew.csv.

`attention.csv` has times over (chunk, context, decodes, KV). The measured grid has holes: not every chunk was measured
with every context, and the largest batches only with short ones. Missing points lie on the line through their
neighbours along one axis, beyond the last point on its slope.

`skew.csv`: each row is a batch of `n` decodes, `nb` of them with `kv_big` tokens and the others with `kvs`, beside a
prompt chunk of `pc` tokens after `kp` (0: none). Its three times are of that batch (t_skew_us) and of batches in which
all have the mean or the greatest length (t_mean_us, t_max_us). The profiler writes these times as the SUM over its
timed repetitions, where attention.csv holds their mean: its measurement adds up every sample of the attention layer
that a shot returns, and a shot of N repetitions returns N. N is `measurement_iterations` in meta.yaml (3 unless set
otherwise). If both files hold the same batch, the ratio of their times also gives N, and times are divided by this
ratio.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from helios_sim.errors import UserError
from helios_sim.profile.composition import IntArray
from helios_sim.profile.importers.reading import US, FloatArray, along, read_columns, times, whole
from helios_sim.profile.tables import GridTable, MixedTable, UnequalTable

_AXES = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")


class AttentionGrid:
    """Seconds of one layer's attention. KV lengths include the new token, which the file's `kv_decode` excludes."""

    def __init__(self, path: Path) -> None:
        columns = read_columns(path, (*_AXES, "time_us"), may_differ=())
        chunk, context, batch, kv = (whole(path, a, columns[a]) for a in _AXES)
        time_s = times(path, "time_us", columns["time_us"], US)
        points, place = np.unique(np.stack((chunk, context, batch, kv)), axis=1, return_inverse=True)
        (chunk, context, batch, kv), place = points, place.ravel()
        time_s = np.bincount(place, time_s) / np.bincount(place)  # repeats averaged
        kv = np.where(batch > 0, kv + 1, 0)
        self.chunks, self.contexts = np.unique(chunk[chunk > 0]), np.unique(context[chunk > 0])
        self.batches, self.kvs = np.unique(batch[batch > 0]), np.unique(kv[batch > 0])
        few = [n for n in ("chunks", "contexts", "batches", "kvs") if len(getattr(self, n)) < 2]
        if few:
            raise UserError(str(path), few[0], "two points or more of prompts and of decodes", "measure more points")
        self._by: dict[tuple[int, int], tuple[FloatArray, FloatArray, FloatArray]] = {}
        for c, b in sorted({*zip(chunk.tolist(), batch.tolist(), strict=True)}):
            own = (chunk == c) & (batch == b)
            self._by[c, b] = context[own].astype(np.float64), kv[own].astype(np.float64), time_s[own]
        self.prompts_s = np.stack([self._line(int(c), 0, self.contexts) for c in self.chunks])  # (C, X)
        self.decodes_s = self._filled([self._row(0, int(b)) for b in self.batches])  # (B, V)

    def decode_table(self) -> GridTable:
        return GridTable(self.batches, self.kvs, self.decodes_s)

    def prefill_table(self) -> GridTable:
        return GridTable(self.chunks, self.contexts, self.prompts_s)

    def mixed_table(self) -> MixedTable | None:
        """Seconds that decodes add to a chunk; None if no mixed batch was measured."""
        mixed = [c for c in self.chunks.tolist() if any((c, b) in self._by for b in self.batches.tolist())]
        if len(mixed) < 2:
            return None
        seconds = np.zeros((len(mixed), len(self.contexts), len(self.batches), len(self.kvs)))
        for i, c in enumerate(mixed):
            alone_s = self.prompts_s[self.chunks.tolist().index(c)][:, None]
            planes = [self._plane(c, int(b)) for b in self.batches]
            added = [None if plane is None else np.maximum(plane - alone_s, 0.0) for plane in planes]
            seconds[i] = np.moveaxis(self._filled(added), 0, 1)
        return MixedTable(np.array(mixed, np.int64), self.contexts, self.batches, self.kvs, seconds)

    def chunk_s(self, chunk: int, context: int) -> float:
        """Seconds of a chunk without decodes; 0 for an empty chunk."""
        if chunk == 0:
            return 0.0
        at = np.array([float(context)])
        by_chunk = np.array([along(self.contexts.astype(np.float64), row, at)[0] for row in self.prompts_s])
        return float(along(self.chunks.astype(np.float64), by_chunk, np.array([float(chunk)]))[0])

    def decode_s(self, batch: int, kv: int) -> float:
        """Seconds of decodes alone."""
        at = np.array([float(kv)])
        by_batch = np.array([along(self.kvs.astype(np.float64), row, at)[0] for row in self.decodes_s])
        return float(along(self.batches.astype(np.float64), by_batch, np.array([float(batch)]))[0])

    def _line(self, chunk: int, batch: int, contexts: IntArray) -> FloatArray:
        if (chunk, batch) not in self._by:
            raise UserError("attention.csv", chunk, "every chunk measured without decodes too", "measure these")
        points, _, seconds = self._by[chunk, batch]
        order = np.argsort(points)
        return along(points[order], seconds[order], contexts.astype(np.float64))

    def _row(self, chunk: int, batch: int) -> FloatArray | None:
        """Seconds (V,) of decodes alone; None if this batch was not measured."""
        if (chunk, batch) not in self._by:
            return None
        _, points, seconds = self._by[chunk, batch]
        order = np.argsort(points)
        return along(points[order], seconds[order], self.kvs.astype(np.float64))

    def _plane(self, chunk: int, batch: int) -> FloatArray | None:
        """Seconds (X, V) of a chunk with `batch` decodes; None if this batch was not measured."""
        if (chunk, batch) not in self._by:
            return None
        contexts, kvs, seconds = self._by[chunk, batch]
        measured = np.unique(contexts)
        rows = []
        for context in measured:
            own = contexts == context
            order = np.argsort(kvs[own])
            rows.append(along(kvs[own][order], seconds[own][order], self.kvs.astype(np.float64)))
        by_kv = np.stack(rows, axis=1)  # (V, measured contexts)
        return np.stack([along(measured, row, self.contexts.astype(np.float64)) for row in by_kv], axis=1)

    def _filled(self, by_batch: list[FloatArray | None]) -> FloatArray:
        """Seconds (B, ...). An unmeasured batch scales from the next smaller one, or from the first measured batch."""
        known = [k for k, values in enumerate(by_batch) if values is not None]
        if not known:
            raise UserError("attention.csv", "no decodes", "decodes alone, by batch and KV", "measure these")
        found = []
        for k, values in enumerate(by_batch):
            near = max((n for n in known if n <= k), default=known[0])
            found.append(
                np.asarray(by_batch[near]) * (self.batches[k] / self.batches[near]) if values is None else values
            )
        return np.stack(found)


SHARES = np.array([0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.9, 1.0])
_COLUMNS = ("n", "nb", "pc", "kp", "kvs", "kv_big", "kv_mean", "t_mean_us", "t_skew_us", "skew")
_OTHERS = ("regime", "ratio", "t_max_us", "alpha")  # follow from `_COLUMNS`


def unequal_table(path: Path, grid: AttentionGrid, repetitions: int) -> UnequalTable:
    """The table of unequal lengths, from rows with the most frequent ratio of lengths, which covers all batches."""
    columns = read_columns(path, _COLUMNS, may_differ=_OTHERS)
    ratio, counts = np.unique(np.round(columns["skew"].astype(np.float64), 3), return_counts=True)
    usual = np.isclose(columns["skew"].astype(np.float64), ratio[counts.argmax()], atol=2e-3)
    n, nb, pc, kp, kv_big = (whole(path, c, columns[c][usual]) for c in ("n", "nb", "pc", "kp", "kv_big"))
    mean_s, skew_s = (times(path, c, columns[c][usual], US) / repetitions for c in ("t_mean_us", "t_skew_us"))
    if not np.all((nb > 0) & (nb < n)):
        raise UserError(f"{path}: nb", int(nb.min()), "from 1 to n - 1", "measure again")

    excess: dict[tuple[int, int, int], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    chunk_s = {key: grid.chunk_s(*key) for key in {*zip(pc.tolist(), kp.tolist(), strict=True)}}
    for row in range(len(n)):
        decodes_s = mean_s[row] - chunk_s[int(pc[row]), int(kp[row])]
        if decodes_s > 0:
            share = float(nb[row] / n[row])
            excess[int(pc[row]), int(n[row]), int(kv_big[row])][share].append((skew_s[row] - mean_s[row]) / decodes_s)
    chunks, batches, longest = np.unique(np.append(pc, 0)), np.unique(n), np.unique(kv_big)
    if len(batches) < 2 or len(longest) < 2:
        raise UserError(str(path), f"{len(batches)} batches", "two batches and lengths or more", "measure more points")
    table = np.zeros((len(chunks), len(batches), len(longest), len(SHARES)))
    for i, c in enumerate(chunks.tolist()):
        for j, b in enumerate(batches.tolist()):
            before = np.zeros(len(SHARES))
            for k, length in enumerate(longest.tolist()):
                measured = excess.get((c, b, length), {})
                if len(measured) > 1:  # a length that did not fit takes the values of the next shorter one
                    shares = sorted(measured)
                    values = [float(np.median(measured[share])) for share in shares]
                    before = np.interp(SHARES, [*shares, 1.0], [*values, 0.0])
                table[i, j, k] = before
    return UnequalTable(chunks, batches, longest, SHARES, np.maximum(table, -0.9))


def repetitions_of(path: Path, grid: AttentionGrid, stated: int | None) -> int:
    """How many timed repetitions the file sums over: the stated number, checked against attention.csv.

    Raises UserError if the two contradict each other, or if neither gives a number.
    """
    columns = read_columns(path, _COLUMNS)
    alone = whole(path, "pc", columns["pc"]) == 0
    n, kv, time_us = (columns[c][alone] for c in ("n", "kv_mean", "t_mean_us"))
    whole(path, "n", n, 1)
    time_s = times(path, "t_mean_us", time_us, US)
    ratios = [
        t / decode_s for b, v, t in zip(n, kv, time_s, strict=True)
        if b <= grid.batches[-1] and 0 <= v < grid.kvs[-1] and (decode_s := grid.decode_s(int(b), int(v) + 1)) > 0
    ]  # fmt: skip
    if not ratios:
        if stated is None:
            raise UserError("measurement_iterations", None, "given in meta.yaml, or seen in attention.csv", "add it")
        return stated
    seen = float(np.median(ratios))
    found = max(round(seen), 1)
    if abs(seen - found) > 0.15 * found:
        raise UserError(f"{path}: t_mean_us", f"{seen:.2f} x attention.csv", "a whole multiple of it", "measure again")
    if stated is not None and found not in (stated, 1):
        allowed = f"{stated} x attention.csv (measurement_iterations in meta.yaml) or the same"
        raise UserError(f"{path}: t_mean_us", f"{seen:.2f} x attention.csv", allowed, "correct meta.yaml")
    return found
