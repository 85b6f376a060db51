"""Predicted performance of a placement under a load: arithmetic on profile and exits.

Two simplifications are deliberate, since they affect all candidates alike. Prompts are priced on their own, although
they share iterations with decodes. And a request occupies its whole KV from the start, without preemption or sharing.
With prefix caching, the share of prompt tokens that were recently found is not computed, for any candidate: another
candidate finds as many once its cache is warm, and warming the cache is part of the `transition`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.core.operate import LEAST_S
from helios_sim.exits.replay import OfflineExits
from helios_sim.exits.rule import Confidence
from helios_sim.policy.deployment import Placement
from helios_sim.policy.telemetry import Candidate, Situation, Telemetry
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.profile import Profile


@dataclass(frozen=True, slots=True)
class Load:
    """Mean lengths, and one of three regimes: open arrivals at a rate, a closed loop of users, or a full queue."""

    prompt_chars: float
    output_chars: float
    arrival_rate_per_s: float | None = None
    users: int | None = None
    queued_requests: int = 0  # waiting now; only counts under open arrivals
    cached_share: float = 0.0  # share of prompt tokens with K and V in a warm prefix cache

    def prompt_tokens(self, candidate: Candidate) -> float:
        """Mean prompt length in the candidate's tokens, at least 1."""
        return max(1.0, self.prompt_chars / candidate.profile.model.chars_per_token)

    def cached_tokens(self, candidate: Candidate) -> int:
        """Tokens of a mean prompt that a warm cache holds, but never the last token, which is always computed."""
        prompt = round(self.prompt_tokens(candidate))
        return min(round(prompt * self.cached_share), prompt - 1)

    def output_tokens(self, candidate: Candidate) -> float:
        """Mean answer length in the candidate's tokens, at least 1, by the trace that replays answers."""
        return max(1.0, self.output_chars / candidate.offline.chars_per_token)


def expected_load(situation: Situation) -> Load:
    """The load that the operator expects, before any telemetry.

    Without an expectation, prompts and answers are as long as the recorded prompts' answers on average, and the queue
    is full: lengths then only serve to rank candidates.
    """
    expected = situation.expected
    if expected is None:
        offline = next(iter(situation.candidates.values())).offline
        chars = float(offline.prompt_tokens.mean()) * offline.chars_per_token
        return Load(chars, chars)
    return Load(expected.prompt_chars, expected.output_chars, expected.arrival_rate_per_s, expected.closed_loop_users)


def seen_load(situation: Situation, telemetry: Telemetry, active_model: str) -> Load:
    """The load by telemetry, with expected values for all that telemetry has not seen yet."""
    expected = expected_load(situation)
    active = situation.candidates[active_model]
    prompt, output = telemetry.prompt_tokens_mean, telemetry.output_tokens_mean
    rate = telemetry.arrival_rate_per_s
    return Load(
        prompt_chars=expected.prompt_chars if prompt is None else prompt * active.profile.model.chars_per_token,
        output_chars=expected.output_chars if output is None else output * active.offline.chars_per_token,
        arrival_rate_per_s=None if expected.users is not None else rate or expected.arrival_rate_per_s,
        users=expected.users,
        queued_requests=telemetry.queued_requests,
        cached_share=telemetry.prefix_hit_share or 0.0,
    )


STRATA = 64  # iterations averaged per batch size if tokens leave at different exits


@dataclass(frozen=True, slots=True)
class Depths:
    """Bands of layers and the share of tokens that run each. Prompts run all bands."""

    bounds: tuple[int, ...]  # depth at the end of each band, ascending
    reach: tuple[float, ...]  # share of tokens that run the band; the first is 1, and shares do not rise
    checked: Confidence | None = None  # measure of the exit check at the end of every band but the last
    propagated: bool = False  # whether K and V of tokens that left are computed in the bands above

    @property
    def layers(self) -> int:
        return self.bounds[-1]

    @property
    def is_fixed(self) -> bool:
        """Whether all tokens run the same layers, without a check."""
        return self.reach == (1.0,) and self.checked is None and not self.propagated


