"""The settings of a study, in plain types, with the ranges of single values.

The classes are mutable and hold only plain types because Hydra fills them; everything made from them is frozen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

from helios_sim.core.line import ORDERS
from helios_sim.errors import UserError, require, require_one_of
from helios_sim.profile.devices import DEGREES, group_of
from helios_sim.profile.precision import Precision
from helios_sim.profile.spec import RuntimeConfig
from helios_sim.report import FOR_PAGE, STYLES
from helios_sim.study.modes import (
    KERNELS,
    MODES,
    SCHEDULERS,
    CapacityConfig,
    DesignsConfig,
    FidelityConfig,
    FromLogConfig,
    LiveConfig,
    LiveFidelityConfig,
)
from helios_sim.study.presets import settings_in_full
from helios_sim.vary.axis import AxisConfig

# Settings that do not change a single run, only which runs there are and how results are shown.
PRESENTATION = (
    "name", "title", "question", "arms", "policy", "baseline", "subject", "seeds", "auto_seeds", "sweeps", "figures",
    "published", "gates", "headline_metrics", "pictures", "report", "trace", "jobs", "sweep", "fidelity",
    "fidelity_live", "profile_band", "next_best", "capacity", "from_log",
)  # fmt: skip

DISCARDED = 2  # server.sleep_level
LATEST_FAULT_S = 1e9
MOST_FAULTS_PER_HOUR = 1e6  # of one kind on one replica


@dataclass
class ArrivalsConfig:
    """When requests come."""

    kind: str = "poisson"  # poisson, gamma, constant, all_at_once, closed_loop, trace
    rate_per_s: float | None = None  # poisson, gamma, constant
    cv: float | None = None  # gamma: coefficient of variation of the gaps
    users: int | None = None  # closed_loop: each sends the next request when the last is answered
    trace: str | None = None  # trace: a file, here or in the folder of shared data
    rate_scale: float = 1.0  # trace: so many times as fast as recorded
    time_unit: str | None = None  # trace: s, ms, us or ns, for numbers without a unit in the file


@dataclass
class LengthConfig:
    """Length of a text in tokens, or in characters: see `chars_per_token` of the workload."""

    kind: str = "fixed"  # fixed, lognormal, exponential; uniform: from minimum to maximum
    value: int | None = None  # fixed
    mean: float | None = None  # exponential; lognormal with sigma
    sigma: float | None = None  # lognormal: standard deviation of the logarithm
    median: float | None = None  # lognormal with sigma
    p50: float | None = None  # lognormal with p95
    p95: float | None = None
    minimum: int = 1  # lengths are clipped to these two
    maximum: int | None = None


@dataclass
class LengthsConfig:
    """How long prompts and answers are."""

    kind: str = "drawn"  # drawn: prompt and answer independently; trace: both of a recorded request
    prompt: LengthConfig = field(default_factory=LengthConfig)
    output: LengthConfig = field(default_factory=LengthConfig)
    trace: str | None = None  # trace: a file, here or in the folder of shared data
    resample: bool = False  # trace: rows drawn with replacement; false: in the file's order
    id_tokens: int = 512  # trace: tokens per hash_id, which say what prompts share; 512 in Mooncake's

    def __post_init__(self) -> None:
        fits = 1 <= self.id_tokens < 2**31
        require(fits, "workload.lengths.id_tokens", self.id_tokens, "from 1 to 2^31 - 1")


@dataclass
class SessionsConfig:
    """Users who take turns, request after request; each prompt is the whole conversation so far and a new text."""

    users: int | None = None  # null: no sessions, each request is alone
    turns: LengthConfig = field(default_factory=LengthConfig)  # per session; its user then begins another session
    max_tokens: int | None = None  # a session ends before it would exceed this; null: no limit


@dataclass
class MixConfig:
    """Shares of tasks among the requests, and how they change."""

    # Shares by name, scaled to a sum of 1. Given whole, they replace the experiment's; so does `after`
    tasks: dict[str, float] = field(default_factory=dict, metadata={"whole": True})
    # Shares to which the mix drifts; empty: it does not
    after: dict[str, float] = field(default_factory=dict, metadata={"whole": True})
    drift: str | None = None  # step, linear, periodic; null: none
    at: float | None = None  # step: the position of the jump
    start: float | None = None  # linear: from here to `end`
    end: float | None = None
    period: float | None = None  # periodic: length of a cycle
    per: str = "requests"  # requests: a position is the share of requests so far, 0 to 1; seconds: an arrival time
    # By task, for server.order=priority: the lowest number is served first; tasks without an entry have 0
    priorities: dict[str, int] = field(default_factory=dict)


@dataclass
class FaultConfig:
    """When one kind of fault strikes: at these times, at random, or both; without either it does not."""

    at_s: list[float] = field(default_factory=list)  # on the run's clock
    rate_per_hour: float | None = None  # mean rate of each replica, at random times
    replicas: list[int] | None = None  # numbers of the replicas that it strikes, from 0; null: all


@dataclass
class LastingFaultConfig(FaultConfig):
    """Faults that last for a time."""

    lasts_s: float = 10.0


@dataclass
class SlowCardConfig(LastingFaultConfig):
    """Times in which a card is slow."""

    factor: float = 2.0  # iterations take so many times as long


@dataclass
class FaultsConfig:
    """Faults that every arm meets at the same times; see workload/faults.py for what each kind does."""

    retries: int = 3  # how often a request that a fault hits is sent again before it is dropped
    replica_dies: LastingFaultConfig = field(default_factory=LastingFaultConfig)  # lasts_s: until it serves again
    iteration_fails: FaultConfig = field(default_factory=FaultConfig)
    out_of_memory: FaultConfig = field(default_factory=FaultConfig)
    load_fails: FaultConfig = field(default_factory=FaultConfig)
    transfer_stalls: LastingFaultConfig = field(default_factory=LastingFaultConfig)
    slow_card: SlowCardConfig = field(default_factory=SlowCardConfig)

    def __post_init__(self) -> None:
        def check(name: str, value: Any, holds: bool, allowed: str) -> None:
            require(holds, f"workload.faults.{name}", value, allowed)

        check("retries", self.retries, 0 <= self.retries <= 1000, "from 0 to 1000")
        for kind, fault in self.by_kind.items():
            at_s, rate, replicas = fault.at_s, fault.rate_per_hour, fault.replicas
            times_ok = all(1e-9 <= time <= LATEST_FAULT_S for time in at_s) and len(set(at_s)) == len(at_s)
            check(f"{kind}.at_s", at_s, times_ok, f"different times, above 0 and up to {LATEST_FAULT_S:g} s")
            fits = rate is None or 0 < rate <= MOST_FAULTS_PER_HOUR
            check(f"{kind}.rate_per_hour", rate, fits, f"null or above 0 and at most {MOST_FAULTS_PER_HOUR:g}")
            known = replicas is None or (len(replicas) == len(set(replicas)) > 0 and min(replicas) >= 0)
            check(f"{kind}.replicas", replicas, known, "null or a list of different numbers from 0")
            if isinstance(fault, LastingFaultConfig):
                fits = 1e-9 <= fault.lasts_s <= LATEST_FAULT_S
                check(f"{kind}.lasts_s", fault.lasts_s, fits, f"above 0 and up to {LATEST_FAULT_S:g}")
            if isinstance(fault, SlowCardConfig):
                check(f"{kind}.factor", fault.factor, 1 <= fault.factor <= 1000, "from 1 to 1000")

    @property
    def by_kind(self) -> dict[str, FaultConfig]:
        return {name: value for name, value in vars(self).items() if isinstance(value, FaultConfig)}

    @property
    def strikes(self) -> dict[str, FaultConfig]:
        """The kinds of faults that strike."""
        return {kind: f for kind, f in self.by_kind.items() if f.at_s or f.rate_per_hour is not None}


@dataclass
class WorkloadConfig:
    """Requests: how many, when, how long and of which tasks."""

    statement: str = ""  # one sentence for the reader: what this workload stands for
    n_requests: int | None = None  # null: all of a trace in its own order
    # Tokenizer that counts lengths, by its characters per token: a number; model: as the served model, the first of
    # `models`; null: lengths are in characters
    chars_per_token: int | float | str | None = "model"  # noqa: S105 - of text
    arrivals: ArrivalsConfig = field(default_factory=ArrivalsConfig)
    lengths: LengthsConfig = field(default_factory=LengthsConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    # By task: the length of a text with which all of its prompts begin, before the drawn text
    system_prompts: dict[str, int] = field(default_factory=dict)
    sessions: SessionsConfig = field(default_factory=SessionsConfig)
    faults: FaultsConfig = field(default_factory=FaultsConfig)


@dataclass
class ServerConfig:
    """How a server batches, schedules and holds memory, and how many replicas there are."""

    max_running_requests: int = 256  # vLLM's max_num_seqs
    max_batch_tokens: int = 2048  # vLLM's max_num_batched_tokens
    memory_utilisation: float = 0.9  # vLLM's gpu_memory_utilization
    block_tokens: int = 16  # of a KV block, vLLM's block_size
    enable_prefix_caching: bool = False  # vLLM's name: equal beginnings of prompts share KV (core/prefix.py)
    replicas: int = 1  # cards, or groups of them, each with a server and a policy of its own
    tensor_parallel: int = 1  # cards of a group that runs a model together: 4 means 4x`hardware`
    # Of the weights of layers: fp8, fp8-block, int8, int4, awq, gptq, nvfp4 or bitsandbytes; null: as the model's name
    # (...-FP8, ...-AWQ, ...-GPTQ-Int4) or its config.json says, else bf16
    quantization: str | None = None
    kv_cache_dtype: str = "auto"  # of K and V: auto (as the config says, else bf16), bfloat16, fp8
    kernels: str = "vllm"  # which measured kernels are summed: vllm's, or trtllm: TensorRT-LLM's, if the card has them
    # Where weights that are not on the card wait, as vLLM's sleep levels: 1: in host memory; 2: nowhere, they are read
    # from files
    sleep_level: int = 1
    schedule_ahead: int = 0  # 0: plan, run, commit; 1: the next iteration is planned while one runs, as vLLM v1 does
    # plain; vllm_v1: places freed late, prefixes found again; vllm_v0, sglang: prompts first, decodes in other
    # iterations; trtllm: a request enters with memory for its whole answer (see core/schedule.py). vllm_v0 and trtllm
    # do not compute prompts in chunks.
    scheduler: str = "plain"
    # TensorRT-LLM's batch_wait: while others decode, prompts wait for so many iterations, or until an iteration would
    # have so many tokens
    batch_wait_iterations: int = 0
    batch_wait_tokens: int = 0
    # Order of the waiting line; preemption takes the request that would be last in it. fcfs; priority: the lowest
    # number first, from workload.mix.priorities or a trace's column `priority`; shortest_prompt
    order: str = "fcfs"
    # Where a request goes. round_robin; least_loaded: the replica with the fewest requests; power_of_two: of two drawn
    # at random the one with fewer; session: all turns of a session to one replica; prefix_aware: where most of its
    # prompt is cached, weighed against the requests there; by_task: a kind of replica that is meant for its task (see
    # cluster); cascade: the first kind answers, and the next one again if that answer is not confident; thompson: a
    # bandit that learns from answers which kind is best; mixed: kinds at random by their shares; best_answer: the kind
    # that will turn out best, a bound that no real router reaches (the last four: helios_sim/by_answer.py)
    router: str = "round_robin"

    def __post_init__(self) -> None:
        for key in ("max_running_requests", "max_batch_tokens", "block_tokens", "replicas"):
            require(1 <= getattr(self, key) < 2**31, f"server.{key}", getattr(self, key), "from 1 to 2^31 - 1")
        degree, allowed = self.tensor_parallel, "1, 2, 4 or 8: for these all-reduces were measured"
        require(degree in DEGREES, "server.tensor_parallel", degree, allowed)
        Precision(self.quantization, self.kv_cache_dtype)
        require_one_of("server.kernels", self.kernels, KERNELS)
        require(self.sleep_level in (1, DISCARDED), "server.sleep_level", self.sleep_level, "1 or 2")
        require(self.schedule_ahead in (0, 1), "server.schedule_ahead", self.schedule_ahead, "0 or 1")
        require_one_of("server.scheduler", self.scheduler, SCHEDULERS)
        for key in ("batch_wait_iterations", "batch_wait_tokens"):
            require(0 <= getattr(self, key) < 2**31, f"server.{key}", getattr(self, key), "from 0 to 2^31 - 1")
        require_one_of("server.order", self.order, ORDERS)
        value = self.memory_utilisation
        require(0 < value <= 1, "server.memory_utilisation", value, "above 0 and at most 1")


@dataclass
class CascadeConfig:
    """Settings of the router cascade: one kind answers, and the next one again if the answer is not confident."""

    kinds: list[str] = field(default_factory=list)  # all kinds of the cluster, in the order in which they are asked
    # A request goes on to the next kind if the answer's confidence is lower; 0: none does, above 1: all do. The
    # confidence of an answer is the mean of the largest probability over its tokens.
    escalate_below: float = 0.5

    def __post_init__(self) -> None:
        value = self.escalate_below
        require(0 <= value <= 2, "cluster.cascade.escalate_below", value, "from 0 (no answer) to above 1 (every one)")


@dataclass
class BanditConfig:
    """Settings of the router thompson."""

    by_task: bool = True  # learn the best kind of each task; false: one kind for all tasks
    spread: float = 0.3  # bits per character by which answers of one kind are assumed to differ before any is known
    # by kind: bits per character by which its answers have to be better than the answers of a kind without a cost
    costs: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        require(0 < self.spread < inf, "cluster.bandit.spread", self.spread, "above 0")


@dataclass
class ClusterConfig:
    """Replicas of several kinds, in place of `server.replicas` equal ones."""

    # By name: count, and how its replicas differ from the study and the arm: hardware, models, server (settings of one
    # server, such as max_running_requests), policy with its settings.
    kinds: dict[str, Any] = field(default_factory=dict)
    # by_task: the kind that serves each task; empty: for each task the kind with the model that has the fewest bits per
    # character on its texts or, if all kinds have policy=draft_model, with the drafter that is right most often on them
    tasks: dict[str, str] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)  # mixed: of the requests, by kind; they sum to 1
    cascade: CascadeConfig = field(default_factory=CascadeConfig)
    bandit: BanditConfig = field(default_factory=BanditConfig)


@dataclass
class AutoscaleConfig:
    """Replicas that come and go with load, from `least` to `server.replicas` (serving/autoscale.py)."""

    least: int | None = None  # null: all replicas are always on
    # Wanted number of requests in the system per replica; a capacity plan tries each of several: [4, 8, 16]
    requests_per_replica: Any = None
    # How long a replica takes until it serves. It has no default, since it depends on engine, model and disk; vLLM
    # prints its parts when it starts (weights, compilation, graphs).
    start_s: float | None = None
    every_s: float = 15.0  # between two looks; default of Kubernetes' HorizontalPodAutoscaler, as is the next setting
    down_after_s: float = 300.0  # replicas go after fewer were wanted for so long
    first: int | None = None  # replicas that serve at the beginning; null: `least`, and in a capacity plan all of them

    def __post_init__(self) -> None:
        if self.least is None:
            return
        require(1 <= self.least < 2**31, "autoscale.least", self.least, "from 1 to server.replicas")
        first, allowed = self.first, "null, or a number from autoscale.least to server.replicas"
        require(first is None or 1 <= first < 2**31, "autoscale.first", first, allowed)
        per, allowed = self.requests_per_replica, "a number above 0, or a list of some: requests for each replica"
        each = per if isinstance(per, list) else [per]
        numbers = [float(n) for n in each if isinstance(n, int | float) and not isinstance(n, bool) and 0 < n < 2**31]
        several = bool(numbers) and len(set(numbers)) == len(each)
        require(several, "autoscale.requests_per_replica", per, allowed)
        self.requests_per_replica = numbers if isinstance(per, list) else numbers[0]
        allowed = "seconds from 0 to 86400: how long a replica takes until it serves, as the engine prints it"
        require(self.start_s is not None and 0 <= self.start_s <= 86400, "autoscale.start_s", self.start_s, allowed)
        for key, least in (("every_s", 1e-3), ("down_after_s", 0.0)):
            value = getattr(self, key)
            require(least <= value <= 86400, f"autoscale.{key}", value, f"seconds from {least:g} to 86400")


@dataclass
class GuaranteeConfig:
    """A promise that thresholds and caps keep, in place of a given threshold (exits/guarantee.py)."""

    max_disagreement: float | None = None  # largest share of tokens that may change; null: no promise
    failure: float = 0.05  # the probability with which the promise may be broken
    calibration_share: float = 0.5  # share of each task's prompts by which settings are chosen; the others are served
    seed: int = 0  # of the draw of these prompts

    def __post_init__(self) -> None:
        key = "exits.guarantee"
        most = self.max_disagreement
        require(most is None or 0 < most < 1, f"{key}.max_disagreement", most, "null or between 0 and 1")
        for name in ("failure", "calibration_share"):
            value = getattr(self, name)
            require(0 < value < 1, f"{key}.{name}", value, "between 0 and 1")
        require(0 <= self.seed < 2**63, f"{key}.seed", self.seed, "from 0 to 2^63 - 1")


@dataclass
class ExitsConfig:
    """Source of the models' exits, and the confidence that decides."""

    source: str = "published"  # published, none, stated, a shipped source, or a folder; {model}: the model's name
    threshold: float | None = None  # None: the published one
    confidence: str = "max_probability"  # or another measure, which exits/rule.py lists
    parameters: dict[str, Any] = field(default_factory=dict)  # of published or stated exits; see exits/published.py
    guarantee: GuaranteeConfig = field(default_factory=GuaranteeConfig)

    def __post_init__(self) -> None:
        promised = isinstance(self.guarantee, GuaranteeConfig) and self.guarantee.max_disagreement is not None
        if promised and self.threshold is not None:
            allowed = "null with exits.guarantee.max_disagreement, which chooses it"
            raise UserError("exits.threshold", self.threshold, allowed, "add exits.threshold=null")
        fits = self.threshold is None or 0 <= self.threshold <= 1
        require(fits, "exits.threshold", self.threshold, "null or from 0 to 1: confidences are shares, not per cent")


