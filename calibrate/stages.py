"""Runs named stages in order of worth within a time budget, and resumes them.

OUT/stages/NAME/ holds a finished stage: what it wrote, and `stage.json` with its settings, result and time. It appears
there atomically, so a kill at any moment loses no finished stage, and a later call with the same folder runs the
missing stages. A finished stage is measured anew only if its settings or the measuring code changed, or if a
stage that it builds on was measured anew. OUT/transcript.jsonl has a line for every event of every call.

A stage that was interrupted by a kill, by time, or by a lack of resources, finds its draft again: the files that it
had written. A stage that failed by a defect finds its draft once more; after a second failure the draft is removed.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from calibrate.progress import OnProgress, Transcript, now
from helios_sim import files
from helios_sim.errors import UserError, lacking
from helios_sim.interrupt import TimeIsUp, at_most, stop_if_asked
from helios_sim.untrusted import Fields, read_json
from helios_sim.vary.runner import at_work_in

STAGES, RECORD = "stages", "stage.json"
CODE = "code"  # key of a stage's settings: a digest of the measuring code
SHORT = "short"  # key of a stage's result: what it lacks for want of time
DRAFTS = ".scratch"
FAILED = "failed"  # key of a draft's record: the stage failed with this draft by a defect
_NO_ROOM = {  # the disk is full, read-only or broken, or too many files are open
    errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EFBIG, errno.EMFILE, errno.ENFILE,
    errno.ESTALE, errno.EIO,
}  # fmt: skip


class CannotRun(Exception):
    """A stage cannot run here. Its files are kept for the next call, and the other stages go on."""


class NotEnoughTime(CannotRun):
    """There is not enough time for a stage."""


class StageStatus(StrEnum):
    """How a stage ended in this call."""

    DONE = "done"  # ran in this call
    KEPT = "kept"  # finished by an earlier call
    SKIPPED = "skipped"  # not enough time, not possible here, or a stage that it needs is missing
    FAILED = "failed"  # a defect; the other stages went on


@dataclass(frozen=True, slots=True)
class Finished:
    """A stage that is complete on disk."""

    name: str
    folder: Path
    settings: Mapping[str, Any]
    result: Mapping[str, Any]
    wall_s: float
    finished_at: str

    @property
    def short(self) -> str:
        """What the stage left out for want of time, in words; "" if nothing. A later call continues the stage."""
        return str(self.result.get(SHORT) or "")

    def part(self, name: str) -> Path:
        """A file or folder that the stage wrote."""
        return self.folder / name


@dataclass(frozen=True, slots=True)
class StageRun:
    """The inputs of a running stage. It writes only into `folder`, which has its files from before an interruption."""

    folder: Path
    allowance_s: float | None  # seconds that the stage should use, its share of the time left; None: no limit
    finished: Mapping[str, Finished]  # complete earlier stages by name
    tell: Callable[[str, float | None], None]  # reports progress: (current activity, share done)
    limit_s: float | None = None  # seconds left of the budget, which the stage may use at most
    spent_s: Callable[[], float] = lambda: 0.0  # seconds since the stage began

    @property
    def left_s(self) -> float | None:
        """Seconds left of the stage's share; None for no limit."""
        return None if self.allowance_s is None else self.allowance_s - self.spent_s()

    @property
    def most_s(self) -> float | None:
        """Seconds that the stage may still use, including the shares of stages of less worth; None for no limit."""
        return None if self.limit_s is None else self.limit_s - self.spent_s()


@dataclass(frozen=True, slots=True)
class Stage:
    """One stage. `run` returns its result for stage.json (JSON values).

    Stages run in order of `worth`, the highest first. `estimate_s` is the time of a stage without a budget; with a
    budget, the time left is divided in proportion. A stage is not begun with less than `least_s` (None: `estimate_s`).
    `needs` names the stages that this one builds on; they must be worth more. `settings` are all values that its result
    depends on.
    """

    name: str
    run: Callable[[StageRun], Mapping[str, Any]]
    estimate_s: float
    worth: float
    least_s: float | None = None
    needs: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shortest_s(self) -> float:
        return self.estimate_s if self.least_s is None else self.least_s


