"""Kills commands at random moments, resumes them, and compares what they hold with an undisturbed run.

`python experiments/faults/kills.py [--kills 200] [--further 5] [--seed 1] [--only NAME]` writes kills.json and kills.md
beside itself: `--kills` of studies and sweeps, and `--further` of each of a calibration, a live study, a server under
load, a sweep on Ray, one whose Ray workers are killed under it, and one whose machines are. With `--kills 0` the rows
of earlier kills stay in the files, and with `--only` all rows but the one of that name.

A kill is good if the process is gone within 20 s with all that it started, says no traceback, and the resumed command
ends with the same bits in its requests and decisions and the same figures. What is measured anew differs from run to
run: there, stages, ends of tables and requests must be the same. A sweep that loses a worker of Ray, or one of the two
machines that work for it, must end by itself with the same results; one that loses both must end with one message, and
the resumed command with the same results. A server has nothing to resume: what it answered must stand in its records,
and the same command must serve again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Thread

import httpx
import pyarrow.parquet

from helios_sim import files
from helios_sim.entry import script

FOLDER = Path(__file__).parent
STUDY = ("+experiment=quickstart", "workload.n_requests=60", "seeds=[0,1,2,3]")
SWEEP = (
    "+experiment=quickstart", "workload.n_requests=40", "sweep.arm=helios", "sweep.workers=2",
    "+sweep.parameters={limit: {settings: [arms.helios.limit], values: [10, 20, 30, 40, 50, 60, 70, 80]}}",
)  # fmt: skip
COMMANDS = {
    "a study in one process": (*STUDY, "jobs=1"),
    "a study with two workers": (*STUDY, "jobs=2"),
    "a sweep with two workers": (*SWEEP, "sweep.backend=processes"),
}
CALIBRATION = (
    "model=tiny:llama-2-7b", "model.name=tiny", "quick=true", "threads=1", "dtype=float32", "+task=latency",
    "memory_bytes=200000000",
)  # fmt: skip
LIVE = ("mode=live", "seeds=[0,1,2]", "live.threads=1")
RAY = (*SWEEP, "sweep.backend=ray")
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
GONE_S, STARTS = 20.0, 3


def started(words: tuple[str, ...], folder: Path, module: str = "helios_sim") -> subprocess.Popen[str]:
    place = "out" if module == "calibrate" else "hydra.run.dir"
    command = [sys.executable, "-m", module, *words, f"{place}={folder}"]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip


def results(folder: Path) -> dict[str, object]:
    """What must be the same: tables by content, figures by their text."""
    found: dict[str, object] = {
        path.name: pyarrow.parquet.read_table(path).to_pydict() for path in sorted(folder.glob("*.parquet"))
    }
    summary = json.loads((folder / "summary.json").read_text())
    found["figures"] = {name: summary[name] for name in ("arms", "designs", "front", "verdict") if name in summary}
    return found


def of_calibration(folder: Path) -> dict[str, object]:
    """What does not differ between calibrations: finished stages, the ends of a table, and lines to simulate with."""
    from helios_sim.profile.store import read_profile

    summary = json.loads((folder / "summary.json").read_text())
    (profile,) = (folder / "profile").iterdir()
    rows = read_profile(profile).layer_tables[0].dense.rows.tolist()
    stages = {name: stage["status"] in ("done", "kept") for name, stage in summary["stages"].items()}
    return {"stages": stages, "rows": (rows[0], rows[-1]), "use": len(summary["use"])}


def of_live(folder: Path) -> dict[str, object]:
    """What does not differ between live runs of the same: who asked for how much, and was answered."""
    table = pyarrow.parquet.read_table(folder / "requests.parquet")
    known = ("arm", "seed", "request_id", "prompt_tokens", "output_tokens")
    same = [name for name in known if name in table.column_names]
    return {"requests": sorted(zip(*(table[name].to_pylist() for name in same), strict=True))}


def left_over(session: int) -> list[int]:
    """Processes of that session that are still alive."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def of_ray(mark: int) -> list[int]:
    """Processes of the cluster that this process has started, wherever they are."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"HELIOS_STARTED_BY={mark}.".encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


def outlived(session: int) -> str:
    """What is still there of a process that is gone, after as long as it may take, and is ended here; "": nothing."""
    until_s = time.monotonic() + GONE_S
    while (alive := [*left_over(session), *of_ray(session)]) and time.monotonic() < until_s:
        time.sleep(0.1)
    for pid in alive:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return f"{len(alive)} processes outlive it" if alive else ""


def killed(
    words: tuple[str, ...],
    wanted: dict[str, object],
    number: signal.Signals,
    after_s: float,
    module: str = "helios_sim",
    read: Callable[[Path], dict[str, object]] = results,
) -> str:
    """What was wrong, or ""."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "run"
        process = started(words, folder, module)
        time.sleep(after_s)
        process.send_signal(number)
        try:
            _, said = process.communicate(timeout=GONE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"still there {GONE_S:g} s after"
        if fault := outlived(process.pid):
            return fault
        if "Traceback" in said:
            return f"says {said[said.index('Traceback') :][:1500]}"
        again = started(words, folder, module)
        _, said = again.communicate(timeout=300)
        if again.returncode or "Traceback" in said:
            return f"resumed: status {again.returncode}, {said[-600:]}"
        if read(folder) != wanted:
            return "resumed: other results"
    return ""


def worker_lost(words: tuple[str, ...], wanted: dict[str, object], after_s: float, rng: random.Random) -> str:
    """What was wrong where a worker of the cluster was killed as it worked, or "".

    Where a cluster does not start in Ray's own time, as on a machine that is very busy, it is tried again.
    """
    for _ in range(STARTS):
        if (fault := _worker_lost(words, wanted, after_s, rng)) is not None:
            return fault
    return f"no cluster started in {STARTS} trials"


def _worker_lost(words: tuple[str, ...], wanted: dict[str, object], after_s: float, rng: random.Random) -> str | None:
    """As `worker_lost`; None: there was no cluster."""
    with TemporaryDirectory() as place:
        process = started(words, Path(place) / "run")
        until_s = time.monotonic() + 120
        while not (workers := _at_work(process.pid)) and process.poll() is None and time.monotonic() < until_s:
            time.sleep(0.05)
        time.sleep(after_s)
        if workers := _at_work(process.pid) or workers:
            with suppress(ProcessLookupError):
                os.kill(rng.choice(workers), signal.SIGKILL)
        try:
            _, said = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            for pid in [*of_ray(process.pid), process.pid]:
                os.kill(pid, signal.SIGKILL)
            return "it hangs"
        if process.returncode == 1 and "no Ray cluster can be reached" in said:
            return None
        if process.returncode or "Traceback" in said:
            return f"status {process.returncode}, says {said[-1500:]}"
        return "" if results(Path(place) / "run") == wanted else "other results"


def machines_lost(words: tuple[str, ...], wanted: dict[str, object], after_s: float, count: int) -> str:
    """What was wrong where so many of a cluster's two machines were killed after that time, or "".

    The cluster's head does no work, and stays. The time counts from when workers are there.
    """
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=False)
    with TemporaryDirectory() as place:
        try:
            cluster.add_node(num_cpus=0, include_dashboard=False, object_store_memory=100 << 20)
            machines = [
                cluster.add_node(num_cpus=2, object_store_memory=100 << 20, node_ip_address=address)
                for address in ("127.0.0.2", "127.0.0.3")
            ]
            cluster.wait_for_nodes()
            process = started((*words, f"sweep.address={cluster.address}"), Path(place) / "run")
            time.sleep(after_s)
            for machine in machines[:count]:
                cluster.remove_node(machine, allow_graceful=False)
            try:
                _, said = process.communicate(timeout=300)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                return "it hangs"
            if alive := left_over(process.pid):
                return f"{len(alive)} processes outlive it"
            told = "no machine of the cluster is left" in said or "the cluster does not answer" in said
            ended = process.returncode == 1 and told if process.returncode else True
            if "Traceback" in said or not ended or (process.returncode and count < len(machines)):
                return f"status {process.returncode}, says {said[-1500:]}"
        finally:
            cluster.shutdown()
        again = started((*SWEEP, "sweep.backend=processes"), Path(place) / "run")
        _, said = again.communicate(timeout=300)
        if again.returncode or "Traceback" in said:
            return f"resumed: status {again.returncode}, {said[-600:]}"
        return "" if results(Path(place) / "run") == wanted else "other results"


