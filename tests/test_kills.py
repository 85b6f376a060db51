"""A command that is stopped by any signal at any moment leaves no process, and goes on to the same bits."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from command_line import write_study
from sweep_example import SWEEP

pytestmark = pytest.mark.slow
STUDY = """# @package _global_
name: tiny
models: [opt-1.3b]
workload: {n_requests: 600, lengths: {output: {p50: 12, p95: 30, maximum: 40}}}
arms: {full_depth: {policy: full_depth}, early_exit: {policy: early_exit}}
baseline: full_depth
seeds: [0, 1, 2, 3, 4, 5]
jobs: 2
profile_band: none
pictures: false
"""


class Command:
    """The command line in a process of its own; all that it starts carry a mark in their environment."""

    def __init__(self, folder: Path, repository: Path, *words: str) -> None:
        self.mark = f"HELIOS_TEST_MARK={os.urandom(8).hex()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "helios_sim", *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(repository), name: value}, text=True,
        )  # fmt: skip

    def left(self) -> list[str]:
        """Command lines of processes with the mark."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if self.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_text().replace("\0", " "))
            except OSError:
                continue
        return found

    def ended_by(self, how: signal.Signals) -> tuple[int, str]:
        """Status and what it said on stderr; nothing that it started lives on."""
        self.process.send_signal(how)
        _, said = self.process.communicate(timeout=30)
        deadline = time.monotonic() + 10
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert self.left() == []
        return self.process.returncode, said


def lines(folder: Path) -> int:
    return len((folder / "finished.jsonl").read_bytes().splitlines()) if (folder / "finished.jsonl").exists() else 0


def wait_for(command: Command, folder: Path, n: int) -> None:
    deadline = time.monotonic() + 120
    while lines(folder) < n:
        assert command.process.poll() is None, command.process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def finished(folder: Path, repository: Path, *words: str) -> str:
    """What the command said, which nobody stops."""
    command = Command(folder, repository, *words)
    _, said = command.process.communicate(timeout=200)
    assert command.process.returncode == 0, said
    return said


@pytest.fixture(scope="module")
def whole(tmp_path_factory, repository) -> Path:
    """The results of the study that nobody stopped."""
    folder = tmp_path_factory.mktemp("undisturbed")
    assert "kept from before" not in finished(folder, repository, *write_study(folder, STUDY), "hydra.run.dir=out")
    return folder / "out"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_study_with_processes(tmp_path, repository, whole, how) -> None:
    words = write_study(tmp_path, STUDY)
    command = Command(tmp_path, repository, *words, "hydra.run.dir=out")
    wait_for(command, tmp_path / "out", 3)
    status, said = command.ended_by(how)
    if how is signal.SIGKILL:
        assert status == -signal.SIGKILL
    else:
        assert status == 1
        told, again = said.splitlines()[-2:]
        assert told.startswith("helios_sim: stopped; what was finished is in the output folder")
        assert again.strip().startswith("python -m helios_sim +experiment=mine")
        assert again.endswith(f"hydra.run.dir={tmp_path / 'out'}")
        assert "Traceback" not in said
    before = lines(tmp_path / "out")
    assert finished(tmp_path, repository, *words, "hydra.run.dir=out").count("kept from before") == before
    for file in ("requests.parquet", "decisions.parquet"):
        assert (tmp_path / "out" / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("after_s", [0.03, 0.1, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_while_it_starts(tmp_path, repository, how, after_s) -> None:
    command = Command(tmp_path, repository, *write_study(tmp_path, STUDY), "hydra.run.dir=out")
    time.sleep(after_s)
    status, said = command.ended_by(how)
    if status > 0:  # the interpreter itself was there already
        assert status == 1
        assert any(line.startswith("helios_sim: stopped") for line in said.splitlines()[-2:])
        assert "Traceback" not in said


@pytest.mark.parametrize(
    ("backend", "how"),
    [
        *(("processes", how) for how in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)), ("ray", signal.SIGKILL),
        *(pytest.param("ray", how, marks=pytest.mark.exhaustive) for how in (signal.SIGINT, signal.SIGTERM)),
    ],
)  # fmt: skip
def test_a_sweep(tmp_path, repository, backend, how) -> None:
    if backend == "ray":
        pytest.importorskip("ray")
    text = SWEEP.replace("values: [20, 80]", "low: 10, high: 90, step: 1, whole: true")
    words = (f"sweep.backend={backend}", "sweep.workers=2", "hydra.run.dir=out")
    command = Command(tmp_path, repository, *write_study(tmp_path, text), *words)
    wait_for(command, tmp_path / "out", 3)
    _, said = command.ended_by(how)
    assert how is signal.SIGKILL or "helios_sim: stopped" in said


def test_a_cluster_of_its_own_listens_on_this_machine_alone(tmp_path, repository) -> None:
    pytest.importorskip("ray")
    command = Command(tmp_path, repository, *write_study(tmp_path, SWEEP), "sweep.backend=ray", "hydra.run.dir=out")
    wait_for(command, tmp_path / "out", 1)
    inodes = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if command.mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                inodes |= {os.readlink(link).strip("socket:[]") for link in (folder / "fd").iterdir()}
        except OSError:
            continue
    heard = [row.split() for file in ("tcp", "tcp6") for row in Path("/proc/net", file).read_text().splitlines()[1:]]
    listening = {row[1].split(":")[0] for row in heard if row[3] == "0A" and row[9] in inodes}
    assert listening
    assert listening <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}
    command.ended_by(signal.SIGTERM)
