"""The page's sections on the device: ceilings, times over their floor, host, memory, loads and energy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.ticker import FuncFormatter

from calibrate.measure.ceilings import Ceilings, OverFloor, median_ratio, over_floor
from calibrate.report.page import Section, Table, palette
from helios_sim.profile.profile import Profile
from helios_sim.report import format as fmt
from helios_sim.report.figures.style import BASELINE_COLOR, Drawing, handles_of, legend_above, look, new_figure

MEASURED = "measured"
PARTS = {
    "dense": "layer without attention",
    "kv_projection": "K and V alone",
    "head": "norm, LM head, sampling",
    "check": "exit check by the LM head",
    "check_classifier": "exit check by the classifier",
    "check_predictor": "exit check by a predictor",
    "embedding": "embedding",
    "decode_attention": "decode attention",
    "prefill_attention": "prefill attention",
}
KINDS = {
    "equal": "decode, equal lengths",
    "unequal": "decode, unequal lengths",
    "prefill": "a prompt alone",
    "mixed": "decode beside a prompt",
    "exits": "decode with exits, checks and propagation",
    "all": "all",
}


def device_section(facts: Mapping[str, Any], ceilings: Ceilings) -> Section:
    """The device and its ceilings."""
    rows = [
        ("bandwidth, reading", _rate(ceilings.read_bytes_per_s, "B/s"), "the best of several kernels that only read"),
        ("bandwidth, copying", _rate(ceilings.copy_bytes_per_s, "B/s"), "bytes read and written"),
        (f"matrix rate, {ceilings.dtype}", _rate(ceilings.flops_per_s, "FLOP/s"), f"{ceilings.matrix_rows} rows"),
        ("memory that the engine may use", fmt.in_unit(facts["memory_bytes"], "bytes"), "as the device says"),
    ]
    if facts["power_limit_w"] is not None:
        rows.append(("power limit", f"{facts['power_limit_w']:g} W", "as the driver says"))
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    return Section(
        "device",
        "Device and its ceilings",
        MEASURED,
        [f"{facts['description']}. {versions}."],
        tables=[Table(("ceiling", "value", "how"), rows, words=(2,))],
    )


def times_section(profile: Profile, ceilings: Ceilings) -> Section:
    """Each part's times over their floor, and the accuracy of interpolation and of whole iterations."""
    details = profile.provenance.details
    found = over_floor(profile, ceilings)
    figure = over_floor_figure(_curves(found))
    tables = [_parts(profile, found, details.get("interpolation", {}))]
    whole = details.get("whole_iterations") or {}
    if whole:
        tables.append(_whole(whole))
    sampling = details.get("samples") or {}
    text = ["Every part was timed on a grid that was refined where straight lines did not fit."]
    if sampling:
        text.append(
            f"{sampling['samples']:,} samples at {sampling['points']:,} points, median spread (IQR) "
            f"{100 * sampling['iqr_over_median']:.1f} % of the median; {sampling['outliers']:,} outliers are in the "
            "medians, which do not mind them, and in points.parquet."
        )
    return Section("times", "Times against their floor", MEASURED, text, (), tables, [figure] if figure else [])


def memory_section(profile: Profile) -> Section | None:
    """Predicted and measured memory."""
    memory = profile.provenance.details.get("memory")
    if not memory:
        return None
    rows = []
    names = {
        "weights": "weights, all layers",
        "kv": f"KV of {memory['kv_tokens']:,} tokens",
        "activations": "activations of the largest iteration",
    }
    for key, name in names.items():
        predicted, measured = memory[key]["predicted"], memory[key]["measured"]
        there = fmt.NOTHING if measured is None else fmt.in_unit(measured, "bytes")
        ratio = fmt.NOTHING if not measured or not predicted else f"{measured / predicted:.2f}"
        rows.append((name, fmt.in_unit(predicted, "bytes"), there, ratio))
    rows.append(("one layer", fmt.in_unit(memory["layer_bytes"], "bytes"), fmt.NOTHING, fmt.NOTHING))
    note = f"Measured: {memory['method']}. The simulator reserves the measured activations, where there are any."
    table = Table(("what", "predicted", "measured", "measured / predicted"), rows, note=note)
    return Section("memory", "Memory", MEASURED, tables=[table])


def load_section(profile: Profile) -> Section | None:
    """Load rates, and the slowdown of iterations meanwhile."""
    loads = profile.provenance.details.get("loads")
    if not loads:
        return None
    rows = [
        (f"from {kind.replace('_', ' ')} memory", _rate(rate, "B/s"), fmt.seconds(loads["layer_bytes"] / rate))
        for kind, rate in loads["bytes_per_s"].items()
    ]
    rows.append(("beside running iterations", _rate(loads["meanwhile_bytes_per_s"], "B/s"),
                 fmt.seconds(loads["layer_bytes"] / loads["meanwhile_bytes_per_s"])))  # fmt: skip
    if loads["checkpoint_bytes_per_s"] is not None:
        rate = loads["checkpoint_bytes_per_s"]
        seconds = fmt.seconds(loads["layer_bytes"] / rate)
        rows.append(("from the checkpoint's file, converted", _rate(rate, "B/s"), seconds))
    note = f"An iteration beside a running copy takes {loads['slowdown']:.2f} times as long as alone."
    return Section("load", "Loading layers", MEASURED, tables=[Table(("source", "rate", "one layer"), rows, note=note)])


