"""Tables and figures of exit heads from the shipped traces: `python experiments/exit_heads/measure.py`.

Writes results.md and the figures beside this file. Reads shipped traces, the headers of shipped heads and trial.json
(the simple heads to beat); no model is run.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.reliability import CurvePoint, at_agreement, expected_calibration_error, point
from calibrate.texts import domain_of
from helios_sim.exits.joint import joint_exits
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.exits.store import SHIPPED, load_trace
from helios_sim.exits.trace import ExitTrace

FOLDER = Path(__file__).parent
HEADS = SHIPPED.parent / "exit_heads"
MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b")
DOMAINS = ("prose", "code", "dialogue")
WHOLE_HEAD_LAYERS = {"smollm2-135m": 8.0, "gemma3-270m": 30.0, "qwen2.5-coder-0.5b": 9.0}  # one check, in layers
LEVELS = (0.90, 0.95, 0.98, 0.99)


def main() -> None:
    traces = {name: load_trace(name, "reference") for name in MODELS if (SHIPPED / f"{name}@reference").is_dir()}
    lines = [
        "# Exit heads: results",
        "",
        "Made by `python experiments/exit_heads/measure.py` from the shipped traces.",
        "",
    ]
    for name, trace in traces.items():
        lines += _model(name, trace)
    lines += _joint(traces)
    (FOLDER / "results.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    _figures(traces)


def _model(name: str, trace: ExitTrace) -> list[str]:
    header = json.loads((HEADS / name / "heads.json").read_text())
    check, leave = header["curves"]["check_layers"], header["curves"]["leave_layers"]
    domain = domains(trace)
    lines = [f"## {name}", ""]
    lines += [
        f"{trace.n_tokens:,} held-out tokens, exits after layers {', '.join(map(str, trace.exits[:-1]))} of "
        f"{trace.n_layers}. A check of the hidden state is charged {check:.3f} layers, leaving (the adapter) "
        f"{leave:.2f}, a check through the whole head {WHOLE_HEAD_LAYERS[name]:g}.", "",
    ]  # fmt: skip
    lines += ["### Layers saved per token, by share of all tokens that equal full depth's", ""]
    rows = [["domain", "tokens", "agreement", "threshold", "left early", "gross", "net of hidden-state checks",
             "net, whole-head checks", "break-even check (layers)"]]  # fmt: skip
    trial = json.loads((FOLDER / "trial.json").read_text()) if name == MODELS[0] else None
    for d in DOMAINS:
        mine = domain == d
        for level in LEVELS:
            ours = at_agreement(trace.classifier[mine], trace.agree[mine], trace.exits, level, check, leave)
            whole = at_agreement(
                trace.confidence[mine], trace.agree[mine], trace.exits, level, WHOLE_HEAD_LAYERS[name], leave
            )
            rows.append([d, f"{mine.sum():,}", f"{level:.2f}", f"{ours.threshold:.3f}", f"{1 - ours.left[-1]:.3f}",
                         f"{ours.saved_gross:.2f}", f"{ours.saved_net:.2f}",
                         f"{whole.saved_net:.1f} (gross {whole.saved_gross:.2f})",
                         f"{break_even(ours, leave):.2f}"])  # fmt: skip
    lines += [*table(rows), ""]
    if trial:
        rows = [["domain", "trial, gross", "trial, net", "ours, gross", "ours, net", "ours net over trial gross"]]
        for d in DOMAINS:
            mine = domain == d
            ours = at_agreement(trace.classifier[mine], trace.agree[mine], trace.exits, 0.95, check, leave)
            theirs = trial["at_agreement_0.95"][d]
            rows.append([d, f"{theirs['saved_gross']:.2f}", f"{theirs['saved_net']:.1f}", f"{ours.saved_gross:.2f}",
                         f"{ours.saved_net:.2f}", f"{ours.saved_net / theirs['saved_gross']:.2f}"])  # fmt: skip
        lines += ["### Against the trial, at 0.95", "", *table(rows), ""]
    lines += ["### One threshold for all texts: 0.95 agreement over everything", ""]
    pooled = at_agreement(trace.classifier, trace.agree, trace.exits, 0.95, check, leave)
    rows = [["domain", "agreement", "gross", "net"]]
    for d in DOMAINS:
        mine = domain == d
        at = point(trace.classifier[mine], trace.agree[mine], trace.exits, pooled.threshold, check, leave)
        rows.append([d, f"{at.agreement:.3f}", f"{at.saved_gross:.2f}", f"{at.saved_net:.2f}"])
    lines += [f"Threshold {pooled.threshold:.3f}.", "", *table(rows), ""]
    lines += ["### Agreement with full depth at each exit, and bits per character", ""]
    rows = [["task", "tokens", *(f"layer {e}" for e in trace.exits[:-1]), "bits per character at full depth"]]
    for t, task in enumerate(trace.tasks):
        mine = trace.task == t
        bits = float(trace.bits[mine, -1].sum() / trace.chars[mine].sum())
        shares = [f"{a:.3f}" for a in trace.agree[mine].mean(0)[:-1]]
        rows.append([task, f"{mine.sum():,}", *shares, f"{bits:.3f}"])
    lines += [*table(rows), "", "### Expected calibration error", ""]
    rows = [["exit", "temperature", "probability: calibration split before", "after", "held out",
             "check: calibration split before", "after", "held out"]]  # fmt: skip
    for e, depth in enumerate(trace.exits[:-1]):
        ece = header["calibration"][str(depth)]
        predicted = (trace.confidence[:, e], probability(trace, header, e))
        held = [expected_calibration_error(p, trace.agree[:, e]) for p in predicted]
        rows.append([f"layer {depth}", f"{ece['temperature']:.2f}", f"{ece['probability_before']:.3f}",
                     f"{ece['probability_after']:.3f}", f"{held[0]:.3f}", f"{ece['check_before']:.3f}",
                     f"{ece['check_after']:.3f}", f"{held[1]:.3f}"])  # fmt: skip
    return [*lines, *table(rows), ""]


def break_even(at: CurvePoint, leave: float) -> float:
    """What one check may cost, in layers, before nothing is saved; 0 where nothing leaves."""
    return max(0.0, (at.saved_gross - (1 - at.left[-1]) * leave) / at.checks_per_token)


def probability(trace: ExitTrace, header: dict[str, Any], e: int) -> NDArray[Any]:
    """The check's predicted probability of agreement, (T,): the recorded check with its risk scale undone."""
    return np.clip(1 - (1 - trace.classifier[:, e]) / header["risk_scale"][e], 0, 1)


