"""Settings of further kinds of studies: live serving, comparisons with a real run, designs of one arm, capacity plans.

The classes hold only plain types because Hydra fills them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from helios_sim.errors import require, require_finite, require_one_of
from helios_sim.vary.axis import AxisConfig
from helios_sim.vary.workers import BACKENDS

SIMULATE, LIVE = "simulate", "live"
MODES = (SIMULATE, LIVE)
DTYPES = ("float32", "bfloat16")
KERNELS = ("vllm", "trtllm")
SCHEDULERS = ("plain", "vllm_v1", "vllm_v0", "sglang", "trtllm")
METHODS = ("grid", "search")
SEARCHES = ("bisection", "every")
LIVE_KERNELS = ("triton", "torch", "flashinfer")
BY_REQUESTS = "requests"
STATISTICS_OF_SLOS = ("mean", "p50", "p90", "p95", "p99")
MOST_REPLICAS = 4096
SAMPLERS = ("nsga2", "tpe")


@dataclass
class LiveConfig:
    """Settings of `mode=live` beside the study's own; without that mode they have no effect."""

    device: str = "cpu"  # cpu, cuda, cuda:N; `device=...` for short
    devices: list[str] = field(default_factory=list)  # one for each replica, in order; empty: all on `device`
    dtype: str | None = None  # float32, bfloat16; null: as in the profile
    kernels: str | None = None  # for decodes: triton, torch, flashinfer; null: triton on a card that can, else torch
    threads: int | None = None  # of each replica on a CPU; null: an equal share of all that the process may use
    weights: dict[str, str] = field(default_factory=dict)  # by model: folder, .gguf file or hub id; else by its name
    heads: dict[str, str] = field(default_factory=dict)  # by model: folder of exit heads; else those shipped for it
    texts: str | None = None  # folder of TASK.txt, or one file for all tasks; null: those of `make models`
    warm_up: int = 3  # iterations of each kind before time begins
    score: bool = False  # afterwards read every answer once more at full depth: only then is agreement known
    run: int = 0  # number of a run among several with equal settings, which give different results
    # Every so many seconds stop the clock and time one of the two steps that the calibration timed, in turns; null:
    # time both, only before and after the run. The energy of these steps is not counted as the run's.
    pace_every_s: float | None = None

    def __post_init__(self) -> None:
        require_finite(self, "live.")
        require(self.dtype is None or self.dtype in DTYPES, "live.dtype", self.dtype, f"null, {' or '.join(DTYPES)}")
        for key, device in (("live.device", self.device), *(("live.devices", device) for device in self.devices)):
            name, _, number = device.partition(":")
            known = (name == "cuda" and (number.isdigit() or ":" not in device)) or device == "cpu"
            require(known, key, device, "cpu, cuda or cuda:N")
        allowed = f"null, {', '.join(LIVE_KERNELS)}"
        require(self.kernels in (None, *LIVE_KERNELS), "live.kernels", self.kernels, allowed)
        for key, least in (("threads", 1), ("warm_up", 0), ("run", 0)):
            value = getattr(self, key)
            require(value is None or value >= least, f"live.{key}", value, f"at least {least}")
        require(self.pace_every_s is None or self.pace_every_s > 0, "live.pace_every_s", self.pace_every_s,
                "null or above 0")  # fmt: skip

    def device_of(self, replica: int) -> str:
        return self.devices[replica] if self.devices else self.device

    @property
    def used(self) -> list[str]:
        """Devices on which replicas serve, each once."""
        return list(dict.fromkeys(self.devices or [self.device]))


@dataclass
class LiveFidelityConfig:
    """Comparison of live with simulated runs, if loads are given: every arm at every load, served in several passes."""

    loads: list[float] = field(default_factory=list)  # over each arm's own simulated capacity; above 1: overload
    seconds: float = 12.0  # of arrivals at each load
    least_requests: int = 12  # at each load, however slow the arm
    passes: int = 2  # times that everything is served; differences between passes are the noise floor
    calibrate_s: float | None = None  # take so long to measure a profile of each model before; null: take the known one

    def __post_init__(self) -> None:
        require_finite(self, "fidelity_live.")
        several = all(load > 0 for load in self.loads) and len(set(self.loads)) == len(self.loads)
        require(several, "fidelity_live.loads", list(self.loads), "different numbers above 0")
        for key in ("seconds", "least_requests", "calibrate_s"):
            value = getattr(self, key)
            require(value is None or value > 0, f"fidelity_live.{key}", value, "above 0")
        require(self.passes >= 2, "fidelity_live.passes", self.passes, "at least 2: of one there is no noise floor")