@dataclass
class ObjectiveConfig:
    """Goal of a policy, and its bounds."""

    goal: str = "throughput"  # throughput, response_time, energy, batch_size, quality
    max_disagreement: float = 0.05  # epsilon: share of tokens that may differ from the same model's full depth
    max_bits_per_char: float | None = None  # most bits per character of a model, if they are known; null: any
    max_bits_ratio: float | None = None  # most bits over those of bits_reference at full depth on equal text; null: any
    bits_reference: str | None = None  # a model; null: the best candidate at any time
    max_response_time_s: float | None = None  # predicted mean E2E; null: any

    def __post_init__(self) -> None:
        value = self.max_disagreement
        require(0 <= value <= 1, "objective.max_disagreement", value, "from 0 to 1")
        for key in ("max_bits_per_char", "max_bits_ratio", "max_response_time_s"):
            bound = getattr(self, key)
            require(bound is None or bound > 0, f"objective.{key}", bound, "null or above 0")


# No user waits longer: a larger number was meant in milliseconds.
MOST_SLO_S = {"ttft_s": 90.0, "tpot_s": 5.0, "e2e_s": 86400.0}


@dataclass
class SloConfig:
    """Service levels of one request: first token, time per further token, last token. Null: no bound."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def __post_init__(self) -> None:
        for key, most in MOST_SLO_S.items():
            value = getattr(self, key)
            allowed = f"null, or seconds above 0 and at most {most:g}; milliseconds are thousandths of them"
            require(value is None or 0 < value <= most, f"slo.{key}", value, allowed)


@dataclass
class CostConfig:
    """Prices of cards and electricity. Null: not counted, since no price is assumed."""

    usd_per_card_hour: Any = None  # of each card, or by card: {a100-40gb: 1.2, h100-80gb: 2.5}
    gco2e_per_kwh: float | None = None  # of electricity, as CO2 equivalent in grams

    def __post_init__(self) -> None:
        price, allowed = self.usd_per_card_hour, "null, a number above 0, or such a number for each card by its name"
        each = list(price.values()) if isinstance(price, Mapping) else [price]
        numbers = all(isinstance(p, int | float) and not isinstance(p, bool) and 0 < p <= 1e6 for p in each)
        require(price is None or (bool(each) and numbers), "cost.usd_per_card_hour", price, allowed)
        carbon = self.gco2e_per_kwh
        allowed = "null or from 1 to 5000 grams (wind has some 10, coal some 1000), not kilograms"
        require(carbon is None or 1 <= carbon <= 5000, "cost.gco2e_per_kwh", carbon, allowed)


@dataclass
class SweepConfig:
    """All combinations of the axes' values, for the named arms."""

    axes: list[AxisConfig] = field(default_factory=list)
    arms: list[str] | None = None  # None: all arms without `sweeps_only`
    baseline: str | None = None  # None: the study's


