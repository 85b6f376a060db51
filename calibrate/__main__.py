"""`python -m calibrate`: the command line of calibrations and campaigns.

It registers the schemas with Hydra, expands short forms of settings, and turns errors into messages and exit statuses.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import hydra
import yaml
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

import helios_sim
from calibrate.schema import CalibrateConfig, CampaignConfig, in_vain
from helios_sim.command_line import check_flags, given, leave_no_trace
from helios_sim.config import register, typed
from helios_sim.errors import UserError, lacking
from helios_sim.help import conf_folder, help_text, is_asked
from helios_sim.interrupt import leave_by_status, remembered
from helios_sim.live.checkpoint.known import SHORT_NAMES
from helios_sim.live.served import check_packages
from helios_sim.report.terminal import say, without_json
from helios_sim.streams import open_streams
from helios_sim.vary.settings import known_settings
from helios_sim.words import readable
from helios_sim.wrong_settings import in_words


def to_config(
    settings: DictConfig,
    arguments: Sequence[str] = (),
    schema: type[CalibrateConfig | CampaignConfig] = CalibrateConfig,
) -> CalibrateConfig | CampaignConfig:
    """The settings as the schema's dataclass. Raises UserError for a name, a type or a value that cannot be."""
    return typed(settings, schema, arguments)


def in_full(arguments: Sequence[str]) -> list[str]:
    """The command line for Hydra: overrides first, and `model=X` expanded to the model's name or its weights.

    A model of the user's own is named after its weights, unless `model.name` is given.
    """
    overrides = [a for a in arguments if not a.startswith("-") and ("=" in a or a.startswith("~"))]
    flags = [a for a in arguments if a not in overrides]
    overrides = [a.removeprefix("+") if a.startswith("+task=") else a for a in overrides]
    overrides = [f"out={Path(a[4:]).expanduser()}" if a.startswith("out=~/") else a for a in overrides]
    chosen = given("model", overrides)
    if chosen is not None and "," in chosen and any(flag in ("-m", "--multirun") for flag in flags):
        names = [SHORT_NAMES.get(each, each) for each in chosen.split(",")]
        if not {*names} <= {*SHORT_NAMES.values()}:
            allowed = f"with -m, several of {', '.join(SHORT_NAMES.values())}"
            raise UserError("model", chosen, allowed, "calibrate others one at a time, each with its out=FOLDER")
        overrides = [a for a in overrides if not a.startswith("model=")] + [f"model.name={','.join(names)}"]
    elif chosen is not None and not chosen.startswith("{"):
        overrides = [a for a in overrides if not a.startswith("model=")]
        name = SHORT_NAMES.get(chosen, chosen)
        if name in SHORT_NAMES.values():
            overrides.append(f"model.name={name}")
        elif given("model.weights", overrides) is None:
            overrides.append(f"model.weights={chosen}")
        else:
            overrides.append(f"model.name={name}")
    weights = given("model.weights", overrides)
    if weights not in (None, "null") and given("model.name", overrides) is None:
        overrides.append(f"model.name={name_of(str(weights))}")
    return [*overrides, *flags]


def name_of(weights: str) -> str:
    """A model's name from its folder, file or hub id: lower case, only characters that are safe in paths and shells."""
    last = weights.rstrip("/").rsplit("/", 1)[-1].lower().removesuffix(".gguf")
    return re.sub(r"[^a-z0-9._-]+", "-", last).strip("-.") or "model"


BUSY = 0.6  # a load for each core above which other processes are in the way


def make_way() -> None:
    """Let torch's threads sleep while they wait for each other, if other processes use the cores.

    Threads that spin keep the core from the very thread that they wait for, and a step then takes ten times as long.
    It must come before torch is loaded. A policy that the environment sets stays.
    """
    if os.getloadavg()[0] > BUSY * len(os.sched_getaffinity(0)) and "torch" not in sys.modules:
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")


