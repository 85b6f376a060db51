"""Checks of what a run would take, before it is built: memory, and times that fit into whole nanoseconds."""

from __future__ import annotations

import os
from collections.abc import Mapping

import numpy as np

from helios_sim import on_disk
from helios_sim.engine.simulated import ModelData
from helios_sim.errors import UserError
from helios_sim.policy.telemetry import Situation
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.report.records import ROW_BYTES
from helios_sim.request import LATEST_NS, NS_PER_S
from helios_sim.study.schema import Config
from helios_sim.workload import Workload

MOST_REQUESTS = 2**31 - 1  # request ids are 32 bits wide
REQUEST_BYTES, REPLICA_BYTES, SLOT_BYTES = 200, 4_500_000, 450  # measured; a slot is a place for a running request
REQUESTS_PER_S = 40_000  # about, on one core
HOST_COSTS_S = 3600.0  # largest value of each cost of the host
FACTORS = (1e-3, 1e3)  # range of factors on a profile's times


def check_size(config: Config, replicas: int) -> None:
    """Raise UserError for a number of requests, replicas or places that no machine like this one can hold."""
    requests, slots = config.workload.n_requests or 0, config.server.max_running_requests
    needs = {
        "workload.n_requests": _in_memory(requests) * REQUEST_BYTES,
        "server.replicas": replicas * REPLICA_BYTES,
        "server.max_running_requests": replicas * slots * SLOT_BYTES,
    }
    key = max(needs, key=lambda name: needs[name])
    value = {"workload.n_requests": requests, "server.replicas": replicas}.get(key, slots)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if sum(needs.values()) > memory or requests > MOST_REQUESTS:
        gigabytes, hours = sum(needs.values()) / 1e9, requests / REQUESTS_PER_S / 3600
        allowed = f"one run would take about {gigabytes:,.0f} GB of {memory / 1e9:.0f} GB and {hours:,.1f} hours"
        raise UserError(key, value, allowed, f"ask for fewer, at most {MOST_REQUESTS:,} requests in any case")


def _in_memory(requests: int) -> int:
    """Return how many requests have their records in memory at once, or what takes as much."""
    most = on_disk.WORTH_A_FILE
    return most if requests >= most and requests * ROW_BYTES <= on_disk.free_bytes() else requests


def check_host_costs(config: Config) -> None:
    """Raise UserError for costs of the host and factors at which times would no longer fit."""
    for name in ("load_gb_per_s", "disk_gb_per_s"):
        rate = getattr(config.runtime, name)
        if rate is not None and not 1e-3 <= rate <= 1e5:
            raise UserError(f"runtime.{name}", rate, "from 0.001 to 100000 GB a second", "correct it")
    for name in (
        "launch_s_per_layer", "launch_s_per_graph", "sync_s", "host_overhead_s", "host_s_per_request", "load_fixed_s",
        "regroup_s",
    ):  # fmt: skip
        value = getattr(config.runtime, name)
        if value is not None and not 0 <= value <= HOST_COSTS_S:
            raise UserError(f"runtime.{name}", value, f"from 0 to {HOST_COSTS_S:g} seconds", "correct it")
    for name in ("profile_time_factor", "profile_prompt_time_factor"):
        value = getattr(config, name)
        if value is not None and not FACTORS[0] <= value <= FACTORS[1]:
            raise UserError(name, value, f"from {FACTORS[0]:g} to {FACTORS[1]:g}", "correct it")


def check_times(workload: Workload, models: Mapping[str, ModelData], situation: Situation) -> None:
    """Raise UserError if the run, with every request one after the other, might outlast what int64 ns can count."""
    expected = situation.expected
    for name, data in models.items():
        if expected is None:
            continue
        per_token = data.profile.model.chars_per_token
        iterations = workload.requests * ((expected.prompt_chars + expected.output_chars) / per_token + 2)
        longest_s = iterations * _longest_iteration_s(data.profile, situation)
        if longest_s * NS_PER_S > LATEST_NS:
            allowed = f"times up to {LATEST_NS / NS_PER_S:.1e} s; with {name} all requests might take {longest_s:.1e} s"
            raise UserError("workload", f"{workload.requests} requests", allowed, "ask for fewer, or correct the costs")


def _longest_iteration_s(profile: Profile, situation: Situation) -> float:
    """Return the time of one decode for every place, each with the longest context, with all exits checked in turn."""
    n, model = np.array([[situation.max_running_requests]]), profile.model
    full = Composition((model.n_layers,), n, n * model.max_context_tokens, n[0])
    return float(profile.iteration_time_s(full)[0]) + model.n_layers * profile.runtime.sync_s
