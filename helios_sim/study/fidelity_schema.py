"""Settings of a comparison with a real serving log. Plain types, filled by Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field


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

    folder: str | None = (
        None  # of the log: meta.json, requests.jsonl, profile/, and if there timeseries.csv, workload.csv
    )
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
