"""Turns errors of Hydra and OmegaConf about settings into one message: key, value, what is allowed and the fix."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from helios_sim.command_line import ENGINE, PRESET, composed, given, is_override
from helios_sim.defaults_list import CHOSEN
from helios_sim.errors import UserError, near_names
from helios_sim.help import conf_folder, config_dirs
from helios_sim.own_files import package_of, placed
from helios_sim.study.schema import Config
from helios_sim.untrusted import shortened
from helios_sim.vary.settings import closest, kind_in_words, known_settings, unknown_setting, wrong_type
from helios_sim.words import unreadable

OPEN = (  # groups and mappings that take new names
    "arms.", "policy.", "exits.parameters.", "workload.mix.tasks.", "workload.mix.after.", "cluster.kinds",
    "cluster.tasks", "cluster.shares", "cluster.bandit.costs", "live.weights.", "live.heads.", "serve.tokenizers.",
)  # fmt: skip
MAPPINGS = ("sweep.parameters",)  # from names to groups of settings
PRINT_ALL = "--cfg job prints all settings"
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
_OF_SERVE = ("port", "host", "api_key", "api_key_file")  # as vLLM's server calls them
_NOT_MODELLED = re.compile(r"(pipeline|expert|context|sequence)_parallel")


def in_words(error: Exception, arguments: Sequence[str] = (), schema: type = Config) -> UserError:
    """Turn an error of Hydra or OmegaConf into one message; `arguments` are the command line's."""
    text = str(error)
    if (found := re.match(r"In '([^']+)': ", text)) and (wrong := _wrong_in_file(found[1], text, arguments, schema)):
        return wrong
    if found := re.search(r"Could not find '([^']*)/([^'/]*)'.*?Available options in '[^']*':\s*(.*?)\s*Config search",
                          text, re.DOTALL):  # fmt: skip
        group, option, options = PRESET if found[1] == ENGINE else found[1], found[2], found[3].split()
        if "/" in found[1] and (known := found[1].partition("/")[0]) in CHOSEN:
            fix = f"write {known}={option}, without folders" if option in options else f"name one of these by {known}="
            return UserError(known, given(known, arguments), f"one of {', '.join(options)}", fix)
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
        return wrong_setting(found[1], given(found[1], arguments), str(error.__cause__ or error), arguments, schema)
    if found := re.search(r"Could not append to config\. An item is already at '([^']+)'", text):
        value = given(found[1], arguments)
        return UserError(found[1], value, "it is a setting already, and + is for new ones", f"write {found[1]}={value}")
    if found := re.search(r"Error merging override (\S+?)=(.*)", text):
        return wrong_setting(found[1].lstrip("+~"), found[2], str(error.__cause__ or error), arguments, schema)
    if found := re.search(r"Error merging override ~(\S+)", text):
        allowed = "a setting that stays: ~ takes out arms, tasks and the like"
        return UserError(found[1], "~", allowed, f"give it another value: {found[1]}=...; {PRINT_ALL}")
    if found := re.search(r"does not support sweep type : (\w+)_SWEEP", text):
        word = next((w for w in arguments if f"{found[1].lower()}(" in w), found[1].lower())
        return UserError("argument", word, "values one by one", "name them: -m key=1,2,3, or range(1,4)")
    if found := re.search(r"(?:Ambiguous value for argument|Sweep parameters) '([^'=]+)=(.*?)'", text):
        fix = f"write {found[1]}=[...] for a list, or -m for a study of each value"
        if found[1] in CHOSEN:
            fix = "choose one, or begin with -m for a study of each"
        return UserError(found[1], found[2], "one value, where commas and functions stand for several", fix)
    if found := re.search(r"Interpolation key '(.*)' not found", text):
        place = next((a.split("=")[0] for a in arguments if "${" + found[1] + "}" in a), "settings")
        return UserError(place, "${" + found[1] + "}", "no such setting to copy", f"correct it; {PRINT_ALL}")
    if found := re.search(r"full_key: (\S+)", text):
        key = found[1]
        if isinstance(error, MissingMandatoryValue):
            return UserError(key, None, "it has no default and needs a value", f"set {key}")
        wrong = wrong_setting(key, given(key, arguments), text, arguments, schema)
        if file := re.search(r"In '([^']+)'", text):
            wrong = wrong.about(f"{file[1]}: {key}")
        return wrong
    if (wrong_word := unreadable(arguments)) is not None:
        return wrong_word
    first = text.strip().splitlines()[0] if text.strip() else type(error).__name__
    return UserError("settings", " ".join(arguments), first.rstrip("."), f"correct it; {PRINT_ALL}")