@dataclass(frozen=True, slots=True)
class StageOutcome:
    """How one stage ended, with its record if it is complete."""

    stage: str
    status: StageStatus
    why: str = ""  # the reason, if skipped or failed; what the stage lacks, if time was short
    finished: Finished | None = None  # if done or kept


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    budget_s: float | None = None,
    on_progress: OnProgress = lambda progress: None,
    clock: Callable[[], float] = time.monotonic,
    began: float | None = None,
    over_s: float = 0.0,
    by_worth: bool = False,
) -> list[StageOutcome]:
    """Run the stages and return their outcomes in order.

    Stages that `folder` has with the same settings are kept. A kept stage that lacked time continues, if there is time.

    If the budget is shorter than the sum of the estimates, it is divided in proportion, or with `by_worth` the stages
    of most worth get their full estimates. The budget runs from `began` on the clock (None: now). A stage that still
    runs `over_s` after the budget's end is stopped and skipped, and a later call continues from its draft.

    A stage's UserError is raised at once, since a user's mistake concerns the other stages too. A defect fails its own
    stage and those that need it. Raises UserError if the folder cannot be written to.
    """
    began = clock() if began is None else began
    ordered = in_order(stages)
    files.make_folder(folder)
    transcript = Transcript(folder, on_progress)
    found: dict[str, Finished] = {}
    outcomes: list[StageOutcome] = []
    kept = _kept(ordered, folder, transcript)
    unfinished = {name: kept.pop(name) for name in list(kept) if kept[name].short}
    waiting = [stage for stage in ordered if stage.name not in kept]
    anew: set[str] = set()
    for stage in ordered:
        if stage.name in kept and not anew & set(stage.needs):
            outcome = StageOutcome(stage.name, StageStatus.KEPT, finished=kept[stage.name])
            transcript.note(stage.name, "kept", f"of {kept[stage.name].finished_at}")
        else:
            left_s = None if budget_s is None else budget_s - (clock() - began)
            before = unfinished.get(stage.name)
            if before is not None:
                _take_up(before, folder, stage)
            allowance_s = allowance(stage, waiting, left_s, by_worth)
            outcome = _one(stage, folder, found, allowance_s, left_s, transcript, clock, over_s)
            if outcome.status is StageStatus.SKIPPED and before is not None:
                outcome = StageOutcome(stage.name, StageStatus.KEPT, before.short, before)
            if outcome.status is StageStatus.DONE:
                anew.add(stage.name)
            if stage in waiting:
                waiting.remove(stage)
        outcomes.append(outcome)
        stop_if_asked()
        if outcome.finished is not None:
            found[stage.name] = outcome.finished
    return outcomes


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Make the output folder and lock it against a second process. Raises UserError if it cannot be written to."""
    with at_work_in(folder, "out"):
        try:
            yield
        except OSError as error:
            if _is_of_the_folder(error, folder):
                raise unwritable(folder, error) from error
            raise


def in_order(stages: Sequence[Stage]) -> list[Stage]:
    """The stages by worth. Raises ValueError if a stage needs one that is missing or comes after it."""
    ordered = sorted(stages, key=lambda stage: -stage.worth)
    seen: set[str] = set()
    for stage in ordered:
        if missing := set(stage.needs) - seen:
            raise ValueError(f"stage {stage.name} needs {', '.join(sorted(missing))} before it")
        seen.add(stage.name)
    return ordered


def read_finished(folder: Path) -> dict[str, Finished]:
    """All complete stages in an output folder, with any settings. A stage with a damaged record is not complete."""
    found = {}
    for path in sorted((folder / STAGES).glob(f"*/{RECORD}")):
        with suppress(UserError):
            found[path.parent.name] = read_record(path)[0]
    return found


def drafts_in(folder: Path) -> list[str]:
    """Names of interrupted stages that have a draft."""
    return sorted(path.stem for path in (folder / DRAFTS).glob("*.json") if path.with_suffix("").is_dir())


def read_record(path: Path) -> tuple[Finished, Mapping[str, str]]:
    """The finished stage of a `stage.json`, and when the stages that it needs were finished.

    Raises UserError for a damaged record.
    """
    fix = "remove the stage's folder: the stage is then measured anew"
    record = read_json(path, fix)
    fields = Fields(record, str(path), fix)
    for name in ("settings", "result", "needs"):
        if not isinstance(fields.value(name), dict):
            raise fields.wrong(name, record[name], "values by name")
    fields.text("stage", (path.parent.name,))
    fields.text("finished_at")
    fields.number("wall_s", 0, 1e9)
    return _finished(path.parent, record), record["needs"]


def _one(
    stage: Stage,
    folder: Path,
    found: Mapping[str, Finished],
    allowance_s: float | None,
    left_s: float | None,
    transcript: Transcript,
    clock: Callable[[], float],
    over_s: float,
) -> StageOutcome:
    if missing := [name for name in stage.needs if name not in found]:
        return _skipped(stage, f"needs {', '.join(missing)}, which is not there", transcript)
    if left_s is not None and left_s < stage.shortest_s:
        why = f"{max(0.0, left_s):.0f} s of the budget are left and it takes {stage.shortest_s:.0f} s or more"
        return _skipped(stage, why, transcript)
    transcript.note(stage.name, "started", "" if allowance_s is None else f"with {allowance_s:.0f} s")
    began = clock()
    needs = {name: found[name].finished_at for name in stage.needs}
    try:
        ends_s = None if left_s is None or clock is not time.monotonic else left_s + over_s
        with _draft(folder, stage, needs, transcript) as draft:
            tell = partial(transcript.going, stage.name)
            run = StageRun(draft, allowance_s, dict(found), tell, left_s, lambda: clock() - began)
            with at_most(ends_s):
                result = stage.run(run)
            record = {
                "stage": stage.name,
                "settings": _plain(stage.settings),
                "needs": needs,
                "result": result,
                "wall_s": round(clock() - began, 3),
                "finished_at": now(),
            }
            files.write_json(draft / RECORD, record)
            place = put(draft, folder / STAGES / stage.name)
    except CannotRun as error:
        return _skipped(stage, str(error), transcript)
    except TimeIsUp:
        why = f"the budget was spent after {clock() - began:.0f} s of it; a later call goes on with what it has"
        return _skipped(stage, why, transcript)
    except UserError as error:
        transcript.note(stage.name, "failed", str(error))
        raise
    except OSError as error:
        if _is_of_the_folder(error, folder):
            transcript.note(stage.name, "failed", str(error))
            raise unwritable(folder, error) from error
        return StageOutcome(stage.name, StageStatus.FAILED, transcript.defect(stage.name, error))
    except MemoryError as error:
        transcript.note(stage.name, "failed", "out of memory")
        allowed = "the memory of this machine did not suffice"
        raise UserError("stage", stage.name, allowed, "load fewer layers, or measure smaller batches") from error
    except Exception as error:
        if (message := lacking(error)) is not None:
            transcript.note(stage.name, "failed", str(message))
            raise message from error
        return StageOutcome(stage.name, StageStatus.FAILED, transcript.defect(stage.name, error))
    finished = _finished(place, record)
    transcript.note(stage.name, "done", f"{record['wall_s']:.1f} s{', ' if finished.short else ''}{finished.short}")
    return StageOutcome(stage.name, StageStatus.DONE, finished.short, finished)


def _skipped(stage: Stage, why: str, transcript: Transcript) -> StageOutcome:
    transcript.note(stage.name, "skipped", why)
    return StageOutcome(stage.name, StageStatus.SKIPPED, why)


class Timed(Protocol):
    """The times of a stage, as `allowance` needs them."""

    @property
    def estimate_s(self) -> float: ...
    @property
    def shortest_s(self) -> float: ...


def allowance(
    stage: Timed, waiting: Sequence[Timed], left_s: float | None, by_worth: bool = False
) -> float | None:
    """The stage's seconds of `left_s`, in proportion to the estimates of all waiting stages; None for no limit.

    `by_worth`: if `left_s` is less than the sum of the estimates, the stage gets its full estimate.
    """
    if left_s is None:
        return None
    total_s = sum(other.estimate_s for other in waiting)
    if by_worth and left_s < total_s:
        return max(stage.shortest_s, min(stage.estimate_s, left_s))
    return max(stage.shortest_s, left_s * stage.estimate_s / total_s) if total_s else left_s


def _kept(ordered: Sequence[Stage], folder: Path, transcript: Transcript) -> dict[str, Finished]:
    """Finished stages with the same settings and needs as now. Notes in the transcript why others are outdated."""
    kept: dict[str, Finished] = {}
    for stage in ordered:
        path = folder / STAGES / stage.name / RECORD
        if not path.is_file():
            continue
        try:
            finished, needs = read_record(path)
        except UserError:
            transcript.note(stage.name, "outdated", "its record cannot be read: it is measured anew")
            continue
        why = _changed(finished.settings, _plain(stage.settings))
        newer = [n for n in stage.needs if n not in kept or kept[n].finished_at != needs.get(n)]
        if why or newer:
            why = why or f"{', '.join(newer)} is measured anew"
            transcript.note(stage.name, "outdated", f"{why}: measured anew")
        else:
            kept[stage.name] = finished
    return kept


def _changed(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """A description of the differences; "" if there are none."""
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    told = [f"{key} was {before.get(key)!r} and is {now.get(key)!r}" for key in sorted(keys) if key != CODE]
    return ", ".join([*told, *(["the measuring code changed"] if CODE in keys else [])])


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as they are after writing them to a file and reading them back."""
    plain: dict[str, Any] = json.loads(files.to_json(dict(settings)))
    return plain


