"""The command `python -m helios_sim.serve`. Help and version load nothing else; a server loads the rest."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.util import find_spec

from helios_sim.entry import answers, run

PACKAGES = ("fastapi", "uvicorn", "prometheus_client")
DEFAULT = "serve"  # the experiment served if the command names none


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 if the server was stopped, 1 after a failure or a mistake in the settings."""
    return run("helios_sim.serve", _run, arguments)


def _run(command: list[str]) -> int:
    return 0 if answers("serve", command) else _serve(command)


def _serve(command: list[str]) -> int:
    from helios_sim.command_line import given
    from helios_sim.config import compose_config, settings_page
    from helios_sim.errors import UserError
    from helios_sim.help import config_dirs
    from helios_sim.serve.settings import ServedConfig, check_words

    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        fix = "run `make serve`, or pip install 'helios-llm-sim[serve]'"
        raise UserError("packages", ", ".join(missing), "serving needs them installed", fix)
    shows, words = _without_flags(command)
    check_words(words)
    experiment = given("experiment", words) or DEFAULT
    words = [word for word in words if word.lstrip("+").partition("=")[0] != "experiment"]
    config = compose_config(experiment, words, next(reversed(config_dirs(command)), None), ServedConfig)
    assert isinstance(config, ServedConfig)
    if shows:
        print(settings_page(config), end="")
        return 0
    from helios_sim.serve.command import serve

    return serve(config)


def _without_flags(command: list[str]) -> tuple[bool, list[str]]:
    """Returns whether the command has `--cfg job`, and its settings. UserError for `--cfg` with another word."""
    from helios_sim.errors import UserError

    words, shows, rest = [], False, iter(command)
    for word in rest:
        if word in ("--cfg", "-c") or word.startswith("--cfg="):
            _, given, part = word.partition("=")
            part = part if given else next(rest, "")
            if part != "job":
                raise UserError("--cfg", part, "job, which prints all settings", "--cfg job")
            shows = True
        elif word in ("--config-dir", "-cd"):
            next(rest, "")
        elif not word.startswith("--config-dir="):
            words.append(word)
    return shows, words


if __name__ == "__main__":
    sys.exit(main())
