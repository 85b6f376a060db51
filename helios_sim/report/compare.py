"""Ratios of an arm to the baseline with confidence intervals, over runs that match by seed and requests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

from helios_sim.report.metrics import Band, Metrics, MetricValue
from helios_sim.report.records import Records

IntArray = NDArray[np.int32] | NDArray[np.int64]

LEVEL = 0.95
_MOST_RESAMPLES = 1000
_FEWEST_RESAMPLES = 200
_DRAWS = 4_000_000  # about so many drawn requests in all: bounds time and memory for long runs
_CHUNK_DRAWS = 1_000_000


class Method(StrEnum):
    """How a ratio's bounds were found."""

    PAIRED_BOOTSTRAP = "paired_bootstrap"  # over the requests that both arms completed
    T_OVER_SEEDS = "t_over_seeds"
    BAND = "band"  # the ratio at either end of a band; no sampling error in it
    NONE = "none"  # one seed and a metric of the whole system: no interval


@dataclass(frozen=True, slots=True)
class Ratio:
    """arm / baseline; `low` and `high` bound it at the 95 % level where the method gives bounds."""

    ratio: float | None
    low: float | None
    high: float | None
    method: Method
    n: int  # paired requests or seeds behind it


def compare(
    arm: Sequence[tuple[Records, Metrics]], baseline: Sequence[tuple[Records, Metrics]], *, seed: int = 0
) -> dict[str, Ratio]:
    """Ratios of all metrics that have one, over replicates that match by position (same seed, same requests)."""
    if len(arm) != len(baseline):
        raise ValueError(f"{len(arm)} replicates of the arm, {len(baseline)} of the baseline")
    boot = _bootstrap([(a[0], b[0]) for a, b in zip(arm, baseline, strict=True)], seed)
    ratios: dict[str, Ratio] = {}
    for name in arm[0][1]:
        ours, theirs = [m[name] for _, m in arm], [m[name] for _, m in baseline]
        defined = None not in ours and None not in theirs
        ratio = (boot.get(name) or _system_ratio(ours, theirs)) if defined else None
        if ratio is not None:
            ratios[name] = ratio
    return ratios


def interval_over_seeds(values: Sequence[float], share: bool = False) -> tuple[float, float] | None:
    """95 % interval of the mean from a t-interval; None for fewer than two values.

    A quantity that cannot be negative is taken by its logarithm, a `share` by its logit, so that the interval lies
    where the quantity can; with a value at an end of the range, by the root (of a share, its arcsine), where the end
    itself bounds the interval. The mean is always inside.
    """
    if len(values) < 2:
        return None
    x, mean = np.array(values, np.float64), float(np.mean(values))
    if (x < 0).any() or (share and (x > 1).any()) or x.min() == x.max():
        return _t_interval(x)
    if x.min() > 0 and not (share and x.max() == 1):
        low, high = _t_interval(np.log(x) - np.log1p(-x) if share else np.log(x))
        with np.errstate(over="ignore"):
            ends = [float(1 / (1 + np.exp(-end)) if share else np.exp(end)) for end in (low, high)]
    else:
        low, high = _t_interval(np.arcsin(np.sqrt(x)) if share else np.sqrt(x))
        top = np.pi / 2 if share else np.inf
        ends = [float(np.sin(end) ** 2 if share else end**2) for end in (max(low, 0.0), min(high, top))]
    return min(ends[0], mean), max(ends[1], mean)


def _t_interval(values: NDArray[np.float64]) -> tuple[float, float]:
    from scipy.special import stdtrit

    n = len(values)
    half = float(stdtrit(n - 1, 0.5 + LEVEL / 2)) * float(np.std(values, ddof=1)) / n**0.5
    mean = float(np.mean(values))
    return mean - half, mean + half


def _system_ratio(ours: Sequence[MetricValue], theirs: Sequence[MetricValue]) -> Ratio | None:
    """Ratio from whole-run figures; None where it is undefined."""
    our_bands, their_bands = ([v for v in values if isinstance(v, Band)] for values in (ours, theirs))
    if len(our_bands) == len(ours) and len(their_bands) == len(theirs):
        # The same power model for both arms at either end: the ends are compared with each other.
        low = _mean_ratio([v.low for v in our_bands], [v.low for v in their_bands])
        high = _mean_ratio([v.high for v in our_bands], [v.high for v in their_bands])
        if low is None or high is None:
            return None
        return Ratio(None, min(low, high), max(low, high), Method.BAND, len(ours))
    a, b = ([float(v) for v in values if isinstance(v, int | float)] for values in (ours, theirs))
    if len(a) < len(ours) or len(b) < len(theirs):
        return None
    ratio = _mean_ratio(a, b)
    if ratio is None:
        return None
    if len(a) > 1 and min(*a, *b) > 0:
        logs = _t_interval(np.log(a) - np.log(b))
        centre = float(np.exp(np.mean(np.log(a) - np.log(b))))
        return Ratio(centre, float(np.exp(logs[0])), float(np.exp(logs[1])), Method.T_OVER_SEEDS, len(a))
    return Ratio(ratio, None, None, Method.NONE, len(a))


