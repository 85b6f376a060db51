"""All measurements of one model on one device in order of worth, within a budget. Knows the order, not how.

A folder holds what was found: points.parquet (every sample), and a JSON file for each finished part. The same call with
the same folder goes on where the last one stopped. After the coarse grids and the small parts, which take about a
minute, there is a whole profile; what follows refines it, takes more samples and tries it on whole iterations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from calibrate import whole
from calibrate.anchors import anchor_places
from calibrate.build_profile import Measured, build_profile
from calibrate.ceilings import Ceilings, measure_ceilings
from calibrate.device import Device
from calibrate.drift import Drift
from calibrate.energy import Energy, measure_energy, why_absent
from calibrate.grid import HeldOut, errors, interpolate
from calibrate.host import HostCosts, measure_host
from calibrate.latency import DECODE, DENSE, HEAD, PREFILL, Grids, Latency, grids_from_json, grids_to_json
from calibrate.load import Loads, measure_loads
from calibrate.memory import Memory, measure_memory
from calibrate.parts import Parts
from calibrate.points import Points
from calibrate.report_floor import below_floor, over_floor
from calibrate.sampling import Clock, Sampler
from calibrate.serving import ServingCosts, measure_serving
from calibrate.subject import Subject
from helios_sim.errors import UserError
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import ModelSpec
from helios_sim.provenance import Assumption

COARSE_SAMPLES = 1
REFINE_SAMPLES = 3
KEEP_FOR_REST = 0.5  # of the budget: more samples and whole iterations
FIT, TRY = 1, 2  # seeds: iterations that give the factors, and those that try the profile
WHOLE_EACH = 8  # iterations of each kind
KEEP_FOR_LONG = 0.35  # of the budget: for what is not a decode
KEEP_FOR_WHOLE = 0.12  # of the budget, for whole iterations
TOLERATED = 0.03  # median error of whole iterations that is not mentioned among the assumptions
UNLIMITED_S = 1e9


@dataclass(frozen=True, slots=True)
class Plan:
    """How good is good enough."""

    budget_s: float | None = None
    samples: int = 5  # of every point of the tables
    tolerance: float = 0.03  # interpolation error above which a grid is refined
    seed: int = 0


@dataclass(frozen=True, slots=True)
class About:
    """What the measurements alone do not tell."""

    spec: ModelSpec
    command: str
    date: str
    weights: str  # identity of the weights, since a folder holds those of one model
    details: Mapping[str, Any]  # for the provenance: comparison of dtypes, versions of files


def measure_profile(
    subject: Subject,
    about: About,
    folder: Path,
    plan: Plan,
    *,
    loaded_bytes: int | None = None,
    reload: Callable[[], int] | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> Profile:
    """Measures what is missing in `folder` and builds the profile.

    `loaded_bytes`: how much memory grew when the model was loaded. `reload` reads one layer anew and returns its bytes.
    Raises UserError when the budget does not suffice for the coarse tables; what was measured is kept.
    """
    import torch

    with torch.no_grad():  # not inference mode: its tensors may not be copied into by another thread
        return _Campaign(subject, about, folder, plan, progress).run(loaded_bytes, reload)


class _Campaign:
    def __init__(
        self,
        subject: Subject,
        about: About,
        folder: Path,
        plan: Plan,
        progress: Callable[[str, float], None] | None,
    ) -> None:
        self.subject, self.about, self.plan, self.device = subject, about, plan, subject.device
        dtype = str(subject.model.dtype).removeprefix("torch.")
        settings = {
            "model": about.spec.name, "weights": about.weights, "layers": subject.n_layers, "dtype": dtype,
            "device": self.device.facts.name, "limits": asdict(subject.limits),
            "memory_bytes": self.device.facts.memory_bytes, "samples": "at two paces",
        }  # fmt: skip
        self.dtype = dtype
        self.parts = Parts(folder, settings)
        self.budget_s = UNLIMITED_S if plan.budget_s is None else plan.budget_s
        clock = Clock(self.budget_s)
        self.sampler = Sampler(self.device, Points(folder / "points.parquet"), clock, seed=plan.seed, progress=progress)
        self.latency = Latency(subject, self.sampler)
        self.drift = Drift(self.parts, self.sampler, self.device)

    def run(self, loaded_bytes: int | None, reload: Callable[[], int] | None) -> Profile:
        ceilings = Ceilings.from_json(
            self.parts.made("ceilings", lambda: measure_ceilings(self.device, self.dtype).to_json())
        )
        self.sampler.reference_s = self.parts.made("reference", self.sampler.typical_anchors_s)
        state = self.parts.get("grids")
        grids = self.latency.coarse() if state is None else grids_from_json(state["grids"])
        refined: list[str] = [] if state is None else state["refined"]
        if not self.latency.measure(grids, COARSE_SAMPLES) and not self.latency.known(grids):
            self.drift.note()
            raise UserError(
                "budget_s", self.plan.budget_s, "it does not suffice for the coarse tables; what was measured is kept",
                "call again with the same folder, or allow more",
            )  # fmt: skip
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
        # Decodes are what is served most, their attention is a small difference, and they are quick to time.
        decodes = self.latency.decode_jobs(grids)
        self.sampler.measure(decodes, REFINE_SAMPLES, self.budget_s * KEEP_FOR_LONG, more=True)
        self.latency.measure(grids, REFINE_SAMPLES, self.budget_s * KEEP_FOR_WHOLE, more=True)
        self.sampler.measure(whole_jobs, REFINE_SAMPLES)
        self.latency.measure(grids, self.plan.samples, more=True)
        self.drift.note()
        return self._profile(grids, measured, fit, tries)

    def _order(self) -> list[str]:
        """Tables by what they are worth."""
        return [DENSE, DECODE, PREFILL, HEAD, *(t for t in self.latency.row_tables if t not in (DENSE, HEAD))]

    def _left(self, keep_share: float) -> float:
        return self.sampler.clock.left_s - keep_share * self.budget_s

    def _measured(self, ceilings: Ceilings, loaded_bytes: int | None, reload: Callable[[], int] | None) -> Measured:
        subject, made, device = self.subject, self.parts.made, self.device
        host = made("host", lambda: measure_host(subject).to_json())
        serving = made("serving", lambda: measure_serving(subject, self.about.spec, ceilings).to_json())
        memory = made("memory", lambda: measure_memory(subject, self.about.spec, loaded_bytes).to_json())
        loads = made("load", lambda: measure_loads(subject, reload).to_json())
        energy = made("energy", partial(self._energy, device))
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

    def _energy(self, device: Device) -> dict[str, Any]:
        subject, limits = self.subject, self.subject.limits
        steps = {}
        for batch in limits.few_batches:
            kv = max(1, min(limits.max_kv_tokens // 4, subject.pool_tokens // batch))
            step, hidden = subject.decode_step([kv] * batch), subject.hidden(batch)
            steps[f"decode, batch {batch}, {kv} KV tokens"] = partial(
                subject.model.run, hidden, 0, subject.n_layers, step
            )
        prompt, hidden = subject.prompt_step(limits.max_chunk, 0), subject.hidden(limits.max_chunk)
        steps[f"prefill, {limits.max_chunk} tokens"] = partial(subject.model.run, hidden, 0, subject.n_layers, prompt)
        found = measure_energy(device, steps)
        return {
            "found": None if found is None else found.to_json(),
            "absent": why_absent(device) if found is None else None,
        }

    def _iterations(self, kinds: tuple[str, ...], seed: int) -> list[whole.Iteration]:
        """Kinds take turns, so that a budget that ends early leaves some of each."""
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
        # from the first second's pace to that of the whole time, at which all anchors were looked at together
        points.rescale({name: step_s / reference_s[name] for name, step_s in typical_s.items()})
        bare = build_profile(self.about.spec, self.latency, grids, measured)
        fitted = _positive(whole.fitted_mixed_factor(bare, points, fit))
        profile = whole.with_mixed_factor(bare, fitted, lambda tried: whole.compare(tried, points, tries))
        too_fast = below_floor(over_floor(profile, measured.ceilings))
        tried = whole.summary(whole.compare(profile, points, tries))
        details = {
            **self.about.details,
            "interpolation": {table: _errors(self._held_out(grids, table)) for table in grids.axes},
            "fitted_mixed_factor": fitted,
            "whole_iterations": tried,
            "whole_iterations_without_factors": whole.summary(whole.compare(bare, points, tries)),
            "below_floor": [f"{e.table} {e.place}: {e.time_s:.3g} s, floor {e.floor_s:.3g} s" for e in too_fast],
            "samples": self._sampling(),
            "pace": {
                name: {"rows": rows, "kv_tokens": kv_tokens, "layer_s": typical_s[name] / self.subject.n_layers}
                for name, (rows, kv_tokens) in anchor_places(self.subject).items()
                if name in typical_s
            },
        }
        provenance = profile.provenance
        provenance = replace(
            provenance,
            details={**provenance.details, **details},
            assumptions=(*provenance.assumptions, *_off(tried)),
        )
        return replace(profile, provenance=provenance)

    def _held_out(self, grids: Grids, table: str) -> list[HeldOut]:
        """With the samples that there are now."""
        axes, latency = grids.axes[table], self.latency
        known = {place: latency.time_s(table, place) for place in axes.places()}
        return [
            HeldOut(
                h.place,
                latency.time_s(table, h.place),
                interpolate(axes, known, h.place),
                latency.scale_s(table, h.place),
            )
            for h in grids.held_out.get(table, ())
        ]

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


def _off(tried: Mapping[str, Mapping[str, float | int]]) -> tuple[Assumption, ...]:
    """What every report should print where whole iterations are not priced right in the median."""
    if "all" not in tried or abs(tried["all"]["median"]) <= TOLERATED:
        return ()
    why = (
        f"median of (priced - measured) / measured over {tried['all']['iterations']} random whole iterations; parts "
        "and wholes were measured minutes apart, so this may be the machine's pace (details: samples.anchors) or the "
        "model"
    )
    return (Assumption("whole_iteration_error", round(tried["all"]["median"], 4), why, "measure again, for longer"),)


def _positive(factor: float | None) -> float | None:
    """None where noise was larger than what was to be found."""
    return factor if factor is not None and factor > 0 else None


def _errors(held_out: list[HeldOut]) -> dict[str, Any] | None:
    """None where nothing was held out."""
    if not held_out:
        return None
    found = np.abs(errors(held_out))
    return {
        "held_out": len(found),
        "median_absolute": float(np.median(found)),
        "p90_absolute": float(np.quantile(found, 0.9)),
        "largest": float(found.max()),
    }
