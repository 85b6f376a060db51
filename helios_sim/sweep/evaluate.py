"""One design from its jobs to its metrics, wherever it runs. Writes nothing."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence
from time import perf_counter

from helios_sim.errors import UserError
from helios_sim.report.metrics import MetricValue, mean_metrics
from helios_sim.report.records import RecordLog
from helios_sim.study.job import Job, measure, serve
from helios_sim.study.shared import shared_fleet
from helios_sim.sweep.journal import Outcome


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
    fleet = shared_fleet(job.config, job.seed)
    log = RecordLog()
    run = serve(job, fleet, log.add, pictures=False)
    return measure(job, fleet, log.records(), run)
