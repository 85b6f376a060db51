"""The header of a GGUF file: its metadata, and the shape, kind and place of every tensor.

It is parsed here because the `gguf` package's reader makes an object of every token of the vocabulary (13 s for
Gemma-3's 262,144). Every length is compared with what is left of the file before anything of that length is read.
Format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

from helios_sim.errors import WeightsError
from helios_sim.untrusted import is_lfs_pointer, lfs_pointer, reading

FETCH_AGAIN = "fetch the file again"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_ARRAY_KEPT = 4096  # longer arrays are vocabularies
_LONGEST_ARRAY, _LONGEST_NAME, _LONGEST_STRING = 1 << 22, 1 << 10, 16 << 20
_MOST_ENTRIES = 1 << 17  # keys, and tensors
_LEAST_KEY_BYTES, _LEAST_TENSOR_BYTES = 13, 32
_OLD_FORMATS = (b"ggml", b"lmgg", b"ggmf", b"fmgg", b"ggjt", b"tjgg", b"ggla", b"algg")
# ggml's kinds of stored values that this program knows: name, values of a block, bytes of a block
KINDS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292),
    16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136),
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
_REMOVED = {  # kinds of tensors that ggml no longer reads
    4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8",
    38: "IQ4_NL_8_8",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class LongArray:
    """Stands for an array that is too long to keep."""

    length: int


@dataclass(frozen=True, slots=True)
class StoredTensor:
    shape: tuple[int, ...]  # rows first
    kind: int  # of `KINDS`
    offset: int  # bytes from the beginning of the file

    @property
    def row_bytes(self) -> int:
        return stored_bytes(self.shape[-1], self.kind)

    @property
    def n_bytes(self) -> int:
        return prod(self.shape[:-1]) * self.row_bytes


@dataclass(frozen=True, slots=True)
class GgufHeader:
    metadata: dict[str, Any]
    tensors: dict[str, StoredTensor]


_PREFIXES = ("general", "tokenizer", "quantize", "split", "GGUF")


def foreign_keys(metadata: Mapping[str, Any], family: str) -> list[str]:
    """Names of keys of another family, or of programs that are not known, which llama.cpp passes over."""
    return [str(name) for name in metadata if str(name).partition(".")[0] not in (*_PREFIXES, family)]


def stored_bytes(n_values: int, kind: int) -> int:
    _, block_values, block_bytes = KINDS[kind]
    return n_values // block_values * block_bytes


def read_header(path: Path) -> GgufHeader:
    """Read the header and check that the file holds every tensor's bytes.

    Raises WeightsError for a damaged file, and for versions, byte orders, parts of a split file and kinds of tensors
    that are not read.
    """
    with reading(str(path), "damaged", "a whole GGUF file of version 2 or 3", FETCH_AGAIN, WeightsError):
        with path.open("rb") as file:
            header = _Reader(path, file).header()
        _check_places(path, header.tensors)
    return header


class _Reader:
    def __init__(self, path: Path, file: BinaryIO) -> None:
        self._path, self._file, self._n_bytes = path, file, path.stat().st_size

    def header(self) -> GgufHeader:
        self._check_format()
        n_tensors, n_keys = self._unpack("QQ")
        self._check_count(n_keys, _LEAST_KEY_BYTES, _MOST_ENTRIES, "keys")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            name = self._string(_LONGEST_NAME)
            if name in metadata:
                raise self._wrong(f"key {name}", "twice", "every key once", FETCH_AGAIN)
            (kind,) = self._unpack("I")
            metadata[name] = self._value(name, kind)
        if (shards := metadata.get("split.count", 1)) != 1:
            fix = "join the shards: llama-gguf-split --merge FIRST-SHARD WHOLE.gguf"
            raise self._wrong("split.count", shards, "a whole file: this one is a part of a split file", fix)
        self._check_count(n_tensors, _LEAST_TENSOR_BYTES, _MOST_ENTRIES, "tensors")
        stored: dict[str, StoredTensor] = {}
        for _ in range(n_tensors):
            name = self._string(_LONGEST_NAME)
            if name in stored:
                raise self._wrong(f"tensor {name}", "twice", "every tensor once", FETCH_AGAIN)
            stored[name] = self._tensor(name)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment not in {8 << i for i in range(20)}:
            raise self._wrong("general.alignment", alignment, "a power of two from 8 on", FETCH_AGAIN)
        begin = -(-self._file.tell() // alignment) * alignment
        if any(tensor.offset % alignment for tensor in stored.values()):
            raise ValueError("a tensor's offset is not aligned")
        placed = {name: StoredTensor(t.shape, t.kind, begin + t.offset) for name, t in stored.items()}
        return GgufHeader(metadata, placed)

    def _check_format(self) -> None:
        magic = self._file.read(4)
        if is_lfs_pointer(self._path):
            raise lfs_pointer(self._path, WeightsError)
        if magic in _OLD_FORMATS:
            fix = "convert the model anew with llama.cpp's converter, or fetch a newer file"
            raise self._wrong("format", magic.decode(), "GGUF: this is an older format of ggml", fix)
        if magic != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = self._unpack("I")
        if version & 0xFFFF == 0 and version:
            fix = "convert it with gguf_convert_endian.py of llama.cpp, or fetch the little-endian file"
            raise self._wrong("byte order", "big-endian", "little-endian", fix)
        if version > 99:
            raise ValueError(f"its version would be {version}")
        if version not in (2, 3):
            raise self._wrong("GGUF version", version, "2 or 3", "convert the model anew with llama.cpp's converter")

    def _tensor(self, name: str) -> StoredTensor:
        (dimensions,) = self._unpack("I")
        if not 1 <= dimensions <= 4:
            raise ValueError(f"tensor {name} has {dimensions} dimensions")
        shape = tuple(self._unpack(f"{dimensions}Q")[::-1])
        kind, offset = self._unpack("IQ")
        if kind in _REMOVED:
            fix = "quantize the model anew, or fetch a newer file"
            raise self._wrong(f"tensor {name}", _REMOVED[kind], "a kind that ggml still has", fix)
        if kind not in KINDS:
            allowed = f"a kind that is known: {', '.join(known for known, _, _ in KINDS.values())}"
            raise self._wrong(f"tensor {name}", f"kind {kind}", allowed, "fetch another quantization")
        _, block_values, _ = KINDS[kind]
        if not all(1 <= n <= self._n_bytes * 8 for n in shape) or prod(shape) > self._n_bytes * 8:
            raise ValueError(f"tensor {name} of shape {shape} is larger than the file")
        if shape[-1] % block_values:
            raise ValueError(f"tensor {name}: rows of {shape[-1]} values are not whole blocks of {block_values}")
        return StoredTensor(shape, kind, offset)

    def _value(self, name: str, kind: int) -> Any:
        """Read one value. An array that is too long to keep becomes a `LongArray`."""
        if kind == _STRING:
            return self._string(_LONGEST_STRING)
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise ValueError(f"the key {name} has a value of unknown type {kind}")
            return self._unpack(_SCALARS[kind])[0]
        item_kind, length = self._unpack("IQ")
        if item_kind == _ARRAY:
            raise self._wrong(f"key {name}", "an array of arrays", "an array of plain values", "use another file")
        if item_kind != _STRING and item_kind not in _SCALARS:
            raise ValueError(f"the key {name} has an array of unknown type {item_kind}")
        item_bytes = 8 if item_kind == _STRING else struct.calcsize("<" + _SCALARS[item_kind])
        self._check_count(length, item_bytes, _LONGEST_ARRAY, f"values of {name}")
        if length > _LONGEST_ARRAY_KEPT:
            if item_kind == _STRING:
                for _ in range(length):
                    self._skip(self._unpack("Q")[0])
            else:
                self._skip(length * item_bytes)
            return LongArray(length)
        if item_kind == _STRING:
            return tuple(self._string(_LONGEST_STRING) for _ in range(length))
        return self._unpack(f"{length}{_SCALARS[item_kind]}")

    def _string(self, longest: int) -> str:
        (length,) = self._unpack("Q")
        if length > min(longest, self._left()):
            raise EOFError(f"a text of {length} bytes, and {self._left()} bytes are left")
        return self._file.read(length).decode()

    def _skip(self, n_bytes: int) -> None:
        if n_bytes > self._left():
            raise EOFError("it ends in the middle of its header")
        self._file.seek(n_bytes, 1)

    def _unpack(self, form: str) -> tuple[Any, ...]:
        n_bytes = struct.calcsize("<" + form)
        data = self._file.read(n_bytes)
        if len(data) != n_bytes:
            raise EOFError("it ends in the middle of its header")
        return struct.unpack("<" + form, data)

    def _left(self) -> int:
        return self._n_bytes - self._file.tell()

    def _check_count(self, count: int, least_bytes: int, most: int, what: str) -> None:
        if count > min(most, self._left() // least_bytes):
            raise ValueError(f"it announces {count} {what}, and {self._left()} bytes are left")

    def _wrong(self, what: str, value: object, allowed: str, fix: str) -> WeightsError:
        return WeightsError(f"{what} of {self._path}", value, allowed, fix)


def _check_places(path: Path, tensors: dict[str, StoredTensor]) -> None:
    """Raise WeightsError unless every tensor has bytes of its own within the file."""
    found, end, before = path.stat().st_size, 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise WeightsError(f"tensor {name} of {path}", "shared bytes", f"bytes apart from {before}'s", FETCH_AGAIN)
        end, before = tensor.offset + tensor.n_bytes, name
    if found < end:
        raise WeightsError(str(path), f"{found} bytes", f"at least {end} bytes by its header", FETCH_AGAIN)
