"""Settings of a comparison with a real serving log. Plain types, filled by Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field

from helios_sim.errors import UserError


@dataclass
class LinkConfig:
    """Between the cards of a tensor-parallel group. Null: from the table of cards, PCIe where that knows none."""

    latency_s: float | None = None  # of one all-reduce, however small
    bytes_per_s: float | None = None  # in each direction of each card


@dataclass
class FidelityConfig:
    """With a folder the study is a comparison: the logged run beside its simulation from kernel times and settings.

    What is null comes from the folder, or from tables keyed by the names that it gives.
    """

    compare: bool = False  # a log with its simulation, in place of the arms; a folder alone means the same
    folder: str | None = None  # meta.json, requests.jsonl, profile/, and if there timeseries.csv and workload.csv
    model: str | None = None  # whose shape to use, by its name on Hugging Face
    hardware: str | None = None  # which card's memory and link to use
    memory_bytes: int | None = None  # of one card
    memory_utilisation: float | None = None  # of it, given to the engine; 0.9 unless logged
    kv_blocks: int | None = None  # of the engine; a logged count unless set
    tensor_parallel: int | None = None
    schedule_ahead: int | None = None  # 1: asynchronous scheduling, vLLM's default since 0.14
    link: LinkConfig = field(default_factory=LinkConfig)
    estimate: bool = True  # of the quantities that no table has, from the first requests
    estimate_from: int = 150  # so many requests, the first to arrive; at most half of the log
    mixed_term: bool = True  # decodes beside a prompt chunk as measured together; false: the sum of both alone
    unequal_kv_term: bool = True  # false: KV lengths enter by their mean
    scheduler: str = "vllm_v1"  # plain, vllm_v1
    load_factors: list[float] = field(default_factory=lambda: [0.25, 0.5, 0.7, 0.85, 1.0, 1.2])  # of error against load
    profile_error: float = 0.01  # whose effect is shown against load

    def __post_init__(self) -> None:
        for key in ("memory_bytes", "kv_blocks", "tensor_parallel", "estimate_from"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"fidelity.{key}", value, "at least 1", f"set fidelity.{key} accordingly")
        if self.schedule_ahead not in (None, 0, 1):
            raise UserError("fidelity.schedule_ahead", self.schedule_ahead, "null, 0 or 1", "choose one of these")
        if self.scheduler not in ("plain", "vllm_v1"):
            raise UserError("fidelity.scheduler", self.scheduler, "plain or vllm_v1", "choose one of these")
        if self.memory_utilisation is not None and not 0 < self.memory_utilisation <= 1:
            raise UserError("fidelity.memory_utilisation", self.memory_utilisation, "above 0, at most 1", "correct it")
        if any(factor <= 0 for factor in self.load_factors):
            raise UserError("fidelity.load_factors", list(self.load_factors), "all above 0", "correct it")
