"""Hydra's side: where conf/ lies, the typed schemas, and turning settings into a `Config`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from helios_sim.errors import UserError
from helios_sim.study.schema import Config


def conf_folder() -> str:
    """conf/ beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise UserError("conf", str(package.parent / "conf"), "a folder with config.yaml", "reinstall the package")


def register() -> None:
    ConfigStore.instance().store(name="config_schema", node=Config)


class Variants:
    """The study's configuration, and copies of it with some settings changed."""

    def __init__(self, settings: DictConfig) -> None:
        self._settings = settings

    def __call__(self, changes: Mapping[str, Any]) -> Config:
        """UserError where a setting does not exist or has a value of the wrong type."""
        settings = copy.deepcopy(self._settings)
        for path, value in changes.items():
            try:
                OmegaConf.update(settings, path, value, force_add=path.startswith("arms."))
            except OmegaConfBaseException as error:
                raise UserError(path, value, _first_line(error), "correct the setting") from error
        return to_config(settings)


def to_config(settings: DictConfig) -> Config:
    try:
        config = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "configuration")
        raise UserError(key, None, _first_line(error), "correct the setting") from error
    assert isinstance(config, Config)
    return config


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
