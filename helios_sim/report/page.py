"""The self-contained HTML page of a study or of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from helios_sim import __version__
from helios_sim.report import format as fmt
from helios_sim.report.breakdown import Spread, TaskFigures, by_kind
from helios_sim.report.cautions import cautions
from helios_sim.report.compare import Method, Ratio
from helios_sim.report.decisions import DecisionRow, decision_rows
from helios_sim.report.designs import Design, DesignsResult, design_label, metric_cells, thinned, value_text
from helios_sim.report.figures.style import Drawing, arm_styles, to_svg
from helios_sim.report.files import json_value, to_json
from helios_sim.report.html import (
    Html,
    Inside,
    badge,
    card,
    count,
    details,
    figure,
    joined,
    line,
    num,
    page,
    row_head,
    section,
    sub,
    table,
    tag,
    terms,
    verdict,
    warnings,
)
from helios_sim.report.metrics import DEFINITIONS, ENERGY_NOTE, INTERVAL_NOTE, LATENCY_NOTE
from helios_sim.report.result import ArmResult, Comparisons, ExperimentResult, headline_metrics
from helios_sim.report.tables import baseline_marks

SHOWN_DECISIONS = 200  # per arm; all are in the Parquet file
MOST_ON_PAGE = 200  # designs of a front; all are in the Parquet file
_MOST_CARDS = 4
_LONG_EVIDENCE = 160  # characters, from which evidence is folded up

Part = tuple[str, str, Html | None]  # anchor, entry in the contents, section; None: there is none


def render(result: ExperimentResult, ratios: Comparisons, drawings: Sequence[Drawing]) -> str:
    """The page of a study as text: no script, no network, figures inline."""
    parts: tuple[Part, ...] = (
        ("answer", "Answer", _answer(result, ratios)),
        ("warnings", "Read with care", warnings(cautions(result))),
        ("arms", "Arms", _arms(result, ratios)),
        ("waits", "Who waits", _waits(result)),
        ("fidelity", "Measured beside simulated", _fidelity(result)),
        ("published", "Published", _published(result)),
        ("gates", "Gates", _gates(result)),
        ("figures", "Figures", _figures(drawings)),
        ("decisions", "Decisions", _decisions(result)),
        ("workload", "Workload", _workload("What was served", result)),
        ("assumptions", "Not measured", _assumptions(result, _OF_ASSUMPTIONS)),
        ("provenance", "Provenance", _provenance(result, "Definitions of the metrics", list(DEFINITIONS),
                                                 (LATENCY_NOTE, INTERVAL_NOTE, ENERGY_NOTE))),
    )  # fmt: skip
    return _page(result, parts, "per request in ", "requests.parquet")


def render_designs(result: DesignsResult, drawings: Sequence[Drawing]) -> str:
    """The page of a sweep as text, self-contained as well."""
    names = [*result.objectives, *result.shown_metrics]
    notes = (LATENCY_NOTE, *([ENERGY_NOTE] if any("energy" in name for name in names) else []))
    parts: tuple[Part, ...] = (
        ("answer", "Answer", section("answer", None, verdict(result.verdict))),
        ("warnings", "Read with care", warnings(result.warnings)),
        ("figures", "Figures", _figures(drawings)),
        ("front", "Front", _front(result, names)),
        ("failed", "Failed", _failed(result)),
        ("workload", "Workload", _workload("What every design served", result)),
        ("assumptions", "Not measured", _assumptions(result, None)),
        ("provenance", "Provenance", _provenance(result, "Definitions of the metrics shown", names, notes)),
    )
    return _page(result, parts, "every design in ", "designs.parquet")


def _page(result: ExperimentResult | DesignsResult, parts: Sequence[Part], where: str, file: str) -> str:
    weakest = result.provenance_class
    kicker = [tag("span", f"helios-sim · {result.experiment}")]
    if weakest is not None:
        kicker += [badge(weakest.value), tag("span", "is the class of the weakest input")]
    head = (
        tag("div", kicker, cls="kicker"),
        tag("h1", result.title),
        tag("p", result.question, cls="question"),
        tag("p", result.conditions, cls="conditions"),
    )
    foot = (f"Made by helios-sim {__version__}. The same numbers are in ", tag("code", "summary.json"), f", {where}",
            tag("code", file), ".")  # fmt: skip
    contents = [(name, text) for name, text, it in parts if it]
    return page(result.title, head, contents, [it for _, _, it in parts], foot)


def _answer(result: ExperimentResult, ratios: Comparisons) -> Html:
    """The verdict, and published comparisons; without any, the first headline metric against the baseline."""
    cards = [
        card(p.what, fmt.in_unit(p.ours, p.unit),
             _beside(p.low, p.high, f"published {fmt.in_unit(p.published, p.unit)}"))
        for p in result.published
        if p.ours is not None
    ]  # fmt: skip
    if not cards:
        name = headline_metrics(result)[0]
        hint = f", {direction}" if (direction := fmt.direction(name)) else ""
        for arm in sorted(ratios, key=lambda arm: arm != result.subject):  # the subject first, whatever is left out
            value = ratios[arm].get(name)
            if value is not None and value.ratio is not None:
                note = _beside(value.low, value.high, f"against {result.baseline_of(arm)}")
                cards.append(card(f"{arm}: {fmt.label(name)}{hint}", f"{value.ratio:.2f}×", note))
    shown = tag("div", cards[:_MOST_CARDS], cls="cards") if cards else None
    return section("answer", None, verdict(result.verdict), shown)


def _beside(low: float | None, high: float | None, note: str) -> str:
    return note if low is None or high is None else f"[{low:.2f}, {high:.2f}] · {note}"


def _arms(result: ExperimentResult, ratios: Comparisons) -> Html:
    names = headline_metrics(result)
    styles = arm_styles(list(result.arms), result.baseline)
    marks = baseline_marks(result)
    mark_of = {name: mark for mark, name in marks.items()}
    heads: list[Inside] = ["arm"]
    for place, name in enumerate(names):
        heads += [num(fmt.label(name), head=True), *([] if place else [num("against baseline", head=True)])]
    rows = []
    for arm in result.arms.values():
        over = result.baseline_of(arm.name)
        is_baseline = arm.name == over
        versus, interval = ("1×", "") if is_baseline else _split(ratios[arm.name].get(names[0]))
        versus = f"{versus} {mark_of[over]}" if over in mark_of else versus
        first, *others = (num(fmt.metric(name, arm.metrics[name])) for name in names)
        swatch = tag("span", cls="swatch", style=f"background:{styles[arm.name].color}")
        head = row_head(swatch, arm.name, sub(arm.description))
        against = num(versus, sub(interval, interval=True))
        rows.append(line([head, first, against, *others], cls="baseline" if is_baseline else None))
    return section(
        "arms", "Arms", table(heads, rows),
        (tag("p", f"{mark} against {name}", cls="footnote") for mark, name in marks.items()),
        _all_metrics(result, ratios), _tasks(result), _replicas(result),
    )  # fmt: skip


def _split(ratio: Ratio | None) -> tuple[str, str]:
    """A ratio and its interval as two texts."""
    text = fmt.ratio(ratio)
    if ratio is None or ratio.method is Method.BAND or " " not in text:
        return text, ""
    value, interval = text.split(" ", 1)
    return value, interval


def _all_metrics(result: ExperimentResult, ratios: Comparisons) -> Html:
    by_arm = {name: arm.metrics for name, arm in result.arms.items()}
    rows = []
    for name in by_arm[result.baseline]:
        values = {arm: metrics[name] for arm, metrics in by_arm.items()}
        if any(value is not None for value in values.values()):
            cells = (num(fmt.metric(name, value), sub(_shown(ratios, arm, name))) for arm, value in values.items())
            rows.append(line([tag("td", tag("code", name)), *cells]))
    heads = ["metric", *(num(name, head=True) for name in by_arm)]
    return details(joined(["All metrics ", count(f"({len(rows)})")]), table(heads, rows))


def _shown(ratios: Comparisons, arm: str, metric: str) -> str:
    ratio = ratios.get(arm, {}).get(metric)
    return "" if ratio is None else fmt.ratio(ratio)


def _tasks(result: ExperimentResult) -> Html | None:
    """A row for each task and a cell for each arm; none with a single task, which the arms' table shows."""
    figures = {arm: result.by_task(arm) for arm in result.arms}
    tasks = [task for task in result.workload.tasks if any(task in of_arm for of_arm in figures.values())]
    if len(tasks) < 2:
        return None
    rows = [[task, *(_task_cell(of_arm.get(task)) for of_arm in figures.values())] for task in tasks]
    heads = ["task", *(num(name, head=True) for name in result.arms)]
    return details(joined(["By task ", count(f"({len(tasks)})")]), table(heads, rows))


