"""A command whose standard streams are closed does its work and ends as ever."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

CODE = """
import os, sys
for number in map(int, sys.argv[1]):
    os.close(number)
os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
"""


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["1", "2", "012"])
@pytest.mark.parametrize("words", [("helios_sim", "--version"), ("helios_sim", "--hlep")])
def test_closed_streams(closed: str, words: tuple[str, ...], repository) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CODE, closed, *words], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == (1 if "--hlep" in words else 0), done.stderr
    assert "Traceback" not in done.stderr
    if "1" not in closed and "--version" in words:
        assert done.stdout.startswith("helios_sim ")


def test_no_file_takes_the_place_of_a_closed_stream(tmp_path, repository) -> None:
    """What a library prints to stderr would else be written into the first file of the run."""
    script = "import os; from helios_sim.streams import *; open_streams(); f = open('file', 'w'); os.write(2, b'x')"
    closing = f"import os, sys; os.close(2); os.execv(sys.executable, [sys.executable, '-c', {script!r}])"
    environment = {**os.environ, "PYTHONPATH": str(repository)}
    subprocess.run([sys.executable, "-c", closing], cwd=tmp_path, env=environment, check=True, timeout=60)
    assert (tmp_path / "file").read_text() == ""

PROGRAMS = (
    "helios_sim", "helios_sim.serve", "helios_sim.observe", "helios_sim.profile", "helios_sim.profile.build",
    "helios_sim.exits.import",
    "calibrate", "calibrate.models", "calibrate.bundle", "calibrate.campaigns.land",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_a_reader_that_leaves_before_the_help_is_told_is_no_error(program: str, repository) -> None:
    command = subprocess.Popen(
        [sys.executable, "-m", program, "--help"], cwd=repository, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert command.stdout is not None
    command.stdout.close()
    assert command.stderr is not None
    said = command.stderr.read()
    assert (command.wait(timeout=60), said) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_program_tells_its_help(program: str, repository) -> None:
    done = subprocess.run(
        [sys.executable, "-m", program, "--help"], cwd=repository, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert f"python -m {program}" in done.stdout
