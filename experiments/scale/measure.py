"""Times whole runs of growing length, and of many replicas.

`python experiments/scale/measure.py [REQUESTSxREPLICAS ...]`, by default 1000x1 10000x1 100000x1 1000000x1, adds one
JSON line a run to `runs.jsonl` in this folder; `--draw` draws all its lines into `scale.png` and prints a table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter
from typing import Any

from helios_sim import files
from helios_sim.entry import script

FOLDER = Path(__file__).parent
RUNS = FOLDER / "runs.jsonl"
RATE_PER_REPLICA = 3.0  # requests/s, as in the experiment
SIZES = ("1000x1", "10000x1", "100000x1", "1000000x1")
Run = dict[str, Any]
WITHOUT_REPORT = "import helios_sim.report.write as w; w.write_pictures = lambda *_: None; "


def timed(requests: int, replicas: int) -> Run:
    """One whole process: start, simulation, metrics, Parquet, summary; without the page and its figures."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = [
            "+experiment=scale",
            f"workload.n_requests={requests}",
            *([f"server.replicas={replicas}", "server.router=least_loaded"] if replicas > 1 else []),
            f"workload.arrivals.rate_per_s={RATE_PER_REPLICA * replicas}",
            f"hydra.run.dir={folder}/out",
        ]
        started_s = perf_counter()
        code = WITHOUT_REPORT + "import sys; from helios_sim.__main__ import main; sys.exit(main(sys.argv[1:]))"
        with subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            said = process.stdout.read()
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        wall_s = perf_counter() - started_s
        if process.returncode:
            raise SystemExit(process.returncode)
        job = json.loads(Path(folder, "out", "finished.jsonl").read_text(encoding="utf-8").splitlines()[0])
        parquet_bytes = Path(folder, "out", "requests.parquet").stat().st_size
    metrics = json.loads(said.splitlines()[-1])["arms"]["full_depth"]["metrics"]
    return {
        "requests": requests,
        "replicas": replicas,
        "process_wall_s": round(wall_s, 2),
        "process_cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "run_wall_s": job["wall_s"],  # the job alone: parts, loop, metrics
        "peak_rss_mb": round(used.ru_maxrss * 1024 / 1e6),
        "requests_parquet_mb": round(parquet_bytes / 1e6, 1),
        "requests_completed": metrics["requests_completed"],
        "busy_fraction": metrics["busy_fraction"],
        "ttft_s_p99": metrics["ttft_s_p99"],
        "python": platform.python_version(),
    }


def further_ms(run: Run, runs: list[Run]) -> float | None:
    """CPU for each request beyond those of the shortest run of as many replicas: what is paid once falls out."""
    least = min((it for it in runs if it["replicas"] == run["replicas"]), key=lambda it: it["requests"])
    further = run["requests"] - least["requests"]
    return 1e3 * (run["process_cpu_s"] - least["process_cpu_s"]) / further if further else None


def draw(runs: list[Run]) -> None:
    """Cost of a request and peak memory against the number of requests, a line for each number of replicas."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (cost, memory) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for replicas in sorted({run["replicas"] for run in runs}):
        own = sorted((run for run in runs if run["replicas"] == replicas), key=lambda run: run["requests"])
        label = "1 replica" if replicas == 1 else f"{replicas} replicas"
        costs = [(run["requests"], ms) for run in own if (ms := further_ms(run, runs)) is not None]
        cost.plot(*zip(*costs, strict=True), "o-", label=label)
        memory.plot([run["requests"] for run in own], [run["peak_rss_mb"] for run in own], "o-", label=label)
    memory.axhline(500, color="grey", linewidth=1, linestyle="--")
    memory.annotate("meant: 500 MB", (1e3, 500), (0, 4), textcoords="offset points", fontsize=9, color="grey")
    for axes, title in ((cost, "CPU ms of a further request"), (memory, "peak memory (MB)")):
        axes.set_xscale("log")
        axes.set_xlabel("requests")
        axes.set_title(title)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
    with files.replacing(FOLDER / "scale.png") as out:
        figure.savefig(out, dpi=120)


def main(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", metavar="REQUESTSxREPLICAS")
    parser.add_argument("--draw", action="store_true", help="draw and print what was recorded, run nothing")
    options = parser.parse_args(words)
    for size in [] if options.draw else options.sizes or SIZES:
        requests, replicas = (int(part) for part in size.split("x"))
        run = timed(requests, replicas)
        with RUNS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(run) + "\n")
        print(json.dumps(run), flush=True)
    if options.draw:
        runs = [json.loads(line) for line in RUNS.read_text(encoding="utf-8").splitlines()]
        draw(runs)
        print("| requests | replicas | whole process, CPU | wall | a further request, CPU | peak memory | Parquet |")
        print("| ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
        for run in runs:
            ms = further_ms(run, runs)
            print(
                f"| {run['requests']:,} | {run['replicas']} | {run['process_cpu_s']:.1f} s "
                f"| {run['process_wall_s']:.1f} s | {'' if ms is None else f'{ms:.2f} ms'} "
                f"| {run['peak_rss_mb']} MB | {run['requests_parquet_mb']} MB |"
            )


if __name__ == "__main__":
    script(__file__, main)
