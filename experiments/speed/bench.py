"""Measures the simulator's speed and writes the table.

`python experiments/speed/bench.py [--rounds 3]` writes bench.json and bench.md beside itself; a new figure is a new row
of `CASES`. Needs the shared data (HELIOS_SHARED_DATA).

Each round runs every case, so that a machine that becomes slower or faster meanwhile does so for all of them: ratios
between rows hold where seconds do not.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from time import perf_counter

from helios_sim import files
from helios_sim.entry import script

FOLDER = Path(__file__).parent
# Byte code is kept, as for any user: to compile the sources of the package takes 0.2 s.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"} | {"OMP_NUM_THREADS": "1"}
LIBRARIES = ("numpy", "numba", "simpy")
EXITS = (
    "models=[opt-1.3b,opt-6.7b]", "exits.source=published",
    "~workload.mix.tasks.conversation", "+workload.mix.tasks.sharegpt=1.0",
)  # fmt: skip
EARLY_EXIT = (*EXITS, "+arms.early_exit={policy: early_exit, model: opt-6.7b}", "~arms.full_depth")
HELIOS = (*EXITS, "+arms.helios={policy: helios}", "~arms.full_depth")
FOUR_CARDS, SHARING = ("server.tensor_parallel=4",), ("server.enable_prefix_caching=true",)
PRIORITY = ("server.order=priority", "+workload.mix.priorities={conversation: 1}")
MEASURED = (
    "models=[smollm2-135m]", "hardware=epyc-2core", "arms.full_depth.model=smollm2-135m", "runtime.preset=profile",
)  # fmt: skip
UNIT = "a million timeouts of SimPy"
LOOPS = 5  # runs of the loop in a round
TIMEOUTS = """
import simpy
env = simpy.Environment()
def ticks():
    for _ in range(1_000_000):
        yield env.timeout(1)
