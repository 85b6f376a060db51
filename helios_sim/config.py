"""Settings as a typed `Config`: the schemas that Hydra reads, composed from conf/ and the words of a command line.

Functions about Hydra alone serve every command line of the project; they take the schema of its settings.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from helios_sim.command_line import by_arm, check_flags, given, in_full, in_order, is_override, searched, whole_mixes
from helios_sim.errors import UserError
from helios_sim.help import conf_folder
from helios_sim.own_files import EXPERIMENT, check_names, leaves, own_files, shipped_paths
from helios_sim.study.effects import check_effect, check_written
from helios_sim.study.schema import Config
from helios_sim.vary.settings import kind_in_words, known_settings, unknown_setting, wrong_type
from helios_sim.words import look_at_files
from helios_sim.wrong_settings import in_a_circle, in_words, wrong_setting

_Schema = TypeVar("_Schema")

# What settings ask for.
STUDY, DESIGNS, FIDELITY, FIDELITY_LIVE = "a study", "designs", "a comparison with a log", "a comparison with live runs"
FIDELITY_SILICON, CAPACITY = "a comparison with published measurements", "a capacity plan"
FROM_LOG = "a study of a log"

_registered: dict[str, type] = {}


def register(name: str = "config_schema", schema: type = Config) -> None:
    """Give Hydra the schema that conf/ calls `name`. A schema is read once, which takes some 0.05 s."""
    look_at_files()
    if _registered.get(name) is not schema:
        ConfigStore.instance().store(name=name, node=schema)
        _registered[name] = schema


def compose_config(
    experiment: str,
    words: Sequence[str] = (),
    config_dir: str | Path | None = None,
    schema: type[Config] = Config,
) -> Config:
    """Return the settings of an experiment and further words of the command line, without running Hydra's own main.

    `schema` belongs to a command with further settings of its own. Raises UserError for a name, a key or a value that
    does not exist.
    """
    folder = [] if config_dir is None else ["--config-dir", str(config_dir)]
    command = in_full(in_order([f"+experiment={experiment}", *words]), schema)
    flags = [word for word in command if word.startswith("-")]
    if flags:
        raise UserError("argument", flags[0], "only settings, key=value", "leave it out")
    check_flags([*command, *folder])
    register(schema=schema)
    try:
        command = whole_mixes(by_arm(command, config_dir), config_dir)
        with initialize_config_dir(conf_folder(), version_base=None):
            settings = compose("config", [*command, *searched(config_dir)], return_hydra_config=True)
        choices = settings.hydra.runtime.choices
        with open_dict(settings):
            del settings["hydra"]
        check_choices(settings, choices, [*command, *folder])
        config = typed(settings, schema, command)
    except (HydraException, OmegaConfBaseException) as error:
        raise in_words(error, [*command, *folder], schema) from error
    except RecursionError as error:
        raise in_a_circle() from error
    except yaml.YAMLError as error:
        raise UserError(
            "YAML", " ".join(str(error).split()), "a file that is valid YAML", "correct the file"
        ) from error
    check_effect(config, command)
    check_own_files(config, choices, [*command, *folder])
    return config


def kind_of(settings: DictConfig | Config) -> str:
    """Return what the settings ask for: a study, designs of one arm, a capacity plan, or a comparison."""
    if settings.fidelity.silicon:
        return FIDELITY_SILICON
    if settings.fidelity.compare or settings.fidelity.folder is not None:
        return FIDELITY
    if settings.from_log.replay or settings.from_log.log is not None:
        return FROM_LOG
    if settings.fidelity_live.loads:
        return FIDELITY_LIVE
    if settings.capacity.cards:
        return CAPACITY
    return DESIGNS if settings.sweep.parameters else STUDY


def check_choices(settings: DictConfig, choices: Mapping[str, str], arguments: Sequence[str]) -> None:
    """Raise UserError if an experiment's own value overrides a choice of the command line, or an empty group is set."""
    from helios_sim.policy.telemetry import Goal
    from helios_sim.profile.runtimes import PRESETS

    check_names(choices, arguments)
    known = known_settings(Config)
    for word in arguments:
        name, _, value = word.partition("=")
        if value.strip() == "{}" and (name == "arms" or any(other.startswith(f"{name}.") for other in known)):
            allowed = "settings of a group: an empty one is merged with what is there, and does nothing"
            raise UserError(name, value, allowed, f"name them, such as {name}.KEY=null, or leave it out")
    for group, key, options in (("objective", "goal", tuple(Goal)), ("runtime", "preset", tuple(PRESETS))):
        if given(group, arguments) is None:
            continue
        chosen, value = choices[group], settings[group][key]
        if chosen in options and value != chosen:
            allowed = f"{group}.{key} is set to {value} by the experiment or the command line"
            raise UserError(group, chosen, allowed, f"write {group}.{key}={chosen}")


def check_own_files(config: Config, choices: Mapping[str, str | None], arguments: Sequence[str]) -> None:
    """Raise UserError for settings in the user's own files that have no effect.

    What a file sets may be overwritten by later files, and by the command line.
    """
    after = [word.partition("=")[0].lstrip("+~") for word in arguments if is_override(word)]
    for own in reversed(own_files(choices, arguments)):
        is_last = own.group == EXPERIMENT
        changed = after if is_last else [path for path in (*after, *shipped_paths(choices)) if path != own.group]
        check_written(config, own.values, changed, own.path.name, is_last)
        # arms and their settings never are the reason why another setting has no effect
        after = [*after, *(path for path, _ in leaves(own.values) if not path.startswith(("arms.", "policy.")))]


def to_config(settings: DictConfig, arguments: Sequence[str] = ()) -> Config:
    return typed(settings, Config, arguments)


def typed(settings: DictConfig, schema: type[_Schema], arguments: Sequence[str]) -> _Schema:
    """Return the settings as the schema's dataclass. UserError for a name, a type or a value that cannot be."""
    try:
        name = unknown_setting(schema, OmegaConf.to_container(settings))
        if name is not None:
            raise wrong_setting(name, OmegaConf.select(settings, name), "", arguments, schema)
        wrong = wrong_type(schema, OmegaConf.to_container(settings, resolve=True))
        if wrong is not None:
            key, value, hint = wrong
            raise UserError(key, value, f"must be {kind_in_words(hint)}", f"set {key} to such a value")
        config = OmegaConf.to_object(settings)
    except OmegaConfBaseException as error:
        raise in_words(error, arguments, schema) from error
    assert isinstance(config, schema)
    return config


def settings_page(config: Config) -> str:
    """Return all settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def saved_config(settings: object, where: str) -> Config:
    """Restore a Config from what `asdict` made of it. UserError, about the file `where`, if it is no Config."""
    allowed, fix = "the settings of a study, under configuration", "name the output folder of a study of this version"
    if not isinstance(settings, Mapping):
        raise UserError(where, settings, allowed, fix)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings)))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(where, str(error).strip().splitlines()[0], allowed, fix) from error
    assert isinstance(merged, DictConfig)
    return to_config(merged)
