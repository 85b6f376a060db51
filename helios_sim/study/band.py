"""Tests whether an answer holds if a profile is off: runs the subject and its baseline at both ends of its time band.

At an end, every iteration of both arms takes a factor as long, whatever the model, and the policies know it; arrivals,
lengths and loads of weights stay. A profile says how far its times may be off (`Profile.time_band`), or the settings do
(`profile_band`). No end is quicker than the card: utilisation stays below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from helios_sim.errors import UserError
from helios_sim.profile.spec import TimeBand
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.jobs import Job, JobResult
from helios_sim.study.limits import FACTORS
from helios_sim.study.modes import SIMULATE
from helios_sim.study.plan import StudyPlan
from helios_sim.study.schema import AUTO, NONE, Config

# Most requests, of both arms and all seeds together, with which profile_band=auto runs them again: a second or two.
MOST_REQUESTS = 50_000
FASTEST = 0.999  # highest utilisation at an end

Pair = tuple[tuple[Job, ...], tuple[Job, ...]]  # jobs of the subject and of its baseline, one for each seed


@dataclass(frozen=True, slots=True)
class Ends:
    """The pair's jobs by factor on the times of iterations, or why there are none."""

    band: TimeBand | None = None
    pairs: Mapping[float, Pair] | None = None
    why_not: str | None = None


def run_ends(
    plan: StudyPlan, pair: Pair, results: Mapping[str, JobResult], run: Callable[[Sequence[Job]], None]
) -> Ends:
    """Run the pair at both ends of the band, or say why not. `results` must hold its results at factor 1."""
    asked = plan.config.profile_band
    if asked == NONE or any(job.config.mode != SIMULATE for jobs in pair for job in jobs):
        return Ends()
    jobs = list({job.key: job for jobs in pair for job in jobs}.values())
    band = band_of(plan.config, jobs)
    if band is None:
        return Ends(why_not="how far the profiles' times may be off is not known (profile_band=[LOW,HIGH] says it)")
    requests = sum(len(results[job.key].replicate.records) for job in jobs)
    if asked == AUTO and requests > MOST_REQUESTS:
        how = f"profile_band=[{band.low:g},{band.high:g}] runs them again with such times"
        return Ends(band, why_not=f"{requests:,} requests are many ({how})")
    shares = [results[job.key].replicate.metrics.get("roofline_fraction") for job in jobs]
    share = max((s for s in shares if isinstance(s, int | float)), default=0.0)
    band = possible(band, share)
    pairs = {factor: _scaled(pair, factor) for factor in (band.low, band.high)}
    try:
        run([job for ours, theirs in pairs.values() for job in (*ours, *theirs)])
    except UserError as error:
        return Ends(band, why_not=f"it cannot be run at the ends of the profile's band: {error}")
    return Ends(band, pairs)


def band_of(config: Config, jobs: Sequence[Job]) -> TimeBand | None:
    """Return the band of the settings, else the widest of the profiles that the jobs use; None if one has no band."""
    if config.profile_band != AUTO:
        low, high = map(float, config.profile_band)
        return TimeBand(low, high, "profile_band")
    found: dict[TimeBand | None, None] = {}
    for job in jobs:
        for kind in shared_fleet(job.config, job.seed).kinds:
            found |= dict.fromkeys(data.profile.time_band for data in kind.parts.models.values())
    bands = [band for band in found if band is not None]
    if None in found or not bands:
        return None
    sources = " and ".join(dict.fromkeys(band.source for band in bands))
    return TimeBand(min(band.low for band in bands), max(band.high for band in bands), sources)


def possible(band: TimeBand, share: float) -> TimeBand:
    """Return the band without times at which runs would use more than the whole card; `share`: what they use now."""
    return replace(band, low=min(1.0, max(band.low, share / FASTEST)))


def _scaled(pair: Pair, factor: float) -> Pair:
    ours, theirs = (tuple(_at(job, factor) for job in jobs) for jobs in pair)
    return ours, theirs


def _at(job: Job, factor: float) -> Job:
    return replace(job, config=replace(job.config, profile_time_factor=time_factor(job.config, factor)))


def time_factor(config: Config, factor: float) -> float:
    """Return the `profile_time_factor` that makes iterations take `factor` times as long as the one that is set."""
    return min(max(config.profile_time_factor * factor, FACTORS[0]), FACTORS[1])