def _task_cell(figures: TaskFigures | None) -> Html:
    """Bits per character where known, else the mean time of a request; below it the depth and the models."""
    if figures is None:
        return num(fmt.NOTHING)
    bits = figures.bits_per_char
    value = fmt.seconds(figures.e2e_s_mean) if bits is None else f"{bits:.3f} bits/char"
    models = [f"{share:.0%} {model}" for model, share in figures.models.items()]
    return num(value, sub(f"{figures.layers_per_token:.1f} layers"), map(sub, models if len(models) > 1 else []))


def _replicas(result: ExperimentResult) -> Html | None:
    """A row for each kind of replica of each arm that has several replicas."""
    rows = []
    for arm in result.arms.values():
        for it in by_kind(arm.replicas) if len(arm.replicas) > 1 else ():
            name = f"{it.replicas} x {it.card}"
            rows.append([
                row_head(arm.name), f"{it.kind}: {name}" if it.kind else name, ", ".join(it.models),
                num(f"{it.requests_completed:,}"), _spread(it.requests_in_it, fmt.number),
                _spread(it.busy_fraction, lambda share: fmt.in_unit(share, "share")), _spread(it.e2e_s, fmt.seconds),
                num(it.switches), num(it.loads),
            ])  # fmt: skip
    if not rows:
        return None
    numbers = ("requests", "in each, mean", "busy", "E2E mean", "switches", "loads")
    heads = ["arm", "replicas", "models", *(num(name, head=True) for name in numbers)]
    note = "First seed. Below each mean: the replica with the least and the one with the most."
    return details("Replicas", table(heads, rows), tag("p", note, cls="footnote"), opened=True)


