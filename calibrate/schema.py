"""The settings of a calibration and of a campaign, with the allowed range of each.

The classes are mutable and hold only plain types because Hydra fills them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields

from helios_sim.errors import UserError, require_finite
from helios_sim.exits.trace import ANY_DRAFTER, FUSED
from helios_sim.profile.devices import device_of

TASKS = ("all", "latency", "adapters", "train_exits", "traces", "predictors", "drafters", "potential", "report")
POTENTIAL, TRAIN_EXITS, PREDICTORS, DRAFTERS = "potential", "train_exits", "predictors", "drafters"
CURRICULA = ("rotational", "gradual")
_MEASURING, _TRAINING = ("all", "latency"), ("adapters", TRAIN_EXITS)
_TRACING = ("all", *_TRAINING, "traces", PREDICTORS, POTENTIAL)
# By setting: the tasks in which it has an effect. A setting that is not listed affects all tasks, or their page.
COUNTS = {
    **dict.fromkeys(("train_tokens", "check_width"), (*_TRAINING, PREDICTORS)),
    "adapter_width": _TRAINING, "epochs": ("adapters",),
    "trace_tokens": _TRACING, "tasks": (*_TRACING, DRAFTERS), "answers": ("all", "traces", DRAFTERS),
    "drafters": (DRAFTERS,),
    **dict.fromkeys(("max_batch", "max_batch_tokens", "max_context_tokens", "energy"), _MEASURING),
    "budget_s": tuple(task for task in TASKS if task != "report"),
}
DTYPES = ("float32", "bfloat16")
KERNELS = ("triton", "torch")


@dataclass
class ModelConfig:
    name: str = "smollm2-135m"  # used for the profile, the trace and the exit heads
    weights: str | None = None  # folder (config.json, safetensors), .gguf file or hub id; null: from the cache, by name
    layers: int | None = None  # how many layers are loaded; null: all
    exits: list[int] | None = None  # depths in layers; null: those of the exit heads, else evenly spaced

    def __post_init__(self) -> None:
        require(self.layers is None or self.layers >= 1, "model.layers", self.layers, "null or at least 1")
        ascending = self.exits is None or (self.exits == sorted(set(self.exits)) and min(self.exits, default=0) >= 1)
        require(ascending, "model.exits", self.exits, "null or depths that ascend from 1 or more")


@dataclass
class TrainExitsConfig:
    """LayerSkip's recipe (arXiv 2404.16710), with which the model itself is trained to exit early."""

    rank: int = 8  # rank of the change of every product of every layer
    drop_most: float = 0.1  # share of the texts that leave out the last layer; earlier layers less, the first none
    loss_scale: float = 1.0  # weight of early exits in the loss, beside full depth
    curriculum: str = "rotational"  # rotational: exits take turns; gradual: they join from the deepest on
    every: int = 2  # rotational curriculum: a step trains every 2nd, 3rd, ... exit
    learning_rate: float = 5e-4  # learning rate of the model's change
    adapter_learning_rate: float = 5e-4  # learning rate of the exits' adapters
    text_tokens: int = 256  # tokens of each text
    batch_texts: int | None = None  # texts per step; null: 2 on a CPU, 64 on a card
    steps: int | None = None  # null: as many as the time allows, an hour without budget_s
    check_tokens: int = 20_000  # approximate number of tokens from which checks learn

    def __post_init__(self) -> None:
        require_finite(self, "train_exits.")
        for key in ("rank", "every", "text_tokens", "check_tokens"):
            require(getattr(self, key) >= 1, f"train_exits.{key}", getattr(self, key), "at least 1")
        for key in ("batch_texts", "steps"):
            value = getattr(self, key)
            require(value is None or value >= 1, f"train_exits.{key}", value, "null or at least 1")
        require(0 <= self.drop_most < 1, "train_exits.drop_most", self.drop_most, "at least 0 and below 1")
        for key in ("loss_scale", "learning_rate", "adapter_learning_rate"):
            require(getattr(self, key) > 0, f"train_exits.{key}", getattr(self, key), "above 0")
        known = self.curriculum in CURRICULA
        require(known, "train_exits.curriculum", self.curriculum, f"one of {', '.join(CURRICULA)}")
        turns = self.every == type(self).every or self.curriculum == "rotational"
        require(turns, "train_exits.every", self.every, "left out: it counts for the rotational curriculum")


