"""Studies on the measurements of a campaign: their exits and settings, live serving, and the headline comparison.

Exits are measured if the campaign traced the model, published if the literature has shares for it, carried over from
another model's published shares, or synthetic in a rehearsal.

The headline is what HELIOS gains on this device over early exits and full depth, for one user and for a full queue. It
is simulated from the profiles measured here, and served live beside a simulation of the same requests. Every arm
records where its times, exits and energy come from.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import partial
from math import floor
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.schema import CampaignConfig
from calibrate.stages import SHORT, Finished, NotEnoughTime, StageRun
from calibrate.work import ADAPTERS, TRACES
from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.published import EXIT_SHARES, TASKS as PUBLISHED_TASKS, published_trace
from helios_sim.exits.rule import Confidence
from helios_sim.exits.store import read_trace, write_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.live.checkpoint.known import KNOWN
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import RuntimeConfig
from helios_sim.profile.store import read_profile
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass
from helios_sim.shared_data import cache_folder
from helios_sim.study.command import run_study
from helios_sim.study.modes import LIVE, SIMULATE, LiveConfig, LiveFidelityConfig
from helios_sim.study.schema import (
    ArrivalsConfig,
    Config,
    ExitsConfig,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    ServerConfig,
    WorkloadConfig,
)
from helios_sim.validate.command import run_fidelity_live
from helios_sim.validate.live import NoTimeLeft, TimeLeft

MADE_UP = "text"  # the task of synthetic exits
SURE_HEAD, SURE_CHECK = 0.9, 0.8  # thresholds of a head's probability, and of a classifier's check
SURE_MADE_UP = 0.6
LENDER = "opt-6.7b"  # its published exits are used for models without published ones
# By model: the published layer of its early exit, and the share of its unconfident tokens that deeper layers leave
# unchanged (HELIOS, arXiv 2504.10724, by reading notes). How many tokens are confident there is not published.
CARRIED: Mapping[str, tuple[int, float]] = {"codellama-34b": (16, 0.90)}
SCRATCH = "scratch"  # folder in a stage that is not archived
WORDS = "The river ran high in March and the keeper of the bridge wrote down every cart that crossed it. "
UNHURRIED_S = 12.0  # seconds of arrivals in each live run without a budget
SERVING_SHARE = 0.6  # share of the allowed time; the rest is for opening models, overload's tails and figures
SHORTEST_S = 1.0
QUICK_S = 0.05


@dataclass(frozen=True, slots=True)
class StudyExits:
    """The exits of a study. `said` describes their origin; `origin` is one word for it."""

    settings: ExitsConfig
    tasks: Sequence[str]
    chars_per_token: float
    said: str
    origin: str  # measured, published, assumed, made up


NO_EXITS = StudyExits(ExitsConfig(source="none"), (MADE_UP,), 4.0, "none: full depth", "none")


def exits_of(
    config: CampaignConfig, profiles: Mapping[str, Profile], finished: Mapping[str, Finished], folder: Path
) -> StudyExits:
    """The exits of models that serve together. Traces are written to `folder`. Raises UserError if none are known."""
    if config.text_model is not None and config.text_model in profiles:
        return _measured(finished[TRACES], profiles[config.text_model])
    if config.live.exits:
        for model in profiles:
            trace = synthetic_trace(model, config.live.exits[model], (MADE_UP,), seed=config.seed)
            write_trace(trace, folder / model)
        exits = ExitsConfig(source=f"{folder}/{{model}}", threshold=SURE_MADE_UP)
        return StudyExits(exits, (MADE_UP,), 4.0, "made up, to rehearse", "made up")
    if set(profiles) <= set(EXIT_SHARES):
        said = "fitted to published shares; weights are random, so their text means nothing"
        return StudyExits(ExitsConfig(source="published", threshold=SURE_HEAD), PUBLISHED_TASKS, 4.2, said, "published")
    for model, profile in profiles.items():
        write_trace(carried_over(model, profile.model.n_layers, profile.model.chars_per_token), folder / model)
    exits = ExitsConfig(source=f"{folder}/{{model}}", threshold=SURE_HEAD)
    chars = next(iter(profiles.values())).model.chars_per_token
    said = f"assumed: shares as published for {LENDER}, at the model's own published exit"
    return StudyExits(exits, PUBLISHED_TASKS, chars, said, "assumed")


def carried_over(model: str, n_layers: int, chars_per_token: float) -> ExitTrace:
    """The lender's tokens at the model's published exit. Raises UserError for a model without a published exit."""
    if model not in CARRIED:
        allowed = f"exits are known for {', '.join((*EXIT_SHARES, *CARRIED))}"
        raise UserError("models", model, allowed, "name them in live.exits")
    layer, unchanged = CARRIED[model]
    lent = published_trace(LENDER, chars_per_token=chars_per_token)
    assert lent.confident is not None
    confident = lent.confident[:, 0]
    agree = np.ones_like(lent.agree)
    agree[:, 0] = confident | (np.random.default_rng(0).random(lent.n_tokens) < unchanged)
    (lent_layer, share), *_ = EXIT_SHARES[LENDER].items()
    why = f"published for {LENDER} at layer {lent_layer}; of {model} no share is published"
    return replace(
        lent,
        model=model,
        exits=(layer, n_layers),
        agree=agree,
        provenance=Provenance(
            ProvenanceClass.PUBLISHED,
            f"exits of {LENDER} at layer {layer} of {model}; {unchanged:.0%} of tokens not confident there unchanged: "
            "HELIOS (arXiv 2504.10724, reading notes)",
            f"calibrate.campaigns.headline.carried_over({model!r}, {n_layers}, {chars_per_token})",
            assumptions=(Assumption(f"{model} exits: share at layer {layer}", share, why, "exits.source"),),
        ),
    )


def _measured(traces: Finished, profile: Profile) -> StudyExits:
    place = traces.part("trace")
    trace = read_trace(place)
    checks = Confidence.CLASSIFIER in trace.confidences and profile.check_classifier is not None
    exits = ExitsConfig(
        source=str(place), threshold=SURE_CHECK if checks else SURE_HEAD,
        confidence="classifier" if checks else "max_probability",
    )  # fmt: skip
    said = f"measured by this campaign, {trace.n_tokens} tokens"
    return StudyExits(exits, trace.tasks, float(trace.chars.sum() / trace.n_tokens), said, "measured")


@dataclass(frozen=True, slots=True)
class Basis:
    """The settings of a study, its exits, and how far its profiles' times may be off (0 if none was cut short)."""

    config: Config
    exits: StudyExits
    within: float


