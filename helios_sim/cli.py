"""Runs one study from the command line, or one for each combination of -m: exit codes, streams, and kind of study."""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
import yaml
from hydra._internal.hydra import Hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from helios_sim.command_line import by_arm, check_flags, given, in_full, in_order, leave_no_trace, whole_mixes
from helios_sim.config import (
    CAPACITY,
    DESIGNS,
    FIDELITY,
    FIDELITY_LIVE,
    FIDELITY_SILICON,
    FROM_LOG,
    check_choices,
    check_own_files,
    kind_of,
    register,
    to_config,
)
from helios_sim.errors import UserError
from helios_sim.help import conf_folder, config_dirs
from helios_sim.interrupt import is_asked, leave_by_status, stop_if_asked
from helios_sim.report.terminal import say, without_json
from helios_sim.study.schema import Config
from helios_sim.words import MOST_BYTES
from helios_sim.wrong_settings import in_a_circle, in_words

MOST_LOOKED_AT = 300  # files and folders of the user's; with more of them, composing all settings once more is quicker


def run_command(command: list[str]) -> int:
    """Run studies from the command line. Returns 0 if done, 1 after a mistake of the user (one message), 2 if a gate
    failed.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of exiting by itself
    status = 0
    started = False
    folders: list[tuple[Path, bool]] = []  # output folders of studies that began, and whether each is one of several
    refused: list[Path] = []  # output folders of studies that could not start
    swept: list[Path] = []  # output folders of multiruns, in which Hydra writes before it looks at the settings

    def study(settings: DictConfig) -> None:
        nonlocal status, started
        from helios_sim.study.effects import check_effect

        started = True
        run = HydraConfig.get()
        folder = Path(run.runtime.output_dir)
        folders.append((folder, run.mode is RunMode.MULTIRUN))
        try:
            check_choices(settings, run.runtime.choices, command)
            config = to_config(settings, command)
            check_effect(config, run.overrides.task)
            check_own_files(config, run.runtime.choices, command)
            status = max(status, runner_of(config)(config, folder))
        except (UserError, OmegaConfBaseException) as error:
            stop_if_asked()
            # Handled here, since Hydra would print it in words of its own
            mistake = error if isinstance(error, UserError) else in_words(error, command)
            status = _fail(mistake, run.job.override_dirname if run.mode is RunMode.MULTIRUN else "")
            refused.append(folder)

    try:
        register()
        command = in_full(in_order(without_json(command)))
        check_flags(command)
        command = whole_mixes(by_arm(command))
        logging.raiseExceptions = False  # Hydra logs its help pages, and their reader may close the pipe
        GlobalHydra.instance().clear()
        sys.argv[1:] = command
        with _composed_once(command), _noting(swept):
            hydra.main(version_base=None, config_path=conf_folder(), config_name="config")(study)()
    except UserError as error:
        return _fail(error)
    except (HydraException, OmegaConfBaseException) as error:
        if is_asked():
            return _stopped(command, folders)
        return _fail(in_words(error, command))
    except yaml.YAMLError as error:
        return _fail(UserError("YAML", " ".join(str(error).split()), "a file that is valid YAML", "correct the file"))
    except BrokenPipeError:  # see __main__
        raise
    except RecursionError:
        if started:
            raise
        return _fail(in_a_circle())
    except (OSError, ValueError, AssertionError) as error:
        if started:
            raise  # a defect of ours
        return _fail(_before_start(error, command))
    except (SystemExit, KeyboardInterrupt) as leaving:
        if isinstance(leaving, SystemExit) and not started:  # Hydra's own commands, such as --info, end so
            return 1 if leaving.code else 0
        return _stopped(command, folders)
    finally:
        for folder in (*refused, *swept):
            leave_no_trace(folder)
    if not started and any(word in ("-m", "--multirun") for word in command):
        word = next((word for word in command if "glob(" in word), "-m")
        return _fail(UserError("argument", word, "no value that is there, so there is no study", "name values: a,b"))
    return status


def runner_of(config: Config) -> Callable[[Config, Path], int]:
    """Return the function that runs these settings into a folder and returns the exit status."""
    from helios_sim.study.command import run_study as run_it

    kind = kind_of(config)
    if kind == FIDELITY:
        from helios_sim.validate.command import run_fidelity as run_it
    elif kind == FIDELITY_SILICON:
        from helios_sim.validate.command import run_fidelity_silicon as run_it
    elif kind == FIDELITY_LIVE:
        from helios_sim.validate.command import run_fidelity_live as run_it
    elif kind == FROM_LOG:
        from helios_sim.validate.from_log import run_from_log as run_it
    elif kind == DESIGNS:
        from helios_sim.study.sweep import run_sweep as run_it
    elif kind == CAPACITY:
        from helios_sim.study.capacity import run_capacity as run_it
    return run_it


def repeat_study(arguments: list[str]) -> int:
    """Run `repro`, with the messages and exit codes of a study; 2 if the results are not the same."""
    from helios_sim.repro import main

    try:
        return main(arguments)
    except (UserError, OmegaConfBaseException) as error:
        return _fail(error if isinstance(error, UserError) else in_words(error))


@contextmanager
def _composed_once(command: Sequence[str]) -> Iterator[None]:
    """Keep Hydra from composing all settings once more, only to read `hydra.mode`.

    The user's files and the command line may set it; if they do not, -m alone decides.
    """
    read = Hydra.get_mode
    by_word = any(word.lstrip("+").startswith(("hydra.mode", "hydra.searchpath")) for word in command)
    if not by_word and not any(map(_may_set_hydra, config_dirs(command))):
        setattr(Hydra, "get_mode", lambda *_, **__: None)  # noqa: B010 - as where it is not set
    try:
        yield
    finally:
        setattr(Hydra, "get_mode", read)  # noqa: B010


def _may_set_hydra(folder: str) -> bool:
    """Whether a file of settings in the folder may set Hydra's own; True too if a full search would take long."""
    seen = 0
    for place, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > MOST_LOOKED_AT or "hydra" in folders or any(Path(place, name).is_symlink() for name in folders):
            return True
        for file in (Path(place, name) for name in files if name.endswith((".yaml", ".yml"))):
            try:
                if file.stat().st_size > MOST_BYTES or b"hydra" in file.read_bytes():
                    return True
            except OSError:
                return True
    return False


