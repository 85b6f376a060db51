"""Hydra's side: where conf/ lies, the typed schemas, turning settings into a `Config`, and its errors in our words.

What is about Hydra alone serves every command line of the project: such functions take the schema of its settings.
"""

from __future__ import annotations

import contextlib
import io
import re
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from helios_sim.defaults_list import CHOSEN, check_defaults
from helios_sim.errors import UserError
from helios_sim.help import conf_folder, config_dirs
from helios_sim.live.checkpoint.known import SHORT_NAMES
from helios_sim.own_files import EXPERIMENT, check_names, leaves, own_files, package_of, placed, shipped_paths
from helios_sim.study.effects import check_effect, check_written
from helios_sim.study.schema import Config
from helios_sim.untrusted import shortened
from helios_sim.vary.settings import closest, kind_in_words, known_settings, unknown_setting, wrong_type
from helios_sim.words import look_at_files, readable, unreadable

_Schema = TypeVar("_Schema")

OPEN = (  # take new names
    "arms.", "policy.", "exits.parameters.", "workload.mix.tasks.", "workload.mix.after.", "cluster.kinds",
    "cluster.tasks", "cluster.shares", "cluster.bandit.costs", "live.weights.", "live.heads.", "serve.tokenizers.",
)  # fmt: skip
MIXES = ("workload.mix.tasks", "workload.mix.after")  # given whole, they take the place of the experiment's
PRINT_ALL = "--cfg job prints all settings"
DEFAULT = "+experiment=quickstart"
PRESET, ENGINE = "server.preset", "engine"  # the word, and the group of files that it chooses from
# What settings ask for.
STUDY, DESIGNS, FIDELITY, FIDELITY_LIVE = "a study", "designs", "a comparison with a log", "a comparison with live runs"
FIDELITY_SILICON, CAPACITY = "a comparison with published measurements", "a capacity plan"
FROM_LOG = "a study of a log"
# What vLLM and the clients that measure it call settings, and their names here.
ELSEWHERE = {
    **dict.fromkeys(("max_num_seqs", "max_batch_size"), "server.max_running_requests"),
    **dict.fromkeys(("max_num_batched_tokens", "chunked_prefill_size"), "server.max_batch_tokens"),
    **dict.fromkeys(("gpu_memory_utilization", "mem_fraction_static"), "server.memory_utilisation"),
    **dict.fromkeys(("tensor_parallel_size", "tp", "tp_size"), "server.tensor_parallel"),
    **dict.fromkeys(("data_parallel_size", "dp", "dp_size"), "server.replicas"),
    **dict.fromkeys(("block_size", "page_size"), "server.block_tokens"), "enforce_eager": "runtime.preset=eager",
    **dict.fromkeys(("async_scheduling", "overlap_schedule"), "server.schedule_ahead"),
    **dict.fromkeys(("scheduling_policy", "priority"), "server.order"),
    "enable_prefix_caching": "server.enable_prefix_caching",
    **dict.fromkeys(("rate", "request_rate", "qps", "rps", "arrival_rate"), "workload.arrivals.rate_per_s"),
    **dict.fromkeys(("concurrency", "max_concurrency", "streams"), "workload.arrivals.users"),
    "burstiness": "workload.arrivals.cv",
    **dict.fromkeys(("num_prompts", "num_requests", "request_count", "max_requests"), "workload.n_requests"),
    **dict.fromkeys(("input_len", "random_input_len", "isl", "prompt_tokens"), "workload.lengths.prompt"),
    **dict.fromkeys(("output_len", "random_output_len", "osl", "output_tokens"), "workload.lengths.output"),
    **dict.fromkeys(("gpu", "card", "accelerator"), "hardware"), "seed": "seeds", "model": "models",
}  # fmt: skip
BY_HYDRA = {".hydra", "multirun.yaml"}  # what lies in an output folder before anything else was written

_registered: dict[str, type] = {}


def register(name: str = "config_schema", schema: type = Config) -> None:
    """Gives Hydra the schema that conf/ calls `name`. A schema is read once, which takes some 0.05 s."""
    look_at_files()
    if _registered.get(name) is not schema:
        ConfigStore.instance().store(name=name, node=schema)
        _registered[name] = schema


