"""How fast the report's hot paths are; run with `make bench`."""

from __future__ import annotations

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from helios_sim.report.compare import compare
from helios_sim.report.metrics import compute_metrics
from helios_sim.serving.stats import GapHistogram, RunStats
from report_example import example_records

pytestmark = pytest.mark.bench


def test_counting_the_gaps_of_a_batch_of_300(benchmark: BenchmarkFixture) -> None:
    gaps = np.random.default_rng(0).integers(1_000_000, 100_000_000, 300)
    histogram = GapHistogram()
    benchmark(histogram.add, gaps)
    assert histogram.total_count % 300 == 0


def test_metrics_and_intervals_of_16000_requests(benchmark: BenchmarkFixture) -> None:
    records = example_records("helios", 1, n=16_000)

    def measure() -> int:
        metrics = compute_metrics(records, RunStats())
        return compare([(records, metrics)], [(records, metrics)])["ttft_s_mean"].n

    assert benchmark(measure) == 15_999  # one is dropped in the example
