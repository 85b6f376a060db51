"""Shared by all tests: where data from elsewhere lies, the command line, and reproducible property tests."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from helios_sim.shared_data import shared_data_folder

if TYPE_CHECKING:
    from command_line import CommandLine

# Before a test loads torch: pytest-xdist has a worker on every core, and torch's threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

REPOSITORY = Path(__file__).resolve().parent.parent
_NO_DATA = "data from elsewhere is not here"

# A failing example must fail again for everybody; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("repeat", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))


@pytest.fixture(scope="session")
def repository() -> Path:
    return REPOSITORY


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of data from elsewhere (`HELIOS_SHARED_DATA`, else ../shared/data); skips the test without it."""
    folder = shared_data_folder().resolve()
    if not folder.is_dir():
        pytest.skip(f"{_NO_DATA}: no folder {folder} (set HELIOS_SHARED_DATA)")
    return folder


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> CommandLine:
    """`python -m helios_sim` inside this process, in a folder of the test's own."""
    from command_line import CommandLine

    return CommandLine(capsys, monkeypatch, tmp_path)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests did not run for want of data: a skipped check must not look like a passed one."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if _NO_DATA in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests did not run: {_NO_DATA} (HELIOS_SHARED_DATA)", yellow=True)
