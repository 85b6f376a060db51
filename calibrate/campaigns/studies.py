"""Settings of studies over what a campaign has measured so far. Knows its profiles and traces, runs nothing."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibrate.campaigns.exits import Exits, exits_of
from calibrate.campaigns.schema import CampaignConfig
from calibrate.stages import Finished, NotEnoughTime, StageRun
from calibrate.work import ADAPTERS
from helios_sim.live.checkpoint.known import KNOWN, cache_folder
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import read_profile
from helios_sim.report import files
from helios_sim.study.live_schema import LiveConfig
from helios_sim.study.plan import Variant
from helios_sim.study.schema import (
    ArrivalsConfig,
    Config,
    LengthConfig,
    LengthsConfig,
    MixConfig,
    RuntimeConfig,
    ServerConfig,
    WorkloadConfig,
)

SCRATCH = "scratch"  # of a stage: not archived
WORDS = "The river ran high in March and the keeper of the bridge wrote down every cart that crossed it. "
UNHURRIED_S = 12.0  # of arrivals in each live run
SERVING_SHARE = 0.6  # of the time allowed; the rest goes to opening models, overload's tails and figures
SHORTEST_S = 1.0
QUICK_S = 0.05


@dataclass(frozen=True, slots=True)
class Basis:
    """What a study stands on."""

    config: Config
    exits: Exits


def basis(config: CampaignConfig, models: Sequence[str], stage: StageRun, weights: Mapping[str, str]) -> Basis:
    """Profiles of the models from their stages, exits, and a workload of texts. `weights`: of those to be served."""
    scratch = stage.folder / SCRATCH
    profiles = {model: _placed(stage.finished[f"profile-{model}"], scratch / "profiles") for model in models}
    card = profiles[models[0]].hardware.name
    exits = exits_of(config, profiles, stage.finished, scratch / "traces")
    live = LiveConfig(device=config.device, threads=config.threads, weights=dict(weights), seed=config.seed)
    if config.text_model in models:
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
        arrivals=ArrivalsConfig(rate_per_s=1.0),  # each study sets its own
        lengths=LengthsConfig(prompt=_lengths(c.prompt_tokens), output=_lengths(c.output_tokens)),
        mix=MixConfig(tasks=dict.fromkeys(exits.tasks, 1.0)),
    )
    study = Config(
        hardware=card, models=list(models), profile_folder=str(scratch / "profiles"), workload=workload,
        runtime=RuntimeConfig(preset="profile"), exits=exits.settings, live=live, seeds=[config.seed],
        server=ServerConfig(max_running_requests=c.max_running_requests, max_batch_tokens=c.max_batch_tokens),
    )  # fmt: skip
    return Basis(study, exits)


def arms(config: CampaignConfig, models: Sequence[str]) -> dict[str, Any]:
    """Full depth and early exits of the largest model, and HELIOS over all of them, quick to decide again."""
    largest = models[-1]
    asks = {"prompts_per_candidate": 2, "window_tokens": 64, "limit": 24, "round_requests": config.live.round_requests}
    return {
        "full_depth": {"policy": "full_depth", "model": largest},
        "early_exit": {"policy": "early_exit", "model": largest},
        "helios": {"policy": "helios", "constants": "published", **asks},
    }


def weights_of(config: CampaignConfig, model: str) -> str:
    """Those named, those in the cache, or random ones of the same shape."""
    if model in config.weights:
        return config.weights[model]
    known = KNOWN.get(model)
    return model if known is not None and (cache_folder() / known.file).exists() else f"random:{model}"


def seconds_each(config: CampaignConfig, stage: StageRun, runs: int) -> float:
    """Of arrivals, for each of so many live runs. NotEnoughTime where that is next to nothing."""
    if config.quick:
        return QUICK_S
    if stage.allowance_s is None:
        return UNHURRIED_S
    found = min(UNHURRIED_S, SERVING_SHARE * stage.allowance_s / runs)
    if found < SHORTEST_S:
        raise NotEnoughTime(f"{runs} runs in {stage.allowance_s:.0f} s would be shorter than {SHORTEST_S:g} s each")
    return found


def summary_of(run: Callable[[Variant, Path], int], study: Config, folder: Path) -> tuple[int, Mapping[str, Any]]:
    """Runs the study into the folder: its exit status and summary.json. What it prints is in table.txt there."""
    with (folder / "table.txt").open("w", encoding="utf-8") as said, redirect_stdout(said):
        status = run(variant_of(study), folder)
    return status, json.loads((folder / "summary.json").read_text(encoding="utf-8"))


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


def _prompts(tasks: Sequence[str], folder: Path) -> Path:
    from calibrate.prompts import write_prompts

    write_prompts(tasks, folder)
    return folder


def _lengths(mean: int) -> LengthConfig:
    return LengthConfig(kind="lognormal", mean=mean, sigma=0.4, minimum=2, maximum=3 * mean)