env.process(ticks())
env.run()
"""
MANY = (
    "server.replicas=64", "server.router=least_loaded", "workload.n_requests=64000",
    "workload.arrivals.rate_per_s=192",
)  # fmt: skip
MILLION = ("pictures=false", "workload.n_requests=1000000")
VALUES = {
    "cap_bound": ("objective.max_disagreement", [0.02, 0.04, 0.06, 0.08, 0.10, 0.12, 0.14, 0.16, 0.18, 0.20]),
    "limit": ("arms.helios.limit", [20, 30, 40, 45, 50, 55, 60, 70, 80, 90]),
    "round_requests": ("arms.helios.round_requests", [25, 50, 75, 100, 125, 150, 200, 250, 300, 400]),
}
PARAMETERS = ", ".join(f"{name}: {{settings: [{path}], values: {values}}}" for name, (path, values) in VALUES.items())
SWEEP = (
    "sweep.arm=helios", "sweep.backend=processes", "sweep.workers=2", f"+sweep.parameters={{{PARAMETERS}}}",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Case:
    """One row: an experiment with these settings. `whole`: the process from its start, else the loop alone."""

    name: str
    whole: bool
    settings: tuple[str, ...] = ()
    experiment: str = "speed_w1"
    most_rounds: int = 99
    designs: int = 0  # of a sweep; 0: a study of one arm


CASES = (
    Case("loop: w1, full depth", False),
    Case("loop: w1 on a card with room (h100-80gb)", False, ("hardware=h100-80gb",)),
    Case("loop: w1, early_exit, per-token exits of opt-6.7b", False, EARLY_EXIT),
    Case("loop: w1, helios over opt-1.3b and opt-6.7b", False, HELIOS),
    Case("loop: w1, four replicas", False, ("server.replicas=4",)),
    Case("loop: w1, server.scheduler=vllm_v1", False, ("server.scheduler=vllm_v1",)),
    Case("loop: w1, server.schedule_ahead=1", False, ("server.schedule_ahead=1",)),
    Case("loop: w1, server.tensor_parallel=4", False, FOUR_CARDS),
    Case("loop: w1, server.enable_prefix_caching=true", False, SHARING),
    Case("loop: w1, both", False, (*FOUR_CARDS, *SHARING)),
    Case("loop: w1, server.order=priority", False, PRIORITY),
    Case("loop: w1 on a measured profile with terms (smollm2-135m)", False, MEASURED),
    Case("loop: 64 replicas of 1,000 requests, least loaded", False, MANY, "scale"),
    Case("process: w1, full depth, without pictures", True, ("pictures=false",)),
    Case("process: w1, full depth, with pictures", True),
    Case("process: a million requests, without pictures", True, MILLION, "scale", most_rounds=1),
    Case("process: 1,000 designs of the quickstart, two workers", True, SWEEP, "quickstart", 1, 1000),
)


@dataclass(frozen=True, slots=True)
class Peer:
    """Recorded by others for the 16,000 requests of w1, on one core of another machine; whole process."""

    name: str
    wall_s: float
    peak_mb: str


PEERS = (
    Peer("inference-sim (BLIS, Go)", 5.9, "416"),
    Peer("Vidur, no metrics", 15.7, "931 to 1,058"),
    Peer("DistServe's simulator (SimPy)", 71.0, "1,783"),
    Peer("SplitwiseSim", 89.0, "258"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """Medians over the runs of all rounds. CPU seconds are the figures to compare where other work runs beside."""

    name: str
    requests: int
    wall_s: float
    cpu_s: float
    requests_per_cpu_s: int
    peak_mib: int


@dataclass(slots=True)
class Samples:
    """The runs of one case so far."""

    case: Case
    requests: int = 0
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    peak_mib: int = 0

    def add_loops(self) -> None:
        """Run the loop `LOOPS` times in a process of its own, after once that is not counted."""
        command = [sys.executable, str(FOLDER / "measure.py"), "--experiment", self.case.experiment]
        command += ["--runs", str(LOOPS + 1), *self.case.settings]
        out = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
        found = json.loads(out.stdout.splitlines()[-1])
        self.requests = found["requests"]
        self.wall_s += found["loop_s"][1:]
        self.cpu_s += found["loop_cpu_s"][1:]
        self.peak_mib = max(self.peak_mib, found["peak_rss_mib"])

    def add_process(self) -> None:
        """Run the whole command once."""
        case = self.case
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "helios_sim", f"+experiment={case.experiment}", f"hydra.run.dir={folder}"]
            wall_s, used = ran([*command, *case.settings])
            summary = json.loads((Path(folder) / "summary.json").read_text())
        arm, *others = summary["arms"].values()
        requests = round(arm["metrics"]["requests_completed"] + arm["metrics"]["requests_dropped"])
        self.requests = requests * (case.designs + len(others) + 1)
        self.wall_s.append(wall_s)
        self.cpu_s.append(used.ru_utime + used.ru_stime)
        self.peak_mib = max(self.peak_mib, used.ru_maxrss // 1024)

    def row(self) -> Row:
        wall_s, cpu_s = statistics.median(self.wall_s), statistics.median(self.cpu_s)
        digits = 2 if self.case.whole else 3
        return Row(
            self.case.name, self.requests, round(wall_s, digits), round(cpu_s, digits), round(self.requests / cpu_s),
            self.peak_mib,
        )  # fmt: skip


def ran(command: list[str]) -> tuple[float, resource.struct_rusage]:
    """Seconds on the clock, and what the process and those that it started have used. Its peak is of the largest."""
    started_s = perf_counter()
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return perf_counter() - started_s, used


def timeouts_cpu_s() -> float:
    """The unit that other machines can be compared by."""
    _, used = ran([sys.executable, "-c", TIMEOUTS])
    return used.ru_utime + used.ru_stime


def markdown(machine: dict[str, str], rows: list[Row], unit_cpu_s: float) -> str:
    lines = [
        "# Speed", "", "Written by `make bench`. " + ", ".join(f"{key} {value}" for key, value in machine.items()), "",
        f"In the same run {UNIT} took {unit_cpu_s} s of CPU. The ratio is of CPU seconds to the first row's.", "",
        "| what | requests | wall s | CPU s | ratio | requests per CPU s | peak MiB |", "|---|---|---|---|---|---|---|",
        *(f"| {r.name} | {r.requests:,} | {r.wall_s} | {r.cpu_s} | {r.cpu_s / rows[0].cpu_s:.2f} | "
          f"{r.requests_per_cpu_s:,} | {r.peak_mib} |" for r in rows),
        "", "Recorded by others for the 16,000 requests of w1, on another machine (one core, whole process):", "",
        "| simulator | wall s | peak MB |", "|---|---|---|",
        *(f"| {peer.name} | {peer.wall_s} | {peer.peak_mb} |" for peer in PEERS), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="rows whose name contains this; nothing is written")
    options = parser.parse_args(words)
    cores = os.cpu_count() or 1
    machine = {"machine": platform.machine(), "cores": str(cores), "python": platform.python_version()}
    machine |= {name: version(name) for name in LIBRARIES}
    samples, units_cpu_s = [Samples(case) for case in CASES if options.only in case.name], []
    for number in range(options.rounds):
        print(f"round {number + 1} of {options.rounds}", file=sys.stderr, flush=True)
        units_cpu_s.append(timeouts_cpu_s())
        for each in samples:
            if number < each.case.most_rounds:
                each.add_process() if each.case.whole else each.add_loops()
    rows, unit_cpu_s = [each.row() for each in samples], round(statistics.median(units_cpu_s), 3)
    for row in rows:
        print(json.dumps(asdict(row)), flush=True)
    if not options.only:
        unit = {"what": UNIT, "cpu_s": unit_cpu_s}
        peers = [asdict(peer) for peer in PEERS]
        found = {"machine": machine, "unit": unit, "rows": [asdict(r) for r in rows], "peers": peers}
        files.write_text(FOLDER / "bench.json", json.dumps(found, indent=1) + "\n")
        files.write_text(FOLDER / "bench.md", markdown(machine, rows, unit_cpu_s))


if __name__ == "__main__":
    script(__file__, main)
