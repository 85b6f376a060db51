"""Tables and figures of exit heads from the shipped traces: `python experiments/exit_heads/measure.py`.

Writes results.md and the figures beside this file. Reads shipped traces and profiles, the headers of shipped heads,
trial.json (the simple heads to beat) and what low_rank.py and shortlist.py left beside this file; no model is run.
"""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from calibrate.exits.reliability import CurvePoint, at_agreement, expected_calibration_error, point
from calibrate.exits.texts import domain_of
from helios_sim import files
from helios_sim.entry import script
from helios_sim.exits.replay import joint_exits
from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.exits.store import SHIPPED, load_trace
from helios_sim.exits.trace import ExitTrace
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import known_profiles, load_profile
from helios_sim.profile.tables import RowsTable

FOLDER = Path(__file__).parent
HEADS = SHIPPED.parent / "exit_heads"
MODELS = ("smollm2-135m", "gemma3-270m", "qwen2.5-coder-0.5b")
DOMAINS = ("prose", "code", "dialogue")
WHOLE_HEAD_LAYERS = {"smollm2-135m": 8.0, "gemma3-270m": 30.0, "qwen2.5-coder-0.5b": 9.0}  # one check, in layers
LEVELS = (0.90, 0.95, 0.98, 0.99)
BATCHES = (1, 8, 32)


def checked(trace: ExitTrace) -> NDArray[np.float32]:
    return trace.recorded(Confidence.CLASSIFIER)


def by_head(trace: ExitTrace) -> NDArray[np.float32]:
    return trace.recorded(Confidence.MAX_PROBABILITY)