def in_a_circle() -> UserError:
    """Return the error for files that name each other in a circle, which Hydra cannot stop reading."""
    return UserError("defaults", "a circle", "files of which none names itself through others", "take one of them out")


def _wrong_in_file(name: str, text: str, arguments: Sequence[str], schema: type) -> UserError | None:
    """Return what is wrong in a user's file of this name below --config-dir; None if the file does not tell."""
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
            return wrong_setting(unknown, value, "", arguments, schema).about(f"{name}: {unknown}")
    return None


def _odd_name(values: Any, path: str = "") -> tuple[str, Any] | None:
    """Return the place of the first key that is no text, and the key; None if all keys are texts."""
    if isinstance(values, dict):
        for key, value in values.items():
            if not isinstance(key, str):
                return path or "settings", key
            if (found := _odd_name(value, f"{path}.{key}" if path else key)) is not None:
                return found
    return None


def _nearest_versions(option: str, options: Sequence[str]) -> str:
    """Return a fix that names the versions around an unknown version of an engine; without any, the closest name."""
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


def wrong_setting(
    key: str, value: object, cause: str, arguments: Sequence[str] = (), schema: type = Config
) -> UserError:
    """Return the error about a key that does not exist, or a value that the key cannot have."""
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
    of_mapping = next((name for name in MAPPINGS if key.startswith(f"{name}.")), "")
    new, _, below = key.removeprefix(f"{of_mapping}.").partition(".")
    if of_mapping and below in ("", *_names_in(schema, f"{of_mapping}.{new}")[0]):
        given_so = f"{{{below}: {value}, ...}}" if below else value
        fix = f"write '+{of_mapping}={{{new}: {given_so}}}'"
        return UserError(key, value, "a setting of what is there already; what is new is given whole", fix)
    if key.startswith(OPEN) and "could not be converted" in cause:
        return UserError(key, value, "must be a number" if "loat" in cause or "nteger" in cause else "of another type",
                         f"set {key} to such a value")  # fmt: skip
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
    while of_one and not own:  # a key of a file may contain dots
        parent = parent.rpartition(".")[0]
        own, of_one = _names_in(schema, parent)
    named = ELSEWHERE.get(last, "")
    # the right name in the wrong place, the least deep of several
    same = min((name for name in known if name.split(".")[-1] == last), key=lambda name: name.count("."), default=None)
    if named.split("=")[0] in known and not of_one:
        return UserError(key, value, "no such setting", f"you may have meant {named}; {PRINT_ALL}")
    if near := near_names(last, own):
        return UserError(key, value, "no such setting", f"you may have meant {parent}.{near[0]}")
    beside, _ = _names_in(schema, parent.rpartition(".")[0]) if parent else ([], False)
    if parent and not own and not of_one and beside:  # there is no such group
        above, _, name = parent.rpartition(".")
        near_group = near_names(name, beside)
        meant = f"you may have meant {above}.{near_group[0]}".replace(" .", " ") if near_group else (
            f"{above or 'a study'} has {', '.join(beside[:30])}")  # fmt: skip
        exact = f"you may have meant {same}" if same and near_group and same.startswith(f"{above}.".lstrip(".")) else ""
        return UserError(key, value, "no such setting", f"{exact or meant}; {PRINT_ALL}")
    if same and not of_one:
        return UserError(key, value, "no such setting", f"you may have meant {same}; {PRINT_ALL}")
    if 0 < len(own) < 30:
        return UserError(key, value, "no such setting", f"{parent} has {', '.join(own)}")
    return UserError(key, value, "no such setting", closest(key, list(known)) or PRINT_ALL)


