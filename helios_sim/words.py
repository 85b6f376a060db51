"""Settings as users write them: words of the command line, and YAML files of their own, before Hydra reads them.

What could run code, read the environment or fill the memory is refused: `_target_`, resolvers, files that are too long,
too deep, or grow without bound by their anchors.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from hydra._internal.sources_registry import SourcesRegistry
from hydra.conf import HydraConf
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.errors import HydraException

from helios_sim.composing import keep_what_is_read, loaded
from helios_sim.errors import UserError
from helios_sim.help import conf_folder
from helios_sim.own_files import package_of
from helios_sim.untrusted import read_bytes, shortened

HYDRAS = tuple(f.name for f in fields(HydraConf))
MOST_BYTES = 1 << 18  # of a YAML file
MOST_VALUES = 100_000  # of a YAML file, anchors written out
TEXTS = ("hydra.run.dir", "hydra.sweep.dir", "live.weights.", "live.heads.")  # text settings, or their prefixes
_RESOLVER = re.compile(r"\$\{\s*([\w.]+)\s*:")
_OF_HYDRA = ("now", "hydra")  # resolvers that name output folders
_OCTAL_OR_CLOCK = re.compile(r"[-+]?(0[0-7_]+|[\d_]+(:[0-5]?\d)+(\.[\d_]*)?)")
_GROUPS = ("workload", "policy", "objective", "runtime")  # groups in which a file holds the settings of that group
_FIX = "correct the file, or take it out of that folder"


def _with_asserts() -> None:
    """Restore two methods of Hydra's parser under `python -O`: their asserts step over a colon and a bracket."""
    from importlib.util import find_spec

    from hydra.core.override_parser import overrides_visitor

    spec = find_spec(overrides_visitor.__name__)
    assert spec is not None
    names: dict[str, Any] = {"__name__": overrides_visitor.__name__}
    source = Path(str(spec.origin)).read_text(encoding="utf-8")
    exec(compile(source, str(spec.origin), "exec", optimize=0), names)  # noqa: S102 - Hydra's own file
    for name in ("visitDictKeyValuePair", "visitFunction"):
        setattr(overrides_visitor.HydraOverrideVisitor, name, vars(names["HydraOverrideVisitor"])[name])


if not __debug__:
    _with_asserts()


def readable(arguments: Sequence[str], kinds: Mapping[str, Any]) -> list[str]:
    """Return the words with quotes around texts that Hydra could not read, such as paths with = , ( [ ' # or umlauts.

    `kinds`: types of settings by path. Raises UserError for a word that would run code.
    """
    several = any(word in ("-m", "--multirun") for word in arguments)
    found = []
    for word in arguments:
        key, equals, value = word.partition("=")
        name = key.lstrip("+~").partition("@")[0]
        if not word.startswith("-") and equals:
            _check_word(name, value)
            if name.startswith("hydra.") and name.split(".")[1] not in HYDRAS:
                raise UserError(name, value, "no such setting of Hydra", "--cfg hydra prints all of them")
            if kinds.get(name) is bool and value.strip().lstrip("+-").isdecimal() and value.strip() not in ("0", "1"):
                raise UserError(name, value, "true or false", "write one of these")
            if _is_text(name, kinds) and not _is_read(word, several):
                word = f"{key}={_quoted(value)}"
        found.append(word)
    return found


def unreadable(arguments: Iterable[str]) -> UserError | None:
    """Return an error, in our words, about the first word that Hydra's parser does not take; None if it takes all."""
    for word in arguments:
        if not word.startswith("-") and "=" in word:
            try:
                OverridesParser.create().parse_override(word)
            except (HydraException, RecursionError) as error:
                reason = re.sub(r" expecting \{.*", "", str(error).split("\n")[0])
                fix = _fix_of(word)
                hidden = next((sign for sign in word if not sign.isprintable()), None)
                if hidden is not None:
                    fix = f"take out U+{ord(hidden):04X}, which does not show"
                    fix += ": the script has line ends of Windows" if hidden == "\r" else ""
                return UserError("argument", word, f"cannot be read: {reason}", fix)
    return None


def _fix_of(word: str) -> str:
    key, _, value = word.partition("=")
    if any(sign.isspace() for sign in key.strip()):
        return "leave out the blanks in the name"
    if ".." in key or key.endswith("."):
        return "write one point between names"
    if "[" in key:
        return f"write points between names: {re.sub(r'[][]+', '.', key).strip('.')}=VALUE"
    if value.startswith("="):
        return "write key=value, with one ="
    if len(key) - len(key.lstrip("+~")) > 2:
        return "write + before a new name, ++ before one that may be there, or neither"
    if re.search(r",\s*([\]})]|$)", value):
        return "leave out the last comma, after which nothing stands"
    if any(sign in word for sign in "\u201c\u201d\u2018\u2019\u201e"):
        return "write plain quotes, ' or \", or none"
    digit = next((sign for sign in value if sign.isdigit() and not sign.isascii()), None)
    if digit is not None:
        return f"write the digit {digit} as {unicodedata.digit(digit)}"
    return "write key=value; put quotes around a value that holds spaces, commas, braces or colons"


