"""The page that `--help` prints: conf/hydra/help with the groups of conf/, without loading Hydra for it."""

from __future__ import annotations

import re
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import yaml

from helios_sim.errors import UserError

NOT_CHOSEN = ("campaign", "helios", "hydra", "paper")  # groups of another program, and of parts that other files share
WIDTH = 120


def conf_folder() -> str:
    """Return conf/: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).resolve().parent
    for folder in (package.parent / "conf", package / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise UserError("conf", str(package.parent / "conf"), "a folder with config.yaml", "reinstall the package")


def is_asked(command: Sequence[str]) -> bool:
    return bool({"--help", "-h"} & {*command})


def help_text(program: str, command: Sequence[str]) -> str:
    """Return the program's page, with the groups that a folder named by --config-dir adds."""
    conf = Path(conf_folder())
    page = yaml.safe_load((conf / "hydra" / "help" / f"{program}.yaml").read_text(encoding="utf-8"))
    folders = [conf, *(Path(folder) for folder in config_dirs(command))]
    text: str = page["template"].replace("$APP_CONFIG_GROUPS", _groups(folders))
    for part in ("header", "footer"):
        text = text.replace(f"${{hydra.help.{part}}}", page[part])
    width = min(WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else WIDTH
    lines = text.splitlines() if width == WIDTH else _joined(text.splitlines())
    return "\n".join(part for line in lines for part in _wrapped(line, width))


def _joined(lines: Sequence[str]) -> list[str]:
    """Join each paragraph that was broken for a wide terminal into one line."""
    found: list[str] = []
    for line in lines:
        goes_on = line[:1].isalnum() and re.match(r"[\w.]+: ", line) is None
        if goes_on and found and found[-1][:1].isalnum() and len(found[-1]) > WIDTH - 30:
            found[-1] += f" {line}"
        else:
            found.append(line)
    return found


def _wrapped(line: str, width: int) -> list[str]:
    """Wrap a line to `width` characters; the remark of an example comes below the example, not beside it."""
    if len(line) <= width:
        return [line]
    example = re.fullmatch(r"( *)(\S.*?) {2,}(\S.*)", line)
    parts = [line] if example is None else [example[1] + example[2], f"{example[1]}    {example[3]}"]
    if example is None and line.startswith(" " * (width // 2)):  # a note alone, below its example
        parts = [f"      {line.strip()}"]
    found = []
    for part in parts:
        indent = " " * (len(part) - len(part.lstrip()))
        further = f"{indent}  " if indent or re.match(r"[\w.]+: ", part) else ""
        found += textwrap.wrap(
            part, width, subsequent_indent=further, break_long_words=False, break_on_hyphens=False
        )
    return found


def _groups(folders: Sequence[Path]) -> str:
    options: dict[str, set[str]] = {}
    for file in (file for folder in folders for file in folder.glob("*/*.yaml")):
        options.setdefault(file.parent.name, set()).add(file.stem)
    words = {"engine": "server.preset"}  # the word that chooses a group, if that is not its name
    lines = [f"{words.get(group, group)}: {', '.join(sorted(names))}" for group, names in sorted(options.items())]
    return "\n".join(line for line in lines if line.partition(":")[0] not in NOT_CHOSEN)


def config_dirs(command: Sequence[str]) -> list[str]:
    """Return the folders that --config-dir names, in either way of writing it."""
    apart = [folder for flag, folder in pairwise(command) if flag in ("--config-dir", "-cd")]
    return apart + [word.partition("=")[2] for word in command if word.startswith("--config-dir=")]
