"""How long pricing takes: the simulator asks for it in every iteration. Run with -m bench."""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.store import PROFILES_FOLDER, load_profile, read_profile

pytestmark = pytest.mark.bench


def composition(n: int, bounds: tuple[int, ...], prefill: tuple[PrefillChunk, ...] = ()) -> Composition:
    rows = np.full((n, len(bounds)), 50)
    return Composition(bounds, rows, rows * 700, np.full(n, 50), prefill=prefill)


@pytest.mark.parametrize(
    ("case", "limit_s"),
    [
        (composition(1, (24,)), 20e-6),
        (composition(1, (24,), (PrefillChunk(500, 300, 24),)), 35e-6),
        (composition(256, (6, 12, 18, 24)), 150e-6),
    ],
    ids=["one decode", "one with prefill", "256 of decodes"],
)
def test_pricing(benchmark: BenchmarkFixture, case: Composition, limit_s: float) -> None:
    profile = load_profile("opt-1.3b@a100-40gb")
    benchmark(profile.iteration_time_s, case)
    assert benchmark.stats["median"] < limit_s


def test_loading(benchmark: BenchmarkFixture) -> None:
    benchmark(read_profile, PROFILES_FOLDER / "llama-3-8b@a100-40gb")
    assert benchmark.stats["median"] < 0.02
