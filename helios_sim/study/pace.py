"""How fast a device was while it served, against how fast it was while its profile was measured. Knows no iteration.

One and the same step is timed in both (`helios_sim.live.pace`). What is served has no part in it, so the ratio says
nothing of whether the profile prices iterations right: it is the machine, the hour and who else is there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helios_sim.profile.profile import Profile

if TYPE_CHECKING:
    from helios_sim.live.engine import LiveEngine

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Anchor:
    """The step as the calibration timed it: `batch` decodes at `kv_tokens`, seconds of one layer."""

    batch: int
    kv_tokens: int
    layer_s: float


def anchor_of(profile: Profile) -> Anchor | None:
    """None where the profile was not measured, or before such a step was timed."""
    found = profile.provenance.details.get("pace")
    return None if not found else Anchor(found["batch"], found["kv_tokens"], found["layer_s"])


def measured_pace(engine: LiveEngine, profiles: Mapping[str, Profile]) -> float | None:
    """Time of the step now over its time then, for the model with the most layers in memory: above 1 is slower.

    None where that model's profile does not tell, or the device has no memory for the step.
    """
    from helios_sim.live.pace import layer_s

    there = engine.residents.layers
    name = max(there, key=lambda model: there[model])
    anchor = anchor_of(profiles[name])
    if anchor is None:
        return None
    model = engine.residents.running(name, there[name])
    try:
        now_s: float = layer_s(model, engine.device, anchor.batch, anchor.kv_tokens)
    except (MemoryError, RuntimeError) as short:  # torch's own out-of-memory is a RuntimeError
        _log.warning("the device's pace is not known: %s", short)
        return None
    return now_s / anchor.layer_s
