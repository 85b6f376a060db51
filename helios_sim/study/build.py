"""Turns settings into the parts of a run: models with their exits, the situation, and an arm's policy."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from helios_sim.engine.simulated import ModelData
from helios_sim.errors import UserError
from helios_sim.exits.artificial import no_exits, stated_exits
from helios_sim.exits.guarantee import NO_TOKEN, Certified, Promise, certify, split
from helios_sim.exits.replay import OfflineExits, offline_exits
from helios_sim.exits.rule import MEASURES, Confidence
from helios_sim.exits.store import load_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.live.energy import may_be_counted
from helios_sim.policy.registry import PolicyConfig, parameters_of, policy_config
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation
from helios_sim.profile.catalog import published_model
from helios_sim.profile.formats import named_format
from helios_sim.profile.pace import at_pace
from helios_sim.profile.predictor import with_predictor
from helios_sim.profile.profile import MemoryBudget, Profile
from helios_sim.profile.resolve import find_profile, in_precision
from helios_sim.profile.runtimes import preset
from helios_sim.profile.spec import HardwareSpec, Runtime
from helios_sim.profile.store import load_profile
from helios_sim.provenance import ProvenanceClass
from helios_sim.request import Slo
from helios_sim.study.limits import check_times
from helios_sim.study.modes import LIVE
from helios_sim.study.schema import DISCARDED, Config
from helios_sim.study.workload import Foresight, build_workload, choose, expected_load
from helios_sim.workload import (
    Workload,
)

PROFILE_RUNTIME = "profile"  # name of a preset: the profile's own host costs, measured if the profile is

_Enum = TypeVar("_Enum", bound=StrEnum)
_Value = TypeVar("_Value", float, int, str)
MOST_COUNTED_W = 1e5  # largest power that a device's counter can tell
# Keys of an arm's entry that are not parameters of its policy.
OF_THE_ARM = ("policy", "description", "baseline", "overrides", "sweeps_only")


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything a server needs besides its policy."""

    workload: Workload
    models: Mapping[str, ModelData]
    situation: Situation
    recorded: Mapping[str, ExitTrace]  # by model, exits that policies know beforehand: all, or a part set apart


def build(config: Config, seed: int, tasks: Collection[str] | None = None) -> Parts:
    """Build the parts. `tasks`: the workload's tasks that the replicas are meant for; None for all.

    Raises UserError if a setting is missing, unknown or out of range, or a file cannot be read.
    """
    shares = config.server.enable_prefix_caching
    workload = build_workload(config.workload, shares=shares)
    profiles = {name: build_profile(config, name) for name in config.models}
    models, candidates, recorded = {}, {}, {}
    for name, profile in profiles.items():
        recorded[name], trace = recorded_and_served(config, name, profile)
        # on texts of the served tasks, whatever else was recorded
        offline = known_offline(config, recorded[name], tasks or workload.mix.tasks)
        if trace.provenance.provenance_class is ProvenanceClass.MEASURED:
            profile = _with_tokens_of(offline.chars_per_token, profile)
        models[name] = ModelData(profile, trace.bind(workload.mix.tasks))
        candidates[name] = Candidate(profile, offline)
    served = next(iter(models.values())).profile.model
    workload = build_workload(config.workload, served.chars_per_token, shares)
    card = next(iter(profiles.values())).hardware
    situation = Situation(
        candidates=MappingProxyType(candidates),  # read-only, since arms and seeds share it
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
        prefill_first=config.server.scheduler in ("vllm_v0", "sglang"),
        keeps_answers=config.server.scheduler == "trtllm",
        whole_prompts=config.server.scheduler in ("vllm_v0", "trtllm"),
        wait_iterations=config.server.batch_wait_iterations,
        wait_tokens=config.server.batch_wait_tokens,
        shares=shares,
        prefixes=workload.prefixes if shares else None,
        slo=Slo(**vars(config.slo)),
        power_w=_power_w(config, card),
        busy_w=None if config.mode == LIVE or card.least_busy_w is None else card.busy_w(1.0),
    )
    if config.server.order == "priority" and not workload.has_priorities:
        raise UserError(
            "server.order", "priority", "requests that carry priorities: here all would be alike",
            "set workload.mix.priorities, or take a trace in its own order that has a column priority",
        )  # fmt: skip
    check_times(workload, models, situation)
    return Parts(workload, models, situation, recorded)


