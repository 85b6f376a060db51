"""What measuring needs from a device, and which devices there are. Knows no model and no table.

Every measurement in this package speaks to a `Device`; a CPU and a CUDA card are two implementations of it, and a
test may bring a third. Times are seconds of the device: on a card the time between two events on its stream, on a CPU
the monotonic clock around the same work, since there host and device are the same cores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from helios_sim.errors import UserError

Step = Callable[[], object]


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What is known of a device without measuring it. None where the device does not say."""

    kind: str  # cpu or cuda
    name: str  # short, for names of profiles: epyc-2core, h100-80gb-hbm3
    description: str
    memory_bytes: int  # that the engine may have
    power_limit_w: float | None
    versions: Mapping[str, str] = field(default_factory=dict)


class Copy(Protocol):
    """A transfer under way."""

    def wait_s(self) -> float:
        """Seconds from its start to its end; returns when it has ended."""
        ...


class Device(Protocol):
    """One device as the harness sees it."""

    facts: DeviceFacts
    asynchronous: bool  # the host issues work and goes on; launches and synchronising then cost time of their own
    host_buffers: tuple[str, ...]  # kinds of host memory that weights may be loaded from, the engine's first

    @property
    def torch_device(self) -> str: ...

    def prepare(self, step: Step) -> Step:
        """The step as the engine would run it at its best: a captured graph where the device has them."""
        ...

    def laps_s(self, steps: Sequence[Step]) -> list[float]:
        """Device seconds of each of the steps, run back to back."""
        ...

    def launch_s(self, step: Step) -> float:
        """Host seconds to issue the step to an idle device, not waiting for it."""
        ...

    def wait(self) -> None:
        """Returns when the device has nothing left to do."""
        ...

    def peak_bytes(self, step: Step) -> int | None:
        """How far memory in use rose above what was in use before, while the step ran; None where it cannot tell."""
        ...

    def used_bytes(self) -> int | None: ...

    def energy_j(self) -> float | None:
        """A counter that only rises; None where there is none."""
        ...

    def host_buffer(self, n_bytes: int, kind: str) -> Any:
        """A tensor of that many bytes in one of `host_buffers`, filled with noise."""
        ...

    def start_copy(self, pairs: Sequence[tuple[Any, Any]], repeats: int = 1) -> Copy:
        """Copies each pair's first tensor into its second beside whatever else runs, `repeats` times over."""
        ...

    def waited_s(self) -> float | None:
        """A counter of seconds in which this process was ready to run and others had its cores.

        None where that does not touch the device's times.
        """
        ...

    def disturbance(self) -> dict[str, float]:
        """Readings that tell whether others use the machine or its clock is held back."""
        ...


def open_device(name: str, memory_bytes: int | None = None, threads: int | None = None) -> Device:
    """`cpu`, `cuda` or `cuda:N`. `memory_bytes` is what the engine may use; None: what the device has free or in all.

    Raises UserError when the device is unknown or absent.
    """
    if name == "cpu":
        from calibrate.cpu import CpuDevice

        return CpuDevice.open(memory_bytes, threads)
    if name == "cuda" or (name.startswith("cuda:") and name[5:].isdigit()):
        from calibrate.cuda import CudaDevice

        return CudaDevice.open(int(name[5:] or 0), memory_bytes)
    raise UserError("device", name, "cpu, cuda or cuda:N", "choose one of these")


def short_name(description: str) -> str:
    """`NVIDIA H100 80GB HBM3` becomes `h100-80gb-hbm3`: a name for folders."""
    words = description.lower().replace("(r)", "").replace("(tm)", "").replace("_", " ").split()
    return "-".join(w for w in words if w not in {"nvidia", "amd", "intel", "cpu", "processor", "@"})
