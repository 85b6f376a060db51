"""Lengths of prompts and answers: fixed, drawn from a distribution, or recorded.

A length is a whole number of at least 1, in the workload's unit: tokens of its reference tokenizer, or characters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from helios_sim.errors import UserError, require_count, require_positive
from helios_sim.request import LONGEST
from helios_sim.workload.traces import RequestTrace

LengthSampler = Callable[[int], NDArray[np.int64]]
"""Number of requests -> their lengths, shape (number,)."""

PairSampler = Callable[[int, int], tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64] | None]]
"""(index of the first request, number of requests) -> lengths of prompts and of answers, shape (number,) each, and the
rows of the trace from which they come (None if they are drawn)."""

_Z95 = NormalDist().inv_cdf(0.95)


@dataclass(frozen=True, slots=True)
class Fixed:
    """A fixed length for every request."""

    value: int

    def __post_init__(self) -> None:
        require_count("workload.lengths.value", self.value, "give a length of at least 1")
        _require_at_most("workload.lengths.value", self.value)

    def sampler(self, rng: Generator) -> LengthSampler:
        return lambda n: np.full(n, self.value, dtype=np.int64)


@dataclass(frozen=True, slots=True)
class Lognormal:
    """A lognormal distribution with this median, rounded and then clipped to minimum and maximum.

    Clipping moves the mean and the percentiles; `describe` gives those of a generated workload.
    """

    median: float
    sigma: float  # standard deviation of the logarithm
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        require_positive("workload.lengths.median", self.median, "give a length above 0")
        require_positive("workload.lengths.sigma", self.sigma, "use a fixed length for no spread")
        _require_clip(self.minimum, self.maximum)

    @classmethod
    def from_mean(cls, mean: float, sigma: float, minimum: int = 1, maximum: int | None = None) -> Lognormal:
        """The distribution with this mean before clipping: median = mean * exp(-sigma^2 / 2)."""
        require_positive("workload.lengths.mean", mean, "give a length above 0")
        require_positive("workload.lengths.sigma", sigma, "use a fixed length for no spread")
        return cls(mean * math.exp(-(sigma**2) / 2), sigma, minimum, maximum)

    @classmethod
    def from_percentiles(cls, p50: float, p95: float, minimum: int = 1, maximum: int | None = None) -> Lognormal:
        """The distribution with this median and 95th percentile before clipping: sigma = ln(p95 / p50) / 1.645."""
        require_positive("workload.lengths.p50", p50, "give a length above 0")
        if not (math.isfinite(p95) and p95 > p50):
            raise UserError("workload.lengths.p95", p95, f"must lie above the median, {p50}", "raise p95 or lower p50")
        return cls(p50, math.log(p95 / p50) / _Z95, minimum, maximum)

    def sampler(self, rng: Generator) -> LengthSampler:
        log_median = math.log(self.median)
        return lambda n: _whole(rng.lognormal(log_median, self.sigma, n), self.minimum, self.maximum)


@dataclass(frozen=True, slots=True)
class Exponential:
    """An exponential distribution with this mean, rounded and then clipped.

    It serves to compare with queueing theory: take a mean far above 1.
    """

    mean: float
    minimum: int = 1
    maximum: int | None = None

    def __post_init__(self) -> None:
        require_positive("workload.lengths.mean", self.mean, "give a length above 0")
        _require_clip(self.minimum, self.maximum)

    def sampler(self, rng: Generator) -> LengthSampler:
        return lambda n: _whole(rng.standard_exponential(n) * self.mean, self.minimum, self.maximum)


@dataclass(frozen=True, slots=True)
class Uniform:
    """A uniform distribution over the whole numbers from minimum to maximum."""

    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        _require_clip(self.minimum, self.maximum)

    def sampler(self, rng: Generator) -> LengthSampler:
        width = self.maximum - self.minimum + 1
        return lambda n: self.minimum + (rng.random(n) * width).astype(np.int64)


Length = Fixed | Lognormal | Exponential | Uniform


@dataclass(frozen=True, slots=True)
class DrawnLengths:
    """Lengths of prompt and answer, drawn independently of each other."""

    prompt: Length
    output: Length

    def sampler(self, prompt_rng: Generator, output_rng: Generator) -> PairSampler:
        prompt, output = self.prompt.sampler(prompt_rng), self.output.sampler(output_rng)
        return lambda first, n: (prompt(n), output(n), None)


@dataclass(frozen=True, slots=True)
class TraceLengths:
    """Recorded pairs of prompt and answer lengths: in the trace's order, or its rows drawn with replacement."""

    trace: RequestTrace
    resample: bool = False

    def sampler(self, prompt_rng: Generator, output_rng: Generator) -> PairSampler:
        prompts, outputs = self.trace.prompt_tokens, self.trace.output_tokens
        if not self.resample:

            def in_order(first: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
                rows = np.arange(first, first + n, dtype=np.int64)
                return prompts[first : first + n], outputs[first : first + n], rows

            return in_order

        def sample(first: int, n: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
            # One uniform draw per request, since bounded integers may take a varying number of draws: request i then
            # sees the same quantile of the rows whatever the trace.
            rows = (prompt_rng.random(n) * len(prompts)).astype(np.int64)
            return prompts[rows], outputs[rows], rows

        return sample


Lengths = DrawnLengths | TraceLengths


def _require_clip(minimum: int, maximum: int | None) -> None:
    require_count("workload.lengths.minimum", minimum, "a request has at least 1")
    _require_at_most("workload.lengths.minimum", minimum)
    if maximum is not None and not minimum <= maximum <= LONGEST:
        raise UserError(
            "workload.lengths.maximum",
            maximum,
            f"must lie from the minimum, {minimum}, to {LONGEST}",
            "widen the range",
        )


def _require_at_most(key: str, value: int) -> None:
    if value > LONGEST:
        raise UserError(key, value, f"must be at most {LONGEST}", "lower it")


def _whole(lengths: NDArray[np.float64], minimum: int, maximum: int | None) -> NDArray[np.int64]:
    longest = LONGEST if maximum is None else maximum
    whole: NDArray[np.int64] = np.clip(np.rint(lengths), minimum, longest).astype(np.int64)
    return whole