def basis(
    config: CampaignConfig, models: Sequence[str], stage: StageRun, weights: Mapping[str, str], exits_known: bool = True
) -> Basis:
    """The common settings of a campaign's studies: profiles, exits and workload.

    `weights`: the weights of the models that are served live. `exits_known`: false for studies of full depth alone.
    """
    scratch = stage.folder / SCRATCH
    profiles = {model: _placed(stage.finished[f"profile-{model}"], scratch / "profiles") for model in models}
    card = profiles[models[0]].hardware.name
    exits = exits_of(config, profiles, stage.finished, scratch / "traces") if exits_known else NO_EXITS
    live = LiveConfig(device=config.device, threads=config.threads, weights=dict(weights))
    if config.text_model is not None and config.text_model in models and exits_known:
        live.heads = {config.text_model: str(stage.finished[ADAPTERS].part("heads"))}
        live.texts = str(_prompts(exits.tasks, scratch / "prompts"))
    else:
        files.write_text(scratch / "words.txt", WORDS * 200)
        live.texts = str(scratch / "words.txt")
    c = config.live
    workload = WorkloadConfig(
        statement=f"prompts of about {c.prompt_tokens} tokens and answers of about {c.output_tokens}",
        n_requests=c.least_requests,
        chars_per_token=exits.chars_per_token,
        arrivals=ArrivalsConfig(rate_per_s=1.0),  # replaced by each study
        lengths=LengthsConfig(prompt=_lengths(c.prompt_tokens), output=_lengths(c.output_tokens)),
        mix=MixConfig(tasks=dict.fromkeys(exits.tasks, 1.0)),
    )
    study = Config(
        hardware=card, models=list(models), profile_folder=str(scratch / "profiles"), workload=workload,
        runtime=RuntimeConfig(preset="profile"), exits=exits.settings, live=live, seeds=[config.seed],
        server=ServerConfig(max_running_requests=c.max_running_requests, max_batch_tokens=c.max_batch_tokens),
    )  # fmt: skip
    return Basis(study, exits, max(profile.times_within or 0.0 for profile in profiles.values()))


