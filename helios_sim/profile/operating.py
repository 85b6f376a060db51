"""Operating points of one model by its prices: `core/operate.py` with the arrays that it works on."""

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
    """What `core/operate.py` finds, in the order of its names."""

    batch: int
    keeps_up: int  # 0: no batch does
    prefill_s: float
    prefill_floor_s: float
    rate_per_s: float
    most_rate_per_s: float
    decode_s: float
    decode_floor_s: float  # where decodes were priced


class OperatingPoints:
    """Of one model; several threads may ask."""

    def __init__(self, pricing: Pricing) -> None:
        self._pricing = pricing
        self._rooms: dict[tuple[bool, int], _Room] = {}
        self._lock = Lock()

    def of(
        self, layers: int, prompt: tuple[int, int, int], batches: tuple[int, int], means: tuple[float, float, float],
        decode_s: NDArray[np.float64] | None = None,
    ) -> OperatingPoint:  # fmt: skip
        """See `core.operate.operating_point`. `prompt`: its tokens, those that are cached, and the token budget.

        `batches`: the first and the last, none where the last is smaller. `means`: tokens of a request in the KV cache,
        output tokens after the first, and arrivals per second. `decode_s`: seconds at each batch, where they are known.
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
    """Arrays to work in."""

    estimate: Any  # a caller of its own: the code wants to be told of new arrays
    found: FloatArray
    whole: IntArray
    means: FloatArray
    read: tuple[Any, ...]  # as `estimate` takes them
    records: tuple[Record, ...]  # whose memory it reads
