"""How fast a device is while it serves, against how fast it was while its profile was measured. Knows no iteration.

One and the same step is timed in both (`helios_sim.live.pace`). What is served has no part in it, so the ratio says
nothing of whether the profile prices iterations right: it is the machine, the hour and who else is there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from helios_sim.live.clock import WallClock
from helios_sim.profile.profile import Profile
from helios_sim.request import NS_PER_S

if TYPE_CHECKING:
    from helios_sim.live.device import Step
    from helios_sim.live.engine import LiveEngine
    from helios_sim.live.model import SegmentedModel
    from helios_sim.live.weights import LayerWeights

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


class Pace:
    """Times the step beside a run and now and then within it, when the clock is stopped for it."""

    def __init__(
        self, engine: LiveEngine, profiles: Mapping[str, Profile], clock: WallClock, every_s: float | None
    ) -> None:
        self._engine, self._profiles, self._clock = engine, profiles, clock
        self._every_ns = None if every_s is None else round(every_s * NS_PER_S)
        self._due_ns = 0
        self._beside: list[float] = []
        self._within: list[float] = []
        self._ready: dict[str, tuple[list[LayerWeights], Step]] = {}  # the step, and of which layers it is

    @property
    def mean(self) -> float | None:
        """Time of the step over its time beside the profile: above 1 is slower. Within the run, where it was timed
        there; None where the profile does not tell, or the device has no memory for the step.

        The mean over the profile's median: tables hold medians, and what a run takes is a sum.
        """
        known = self._within or self._beside
        return sum(known) / len(known) if known else None

    def look_beside(self) -> None:
        """Before time begins and after it has ended, unless it is timed within: the middle of some steps."""
        from helios_sim.live.pace import REPEATS

        if self._every_ns is None:
            there = self._engine.residents.layers
            self._note(self._beside, max(there, key=lambda model: there[model]), REPEATS)

    def look_within(self, name: str) -> None:
        """One step of the model that runs next, if it is time for one. Nothing may be loading."""
        if self._every_ns is None or self._clock.wall_ns < self._due_ns:
            return
        with self._clock.stopped():
            self._note(self._within, name, 1)
        self._due_ns = self._clock.wall_ns + self._every_ns

    def _note(self, found: list[float], name: str, repeats: int) -> None:
        """`name` is that of a model in memory."""
        from helios_sim.live.pace import seconds

        anchor = anchor_of(self._profiles[name])
        if anchor is None:
            return
        model = self._engine.residents.running(name, 1)
        try:
            step = self._step(name, model, anchor)
            found.append(seconds(step, self._engine.device, repeats) / model.n_loaded / anchor.layer_s)
        except (MemoryError, RuntimeError) as short:  # torch's own out-of-memory is a RuntimeError
            _log.warning("the device's pace is not known: %s", short)

    def _step(self, name: str, model: SegmentedModel, anchor: Anchor) -> Step:
        """The one of last time, unless layers came or went since."""
        from helios_sim.live.pace import prepared

        known = self._ready.get(name)
        if known is not None and list(map(id, known[0])) == list(map(id, model.layers)):
            return known[1]
        self._ready.pop(name, None)  # its memory first
        step: Step = prepared(model, self._engine.device, anchor.batch, anchor.kv_tokens)
        self._ready[name] = list(model.layers), step
        return step