@dataclass
class LinkConfig:
    """Link between the cards of a tensor-parallel group. Null: from the table of cards, PCIe if that has none."""

    latency_s: float | None = None  # of one all-reduce, however small
    bytes_per_s: float | None = None  # in each direction of each card


@dataclass
class FidelityConfig:
    """Comparison, if a folder is given, of a logged run with its simulation from kernel times and settings.

    A null setting comes from the folder, or from tables by the names that the folder gives.
    """

    compare: bool = False  # true: compare a log, in place of running the arms; giving a folder means true
    folder: str | None = None  # meta.json, requests.jsonl, profile/, and if there timeseries.csv and workload.csv
    model: str | None = None  # the shape to use, by its name on Hugging Face
    hardware: str | None = None  # which card's memory and link to use
    memory_bytes: int | None = None  # of one card
    memory_utilisation: float | None = None  # share of it for the engine; 0.9 unless logged
    kv_blocks: int | None = None  # of the engine; the logged count unless set
    tensor_parallel: int | None = None
    schedule_ahead: int | None = None  # 1: asynchronous scheduling, vLLM's default since 0.14
    link: LinkConfig = field(default_factory=LinkConfig)
    estimate: bool = True  # estimate quantities that no table has from the first requests
    estimate_from: int = 150  # number of these first requests; at most half of the log
    mixed_term: bool = True  # decodes beside a prompt chunk as measured together; false: the sum of both alone
    unequal_kv_term: bool = True  # false: KV lengths enter by their mean
    scheduler: str = "vllm_v1"  # plain, vllm_v1
    load_factors: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.7, 0.85, 1.0, 1.2])  # to show error at
    profile_error: float = 0.01  # the effect of a profile error of this size is shown against load
    # True: compare published measurements with their simulation, in place of the arms; beside it only `rows` counts
    silicon: bool = False
    rows: str | None = None  # a CSV file with the columns of data/silicon/handed.csv; null: that file

    def __post_init__(self) -> None:
        require_finite(self, "fidelity.")
        for key in ("memory_bytes", "kv_blocks", "tensor_parallel", "estimate_from"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"fidelity.{key}", value, "at least 1")
        ahead, share, factors = self.schedule_ahead, self.memory_utilisation, self.load_factors
        require(ahead in (None, 0, 1), "fidelity.schedule_ahead", ahead, "null, 0 or 1")
        require_one_of("fidelity.scheduler", self.scheduler, SCHEDULERS[:2])
        require(share is None or 0 < share <= 1, "fidelity.memory_utilisation", share, "above 0, at most 1")
        require(all(factor > 0 for factor in factors), "fidelity.load_factors", list(factors), "all above 0")


@dataclass
class FromLogConfig:
    """Study of a log of real serving, if given: replays it, fits to its first part, tries other models and cards.

    Every format that helios_sim/logs or a workload's trace reads is taken, and the folder of a vLLM run.
    """

    replay: bool = False  # true: a log takes the place of the workload; giving a log means true
    log: str | None = None  # file or folder; `log=...` for short
    part: int | None = None  # which run of a file with several (rates of a sweep), from 1
    span_s: list[float] | None = None  # ServeGen's clients: the seconds to draw requests for, [begin, end]
    kernels: bool = True  # price the replay by the card's kernel times in the folder of a vLLM run, if it has some
    engine_of_log: bool = True  # engine settings that the log states override server.*
    kv_blocks: int | None = None  # of the engine; null: as logged, else what the card's memory has room for
    estimate: bool = True  # estimate host time and prices from the requests of the first part
    share: float = 0.5  # share of the requests, by arrival, in the first part
    models: list[str] = field(default_factory=list)  # other models to simulate on the same arrivals, at full depth
    cards: list[str] = field(default_factory=list)  # other cards, as `hardware`, for the log's model

    def __post_init__(self) -> None:
        require_finite(self, "from_log.")
        require(0 < self.share < 1, "from_log.share", self.share, "above 0 and below 1")
        for key in ("part", "kv_blocks"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"from_log.{key}", value, "null or at least 1")
        span = self.span_s
        pair = span is None or (len(span) == 2 and 0 <= span[0] < span[1])
        require(pair, "from_log.span_s", span, "null, or two numbers of seconds, the second above the first")
        for key in ("models", "cards"):
            names = getattr(self, key)
            each = len(set(names)) == len(names) and all(name.strip() for name in names)
            require(each, f"from_log.{key}", names, "names, each once")