def arms(config: CampaignConfig, models: Sequence[str]) -> dict[str, Any]:
    """Arms: full depth and early exits of the largest model, and HELIOS over all models with short rounds."""
    largest = models[-1]
    asks = {"prompts_per_candidate": 2, "window_tokens": 64, "limit": 24, "round_requests": config.live.round_requests}
    return {
        "full_depth": {"policy": "full_depth", "model": largest},
        "early_exit": {"policy": "early_exit", "model": largest},
        "helios": {"policy": "helios", "constants": "published", **asks},
    }


def weights_of(config: CampaignConfig, model: str) -> str:
    """The model's weights: those named, those in the cache, or random ones of its shape."""
    if model in config.weights:
        return config.weights[model]
    known = KNOWN.get(model)
    return model if known is not None and (cache_folder() / known.file).exists() else f"random:{model}"


def seconds_each(config: CampaignConfig, stage: StageRun, runs: int) -> float:
    """Seconds of arrivals for each of `runs` live runs. Raises NotEnoughTime if that is too little."""
    if config.quick:
        return QUICK_S
    if stage.allowance_s is None:
        return UNHURRIED_S
    found = min(UNHURRIED_S, SERVING_SHARE * stage.allowance_s / runs)
    if found < SHORTEST_S:
        raise NotEnoughTime(f"{runs} runs in {stage.allowance_s:.0f} s would be shorter than {SHORTEST_S:g} s each")
    return found


def summary_of(run: Callable[[Config, Path], int], study: Config, folder: Path) -> tuple[int, Mapping[str, Any]]:
    """Run the study into the folder. Returns its exit status and summary.json; its output goes to table.txt."""
    with (folder / "table.txt").open("w", encoding="utf-8") as said, redirect_stdout(said):
        status = run(study, folder)
    return status, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


def _placed(finished: Finished, folder: Path) -> Profile:
    """Copy the stage's profile into a common folder and read it."""
    name = finished.result["name"]
    shutil.copytree(finished.part("profile") / name, folder / name, dirs_exist_ok=True)
    return read_profile(folder / name)


def _prompts(tasks: Sequence[str], folder: Path) -> Path:
    from calibrate.models import write_prompts

    write_prompts(tasks, folder)
    return folder


def _lengths(mean: int) -> LengthConfig:
    return LengthConfig(kind="lognormal", mean=mean, sigma=0.4, minimum=2, maximum=3 * mean)


REQUESTS, QUICK_REQUESTS = 400, 12
HELIOS, EARLY_EXIT, FULL_DEPTH = "helios", "early_exit", "full_depth"
ONE_USER, FULL_QUEUE = "one user", "full queue"
ARRIVALS: Mapping[str, Mapping[str, Any]] = {
    ONE_USER: {"workload.arrivals.kind": "closed_loop", "workload.arrivals.users": 1},
    FULL_QUEUE: {"workload.arrivals.kind": "all_at_once"},
}
METRICS = (
    "throughput_requests_per_s", "e2e_s_mean", "tpot_s_mean", "batch_mean", "energy_wh_per_request", "layers_per_token",
    "breach_fraction", "agreement",
)  # fmt: skip
GAINS = ("throughput_requests_per_s", "e2e_s_mean", "energy_wh_per_request", "batch_mean")


STEADY_USERS = (1, 8, 32)  # each user always has one request in the system


def steady(config: CampaignConfig, model: str, stage: StageRun) -> Mapping[str, Any]:
    """Serve the model at full depth to a constant number of users, live and simulated: the time of a token alone.

    Raises NotEnoughTime if there is no time for the least number of requests.
    """
    made = basis(config, [model], stage, {model: weights_of(config, model)}, exits_known=False)
    users = [n for n in STEADY_USERS if n <= config.live.max_running_requests]
    about = made.config.profile_folder, model, made.config.hardware
    seconds, requests = seconds_each(config, stage, len(users)), {}
    entries: dict[str, Any] = {}
    for n in users:
        least = max(config.live.least_requests, n)
        requests[n] = least if config.quick else requests_within(seconds, _request_s(config, n, *about), least)
        for mode in (LIVE, SIMULATE):
            overrides = {
                "mode": mode, "workload.n_requests": requests[n], "workload.arrivals.kind": "closed_loop",
                "workload.arrivals.users": n,
            }  # fmt: skip
            entries[f"{mode}_{n}"] = {"policy": FULL_DEPTH, "model": model, "overrides": overrides}
    study = replace(
        made.config,
        name=f"steady_{model}",
        title=f"{model} at full depth on {made.config.hardware}, live and simulated",
        question="How far is the simulated time of a token from the served one, with nothing else changing?",
        arms=entries,
        baseline=f"{SIMULATE}_{users[0]}",
        subject=f"{LIVE}_{users[0]}",
        headline_metrics=list(METRICS),
        pictures=True,
        jobs=1,
    )
    _, summary = summary_of(run_study, study, stage.folder)
    token_s = {name: summary["arms"][name]["metrics"]["tpot_s_mean"] for name in entries}
    found = [
        {"users": n, "requests": requests[n], **{f"{mode}_s": token_s[f"{mode}_{n}"] for mode in (LIVE, SIMULATE)}}
        for n in users
    ]
    return {"models": [model], "exits": made.exits.said, "verdict": summary["verdict"], "steady": found}


