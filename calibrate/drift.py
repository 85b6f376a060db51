"""How the machine's pace moved while it was measured, call after call. Knows the anchors' times, no table.

A folder keeps one entry for each call that measured in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from calibrate.device import Device
from calibrate.parts import Parts
from calibrate.sampling import Sampler

PART = "drift"


class Drift:
    def __init__(self, parts: Parts, sampler: Sampler, device: Device) -> None:
        self._parts, self._sampler, self._device = parts, sampler, device
        self._earlier: list[dict[str, Any]] = parts.get(PART) or []

    def note(self) -> None:
        """This call's entry, brought up to date as it goes on."""
        now = {
            "anchors": self._sampler.drift(),
            "contended": sum(self._sampler.contended.values()),
            "disturbance": self._device.disturbance(),
        }
        self._parts.put(PART, [*self._earlier, now])

    @property
    def set_aside(self) -> int:
        """Samples taken while others had the cores."""
        return sum(call["contended"] for call in self._calls())

    @property
    def anchors(self) -> list[dict[str, dict[str, float]]]:
        return [call["anchors"] for call in self._calls()]

    def typical_s(self) -> dict[str, float]:
        """The middle of each anchor's times over all calls, without those that were hardly timed."""
        found = {}
        for name in dict.fromkeys(name for call in self.anchors for name in call):
            known = [call[name] for call in self.anchors if name in call]
            counts = [anchor["measurements"] for anchor in known]
            found[name] = float(np.average([anchor["median_s"] for anchor in known], weights=counts))
        return found

    def _calls(self) -> list[dict[str, Any]]:
        return self._parts.get(PART) or []
