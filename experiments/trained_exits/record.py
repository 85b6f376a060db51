"""What training a model for early exit did: `python experiments/trained_exits/record.py [OUT]`.

OUT is the folder of a `python -m calibrate +task=train_exits`, from which the change, heads, traces and figures are
taken over into the folder `smollm2-135m` beside this file; without it those that lie there are used. Writes results.md
and depth.png: tables of the stage, and what policies gain from both traces in simulation. Needs no torch.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.exits.before_after import AFTER, BEFORE, CHANGE, HEADS, TRACES, verdict
from calibrate.exits.reliability import point
from calibrate.report.page import Table
from calibrate.report.trained import by_agreement, by_exit
from helios_sim import files
from helios_sim.api import simulate
from helios_sim.entry import script
from helios_sim.exits.rule import Confidence
from helios_sim.exits.store import read_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.report import format as fmt
from helios_sim.report.compare import compare
from helios_sim.report.figures.style import (
    BASELINE_COLOR,
    MODEL_COLORS,
    Drawing,
    handles_of,
    legend_above,
    look,
    new_figure,
    to_png,
)
from helios_sim.report.result import ExperimentResult

FOLDER = Path(__file__).parent
MODEL, CARD = "smollm2-135m", "epyc-2core"
KEPT = FOLDER / MODEL
PLACES = {BEFORE: KEPT / "trace-before", AFTER: KEPT / "trace"}
SHIPPED = "reference"  # the trace of the heads that the package ships
USERS = (1, 8)
SPEED = "throughput_requests_per_s"
FIGURES = ("layers_per_token", "agreement", "bits_per_char")
POLICIES = ("early_exit", "static_cap", "helios", "helios_next")
NAMES = {BEFORE: "attached on the same tokens", AFTER: "trained", SHIPPED: "attached, as shipped"}
SHIPPED_THRESHOLD = 0.65  # at which the shipped heads keep 0.95 (experiments/exit_heads)


def main(outputs: list[str]) -> None:
    for output in outputs:
        take_over(Path(output) / "stages" / "train_exits")
    stage = json.loads((KEPT / "stage.json").read_text(encoding="utf-8"))
    found = stage["compared"]
    training = json.loads((KEPT / "delta.json").read_text(encoding="utf-8"))["training"]
    traces = {side: read_trace(place) for side, place in PLACES.items()}
    lines = [
        "# trained_exits: results", "",
        f"Made by `{training['command']}`: {training['tokens']:,} tokens in "
        f"{training['steps']:,} steps; {found['tokens']:,} tokens of {found['passages']} held-out passages. Brackets "
        "are 95 % intervals over groups of passages, in simulations over three seeds.", "",
        *(f"- {sentence}" for sentence in verdict(found)), "",
    ]  # fmt: skip
    for table in (by_exit(found), by_agreement(found)):
        lines += [*markdown(table), ""]
    lines += markdown(simulated(found))
    files.write_text(FOLDER / "results.md", "\n".join(lines).rstrip() + "\n")
    files.write_bytes(FOLDER / "depth.png", to_png(figure(traces)))


def take_over(stage: Path) -> None:
    """Copy what the stage left: change and heads in one folder, which can be named as weights and as heads."""
    shutil.rmtree(KEPT, ignore_errors=True)
    shutil.copytree(stage / CHANGE, KEPT)
    shutil.copytree(stage / HEADS[AFTER], KEPT, dirs_exist_ok=True)
    for side, place in PLACES.items():
        shutil.copytree(stage / TRACES[side], place)
    result = json.loads((stage / "stage.json").read_text(encoding="utf-8"))["result"]
    files.write_text(KEPT / "stage.json", json.dumps(result, indent=1) + "\n")


def markdown(table: Table) -> list[str]:
    rows = [table.columns, ["---"] * len(table.columns), *table.rows]
    return [f"## {table.title}", "", *(f"| {' | '.join(row)} |" for row in rows), "", table.note]


def simulated(found: Mapping[str, Any]) -> Table:
    """Policies on the profile of the model's CPU, with the exits of each trace at its own threshold."""
    rows = []
    for users in USERS:
        for source, name in ((SHIPPED, SHIPPED), (PLACES[BEFORE], BEFORE), (PLACES[AFTER], AFTER)):
            if name == SHIPPED:
                threshold = SHIPPED_THRESHOLD
            else:
                threshold = found[name]["at"][Confidence.CLASSIFIER.value]["0.95"]["threshold"]
            arms = [f"+arms.{policy}={{policy: {policy}}}" for policy in POLICIES]
            result = simulate(
                "own", f"models=[{MODEL}]", f"hardware={CARD}", "workload=all_texts", "runtime=profile",
                f"exits.source={source}", f"exits.threshold={threshold:.4f}", "exits.confidence=classifier",
                "workload.n_requests=120", f"workload.arrivals.users={users}", "policy=full_depth", *arms,
                "baseline=full_depth", "subject=early_exit", "objective.max_disagreement=0.05",
                "server.max_running_requests=8", "server.max_batch_tokens=512", "seeds=[0,1,2]", "jobs=1",
                "profile_band=none", "next_best=none",
            )  # fmt: skip
            rows += [[str(users), NAMES[name], *row] for row in rows_of(result)]
    columns = ["users", "exits", "policy", "over full depth", "layers a token", "agreement", "bits/char"]
    note = (
        "Requests a second over full depth of the same model; thresholds of the classifier at which 95 % of the tokens "
        "stay on one half of the passages. Profile: smollm2-135m@epyc-2core."
    )
    return Table(columns, rows, title=f"In simulation, on {CARD}", note=note)