@contextmanager
def _noting(folders: list[Path]) -> Iterator[None]:
    """Add the folders in which Hydra writes multirun.yaml: if no study begins, nothing else names them."""
    save = OmegaConf.save

    def noted(config: object, f: str | Path, resolve: bool = False) -> None:
        if Path(str(f)).name == "multirun.yaml":
            folders.append(Path(str(f)).resolve().parent)
        save(config, f, resolve)

    setattr(OmegaConf, "save", staticmethod(noted))  # noqa: B010
    try:
        yield
    finally:
        setattr(OmegaConf, "save", staticmethod(save))  # noqa: B010


def _before_start(error: Exception, arguments: Sequence[str]) -> UserError:
    """Return as one message what Hydra raised while it read flags, made the output folder, or set a key below null.

    Other errors are raised again.
    """
    if isinstance(error, OSError):
        try:
            Path.cwd()
        except FileNotFoundError:
            return UserError("current folder", None, "it was removed", "change to one that is there: cd FOLDER")
        folder = given("hydra.run.dir", arguments) or given("hydra.sweep.dir", arguments) or str(error.filename)
        reason = f"the output folder cannot be made: {error.strerror or error}"
        return UserError("hydra.run.dir", folder, reason, "choose a folder that you may write to")
    if found := re.match(r"invalid literal for int\(\) with base 10: '(\w+)'", str(error)):
        word = next((a for a in arguments if f".{found[1]}" in a.partition("=")[0]), found[1])
        key, _, value = word.partition("=")
        name = key.lstrip("+~").partition(f".{found[1]}")[0]
        fix = f"write {name}.0.{found[1]}={value}"
        return UserError(key, value, f"{name} is a list, whose entries have numbers", fix)
    if isinstance(error, ValueError):  # flags that exclude each other
        return UserError("command line", " ".join(arguments), str(error), "see python -m helios_sim --help")
    if "Unexpected type for root" not in str(error):
        raise error
    of_hydra = next((word for word in arguments if word.lstrip("+").startswith("hydra.")), None)
    if of_hydra is not None and not any(word.lstrip("+").startswith("policy.") for word in arguments):
        key, _, value = of_hydra.partition("=")
        return UserError(key.lstrip("+"), value, "no such setting of Hydra", "--cfg hydra prints all of them")
    key = next((a.split("=")[0].lstrip("+") for a in arguments if a.lstrip("+").startswith("policy.")), "policy")
    fix = "choose one first, such as policy=helios policy.round_requests=50"
    return UserError(key, given(key, arguments), "settings of a policy need a policy", fix)


def _stopped(command: Sequence[str], folders: Sequence[tuple[Path, bool]]) -> int:
    """Say where finished results are, and which command goes on from them. Returns the exit status."""
    leave_by_status()  # Ray, while it starts, ends the program on SIGTERM
    if not folders:
        say("helios_sim: stopped before anything was run", sys.stderr)
        return 1
    folder, one_of_several = folders[-1]
    key, place = ("hydra.sweep.dir", folder.parent) if one_of_several else ("hydra.run.dir", folder)
    words = [word for word in command if not word.startswith(f"{key}=")]
    again = shlex.join(["python", "-m", "helios_sim", *words, f"{key}={place}"])
    say(f"helios_sim: stopped; what was finished is in the output folder {place}. To go on:", sys.stderr)
    print(f"  {again}", file=sys.stderr)
    return 1


def _fail(error: UserError, study: str = "") -> int:
    """Print the error and return the exit status; `study` names the failed one of several studies."""
    where = f"{study}: " if study else ""
    say(f"helios_sim: {where}{error}", sys.stderr)
    return 1
