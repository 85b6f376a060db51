"""Kills studies and sweeps at random moments, resumes them, and compares what they hold with an undisturbed run.

`python experiments/faults/kills.py [--kills 200] [--seed 1]` writes kills.json and kills.md beside itself. A kill is
good if the process is gone within 20 s with all that it started, says no traceback, and the resumed command ends with
the same bits in its requests and decisions and the same figures.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow.parquet

from helios_sim import files

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
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGKILL)
GONE_S = 20.0


def started(words: tuple[str, ...], folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "helios_sim", *words, f"hydra.run.dir={folder}"]
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


def killed(words: tuple[str, ...], wanted: dict[str, object], number: signal.Signals, after_s: float) -> str:
    """What was wrong, or ""."""
    with TemporaryDirectory() as place:
        folder = Path(place) / "run"
        process = started(words, folder)
        time.sleep(after_s)
        process.send_signal(number)
        try:
            _, said = process.communicate(timeout=GONE_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return f"still there {GONE_S:g} s after"
        until_s = time.monotonic() + GONE_S
        while (alive := left_over(process.pid)) and time.monotonic() < until_s:
            time.sleep(0.1)
        if alive:
            os.killpg(process.pid, signal.SIGKILL)
            return f"{len(alive)} processes outlive it"
        if "Traceback" in said:
            return f"says {said[said.index('Traceback') :][:1500]}"
        again = started(words, folder)
        _, said = again.communicate(timeout=300)
        if again.returncode or "Traceback" in said:
            return f"resumed: status {again.returncode}, {said[-600:]}"
        if results(folder) != wanted:
            return "resumed: other results"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    rng, rows, wrong = random.Random(options.seed), [], []
    for place, (name, words) in enumerate(COMMANDS.items()):
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
        found = {"seed": options.seed, "rows": rows, "bad": wrong}
        files.write_text(FOLDER / "kills.json", json.dumps(found, indent=1) + "\n")
    lines = [
        "# Kills and resumption", "", f"Written by `python experiments/faults/kills.py`, seed {options.seed}.", "",
        "| what | " + " | ".join(f"{number.name}, bad" for number in SIGNALS) + " |", "|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        cells = (f"{row.get(n.name, 0)}, {row.get(f'bad {n.name}', 0)}" for n in SIGNALS)
        lines.append(f"| {row['what']} | " + " | ".join(cells) + " |")
    files.write_text(FOLDER / "kills.md", "\n".join([*lines, ""]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