def _at_work(mark: int) -> list[int]:
    """Workers of the cluster that have tasks; its other processes are agents, with which a node ends."""
    found = []
    for pid in of_ray(mark):
        with suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_bytes().startswith(b"ray::PoolActor"):
                found.append(pid)
    return found


@dataclass(frozen=True)
class Further:
    """A command of another kind."""

    name: str
    words: tuple[str, ...]
    module: str = "helios_sim"
    read: Callable[[Path], dict[str, object]] = results
    loses_workers: bool = False
    loses_machines: bool = False

    def tried(self, kills: int, seed: int) -> tuple[dict[str, object], list[str]]:
        """A row of counts, and what went wrong."""
        rng, counts, wrong = random.Random(f"{seed} {self.name}"), Counter[str](), []
        with TemporaryDirectory() as at:
            began_s = time.monotonic()
            process = started(self.words, Path(at) / "run", self.module)
            _, said = process.communicate(timeout=300)
            assert not process.returncode, said
            whole_s, wanted = time.monotonic() - began_s, self.read(Path(at) / "run")
        for kill in range(kills):
            loses = self.loses_workers or self.loses_machines
            number = signal.SIGKILL if loses else SIGNALS[kill % len(SIGNALS)]
            after_s = rng.uniform(0.0, 1.0 if self.loses_workers else whole_s)
            if self.loses_machines:
                fault = machines_lost(self.words, wanted, after_s, 1 + kill % 2)
            elif self.loses_workers:
                fault = worker_lost(self.words, wanted, after_s, rng)
            else:
                fault = killed(self.words, wanted, number, after_s, self.module, self.read)
            counts[number.name] += 1
            counts[f"bad {number.name}"] += bool(fault)
            if fault:
                wrong.append(f"{self.name}, {number.name} after {after_s:.2f} s: {fault}")
                print(wrong[-1], flush=True)
        return {"what": self.name, **counts}, wrong


