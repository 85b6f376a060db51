"""Stages of a calibration: order of worth, a time budget, and nothing that was finished is ever lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from calibrate.progress import Progress
from calibrate.stages import CODE, NotEnoughTime, Stage, StageRun, StageStatus, at_work, read_finished, run_stages
from helios_sim.errors import UserError


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def working(clock: Clock, for_s: float, log: list[str] | None = None, name: str = "") -> Callable[[StageRun], dict]:
    """A stage that takes a time, writes a file, and says how much time it was given."""

    def run(stage: StageRun) -> dict:
        (stage.folder / "data.txt").write_text("measured")
        clock.now_s += for_s
        if log is not None:
            log.append(name)
        return {"allowance_s": stage.allowance_s, "before": sorted(stage.finished)}

    return run


def statuses(outcomes) -> dict[str, str]:
    return {outcome.stage: outcome.status.value for outcome in outcomes}


def test_stages_run_in_order_of_worth_and_leave_their_files(tmp_path: Path) -> None:
    clock, log = Clock(), []
    stages = [Stage(n, working(clock, 1, log, n), 1, worth) for n, worth in (("b", 2), ("c", 1), ("a", 3))]
    outcomes = run_stages(stages, tmp_path, clock=clock)
    assert log == ["a", "b", "c"] == [outcome.stage for outcome in outcomes]
    assert outcomes[2].finished.result["before"] == ["a", "b"]
    assert outcomes[0].finished.part("data.txt").read_text() == "measured"
    assert outcomes[0].finished.wall_s == 1
    assert set(read_finished(tmp_path)) == {"a", "b", "c"}
    assert not (tmp_path / ".scratch").exists()


def test_the_time_left_is_divided_in_proportion_and_what_does_not_fit_is_skipped(tmp_path: Path) -> None:
    clock = Clock()
    stages = [
        Stage("slow", working(clock, 70), 30, worth=3, least_s=10),  # is given 30 / 60 of 100 s and takes 70
        Stage("long", working(clock, 20), 20, worth=2, least_s=35),
        Stage("short", working(clock, 5), 10, worth=1, least_s=2),
    ]
    outcomes = run_stages(stages, tmp_path, budget_s=100, clock=clock)
    assert statuses(outcomes) == {"slow": "done", "long": "skipped", "short": "done"}
    assert outcomes[0].finished.result["allowance_s"] == pytest.approx(50)
    assert "30 s of the budget are left" in outcomes[1].why
    assert outcomes[2].finished.result["allowance_s"] == pytest.approx(30)


def test_a_later_call_keeps_what_is_finished_and_adds_what_was_skipped(tmp_path: Path) -> None:
    clock, log = Clock(), []
    stages = [Stage(n, working(clock, 8, log, n), 8, worth) for n, worth in (("a", 2), ("b", 1))]
    assert statuses(run_stages(stages, tmp_path, 10, clock=clock)) == {"a": "done", "b": "skipped"}
    assert statuses(run_stages(stages, tmp_path, 10, clock=clock)) == {"a": "kept", "b": "done"}
    assert log == ["a", "b"]
    events = [json.loads(line)["event"] for line in (tmp_path / "transcript.jsonl").read_text().splitlines()]
    assert events == ["started", "done", "skipped", "kept", "started", "done"]


def test_a_changed_setting_measures_that_stage_and_its_dependents_anew_and_says_so(tmp_path: Path) -> None:
    clock, log, told = Clock(), [], []

    def stages(dtype: str) -> list[Stage]:
        return [
            Stage("base", working(clock, 1, log, "base"), 1, 3, settings={"dtype": dtype}),
            Stage("above", working(clock, 1, log, "above"), 1, 2, needs=("base",)),
            Stage("beside", working(clock, 1, log, "beside"), 1, 1),
        ]

    run_stages(stages("float32"), tmp_path, clock=clock)
    time.sleep(0.002)  # finishing times differ
    outcomes = run_stages(stages("bfloat16"), tmp_path, on_progress=told.append, clock=clock)
    assert statuses(outcomes) == {"base": "done", "above": "done", "beside": "kept"}
    outdated = {p.stage: p.text for p in told if isinstance(p, Progress) and p.event == "outdated"}
    assert "dtype was 'float32' and is 'bfloat16'" in outdated["base"]
    assert "base is measured anew" in outdated["above"]
    assert log == ["base", "above", "beside", "base", "above"]


def test_a_stage_whose_foundation_was_skipped_is_skipped(tmp_path: Path) -> None:
    clock = Clock()
    stages = [Stage("base", working(clock, 1), 50, 2), Stage("above", working(clock, 1), 1, 1, needs=("base",))]
    outcomes = run_stages(stages, tmp_path, budget_s=10, clock=clock)
    assert statuses(outcomes) == {"base": "skipped", "above": "skipped"}
    assert "base" in outcomes[1].why


def test_a_stage_must_be_worth_less_than_what_it_needs(tmp_path: Path) -> None:
    stages = [Stage("base", dict, 1, 1), Stage("above", dict, 1, 2, needs=("base",))]
    with pytest.raises(ValueError, match="above needs base before it"):
        run_stages(stages, tmp_path)


def test_a_defect_costs_its_own_stage_only_and_its_traceback_is_kept(tmp_path: Path) -> None:
    def broken(stage: StageRun) -> dict:
        (stage.folder / "half.txt").write_text("half")
        raise ZeroDivisionError("by nothing")

    clock = Clock()
    outcomes = run_stages([Stage("broken", broken, 1, 2), Stage("sound", working(clock, 1), 1, 1)], tmp_path)
    assert statuses(outcomes) == {"broken": "failed", "sound": "done"}
    assert outcomes[0].why == "ZeroDivisionError: by nothing"
    assert not (tmp_path / "stages" / "broken").exists()
    assert "in broken" in (tmp_path / "transcript.jsonl").read_text()


def left(folder: Path) -> str:
    """What an interrupted stage called "a" has left."""
    path = folder / ".scratch" / "a" / "samples.txt"
    return path.read_text() if path.exists() else ""


def sampling(ends: Callable[[], None]) -> Callable[[StageRun], dict]:
    """A stage that adds a sample to those of earlier calls, and then ends like that."""

    def run(stage: StageRun) -> dict:
        with (stage.folder / "samples.txt").open("a") as file:
            file.write("s")
        ends()
        return {"samples": (stage.folder / "samples.txt").read_text()}

    return run


LACKS = {
    "host memory": MemoryError(),
    "device memory": RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "full disk": OSError(errno.ENOSPC, "No space left on device"),
    "open files": OSError(errno.EMFILE, "Too many open files"),
    "bad medium": OSError(errno.EIO, "Input/output error"),
    "library": ImportError("x.so: failed to map segment from shared object: Cannot allocate memory"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lack", LACKS.values(), ids=LACKS)
def test_what_the_machine_lacks_loses_no_sample(lack: Exception, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from calibrate.work import memory_named

    def ends() -> None:
        raise lack

    for count in (1, 2, 3):
        with pytest.raises(UserError):
            run_stages([Stage("a", memory_named(sampling(ends)), 1, 1)], tmp_path)
        assert left(tmp_path) == count * "s"
    (outcome,) = run_stages([Stage("a", sampling(lambda: None), 1, 1)], tmp_path)
    assert outcome.finished.result == {"samples": "ssss"}


def test_a_draft_is_not_used_again_when_a_stage_has_failed_with_it_twice(tmp_path: Path) -> None:
    def defect() -> None:
        raise ZeroDivisionError

    def lack() -> None:
        raise MemoryError

    broken = [Stage("a", sampling(defect), 1, 1)]
    found = []
    for stages in (broken, broken, broken, [Stage("a", sampling(lack), 1, 1)], broken):
        with suppress(UserError):
            run_stages(stages, tmp_path)
        found.append(left(tmp_path))
    assert found == ["s", "", "s", "ss", ""]


def test_a_changed_code_measures_finished_stages_and_drafts_anew_and_says_so(tmp_path: Path) -> None:
    clock, told = Clock(), []

    def short_of_time() -> None:
        raise NotEnoughTime("later")

    def stages(code: str) -> list[Stage]:
        settings = {"dtype": "float32", CODE: code}
        return [
            Stage("whole", working(clock, 1), 1, 2, settings=settings),
            Stage("a", sampling(short_of_time), 1, 1, settings=settings),
        ]

    run_stages(stages("1"), tmp_path, clock=clock)
    run_stages(stages("1"), tmp_path, clock=clock)
    assert left(tmp_path) == "ss"
    outcomes = run_stages(stages("2"), tmp_path, on_progress=told.append, clock=clock)
    assert statuses(outcomes) == {"whole": "done", "a": "skipped"}
    assert left(tmp_path) == "s"
    outdated = {p.stage: p.text for p in told if p.event == "outdated"}
    assert outdated["whole"] == "the measuring code changed: measured anew"
    assert outdated["a"].startswith("the measuring code changed: what an interrupted call has left is measured anew")


def test_a_stage_that_takes_longer_than_the_budget_is_stopped_and_goes_on_later(tmp_path: Path) -> None:
    def slow(seconds: float) -> list[Stage]:
        return [Stage("a", sampling(lambda: time.sleep(seconds)), 1, 2, 0.1), Stage("b", dict, 1, 1, 0.1)]

    began_s = time.monotonic()
    outcomes = run_stages(slow(60), tmp_path, budget_s=0.3, over_s=0.1)
    assert time.monotonic() - began_s < 10
    assert statuses(outcomes) == {"a": "skipped", "b": "skipped"}
    assert "the budget was spent" in outcomes[0].why
    (outcome, _) = run_stages(slow(0), tmp_path)
    assert outcome.finished.result == {"samples": "ss"}


def test_a_mistake_of_the_user_ends_the_run_and_keeps_what_is_finished(tmp_path: Path) -> None:
    def refuses(stage: StageRun) -> dict:
        raise UserError("device", "tpu", "cpu or cuda", "set device")

    clock = Clock()
    with pytest.raises(UserError, match="device='tpu'"):
        run_stages([Stage("a", working(clock, 1), 1, 2), Stage("b", refuses, 1, 1)], tmp_path)
    assert set(read_finished(tmp_path)) == {"a"}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES])
def test_a_full_or_forbidden_disk_gives_one_message(tmp_path: Path, code: int) -> None:
    def full(stage: StageRun) -> dict:
        raise OSError(code, os.strerror(code))

    with pytest.raises(UserError, match=r"out=.*cannot be written: .*Fix: free space"):
        run_stages([Stage("a", full, 1, 1)], tmp_path)


def test_a_damaged_record_is_measured_anew(tmp_path: Path) -> None:
    clock, log = Clock(), []
    stages = [Stage("a", working(clock, 1, log, "a"), 1, 1)]
    run_stages(stages, tmp_path, clock=clock)
    (tmp_path / "stages" / "a" / "stage.json").write_text('{"stage": "a", ')
    assert statuses(run_stages(stages, tmp_path, clock=clock)) == {"a": "done"}
    assert log == ["a", "a"]


def test_two_processes_do_not_share_a_folder(tmp_path: Path) -> None:
    with at_work(tmp_path), pytest.raises(UserError, match="another process is at work"), at_work(tmp_path):
        pass


def test_a_stage_that_lacked_time_goes_on_where_it_was_and_stays_as_it_is_without_time(tmp_path: Path) -> None:
    def counting(stage: StageRun) -> dict:
        path = stage.folder / "samples.txt"
        samples = path.read_text() + "s" if path.exists() else "s"
        path.write_text(samples)
        return {"samples": samples, "short": "" if len(samples) == 3 else f"{len(samples)} of 3 samples"}

    def called(budget_s: float) -> tuple[str, str, str]:
        clock = Clock()
        (outcome,) = run_stages([Stage("a", counting, 10, 1)], tmp_path, budget_s, clock=clock)
        assert outcome.finished is not None
        return outcome.status, outcome.why, outcome.finished.result["samples"]

    assert called(20) == ("done", "1 of 3 samples", "s")
    assert called(5) == ("kept", "1 of 3 samples", "s")
    assert called(20) == ("done", "2 of 3 samples", "ss")
    assert called(20) == ("done", "", "sss")
    assert called(20) == ("kept", "", "sss")


KILLED = """
import sys, time
from pathlib import Path
from calibrate.stages import Stage, run_stages