@dataclass
class CalibrateConfig:
    """A calibration of one model on one device: what to measure, in how much time, and where to put it."""

    # all, latency (times, memory, loads, energy), adapters (exits attached to the frozen model), train_exits (the model
    # trained for exits), traces, predictors (of a few words, and a trace with them), drafters (a joint trace of its
    # answers with other models' predictions for them), potential (does it exit?), report
    task: str = "all"
    model: ModelConfig = field(default_factory=ModelConfig)
    device: str = "cpu"  # cpu, cuda, cuda:N
    threads: int | None = None  # CPU threads; null: all that the process may use
    memory_bytes: int | None = None  # memory that the engine may use; null: all of the device
    dtype: str | None = None  # float32, bfloat16; null: bfloat16 where the device computes in it, else float32
    kernels: str | None = None  # kernels of decodes: triton, torch; null: triton if the card can, else torch
    budget_s: float | None = None  # seconds for everything together; null: no limit
    heads: str | None = None  # folder of exit heads; null: the shipped heads of the model, else none
    tasks: list[str] | None = None  # labelled texts to trace; null: all that are available
    # approximate tokens to trace, of all tasks together; null: 55,000, or 16,000 for potential, predictors and
    # train_exits
    trace_tokens: int | None = None
    card: str | None = None  # task=potential: the card of the speed-up estimate; null: h100-80gb
    answers: int = 6  # answers of the model to trace for each task; 0: none
    # task=drafters: models with the same tokenizer, as name in the trace -> weights (folder, .gguf file, hub id, or a
    # known name)
    drafters: dict[str, str] = field(default_factory=dict)
    # approximate tokens of text; null: 200,000 for adapters, 20,000 for predictors, 2,000,000 for train_exits
    train_tokens: int | None = None
    adapter_width: int = 128  # width of an exit adapter's gated network
    check_width: int = 256  # width of the check of the hidden state, and of predictors
    epochs: float = 1.5  # passes of adapters over the training tokens
    train_exits: TrainExitsConfig = field(default_factory=TrainExitsConfig)  # only for task=train_exits
    max_batch: int | None = None  # largest decode batch measured; null: 32 on a CPU, 256 on a card
    max_batch_tokens: int | None = None  # most tokens of one iteration; null: 512 on a CPU, 8192 on a card
    max_context_tokens: int | None = None  # longest context measured; null: the model's, 2048 on a CPU, 8192 on a card
    quick: bool = False  # tiny shapes and few samples, to try the command; the numbers are not meaningful
    energy: bool = True  # measure the energy of iterations, if the device has a counter
    threshold: float = 0.9  # threshold for exits in the report; the trace can answer any other
    pairs: list[str] = field(default_factory=list)  # further trace folders for joint exits, besides the shipped ones
    out: str = ""  # output folder; the same folder again resumes
    seed: int = 0

    def __post_init__(self) -> None:
        require_finite(self)
        require(self.task in TASKS, "task", self.task, f"one of {', '.join(TASKS)}")
        allowed = self.dtype is None or self.dtype in DTYPES
        require(allowed, "dtype", self.dtype, f"null or one of {', '.join(DTYPES)}")
        require(self.kernels in (None, *KERNELS), "kernels", self.kernels, f"null or one of {', '.join(KERNELS)}")
        budget = self.budget_s
        require(budget is None or budget > 0, "budget_s", budget, "null or above 0")
        require(self.tasks is None or bool(self.tasks), "tasks", self.tasks, "null or at least one task")
        require(self.answers >= 0, "answers", self.answers, "at least 0")
        self._check_drafters()
        for key, least in (
            ("trace_tokens", 1),
            ("train_tokens", 1),
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
        told = self.card is None or self.task in (POTENTIAL, "report")
        require(told, "card", self.card, "left out: it counts for task=potential, and for report")
        if self.card is not None:
            device_of(self.card, "card")
        own = self.task in (TRAIN_EXITS, "report") or self.train_exits == TrainExitsConfig()
        require(own, "train_exits", asdict(self.train_exits), "left out: it counts for task=train_exits")
        require(self.epochs > 0, "epochs", self.epochs, "above 0")
        require(0 < self.threshold < 1, "threshold", self.threshold, "between 0 and 1")
        require(self.seed >= 0, "seed", self.seed, "at least 0")

    def _check_drafters(self) -> None:
        if self.task != DRAFTERS:
            return
        given = dict(self.drafters)
        require(bool(given), "drafters", given, "one model or more by name, such as +drafters={small: PATH}")
        require(self.answers >= 1, "answers", self.answers, "at least 1: drafters are asked for the tokens of answers")
        for name in given:
            plain = bool(name) and not set(name) & set(f"{FUSED}{ANY_DRAFTER}/")
            require(plain, "drafters", name, f"a name without {FUSED}, {ANY_DRAFTER} and /")
            require(name != self.model.name, "drafters", name, "another name than that of the model, model.name")

    @property
    def priced_for(self) -> str:
        """The card of `task=potential`."""
        return CARD if self.card is None else self.card

    @property
    def tokens_to_trace(self) -> int:
        if self.trace_tokens is not None:
            return self.trace_tokens
        return TOKENS_OF_POTENTIAL if self.task in (POTENTIAL, TRAIN_EXITS, PREDICTORS) else TOKENS

    @property
    def tokens_to_train(self) -> int:
        if self.train_tokens is not None:
            return self.train_tokens
        return {TRAIN_EXITS: TOKENS_OF_TRUNK, PREDICTORS: TOKENS_OF_PREDICTORS}.get(self.task, TOKENS_OF_ADAPTERS)


def in_vain(config: CalibrateConfig, words: Sequence[str]) -> list[str]:
    """A sentence for each setting of the command line that has no effect on the chosen task.

    It is no error, since one command line may run several tasks in turn into one folder.
    """
    given = [word.lstrip("+").partition("=") for word in words]
    return [
        f"{name}={value} does nothing here: it counts for task={' or '.join(COUNTS[name])}"
        for name, equals, value in given if equals and config.task not in COUNTS.get(name, TASKS)
    ]  # fmt: skip


TOKENS, TOKENS_OF_POTENTIAL = 55_000, 16_000
TOKENS_OF_ADAPTERS, TOKENS_OF_TRUNK, TOKENS_OF_PREDICTORS = 200_000, 2_000_000, 20_000
CARD = "h100-80gb"


def require(holds: bool, key: str, value: object, allowed: str) -> None:
    """Raise UserError for the setting unless `holds`."""
    if not holds:
        raise UserError(key, value, f"must be {allowed}", f"set {key} accordingly")


@dataclass
class CampaignLiveConfig:
    """The amount of live serving beside its simulation."""

    pair: list[str] = field(default_factory=list)  # two shapes that HELIOS switches between, smaller first; empty: none
    loads: list[float] = field(default_factory=lambda: [0.5, 0.75, 0.9, 1.2])  # as shares of each arm's own capacity
    prompt_tokens: int = 256  # mean per request
    output_tokens: int = 64
    max_running_requests: int = 64
    max_batch_tokens: int = 2048
    least_requests: int = 12  # least number in every run
    round_requests: int = 40  # after how many requests HELIOS re-assesses
    exits: dict[str, list[int]] = field(default_factory=dict)  # synthetic exits by model, in place of real ones

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            require(not isinstance(value, int) or value >= 1, f"live.{f.name}", value, "at least 1")


@dataclass
class CampaignConfig:
    """A campaign on one device: what to measure on it, and in how much time."""

    campaign: str = ""
    device: str = "cuda"  # cpu, cuda, cuda:N
    threads: int | None = None  # CPU threads
    memory_bytes: int | None = None  # that the engine may use; null: what the device has
    dtype: str = "bfloat16"  # float32, bfloat16
    models: list[str] = field(default_factory=list)  # shapes to profile, in order of worth
    text_model: str | None = None  # one of `models`, with real weights: for adapters, exit traces, live serving
    last_model: str | None = None  # a large shape, profiled last; its headline is simulated, never served
    # by model: folder, .gguf file, hub id, or random:NAME; else the cache's file by the model's name, else random:NAME
    weights: dict[str, str] = field(default_factory=dict)
    quick: bool = False  # few samples of small tables, for a rehearsal; the numbers are not meaningful
    max_batch: int | None = None
    max_context_tokens: int | None = None
    tasks: list[str] | None = None  # labelled texts; null: all that are available
    train_tokens: int = 1_000_000
    trace_tokens: int = 55_000
    adapter_width: int = 256
    check_width: int = 256
    train_exits: TrainExitsConfig = field(default_factory=TrainExitsConfig)  # for the text model
    live: CampaignLiveConfig = field(default_factory=CampaignLiveConfig)
    kernels: str | None = None  # of decodes: triton, torch; null: triton on a card that can, else torch
    budget_s: float | None = None  # seconds for everything together; null: no limit
    dry_run: bool = False  # print the plan with its times, and measure nothing
    resume: list[str] = field(default_factory=list)  # archives of earlier calls, or folders with them; `out` counts too
    out: str = ""
    seed: int = 0

    def __post_init__(self) -> None:
        require_finite(self)
        require_finite(self.live, "live.")
        require(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        require(self.budget_s is None or self.budget_s > 0, "budget_s", self.budget_s, "null or above 0")
        require(bool(self.models), "models", self.models, "at least one model")
        require(len(set(self.models)) == len(self.models), "models", self.models, "each model once")
        text = [] if self.text_model is None else [self.text_model]
        unknown = sorted({*self.live.pair, *text} - set(self.models))
        require(not unknown, "models", self.models, f"with {', '.join(unknown)}, which is to be served")
        require(len(self.live.pair) in (0, 2), "live.pair", self.live.pair, "two models or none")
        require(self.last_model not in self.models, "last_model", self.last_model, "a model that is not among models")
        simulated = {*self.live.pair, *([self.last_model] if self.last_model else [])}
        missing = sorted(simulated - set(self.live.exits)) if self.live.exits else []
        require(not missing, "live.exits", dict(self.live.exits), f"with {', '.join(missing)}, or none at all")
        loads = bool(self.live.loads) and all(load > 0 for load in self.live.loads)
        require(loads, "live.loads", self.live.loads, "at least one load, each above 0")
        require(self.seed >= 0, "seed", self.seed, "at least 0")
