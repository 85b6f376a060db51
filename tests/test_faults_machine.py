"""Faults of the machine, in short: the long form is experiments/faults/machine.py."""

from __future__ import annotations

import errno
import importlib.util
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from helios_sim.errors import UserError, lacking
from helios_sim.vary.runner import at_work_in


@pytest.fixture(scope="module")
def machine(repository: Path) -> ModuleType:
    path = repository / "experiments" / "faults" / "machine.py"
    spec = importlib.util.spec_from_file_location("machine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["machine"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def target(machine: ModuleType) -> Any:
    """The study of the long form with half as many runs, and with its figures, which are files too."""
    words = ("seeds=[0,1]", "jobs=1", "profile_band=none", "next_best=none")
    return replace(machine.TARGETS[0], words=(*machine.SMALL, *words))


@pytest.fixture(scope="module")
def undisturbed(machine: ModuleType, target: Any) -> tuple[dict[str, object], float, int]:
    return machine.undisturbed(target)


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["files limited in size", "folder removed", "no file handles", "two writers"])
def test_a_study_ends_well_or_with_one_message_and_goes_on(
    machine: ModuleType, target: Any, undisturbed: tuple[dict[str, object], float, int], tmp_path: Path, fault: str
) -> None:
    wanted, whole_s, peak = undisturbed
    case = machine.Case(target, random.Random(fault), tmp_path, whole_s, peak)
    assert machine.FAULTS[fault](case, wanted) == ""


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (MemoryError(), "memory"),
        (ImportError("libX.so.6: failed to map segment from shared object"), "memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory"),
        (OSError(errno.EMFILE, "Too many open files"), "open files"),
        (RuntimeError("can't start new thread"), "processes and threads"),
        (OSError(errno.ENOSPC, "No space left on device"), "room on the disk"),
    ],
)
def test_what_the_machine_does_not_give_is_named_however_it_is_raised(error: Exception, what: str) -> None:
    for raised in (error, _wrapped(error)):
        message = lacking(raised)
        assert message is not None
        assert message.value == what
    assert lacking(ValueError("a defect")) is None
    assert lacking(ImportError("no module named x")) is None


def _wrapped(error: Exception) -> Exception:
    try:
        raise RuntimeError("while something was done") from error
    except RuntimeError as outer:
        return outer


def _replaced(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    folder.mkdir()


@pytest.mark.parametrize("change", [Path.rmdir, _replaced])
def test_a_folder_that_is_another_one_in_the_end_is_refused(tmp_path: Path, change: Callable[[Path], None]) -> None:
    with pytest.raises(UserError, match="removed or replaced"), at_work_in(tmp_path / "run"):
        change(tmp_path / "run")
