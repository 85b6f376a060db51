"""Fits the host times of engines to one half of published measurements; the other half judges them.

`python experiments/fidelity_silicon/fit.py [FILE]` reads rows with the columns of helios_sim/data/silicon/handed.csv,
takes the half whose ids hash to an even number, and prints what belongs into helios_sim/profile/runtimes.py (host
seconds of an iteration, by engine version, from time per output token) and into helios_sim/validate/silicon.py (seconds
between a client and the engine's loop, from time to first token of the rows whose harness is known).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from helios_sim.api import study_config
from helios_sim.entry import script
from helios_sim.study.schema import Config
from helios_sim.validate.silicon import INFERENCEMAX, SHIPPED, Row, job_of, predict, preset_for, read_rows
from helios_sim.vary.settings import with_settings

HOST = {  # by preset: the two costs that are fitted, and where the search begins, ms and us
    "vllm-0.10": ("gap_s", "gap_s_per_request", (0.3, 20.0)),
    "vllm-0.12": ("host_overhead_s", "host_s_per_request", (1.8, 47.0)),
    "trtllm-1.0": ("host_overhead_s", "host_s_per_request", (0.5, 11.0)),
    "trtllm-1.1": ("host_overhead_s", "host_s_per_request", (0.3, 1.0)),
    "sglang-0.5": ("host_overhead_s", "host_s_per_request", (0.5, 10.0)),
}  # fmt: skip
SCALE = np.array([1e-3, 1e-6])


def times_ms(rows: Sequence[Row], base: Config, costs: dict[str, float]) -> NDArray[np.float64]:
    """(rows, 2) simulated time per output token and time to first token."""
    runtime = {f"runtime.{name}": value for name, value in costs.items()}
    found = []
    for row in rows:
        job = job_of(row, base)
        one = predict(type(job)(job.arm, with_settings(job.config, runtime), job.seed))
        found.append((one.tpot_ms, one.ttft_ms))
    return np.array(found)


def main(path: Path) -> None:
    base = study_config("fidelity_silicon")
    rows = [row for row in read_rows(path) if row.is_fitted]
    for preset, (first, second, start) in HOST.items():
        own = [row for row in rows if preset_for(row) == preset]
        if not own:
            continue
        measured = np.array([row.tpot_ms for row in own])

        def costs(point: NDArray[np.float64], names: tuple[str, str] = (first, second)) -> dict[str, float]:
            return dict(zip(names, (np.abs(point) * SCALE).tolist(), strict=True))

        def miss(
            point: NDArray[np.float64], own: list[Row] = own, measured: NDArray[np.float64] = measured
        ) -> NDArray[np.float64]:
            return times_ms(own, base, costs(point))[:, 0] / measured - 1

        found = least_squares(miss, start, diff_step=0.15, max_nfev=8, loss="soft_l1", f_scale=0.05, x_scale=(1, 20))
        print(f"{preset}: {len(own)} rows, {first} {abs(found.x[0]):.2f} ms, {second} {abs(found.x[1]):.1f} us")
        print(f"  mean error of the half that was fitted {np.abs(found.fun).mean():.1%}, bias {found.fun.mean():+.1%}")
        known = [k for k, row in enumerate(own) if row.source.startswith(INFERENCEMAX)]
        if known:
            fit_front(preset, [own[k] for k in known], times_ms(own, base, costs(found.x))[known, 1])


def fit_front(preset: str, rows: Sequence[Row], ttft_ms: NDArray[np.float64]) -> None:
    clients = np.array([row.concurrency for row in rows])
    measured = np.array([row.ttft_ms for row in rows])

    def miss(point: NDArray[np.float64]) -> NDArray[np.float64]:
        first, each = np.abs(point)
        return np.asarray((ttft_ms + first + each * clients) / measured - 1)

    found = least_squares(miss, (10.0, 0.3), loss="soft_l1", f_scale=0.05)
    first, each = np.abs(found.x)
    print(f"  from a client to the loop and back: {first:.1f} ms, {each:.2f} ms for each client")
    print(f"  mean error of TTFT {np.abs(found.fun).mean():.1%}, bias {found.fun.mean():+.1%}")


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", nargs="?", type=Path, default=SHIPPED)
    main(parser.parse_args(words).file)


if __name__ == "__main__":
    script(__file__, command)
