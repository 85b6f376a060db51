"""Inputs of a policy: the `Situation` before the run, and `Telemetry` at each decision."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.replay import OfflineExits
from helios_sim.exits.rule import ReleaseEarly
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.deployment import Cause, Deployment
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.request import NS_PER_S, Request, Slo
from helios_sim.workload.prefixes import SharedPrefixes

NO_SLO = Slo()


class Goal(StrEnum):
    THROUGHPUT = "throughput"  # requests per second, higher is better
    RESPONSE_TIME = "response_time"  # mean end-to-end seconds, lower is better
    ENERGY = "energy"  # joules per request, lower is better
    BATCH_SIZE = "batch_size"  # requests that fit at once, higher is better
    QUALITY = "quality"  # bits per character of the text, lower is better


@dataclass(frozen=True, slots=True)
class Objective:
    """The goal of a policy, and the share of tokens that may change for it."""

    goal: Goal
    max_disagreement: float  # epsilon: share of tokens that may differ from full depth of the same model
    max_bits_per_char: float | None = None  # quality floor across models, if bits per character are known
    max_bits_ratio: float | None = None  # floor relative to the bits of `bits_reference` at full depth on the same text
    bits_reference: str | None = None  # a candidate; None means the best one
    max_response_time_s: float | None = None  # predicted mean; if no candidate keeps it, the quickest serves


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that may serve: its costs on this card and the offline records of its exits."""

    profile: Profile
    offline: OfflineExits


@dataclass(frozen=True, slots=True)
class ExpectedLoad:
    """The load that the operator expects; telemetry replaces it as soon as there is some."""

    prompt_chars: float  # mean of a request
    output_chars: float
    arrival_rate_per_s: float | None = None  # of open arrivals; None with a full queue or a closed loop
    closed_loop_users: int | None = None  # each sends the next request when the last is answered; None if open


class Outlook(Protocol):
    """Knowledge of the future, for the oracle only: the requests to come and the exits of their answers."""

    def requests(self) -> Sequence[Request]:
        """All requests of the run, in order of arrival."""
        ...

    def agreement(self, model: str, request: Request) -> NDArray[np.bool_]:
        """Whether each exit predicts full depth's token, (n, E), for the n answer tokens of this model."""
        ...

    def bits(self, model: str, request: Request) -> NDArray[np.float64] | None:
        """Bits of the text's own tokens at each exit, (n, E); None unless recorded, and people wrote the text."""
        ...


@dataclass(frozen=True, slots=True)
class Situation:
    """Facts that are fixed for the run."""

    candidates: Mapping[str, Candidate]  # by model name, in the order of the configuration
    memory: MemoryBudget
    objective: Objective
    max_running_requests: int  # the server's own batch limit
    max_batch_tokens: int  # token budget of an iteration
    seed: int  # for random draws of the policy
    expected: ExpectedLoad | None = None  # None if the operator expects no particular load
    outlook: Outlook | None = None
    schedule_ahead: int = 0  # 1 if the next iteration is planned while one runs, unless exits must be seen first
    order: str = "fcfs"  # of the waiting queue: fcfs, priority, shortest_prompt
    vllm_v1: bool = False  # as vLLM v1: a request done ahead of a plan keeps its place in it; freed blocks are found
    prefill_first: bool = False  # as SGLang: an iteration has prompts or decodes, and prompts come first
    keeps_answers: bool = False  # as TensorRT-LLM: a request enters when there is memory for its whole answer
    wait_iterations: int = 0  # TensorRT-LLM's batch_wait: beside decodes, prompts wait for so many iterations
    wait_tokens: int = 0  # or until an iteration has so many tokens
    whole_prompts: bool = False  # a prompt waits until the token budget has room for all of it
    prefix_caching: bool = True  # with vllm_v1; if false, a preempted request finds none of its freed blocks again
    shares: bool = False  # KV blocks of equal beginnings of prompts are shared
    prefixes: SharedPrefixes | None = None  # common beginnings of prompts
    slo: Slo = NO_SLO  # of the study; a bound is None if it is not set
    # Watts of the replica's card, or group: idle and at the board's limit; None if not known. In a live run it is 0 to
    # 100 kW, or None if the device has no energy counter.
    power_w: tuple[float, float] | None = None
    busy_w: tuple[float, float] | None = None  # least and most watts while its kernels run, if measured

    @property
    def refinds(self) -> bool:
        """Whether a preempted request may find its freed KV blocks again."""
        return self.vllm_v1 and self.prefix_caching and not self.shares


@dataclass(frozen=True, slots=True)
class Observation:
    """n tokens of one request that ran at full depth with every exit observed, or that were scored by a probe."""

    model: str
    request_id: int
    time_ns: int  # when the last of the tokens was observed
    confident: NDArray[np.bool_]  # (n, E) whether the rule's threshold lets the token leave; without one, `agrees`
    agrees: NDArray[np.bool_]  # (n, E) whether the exit's prediction equals full depth's
    bits: NDArray[np.float32] | None  # (n, E) bits of the text's own token; None unless people wrote the text
    chars: int  # characters that the n tokens cover


