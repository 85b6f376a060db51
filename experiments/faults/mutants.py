"""Gives every loader changed files and counts what it makes of them: read, refused with one message, or something bad.

`python experiments/faults/mutants.py [--count 1000] [--seed 1] [loader ...]` writes mutants.json and mutants.md beside
itself, each loader as it is done; where loaders are named, the rows of the others stay. The mutators and the judge are
those of the tests (`tests/faults`). Loaders of weights need torch.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

from helios_sim import files
from helios_sim.entry import script

FOLDER = Path(__file__).parent
sys.path.insert(0, str(FOLDER.parents[1] / "tests"))
LOADERS = {
    "workload_traces": "workload traces: CSV, JSON and JSONL of the known formats",
    "exit_traces": "exit traces",
    "profiles": "profiles",
    "measured_tables": "tables of measured kernels",
    "serving_logs": "serving logs: settings, requests, series",
    "tool_logs": "logs of benchmark tools, spans and scrapes",
    "exit_tables": "tables of exits of one's own: CSV and Parquet",
    "gguf_files": "GGUF checkpoints",
    "hub_folders": "checkpoint folders: config, safetensors, index, tokenizer",
    "head_folders": "exit heads",
    "own_models": "shapes of models (config.json) and cards (YAML), priced",
    "settings_files": "settings of a study: YAML, composed and checked",
    "campaign_archives": "archives of calibration campaigns",
}


def tried(loader: str, count: int, seed: int) -> dict[str, object]:
    """What became of so many mutants, and the bad ones word for word."""
    from faults import bad, campaign

    module = import_module(f"faults.{loader}")
    started_s = perf_counter()
    with TemporaryDirectory() as cache:
        os.environ["HELIOS_CACHE"] = cache
        verdicts = campaign(module.mutants(seed), module.read, count)
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    return {
        "loader": loader, "tried": len(verdicts), "read": outcomes["read"], "refused": outcomes["refused"],
        "bad": len(bad(verdicts)), "wall_s": round(perf_counter() - started_s), "bad_ones": bad(verdicts),
    }  # fmt: skip


def recorded(seed: int) -> dict[str, dict[str, object]]:
    """The rows that are there, by loader; none if they are of another seed."""
    there = json.loads((FOLDER / "mutants.json").read_text())
    return {row["loader"]: row for row in there["rows"]} if there["seed"] == seed else {}


def table(rows: list[dict[str, object]], seed: int) -> str:
    lines = [
        "# Mutants of files that loaders read", "",
        f"Written by `python experiments/faults/mutants.py`, seed {seed}. Bad: a traceback, a hang above 10 s, more",
        "than 500 MiB, or a crash. A mutant may be read where the change leaves a valid file.", "",
        "| loader | tried | read | refused | bad |", "|---|---|---|---|---|",
    ]  # fmt: skip
    lines += [
        f"| {LOADERS[str(row['loader'])]} | {row['tried']:,} | {row['read']:,} | {row['refused']:,} | {row['bad']:,} |"
        for row in rows
    ]
    total = [sum(int(str(row[name])) for row in rows) for name in ("tried", "read", "refused", "bad")]
    lines.append("| **all** | " + " | ".join(f"{number:,}" for number in total) + " |")
    return "\n".join([*lines, ""])


def main(words: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("loaders", nargs="*", help=", ".join(LOADERS))
    options = parser.parse_args(words)
    found = recorded(options.seed) if options.loaders else {}
    now = options.loaders or list(LOADERS)
    for loader in now:
        found[loader] = tried(loader, options.count, options.seed)
        print({name: value for name, value in found[loader].items() if name != "bad_ones"}, flush=True)
        rows = [found[name] for name in LOADERS if name in found]
        files.write_text(FOLDER / "mutants.json", json.dumps({"seed": options.seed, "rows": rows}, indent=1) + "\n")
        files.write_text(FOLDER / "mutants.md", table(rows, options.seed))
    return 1 if any(found[loader]["bad"] for loader in now) else 0


if __name__ == "__main__":
    script(__file__, main)
