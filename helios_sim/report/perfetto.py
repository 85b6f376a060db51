"""A run as a trace for Perfetto (ui.perfetto.dev): iterations, requests, decisions and counters on one time axis.

Each arm is a group of tracks. For each replica it has a track with decisions as instants, one with a slice for every
iteration, counters, and a group with a track for every slot that requests take one after the other. With several
replicas each has its own group. Arms are not processes of the format, since Perfetto sorts processes by their number of
slices, and their tracks by name. Format: TrackEvents of
https://perfetto.dev/docs/reference/synthetic-track-event, written by the `perfetto` package.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from importlib import import_module
from importlib.util import find_spec
from itertools import count
from typing import Any

from helios_sim.errors import UserError
from helios_sim.report.format import visible

SEQUENCE = 1  # sequence id of all packets, since there is one writer
ROOT = 0  # the parent of all tracks
# A field of an iteration -> the name of its counter and the unit.
COUNTERS = {
    "running": ("requests running", "requests"), "waiting": ("requests waiting", "requests"),
    "kv_blocks": ("KV blocks in use", "blocks"), "layers": ("layers loaded", "layers"),
}  # fmt: skip
POWER = "power at least"


@dataclass(frozen=True, slots=True)
class Iteration:
    """An iteration of one replica from `start_ns` to `end_ns`, and its state."""

    replica: int
    start_ns: int
    end_ns: int
    decodes: int
    prompts: int
    prompt_tokens: int
    running: int
    waiting: int
    kv_blocks: int
    model: str
    layers: int  # loaded layers
    utilisation: float  # roofline floor over its time


@dataclass(frozen=True, slots=True)
class Served:
    """A request that was scheduled. `first_token_ns` is None if it left without a token."""

    replica: int
    request_id: int
    arrival_ns: int
    scheduled_ns: int
    first_token_ns: int | None
    left_ns: int
    prompt_tokens: int
    output_tokens: int
    preemptions: int
    task: str
    status: str


@dataclass(frozen=True, slots=True)
class Instant:
    """A decision of a replica's policy, or a fault."""

    replica: int
    time_ns: int
    name: str
    details: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class TracedArm:
    """One arm under one seed."""

    name: str
    iterations: Sequence[Iteration]
    requests: Sequence[Served]
    instants: Sequence[Instant]
    # Watts of a replica: idle, and running at a utilisation of 0 and of 1; None if they are not known.
    power_w: Mapping[int, tuple[float, float, float]]


def require_perfetto() -> None:
    """Raise UserError if the `perfetto` package is not installed."""
    if find_spec("perfetto") is None:
        allowed = "a trace needs the package perfetto, which is not installed"
        raise UserError("trace", True, allowed, "pip install 'helios-llm-sim[trace]'")