def _mean_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    base = sum(theirs)
    return sum(ours) / base if base > 0 else None


def _bootstrap(pairs: Sequence[tuple[Records, Records]], seed: int) -> dict[str, Ratio]:
    """Ratio of every per-request metric that is defined in all resamples.

    The cluster is the request: all its tokens stay together, in both arms. A resample draws requests with
    replacement from all replicates' pairs; sums are of integers, so the result does not depend on summation order.
    """
    ours = _join([_columns(a, _shared(a, b)) for a, b in pairs])
    theirs = _join([_columns(b, _shared(b, a)) for a, b in pairs])
    n = len(ours["tokens"])
    if n < 2:
        return {}
    resamples = int(np.clip(_DRAWS // n, _FEWEST_RESAMPLES, _MOST_RESAMPLES))
    everyone = np.arange(n)[None, :]
    whole = _divide(_statistics(ours, everyone), _statistics(theirs, everyone))
    rng = np.random.default_rng(np.random.SeedSequence(entropy=seed, spawn_key=(n,)))
    chunk = max(1, _CHUNK_DRAWS // n)
    parts: dict[str, list[NDArray[np.float64]]] = {}
    for start in range(0, resamples, chunk):
        drawn = rng.integers(0, n, size=(min(chunk, resamples - start), n))
        for name, ratios in _divide(_statistics(ours, drawn), _statistics(theirs, drawn)).items():
            parts.setdefault(name, []).append(ratios)
    found = {}
    for name, chunks in parts.items():
        drawn_ratios = np.concatenate(chunks)
        if np.isfinite(drawn_ratios).all() and np.isfinite(whole[name]).all():
            low, high = np.percentile(drawn_ratios, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
            found[name] = Ratio(float(whole[name][0]), float(low), float(high), Method.PAIRED_BOOTSTRAP, n)
    return found


def _divide(
    ours: dict[str, NDArray[np.float64]], theirs: dict[str, NDArray[np.float64]]
) -> dict[str, NDArray[np.float64]]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return {name: ours[name] / theirs[name] for name in ours}


def _shared(one: Records, other: Records) -> NDArray[np.bool_]:
    """Rows of `one` with a request that both arms completed."""
    both = np.intersect1d(one.request_id[one.completed], other.request_id[other.completed], assume_unique=True)
    return np.isin(one.request_id, both, assume_unique=True)


def _columns(records: Records, rows: NDArray[np.bool_]) -> dict[str, IntArray]:
    keep = rows[records.completed]
    tpot_ns, defined = records.tpot_ns()
    return {
        "ttft_s": records.ttft_ns()[keep],
        "e2e_s": records.e2e_ns()[keep],
        "tpot_s": np.where(defined, np.rint(tpot_ns), 0).astype(np.int64)[keep],
        "tpot_defined": defined.astype(np.int64)[keep],
        "tokens": records.output_tokens[rows],
        "layers_per_token": records.layers_run[rows],
        "agreement": records.agreed_tokens[rows],
        "early_exit_fraction": records.early_tokens[rows],
        "breach_fraction": records.breach_tokens[rows],
        "chars": records.output_chars[rows],
        "bits_per_char": records.microbits.values[rows],  # 0 where not known: then no ratio is
    }


def _join(blocks: Sequence[dict[str, IntArray]]) -> dict[str, IntArray]:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _statistics(columns: dict[str, IntArray], drawn: IntArray) -> dict[str, NDArray[np.float64]]:
    """Statistics of each resample; `drawn` has shape (resamples, n)."""
    sums = {name: column[drawn].sum(axis=1) for name, column in columns.items()}
    found = {f"{name}_mean": sums[name] / drawn.shape[1] for name in ("ttft_s", "e2e_s")}
    with np.errstate(divide="ignore", invalid="ignore"):
        found["tpot_s_mean"] = sums["tpot_s"] / sums["tpot_defined"]
        for name in ("layers_per_token", "agreement", "early_exit_fraction", "breach_fraction"):
            found[name] = sums[name] / sums["tokens"]
        found["bits_per_char"] = sums["bits_per_char"] / sums["chars"]
    for name in ("ttft_s", "e2e_s"):
        p50, p99 = np.percentile(columns[name][drawn], [50, 99], axis=1)
        found |= {f"{name}_p50": p50, f"{name}_p99": p99}
    return found
