"""The same bits in every environment: no result depends on what is compiled, cached, writable or set outside."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("numba")

STUDIES = {
    "quickstart": ("+experiment=quickstart", "workload.n_requests=40", "pictures=false"),
    "drift": (
        "+experiment=drift", "workload.n_requests=100", "sweeps=[]", "figures=[]", "seeds=[0]", "pictures=false",
        "profile_band=none", "next_best=none",  # the other study has both
        "+exits.parameters.prompts_per_task=64", "~arms.full_depth_opt-1.3b", "~arms.early_exit_opt-6.7b",
        "~arms.static_cap_opt-1.3b", "~arms.static_cap_opt-6.7b", "~arms.helios_standby",
    ),
}  # fmt: skip
# Several studies in one process: what is tried is the environment, and most of a small study is imports.
PROGRAM = """
import json, sys
from helios_sim.__main__ import main

for sys.argv[1:] in json.loads(sys.argv[1]):
    if main():
        sys.exit(1)
"""
COMPILING = ("+experiment=quickstart", "workload.n_requests=2000", "pictures=false")
Made = Callable[[Path], Path]  # a folder of machine code, from one that is whole


@dataclass(frozen=True)
class Environment:
    """How the command is run, beside the usual; `cache` makes the folder of machine code from a whole one."""

    variables: dict[str, str | None] = field(default_factory=dict)  # None: unset
    options: tuple[str, ...] = ()  # of python
    words: tuple[str, ...] = ()
    shell: str = ""  # runs before
    cache: Made = lambda whole: whole
    cwd: str = "."
    without: tuple[str, ...] = ()  # packages that cannot be imported


def beside(whole: Path) -> Path:
    return whole.parent / f"copy{len(list(whole.parent.iterdir()))}"


def damaged(change: Callable[[Path], object]) -> Made:
    """A copy of the whole cache with a change in its one folder of compiled code."""

    def made(whole: Path) -> Path:
        copy = beside(whole)
        shutil.copytree(whole, copy)
        (folder,) = (copy / "compiled").iterdir()
        change(folder)
        return copy

    return made


def largest(folder: Path) -> Path:
    return max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)


def flip(folder: Path) -> None:
    content = bytearray(largest(folder).read_bytes())
    content[len(content) // 2] ^= 1
    largest(folder).write_bytes(content)


def replace_by(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder)
        make(folder)

    return change


def listed(text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "digests.json").write_text(text)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit is flipped": flip,
    "a file is cut short": lambda folder: os.truncate(largest(folder), 1000),
    "a file is empty": lambda folder: os.truncate(largest(folder), 0),
    "a file is longer": lambda folder: largest(folder).open("ab").write(b"x"),
    "a file is missing": lambda folder: largest(folder).unlink(),
    "a file is a folder": lambda folder: (largest(folder).rename(folder / "moved"), (folder / "x.nbc").mkdir()),
    "no list": lambda folder: (folder / "digests.json").unlink(),
    "an empty list": listed("{}"),
    "half a list": lambda folder: os.truncate(folder / "digests.json", 30),
    "a list that is none": listed("[1, 2]"),
    "a list of bytes": lambda folder: (folder / "digests.json").write_bytes(b"\xff\xfe\x00"),
    "a file in place of the folder": replace_by(lambda folder: folder.write_text("x")),
    "a link in a circle": replace_by(lambda folder: folder.symlink_to(folder)),
}
ENVIRONMENTS: dict[str, Environment] = {
    "a home that cannot be written": Environment({"HOME": "/proc", "XDG_CACHE_HOME": None, "HELIOS_CACHE": None}),
    "no home": Environment({"HOME": None}),
    "a cache that cannot be written": Environment({"HELIOS_CACHE": "/proc/x"}),
    "a cache that is a file": Environment({"HELIOS_CACHE": "/etc/hostname"}),
    "an empty cache": Environment(cache=lambda whole: beside(whole)),
    **{name: Environment(cache=damaged(change)) for name, change in DAMAGES.items()},
    "no machine code": Environment({"NUMBA_DISABLE_JIT": "1"}),
    "no numba": Environment(without=("numba", "llvmlite")),
    "optimised": Environment(options=("-O",)),
    "optimised twice": Environment(options=("-OO",)),
    "development mode": Environment(options=("-X", "dev", "-W", "ignore")),
    "the C locale": Environment({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "ASCII": Environment({"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}),
    "hash seed 0": Environment({"PYTHONHASHSEED": "0"}),
    "hash seed 4294967295": Environment({"PYTHONHASHSEED": "4294967295"}),
    "one thread": Environment(dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")),
    "many threads": Environment({"OMP_NUM_THREADS": "64"}),
    "another time zone": Environment({"TZ": "Asia/Kathmandu"}),
    "another folder": Environment(cwd="/"),
    "private files": Environment(shell="umask 077"),
    "public files": Environment(shell="umask 000"),
    "one process": Environment(words=("jobs=1",)),
    "two processes": Environment(words=("jobs=2",)),
    "few file handles": Environment(shell="ulimit -n 64"),
    "no temporary folder": Environment({"TMPDIR": "/proc/x"}),
    "a small dumb terminal": Environment({"COLUMNS": "20", "TERM": "dumb", "NO_COLOR": "1"}),
    "memory that is not zero": Environment({"MALLOC_PERTURB_": "165", "PYTHONMALLOC": "malloc"}),
}
TOGETHER = (  # in one process, since none undoes what another one does
    ("no home", "optimised twice", "hash seed 4294967295", "one thread", "public files", "two processes"),
    ("development mode", "the C locale", "another folder", "no temporary folder"),
    ("optimised", "hash seed 0", "ASCII", "another time zone", "a small dumb terminal", "few file handles",
     "memory that is not zero"),
    ("a home that cannot be written", "many threads", "private files", "one process"),
    ("a cache that cannot be written",),
    ("a cache that is a file",),
    ("an empty cache",),
    ("no machine code",),
    ("no numba",),
)  # fmt: skip


def together(names: tuple[str, ...]) -> Environment:
    """All of these at once, of which no two may say the same thing."""
    usual, made, variables = Environment(), {}, {}
    for env in (ENVIRONMENTS[name] for name in names):
        assert not variables.keys() & env.variables.keys(), names
        variables |= env.variables
        own = {key: value for key, value in vars(env).items() if key != "variables" and value != getattr(usual, key)}
        assert not made.keys() & own.keys(), names
        made |= own
    return Environment(variables, **made)


def without(packages: tuple[str, ...], folder: Path) -> str:
    """A folder that holds every installed package but these."""
    folder.mkdir(exist_ok=True)
    for path in Path(sysconfig.get_path("purelib")).iterdir():
        link = folder / path.name
        if not path.name.startswith(packages) and path.suffix != ".pth" and not link.is_symlink():
            link.symlink_to(path)
    return str(folder)


def ran(
    commands: dict[Path, tuple[str, ...]], env: Environment, cache: Path, repository: Path
) -> subprocess.CompletedProcess[str]:
    """Studies by the folders that they write, one after the other in one process of the environment."""
    variables: dict[str, str | None] = {**os.environ, "PYTHONPATH": str(repository), "HELIOS_CACHE": str(cache)}
    program = [sys.executable, *env.options]
    if env.without:
        variables["PYTHONPATH"] = f"{repository}:{without(env.without, cache.parent / 'packages')}"
        program = [os.path.realpath(sys.executable), "-S"]
    variables |= env.variables
    studies = [[*words, *env.words, f"hydra.run.dir={out}"] for out, words in commands.items()]
    command = [*program, "-c", PROGRAM, json.dumps(studies)]
    if env.shell:
        command = ["bash", "-c", f'{env.shell}; exec "$@"', "bash", *command]
    cwd = next(iter(commands)).parent if env.cwd == "." else Path(env.cwd)
    return subprocess.run(
        command, cwd=cwd, env={name: value for name, value in variables.items() if value is not None},
        capture_output=True, text=True, check=False, timeout=300, errors="replace",
    )  # fmt: skip


def bits(out: Path) -> dict[str, Any]:
    """Everything that must be the same."""
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    files = {name: (out / name).read_bytes() for name in ("requests.parquet", "decisions.parquet")}
    return {**files, **{key: summary[key] for key in ("arms", "baseline", "verdict") if key in summary}}


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A whole cache of machine code."""
    from helios_sim.core import machine

    place = tmp_path_factory.mktemp("environments") / "cache"
    if machine.is_made():
        shutil.copytree(machine.code_folder(), place / "compiled" / machine.code_folder().name)
    else:
        done = ran({place.parent / "first": COMPILING}, Environment(), place, repository)
        assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(scope="module")
