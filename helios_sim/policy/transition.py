"""Predicted cost of a transition from one placement to another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from helios_sim.policy.deployment import InFlight, Placement
from helios_sim.policy.prediction import Load
from helios_sim.policy.telemetry import Situation


@dataclass(frozen=True, slots=True)
class Transition:
    """Predicted cost of a transition. `lost_s` is all serving time lost until the server works at the new rate."""

    load_bytes: int
    load_s: float  # transfer time on a free channel
    drain_s: float  # time until requests in flight are done; 0 if the transition does not wait for them
    prefill_s: float  # time to prefill the texts in flight again
    lost_s: float
    cache_s: float = 0.0  # time to compute beginnings of prompts that the lost prefix cache held

    def to_json(self) -> dict[str, Any]:
        """The fields as JSON values, with `cache_s` only if it is not 0."""
        return {name: getattr(self, name) for name in self.__slots__ if name != "cache_s" or self.cache_s}


NO_TRANSITION = Transition(0, 0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True, slots=True)
class Underway:
    """Placements in memory and requests running when a transition would start."""

    active: Placement
    standby: tuple[Placement, ...]
    running_requests: int
    decode_iteration_s: float  # of the active placement
    cached_tokens: int = 0  # tokens with K and V in the prefix cache that no request holds

    @property
    def resident(self) -> dict[str, int]:
        layers = {self.active.model: self.active.held_layers}
        for other in self.standby:
            layers[other.model] = max(other.held_layers, layers.get(other.model, 0))
        return layers


def transition(
    situation: Situation,
    now: Underway,
    to: Placement,
    load: Load,
    in_flight: InFlight = InFlight.DRAIN,
    requests: int | None = None,
) -> Transition:
    """Predicts a transition at mean lengths, for `requests` requests to come (None means no end).

    Another model, or more layers of the same model, loses the prefix cache. As many prompts as it held, but no more
    than are to come, then compute the tokens that a warm cache would have held. That time is part of `lost_s`.

    Requests in flight have uniform shares of their answers left. So B of them drain in T B / (B + 1), with T the whole
    decode of one, and T (B - 1) / (2 (B + 1)) of that is lost to empty places in the batch. A switch of the model loads
    while it drains if both models fit beside the KV in use, else afterwards. More layers of the same model load while
    serving goes on more slowly; then the texts in flight are prefilled again, as after a migration.
    """
    found = _without_cache(situation, now, to, load, in_flight)
    if to.model == now.active.model and to.layers <= now.active.layers:
        return found
    cache_s = _cache_s(situation, now, to, load, requests)
    return found if not cache_s else replace(found, cache_s=cache_s, lost_s=found.lost_s + cache_s)


def _cache_s(situation: Situation, now: Underway, to: Placement, load: Load, requests: int | None) -> float:
    """Seconds that a warm cache would have saved the next prompts, for as many prompts as the lost cache held."""
    candidate = situation.candidates[to.model]
    cached, prompt = load.cached_tokens(candidate), round(load.prompt_tokens(candidate))
    if not cached or not now.cached_tokens:
        return 0.0
    held = now.cached_tokens / load.prompt_tokens(situation.candidates[now.active.model])
    cold_s, warm_s = (
        candidate.profile.prompt_time_s(to.layers, prompt, situation.max_batch_tokens, known)[0]
        for known in (0, cached)
    )
    return max(0.0, cold_s - warm_s) * (held if requests is None else min(held, requests))


def _without_cache(
    situation: Situation, now: Underway, to: Placement, load: Load, in_flight: InFlight
) -> Transition:
    candidate = situation.candidates[to.model]
    profile = candidate.profile
    resident = now.resident
    have = profile.weight_bytes(resident[to.model]) if to.model in resident else 0
    load_bytes = max(0, profile.weight_bytes(to.held_layers) - have)
    load_s = profile.load_time_s(load_bytes) if load_bytes else 0.0
    running = now.running_requests
    tokens_in_flight = round(load.prompt_tokens(candidate) + load.output_tokens(candidate) / 2)

    def prefill_again_s() -> float:
        return running * profile.prompt_time_s(to.layers, tokens_in_flight, situation.max_batch_tokens)[0]

    if to.model == now.active.model:
        deeper = to.layers > now.active.layers
        prefill_s = prefill_again_s() if deeper and running else 0.0
        slowed_s = load_s * (1.0 - 1.0 / profile.load_slowdown) if running else load_s
        return Transition(load_bytes, load_s, 0.0, prefill_s, slowed_s + prefill_s)
    if in_flight is InFlight.MIGRATE and running:
        prefill_s = prefill_again_s()
        slowed_s = load_s * (1.0 - 1.0 / profile.load_slowdown) if _fits_beside(situation, now, to, load) else load_s
        return Transition(load_bytes, load_s, 0.0, prefill_s, slowed_s + prefill_s)
    answer_s = (load.output_tokens(situation.candidates[now.active.model]) - 1) * now.decode_iteration_s
    drain_s = answer_s * running / (running + 1)
    empty_s = answer_s * (running - 1) / (2 * (running + 1)) if running else 0.0
    left_s = max(0.0, load_s - drain_s) if _fits_beside(situation, now, to, load) else load_s
    return Transition(load_bytes, load_s, drain_s, 0.0, empty_s + left_s)


def _fits_beside(situation: Situation, now: Underway, to: Placement, load: Load) -> bool:
    """Whether the new weights fit beside the old ones and the KV in use."""
    layers = now.resident
    layers[to.model] = max(to.held_layers, layers.get(to.model, 0))
    resident: Sequence[tuple[str, int]] = tuple(layers.items())
    active = situation.candidates[now.active.model]
    tokens = load.prompt_tokens(active) + load.output_tokens(active) / 2
    in_use_bytes = now.running_requests * tokens * active.profile.kv_bytes_per_token(now.active.layers)
    pool_bytes = situation.memory.pool_bytes((situation.candidates[m].profile, n) for m, n in resident)
    return pool_bytes >= in_use_bytes