def _spread(value: Spread | None, shown: Callable[[float], str]) -> Html:
    if value is None:
        return num(fmt.NOTHING)
    return num(shown(value.mean), sub(f"{shown(value.low)} to {shown(value.high)}", interval=True))


def _waits(result: ExperimentResult) -> Html | None:
    """How long each group waits, where the order of the line prefers some requests."""
    sentences, rows = [], []
    for arm in result.arms.values():
        known = [(it.queue_s_p99, it) for it in arm.waits if it.queue_s_p99 is not None]
        if len(known) > 1:
            p99, worst = max(known, key=lambda pair: pair[0])
            least, _ = min(known, key=lambda pair: pair[0])
            sentences.append(
                f"{arm.name}: {worst.group} wait longest, p99 {fmt.seconds(p99)} and at most "
                f"{fmt.seconds(worst.queue_s_max or 0.0)}; the p99 of those who wait least is {fmt.seconds(least)}."
            )
        for it in arm.waits:
            times = (it.queue_s_p50, it.queue_s_p99, it.queue_s_max)
            shown = (num(fmt.NOTHING if time is None else fmt.seconds(time)) for time in times)
            rows.append([row_head(arm.name), it.group, num(f"{it.requests:,}"), *shown, num(f"{it.never_scheduled:,}")])
    if not rows:
        return None
    numbers = ("requests", "queue p50", "queue p99", "longest", "never scheduled")
    heads = ["arm", "requests with", *(num(name, head=True) for name in numbers)]
    return section("waits", "Who waits", (tag("p", sentence) for sentence in sentences), table(heads, rows))


_OF_NOISE = (
    "Measured is the mean of the passes; noise: how far two measurements of the same lie apart, the root of the mean "
    "square over all pairs."
)
_OF_PACE = (
    " At its pace: the simulation with decodes and prompts each as much longer as one and the same step of that kind "
    "took then, over its time beside the profile; what is served has no part in that."
)


