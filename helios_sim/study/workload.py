"""Makes the workload that settings describe, and tells what is known of its requests beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from helios_sim.engine.simulated import ModelData
from helios_sim.errors import UserError, require, require_one_of
from helios_sim.exits.trace import MICROBITS
from helios_sim.help import conf_folder
from helios_sim.policy.telemetry import ExpectedLoad
from helios_sim.request import LONGEST, NS_PER_S, Request
from helios_sim.study.schema import (
    ArrivalsConfig,
    FaultsConfig,
    LastingFaultConfig,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    SessionsConfig,
    SlowCardConfig,
    WorkloadConfig,
)
from helios_sim.workload import (
    AllAtOnce,
    Arrivals,
    ClosedLoop,
    Constant,
    DrawnLengths,
    Drift,
    Exponential,
    Fixed,
    Gamma,
    Length,
    Lengths,
    LinearDrift,
    Lognormal,
    Per,
    PeriodicDrift,
    Poisson,
    RequestTrace,
    StepDrift,
    TaskMix,
    TraceArrivals,
    TraceFileError,
    TraceLengths,
    Uniform,
    Workload,
    generate,
    read_trace,
)
from helios_sim.workload.faults import FaultKind, FaultPlan, FaultSpec
from helios_sim.workload.prefixes import Sessions

_Enum = TypeVar("_Enum", bound=StrEnum)
_Value = TypeVar("_Value", float, int, str)


class Foresight:
    """The requests to come and the exits of their answers, for the oracle; generated when it asks."""

    def __init__(self, workload: Workload, seed: int, models: Mapping[str, ModelData]) -> None:
        self._workload, self._seed, self._models = workload, seed, models

    def requests(self) -> Sequence[Request]:
        return [request for block in generate(self._workload, self._seed) for request in block.rows()]

    def agreement(self, model: str, request: Request) -> NDArray[np.bool_]:
        bound = self._models[model].trace
        span = bound.locate(request.task, request.text_start, request.output_chars)
        rows: NDArray[np.bool_] = bound.trace.agree[span.indices()]
        return rows

    def bits(self, model: str, request: Request) -> NDArray[np.float64] | None:
        bound = self._models[model].trace
        if bound.trace.microbits is None:
            return None
        span = bound.locate(request.task, request.text_start, request.output_chars)
        return bound.trace.microbits[span.indices()] / MICROBITS


def expected_load(workload: Workload, seed: int, share: float | Sequence[float] = 1.0) -> ExpectedLoad:
    """Return what an operator knows beforehand: mean lengths, and the rate or the users.

    `share`: the share of all requests, or of each task's requests, that the server in question gets.
    """
    of_task = np.broadcast_to(np.asarray(share, np.float64), len(workload.mix.tasks))
    requests = 0
    ours = prompts = outputs = 0.0
    first_ns = last_ns = 0
    for block in generate(workload, seed):
        if not requests:
            first_ns = int(block.arrival_ns[0])
        weights = of_task[block.task]
        ours += float(weights.sum())
        prompts += float((weights * block.prompt_chars).sum())
        outputs += float((weights * block.output_chars).sum())
        requests += len(block)
        last_ns = int(block.arrival_ns[-1])
    span_s = (last_ns - first_ns) / NS_PER_S
    rate = (requests - 1) / span_s * (ours / requests) if span_s > 0 and workload.users is None else None
    users = None if workload.users is None else max(1, round(workload.users * ours / requests))
    return ExpectedLoad(prompts / ours, outputs / ours, rate, users)


def choose(kind: type[_Enum], key: str, value: str) -> _Enum:
    """Return the member with this value. UserError if there is none."""
    require_one_of(key, value, [member.value for member in kind])
    return kind(value)


OF_THE_MODEL = "model"  # a workload's chars_per_token: lengths are in tokens of the model that is served


def build_workload(config: WorkloadConfig, of_model: float = 4.0, shares: bool = False) -> Workload:
    """Make the workload, with `of_model` characters per token if lengths are in tokens of the model served.

    `shares`: also read what a trace says about the texts of its prompts.
    """
    chars = config.chars_per_token
    if isinstance(chars, str | bool) and chars != OF_THE_MODEL:
        raise UserError("workload.chars_per_token", chars, "a number, null or model", "English text has about 4")
    per_token = of_model if chars == OF_THE_MODEL else None if chars is None else float(chars)
    arrivals = _arrivals(config.arrivals, shares and config.arrivals.trace == config.lengths.trace)
    lengths = _lengths(config.lengths, config.arrivals.time_unit, shares)
    return Workload(
        arrivals, lengths, _mix(config.mix), config.n_requests, per_token, _system_prompts(config),
        _sessions(config.sessions), config.lengths.id_tokens,
    )  # fmt: skip


def _system_prompts(config: WorkloadConfig) -> tuple[int, ...] | None:
    tasks, lengths = task_names(config.mix), config.system_prompts
    for task, length in lengths.items():
        if task not in tasks:
            allowed = f"tasks of the mix: {', '.join(tasks)}"
            raise UserError("workload.system_prompts", task, allowed, "name one of them")
        require(0 < length <= LONGEST, f"workload.system_prompts.{task}", length, f"from 1 to {LONGEST}")
    return tuple(lengths.get(task, 0) for task in tasks) if lengths else None


def _sessions(c: SessionsConfig) -> Sessions | None:
    if c.users is None:
        return None
    return Sessions(c.users, _length("workload.sessions.turns", c.turns), c.max_tokens)


def _given(key: str, value: _Value | None, why: str) -> _Value:
    if value is None:
        raise UserError(key, None, f"{why} needs a value", f"set {key}")
    return value


def _unknown(key: str, value: str, kinds: str) -> UserError:
    return UserError(key, value, f"one of {kinds}", f"set {key} to one of these")


def _arrivals(c: ArrivalsConfig, texts: bool) -> Arrivals:
    def rate() -> float:
        return _given("workload.arrivals.rate_per_s", c.rate_per_s, f"{c.kind} arrivals")

    match c.kind:
        case "poisson":
            return Poisson(rate())
        case "gamma":
            return Gamma(rate(), _given("workload.arrivals.cv", c.cv, "gamma arrivals"))
        case "constant":
            return Constant(rate())
        case "all_at_once":
            return AllAtOnce()
        case "closed_loop":
            return ClosedLoop(_given("workload.arrivals.users", c.users, "a closed loop"))
        case "trace":
            return TraceArrivals(_recorded("workload.arrivals.trace", c.trace, c.time_unit, texts), c.rate_scale)
    raise _unknown("workload.arrivals.kind", c.kind, "poisson, gamma, constant, all_at_once, closed_loop, trace")


def _recorded(key: str, path: str | None, unit: str | None, texts: bool = False) -> RequestTrace:
    try:
        return read_trace(_given(key, path, "a trace"), time_unit=unit, texts=texts)
    except TraceFileError as error:
        raise error.about(key) from error


def _lengths(c: LengthsConfig, unit: str | None, texts: bool) -> Lengths:
    match c.kind:
        case "drawn":
            return DrawnLengths(
                _length("workload.lengths.prompt", c.prompt), _length("workload.lengths.output", c.output)
            )
        case "trace":
            return TraceLengths(_recorded("workload.lengths.trace", c.trace, unit, texts), c.resample)
    raise _unknown("workload.lengths.kind", c.kind, "drawn, trace")


def _length(key: str, c: LengthConfig) -> Length:
    def made(kind: Callable[..., Length], *values: float | None) -> Length:
        """Make a length. An error about lengths in general names the prompt's or the answer's setting."""
        try:
            return kind(*values)
        except UserError as error:
            raise error.about(key + error.key.removeprefix("workload.lengths")) from error

    match c.kind:
        case "fixed":
            return made(Fixed, _given(f"{key}.value", c.value, "a fixed length"))
        case "exponential":
            return made(Exponential, _given(f"{key}.mean", c.mean, "an exponential length"), c.minimum, c.maximum)
        case "uniform":
            return made(Uniform, c.minimum, _given(f"{key}.maximum", c.maximum, "a uniform length"))
        case "lognormal":
            limits = (c.minimum, c.maximum)
            if c.p50 is not None:
                p95 = _given(f"{key}.p95", c.p95, "lognormal with p50")
                return made(Lognormal.from_percentiles, c.p50, p95, *limits)
            sigma = _given(f"{key}.sigma", c.sigma, "lognormal")
            if c.median is not None:
                return made(Lognormal, c.median, sigma, *limits)
            return made(Lognormal.from_mean, _given(f"{key}.mean", c.mean, "lognormal"), sigma, *limits)
    raise _unknown(f"{key}.kind", c.kind, "fixed, lognormal, exponential, uniform")


def build_faults(c: FaultsConfig, replicas: int, seed: int) -> FaultPlan | None:
    """Return the plan of faults; None without faults. UserError for a replica that does not exist."""
    specs = []
    for kind, fault in c.strikes.items():
        if fault.replicas is not None and max(fault.replicas) >= replicas:
            allowed = f"numbers of replicas, from 0 to {replicas - 1}"
            raise UserError(f"workload.faults.{kind}.replicas", fault.replicas, allowed, "name some of these")
        specs.append(
            FaultSpec(
                FaultKind(kind),
                at_ns=tuple(sorted(round(time_s * NS_PER_S) for time_s in fault.at_s)),
                rate_per_hour=fault.rate_per_hour,
                replicas=None if fault.replicas is None else tuple(fault.replicas),
                lasts_ns=round(fault.lasts_s * NS_PER_S) if isinstance(fault, LastingFaultConfig) else 0,
                factor=fault.factor if isinstance(fault, SlowCardConfig) else 1.0,
            )
        )
    return FaultPlan(tuple(specs), c.retries, seed) if specs else None


def task_names(c: MixConfig) -> tuple[str, ...]:
    """Return all tasks of the mix, by the number that requests carry."""
    return tuple(dict.fromkeys((*c.tasks, *c.after)))


def _mix(c: MixConfig) -> TaskMix:
    tasks = task_names(c)
    shares = tuple(float(c.tasks.get(task, 0.0)) for task in tasks)
    after = tuple(float(c.after.get(task, 0.0)) for task in tasks) if c.after else None
    unknown = [task for task in c.priorities if task not in tasks]
    if unknown:
        raise UserError("workload.mix.priorities", unknown, f"tasks of the mix: {', '.join(tasks)}", "name one of them")
    priorities = tuple(c.priorities.get(task, 0) for task in tasks) if c.priorities else None
    return TaskMix(tasks, shares, after, _drift(c), choose(Per, "workload.mix.per", c.per), priorities)


def _drift(c: MixConfig) -> Drift | None:
    def position(name: str) -> float:
        value: float | None = getattr(c, name)
        most = 1.0 if name in ("at", "start") else 10.0  # the others may lie beyond the run
        if value is not None and value > most and c.per == "requests":
            allowed = f"from 0 to {most:g}, a share of the requests: what comes later comes never"
            raise UserError(f"workload.mix.{name}", value, allowed, "correct it, or set workload.mix.per=seconds")
        return _given(f"workload.mix.{name}", value, f"{c.drift} drift")

    match c.drift:
        case None:
            return None
        case "step":
            return StepDrift(position("at"))
        case "linear":
            return LinearDrift(position("start"), position("end"))
        case "periodic":
            return PeriodicDrift(position("period"))
    raise _unknown("workload.mix.drift", c.drift, "step, linear, periodic, null")


def statement(config: WorkloadConfig) -> str:
    """Return what the workload stands for: its file's words if lengths and mix are the file's, else the settings.

    Arrivals have to be the file's too if its sentence speaks of them.
    """
    for file in sorted(Path(conf_folder()).glob("[we]*/*.yaml")):  # workloads and experiments
        text = file.read_text(encoding="utf-8")
        if config.statement and " ".join(config.statement.split()) in " ".join(text.split()):
            given = yaml.safe_load(text)
            given = given.get("workload", given)
            named = ["lengths", "mix", *(["arrivals"] if "arrival" in config.statement else [])]
            alike = all(_as_given(getattr(config, name), given.get(name, {})) for name in named)
            alike = alike and dict(config.system_prompts) == given.get("system_prompts", {})
            if not alike or config.sessions.users != given.get("sessions", {}).get("users"):
                return _in_words(config)
    return config.statement or _in_words(config)


def _as_given(settings: object, given: object) -> bool:
    """Whether the settings are equal to a file's; mappings of names are compared as a whole."""
    if not isinstance(given, Mapping):
        return settings == given
    if isinstance(settings, Mapping):
        return dict(settings) == dict(given)
    return all(_as_given(getattr(settings, key), value) for key, value in given.items())


def _in_words(config: WorkloadConfig) -> str:
    lengths, mix = config.lengths, config.mix
    of_trace = f"Lengths of {lengths.trace}" + (", resampled" if lengths.resample else "")
    drawn = f"Prompts of {lengths.prompt.kind} and answers of {lengths.output.kind} lengths"
    tasks = ", ".join(mix.tasks) + (f", drifting to {', '.join(mix.after)}" if mix.after else "")
    arrivals = f"arrivals of {config.arrivals.trace}" if config.arrivals.kind == "trace" else (
        f"arrivals: {config.arrivals.kind.replace('_', ' ')}"
    )
    system = f"; system prompts of {', '.join(config.system_prompts)}" if config.system_prompts else ""
    sessions = f"; sessions of {config.sessions.users} users" if config.sessions.users is not None else ""
    return f"{of_trace if lengths.kind == 'trace' else drawn}{system}{sessions}; {arrivals}; tasks: {tasks}."
