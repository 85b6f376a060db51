"""Whole iterations of random composition, measured and compared with a profile's prices.

A composition runs the model's real steps: each band for the rows still alive, checks, K and V propagated for rows that
exited, and the head. Its device time is compared with the profile's price without host costs. These measurements are
not used for the tables.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from calibrate.measure.device import Step
from calibrate.measure.latency import WHOLE_MODEL, nearer_anchor
from calibrate.measure.sampling import Points, TimingJob, TimingPoint
from calibrate.measure.subject import Subject
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Runtime

KINDS = ("equal", "unequal", "prefill", "mixed", "exits")
FITTED = "mixed"  # the kind to which the profile's mixed factor is fitted
NO_HOST = Runtime(0.0, 0.0, 0.0, 0.0, None)


@dataclass(frozen=True, slots=True)
class Iteration:
    """One iteration to run. `alive[s]` of the decodes' rows run band s; the first rows stay longest."""

    kind: str
    index: int
    bounds: tuple[int, ...]
    kv_tokens: tuple[int, ...]  # context of each decode
    alive: tuple[int, ...]
    chunk: tuple[int, int] | None = None  # new tokens and context of a prompt, which runs all bands
    by_classifier: bool = False

    @property
    def point(self) -> TimingPoint:
        return TimingPoint(f"whole_{self.kind}", WHOLE_MODEL, self.index)

    def composition(self) -> Composition:
        bands, batch = len(self.bounds), len(self.kv_tokens)
        decode = np.array([self.alive], dtype=np.int64)
        kv = np.array([[sum(self.kv_tokens[:rows]) for rows in self.alive]], dtype=np.int64)
        checks = np.zeros((1, bands), dtype=np.int64)
        checks[0, :-1] = self.alive[:-1]
        chunks = () if self.chunk is None else (PrefillChunk(*self.chunk, self.bounds[-1]),)
        sampled = self.alive[-1] + len(chunks)
        return Composition(
            self.bounds, decode, kv, np.array([sampled]),
            check_tokens=None if self.by_classifier or bands == 1 else checks,
            classifier_tokens=checks if self.by_classifier else None,
            propagated_tokens=batch - decode if bands > 1 else None,
            prefill=chunks, host_sync_at_checks=False,
            decode_kv_least=np.array([min(self.kv_tokens)]) if batch else None,
            decode_kv_most=np.array([max(self.kv_tokens)]) if batch else None,
        )  # fmt: skip


