"""Settings of studies over what a campaign has measured so far. Knows its profiles and traces, runs nothing."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.campaigns.schema import CampaignConfig
from calibrate.stages import Finished, StageRun
from calibrate.work import ADAPTERS, TRACES
from helios_sim.exits.published import TASKS as PUBLISHED_TASKS
from helios_sim.exits.store import read_trace, write_trace
from helios_sim.exits.synthetic import synthetic_trace
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import read_profile
from helios_sim.report import files
from helios_sim.study.live_schema import LiveConfig
from helios_sim.study.plan import Variant
from helios_sim.study.schema import (
    ArrivalsConfig,
    Config,
    ExitsConfig,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    RuntimeConfig,
    ServerConfig,
    WorkloadConfig,
)

SCRATCH = "scratch"  # of a stage: not archived
MADE_UP = "text"  # the task of made-up exits
SURE_HEAD, SURE_CHECK = 0.9, 0.8  # thresholds of a head's probability, and of a classifier's check
WORDS = "The river ran high in March and the keeper of the bridge wrote down every cart that crossed it. "


@dataclass(frozen=True, slots=True)
class Basis:
    """What a study stands on. `exits` says where exits come from, in words."""

    config: Config
    profiles: Mapping[str, Profile]
    exits: str


def basis(config: CampaignConfig, models: Sequence[str], stage: StageRun, weights: Mapping[str, str]) -> Basis:
    """Profiles of the models from their stages, exits measured, published or made up, and a workload of texts."""
    scratch = stage.folder / SCRATCH
    profiles = {model: _placed(stage.finished[f"profile-{model}"], scratch / "profiles") for model in models}
    card = profiles[models[0]].hardware.name
    live = LiveConfig(device=config.device, threads=config.threads, weights=dict(weights), seed=config.seed)
    if config.text_model in models:
        exits, tasks, chars, said = _measured(stage.finished, profiles[config.text_model])
        live.heads = {config.text_model: str(stage.finished[ADAPTERS].part("heads"))}
        live.texts = str(_prompts(tasks, scratch / "prompts"))
    else:
        exits, tasks, chars, said = _of_pair(config, models, scratch / "traces")
        files.write_text(scratch / "words.txt", WORDS * 200)
        live.texts = str(scratch / "words.txt")
    c = config.live
    workload = WorkloadConfig(
        statement=f"prompts of about {c.prompt_tokens} tokens and answers of about {c.output_tokens}",
        n_requests=c.least_requests,
        chars_per_token=chars,
        arrivals=ArrivalsConfig(rate_per_s=1.0),  # each study sets its own
        lengths=LengthsConfig(prompt=_lengths(c.prompt_tokens), output=_lengths(c.output_tokens)),
        mix=MixConfig(tasks=dict.fromkeys(tasks, 1.0)),
    )
    study = Config(
        hardware=card, models=list(models), profile_folder=str(scratch / "profiles"), workload=workload,
        runtime=RuntimeConfig(preset="profile"), exits=exits, live=live, seeds=[config.seed],
        server=ServerConfig(max_running_requests=c.max_running_requests, max_batch_tokens=c.max_batch_tokens),
    )  # fmt: skip
    return Basis(study, profiles, said)


def arms(config: CampaignConfig, models: Sequence[str], **more: Any) -> dict[str, Any]:
    """Full depth and early exits of the largest model, and HELIOS over all of them, quick to decide again."""
    largest = models[-1]
    asks = {"prompts_per_candidate": 2, "window_tokens": 64, "limit": 24, "round_requests": config.live.round_requests}
    return {
        "full_depth": {"policy": "full_depth", "model": largest, **more},
        "early_exit": {"policy": "early_exit", "model": largest, **more},
        "helios": {"policy": "helios", "constants": "published", **asks, **more},
    }


def variant_of(config: Config) -> Variant:
    """The configuration with some settings changed, by dotted path, as the command line would."""

    def changed(changes: Mapping[str, Any]) -> Config:
        new = copy.deepcopy(config)
        for path, value in changes.items():
            *groups, last = path.split(".")
            place: Any = new
            for group in groups:
                place = place[group] if isinstance(place, dict) else getattr(place, group)
            if isinstance(place, dict):
                place[last] = value
            else:
                setattr(place, last, value)
        return new

    return changed


def _placed(finished: Finished, folder: Path) -> Profile:
    """The stage's profile, with others in one folder."""
    name = finished.result["name"]
    shutil.copytree(finished.part("profile") / name, folder / name, dirs_exist_ok=True)
    return read_profile(folder / name)


def _measured(finished: Mapping[str, Finished], profile: Profile) -> tuple[ExitsConfig, Sequence[str], float, str]:
    place = finished[TRACES].part("trace")
    trace = read_trace(place)
    checks = trace.classifier is not None and profile.check_classifier is not None
    exits = ExitsConfig(
        source=str(place), threshold=SURE_CHECK if checks else SURE_HEAD,
        confidence="classifier" if checks else "max_probability",
    )  # fmt: skip
    said = f"measured by this campaign, {trace.n_tokens} tokens"
    return exits, trace.tasks, float(trace.chars.sum() / trace.n_tokens), said


def _of_pair(
    config: CampaignConfig, models: Sequence[str], folder: Path
) -> tuple[ExitsConfig, Sequence[str], float, str]:
    made_up = config.live.exits
    if not made_up:
        exits = ExitsConfig(source="published", threshold=SURE_HEAD)
        return (
            exits,
            PUBLISHED_TASKS,
            4.2,
            "fitted to published shares; weights are random, so their text means nothing",
        )
    for model in models:
        write_trace(synthetic_trace(model, made_up[model], (MADE_UP,), seed=config.seed), folder / model)
    exits = ExitsConfig(source=f"{folder}/{{model}}", threshold=0.6)
    return exits, (MADE_UP,), 4.0, "made up, to rehearse"


def _prompts(tasks: Sequence[str], folder: Path) -> Path:
    from calibrate.prompts import write_prompts

    write_prompts(tasks, folder)
    return folder


def _lengths(mean: int) -> LengthConfig:
    return LengthConfig(kind="lognormal", mean=mean, sigma=0.4, minimum=2, maximum=3 * mean)