def _names_in(schema: Any, path: str) -> tuple[list[str], bool]:
    """Return the settings of the group at this path, none if it is no group; and whether a list or mapping holds it."""
    of_one = False
    for part in path.split(".") if path else ():
        if get_origin(schema) in (list, dict):
            schema, of_one = get_args(schema)[-1], True
        else:
            schema = get_type_hints(schema).get(part) if is_dataclass(schema) else None
    return [f.name for f in fields(schema)] if path and is_dataclass(schema) else [], of_one


def _wrong_inside(key: str, value: object, cause: str, hint: Any) -> UserError | None:
    """Return the error about a setting of a group within the value; None if the value itself is wrong."""
    groups = {group.__name__: group for group in _groups_in(hint)}
    if (found := re.search(r"Key '([^']+)' not in '(\w+)'", cause)) and found[2] in groups:
        names = [f.name for f in fields(groups[found[2]])]
        near = near_names(found[1], names)
        fix = f"you may have meant {near[0]}" if near else "correct the name or leave it out"
        return UserError(key, value, f"{found[1]} is none of its settings: {', '.join(names)}", fix)
    if (found := re.search(r"full_key: (?:[\w.]+\.)?(\w+)\s+reference_type=(\w+)", cause)) and found[2] in groups:
        wanted = get_type_hints(groups[found[2]]).get(found[1])
        if wanted is not None and found[1] != key.rpartition(".")[2]:
            return UserError(key, value, f"{found[1]} in it must be {kind_in_words(wanted)}", f"correct {found[1]}")
    return None


def _groups_in(hint: Any) -> Iterator[Any]:
    """Yield the groups of settings within a type."""
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
    """Return `arms.NAME.KEY` and its value, if `by_arm` wrote them as arms={NAME: {KEY: value}}."""
    if key == "arms" and isinstance(value, str):
        with contextlib.suppress(HydraException, RecursionError):
            value = OverridesParser.create().parse_override(f"arms={value}").value()
    while key.startswith("arms") and isinstance(value, dict) and len(value) == 1 and key.count(".") < 8:
        (name, value), = value.items()
        key = f"{key}.{name}"
    return key, value


def _wrong_arm_key(key: str, value: object, arguments: Sequence[str]) -> UserError | None:
    """Return the error if there is an arm of this name, but its policy has no such setting; else None."""
    from helios_sim.policy.registry import parameters_of
    from helios_sim.study.build import OF_THE_ARM

    policy, setting = "", ""
    with contextlib.suppress(HydraException, OmegaConfBaseException, UserError, yaml.YAMLError):
        about = [word for word in arguments if is_override(word) and re.match(r"[+~]*arms[.=]", word)]
        arms = composed(arguments, about, None).arms
        arm = max((str(name) for name in arms if key.startswith(f"arms.{name}.") and arms[name]), key=len, default=None)
        if arm is not None:
            policy, setting = str(arms[arm].get("policy")), key.removeprefix(f"arms.{arm}.").partition(".")[0]
            known = (*OF_THE_ARM, *parameters_of(policy))
    if not policy or setting in known:
        return None
    allowed = f"{policy} knows {', '.join(name for name in known if name != 'policy')}"
    return UserError(key, value, allowed, closest(setting, known) or "correct the name or leave it out")


def _settings_in(file: Path) -> list[str]:
    """Return the keys of a file of settings and of the files that it builds on."""
    found: dict[str, None] = {}
    for key, value in OmegaConf.load(file).items_ex(resolve=False):  # some have no default
        if key != "defaults":
            found[str(key)] = None
            continue
        for name in (str(entry).removesuffix("@_here_") for entry in value if entry != "_self_"):
            folder = Path(conf_folder()) if name.startswith("/") else file.parent
            found |= dict.fromkeys(_settings_in(folder / f"{name.removeprefix('/')}.yaml"))
    return list(found)
