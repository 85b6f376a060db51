"""The page of a calibration: its sections, key numbers, verdict and warnings."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from calibrate.exits.before_after import verdict
from calibrate.exits.potential import Potential, sentences
from calibrate.exits.reliability import ExitStatistics
from calibrate.measure.ceilings import Ceilings
from calibrate.measure.profile import in_words
from calibrate.report.device import (
    device_section,
    energy_section,
    host_section,
    load_section,
    memory_section,
    times_section,
)
from calibrate.report.drafters import draft_sentences, drafts_section
from calibrate.report.exits import exit_sections
from calibrate.report.page import Highlight, Page, Section
from calibrate.report.potential import potential_section
from calibrate.report.trained import trained_section
from calibrate.schema import CalibrateConfig
from helios_sim.exits.trace import ExitTrace
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.provenance import weakest
from helios_sim.report import format as fmt

TOLERANCE = 0.03  # largest acceptable held-out interpolation error
ENOUGH_TOKENS = 1_000  # with fewer tokens of a task, its shares are uncertain


@dataclass(frozen=True, slots=True, eq=False)
class Results:
    """The results of the finished stages; None for a stage that is missing."""

    facts: Mapping[str, Any] | None
    ceilings: Ceilings | None
    profile: Profile | None
    trace: ExitTrace | None
    answers: ExitTrace | None
    others: tuple[ExitTrace, ...]  # traces of other models on the same text
    heads: Mapping[str, Any] | None  # header of the exit heads that were used
    left_out: Mapping[str, str]  # tasks without texts
    potential: Potential | None = None  # potential of the model's own exits on the chosen card
    own_exits: ExitTrace | None = None  # trace on which the potential is based
    card: Profile | None = None  # profile by which the potential is priced
    trained: Mapping[str, Any] | None = None  # result of the stage that trained the model for early exit
    joint: ExitTrace | None = None  # trace of answers with the drafters' predictions
    predictors: Mapping[str, Any] | None = None  # results of predictors by exit, on held-out texts


def make_page(
    config: CalibrateConfig, results: Results, use: Sequence[str], skipped: Mapping[str, str]
) -> tuple[Page, list[ExitStatistics]]:
    """The page, and the exit statistics shown on it."""
    sections: list[Section] = []
    statistics: list[ExitStatistics] = []
    if results.facts is not None and results.ceilings is not None:
        sections.append(device_section(results.facts, results.ceilings))
    if results.profile is not None and results.ceilings is not None:
        made = (
            times_section(results.profile, results.ceilings),
            host_section(results.profile),
            memory_section(results.profile),
            load_section(results.profile),
            energy_section(results.profile),
        )
        sections += [section for section in made if section is not None]
    if results.trace is not None:
        found, statistics = exit_sections(results.trace, results.others, config.threshold, results.heads)
        sections += found
    if results.potential is not None:
        sections.append(potential_section(results.potential))
    if results.trained is not None:
        sections.append(trained_section(results.trained))
    if results.joint is not None:
        sections.append(drafts_section(results.joint))
    if results.profile is not None or results.trace is not None or results.joint is not None:
        sections.append(_use_section(use, results))
    sections.append(_provenance_section(results))
    known = (results.profile, results.trace, results.own_exits, results.card, results.joint)
    inputs = [source.provenance for source in known if source is not None]
    where = "" if results.facts is None else f" on {results.facts['name']}"
    page = Page(
        title=f"{config.model.name}{where}",
        subtitle="What its layers, exit checks and loads cost there, and where its tokens could leave.",
        provenance_class=weakest([p.provenance_class for p in inputs]).value if inputs else None,
        verdict=_verdict(config, results, statistics),
        cards=_cards(results, statistics),
        warnings=_warnings(config, results, statistics, skipped),
        sections=sections,
    )
    return page, statistics


def _verdict(config: CalibrateConfig, results: Results, statistics: Sequence[ExitStatistics]) -> list[str]:
    found = []
    if results.profile is not None:
        step_s, floor_s = _decode_step(results.profile)
        found.append(
            f"One token of one request takes {fmt.seconds(step_s)} through all {results.profile.model.n_layers} "
            f"layers, {fmt.number(step_s / floor_s)} times what the device's own ceilings allow."
        )
        if (short := results.profile.provenance.details.get("short")) is not None:
            found.append(f"The time was short: {in_words(short)}.")
    if statistics:
        best = max(statistics, key=lambda s: _saved_at(s, 0.95))
        saved = _saved_at(best, 0.95)
        layers = best.exits[-1]
        if saved > 0:
            found.append(
                f"With per-token exits by {best.confidence.value}, {saved:.1f} of {layers} layers per token can be "
                "left out while 95 % of tokens stay what full depth gives, before the checks are paid for."
            )
        else:
            found.append("No threshold tried lets tokens leave early while 95 % of them stay what full depth gives.")
    if results.potential is not None:
        found += sentences(results.potential, config.model.name)
    if results.trained is not None:
        found += verdict(results.trained["compared"])
    if results.joint is not None:
        found += draft_sentences(results.joint)
    for depth, reached in (results.predictors or {}).items():
        found.append(
            f"A predictor at layer {depth} lets {reached['leaves']:.1%} of the tokens leave and changes "
            f"{reached['changed']:.1%}; it asks the head in vain for {reached['in_vain']:.1%}."
        )
    return found or ["Nothing that can be simulated from is finished yet."]


def _cards(results: Results, statistics: Sequence[ExitStatistics]) -> list[Highlight]:
    cards = []
    profile, ceilings = results.profile, results.ceilings
    if ceilings is not None:
        gbs = f"{fmt.number(ceilings.bytes_per_s / 1e9)} GB/s"
        rate = f"{fmt.number(ceilings.flops_per_s / 1e9)} GFLOP/s"
        cards.append(Highlight("ceilings", gbs, f"bandwidth; matrices in {ceilings.dtype}: {rate}"))
    if profile is not None:
        step_s, floor_s = _decode_step(profile)
        cards.append(
            Highlight("decode step, batch 1", fmt.seconds(step_s), f"{fmt.number(step_s / floor_s)} times its floor")
        )
        if (check := _check_layers(profile)) is not None:
            cards.append(Highlight("one exit check", f"{check[0]:.1f} layers", check[1]))
        errors = _held_out(profile)
        if errors:
            most = max(errors.values())
            cards.append(
                Highlight("held-out error", f"{100 * most:.1f} %", "median of the worst table, between grid points")
            )
    if statistics:
        s = statistics[0]
        mean = float(np.average([r.ece for r in s.reliability])) if s.reliability else 0.0
        cards.append(
            Highlight("calibration error", f"{mean:.3f}", f"mean ECE of {len(s.reliability)} exits, {s.confidence}")
        )
    return cards[:5]


def _warnings(
    config: CalibrateConfig, results: Results, statistics: Sequence[ExitStatistics], skipped: Mapping[str, str]
) -> list[str]:
    found = [f"The stage {stage} is not there: {why}." for stage, why in skipped.items()]
    if config.quick:
        found.append("quick=true: tiny shapes and few samples. These numbers try the command; they are worth little.")
    if results.profile is not None:
        details = results.profile.provenance.details
        if too_fast := details.get("below_floor"):
            found.append(f"{len(too_fast)} measured times lie below their floor: {'; '.join(too_fast[:3])}.")
        wide = {t: e for t, e in _held_out(results.profile).items() if e > TOLERANCE}
        if wide:
            tables = ", ".join(f"{table} {100 * error:.1f} %" for table, error in wide.items())
            found.append(f"The median held-out error is above {100 * TOLERANCE:.0f} %: {tables}.")
        if contended := (details.get("samples") or {}).get("contended"):
            found.append(f"{contended} samples were taken while others had the cores; more time gives better ones.")
    for s in statistics[:1]:
        few = [task for task, n in zip(s.trace.tasks, s.tokens, strict=True) if n < ENOUGH_TOKENS]
        if few:
            found.append(f"Fewer than {ENOUGH_TOKENS:,} tokens were traced of {', '.join(few)}.")
        if results.heads is None:
            found.append(
                "No exit heads belong to this model: its own norm and LM head were read at every exit. Their "
                "confidence is seldom worth much on a model not trained for it; task=adapters trains some."
            )
    if results.left_out:
        found.append(f"No texts of {', '.join(results.left_out)}: {next(iter(results.left_out.values()))}")
    return found


def _use_section(use: Sequence[str], results: Results) -> Section:
    if results.profile is None and results.joint is not None:
        text = ["The joint trace says which drafts are accepted; models outside the catalogue take profiles of theirs:"]
        return Section("use", "Simulate from this", text=text, commands=list(use))
    if not use:
        text = ["A profile is missing: call again with the same out and more time, and without task or with task=all."]
        return Section("use", "Simulate from this", text=text)
    text = ["The profile and the trace drive the simulator, which needs neither torch nor this model:"]
    if results.trace is None:
        text = ["The profile drives the simulator at full depth; exits need a trace (task=traces):"]
    return Section("use", "Simulate from this", text=text, commands=list(use))


def _provenance_section(results: Results) -> Section:
    sources = {
        "profile": results.profile,
        "trace": results.trace,
        "answers": results.answers,
        "joint trace": results.joint,
        "own exits": results.own_exits,
        "times on the card": results.card,
    }
    there = {name: source.provenance for name, source in sources.items() if source is not None}
    text = [f"{name}: {p.provenance_class.value}; {p.source}. Made by: {p.command}" for name, p in there.items()]
    for p in there.values():
        text += [f"Assumed: {a.name} = {a.value}: {a.why} (change it with {a.change})." for a in p.assumptions]
    details = [(f"Record of the {name}", json.dumps(p.to_json(), indent=1, default=str)) for name, p in there.items()]
    return Section("provenance", "Where the numbers come from", text=text, details=details)


def _decode_step(profile: Profile) -> tuple[float, float]:
    """(measured, floor) seconds of one decode step at batch 1 and a medium context, all layers."""
    context = int(profile.layer_tables[0].decode_attention.second[-1]) // 4 or 1
    step = Composition(
        bounds=(profile.model.n_layers,),
        decode_tokens=np.array([[1]]),
        decode_kv_tokens=np.array([[context]]),
        sampled_tokens=np.array([1]),
    )
    return float(profile.iteration_time_s(step)[0]), float(profile.iteration_floor_s(step)[0])


def _check_layers(profile: Profile) -> tuple[float, str] | None:
    """The cost of a check of one row in layers, with a note; the cheaper one if there are two."""
    layer_s = float(profile.layer_tables[0].dense.time_s[0])
    costs = {"through the LM head": profile.check, "by the classifier": profile.check_classifier}
    costs["by a predictor of a few words"] = profile.check_predictor
    known = {name: float(table.time_s[0]) / layer_s for name, table in costs.items() if table is not None}
    if not known or not layer_s:
        return None
    name = min(known, key=lambda n: known[n])
    others = "".join(f"; {other}: {value:.1f}" for other, value in known.items() if other != name)
    return known[name], f"{name}, batch 1{others}"


def _held_out(profile: Profile) -> dict[str, float]:
    """The median held-out error by table."""
    interpolation = profile.provenance.details.get("interpolation") or {}
    return {table: found["median_absolute"] for table, found in interpolation.items() if found}


def _saved_at(s: ExitStatistics, agreement: float) -> float:
    """Layers per token saved at the best tried threshold that keeps the agreement."""
    kept = [p.layers_per_token for p in s.sweep if p.agreement >= agreement]
    return s.exits[-1] - min(kept) if kept else 0.0
