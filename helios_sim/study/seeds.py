"""Runs a study with `seeds=auto` under more and more seeds, until the subject's ratio is known well enough.

The subject and its baseline run under the first seeds, then under twice as many, and so on; the other arms and the
sweeps follow under the seeds at which that ended. It ends when more seeds would not change the verdict: the interval is
narrow, or the interval at the DECIDED level lies on one side of 1. With a level as high as that, repeated looks hardly
matter: the 95 % interval that is shown in the end covers nearly what it claims (Haybittle 1971, Peto et al. 1976, on
trials that are looked at before their end). The number of seeds does not depend on where the jobs run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from helios_sim.report.cautions import MOST_LOST
from helios_sim.report.compare import Ratio, compare, intervals_of
from helios_sim.report.intervals import Method
from helios_sim.report.metrics import mean_metrics
from helios_sim.report.result import USUAL_METRICS, Instead, Replicate
from helios_sim.study.band import Ends, Pair, run_ends
from helios_sim.study.instead import run_instead
from helios_sim.study.jobs import Job, JobResult
from helios_sim.study.plan import CUSTOM, StudyPlan, check_study, plan_study
from helios_sim.study.schema import AUTO, Config

DECIDED = 0.999  # level of the interval that settles the sign of a difference

RunJobs = Callable[[Sequence[Job]], Mapping[str, JobResult]]  # results by job key


@dataclass(frozen=True, slots=True)
class Settled:
    """A study under the seeds that it needed, with the results of all its jobs."""

    plan: StudyPlan
    results: Mapping[str, JobResult]
    why: str | None = None  # why there are no more seeds; None if the seeds were given
    ends: Ends = field(default_factory=Ends)
    instead: Mapping[str, Mapping[int, Instead]] = field(default_factory=dict)  # by arm and place in its log


def first_plan(config: Config) -> StudyPlan:
    """Return the checked plan of a study, with `seeds=auto` under the first seeds. UserError for wrong settings."""
    plan = plan_study(_under(config, looks(config)[0]) if config.seeds == AUTO else config)
    check_study(plan)
    return plan


def settle(plan: StudyPlan, config: Config, run: RunJobs, processes: int | None = 1) -> Settled:
    """Run a study from its first plan on; `config` is as it was given, with seeds that may be `auto`.

    `processes` is as in `run_jobs`, for the branches of `run_instead`.
    """
    results: dict[str, JobResult] = {}

    def done(jobs: Sequence[Job]) -> None:
        missing = {job.key: job for job in jobs if job.key not in results}
        if missing:
            # a user's own policy first, to find its mistakes before others have run
            results.update(run(sorted(missing.values(), key=lambda job: job.arm.policy.name != CUSTOM)))

    why = None
    if config.seeds == AUTO:
        for seeds in looks(config):
            plan = plan_study(_under(config, seeds))
            subject, baseline = _pair(plan)
            done([*subject, *baseline])
            why = _reason(config, [[results[job.key].replicate for job in jobs] for jobs in (subject, baseline)])
            if why is not None:
                break
        why = f"{len(plan.config.seeds)} seeds: {why or 'auto_seeds.at_most allows no more'}."
    done(plan.jobs)
    ends = run_ends(plan, _pair(plan), results, done)
    first = {name: jobs[0] for name, jobs in plan.headline.jobs.items()}
    return Settled(plan, results, why, ends, run_instead(first, results, _subject(plan), processes))


def looks(config: Config) -> list[int]:
    """Return the numbers of seeds at which it may end: twice as many each time, at last the most that are allowed."""
    found, most = [config.auto_seeds.first], config.auto_seeds.at_most
    while found[-1] * 2 < most:
        found.append(found[-1] * 2)
    return found if found[-1] == most else [*found, most]


def _under(config: Config, seeds: int) -> Config:
    return replace(config, seeds=list(range(seeds)))


def _pair(plan: StudyPlan) -> Pair:
    """Return the jobs of the subject and of its baseline."""
    arms, subject = plan.headline.jobs, _subject(plan)
    return arms[subject], arms[arms[subject][0].arm.baseline or plan.headline.baseline]


def _subject(plan: StudyPlan) -> str:
    return plan.config.subject or list(plan.headline.jobs)[-1]


def _reason(config: Config, pair: Sequence[Sequence[Replicate]]) -> str | None:
    """Return why more seeds would not change the verdict; None if they may."""
    name = (config.headline_metrics or USUAL_METRICS)[0]
    ours, theirs = ([(it.records, it.metrics) for it in runs] for runs in pair)
    if all(_lossy(it) for it in pair[0]) or all(_lossy(it) for it in pair[1]):
        return "under each of them requests were lost, and more do not mend that"
    if pair[0][0] is pair[1][0]:  # the subject is its own baseline: the figure itself
        value = mean_metrics([metrics for _, metrics in ours])[name]
        interval = intervals_of(ours, [name]).get(name)
        if not isinstance(value, int | float) or interval is None:
            return "its figure is not defined"
        found = Ratio(float(value), interval.low, interval.high, interval.method, interval.n)
        return _narrow(config, found)
    ratio = compare(ours, theirs, names=[name]).get(name)
    if ratio is None:
        return "the ratio is not defined"
    if ratio.method is Method.BAND:
        return "the ratio is a band, which more seeds do not narrow"
    if (reason := _narrow(config, ratio)) is not None:
        return reason
    decided = compare(ours, theirs, names=[name], level=DECIDED)[name]
    if decided.low is not None and decided.high is not None and (decided.high < 1 or decided.low > 1):
        return f"more would not change on which side of 1 the ratio lies, at the {DECIDED:.1%} level"
    return None


def _narrow(config: Config, found: Ratio) -> str | None:
    if found.low is None or found.high is None or found.ratio is None:
        return None
    width = (found.high - found.low) / found.ratio if found.ratio else 0.0
    if width > config.auto_seeds.relative_width:
        return None
    return f"the subject's interval is {width:.1%} of its figure wide, at most {config.auto_seeds.relative_width:.0%}"


def _lossy(run: Replicate) -> bool:
    n = len(run.records)
    return (n - run.records.n_completed) / n > MOST_LOST if n else False
