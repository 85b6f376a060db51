"""Command that makes an exit trace from a table: `python -m helios_sim.exits.import FILE [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from helios_sim.entry import run
from helios_sim.errors import UserError, require_one_of
from helios_sim.exits import table
from helios_sim.exits.store import write_trace
from helios_sim.exits.table import SUFFIXES, Told, is_table, read_table

KEYS = {
    "model": "name of the model in your studies; FILE without its ending, if left out",
    "out": "folder to write; beside FILE, if left out",
    "chars_per_token": "characters of a token, where the table has no column chars",
    "human_text": "true or false: did people write the text? To be said where the table has log_prob_D",
    "source": "on what and how it was recorded, for the provenance",
}
HELP = f"""Usage: python -m helios_sim.exits.import FILE{{{",".join(SUFFIXES)}}} [key=value ...]

{table.__doc__}
Keys
""" + "\n".join(f"  {name:<16} {meaning}" for name, meaning in KEYS.items())


def main(arguments: Sequence[str]) -> int:
    """Runs the command. Returns 0 if the trace was written, or 1 after one message that says what is wrong."""
    return run("helios_sim", _run, arguments)


def _run(arguments: Sequence[str]) -> int:
    if not arguments or {"--help", "-h"} & {*arguments}:
        print(HELP)
        return 0
    return _imported(Path(arguments[0]), _settings(arguments[1:]))


def _settings(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in KEYS or key in found:
            raise UserError("argument", word, f"each once: {', '.join(f'{name}=...' for name in KEYS)}", "see --help")
        found[key] = value
    return found


def _imported(path: Path, settings: dict[str, str]) -> int:
    if not is_table(path):
        raise UserError("FILE", str(path), f"a table, {' or '.join(SUFFIXES)}", "see --help")
    name = path.name[: -len(next(suffix for suffix in SUFFIXES if path.name.endswith(suffix)))]
    model, human = settings.get("model", name), settings.get("human_text")
    if human is not None:
        require_one_of("human_text", human, ("true", "false"))
    people = None if human is None else human == "true"
    told = Told(_number(settings.get("chars_per_token")), people, settings.get("source"))
    trace, ignored = read_table(path, model, told, "model" in settings)
    folder = Path(settings.get("out", path.with_name(f"{name}.exits"))).expanduser()
    write_trace(trace, folder)
    print(f"{trace.n_tokens} tokens of {len(np.unique(trace.prompt))} prompts, {len(trace.tasks)} tasks")
    print("layers   agree" + "".join(f"  mean {c.value}" for c in trace.confidences))
    for e, depth in enumerate(trace.exits):
        means = (f"{float(v[:, e].mean()):{7 + len(c.value)}.3f}" for c, v in trace.confidences.items())
        print(f"{depth:6}  {trace.agree[:, e].mean():6.1%}" + "".join(means))
    if ignored:
        print(f"not read: {', '.join(map(repr, ignored))}")
    print(f"written: {folder}; use it with models=[{model}] exits.source={folder}")
    return 0


def _number(text: str | None) -> float | None:
    try:
        value = None if text is None else float(text)
    except ValueError:
        value = -1.0
    if value is not None and not 0.1 <= value <= 100:
        raise UserError("chars_per_token", text, "a number from 0.1 to 100", "English text has about 4")
    return value


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