@dataclass
class FigureConfig:
    """A figure over the arms, or over the points of sweeps, with settings named as by the sweeps' axes."""

    # sweep: a metric against a setting; load: throughput and latency against load; arms: a metric against another;
    # quality: bits per character over the run; phase: the best arm at each value of `x` and of `split_by`; matrix:
    # every arm's metric at each of them
    kind: str = "sweep"
    title: str = ""
    x: str = ""  # an axis; arms: a metric
    x_label: str = ""
    metric: str = "throughput_requests_per_s"
    y_label: str = ""
    relative: bool = False  # true: the ratio to the baseline
    arms: list[str] | None = None  # None: all
    split_by: str | None = None  # another axis: one line for each of its values
    along: list[str] = field(default_factory=list)  # arms: axes of sweeps; a line joins an arm's points along them
    log_x: bool = False
    log_y: bool = False
    marks: dict[str, float] = field(default_factory=dict)  # level lines: label and value
    where: dict[str, Any] = field(default_factory=dict)  # only points with these settings
    least_agreement: float = 0.0  # phase, matrix: arms that change more tokens are no choice


@dataclass
class PublishedConfig:
    """A published figure, and how ours is computed: `metric` of `arm` over that of `over`."""

    what: str = ""
    published: float = 0.0
    condition: str = ""
    source: str = "arXiv 2504.10724, abstract"
    metric: str = "throughput_requests_per_s"
    arm: str = ""
    over: str | None = None  # None: the baseline
    inverse: bool = False  # for a metric of which lower is better: over / arm
    at: dict[str, Any] = field(default_factory=dict)  # a sweep's point; empty: the arms themselves
    remark: str = ""