def _finished(folder: Path, record: Mapping[str, Any]) -> Finished:
    return Finished(
        record["stage"], folder, record["settings"], record["result"], float(record["wall_s"]), record["finished_at"]
    )


@contextmanager
def _draft(folder: Path, stage: Stage, needs: Mapping[str, str], transcript: Transcript) -> Iterator[Path]:
    """The draft of a stage: its folder until it finishes. The draft is kept unless the stage fails twice by a defect.

    A draft of other settings, code or needs is cleared. For other settings or code, the transcript says so.
    """
    place = folder / DRAFTS / stage.name
    basis = place.with_name(f"{stage.name}.json")
    now_is = _basis(stage, needs)
    before = _read_basis(basis)
    if place.is_dir() and before.get("settings") != now_is["settings"]:
        why = _changed(before.get("settings") or {}, now_is["settings"]) if before else "nothing says of what it is"
        transcript.note(stage.name, "outdated", f"{why}: what an interrupted call has left is measured anew")
    same = all(before.get(key) == value for key, value in now_is.items())
    if not same:
        shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True, exist_ok=True)
    failed_before = same and bool(before.get(FAILED))
    files.write_text(basis, files.to_json({**now_is, FAILED: failed_before}))
    try:
        yield place
    except (UserError, CannotRun):
        raise
    except Exception as error:
        defect = lacking(error) is None and not (isinstance(error, OSError) and _is_of_the_folder(error, folder))
        if defect and failed_before:
            shutil.rmtree(place, ignore_errors=True)
            basis.unlink(missing_ok=True)
        elif defect:
            files.write_text(basis, files.to_json({**now_is, FAILED: True}))
        raise
    basis.unlink(missing_ok=True)
    with suppress(OSError):
        place.parent.rmdir()  # unless another interrupted stage is in there


