"""Measures everything that a profile of one model on one device needs, within a budget, and resumes it.

The folder holds points.parquet (every sample) and a JSON file for each finished part (`SavedParts`). A call with the
same folder continues where the last one stopped. The coarse grids and the small parts take about a minute and give a
whole profile. The rest of the time refines it, takes more samples and tests it on whole iterations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibrate.drafts import kept
from calibrate.measure import whole
from calibrate.measure.build_profile import Measured, build_profile
from calibrate.measure.ceilings import Ceilings, below_floor, measure_ceilings, over_floor
from calibrate.measure.device import Energy, Step, TimedDevice, measure_energy, why_absent
from calibrate.measure.grid import HeldOut, Place, errors, interpolate
from calibrate.measure.host import HostCosts, ServingCosts, measure_host, measure_serving
from calibrate.measure.latency import (
    DECODE,
    DENSE,
    HEAD,
    PREFILL,
    Grids,
    Latency,
    anchor_places,
    grids_from_json,
    grids_to_json,
)
from calibrate.measure.memory import (
    Loads,
    Memory,
    loads_by_ceilings,
    measure_loads,
    measure_memory,
    predicted_memory,
)
from calibrate.measure.sampling import Clock, Points, Sampler
from calibrate.measure.subject import Subject
from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Anchor, Anchors, ModelSpec
from helios_sim.provenance import Assumption
from helios_sim.untrusted import parse_json

PART = "drift"
COARSE_SAMPLES = 1
REFINE_SAMPLES = 3
KEEP_FOR_REST = 0.5  # share of the budget for more samples and whole iterations
WHOLE_EACH = 8  # iterations of each kind
KEEP_FOR_LONG = 0.35  # share of the budget for everything but decodes
KEEP_FOR_WHOLE = 0.12  # share of the budget for whole iterations
TOLERATED = 0.03  # a larger median error of whole iterations is listed among the assumptions
UNLIMITED_S = 1e9
# With a budget, times of parts are estimated from the anchors' times:
REFERENCE_SHARE = 0.04  # of the time, for the first laps of the anchors
SKETCHES = (1.0, 0.5, 0.25, 0.125)  # shares of the limits at which tables may end
SKETCH_SHARE = 0.5  # of the time, for the ends of the tables
VISIT_LAPS, VISIT_S = 6, 0.1  # cost of a brief visit: laps of its step, and seconds to make it
PART_SHARE = 0.15  # of the time, for one of the small parts
HOST_LAPS, SERVING_LAPS, MEMORY_LAPS, LOAD_LAPS = 60, 90, 12, 30  # times of small parts, in laps of an anchor
LOADS_S, ENERGY_S = 8.0, 60.0
ENERGY_ELSEWHERE = "it is measured once for the device, in a stage of its own"
BRIEF, BRIEF_REPEATS = "brief", 3
ENOUGH_TO_JUDGE = 5  # places or iterations, to estimate the error of times
UNJUDGED, BY_ENDS_WITHIN, LEAST_WITHIN = 0.5, 0.15, 0.05  # least assumed errors of times
FIT, TRY = 1, 2  # seeds of the iterations that fit the factor, and of those that test the profile


class SavedParts:
    """Finished parts as JSON files in a folder, each written atomically.

    All parts depend on `settings`. A folder with parts under other settings is refused with a UserError.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        plain = json.loads(json.dumps(settings))
        found = self.get("settings")
        differing = [] if found is None else sorted(key for key in plain if found.get(key) != plain[key])
        if differing:
            raise UserError(
                "folder", str(folder), f"it holds measurements under another {', '.join(differing)}",
                "name another folder, or delete this one",
            )  # fmt: skip
        self.put("settings", plain)

    def get(self, name: str) -> Any | None:
        """The part; None if it is missing, or was damaged and is removed."""
        return kept(self.folder / f"{name}.json", lambda path: parse_json(path.read_text(encoding="utf-8")))

    def put(self, name: str, value: Any) -> None:
        files.write_text(self.folder / f"{name}.json", files.to_json(value, indent=1) + "\n")

    def made(self, name: str, make: Callable[[], Any]) -> Any:
        """The part, made now if it is missing."""
        found = self.get(name)
        if found is None:
            self.put(name, make())
            found = self.get(name)
        return found


