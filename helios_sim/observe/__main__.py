"""`python -m helios_sim.observe`. Only help and version are here; all else is imported when a server is driven."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from helios_sim.entry import answers, run

DEFAULT = "own"  # the experiment with the workload to send
SHORT = ("url", "out", "model", "api")  # settings of `observe` that may be given without that prefix


def main(arguments: Sequence[str] | None = None) -> int:
    """Return 0 if all requests were answered, 1 for a mistake in the settings, 2 if some failed or it was stopped."""
    return run("helios_sim.observe", _run, arguments)


def _run(command: list[str]) -> int:
    return 0 if answers("observe", command) else _observe(command)


def _observe(command: list[str]) -> int:
    from helios_sim.command_line import given
    from helios_sim.config import compose_config
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
    for word in kept if config.observe.kind_of_prompts != "ids" else ():
        key = word.lstrip("+~").partition("=")[0]
        if key in ("observe.lowest_id", "observe.highest_id"):
            allowed = "does nothing here: it counts only with token ids as prompts"
            raise UserError(key, word.partition("=")[2], allowed, "leave it out, or set observe.prompts=ids")
    return observe(config)


if __name__ == "__main__":
    sys.exit(main())