def look_at_files() -> None:
    """Check every YAML file before Hydra loads it, from now on. Shipped files are not checked, and are read once.

    Loading a file that could run code or fill the memory then raises UserError.
    """
    keep_what_is_read()
    Plugins.instance()  # it loads the class of sources anew, so an import would give another class
    sources: Any = SourcesRegistry.instance().resolve("file")
    load = sources.load_config
    if getattr(load, "looks_first", False):
        return

    def checked(source: Any, config_path: str) -> Any:
        folder, name = Path(source.path.removeprefix("file://")), source._normalize_file_name(config_path)
        if (folder / name).is_file():
            if folder.resolve() == Path(conf_folder()).resolve():
                return loaded(source, folder / name)
            check_file(folder / name)
        return load(source, config_path)

    setattr(checked, "looks_first", True)  # noqa: B010 - functions have no such attribute for a type checker
    sources.load_config = checked


def check_file(file: Path) -> None:
    """Raise UserError for a file that could run code or fill the memory. Invalid YAML is left to Hydra."""
    content = read_bytes(file, MOST_BYTES, _FIX)
    try:
        root = yaml.compose(content.decode("utf-8"), Loader=yaml.SafeLoader)
        size = 0 if root is None else _Looked(file).size(root, "")
    except UnicodeDecodeError as error:
        raise UserError(str(file), f"byte {error.start + 1}", "text in UTF-8", _FIX) from None
    except yaml.YAMLError:
        return
    except RecursionError:
        raise UserError(str(file), "nested too deeply", "settings, a few levels deep", _FIX) from None
    if isinstance(root, yaml.MappingNode):
        _check_package(file, content.decode("utf-8"), [str(key.value) for key, _ in root.value])
    if size > MOST_VALUES:
        raise UserError(str(file), f"{size} values", f"at most {MOST_VALUES}, anchors written out", _FIX)


def _check_package(file: Path, text: str, names: Sequence[str]) -> None:
    """Raise UserError for a file of a group that names the group again, or an engine's that is not `_global_`."""
    group = file.parent.name
    if package_of(text, "none") != "none" or group not in (*_GROUPS, "engine"):
        return
    if group == "engine":
        fix = "put that line first: settings of a server and its runtime are in groups of their own"
        raise UserError(str(file), shortened(text.partition("\n")[0]), "# @package _global_ in its first line", fix)
    if group in names:
        allowed = f"the settings of {group} themselves: what is in the folder {group} goes below it"
        fix = f"leave out {group}: and move what is below it to the left, or begin with # @package _global_"
        raise UserError(str(file), f"{group}:", allowed, fix)


class _Looked:
    """Checks every node of a YAML file once, and counts its values."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._sizes: dict[int, int] = {}  # by node: values in it, itself included; 0 while they are being counted

    def size(self, node: yaml.Node, path: str) -> int:
        known = self._sizes.get(id(node))
        if known == 0:
            raise UserError(str(self._file), path, "a file without anchors that contain themselves", _FIX)
        if known is None:
            self._sizes[id(node)] = 0
            self._sizes[id(node)] = known = 1 + self._below(node, path)
        return known

    def _below(self, node: yaml.Node, path: str) -> int:
        if isinstance(node, yaml.MappingNode):
            return sum(self._entry(key, value, path) for key, value in node.value)
        if isinstance(node, yaml.SequenceNode):
            return sum(self.size(item, path) for item in node.value)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None and node.tag.endswith((":int", ":float"))
        if plain and _OCTAL_OR_CLOCK.fullmatch(node.value):
            allowed = "a plain number, or a text in quotes: YAML takes 010 for 8 and 1:30 for 90"
            raise UserError(f"{self._file}: {path}", node.value, allowed, "write it out")
        self._check(path, node.value)
        return 0

    def _entry(self, key: yaml.Node, value: yaml.Node, path: str) -> int:
        name = str(key.value) if isinstance(key, yaml.ScalarNode) else "?"
        below = f"{path}.{name}" if path else name
        self._check(below, "")
        return self.size(value, below)

    def _check(self, path: str, value: str) -> None:
        try:
            _check_word(path, value)
        except UserError as error:
            raise error.about(f"{self._file}: {error.key}") from None


def _check_word(name: str, value: str) -> None:
    if "_target_" in name or "_target_" in value:
        raise UserError(name, value, "settings name no code to run", "leave _target_ out; a policy of your own is "
                        "policy=custom policy.object=my_policy:MyPolicy")  # fmt: skip
    for resolver in _RESOLVER.findall(value):
        if not (resolver in _OF_HYDRA and name.startswith("hydra.")):
            raise UserError(name, value, f"settings call no resolver, as ${{{resolver}:...}} does", "write the value")


def _is_text(name: str, kinds: Mapping[str, Any]) -> bool:
    kind = kinds.get(name)
    return name.startswith(TEXTS) or kind is str or kind == (str | None)


def _is_read(word: str, several: bool) -> bool:
    try:
        read = OverridesParser.create().parse_override(word)
        return several or not read.is_sweep_override()
    except (HydraException, RecursionError):
        return False


def _quoted(value: str) -> str:
    """Put a value in quotes as Hydra reads them: backslashes count only before a quote."""
    return "'" + re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + (r"\'" if m[2] else ""), value) + "'"
