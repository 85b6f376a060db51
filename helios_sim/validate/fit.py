"""Estimates quantities of a logged engine that profiles lack, from the first requests of its log.

- `host`: time of the host in each iteration. Above 0: milliseconds more than in the engine's preset; below 0: the share
  of the preset's host time that is taken away.
- `prefill_gap_s`: additional time of an iteration with a prompt.
- `decode_factor`, `prompt_factor`: times of work with few tokens, and with many, divided by the profile's.
- `warm_up_s`: additional time of the first iteration, seen in the first request alone.

The first two are added times and the factors scale with the work, so requests in quiet and busy times, with short and
long prompts, tell them apart as far as a log has both. Otherwise the difference is shared out by prior likelihood
(`PRIOR`). Every fitted figure is a mean over many requests, since single ones depend on which iteration they meet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import lsq_linear

from helios_sim.errors import UserError
from helios_sim.logs import Begins, RequestLog
from helios_sim.profile.spec import Runtime
from helios_sim.provenance import Assumption
from helios_sim.request import NS_PER_S, RequestRecord, Status
from helios_sim.study.build import build_profile
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.jobs import serve
from helios_sim.study.plan import jobs_of
from helios_sim.study.schema import Config
from helios_sim.validate.replay import stamp_times
from helios_sim.vary.settings import with_settings

FloatArray = NDArray[np.float64]
CLOSE = 0.01  # a relative miss of a fitted figure that counts as much as one unit of PRIOR
CLOSE_IN_A_QUEUE = 0.04  # the same for waits, in which errors of all earlier iterations add up
PRIOR = {"host": 1.0, "prefill_gap_s": 4e-3, "decode_factor": 0.1, "prompt_factor": 0.1}
_STEPS = np.array([1.0, 1.0, 2.0, 2.0])  # in units of PRIOR, large enough to outweigh the effect of single arrivals
_LEAST, _MOST = np.array([-1.0, 0.0, -7.5, -7.5]), np.array([50.0, 20.0, 30.0, 30.0])
ROUNDS, STILL, ENOUGH = 6, 0.03, 0.97  # a round that leaves more than this share of the misses is the last
MOST = 1500  # most requests that are fitted
FEWEST = 5  # fewest requests of a figure
LEAST_WARM_UP_S = 0.02
_HOST = ("host_overhead_s", "host_s_per_request", "gap_s", "gap_s_per_request")


@dataclass(frozen=True, slots=True)
class Quantities:
    host: float = 0.0
    prefill_gap_s: float = 0.0
    decode_factor: float = 1.0
    prompt_factor: float = 1.0
    warm_up_s: float = 0.0

    def settings(self, base: Runtime, config: Config) -> dict[str, float]:
        """The study's settings with these quantities, by path; `base` is the runtime without them."""
        kept = 1.0 + min(self.host, 0.0)
        costs = {name: getattr(base, name) * kept for name in _HOST if getattr(base, name) > 0 and kept != 1.0}
        costs["gap_s"] = base.gap_s * kept + max(self.host, 0.0) * 1e-3
        costs["prefill_gap_s"] = base.prefill_gap_s + self.prefill_gap_s
        found = {f"runtime.{name}": value for name, value in costs.items()}
        found["profile_time_factor"] = config.profile_time_factor * self.decode_factor
        prompts = config.profile_prompt_time_factor or config.profile_time_factor
        found["profile_prompt_time_factor"] = prompts * self.prompt_factor
        return found

    def told(self) -> tuple[tuple[str, str], ...]:
        """The quantities by name, with their values in words."""
        more, less = f"{self.host:.2f} ms more in each iteration", f"{1 + self.host:.0%} of the preset's"
        return (
            ("host time", more if self.host >= 0 else less),
            ("gap of an iteration with prefill", f"{self.prefill_gap_s * 1e3:.2f} ms"),
            ("price of decodes", f"{self.decode_factor:.3f} of the profile's"),
            ("price of prompts", f"{self.prompt_factor:.3f} of the profile's"),
            ("warm-up of the first iteration", f"{self.warm_up_s * 1e3:.1f} ms"),
        )

    def at_limits(self) -> tuple[str, ...]:
        """The quantities at their upper or lower limit."""
        most = {name: share * unit for (name, unit), share in zip(PRIOR.items(), _MOST, strict=True)}
        least = {name: share * unit for (name, unit), share in zip(PRIOR.items(), _LEAST, strict=True)}
        found = {"host": self.host, "prefill_gap_s": self.prefill_gap_s, "decode_factor": self.decode_factor - 1.0,
                 "prompt_factor": self.prompt_factor - 1.0}  # fmt: skip
        named = dict(zip(found, (name for name, _ in self.told()), strict=False))
        return tuple(
            named[name]
            for name, value in found.items()
            if value >= 0.999 * most[name] or ("factor" in name and value <= 0.999 * least[name])
        )

    def assumptions(self, n: int) -> tuple[Assumption, ...]:
        why = f"estimated from the first {n} requests of the log"
        names = ("host", "prefill_gap_s", "decode_factor", "prompt_factor", "warm_up_s")
        return tuple(Assumption(name, float(getattr(self, name)), why, "from_log.estimate") for name in names)


