"""A low-rank change of a model's weights, kept beside them in a small folder and added when they are read.

A folder of a change holds delta.json (the weights that it belongs to, by name and sha256; how it was made) and
delta.safetensors: for layer L and part P of `live.model.weights.LayerWeights` the factors "L.P.down" (rank, in) and
"L.P.up" (out, rank) in float16. The changed weight is W + up down, computed in float32 and rounded once.

The folder is named where weights are named (`model=FOLDER`, `live.weights={NAME: FOLDER}`). Importing this module does
not load torch.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from helios_sim import files
from helios_sim.errors import WeightsError
from helios_sim.untrusted import Fields, read_bytes, read_json, reading

if TYPE_CHECKING:
    import torch

    from helios_sim.live.model.architecture import Architecture

SCHEMA_VERSION = 1
HEADER, TENSORS = "delta.json", "delta.safetensors"
_TOLD = ("training",)  # how the change was made, for people
_MOST_BYTES = 1 << 30
_LARGEST = 1e4  # largest number in a factor
_FIX = "train it anew with `python -m calibrate +task=train_exits`, or fetch the files again"
_NAME = re.compile(r"(\d{1,4})\.(\w{1,40})\.(down|up)")

Place = tuple[int, str]  # layer, counted from 0, and the field of LayerWeights


@dataclass(frozen=True, slots=True, eq=False)
class WeightsDelta:
    """The low-rank change of one model's layers."""

    header: Mapping[str, Any]
    factors: Mapping[Place, tuple[torch.Tensor, torch.Tensor]]  # down (rank, in) and up (out, rank), as stored
    folder: Path

    @classmethod
    def load(cls, folder: Path, architecture: Architecture) -> Self:
        """Load a folder. Raises WeightsError for a missing or damaged file, or a change of another shape of model."""
        import torch
        from safetensors.torch import load

        header = read_header(folder)
        path = folder / TENSORS
        content = read_bytes(path, _MOST_BYTES, _FIX, WeightsError)
        if hashlib.sha256(content).hexdigest() != header["sha256"]:
            raise WeightsError("weights", str(path), "its sha256 is not the one in its header", _FIX)
        with reading("weights", str(path), "a file of safetensors", _FIX, WeightsError):
            stored = load(content)
        shapes = architecture.layer_shapes()
        found: dict[Place, dict[str, torch.Tensor]] = {}
        for name, value in stored.items():
            match = _NAME.fullmatch(name)
            where = f"tensor {name} of {path}"
            if match is None or int(match[1]) >= architecture.n_layers or len(shapes.get(match[2], ())) != 2:
                raise WeightsError(where, "there", "factors of matrices that the model has", _FIX)
            fits = value.dim() == 2 and value.numel() and value.is_floating_point()
            out, into = shapes[match[2]]
            if not fits or (value.shape[1] != into if match[3] == "down" else value.shape[0] != out):
                raise WeightsError(where, tuple(value.shape), f"factors of a matrix of shape {(out, into)}", _FIX)
            if not bool(torch.isfinite(value).all()) or float(value.abs().max()) > _LARGEST:
                raise WeightsError(where, "not all finite", f"numbers from {-_LARGEST:g} to {_LARGEST:g}", _FIX)
            found.setdefault((int(match[1]), match[2]), {})[match[3]] = value
        for (layer, part), of in found.items():
            if set(of) != {"down", "up"} or len(of["down"]) != of["up"].shape[1]:
                raise WeightsError(f"{layer}.{part} of {path}", sorted(of), "down and up of one rank", _FIX)
        return cls(header, {place: (of["down"], of["up"]) for place, of in found.items()}, folder)

    @property
    def files(self) -> tuple[Path, ...]:
        return self.folder / HEADER, self.folder / TENSORS

    def of(self, part: str, layer: int | None) -> torch.Tensor | None:
        """What to add to a part (out, in), in float32; None for nothing."""
        if layer is None or (found := self.factors.get((layer, part))) is None:
            return None
        down, up = found
        return up.float() @ down.float()


def read_header(folder: Path) -> dict[str, Any]:
    """Read delta.json of a folder. Raises WeightsError if it is damaged or of another schema version."""
    path = folder / HEADER
    with reading("weights", str(path), "the header of a change of weights", _FIX, WeightsError):
        header = read_json(path, _FIX)
        if header.get("format") != "weights-delta":
            raise WeightsError("weights", str(path), "not the header of a change of weights", _FIX)
        fields = Fields(header, str(path), _FIX)
        if fields.value("schema_version") != SCHEMA_VERSION:
            allowed = f"this version reads {SCHEMA_VERSION}"
            raise WeightsError("schema_version", header["schema_version"], allowed, _FIX)
        for name in ("weights", "weights_sha256", "sha256"):
            fields.text(name)
        fields.ignore(["format", *_TOLD])
        fields.refuse_rest("no such key is known")
    return header


def write_delta(
    folder: Path, header: Mapping[str, Any], factors: Mapping[Place, tuple[torch.Tensor, torch.Tensor]]
) -> None:
    """Write the folder in float16, both files or none. The header names `weights`, `weights_sha256` and `training`.

    Raises UserError if it cannot be written.
    """
    import torch
    from safetensors.torch import save

    content = save(
        {
            f"{layer}.{part}.{name}": value.to(torch.float16).cpu().contiguous()
            for (layer, part), of in factors.items()
            for name, value in zip(("down", "up"), of, strict=True)
        }
    )
    full = {"format": "weights-delta", "schema_version": SCHEMA_VERSION, **header}
    full["sha256"] = hashlib.sha256(content).hexdigest()
    files.write_together(folder, {TENSORS: content}, HEADER, f"{json.dumps(full, indent=1)}\n".encode())