@dataclass
class GateConfig:
    """A bound that the study's result must keep, or the command's status is 2."""

    name: str = ""
    arm: str = ""
    metric: str = ""
    over: str | None = None  # None: the metric itself, not a ratio
    low: float | None = None
    high: float | None = None


AUTO, NONE, ALL = "auto", "none", "all"


@dataclass
class AutoSeedsConfig:
    """When `seeds=auto` has enough seeds.

    The defaults follow Law, Simulation Modeling and Analysis, section 9.4.1, on such procedures: a figure known to 15 %
    either way or better, and at least ten runs before the first look.
    """

    relative_width: float = 0.2  # largest width of the subject's interval over its figure: 10 % either way
    first: int = 10  # seeds before the first look; then twice as many, and so on
    at_most: int = 40

    def __post_init__(self) -> None:
        width = self.relative_width
        require(0 < width < float("inf"), "auto_seeds.relative_width", width, "above 0")
        require(2 <= self.first <= 10_000, "auto_seeds.first", self.first, "from 2 to 10000")
        allowed = "at least auto_seeds.first, and at most 10000"
        require(self.first <= self.at_most <= 10_000, "auto_seeds.at_most", self.at_most, allowed)


@dataclass
class ReportConfig:
    """Looks of the report."""

    style: str = FOR_PAGE  # page: figures as PNG; paper: also as SVG and PDF, on white, without titles, fonts inside

    def __post_init__(self) -> None:
        require_one_of("report.style", self.style, STYLES)


