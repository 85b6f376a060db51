"""Whatever lies in the folder of machine code, the same command gives the same bits and stops with no traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet
import pytest

pytest.importorskip("numba")

from helios_sim.core.machine import WORTH_COMPILING, _is_whole, code_folder, is_made

pytestmark = pytest.mark.slow

COMMAND = (
    "+experiment=own", "models=[opt-1.3b,opt-6.7b]", "policy=none", "+arms.probe={policy: helios_probe}",
    f"workload.n_requests={WORTH_COMPILING}", "seeds=[0,1]", "workload.arrivals.rate_per_s=12",
    "profile_band=none", "next_best=none", "pictures=false",
)  # fmt: skip


# Machine code that was made before takes the place of what takes some 10 s to make. All else is as ever.
MADE_BEFORE = """
import sys
from pathlib import Path
from helios_sim.__main__ import main
from helios_sim.core import native

made = Path(sys.argv.pop(1))
native.compiled = lambda function, args: (made / f"{function.py_func.__name__}.o").read_bytes()
sys.exit(main(sys.argv[1:]))
"""


@dataclass(frozen=True)
class Ran:
    folder: Path
    said: str  # on standard error
    compiled: bool  # it took the time to make the machine code and said so


def run(folder: Path, cache: Path, made: Path | None = None, **variables: str) -> Ran:
    """Runs the command with its results in `folder` and its machine code in `cache`.

    `made` is another cache, whose code is taken where code would be compiled.
    """
    program = ["-m", "helios_sim"] if made is None else ["-c", MADE_BEFORE, str(code_in(made))]
    environment = {**os.environ, "HELIOS_CACHE": str(cache), **variables}
    done = subprocess.run(
        [sys.executable, *program, *COMMAND, f"hydra.run.dir={folder}"],
        env=environment, capture_output=True, text=True, check=False, cwd=folder.parent, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return Ran(folder, done.stderr, "compiling the serving loop" in done.stderr)


def flip(folder: Path) -> None:
    """One bit in the middle of the loop's code."""
    code = folder / "route.o"
    content = bytearray(code.read_bytes())
    content[len(content) // 2] ^= 1
    code.write_bytes(content)


def truncate(folder: Path) -> None:
    listed = folder / "digests.json"
    listed.write_text(listed.read_text()[:-20])


def lose(folder: Path) -> None:
    (folder / "estimate.o").unlink()


def empty(folder: Path) -> None:
    (folder / "digests.json").write_text("{}")


def move(folder: Path) -> None:
    """As it comes from a machine with another kind of processor."""
    listed = folder / "digests.json"
    listed.write_text(json.dumps(json.loads(listed.read_text()) | {"processor": "x86_64 of another make"}))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "flipped": flip, "truncated": truncate, "lost": lose, "empty": empty, "moved": move,
}  # fmt: skip


def damaged(cache: Path, to: Path, damage: str) -> Path:
    """A copy of a cache whose machine code has been damaged."""
    shutil.copytree(cache, to)
    DAMAGES[damage](code_in(to))
    return to


def code_in(cache: Path) -> Path:
    """The one folder of machine code in a cache."""
    (folder,) = (cache / "compiled").iterdir()
    return folder


def lay_ready(code: Path) -> None:
    """Put the code where the tests of this process look for it, unless some lies there."""
    if not is_made():
        own = code_folder().with_name(f"{code_folder().name}.{os.getpid()}")
        shutil.copytree(code, own)
        with suppress(OSError):  # another process was quicker
            own.rename(code_folder())
        shutil.rmtree(own, ignore_errors=True)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ran]:
    """By what the command finds, two at a time. The code is compiled once, and then lies ready for other tests."""
    at = tmp_path_factory.mktemp("machine_code")
    made = at / "made"
    with ThreadPoolExecutor(2) as pool:
        first = {
            "empty": pool.submit(run, at / "a", made),
            "interpreted": pool.submit(run, at / "c", at / "none", NUMBA_DISABLE_JIT="1"),
        }
        found = {name: task.result() for name, task in first.items()}
        lay_ready(code_in(made))
        second = {
            "unwritable": pool.submit(run, at / "b", Path("/proc/x"), made),
            "flipped": pool.submit(run, at / "d", damaged(made, at / "flipped", "flipped"), made),
            "warm": pool.submit(run, at / "e", made),
        }
        return found | {name: task.result() for name, task in second.items()}


@pytest.mark.parametrize("found", ["empty", "unwritable", "flipped", "warm"])
def test_the_bits_are_those_of_the_interpreter(runs: dict[str, Ran], found: str) -> None:
    check_bits(runs[found], runs["interpreted"])


@pytest.mark.exhaustive
def test_the_bits_are_those_of_the_interpreter_where_code_is_compiled_again(runs: dict[str, Ran]) -> None:
    at = runs["empty"].folder.parent
    unwritable = run(at / "f", Path("/proc/x"))
    flipped = run(at / "g", damaged(at / "made", at / "flipped again", "flipped"))
    for ran in (unwritable, flipped):
        check_bits(ran, runs["interpreted"])
    assert flipped.compiled
    assert _is_whole(code_in(at / "flipped again"))


def check_bits(other: Ran, wanted: Ran) -> None:
    for file in ("requests.parquet", "decisions.parquet"):
        assert pyarrow.parquet.read_table(wanted.folder / file).equals(pyarrow.parquet.read_table(other.folder / file))
    metrics = [
        json.loads((ran.folder / "summary.json").read_text())["arms"]["probe"]["metrics"] for ran in (other, wanted)
    ]
    assert metrics[0] == metrics[1]
    assert "Traceback" not in other.said
    assert "rror" not in other.said


def test_what_is_damaged_is_made_anew_and_what_is_whole_is_used(runs: dict[str, Ran]) -> None:
    assert {name for name, ran in runs.items() if ran.compiled} == {"empty", "flipped"}
    for name in ("made", "flipped"):
        assert _is_whole(code_in(runs["empty"].folder.parent / name))
    assert not (runs["empty"].folder.parent / "none").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_of_any_kind_is_noticed(runs: dict[str, Ran], tmp_path: Path, damage: str) -> None:
    copy = damaged(runs["empty"].folder.parent / "made", tmp_path / "copy", damage)
    assert not _is_whole(code_in(copy))


def test_a_run_from_disk_does_without_numba(runs: dict[str, Ran], tmp_path: Path) -> None:
    """To import it takes longer than to simulate ten thousand requests."""
    said = (
        "import sys; from helios_sim.__main__ import main; main(sys.argv[1:]); "
        "print([name for name in ('numba', 'scipy') if name in sys.modules])"
    )
    command = ["+experiment=own", "models=[opt-1.3b]", "policy=full_depth", "exits.source=none"]
    environment = {**os.environ, "HELIOS_CACHE": str(runs["empty"].folder.parent / "made")}
    done = subprocess.run(
        [sys.executable, "-c", said, *command, "pictures=false", f"hydra.run.dir={tmp_path}"],
        env=environment, capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]"