def _request_s(config: CampaignConfig, users: int, folder: str | None, model: str, card: str) -> float:
    """An estimate of the device's seconds per request when `users` are served at once."""
    profile = read_profile(Path(folder or "") / f"{model}@{card}")
    length = config.live.prompt_tokens + config.live.output_tokens // 2
    n, decode = profile.model.n_layers, np.array([[users]], dtype=np.int64)
    step = Composition((n,), decode, decode * length, np.array([users]), host_sync_at_checks=False)
    return float(profile.iteration_time_s(step)[0]) * config.live.output_tokens / users


def served(
    config: CampaignConfig, models: Sequence[str], some: Mapping[str, Any], stage: StageRun
) -> Mapping[str, Any]:
    """Run these arms at every load, simulated and served live in two passes. Raises as `run_fidelity_live` does."""
    weights = {model: weights_of(config, model) for model in models}
    made = basis(config, models, stage, weights, exits_known=any(arm["policy"] != FULL_DEPTH for arm in some.values()))
    largest = models[-1]
    seconds = seconds_each(config, stage, len(some) * len(config.live.loads) * 2)
    study = replace(
        made.config,
        name=f"live_{largest}",
        title=f"Live and simulated: {', '.join(models)} on {made.config.hardware}",
        question=f"How far off is the simulation from the profile just measured? Exits: {made.exits.said}.",
        arms=dict(some),
        fidelity_live=LiveFidelityConfig(list(config.live.loads), seconds, config.live.least_requests),
    )
    stage.tell(f"{len(some)} arms at {len(config.live.loads)} loads, {seconds:.1f} s each", None)
    left = None if stage.left_s is None else TimeLeft(lambda: stage.left_s or 0.0, lambda: stage.most_s or 0.0)
    try:
        status, summary = summary_of(partial(run_fidelity_live, left=left), study, stage.folder)
    except NoTimeLeft as error:
        raise NotEnoughTime(error.allowed) from error
    loads = {point["settings"]["load"] for point in summary["points"]}
    short = f"{len(loads)} of {len(config.live.loads)} loads served" if len(loads) < len(config.live.loads) else ""
    return {
        "models": list(models),
        SHORT: short,
        "exits": made.exits.said,
        "arrivals_s_per_run": seconds,
        "gates_passed": status == 0,
        "verdict": summary["verdict"],
        "gates": summary["gates"],
        "points": summary["points"],
    }


@dataclass(frozen=True, slots=True)
class Arm:
    """A policy under a load, simulated or live."""

    mode: str
    load: str
    policy: str

    @property
    def name(self) -> str:
        return f"{'live' if self.mode == LIVE else 'simulated'}_{self.policy}{'_batched' * (self.load == FULL_QUEUE)}"


def headline(config: CampaignConfig, models: Sequence[str], stage: StageRun) -> Mapping[str, Any]:
    """Simulate every arm with one user and with a full queue."""
    made = basis(config, models, stage, {})
    requests = dict.fromkeys(ARRIVALS, QUICK_REQUESTS if config.quick else REQUESTS)
    return _run(config, models, stage, made, _arms(SIMULATE), requests)


def live_headline(config: CampaignConfig, models: Sequence[str], simulated: str, stage: StageRun) -> Mapping[str, Any]:
    """Serve the headline's arms live with as many requests as there is time for, beside their simulation.

    `simulated` is the stage with each arm's approximate speed. Raises NotEnoughTime if an arm is too slow.
    """
    made = basis(config, models, stage, {model: weights_of(config, model) for model in models})
    live, beside = _arms(LIVE), _arms(SIMULATE)
    speeds = stage.finished[simulated].result["arms"]
    seconds = seconds_each(config, stage, len(live))
    requests = dict.fromkeys(ARRIVALS, QUICK_REQUESTS)
    for load in () if config.quick else ARRIVALS:
        each_s = [1 / speeds[arm.name]["throughput_requests_per_s"] for arm in beside if arm.load == load]
        requests[load] = requests_within(seconds * len(each_s), sum(each_s), config.live.least_requests)
    stage.tell(f"{len(live)} arms, {', '.join(f'{load}: {n} requests' for load, n in requests.items())}", None)
    return _run(config, models, stage, made, [*live, *beside], requests)


