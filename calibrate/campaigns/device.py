"""The device report of a campaign (ceilings, buses, launches, waits, power), and recorded devices.

Everything is measured through a device and a clock that are passed in. `RecordingDevice` writes each answer of a device
as a line of JSON. `ReplayedDevice` gives the recorded answers without the device, which reproduces all results computed
from them to the last bit. So code for a card that is not available is tested with the card's recorded answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from calibrate.measure.ceilings import Ceilings, measure_ceilings
from calibrate.measure.device import Copy, DeviceFacts, Step, TimedDevice, measure_energy, why_absent
from calibrate.measure.sampling import figure
from calibrate.stages import SHORT, StageRun
from calibrate.work import CEILINGS
from helios_sim.errors import UserError
from helios_sim.files import to_json
from helios_sim.untrusted import parse_json, read_bytes, reading

if TYPE_CHECKING:
    from calibrate.inputs import Inputs

REPEATS = 15
COPY_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
CHAIN = 200  # small kernels launched in a row
SMALL = 256  # values that a small kernel works on
_FIX = "record it anew"
_MOST_BYTES = 64 << 20


def measure_device(
    device: TimedDevice,
    dtype: str,
    now_s: Callable[[], float],
    sleep: Callable[[float], None],
    *,
    buffer_bytes: int | None = None,
    matrix_rows: int | None = None,
    copy_bytes: int | None = None,
    power: bool = True,
) -> dict[str, Any]:
    """The report as JSON values in seconds, bytes and watts; None for a figure that the device cannot give.

    `power`: measure it here, which takes half a minute on a card.
    """
    ceilings = measure_ceilings(device, dtype, buffer_bytes=buffer_bytes, matrix_rows=matrix_rows)
    n_bytes = copy_bytes or COPY_BYTES[device.facts.kind]
    joules = measure_energy(device, _loads(device, dtype, ceilings), now_s, sleep) if power else None
    absent = why_absent(device) if power else "it is measured last, in a stage of its own"
    return {
        "facts": asdict(device.facts),
        "ceilings": ceilings.to_json(),
        "host_copies": {kind: _copies(device, n_bytes, kind) for kind in device.host_buffers},
        "copied_bytes": n_bytes,
        "launch": _launches(device) if device.asynchronous else None,
        "sync_s": _sync_s(device, now_s) if device.asynchronous else None,
        "power": None if joules is None else joules.to_json(),
        "power_absent": absent if joules is None else None,
        "disturbance": device.disturbance(),
    }


def measure_card_energy(models: Sequence[Inputs], dtype: str, stage: StageRun) -> dict[str, Any]:
    """Joules of the device's heaviest loads and of iterations of each model, each model loaded by itself.

    Measurements for which there is no time are left out, and `short` names them.
    """
    from calibrate.measure.profile import energy_steps
    from calibrate.measure.subject import Subject

    device, short = models[0].device, ""
    found: dict[str, Any] = {}
    ceilings = Ceilings.from_json(stage.finished[CEILINGS].result["ceilings"])
    for inputs in models:
        name = inputs.config.model.name
        if found and stage.left_s is not None and stage.spent_s() > stage.left_s:
            short = f"no time was left for {name}"
            break
        steps = {} if found else _loads(device, dtype, ceilings)
        try:
            model, _ = inputs.loaded
            subject = Subject(model, device, inputs.limits(), None, inputs.config.seed)
            joules = measure_energy(device, {**steps, **energy_steps(subject)})
        finally:
            inputs.__dict__.pop("loaded", None)
        if joules is None:
            return {"found": {}, "absent": why_absent(device), SHORT: ""}
        found[name] = joules.to_json()
    return {"found": found, "absent": None, SHORT: short}


def _copies(device: TimedDevice, n_bytes: int, kind: str) -> dict[str, float]:
    """Bytes per second to the device and back, with nothing else running."""
    import torch

    host = device.host_buffer(n_bytes, kind)
    place = torch.empty(n_bytes, dtype=torch.uint8, device=device.torch_device)
    found = {}
    device.wait()
    for name, pair in (("to_device_bytes_per_s", (host, place)), ("to_host_bytes_per_s", (place, host))):
        device.start_copy([pair]).wait_s()
        found[name] = n_bytes / figure([device.start_copy([pair]).wait_s() for _ in range(REPEATS)]).median_s
    return found


def _launches(device: TimedDevice) -> dict[str, float]:
    """Host seconds per eager small kernel and per captured graph of many, and device seconds per kernel in a graph."""
    import torch

    small = torch.ones(SMALL, device=device.torch_device)

    def chain() -> object:
        for _ in range(CHAIN):
            small.add_(1.0)
        return small

    eager_s = figure([device.launch_s(chain) for _ in range(REPEATS)]).median_s
    captured = device.prepare(chain)
    device.laps_s([captured])
    graph_s = figure([device.launch_s(captured) for _ in range(REPEATS)]).median_s
    laps_s = figure([device.laps_s([captured])[0] for _ in range(REPEATS)]).median_s
    return {
        "host_s_per_kernel": eager_s / CHAIN,
        "host_s_per_graph": graph_s,
        "device_s_per_kernel_in_graph": laps_s / CHAIN,
        "kernels": float(CHAIN),
    }


def _sync_s(device: TimedDevice, now_s: Callable[[], float]) -> float:
    """Seconds for a small kernel and its result on the host: the least cost of a decision on the host."""
    import torch

    small = torch.ones(SMALL, device=device.torch_device)
    ask: Step = _on_host(small)
    found = []
    for _ in range(REPEATS):
        device.wait()
        before_s = now_s()
        ask()
        found.append(now_s() - before_s)
    return figure(found).median_s


def _on_host(small: Any) -> Step:
    return lambda: (small + 1.0).tolist() if small.device.type != "meta" else None


def _loads(device: TimedDevice, dtype: str, ceilings: Ceilings) -> dict[str, Step]:
    """The steps that draw most power: products of large matrices, and reading memory."""
    import torch

    on, kind, n = device.torch_device, getattr(torch, dtype), ceilings.matrix_rows
    a, b = (torch.randn(n, n, device=on).to(kind) for _ in range(2))
    source = torch.randn(ceilings.buffer_bytes // 4, device=on)
    return {"matrix product": lambda: torch.mm(a, b), "read": source.sum}


class RecordingDevice:
    """A device that answers as `inner` does and records each answer, including those of its `now_s`."""

    def __init__(self, inner: TimedDevice, file: IO[str], now_s: Callable[[], float] = time.monotonic) -> None:
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


class ReplayedDevice:
    """A device that computes nothing (its tensors have only shapes) and answers from a record.

    Raises UserError if the record is damaged or a call differs from the recorded one.
    """

    torch_device = "meta"

    def __init__(self, path: Path) -> None:
        self._path = path
        with reading("record", str(path), "cannot be read", _FIX):
            lines = read_bytes(path, _MOST_BYTES, _FIX).decode().splitlines()
            self._lines = [parse_json(line) for line in lines]
            self._at = 0
            facts = self._next("facts")
            self.asynchronous: bool = facts.pop("asynchronous")
            self.host_buffers: tuple[str, ...] = tuple(facts.pop("host_buffers"))
            self.facts = DeviceFacts(**facts)

    @property
    def finished(self) -> bool:
        """Whether all recorded answers were used."""
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
    """Does nothing."""