@dataclass
class Load:
    """Streams of completions that clients ask a server for, one after the other, until it answers no more."""

    address: str
    answers: list[tuple[float, int]] = field(default_factory=list)  # of whole ones: when the last chunk came, tokens
    wrong: list[str] = field(default_factory=list)

    def ask(self, rng: random.Random) -> bool:
        """Whether the answer came whole. One that was cut short, or refused, is none."""
        tokens = rng.randint(5, 60)
        body = {"prompt": "x", "max_tokens": tokens, "ignore_eos": True, "stream": True}
        try:
            with httpx.stream("POST", f"{self.address}/v1/completions", json=body, timeout=60) as answer:
                lines = [line for line in answer.iter_lines() if line]
        except httpx.TransportError:
            return False
        if answer.status_code != 200 or lines[-1:] != ["data: [DONE]"] or any('"error"' in line for line in lines):
            return False
        if len(lines) != tokens + 1:
            self.wrong.append(f"{len(lines) - 1} chunks where {tokens} tokens were asked for")
        self.answers.append((time.monotonic(), tokens))
        return True

    def go_on(self, rng: random.Random) -> None:
        while self.ask(rng):
            pass


@dataclass(frozen=True)
class Serving:
    """A server that is killed while clients ask it: it has nothing to resume, but what it answered is recorded."""

    name: str = "a server under load"

    def tried(self, kills: int, seed: int) -> tuple[dict[str, object], list[str]]:
        """A row of counts, and what went wrong."""
        rng, counts, wrong = random.Random(f"{seed} {self.name}"), Counter[str](), []
        for kill in range(kills):
            number, after_s = SIGNALS[kill % len(SIGNALS)], rng.uniform(0.0, 3.0)
            with TemporaryDirectory() as place:
                fault = server_killed(Path(place), number, after_s if kill >= len(SIGNALS) else None, rng)
            counts[number.name] += 1
            counts[f"bad {number.name}"] += bool(fault)
            if fault:
                wrong.append(f"{self.name}, {number.name} after {after_s:.2f} s: {fault}")
                print(wrong[-1], flush=True)
        return {"what": self.name, **counts}, wrong


