"""How fast a device is while it serves, against how fast it was while its profile was measured. Knows no iteration.

The same steps are timed in both (`helios_sim.live.pace`). What is served has no part in them, so the ratios say nothing
of whether the profile prices iterations right: they are the machine, the hour and who else is there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING

from helios_sim.live.clock import WallClock
from helios_sim.profile.pace import DECODE, PROMPT
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Anchors
from helios_sim.request import NS_PER_S

if TYPE_CHECKING:
    from helios_sim.live.device import Step
    from helios_sim.live.engine import LiveEngine
    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.weights import LayerWeights
    from helios_sim.profile.spec import Anchor

_log = logging.getLogger(__name__)


class Pace:
    """Times the steps beside a run and in turns within it, now and then, when the clock is stopped for it."""

    def __init__(
        self, engine: LiveEngine, profiles: Mapping[str, Profile], clock: WallClock, every_s: float | None
    ) -> None:
        self._engine, self._profiles, self._clock = engine, profiles, clock
        self._every_ns = None if every_s is None else round(every_s * NS_PER_S)
        self._due_ns = 0
        self._turns = cycle((DECODE, PROMPT))
        self._found: dict[str, list[float]] = {DECODE: [], PROMPT: []}
        # the steps of a model, and of which layers they are
        self._ready: dict[tuple[str, str], tuple[list[LayerWeights], Step]] = {}

    def mean(self, anchor: str) -> float | None:
        """Time of the step over its time beside the profile: above 1 is slower. None where the profile does not tell,
        the device has no memory for the step, or a run ended before its turn.

        The mean over the profile's median: tables hold medians, and what a run takes is a sum.
        """
        known = self._found[anchor]
        return fmean(known) if known else None

    def look_beside(self) -> None:
        """Before time begins and after it has ended, unless it is timed within: the middle of some steps."""
        from helios_sim.live.pace import REPEATS

        if self._every_ns is None:
            there = self._engine.residents.layers
            for anchor in self._found:
                self._note(anchor, max(there, key=lambda model: there[model]), REPEATS)

    def look_within(self, name: str) -> None:
        """One step of the model that runs next, if it is time for one. Nothing may be loading."""
        if self._every_ns is None or self._clock.wall_ns < self._due_ns:
            return
        with self._clock.stopped():
            self._note(next(self._turns), name, 1)
        self._due_ns = self._clock.wall_ns + self._every_ns

    def _note(self, name: str, of_model: str, repeats: int) -> None:
        """`name` is an anchor's, `of_model` that of a model in memory."""
        from helios_sim.live.pace import seconds

        known = self._profiles[of_model].anchors or Anchors()
        anchor = known.decode if name == DECODE else known.prompt
        if anchor is None:
            return
        model = self._engine.residents.running(of_model, 1)
        try:
            step = self._step((of_model, name), model, anchor)
            found_s = seconds(step, self._engine.device, repeats)
            self._found[name].append(found_s / model.n_loaded / anchor.layer_s)
        except (MemoryError, RuntimeError) as short:  # torch's own out-of-memory is a RuntimeError
            _log.warning("the device's pace is not known: %s", short)

    def _step(self, key: tuple[str, str], model: SegmentedModel, anchor: Anchor) -> Step:
        """The one of last time, unless layers came or went since."""
        from helios_sim.live.pace import prepared

        known = self._ready.get(key)
        if known is not None and list(map(id, known[0])) == list(map(id, model.layers)):
            return known[1]
        self._ready.pop(key, None)  # its memory first
        step: Step = prepared(model, self._engine.device, anchor)
        self._ready[key] = list(model.layers), step
        return step
