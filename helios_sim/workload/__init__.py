"""What is asked of a server: arrivals, lengths, task mix, and readers of public traces. Knows no model."""

from helios_sim.workload.arrivals import AllAtOnce, Arrivals, ClosedLoop, Constant, Gamma, Poisson, TraceArrivals
from helios_sim.workload.describe import LengthFigures, WorkloadFigures, describe
from helios_sim.workload.generate import BLOCK_REQUESTS, Workload, generate
from helios_sim.workload.lengths import DrawnLengths, Exponential, Fixed, Length, Lengths, Lognormal, TraceLengths
from helios_sim.workload.mix import Drift, Linear, Per, Periodic, Step, TaskMix
from helios_sim.workload.readers import read_trace
from helios_sim.workload.trace import Trace

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
    "Linear",
    "Lognormal",
    "Per",
    "Periodic",
    "Poisson",
    "Step",
    "TaskMix",
    "Trace",
    "TraceArrivals",
    "TraceLengths",
    "Workload",
    "WorkloadFigures",
    "describe",
    "generate",
    "read_trace",
]
