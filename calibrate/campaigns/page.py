"""The page of a campaign in Markdown: what was measured, compared with its ceiling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from calibrate.work import PROFILE
from helios_sim.report.format import in_unit

OVER_CEILING = ("dense", "decode_attention", "prefill_attention", "head")

WORTHLESS = (
    "**A rehearsal: tiny shapes, few samples, a CPU. It shows that every stage runs and what it writes. "
    "No figure below means anything.**"
)


def page(campaign: str, summary: Mapping[str, Any]) -> str:
    """The page. `summary` is the content of summary.json."""
    stages: Mapping[str, Mapping[str, Any]] = summary["stages"]
    parts = [f"# Campaign {campaign} on {summary['device']}", ""]
    parts += [WORTHLESS, ""] if summary["worthless"] else []
    parts += ["| stage | archive | status | seconds | remark |", "| --- | --- | --- | ---: | --- |"]
    for name, stage in stages.items():
        took = "" if stage["wall_s"] is None else f"{stage['wall_s']:.1f}"
        parts.append(f"| {name} | {stage['archive']} | {stage['status']} | {took} | {stage['why'] or ''} |")
    results = {name: stage["result"] for name, stage in stages.items() if stage["result"]}
    if "ceilings" in results:
        parts += ["", "## Device", "", *_device(results["ceilings"])]
    profiles = {name: r for name, r in results.items() if name.startswith(f"{PROFILE}-")}
    if profiles:
        parts += ["", "## Profiles", "", *_profiles(profiles)]
    for name, result in results.items():
        if name.startswith(("live-", "headline-")):
            parts += ["", f"## {name}", "", f"Models: {', '.join(result['models'])}. Exits: {result['exits']}.", ""]
            parts += [f"- {sentence}" for sentence in result["verdict"]]
        if "arms" in result:
            parts += ["", *_headline(result)]
    return "\n".join(parts) + "\n"


def _device(found: Mapping[str, Any]) -> list[str]:
    ceilings, facts = found["ceilings"], found["facts"]
    rows = [
        f"- {facts['description']}, {in_unit(facts['memory_bytes'], 'bytes')} for the engine",
        f"- reading {ceilings['read_bytes_per_s'] / 1e9:.0f} GB/s",
        f"- copying {ceilings['copy_bytes_per_s'] / 1e9:.0f} GB/s, read and written",
        f"- {ceilings['dtype']} matrix products {ceilings['flops_per_s'] / 1e12:.2f} TFLOP/s",
    ]
    for kind, rates in found["host_copies"].items():
        there, back = rates["to_device_bytes_per_s"] / 1e9, rates["to_host_bytes_per_s"] / 1e9
        rows.append(f"- copies from {kind} memory: {there:.1f} GB/s to the device, {back:.1f} GB/s back")
    if found["launch"] is not None:
        launch = found["launch"]
        rows.append(
            f"- a launch takes the host {launch['host_s_per_kernel'] * 1e6:.1f} us, a graph of {launch['kernels']:.0f} "
            f"kernels {launch['host_s_per_graph'] * 1e6:.1f} us; a result on the host {found['sync_s'] * 1e6:.1f} us"
        )
    power = found["power"]
    rows.append(f"- no power: {found['power_absent']}" if power is None else f"- idle {power['idle_w']:.0f} W")
    return rows


def _profiles(profiles: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Tables of the profiles' accuracy, and of measured over predicted times and memory."""
    quality, over = [], []
    for name, found in profiles.items():
        model = name.removeprefix(f"{PROFILE}-")
        errors = [t["median_absolute"] for t in (found.get("interpolation") or {}).values() if t is not None]
        whole = (found.get("whole_iterations") or {}).get("all")
        quality.append(
            [
                model,
                str(found.get("weights")),
                f"{max(errors):.1%}" if errors else "",
                "" if whole is None else f"{whole['median']:+.1%}",
                str(len(found.get("below_floor") or ())),
            ]
        )
        times = [f"{found['over_ceiling'][kind]:.2f}" for kind in OVER_CEILING]
        memory = [_measured_over_predicted(found["memory"][part]) for part in ("weights", "kv", "activations")]
        over.append([model, *times, *memory, f"{next(iter(found['loads']['bytes_per_s'].values())) / 1e9:.1f}"])
    columns = ["model", "weights", "interpolation error, median", "whole iterations, median error", "below the floor"]
    names = [kind.replace("_", " ") for kind in OVER_CEILING]
    return [
        *table(columns, quality, 2),
        "",
        "Median time over the least that the ceilings allow, memory over what the shapes say, and loads:",
        "",
        *table(["model", *names, "weights", "KV", "activations", "loads, GB/s"], over, 1),
    ]


def _measured_over_predicted(found: Mapping[str, Any]) -> str:
    return "" if found["measured"] is None else f"{found['measured'] / found['predicted']:.2f}"


def _headline(result: Mapping[str, Any]) -> list[str]:
    """Tables of the arms with the origin of their figures, and of what HELIOS gains over each rival."""
    requests = ", ".join(f"{n} ({load})" for load, n in result["requests"].items())
    counter = result["counter"] or "none of a live run; bands are between idle power and the board's limit"
    arms: Mapping[str, Mapping[str, Any]] = result["arms"]
    origins = ("times", "exits", "energy", "class")
    metrics = [metric for metric in next(iter(arms.values())) if metric != "provenance"]
    told = [
        [name, *(values["provenance"][key] or "" for key in origins), *(shown(values[metric]) for metric in metrics)]
        for name, values in arms.items()
    ]
    keys = [key for key in result["gains"][0] if key not in ("mode", "load", "over")]
    gains = [
        [f"{gain['mode']}, {gain['load']}", gain["over"], *(shown(gain[key]) for key in keys)]
        for gain in result["gains"]
    ]
    return [
        f"Requests of each arm: {requests}. Energy counter: {counter}.",
        "",
        *table(["arm", *origins, *metrics], told, 1 + len(origins)),
        "",
        "HELIOS's figure over the rival's:",
        "",
        *table(["served", "over", *keys], gains, 2),
    ]


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> list[str]:
    """A Markdown table. The first `words` columns hold words, the others numbers."""
    rule = ["---" if i < words else "---:" for i in range(len(columns))]
    return [f"| {' | '.join(row)} |" for row in (columns, rule, *rows)]


def shown(value: Any) -> str:
    """A figure as text; a band by both its ends."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return " to ".join(f"{float(v):.4g}" for v in value.values())
    return f"{float(value):.4g}"
