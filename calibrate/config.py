"""Hydra for calibrations: registers the schemas, expands short forms of settings, and returns the typed result."""

from __future__ import annotations

import re
from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from calibrate.schema import CalibrateConfig, CampaignConfig
from helios_sim.config import given, in_words
from helios_sim.live.checkpoint.known import SHORT_NAMES


def register() -> None:
    ConfigStore.instance().store(name="calibrate_schema", node=CalibrateConfig)
    ConfigStore.instance().store(name="campaign_schema", node=CampaignConfig)


def to_config(
    settings: DictConfig,
    arguments: Sequence[str] = (),
    schema: type[CalibrateConfig | CampaignConfig] = CalibrateConfig,
) -> CalibrateConfig | CampaignConfig:
    """The settings as the schema's dataclass. Raises UserError for a value of the wrong type or out of range."""
    try:
        config = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        raise in_words(error, arguments, schema) from error
    assert isinstance(config, schema)
    return config


def in_full(arguments: Sequence[str]) -> list[str]:
    """The command line for Hydra: overrides first, and `model=X` expanded to the model's name or its weights.

    A model of the user's own is named after its weights, unless `model.name` is given.
    """
    overrides = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    flags = [a for a in arguments if a not in overrides]
    overrides = [a.removeprefix("+") if a.startswith("+task=") else a for a in overrides]
    chosen = given("model", overrides)
    if chosen is not None and not chosen.startswith("{"):
        overrides = [a for a in overrides if not a.startswith("model=")]
        name = SHORT_NAMES.get(chosen, chosen)
        if name in SHORT_NAMES.values():
            overrides.append(f"model.name={name}")
        elif given("model.weights", overrides) is None:
            overrides.append(f"model.weights={chosen}")
        else:
            overrides.append(f"model.name={name}")
    weights = given("model.weights", overrides)
    if weights not in (None, "null") and given("model.name", overrides) is None:
        overrides.append(f"model.name={name_of(str(weights))}")
    return [*overrides, *flags]


def name_of(weights: str) -> str:
    """A model's name from its folder, file or hub id: lower case, only characters that are safe in paths and shells."""
    last = weights.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".gguf")
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-.") or "model"
