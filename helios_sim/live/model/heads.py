"""Heads at early exits: an adapter, a temperature and a cheap check of whether the exit's token can be trusted.

At an exit the hidden state h is divided by its root mean square (the model's final norm does that anyway) and its
dimensions are brought to one scale for the small networks:

    x = h / rms(h),  z = x * scale
    adapted = x + W z + b + D (silu(G z) * U z)        goes through the model's own final norm and LM head
    p       = sigmoid(v . silu(A z + a) + c)           calibrated probability that the exit's token is full depth's
    check   = 1 - (1 - p) * risk_scale                 compared with the threshold

Leaving at a deep exit saves little, so a risk there counts more: risk_scale is 1 at the first exit and grows in inverse
proportion to the layers that leaving saves. One threshold then spends the changed tokens where they save most. At deep
exits the check can fall below 0.

A token that exits pays for the adapter once. A token that is only checked pays for the check, which does not read the
vocabulary matrix.

A folder of heads holds heads.json (the model they belong to, how they were trained and what they reach) and
heads.safetensors. Importing this module does not load torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numba import njit
from numpy.typing import NDArray

from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.untrusted import Fields, read_bytes, read_json, reading

if TYPE_CHECKING:
    import torch

    from helios_sim.live.model.architecture import Architecture

SCHEMA_VERSION = 1
HEADER, TENSORS = "heads.json", "heads.safetensors"
SHIPPED = Path(__file__).parents[2] / "data" / "exit_heads"
ADAPTER = ("scale", "linear", "bias", "gate", "up", "down")
CHECK = ("check_in", "check_bias", "check_out", "check_offset")
BELONGS_TO = ("family", "n_layers", "d_model", "vocab_size")  # what the header says about the model
_TOLD = ("training", "calibration", "curves")  # how the heads were made, for people
_MOST_BYTES = 1 << 30
_LARGEST_WEIGHT = 1e6
_FIX = "train the heads anew with `python -m calibrate +task=adapters`, or fetch the files again"
FEW_ROWS = 16  # with more rows, torch's threads are worth their start-up time
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class ExitHeads:
    """The heads at the early exits of one model. The last layer has only a temperature.

    `tensors[e]` is empty if exit e uses the model's own norm and LM head unchanged, without a check.
    """

    exits: tuple[int, ...]  # depths of the early exits in layers, ascending, all below the model's last
    temperature: tuple[float, ...]  # one per early exit and one for full depth: logits are divided by it
    tensors: tuple[Mapping[str, torch.Tensor], ...]
    risk_scale: tuple[float, ...]  # one per early exit
    header: Mapping[str, Any] = field(default_factory=dict)
    checks: tuple[FoldedCheck | None, ...] = field(init=False)  # None for an exit without a check

    def __post_init__(self) -> None:
        folded = (
            FoldedCheck.fold(tensors, scale) if "check_in" in tensors else None
            for tensors, scale in zip(self.tensors, self.risk_scale, strict=True)
        )
        object.__setattr__(self, "checks", tuple(folded))

    @classmethod
    def own(cls, exits: Sequence[int]) -> Self:
        """The model's own final norm and LM head at every exit, as LayerSkip checkpoints have it."""
        return cls(tuple(exits), (1.0,) * (len(exits) + 1), ({},) * len(exits), (1.0,) * len(exits))

    @classmethod
    def load(
        cls,
        folder: Path,
        architecture: Architecture,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Self:
        """Load heads from a folder onto `device`, in `dtype` (None for float32).

        Raises UserError for a missing or damaged file and for heads of another model: other layers, hidden size or
        vocabulary.
        """
        import torch
        from safetensors.torch import load

        header = read_header(folder)
        for name in BELONGS_TO:
            if getattr(architecture, name) != header["architecture"][name]:
                allowed = (
                    f"{name} of the model is {getattr(architecture, name)}, the heads were trained for "
                    f"{header['architecture'][name]} ({header['model']})"
                )
                fix = "name heads of this model, or train some with `python -m calibrate +task=adapters`"
                raise UserError("heads", str(folder), allowed, fix)
        path = folder / TENSORS
        content = read_bytes(path, _MOST_BYTES, _FIX)
        if hashlib.sha256(content).hexdigest() != header["sha256"]:
            raise UserError("heads", str(path), "its sha256 is not the one in its header", _FIX)
        with reading("heads", str(path), "a file of safetensors", _FIX):
            stored = load(content)
        tensors = tuple(
            {name: value.to(device, dtype or torch.float32) for name, value in _head(stored, depth, architecture, path)}
            for depth in header["exits"]
        )
        if stored:
            raise UserError(f"tensor {min(stored)} of {path}", "there", "tensors of the exits in its header only", _FIX)
        return cls(tuple(header["exits"]), header["temperature"], tensors, header["risk_scale"], header)

    @property
    def has_check(self) -> bool:
        return all(check is not None for check in self.checks)

    def adapt(self, exit_index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Adapt hidden states (..., d) after an exit for the model's final norm and LM head.

        `exit_index` is an index into `exits`; one past them is full depth, which returns the state unchanged.
        """
        if exit_index == len(self.exits) or not self.tensors[exit_index]:
            return hidden
        return adapted(self.tensors[exit_index], hidden)

    def classify(self, exit_index: int, hidden: torch.Tensor) -> torch.Tensor:
        """The check at this exit, float32 (...,), from hidden (..., d); 1 at full depth.

        At the first exit this is the predicted probability that the token is full depth's; at deeper exits the risk is
        scaled. Raises UserError for heads without a check.
        """
        import torch

        if exit_index == len(self.exits):
            return torch.ones(hidden.shape[:-1], device=hidden.device)
        check = self.checks[exit_index]
        if check is None:
            raise UserError("confidence", "classifier", "these heads have no check", "use max_probability or margin")
        return check(hidden)


def adapted(tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """Apply the adapter: (..., d) -> (..., d) in the dtype of `tensors`."""
    import torch.nn.functional as F

    x, z = scaled(tensors["scale"], hidden)
    gated = F.silu(z @ tensors["gate"].T) * (z @ tensors["up"].T)
    return x + z @ tensors["linear"].T + tensors["bias"] + gated @ tensors["down"].T


def check_logit(tensors: Mapping[str, torch.Tensor], hidden: torch.Tensor) -> torch.Tensor:
    """The check before the sigmoid: (..., d) -> (...,). Slope and offset are folded into the weights."""
    import torch.nn.functional as F

    _, z = scaled(tensors["scale"], hidden)
    return F.silu(z @ tensors["check_in"].T + tensors["check_bias"]) @ tensors["check_out"] + tensors["check_offset"]


def scaled(scale: torch.Tensor, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x and z of the formulae in the module's docstring, both (..., d). The norm is computed in float32."""
    wide = hidden.float()
    x = (wide * (wide.square().mean(-1, keepdim=True) + 1e-12).rsqrt()).to(scale.dtype)
    return x, x * scale


def read_header(folder: Path) -> dict[str, Any]:
    """Read heads.json of a folder. Raises UserError if it is missing, damaged or of another schema version.

    `exits`, `temperature` and `risk_scale` are tuples that fit each other.
    """
    path = folder / HEADER
    if not path.exists():
        shipped = ", ".join(sorted(p.parent.name for p in SHIPPED.glob(f"*/{HEADER}"))) or "none"
        raise UserError("heads", str(path), f"no such file; shipped: {shipped}", "name a folder with heads")
    header = read_json(path, _FIX)
    if header.get("format") != "exit-heads":
        raise UserError("heads", str(path), "not the header of exit heads", _FIX)
    fields = Fields(header, str(path), _FIX)
    if fields.value("schema_version") != SCHEMA_VERSION:
        raise UserError("schema_version", header["schema_version"], f"this version reads {SCHEMA_VERSION}", _FIX)
    for name in ("model", "sha256"):
        fields.text(name)
    if not isinstance(fields.value("architecture"), dict):
        raise fields.wrong("architecture", header["architecture"], "sizes of the model by name")
    sizes = Fields(header["architecture"], f"architecture of {path}", _FIX)
    for name in BELONGS_TO:
        sizes.text(name) if name == "family" else sizes.integer(name, 1, 1 << 22)
    sizes.refuse_rest(f"only {', '.join(BELONGS_TO)}")
    exits = fields.numbers("exits", 1, header["architecture"]["n_layers"] - 1)
    if not all(isinstance(depth, int) for depth in header["exits"]) or list(exits) != sorted(set(exits)):
        raise fields.wrong("exits", header["exits"], "whole numbers that ascend")
    header["exits"] = tuple(header["exits"])
    header["temperature"] = fields.numbers("temperature", 1e-3, 1e3, len(exits) + 1)
    header["risk_scale"] = fields.numbers("risk_scale", 0, 1e6, len(exits))
    fields.ignore(["format", *_TOLD])
    fields.refuse_rest("no such key is known")
    return header


def _head(
    stored: dict[str, torch.Tensor], depth: int, a: Architecture, path: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    """Take one exit's tensors out of `stored`, after checking that they are there, fit each other and are finite."""
    d = a.d_model
    widths = (stored.get(f"{depth}.{name}") for name in ("gate", "check_bias"))
    width, check = (0 if tensor is None or not tensor.dim() else len(tensor) for tensor in widths)
    shapes = {
        "scale": (d,), "linear": (d, d), "bias": (d,), "gate": (width, d), "up": (width, d), "down": (d, width),
        "check_in": (check, d), "check_bias": (check,), "check_out": (check,), "check_offset": (),
    }  # fmt: skip
    for name in (*ADAPTER, *CHECK):
        key = f"{depth}.{name}"
        if key not in stored:
            raise UserError("heads", str(path), f"{key} is missing", _FIX)
        value = stored.pop(key)
        where = f"tensor {key} of {path}"
        if tuple(value.shape) != shapes[name] or not value.numel():
            raise UserError(where, tuple(value.shape), f"a tensor of shape {shapes[name]}", _FIX)
        if not value.is_floating_point() or value.dtype.itemsize < 2:
            raise UserError(where, str(value.dtype), "float16, bfloat16 or float32", _FIX)
        if not float(value.float().abs().max()) <= _LARGEST_WEIGHT:
            raise UserError(where, "NaN, infinity or beyond", f"numbers up to {_LARGEST_WEIGHT:g}", _FIX)
        yield name, value


def write_heads(folder: Path, header: Mapping[str, Any], tensors: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    """Write the folder in float16, both files or none. `tensors` maps depths to adapter and check.

    Raises UserError if it cannot be written.
    """
    import torch
    from safetensors.torch import save

    content = save(
        {
            f"{depth}.{name}": value.to(torch.float16).contiguous()
            for depth, of in tensors.items()
            for name, value in of.items()
        }
    )
    full = {"format": "exit-heads", "schema_version": SCHEMA_VERSION, **header}
    full["sha256"] = hashlib.sha256(content).hexdigest()
    files.write_together(folder, {TENSORS: content}, HEADER, f"{json.dumps(full, indent=1)}\n".encode())


@dataclass(frozen=True, slots=True, eq=False)
class FoldedCheck:
    """1 - (1 - p) x risk_scale with p = sigmoid(v . silu(A (h / rms(h) * scale) + a) + c), on float32 weights.

    At batch 1 the check costs the launch of its operations rather than their arithmetic, so everything that can be is
    folded into the weights: the scale of the dimensions, the square root of d, and the share of risk_scale. Float32
    throughout: on a CPU a product with one row is faster in float32 than in bfloat16. On a CPU, a few rows go through
    one compiled function (`check_rows`).
    """

    weight: torch.Tensor  # (width, d): A x scale x sqrt(d)
    bias: torch.Tensor  # (width,)
    out: torch.Tensor  # (width,)
    offset: torch.Tensor  # ()
    risk_scale: float
    _arrays: tuple[Any, ...] | None = field(init=False, repr=False)  # arguments of `check_rows`; None if not on a CPU

    def __post_init__(self) -> None:
        arrays = None
        if self.weight.device.type == "cpu":
            tensors = (self.weight, self.bias, self.out)
            scalars = (np.float32(self.offset.item()), np.float32(self.risk_scale))
            arrays = (*(tensor.detach().numpy() for tensor in tensors), *scalars)
        object.__setattr__(self, "_arrays", arrays)

    @classmethod
    def fold(cls, tensors: Mapping[str, torch.Tensor], risk_scale: float) -> Self:
        """Fold a head's tensors `scale`, `check_in`, `check_bias`, `check_out` and `check_offset`."""
        scale = tensors["scale"].float()
        return cls(
            (tensors["check_in"].float() * scale * scale.numel() ** 0.5).contiguous(),
            tensors["check_bias"].float(),
            tensors["check_out"].float(),
            tensors["check_offset"].float(),
            risk_scale,
        )

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """States (..., d) of any float type -> float32 (...,). A state of zeros gives NaN, which is never confident."""
        import torch
        import torch.nn.functional as F

        if hidden.dim() != 2:
            return self(hidden.reshape(-1, hidden.shape[-1])).reshape(hidden.shape[:-1])
        if len(hidden) <= FEW_ROWS and self._arrays is not None:
            found = np.empty(len(hidden), np.float32)
            weight, bias, out, offset, risk_scale = self._arrays
            check_rows(hidden.detach().float().contiguous().numpy(), weight, bias, out, offset, risk_scale, found)
            return torch.from_numpy(found)
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        inside = F.linear(hidden / norm, self.weight, self.bias)  # float32, as the norm is
        sure = torch.addmv(self.offset, F.silu(inside), self.out).sigmoid_()
        return sure if self.risk_scale == 1 else torch.add(1 - self.risk_scale, sure, alpha=self.risk_scale)


# Sums may be reordered, so that they are vectorized.
@njit(cache=True, error_model="numpy", fastmath={"reassoc", "contract"})
def check_rows(
    hidden: Floats, weight: Floats, bias: Floats, out: Floats, offset: Any, risk_scale: Any, found: Floats
) -> None:
    """Compute `FoldedCheck` for hidden (N, d), weight (width, d), bias and out (width,) into found (N,), compiled.

    One call replaces seven of torch's.
    """
    rows, d = hidden.shape
    one = np.float32(1.0)
    for row in range(rows):
        squares = np.float32(0.0)
        for k in range(d):
            squares += hidden[row, k] * hidden[row, k]
        shrink = one / np.sqrt(squares)
        logit = offset
        for unit in range(len(bias)):
            inside = np.float32(0.0)
            for k in range(d):
                inside += weight[unit, k] * hidden[row, k]
            inside = inside * shrink + bias[unit]
            logit += out[unit] * inside / (one + np.exp(-inside))
        found[row] = one - risk_scale + risk_scale / (one + np.exp(-logit))
