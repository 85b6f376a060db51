"""`python -m calibrate`: the command line of calibrations and campaigns, with exit statuses and error messages."""

from __future__ import annotations

import os
import sys
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
from calibrate.config import in_full, register, to_config
from calibrate.schema import CalibrateConfig, CampaignConfig
from helios_sim.config import check_flags, given, in_words, leave_no_trace
from helios_sim.errors import UserError
from helios_sim.help import conf_folder
from helios_sim.interrupt import leave_by_status, remembered

WORTHLESS = (".lock", ".scratch", "transcript.jsonl")  # files of a calibration in which no stage finished


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line. Returns 0 if done, 1 after a user's mistake, a defect of a stage, or an interrupt.

    With `+campaign=NAME` it runs a campaign of many models, else one calibration of one model.
    """
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of exiting by itself
    command = sys.argv[1:] if arguments is None else list(arguments)
    status = 0
    folder: Path | None = None  # output folder of the running calibration
    started: list[Path] = []
    of_many = given("campaign", command) is not None
    schema = CampaignConfig if of_many else CalibrateConfig

    def calibrate(settings: DictConfig) -> None:
        nonlocal status, folder
        from calibrate.campaigns.command import run_campaign
        from calibrate.command import run_calibration

        run = HydraConfig.get()
        folder = Path(run.runtime.output_dir)
        started.append(folder)
        try:
            config = to_config(settings, command, schema)
            done = (
                run_campaign(config, folder) if isinstance(config, CampaignConfig) else run_calibration(config, folder)
            )
            status = max(status, done)
        except UserError as error:  # caught here, since Hydra would print a message of its own
            status = _fail(error, run.job.override_dirname if run.mode is RunMode.MULTIRUN else "")

    try:
        if "--version" in command:
            print(f"calibrate {helios_sim.__version__}")
            return 0
        command = in_full(command)
        check_flags(command, "calibrate")
        register()
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
            raise  # a defect of this program
        wanted = given("out", command) or given("hydra.run.dir", command) or str(error.filename)
        reason = f"the output folder cannot be made: {error.strerror or error}"
        return _fail(UserError("out", wanted, reason, "choose a folder that you may write to"))
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
    return f"finished stages are kept; go on with: python -m calibrate {' '.join([*words, f'out={folder}'])}"


def _fail(error: UserError, which: str = "") -> int:
    """Print an error. `which`: the calibration that it belongs to, if there are several."""
    print(f"calibrate: {which}{': ' if which else ''}{error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
