"""Settings of `python -m helios_sim.serve`: the settings of a study, and `serve.*` for address, keys and limits."""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from helios_sim.errors import UserError, require, require_finite
from helios_sim.study.answer_routers import ROUTERS
from helios_sim.study.jobs import Job
from helios_sim.study.modes import SIMULATE
from helios_sim.study.plan import entries_of, jobs_of
from helios_sim.study.schema import Config

KEY_VARIABLE = "HELIOS_API_KEY"


ONE_ENGINE = "with mode=live one engine serves all clients"
# Settings of a study that have no effect on a server.
OF_STUDIES = (
    "sweeps", "figures", "published", "gates", "headline_metrics", "pictures", "report", "trace", "jobs", "sweep",
    "fidelity", "fidelity_live", "profile_band", "capacity", "baseline", "slo", "cost", "auto_seeds", "live.texts",
    "live.score", "live.run", "live.pace_every_s", "next_best", "from_log", "log", "name", "title", "question",
    "workload.statement",
)  # fmt: skip


@dataclass
class ServeConfig:
    host: str = "127.0.0.1"  # an address that other machines can reach needs an API key
    port: int = 8000  # 0: any free port
    api_key_file: str | None = None  # a file with one key on each line; null: the variable HELIOS_API_KEY, if it is set
    tokenizers: dict[str, str] = field(default_factory=dict)  # mode=simulate: by model, a folder with tokenizer.json
    name: str = "helios"  # the model name by which clients ask for the model that the policy has loaded
    # The arm of the experiment that serves; null: the arm of policy=, else the subject, else the last
    arm: str | None = None
    speedup: float = 1.0  # mode=simulate: simulated seconds per second of the wall clock
    temperature: float = 0.0  # for requests that name none; 0: the likeliest token, for which exits were calibrated
    max_model_len: int = 2048  # most tokens of a request, prompt and answer together; vLLM's name
    max_tokens: int | None = None  # most output tokens that a request may ask for; null: limited by max_model_len
    max_queue: int = 1024  # most open requests beyond those that can run at once; further ones get 429
    streams_per_client: int = 1024  # most open requests of one client (told apart by key, or else by address)
    max_body_bytes: int = 4 << 20
    body_timeout_s: float = 20.0  # longest time for the body of a request to arrive
    request_timeout_s: float = 600.0  # from a request's arrival to its last token
    records: str | None = None  # a file that gets a line of JSON for each answer: times and tokens, no text
    drain_s: float = 60.0  # how long SIGTERM waits for answers before it aborts them

    def __post_init__(self) -> None:
        require_finite(self, "serve.")
        require(0 <= self.port <= 65535, "serve.port", self.port, "from 0 to 65535")
        require(bool(self.name.strip()), "serve.name", self.name, "a name")
        require(0 < self.speedup <= 1e6, "serve.speedup", self.speedup, "above 0 and at most 1e6")
        require(0 <= self.temperature <= 2, "serve.temperature", self.temperature, "from 0 to 2")
        require(2 <= self.max_model_len < 2**31, "serve.max_model_len", self.max_model_len, "from 2 to 2^31 - 1")
        most = self.max_tokens
        require(most is None or most >= 1, "serve.max_tokens", most, "null, or at least 1")
        require(self.max_queue >= 0, "serve.max_queue", self.max_queue, "at least 0")
        for key in ("streams_per_client", "max_body_bytes"):
            require(getattr(self, key) >= 1, f"serve.{key}", getattr(self, key), "at least 1")
        for key in ("body_timeout_s", "request_timeout_s", "drain_s"):
            require(getattr(self, key) > 0, f"serve.{key}", getattr(self, key), "above 0")

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


@dataclass
class ServedConfig(Config):
    serve: ServeConfig = field(default_factory=ServeConfig)

    def study(self) -> Config:
        """The settings without `serve`."""
        return Config(**{f.name: getattr(self, f.name) for f in fields(Config)})


def check_words(words: Sequence[str]) -> None:
    """Raises UserError for a word of the command line that has no effect on a server."""
    for word in words:
        key, _, value = word.lstrip("+~").partition("=")
        if any(key == name or key.startswith(f"{name}.") for name in OF_STUDIES):
            raise UserError(key, value, "does nothing when serving: it is about studies", "leave it out")


def served_job(config: Config, serve: ServeConfig) -> Job:
    """The job of the arm that serves, with the arm's own overrides. UserError for settings that cannot be served."""
    arms = entries_of(config)
    name = serve.arm or (list(arms)[-1] if config.policy is not None else config.subject or list(arms)[-1])
    if name not in arms:
        raise UserError("serve.arm", name, f"one of {', '.join(arms)}", "name an arm of the experiment")
    if config.seeds == "auto":
        raise UserError("seeds", "auto", "a list with one seed when serving", "set seeds=[0]")
    job = jobs_of(config, name)[0]
    server, faults = job.config.server, job.config.workload.faults.strikes
    for key, value, holds, why in (
        ("server.enable_prefix_caching", True, not server.enable_prefix_caching,
         "what clients' prompts have in common is not looked for"),
        ("policy", job.arm.policy.name, job.arm.policy.name != "oracle", "what no policy can know is not known here"),
        ("seeds", list(job.config.seeds), len(job.config.seeds) == 1, "there is one run"),
        ("serve.tokenizers", dict(serve.tokenizers), not serve.tokenizers or job.config.mode == SIMULATE,
         "a real model has its own"),
        ("server.router", server.router, server.router not in ROUTERS,
         "it goes by recorded confidences and bits, and those of clients' texts are not recorded"),
        ("server.replicas", server.replicas, server.replicas == 1 or job.config.mode == SIMULATE, ONE_ENGINE),
        ("cluster.kinds", list(job.config.cluster.kinds), not job.config.cluster.kinds or job.config.mode == SIMULATE,
         ONE_ENGINE),
        ("workload.faults", list(faults), not faults, "faults strike at times of a run, and a server has no end"),
        ("serve.temperature", serve.temperature, serve.temperature == 0 or job.config.mode != SIMULATE,
         "simulated tokens are not drawn; this counts when mode=live"),
        ("serve.speedup", serve.speedup, serve.speedup == 1 or job.config.mode == SIMULATE,
         "a device is as fast as it is; this counts when mode=simulate"),
    ):  # fmt: skip
        if not holds:
            raise UserError(key, value, f"left out when serving: {why}", "leave it out")
    return job
