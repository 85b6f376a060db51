"""Percentiles without a stretch are those of numpy, to the last bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.report.intervals import stretches
from helios_sim.report.percentiles import FEWEST_BEYOND, Ranked


@given(st.integers(0, 2**32), st.integers(1, 400), st.sampled_from([50, 90, 95, 99]), st.booleans(), st.booleans())
def test_they_are_those_of_numpy(seed: int, n: int, q: int, whole_numbers: bool, some: bool) -> None:
    draw = np.random.default_rng(seed)
    values = draw.integers(0, 50, n) * 10**9 if whole_numbers else draw.lognormal(size=n)
    counted = draw.random(n) < 0.7 if some else np.ones(n, np.bool_)
    counted[draw.integers(n)] = True
    ranked = Ranked(values, counted)
    ranked.percentile_and_without(90)  # others that were asked for before change nothing
    whole, without = ranked.percentile_and_without(q)
    assert whole == np.percentile(values[counted], q)
    ends = stretches(n)
    if without is None:
        assert len(ends) < 3 or counted.sum() * min(q, 100 - q) < 100 * FEWEST_BEYOND
        return
    for got, start, end in zip(without, ends[:-1], ends[1:], strict=True):
        kept = counted.copy()
        kept[start:end] = False
        assert got == np.percentile(values[kept], q) if kept.any() else np.isnan(got)


def test_a_stretch_that_holds_all_leaves_none() -> None:
    values, counted = np.arange(400), np.arange(400) < 40
    whole, without = Ranked(values, counted).percentile_and_without(50)
    assert whole == pytest.approx(19.5)
    assert without is not None
    assert np.isnan(without[0])
    assert (without[1:] == whole).all()