@dataclass(frozen=True, slots=True)
class Released(Observation):
    """Tokens of one answer under ReleaseEarly, but the first, which passes no ramp. Columns are the rule's ramps."""

    confidences: NDArray[np.float32]  # (n, E)

    @classmethod
    def recorded(
        cls, model: str, request_id: int, trace: ExitTrace, rows: NDArray[np.int64], rule: ReleaseEarly, time_ns: int
    ) -> Released:
        """Makes the observation from these rows of a trace."""
        ramps = [trace.exits.index(ramp) for ramp in rule.ramps]
        confidences = trace.recorded(rule.confidence)[rows][:, ramps]
        return cls(
            model=model, request_id=request_id, time_ns=time_ns,
            confident=confidences >= np.array(rule.thresholds, np.float32), agrees=trace.agree[rows][:, ramps],
            bits=None, chars=int(trace.chars[rows].sum()), confidences=confidences,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class LatestRequests:
    """Times of the latest completed requests, up to 256, oldest first, in seconds, (n,) each.

    The usual figures of an operator follow from them: `np.percentile(latest.ttft_s, 95)`, or the share of requests that
    met a bound, `np.mean(latest.tpot_s <= 0.05)`.
    """

    # (n, 5) times of arrival, scheduling, first and last token; number of output tokens
    moments_ns: NDArray[np.int64] = field(default_factory=lambda: np.zeros((0, 5), np.int64))
    slo: Slo = NO_SLO

    def __len__(self) -> int:
        return len(self.moments_ns)

    @property
    def queue_s(self) -> NDArray[np.float64]:
        """Time from arrival until first scheduled."""
        return self._seconds(1, 0)

    @property
    def ttft_s(self) -> NDArray[np.float64]:
        """Time to first token."""
        return self._seconds(2, 0)

    @property
    def e2e_s(self) -> NDArray[np.float64]:
        """Time from arrival to the last token."""
        return self._seconds(3, 0)

    @property
    def tpot_s(self) -> NDArray[np.float64]:
        """Time per output token after the first; NaN for an answer of one token."""
        gaps = (self.moments_ns[:, 4] - 1).astype(np.float64)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.asarray(np.where(gaps > 0, self._seconds(3, 2) / gaps, np.nan))

    @property
    def slo_attainment(self) -> float | None:
        """Share of these requests that met every SLO of the study; None without SLOs, or before one has completed."""
        if not self.slo.any or not len(self):
            return None
        good = np.ones(len(self), np.bool_)
        for times_s, bound_s in (
            (self.ttft_s, self.slo.ttft_s), (self.tpot_s, self.slo.tpot_s), (self.e2e_s, self.slo.e2e_s)
        ):  # fmt: skip
            if bound_s is not None:
                good &= np.isnan(times_s) | (times_s <= bound_s)
        return float(np.mean(good))

    def _seconds(self, end: int, start: int) -> NDArray[np.float64]:
        return (self.moments_ns[:, end] - self.moments_ns[:, start]) / NS_PER_S


@dataclass(frozen=True, slots=True)
class Energy:
    """Energy and power drawn by the replica's card, or group of cards.

    A device is read by its energy counter, which counts all that the device does. A simulated card draws the middle of
    the band that a report shows. Above idle power it draws half of the rest up to the board's limit while an iteration
    runs, and the other half for the time that the same work takes at the card's ceilings. If the power of its kernels
    was measured (`Situation.busy_w`), it draws the middle of that range while an iteration runs.
    """

    joules: float  # since the run began
    watts: float  # mean over the last 10 s, or since the run began


def _not_known() -> Energy | None:
    return None


@dataclass(frozen=True, slots=True)
class Telemetry:
    """Telemetry of a replica, read at the end of an iteration or when an idle server wakes."""

    now_ns: int
    completed_requests: int  # since the run began
    queued_requests: int
    running_requests: int
    batch_mean: float | None  # running requests, time-averaged while some decode, since the last placement change
    prompt_tokens_mean: float | None  # of the latest completed requests (up to 256), in the active model's tokens
    output_tokens_mean: float | None
    arrival_rate_per_s: float | None  # over the latest 256 arrivals
    breaches_in_window: int  # in the window of the trigger that fired, or of the deployment's first breach limit
    observations: tuple[Observation, ...]  # new since the last decision
    kv_used_share: float = 0.0  # share of the KV blocks that the placement has room for
    latest: LatestRequests = LatestRequests()
    # Share of the prompt tokens of the latest completed requests (up to 256) that were found in the prefix cache; None
    # if nothing is shared. It is vLLM's prefix_cache_hits over prefix_cache_queries, in a window.
    prefix_hit_share: float | None = None
    prefix_cached_tokens: int = 0  # tokens with K and V in the prefix cache that no request holds
    # Drafts since the run began that full depth tested (in each pass, up to the first that it refused), and accepted.
    tested_drafts: int = 0
    accepted_drafts: int = 0
    read_energy: Callable[[], Energy | None] = _not_known  # reads a device's counter, which takes time

    @property
    def slo_attainment(self) -> float | None:
        """Share of the latest completed requests (up to 256) that met every SLO; None without SLOs, or before one has
        completed."""
        return self.latest.slo_attainment

    @property
    def energy(self) -> Energy | None:
        """Energy drawn so far; None if the card's power is not known, or the device has no counter."""
        return self.read_energy()


class Policy(Protocol):
    """The interface of a policy. State lives in the object; one object serves one replica in one run."""

    def start(self, situation: Situation) -> Deployment:
        """Returns the deployment at time 0. The server loads it before the first request, at no charge."""
        ...

    def decide(self, cause: Cause, telemetry: Telemetry) -> Deployment | None:
        """Returns the next deployment, or None to keep the one in force.

        The server calls it when one of the deployment's triggers fires, and with LoadFailed.
        """
        ...