def in_full(arguments: Sequence[str], schema: type[Config] = Config) -> list[str]:
    """The command line as Hydra reads it: `model=X` names the only candidate, for short too, `device=X` what serves.

    `server.preset=X` adds a file of conf/engine, above what an experiment says.

    UserError for words that would run code.
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
                continue  # as it is without the word
            argument = f"+{ENGINE}={value}"
        elif key in ("hydra.run.dir", "hydra.sweep.dir") and value.startswith("~/"):  # which shells leave as it is
            argument = f"{key}={Path(value).expanduser()}"
        found.append(argument)
    return readable(found, known_settings(schema))


def in_order(arguments: Sequence[str]) -> list[str]:
    """Overrides first and together, as Hydra's parser wants them, with an experiment among them."""
    overrides = [a for a in arguments if _is_override(a)]
    flags = [a for a in arguments if a not in overrides]
    for place, override in enumerate(overrides):
        if override.startswith("experiment="):
            overrides[place] = f"+{override}"  # without the + Hydra looks for it among the defaults
    if not any(override.lstrip("+").startswith("experiment=") for override in overrides):
        overrides.append(DEFAULT)
    return [*overrides, *flags]


def _is_override(word: str) -> bool:
    return not word.startswith("-") and ("=" in word or word.startswith("~"))


