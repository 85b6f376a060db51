"""The gap histogram: exact sums, bounded error, no dependence on order."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, strategies as st

from helios_sim.serving.stats import GapHistogram, bucket_edges_ns

GAPS = st.lists(st.integers(0, 10**13), min_size=1, max_size=60)


def filled(gaps: list[int]) -> GapHistogram:
    histogram = GapHistogram()
    histogram.add(gaps)
    return histogram


@pytest.mark.slow
@given(GAPS, st.sampled_from([0, 1, 50, 90, 95, 99, 100]))
def test_percentile_is_the_nearest_rank_to_a_thousandth(gaps: list[int], q: float) -> None:
    exact = sorted(gaps)[max(1, int(np.ceil(q / 100 * len(gaps)))) - 1]
    found = filled(gaps).percentile_ns(q)
    assert found is not None
    assert exact <= found <= max(exact + 1, exact * 1.001)


@given(GAPS, st.integers(0, 60))
def test_any_split_and_order_gives_the_same_histogram(gaps: list[int], cut: int) -> None:
    left, right = filled(gaps[cut:]), filled(gaps[:cut])
    left.merge(right)
    assert left == filled(gaps[::-1])
    assert left.mean_ns == sum(gaps) / len(gaps)


@given(GAPS, st.data())
def test_counts_stand_for_repetition(gaps: list[int], data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, 5), min_size=len(gaps), max_size=len(gaps)))
    weighted = GapHistogram()
    weighted.add(gaps, counts)
    assert weighted == filled([gap for gap, count in zip(gaps, counts, strict=True) for _ in range(count)])


def test_empty_is_undefined_and_negative_is_refused() -> None:
    histogram = GapHistogram()
    assert histogram.mean_ns is None
    assert histogram.percentile_ns(99) is None
    with pytest.raises(ValueError, match="negative"):
        histogram.add([-1])


def test_edges_are_a_thousandth_apart() -> None:
    edges = bucket_edges_ns()[:-1].astype(float)
    assert (np.diff(edges) <= np.maximum(1, edges[:-1] * 0.001)).all()
    assert edges[-1] >= 1e15
