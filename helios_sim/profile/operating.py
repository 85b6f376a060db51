"""Operating points of one model: `core/operate.py` with the arrays that it works on."""

from __future__ import annotations

from dataclasses import dataclass
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helios_sim.core import machine
from helios_sim.core.layout import CHUNK, ITERATION, NEVER, WORK, FloatArray, IntArray, Record, Storage, raw
from helios_sim.core.operate import POINT, estimate
from helios_sim.core.price import TIME
from helios_sim.profile.price_tables import Pricing


class OperatingPoint(NamedTuple):
    """The outputs of `core/operate.py`, in the order of its names."""

    batch: int
    keeps_up: int  # whether the batch keeps up with arrivals; 0 if no batch does
    prefill_s: float
    prefill_floor_s: float
    rate_per_s: float
    most_rate_per_s: float
    decode_s: float
    decode_floor_s: float  # only if decodes were priced


class OperatingPoints:
    """Computes operating points of one model. Safe for several threads."""

    def __init__(self, pricing: Pricing) -> None:
        self._pricing = pricing
        self._rooms: dict[tuple[bool, int], _Room] = {}
        self._lock = Lock()

    def of(
        self, layers: int, prompt: tuple[int, int, int], batches: tuple[int, int], means: tuple[float, float, float],
        decode_s: NDArray[np.float64] | None = None,
    ) -> OperatingPoint:  # fmt: skip
        """The operating point (`core.operate.operating_point`). `prompt`: tokens, cached tokens and the token budget.

        `batches`: first and last batch; there is none if the last is smaller. `means`: mean context tokens, output
        tokens after the first, and arrivals per second. `decode_s`: seconds at each batch if they are known.
        """
        code, n = machine.loaded(), max(0, batches[1] + 1 - batches[0])
        with self._lock:
            room = self._rooms.get((code is not None, layers))
            if room is None or len(room.found) <= n:
                room = self._rooms[code is not None, layers] = self._room(code, layers, n)
            room.whole[:6] = *prompt, *batches, decode_s is None
            room.means[:3] = means
            if decode_s is not None:
                room.found[:n, TIME] = decode_s
            room.estimate(*room.read)
            return OperatingPoint(*room.whole[6:].tolist(), *room.means[3:].tolist())

    def _room(self, code: machine.Machine | None, layers: int, n: int) -> _Room:
        storage, spans = Storage(compiled=code is not None), self._pricing.spans((layers,))
        iteration, chunk = storage.record(ITERATION), storage.record(CHUNK)
        iteration.kv_least = iteration.kv_most = NEVER
        iteration.syncs, chunk.layers = 1, layers
        asked: IntArray = np.zeros(4, np.int64)
        asked[POINT] = 1
        found, whole, means = np.zeros((2 * n + 1, 3)), np.zeros(8, np.int64), np.zeros(9)
        arrays = map(storage.array, (np.zeros((0, 9), np.int64), asked, found, whole, means))
        read = (
            storage.group(self._pricing.tables), self._pricing.scalars(storage), raw(iteration), spans.table(storage),
            storage.array(spans.class_layers), storage.rows(WORK, 1), raw(chunk), *arrays,
        )  # fmt: skip
        return _Room(estimate if code is None else code.estimate(), found, whole, means, read, (iteration, chunk))


@dataclass(slots=True, eq=False)
class _Room:
    """Arrays that are reused from call to call."""

    estimate: Any  # the function for these arrays alone: a caller keeps the addresses of its arrays
    found: FloatArray
    whole: IntArray
    means: FloatArray
    read: tuple[Any, ...]  # arguments of `estimate`
    records: tuple[Record, ...]  # kept, since `estimate` reads their memory
