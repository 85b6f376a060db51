"""Decode batches of two lengths as the table of unequal KV lengths. Knows the file, not the card.

`skew.csv`: each row is a batch of `n` decodes, `nb` of them with `kv_big` tokens and the others with `kvs`, beside a
prompt chunk of `pc` tokens after `kp` (0: none). Its three times are of that batch (t_skew_us) and of batches in which
all have the mean or the greatest length (t_mean_us, t_max_us).

The profiler writes these times as the SUM over its timed repetitions, where attention.csv holds their mean: its
measurement adds up every sample of the attention layer that a shot returns, and a shot of N repetitions returns N.
N is `measurement_iterations` in meta.yaml (3 unless set otherwise). Where both files hold the same batch, the ratio
of their times tells the same number, and it is the ratio that is divided by.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np

from helios_sim.errors import UserError
from helios_sim.profile.importers.attention_grid import AttentionGrid
from helios_sim.profile.importers.reading import US, read_columns
from helios_sim.profile.terms import UnequalTable

SHARES = np.array([0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 0.9, 1.0])
_COLUMNS = ("n", "nb", "pc", "kp", "kvs", "kv_big", "kv_mean", "t_mean_us", "t_skew_us", "skew")


def unequal_table(path: Path, grid: AttentionGrid, repetitions: int) -> UnequalTable:
    """The table of `terms`. Only the ratio of lengths that was measured throughout is used, the most frequent one."""
    columns = read_columns(path, _COLUMNS)
    ratio, counts = np.unique(np.round(columns["skew"].astype(np.float64), 3), return_counts=True)
    usual = np.isclose(columns["skew"].astype(np.float64), ratio[counts.argmax()], atol=2e-3)
    n, nb, pc, kp, kv_big = (columns[c][usual].astype(np.int64) for c in ("n", "nb", "pc", "kp", "kv_big"))
    mean_s, skew_s = (columns[c][usual].astype(np.float64) * US / repetitions for c in ("t_mean_us", "t_skew_us"))
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
                if len(measured) > 1:  # lengths that did not fit are taken from the next shorter one
                    shares = sorted(measured)
                    values = [float(np.median(measured[share])) for share in shares]
                    before = np.interp(SHARES, [*shares, 1.0], [*values, 0.0])
                table[i, j, k] = before
    return UnequalTable(chunks, batches, longest, SHARES, np.maximum(table, -0.9))


def repetitions_of(path: Path, grid: AttentionGrid, stated: int | None) -> int:
    """How many timed repetitions the file sums over: the stated number, checked against attention.csv.

    Raises UserError where the two contradict each other, or where nothing tells.
    """
    columns = read_columns(path, _COLUMNS)
    alone = columns["pc"].astype(np.int64) == 0
    n, kv, time_s = (columns[c][alone].astype(np.float64) for c in ("n", "kv_mean", "t_mean_us"))
    ratios = [
        t * US / grid.decode_s(int(b), int(v) + 1) for b, v, t in zip(n, kv, time_s, strict=True)
        if b <= grid.batches[-1] and v < grid.kvs[-1]
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
