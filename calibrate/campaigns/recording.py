"""Writes down all that a device answered, and answers from what was written. Knows the device's calls, no meaning.

One line of JSON for each answer, in order. What was computed from a device's answers can so be computed again without
it, to the last bit: that is how code for a card that is not here is tested with what the card said.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from calibrate.device import Copy, Device, DeviceFacts, Step
from helios_sim.errors import UserError
from helios_sim.report.files import to_json

_FIX = "record it anew"


class Recorded:
    """A device that answers as `inner` does and notes it. `now_s` and `sleep` are noted too: hand them on."""

    def __init__(self, inner: Device, file: IO[str], now_s: Callable[[], float] = time.monotonic) -> None:
        self._inner, self._file, self._now_s = inner, file, now_s
        self.facts, self.asynchronous, self.host_buffers = inner.facts, inner.asynchronous, inner.host_buffers
        about = {"asynchronous": self.asynchronous, "host_buffers": list(self.host_buffers)}
        self._note("facts", {**asdict(self.facts), **about})

    @property
    def torch_device(self) -> str:
        return self._inner.torch_device

    def prepare(self, step: Step) -> Step:
        return self._inner.prepare(step)

    def laps_s(self, steps: Sequence[Step]) -> list[float]:
        return self._note("laps_s", self._inner.laps_s(steps))

    def launch_s(self, step: Step) -> float:
        return self._note("launch_s", self._inner.launch_s(step))

    def wait(self) -> None:
        self._inner.wait()

    def peak_bytes(self, step: Step) -> int | None:
        return self._note("peak_bytes", self._inner.peak_bytes(step))

    def used_bytes(self) -> int | None:
        return self._note("used_bytes", self._inner.used_bytes())

    def energy_j(self) -> float | None:
        return self._note("energy_j", self._inner.energy_j())

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        return self._inner.host_buffer(n_bytes, kind)

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> Copy:
        return _RecordedCopy(self._inner.start_copy(pairs, repeats), lambda s: self._note("copy_s", s))

    def waited_s(self) -> float | None:
        return self._note("waited_s", self._inner.waited_s())

    def disturbance(self) -> dict[str, float]:
        return self._note("disturbance", self._inner.disturbance())

    def now_s(self) -> float:
        return self._note("now_s", self._now_s())

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def _note(self, call: str, answer: Any) -> Any:
        self._file.write(to_json([call, answer]) + "\n")
        return answer


class _RecordedCopy:
    def __init__(self, inner: Copy, note: Callable[[float], Any]) -> None:
        self._inner, self._note = inner, note

    def wait_s(self) -> float:
        seconds = self._inner.wait_s()
        self._note(seconds)
        return seconds


class Replayed:
    """A device that computes nothing: tensors on it have shapes alone, and its answers come from a record.

    UserError where the record is damaged or something else is asked than was asked then.
    """

    torch_device = "meta"

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError("record", str(path), f"cannot be read: {error}", _FIX) from error
        self._at = 0
        facts = self._next("facts")
        self.asynchronous: bool = facts.pop("asynchronous")
        self.host_buffers: tuple[str, ...] = tuple(facts.pop("host_buffers"))
        self.facts = DeviceFacts(**facts)

    @property
    def finished(self) -> bool:
        """Everything was asked that was asked then."""
        return self._at == len(self._lines)

    def prepare(self, step: Step) -> Step:
        return _nothing

    def laps_s(self, steps: Sequence[Step]) -> list[float]:
        laps: list[float] = self._next("laps_s")
        if len(laps) != len(steps):
            raise self._other(f"{len(steps)} steps where {len(laps)} were timed")
        return laps

    def launch_s(self, step: Step) -> float:
        return float(self._next("launch_s"))

    def wait(self) -> None:
        return None

    def peak_bytes(self, step: Step) -> int | None:
        found: int | None = self._next("peak_bytes")
        return found

    def used_bytes(self) -> int | None:
        found: int | None = self._next("used_bytes")
        return found

    def energy_j(self) -> float | None:
        found: float | None = self._next("energy_j")
        return found

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        import torch

        return torch.empty(n_bytes, dtype=torch.uint8, device=self.torch_device)

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> Copy:
        return _ReplayedCopy(lambda: float(self._next("copy_s")))

    def waited_s(self) -> float | None:
        found: float | None = self._next("waited_s")
        return found

    def disturbance(self) -> dict[str, float]:
        return dict(self._next("disturbance"))

    def now_s(self) -> float:
        return float(self._next("now_s"))

    def sleep(self, seconds: float) -> None:
        return None

    def _next(self, call: str) -> Any:
        if self._at >= len(self._lines):
            raise self._other(f"{call} after its end")
        noted, answer = self._lines[self._at]
        if noted != call:
            raise self._other(f"{call} where {noted} was asked")
        self._at += 1
        return answer

    def _other(self, what: str) -> UserError:
        return UserError("record", str(self._path), f"line {self._at + 1}: {what}; it is of another measurement", _FIX)


class _ReplayedCopy:
    def __init__(self, answer: Callable[[], float]) -> None:
        self._answer = answer

    def wait_s(self) -> float:
        return self._answer()


def _nothing() -> None:
    """Computed long ago."""
