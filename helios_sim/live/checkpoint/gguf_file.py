"""A GGUF file, read tensor by tensor and dequantized.

The header is parsed here: the `gguf` package's reader makes an object of every token of the vocabulary (13 s for
Gemma-3's 262,144). The package's dequantization is used. Format: ggml-org/ggml, docs/gguf.md.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from helios_sim.errors import UserError, WeightsError
from helios_sim.live.checkpoint.hub_folder import refuse, wrong_family
from helios_sim.live.checkpoint.naming import gguf_pieces
from helios_sim.live.model.architecture import Architecture, Rope, Shape
from helios_sim.live.model.weights import StoredPiece

_FETCH_AGAIN = "fetch the file again"
_STRING, _ARRAY = 8, 9
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_LONGEST_ARRAY_KEPT = 4096  # longer arrays are vocabularies
_FAMILIES = ("llama", "qwen2", "gemma3")
_GEMMA3_SLIDING_PERIOD = 6  # every sixth layer has full attention
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_27B_LAYERS = 62


@dataclass(frozen=True, slots=True)
class StoredTensor:
    shape: Shape  # rows first
    kind: int  # GGMLQuantizationType
    offset: int  # bytes from the beginning of the file


class GgufFile:
    """Metadata and tensors of one file. Raises UserError for a damaged file or an unsupported family."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.metadata, self._tensors = _read_header(file)
        except (struct.error, ValueError, KeyError, EOFError) as error:
            raise UserError(str(path), str(error), "a whole GGUF file of version 2 or 3", _FETCH_AGAIN) from error
        self._check_length()
        self.architecture: Architecture = self._architecture()

    @property
    def files(self) -> tuple[Path, ...]:
        return (self.path,)

    def pieces(self, part: str, layer: int | None) -> tuple[StoredPiece, ...]:
        return gguf_pieces(self.architecture.family, part, layer)

    def shape(self, name: str) -> Shape:
        return self._tensor(name).shape

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Read rows of one tensor as float32. The file is not mapped, so none of its pages stay resident."""
        from gguf.constants import GGMLQuantizationType
        from gguf.quants import dequantize

        stored = self._tensor(name)
        row_bytes = _stored_bytes((1, *stored.shape[1:]), stored.kind)
        offset = stored.offset + start * row_bytes
        data = np.fromfile(self.path, np.uint8, (stop - start) * row_bytes, offset=offset)
        if len(stored.shape) == 2:
            data = data.reshape(stop - start, row_bytes)
        return torch.from_numpy(dequantize(data, GGMLQuantizationType(stored.kind)))

    def tokenizer(self) -> Any:
        """Build transformers' tokenizer from the file's vocabulary. Raises UserError if the file has none."""
        if "tokenizer.ggml.model" not in self.metadata:
            raise WeightsError("weights", str(self.path), "a GGUF file with a tokenizer", "choose a file that has one")
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.path.parent, gguf_file=self.path.name)

    def _tensor(self, name: str) -> StoredTensor:
        if name not in self._tensors:
            raise UserError(f"tensor {name}", "missing", f"there in {self.path}", _FETCH_AGAIN)
        return self._tensors[name]

    def _check_length(self) -> None:
        needed = max((t.offset + _stored_bytes(t.shape, t.kind) for t in self._tensors.values()), default=0)
        found = self.path.stat().st_size
        if found < needed:
            raise UserError(str(self.path), f"{found} bytes", f"at least {needed} bytes by its header", _FETCH_AGAIN)

    def _architecture(self) -> Architecture:
        family = self.metadata.get("general.architecture")
        if family not in _FAMILIES:
            raise wrong_family(f"{self.path} (GGUF, which is read for {', '.join(_FAMILIES)})", family)
        try:
            return self._architecture_of(family)
        except KeyError as error:
            raise UserError(str(self.path), f"no key {error}", "all of the family's keys", _FETCH_AGAIN) from error

    def _architecture_of(self, family: str) -> Architecture:
        keys = {k.removeprefix(family + "."): v for k, v in self.metadata.items() if k.startswith(family + ".")}
        d_model, n_heads, n_layers = keys["embedding_length"], keys["attention.head_count"], keys["block_count"]
        head_dim = keys.get("attention.key_length", d_model // n_heads)
        gemma = family == "gemma3"
        refuse(
            str(self.path),
            {
                "rotary positions of part of a head": keys.get("rope.dimension_count", head_dim) != head_dim,
                "V heads of another size": keys.get("attention.value_length", head_dim) != head_dim,
                "heads that differ by layer": not isinstance(n_heads, int),
                "experts": keys.get("expert_count", 0) > 0,
                "logit softcapping": keys.get("final_logit_softcapping", 0) > 0,
            },
        )
        sliding = tuple(gemma and (i + 1) % _GEMMA3_SLIDING_PERIOD != 0 for i in range(n_layers))
        # llama.cpp's own rule, since the file does not say it: the largest Gemma-3 scales by d_model / n_heads.
        scaled_by = d_model // n_heads if gemma and n_layers == _GEMMA3_27B_LAYERS else head_dim
        return Architecture(
            family=family,
            n_layers=n_layers,
            d_model=d_model,
            n_heads=n_heads,
            n_kv_heads=keys.get("attention.head_count_kv", n_heads),
            head_dim=head_dim,
            d_ff=keys["feed_forward_length"],
            vocab_size=self.shape("token_embd.weight")[0],
            max_context_tokens=keys["context_length"],
            norm_eps=keys["attention.layer_norm_rms_epsilon"],
            activation="gelu_tanh" if gemma else "silu",
            tied_embeddings="output.weight" not in self._tensors,
            attention_scale=scaled_by**-0.5,
            embedding_scale=d_model**0.5 if gemma else 1.0,
            rope=self._rope(keys, head_dim),
            window_tokens=keys["attention.sliding_window"] if any(sliding) else None,
            sliding_rope=Rope(_GEMMA3_LOCAL_THETA) if any(sliding) else None,
            sliding=sliding if any(sliding) else (),
        )

    def _rope(self, keys: Mapping[str, Any], head_dim: int) -> Rope:
        theta, kind = float(keys.get("rope.freq_base", 10_000.0)), keys.get("rope.scaling.type", "none")
        refuse(str(self.path), {f"rope scaling {kind!r}": kind not in ("none", "linear")})
        if "rope_freqs.weight" in self._tensors:  # where llama.cpp keeps Llama-3.1's scaling
            return Rope(theta, tuple(self.rows("rope_freqs.weight", 0, head_dim // 2).tolist()))
        factor = float(keys.get("rope.scaling.factor", 1.0)) if kind == "linear" else 1.0
        return Rope(theta, None if factor == 1.0 else (factor,) * (head_dim // 2))


def _stored_bytes(shape: Shape, kind: int) -> int:
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    block_values, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return int(np.prod(shape)) // block_values * block_bytes


def _read_header(file: BinaryIO) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    if file.read(4) != b"GGUF":
        raise ValueError("it does not begin with GGUF")
    version, n_tensors, n_keys = _unpack(file, "IQQ")
    if version not in (2, 3):
        raise ValueError(f"GGUF version {version}")
    metadata = {_string(file): _value(file, _unpack(file, "I")[0]) for _ in range(n_keys)}
    stored = {}
    for _ in range(n_tensors):
        name = _string(file)
        (dimensions,) = _unpack(file, "I")
        shape = _unpack(file, f"{dimensions}Q")[::-1]
        kind, offset = _unpack(file, "IQ")
        stored[name] = StoredTensor(shape, kind, offset)
    alignment = metadata.get("general.alignment", 32)
    begin = -(-file.tell() // alignment) * alignment
    return metadata, {n: StoredTensor(t.shape, t.kind, begin + t.offset) for n, t in stored.items()}


def _value(file: BinaryIO, kind: int) -> Any:
    """Read one value. An array that is too long to keep is replaced by its length."""
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])[0]
    item_kind, length = _unpack(file, "IQ")
    if item_kind in _SCALARS and length > _LONGEST_ARRAY_KEPT:
        file.seek(length * struct.calcsize("<" + _SCALARS[item_kind]), 1)
        return length
    items = [_value(file, item_kind) for _ in range(length)]
    return tuple(items) if length <= _LONGEST_ARRAY_KEPT else length


def _string(file: BinaryIO) -> str:
    (length,) = _unpack(file, "Q")
    text = file.read(length)
    if len(text) != length:
        raise EOFError("it ends in the middle of its header")
    return text.decode()


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    data = file.read(struct.calcsize("<" + form))
    try:
        return struct.unpack("<" + form, data)
    except struct.error:
        raise EOFError("it ends in the middle of its header") from None
