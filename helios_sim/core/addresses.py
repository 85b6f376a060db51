"""The tables of replicas as the compiled loop takes them: addresses and shapes in one array.

Looking at every array in each call would take as long as an iteration. So the loop gets one array with the places
(`places`) of all arrays, whose types are checked when they are put there.
"""

from __future__ import annotations

from itertools import accumulate
from operator import is_
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.core.layout import IntArray, Tables
from helios_sim.core.places import NUMBERS, arrays_of, place_of

_GROUPS = 1024  # groups of arrays with remembered addresses
_OF_TERMS = Tables._fields.index("trace")  # fields from here on belong to a model and its deployment


class Compiled(Protocol):
    def require_types(self, tables: Tables) -> None:
        """Raise TypeError if the compiled code reads tables of other types."""
        ...

    def require_type(self, place: int, array: NDArray[Any]) -> None:
        """Raise TypeError if the compiled code reads another type of array at that place of the tables."""
        ...


class Replicas:
    """The tables of R replicas. `raw` is the tables if the loop is interpreted, else the addresses and shapes
    of their arrays, (R, arrays, 1 + dimensions)."""

    def __init__(self, n: int, machine: Compiled | None) -> None:
        self._machine = machine
        self._tables: list[Tables | None] = [None] * n
        self._addresses: IntArray | None = None
        self._places: list[int] = []  # place of the first array of each field of the tables
        self._of_groups: dict[tuple[int, ...], tuple[Any, IntArray]] = {}  # with their rows, by ids

    @property
    def raw(self) -> Any:
        return self._tables if self._machine is None else self._addresses

    def put(self, number: int, tables: Tables) -> None:
        """Let the loop read these arrays from now on."""
        known = self._tables[number]
        if self._machine is None or (known is not None and all(map(is_, known, tables))):
            self._tables[number] = tables
            return
        if self._addresses is None:
            self._machine.require_types(tables)
            sizes = [sum(1 for _ in arrays_of(field)) for field in tables]
            self._places = [0, *accumulate(sizes)]
            self._addresses = np.zeros((len(self._tables), self._places[-1], NUMBERS), np.int64)
        self._tables[number] = tables
        rows = self._addresses[number]
        for n, (field, place) in enumerate(zip(tables[:_OF_TERMS], self._places, strict=False)):
            if known is not None and field is known[n]:
                continue
            if isinstance(field, tuple):
                self._put_group(rows, place, field)
            else:  # a table that grows, or of which further parts are read
                rows[place] = self._row(place, field)
        of_terms = tables[_OF_TERMS:]
        if known is None or not all(map(is_, known[_OF_TERMS:], of_terms)):
            self._put_group(rows, self._places[_OF_TERMS], of_terms)

    def _put_group(self, rows: IntArray, place: int, group: tuple[Any, ...]) -> None:
        """Write the rows of a group. Most groups are put again and again, as models take turns."""
        ids = place, *map(id, group)
        known = self._of_groups.get(ids)
        if known is None:
            if len(self._of_groups) == _GROUPS:
                self._of_groups.clear()
            found = np.array([self._row(place + at, array) for at, array in enumerate(arrays_of(group))])
            known = self._of_groups[ids] = group, found
        rows[place : place + len(known[1])] = known[1]

    def _row(self, place: int, array: NDArray[Any]) -> list[int]:
        """The address and shape of an array."""
        assert self._machine is not None
        self._machine.require_type(place, array)
        return place_of(array)