def _fidelity(result: ExperimentResult) -> Html | None:
    """A table for each part of a comparison with a measured run."""
    found = result.fidelity
    if found is None:
        return None
    heads: list[Inside] = ["figure", num("measured", head=True), num("simulated", head=True), "unit"]
    extra = ["difference", *(["at its pace"] if found.paced else []), *(["noise"] if found.repeated else [])]
    heads += [num(name, head=True) for name in extra]
    parts: list[Html] = []
    for part, compared in found.parts:
        rows = []
        for it in compared:
            cells = [num(fmt.compared(it.difference, "+.2%"))]
            cells += [num(fmt.compared(it.paced_difference, "+.2%"))] if found.paced else []
            cells += [num(fmt.compared(it.noise, ".2%"))] if found.repeated else []
            both = num(fmt.compared(it.measured)), num(fmt.compared(it.simulated))
            rows.append([row_head(it.name), *both, it.unit, *cells])
        parts.append(details(part, table(heads, rows), opened=not parts))
    note = tag("p", _OF_NOISE + (_OF_PACE if found.paced else ""), cls="footnote") if found.repeated else None
    return section("fidelity", "Measured beside simulated", parts, note, terms(found.terms))


def _published(result: ExperimentResult) -> Html | None:
    if not result.published:
        return None
    rows = []
    for p in result.published:
        interval = "" if p.low is None or p.high is None else f"[{fmt.number(p.low)}, {fmt.number(p.high)}]"
        ours = fmt.NOTHING if p.ours is None else fmt.in_unit(p.ours, p.unit)
        inputs = (
            tag("span", badge(kind.value), " ", name, cls="sub", style="white-space:nowrap") for name, kind in p.inputs
        )
        rows.append([
            row_head(p.what, sub(p.condition), sub(p.source), style="white-space:normal"),
            num(fmt.in_unit(p.published, p.unit)), num(ours, sub(interval, interval=True)), p.remark,
            tag("td", inputs),
        ])  # fmt: skip
    heads = ["figure", num("published", head=True), num("this run", head=True), "follows?", "inputs"]
    return section("published", "Beside the published figures", table(heads, rows))


def _gates(result: ExperimentResult) -> Html | None:
    rows = [
        [gate.name, num(fmt.gate_value(gate.value, gate.bound)), gate.bound,
         tag("td", badge("passed" if gate.passed else "failed"))]
        for gate in result.gates
    ]  # fmt: skip
    heads = ["gate", num("value", head=True), "bound", "verdict"]
    return section("gates", "Gates", table(heads, rows)) if rows else None


def _figures(drawings: Sequence[Drawing]) -> Html | None:
    shown = [("\n", figure(d.name, d.title, to_svg(d), d.caption)) for d in drawings]
    return section("figures", "Figures", shown) if shown else None


def _decisions(result: ExperimentResult) -> Html | None:
    logs = [_decision_log(arm) for arm in result.arms.values() if len(arm.decisions) > 1]
    about = (
        "Every decision of the policies in the first seed: when, on what cause, what was decided and on what evidence. "
        "All of them are in ", tag("code", "decisions.parquet"), ".",
    )  # fmt: skip
    return section("decisions", "Decision log", tag("p", about), logs) if logs else None


def _decision_log(arm: ArmResult) -> Html:
    rows = decision_rows(arm)
    shown = rows[:SHOWN_DECISIONS]
    any_standby, any_replica = any(row.standby for row in shown), any(row.replica for row in shown)
    heads: list[Inside] = [num("time", head=True), *([num("replica", head=True)] if any_replica else [])]
    heads += ["cause", "decided", *(["standby"] if any_standby else []), "reason", "evidence"]
    body = []
    for row in shown:
        decided = tag("span", f"{row.model}, {row.layers} layers", style="white-space:nowrap"), sub(row.exit_rule)
        body.append([
            num(f"{row.time_s:.3f} s"), *([num(row.replica)] if any_replica else []), row.cause, tag("td", decided),
            *([row.standby] if any_standby else []), row.reason, _evidence(row),
        ])  # fmt: skip
    total = f"{len(rows)} decisions" + (f", the first {len(shown)} shown" if len(rows) > len(shown) else "")
    return details(joined([arm.name, " ", count(total)]), table(heads, body), opened=len(shown) <= 12)


