"""What stands at the end of every study: its last lines, its exit status, and the command that it names."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import helios_sim
from helios_sim.provenance import command_given, commit
from helios_sim.report.result import Gate
from helios_sim.study.command import end

PASSED, FAILED = Gate("a", 1.0, "<= 2", True), Gate("b", 0.031, "within 3.0%", False)
MUCH_TO_SAY = """
import sys
from pathlib import Path
from helios_sim.report.result import Gate
from helios_sim.study.command import end
sys.exit(end(lambda: print("x" * 1_000_000), Path("."), {}, [Gate("b", 3.0, "<= 2", False)]))
"""


@pytest.mark.parametrize(("gates", "status"), [([], 0), ([PASSED], 0), ([PASSED, FAILED], 2)])
def test_the_summary_comes_last_and_gates_decide_the_status(capsys, gates: list[Gate], status: int) -> None:
    assert end(lambda: print("a table"), Path("out"), {"metric": None}, gates) == status
    lines = capsys.readouterr().out.splitlines()
    assert (lines[0], *lines[-2:]) == ("a table", "output folder: out", '{"metric": null}')
    said = ["gate passed: a 1.000 [–], must be <= 2", "gate FAILED: b +3.10% [–], must be within 3.0%"]
    assert lines[1:-2] == said[: len(gates)]


@pytest.mark.slow
def test_a_reader_that_leaves_early_changes_nothing() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", MUCH_TO_SAY], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(helios_sim.__file__).parents[1],
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 2


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["/somewhere/calibrate/__main__.py", "model=a b", "-m"], "python -m calibrate 'model=a b' -m"),
        (["/usr/bin/calibrate", "model=b"], "calibrate model=b"),
        (["/somewhere/ipykernel_launcher.py", "-f", "/there/kernel-1.json"], "calibrate, called from Python"),
    ],
)
def test_the_command_is_named_only_where_there_was_one(monkeypatch, arguments: list[str], command: str) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    assert command_given("calibrate") == command


def test_a_process_ends_with_its_status_once_all_that_was_registered_is_done() -> None:
    program = (
        "import atexit, helios_sim.__main__ as m; m.collect_rarely(); atexit.register(print, 'said at the end'); "
        "m._statuses.append(2)"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "said at the end\n")


def test_a_checkout_is_named_by_its_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    folder = tmp_path / "package"
    folder.mkdir()
    (folder / "a.py").write_text("1")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]

    def told(*words: str) -> str:
        return subprocess.run([*git, *words], capture_output=True, text=True, check=True).stdout.strip()

    assert commit(folder) is None
    told("init")
    assert commit(folder) is None
    told("add", ".")
    told("commit", "-m", "first")
    (folder / "new.py").write_text("not one of its files")
    first = told("rev-parse", "HEAD")
    assert commit(folder) == first
    (folder / "a.py").write_text("2")
    assert commit(folder) == f"{first}-dirty"
