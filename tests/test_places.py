"""The types of compiled code: what it reads and writes by the places of arrays is what NumPy reads and writes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("numba")

from helios_sim.core import machine, native, places
from helios_sim.core.layout import Kind

pytestmark = pytest.mark.skipif(not machine._can_compile(), reason="Numba compiles nothing here")
ROW = Kind.of("Row", ("one", "two"), floats=("share",))


class Pair(NamedTuple):
    rows: Any
    flags: Any


class Group(NamedTuple):
    pair: Pair
    grid: Any


def work(groups: Any, numbers: Any, deep: Any) -> int:
    """Of the two groups the second: reads and writes with one index and with several, fields, lengths and shapes."""
    group = groups[1]
    rows, flags, grid = group.pair.rows, group.pair.flags, group.grid
    for i in range(len(rows)):
        row = rows[i]
        row.one += i
        row.share = row.share / 2 + grid[i, 1]
    rows[0] = rows[len(rows) - 1]
    flags[1, 2] = 1 if flags[0, 0] else 0
    grid[0, 0] = grid.shape[0] * 10 + grid.shape[1]
    numbers[2] += rows[1].two
    return int(deep[1, 0, 1, 2, 1])


@pytest.fixture
def arrays() -> tuple[Any, ...]:
    rng = np.random.default_rng(0)

    def group(n: int) -> Group:
        rows = np.zeros(n, ROW.dtype)
        rows["one"], rows["two"], rows["share"] = rng.integers(-9, 9, n), rng.integers(0, 9, n), rng.random(n)
        return Group(Pair(rows, rng.integers(0, 2, (2, 3)).astype(np.bool_)), rng.random((n, 2)))

    return [group(2), group(4)], rng.integers(0, 9, 3), rng.integers(0, 99, (2, 1, 2, 3, 2)).astype(np.float64)


def every(groups: Any, *others: Any) -> list[Any]:
    return [array.copy() for arg in (*groups, *others) for array in places.arrays_of(arg)]


def test_compiled_code_reads_and_writes_as_numpy_does(arrays: tuple[Any, ...]) -> None:
    import numba

    groups, *others = arrays
    before = every(groups, *others)
    written = np.array([[places.place_of(array) for array in places.arrays_of(group)] for group in groups])
    with machine._quickly_compiled():
        jit = numba.njit(error_model="numpy", _nrt=False, pipeline_class=native.compiler_class())
        kinds = [places.array_type(places.type_of(groups[0])), *map(places.type_of, others)]
        call = native.Call(native.Native(native.compiled(jit(work), kinds)))
    found = call(written, *others)
    compiled = every(groups, *others)
    for array, was in zip([a for arg in (*groups, *others) for a in places.arrays_of(arg)], before, strict=True):
        array[...] = was
    assert found == work(groups, *others)
    for one, other in zip(compiled, every(groups, *others), strict=True):
        assert one.tobytes() == other.tobytes()
    assert any(one.tobytes() != was.tobytes() for one, was in zip(compiled, before, strict=True))


def test_types_are_one_where_names_dtypes_and_axes_are() -> None:
    one, other = (places.type_of(Pair(np.zeros(n, ROW.dtype), np.zeros((n, 2)))) for n in (1, 3))
    assert one is other
    assert places.type_of(np.zeros(2)) is not places.type_of(np.zeros((2, 1)))
    assert places.type_of(np.zeros(2)) is not places.type_of(np.zeros(2, np.int64))
