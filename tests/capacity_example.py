"""A capacity plan that takes a second or two: what its tests share."""

from __future__ import annotations

from typing import Any

from helios_sim.study.modes import CapacityConfig
from helios_sim.study.schema import (
    ArrivalsConfig,
    Config,
    CostConfig,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    ServerConfig,
    SloConfig,
    WorkloadConfig,
)

CAPACITY = """# @package _global_
name: plan
models: [opt-6.7b]
workload:
  arrivals: {rate_per_s: 120}
  lengths: {prompt: {mean: 300}, output: {mean: 30, sigma: 0.4, maximum: 80}}
slo: {ttft_s: 0.2, tpot_s: 0.02}
server: {router: least_loaded}
capacity: {cards: [a100-40gb, h100-80gb], seconds: 3, most_replicas: 12}
arms:
  full_depth: {policy: full_depth}
  static_cap: {policy: static_cap}
seeds: [0, 1]
"""


def example(**settings: Any) -> Config:
    """OPT-6.7B on two cards, 360 short requests in three seconds, at full depth and cut; `settings` are groups."""
    capacity = {"cards": ["a100-40gb", "h100-80gb"], "seconds": 3.0, "most_replicas": 12} | settings.pop("capacity", {})
    groups: dict[str, Any] = {
        "models": ["opt-6.7b"],
        "arms": {"full_depth": {"policy": "full_depth"}, "static_cap": {"policy": "static_cap"}},
        "slo": SloConfig(ttft_s=0.2, tpot_s=0.02),
        "server": ServerConfig(router="least_loaded"),
        "seeds": [0, 1],
        "cost": CostConfig(),
        "workload": WorkloadConfig(
            n_requests=360,
            arrivals=ArrivalsConfig(kind="poisson", rate_per_s=120.0),
            lengths=LengthsConfig(
                prompt=LengthConfig(kind="lognormal", mean=300, sigma=0.5),
                output=LengthConfig(kind="lognormal", mean=30, sigma=0.4, maximum=80),
            ),
            mix=MixConfig({"gsm8k": 1.0}),
        ),
    }
    return Config(name="example", capacity=CapacityConfig(**capacity), **{**groups, **settings})