class Paced(Protocol):
    """Another way to decode, with a known mean time per token; `drafts.Drafts` is one."""

    @property
    def layers(self) -> int: ...

    def decode_time_s(
        self, profile: Profile, batch: NDArray[np.int64], context_tokens: float
    ) -> NDArray[np.float64]: ...

    def decode_floor_s(
        self, profile: Profile, batch: NDArray[np.int64], context_tokens: float
    ) -> NDArray[np.float64]: ...


def fixed_depth(layers: int) -> Depths:
    """Depths if all tokens run `layers`: full depth, or a fixed cap with confidences from the token's own logits."""
    return Depths((layers,), (1.0,))


def per_token_depths(offline: OfflineExits, propagated: bool = True) -> Depths:
    """Depths if each token leaves alone, all layers loaded, in the recorded shares."""
    left = np.concatenate([[0.0], np.cumsum(offline.exit_share)[:-1]])
    reach = tuple(np.clip(1.0 - left, 0.0, 1.0).tolist())
    return Depths(offline.exits, reach, checked=offline.confidence, propagated=propagated)


def decode_time_s(
    profile: Profile, depths: Depths | Paced, batch: NDArray[np.int64], context_tokens: float
) -> NDArray[np.float64]:
    """Mean seconds of a decode iteration at each batch size, (K,).

    If tokens leave at different exits, the rows of a band are floor(batch x reach + u) with u spread evenly over
    (0, 1): this is unbiased, nested from band to band, and at batch 1 exactly the mixture of the exits.
    """
    if not isinstance(depths, Depths):
        return depths.decode_time_s(profile, batch, context_tokens)
    if depths.is_fixed:
        time_s = profile.decodes_time_s(depths.layers, batch, _kv_tokens(batch, context_tokens))
    else:
        time_s = profile.iteration_time_s(_decodes(depths, batch, context_tokens))
    return _mean_of_each(np.maximum(time_s, LEAST_S), len(batch))


def decode_floor_s(
    profile: Profile, depths: Depths | Paced, batch: NDArray[np.int64], context_tokens: float
) -> NDArray[np.float64]:
    """Roofline floor of `decode_time_s`, (K,)."""
    if not isinstance(depths, Depths):
        return depths.decode_floor_s(profile, batch, context_tokens)
    if depths.is_fixed:
        return profile.decodes_floor_s(depths.layers, batch, _kv_tokens(batch, context_tokens))
    return _mean_of_each(profile.iteration_floor_s(_decodes(depths, batch, context_tokens)), len(batch))


def _mean_of_each(values: NDArray[np.float64], batches: int) -> NDArray[np.float64]:
    return values if len(values) == batches else np.asarray(values.reshape(batches, -1).mean(axis=1))


def _kv_tokens(rows: NDArray[np.int64], context_tokens: float) -> NDArray[np.int64]:
    found: NDArray[np.int64] = np.rint(rows * context_tokens).astype(np.int64)
    return found


def _decodes(depths: Depths, batch: NDArray[np.int64], context_tokens: float) -> Composition:
    """Iterations at each batch size, one after the other; `STRATA` of each if tokens leave at different exits."""
    strata = 1 if len(depths.bounds) == 1 else STRATA
    u = (np.arange(strata) + 0.5) / strata
    rows = np.floor(batch[:, None, None] * np.asarray(depths.reach) + u[None, :, None]).astype(np.int64)
    rows = np.minimum(rows, batch[:, None, None]).reshape(-1, len(depths.bounds))
    last = np.arange(len(depths.bounds)) == len(depths.bounds) - 1
    whole = np.repeat(batch, strata)
    checks = None if depths.checked is None else np.where(last, 0, rows)
    by_classifier = depths.checked is not None and not depths.checked.by_head
    return Composition(
        bounds=depths.bounds,
        decode_tokens=rows,
        decode_kv_tokens=_kv_tokens(rows, context_tokens),
        sampled_tokens=whole if checks is None or by_classifier else rows[:, -1],
        check_tokens=None if by_classifier else checks,
        classifier_tokens=checks if by_classifier else None,
        propagated_tokens=whole[:, None] - rows if depths.propagated else None,
    )