def rows_of(result: ExperimentResult) -> list[list[str]]:
    """A row for each policy beside full depth."""
    runs = {name: [(it.records, it.metrics) for it in arm.replicates] for name, arm in result.arms.items()}
    rows = []
    for name in POLICIES:
        arm = result.arms[name]
        speed = compare(runs[name], runs[result.baseline], names={SPEED})[SPEED]
        shown = [fmt.metric_with_interval(what, arm.metrics[what], arm.intervals.get(what)) for what in FIGURES]
        rows.append([name, fmt.ratio(speed), *shown])
    return rows


def curve(trace: ExitTrace) -> list[tuple[float, float, float]]:
    """Layers a token, agreement and bits per character at thresholds of the check."""
    assert trace.bits is not None
    sure = trace.recorded(Confidence.CLASSIFIER).copy()
    sure[:, -1] = 1.0
    rows, chars = np.arange(trace.n_tokens), trace.chars.sum()
    found = []
    for threshold in (*np.quantile(sure[:, :-1], np.linspace(0, 1, 81)), 2.0):
        at = point(sure, trace.agree, trace.exits, float(threshold), 0.0)
        leaves = sure[:, :-1] >= threshold
        index = np.where(leaves.any(1), leaves.argmax(1), len(trace.exits) - 1)
        found.append((at.layers_per_token, at.agreement, float(trace.bits[rows, index].sum() / chars)))
    return found


def figure(traces: dict[str, ExitTrace]) -> Drawing:
    with look():
        drawn, axes = new_figure(1, 2, 3.2)
        for (side, trace), color in zip(traces.items(), (BASELINE_COLOR, MODEL_COLORS[0]), strict=True):
            layers, agreement, bits = zip(*curve(trace), strict=True)
            axes[0].plot(layers, [100 * a for a in agreement], color=color, label=NAMES[side])
            axes[1].plot(layers, bits, color=color, label=NAMES[side])
            depths = list(trace.exits)
            every = f"{NAMES[side]}: every token at one exit"
            axes[0].plot(depths, 100 * trace.agree.mean(0), "o", color=color, label=every)
            axes[1].plot(depths, trace.bits.sum(0) / trace.chars.sum(), "o", color=color)
        axes[0].set_ylabel("agree with full depth (%)")
        axes[1].set_ylabel("bits per character")
        for ax in axes:
            ax.set_xlabel(f"layers run per token, of {next(iter(traces.values())).n_layers}")
        legend_above(drawn, handles_of(axes[0]))
    return Drawing("depth", "Agreement and bits by mean depth", "", drawn)


if __name__ == "__main__":
    script(__file__, main)
