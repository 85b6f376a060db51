"""Turns settings into the parts of a run: workload, models with their exits, situation."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TypeVar

from helios_sim.engine.simulated import ModelData
from helios_sim.errors import UserError
from helios_sim.exits.artificial import no_exits
from helios_sim.exits.published import THRESHOLD
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.exits.store import load_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation
from helios_sim.profile.memory import MemoryBudget
from helios_sim.profile.pace import at_pace
from helios_sim.profile.profile import Profile
from helios_sim.profile.runtime import preset
from helios_sim.profile.spec import Runtime
from helios_sim.profile.store import PROFILES_FOLDER, load_profile
from helios_sim.provenance import ProvenanceClass
from helios_sim.study.foresight import Foresight, expected_load
from helios_sim.study.schema import ArrivalsConfig, Config, LengthConfig, LengthsConfig, MixConfig, WorkloadConfig
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
    Workload,
    read_trace,
)

PROFILE_RUNTIME = "profile"  # a preset's name: host costs as the profile has them, which a measured one measured

_Enum = TypeVar("_Enum", bound=StrEnum)
_Value = TypeVar("_Value", float, int, str)


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything a server needs besides its policy."""

    workload: Workload
    models: Mapping[str, ModelData]
    situation: Situation


def choose(kind: type[_Enum], key: str, value: str) -> _Enum:
    members = {member.value: member for member in kind}
    if value not in members:
        raise UserError(key, value, f"one of {', '.join(members)}", f"set {key} to one of these")
    return members[value]


def build(config: Config, seed: int, tasks: Collection[str] | None = None) -> Parts:
    """`tasks`: what its replicas are meant for, of the workload's (None: all of them).

    UserError where a setting is missing, unknown or out of range, or a file cannot be read.
    """
    workload = build_workload(config.workload)
    profiles = {name: build_profile(config, name) for name in config.models}
    models, candidates = {}, {}
    for name, profile in profiles.items():
        trace = exit_trace(config, name, profile)
        # of texts like those to be served, whatever else was recorded
        offline = offline_exits(trace, threshold(config), confidence(config), tasks or workload.mix.tasks)
        if trace.provenance.provenance_class is ProvenanceClass.MEASURED:
            profile = _with_tokens_of(offline.chars_per_token, profile)
        models[name] = ModelData(profile, trace.bind(workload.mix.tasks))
        candidates[name] = Candidate(profile, offline)
    card = next(iter(profiles.values())).hardware
    situation = Situation(
        candidates=candidates,
        memory=MemoryBudget(card.hbm_bytes, config.server.memory_utilisation, config.server.block_tokens),
        objective=objective_of(config, candidates),
        max_running_requests=config.server.max_running_requests,
        max_batch_tokens=config.server.max_batch_tokens,
        seed=seed,
        expected=expected_load(workload, seed),
        outlook=Foresight(workload, seed, models),
        schedule_ahead=config.server.schedule_ahead,
        order=config.server.order,
        vllm_v1=config.server.scheduler == "vllm_v1",
    )
    if config.server.order == "priority" and not workload.has_priorities:
        raise UserError(
            "server.order", "priority", "requests that carry priorities: here all would be alike",
            "set workload.mix.priorities, or take a trace in its own order that has a column priority",
        )  # fmt: skip
    return Parts(workload, models, situation)


def objective_of(config: Config, candidates: Mapping[str, Candidate]) -> Objective:
    c = config.objective
    goal = choose(Goal, "objective.goal", c.goal)
    if c.bits_reference is not None and c.bits_reference not in candidates:
        raise UserError("objective.bits_reference", c.bits_reference, f"one of {', '.join(candidates)}", "name a model")
    if c.max_bits_ratio is not None or goal is Goal.QUALITY:
        unknown = [name for name, candidate in candidates.items() if candidate.offline.bits_per_char is None]
        if unknown:
            key, value = ("goal", c.goal) if c.max_bits_ratio is None else ("max_bits_ratio", c.max_bits_ratio)
            raise UserError(
                f"objective.{key}",
                value,
                f"needs exit traces of human text with bits, which {', '.join(unknown)} lacks in {config.exits.source}",
                "leave it out, or take other traces (exits.source)",
            )
    return Objective(
        goal,
        c.max_disagreement,
        max_bits_per_char=c.max_bits_per_char,
        max_bits_ratio=c.max_bits_ratio,
        bits_reference=c.bits_reference,
        max_response_time_s=c.max_response_time_s,
    )