def encode(arms: Sequence[TracedArm]) -> bytes:
    """The trace as bytes of a .perfetto-trace file."""
    builder: Any = import_module("perfetto.trace_builder.proto_builder")
    out = io.BytesIO()
    protos = import_module("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    writer = _Writer(builder.StreamingTraceProtoBuilder(out), protos)
    for arm in arms:
        _write_arm(writer, arm)
    return out.getvalue()


def _write_arm(writer: _Writer, arm: TracedArm) -> None:
    group = writer.track(ROOT, visible(arm.name))
    replicas = sorted({it.replica for part in (arm.iterations, arm.requests, arm.instants) for it in part})
    for replica in replicas:
        parent = writer.track(group, f"replica {replica}") if len(replicas) > 1 else group
        iterations = [it for it in arm.iterations if it.replica == replica]
        decisions = writer.track(parent, "decisions")
        for instant in arm.instants:
            if instant.replica == replica:
                writer.instant(decisions, instant.time_ns, visible(instant.name), instant.details)
        _write_iterations(writer, writer.track(parent, "iterations"), iterations)
        _write_counters(writer, parent, iterations, arm.power_w.get(replica))
        requests = writer.track(parent, "requests")
        lanes: dict[int, int] = {}
        for lane, request in in_lanes([it for it in arm.requests if it.replica == replica]):
            if lane not in lanes:
                lanes[lane] = writer.track(requests, f"slot {lane}")
            _write_request(writer, lanes[lane], request)


def _write_iterations(writer: _Writer, track: int, iterations: Sequence[Iteration]) -> None:
    for it in iterations:
        parts = [f"{it.decodes} decodes"] if it.decodes else []
        parts += [f"{it.prompt_tokens} prompt tokens"] if it.prompts else []
        about = {"model": it.model, "utilisation": it.utilisation, **({"prompts": it.prompts} if it.prompts else {})}
        writer.slice(track, it.start_ns, it.end_ns, " + ".join(parts), about)


def _write_counters(
    writer: _Writer, parent: int, iterations: Sequence[Iteration], power_w: tuple[float, float, float] | None
) -> None:
    """State while each iteration runs. Power is the lower end of the band, by utilisation."""
    tracks = {field: writer.track(parent, name, unit) for field, (name, unit) in COUNTERS.items()}
    before: dict[str, int] = {}
    for it in iterations:
        for field, track in tracks.items():
            value = getattr(it, field)
            if before.get(field) != value:
                writer.count(track, it.start_ns, value)
                before[field] = value
    if power_w is not None and iterations:
        idle_w, least_w, most_w = power_w
        track = writer.track(parent, POWER, "W")
        for it, following in zip(iterations, [*iterations[1:], None], strict=True):
            writer.count(track, it.start_ns, least_w + it.utilisation * (most_w - least_w))
            if following is None or following.start_ns > it.end_ns:
                writer.count(track, it.end_ns, idle_w)


def _write_request(writer: _Writer, track: int, request: Served) -> None:
    about = {
        "request_id": request.request_id, "task": request.task, "status": request.status,
        "queue_ms": (request.scheduled_ns - request.arrival_ns) / 1e6, "prompt_tokens": request.prompt_tokens,
        "output_tokens": request.output_tokens, "preemptions": request.preemptions,
    }  # fmt: skip
    first_ns = request.left_ns if request.first_token_ns is None else request.first_token_ns
    writer.slice(track, request.scheduled_ns, first_ns, f"{request.request_id} prefill", about)
    if request.left_ns > first_ns:
        writer.slice(track, first_ns, request.left_ns, f"{request.request_id} decode", about)


def in_lanes(requests: Sequence[Served]) -> Iterator[tuple[int, Served]]:
    """Each request with the lowest lane that is free from when it is scheduled until it leaves."""
    free: list[int] = []
    taken: list[tuple[int, int]] = []  # end of its request, and the lane
    lanes = count()
    for request in sorted(requests, key=lambda it: (it.scheduled_ns, it.request_id)):
        while taken and taken[0][0] <= request.scheduled_ns:
            heappush(free, heappop(taken)[1])
        lane = heappop(free) if free else next(lanes)
        heappush(taken, (request.left_ns, lane))
        yield lane, request


class _Writer:
    """Writes tracks and events in Perfetto's format."""

    def __init__(self, builder: Any, protos: Any) -> None:
        self._builder, self._types, self._orders = builder, protos.TrackEvent, protos.TrackDescriptor
        self._numbers, self._ranks = count(ROOT), count()
        packet = self._track("")
        packet.sequence_flags = protos.TracePacket.SequenceFlags.SEQ_INCREMENTAL_STATE_CLEARED
        self._write(packet)

    def track(self, parent: int, name: str, unit: str | None = None) -> int:
        packet = self._track(name)
        track = packet.track_descriptor
        track.parent_uuid, track.sibling_order_rank = parent, next(self._ranks)
        if unit is not None:
            track.counter.unit_name = unit
        self._write(packet)
        return int(track.uuid)

    def _track(self, name: str) -> Any:
        packet = self._builder.create_packet()
        packet.timestamp = 0
        track = packet.track_descriptor
        track.uuid, track.name, track.child_ordering = next(self._numbers), name, self._orders.EXPLICIT
        return packet

    def slice(self, track: int, start_ns: int, end_ns: int, name: str, about: Mapping[str, Any]) -> None:
        packet = self._event(track, start_ns, self._types.TYPE_SLICE_BEGIN)
        packet.track_event.name = name
        self._annotate(packet.track_event, about)
        self._write(packet)
        self._write(self._event(track, end_ns, self._types.TYPE_SLICE_END))

    def instant(self, track: int, time_ns: int, name: str, about: Mapping[str, Any]) -> None:
        packet = self._event(track, time_ns, self._types.TYPE_INSTANT)
        packet.track_event.name = name
        self._annotate(packet.track_event, about)
        self._write(packet)

    def count(self, track: int, time_ns: int, value: float) -> None:
        packet = self._event(track, time_ns, self._types.TYPE_COUNTER)
        if isinstance(value, int):
            packet.track_event.counter_value = value
        else:
            packet.track_event.double_counter_value = value
        self._write(packet)

    def _event(self, track: int, time_ns: int, kind: int) -> Any:
        packet = self._builder.create_packet()
        packet.timestamp = time_ns
        packet.track_event.type = kind
        packet.track_event.track_uuid = track
        return packet

    def _annotate(self, event: Any, about: Mapping[str, Any]) -> None:
        for name, value in about.items():
            note = event.debug_annotations.add()
            note.name = name
            if isinstance(value, int):
                note.int_value = value
            elif isinstance(value, float):
                note.double_value = value
            else:
                note.string_value = visible(str(value))

    def _write(self, packet: Any) -> None:
        packet.trusted_packet_sequence_id = SEQUENCE
        self._builder.write_packet(packet)
