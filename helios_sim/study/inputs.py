"""Inputs of a job's result besides its settings: this program's code and the contents of every file it reads.

A resumed run keeps only results with equal inputs.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import helios_sim
from helios_sim.contents import code_of, digest, digest_of
from helios_sim.errors import UserError
from helios_sim.exits.store import HEADER as EXITS_HEADER, SHIPPED as SHIPPED_EXITS
from helios_sim.policy.custom import CustomParameters
from helios_sim.policy.registry import PolicyConfig
from helios_sim.profile.resolve import files_of, kept_profile
from helios_sim.shared_data import cache_folder, shared_data_folder
from helios_sim.study.modes import LIVE
from helios_sim.study.schema import Config
from helios_sim.untrusted import is_there
from helios_sim.workload.traces import locate

CODE = "the program"


def made_of(config: Config, policy: PolicyConfig | None = None) -> dict[str, str]:
    """Return digests by name, such as "profile opt-1.3b@a100-40gb". A missing file is left to the loader that needs it.
    """
    own = policy.parameters if policy is not None else None
    return _made_of(config, [own.object] if isinstance(own, CustomParameters) else [])


def inputs_of(config: Config) -> dict[str, str]:
    """Return digests by name of the inputs of a whole study, with the policies of all its arms."""
    arms = [arm for arm in (*config.arms.values(), config.policy) if isinstance(arm, Mapping)]
    found = _made_of(config, [str(arm["object"]) for arm in arms if arm.get("object")])
    named = {"log": config.from_log.log, "log folder": config.fidelity.folder, "rows": config.fidelity.rows}
    for name, text in named.items():
        for path in () if text is None else (Path(text).expanduser(), shared_data_folder() / text):
            if is_there(path, Path.exists):
                found.setdefault(f"{name} {text}", digest_of(path))
    return found


def _made_of(config: Config, policies: Sequence[str]) -> dict[str, str]:
    found = {CODE: _code()}
    if config.mode == LIVE:
        with suppress(PackageNotFoundError):
            found["torch"] = digest(version("torch").encode())
    for name, path in _files(config):
        if is_there(path, Path.exists):
            found[name] = _digest_of(path, config)
    custom = [*(str(kind["object"]) for kind in _kinds(config) if "object" in kind), *policies]
    for path in dict.fromkeys(path for reference in custom for path in _sources(reference)):
        found[f"policy file {path.name}"] = digest_of(path)
    return found


def _digest_of(path: Path, config: Config) -> str:
    """Return a file's digest. Only the header of a GGUF file counts, which may be large, unless the model is run."""
    if path.suffix == ".gguf" and config.mode != LIVE:
        from helios_sim.profile.gguf_header import read_header

        with suppress(UserError):  # the loader reports it
            return digest(repr(read_header(path)).encode())
    return digest_of(path)


def _files(config: Config) -> Iterator[tuple[str, Path]]:
    for kind in _kinds(config) or [{}]:
        hardware, precision = config.device_of(kind), config.precision_of(kind)
        for model in _models(kind, config):
            name = f"profile {model}@{hardware}"
            if config.profile_folder is not None:
                yield name, Path(config.profile_folder) / f"{model}@{hardware}"
            elif (kept := kept_profile(model, hardware, precision=precision)) is not None:
                yield name, kept
            else:
                yield from ((f"{path.name} of {model}@{hardware}", path) for path in files_of(model, hardware))
            source = config.exits.source.replace("{model}", model)
            shipped = SHIPPED_EXITS / f"{model}@{source}"
            yield f"exits of {model}", shipped if is_there(shipped / EXITS_HEADER) else Path(source)
    for trace in (config.workload.arrivals.trace, config.workload.lengths.trace):
        if trace is not None:
            with suppress(ValueError):
                yield f"trace {trace}", locate(trace)
    if config.mode == LIVE:
        yield from _live_files(config)


def _models(kind: Mapping[str, Any], config: Config) -> list[str]:
    models = kind.get("models", config.models)
    return list(map(str, models if isinstance(models, Sequence) else ()))  # the fleet refuses other values


def _kinds(config: Config) -> list[Mapping[str, Any]]:
    return [kind for kind in config.cluster.kinds.values() if isinstance(kind, Mapping)]


def _live_files(config: Config) -> Iterator[tuple[str, Path]]:
    from helios_sim.live.checkpoint.known import KNOWN, hub_snapshot
    from helios_sim.live.model.heads import SHIPPED
    from helios_sim.live.served import FOLDER

    for model in dict.fromkeys(model for kind in _kinds(config) or [{}] for model in _models(kind, config)):
        weights = config.live.weights.get(model, model)
        known = KNOWN.get(weights)
        path = Path(weights).expanduser() if known is None else cache_folder() / known.file
        yield f"weights of {model}", path if path.exists() else hub_snapshot(weights) or path
        heads = config.live.heads.get(model)
        yield f"exit heads of {model}", SHIPPED / model if heads is None else Path(heads).expanduser()
    texts = config.live.texts
    yield "texts", cache_folder() / FOLDER if texts is None else Path(texts).expanduser()


@cache
def _code() -> str:
    return code_of(Path(helios_sim.__file__).parent)


def _sources(reference: str) -> list[Path]:
    """Return the files of the module in "module:Name" and of its imports, except libraries and this package."""
    found: dict[Path, None] = {}
    waiting = [reference.partition(":")[0]]
    while waiting:
        name = waiting.pop()
        spec = None
        with suppress(Exception):  # the policy's loader reports what is wrong with it
            spec = find_spec(name)
        path = Path(spec.origin).resolve() if spec is not None and spec.origin else None
        if spec is None or path is None or path in found or path.suffix != ".py" or _is_of_a_library(path):
            continue
        found[path] = None
        with suppress(OSError, SyntaxError, ValueError):
            waiting += _imports(path.read_bytes(), spec.parent or "")
    return sorted(found)


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Yield names of modules that a source may import; some may be names within a module."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            name = ".".join([*above, *([node.module] if node.module else [])])
            yield from (name, *(f"{name}.{alias.name}" for alias in node.names))


def _is_of_a_library(path: Path) -> bool:
    ours = Path(helios_sim.__file__).parent
    inside = any(path.is_relative_to(Path(prefix).resolve() / "lib") for prefix in {sys.prefix, sys.base_prefix})
    return inside or "site-packages" in path.parts or path.is_relative_to(ours)
