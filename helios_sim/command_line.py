"""Turns a command line into one that Hydra reads: short words in full, in order, and wrong flags and words refused."""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Collection, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from helios_sim.defaults_list import CHOSEN, check_defaults
from helios_sim.errors import UserError
from helios_sim.help import conf_folder, config_dirs
from helios_sim.live.checkpoint.known import SHORT_NAMES
from helios_sim.study.schema import Config
from helios_sim.vary.settings import closest, known_settings
from helios_sim.words import readable

MIXES = ("workload.mix.tasks", "workload.mix.after")  # if given whole, they take the place of the experiment's
DEFAULT = "+experiment=quickstart"
PRESET, ENGINE = "server.preset", "engine"  # the word, and the group of files that it chooses from
PRINT_JOB = "--cfg job prints all of them"
BY_HYDRA = {".hydra", "multirun.yaml"}  # files of an output folder before anything else is written


def in_full(arguments: Sequence[str], schema: type[Config] = Config) -> list[str]:
    """Return the command line with short words in full: `model=X` names the only candidate, by a short name too,
    `device=X` the serving device, and `log=X` the log of `from_log`.

    `server.preset=X` adds a file of conf/engine, which overrides an experiment. Raises UserError for words that would
    run code, and for a group set to null.
    """
    found = []
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if equals and key == "model":
            argument = f"models=[{SHORT_NAMES.get(value, value)}]"
        elif equals and key == "device":
            argument = f"live.device={value}"
        elif equals and key == "log":
            argument = f"from_log.log={value}"
        elif equals and key.lstrip("+") in CHOSEN and value in ("null", ""):
            fix = "policy=none is no further arm" if key.lstrip("+") == "policy" else "leave it out"
            raise UserError(key.lstrip("+"), value, "one of its files: every study has one", fix)
        elif equals and key == PRESET:
            if value in ("null", ""):
                continue  # the default without this word
            argument = f"+{ENGINE}={value}"
        elif key in ("hydra.run.dir", "hydra.sweep.dir") and value.startswith("~/"):  # shells do not expand this ~
            argument = f"{key}={Path(value).expanduser()}"
        found.append(argument)
    return readable(found, known_settings(schema))


def in_order(arguments: Sequence[str]) -> list[str]:
    """Put overrides first and together, as Hydra's parser wants them, with an experiment among them."""
    overrides = [a for a in arguments if is_override(a)]
    flags = [a for a in arguments if a not in overrides]
    for place, override in enumerate(overrides):
        if override.startswith("experiment="):
            overrides[place] = f"+{override}"  # without the + Hydra looks for it among the defaults
    if not any(override.lstrip("+").startswith("experiment=") for override in overrides):
        overrides.append(DEFAULT)
    return [*overrides, *flags]


