"""Fits the host time of an engine's iteration to end-to-end measurements of others, and judges it on those left out.

`python experiments/engine_host/fit.py [FILE]` reads rows with the columns of silicon/handed.csv in the shared data and
takes those of vLLM in bf16: for each a closed loop of `concurrency` clients with prompts of `isl` and answers of `osl`
tokens on `tp` cards. Two numbers are fitted, host seconds of an iteration and of each request in it, to the mean time
per output token of one half of the rows, drawn by a hash of their ids. It writes results.md beside itself.
"""

from __future__ import annotations

import csv
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from helios_sim import files
from helios_sim.api import study_config
from helios_sim.profile.catalog import published_model
from helios_sim.shared_data import shared_data_folder
from helios_sim.study.command import run

Row = dict[str, str]
FOLDER = Path(__file__).parent
CARDS = {"h100_sxm": "h100", "h200_sxm": "h200", "b200_sxm": "b200", "a100_sxm": "a100-80gb", "l40s": "l40s"}
TURNS = 3  # requests of each client
START = (1.5, 20.0)  # ms an iteration, us a request


def rows_of(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", newline="") as file:
        return [row for row in csv.DictReader(file) if row["backend"] == "vllm" and row["precision"] == "bf16"]


def is_fitted(row: Row) -> bool:
    return hashlib.sha256(row["id"].encode()).digest()[0] % 2 == 0


def tpot_ttft_ms(row: Row, host_ms: float, request_us: float) -> tuple[float, float]:
    """Means over the run, simulated from kernel tables."""
    model, clients = row["model"].rsplit("/", 1)[-1], int(row["concurrency"])
    chars_per_token = published_model(model).chars_per_token
    words = {
        "models": f"[{model}]", "hardware": CARDS[row["system"]], "server.tensor_parallel": row["tp"],
        "exits.source": "none", "policy": "full_depth", "workload.n_requests": max(TURNS * clients, 12),
        "workload.arrivals.kind": "closed_loop", "workload.arrivals.users": clients,
        "workload.chars_per_token": chars_per_token, "workload.lengths.prompt.kind": "fixed",
        "workload.lengths.prompt.value": row["isl"], "workload.lengths.output.kind": "fixed",
        "workload.lengths.output.value": row["osl"], "server.max_batch_tokens": 8192,
        "server.max_running_requests": clients, "runtime.host_overhead_s": host_ms * 1e-3,
        "runtime.host_s_per_request": request_us * 1e-6,
    }  # fmt: skip
    (arm,) = run(study_config("own", *(f"{key}={value}" for key, value in words.items()))).arms.values()
    return 1e3 * float(arm.metrics["tpot_s_mean"] or 0), 1e3 * float(arm.metrics["ttft_s_mean"] or 0)


def errors(rows: Sequence[Row], host: Sequence[float]) -> NDArray[np.float64]:
    """(rows, 2) relative errors of TPOT and TTFT."""
    found = [tpot_ttft_ms(row, *np.abs(host)) for row in rows]
    measured = [(float(row["tpot_ms"]), float(row["ttft_ms"])) for row in rows]
    return np.array(found) / np.array(measured) - 1


def line(name: str, rows: Sequence[Row], error: NDArray[np.float64]) -> str:
    tpot, ttft = error.T
    shown = (abs(tpot).mean(), np.quantile(abs(tpot), 0.9), tpot.mean(), abs(ttft).mean(), ttft.mean())
    cells = [f"{shown[0]:.1%}", f"{shown[1]:.1%}", f"{shown[2]:+.1%}", f"{shown[3]:.1%}", f"{shown[4]:+.1%}"]
    return f"| {name} | {len(rows)} | {' | '.join(cells)} |"


def main(path: Path) -> None:
    rows = rows_of(path)
    fitted, judged = [r for r in rows if is_fitted(r)], [r for r in rows if not is_fitted(r)]
    found = least_squares(lambda point: errors(fitted, point)[:, 0], START, diff_step=0.1, max_nfev=6)
    host = np.abs(found.x)
    groups = sorted({(r["model"], r["backend_version"], r["system"]) for r in rows})
    what = "; ".join(f"{model}, vLLM {version}, {system}" for model, version, system in groups)
    text = [
        "# Host time of an engine's iteration", "",
        f"Written by `python experiments/engine_host/fit.py`. Rows: {what}, bf16.",
        f"Fitted: {host[0]:.2f} ms an iteration and {host[1]:.0f} us for each request in it.", "",
        "| rows | number | TPOT: mean error | 90 % within | bias | TTFT: mean error | bias |",
        "|---|---|---|---|---|---|---|",
        line("all, by the default runtime (0.2 ms)", rows, errors(rows, (0.2, 0.0))),
        line("half that was fitted", fitted, errors(fitted, host)),
        line("half that was not", judged, errors(judged, host)), "",
        "| cards | clients | prompt | answer | TPOT measured, ms | simulated | |", "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in sorted(judged, key=lambda r: [int(r[key]) for key in ("tp", "concurrency", "isl", "osl")]):
        simulated = tpot_ttft_ms(row, *host)[0]
        error = simulated / float(row["tpot_ms"]) - 1
        cells = [row["tp"], row["concurrency"], row["isl"], row["osl"], f"{float(row['tpot_ms']):.2f}"]
        text.append(f"| {' | '.join(cells)} | {simulated:.2f} | {error:+.1%} |")
    files.write_text(FOLDER / "results.md", "\n".join([*text, ""]))
    print("\n".join(text[:10]))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else shared_data_folder() / "silicon" / "handed.csv")
