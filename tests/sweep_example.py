"""A sweep that takes a second: what the tests of sweeps share."""

from __future__ import annotations

from typing import Any

from helios_sim.study.modes import DesignsConfig
from helios_sim.study.schema import ArrivalsConfig, Config, LengthConfig, LengthsConfig, MixConfig, WorkloadConfig
from helios_sim.vary.axis import AxisConfig

SWEEP = """# @package _global_
name: designs
models: [opt-1.3b]
workload:
  n_requests: 12
  lengths: {output: {p50: 12, p95: 30, maximum: 40}}
arms:
  full_depth: {policy: full_depth}
  helios: {policy: helios}
sweep:
  parameters:
    cap_bound: {settings: [objective.max_disagreement], values: [0.01, 0.2]}
    limit: {settings: [arms.helios.limit], values: [20, 80]}
"""
FREE = {
    "cap_bound": AxisConfig(settings=["objective.max_disagreement"], low=0.01, high=0.3),
    "limit": AxisConfig(settings=["arms.helios.limit"], low=10, high=90, whole=True),
    "prompts": AxisConfig(settings=["arms.helios.prompts_per_candidate"], values=[1, 2, 5]),
    "on_breach": AxisConfig(settings=["arms.helios.on_breach"], values=["cheaper", "load_only"]),
}
SEARCH: dict[str, Any] = {"method": "search", "parameters": FREE, "designs": 24, "generation": 6}


def example(**sweep: Any) -> Config:
    """Four bounds times seven limits of HELIOS, twelve short requests at once."""
    parameters = {
        "cap_bound": AxisConfig(settings=["objective.max_disagreement"], values=[0.02, 0.05, 0.1, 0.2]),
        "limit": AxisConfig(settings=["arms.helios.limit"], low=20, high=80, step=10, whole=True),
    }
    return Config(
        name="example",
        models=["opt-1.3b"],
        workload=WorkloadConfig(
            n_requests=12,
            arrivals=ArrivalsConfig(kind="all_at_once"),
            lengths=LengthsConfig(
                prompt=LengthConfig(value=100), output=LengthConfig(kind="exponential", mean=20, maximum=60)
            ),
            mix=MixConfig({"gsm8k": 1.0}),
        ),
        arms={"full_depth": {"policy": "full_depth"}, "helios": {"policy": "helios"}},
        sweep=DesignsConfig(**{"parameters": parameters, **sweep}),
    )
