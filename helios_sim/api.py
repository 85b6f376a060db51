"""A study from Python, in this process, without files: for notebooks and scripts.

Settings are composed from the same files as on the command line, by the same functions, and run by the same ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_sim.config import DESIGNS, STUDY, compose_config, kind_of
from helios_sim.errors import UserError
from helios_sim.study.effects import check_effect
from helios_sim.study.schema import Config
from helios_sim.vary.settings import with_settings

if TYPE_CHECKING:
    from helios_sim.report.designs import DesignsResult
    from helios_sim.report.result import ExperimentResult


def simulate(
    study: Config | str = "quickstart", *words: str, settings: Mapping[str, Any] | None = None
) -> ExperimentResult:
    """Run every arm of a study under every seed, and its sweeps, one after the other.

    `study` is the name of an experiment, with further words of the command line (`"policy=helios"`,
    `"workload.n_requests=100"`), or a `Config`. `settings` are set on top of it, by dotted path:
    `{"server.replicas": 4}`, or `{"server.preset": "vllm-0.24"}` as on the command line. The result is what
    `python -m helios_sim` computes for the same settings and seeds; nothing is written or printed (`print_table` and
    `write_result` do that).

    Raises UserError if settings cannot be run, or if they ask for something else than a study: designs
    (`simulate_designs`) or a comparison with a real run, which only the command line makes.
    """
    from helios_sim.study.command import run

    return run(_settings_of(study, words, settings, STUDY))


def simulate_designs(
    study: Config | str = "sweep_helios", *words: str, settings: Mapping[str, Any] | None = None
) -> DesignsResult:
    """Run the designs of a study with `sweep.parameters`, all under the same requests; arguments as in `simulate`.

    Raises UserError if settings cannot be run, there is nothing to vary, or every design fails.
    """
    from helios_sim.study.sweep import sweep

    return sweep(_settings_of(study, words, settings, DESIGNS))


def study_config(experiment: str = "quickstart", *words: str, config_dir: str | Path | None = None) -> Config:
    """Return the settings of `python -m helios_sim +experiment=NAME WORDS`.

    `config_dir`: a folder of your own config groups.

    Raises UserError for a name, a key or a value that does not exist.
    """
    for word in (experiment, *words):
        if not isinstance(word, str):
            raise UserError("word", word, "texts, as on the command line", "write 'key=value'")
    return compose_config(experiment, words, config_dir)


def _settings_of(study: Config | str, words: tuple[str, ...], settings: Mapping[str, Any] | None, kind: str) -> Config:
    if not isinstance(study, Config | str):
        raise UserError("study", study, "the name of an experiment, or a Config of study_config()", "give one of them")
    if settings is not None and not isinstance(settings, Mapping):
        raise UserError("settings", settings, "a mapping such as {'server.replicas': 2}", "write it so")
    if isinstance(study, str):
        config = study_config(study, *words)
    elif words:
        raise UserError(
            "study", " ".join(words), "words of the command line need an experiment's name", "use settings="
        )
    else:
        config = study
    if settings:
        config = with_settings(config, settings)
        check_effect(config, list(_as_words(settings)))
    found = kind_of(config)
    if found != kind:
        fix = {DESIGNS: "call simulate_designs", STUDY: "call simulate, or set sweep.parameters"}
        allowed = f"these settings ask for {found}, not for {kind}"
        raise UserError("study", config.name, allowed, fix.get(found, "run it from the command line"))
    return config


def _as_words(settings: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """Yield the settings as words of the command line."""
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from _as_words(value, f"{above}{key}.")
        else:
            yield f"{above}{key}={'null' if value is None else value}"
