"""Predictors in place of the head, as in SpecEE (arXiv 2504.08850): what they read, and how they are stored.

The head of the first exit proposes `WORDS` words for a token. (SpecEE takes them from a draft model; there is none
here.) At every exit a predictor reads 3 x WORDS numbers: the logits of these words there, from one product each with a
row of the head; their softmax among themselves; and the change of that softmax since the exit before, computed from the
state there (at the first exit, the softmax itself). SpecEE's code compares with the last exit at which a predictor ran.
With the exit before, a recorded value does not depend on which exits check.

Importing this module does not load torch.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helios_sim import files
from helios_sim.errors import UserError
from helios_sim.exits.rule import WORDS, Confidence
from helios_sim.untrusted import read_bytes, reading

if TYPE_CHECKING:
    from torch import Tensor

    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.heads import ExitHeads

FILE = "predictors.safetensors"
FEATURES = 3 * WORDS
TENSORS = ("mean", "spread", "weight", "bias", "out", "offset")
_MOST_BYTES = 1 << 26
_FIX = "train them anew with `python -m calibrate +task=predictors`"

Tensors = Mapping[str, "Tensor"]


@dataclass(frozen=True, slots=True, eq=False)
class Predictors:
    """One predictor for each early exit, in the order of the exits."""

    exits: tuple[int, ...]
    tensors: tuple[Tensors, ...]  # mean and spread (FEATURES,), weight (width, FEATURES), bias and out (width,), offset

    @property
    def width(self) -> int:
        return len(self.tensors[0]["bias"])

    def predicted(self, exit_index: int, seen: Tensor) -> Tensor:
        """The predicted probability (n,) that a token may leave, from features (n, FEATURES)."""
        return logit(self.tensors[exit_index], seen).sigmoid()

    def digest(self) -> str:
        """Hash of the tensors, so that results of other predictors are not mistaken for theirs."""
        found = hashlib.sha256()
        for name, tensor in sorted(self._named().items()):
            found.update(name.encode() + tensor.float().cpu().numpy().tobytes())
        return found.hexdigest()

    def write(self, folder: Path) -> None:
        """Write the file in float16, to which the tensors were rounded after training."""
        from safetensors.torch import save

        content = save({name: tensor.half().contiguous().cpu() for name, tensor in self._named().items()})
        files.write_bytes(folder / FILE, content)

    def _named(self) -> dict[str, Tensor]:
        pairs = zip(self.exits, self.tensors, strict=True)
        return {f"{depth}.{name}": tensor for depth, of in pairs for name, tensor in of.items()}


def read_predictors(folder: Path, device: Any = "cpu") -> Predictors:
    """Read the predictors in a folder. UserError if the file is missing or damaged."""
    from safetensors.torch import load

    content = read_bytes(folder / FILE, _MOST_BYTES, _FIX)
    with reading("predictors", str(folder / FILE), "a file of predictors", _FIX):
        stored = load(content)
        exits = tuple(sorted({int(name.partition(".")[0]) for name in stored}))
    if not exits or set(stored) != {f"{depth}.{name}" for depth in exits for name in TENSORS}:
        raise UserError("predictors", str(folder / FILE), f"{', '.join(TENSORS)} of each exit", _FIX)
    of = (({name: stored[f"{depth}.{name}"].float().to(device) for name in TENSORS}) for depth in exits)
    return Predictors(exits, tuple(of))


def no_predictors(where: str = "beside its trace") -> UserError:
    allowed = f"predictors of the exits that are served, which lie {where} ({FILE}): there are none"
    return UserError("exits.confidence", Confidence.PREDICTOR.value, allowed, _FIX)


def features(
    model: SegmentedModel, heads: ExitHeads, exit_index: int, state: Tensor, before: Tensor | None, words: Tensor
) -> Tensor:
    """Features (n, FEATURES) at an exit, from the states (n, d) there and at the exit before, if there is one."""
    import torch

    columns = model.outer.head[words].float()  # (n, WORDS, d)
    logits = torch.einsum("nd,nkd->nk", normed(model, heads, exit_index, state).float(), columns)
    shares = logits.softmax(-1)
    change = shares
    if before is not None:
        earlier = torch.einsum("nd,nkd->nk", normed(model, heads, exit_index - 1, before).float(), columns)
        change = shares - earlier.softmax(-1)
    return torch.cat((logits, shares, change), -1)


def likeliest(logits: Tensor) -> Tensor:
    """The words (n, WORDS) that the first exit proposes, the likeliest first, from its head's logits (n, V)."""
    return largest(logits, WORDS)[1]


def signed(predicted: Tensor, choice: Tensor, words: Tensor) -> Tensor:
    """The confidence `predictor` (n,): negative if the exit's own word (n,) is none of the words (n, WORDS)."""
    return predicted * ((words == choice[:, None]).any(-1).float() * 2 - 1)


def largest(logits: Tensor, k: int, run: int = 128) -> tuple[Tensor, Tensor]:
    """Values and indices (N, k) of the k largest logits of each row (N, V), by a two-step topk, faster on a CPU."""
    n, vocabulary = logits.shape
    whole = vocabulary // run
    if whole <= k:
        values, places = logits.topk(k, dim=-1)
        return values, places
    runs = logits[:, : whole * run].reshape(n, whole, run)
    best = runs.amax(-1).topk(k, dim=-1).indices  # the k largest lie in the k runs with the largest maxima
    inside = runs.gather(1, best[..., None].expand(-1, -1, run)).reshape(n, k * run)
    values, places = inside.topk(k, dim=-1)
    places = best.gather(1, places // run) * run + places % run
    if whole * run < vocabulary:
        import torch

        rest = logits[:, whole * run :]
        values = torch.cat((values, rest), -1)
        places = torch.cat((places, torch.arange(whole * run, vocabulary, device=logits.device).expand(n, -1)), -1)
        order = values.topk(k, dim=-1).indices
        values, places = values.gather(1, order), places.gather(1, order)
    return values, places


def untrained(width: int, generator: Any, device: Any) -> Tensors:
    """A predictor of the right size, to be trained or timed."""
    import torch

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    return {
        "mean": torch.zeros(FEATURES, device=device), "spread": torch.ones(FEATURES, device=device),
        "weight": drawn(width, FEATURES) / math.sqrt(FEATURES), "bias": torch.zeros(width, device=device),
        "out": drawn(width) / math.sqrt(width), "offset": torch.zeros((), device=device),
    }  # fmt: skip


def drawn_predictors(exits: tuple[int, ...], device: Any, seed: int, width: int = 256) -> Predictors:
    """Predictors of the right size that have learned nothing, for timing."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    return Predictors(exits, tuple(untrained(width, generator, device) for _ in exits))


def logit(of: Tensors, seen: Tensor) -> Tensor:
    """The predictor before the sigmoid: (n, FEATURES) -> (n,)."""
    inside = ((seen - of["mean"]) / of["spread"]) @ of["weight"].T + of["bias"]
    return inside.relu() @ of["out"] + of["offset"]


def normed(model: SegmentedModel, heads: ExitHeads, exit_index: int, state: Tensor) -> Tensor:
    """The head's input from the states (n, d) at an exit; an index one past the exits is full depth."""
    return model.normed(heads.adapt(exit_index, state).to(model.dtype))
