"""What a calibration's settings are, in plain types. Knows ranges of single values, not how anything is measured.

The classes are mutable and hold only plain types because Hydra fills them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from helios_sim.errors import UserError

TASKS = ("all", "latency", "adapters", "traces", "report")
DTYPES = ("float32", "bfloat16")


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
    tasks: list[str] | None = None  # labelled texts to trace; null: all that are there
    trace_tokens: int = 55_000  # about as many, of all tasks together
    answers: int = 6  # the model's own, to trace for each task; 0: none
    train_tokens: int = 200_000  # for exit adapters, about
    adapter_width: int = 128  # of an exit adapter's gated network
    check_width: int = 256  # of the check of the hidden state
    epochs: float = 1.5  # over the training tokens
    max_batch: int | None = None  # largest decode batch measured; null: 32 on a CPU, 256 on a card
    max_batch_tokens: int | None = None  # most tokens of one iteration; null: 512 on a CPU, 8192 on a card
    max_context_tokens: int | None = None  # longest context measured; null: the model's, 2048 on a CPU, 8192 on a card
    quick: bool = False  # tiny shapes and few samples: to try the command; its numbers are worth little
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
        for key, least in (("trace_tokens", 1), ("train_tokens", 1), ("answers", 0)):
            require(getattr(self, key) >= least, key, getattr(self, key), f"at least {least}")
        for key, least in (
            ("adapter_width", 1),
            ("check_width", 1),
            ("threads", 1),
            ("memory_bytes", 1),
            ("max_batch", 2),
            ("max_batch_tokens", 16),
            ("max_context_tokens", 16),
        ):
            value = getattr(self, key)
            require(value is None or value >= least, key, value, f"null or at least {least}")
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(0 < self.threshold < 1, "threshold", self.threshold, "between 0 and 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(key, value, f"must be {allowed}", f"set {key} accordingly")