def probe_time_s(candidate: Candidate, load: Load) -> float:
    """Seconds for the whole model to score one text of mean length, every token at every exit."""
    exits, rows = candidate.offline.exits, round(load.output_tokens(candidate))
    checked = np.full((1, len(exits)), rows, np.int64)
    checked[0, -1] = 0  # the last exit's logits are counted as sampled tokens
    none = np.zeros((1, len(exits)), np.int64)
    chunk = PrefillChunk(round(load.prompt_tokens(candidate)) + rows, 0, exits[-1])
    composition = Composition(
        exits, none, none, np.array([rows]), check_tokens=checked, prefill=(chunk,), host_sync_at_checks=False
    )
    return max(float(candidate.profile.iteration_time_s(composition)[0]), LEAST_S)


@dataclass(frozen=True, slots=True)
class Prediction:
    """Predicted performance of one placement under one load. "Busy" time is a request's share of iterations."""

    batch: float  # requests running at once; below 1 if the server is sometimes idle
    batch_capacity: int  # requests that may run at once, by memory and limits
    throughput_requests_per_s: float  # delivered rate; under open arrivals at most the arrival rate
    capacity_requests_per_s: float  # highest rate over possible batches; at the batch in use if the load fixes it
    response_time_s: float
    prefill_s: float
    decode_iteration_s: float  # at the operating batch
    busy_s_per_request: float
    energy_j_low: float | None  # per request, busy time only; None if idle power or TDP is not known
    energy_j_high: float | None
    tdp_w: float | None

    @property
    def energy_rank_j(self) -> float:
        """The figure that the energy objective compares: the middle of the band.

        Without idle power there is no band; then busy time at TDP is compared, an upper bound and no estimate. Without
        TDP busy time itself is compared: the order is the same, since all candidates run on one device.
        """
        if self.energy_j_low is None or self.energy_j_high is None:
            return self.busy_s_per_request * (1.0 if self.tdp_w is None else self.tdp_w)
        return 0.5 * (self.energy_j_low + self.energy_j_high)

    def to_json(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


def predict(
    situation: Situation,
    placement: Placement,
    depths: Depths | Paced,
    load: Load,
    *,
    standby: Iterable[Placement] = (),
    batch_limit: int | None = None,
    horizon_requests: int = 150,
) -> Prediction | None:
    """Predicts a placement's performance; None if it leaves no room for one request of mean length.

    X(B) = 1 / (p + (n - 1) d(B) / B) requests per second with B running, where p is the prompt's seconds, n the
    answer's tokens and d(B) a decode iteration at mean context; R(B) = B / X(B). Closed loop of N users:
    B = min(N, capacity), and the response time is N / X (Little). Open arrivals at rate a: the smallest B with
    X(B) >= a, since B = a R(B). Full queue: B = capacity. The wait under open arrivals is `_wait_s`; it is bounded by
    `horizon_requests` if the queue grows.
    """
    candidate = situation.candidates[placement.model]
    profile = candidate.profile
    prompt, output = load.prompt_tokens(candidate), load.output_tokens(candidate)
    capacity = batch_capacity(situation, placement, prompt + output, standby, batch_limit)
    if capacity == 0:
        return None
    most = capacity if load.users is None else min(capacity, load.users)
    context, least = prompt + output / 2, 1 if load.arrival_rate_per_s is not None else most
    priced = isinstance(depths, Depths) and depths.is_fixed
    decode_s = None if priced else decode_time_s(profile, depths, np.arange(least, most + 1), context)
    at = profile.operating.of(
        depths.layers, (round(prompt), load.cached_tokens(candidate), situation.max_batch_tokens), (least, most),
        (context, output - 1, math.inf if load.arrival_rate_per_s is None else load.arrival_rate_per_s), decode_s,
    )  # fmt: skip
    running, delivered, most_per_s = at.batch, at.rate_per_s, at.most_rate_per_s
    batch = float(most)  # a full queue
    if load.arrival_rate_per_s is not None and at.keeps_up:
        batch = load.arrival_rate_per_s * (running / delivered)
    if load.users is not None:
        response_s = load.users / delivered
    elif load.arrival_rate_per_s is not None:
        delivered = min(load.arrival_rate_per_s, most_per_s)
        response_s = running / at.rate_per_s + _wait_s(load, most_per_s, most, horizon_requests)
    else:
        response_s = running / delivered
    busy_s = at.prefill_s + (output - 1) * at.decode_s / running
    floor_s = at.decode_floor_s
    if not priced:
        floor_s = float(decode_floor_s(profile, depths, np.array([running]), context)[0])
    floor_s = at.prefill_floor_s + (output - 1) * floor_s / running
    low_j, high_j = _energy_j(profile, busy_s, floor_s)
    return Prediction(
        batch=batch,
        batch_capacity=capacity,
        throughput_requests_per_s=delivered,
        capacity_requests_per_s=most_per_s,
        response_time_s=response_s,
        prefill_s=at.prefill_s,
        decode_iteration_s=at.decode_s,
        busy_s_per_request=busy_s,
        energy_j_low=low_j,
        energy_j_high=high_j,
        tdp_w=profile.hardware.tdp_w,
    )


def batch_capacity(
    situation: Situation,
    placement: Placement,
    request_tokens: float,
    standby: Iterable[Placement] = (),
    batch_limit: int | None = None,
) -> int:
    """Number of requests of `request_tokens` tokens that may run at once, 0 if not one fits. A model is loaded once."""
    layers = {placement.model: placement.held_layers}
    for other in standby:
        layers[other.model] = max(other.held_layers, layers.get(other.model, 0))
    resident = [(situation.candidates[model].profile, n) for model, n in layers.items()]
    active = (situation.candidates[placement.model].profile, placement.layers)
    blocks = situation.memory.pool_blocks(resident, active)
    fit = blocks // math.ceil(max(1.0, request_tokens) / situation.memory.block_tokens)
    limits = [fit, situation.max_running_requests, situation.max_batch_tokens]
    return min(limits if batch_limit is None else [*limits, batch_limit])


def _wait_s(load: Load, most_per_s: float, slots: int, horizon_requests: int) -> float:
    """Mean wait of the next `horizon_requests` under open arrivals, with variation 1 of gaps and service.

    Below saturation it is the smaller of two waits. One is Sakasegawa's approximation of M/M/c (1977; exact for one
    slot; a slot's service time is slots / X). The other is reached at load 1 within the horizon by a queue that starts
    empty: the mean over the horizon of reflected Brownian motion, 2/3 sqrt(4 H / pi) requests. Above saturation it is
    the latter, and the queue also grows by (1/X - 1/a) per request. Requests that wait now are worked off at the spare
    rate.
    """
    assert load.arrival_rate_per_s is not None
    rho = load.arrival_rate_per_s / most_per_s
    wait_s = 2 / 3 * math.sqrt(4 * horizon_requests / math.pi) / most_per_s
    backlog_s = load.queued_requests / most_per_s
    if rho < 1:
        stationary_s = rho ** (math.sqrt(2 * (slots + 1)) - 1) / (1 - rho) / most_per_s
        wait_s = min(wait_s, stationary_s)
        backlog_s *= min(1.0, load.queued_requests / (2 * horizon_requests * (1 - rho)))
    else:
        wait_s += horizon_requests / 2 * (1 / most_per_s - 1 / load.arrival_rate_per_s)
    return wait_s + backlog_s


def _energy_j(profile: Profile, busy_s: float, floor_s: float) -> tuple[float | None, float | None]:
    """Least and most joules of a request's busy time; (None, None) if the card's power is not known."""
    watts = profile.hardware.busy_w(min(1.0, floor_s / busy_s))
    return (None, None) if watts is None else (busy_s * watts[0], busy_s * watts[1])
