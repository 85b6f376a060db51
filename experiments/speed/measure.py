"""Times the simulation loop alone, without start-up and report.

`python experiments/speed/measure.py [--runs 5] [key=value ...]` prints one JSON line.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import platform
import resource
import statistics
from dataclasses import astuple
from time import perf_counter, process_time

import numpy as np
from hydra import compose, initialize_config_dir

from helios_sim.__main__ import collect_rarely
from helios_sim.config import register, to_config
from helios_sim.entry import script
from helios_sim.help import conf_folder
from helios_sim.request import RequestRecord
from helios_sim.simulation import Run
from helios_sim.study.fleet import Fleet, build_fleet
from helios_sim.study.jobs import Job, serve
from helios_sim.study.plan import plan_study


def jobs(experiment: str, overrides: list[str]) -> list[Job]:
    collect_rarely()  # as the command does
    register()
    with initialize_config_dir(conf_folder(), version_base=None):
        settings = compose("config", overrides=[f"+experiment={experiment}", *overrides])
    return plan_study(to_config(settings)).jobs


def served(job: Job, fleet: Fleet) -> tuple[list[RequestRecord], Run]:
    """The loop, with every record as it comes."""
    records: list[RequestRecord] = []
    return records, serve(job, fleet, records.append)


def digest(records: list[RequestRecord], run: Run) -> str:
    """The same for the same result: every record and every integral over the run. Samples for pictures are left out."""
    stats = run.stats
    integrals = {name: getattr(stats, name) for name in stats.__slots__ if name != "itl"}
    gaps = (stats.itl.counts.tolist(), stats.itl.total_ns, stats.itl.shortest_ns, stats.itl.longest_ns)
    rows = [tuple(map(str, astuple(record))) for record in records]
    decisions = [(d.time_ns, d.replica, str(d.cause)) for server in run.servers for d in server.decisions]
    integrals["tokens_by_depth"] = {model: sorted(n.items()) for model, n in sorted(stats.tokens_by_depth.items())}
    everything = (rows, integrals, gaps, decisions, run.end_ns)
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:16]


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--experiment", default="speed_w1")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("overrides", nargs="*")
    options = parser.parse_args(words)
    for job in jobs(options.experiment, options.overrides):
        fleet = build_fleet(job.config, job.seed)
        wall_s, cpu_s = [], []
        for _ in range(options.runs):
            started_s, started_cpu_s = perf_counter(), process_time()
            records, run = served(job, fleet)
            wall_s.append(perf_counter() - started_s)
            cpu_s.append(process_time() - started_cpu_s)
        result = {
            "experiment": options.experiment,
            "arm": job.arm.name,
            "requests": run.requests,
            "iterations": run.stats.iterations,
            "preemptions": run.stats.preemptions,
            "loop_s_median": round(statistics.median(wall_s), 3),
            "loop_s_min": round(min(wall_s), 3),
            "loop_cpu_s_median": round(statistics.median(cpu_s), 3),
            "loop_cpu_s": [round(seconds, 4) for seconds in cpu_s],
            "loop_s": [round(seconds, 4) for seconds in wall_s],
            "requests_per_s": round(run.requests / statistics.median(wall_s)),
            "peak_rss_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "digest": digest(records, run),
            "python": platform.python_version(),
            "numpy": np.__version__,
        }
        print(json.dumps(result))


if __name__ == "__main__":
    script(__file__, main)
