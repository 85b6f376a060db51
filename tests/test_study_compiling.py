"""Machine code is made before many short runs, once, and never for a few."""

from __future__ import annotations

import pytest

from helios_sim.study import jobs
from helios_sim.study.jobs import make_job
from helios_sim.study.schema import Config


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """How runs for it were asked to go; there is none on disk."""
    asked: list[object] = []

    def noted(*given: object, **settings: object) -> None:
        asked.append(settings["compiled"])

    monkeypatch.setattr(jobs, "serve", noted)
    monkeypatch.setattr(jobs, "shared_fleet", lambda *_: None)
    monkeypatch.setattr(jobs, "is_made", lambda: False)
    return asked


JOB = make_job("full_depth", {"policy": "full_depth"}, Config(), 0)


def test_many_requests_are_worth_one_run_ahead_of_the_clock(made: list[object]) -> None:
    jobs.make_ready(JOB, jobs.WORTH_COMPILING)
    assert made == [True]


def test_few_are_not_nor_are_many_where_it_is_made(made: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    jobs.make_ready(JOB, jobs.WORTH_COMPILING - 1)
    monkeypatch.setattr(jobs, "is_made", lambda: True)
    jobs.make_ready(JOB, 10 * jobs.WORTH_COMPILING)
    assert made == []


def test_what_fails_is_left_to_the_run_that_reports_it(made: list[object], monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(jobs, "serve", fails)
    jobs.make_ready(JOB, jobs.WORTH_COMPILING)
