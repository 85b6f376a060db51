"""Settings of serving on a device, and of comparing that with its simulation. Plain types, filled by Hydra."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isfinite

from helios_sim.errors import UserError

SIMULATE, LIVE = "simulate", "live"
MODES = (SIMULATE, LIVE)
DTYPES = ("float32", "bfloat16")


@dataclass
class LiveConfig:
    """What `mode=live` needs beside the study's own settings; without it nothing here does anything."""

    device: str = "cpu"  # cpu, cuda, cuda:N; `device=...` for short
    dtype: str | None = None  # float32, bfloat16; null: as in the profile
    threads: int | None = None  # of a CPU; null: all that the process may use
    weights: dict[str, str] = field(default_factory=dict)  # by model: folder, .gguf file or hub id; else by its name
    heads: dict[str, str] = field(default_factory=dict)  # by model: folder of exit heads; else those shipped for it
    texts: str | None = None  # folder of TASK.txt, or one file for all tasks; null: those of `make models`
    warm_up: int = 3  # iterations of each kind before time begins
    seed: int = 0  # of torch, where anything is drawn at all; the requests go by `seeds`
    score: bool = False  # afterwards read every answer once more at full depth: only then is agreement known
    run: int = 0  # which of several runs of the same: they are different results
    # Every so many seconds stop the clock and time one of the two steps that the calibration timed, in turns; null, and
    # wherever energy is counted: both before and after the run only.
    pace_every_s: float | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None and self.dtype not in DTYPES:
            raise UserError("live.dtype", self.dtype, f"null or one of {', '.join(DTYPES)}", "choose one of these")
        name, _, number = self.device.partition(":")
        if name not in ("cpu", "cuda") or (":" in self.device and (name == "cpu" or not number.isdigit())):
            raise UserError("live.device", self.device, "cpu, cuda or cuda:N", "choose one of these")
        for key, least in (("threads", 1), ("warm_up", 0), ("seed", 0), ("run", 0)):
            value = getattr(self, key)
            if value is not None and value < least:
                raise UserError(f"live.{key}", value, f"at least {least}", f"set live.{key} accordingly")
        if self.pace_every_s is not None and not self.pace_every_s > 0:
            raise UserError("live.pace_every_s", self.pace_every_s, "null or above 0", "leave it out")


@dataclass
class LiveFidelityConfig:
    """With loads the study is a comparison: every arm at every load, simulated, and served in passes over them all."""

    loads: list[float] = field(default_factory=list)  # over each arm's own capacity, as simulated; above 1: overload
    seconds: float = 12.0  # of arrivals in each of them
    least_requests: int = 12  # in each of them, however slow the arm
    passes: int = 2  # everything is served so often; how far these runs differ is the noise floor
    calibrate_s: float | None = None  # measure a profile just before, in so long for each model; null: as it is shipped

    def __post_init__(self) -> None:
        if not all(isfinite(load) and load > 0 for load in self.loads) or len(set(self.loads)) != len(self.loads):
            raise UserError("fidelity_live.loads", list(self.loads), "different numbers above 0", "correct them")
        for key in ("seconds", "least_requests", "calibrate_s"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UserError(f"fidelity_live.{key}", value, "above 0", f"set fidelity_live.{key} accordingly")
        if self.passes < 2:
            why = "at least 2: of one there is no noise floor"
            raise UserError("fidelity_live.passes", self.passes, why, "set fidelity_live.passes accordingly")
