"""Places of ticks on an axis, and what is written beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, floor, isfinite, log10

from helios_sim.report import format as fmt

Write = Callable[[float], str]


@dataclass(frozen=True, slots=True)
class Ticks:
    at: tuple[float, ...]
    texts: tuple[str, ...]
    minor: tuple[float, ...] = ()


def linear(low: float, high: float, most: int, write: Write | None = None, whole: bool = False) -> Ticks:
    """At most `most` + 1 ticks at round values; `whole`: only at whole numbers."""
    step = round_step((high - low) / max(most, 1), whole)
    first, last = ceil(low / step - 1e-9), floor(high / step + 1e-9)
    at = tuple(number * step for number in range(first, last + 1))
    decimals = next((d for d in range(9) if abs(round(step, d) - step) < 1e-9 * step), 9)
    return Ticks(at, tuple(write(v) if write else f"{v:,.{decimals}f}" for v in at))


def round_step(least: float, whole: bool = False) -> float:
    """The next of 1, 2, 2.5 and 5 times a power of ten."""
    if not (isfinite(least) and least > 0):
        return 1.0
    if whole and least <= 1:
        return 1.0
    power = 10.0 ** floor(log10(least))
    sizes = (1, 2, 5, 10) if whole and power < 10 else (1, 2, 2.5, 5, 10)
    return next(size * power for size in sizes if size * power >= least * (1 - 1e-9))


def logarithmic(low: float, high: float, write: Write | None = None, base: int = 10, most: int = 7) -> Ticks:
    """At powers, with values between them where there are few; small ticks at the other digits."""
    write = write or fmt_plain
    if base != 10:
        first, last = ceil(_power(low, base) - 1e-9), floor(_power(high, base) + 1e-9)
        at = [float(base) ** power for power in range(first, last + 1)]
        at = at[:: max(1, ceil(len(at) / (most + 4)))]
        return Ticks(tuple(at), tuple(write(v) for v in at))
    decades = log10(high / low)
    if decades < 0.6:
        return linear(low, high, 4, write)
    digits = (1,) if decades > 2 else (1, 3) if decades > 1 else (1, 2, 3, 5)
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    skip = max(1, ceil(decades / most))
    at = [d * 10.0**p for p in powers for d in digits if p % skip == 0 and low <= d * 10.0**p * (1 + 1e-9)
          and d * 10.0**p <= high * (1 + 1e-9)]  # fmt: skip
    minor = [d * 10.0**p for p in powers for d in range(1, 10) if low <= d * 10.0**p <= high]
    return Ticks(tuple(at), tuple(write(v) for v in at), tuple(m for m in minor if m not in at))


def fmt_plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:g}"


def in_seconds(value: float) -> str:
    return fmt.seconds(value).replace(".00 ", " ").replace(".0 ", " ")


def _power(value: float, base: int) -> float:
    return log10(value) / log10(base)
