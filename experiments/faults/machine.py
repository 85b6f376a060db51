"""Lets the machine fail under studies, sweeps and calibrations: disk, folder, clock, file handles, memory, workers.

`python experiments/faults/machine.py [--count 3] [--seed 1] [--only WORD]` writes machine.json and machine.md beside
itself. A run under a fault is good if it ends by itself within 120 s, with the results of an undisturbed run or with
one message and status 1, and the same command without the fault then ends with those results and leaves nothing that is
half written. What a calibration measures differs from run to run: its stages and tables must be there. Disks that fill
up or turn read-only are file systems in memory, which only root may mount; others limit the size of a file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER))

from kills import CALIBRATION, left_over, of_calibration, results  # noqa: E402

from helios_sim import files  # noqa: E402
from helios_sim.entry import script  # noqa: E402

LONGEST_S = 120.0
HALF_WRITTEN = (".tmp", ".part", ".partial")
SMALL = ("+experiment=quickstart", "workload.n_requests=40")
AXIS = "+sweep.parameters={limit: {settings: [arms.helios.limit], values: [10, 20, 30, 40]}}"
JUMPS = """
import random, time

rng, past, past_ns = random.Random({seed}), time.time, time.time_ns

def off():
    return rng.choice((-1, 1)) * rng.uniform(0, 1e6)

