"""Compiles once what many short runs will share.

A short run alone does not wait for machine code (`helios_sim.core.machine`), and neither would a thousand of
them, one after the other.
"""

from __future__ import annotations

from contextlib import suppress

from helios_sim.core.machine import is_made
from helios_sim.study.job import Job, serve
from helios_sim.study.shared import shared_fleet

WORTH_COMPILING = 30_000  # requests: compiling takes some 20 s, and 300 of the quickstart's are 0.2 s quicker with it



def make_ready(job: Job, requests: int) -> None:
    """One run of the job for its machine code, where runs with so many requests follow and there is none on disk."""
    if requests < WORTH_COMPILING or is_made():
        return
    with suppress(Exception):  # what fails here fails again where it is reported
        serve(job, shared_fleet(job.config, job.seed), lambda record: None, pictures=False, compiled=True)
