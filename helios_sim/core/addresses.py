"""The tables of replicas as the compiled loop takes them: where they lie in memory.

Numba takes as long to look at every array of a call as an iteration takes. So it gets one array of addresses and makes
the others from it, all of the types that the code was compiled for.
"""

from __future__ import annotations

from importlib import import_module
from itertools import accumulate, repeat
from operator import is_
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.core.layout import IntArray, Tables
from helios_sim.core.native import address_of, arrays_of

_DIMENSIONS = 5  # most that an array has
_GROUPS = 1024  # of arrays, whose addresses are remembered


class Compiled(Protocol):
    def require_types(self, tables: Tables) -> None:
        """TypeError where the compiled code reads tables of another kind."""
        ...

    def require_type(self, place: int, array: NDArray[Any]) -> None:
        """TypeError where the compiled code reads another kind of array at that place of the tables."""
        ...


class Replicas:
    """The tables of R replicas, as `raw`: themselves where the loop is interpreted, else (R, arrays, 1 + dimensions)
    address and shape of each array."""

    def __init__(self, n: int, machine: Compiled | None) -> None:
        self._machine = machine
        self._tables: list[Tables | None] = [None] * n
        self._addresses: IntArray | None = None
        self._places: list[int] = []  # of the first array of each field of the tables
        self._of_groups: dict[int, tuple[Any, IntArray]] = {}  # by id, groups that were put before, and their rows

    @property
    def raw(self) -> Any:
        return self._tables if self._machine is None else self._addresses

    def put(self, number: int, tables: Tables) -> None:
        """The loop reads these arrays from now on, until others are put in their place."""
        known = self._tables[number]
        if self._machine is None or (known is not None and all(map(is_, known, tables))):
            self._tables[number] = tables
            return
        if self._addresses is None:
            self._machine.require_types(tables)
            sizes = [sum(1 for _ in arrays_of(field)) for field in tables]
            self._places = [0, *accumulate(sizes)]
            self._addresses = np.zeros((len(self._tables), self._places[-1], 1 + _DIMENSIONS), np.int64)
        self._tables[number] = tables
        rows = self._addresses[number]
        for before, field, place in zip(repeat(None) if known is None else known, tables, self._places, strict=False):
            if field is before:
                continue
            if not isinstance(field, tuple):
                rows[place] = self._row(place, field)
                continue
            known_group = self._of_groups.get(id(field))  # most are put again and again, as models take turns
            if known_group is None or known_group[0] is not field:
                if len(self._of_groups) == _GROUPS:
                    self._of_groups.clear()
                found = np.array([self._row(place + n, array) for n, array in enumerate(arrays_of(field))])
                known_group = self._of_groups[id(field)] = field, found
            rows[place : place + len(known_group[1])] = known_group[1]

    def _row(self, place: int, array: NDArray[Any]) -> list[int]:
        """Where an array lies, and its shape."""
        assert self._machine is not None
        self._machine.require_type(place, array)
        return [address_of(array), *array.shape, *[0] * (_DIMENSIONS - array.ndim)]


def register(tables: Tables) -> None:
    """Lets compiled code make a replica's tables, all of these types, from their addresses."""
    numba, extending = import_module("numba"), import_module("numba.extending")
    cgutils, arrays = import_module("numba.core.cgutils"), import_module("numba.np.arrayobj")
    route = import_module("helios_sim.core.route")
    types = numba.types

    def writable(kind: Any) -> Any:
        if isinstance(kind, types.Array):
            return types.Array(kind.dtype, kind.ndim, "C")
        return types.BaseTuple.from_types([writable(each) for each in kind.types], kind.instance_class)

    made = writable(numba.typeof(tables))

    def read(context: Any, replicas: Any, number: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            numbers = arrays.make_array(signature.args[0])(context, builder, args[0])
            per_replica = builder.udiv(numbers.nitems, cgutils.unpack_tuple(builder, numbers.shape)[0])
            start = builder.gep(numbers.data, [builder.mul(args[1], per_replica)])
            place = 0

            def number_at(offset: int) -> Any:
                return builder.load(builder.gep(start, [context.get_constant(types.intp, offset)]))

            def build(kind: Any) -> Any:
                nonlocal place
                if isinstance(kind, types.BaseTuple):
                    return context.make_tuple(builder, kind, [build(each) for each in kind.types])
                item = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(kind.dtype)))
                shape = [number_at(place + 1 + axis) for axis in range(kind.ndim)]
                strides = [item]
                for length in reversed(shape[1:]):
                    strides.insert(0, builder.mul(strides[0], length))
                array = arrays.make_array(kind)(context, builder)
                data = builder.inttoptr(number_at(place), array.data.type)
                packed = [cgutils.pack_array(builder, each) for each in (shape, strides)]
                arrays.populate_array(array, data, *packed, item, None)
                place += 1 + _DIMENSIONS
                return array._getvalue()

            return build(signature.return_type)

        return made(replicas, types.intp), generate

    intrinsic: Any = extending.intrinsic(read)
    made_from = extending.overload(route.tables_of, jit_options={"_nrt": False, "forceinline": True})
    made_from(lambda replicas, number: lambda replicas, number: intrinsic(replicas, number))