def domains(trace: ExitTrace) -> NDArray[Any]:
    """prose, code or dialogue of each token, (T,)."""
    return np.array([domain_of(task) for task in trace.tasks])[trace.task]


def _joint(traces: dict[str, ExitTrace]) -> list[str]:
    rules = {}
    for name, trace in traces.items():
        at = at_agreement(trace.classifier, trace.agree, trace.exits, 0.95, 0.0)
        rules[name] = PerToken(at.threshold, Confidence.CLASSIFIER)
    lines = ["## Joint exits", "", "Shares of characters, each model at the threshold that keeps 0.95 agreement.", ""]
    for a, b in combinations(traces, 2):
        joint = joint_exits(traces[a], rules[a], traces[b], rules[b])
        rows = [[f"{a} leaves at", *(f"{b}: {e}" for e in joint.exits[1])]]
        rows += [[str(e), *(f"{x:.3f}" for x in joint.share[i])] for i, e in enumerate(joint.exits[0])]
        both = joint.share[:-1, :-1].sum()
        alone = joint.share[:-1].sum() * joint.share[:, :-1].sum()
        lines += [*table(rows), "", f"Early in both {both:.3f}; were they independent {alone:.3f}.", ""]
    return lines


def _figures(traces: dict[str, ExitTrace]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(traces), figsize=(4.6 * len(traces), 3.6), squeeze=False)
    for axis, (name, trace) in zip(axes[0], traces.items(), strict=True):
        costs = json.loads((HEADS / name / "heads.json").read_text())["curves"]
        for d in DOMAINS:
            mine = domains(trace) == d
            grid = np.quantile(trace.classifier[mine][:, :-1], np.linspace(0.3, 1, 80))
            at = [point(trace.classifier[mine], trace.agree[mine], trace.exits, t, costs["check_layers"],
                        costs["leave_layers"]) for t in grid]  # fmt: skip
            kept = [p for p in at if p.agreement >= 0.85]
            (line,) = axis.plot([p.agreement for p in kept], [p.saved_net for p in kept], label=d)
            if name == MODELS[0]:
                gross = json.loads((FOLDER / "trial.json").read_text())["at_agreement_0.95"][d]["saved_gross"]
                axis.plot(0.95, gross, "x", color=line.get_color())
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set(title=name, xlabel="share of tokens that equal full depth's", xlim=(0.85, 1))
    axes[0][0].set_ylabel("layers saved per token, net of checks")
    axes[0][0].legend(title="crosses: the trial, gross", fontsize=8)
    figure.tight_layout()
    figure.savefig(FOLDER / "saving.png", dpi=130)
    figure, axes = plt.subplots(1, len(traces), figsize=(4.6 * len(traces), 3.6), squeeze=False)
    for axis, (name, trace) in zip(axes[0], traces.items(), strict=True):
        header = json.loads((HEADS / name / "heads.json").read_text())
        for e, depth in enumerate(trace.exits[:-1]):
            p = probability(trace, header, e)
            which = np.minimum((p * 10).astype(int), 9)
            seen = [which == k for k in range(10) if (which == k).sum() >= 50]
            shares = [trace.agree[mine, e].mean() for mine in seen]
            axis.plot([p[mine].mean() for mine in seen], shares, marker=".", label=f"layer {depth}")
        axis.plot((0, 1), (0, 1), color="0.6", lw=0.8)
        axis.set(title=name, xlabel="predicted probability of agreement")
        axis.legend(fontsize=7)
    axes[0][0].set_ylabel("share that agrees")
    figure.tight_layout()
    figure.savefig(FOLDER / "reliability.png", dpi=130)


def table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


if __name__ == "__main__":
    main()