def iterations(subject: Subject, kind: str, count: int, seed: int) -> list[Iteration]:
    """Random iterations within the limits. Lengths in a batch are uniform up to twice their mean, except in `equal`."""
    limits, n = subject.limits, subject.n_layers
    found = []
    for index in range(count):
        rng = np.random.default_rng([seed, KINDS.index(kind), index])
        batch = int(np.exp(rng.uniform(0, np.log(limits.max_batch + 0.5))))
        longest = min(limits.max_kv_tokens, subject.pool_tokens // (batch + 1))
        most = int(np.exp(rng.uniform(np.log(min(32, longest)), np.log(longest))))
        kv = [most] * batch if kind == "equal" else rng.integers(1, most, batch, endpoint=True).tolist()
        chunk = None
        if kind in ("prefill", "mixed"):
            tokens = int(np.exp(rng.uniform(np.log(min(8, limits.max_chunk)), np.log(limits.max_chunk))))
            tokens = max(1, min(tokens, limits.max_rows - batch))
            room = min(limits.max_kv_tokens, subject.pool_tokens) - tokens
            chunk = (tokens, int(rng.integers(0, room)) if rng.random() < 0.6 else 0)
        bounds: tuple[int, ...] = (n,)
        alive: tuple[int, ...] = (batch,)
        if kind == "prefill":
            kv, alive = [], (0,)
        if kind == "exits" and n >= 3:
            first, second = sorted(rng.choice(np.arange(1, n), 2, replace=False).tolist())
            stay = int(rng.integers(1, batch, endpoint=True))
            bounds, alive = (first, second, n), (batch, stay, int(rng.integers(1, stay, endpoint=True)))
        classify = kind == "exits" and subject.has_classifier and index % 2 == 1
        # the number keeps iterations of different seeds apart among the points
        found.append(Iteration(kind, seed * 1000 + index, bounds, tuple(kv), alive, chunk, classify))
    return found


def job(subject: Subject, iteration: Iteration) -> TimingJob:
    """A timing job for the iteration: the sum of its laps is one sample of its point."""
    point, rows = iteration.point, iteration.alive[0] + (iteration.chunk[0] if iteration.chunk else 0)
    steps = partial(_steps, subject, iteration)
    return TimingJob((point,), steps, lambda laps_s: {point: float(sum(laps_s))}, nearer_anchor(subject, rows))


def _steps(subject: Subject, it: Iteration) -> Sequence[Step]:
    from helios_sim.live.memory.kv import MixedStep

    model, batch = subject.model, len(it.kv_tokens)
    cache = subject.decode_cache(it.kv_tokens) if batch else None
    extra = it.chunk[0] if it.chunk else 0
    ids = subject.tokens(batch + extra)
    steps: list[Step] = [lambda: model.embed(ids, ids % subject.architecture.max_context_tokens)]
    start = 0
    for band, end in enumerate(it.bounds):
        rows = it.alive[band]
        parts: list[Any] = []
        if rows and cache is not None:
            parts.append(subject.decode_step_in(cache, it.kv_tokens[:rows], 0))
        if it.chunk:
            parts.append(subject.prompt_step(*it.chunk))
        attend = parts[0] if len(parts) == 1 else MixedStep(parts, [rows, extra])
        steps.append(partial(model.run, subject.hidden(rows + extra), start, end, attend))
        if rows < batch and cache is not None:
            left = subject.decode_step_in(cache, it.kv_tokens[rows:], rows)
            steps.append(partial(model.propagate, subject.hidden(batch - rows), start, end, left))
        if band + 1 < len(it.bounds):
            check = subject.classified if it.by_classifier else subject.checked
            steps.append(partial(check, subject.hidden(rows)))
        start = end
    sampled = it.alive[-1] + (1 if it.chunk else 0)
    steps.append(partial(subject.sampled, subject.hidden(sampled)))
    return steps


@dataclass(frozen=True, slots=True)
class Comparison:
    """Measured and priced seconds of one iteration."""

    kind: str
    measured_s: float
    priced_s: float

    @property
    def error(self) -> float:
        return (self.priced_s - self.measured_s) / self.measured_s


def compare(profile: Profile, points: Points, found: Sequence[Iteration]) -> list[Comparison]:
    """Compare the profile's price with the measured time of every iteration that was measured."""
    bare = replace(profile, runtime=NO_HOST)
    return [
        Comparison(it.kind, points.figure(it.point).median_s, float(bare.iteration_time_s(it.composition())[0]))
        for it in found
        if points.known(it.point)
    ]


def fitted_mixed_factor(profile: Profile, points: Points, found: Sequence[Iteration]) -> float | None:
    """The `mixed_factor` with the least relative squared error on these iterations.

    The price is linear in it. None if nothing was measured or the price does not depend on it.
    """
    without, with_it = (replace(profile, runtime=NO_HOST, mixed_factor=value) for value in (0.0, 1.0))
    above = below = 0.0
    for it in found:
        if not points.known(it.point):
            continue
        measured_s = points.figure(it.point).median_s
        rest_s = float(without.iteration_time_s(it.composition())[0])
        own_s = float(with_it.iteration_time_s(it.composition())[0]) - rest_s
        above += own_s * (measured_s - rest_s) / measured_s**2
        below += (own_s / measured_s) ** 2
    return above / below if below else None


def with_mixed_factor(bare: Profile, fitted: float | None, compare: Callable[[Profile], list[Comparison]]) -> Profile:
    """The profile with the fitted factor if it is more than noise, else the profile without it.

    The factor must exceed the error of other kinds of iterations and improve iterations that it was not fitted to.
    """
    if fitted is None:
        return bare
    without, with_it = (compare(profile) for profile in (bare, replace(bare, mixed_factor=fitted)))
    others = [abs(c.error) for c in without if c.kind in ("equal", "prefill")]
    mixed = [[abs(c.error) for c in of if c.kind == FITTED] for of in (without, with_it)]
    if not others or not mixed[0] or abs(fitted - 1.0) <= 2.0 * float(np.median(others)):
        return bare
    return replace(bare, mixed_factor=fitted) if np.median(mixed[1]) < np.median(mixed[0]) else bare


def summary(found: Sequence[Comparison]) -> dict[str, Mapping[str, float | int]]:
    """Errors of the prices by kind and for all, as shares of the measured time."""
    by_kind = {kind: [c.error for c in found if c.kind == kind] for kind in KINDS} | {"all": [c.error for c in found]}
    return {
        kind: {
            "iterations": len(errors),
            "median": float(np.median(errors)),
            "median_absolute": float(np.median(np.abs(errors))),
            "p90_absolute": float(np.quantile(np.abs(errors), 0.9)),
            "largest": float(max(errors, key=abs)),
        }
        for kind, errors in by_kind.items()
        if errors
    }