def build_profile(config: Config, model: str) -> Profile:
    folder = PROFILES_FOLDER if config.profile_folder is None else Path(config.profile_folder)
    profile = load_profile(f"{model}@{config.hardware}", folder)
    profile = profile.with_runtime(build_runtime(config, profile.runtime))
    return at_pace(profile, config.profile_time_factor, config.profile_prompt_time_factor)


def _with_tokens_of(chars_per_token: float, profile: Profile) -> Profile:
    """Prompts in tokens as long as they were measured to be on these texts, which a profile can only assume."""
    kept = tuple(a for a in profile.provenance.assumptions if a.change != "model.chars_per_token")
    return replace(
        profile,
        model=replace(profile.model, chars_per_token=chars_per_token),
        provenance=replace(profile.provenance, assumptions=kept),
    )


def build_runtime(config: Config, of_profile: Runtime) -> Runtime:
    """The named host costs, or those that came with the profile."""
    runtime = of_profile if config.runtime.preset == PROFILE_RUNTIME else preset(config.runtime.preset)
    for key in ("launch_s_per_layer", "launch_s_per_graph", "sync_s", "host_overhead_s"):
        value = getattr(config.runtime, key)
        if value is not None:
            sources = tuple((name, text) for name, text in runtime.sources if name != key)
            runtime = replace(runtime, **{key: value}, sources=(*sources, (key, f"set by runtime.{key}")))
    return runtime


def threshold(config: Config) -> float:
    return THRESHOLD if config.exits.threshold is None else config.exits.threshold


def confidence(config: Config) -> Confidence:
    return choose(Confidence, "exits.confidence", config.exits.confidence)


def exit_trace(config: Config, model: str, profile: Profile) -> ExitTrace:
    exits = config.exits
    if exits.source == "none":
        return no_exits(profile.model)
    return load_trace(model, exits.source.replace("{model}", model), **exits.parameters)


def build_workload(config: WorkloadConfig) -> Workload:
    return Workload(
        _arrivals(config.arrivals), _lengths(config.lengths), _mix(config.mix), config.n_requests,
        config.chars_per_token,
    )  # fmt: skip


def _given(key: str, value: _Value | None, why: str) -> _Value:
    if value is None:
        raise UserError(key, None, f"{why} needs a value", f"set {key}")
    return value


def _unknown(key: str, value: str, kinds: str) -> UserError:
    return UserError(key, value, f"one of {kinds}", f"set {key} to one of these")


def _arrivals(c: ArrivalsConfig) -> Arrivals:
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
            return TraceArrivals(_recorded("workload.arrivals.trace", c.trace), c.rate_scale)
    raise _unknown("workload.arrivals.kind", c.kind, "poisson, gamma, constant, all_at_once, closed_loop, trace")


def _recorded(key: str, path: str | None) -> RequestTrace:
    try:
        return read_trace(_given(key, path, "a trace"))
    except TraceFileError as error:
        raise error.about(key) from error


def _lengths(c: LengthsConfig) -> Lengths:
    match c.kind:
        case "drawn":
            return DrawnLengths(
                _length("workload.lengths.prompt", c.prompt), _length("workload.lengths.output", c.output)
            )
        case "trace":
            return TraceLengths(_recorded("workload.lengths.trace", c.trace), c.resample)
    raise _unknown("workload.lengths.kind", c.kind, "drawn, trace")


def _length(key: str, c: LengthConfig) -> Length:
    def made(kind: Callable[..., Length], *values: float | None) -> Length:
        """Specifications name a setting of lengths in general; here it is known whether it is the prompt's."""
        try:
            return kind(*values)
        except UserError as error:
            raise error.about(key + error.key.removeprefix("workload.lengths")) from error

    match c.kind:
        case "fixed":
            return made(Fixed, _given(f"{key}.value", c.value, "a fixed length"))
        case "exponential":
            return made(Exponential, _given(f"{key}.mean", c.mean, "an exponential length"), c.minimum, c.maximum)
        case "lognormal":
            limits = (c.minimum, c.maximum)
            if c.p50 is not None:
                p95 = _given(f"{key}.p95", c.p95, "lognormal with p50")
                return made(Lognormal.from_percentiles, c.p50, p95, *limits)
            sigma = _given(f"{key}.sigma", c.sigma, "lognormal")
            if c.median is not None:
                return made(Lognormal, c.median, sigma, *limits)
            return made(Lognormal.from_mean, _given(f"{key}.mean", c.mean, "lognormal"), sigma, *limits)
    raise _unknown(f"{key}.kind", c.kind, "fixed, lognormal, exponential")


def task_names(c: MixConfig) -> tuple[str, ...]:
    """All tasks of the mix, by the number that requests carry."""
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
