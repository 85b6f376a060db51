"""Errors of prices for measured kernels that were not used to make them (cross-validation).

One row in ten of each table is left out, chosen by a hash of the row, and priced from the others. Matrix products of a
decode have a row for each request of the batch, those of a prompt a row for each token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from helios_sim.profile.importers.aiconfigurator import TABLE_HEAD_DIM
from helios_sim.profile.importers.between import DecodeTimes, PrefillTimes, ProductTimes
from helios_sim.profile.importers.kernel_tables import BF16, KernelSource, Measured
from helios_sim.profile.importers.reading import MS
from helios_sim.profile.roofline import Gemm
from helios_sim.profile.tables import FloatArray

PARTS = 10  # parts of the rows, one of which is left out
MOST_DECODES = 128  # rows of a product that counts as a decode's
LEAST_WIDTH = 1024  # of matrices: narrower ones only take the time of a launch
HEADS = ((8, 8), (16, 8), (32, 8), (64, 8))  # query and KV heads of the models in use


def is_left_out(values: Sequence[object], part: int = 0) -> bool:
    """Whether the row with these values belongs to this part of `PARTS`."""
    text = ",".join(map(str, values))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % PARTS == part


class _Rows:
    """The rows of a table that are left out, collected while the others are read."""

    def __init__(self, name: str, columns: Sequence[str], part: int) -> None:
        self._name, self._columns, self._part = name, columns, part
        self.left_out: dict[str, Any] = {}

    def keep(self, table: Mapping[str, Any]) -> Any:
        rows = zip(*(table[column].tolist() for column in self._columns), strict=True)
        out = np.array([is_left_out((self._name, *row), self._part) for row in rows])
        self.left_out = {column: values[out] for column, values in table.items()}
        return ~out

    def ratios(self, price_s: Callable[..., float]) -> FloatArray:
        """Prices divided by measured times."""
        rows = zip(*(self.left_out[column].tolist() for column in self._columns), strict=True)
        return np.asarray(np.array([price_s(*row) for row in rows]) / (self.left_out["latency"] * MS))


@cache
def products(source: KernelSource, kind: Measured = BF16, part: int = 0) -> tuple[FloatArray, FloatArray]:
    """Prices divided by measured times of matrix products that were left out: of decodes, and of prompts."""
    rows = _Rows(kind.dtype, ("m", "n", "k"), part)
    times = ProductTimes(source, kind, rows.keep)
    by_shape: dict[tuple[int, int], FloatArray] = {}

    def price_s(m: int, n: int, k: int) -> float:
        if (n, k) not in by_shape:
            by_shape[n, k] = times.time_s(Gemm(n, k))
        return float(np.interp(m, times.rows, by_shape[n, k]))

    found = rows.ratios(price_s)
    wide = np.minimum(rows.left_out["n"], rows.left_out["k"]) >= LEAST_WIDTH
    of_decodes = rows.left_out["m"] <= MOST_DECODES
    return found[wide & of_decodes], found[wide & ~of_decodes]


@cache
def attention(source: KernelSource, part: int = 0) -> tuple[FloatArray, FloatArray]:
    """The ratios for attention: of decodes, and of prompts without earlier context."""
    of_decodes, of_prompts = [], []
    for heads, kv_heads in HEADS:
        name = f"{heads},{kv_heads},{TABLE_HEAD_DIM}"
        rows = _Rows(name, ("batch_size", "step"), part)
        decodes = DecodeTimes(source, heads, kv_heads, TABLE_HEAD_DIM, keep=rows.keep)
        of_decodes.append(rows.ratios(lambda batch, step, of=decodes: of.time_s(batch, step + 1)))
        rows = _Rows(name, ("isl",), part)
        prompts = PrefillTimes(source, heads, kv_heads, TABLE_HEAD_DIM, keep=rows.keep)
        of_prompts.append(rows.ratios(lambda tokens, of=prompts: of.alone_s(tokens)))
    return np.concatenate(of_decodes), np.concatenate(of_prompts)
