"""Builds a profile from measurements: tables, limits, host costs, and the origin of each number."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from calibrate.measure.ceilings import Ceilings
from calibrate.measure.device import DeviceFacts, Energy
from calibrate.measure.grid import Axes, Place
from calibrate.measure.host import HostCosts, ServingCosts
from calibrate.measure.latency import (
    CHECK,
    CHECK_CLASSIFIER,
    CHECK_PREDICTOR,
    DECODE,
    DENSE,
    EMBEDDING,
    HEAD,
    KV_PROJECTION,
    PREFILL,
    Grids,
    Latency,
)
from calibrate.measure.memory import Loads, Memory
from helios_sim.profile.profile import Profile
from helios_sim.profile.runtimes import GRAPH_BATCH_SIZES
from helios_sim.profile.spec import Basis, CostSource, HardwareSpec, ModelSpec, Runtime, TimeBand
from helios_sim.profile.tables import GridTable, LayerTables, RowsTable
from helios_sim.provenance import Assumption, Provenance, ProvenanceClass

# A machine is not as fast tomorrow as while it was measured.
TIME_BAND = TimeBand(0.87, 1.14, "24 live runs lie within: experiments/fidelity_live")


@dataclass(frozen=True, slots=True)
class Measured:
    """Everything in a profile except the tables. `details` go into its provenance unchanged."""

    facts: DeviceFacts
    ceilings: Ceilings
    host: HostCosts
    serving: ServingCosts
    memory: Memory
    loads: Loads
    energy: Energy | None
    energy_absent: str | None  # why there is no energy
    command: str
    date: str
    details: Mapping[str, Any] = field(default_factory=dict)


def build_profile(spec: ModelSpec, latency: Latency, grids: Grids, measured: Measured) -> Profile:
    """Build the profile. Raises KeyError if a place of the grids was not measured.

    Factors are None until they are fitted on whole iterations.
    """
    tables = tuple(_layer(latency, grids, i) for i in range(len(latency.subject.classes)))
    classifier, predictor = (
        _rows(latency, table, grids.axes[table]) if table in grids.axes else None
        for table in (CHECK_CLASSIFIER, CHECK_PREDICTOR)
    )
    loads = measured.loads
    return Profile(
        model=spec, hardware=_hardware(measured), runtime=_runtime(latency, measured),
        provenance=_provenance(spec, latency, measured), layer_tables=tables,
        layer_class=latency.subject.layer_class, head=_rows(latency, HEAD, grids.axes[HEAD]),
        embedding=_rows(latency, EMBEDDING, grids.axes[EMBEDDING]), check=_rows(latency, CHECK, grids.axes[CHECK]),
        activation_reserve_bytes=measured.memory.activation_reserve_bytes,
        load_bytes_per_s=loads.engine_bytes_per_s, load_slowdown=loads.slowdown, check_classifier=classifier,
        check_predictor=predictor,
        disk_bytes_per_s=loads.checkpoint_bytes_per_s,
        padded_kv=not latency.subject.model.kernels.any_lengths,  # by definition: `KvCache.decode_step`
        time_band=TIME_BAND,
    )  # fmt: skip


def _layer(latency: Latency, grids: Grids, layer_class: int) -> LayerTables:
    return LayerTables(
        dense=_rows(latency, DENSE, grids.axes[DENSE]),
        kv_projection=_rows(latency, KV_PROJECTION, grids.axes[KV_PROJECTION]),
        decode_attention=_grid(latency, DECODE, layer_class, grids.axes[DECODE]),
        prefill_attention=_grid(latency, PREFILL, layer_class, grids.axes[PREFILL]),
    )


def _rows(latency: Latency, table: str, axes: Axes) -> RowsTable:
    (rows,) = axes.values
    figures = [latency.rows_figure(table, r) for r in rows]
    return RowsTable(
        np.array(rows, dtype=np.int64),
        np.array([f.median_s for f in figures]),
        np.array([f.iqr_s for f in figures]),
        np.array([f.samples for f in figures], dtype=np.int64),
    )


def _grid(latency: Latency, table: str, layer_class: int, axes: Axes) -> GridTable:
    """An attention table. Places that do not fit into memory are scaled by the batch and have 0 samples."""
    shape = tuple(len(v) for v in axes.values)
    places: list[Place] = axes.places()
    known = latency.points.of(table, layer_class)
    figures = [known.get((p[0], p[1])) for p in places]
    first, second = (np.array(v, dtype=np.int64) for v in axes.values)
    return GridTable(
        first,
        second,
        np.array([latency.attention_s(table, layer_class, p) for p in places]).reshape(shape),
        np.array([0.0 if f is None else f.iqr_s for f in figures]).reshape(shape),
        np.array([0 if f is None else f.samples for f in figures], dtype=np.int64).reshape(shape),
    )


def _hardware(m: Measured) -> HardwareSpec:
    return HardwareSpec(
        name=m.facts.name,
        hbm_bytes=m.facts.memory_bytes,
        hbm_bytes_per_s=m.ceilings.bytes_per_s,
        flops_per_s=m.ceilings.flops_per_s,
        tdp_w=m.facts.power_limit_w,
        idle_w=None if m.energy is None else m.energy.idle_w,
        source=(
            f"{m.facts.description}; bandwidth and {m.ceilings.dtype} matrix rate measured, the best of repeats; "
            f"memory given to the engine: {m.facts.memory_bytes / 2**30:.1f} GiB"
        ),
    )


def _runtime(latency: Latency, m: Measured) -> Runtime:
    host, serving, asynchronous = m.host, m.serving, latency.subject.device.asynchronous
    sizes = tuple(b for b in GRAPH_BATCH_SIZES if b <= latency.subject.limits.max_batch)
    around, inside = _by_batch(serving.host_s), _by_batch(host.overhead_s)
    syncs = _by_batch(host.sync_s)
    measured, none = Basis.MEASURED, Basis.DEFINITION
    at_exit = "confidences to the host, survivors gathered, a step made for them"
    if latency.subject.decides_exits:
        at_exit = "who leaves is decided on the card, within a captured pass"
    sources = [
        CostSource("sync_s", measured, f"{at_exit}; by batch {syncs}"),
        CostSource(
            "host_overhead_s", measured,
            "from the end of an iteration to the next one's, less the forward pass, when the real server "
            f"serves at full depth, by batch {around}; and inside the pass token ids and a step made from lists, "
            f"tokens back into lists, by batch {inside}",
        ),
    ]  # fmt: skip
    if not asynchronous:
        return Runtime(
            launch_s_per_layer=0.0, launch_s_per_graph=host.launch_s_per_graph, sync_s=host.host_sync_s,
            host_overhead_s=serving.middle_host_s + host.middle_overhead_s, graph_batch_sizes=None,
            sources=(
                CostSource("launch_s_per_layer", none, "issuing a layer is inside its device time"),
                CostSource("launch_s_per_graph", none, "no graphs"),
                *sources,
                CostSource("graph_batch_sizes", none, "no graphs, no padding"),
            ),
        )  # fmt: skip
    by_batch = {
        batch: time_s + host.overhead_s[batch] + host.step_s.get(batch, 0.0)
        for batch, time_s in serving.host_s.items() if batch in host.overhead_s
    }  # fmt: skip
    base_s, request_s = line_through(by_batch)
    made = _by_batch(host.step_s)
    return Runtime(
        launch_s_per_layer=0.0, launch_s_per_graph=host.launch_s_per_graph, sync_s=host.host_sync_s,
        host_overhead_s=base_s, host_s_per_request=request_s, graph_batch_sizes=sizes,
        prefill_launch_s_per_layer=host.launch_s_per_layer,
        sources=(
            CostSource("launch_s_per_layer", none, "decodes are captured"),
            CostSource("prefill_launch_s_per_layer", measured, "a layer's operations issued one by one"),
            CostSource("launch_s_per_graph", measured, "all layers as one graph"),
            *sources,
            CostSource(
                "host_s_per_request", measured,
                f"the slope of the line through these batches, the device's part of making a step included: {made}",
            ),
            CostSource("graph_batch_sizes", Basis.STATED, "vLLM's default capture sizes"),
        ),
    )  # fmt: skip


def line_through(times_s: Mapping[int, float]) -> tuple[float, float]:
    """Seconds at batch 0 and for each request, neither below 0, with the least relative error at these batches."""
    batches, seconds = np.array(list(times_s)), np.array(list(times_s.values()))
    if len(batches) < 2:
        return float(seconds[0]), 0.0
    slope, base = np.polyfit(batches, seconds, 1, w=1.0 / np.maximum(seconds, 1e-9))
    if slope <= 0:
        return float(np.median(seconds)), 0.0
    if base <= 0:
        return 0.0, float(np.median(seconds / batches))
    return float(base), float(slope)


def _by_batch(times_s: Mapping[int, float]) -> str:
    return ", ".join(f"{batch}: {time_s * 1e6:.0f} us" for batch, time_s in times_s.items())


def _provenance(spec: ModelSpec, latency: Latency, m: Measured) -> Provenance:
    filled = _filled(latency)
    assumptions = [
        Assumption(
            "chars_per_token", spec.chars_per_token, "mean on the texts it was traced on", "model.chars_per_token"
        )
    ]
    if m.energy is None:
        assumptions.append(Assumption("idle_w", None, m.energy_absent or "not measured", "hardware.idle_w"))
    details = {
        "facts": asdict(m.facts),
        "ceilings": m.ceilings.to_json(),
        "host": m.host.to_json(),
        "serving": m.serving.to_json(),
        "memory": m.memory.to_json(),
        "loads": m.loads.to_json(),
        "energy": None if m.energy is None else m.energy.to_json(),
        "energy_absent": m.energy_absent,
        "limits": asdict(latency.subject.limits),
        **m.details,
    }
    return Provenance(
        provenance_class=ProvenanceClass.MEASURED,
        source=f"{m.facts.description}, {m.date}; torch {m.facts.versions.get('torch', '?')}, {m.ceilings.dtype}",
        command=m.command,
        scaled=(f"decode attention of batches that no pool holds: in proportion to the batch ({filled} places)",)
        if filled
        else (),
        assumptions=tuple(assumptions),
        details=details,
    )


def _filled(latency: Latency) -> int:
    limits = latency.subject.limits
    return 0 if latency.subject.holds(limits.max_batch, limits.max_kv_tokens) else 1
