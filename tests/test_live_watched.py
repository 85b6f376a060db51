"""What is noted of a live run's iterations: the same sums however few steps are kept, and nothing while layers load."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from helios_sim.live.clock import WallClock
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import load_profile
from helios_sim.profile.synthetic import flat_profile
from helios_sim.study.watched import LiveNotes, WatchedEngine

PROFILE = flat_profile(0.002, n_layers=4)
RAN_NS, FORWARD_NS = 1_000_000, 700_000


class Fixed:
    """An engine that says at once how long an iteration took."""

    def __init__(self, clock: WallClock, profile: Profile = PROFILE, drafts: int = 0) -> None:
        self._clock, self._profile, self.forward_ns, self._drafts = clock, profile, 0, drafts
        self.loading = 0

    def execute(self, plan: Any, now_ns: int) -> Any:
        self.forward_ns += FORWARD_NS
        composition = Composition(
            (self._profile.model.n_layers,), np.array([[plan.batch]]), np.array([[8 * plan.batch]]),
            np.array([plan.batch]),
        )  # fmt: skip
        drafted = (replace(composition, drafting=True),) * self._drafts
        return SimpleNamespace(
            profile=self._profile, composition=composition, end_ns=self._clock.wall_ns + RAN_NS, drafted=drafted,
            draft_ns=0, drafter=None,
        )  # fmt: skip


def watched(kept: int | None, before: Any = None) -> WatchedEngine:
    clock = WallClock()
    clock.sync()
    return WatchedEngine(Fixed(clock), clock, before, kept)  # type: ignore[arg-type]


def run(engine: WatchedEngine, batches: range) -> LiveNotes:
    for batch in batches:
        engine.execute(SimpleNamespace(model="a", batch=batch), 0)  # type: ignore[arg-type]
    return engine.notes()


def test_sums_are_the_same_however_few_steps_are_kept() -> None:
    engine, short = watched(None), watched(3)
    everything, added_up = run(engine, range(1, 9)), run(short, range(1, 9))
    assert len(engine.steps) == 8
    assert len(short.steps) <= 3
    assert (
        (added_up.iterations, added_up.forward_ns)
        == (everything.iterations, everything.forward_ns)
        == (8, 8 * FORWARD_NS)
    )
    assert added_up.priced_ns == everything.priced_ns > 0
    assert everything.engine_ns >= 8 * RAN_NS
    assert short.notes() == added_up  # asked twice, nothing is added twice


def test_drafts_are_priced_with_the_pass_that_verifies_them() -> None:
    clock = WallClock()
    clock.sync()
    profile = load_profile("opt-1.3b@a100-40gb")
    engine = WatchedEngine(Fixed(clock, profile, drafts=3), clock)  # type: ignore[arg-type]
    notes = run(engine, range(1, 2))
    (step,) = engine.steps
    draft_s, verify_s = (float(profile.iteration_time_s(c)[0]) for c in (step.drafted[0], step.composition))
    assert notes.priced_ns == pytest.approx(1e9 * (3 * draft_s + verify_s), abs=4)
    assert draft_s > 0.5e-3
    other = load_profile("opt-6.7b@a100-40gb")  # drafts of another model take what that one takes
    other_s = float(other.iteration_time_s(step.drafted[0])[0])
    assert replace(step, drafter=other).priced_ns == pytest.approx(1e9 * (3 * other_s + verify_s), abs=4)
    assert other_s > draft_s


def test_nothing_looks_at_the_device_while_layers_load() -> None:
    looks: list[str] = []
    engine = watched(2, looks.append)
    run(engine, range(1, 3))
    engine._inner.loading = 2  # type: ignore[misc]
    run(engine, range(1, 4))
    assert (len(looks), len(engine.steps)) == (2, 5)
    engine._inner.loading = 0  # type: ignore[misc]
    run(engine, range(1, 2))
    assert looks == ["a"] * 3
    assert len(engine.steps) == 1
    assert engine.notes().iterations == 6
