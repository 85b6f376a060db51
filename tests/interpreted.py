"""Triton's kernels on a CPU, by its own interpreter. Import this before anything that imports Triton."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


# The interpreter puts itself in the place of the language at every call of a function of a kernel, which takes most of
# its time. Here it does so once.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda function: interpreter._LangPatchScope()
# That of Triton 3.6 makes no index of an array with one value, which numpy 2.4 wants.
tl.tensor.__index__ = lambda self: int(self.handle.data.reshape(-1)[0])
_builder = interpreter.InterpreterBuilder
_dot, _cast, _load = _builder.create_dot, _builder.cast_impl, _builder.create_masked_load


def _wide(bits: Any) -> Any:
    """bfloat16, which the interpreter keeps as 16 bits, in float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _cast_as_a_card(self: Any, value: Any, to: Any) -> Any:
    """To the nearest bfloat16, as a card rounds. The interpreter cuts."""
    before, after = value.dtype.scalar, to.scalar
    if before == tl.bfloat16 and after == tl.float32:
        return interpreter.TensorHandle(_wide(value.data), after)
    if before == tl.float32 and after == tl.bfloat16:
        bits = np.ascontiguousarray(value.data).view(np.uint32)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        return interpreter.TensorHandle(np.where(np.isnan(value.data), np.uint16(0x7FC0), nearest), after)
    return _cast(self, value, to)


def _dot_of_numbers(self: Any, a: Any, b: Any, *more: Any) -> Any:
    """The interpreter multiplies the bits of bfloat16 as whole numbers."""
    pair = [
        interpreter.TensorHandle(_wide(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b)
    ]
    return _dot(self, *pair, *more)


_builder.cast_impl, _builder.create_dot = _cast_as_a_card, _dot_of_numbers


class Reads:
    """Bytes that kernels loaded of some tensors, each load counted."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        self.n_bytes = 0
        self._ranges = [(t.data_ptr(), t.data_ptr() + t.numel() * t.element_size(), t.element_size()) for t in tensors]

    def note(self, pointers: Any, mask: Any) -> None:
        places, read = np.broadcast_arrays(pointers.data, mask.data)
        at = places[read.astype(bool)]
        for start, end, size in self._ranges:
            self.n_bytes += int(((at >= start) & (at < end)).sum()) * size


@contextmanager
def reads(tensors: list[torch.Tensor]) -> Iterator[Reads]:
    """Count what is read of these tensors."""
    counted = Reads(tensors)

    def noted(self: Any, pointers: Any, mask: Any, *more: Any) -> Any:
        counted.note(pointers, mask)
        return _load(self, pointers, mask, *more)

    _builder.create_masked_load = noted
    try:
        yield counted
    finally:
        _builder.create_masked_load = _load
