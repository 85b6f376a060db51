"""Records a finished run beside its question: `python experiments/record.py OUTPUT_FOLDER`.

Writes experiments/NAME/results.md (the arms, published figures beside ours, the verdict) and copies the figures that
the page of that experiment shows. The page itself, README.md, is written by people and is left alone.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from helios_sim import files
from helios_sim.entry import script
from helios_sim.report.format import code_span, markdown, metric_with_interval
from helios_sim.report.intervals import Interval, Method
from helios_sim.report.metrics import DEFINITIONS, Band

FOLDER = Path(__file__).parent


def record(output: Path) -> Path:
    summary = json.loads((output / "summary.json").read_text(encoding="utf-8"))
    name = summary["experiment"]
    if not re.fullmatch(r"\w[\w.-]*", name):
        raise SystemExit(f"{name!r} is no name of a folder here")
    folder = FOLDER / name
    folder.mkdir(exist_ok=True)
    lines = [f"# {summary['experiment']}: results", "", _source(summary), ""]
    if "groups" in summary:
        lines += [*_bullets(summary["notes"]), "", "## Gates", "", *_gates(summary["gates"]), ""]
        lines += ["## Errors by group", "", *_groups([*summary["groups"], *summary["together"]]), ""]
        return _written(folder, output, lines)
    if "capacity" in summary:
        lines += [*_bullets([*summary["verdict"], *summary["warnings"]]), "", *_fleets(summary["capacity"])]
        return _written(folder, output, lines)
    lines += [*_bullets(summary["verdict"]), "", "## Arms", "", *_arms(summary), ""]
    tasks = [figures for arm in summary["arms"].values() for figures in arm.get("tasks", {}).values()]
    if any(figures["bits_per_char"] is not None for figures in tasks):
        lines += ["## Bits per character by task", "", *_tasks(summary), ""]
    if summary.get("published"):
        lines += ["## Published figures beside ours", "", *_published(summary["published"]), ""]
    if any(row["noise"] is not None for rows in _parts(summary).values() for row in rows):
        lines += ["## Measured beside simulated", "", *_compared(_parts(summary)), ""]
        lines += [
            "## What iterations took",
            "",
            *_bullets([f"{k}: {v}" for k, v in summary["fidelity"]["terms"].items()]),
            "",
        ]
    if any("band" in row for rows in _parts(summary).values() for row in rows):
        lines += ["## Measured beside simulated", "", *_predicted(_parts(summary)), ""]
        lines += ["Estimated:", "", *_bullets([f"{k}: {v}" for k, v in summary["fidelity"]["terms"].items()]), ""]
    if summary.get("sweep"):
        lines += ["## Designs that no other beats", "", *_front(summary), ""]
    return _written(folder, output, lines)


def _written(folder: Path, output: Path, lines: list[str]) -> Path:
    """results.md, and the figures that the page beside it shows."""
    page = folder / "README.md"
    drawn = sorted([*output.glob("*.png"), *(output / "figures").glob("*.png")])
    figures = [f for f in drawn if page.is_file() and f.name in page.read_text()]
    for figure in figures:
        shutil.copyfile(figure, folder / figure.name)
    target = folder / "results.md"
    files.write_text(target, "\n".join(lines).rstrip() + "\n")
    return target


def _fleets(plan: dict[str, Any]) -> list[str]:
    """A table for each load: the smallest fleets that are enough, the advised one first named."""
    lines = [f"Enough is: {markdown(plan['rule'])}.", ""]
    for load in plan["loads"]:
        advised = load["recommended"]
        lines += [f"## {load['requests_per_s']:.3g} requests/s ({load['load']:g}x)", ""]
        metrics = ["agreement", "slo_attainment", "ttft_s_p95", "tpot_s_p95", "usd_per_hour", "usd_per_million_tokens"]
        metrics = [name for name in metrics if any(name in it["metrics"] for it in load["plans"])]
        labels = [DEFINITIONS[name].label for name in metrics]
        rows = [["card", "policy", "replicas", "of each seed", "cards", "MJ/M tokens", *labels]]
        for it in load["plans"]:
            own = advised is not None and (it["card"], it["policy"]) == (advised["card"], advised["policy"])
            joules = it["j_per_million_tokens"]
            rows.append([
                f"**{markdown(it['card'])}**" if own else markdown(it["card"]), code_span(it["policy"]),
                markdown(str(it["replicas"] or it["why_not"])), ", ".join(map(str, it["replicas_by_seed"])),
                str(it["cards"] or "-"),
                "-" if joules is None else f"{joules['low'] / 1e6:.2f} to {joules['high'] / 1e6:.2f}",
                *(_shown(name, it) for name in metrics),
            ])  # fmt: skip
        lines += [*_table(rows), ""]
        if advised is not None:
            by_seed = ", ".join("-" if rate is None else f"{rate:.3g}" for rate in advised["valid_up_to_rps_by_seed"])
            upto = f"valid up to {advised['valid_up_to_rps']:.3g} requests/s (by seed: {by_seed})"
            lines += [f"Bold: advised, {upto}.", ""]
    return lines


def _gates(gates: list[dict[str, Any]]) -> list[str]:
    lines = ["| gate | value | must be | |", "| --- | ---: | --- | --- |"]
    for gate in gates:
        value = "" if gate["value"] is None else f"{gate['value']:+.1%}"
        lines.append(f"| {gate['name']} | {value} | {gate['bound']} | {'kept' if gate['passed'] else 'missed'} |")
    return lines


def _groups(groups: list[dict[str, Any]]) -> list[str]:
    """Mean error, 90th percentile and bias of TPOT, mean error and bias of TTFT, and the errors of others."""
    others = list(dict.fromkeys(name for group in groups for name in group["others"]))
    headings = ["rows of", "number", "TPOT", "90 %", "bias", "TTFT", "bias", *(f"{n}: TPOT / TTFT" for n in others)]
    lines = [f"| {' | '.join(headings)} |", "| --- |" + " ---: |" * (len(headings) - 1)]
    for group in groups:
        tpot, ttft = group["tpot"], group["ttft"]
        cells = [group["name"], str(group["rows"])]
        cells += ["", "", ""] if tpot is None else [f"{tpot['mean']:.1%}", f"{tpot['p90']:.1%}", f"{tpot['bias']:+.1%}"]
        cells += ["", ""] if ttft is None else [f"{ttft['mean']:.1%}", f"{ttft['bias']:+.1%}"]
        cells += [" / ".join(f"{share:.1%}" for share in group["others"].get(name, ())) for name in others]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _source(summary: dict[str, Any]) -> str:
    made = summary["provenance"]
    versions = ", ".join(f"{name} {version}" for name, version in made["libraries"].items())
    by = f"helios-sim {made['helios_sim']}, Python {made['python']}, {versions}"
    if "groups" in summary:
        return f"Made by `python -m helios_sim +experiment={summary['experiment']}`, {by}."
    if "capacity" in summary or any("band" in row for rows in _parts(summary).values() for row in rows):
        command = re.sub(r" hydra\.run\.dir=('[^']*'|\S+)", "", made["command"])  # where its output lay
        return f"Made by `{command}`, class `{made['class']}`, {by}. {_intervals(summary['intervals'])}"
    return (
        f"Made by `python -m helios_sim +experiment={summary['experiment']}`, seeds {made['seeds']}, class "
        f"`{made['class']}`, {by}. Ratios are to `{summary['baseline']}`. {_intervals(summary['intervals'])}"
    )


def _intervals(told: dict[str, Any]) -> str:
    """What the brackets hold."""
    if told["scope"] == "over_seeds":
        return f"Brackets are 95 % intervals over {told['seeds']} seeds; other figures are means over them."
    return "Brackets are 95 % intervals within this run, which say nothing of other seeds; [–]: no interval."


def _bullets(sentences: list[str]) -> list[str]:
    return [f"- {markdown(sentence)}" for sentence in sentences]


def _arms(summary: dict[str, Any]) -> list[str]:
    metrics = summary["headline_metrics"]
    first = metrics[0]
    labels = [DEFINITIONS[name].label for name in metrics]
    rows = [["arm", labels[0], "ratio", *labels[1:]]]
    for name, arm in summary["arms"].items():
        values = [_shown(metric, arm) for metric in metrics]
        over = arm.get("baseline", summary["baseline"])
        ratio = "baseline" if name == over else _ratio(arm["vs_baseline"].get(first))
        if name != over and over != summary["baseline"]:
            ratio += f" of {code_span(over)}"
        rows.append([code_span(name), values[0], ratio, *values[1:]])
    return _table(rows)


def _front(summary: dict[str, Any]) -> list[str]:
    """One row for designs that come to the same in every objective, the first of them."""
    parameters, objectives = summary["sweep"]["parameters"], summary["sweep"]["objectives"]
    rows = [["design", *map(markdown, parameters), *(DEFINITIONS[name].label for name in objectives)]]
    alike: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for design in summary["sweep"]["front"]:
        found = tuple(_shown(name, design) for name in objectives)
        alike.setdefault(found, []).append(design)
    for found, designs in alike.items():
        more = f" +{len(designs) - 1}" if len(designs) > 1 else ""
        values = [f"{v:g}" if isinstance(v, float) else str(v) for v in designs[0]["parameters"].values()]
        rows.append([f"{designs[0]['design']}{more}", *map(markdown, values), *found])
    return _table(rows)


def _parts(summary: dict[str, Any]) -> dict[str, Any]:
    parts: dict[str, Any] = summary.get("fidelity", {}).get("parts", {})
    return parts


def _compared(parts: dict[str, Any]) -> list[str]:
    """Of what was measured several times: its mean, the simulation and its difference, also at the pace that
    the device had meanwhile, and how far two measurements lie apart.
    """
    wanted = [
        ("TPOT", "mean", "ms"), ("TTFT", "mean", "ms"), ("TTFT", "p95", "ms"), ("E2E", "mean", "ms"),
        ("ITL", "p99", "ms"), ("system", "throughput", "requests/s"), ("system", "mean batch", "requests"),
        ("system", "KV in use", "%"), ("system", "layers run", "a token"), ("system", "switches", ""),
        ("system", "time of switches", "s"),
    ]  # fmt: skip
    rows = [["", "figure", "measured", "simulated", "difference", "at its pace", "noise"]]
    for part, of_part in parts.items():
        found = {(row["group"], row["statistic"], row["unit"]): row for row in of_part}
        for key in wanted:
            row = found[key]
            name = " ".join(
                filter(None, (key[0] if key[0] != "system" else "", key[1], f"({key[2]})" if key[2] else ""))
            )
            values = ["-" if row[k] is None else f"{row[k]:.4g}" for k in ("measured", "simulated")]
            shares = ["-" if row[k] is None else f"{row[k]:+.1%}" for k in ("difference", "paced_difference")]
            noise = "-" if row["noise"] is None else f"{row['noise']:.1%}"
            rows.append([markdown(part) if key is wanted[0] else "", name, *values, *shares, noise])
    return _table(rows)


def _predicted(parts: dict[str, Any]) -> list[str]:
    """Of a log: each figure of each part with its difference and the interval of that."""
    rows = [["", "figure", "measured", "simulated", "difference", "95 %"]]
    for part, of_part in parts.items():
        for place, row in enumerate(of_part):
            low, high = row.get("band") or (None, None)
            band = "[–]" if low is None else f"[{low:+.1%}, {high:+.1%}]"
            both = (row["measured"], row["simulated"])
            shown = [f"{value:,.0f} ms" if value >= 100 else f"{value:.4g} ms" for value in both]
            name = f"{row['group']} {row['statistic']}"
            rows.append(["" if place else markdown(part), name, *shown, f"{row['difference']:+.1%}", band])
    return _table(rows)


def _tasks(summary: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(task for arm in summary["arms"].values() for task in arm["tasks"]))
    rows = [["arm", *map(markdown, names)]]
    for arm, entry in summary["arms"].items():
        bits = [entry["tasks"].get(task, {}).get("bits_per_char") for task in names]
        rows.append([code_span(arm), *("-" if value is None else f"{value:.3f}" for value in bits)])
    return _table(rows)


def _published(figures: list[dict[str, Any]]) -> list[str]:
    rows = [["figure", "published", "ours", "remark"]]
    for figure in figures:
        ours = _ratio({"ratio": figure["ours"], "low": figure["low"], "high": figure["high"]})
        rows.append([markdown(figure["what"]), f"{figure['published']:g}", ours, markdown(figure["remark"])])
    return _table(rows)


def _shown(metric: str, entry: dict[str, Any]) -> str:
    """A metric of an arm or a design with its interval."""
    interval = entry["intervals"].get(metric)
    found = None if interval is None else Interval(**{**interval, "method": Method(interval["method"])})
    return metric_with_interval(metric, _value(entry["metrics"].get(metric)), found)


def _value(value: Any) -> Any:
    return Band(**value) if isinstance(value, dict) else value


def _ratio(ratio: dict[str, Any] | None) -> str:
    if ratio is None:
        return "-"
    low, high = ratio["low"], ratio["high"]
    if ratio["ratio"] is None:
        return "-" if low is None else f"{low:.2f} to {high:.2f}"
    if ratio.get("method") == Method.EXACT:
        return f"{ratio['ratio']:.2f}"
    return f"{ratio['ratio']:.2f} [–]" if low is None else f"{ratio['ratio']:.2f} [{low:.2f}, {high:.2f}]"


def _table(rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def main(words: list[str]) -> None:
    for word in words:
        print(record(Path(word)))


if __name__ == "__main__":
    script(__file__, main)
