"""What measuring needs from a device (`TimedDevice`).

Every measurement goes through this protocol. `devices.py` implements it for a CPU and for a CUDA card; a test may pass
its own. Times are seconds of the device: on a card the time between two events on its stream, on a CPU the monotonic
clock around the same work, since there host and device are the same cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What is known about a device without measuring it. None: the device does not tell."""

    kind: str  # cpu or cuda
    name: str  # short, for names of profiles: epyc-2core, h100-80gb-hbm3
    description: str
    memory_bytes: int  # memory that the engine may use
    power_limit_w: float | None
    versions: Mapping[str, str] = field(default_factory=dict)


class Copy(Protocol):
    """A copy in progress."""

    def wait_s(self) -> float:
        """Wait for its end. Returns the seconds from its start to its end."""
        ...


class TimedDevice(Protocol):
    """One device with everything that measurements need."""

    facts: DeviceFacts
    asynchronous: bool  # the host issues work and goes on, so that launches and synchronization cost extra time
    host_buffers: tuple[str, ...]  # kinds of host memory to load weights from, the engine's kind first

    @property
    def torch_device(self) -> str: ...

    def prepare(self, step: Step) -> Step:
        """The step in its fastest form: a captured graph if the device supports it."""
        ...

    def laps_s(self, steps: Sequence[Step]) -> list[float]:
        """Device seconds of each step, run back to back."""
        ...

    def launch_s(self, step: Step) -> float:
        """Host seconds to issue the step to an idle device, without waiting for it."""
        ...

    def wait(self) -> None:
        """Wait until the device is idle."""
        ...

    def peak_bytes(self, step: Step) -> int | None:
        """By how much memory use rose while the step ran. None if the device cannot tell."""
        ...

    def used_bytes(self) -> int | None:
        """Memory in use. None if the device cannot tell."""
        ...

    def energy_j(self) -> float | None:
        """An energy counter in joules that only rises. None if there is none."""
        ...

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        """A tensor of `n_bytes` noise in the given kind of host memory."""
        ...

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> Copy:
        """Start copying each pair's first tensor into its second, `repeats` times, while other work goes on."""
        ...

    def waited_s(self) -> float | None:
        """A counter of the seconds in which this process was ready to run but others had its cores.

        None if that does not affect the device's times.
        """
        ...

    def disturbance(self) -> dict[str, float]:
        """Readings that show whether others use the machine or its clock is throttled."""
        ...


def short_name(description: str) -> str:
    """A short name for folders: `NVIDIA H100 80GB HBM3` becomes `h100-80gb-hbm3`."""
    words = description.lower().replace("(r)", "").replace("(tm)", "").replace("_", " ").split()
    return "-".join(w for w in words if w not in {"nvidia", "amd", "intel", "cpu", "processor", "@"})
