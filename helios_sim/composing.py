"""Caches for Hydra, which otherwise reads, copies and parses everything again for each composition of settings.

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

_PARSED = 4096  # texts with ${...} that are kept parsed


@cache
def keep_what_is_read() -> None:
    """Keep registered schemas and parsed texts instead of copying and parsing them again, from now on.

    Hydra copies its search path for each composition, and with it all registered schemas; what it loads from the store
    is a copy anyway. OmegaConf's parse of a text depends on the text alone, and is never changed.
    """
    setattr(ConfigStore, "__deepcopy__", lambda store, memo: store)  # noqa: B010
    setattr(omegaconf.base, "parse", lru_cache(_PARSED)(parse))  # noqa: B010


def loaded(source: ConfigSource, file: Path) -> ConfigResult:
    """Return a file as its source loads it; the file is read again only if it has changed."""
    found = file.stat()
    header, values = _read(file, found.st_mtime_ns, found.st_size)
    path = f"{source.scheme()}://{source.path}"
    return ConfigResult(provider=source.provider, path=path, config=OmegaConf.create(values), header=dict(header))


@cache
def _read(file: Path, mtime_ns: int, size_bytes: int) -> tuple[dict[str, Any], Any]:
    """Return what the file's first lines tell Hydra, and its values."""
    text = file.read_text(encoding="utf-8")
    values = yaml.load(text, Loader=_loader())  # noqa: S506 - a safe one
    if values is not None and not isinstance(values, dict):
        values = OmegaConf.to_container(OmegaConf.load(file))
    return ConfigSource._get_header_dict(text[:512]), values or {}


@cache
def _loader() -> Any:
    """Return OmegaConf's loader, by libyaml if PyYAML has it, which reads these files twenty times as quickly."""
    own = get_yaml_loader()
    return type("Loader", (yaml.CSafeLoader, own), {}) if yaml.__with_libyaml__ else own