WORTHLESS = (".scratch", "transcript.jsonl")  # files of a calibration in which no stage finished


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 if done, 1 after a user's mistake, a defect of a stage, or an interrupt.

    With `+campaign=NAME` it runs a campaign of many models, else one calibration of one model.
    """
    open_streams()
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of exiting by itself
    command = sys.argv[1:] if arguments is None else list(arguments)
    # the time that this process has taken so far belongs to the budget
    budget_began_s = [time.monotonic() - (time.process_time() if arguments is None else 0.0)]
    if arguments is None:
        make_way()
    status = 0
    folder: Path | None = None  # output folder of the running calibration
    started: list[Path] = []
    of_many = given("campaign", command) is not None
    schema = CampaignConfig if of_many else CalibrateConfig

    def calibrate(settings: DictConfig) -> None:
        nonlocal status, folder
        run = HydraConfig.get()
        folder = Path(run.runtime.output_dir)
        started.append(folder)
        try:
            config = to_config(settings, command, schema)
            check_packages("a calibration")  # before anything that needs them is imported
            for sentence in in_vain(config, command) if isinstance(config, CalibrateConfig) else ():
                say(f"calibrate: {sentence}", sys.stderr)
            from calibrate.command import run_calibration, run_campaign

            began_s = budget_began_s.pop() if budget_began_s else time.monotonic()  # each calibration has its own
            if isinstance(config, CampaignConfig):
                status = max(status, run_campaign(config, folder, began_s))
            else:
                status = max(status, run_calibration(config, folder, began_s))
        except UserError as error:  # caught here, since Hydra would print a message of its own
            status = _fail(error, run.job.override_dirname if run.mode is RunMode.MULTIRUN else "")

    try:
        if "--version" in command:
            print(f"calibrate {helios_sim.__version__}", flush=True)
            return 0
        if is_asked(command):
            print(help_text("calibrate", command), flush=True)
            return 0
        command = readable(in_full(without_json(command)), known_settings(schema))
        check_flags(command, "calibrate")
        register("calibrate_schema", CalibrateConfig)
        register("campaign_schema", CampaignConfig)
        GlobalHydra.instance().clear()
        sys.argv[1:] = command
        name = "campaign" if of_many else "calibrate"
        with remembered():
            hydra.main(version_base=None, config_path=conf_folder(), config_name=name)(calibrate)()
    except UserError as error:
        return _fail(error)
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(in_words(error, command, schema))
    except yaml.YAMLError as error:
        return _fail(UserError("YAML", " ".join(str(error).split()), "a file that is valid YAML", "correct the file"))
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if started:
            if (message := lacking(error)) is not None:
                return _fail(message)
            raise  # a defect of this program
        wanted = given("out", command) or given("hydra.run.dir", command) or str(error.filename)
        reason = f"the output folder cannot be made: {error.strerror or error}"
        return _fail(UserError("out", wanted, reason, "choose a folder that you may write to"))
    except (MemoryError, ImportError, RuntimeError) as error:
        if (message := lacking(error)) is None:
            raise
        return _fail(message)
    except SystemExit as leaving:  # how Hydra's own commands, such as --help, end
        return 1 if leaving.code else 0
    except KeyboardInterrupt:
        leave_by_status()
        print(f"calibrate: stopped; {_how_to_resume(command, folder)}", file=sys.stderr)
        return 1
    finally:
        for place in started:
            leave_no_trace(place, WORTHLESS)
    return status


def _how_to_resume(command: Sequence[str], folder: Path | None) -> str:
    if folder is None:
        return "nothing was measured yet"
    words = [word for word in command if not word.startswith(("out=", "hydra.run.dir="))]
    again = shlex.join(["python", "-m", "calibrate", *words, f"out={folder}"])
    return f"finished stages are kept; go on with: {again}"


def _fail(error: UserError, which: str = "") -> int:
    """Print an error. `which`: the calibration with the error, if there are several."""
    say(f"calibrate: {which}{': ' if which else ''}{error}", sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
