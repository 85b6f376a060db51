"""Draws what is found of prompts over time, and when it is thrown away.

`python experiments/prefix_caching/figure.py OUTPUT_FOLDER` reads the tables of a run of `+experiment=prefix_caching`
and writes found.png beside this file: of the prompt tokens of the latest requests those that were cached, for arms that
serve the same trace, with a mark at every switch and raise.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pyarrow.parquet as pq

from helios_sim.entry import script

ARMS = {  # colour, and what the line says
    "cap": ("#0fa08a", "16 of 32 layers: a token takes half the memory"),
    "full_depth": ("#7c8796", "full depth"),
    "helios": ("#2f74e6", "HELIOS: every evaluation round switches models"),
    "raises": ("#e5822e", "a cap that is raised in every round"),
}
WINDOW_S = 300.0


def main(output: Path) -> None:
    requests = pq.read_table(output / "requests.parquet").to_pandas()
    decisions = pq.read_table(output / "decisions.parquet").to_pandas()
    figure, axes = plt.subplots(figsize=(9.0, 4.6), layout="constrained")
    for row, (arm, (color, text)) in enumerate(ARMS.items()):
        of_arm = requests[(requests.arm == arm) & requests.cached_tokens.notna()].sort_values("scheduled_ns")
        at_s = of_arm.scheduled_ns.to_numpy() / 1e9
        found, asked = (np.cumsum(of_arm[name].to_numpy(np.float64)) for name in ("cached_tokens", "prompt_tokens"))
        first = np.searchsorted(at_s, at_s - WINDOW_S)
        before = (np.where(first > 0, total[first - 1], 0.0) for total in (found, asked))
        share = (found - next(before)) / np.maximum(asked - next(before), 1.0)
        axes.plot(at_s / 60, 100 * share, color=color, linewidth=1.8, label=text)
        log = decisions[decisions.arm == arm].sort_values("time_s")
        same = log.model == log.model.shift()
        lost = log[(~same & log.model.shift().notna()) | (same & (log.layers > log.layers.shift()))]
        axes.plot(lost.time_s / 60, np.full(len(lost), -0.9 - 0.9 * row), "|", color=color, markersize=5)
    axes.axhline(0.0, color="#d4d8df", linewidth=0.8)
    axes.set(xlim=(0, None), ylim=(-4.5, 30), ylabel=f"prompt tokens found, last {WINDOW_S / 60:.0f} min, %")
    axes.set_xlabel("minutes of the trace; marks: a switch or a raise, which throws the cache away")
    axes.set_title("What policies leave of a prefix cache (Mooncake conversations, four H100 as one)", loc="left",
                   fontsize=10.5, fontweight="bold")  # fmt: skip
    axes.legend(frameon=False, fontsize=9, loc="upper left", ncols=2)
    axes.set_yticks([0, 5, 10, 15, 20, 25])
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(Path(__file__).with_name("found.png"), dpi=150)


def command(words: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    main(parser.parse_args(words).output)


if __name__ == "__main__":
    script(__file__, command)