def is_override(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def whole_mixes(command: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """Return the command line in which a whole mix of tasks takes the place of the experiment's.

    Hydra would merge the two. Tasks that only the experiment names are deleted by further words, so that the settings
    that Hydra prints and keeps are the settings that run.
    """
    mixes = {word: word.partition("=") for word in command if word.partition("=")[0] in MIXES}
    whole = {word: key for word, (key, _, value) in mixes.items() if value.lstrip().startswith("{")}
    if not whole:
        return list(command)
    settings = composed(command, whole, config_dir)
    found = [f"+{word}" if word in whole else word for word in command]  # + lets it name tasks that are new
    for word, key in whole.items():
        value = OverridesParser.create().parse_override(word).value()
        names = OmegaConf.select(settings, key) or {}
        found += [f"~{key}.{name}" for name in names if isinstance(value, dict) and str(name) not in map(str, value)]
    return in_order(found)


def by_arm(command: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """Return the command line with words about arms with names that Hydra cannot read turned into words about `arms`.

    `arms.full_depth_opt-1.3b.model=X` becomes `arms={full_depth_opt-1.3b: {model: X}}`, which Hydra merges with the
    arms; `~arms.NAME` sets the arm to null, which leaves it out. Raises UserError if there is no such arm.
    """
    about = [word for word in command if is_override(word) and _names_arm(word)]
    if not about:
        return list(command)
    names = [str(name) for name in composed(command, about, config_dir).arms]
    return in_order([_of_arms(word, names) if word in about else word for word in command])


def _names_arm(word: str) -> bool:
    """Whether the word is about an arm with a name that Hydra's grammar takes for something else."""
    key = word.partition("=")[0].lstrip("+~")
    return key.startswith("arms.") and not re.fullmatch(r"arms(\.[A-Za-z_$][\w$-]*)+", key)


def _of_arms(word: str, names: Sequence[str]) -> str:
    key, _, value = word.partition("=")
    path = key.lstrip("+~").removeprefix("arms.")
    found = max((name for name in names if f"{path}.".startswith(f"{name}.")), key=len, default=None)
    if found is None or not re.fullmatch(r"[\w./$%*@?|+-]+", found):
        fix = "a new one is +arms={NAME: {policy: ...}}"
        raise UserError("arms", path, f"begins with the name of an arm: {', '.join(names) or 'there are none'}", fix)
    parts = path.removeprefix(found).strip(".").split(".") if path != found else []
    inner = "null" if word.startswith("~") else value
    for part in reversed(parts):
        inner = f"{{{part}: {inner}}}"
    return f"{'+' if word.startswith('+') else ''}arms={{{found}: {inner}}}"


def composed(command: Sequence[str], left_out: Collection[str], config_dir: str | Path | None) -> DictConfig:
    """Compose the settings without these words, to see what an experiment names, by the schema registered last."""
    others = [word for word in command if is_override(word) and word not in left_out and not _names_arm(word)]
    several = any(word in ("-m", "--multirun") for word in command)
    kept = [word for word in others if not (several and "," in word)]  # without the settings that a sweep varies
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_folder(), version_base=None):
        return compose("config", [*kept, *searched(next(reversed(config_dirs(command)), config_dir))])


def searched(config_dir: str | Path | None) -> list[str]:
    return [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]


def given(key: str, arguments: Sequence[str]) -> str | None:
    """Return what the command line sets a key to; None if it does not set it."""
    for argument in reversed(arguments):
        name, equals, value = argument.partition("=")
        if equals and name.lstrip("+~").split("@")[0] == key:
            return value
    return None


def check_flags(arguments: Sequence[str], program: str = "helios_sim") -> None:
    """Raise UserError for what argparse would refuse with a page of usage, and for words that Hydra would misread.

    Hydra's parser is not public.
    """
    said = io.StringIO()
    see = f"see python -m {program} --help"
    dashed = next((word for word in arguments if word.startswith("--exp")), "--experimental-rerun")
    if not dashed.startswith("--experimental-rerun"):  # argparse would take it for an abbreviation of that flag
        raise UserError("argument", dashed, "no such flag", "write +experiment=NAME, without dashes")
    folders = [b.removeprefix("--config-dir=") for a, b in pairwise(["", *arguments])
               if b.startswith("--config-dir=") or a in ("--config-dir", "-cd")]  # fmt: skip
    if len(set(folders)) > 1:
        allowed = "one folder: only the last would be looked into"
        raise UserError("--config-dir", " and ".join(folders), allowed, "put your files into one folder")
    try:
        with contextlib.redirect_stderr(said):
            parsed = get_args_parser().parse_args(arguments)
    except SystemExit:
        reason = said.getvalue().strip().splitlines()[-1].split("error: ")[-1]
        raise UserError("command line", " ".join(arguments), reason, see) from None
    for flag, value in (("--config-name", parsed.config_name), ("--config-path", parsed.config_path)):
        if value is not None:
            allowed = "a study begins with the settings of this program"
            fix = "put yours into FOLDER/experiment/NAME.yaml: --config-dir FOLDER +experiment=NAME"
            raise UserError(flag, value, allowed, fix)
    experiments = [word for word in parsed.overrides if word.lstrip("+").startswith("experiment=")]
    if len(experiments) > 1:
        fix = "choose one, or run both: -m +experiment=a,b"
        raise UserError("experiment", " ".join(experiments), "one", fix)
    if experiments and experiments[0].partition("=")[2].strip().lower() in ("", "null", "none", "''", '""'):
        fix = "leave it out for the quickstart, or name one: +experiment=NAME"
        raise UserError("experiment", experiments[0].partition("=")[2], "the name of an experiment", fix)
    for group in CHOSEN:
        named = [word.partition("=") for word in parsed.overrides if word.lstrip("+").startswith(f"{group}=")]
        files = dict.fromkeys(value for _, _, value in named)
        if len(files) > 1:
            fix = "choose one; more arms are '+arms.NAME={policy: ...}'" if group == "policy" else "choose one"
            raise UserError(group, " and ".join(files), "one: only the last would run", fix)
    for override in parsed.overrides:
        if override.lstrip("+~").startswith("="):
            raise UserError("argument", override, "settings are written key=value, and this has no key", see)
        if "=" not in override and not override.startswith("~"):
            raise UserError("argument", override, "settings are written key=value", see)
        name, _, value = override.partition("=")
        group = name.lstrip("+~").split("@")[0]
        if value.strip().startswith("[") and (Path(conf_folder()) / group).is_dir():
            options = ", ".join(sorted(file.stem for file in (Path(conf_folder()) / group).glob("*.yaml")))
            raise UserError(group, value, f"one of {options}: settings of two would be mixed", "choose one")
    if parsed.cfg == "job" and parsed.package is not None and program == "helios_sim":
        groups = list(dict.fromkeys(name.partition(".")[0] for name in known_settings(Config)))
        if parsed.package.partition(".")[0] not in (*groups, "_global_", "policy", "hydra"):
            fix = closest(parsed.package, groups, "--package ") or PRINT_JOB
            raise UserError("--package", parsed.package, "a group of settings", fix)
    folder = parsed.config_dir
    if folder == "" or (folder is not None and not Path(folder).is_dir()):
        raise UserError("--config-dir", folder, "must be a folder that holds config groups", "correct the path")
    if folder is not None:
        _check_beginning(Path(folder))
    for name in [] if folder is None else (given("experiment", parsed.overrides) or "").split(","):
        file = Path(folder) / "experiment" / f"{name.removesuffix('.yaml')}.yaml"
        if name and file.is_file():
            check_defaults(file)


def _check_beginning(folder: Path) -> None:
    """Raise UserError for a user's config.yaml with settings of a study, which Hydra would not read."""
    for file in (folder / "config.yaml", folder / "config.yml"):
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError, RecursionError):
            continue
        known = {"defaults", *(field.name for field in fields(Config))}
        if isinstance(values, dict) and (ours := next((name for name in values if name in known), None)) is not None:
            allowed = f"a study begins with the program's own {file.name}: this one, which sets {ours}, is not read"
            fix = f"move it to {folder}/experiment/NAME.yaml and choose it: +experiment=NAME"
            raise UserError("--config-dir", str(file), allowed, fix)


def leave_no_trace(folder: Path, worthless: Collection[str] = ()) -> None:
    """Remove a folder that holds only Hydra's own files and `worthless` ones, and empty ones above it up to here."""
    here = Path.cwd()
    folder = folder.resolve()
    above = [parent for parent in folder.parents if here in parent.parents]
    for place in (folder, *above):
        if place == here or not place.is_dir() or not {e.name for e in place.iterdir()} <= BY_HYDRA | {*worthless}:
            return
        shutil.rmtree(place)
