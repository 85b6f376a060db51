"""Shared by all tests: where data from elsewhere lies, the command line, which tests need torch, and properties."""

from __future__ import annotations

import os
import re
from functools import cache
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

_IMPORTED = re.compile(
    r"""^(?:\w+\ =\ )?  # at the start of a line, so when the file is imported
    (?:from\ ([\w.]+)\ import\ (.*) | import\ ([\w.]+) | pytest\.importorskip\("(\w+)")""",
    re.M | re.X,
)
_TORCH = {"torch", "transformers"}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Files that need torch are not even imported where live tests are left out."""
    if "not live" in config.option.markexpr and collection_path.name.startswith("test_"):
        return True if needs_torch(collection_path) else None
    return None


def pytest_itemcollected(item: pytest.Item) -> None:
    if needs_torch(item.path):
        item.add_marker("live")


@cache
def needs_torch(path: Path) -> bool:
    """Whether importing this file imports torch, itself or through files of the project that it imports."""
    seen: set[Path] = set()
    ahead = [path]
    while ahead:
        file = ahead.pop()
        if file not in seen:
            seen.add(file)
            names = _imported_by(file)
            if not _TORCH.isdisjoint(name.split(".")[0] for name in names):
                return True
            ahead += [found for name in names for found in _files_of(name)]
    return False


@cache
def _imported_by(file: Path) -> tuple[str, ...]:
    names: list[str] = []
    for package, what, module, skipped in _IMPORTED.findall(file.read_text(encoding="utf-8")):
        names.append(package or module or skipped)
        names += [f"{package}.{name}" for name in re.findall(r"\w+", what)]
    return tuple(names)


@cache
def _files_of(module: str) -> tuple[Path, ...]:
    """The project's files that this module can be."""
    place = Path(*module.split("."))
    folders = (REPOSITORY, REPOSITORY / "tests")
    found = (folder / end for folder in folders for end in (place.with_suffix(".py"), place / "__init__.py"))
    return tuple(file for file in found if file.is_file())


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
