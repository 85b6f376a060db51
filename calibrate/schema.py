"""What a calibration's settings are, in plain types. Knows ranges of single values, not how anything is measured.

The classes are mutable and hold only plain types because Hydra fills them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from helios_sim.errors import UserError

TASKS = ("all", "latency", "adapters", "traces", "report")
DTYPES = ("float32", "bfloat16")
SHORT_NAMES = {
    "smollm2": "smollm2-135m",
    "gemma3": "gemma3-270m",
    "qwen2.5-coder": "qwen2.5-coder-0.5b",
}


@dataclass
class ModelConfig:
    name: str = "smollm2-135m"  # of the profile, the trace and the exit heads
    weights: str | None = None  # folder (config.json, safetensors), .gguf file or hub id; null: the cache's, by name
    layers: int | None = None  # the layers above are never loaded; null: all
    exits: list[int] | None = None  # depths in layers; null: those of the exit heads, else evenly spaced

    def __post_init__(self) -> None:
        require(self.layers is None or self.layers >= 1, "model.layers", self.layers, "null or at least 1")
        ascending = self.exits is None or (self.exits == sorted(set(self.exits)) and min(self.exits, default=0) >= 1)
        require(ascending, "model.exits", self.exits, "null or depths that ascend from 1 or more")


@dataclass
class CalibrateConfig:
    """One model on one device: what to measure, in which time, and where to put it."""

    task: str = "all"  # all, latency (times, memory, loads, energy), adapters (train exits), traces, report
    model: ModelConfig = field(default_factory=ModelConfig)
    device: str = "cpu"  # cpu, cuda, cuda:N
    threads: int | None = None  # of a CPU; null: all that the process may use
    memory_bytes: int | None = None  # that the engine may use; null: what the device has
    dtype: str | None = None  # float32, bfloat16; null: bfloat16 where the device computes in it, else float32
    budget_s: float | None = None  # for everything together; null: as long as it takes
    heads: str | None = None  # folder of exit heads; null: those shipped for the model, else none
    tasks: list[str] | None = None  # labelled texts to trace; null: all
    trace_tokens: int = 50_000  # of all tasks together
    train_tokens: int = 200_000  # for exit adapters
    max_batch: int = 64  # largest decode batch in the grid
    max_context_tokens: int | None = None  # longest context in the grid; null: the model's, at most 2048
    threshold: float = 0.9  # at which the report counts exits; the trace answers every other
    pairs: list[str] = field(default_factory=list)  # more trace folders, for joint exits; shipped ones are used anyway
    out: str = ""  # the output folder; the same again resumes
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.task in TASKS, "task", self.task, f"one of {', '.join(TASKS)}")
        allowed = self.dtype is None or self.dtype in DTYPES
        require(allowed, "dtype", self.dtype, f"null or one of {', '.join(DTYPES)}")
        budget = self.budget_s
        require(budget is None or budget > 0, "budget_s", budget, "null or above 0")
        require(self.tasks is None or bool(self.tasks), "tasks", self.tasks, "null or at least one task")
        for key in ("trace_tokens", "train_tokens", "max_batch"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "at least 1")
        for key in ("threads", "memory_bytes", "max_context_tokens"):
            value = getattr(self, key)
            require(value is None or value >= 1, key, value, "null or at least 1")
        require(0 < self.threshold < 1, "threshold", self.threshold, "between 0 and 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(key, value, f"must be {allowed}", f"set {key} accordingly")