folder = Path(sys.argv[1])

def quick(stage):
    (stage.folder / "data.txt").write_text("whole")
    with (folder.parent / "runs.txt").open("a") as log:
        log.write("quick ")
    return {}

def endless(stage):
    samples = stage.folder / "samples.txt"
    with samples.open("a") as file:
        file.write("sample ")
    (folder.parent / "reached").touch()
    time.sleep(float(sys.argv[2]))
    return {"samples": samples.read_text()}

settings = {"kind": sys.argv[3]}
run_stages([Stage("quick", quick, 1, 2), Stage("endless", endless, 1, 1, settings=settings)], folder)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("kind_later", "samples"), [("a", "sample sample "), ("b", "sample ")])
def test_killed_outright_it_loses_nothing_finished_and_leaves_nothing_half_written(
    tmp_path, repository, kind_later, samples
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(out)]
    victim = subprocess.Popen([*command, "600", "a"], cwd=repository)
    deadline = time.monotonic() + 60
    while not (tmp_path / "reached").exists():
        assert time.monotonic() < deadline
        assert victim.poll() is None
        time.sleep(0.02)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert set(read_finished(out)) == {"quick"}

    subprocess.run([*command, "0", kind_later], cwd=repository, check=True)
    assert (tmp_path / "runs.txt").read_text() == "quick "  # not run a second time
    assert set(read_finished(out)) == {"quick", "endless"}
    assert read_finished(out)["endless"].result["samples"] == samples  # it finds its own again, with the same settings
    assert not (out / ".scratch").exists()
    last = json.loads((out / "transcript.jsonl").read_text().splitlines()[-1])
    assert (last["stage"], last["event"]) == ("endless", StageStatus.DONE)