def _evidence(row: DecisionRow) -> Html:
    text = row.evidence_text
    if len(text) > _LONG_EVIDENCE:
        return tag("td", details(f"{text[: _LONG_EVIDENCE - 20]}…", tag("pre", row.evidence_json)), cls="evidence")
    return tag("td", text, cls="evidence")


def _front(result: DesignsResult, names: Sequence[str]) -> Html | None:
    distinct = result.distinct_front
    front = thinned(distinct, MOST_ON_PAGE)
    if not front:
        return None
    rows = [_design_row(design, row_head(design_label(design, alike)), names) for design, alike in front]
    for it in result.references:
        head = row_head(it.name, sub("as it was set" if it.name == result.arm else None))
        cells = [head, *(tag("td") for _ in result.parameters), *map(num, metric_cells(it, names))]
        rows.append(line(cells, cls="baseline"))
    some = f"; {len(front)} of {len(distinct)} rows are shown" if len(distinct) > len(front) else ""
    note = tag(
        "p", f"{len(result.front):,} of {len(result.designs):,} designs; those that come to the same in every ",
        f"objective share a row{some}. All designs, with every metric, are in ", tag("code", "designs.parquet"),
        ". Grey rows are arms at the study's own settings.", cls="footnote",
    )  # fmt: skip
    heads = ["design", *(num(name, head=True) for name in (*result.parameters, *map(fmt.label, names)))]
    return section("front", "Designs that no other beats", table(heads, rows), note)


def _design_row(design: Design, head: Html, names: Sequence[str]) -> Html:
    return line([head, *map(num, map(value_text, design.parameters.values())), *map(num, metric_cells(design, names))])


def _failed(result: DesignsResult) -> Html | None:
    rows = [
        [row_head(it.name), *(num(value_text(value)) for value in it.parameters.values()), it.error]
        for it in result.failed[:MOST_ON_PAGE]
    ]
    heads = ["design", *(num(name, head=True) for name in result.parameters), "why"]
    return section("failed", "Designs that failed", table(heads, rows)) if rows else None


def _workload(heading: str, result: ExperimentResult | DesignsResult) -> Html:
    workload = result.workload
    facts: list[tuple[Inside, Inside]] = [("requests", f"{workload.requests:,}")]
    if workload.offered_requests_per_s:
        facts.append(("offered load", f"{workload.offered_requests_per_s:.4g} requests/s"))
    return section("workload", heading, tag("p", workload.statement), terms([*facts, *workload.facts]))


_OF_ASSUMPTIONS = joined((
    "These have no source. A setting changes those of the runtime and the exits; ", tag("code", "profile"), ", ",
    tag("code", "model"), " and ", tag("code", "hardware"), " stand for entries of the profile's ",
    tag("code", "profile.json"), ", in a folder named by ", tag("code", "profile_folder"), "; ", tag("code", "rebuild"),
    " means that other constants need another profile.",
))  # fmt: skip


def _assumptions(result: ExperimentResult | DesignsResult, about: Html | None) -> Html | None:
    rows = [
        [a.name, num(fmt.NOTHING if a.value is None else a.value), a.why, tag("td", tag("code", a.change))]
        for a in result.all_assumptions
    ]
    heads = ["quantity", num("value", head=True), "why this value", "change it with"]
    text = tag("p", about) if about else None
    return section("assumptions", "Costs that were not measured", text, table(heads, rows)) if rows else None


def _provenance(
    result: ExperimentResult | DesignsResult, definitions: str, names: Sequence[str], notes: Sequence[str]
) -> Html:
    inputs = [
        [row_head(name), tag("td", badge(p.provenance_class.value)), tag("td", p.source, map(sub, p.scaled)),
         tag("td", tag("code", p.command))]
        for name, p in result.inputs.items()
    ]  # fmt: skip
    run = tag("pre", to_json(json_value(result.provenance), indent=2))
    meanings = [[tag("td", tag("code", name)), DEFINITIONS[name].meaning] for name in names]
    return section(
        "provenance", "Where the numbers come from",
        table(["input", "class", "source", "made by"], inputs) if inputs else None,
        details("This run", tag("div", run, cls="inside")),
        details(definitions, tag("div", (tag("p", note) for note in notes), cls="inside"), table([], meanings)),
    )  # fmt: skip