time.time = lambda: max(0.0, past() + off())
time.time_ns = lambda: max(0, past_ns() + int(1e9 * off()))
"""


@dataclass(frozen=True)
class Target:
    """A command, and how its results are read."""

    name: str
    module: str
    words: tuple[str, ...]
    place: str  # the setting that names the output folder
    read: Callable[[Path], dict[str, object]] = results
    workers: bool = False

    def command(self, folder: Path) -> list[str]:
        return [sys.executable, "-m", self.module, *self.words, f"{self.place}={folder}"]


TARGETS = (
    Target("a study", "helios_sim", (*SMALL, "seeds=[0,1,2,3]", "jobs=1"), "hydra.run.dir"),
    Target("a study with two workers", "helios_sim", (
        *SMALL, "seeds=[0,1,2,3]", "jobs=2",
    ), "hydra.run.dir", results, True),
    Target("a sweep with two workers", "helios_sim", (
        *SMALL, "sweep.arm=helios", "sweep.workers=2", "sweep.backend=processes", AXIS,
    ), "hydra.run.dir", results, True),
    Target("a calibration", "calibrate", CALIBRATION, "out", of_calibration),
)  # fmt: skip


@dataclass
class Case:
    """One run of a target under a fault."""

    target: Target
    rng: random.Random
    place: Path  # for everything of this case
    whole_s: float  # that an undisturbed run takes
    peak_bytes: int  # of its address space
    folder: Path = field(init=False)

    def __post_init__(self) -> None:
        self.folder = self.place / "run"

    def some_time(self) -> float:
        return self.rng.uniform(0.05, self.whole_s)

    def started(self, limit: tuple[int, int] | None = None, path: Path | None = None) -> subprocess.Popen[str]:
        """`limit`: of a resource (RLIMIT_...). `path`: a folder of modules that come first."""
        environment = dict(os.environ)
        if path is not None:
            environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])

        def prepare() -> None:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            if limit is not None:
                resource.setrlimit(limit[0], (limit[1], limit[1]))

        return subprocess.Popen(
            self.target.command(self.folder), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
            start_new_session=True, env=environment, preexec_fn=prepare, errors="replace",
        )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """The status and what it said on stderr; -999 if it had to be ended."""
    try:
        _, said = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -999, process.communicate()[1]
    if left_over(process.pid):
        time.sleep(2)
        with suppress(ProcessLookupError):
            if left_over(process.pid):
                os.killpg(process.pid, signal.SIGKILL)
                return -998, said
    return process.returncode, said


def has(case: Case, wanted: dict[str, object]) -> bool:
    """Whether the output folder holds these results."""
    try:
        return case.target.read(case.folder) == wanted
    except FileNotFoundError:
        return False


def judged(case: Case, status: int, said: str, wanted: dict[str, object]) -> str:
    """What was wrong with a run under a fault, or ""."""
    if status in (-999, -998):
        return "it did not end" if status == -999 else "processes outlive it"
    if "Traceback" in said:
        return f"says {said[said.index('Traceback') :][-1500:]}"
    if status == 0:
        return "" if has(case, wanted) else "status 0 and other results, or none"
    told = [line for line in said.splitlines() if line.startswith((f"{case.target.module}: ", "calibrate: "))]
    if status != 1 or not told:
        return f"status {status}, says {said[-600:]!r}"
    return ""


def resumed(case: Case, wanted: dict[str, object]) -> str:
    """What was wrong with the same command without the fault, or ""."""
    status, said = ended(case.started())
    if status or "Traceback" in said:
        return f"resumed: status {status}, says {said[-600:]!r}"
    if not has(case, wanted):
        return "resumed: other results, or none"
    left = [str(p.relative_to(case.folder)) for p in case.folder.rglob("*") if p.suffix in HALF_WRITTEN]
    return f"resumed: half written: {', '.join(left)}" if left else ""


def settled(case: Case, process: subprocess.Popen[str], wanted: dict[str, object]) -> str:
    return judged(case, *ended(process), wanted)


@contextmanager
def in_memory(folder: Path, options: str) -> Iterator[Callable[[str], bool]]:
    """A file system in memory at the folder. Yields what mounts it again with other options, if that is possible."""

    def again(other: str) -> bool:
        command = ["/bin/mount", "-o", f"remount,{other}", str(folder)]
        return not subprocess.run(command, capture_output=True, check=False).returncode

    folder.mkdir()
    subprocess.run(["/bin/mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    try:
        yield again
    finally:
        subprocess.run(["/bin/umount", "-l", str(folder)], check=False)


def disk_full(case: Case, wanted: dict[str, object]) -> str:
    if os.geteuid():
        return file_too_large(case, wanted)
    size = int(2 ** case.rng.uniform(12, 21))
    with in_memory(case.place / "disk", f"size={size}") as again:
        case.folder = case.place / "disk" / "run"
        wrong = settled(case, case.started(), wanted)
        again("size=1g")
        return wrong or resumed(case, wanted)


def file_too_large(case: Case, wanted: dict[str, object]) -> str:
    limit = resource.RLIMIT_FSIZE, int(2 ** case.rng.uniform(6, 19))
    return settled(case, case.started(limit), wanted) or resumed(case, wanted)


def read_only(case: Case, wanted: dict[str, object]) -> str:
    """From the beginning, or from some moment on."""
    if os.geteuid():
        return ""
    with in_memory(case.place / "disk", "size=1g") as again:
        case.folder = case.place / "disk" / "run"
        from_s = case.rng.choice((0.0, case.some_time()))
        if not from_s:
            again("ro")
        process = case.started()
        until_s = time.monotonic() + from_s
        while process.poll() is None and (time.monotonic() < until_s or not (from_s == 0 or again("ro"))):
            time.sleep(0.02)
            if time.monotonic() > until_s and again("ro"):
                break
        wrong = settled(case, process, wanted)
        again("rw")
        return wrong or resumed(case, wanted)


def folder_removed(case: Case, wanted: dict[str, object]) -> str:
    process = case.started()
    time.sleep(case.some_time())
    was_done = (case.folder / "summary.json").is_file()  # then there is no one left who could notice
    shutil.rmtree(case.folder, ignore_errors=True)
    status, said = ended(process)
    wrong = judged(case, status, said, wanted) if status or not was_done else ""
    return wrong or resumed(case, wanted)


def clock_jumps(case: Case, wanted: dict[str, object]) -> str:
    modules = case.place / "modules"
    modules.mkdir()
    (modules / "sitecustomize.py").write_text(JUMPS.format(seed=case.rng.randrange(1 << 30)))
    wrong = settled(case, case.started(path=modules), wanted)
    return wrong or resumed(case, wanted)


def no_handles(case: Case, wanted: dict[str, object]) -> str:
    limit = resource.RLIMIT_NOFILE, case.rng.randint(12, 40)
    return settled(case, case.started(limit), wanted) or resumed(case, wanted)


def memory_limit(case: Case, wanted: dict[str, object]) -> str:
    limit = resource.RLIMIT_AS, int(case.peak_bytes * case.rng.uniform(0.7, 1.0))
    return settled(case, case.started(limit), wanted) or resumed(case, wanted)


def worker_killed(case: Case, wanted: dict[str, object]) -> str:
    """As the system does where memory runs out."""
    process = case.started()
    time.sleep(case.some_time())
    workers = []
    for pid in left_over(process.pid):
        with suppress(OSError):
            if b"--process-name" in Path(f"/proc/{pid}/cmdline").read_bytes():
                workers.append(pid)
    if workers:
        with suppress(ProcessLookupError):
            os.kill(case.rng.choice(workers), signal.SIGKILL)
    return settled(case, process, wanted) or resumed(case, wanted)


def two_writers(case: Case, wanted: dict[str, object]) -> str:
    """One of the two is refused, unless it came when the other was done."""
    first = case.started()
    time.sleep(case.some_time())
    second = case.started()
    ends = [ended(first), ended(second)]
    if all(status for status, _ in ends):
        return f"neither of two ended well: {[said[-300:] for _, said in ends]}"
    for status, said in ends:
        if wrong := judged(case, status, said, wanted):
            return wrong
        if status and "another process is at work" not in said:
            return f"refused otherwise: {said[-300:]!r}"
    return resumed(case, wanted)


FAULTS: dict[str, Callable[[Case, dict[str, object]], str]] = {
    "disk full": disk_full,
    "files limited in size": file_too_large,
    "folder read-only": read_only,
    "folder removed": folder_removed,
    "clock jumps": clock_jumps,
    "no file handles": no_handles,
    "memory limited": memory_limit,
    "a worker killed": worker_killed,
    "two writers": two_writers,
}


def undisturbed(target: Target) -> tuple[dict[str, object], float, int]:
    """The results, seconds, and the largest address space in bytes."""
    with TemporaryDirectory() as at:
        case = Case(target, random.Random(0), Path(at), 0.0, 0)
        began_s, peak = time.monotonic(), 0
        process = case.started()
        while process.poll() is None and time.monotonic() - began_s < LONGEST_S:
            with suppress(OSError, StopIteration, ValueError):
                lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                peak = max(peak, 1024 * int(next(line for line in lines if line.startswith("VmPeak")).split()[1]))
            time.sleep(0.05)
        status, said = ended(process)
        assert not status, said
        return target.read(case.folder), time.monotonic() - began_s, peak


def tried(target: Target, faults: Sequence[str], count: int, seed: int) -> list[dict[str, object]]:
    """A row for each fault: how often it was tried, and what went wrong, word for word."""
    wanted, whole_s, peak = undisturbed(target)
    rows = []
    for fault in faults:
        if fault == "a worker killed" and not target.workers:
            continue
        wrong = []
        for number in range(count):
            with TemporaryDirectory() as at:
                rng = random.Random(f"{seed} {target.name} {fault} {number}")
                found = FAULTS[fault](Case(target, rng, Path(at), whole_s, peak), wanted)
            if found:
                wrong.append(f"{number}: {found}")
        rows.append({"target": target.name, "fault": fault, "tried": count, "bad": len(wrong), "bad_ones": wrong})
        print(rows[-1], flush=True)
    return rows


def table(rows: Sequence[dict[str, object]], seed: int) -> str:
    targets = list(dict.fromkeys(str(row["target"]) for row in rows))
    found = {(row["fault"], row["target"]): f"{row['tried']}, {row['bad']}" for row in rows}
    lines = [
        "# Faults of the machine", "",
        f"Written by `python experiments/faults/machine.py`, seed {seed}: how often tried, and how often bad.", "",
        f"| fault | {' | '.join(targets)} |", f"|---|{'---|' * len(targets)}",
    ]  # fmt: skip
    for fault in FAULTS:
        if any(row["fault"] == fault for row in rows):
            lines.append(f"| {fault} | {' | '.join(found.get((fault, target), '') for target in targets)} |")
    total: Counter[str] = Counter()
    for row in rows:
        total.update({"tried": int(str(row["tried"])), "bad": int(str(row["bad"]))})
    return "\n".join([*lines, "", f"In all {total['tried']} tried, {total['bad']} bad.", ""])


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", default="", help="faults or commands with this word in their names")
    options = parser.parse_args(words)
    rows: list[dict[str, object]] = []
    for target in TARGETS:
        faults = [fault for fault in FAULTS if options.only in fault or options.only in target.name]
        if faults:
            rows += tried(target, faults, options.count, options.seed)
        found = {"seed": options.seed, "rows": rows}
        if not options.only:
            files.write_text(FOLDER / "machine.json", json.dumps(found, indent=1) + "\n")
            files.write_text(FOLDER / "machine.md", table(rows, options.seed))
    return 1 if any(row["bad"] for row in rows) else 0


if __name__ == "__main__":
    script(__file__, main)
