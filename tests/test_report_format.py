"""Numbers as people read them."""

from __future__ import annotations

import pytest

from helios_sim.report import format as fmt
from helios_sim.report.compare import Ratio
from helios_sim.report.intervals import Interval, Method
from helios_sim.report.metrics import Band


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (7.0, "7.00"), (1234.5, "1,234"), (0.01234, "0.0123"), (12.34, "12.3"), (1500000, "1,500,000")],
)
def test_three_digits(value: float, text: str) -> None:
    assert fmt.number(value) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("ttft_s_p50", 0.0123, "12.3 ms"),
        ("ttft_s_p50", 2.5, "2.50 s"),
        ("tpot_s_mean", 63e-6, "63.0 µs"),
        ("hbm_peak_bytes", 31_000_000_000, "31.0 GB"),
        ("agreement", 0.976, "97.6 %"),
        ("switches", 2, "2"),
        ("throughput_requests_per_s", 7.716, "7.72/s"),
        ("bits_per_char", None, "–"),
        ("energy_wh_per_request", Band(0.0049, 0.0086), "0.0049 to 0.0086 Wh"),
    ],
)
def test_metrics_come_with_their_unit(name: str, value: float | Band | None, text: str) -> None:
    assert fmt.metric(name, value) == text


def test_ratios_show_what_is_known() -> None:
    assert fmt.ratio(Ratio(1.484, 1.45, 1.519, Method.OVER_SEEDS, 3)) == "1.48× [1.45, 1.52]"
    assert fmt.ratio(Ratio(1.484, None, None, Method.NONE, 1)) == "1.48× [–]"
    assert fmt.ratio(Ratio(1.5, None, None, Method.EXACT, 1)) == "1.50×"
    assert fmt.ratio(Ratio(None, 0.9, 1.1, Method.BAND, 1)) == "0.90 to 1.10×"
    assert fmt.ratio(None) == "–"


@pytest.mark.parametrize(
    ("name", "value", "interval", "text"),
    [
        ("agreement", 0.961, Interval(0.952, 0.9699, Method.OVER_SEEDS, 3), "96.1 % [95.2, 97.0]"),
        ("ttft_s_p50", 0.0123, Interval(0.0101, 1.5, Method.WITHIN_RUN, 300), "12.3 ms [10.1, 1,500]"),
        ("throughput_requests_per_s", 7.716, Interval(None, None, Method.NONE, 1), "7.72/s [–]"),
        ("throughput_requests_per_s", 7.716, None, "7.72/s [–]"),
        ("switches", 3, Interval(None, None, Method.EXACT, 1), "3"),
        ("energy_wh_per_request", Band(0.001, 0.003), Interval(0.001, 0.003, Method.BAND, 3), "0.001 to 0.003 Wh"),
        ("bits_per_char", None, None, "–"),
    ],
)
def test_every_figure_has_an_interval_or_says_that_it_has_none(
    name: str, value: float | Band | None, interval: Interval | None, text: str
) -> None:
    assert fmt.metric_with_interval(name, value, interval) == text


def test_an_interval_of_a_time_that_says_nothing_is_marked() -> None:
    """Those of percentiles where requests thin out, which span factors of thousands."""

    def shown(name: str, value: float, low: float, high: float) -> str:
        return fmt.metric_with_interval(name, value, Interval(low, high, Method.WITHIN_RUN, 300))

    assert shown("queue_s_p90", 1.11, 3e-5, 47_788.0) == "1.11 s [–]"
    assert shown("queue_s_p90", 1.11, 0.2, 6.0) == "1.11 s [0.2, 6.00]"
    assert shown("queue_s_p90", 1.11, 0.0, 3.0) == "1.11 s [0, 3.00]"
    assert shown("breach_fraction", 0.001, 0.0, 0.02) == "0.1 % [0.0, 2.0]"
    assert fmt.ratio(Ratio(0.94, 0.0001, 8_000.0, Method.WITHIN_RUN, 300)) == "0.94× [–]"
    assert fmt.ratio(Ratio(0.94, 0.48, 1.85, Method.WITHIN_RUN, 300)) == "0.94× [0.48, 1.85]"
