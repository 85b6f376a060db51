"""Kernels compiled for cards that are not here: what each launch of a wrapper needs, as ptxas says."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from helios_sim.live.kernels import activation, attention, gemv, head, leave, norms, turn

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.float64: "*fp64", torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # that a block may have
OPTIONS = ("num_warps", "num_stages", "maxnreg")


@dataclass(frozen=True)
class Built:
    """What one compiled kernel needs."""

    name: str
    card: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    constants: dict[str, Any]
    tensor_cores: bool
    asynchronous: bool  # copies into shared memory while it computes


Launch = tuple[Any, tuple[Any, ...], dict[str, Any]]


@contextmanager
def noted() -> Iterator[list[Launch]]:
    """Kernels are noted with their arguments where they would be launched. Nothing is computed."""
    found: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        found.append((kernel, given, constants))

    with pytest.MonkeyPatch.context() as patch:
        for module in (activation, attention, gemv, head, leave, norms, turn):
            patch.setattr(module, "launch", note)
        yield found


def launches(call: Callable[[], object]) -> list[Launch]:
    """The kernels that `call` would launch."""
    with noted() as found:
        call()
    return found


def build(kernel: Any, given: tuple[Any, ...], constants: dict[str, Any], card: int) -> Built:
    """Compile as the launch would: numbers that divide by 16 are known to, and 1 is a constant."""
    options = {name: constants[name] for name in OPTIONS if name in constants}
    fixed = {name: value for name, value in constants.items() if name not in OPTIONS}
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[Any]]] = {}
    values = dict(zip(kernel.arg_names, given, strict=False)) | fixed
    for place, name in enumerate(kernel.arg_names):
        value = values[name]
        if name in fixed or (type(value) is int and value == 1):
            signature[name], fixed[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            attributes[(place,)] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[name] = "i32" if value < 1 << 31 else "i64"
            if value % 16 == 0:
                attributes[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=attributes)
    made = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    ptx = made.asm["ptx"]
    return Built(
        kernel.__name__, card, *_needs(ptx, card), made.metadata.shared, constants,
        "mma" in ptx or "tcgen05" in ptx, "cp.async" in ptx,
    )  # fmt: skip


def _needs(ptx: str, card: int) -> tuple[int, int]:
    """Registers of a thread and bytes that are spilled, by `ptxas -v`."""
    found = re.search(r"^\.target (sm_\w+)", ptx, re.M)
    assert found
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    tool = folder / ("ptxas-blackwell" if card >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx", delete=False) as file:
        file.write(ptx)
    try:
        said = subprocess.run(
            [str(tool), "-v", f"--gpu-name={found[1]}", file.name, "-o", os.devnull], capture_output=True, text=True,
            check=True,
        ).stderr  # fmt: skip
    finally:
        os.unlink(file.name)
    registers = max(int(n) for n in re.findall(r"Used (\d+) registers", said))
    return registers, sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", said))