def whole_mixes(command: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """The command line, where a whole mix of tasks takes the place of the experiment's.

    Hydra would join the two. What the experiment names and the word does not is taken out by words of its own, so that
    the settings that Hydra prints and keeps are those that run.
    """
    mixes = {word: word.partition("=") for word in command if word.partition("=")[0] in MIXES}
    whole = {word: key for word, (key, _, value) in mixes.items() if value.lstrip().startswith("{")}
    if not whole:
        return list(command)
    settings = _composed(command, whole, config_dir)
    found = [f"+{word}" if word in whole else word for word in command]  # + lets it name tasks that are new
    for word, key in whole.items():
        value = OverridesParser.create().parse_override(word).value()
        names = OmegaConf.select(settings, key) or {}
        found += [f"~{key}.{name}" for name in names if isinstance(value, dict) and str(name) not in map(str, value)]
    return in_order(found)


def by_arm(command: Sequence[str], config_dir: str | Path | None = None) -> list[str]:
    """The command line, where words about arms that Hydra cannot read by name are words about all arms.

    `arms.full_depth_opt-1.3b.model=X` becomes `arms={full_depth_opt-1.3b: {model: X}}`, which Hydra joins with what is
    there; `~arms.NAME` sets the arm to null, which leaves it out. UserError where there is no such arm.
    """
    about = [word for word in command if _is_override(word) and _names_arm(word)]
    if not about:
        return list(command)
    names = [str(name) for name in _composed(command, about, config_dir).arms]
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


def _composed(command: Sequence[str], left_out: Collection[str], config_dir: str | Path | None) -> DictConfig:
    """The settings without these words, to see what an experiment names. Their schema is the one registered last."""
    others = [word for word in command if _is_override(word) and word not in left_out and not _names_arm(word)]
    several = any(word in ("-m", "--multirun") for word in command)
    kept = [word for word in others if not (several and "," in word)]  # values of a sweep name nothing
    GlobalHydra.instance().clear()
    with initialize_config_dir(conf_folder(), version_base=None):
        return compose("config", [*kept, *_searched(next(reversed(config_dirs(command)), config_dir))])


def compose_config(
    experiment: str,
    words: Sequence[str] = (),
    config_dir: str | Path | None = None,
    schema: type[Config] = Config,
) -> Config:
    """The settings of an experiment and further words of the command line, without running Hydra's own main.

    `schema`: of a command with further settings of its own. Raises UserError for a name, a key or a value that does
    not exist.
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
            settings = compose("config", [*command, *_searched(config_dir)], return_hydra_config=True)
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


def _searched(config_dir: str | Path | None) -> list[str]:
    return [] if config_dir is None else [f"hydra.searchpath=['file://{Path(config_dir).resolve()}']"]


def kind_of(settings: DictConfig | Config) -> str:
    """What the settings ask for: a study, designs of one arm, a capacity plan, or a comparison."""
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
    """UserError where an experiment's own value hides a choice from the command line."""
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
    """UserError for what the user's own files, of which a study is made, set in vain.

    What a file sets may be undone by those that come after it, and by the command line.
    """
    after = [word.partition("=")[0].lstrip("+~") for word in arguments if _is_override(word)]
    for own in reversed(own_files(choices, arguments)):
        is_last = own.group == EXPERIMENT
        changed = after if is_last else [path for path in (*after, *shipped_paths(choices)) if path != own.group]
        check_written(config, own.values, changed, own.path.name, is_last)
        # that there are arms is no reason for which a setting does not count
        after = [*after, *(path for path, _ in leaves(own.values) if not path.startswith(("arms.", "policy.")))]


def to_config(settings: DictConfig, arguments: Sequence[str] = ()) -> Config:
    return typed(settings, Config, arguments)


def typed(settings: DictConfig, schema: type[_Schema], arguments: Sequence[str]) -> _Schema:
    """The settings as the schema's dataclass. UserError for a name, a type or a value that cannot be."""
    try:
        name = unknown_setting(schema, OmegaConf.to_container(settings))
        if name is not None:
            raise _wrong(name, OmegaConf.select(settings, name), "", arguments, schema)
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
    """All settings as YAML."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def saved_config(settings: object, where: str) -> Config:
    """The settings that `asdict` made of a Config. UserError, about the file `where`, if they are none."""
    allowed, fix = "the settings of a study, under configuration", "name the output folder of a study of this version"
    if not isinstance(settings, Mapping):
        raise UserError(where, settings, allowed, fix)
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.create(dict(settings)))
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(where, str(error).strip().splitlines()[0], allowed, fix) from error
    assert isinstance(merged, DictConfig)
    return to_config(merged)


def in_words(error: Exception, arguments: Sequence[str] = (), schema: type = Config) -> UserError:
    """An error of Hydra or OmegaConf as one message; `arguments` are the command line's."""
    text = str(error)
    if (found := re.match(r"In '([^']+)': ", text)) and (wrong := _wrong_in_file(found[1], text, arguments, schema)):
        return wrong
    if found := re.search(r"Could not find '([^']*)/([^'/]*)'.*?Available options in '[^']*':\s*(.*?)\s*Config search",
                          text, re.DOTALL):  # fmt: skip
        group, option, options = PRESET if found[1] == ENGINE else found[1], found[2], found[3].split()
        near = _nearest_versions(option, options) if group == PRESET else closest(option, options, f"{group}=")
        fix = near or "choose one of these, or name your folder by --config-dir"
        for place in config_dirs(arguments):
            if (Path(place) / found[1] / f"{found[2]}.yml").is_file():
                fix = f"let its name end in .yaml: {Path(place) / found[1] / found[2]}.yml is not looked at"
            if (Path(place) / f"{found[2]}.yaml").is_file():
                fix = f"put {Path(place) / found[2]}.yaml into a folder {found[1]} there"
        if group.startswith("experiment"):
            group, path = "experiment", Path(given("experiment", arguments) or option)
            option = str(path)
            if path.with_suffix(".yaml").is_file():
                folder = path.parent.parent if path.parent.name == "experiment" else "FOLDER"
                fix = f"files are named so: --config-dir {folder} +experiment={path.stem}, from {folder}/experiment"
        return UserError(group, option, f"one of {', '.join(options)}", fix)
    if found := re.search(r"Multiple values for \w+\..*?(\w+): ([\w.-]+)'", text):
        group, name = found[1], found[2]
        word = PRESET if group == ENGINE else group
        words = [w for w in arguments if w.lstrip("+").startswith(f"{group}=")]
        if len(words) > 1 or (words and group != ENGINE):
            several = " ".join(w.replace(f"+{ENGINE}=", f"{PRESET}=") for w in words)
            return UserError(word, several, "one, which there is already", f"write {word}={name} alone")
        fix = f"write override /{group}: {name} in the file"
        return UserError("defaults", f"{group}: {name}", "there is one already", fix)
    if found := re.search(r"Could not override '([^']+)'", text):
        return _wrong(found[1], given(found[1], arguments), str(error.__cause__ or error), arguments, schema)
    if found := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        value = given(found[1], arguments)
        return UserError(found[1], value, "it is a setting already, and + is for new ones", f"write {found[1]}={value}")
    if found := re.search(r"Error merging override (\S+?)=(.*)", text):
        return _wrong(found[1].lstrip("+~"), found[2], str(error.__cause__ or error), arguments, schema)
    if found := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^'=]+)=(.*?)'", text):
        fix = f"write {found[1]}=[...] for a list, or -m for a study of each value"
        return UserError(found[1], found[2], "one value, where commas and functions stand for several", fix)
    if found := re.search(r"Interpolation key '(.*)' not found", text):
        place = next((a.split("=")[0] for a in arguments if "${" + found[1] + "}" in a), "settings")
        return UserError(place, "${" + found[1] + "}", "no such setting to copy", f"correct it; {PRINT_ALL}")
    if found := re.search(r"full_key: (\S+)", text):
        key = found[1]
        if isinstance(error, MissingMandatoryValue):
            return UserError(key, None, "it has no default and needs a value", f"set {key}")
        wrong = _wrong(key, given(key, arguments), text, arguments, schema)
        if file := re.search(r"In '([^']+)'", text):
            wrong = wrong.about(f"{file[1]}: {key}")
        return wrong
    if (wrong_word := unreadable(arguments)) is not None:
        return wrong_word
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return UserError("settings", " ".join(arguments), first.rstrip("."), f"correct it; {PRINT_ALL}")


def in_a_circle() -> UserError:
    """Of files that Hydra cannot stop reading."""
    return UserError("defaults", "a circle", "files of which none names itself through others", "take one of them out")


def _wrong_in_file(name: str, text: str, arguments: Sequence[str], schema: type) -> UserError | None:
    """What is wrong in a user's file of this name below --config-dir; None where that cannot be told from the file."""
    paths = [Path(place) / f"{name}.yaml" for place in config_dirs(arguments)]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        return None
    beside = re.search(r"Could not find 'experiment/[^']*?(\w+)/([\w.-]+)'", text)
    if name != "config" and (found := beside):
        fix = f"write override /{found[1]}: {found[2]}, for a group of this program"
        return UserError(f"{name}: defaults", f"{found[1]}: {found[2]}", "no such file beside it", fix)
    content = path.read_text(encoding="utf-8", errors="replace")
    if name.startswith("experiment/") and not re.match(r"(\s*(#\s*@.*)?\n)*\s*#\s*@package _global_", content):
        told = shortened(content.partition("\n")[0])
        allowed = "# @package _global_ in its first line: without it Hydra takes the settings for others"
        return UserError(str(path), told, allowed, "put that line first, without a byte order mark before it")
    with contextlib.suppress(OmegaConfBaseException, yaml.YAMLError, ValueError):
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(values, dict):
            return UserError(str(path), shortened(values), "settings, KEY: VALUE", "correct the file")
        if (odd := _odd_name(values)) is not None:
            return UserError(f"{name}: {odd[0]}", odd[1], "a name, which is a text", f'put it in quotes: "{odd[1]}"')
        package = package_of(content, name.rpartition("/")[0] if not name.startswith("experiment/") else "")
        if package.partition(".")[0] not in ("", *known_settings(schema)):
            allowed = "a group of settings, or _global_ for all of them"
            return UserError(f"{path}: # @package", package, allowed, "correct it in the first line")
        values = placed({str(key): value for key, value in values.items()}, package)
        key = found[1] if (found := re.search(r"full_key: (\S+)", text)) else ""
        unknown, wrong = unknown_setting(schema, values), wrong_type(schema, values)
        if wrong is not None and wrong[0].endswith(key) and not str(wrong[1]).startswith("${"):
            allowed = f"must be {kind_in_words(wrong[2])}"
            fix = "correct the file"
            if isinstance(wrong[1], str) and (Path(conf_folder()) / wrong[0] / f"{wrong[1]}.yaml").is_file():
                fix = f"write override /{wrong[0]}: {wrong[1]} among the defaults at the beginning of the file"
            return UserError(f"{name}: {wrong[0]}", shortened(wrong[1]), allowed, fix)
        if unknown is not None and unknown.endswith(key):
            value = OmegaConf.select(OmegaConf.create(values), unknown)
            return _wrong(unknown, value, "", arguments, schema).about(f"{name}: {unknown}")
    return None


def _odd_name(values: Any, path: str = "") -> tuple[str, Any] | None:
    """The place of the first key that is no text, and the key."""
    if isinstance(values, dict):
        for key, value in values.items():
            if not isinstance(key, str):
                return path or "settings", key
            if (found := _odd_name(value, f"{path}.{key}" if path else key)) is not None:
                return found
    return None


def _nearest_versions(option: str, options: Sequence[str]) -> str:
    """A fix that names the versions of the same engine around the one that is not known; "" where that is none."""
    engine, _, version = option.rpartition("-")
    wanted = [int(part) for part in re.findall(r"\d+", version)[:2]]
    there = {
        name: [int(part) for part in name.rpartition("-")[2].split(".")] for name in options
        if name.startswith(f"{engine}-")
    }  # fmt: skip
    if not wanted or not there:
        return closest(option, options, f"{PRESET}=")
    below = max((v for v in there.values() if v <= wanted), default=None)
    above = min((v for v in there.values() if v >= wanted), default=None)
    return f"the nearest: {' and '.join(name for name, v in there.items() if v in (below, above))}"


def given(key: str, arguments: Sequence[str]) -> str | None:
    """What the command line sets a key to."""
    for argument in reversed(arguments):
        name, equals, value = argument.partition("=")
        if equals and name.lstrip("+~").split("@")[0] == key:
            return value
    return None


def check_flags(arguments: Sequence[str], program: str = "helios_sim") -> None:
    """UserError for what argparse would refuse with a page of usage and status 2. Hydra's parser is not public."""
    said = io.StringIO()
    see = f"see python -m {program} --help"
    dashed = next((word for word in arguments if word.startswith("--exp")), "--experimental-rerun")
    if not dashed.startswith("--experimental-rerun"):  # argparse would take it for the beginning of this
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
    for group in CHOSEN:
        named = [word.partition("=") for word in parsed.overrides if word.lstrip("+").startswith(f"{group}=")]
        files = dict.fromkeys(value for _, _, value in named)
        if len(files) > 1:
            fix = "choose one; more arms are '+arms.NAME={policy: ...}'" if group == "policy" else "choose one"
            raise UserError(group, " and ".join(files), "one: only the last would run", fix)
    for override in parsed.overrides:
        if "=" not in override and not override.startswith("~"):
            raise UserError("argument", override, "settings are written key=value", see)
        name, _, value = override.partition("=")
        group = name.lstrip("+~").split("@")[0]
        if value.strip().startswith("[") and (Path(conf_folder()) / group).is_dir():
            options = ", ".join(sorted(file.stem for file in (Path(conf_folder()) / group).glob("*.yaml")))
            raise UserError(group, value, f"one of {options}: settings of two would be mixed", "choose one")
    folder = parsed.config_dir
    if folder is not None and not Path(folder).is_dir():
        raise UserError("--config-dir", folder, "must be a folder that holds config groups", "correct the path")
    for name in [] if folder is None else (given("experiment", parsed.overrides) or "").split(","):
        file = Path(folder) / "experiment" / f"{name.removesuffix('.yaml')}.yaml"
        if name and file.is_file():
            check_defaults(file)


def leave_no_trace(folder: Path, worthless: Collection[str] = ()) -> None:
    """Remove a folder in which nothing but Hydra's own files and `worthless` ones lie, and empty ones above it here."""
    here = Path.cwd()
    folder = folder.resolve()
    above = [parent for parent in folder.parents if here in parent.parents]
    for place in (folder, *above):
        if place == here or not place.is_dir() or not {e.name for e in place.iterdir()} <= BY_HYDRA | {*worthless}:
            return
        shutil.rmtree(place)


_OF_SERVE = ("port", "host", "api_key", "api_key_file")  # as vLLM's server calls them
_NOT_MODELLED = re.compile(r"(pipeline|expert|context|sequence)_parallel")


def _wrong(key: str, value: object, cause: str, arguments: Sequence[str] = (), schema: type = Config) -> UserError:
    """A key that does not exist, or a value that it cannot have."""
    known = known_settings(schema)
    if key in known and (inner := _wrong_inside(key, value, cause, known[key])) is not None:
        return inner
    if key in known and "is not in struct" not in cause:
        return UserError(key, value, f"must be {kind_in_words(known[key])}", f"set {key} to such a value")
    group = key.split(".")[0]
    if group == "policy" and schema is Config and not key.startswith("policy.settings."):
        return _wrong_policy_key(key, value, arguments)
    key, value = _of_one_arm(key, value)
    if key.startswith("arms.") and (of_arm := _wrong_arm_key(key, value, arguments)) is not None:
        return of_arm
    if key in known or key.startswith(OPEN):
        allowed = "a new name in a mapping is added with +"
        return UserError(key, value, allowed, f"write '+{key}={value}'")
    if group == "hydra":
        return UserError(key, value, "no such setting of Hydra", "--cfg hydra prints all of them")
    if (parallel := _NOT_MODELLED.search(key)) is not None:
        allowed = f"left out: {parallel[1]} parallelism is not modelled; a group of cards splits every matrix"
        return UserError(key, value, allowed, "set hardware=4xh100, or server.replicas for copies of the model")
    if key == PRESET:
        return UserError(key, value, "a word of the command line", f"write - /{ENGINE}: {value} among the defaults")
    if key == ENGINE:
        return UserError(key, value, "no such setting", f"write {PRESET}={value}")
    if key in _OF_SERVE or (group == "serve" and group not in known):
        return UserError(key, value, "no such setting", "settings serve.* are those of python -m helios_sim.serve")
    parent, _, last = key.rpartition(".")
    last = last.replace("-", "_")
    own, of_one = _names_in(schema, parent)
    while of_one and not own:  # a key with dots, in a file
        parent = parent.rpartition(".")[0]
        own, of_one = _names_in(schema, parent)
    named = ELSEWHERE.get(last, "")
    # the right name in the wrong place, the least deep of several
    same = min((name for name in known if name.split(".")[-1] == last), key=lambda name: name.count("."), default=None)
    if named.split("=")[0] in known and not of_one:
        return UserError(key, value, "no such setting", f"you may have meant {named}; {PRINT_ALL}")
    if near := get_close_matches(last, own, 1):
        return UserError(key, value, "no such setting", f"you may have meant {parent}.{near[0]}")
    if same and not of_one:
        return UserError(key, value, "no such setting", f"you may have meant {same}; {PRINT_ALL}")
    if 0 < len(own) < 30:
        return UserError(key, value, "no such setting", f"{parent} has {', '.join(own)}")
    return UserError(key, value, "no such setting", closest(key, list(known)) or PRINT_ALL)


def _names_in(schema: Any, path: str) -> tuple[list[str], bool]:
    """The settings of the group at this path, none where it is no group; and whether it is in one of several alike."""
    of_one = False
    for part in path.split(".") if path else ():
        if get_origin(schema) in (list, dict):
            schema, of_one = get_args(schema)[-1], True
        else:
            schema = get_type_hints(schema).get(part) if is_dataclass(schema) else None
    return [f.name for f in fields(schema)] if path and is_dataclass(schema) else [], of_one


def _wrong_inside(key: str, value: object, cause: str, hint: Any) -> UserError | None:
    """The same, where it is a setting of a group within the value; None: it is the value itself."""
    groups = {group.__name__: group for group in _groups_in(hint)}
    if (found := re.search(r"Key '([^']+)' not in '(\w+)'", cause)) and found[2] in groups:
        names = [f.name for f in fields(groups[found[2]])]
        near = get_close_matches(found[1], names, 1)
        fix = f"you may have meant {near[0]}" if near else "correct the name or leave it out"
        return UserError(key, value, f"{found[1]} is none of its settings: {', '.join(names)}", fix)
    if (found := re.search(r"full_key: (\w+)\s+reference_type=(\w+)", cause)) and found[2] in groups:
        wanted = get_type_hints(groups[found[2]]).get(found[1])
        if wanted is not None:
            return UserError(key, value, f"{found[1]} in it must be {kind_in_words(wanted)}", f"correct {found[1]}")
    return None


def _groups_in(hint: Any) -> Iterator[Any]:
    """The groups of settings within a type."""
    if is_dataclass(hint):
        yield hint
        for inner in get_type_hints(hint).values():
            yield from _groups_in(inner)
    for part in get_args(hint):
        yield from _groups_in(part)


def _wrong_policy_key(key: str, value: object, arguments: Sequence[str]) -> UserError:
    policy = given("policy", arguments)
    file = Path(conf_folder()) / "policy" / f"{policy}.yaml"
    if policy in (None, "none") or not file.is_file():
        allowed = "settings of a policy need a policy"
        return UserError(key, value, allowed, "choose one first, such as policy=helios policy.round_requests=50")
    names = [f"policy.{name}" for name in _settings_in(file) if name not in ("name", "arm")]
    allowed = f"{policy} knows {', '.join(name.removeprefix('policy.') for name in names)}"
    return UserError(key, value, allowed, closest(key, names) or "correct the name or leave it out")


def _of_one_arm(key: str, value: object) -> tuple[str, object]:
    """`arms.NAME.KEY` and its value, where `by_arm` wrote arms={NAME: {KEY: value}} for it."""
    if key == "arms" and isinstance(value, str):
        with contextlib.suppress(HydraException, RecursionError):
            value = OverridesParser.create().parse_override(f"arms={value}").value()
    while key.startswith("arms") and isinstance(value, dict) and len(value) == 1 and key.count(".") < 8:
        (name, value), = value.items()
        key = f"{key}.{name}"
    return key, value


def _wrong_arm_key(key: str, value: object, arguments: Sequence[str]) -> UserError | None:
    """The same, where an arm of this name is there and its policy has no such setting; None: it is a new name."""
    from helios_sim.policy.registry import parameters_of
    from helios_sim.study.build import OF_THE_ARM

    policy, setting = "", ""
    with contextlib.suppress(HydraException, OmegaConfBaseException, UserError, yaml.YAMLError):
        about = [word for word in arguments if _is_override(word) and re.match(r"[+~]*arms[.=]", word)]
        arms = _composed(arguments, about, None).arms
        arm = max((str(name) for name in arms if key.startswith(f"arms.{name}.") and arms[name]), key=len, default=None)
        if arm is not None:
            policy, setting = str(arms[arm].get("policy")), key.removeprefix(f"arms.{arm}.").partition(".")[0]
            known = (*OF_THE_ARM, *parameters_of(policy))
    if not policy or setting in known:
        return None
    allowed = f"{policy} knows {', '.join(name for name in known if name != 'policy')}"
    return UserError(key, value, allowed, closest(setting, known) or "correct the name or leave it out")


def _settings_in(file: Path) -> list[str]:
    """Keys of a file of settings and of the files that it builds on."""
    found: dict[str, None] = {}
    for key, value in OmegaConf.load(file).items_ex(resolve=False):  # some have no default
        if key != "defaults":
            found[str(key)] = None
            continue
        for name in (str(entry).removesuffix("@_here_") for entry in value if entry != "_self_"):
            folder = Path(conf_folder()) if name.startswith("/") else file.parent
            found |= dict.fromkeys(_settings_in(folder / f"{name.removeprefix('/')}.yaml"))
    return list(found)