def server(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    """Its process, and the file of what it says."""
    said = folder / f"said-{len(list(folder.iterdir()))}.txt"
    command = [sys.executable, "-m", "helios_sim.serve", "+experiment=own", "policy.model=opt-1.3b", "serve.port=0",
               f"serve.records={folder / 'records.jsonl'}"]  # fmt: skip
    with said.open("w") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, text=True, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )  # fmt: skip
    return process, said


def address_of(process: subprocess.Popen[str], said: Path) -> str | None:
    """None where it does not begin to serve."""
    until_s = time.monotonic() + 60
    while time.monotonic() < until_s and process.poll() is None:
        if found := re.search(r"^(http://\S+): ", said.read_text(), re.MULTILINE):
            with suppress(httpx.TransportError):
                if httpx.get(f"{found[1]}/health").status_code == 200:
                    return found[1]
        time.sleep(0.05)
    return None


def server_killed(folder: Path, number: signal.Signals, after_s: float | None, rng: random.Random) -> str:
    """What was wrong, or "". `after_s`: of load; None: the signal comes at a random moment of the start.

    What a client had whole must stand in the records, but for a killed server's last half second; each line that was
    written must be whole, but the last; and the same command must serve again.
    """
    process, said = server(folder)
    load, threads = Load(""), []
    if after_s is None:
        time.sleep(rng.uniform(0.0, 3.0))
    else:
        address = address_of(process, said)
        if address is None:
            return f"does not serve: {said.read_text()[-600:]}"
        load.address = address
        threads = [Thread(target=load.go_on, args=(random.Random(rng.random()),)) for _ in range(4)]
        for thread in threads:
            thread.start()
        time.sleep(after_s)
    killed_s = time.monotonic()
    process.send_signal(number)
    try:
        process.wait(GONE_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return f"still there {GONE_S:g} s after"
    for thread in threads:
        thread.join(60)
    if fault := outlived(process.pid):
        return fault
    if "Traceback" in (text := said.read_text()):
        return f"says {text[text.index('Traceback') :][:1500]}"
    if load.wrong:
        return load.wrong[0]
    due = [tokens for at_s, tokens in load.answers if number is not signal.SIGKILL or at_s < killed_s - 0.5]
    fault = unrecorded(folder / "records.jsonl", due, number is signal.SIGKILL)
    if fault:
        return fault
    process, said = server(folder)
    address = address_of(process, said)
    again = Load(address or "").ask(rng) if address else False
    process.send_signal(signal.SIGTERM)
    if process.wait(GONE_S) or not again or "Traceback" in said.read_text():
        return f"started again: {'answers' if again else 'no answer'}, says {said.read_text()[-600:]}"
    return outlived(process.pid)


def unrecorded(records: Path, due: list[int], cut: bool) -> str:
    """What of the answers, by their tokens, is not in the records; "": none. `cut`: the last line may be."""
    lines = records.read_text().splitlines() if records.is_file() else []
    found: Counter[int] = Counter()
    for place, line in enumerate(lines, 1):
        try:
            found[int(json.loads(line)["output_tokens"])] += 1
        except ValueError:
            if not cut or place < len(lines):
                return f"line {place} of its records is no JSON: {line[:80]}"
    missing = Counter(due) - found
    return f"{missing.total()} of {len(due)} answers are not in its records" if missing else ""


def further(place: Path) -> list[Further | Serving]:
    """`place`: a folder for a live study on a tiny model."""
    sys.path.insert(0, str(FOLDER.parents[1] / "tests"))
    from live_study import write_live_study

    return [
        Further("a calibration", CALIBRATION, "calibrate", of_calibration),
        Further("a live study", (*write_live_study(place), *LIVE), read=of_live),
        Serving(),
        Further("a sweep on Ray", RAY),
        Further("a sweep on Ray, a worker lost", RAY, loses_workers=True),
        Further("a sweep on Ray, one or both machines lost", RAY, loses_machines=True),
    ]


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--further", type=int, default=5, help="of each further kind of command")
    parser.add_argument("--only", help="one further kind of command, by its name")
    options = parser.parse_args(words)
    rng, rows, wrong = random.Random(options.seed), [], []
    if options.only is not None:
        before = json.loads((FOLDER / "kills.json").read_text())
        rows = [row for row in before["rows"] if row["what"] != options.only]
        wrong = [text for text in before["bad"] if not text.startswith(f"{options.only}, SIG")]
    elif not options.kills and (FOLDER / "kills.json").is_file():
        before = json.loads((FOLDER / "kills.json").read_text())
        rows = [row for row in before["rows"] if row["what"] in COMMANDS]
        wrong = [text for text in before["bad"] if text.partition(",")[0] in COMMANDS]
    for place, (name, words) in enumerate(COMMANDS.items() if options.kills and options.only is None else ()):
        with TemporaryDirectory() as at:
            began_s = time.monotonic()
            process = started(words, Path(at) / "run")
            _, said = process.communicate(timeout=300)
            assert not process.returncode, said
            whole_s, wanted = time.monotonic() - began_s, results(Path(at) / "run")
        counts: Counter[str] = Counter()
        for kill in range(options.kills * (place + 1) // len(COMMANDS) - options.kills * place // len(COMMANDS)):
            number, after_s = SIGNALS[kill % len(SIGNALS)], rng.uniform(0.05, whole_s)
            fault = killed(words, wanted, number, after_s)
            counts[number.name] += 1
            counts[f"bad {number.name}"] += bool(fault)
            if fault:
                wrong.append(f"{name}, {number.name} after {after_s:.2f} s: {fault}")
                print(wrong[-1], flush=True)
        rows.append({"what": name, **counts})
        print(rows[-1], flush=True)
        record(options.seed, rows, wrong)
    with TemporaryDirectory() as folder:
        for command in further(Path(folder)) if options.further else ():
            if options.only not in (None, command.name):
                continue
            row, bad = command.tried(options.further, options.seed)
            rows.append(row)
            wrong += bad
            print(row, flush=True)
            record(options.seed, rows, wrong)
    return 1 if wrong else 0


def record(seed: int, rows: list[dict[str, object]], wrong: list[str]) -> None:
    """Write kills.json and kills.md."""
    found = {"seed": seed, "rows": rows, "bad": wrong}
    files.write_text(FOLDER / "kills.json", json.dumps(found, indent=1) + "\n")
    lines = [
        "# Kills and resumption", "", f"Written by `python experiments/faults/kills.py`, seed {seed}.", "",
        "| what | " + " | ".join(f"{number.name}, bad" for number in SIGNALS) + " |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        cells = (f"{row.get(n.name, 0)}, {row.get(f'bad {n.name}', 0)}" for n in SIGNALS)
        lines.append(f"| {row['what']} | " + " | ".join(cells) + " |")
    files.write_text(FOLDER / "kills.md", "\n".join([*lines, ""]))


if __name__ == "__main__":
    script(__file__, main)