@dataclass(frozen=True, slots=True)
class Replayed:
    """Times of n requests in the simulation, in s since the moment from which the log counts, (n,) each."""

    ttft_s: FloatArray
    e2e_s: FloatArray
    service_s: FloatArray  # from the first scheduling to the first token
    preemptions: int

    def tpot_s(self, output_tokens: NDArray[np.int64]) -> FloatArray:
        further = np.where(output_tokens > 1, output_tokens - 1, 1)
        return np.where(output_tokens > 1, (self.e2e_s - self.ttft_s) / further, np.nan)


def replayed(log: RequestLog, config: Config, arm: str, warm_up_s: float = 0.0) -> Replayed:
    """Simulate the log's requests, in its order. Raises UserError if one of them cannot be served."""
    (job, *_) = jobs_of(config, arm)
    fleet = shared_fleet(job.config, job.seed)
    records: list[RequestRecord] = []
    turns: tuple[list[int], list[int]] = ([], [])

    def note(start_ns: int, end_ns: int) -> None:
        turns[0].append(start_ns)
        turns[1].append(end_ns)

    stamped = log.begins is Begins.QUEUED and fleet.replicas == 1

    def watch(server: object) -> None:
        setattr(server, "on_iteration", note)  # noqa: B010 - a server, of whatever kind

    serve(job, fleet, records.append, pictures=False, stepwise=stamped, warm_up_s=warm_up_s,
          on_server=watch if stamped else None)  # fmt: skip
    records.sort(key=lambda record: record.request_id)
    lost = [record for record in records if record.status is not Status.COMPLETED]
    if lost or len(records) != len(log):
        told = f"{len(log) - len(records)} requests"
        if lost:
            i = lost[0].request_id
            told = f"request {i + 1} of the log ({log.prompt_tokens[i]:,} and {log.output_tokens[i]:,} tokens)"
        why = f": {lost[0].drop_reason}" if lost else ""
        fix = "check model and hardware, or set from_log.kv_blocks and server.max_batch_tokens"
        raise UserError("log", told, f"requests that this engine can serve{why}", fix)
    if stamped:
        times, _ = stamp_times(records, np.array(turns[0], np.int64), np.array(turns[1], np.int64))
        begins, scheduled = times.queued_ns, times.scheduled_ns
        first, last = times.first_ns, times.last_ns
    else:
        begins, scheduled, first, last = (
            np.array([getattr(record, name) for record in records], np.int64)
            for name in ("arrival_ns", "scheduled_ns", "first_token_ns", "last_token_ns")
        )
    return Replayed(
        (first - begins) / NS_PER_S, (last - begins) / NS_PER_S, (first - scheduled) / NS_PER_S,
        sum(record.preemptions for record in records),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Figure:
    """A fitted mean: its requests, and its time."""

    name: str  # TPOT, service, TTFT, E2E
    rows: NDArray[np.bool_]
    measured: float
    close: float = CLOSE


def figures_of(log: RequestLog, n: int) -> list[_Figure]:
    """The figures of the first n requests, as far as the log has times."""
    found: list[_Figure] = []
    busy, early = _in_flight(log), np.arange(len(log)) < n
    tpot_s = log.tpot_s()
    if tpot_s is not None:
        found += _thirds("TPOT", tpot_s, early & ~np.isnan(tpot_s), busy)
    elif log.e2e_s is not None:  # answers were not streamed
        found += _thirds("E2E", log.e2e_s, early & ~np.isnan(log.e2e_s), log.output_tokens)
    if log.ttft_s is not None:
        several = early.copy()
        several[int(np.argmin(log.arrival_s)) if log.arrival_s is not None else 0] = n == 1  # it warms up
        if log.queue_s is not None:
            service_s = log.ttft_s - log.queue_s
            found += _thirds("service", service_s, several & ~np.isnan(service_s), log.prompt_tokens)
        else:  # with the wait in the queue: of those that came in quiet times
            known = several & ~np.isnan(log.ttft_s)
            quiet = known & (busy <= np.median(busy[known])) if known.any() else known
            found += _thirds("TTFT", log.ttft_s, quiet, log.prompt_tokens)
            if (rest := known & ~quiet).sum() >= FEWEST and (mean := float(log.ttft_s[rest].mean())) > 0:
                found.append(_Figure("TTFT", rest, mean, CLOSE_IN_A_QUEUE))
    return found


def _thirds(name: str, times: FloatArray, rows: NDArray[np.bool_], by: NDArray[np.int64]) -> list[_Figure]:
    """A figure for each third of the rows by a number; fewer parts if there are few rows or values."""
    if rows.sum() < FEWEST:
        return []
    for parts in (3, 2, 1):
        edges = [-np.inf, *np.quantile(by[rows], np.arange(1, parts) / parts), np.inf]
        found = [rows & (by > low) & (by <= high) for low, high in pairwise(edges)]
        if all(part.sum() >= FEWEST for part in found):
            break
    return [_Figure(name, part, float(times[part].mean())) for part in found if times[part].mean() > 0]


def _in_flight(log: RequestLog) -> NDArray[np.int64]:
    """The number of the log's requests in flight at each arrival, (n,)."""
    assert log.arrival_s is not None
    took_s = np.zeros(len(log)) if log.e2e_s is None else np.nan_to_num(log.e2e_s)
    ends = np.sort(log.arrival_s + took_s)
    came = np.searchsorted(np.sort(log.arrival_s), log.arrival_s, side="right") - 1
    return (came - np.searchsorted(ends, log.arrival_s, side="right")).astype(np.int64)


def estimate(
    log: RequestLog, config: Config, arm: str, n: int, note: Callable[[str], None] = lambda text: None
) -> Quantities:
    """Fit the quantities to the `figures_of` the first n requests, at most MOST.

    Later requests are served too, as far as they can matter.
    """
    n = min(n, MOST)
    log, config = _beginning(log, config, n)
    found = figures_of(log, n)
    close = np.array([figure.close for figure in found])
    base = build_profile(config, config.models[0]).runtime
    least = _LEAST.copy()
    least[0] *= any(getattr(base, name) > 0 for name in _HOST)
    of_decodes, of_prompts = (any(f.name in names for f in found) for names in (("TPOT", "E2E"), ("service", "TTFT")))
    free = np.array([of_decodes, of_prompts, of_decodes, of_prompts])

    def quantities(point: FloatArray) -> Quantities:
        host, gap, decode, prompt = (x * s for x, s in zip(point, PRIOR.values(), strict=True))
        return Quantities(float(host), float(gap), 1.0 + float(decode), 1.0 + float(prompt))

    def run(point: FloatArray) -> Replayed:
        q = quantities(point)
        note(f"host {q.host:.2f}, prefill gap {q.prefill_gap_s * 1e3:.2f} ms, decodes x{q.decode_factor:.3f}, "
             f"prompts x{q.prompt_factor:.3f}")  # fmt: skip
        return replayed(log, with_settings(config, q.settings(base, config)), arm)

    def miss(point: FloatArray) -> FloatArray:
        return _miss(found, log, run(point))

    def badness(point: FloatArray, missed: FloatArray) -> float:
        return float(((missed / close) ** 2).sum() + (point**2).sum())

    point = np.zeros(4)
    missed = miss(point)
    for _ in range(ROUNDS):
        slopes = np.zeros((len(found), 4))
        toward = np.where(missed.mean() > 0, -_STEPS, _STEPS)
        low, high = _limits(least, point[0] < 0 or (point[0] == 0 and toward[0] < 0))
        for i in np.flatnonzero(free):
            there = point.copy()
            there[i] = np.clip(point[i] + toward[i], low[i], high[i])
            if there[i] == point[i]:
                there[i] += _STEPS[i]
            slopes[:, i] = (miss(there) - missed) / (there[i] - point[i])
        step = _next(point, missed / close, slopes / close[:, None], (low, high), free) - point
        if np.abs(step).max() < STILL:
            break
        before, after = badness(point, missed), miss(point + step)
        if badness(point + step, after) >= before:
            step = 0.4 * step
            after = miss(point + step)
        now = badness(point + step, after)
        if now < before:
            point, missed = point + step, after
        if now > ENOUGH * before:
            break
    return replace(quantities(point), warm_up_s=_warm_up_s(log, run(point)))


def _beginning(log: RequestLog, config: Config, n: int) -> tuple[RequestLog, Config]:
    """The log without requests that arrived after the first n were answered, and so did not run beside them."""
    assert log.arrival_s is not None
    kept = min(len(log), 2 * n)
    if log.e2e_s is not None:
        answered_s = np.nanmax(log.arrival_s[:n] + np.nan_to_num(log.e2e_s[:n]))
        kept = max(n, int(np.searchsorted(log.arrival_s, answered_s, side="right")))
    if kept == len(log):
        return log, config
    rows = slice(0, kept)

    def part(column: FloatArray | None) -> FloatArray | None:
        return None if column is None else column[rows]

    shorter = replace(
        log, arrival_s=part(log.arrival_s), prompt_tokens=log.prompt_tokens[rows], completed=log.completed[rows],
        output_tokens=log.output_tokens[rows], status=log.status[rows], ttft_s=part(log.ttft_s), e2e_s=part(log.e2e_s),
        queue_s=part(log.queue_s), priority=None if log.priority is None else log.priority[rows],
    )  # fmt: skip
    return shorter, with_settings(config, {"workload.n_requests": kept})


def _limits(least: FloatArray, taken_away: bool) -> tuple[FloatArray, FloatArray]:
    """The limits of a step. It either takes away from the preset's host time or adds to it, never both."""
    low, high = least.copy(), _MOST.copy()
    if taken_away and least[0] < 0:
        high[0] = 0.0
    else:
        low[0] = 0.0
    return low, high


def _next(
    point: FloatArray,
    missed: FloatArray,
    slopes: FloatArray,
    limits: tuple[FloatArray, FloatArray],
    free: NDArray[np.bool_],
) -> FloatArray:
    """The point with the smallest sum of misses, by their slopes, and distance from 0.

    Misses and slopes are in units of each figure's closeness.
    """
    rows = np.vstack([slopes[:, free], np.eye(int(free.sum()))])
    wanted = np.concatenate([slopes @ point - missed, np.zeros(int(free.sum()))])
    low, high = (limit[free] for limit in limits)
    solved = lsq_linear(rows, wanted, bounds=(low - 1e-9, high + 1e-9))
    to = np.zeros(4)
    to[free] = np.clip(solved.x, low, high)
    return to


def _miss(found: list[_Figure], log: RequestLog, run: Replayed) -> FloatArray:
    """The relative error of each figure."""
    times: Mapping[str, FloatArray] = {
        "TPOT": run.tpot_s(log.output_tokens), "service": run.service_s, "TTFT": run.ttft_s, "E2E": run.e2e_s,
    }  # fmt: skip
    return np.array([float(times[f.name][f.rows].mean()) / f.measured - 1.0 for f in found])


def _warm_up_s(log: RequestLog, run: Replayed) -> float:
    """The additional wait of the first request over the fitted simulation; small values count as no warm-up."""
    first = int(np.argmin(log.arrival_s)) if log.arrival_s is not None else 0
    if log.ttft_s is None or np.isnan(log.ttft_s[first]):
        return 0.0
    longer_s = float(log.ttft_s[first] - run.ttft_s[first])
    return longer_s if longer_s > max(0.5 * run.ttft_s[first], LEAST_WARM_UP_S) else 0.0
