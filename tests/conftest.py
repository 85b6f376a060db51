"""Shared by all tests: where data from elsewhere lies, the command line, which tests need torch, and properties."""

from __future__ import annotations

import gc
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import is_hypothesis_test, settings

from helios_sim.shared_data import shared_data_folder
from schedule import pytest_collection_modifyitems, pytest_xdist_make_scheduler

__all__ = ["pytest_collection_modifyitems", "pytest_xdist_make_scheduler"]

if TYPE_CHECKING:
    from command_line import CommandLine

# Before a test loads torch: pytest-xdist has a worker on every core, and torch's threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# What a test writes need not outlast a power cut, and a disk takes its time to promise that it would.
os.fsync = lambda _: None

REPOSITORY = Path(__file__).resolve().parent.parent
_NO_DATA = "data from elsewhere is not here"

# A failing example must fail again for everybody; HYPOTHESIS_PROFILE=explore looks for new ones.
settings.register_profile("repeat", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("explore", deadline=None, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeat"))
SHARE, FEW = 0.5, 10  # of a property's examples; `pytest -m exhaustive` tries all

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
    if is_hypothesis_test(getattr(item, "obj", None)):
        if item.config.option.markexpr == "exhaustive":
            item.add_marker("exhaustive")
        elif "HYPOTHESIS_PROFILE" not in os.environ:
            try_fewer_examples(item.obj)


@cache  # several items may have one function
def try_fewer_examples(test: Any) -> None:
    """Let a property try a share of the examples that it names."""
    own: settings = test._hypothesis_internal_use_settings
    if (n := max(FEW, round(SHARE * own.max_examples))) < own.max_examples:
        test._hypothesis_internal_use_settings = settings(own, max_examples=n)


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


def pytest_collection_finish() -> None:
    """Six thousand tests and what they import stay until the end: the collector of cycles need not look at them.

    Live serving freezes what it has opened and thaws everything when it ends. Here what is frozen stays so.
    """
    gc.collect()
    gc.freeze()
    gc.freeze = gc.unfreeze = lambda: None


@pytest.fixture(autouse=True)
def threads_of_torch() -> Iterator[None]:
    """No test leaves another number of torch's threads than it found."""
    before = sys.modules["torch"].get_num_threads() if "torch" in sys.modules else int(os.environ["OMP_NUM_THREADS"])
    yield
    if "torch" in sys.modules and sys.modules["torch"].get_num_threads() != before:
        sys.modules["torch"].set_num_threads(before)


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


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures are made and written, and hold nothing: to set and draw them takes longer than a small study."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    monkeypatch.setattr(ConstrainedLayoutEngine, "execute", lambda self, figure: None)
    monkeypatch.setattr(FigureCanvasAgg, "print_png", lambda self, out, **_: out.write(b"\x89PNG\r\n\x1a\n"))
    monkeypatch.setattr(FigureCanvasSVG, "print_svg", lambda self, out, **_: out.write("<svg ></svg>"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many tests did not run for want of data: a skipped check must not look like a passed one."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if _NO_DATA in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} tests did not run: {_NO_DATA} (HELIOS_SHARED_DATA)", yellow=True)
