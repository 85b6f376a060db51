"""The wheel: carries conf, data and templates, and runs where the checkout is not importable."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder


@pytest.fixture(scope="module")
def unpacked(repository, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    (wheel,) = WheelBuilder(str(repository)).build(directory=str(folder), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


@pytest.mark.slow
def test_every_setting_of_the_checkout_is_in_the_wheel(repository, unpacked):
    def settings(conf: Path) -> dict[str, str]:
        return {str(path.relative_to(conf)): path.read_text() for path in conf.rglob("*.yaml")}

    assert settings(unpacked / "helios_sim" / "conf") == settings(repository / "conf")
    assert not (unpacked / "conf").exists()  # no module of that name for others to trip over


@pytest.mark.slow
def test_the_wheel_runs_without_the_checkout(unpacked, tmp_path):
    # -S leaves out the .pth file by which an editable install finds the checkout.
    libraries = sysconfig.get_paths()["purelib"]
    ran = subprocess.run(
        [sys.executable, "-S", "-m", "helios_sim", "workload.n_requests=10", "hydra.run.dir=out"],
        cwd=tmp_path,
        env={"PYTHONPATH": f"{unpacked}:{libraries}", "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["experiment"] == "quickstart"
    search_path = (tmp_path / "out" / ".hydra" / "hydra.yaml").read_text()
    assert str(unpacked / "helios_sim" / "conf") in search_path
