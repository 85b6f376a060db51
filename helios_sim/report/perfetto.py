"""A run as a trace for Perfetto (ui.perfetto.dev): iterations, requests, decisions and counters on one time axis.

Each arm is a process. Under it, for each replica: a track with a slice for every iteration, one with decisions as
instants, counters, and a track for every slot that requests take one after the other. Format: TrackEvents of
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

SEQUENCE = 1  # of the packets, all of which one writer writes


@dataclass(frozen=True, slots=True)
class Iteration:
    """What one replica ran from `start_ns` to `end_ns`, and its state then."""

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
    layers: int  # loaded
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
    # Watts that a replica draws idle, and while it runs at a utilisation of 0 and of 1; none where they are not known.
    power_w: Mapping[int, tuple[float, float, float]]


def require_perfetto() -> None:
    """UserError where the `perfetto` package is not installed."""
    if find_spec("perfetto") is None:
        allowed = "a trace needs the package perfetto, which is not installed"
        raise UserError("trace", True, allowed, "pip install 'helios-llm-sim[trace]'")


def encode(arms: Sequence[TracedArm]) -> bytes:
    """The trace as bytes of a .perfetto-trace file."""
    builder: Any = import_module("perfetto.trace_builder.proto_builder")
    out = io.BytesIO()
    protos = import_module("perfetto.protos.perfetto.trace.perfetto_trace_pb2")
    writer = _Writer(builder.StreamingTraceProtoBuilder(out), protos)
    for number, arm in enumerate(arms, 1):
        _write_arm(writer, number, arm)
    return out.getvalue()


def _write_arm(writer: _Writer, number: int, arm: TracedArm) -> None:
    process = writer.process(number, visible(arm.name))
    replicas = sorted({it.replica for part in (arm.iterations, arm.requests, arm.instants) for it in part})
    for replica in replicas:
        of = f"replica {replica} " if len(replicas) > 1 else ""
        iterations = [it for it in arm.iterations if it.replica == replica]
        _write_iterations(writer, writer.track(process, f"{of}iterations"), iterations)
        decisions = writer.track(process, f"{of}decisions")
        for instant in arm.instants:
            if instant.replica == replica:
                writer.instant(decisions, instant.time_ns, visible(instant.name), instant.details)
        _write_counters(writer, process, of, iterations, arm.power_w.get(replica))
        lanes: dict[int, int] = {}
        for lane, request in in_lanes([it for it in arm.requests if it.replica == replica]):
            if lane not in lanes:
                lanes[lane] = writer.track(process, f"{of}slot {lane}")
            _write_request(writer, lanes[lane], request)


def _write_iterations(writer: _Writer, track: int, iterations: Sequence[Iteration]) -> None:
    for it in iterations:
        parts = [f"{it.decodes} decodes"] if it.decodes else []
        parts += [f"{it.prompt_tokens} prompt tokens"] if it.prompts else []
        about = {"model": it.model, "utilisation": it.utilisation, **({"prompts": it.prompts} if it.prompts else {})}
        writer.slice(track, it.start_ns, it.end_ns, " + ".join(parts), about)


def _write_counters(
    writer: _Writer, process: int, of: str, iterations: Sequence[Iteration], power_w: tuple[float, float, float] | None
) -> None:
    """State while each iteration runs. Power is the lower end of the band, by utilisation."""
    names = {"running": "requests", "waiting": "requests", "kv_blocks": "blocks", "layers": "layers"}
    tracks = {name: writer.track(process, f"{of}{name}", unit) for name, unit in names.items()}
    before: dict[str, int] = {}
    for it in iterations:
        for name, track in tracks.items():
            value = getattr(it, name)
            if before.get(name) != value:
                writer.count(track, it.start_ns, value)
                before[name] = value
    if power_w is not None and iterations:
        idle_w, least_w, most_w = power_w
        track = writer.track(process, f"{of}power at least", "W")
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
    writer.slice(track, request.scheduled_ns, first_ns, f"prefill {request.request_id}", about)
    if request.left_ns > first_ns:
        writer.slice(track, first_ns, request.left_ns, f"decode {request.request_id}", about)


def in_lanes(requests: Sequence[Served]) -> Iterator[tuple[int, Served]]:
    """Each request with the lowest lane that is free from when it is scheduled until it leaves."""
    free: list[int] = []
    taken: list[tuple[int, int]] = []  # until when, and the lane
    lanes = count()
    for request in sorted(requests, key=lambda it: (it.scheduled_ns, it.request_id)):
        while taken and taken[0][0] <= request.scheduled_ns:
            heappush(free, heappop(taken)[1])
        lane = heappop(free) if free else next(lanes)
        heappush(taken, (request.left_ns, lane))
        yield lane, request


class _Writer:
    """Writes tracks and events, each with what the format asks for."""

    def __init__(self, builder: Any, protos: Any) -> None:
        self._builder, self._types = builder, protos.TrackEvent
        self._first_only = protos.TrackDescriptor.ChildTracksOrdering.EXPLICIT
        self._cleared = protos.TracePacket.SequenceFlags.SEQ_INCREMENTAL_STATE_CLEARED
        self._numbers, self._ranks = count(1), count()

    def process(self, number: int, name: str) -> int:
        packet, uuid = self._builder.create_packet(), next(self._numbers)
        packet.timestamp = 0
        track = packet.track_descriptor
        track.uuid, track.process.pid, track.process.process_name = uuid, number, name
        track.child_ordering = self._first_only
        if number == 1:
            packet.sequence_flags = self._cleared
        self._write(packet)
        return uuid

    def track(self, parent: int, name: str, unit: str | None = None) -> int:
        packet, uuid = self._builder.create_packet(), next(self._numbers)
        packet.timestamp = 0
        track = packet.track_descriptor
        track.uuid, track.parent_uuid, track.name = uuid, parent, name
        track.sibling_order_rank = next(self._ranks)
        if unit is not None:
            track.counter.unit_name = unit
        self._write(packet)
        return uuid

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
