"""Requests to a server: their arrivals, lengths and task mix, and readers of public traces."""

from helios_sim.workload.arrivals import AllAtOnce, Arrivals, ClosedLoop, Constant, Gamma, Poisson, TraceArrivals
from helios_sim.workload.bad_lines import TraceFileError
from helios_sim.workload.generate import (
    BLOCK_REQUESTS,
    LengthFigures,
    Workload,
    WorkloadFigures,
    describe,
    generate,
    up_to,
)
from helios_sim.workload.lengths import (
    DrawnLengths,
    Exponential,
    Fixed,
    Length,
    Lengths,
    Lognormal,
    TraceLengths,
    Uniform,
)
from helios_sim.workload.mix import Drift, LinearDrift, Per, PeriodicDrift, StepDrift, TaskMix
from helios_sim.workload.traces import RequestTrace, read_trace

__all__ = [
    "BLOCK_REQUESTS",
    "AllAtOnce",
    "Arrivals",
    "ClosedLoop",
    "Constant",
    "DrawnLengths",
    "Drift",
    "Exponential",
    "Fixed",
    "Gamma",
    "Length",
    "LengthFigures",
    "Lengths",
    "LinearDrift",
    "Lognormal",
    "Per",
    "PeriodicDrift",
    "Poisson",
    "RequestTrace",
    "StepDrift",
    "TaskMix",
    "TraceArrivals",
    "TraceFileError",
    "TraceLengths",
    "Uniform",
    "Workload",
    "WorkloadFigures",
    "describe",
    "generate",
    "read_trace",
    "up_to",
]
