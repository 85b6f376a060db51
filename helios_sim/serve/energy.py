"""Energy since the server began: by the device's own counter, or an upper estimate for a simulated card."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from helios_sim.live.energy import ABSENT, Counter, open_counter
from helios_sim.profile.spec import HardwareSpec
from helios_sim.request import NS_PER_S
from helios_sim.serving.server import Server


class Energy(Protocol):
    told: str  # source of the figure, or why there is none

    def joules(self, now_ns: int) -> float | None:
        """Energy since the server began, in J; None if it is not known."""
        ...


class Counted:
    """Energy by the device's counter. `counter` is None if the device has none; `absent` says why."""

    def __init__(self, counter: Counter | None, absent: str) -> None:
        self._counter = counter
        self._began = None if counter is None else counter.energy_j()
        self.told = absent if counter is None or self._began is None else counter.source

    def joules(self, now_ns: int) -> float | None:
        now = None if self._counter is None else self._counter.energy_j()
        return None if now is None or self._began is None else now - self._began


class Modelled:
    """Upper estimate for a simulated card: the upper end of its power band while iterations run, else idle power."""

    def __init__(self, card: HardwareSpec, servers: Sequence[Server]) -> None:
        self._card, self._servers = card, servers
        known = card.idle_w is not None and card.tdp_w is not None
        self.told = "upper estimate: board limit while iterations run, else idle power" if known else "power not known"

    def joules(self, now_ns: int) -> float | None:
        idle_w, busy_w = self._card.idle_w, self._card.busy_w(1.0)
        if idle_w is None or busy_w is None:
            return None
        busy_ns = sum(server.stats.busy_ns for server in self._servers)
        return (idle_w * now_ns * len(self._servers) + (busy_w[1] - idle_w) * busy_ns) / NS_PER_S


def counted(device: str) -> Counted:
    return Counted(open_counter(device), ABSENT[device.partition(":")[0]])
