"""Queue times of the groups that an order of the line prefers or puts off, against plain reckoning."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from helios_sim import simulate, write_result
from helios_sim.report.breakdown import by_priority, by_prompt_length, waits
from helios_sim.report.page import render
from helios_sim.report.records import Records
from helios_sim.report.result import comparisons
from helios_sim.request import NS_PER_S
from test_report_records import some_records

BUSY = ("workload.n_requests=200", "workload.arrivals.rate_per_s=60", "models=[opt-1.3b]", "exits.source=none",
        "policy=full_depth", "server.max_running_requests=8")  # fmt: skip


@pytest.fixture(scope="module")
def records() -> Records:
    return Records.of(some_records())


def test_waits_are_those_of_the_requests_that_were_scheduled(records: Records) -> None:
    (found,) = waits([records, records], [("task 0", [lambda part: part.task == 0] * 2)])
    rows = records.task == 0
    times = [(r.scheduled_ns - r.arrival_ns) / NS_PER_S for r in some_records()
             if r.task == 0 and r.scheduled_ns is not None]  # fmt: skip
    assert (found.requests, found.never_scheduled) == (2 * rows.sum(), 2 * (rows.sum() - len(times)))
    assert found.queue_s_max == pytest.approx(max(times))
    assert found.queue_s_p99 == pytest.approx(np.percentile(times * 2, 99))


def test_every_request_is_in_one_group(records: Records) -> None:
    for groups in (by_prompt_length([records]), by_priority([records], [lambda part: part.task])):
        together = sum(belongs(records).astype(int) for _, (belongs,) in groups)
        assert (together == 1).all()
    assert waits([records], [("none", [lambda part: np.zeros(len(part), np.bool_)])]) == ()


def test_quarters_end_at_the_lengths_that_numpy_finds(records: Records) -> None:
    for n in (1, 2, 3, 4, 5, 98, 99, 100, 1000):
        part = records.part(slice(n))
        ends = np.quantile(part.prompt_tokens, (0, 0.25, 0.5, 0.75, 1), method="inverted_cdf").tolist()
        quarters = [(first if i == 0 else first + 1, last) for i, (first, last) in enumerate(pairwise(ends))]
        named = [f"prompts of {first:,} to {last:,} tokens" for first, last in quarters if first <= last]
        assert [name for name, _ in by_prompt_length([part])] == named


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "put_off"), [("priority", "priority 2"), ("shortest_prompt", "prompts of ")]
)
def test_who_is_put_off_waits_longest_and_the_report_says_so(order: str, put_off: str, tmp_path: Path) -> None:
    own = ("+workload.mix.priorities={sharegpt: 2}",) if order == "priority" else ()
    result = simulate("own", *BUSY, f"server.order={order}", *own)
    groups = result.arms["full_depth"].waits
    assert len(groups) > 1
    worst = max(groups, key=lambda it: it.queue_s_p99 or 0.0)
    assert worst == groups[-1]
    assert worst.group.startswith(put_off)
    page = render(result, comparisons(result), [])
    assert '<section id="waits">' in page
    assert f"{worst.group} wait longest" in page
    write_result(result, tmp_path, style=None)
    entry = json.loads((tmp_path / "summary.json").read_text())["arms"]["full_depth"]["waits"]
    assert [it["group"] for it in entry] == [it.group for it in groups]


@pytest.mark.slow
def test_in_order_of_arrival_there_is_no_such_section() -> None:
    result = simulate("own", *BUSY)
    assert result.arms["full_depth"].waits == ()
    assert 'id="waits"' not in render(result, comparisons(result), [])