@dataclass
class DesignsConfig:
    """Sweep of designs of one arm, if there are `parameters`; the other arms run beside it unchanged."""

    parameters: dict[str, AxisConfig] = field(default_factory=dict)  # by name; empty: an ordinary study
    method: str = "grid"  # grid: every combination; search: Optuna looks for the front
    arm: str | None = None  # the arm that is designed; null: the subject, else the last arm
    objectives: list[str] = field(
        default_factory=lambda: ["throughput_requests_per_s", "e2e_s_p99", "agreement"]
    )  # metrics that designs trade off; of a metric that is a band, the less favourable end counts
    designs: int = 200  # search: number of designs
    generation: int = 20  # search: designs asked for at a time; with `seed` it decides which designs come
    sampler: str = "nsga2"  # search: nsga2, tpe
    seed: int = 0  # search: seed of the sampler; the requests have the study's seeds
    backend: str = "serial"  # serial, processes: on this machine, ray: on a cluster
    workers: int | None = None  # null: one for each core, with ray one for each of the cluster's
    address: str | None = None  # ray: of a running cluster; null: RAY_ADDRESS, else a cluster is started here

    def __post_init__(self) -> None:
        require_one_of("sweep.method", self.method, METHODS)
        require_one_of("sweep.backend", self.backend, BACKENDS)
        require_one_of("sweep.sampler", self.sampler, SAMPLERS)
        for key in ("designs", "generation", "workers"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"sweep.{key}", value, "at least 1")
        require(self.seed >= 0, "sweep.seed", self.seed, "at least 0")
        once = bool(self.objectives) and len(set(self.objectives)) == len(self.objectives)
        require(once, "sweep.objectives", self.objectives, "at least one metric, each once")


@dataclass
class CapacityConfig:
    """Capacity plan, if there are `cards`: the fewest replicas of each card with which each arm keeps the SLOs.

    SLOs are set in `slo`, prices of cards in `cost`.
    """

    cards: list[str] = field(default_factory=list)  # as `hardware`: [l40s, 4xh100-80gb]; empty: an ordinary study
    loads: list[float] = field(default_factory=lambda: [1.0])  # times the workload's arrivals; each is planned for
    # When the SLOs are kept. requests: by the share of requests that meet all SLOs (vLLM's goodput); mean, p50, p90,
    # p95, p99: by this statistic of each time that has an SLO; a mapping gives each its own: {ttft_s: p95, e2e_s: mean}
    by: Any = BY_REQUESTS
    attainment: float = 0.99  # by=requests: the share of requests that have to meet all SLOs
    seconds: float | None = 120.0  # of drawn arrivals, at every load; null: workload.n_requests, at every load
    most_replicas: int = 64  # if so many do not suffice, no number is given
    search: str = "bisection"  # bisection; every: all numbers of replicas are run, which takes long
    beyond: int = 2  # bisection: so many further numbers must keep the SLOs too (helios_sim/vary/least.py)

    def __post_init__(self) -> None:
        require_finite(self, "capacity.")
        each = len(set(self.cards)) == len(self.cards) and all(card.strip() for card in self.cards)
        require(each, "capacity.cards", self.cards, "names of cards, each once")
        loads = self.loads
        several = bool(loads) and len(set(loads)) == len(loads) and all(0 < load <= 1e6 for load in loads)
        require(several, "capacity.loads", loads, "at least one number above 0, each once")
        by = list(self.by.values()) if isinstance(self.by, Mapping) else [self.by]
        known = STATISTICS_OF_SLOS if isinstance(self.by, Mapping) else (BY_REQUESTS, *STATISTICS_OF_SLOS)
        for name in by or [""]:
            require_one_of("capacity.by", name, known)
        require(0 < self.attainment <= 1, "capacity.attainment", self.attainment, "a share above 0 and at most 1")
        seconds = self.seconds
        require(seconds is None or 0 < seconds <= 1e7, "capacity.seconds", seconds, "null or above 0, at most 1e7")
        most, beyond = self.most_replicas, self.beyond
        require(1 <= most <= MOST_REPLICAS, "capacity.most_replicas", most, f"from 1 to {MOST_REPLICAS}")
        require_one_of("capacity.search", self.search, SEARCHES)
        require(0 <= beyond <= MOST_REPLICAS, "capacity.beyond", beyond, f"from 0 to {MOST_REPLICAS}")
