"""What Hydra would read, copy or parse once more for each composition of settings in one process, and need not.

A sweep composes its settings for each of its jobs, a notebook for each study.
"""

from __future__ import annotations

from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import omegaconf.base
import yaml
from hydra.core.config_store import ConfigStore
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.grammar_parser import parse

_PARSED = 4096  # texts with ${...}


@cache
def keep_what_is_read() -> None:
    """From now on, in this process.

    Hydra copies its search path for each composition, and by it all schemas that are registered; what it loads from
    the store is a copy anyway. What OmegaConf parses of a text goes by that text alone, and is only looked at.
    """
    setattr(ConfigStore, "__deepcopy__", lambda store, memo: store)  # noqa: B010
    setattr(omegaconf.base, "parse", lru_cache(_PARSED)(parse))  # noqa: B010


def loaded(source: ConfigSource, file: Path) -> ConfigResult:
    """A file as its source loads it, read once while it stays as it is."""
    found = file.stat()
    header, values = _read(file, found.st_mtime_ns, found.st_size)
    path = f"{source.scheme()}://{source.path}"
    return ConfigResult(provider=source.provider, path=path, config=OmegaConf.create(values), header=dict(header))


@cache
def _read(file: Path, mtime_ns: int, size_bytes: int) -> tuple[dict[str, Any], Any]:
    """What its first lines tell Hydra, and its values."""
    text = file.read_text(encoding="utf-8")
    values = yaml.load(text, Loader=_loader())  # noqa: S506 - a safe one
    if values is not None and not isinstance(values, dict):
        values = OmegaConf.to_container(OmegaConf.load(file))
    return ConfigSource._get_header_dict(text[:512]), values or {}


@cache
def _loader() -> Any:
    """OmegaConf's, which reads these files twenty times as quickly where PyYAML has libyaml to parse them with."""
    own = get_yaml_loader()
    return type("Loader", (yaml.CSafeLoader, own), {}) if yaml.__with_libyaml__ else own
