"""What a sweep of designs can be set to, in plain types, with the ranges of single values.

Mutable and plain because Hydra fills them, like the study's settings of which these are a part.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from helios_sim.errors import UserError
from helios_sim.vary.axis import AxisConfig
from helios_sim.vary.workers import BACKENDS

METHODS = ("grid", "search")
SAMPLERS = ("nsga2", "tpe")


@dataclass
class DesignsConfig:
    """A study with `parameters` is a sweep: designs of one arm, the other arms beside them as they are."""

    parameters: dict[str, AxisConfig] = field(default_factory=dict)  # by name; empty: an ordinary study
    method: str = "grid"  # grid: every combination; search: Optuna looks for the front
    arm: str | None = None  # whose designs these are; null: the subject, else the last arm
    objectives: list[str] = field(
        default_factory=lambda: ["throughput_requests_per_s", "e2e_s_p99", "agreement"]
    )  # metrics between which designs trade; where a metric is a band, its less favourable end counts
    designs: int = 200  # search: how many are asked for
    generation: int = 20  # search: designs that are asked for at a time; with `seed` it decides which they are
    sampler: str = "nsga2"  # search: nsga2, tpe
    seed: int = 0  # search: of the sampler; the requests have the study's seeds
    backend: str = "serial"  # serial, processes: on this machine, ray: on a cluster
    workers: int | None = None  # null: one for each core, with ray one for each of the cluster's
    address: str | None = None  # ray: of a running cluster; null: RAY_ADDRESS, else one is started here

    def __post_init__(self) -> None:
        _one_of("method", self.method, METHODS)
        _one_of("backend", self.backend, BACKENDS)
        _one_of("sampler", self.sampler, SAMPLERS)
        for key in ("designs", "generation", "workers"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"sweep.{key}", value, "must be at least 1", f"set sweep.{key} accordingly")
        if self.seed < 0:
            raise UserError("sweep.seed", self.seed, "must be at least 0", "set sweep.seed accordingly")
        if not self.objectives or len(set(self.objectives)) != len(self.objectives):
            allowed = "must be at least one metric, each once"
            raise UserError("sweep.objectives", self.objectives, allowed, "set sweep.objectives accordingly")


def _one_of(key: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"sweep.{key}", value, f"one of {', '.join(allowed)}", f"set sweep.{key} to one of these")
