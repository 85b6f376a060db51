"""The order of the waiting line and of preemption, against a server in plain Python that knows lists alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from helios_sim.request import RequestBlock, Status
from rig import Served, full_depth, serve, workload

MS = 1_000_000
WEIGHTS, TOKEN = 228, 16  # bytes of the flat model and of one token's K and V


@dataclass
class Asked:
    """A request: when it comes (ms), tokens of its prompt and its answer, its priority; and what becomes of it."""

    arrival: int
    prompt: int
    answer: int
    priority: int = 0
    number: int = 0
    held: int = 0  # tokens whose K and V are in memory
    to_compute: int = 0  # of its prompt and what it has answered so far
    answered: int = 0
    preemptions: int = 0
    times: list[int] = field(default_factory=list)  # ms: first scheduled, then of each token


def reference(asked: Sequence[Asked], order: str, blocks: int, places: int, budget: int) -> list[Asked]:
    """Serves with iterations of 1 ms and blocks of one token."""
    keys = {"fcfs": lambda a: 0, "priority": lambda a: a.priority, "shortest_prompt": lambda a: a.prompt}

    def place(a: Asked) -> tuple[int, int]:
        return keys[order](a), a.number

    coming, waiting, running, now = list(asked), [], [], 0
    while coming or waiting or running:
        if not waiting and not running:
            now = max(now, coming[0].arrival)
        while coming and coming[0].arrival <= now:
            if coming[0].prompt + coming[0].answer - 1 <= blocks:
                waiting.append(coming[0])
            del coming[0]
        waiting.sort(key=place)
        decoding = [a for a in running if not a.to_compute]
        preempted = False
        while sum(a.held + a.to_compute for a in running) + len(decoding) > blocks:
            last = max(running, key=place)
            running.remove(last)
            decoding = [a for a in running if not a.to_compute]
            last.held, last.to_compute, last.preemptions, preempted = 0, 0, last.preemptions + 1, True
            waiting = sorted([*waiting, last], key=place)
        left, chunks = budget - len(decoding), {}
        for a in running:
            if a.to_compute and left > 0:
                chunks[a.number] = min(a.to_compute, left)
                left -= chunks[a.number]
        while waiting and left > 0 and not preempted and len(running) < places:
            a = waiting[0]
            needed = a.prompt + a.answered
            if needed + sum(b.held + b.to_compute for b in running) + len(decoding) > blocks:
                break
            running.append(waiting.pop(0))
            a.to_compute = needed
            chunks[a.number] = min(needed, left)
            left -= chunks[a.number]
            a.times = a.times or [now]
        if not running:
            continue
        now += 1
        for a in running:
            if a in decoding:
                a.held += 1
            elif a.number in chunks:
                a.held, a.to_compute = a.held + chunks[a.number], a.to_compute - chunks[a.number]
                if a.to_compute:
                    continue
            else:
                continue
            a.answered += 1
            a.times.append(now)
        running = [a for a in running if a.answered < a.answer]
    return list(asked)


def block_of(asked: Sequence[Asked]) -> Iterator[RequestBlock]:
    def column(values: Sequence[int]) -> np.ndarray:
        return np.array(values, np.int64)

    numbers = column(range(len(asked)))
    yield RequestBlock(
        numbers, column([a.arrival * MS for a in asked]), column([a.prompt for a in asked]),
        column([a.answer for a in asked]), numbers * 0, numbers * 37, column([a.priority for a in asked]),
    )  # fmt: skip


def served(
    asked: Sequence[Asked], order: str, blocks: int = 1000, places: int = 256, budget: int = 2048, **how
) -> Served:
    return serve(
        workload(len(asked)), full_depth(), blocks=block_of(asked), order=order, hbm_bytes=WEIGHTS + blocks * TOKEN,
        utilisation=1.0, block_tokens=1, max_running_requests=places, max_batch_tokens=budget, **how,
    )  # fmt: skip


def starts(run: Served) -> list[int]:
    return [record.scheduled_ns // MS for record in run.by_request()]


# --- who starts

FOUR = [(0, 9, 5, 2), (1, 8, 5, 1), (2, 3, 5, 3), (3, 6, 5, 0)]  # arrival, prompt, answer, priority; one at a time


@pytest.mark.parametrize(
    ("order", "when"),
    [("fcfs", [0, 5, 10, 15]), ("priority", [0, 10, 15, 5]), ("shortest_prompt", [0, 15, 5, 10])],
)
def test_one_at_a_time_the_first_in_order_starts(order: str, when: list[int]) -> None:
    """The first is alone when it comes, and nobody who runs has to wait for a better one."""
    assert starts(served([Asked(*each) for each in FOUR], order, places=1)) == when


@pytest.mark.parametrize("order", ["priority", "shortest_prompt"])
def test_those_who_are_alike_start_in_order_of_arrival(order: str) -> None:
    assert starts(served([Asked(0, 5, 4, 7) for _ in range(4)], order, places=1)) == [0, 4, 8, 12]


def test_a_large_request_at_the_head_is_not_passed_by_one_that_would_fit() -> None:
    """Room for 20 tokens: 10 are taken at 1 ms, the urgent one needs 11 and the next one 2."""
    asked = [Asked(0, 9, 4, 5), Asked(1, 11, 3, 0), Asked(1, 2, 3, 1)]
    assert starts(served(asked, "priority", blocks=20)) == [0, 4, 4]
    assert starts(served(asked, "shortest_prompt", blocks=20)) == [0, 4, 1]


# --- who is preempted


@pytest.mark.parametrize(
    ("order", "preempted"), [("fcfs", [0, 0, 1]), ("priority", [1, 0, 0]), ("shortest_prompt", [0, 1, 0])]
)
def test_the_last_in_order_loses_its_place(order: str, preempted: list[int]) -> None:
    """Prompts of 5, 6 and 4 tokens fill 15 of 19 blocks; the second decode is short of one. Priorities 2, 0, 1."""
    asked = [Asked(0, 5, 4, 2), Asked(0, 6, 4, 0), Asked(0, 4, 4, 1)]
    assert [r.preemptions for r in served(asked, order, blocks=19).by_request()] == preempted


def test_who_lost_its_place_comes_back_where_the_order_puts_it() -> None:
    """Room for 14: request 1 (priority 3) goes, and request 2 (priority 1), which came last, is done before it."""
    asked = [Asked(0, 5, 6, 0), Asked(0, 5, 6, 3), Asked(3, 5, 4, 1)]
    first, moved, late = served(asked, "priority", blocks=14).by_request()
    assert first.preemptions == 0
    assert moved.preemptions > 0
    assert first.last_token_ns < late.last_token_ns < moved.last_token_ns


# --- everything at once


def numbered(asked: Sequence[Asked]) -> list[Asked]:
    for number, each in enumerate(asked):
        each.number = number
    return list(asked)


asked_lists = st.lists(
    st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 9), st.integers(-2, 2)), min_size=1, max_size=14
)


@pytest.mark.slow
@settings(max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    drawn=asked_lists,
    order=st.sampled_from(["fcfs", "priority", "shortest_prompt"]),
    blocks=st.integers(8, 40),
    places=st.integers(1, 6),
    budget=st.integers(7, 30),  # at least one more than those that decode
)
def test_every_token_comes_when_the_plain_server_says(drawn, order, blocks, places, budget) -> None:
    def asked() -> list[Asked]:
        arrival, made = 0, []
        for gap, prompt, answer, priority in drawn:
            arrival += gap // 4
            made.append(Asked(arrival, prompt, answer, priority))
        return numbered(made)

    expected = reference(asked(), order, blocks, places, budget)
    for stepwise in (False, True):
        run = served(asked(), order, blocks, places, budget, stepwise=stepwise)
        for record, a in zip(run.by_request(), expected, strict=True):
            if not a.times:
                assert record.status is Status.DROPPED
                continue
            moments = (record.scheduled_ns, record.first_token_ns, record.last_token_ns)
            assert moments == tuple(at * MS for at in (a.times[0], a.times[1], a.times[-1]))
            assert (record.output_tokens, record.preemptions) == (a.answer, a.preemptions)