def requests_within(seconds: float, each_s: float, least: int) -> int:
    """How many requests of `each_s` fit into `seconds`, at most REQUESTS. Raises NotEnoughTime for under `least`."""
    if least * each_s > seconds:
        raise NotEnoughTime(f"{least} requests take {least * each_s:.0f} s, and {seconds:.0f} s are there for them")
    return min(floor(seconds / each_s), REQUESTS)


def gains(figures: Mapping[Arm, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """HELIOS's figures over those of each other policy, by mode, load and metric. Bands give a band."""
    found = []
    for arm, ours in figures.items():
        for policy in (EARLY_EXIT, FULL_DEPTH) if arm.policy == HELIOS else ():
            theirs = figures[replace(arm, policy=policy)]
            ratios = {metric: _ratio(ours[metric], theirs[metric]) for metric in GAINS}
            found.append({"mode": arm.mode, "load": arm.load, "over": policy, **ratios})
    return found


def _arms(mode: str) -> list[Arm]:
    return [Arm(mode, load, policy) for load in ARRIVALS for policy in (FULL_DEPTH, EARLY_EXIT, HELIOS)]


def _run(
    config: CampaignConfig, models: Sequence[str], stage: StageRun, made: Basis, chosen: Sequence[Arm],
    requests: Mapping[str, int],
) -> Mapping[str, Any]:  # fmt: skip
    policies = arms(config, models)
    entries = {}
    for arm in chosen:
        overrides = {"mode": arm.mode, "workload.n_requests": requests[arm.load], **ARRIVALS[arm.load]}
        baseline = replace(arm, policy=EARLY_EXIT).name
        entries[arm.name] = {**policies[arm.policy], "baseline": baseline, "overrides": overrides}
    study = replace(
        made.config,
        name=f"headline_{models[-1]}",
        title=f"HELIOS over {', '.join(models)} on {made.config.hardware}",
        question=f"What does HELIOS gain over early exits and full depth? Times: measured. Exits: {made.exits.said}.",
        arms=entries,
        baseline=replace(chosen[0], policy=EARLY_EXIT).name,
        subject=replace(chosen[0], policy=HELIOS).name,
        headline_metrics=list(METRICS),
        pictures=any(arm.mode == LIVE for arm in chosen),  # drawing takes longer than simulating
        jobs=1,
    )
    _, summary = summary_of(run_study, study, stage.folder)
    figures = {arm: {m: summary["arms"][arm.name]["metrics"].get(m) for m in METRICS} for arm in chosen}
    counter = summary["provenance"]["inputs"].get("energy")
    return {
        "models": list(models),
        "exits": made.exits.said,
        "requests": dict(requests),
        "times_within": made.within,
        "verdict": summary["verdict"],
        "counter": None if counter is None else counter["source"],
        "arms": {arm.name: {**values, "provenance": _provenance(made, arm, values)} for arm, values in figures.items()},
        "gains": gains(figures),
    }


def _provenance(made: Basis, arm: Arm, figures: Mapping[str, Any]) -> dict[str, str | None]:
    """The sources of the arm's figures. `class` is the weakest source; full depth uses no exits."""
    energy = figures["energy_wh_per_request"]
    exits = None if arm.policy == FULL_DEPTH else made.exits.origin
    return {
        "times": "served here" if arm.mode == LIVE else "simulated from a profile measured here",
        "exits": exits,
        "energy": "counter" if isinstance(energy, float) else None if energy is None else "band",
        "class": exits or "measured",
    }


def _ratio(ours: Any, theirs: Any) -> Any:
    """The ratio. None if either is undefined, or one is a number and the other a band."""
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        ends = [_ratio(ours[end], theirs[end]) for end in ("low", "high")]
        return None if None in ends else {"low": min(ends), "high": max(ends)}
    if isinstance(ours, Mapping) or isinstance(theirs, Mapping) or ours is None or not theirs:
        return None
    return ours / theirs