@dataclass
class Config:
    """One study: every arm in `arms` (and `policy`, if set) over one workload, and the sweeps beside it."""

    name: str = "study"  # also of the output folder
    title: str = ""  # "": the name
    question: str = ""
    mode: str = "simulate"  # simulate; live: the same requests, scheduler and policies on a real model and device
    hardware: str = "a100-40gb"  # a card by name, N that work as one (4xh100-80gb), or a card's .yaml
    # Candidates of every arm, by name or by the path of a config.json. Costs of a model on the hardware are a profile:
    # MODEL@HARDWARE in `profile_folder`, else made from measured kernels or the card's data sheet.
    models: list[str] = field(default_factory=lambda: ["opt-1.3b", "opt-6.7b"])
    profile_time_factor: float = 1.0  # scales every iteration, to study profile error
    profile_prompt_time_factor: float | None = None  # its value for prompts, many tokens at once; null: the same
    # Tests whether the answer holds if the profiles are off: the subject and its baseline run again at both ends of a
    # band of times. auto: the band that the profiles state, if that takes seconds; [0.9,1.2]: times of iterations over
    # the profiles'; none: no test.
    profile_band: Any = "auto"
    # What the next best option would have given, at each decision of the log: the run again with it, until the next
    # decision. auto: if that takes a second or two, the subject's decisions first; all; none.
    next_best: str = "auto"
    profile_folder: str | None = None  # None: the shipped profiles
    workload: WorkloadConfig = field(default_factory=WorkloadConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    autoscale: AutoscaleConfig = field(default_factory=AutoscaleConfig)
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    exits: ExitsConfig = field(default_factory=ExitsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    slo: SloConfig = field(default_factory=SloConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    policy: dict[str, Any] | None = None  # one more arm: name and settings
    # By name: policy, its settings, and optionally a description, overrides (of this configuration, by dotted path)
    # and a baseline of its own, for arms under other conditions than the study's.
    # An arm with `sweeps_only: true` runs in the sweeps that name it and not at the study's own settings.
    # Null leaves an arm out.
    arms: dict[str, Any] = field(default_factory=dict)
    baseline: str = ""  # an arm; "": the first
    subject: str | None = None  # the arm that the verdict is about; None: the last one
    seeds: Any = field(default_factory=lambda: [0])  # whole numbers; auto: as many as the answer needs
    auto_seeds: AutoSeedsConfig = field(default_factory=AutoSeedsConfig)
    sweeps: list[SweepConfig] = field(default_factory=list)
    figures: list[FigureConfig] = field(default_factory=list)
    published: list[PublishedConfig] = field(default_factory=list)
    gates: list[GateConfig] = field(default_factory=list)
    headline_metrics: list[str] | None = None  # of the table, first the one that decides; None: the usual ones
    pictures: bool = True  # false: no figures and no report.html, only the data
    report: ReportConfig = field(default_factory=ReportConfig)
    trace: bool = False  # true: also trace.perfetto-trace, every iteration of each arm's first seed (ui.perfetto.dev)
    jobs: int | None = None  # processes; None: one per core, or none for the shortest studies
    sweep: DesignsConfig = field(default_factory=DesignsConfig)  # with parameters: designs of one arm
    capacity: CapacityConfig = field(default_factory=CapacityConfig)  # with cards: how many replicas of each
    fidelity: FidelityConfig = field(default_factory=FidelityConfig)  # with a folder: a real log and its simulation
    from_log: FromLogConfig = field(default_factory=FromLogConfig)  # with a log: its replay, other models and cards
    live: LiveConfig = field(default_factory=LiveConfig)  # for mode=live
    fidelity_live: LiveFidelityConfig = field(default_factory=LiveFidelityConfig)  # with loads: served and simulated

    in_full = staticmethod(settings_in_full)  # for `with_settings`: words that stand for settings

    def __post_init__(self) -> None:
        plain = "/" not in self.name and not self.name.startswith(".") and self.name.isprintable()
        plain = plain and bool(self.name) and self.name == self.name.strip()
        require(plain, "name", self.name, "a name of a folder, without / or blanks around it, and no dot first")
        require(bool(self.models), "models", self.models, "at least one model")
        require(len(set(self.models)) == len(self.models), "models", self.models, "each model once")
        self._check_seeds()
        self._check_band()
        self._check_next_best()
        require(self.jobs is None or self.jobs >= 1, "jobs", self.jobs, "null or at least 1")
        require(self.profile_time_factor > 0, "profile_time_factor", self.profile_time_factor, "above 0")
        prompts = self.profile_prompt_time_factor
        require(prompts is None or prompts > 0, "profile_prompt_time_factor", prompts, "null or above 0")
        require_one_of("mode", self.mode, MODES)
        if self.server.tensor_parallel > 1 and group_of(self.hardware)[1] != self.hardware.strip():
            allowed = f"left out where hardware={self.hardware} says how many cards"
            raise UserError("server.tensor_parallel", self.server.tensor_parallel, allowed, "give one of the two")

    def _check_seeds(self) -> None:
        if self.seeds == AUTO:
            others = bool(
                self.sweep.parameters or self.fidelity.compare or self.fidelity_live.loads or self.capacity.cards
            )
            allowed = "a list of seeds: auto is for studies of arms, not for designs, capacity or comparisons"
            require(not others, "seeds", self.seeds, allowed)
            return
        seeds = self.seeds if isinstance(self.seeds, list) else []
        allowed = "a list such as [0,1,2] of different whole numbers from 0 to 2^63 - 1, or auto"
        whole = all(type(seed) is int and 0 <= seed < 2**63 for seed in seeds)
        require(bool(seeds) and whole and len(set(seeds)) == len(seeds), "seeds", self.seeds, allowed)

    def _check_next_best(self) -> None:
        require(self.next_best in (AUTO, ALL, NONE), "next_best", self.next_best, "auto, all or none")

    def _check_band(self) -> None:
        if self.profile_band in (AUTO, NONE):
            return
        band = self.profile_band if isinstance(self.profile_band, list) else []
        numbers = [float(value) for value in band if isinstance(value, int | float) and not isinstance(value, bool)]
        right = len(band) == len(numbers) == 2 and 0.01 <= numbers[0] <= 1 <= numbers[1] <= 100
        allowed = "auto, none, or two factors around 1 such as [0.9,1.2], from 0.01 to 100"
        require(right, "profile_band", self.profile_band, allowed)

    @property
    def figures_as(self) -> str | None:
        """Style of the figures; None if there are to be none."""
        return self.report.style if self.pictures else None

    @property
    def device(self) -> str:
        """The hardware of one replica, with the number of its cards."""
        return self.device_of({})

    @property
    def precision(self) -> Precision:
        """Precision of weights, K and V of one replica."""
        return self.precision_of({})

    def precision_of(self, kind: Mapping[str, Any]) -> Precision:
        """Return the precision of a replica of a kind of the cluster."""
        own = kind.get("server")
        server = own if isinstance(own, Mapping) else {}
        keys = ("quantization", "kv_cache_dtype")
        return Precision(*(server.get(key, getattr(self.server, key)) for key in keys))

    def device_of(self, kind: Mapping[str, Any]) -> str:
        """Return the hardware of a replica of a kind of the cluster, with the number of its cards."""
        hardware, server = str(kind.get("hardware", self.hardware)), kind.get("server")
        degree = self.server.tensor_parallel
        if isinstance(server, Mapping):
            degree = server.get("tensor_parallel", degree)
        return hardware if degree == 1 else f"{degree}x{hardware}"
