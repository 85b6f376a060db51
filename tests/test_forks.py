"""A few short tasks in forks of this process: what serial work gives, in the same order, and nothing left behind."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import closing
from pathlib import Path
from time import sleep

import pytest

from helios_sim.api import study_config
from helios_sim.errors import UserError
from helios_sim.study import runner
from helios_sim.study.jobs import Job
from helios_sim.study.plan import plan_study
from helios_sim.vary.forks import can_fork
from helios_sim.vary.workers import FORKS, Place, Workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks are made on Linux alone")


def in_forks(function: object, n: int, workers: int = 2) -> list[tuple[str, object]]:
    with closing(Workers(Place(FORKS, workers, setting="jobs"))) as run:
        return list(run(function, {str(i): i for i in range(n)}))  # type: ignore[arg-type]


def squared(n: int) -> tuple[int, int]:
    sleep(0.02 * (n == 0))  # the first is not done first
    return n * n, os.getpid()


@pytest.mark.parametrize("workers", [2, 3, 9])
def test_results_come_in_the_order_of_the_tasks_from_other_processes(workers: int) -> None:
    found = in_forks(squared, 7, workers)
    assert [(key, square) for key, (square, _) in found] == [(str(n), n * n) for n in range(7)]  # type: ignore[misc]
    by = {pid for _, (_, pid) in found}  # type: ignore[misc]
    assert os.getpid() not in by
    assert 1 <= len(by) <= min(workers, 7)
    for pid in by:  # none is left
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_function_that_no_other_process_could_import_will_do() -> None:
    more = 5
    assert in_forks(lambda n: n + more, 3) == [("0", 5), ("1", 6), ("2", 7)]


def fails_from_the_second_on(n: int) -> int:
    sleep(0.05 * (n == 1))
    if n:
        raise UserError("key", n, "is wrong", "correct it")
    return n


def test_the_first_error_in_the_order_of_the_tasks_is_raised() -> None:
    with pytest.raises(UserError, match="key=1"):
        in_forks(fails_from_the_second_on, 4)


def test_a_process_that_is_killed_is_told() -> None:
    with pytest.raises(UserError, match=r"jobs=2.*killed from outside.*jobs=1"):
        in_forks(lambda n: os.kill(os.getpid(), signal.SIGKILL), 2)


def test_what_waits_to_be_printed_is_printed_once(tmp_path: Path) -> None:
    """A process that prints, and ends as processes do, has nothing to print of ours."""
    path = tmp_path / "out"
    with path.open("w") as out, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        out.write("once\n")
        in_forks(lambda n: sys.stdout.flush(), 2)
    assert path.read_text() == "once\n"


def test_none_is_made_beside_other_threads() -> None:
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        assert not can_fork()
    finally:
        done.set()
        other.join()


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    monkeypatch.setattr(runner, "can_fork", lambda: True)
    monkeypatch.setattr(runner, "runs_compiled", lambda requests: False)
    return plan_study(study_config("quickstart", "workload.n_requests=200")).jobs


def test_few_short_jobs_are_forked(jobs: list[Job]) -> None:
    assert runner.place_of(jobs, None).backend == FORKS
    assert runner.place_of(jobs, 1) == Place("processes", 1, setting="jobs")
    assert runner.place_of(jobs[:1], None).backend == "serial"  # sooner done than a fork is made
    assert runner.place_of(jobs * 2, None).backend == "processes"


def test_what_is_left_to_machine_code_is_not(jobs: list[Job], monkeypatch: pytest.MonkeyPatch) -> None:
    """It would be made once in each of them."""
    monkeypatch.setattr(runner, "runs_compiled", lambda requests: requests >= 200)
    assert runner.place_of(jobs, None).backend == "serial"