def _power_w(config: Config, card: HardwareSpec) -> tuple[float, float] | None:
    """Return a replica's power, idle and at its card's limit; live, the range of a counter. None if it is not known."""
    if config.mode == LIVE:
        return (0.0, MOST_COUNTED_W) if all(map(may_be_counted, config.live.used)) else None
    return None if card.idle_w is None or card.tdp_w is None else (card.idle_w, card.tdp_w)


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
    if config.profile_folder is None:
        profile = find_profile(model, config.device, precision=config.precision, kernels=config.server.kernels)
    else:  # a named folder means its profiles and no others
        profile = load_profile(f"{model}@{config.device}", Path(config.profile_folder).expanduser())
        profile = in_precision(profile, config.precision)
    profile = profile.with_runtime(build_runtime(config, profile.runtime))
    if config.runtime.load_gb_per_s is not None:
        profile = profile.with_load_rate(config.runtime.load_gb_per_s * 1e9)
    if config.runtime.disk_gb_per_s is not None:
        profile = profile.with_disk_rate(config.runtime.disk_gb_per_s * 1e9)
    if config.server.sleep_level == DISCARDED:
        profile = profile.from_files()
    if MEASURES[confidence(config)].proposes:
        profile = with_predictor(profile)
    return at_pace(profile, config.profile_time_factor, config.profile_prompt_time_factor)


def _with_tokens_of(chars_per_token: float, profile: Profile) -> Profile:
    """Return the profile with the characters per token measured on these texts, in place of its assumption."""
    model = replace(profile.model, chars_per_token=chars_per_token)
    return replace(profile, model=model, provenance=profile.provenance.without(["chars_per_token"]))


def build_runtime(config: Config, of_profile: Runtime) -> Runtime:
    """Return the host costs of the named preset, or those of the profile, changed as the settings say."""
    runtime = of_profile if config.runtime.preset == PROFILE_RUNTIME else preset(config.runtime.preset)
    return runtime.changed(**config.runtime.costs())


def threshold(config: Config) -> float:
    """Return the given threshold, else the published one; with a promise, the lowest that keeps it for all models."""
    if config.exits.guarantee.max_disagreement is not None:
        return max(certified.threshold for certified in promised(config).values())
    if config.exits.threshold is not None:
        return config.exits.threshold
    from helios_sim.exits.published import THRESHOLD

    return THRESHOLD


_Asked = tuple[float, Confidence, frozenset[str]]
_offline: WeakKeyDictionary[ExitTrace, dict[_Asked, OfflineExits]] = WeakKeyDictionary()


def known_offline(config: Config, recorded: ExitTrace, tasks: Collection[str]) -> OfflineExits:
    """Return what policies know of a model's exits beforehand, summed once for all runs of a process."""
    of_trace = _offline.setdefault(recorded, {})
    asked = threshold(config), confidence(config), frozenset(tasks)
    if asked not in of_trace:
        of_trace[asked] = offline_exits(recorded, *asked)
    found = of_trace[asked]
    if config.exits.guarantee.max_disagreement is None:
        return found
    return replace(found, certified_caps=promised(config)[recorded.model].caps)


def recorded_and_served(config: Config, model: str, profile: Profile) -> tuple[ExitTrace, ExitTrace]:
    """Return the exits by which settings are chosen, and those of requests; they differ only if there is a promise."""
    trace, guarantee = exit_trace(config, model, profile), config.exits.guarantee
    if guarantee.max_disagreement is None:
        return trace, trace
    return split(trace, guarantee.calibration_share, guarantee.seed)


_promised: dict[str, Mapping[str, Certified]] = {}


