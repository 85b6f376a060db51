"""What is refused in a user's experiment file must let the files pass that come with the program."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from helios_sim.config import compose_config
from helios_sim.defaults_list import check_defaults
from helios_sim.help import conf_folder
from helios_sim.study.effects import check_written

SHIPPED = sorted((Path(conf_folder()) / "experiment").glob("*.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_a_copy_of_a_shipped_experiment_passes(file: Path) -> None:
    """`scale` names a router for the replicas that its command line has."""
    check_defaults(file)
    words = ["server.replicas=2"] if file.stem == "scale" else []
    written = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(written, dict)
    check_written(compose_config(file.stem, words), written, [], file.name)
