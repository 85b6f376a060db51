"""Numbers as text: few digits, fitting units."""

from __future__ import annotations

import re

from helios_sim.report.compare import Ratio
from helios_sim.report.intervals import Interval, Method
from helios_sim.report.metrics import DEFINITIONS, Band, Better, MetricValue

NOTHING = "–"
NO_INTERVAL = f"[{NOTHING}]"  # marks an estimate without an interval, or with a meaningless one
VAST = 10.0  # an interval from below 1 / VAST to above VAST times the figure is meaningless
_SMALL_S = ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


# Control characters, lone surrogates, and characters that change the text's direction or are invisible.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]")


def visible(text: str) -> str:
    """The text for a page or terminal, with control and invisible characters shown by their code."""
    return _INVISIBLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def markdown(text: str) -> str:
    """The text in one line of Markdown, with mark-up, table cells, links and HTML escaped."""
    plain = " ".join(visible(text).split())
    return re.sub(r"([\\`*<|]|(?<=\])\(|^[#>+-](?=\s))", r"\\\1", plain)


def code_span(text: str) -> str:
    """The text as code in one line of Markdown, in a cell of a table too."""
    plain = " ".join(visible(text).split()).replace("|", "\\|")
    fence = "`" * (max(map(len, re.findall("`+", plain)), default=0) + 1)
    room = " " if plain.startswith("`") or plain.endswith("`") else ""
    return f"{fence}{room}{plain}{room}{fence}"


def number(value: float, digits: int = 3) -> str:
    """The number with about `digits` significant digits, thousands grouped, no exponent from 1e-6 to 1e15."""
    if value == 0:
        return "0"
    if isinstance(value, int) or (abs(value) >= 10**digits and float(value).is_integer()):
        return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.{digits}g}"
    size = abs(value)
    if size >= 1e15 or size < 1e-6:
        return f"{value:.{digits}g}"
    whole_digits = len(str(int(size))) if size >= 1 else 0
    if whole_digits >= digits:
        return f"{value:,.0f}"
    if size >= 1:
        return f"{value:.{digits - whole_digits}f}"
    text = f"{value:.{digits}g}"
    return text if "e" not in text else f"{value:.8f}".rstrip("0")


def seconds(value: float) -> str:
    if value == 0:
        return "0 s"
    _, factor, unit = next(row for row in _SMALL_S if abs(value) >= row[0])
    return f"{number(value * factor)} {unit}"


def in_unit(value: float, unit: str) -> str:
    """The value with its unit, scaled: 0.0123 s -> 12.3 ms, 3.9e10 bytes -> 39.0 GB, 0.85 share -> 85.0 %."""
    if unit == "s":
        return seconds(value)
    if unit == "bytes":
        for size, name in _BYTES:
            if abs(value) >= size:
                return f"{number(value / size)} {name}"
        return f"{number(value)} B"
    if unit == "share":
        return f"{value * 100:.1f} %"
    if unit == "1/s":
        return f"{number(value)}/s"
    if unit == "x":
        return f"{number(value)}×"
    text = f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else number(value)
    return f"{text} {unit}".rstrip()


def compared(value: float | None, form: str = "") -> str:
    """A figure that is shown beside a similar one: with one more digit than usual, or in the given form."""
    if value is None:
        return NOTHING
    if form:
        return format(value, form)
    return f"{value:,.1f}" if abs(value) >= 100 else number(value, 4 if abs(value) >= 1 else 3)


def between(band: tuple[float, float] | None) -> str:
    """An interval of a difference."""
    return NO_INTERVAL if band is None else f"[{band[0]:+.1%}, {band[1]:+.1%}]"


def gate_value(value: float | None, bound: str) -> str:
    """The value of a gate: in percent if its bound is, with one more digit than usual."""
    if value is None:
        return NOTHING
    return format(value, "+.2%") if "%" in bound else number(value, 4)


def gate_interval(low: float | None, high: float | None, bound: str) -> str:
    """The interval of a gate's value; [–] without one."""
    return NO_INTERVAL if low is None or high is None else f"[{gate_value(low, bound)}, {gate_value(high, bound)}]"


def metric(name: str, value: MetricValue) -> str:
    """A metric's value as the tables show it; a dash if it is undefined."""
    if value is None:
        return NOTHING
    unit = DEFINITIONS[name].unit if name in DEFINITIONS else ""
    if isinstance(value, Band):
        return f"{number(value.low)} to {in_unit(value.high, unit)}"
    return in_unit(value, unit)


def interval(name: str, value: MetricValue, found: Interval | None) -> str:
    """The interval as text, such as "[94.1 %, 96.3 %]"; "" for exact and undefined values and bands.

    "[–]" for an estimate without an interval, and for a time with a meaningless one: a percentile of few requests may
    move by factors of thousands when a stretch of them is left out.
    """
    if value is None or isinstance(value, Band) or (found is not None and found.method in (Method.EXACT, Method.BAND)):
        return ""
    if found is None or found.low is None or found.high is None:
        return NO_INTERVAL
    if name in DEFINITIONS and DEFINITIONS[name].unit == "s" and _says_nothing(value, found.low, found.high):
        return NO_INTERVAL
    return f"[{_bare(name, found.low, value)}, {_bare(name, found.high, value)}]"


def _says_nothing(value: float, low: float, high: float) -> bool:
    return value > 0 and low < value / VAST and high > value * VAST


def metric_with_interval(name: str, value: MetricValue, found: Interval | None) -> str:
    """The value and its interval in the same unit, such as "96.1 % [95.2, 97.0]"."""
    return " ".join(filter(None, (metric(name, value), interval(name, value, found))))


def _bare(name: str, bound: float, value: float) -> str:
    """A bound in the unit of the value, without the unit."""
    unit = DEFINITIONS[name].unit if name in DEFINITIONS else ""
    if unit == "share":
        return f"{bound * 100:.1f}"
    if unit == "s":
        factor = next(factor for size, factor, _ in _SMALL_S if abs(value) >= size)
        return number(bound * (factor if value else 1.0))
    if unit == "bytes":
        return number(bound / next((size for size, _ in _BYTES if abs(value) >= size), 1.0))
    return number(bound)


def ratio(value: Ratio | None) -> str:
    """The ratio as text: "1.48× [1.45, 1.51]", a band, "1.48× [–]" without an interval, or a dash."""
    if value is None:
        return NOTHING
    if value.method is Method.BAND and value.low is not None and value.high is not None:
        return f"{value.low:.2f} to {value.high:.2f}×"
    if value.ratio is None:
        return NOTHING
    digits = 2 if value.ratio < 10 else 1
    text = f"{value.ratio:.{digits}f}×"
    if value.low is not None and value.high is not None and not _says_nothing(value.ratio, value.low, value.high):
        return f"{text} [{value.low:.{digits}f}, {value.high:.{digits}f}]"
    return text if value.method is Method.EXACT else f"{text} {NO_INTERVAL}"


def label(name: str) -> str:
    """The metric's name in reports."""
    return DEFINITIONS[name].label if name in DEFINITIONS else name


def direction(name: str) -> str:
    """The better direction of a metric in words; "" if neither is better."""
    better = DEFINITIONS[name].better if name in DEFINITIONS else Better.NEITHER
    return {Better.HIGHER: "more is better", Better.LOWER: "less is better", Better.NEITHER: ""}[better]