class Drift:
    """How the machine's pace moved while it was measured, with one entry per call in the folder's parts."""

    def __init__(self, parts: SavedParts, sampler: Sampler, device: TimedDevice) -> None:
        self._parts, self._sampler, self._device = parts, sampler, device
        self._earlier: list[dict[str, Any]] = parts.get(PART) or []

    def note(self) -> None:
        """Update this call's entry."""
        now = {
            "anchors": self._sampler.drift(),
            "contended": sum(self._sampler.contended.values()),
            "disturbance": self._device.disturbance(),
        }
        self._parts.put(PART, [*self._earlier, now])

    @property
    def set_aside(self) -> int:
        """The number of samples taken while other processes had the cores."""
        return sum(call["contended"] for call in self._calls())

    @property
    def anchors(self) -> list[dict[str, dict[str, float]]]:
        return [call["anchors"] for call in self._calls()]

    def typical_s(self) -> dict[str, float]:
        """The median seconds of each anchor, averaged over all calls by the number of measurements."""
        found = {}
        for name in dict.fromkeys(name for call in self.anchors for name in call):
            known = [call[name] for call in self.anchors if name in call]
            counts = [anchor["measurements"] for anchor in known]
            found[name] = float(np.average([anchor["median_s"] for anchor in known], weights=counts))
        return found

    def _calls(self) -> list[dict[str, Any]]:
        return self._parts.get(PART) or []


@dataclass(frozen=True, slots=True)
class MeasurePlan:
    """The budget and the required precision."""

    budget_s: float | None = None
    most_s: float | None = None  # limit for the parts without which there is no profile; None: the budget
    samples: int = 5  # samples of every point of the tables
    tolerance: float = 0.03  # a grid is refined if its interpolation error is larger
    seed: int = 0
    energy: bool = True  # false if it is measured once for the device, elsewhere


@dataclass(frozen=True, slots=True)
class ProfileOrigin:
    """What the profile records besides the measurements."""

    spec: ModelSpec
    command: str
    date: str
    weights: str  # identity of the weights: a folder holds measurements of one model
    details: Mapping[str, Any]  # further entries for the provenance


