"""Device memory for weights, allocated once and given out in pieces. Knows bytes, no tensor's meaning."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from helios_sim.live.pages import aligned, written_block


@dataclass(frozen=True, slots=True)
class Piece:
    start: int
    n_bytes: int  # as taken, a multiple of the alignment


class Slab:
    """Pieces are taken where they fit first and given back in any order. Neighbouring free ones become one.

    The thread that loads takes, the one that serves gives back.
    """

    def __init__(self, n_bytes: int, device: torch.device) -> None:
        self._lock = threading.Lock()
        self._memory = written_block(aligned(n_bytes), device)
        self._free = [Piece(0, len(self._memory))]

    @property
    def free_bytes(self) -> int:
        return sum(piece.n_bytes for piece in self._free)

    @property
    def total_bytes(self) -> int:
        return len(self._memory)

    def take(self, n_bytes: int) -> Piece:
        """MemoryError where no free piece is large enough."""
        wanted = aligned(n_bytes)
        with self._lock:
            for i, piece in enumerate(self._free):
                if piece.n_bytes >= wanted:
                    rest = Piece(piece.start + wanted, piece.n_bytes - wanted)
                    self._free[i : i + 1] = [rest] if rest.n_bytes else []
                    return Piece(piece.start, wanted)
        raise MemoryError(f"{wanted} bytes of weights wanted, {self.free_bytes} of {self.total_bytes} free")

    def give(self, piece: Piece) -> None:
        with self._lock:
            joined: list[Piece] = []
            for free in sorted([*self._free, piece], key=lambda p: p.start):
                if joined and joined[-1].start + joined[-1].n_bytes == free.start:
                    joined[-1] = Piece(joined[-1].start, joined[-1].n_bytes + free.n_bytes)
                else:
                    joined.append(free)
            self._free = joined

    def bytes_of(self, piece: Piece) -> Tensor:
        """(n_bytes,) uint8, a view."""
        return self._memory[piece.start : piece.start + piece.n_bytes]
