"""Two small candidates whose every cost can be computed by hand, and scripted telemetry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np

from helios_sim.exits.replay import OfflineExits
from helios_sim.policy.helios import HeliosPolicy
from helios_sim.policy.helios_parameters import HeliosParameters
from helios_sim.policy.telemetry import (
    Candidate,
    ExpectedLoad,
    Goal,
    Objective,
    Observation,
    Outlook,
    Situation,
    Telemetry,
)
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.profile.synthetic import flat_profile

LAYER_BYTES = 40  # of flat_profile's model: 20 values of 2 bytes
OTHER_BYTES = 68  # its embedding and final norm
KV_BYTES = 4  # per token and layer
ONE_USER = ExpectedLoad(prompt_chars=10.0, output_chars=21.0, closed_loop_users=1)


@cache
def layered_profile(
    name: str, layer_s: float, n_layers: int, *, load_bytes_per_s: float = 1e9, idle_w: float | None = None
) -> Profile:
    """An iteration takes layer_s for each layer run, whatever the batch: only the host's launches cost anything."""
    profile = flat_profile(0.0, n_layers=n_layers, name=name, load_bytes_per_s=load_bytes_per_s)
    profile = replace(profile, hardware=replace(profile.hardware, tdp_w=100.0, idle_w=idle_w))
    return profile.with_runtime(replace(profile.runtime, launch_s_per_layer=layer_s))


def offline(
    model: str,
    exits: Sequence[int],
    disagreement: Sequence[float],
    confident: Sequence[float],
    *,
    prompts: int = 40,
    tokens: int = 100,
    bits: Sequence[float] | None = None,
) -> OfflineExits:
    """Every prompt has the same shares, so that a bootstrap over prompts has no spread: bounds equal shares."""
    counts = np.rint(np.array(disagreement) * tokens).astype(np.int64)
    left = np.maximum.accumulate([*confident[:-1], 1.0])
    return OfflineExits(
        model=model,
        exits=tuple(exits),
        confident_share=np.array(confident),
        exit_share=np.diff(left, prepend=0.0),
        disagreement=counts / tokens,
        prompt_tokens=np.full(prompts, tokens, dtype=np.int64),
        prompt_disagreements=np.tile(counts, (prompts, 1)),
        chars_per_token=1.0,
        bits_per_char=None if bits is None else np.array(bits),
    )


@cache
def small() -> Candidate:
    return Candidate(
        layered_profile("small", 0.001, 4), offline("small", (2, 4), (0.04, 0.0), (0.8, 1.0), bits=(1.2, 1.1))
    )


@cache
def large() -> Candidate:
    return Candidate(
        layered_profile("large", 0.002, 8), offline("large", (2, 8), (0.02, 0.0), (0.9, 1.0), bits=(1.0, 0.9))
    )


def situation(
    *candidates: Candidate,
    goal: Goal = Goal.THROUGHPUT,
    epsilon: float = 0.05,
    max_bits_per_char: float | None = None,
    capacity_bytes: int = 10**6,
    expected: ExpectedLoad | None = ONE_USER,
    max_running_requests: int = 8,
    outlook: Outlook | None = None,
    seed: int = 0,
) -> Situation:
    chosen = candidates or (small(), large())
    return Situation(
        candidates={c.profile.model.name: c for c in chosen},
        memory=MemoryBudget(capacity_bytes, 1.0, block_tokens=1),
        objective=Objective(goal, epsilon, max_bits_per_char),
        max_running_requests=max_running_requests,
        max_batch_tokens=1000,
        seed=seed,
        expected=expected,
        outlook=outlook,
    )


def seen(
    completed: int,
    observations: Sequence[Observation] = (),
    *,
    now_s: float = 0.0,
    running: int = 0,
    queued: int = 1,
    batch: float | None = 1.0,
    rate_per_s: float | None = None,
) -> Telemetry:
    return Telemetry(
        now_ns=round(now_s * 1e9),
        completed_requests=completed,
        queued_requests=queued,
        running_requests=running,
        batch_mean=batch,
        prompt_tokens_mean=10.0,
        output_tokens_mean=21.0,
        arrival_rate_per_s=rate_per_s,
        breaches_in_window=51,
        observations=tuple(observations),
    )


def observed(model: str, share_by_exit: Mapping[int, float], tokens: int = 100, confident: float = 0.9) -> Observation:
    """A prompt of which these shares of tokens differ from full depth at each exit; the last differs nowhere."""
    shares = list(share_by_exit.values())
    token = np.arange(tokens)[:, None]
    agrees = token >= np.rint(np.array(shares) * tokens)
    sure = np.repeat(token < round(confident * tokens), len(shares), axis=1)
    return Observation(model, 0, 0, confident=sure, agrees=agrees, bits=None, chars=tokens)


def helios(**settings: object) -> HeliosPolicy:
    return HeliosPolicy(HeliosParameters(**{"threshold": 0.7, **settings}))