def put(draft: Path, place: Path) -> Path:
    """Move the finished folder to its place, replacing an outdated one."""
    place.parent.mkdir(exist_ok=True)
    if place.exists():
        shutil.rmtree(place)
    os.rename(draft, place)
    return place


def _take_up(before: Finished, folder: Path, stage: Stage) -> None:
    """Copy a finished stage to its draft, from which the stage continues, unless there is a draft already."""
    place = folder / DRAFTS / stage.name
    if not place.exists():
        shutil.copytree(before.folder, place)
        (place / RECORD).unlink()
        basis = _basis(stage, read_record(before.folder / RECORD)[1])
        files.write_text(place.with_name(f"{stage.name}.json"), files.to_json(basis))


def _basis(stage: Stage, needs: Mapping[str, str]) -> dict[str, Any]:
    return {"settings": _plain(stage.settings), "needs": dict(needs)}


def _read_basis(path: Path) -> dict[str, Any]:
    """The settings and needs of a draft, from its record; {} if the record is missing or damaged."""
    with suppress(UserError):
        return read_json(path, "remove it")
    return {}


def _is_of_the_folder(error: OSError, folder: Path) -> bool:
    """Whether the error means that the folder cannot be written to. Any other error is a defect of a stage."""
    return error.errno in _NO_ROOM or not folder.is_dir()


def unwritable(folder: Path, error: OSError) -> UserError:
    fix = "free space on the disk or choose a folder that you may write to; finished stages are kept"
    return UserError("out", str(folder), f"cannot be written: {error.strerror or error}", fix)