def main(words: list[str]) -> None:
    traces = {name: load_trace(name, "reference") for name in MODELS if (SHIPPED / f"{name}@reference").is_dir()}
    lines = [
        "# Exit heads: results",
        "",
        "Made by `python experiments/exit_heads/measure.py` from the shipped traces.",
        "",
    ]
    for name, trace in traces.items():
        lines += _model(name, trace)
    lines += _measured_checks(traces)
    lines += _shortlist(json.loads((FOLDER / "shortlist.json").read_text()))
    lines += _low_rank(json.loads((FOLDER / "low_rank.json").read_text()))
    lines += _joint(traces)
    files.write_text(FOLDER / "results.md", "\n".join(lines).rstrip() + "\n")
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
            ours = at_agreement(checked(trace)[mine], trace.agree[mine], trace.exits, level, check, leave)
            whole = at_agreement(
                by_head(trace)[mine], trace.agree[mine], trace.exits, level, WHOLE_HEAD_LAYERS[name], leave
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
            ours = at_agreement(checked(trace)[mine], trace.agree[mine], trace.exits, 0.95, check, leave)
            theirs = trial["at_agreement_0.95"][d]
            rows.append([d, f"{theirs['saved_gross']:.2f}", f"{theirs['saved_net']:.1f}", f"{ours.saved_gross:.2f}",
                         f"{ours.saved_net:.2f}", f"{ours.saved_net / theirs['saved_gross']:.2f}"])  # fmt: skip
        lines += ["### Against the trial, at 0.95", "", *table(rows), ""]
    lines += ["### One threshold for all texts: 0.95 agreement over everything", ""]
    pooled = at_agreement(checked(trace), trace.agree, trace.exits, 0.95, check, leave)
    rows = [["domain", "agreement", "gross", "net"]]
    for d in DOMAINS:
        mine = domain == d
        at = point(checked(trace)[mine], trace.agree[mine], trace.exits, pooled.threshold, check, leave)
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
        predicted = (by_head(trace)[:, e], probability(trace, header, e))
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
    return np.clip(1 - (1 - checked(trace)[:, e]) / header["risk_scale"][e], 0, 1)


def domains(trace: ExitTrace) -> NDArray[Any]:
    """prose, code or dialogue of each token, (T,)."""
    return np.array([domain_of(task) for task in trace.tasks])[trace.task]


def _measured_checks(traces: dict[str, ExitTrace]) -> list[str]:
    """What a check costs in layers by the shipped profiles, and what exits save at that price."""
    lines = ["## Checks at their measured cost", ""]
    rows = [["profile", "batch", "hidden-state check (layers)", "whole-head check (layers)",
             *(f"net at 0.95: {d}" for d in DOMAINS)]]  # fmt: skip
    for name in known_profiles():
        model = name.partition("@")[0]
        if model not in traces:
            continue
        profile, trace = load_profile(name), traces[model]
        leave = json.loads((HEADS / model / "heads.json").read_text())["curves"]["leave_layers"]
        for batch in BATCHES:
            whole = check_layers(profile, profile.check_table(Confidence.MAX_PROBABILITY), batch)
            cheap, saved = "not measured", ["" for _ in DOMAINS]
            if profile.check_classifier is not None:
                layers = check_layers(profile, profile.check_classifier, batch)
                cheap = f"{layers:.2f}"
                mine = [domains(trace) == d for d in DOMAINS]
                points = [
                    at_agreement(checked(trace)[m], trace.agree[m], trace.exits, 0.95, layers, leave) for m in mine
                ]
                saved = [f"{p.saved_net:.2f}" for p in points]
            rows.append([name, str(batch), cheap, f"{whole:.1f}", *saved])
    if len(rows) == 1:
        return [*lines, "No profile of these models is shipped.", ""]
    note = "A layer is its dense part and decode attention at a quarter of the longest context measured; leaving is "
    return [*lines, f"{note}charged by weights, as above.", "", *table(rows), ""]


def check_layers(profile: Profile, check: RowsTable, batch: int) -> float:
    """A check of `batch` tokens over one layer of as many, both measured."""
    layer = profile.layer_tables[profile.layer_class[0]]
    attention = layer.decode_attention
    column = int(np.searchsorted(attention.second, attention.second[-1] / 4))
    layer_s = np.interp(batch, layer.dense.rows, layer.dense.time_s)
    layer_s += np.interp(batch, attention.first, attention.time_s[:, column])
    return float(np.interp(batch, check.rows, check.time_s) / layer_s)


def _shortlist(found: dict[str, Any]) -> list[str]:
    lines = ["## A shortlist of the vocabulary as a check", ""]
    covered = ", ".join(f"{n} tokens cover {share:.2f}" for n, share in found["covered"].items())
    lines += [
        f"{found['model']}, {found['tokens']:,} held-out tokens at {found['agreement']:.2f} agreement; two values an "
        f"exit calibrated on {found['calibration']:,} tokens, risks scaled as for the classifier. Of the training text "
        f"{covered}. Costs by weights; a check that reads the vocabulary needs the adapter's answer and pays it.", "",
    ]  # fmt: skip
    rows = [["check", "a check (layers)", *(f"{d}: gross, net" for d in DOMAINS), "ECE held out, by exit"]]
    for name in dict.fromkeys(p["check"] for p in found["points"]):
        points = {p["domain"]: p for p in found["points"] if p["check"] == name}
        saved = [f"{points[d]['saved_gross']:.2f}, {points[d]['saved_net']:.2f}" for d in DOMAINS]
        ece = points[DOMAINS[0]]["ece"]
        shown = "above" if ece is None else ", ".join(f"{x:.3f}" for x in ece)
        rows.append([name, f"{points[DOMAINS[0]]['check_layers']:.2f}", *saved, shown])
    lines += [*table(rows), ""]
    if "measured" in found:
        taken = found["measured"]
        batches = [k for k in taken if k.startswith("batch")]
        rows = [["one check on this machine", *(f"{k}: ms (layers)" for k in batches)]]
        for name in taken[batches[0]]["ms"]:
            cells = [f"{taken[k]['ms'][name]:.2f} ({taken[k]['layers'][name]:.2f})" for k in batches]
            rows.append([name, *cells])
        lines += [
            f"Medians of {taken['passes']} passes, {taken['dtype']}, {taken['threads']} threads.",
            "",
            *table(rows),
            "",
        ]
    return lines


def _low_rank(found: dict[str, Any]) -> list[str]:
    plan, arms = found["plan"], found["arms"]
    depths = [str(e) for e in plan["exits"]]
    size = found["relative_change"]
    lines = [
        "## Low-rank changes of the trunk", "",
        f"{found['model']}, rank {plan['rank']} in {', '.join(plan['parts'])} of the {plan['before']} layers before "
        f"exits {' and '.join(depths)}; {found['heldout_tokens']:,} held-out tokens. Agreement is with the "
        "original model's full depth. Saving is gross, at 0.95 agreement with it; where even full depth agrees less, "
        "none. The confidence is the whole head's. Against the weights the changes have a norm of "
        f"{size['smallest']:.3f} to {size['largest']:.3f}.", "",
    ]  # fmt: skip
    rows = [["heads", "trained further on", "domain", *(f"agrees, layer {e}" for e in depths), "agrees, full depth",
             "bits per character, full depth", "layers saved at 0.95"]]  # fmt: skip
    for name, arm in arms.items():
        for d in DOMAINS:
            agree = [f"{share:.3f}" for share in arm[d]["agree"].values()]
            saved = f"{arm[d]['saved_gross']:.2f}" if arm[d]["agreement"] >= 0.95 else "none"
            rows.append([name, f"{arm['trained_tokens']:,}", d, *agree, f"{arm[d]['bits_per_char']:.3f}", saved])
    return [*lines, *table(rows), ""]


def _joint(traces: dict[str, ExitTrace]) -> list[str]:
    rules = {}
    for name, trace in traces.items():
        at = at_agreement(checked(trace), trace.agree, trace.exits, 0.95, 0.0)
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
            grid = np.quantile(checked(trace)[mine][:, :-1], np.linspace(0.3, 1, 80))
            at = [point(checked(trace)[mine], trace.agree[mine], trace.exits, t, costs["check_layers"],
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
    with files.replacing(FOLDER / "saving.png") as out:
        figure.savefig(out, dpi=130)
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
    with files.replacing(FOLDER / "reliability.png") as out:
        figure.savefig(out, dpi=130)


def table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


if __name__ == "__main__":
    script(__file__, main)