def measure_profile(
    subject: Subject,
    about: ProfileOrigin,
    folder: Path,
    plan: MeasurePlan,
    *,
    loaded_bytes: int | None = None,
    reload: Callable[[], int] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Profile:
    """Measure what is missing in `folder` and build the profile.

    With a budget, the ends of every table come first, then coarse tables. Small parts that would take too much of the
    budget are measured briefly or assumed; `details["short"]` of the profile's provenance lists these gaps.

    `loaded_bytes`: by how much memory grew when the model was loaded. `reload` reads one layer again and returns its
    bytes. Raises BudgetSpent if the time does not suffice for the ends of the tables; what was measured is kept.
    """
    import torch

    with torch.no_grad():  # not inference mode: another thread could not copy into its tensors
        return _Campaign(subject, about, folder, plan, progress).run(loaded_bytes, reload)


class BudgetSpent(UserError):
    """There was not enough time for a profile; the measurements are kept."""


class _Campaign:
    def __init__(
        self,
        subject: Subject,
        about: ProfileOrigin,
        folder: Path,
        plan: MeasurePlan,
        progress: Callable[[str, float], None] | None,
    ) -> None:
        self.subject, self.about, self.plan, self.device = subject, about, plan, subject.device
        dtype = str(subject.model.dtype).removeprefix("torch.")
        settings = {
            "model": about.spec.name, "weights": about.weights, "layers": subject.n_layers, "dtype": dtype,
            "device": self.device.facts.name, "limits": asdict(subject.limits), "samples": "at two paces",
        }  # fmt: skip
        self.dtype = dtype
        self.parts = SavedParts(folder, settings)
        self.hurried = plan.budget_s is not None
        self.budget_s = UNLIMITED_S if plan.budget_s is None else plan.budget_s
        # parts without which there is no profile may overdraw the budget by this
        self.overdraft_s = 0.0 if plan.most_s is None else max(0.0, plan.most_s - self.budget_s)
        clock = Clock(self.budget_s)
        self.brief: list[str] = []  # parts that were measured briefly, or assumed
        self.sampler = Sampler(self.device, Points(folder / "points.parquet"), clock, seed=plan.seed, progress=progress)
        self.latency = Latency(subject, self.sampler)
        self.drift = Drift(self.parts, self.sampler, self.device)

    def run(self, loaded_bytes: int | None, reload: Callable[[], int] | None) -> Profile:
        ceilings = Ceilings.from_json(
            self.parts.made("ceilings", lambda: measure_ceilings(self.device, self.dtype).to_json())
        )
        within_s = REFERENCE_SHARE * self._most_s if self.hurried else np.inf
        reference = partial(self.sampler.typical_anchors_s, within_s)
        self.sampler.reference_s = self.parts.made("reference", reference)
        state = self.parts.get("grids")
        refined: list[str] = [] if state is None else state["refined"]
        if state is not None:
            grids = grids_from_json(state["grids"])
            self.latency.measure(grids, COARSE_SAMPLES)
            measured = self._measured(ceilings, loaded_bytes, reload)
            grids = self._coarse(grids)
        elif self.hurried:
            sketch = self._sketched()
            measured = self._measured(ceilings, loaded_bytes, reload)
            grids = self._coarse(sketch)
        else:
            grids = self.latency.coarse()
            self.latency.measure(grids, COARSE_SAMPLES)
            measured = self._measured(ceilings, loaded_bytes, reload)
        self.drift.note()
        for table in self._order():
            if table not in refined and self._left(KEEP_FOR_REST) > 0:
                keep_s = self.budget_s * KEEP_FOR_REST
                grids = self.latency.refine(grids, table, REFINE_SAMPLES, self.plan.tolerance, keep_s)
                if self._left(KEEP_FOR_REST) > 0:
                    refined.append(table)
                self.parts.put("grids", {"grids": grids_to_json(grids), "refined": refined})
        fit = self._iterations((whole.FITTED,), FIT)
        tries = self._iterations(whole.KINDS, TRY)
        whole_jobs = [whole.job(self.subject, it) for it in [*tries, *fit]]
        # Decodes come first: they are served most, their attention is a small difference, and they are quick to time.
        decodes = self.latency.decode_jobs(grids)
        self.sampler.measure(decodes, REFINE_SAMPLES, self.budget_s * KEEP_FOR_LONG, more=True)
        self.latency.measure(grids, REFINE_SAMPLES, self.budget_s * KEEP_FOR_WHOLE, more=True)
        self.sampler.measure(whole_jobs, REFINE_SAMPLES)
        self.latency.measure(grids, self.plan.samples, more=True)
        self.drift.note()
        return self._profile(grids, measured, fit, tries)

    @property
    def _most_s(self) -> float:
        """Seconds that are left for the parts without which there is no profile."""
        return self.sampler.clock.left_s + self.overdraft_s

    def _sketched(self) -> Grids:
        """Measure the ends of every table once; with too little time, tables end at a share of the limits.

        Raises BudgetSpent as soon as it is known that there is not enough time for the smallest share.
        """
        if (kept := self.parts.get("sketch")) is not None:
            sketch = grids_from_json(kept)
        else:
            costs_s = {share: self._sketch_s(self.latency.sketch(share)) for share in SKETCHES}
            fits = [share for share, cost_s in costs_s.items() if cost_s <= SKETCH_SHARE * self._most_s]
            if not fits and costs_s[SKETCHES[-1]] > self._most_s:
                raise self._spent(f"the least takes about {costs_s[SKETCHES[-1]]:.0f} s")
            sketch = self.latency.sketch(fits[0] if fits else SKETCHES[-1])
            self.parts.put("sketch", grids_to_json(sketch))
        jobs = self.latency.sketch_jobs(sketch)
        if not self.sampler.sketch(jobs, -self.overdraft_s) and not self.latency.known(sketch):
            self.drift.note()
            there = sum(self.sampler.points.known(job.points[0]) for job in jobs)
            raise self._spent(f"{there} of {len(jobs)} times were taken")
        return sketch

    def _spent(self, how: str) -> BudgetSpent:
        allowed = f"it does not suffice for the ends of the tables: {how}; what was measured is kept"
        fix = "call again with the same folder, or allow more"
        return BudgetSpent("budget_s", self.plan.budget_s, allowed, fix)

    def _sketch_s(self, grids: Grids) -> float:
        """An estimate of the time of brief visits to all places, from the times of the anchors and rows near them."""
        (few, _), (many, _) = anchor_places(self.subject).values()
        few_s, many_s = self.sampler.reference_s.values()
        per_row_s = max(0.0, (many_s - few_s) / max(1, many - few))
        jobs = self.latency.sketch_jobs(grids)
        steps_s = [max(few_s, few_s + per_row_s * (job.points[0].first - few)) for job in jobs]
        return sum(VISIT_LAPS * step_s + VISIT_S for step_s in steps_s)

    def _coarse(self, grids: Grids) -> Grids:
        """Replace ends by coarse axes, in order of the tables' importance, as far as the time allows."""
        coarse, found = self.latency.coarse(), grids
        for table in self._order():
            alone = Grids({table: coarse.axes[table]}, {})
            if not self._by_ends(grids, table):
                continue
            if self.latency.measure(alone, COARSE_SAMPLES) or self.latency.known(alone):
                found = found.with_table(table, coarse.axes[table], ())
        return found

    def _by_ends(self, grids: Grids, table: str) -> bool:
        """Whether only the ends of the table's axes are measured, although its coarse axes have more points."""
        ends, more = (
            any(len(values) > 2 for values in of.axes[table].values) for of in (grids, self.latency.coarse())
        )
        return more and not ends

    def _part(self, name: str, make: Callable[[], Any], takes_s: float, brief: Callable[[], Any]) -> Any:
        """A finished part. It is measured briefly or assumed if it would take too much of the time that is left."""
        if not self.hurried or self.parts.get(name) is not None or takes_s <= PART_SHARE * self._most_s:
            return self.parts.made(name, make)
        self.brief.append(name)
        return self.parts.made(f"{name}_{BRIEF}", brief)

    def _order(self) -> list[str]:
        """The tables in order of importance."""
        return [DENSE, DECODE, PREFILL, HEAD, *(t for t in self.latency.row_tables if t not in (DENSE, HEAD))]

    def _left(self, keep_share: float) -> float:
        return self.sampler.clock.left_s - keep_share * self.budget_s

    def _measured(self, ceilings: Ceilings, loaded_bytes: int | None, reload: Callable[[], int] | None) -> Measured:
        subject, device, spec, part = self.subject, self.device, self.about.spec, self._part
        few_s, many_s = self.sampler.reference_s.values()
        host = part(
            "host", lambda: measure_host(subject).to_json(), HOST_LAPS * few_s,
            lambda: measure_host(subject, BRIEF_REPEATS, subject.limits.few_batches[:1]).to_json(),
        )  # fmt: skip
        serving = part(
            "serving", lambda: measure_serving(subject, spec, ceilings).to_json(), SERVING_LAPS * few_s,
            lambda: measure_serving(subject, spec, ceilings, BRIEF_REPEATS, subject.limits.few_batches[:1]).to_json(),
        )  # fmt: skip
        memory = part(
            "memory", lambda: measure_memory(subject, spec, loaded_bytes).to_json(), MEMORY_LAPS * many_s,
            lambda: predicted_memory(subject, spec, loaded_bytes).to_json(),
        )  # fmt: skip
        loads = part(
            "load", lambda: measure_loads(subject, reload).to_json(), LOADS_S + LOAD_LAPS * few_s,
            lambda: loads_by_ceilings(subject, ceilings).to_json(),
        )  # fmt: skip
        elsewhere: dict[str, Any] = {"found": None, "absent": ENERGY_ELSEWHERE}
        energy = elsewhere if not self.plan.energy else part(
            "energy", partial(self._energy, device), 0.0 if device.energy_j() is None else ENERGY_S,
            lambda: {"found": None, "absent": "there was no time to measure it"},
        )  # fmt: skip
        return Measured(
            facts=device.facts,
            ceilings=ceilings,
            host=HostCosts.from_json(host),
            serving=ServingCosts.from_json(serving),
            memory=Memory.from_json(memory),
            loads=Loads.from_json(loads),
            energy=None if energy["found"] is None else Energy.from_json(energy["found"]),
            energy_absent=energy["absent"],
            command=self.about.command,
            date=self.about.date,
        )

    def _energy(self, device: TimedDevice) -> dict[str, Any]:
        found = measure_energy(device, energy_steps(self.subject))
        return {
            "found": None if found is None else found.to_json(),
            "absent": why_absent(device) if found is None else None,
        }

    def _iterations(self, kinds: tuple[str, ...], seed: int) -> list[whole.Iteration]:
        """Iterations of all kinds in turns, so that a budget that ends early leaves some of each."""
        found = [it for kind in kinds for it in whole.iterations(self.subject, kind, WHOLE_EACH, seed)]
        return sorted(found, key=lambda it: it.index)

    def _profile(
        self,
        grids: Grids,
        measured: Measured,
        fit: list[whole.Iteration],
        tries: list[whole.Iteration],
    ) -> Profile:
        points, typical_s, reference_s = self.sampler.points, self.drift.typical_s(), self.sampler.reference_s
        # rescale from the pace of the first second to the typical pace of all anchors
        points.rescale({name: step_s / reference_s[name] for name, step_s in typical_s.items()})
        bare = build_profile(self.about.spec, self.latency, grids, measured)
        fitted = _positive(whole.fitted_mixed_factor(bare, points, fit))
        profile = whole.with_mixed_factor(bare, fitted, lambda tried: whole.compare(tried, points, tries))
        too_fast = below_floor(over_floor(profile, measured.ceilings))
        tried = whole.summary(whole.compare(profile, points, tries))
        short = self._short(grids, tried)
        details = {
            **self.about.details,
            "interpolation": {table: _errors(self._held_out(grids, table)) for table in grids.axes},
            "fitted_mixed_factor": fitted,
            "whole_iterations": tried,
            "whole_iterations_without_factors": whole.summary(whole.compare(bare, points, tries)),
            "below_floor": [f"{e.table} {e.place}: {e.time_s:.3g} s, floor {e.floor_s:.3g} s" for e in too_fast],
            "samples": self._sampling(),
            "short": short,
        }
        provenance = profile.provenance
        provenance = replace(
            provenance,
            details={**provenance.details, **details},
            assumptions=(*provenance.assumptions, *_off(tried), *self._assumed(short)),
        )
        anchors = {
            name: Anchor(rows, typical_s[name] / self.subject.n_layers, kv_tokens)
            for name, (rows, kv_tokens) in anchor_places(self.subject).items()
            if name in typical_s
        }
        within = None if short is None else float(short["within"])
        return replace(profile, provenance=provenance, anchors=Anchors(**anchors), times_within=within)

    def _held_out(self, grids: Grids, table: str) -> list[HeldOut]:
        """The held-out places with the current samples."""
        return self._missed(grids, table, [h.place for h in grids.held_out.get(table, ())])

    def _missed(self, grids: Grids, table: str, places: Sequence[Place]) -> list[HeldOut]:
        """The errors of the table at measured places that are not on its grid."""
        axes, latency = grids.axes[table], self.latency
        known = {place: latency.time_s(table, place) for place in axes.places()}
        return [
            HeldOut(place, latency.time_s(table, place), interpolate(axes, known, place), latency.scale_s(table, place))
            for place in places
        ]

    def _short(self, grids: Grids, tried: Mapping[str, Mapping[str, float | int]]) -> dict[str, Any] | None:
        """What the budget has cut short, and how far times of iterations may be off; None if nothing was cut short."""
        ends = sorted(table for table in grids.axes if self._by_ends(grids, table))
        if not ends and not self.brief:
            return None
        missed = [np.abs(errors(self._missed(grids, t, self.latency.off_axes(grids, t)))) for t in grids.axes]
        known = np.concatenate([m for m in missed if len(m)]) if any(map(len, missed)) else np.empty(0)
        whole_tried = tried.get("all")
        if whole_tried is not None and whole_tried["iterations"] >= ENOUGH_TO_JUDGE:
            within, basis = float(whole_tried["p90_absolute"]), f"{whole_tried['iterations']} whole iterations"
        elif len(known) >= ENOUGH_TO_JUDGE:
            within, basis = float(np.quantile(known, 0.9)), f"{len(known)} places between the ends of the tables"
        else:
            within, basis = UNJUDGED, "nothing was measured that could tell: a guess"
        figures = self.sampler.points.everything().values()
        spread = float(np.median([f.iqr_s / f.median_s for f in figures if f.median_s > 0]))
        moved = [anchor["iqr_over_median"] / 2 for call in self.drift.anchors for anchor in call.values()]
        least = BY_ENDS_WITHIN if ends else LEAST_WITHIN
        return {
            "within": round(max(within, spread, least, *moved), 3), "judged_by": basis,
            "by_ends_alone": ["all tables"] if len(ends) == len(grids.axes) else ends,
            "brief": self.brief, "disturbed": sum(f.samples for f in figures if f.contended),
            "samples": sum(f.samples for f in figures), "budget_s": self.plan.budget_s,
        }  # fmt: skip

    def _assumed(self, short: Mapping[str, Any] | None) -> tuple[Assumption, ...]:
        """The assumptions of a profile that was cut short."""
        if short is None:
            return ()
        again = "measure again, for longer"
        found = [Assumption("times_within", short["within"], in_words(short), again)]
        if "load" in short["brief"]:
            why = "not measured: half of the rate of copies in memory, and as much less bandwidth for iterations"
            found.append(Assumption("load_bytes_per_s", None, why, again))
        return tuple(found)

    def _sampling(self) -> dict[str, Any]:
        found = self.sampler.points.everything()
        return {
            "points": len(found),
            "samples": sum(f.samples for f in found.values()),
            "outliers": sum(f.outliers for f in found.values()),
            "contended": sum(f.samples for f in found.values() if f.contended),
            "set_aside": self.drift.set_aside,
            "iqr_over_median": float(np.median([f.iqr_s / f.median_s for f in found.values() if f.median_s > 0])),
            "anchors": self.drift.anchors,
        }


def energy_steps(subject: Subject) -> dict[str, Step]:
    """The iterations for which energy is measured: decodes of a few batches, and a prompt."""
    limits, model = subject.limits, subject.model
    steps: dict[str, Step] = {}
    for batch in limits.few_batches:
        kv = max(1, min(limits.max_kv_tokens // 4, subject.pool_tokens // batch))
        step, hidden = subject.decode_step([kv] * batch), subject.hidden(batch)
        steps[f"decode, batch {batch}, {kv} KV tokens"] = partial(model.run, hidden, 0, subject.n_layers, step)
    prompt, hidden = subject.prompt_step(limits.max_chunk, 0), subject.hidden(limits.max_chunk)
    steps[f"prefill, {limits.max_chunk} tokens"] = partial(model.run, hidden, 0, subject.n_layers, prompt)
    return steps


def in_words(short: Mapping[str, Any]) -> str:
    """A text about the gaps of a profile that was cut short, from its `details["short"]`."""
    parts = []
    if short["by_ends_alone"]:
        parts.append(f"known at their ends alone: {', '.join(t.replace('_', ' ') for t in short['by_ends_alone'])}")
    if short["brief"]:
        parts.append(f"briefly measured or assumed: {', '.join(short['brief'])}")
    if short["disturbed"]:
        parts.append(f"{short['disturbed']} of {short['samples']} samples were disturbed by other processes")
    return f"times within about {100 * short['within']:.0f} % ({short['judged_by']}); {'; '.join(parts)}"


def _off(tried: Mapping[str, Mapping[str, float | int]]) -> tuple[Assumption, ...]:
    """An assumption for reports if whole iterations are priced wrongly in the median."""
    if "all" not in tried or abs(tried["all"]["median"]) <= TOLERATED:
        return ()
    why = (
        f"median of (priced - measured) / measured over {tried['all']['iterations']} random whole iterations; parts "
        "and wholes were measured minutes apart, so this may be the machine's pace (details: samples.anchors) or the "
        "model"
    )
    return (Assumption("whole_iteration_error", round(tried["all"]["median"], 4), why, "measure again, for longer"),)


def _positive(factor: float | None) -> float | None:
    """The factor, or None if noise was larger than the effect."""
    return factor if factor is not None and factor > 0 else None


def _errors(held_out: list[HeldOut]) -> dict[str, Any] | None:
    """Statistics of the interpolation errors; None if nothing was held out."""
    if not held_out:
        return None
    found = np.abs(errors(held_out))
    return {
        "held_out": len(found),
        "median_absolute": float(np.median(found)),
        "p90_absolute": float(np.quantile(found, 0.9)),
        "largest": float(found.max()),
    }
