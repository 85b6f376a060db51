"""`python -m helios_sim`: one study from the command line. Knows exit codes and streams, nothing of the work."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from helios_sim.config import Variants, conf_folder, register
from helios_sim.errors import UserError

DEFAULT = "+experiment=quickstart"


def main() -> int:
    """0: done; 1: a mistake of the user, in one message; 2: a gate failed."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # Hydra then raises instead of exiting by itself
    if not any(argument.lstrip("+").startswith("experiment=") for argument in sys.argv[1:]):
        sys.argv.append(DEFAULT)
    status = 0

    def study(settings: DictConfig) -> None:
        nonlocal status
        from helios_sim.study.command import run_study

        folder = Path(HydraConfig.get().runtime.output_dir)
        try:
            status = max(status, run_study(Variants(settings), folder))
        except UserError as error:  # here, since Hydra would announce it in words of its own
            status = _fail(str(error))

    try:
        register()
        hydra.main(version_base=None, config_path=conf_folder(), config_name="config")(study)()
    except UserError as error:
        return _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        return _fail(_in_words(error))
    except SystemExit as leaving:  # argparse: --help leaves with 0, a wrong flag with 2
        return 1 if leaving.code else 0
    except KeyboardInterrupt:
        return _fail("stopped; what was finished is in the output folder, and the same hydra.run.dir takes it up again")
    return status


def _fail(message: str) -> int:
    print(f"helios_sim: {message}", file=sys.stderr)
    return 1


def _in_words(error: Exception) -> str:
    """Hydra's messages without their explanations of Hydra."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("object_type=", "Set the environment", "full_key:"))]
    keys = [line.removeprefix("full_key:").strip() for line in lines if line.startswith("full_key:")]
    fix = "see the names in conf/, or print all settings with --cfg job"
    return f"{keys[0] + ': ' if keys else ''}{' '.join(kept)} Fix: {fix}."


if __name__ == "__main__":
    sys.exit(main())
