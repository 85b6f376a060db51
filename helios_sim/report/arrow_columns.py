"""Columns of a table from numbers and texts, without pandas. Knows no table.

`pyarrow.array` would load it to look at what it is given: a third of a second for every process.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow


def numbers(values: NDArray[Any], present: NDArray[np.bool_] | None = None) -> pyarrow.Array:
    """A column over the same memory, shape (n,), null where not `present`."""
    import pyarrow as pa

    known = None if present is None else pa.py_buffer(np.packbits(present, bitorder="little"))
    content = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [known, content])


def texts(values: Sequence[str]) -> pyarrow.Array:
    """At most 2 GB of them."""
    import pyarrow as pa

    encoded = [value.encode() for value in values]
    ends = np.cumsum([0, *map(len, encoded)]).astype(np.int32)
    return pa.Array.from_buffers(pa.string(), len(encoded), [None, pa.py_buffer(ends), pa.py_buffer(b"".join(encoded))])