def energy_section(profile: Profile) -> Section:
    """Energy, or the reason why there is none."""
    energy = profile.provenance.details.get("energy")
    if not energy:
        why = profile.provenance.details.get("energy_absent") or "it was not measured"
        return Section("energy", "Energy", None, [f"Absent: {why}. Nothing is estimated in its place."])
    rows = [
        (name, fmt.seconds(step["time_s"]), f"{step['power_w']:.1f} W", f"{fmt.number(step['energy_j'])} J",
         f"{fmt.number(step['above_idle_j'])} J")
        for name, step in energy["steps"].items()
    ]  # fmt: skip
    note = (
        f"Idle with the model resident: {energy['idle_w']:.1f} W. The counter moves every "
        f"{fmt.seconds(energy['period_s'])}; each reading lasted {fmt.seconds(energy['window_s'])}."
    )
    table = Table(("iteration", "time", "power", "energy", "above idle"), rows, note=note)
    return Section("energy", "Energy", MEASURED, tables=[table])


def host_section(profile: Profile) -> Section:
    """The host's costs, with the source of each value."""
    runtime, sources = profile.runtime, {s.quantity: s.text for s in profile.runtime.sources}
    names = ("launch_s_per_layer", "launch_s_per_graph", "sync_s", "host_overhead_s")
    rows = [(name, fmt.seconds(getattr(runtime, name)), sources.get(name, fmt.NOTHING)) for name in names]
    return Section(
        "host", "What the host adds", MEASURED, tables=[Table(("quantity", "value", "source"), rows, words=(2,))]
    )


def _curves(found: Mapping[str, list[OverFloor]]) -> list[tuple[str, list[int], list[float]]]:
    """Curves by rows; attention at the longest measured context (decode) and without context (prefill)."""
    curves = []
    for table, entries in found.items():
        if len(entries[0].place) == 2:
            second = 0 if table == "prefill_attention" else max(e.place[1] for e in entries)
            entries = [e for e in entries if e.place[1] == second and e.samples != 0]
            label = f"{PARTS[table]}, {second:,} tokens before" if second else PARTS[table]
        else:
            label = PARTS[table]
        entries = [e for e in entries if e.time_s > 0]
        if table != "check" and entries:
            curves.append((label, [e.place[0] for e in entries], [e.ratio for e in entries]))
    return curves


def _parts(profile: Profile, found: Mapping[str, list[OverFloor]], interpolation: Mapping[str, Any]) -> Table:
    rows = []
    for table, entries in found.items():
        known = [e for e in entries if e.time_s > 0]
        if not known:
            continue
        first, last = known[0], known[-1]
        held = interpolation.get(table)
        spread = sorted(e.iqr_s / e.time_s for e in known if e.iqr_s is not None)
        rows.append(
            (
                PARTS[table],
                str(len(entries)),
                f"{fmt.seconds(first.time_s)} to {fmt.seconds(last.time_s)}",
                _ratios(known),
                f"{100 * spread[len(spread) // 2]:.1f} %" if spread else fmt.NOTHING,
                fmt.NOTHING
                if held is None
                else f"{100 * held['median_absolute']:.1f} %, {100 * held['largest']:.1f} %",
                fmt.NOTHING if held is None else str(held["held_out"]),
            )
        )
    columns = ("part", "points", "from smallest to largest", "over floor: median (least to most)", "IQR / median",
               "held-out error: median, largest", "held-out points")  # fmt: skip
    note = (
        "Held-out points were measured and left out of the grid: how far the straight line between its points missed."
    )
    return Table(columns, rows, note=note)


def _ratios(entries: Sequence[OverFloor]) -> str:
    least, most = (f(e.ratio for e in entries) for f in (min, max))
    return f"{fmt.in_unit(median_ratio(entries), 'x')} ({fmt.number(least)} to {fmt.number(most)})"


def _whole(whole: Mapping[str, Mapping[str, Any]]) -> Table:
    rows = [
        (
            KINDS.get(kind, kind),
            str(found["iterations"]),
            f"{100 * found['median']:+.1f} %",
            f"{100 * found['median_absolute']:.1f} %",
            f"{100 * found['p90_absolute']:.1f} %",
        )
        for kind, found in whole.items()
    ]
    columns = ("whole iteration", "tried", "bias (median)", "median error", "90 % within")
    title = "Whole iterations of random composition: priced by the profile against measured"
    return Table(columns, rows, title=title)


def _rate(value: float, unit: str) -> str:
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if value >= size:
            return f"{fmt.number(value / size)} {prefix}{unit}"
    return f"{fmt.number(value)} {unit}"


def over_floor_figure(curves: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Drawing | None:
    """A figure of measured time over floor against rows, from (label, rows, ratio) of each curve."""
    if not curves:
        return None
    with look():
        figure, (ax,) = new_figure(1, 1, 3.2)
        for (label, rows, ratio), color in zip(curves, palette(len(curves)), strict=True):
            ax.plot(rows, ratio, "o-", color=color, markersize=4, linewidth=1.6, label=label)
        ax.axhline(1, color=BASELINE_COLOR, linewidth=1.4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        ax.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: f"{value:g}×" if str(value)[0] in "25" else ""))
        ax.set_xlabel("rows that go through together (batch, or tokens of a prompt)")
        ax.set_ylabel("measured time over its floor")
        legend_above(figure, handles_of(ax))
    caption = (
        "The floor is the larger of bytes over the measured bandwidth and operations over the measured matrix rate. "
        "Nothing can lie below the grey line; what lies far above is where a kernel could be better."
    )
    return Drawing("over_floor", "Measured time over its floor", caption, figure)