def usual(cache: Path, repository: Path) -> dict[str, dict[str, Any]]:
    return found("usual", Environment(), tuple(STUDIES), cache, repository)


def found(
    name: str, env: Environment, studies: tuple[str, ...], cache: Path, repository: Path
) -> dict[str, dict[str, Any]]:
    """What each of the studies gives in this environment."""
    outs = {study: cache.parent / f"{study} {name}" for study in studies}
    done = ran({outs[study]: STUDIES[study] for study in studies}, env, env.cache(cache), repository)
    assert done.returncode == 0, (name, done.stderr)
    assert "Traceback" not in done.stderr, (name, done.stderr)
    return {study: bits(out) for study, out in outs.items()}


def check(name: str, studies: tuple[str, ...], cache: Path, usual: dict[str, dict[str, Any]], repository: Path) -> None:
    made = found(name, ENVIRONMENTS[name], studies, cache, repository)
    assert made == {study: usual[study] for study in studies}, name


def check_all(names: Iterable[str], studies: tuple[str, ...], cache: Path, usual: Any, repository: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        tasks = {name: pool.submit(check, name, studies, cache, usual, repository) for name in names}
        failed = {name: task.exception() for name, task in tasks.items() if task.exception() is not None}
    assert not failed


@pytest.mark.slow
@pytest.mark.parametrize("names", TOGETHER, ids=", ".join)
def test_every_environment_gives_the_same_bits(names, cache, usual, repository) -> None:
    made = found(names[0], together(names), tuple(STUDIES), cache, repository)
    assert made == usual


def test_every_environment_is_among_those_that_are_tried_together() -> None:
    assert sorted(name for names in TOGETHER for name in names) == sorted(set(ENVIRONMENTS) - set(DAMAGES))


@pytest.mark.exhaustive
def test_every_environment_alone_gives_the_same_bits(cache, usual, repository) -> None:
    check_all([name for name in ENVIRONMENTS if name not in DAMAGES], tuple(STUDIES), cache, usual, repository)


@pytest.mark.exhaustive  # below, every damage is noticed; test_machine_code.py runs a study with some
def test_a_damaged_cache_gives_the_same_bits(cache, usual, repository) -> None:
    check_all(DAMAGES, ("drift",), cache, usual, repository)


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_is_made_anew(damage, cache, repository, tmp_path) -> None:
    from helios_sim.core.machine import _is_whole

    copy = ENVIRONMENTS[damage].cache(cache)
    (folder,) = (copy / "compiled").iterdir()
    assert not _is_whole(folder)
