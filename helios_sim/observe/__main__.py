"""`python -m helios_sim.observe`: help and version by itself; everything else is loaded when a server is driven."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from helios_sim.streams import open_streams

DEFAULT = "own"  # the experiment whose workload is sent
SHORT = ("url", "out", "model", "api")  # words of `observe`, without it


def main(arguments: Sequence[str] | None = None) -> int:
    """0: all requests were answered; 1: a mistake in the settings; 2: some failed, or it was stopped."""
    command = sys.argv[1:] if arguments is None else list(arguments)
    open_streams()
    import helios_sim
    from helios_sim.errors import UserError, lacking
    from helios_sim.help import help_text, is_asked

    if is_asked(command):
        print(help_text("observe", command))
        return 0
    if "--version" in command:
        print(f"helios_sim {helios_sim.__version__}")
        return 0
    try:
        return _observe(command)
    except UserError as error:
        print(f"helios_sim.observe: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("helios_sim.observe: stopped", file=sys.stderr)
        return 1
    except Exception as error:
        if (message := lacking(error)) is None:
            raise
        print(f"helios_sim.observe: {message}", file=sys.stderr)
        return 1


def _observe(command: list[str]) -> int:
    from helios_sim.config import compose_config, given
    from helios_sim.errors import UserError
    from helios_sim.help import config_dirs
    from helios_sim.observe.run import observe
    from helios_sim.observe.settings import ObservedConfig
    from helios_sim.report.terminal import without_json

    folder = next(reversed(config_dirs(command)), None)
    words = [word for word in without_json(command) if not word.startswith(("--config-dir", "-cd")) and word != folder]
    experiment = given("experiment", words) or DEFAULT
    kept = []
    for word in words:
        key = word.lstrip("+~").partition("=")[0]
        if key == "experiment":
            continue
        if key not in (*SHORT, "seeds") and not key.startswith(("observe.", "workload", "hydra.")):
            allowed = "does nothing here: what counts is url, out, model, api, observe.*, workload.* and seeds"
            raise UserError(key, word.partition("=")[2], allowed, "leave it out")
        kept.append(f"observe.{word}" if key in SHORT else word)
    config = compose_config(experiment, kept, folder, ObservedConfig)
    assert isinstance(config, ObservedConfig)
    return observe(config)


if __name__ == "__main__":
    sys.exit(main())
