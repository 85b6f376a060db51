"""How the machine's pace moved while it was measured, call after call. Knows one anchor's times, no table.

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
            "anchor": self._sampler.drift(),
            "contended": sum(self._sampler.contended.values()),
            "disturbance": self._device.disturbance(),
        }
        self._parts.put(PART, [*self._earlier, now])

    @property
    def set_aside(self) -> int:
        """Samples taken while others had the cores."""
        return sum(call["contended"] for call in self._calls())

    @property
    def anchors(self) -> list[dict[str, Any] | None]:
        return [call["anchor"] for call in self._calls()]

    def pace(self, place: tuple[int, int], layers: int) -> dict[str, Any] | None:
        """What `helios_sim.study.pace` reads: a layer of the anchor's step, at (requests, tokens of each).

        None where it was hardly timed.
        """
        known = [anchor for anchor in self.anchors if anchor is not None]
        if not known:
            return None
        counts = [anchor["measurements"] for anchor in known]
        step_s = float(np.average([anchor["median_s"] for anchor in known], weights=counts))
        batch, kv_tokens = place
        return {"batch": batch, "kv_tokens": kv_tokens, "layer_s": step_s / layers, "measurements": sum(counts)}

    def _calls(self) -> list[dict[str, Any]]:
        return self._parts.get(PART) or []
