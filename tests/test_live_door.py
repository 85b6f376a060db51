"""Requests and cancellations from another thread while a server runs by the wall clock."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from queue import Full

import pytest
import simpy

from helios_sim.engine.simulated import ModelData, SimulatedEngine
from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.replay import offline_exits
from helios_sim.exits.rule import Confidence
from helios_sim.live.clock import Door, WallClock
from helios_sim.policy.telemetry import Candidate, Goal, Objective, Situation
from helios_sim.profile.profile import MemoryBudget
from helios_sim.profile.synthetic import flat_profile
from helios_sim.request import Request, RequestRecord, Status
from helios_sim.serving.server import Server
from helios_sim.simulation import System, simulate
from rig import EXITS, Scripted, full_depth

MS = 1_000_000
ITERATION_S = 0.004


def serve_outside(client) -> tuple[dict[int, RequestRecord], WallClock]:
    """A server with iterations of 4 ms; `client(door, clock)` runs in a thread of its own."""
    clock = WallClock()
    profile, trace = flat_profile(ITERATION_S), synthetic_trace("flat", EXITS, chars_per_token=1)
    situation = Situation(
        candidates={"flat": Candidate(profile, offline_exits(trace, 0.7, Confidence.MAX_PROBABILITY))},
        memory=MemoryBudget(40 << 30, 0.9, 16),
        objective=Objective(Goal.THROUGHPUT, 0.1),
        max_running_requests=4,
        max_batch_tokens=64,
        seed=0,
    )

    def make_server(env: simpy.Environment, number: int, on_left) -> Server:
        engine = SimulatedEngine(env, {"flat": ModelData(profile, trace.bind(("text",)))})
        return Server(env, number, engine, Scripted(full_depth()), situation, on_left)

    threads: list[threading.Thread] = []

    def outside(system: System) -> None:
        door = Door(clock, system)
        threads.append(threading.Thread(target=client, args=(door, clock)))
        clock.sync()
        threads[0].start()

    records: list[RequestRecord] = []
    run = simulate(make_server, iter(()), sys.maxsize, records.append, env=clock, outside=outside)
    threads[0].join()
    assert run.requests == len(records)
    return {record.request_id: record for record in records}, clock


def request(number: int, answer: int = 5) -> Request:
    return Request(number, -1, 8, answer, 0, number * 50)


def test_requests_arrive_when_they_are_sent() -> None:
    sent_ns: dict[int, int] = {}

    def client(door: Door, clock: WallClock) -> None:
        with door:
            for number in range(5):
                time.sleep(0.01)
                sent_ns[number] = clock.wall_ns
                door.send(request(number))

    records, clock = serve_outside(client)
    assert sorted(records) == list(range(5))
    for number, record in records.items():
        assert record.status is Status.COMPLETED
        assert 0 <= record.arrival_ns - sent_ns[number] < 5 * MS
        assert record.last_token_ns - record.first_token_ns >= 4 * round(ITERATION_S * 1e9)
    assert clock.now <= clock.wall_ns


@pytest.mark.parametrize("running", [True, False])
def test_a_cancelled_request_leaves_with_its_reason(running: bool) -> None:
    def client(door: Door, clock: WallClock) -> None:
        door.send(request(0, answer=2000))
        if not running:
            for number in range(1, 5):
                door.send(request(number, answer=30))
        time.sleep(0.06)
        door.cancel(0 if running else 4)  # four run, the fifth waits
        if not running:
            door.cancel(0)
        door.cancel(99)  # no request has it
        time.sleep(0.03)
        door.send(request(9))
        door.close()

    records, _ = serve_outside(client)
    gone = [0] if running else [0, 4]
    for number, record in records.items():
        assert record.status is (Status.DROPPED if number in gone else Status.COMPLETED), number
    assert {records[number].drop_reason for number in gone} == {"cancelled"}
    assert 0 < records[0].output_tokens < 2000
    assert records[9].output_tokens == 5


MALFORMED = [
    None, "request", replace(request(1), prompt_chars=float("nan")), replace(request(1), task=99),
    replace(request(1), output_chars=0), replace(request(1), prompt_chars=2**40), replace(request(1), text_start=None),
    replace(request(1), request_id=-1), replace(request(1), output_chars=True), request(0),
]  # fmt: skip


def test_a_malformed_request_is_its_sender_s_and_the_run_goes_on() -> None:
    refused = []

    def client(door: Door, clock: WallClock) -> None:
        door.send(request(0))
        for wrong in MALFORMED:
            try:
                door.send(wrong)
            except UserError as error:
                refused.append(str(error))
        door.send(request(2))
        door.close()

    records, _ = serve_outside(client)
    assert len(refused) == len(MALFORMED)
    assert sorted(records) == [0, 2]
    assert all(record.status is Status.COMPLETED for record in records.values())


def test_a_closed_door_says_so_and_closes_once() -> None:
    said = []

    def client(door: Door, clock: WallClock) -> None:
        door.send(request(0))
        door.close()
        door.close()
        for late in (lambda: door.send(request(1)), lambda: door.cancel(0)):
            try:
                late()
            except UserError as error:
                said.append(error.key)

    records, _ = serve_outside(client)
    assert sorted(records) == [0]
    assert said == ["door", "door"]


def test_the_queue_of_calls_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("helios_sim.live.clock.MOST_CALLS", 10)
    clock = WallClock()
    for _ in range(10):
        clock.call(lambda: None)
    with pytest.raises(Full):
        clock.call(lambda: None)
    clock.call(lambda: None, always=True)
