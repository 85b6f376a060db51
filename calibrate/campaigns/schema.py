"""What a campaign's settings are, in plain types. Knows ranges of single values, not how anything is measured."""

from __future__ import annotations

from dataclasses import dataclass, field

from calibrate.schema import DTYPES, require


@dataclass
class CampaignLiveConfig:
    """Live serving beside its simulation, and how much of it."""

    pair: list[str] = field(default_factory=list)  # two shapes that HELIOS switches between, smaller first; none: none
    loads: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9, 1.2])  # over each arm's own capacity
    prompt_tokens: int = 256  # mean of a request
    output_tokens: int = 64
    max_running_requests: int = 64
    max_batch_tokens: int = 2048
    least_requests: int = 12  # of every run
    round_requests: int = 40  # after so many HELIOS asks again
    exits: dict[str, list[int]] = field(default_factory=dict)  # made-up ones by model; else those published or measured


@dataclass
class CampaignConfig:
    """One device, all that is to be measured on it, and the time for it."""

    campaign: str = ""
    device: str = "cuda"  # cpu, cuda, cuda:N
    threads: int | None = None  # of a CPU
    memory_bytes: int | None = None  # that the engine may use; null: what the device has
    dtype: str = "bfloat16"  # float32, bfloat16
    models: list[str] = field(default_factory=list)  # shapes to profile, in order of worth
    text_model: str = "smollm2-135m"  # with weights of its own: adapters, exit traces, live serving
    last_model: str | None = None  # a large shape, profiled after all else; its headline is simulated, never served
    # by model: folder, .gguf file, hub id, or random:NAME; else the cache's file by the model's name, else random:NAME
    weights: dict[str, str] = field(default_factory=dict)
    quick: bool = False  # few samples of small tables: to rehearse; such numbers are worth nothing
    max_batch: int | None = None
    max_context_tokens: int | None = None
    tasks: list[str] | None = None  # labelled texts; null: all that are at hand
    train_tokens: int = 1_000_000
    trace_tokens: int = 55_000
    adapter_width: int = 256
    check_width: int = 256
    live: CampaignLiveConfig = field(default_factory=CampaignLiveConfig)
    budget_s: float | None = None  # for everything together; null: as long as it takes
    resume: list[str] = field(default_factory=list)  # archives of earlier calls, or folders with them; `out` counts too
    out: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(self.budget_s is None or self.budget_s > 0, "budget_s", self.budget_s, "null or above 0")
        require(bool(self.models), "models", self.models, "at least one model")
        require(len(set(self.models)) == len(self.models), "models", self.models, "each model once")
        unknown = sorted({*self.live.pair, self.text_model} - set(self.models))
        require(not unknown, "models", self.models, f"with {', '.join(unknown)}, which is to be served")
        require(len(self.live.pair) in (0, 2), "live.pair", self.live.pair, "two models or none")
        require(self.last_model not in self.models, "last_model", self.last_model, "a model that is not among models")
        simulated = {*self.live.pair, *([self.last_model] if self.last_model else [])}
        missing = sorted(simulated - set(self.live.exits)) if self.live.exits else []
        require(not missing, "live.exits", dict(self.live.exits), f"with {', '.join(missing)}, or none at all")
        require(bool(self.live.loads), "live.loads", self.live.loads, "at least one load")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
