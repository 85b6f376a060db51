"""One design from its jobs to its metrics, wherever it runs. Keeps what designs share; writes nothing.

Designs differ in a policy's settings, the objective or the threshold. Profiles, exit traces, their replays and what
is known of the load are the same for all: each process makes them once.
"""

from __future__ import annotations

import json
import traceback
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from time import perf_counter

from helios_sim.errors import UserError
from helios_sim.exits.offline import OfflineExits, offline_exits
from helios_sim.policy.telemetry import Candidate, Goal, Objective
from helios_sim.report.metrics import MetricValue, mean_metrics
from helios_sim.report.record_log import RecordLog
from helios_sim.study.build import Parts, build, choose, confidence, threshold
from helios_sim.study.job import PRESENTATION, Job, measure, serve
from helios_sim.study.schema import Config, ObjectiveConfig
from helios_sim.sweep.journal import Outcome

MOST_KEPT = 4  # different parts at a time, such as one for each seed
MOST_USES = 200  # of the same parts: a trace remembers its replays, one for every threshold


@dataclass(slots=True)
class _Kept:
    parts: Parts
    uses: int = 0
    offline: dict[tuple[str, float], OfflineExits] = field(default_factory=dict)  # by model and threshold


_kept: OrderedDict[str, _Kept] = OrderedDict()


def evaluate(jobs: Sequence[Job]) -> Outcome:
    """Means of the metrics over the jobs, which are one design under several seeds. Never raises an error of theirs."""
    started_s = perf_counter()
    try:
        metrics: Mapping[str, MetricValue] | None = mean_metrics([_metrics(job) for job in jobs])
        error, lasting = None, True
    except UserError as mistake:
        metrics, error, lasting = None, str(mistake), True
    except Exception as defect:  # of ours or of a custom policy: one design must not end the others
        place = traceback.extract_tb(defect.__traceback__)[-1]
        metrics, lasting = None, False
        error = f"{type(defect).__name__}: {defect} ({place.filename}, line {place.lineno})"
    return Outcome(metrics, error, perf_counter() - started_s, lasting)


def _metrics(job: Job) -> dict[str, MetricValue]:
    parts = shared_parts(job.config, job.seed)
    log = RecordLog()
    run = serve(job, parts, log.add)
    return measure(job, parts, log.records(), run)


def shared_parts(config: Config, seed: int) -> Parts:
    """As `build` gives them, the same to the last bit, from what was built before where it can be."""
    key = _key(config, seed)
    kept = _kept.pop(key, None)
    if kept is None or kept.uses >= MOST_USES:
        kept = _Kept(build(config, seed))
    _kept[key] = kept
    while len(_kept) > MOST_KEPT:
        _kept.popitem(last=False)
    kept.uses += 1
    return replace(kept.parts, situation=replace(
        kept.parts.situation, objective=_objective(config.objective), candidates=_candidates(config, kept)
    ))  # fmt: skip


def _candidates(config: Config, kept: _Kept) -> dict[str, Candidate]:
    at, found = threshold(config), {}
    for name, data in kept.parts.models.items():
        if (name, at) not in kept.offline:
            kept.offline[name, at] = offline_exits(data.trace.trace, at, confidence(config))
        found[name] = Candidate(data.profile, kept.offline[name, at])
    return found


def _objective(c: ObjectiveConfig) -> Objective:
    return Objective(choose(Goal, "objective.goal", c.goal), c.max_disagreement, c.max_bits_per_char)


def _key(config: Config, seed: int) -> str:
    """Of everything that parts are made of, but for what is set anew each time."""
    settings = {name: value for name, value in asdict(config).items() if name not in (*PRESENTATION, "objective")}
    settings["exits"].pop("threshold")
    return json.dumps([seed, settings], sort_keys=True, default=str)