def promised(config: Config) -> Mapping[str, Certified]:
    """Return by model what keeps the promise of `exits.guarantee`, for the mix of tasks and the one it drifts to.

    Raises UserError if published exits, which have one threshold, do not keep the promise at it.
    """
    mix, guarantee = config.workload.mix, config.exits.guarantee
    key = repr((config.models, config.exits, mix.tasks, mix.after, config.profile_folder, config.hardware))
    if key not in _promised:
        assert guarantee.max_disagreement is not None
        each = Promise(guarantee.max_disagreement, guarantee.failure / len(config.models))
        mixes = [shares for shares in (mix.tasks, mix.after) if shares]
        found = {}
        for model in config.models:
            recorded, _ = recorded_and_served(config, model, build_profile(config, model))
            found[model] = certify(recorded, confidence(config), each, mixes or [{}])
            if found[model].threshold == NO_TOKEN and recorded.published_threshold is not None:
                only = f"{recorded.published_threshold:g}, the only one that is published"
                allowed = f"what {model} keeps at its threshold {only}"
                raise UserError("exits.guarantee.max_disagreement", each.max_disagreement, allowed,
                                "raise it, or take a measured trace (exits.source)")  # fmt: skip
        _promised[key] = found
    return _promised[key]


def confidence(config: Config) -> Confidence:
    return choose(Confidence, "exits.confidence", config.exits.confidence)


def exit_trace(config: Config, model: str, profile: Profile) -> ExitTrace:
    exits = config.exits
    if exits.source == "none":
        return no_exits(profile.model)
    if exits.source == "stated":
        return stated_exits(profile.model, **_stated(exits.parameters, config.models, model))
    recorded = named_format(model)[0] if exits.source == "published" else model  # published for bf16 weights
    trace = load_trace(recorded, exits.source.replace("{model}", model), **exits.parameters)
    if trace.n_layers != profile.model.n_layers:
        allowed = f"exits of the model profiled: those there end at layer {trace.n_layers}, its last is"
        fix = "take a trace and a profile of the same model"
        raise UserError("exits.source", exits.source, f"{allowed} {profile.model.n_layers}", fix)
    return trace


def _stated(parameters: Mapping[str, Any], models: Collection[str], model: str) -> dict[str, Any]:
    """Return the parameters of a model's stated exits: its own group, or all models'. UserError for unknown ones."""
    known = ("layers", "unchanged", "confident", "seed", "drafted")
    if any(isinstance(value, Mapping) for name, value in parameters.items() if name != "drafted"):
        if not set(parameters) >= set(models):
            allowed = f"a group for each model, {', '.join(models)}, or parameters of all models"
            raise UserError("exits.parameters", sorted(parameters), allowed, "add the groups that are missing")
        for name in set(parameters) - set(models):  # other arms may serve them
            published_model(name, "exits.parameters")
        parameters = parameters[model]
    for name in parameters:
        if name not in known:
            allowed = f"with exits.source=stated one of {', '.join(known)}, or a group of these for each model"
            raise UserError(f"exits.parameters.{name}", parameters[name], allowed, "leave it out")
    return {"layers": (), "unchanged": (), **parameters}


@dataclass(frozen=True, slots=True)
class Arm:
    """One policy of a study, with settings of its own."""

    name: str
    policy: PolicyConfig
    description: str | None = None
    baseline: str | None = None  # the arm to compare with, if not the study's baseline
    overrides: Mapping[str, Any] = field(default_factory=dict)  # of the study's settings, by dotted path


def arm_of(name: str, entry: Mapping[str, Any], config: Config) -> Arm:
    """Return an arm from its entry. UserError, which names the arm, for an unknown parameter or a wrong value."""
    with in_arm(name, config):
        return Arm(
            name,
            policy_of(entry, config),
            description=entry.get("description"),
            baseline=entry.get("baseline"),
            overrides=dict(entry.get("overrides") or {}),
        )


def policy_of(entry: Mapping[str, Any], config: Config) -> PolicyConfig:
    """Return the entry's policy, with the threshold and confidence of the exits' settings unless it has its own."""
    name = str(entry["policy"])
    settings = {key: value for key, value in entry.items() if key not in OF_THE_ARM}
    for key, value in (("threshold", threshold(config)), ("confidence", confidence(config).value)):
        if key in parameters_of(name) and settings.get(key) is None:
            settings[key] = value
    return policy_config(name, settings)


@contextmanager
def in_arm(name: str, config: Config) -> Iterator[None]:
    """Name the arm in a UserError that is raised inside."""
    try:
        yield
    except UserError as error:
        if name not in config.arms:  # the arm that `policy` added
            raise
        raise error.about(f"arms.{name}: {error.key}") from error
