"""What the project's kernels compute, by torch's operations: for whole runs where Triton's interpreter is too slow.

Like a card's kernels it asks the host for nothing, so it can be captured; `kernel_cases.py` shows that the kernels do
the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from helios_sim.live.kernels.interface import TorchKernels
from helios_sim.live.model.decoder import rotate


class ExactTorch(TorchKernels):
    any_lengths = True


EXACT = ExactTorch()


def turn_and_write(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor,
    angles: Tensor | None = None, norms: tuple[Tensor, Tensor, float] | None = None,
) -> Tensor:  # fmt: skip
    """As `kernels.turn.turn_and_write`."""
    if norms is not None:
        q, k = (rms_norm(x, w.shape, w, norms[2]) for x, w in zip((q, k), norms[:2], strict=True))
    if angles is not None:
        cos, sin = (part.repeat(1, 2)[:, None].to(q.dtype) for part in angles[positions].chunk(2, -1))
        half = sin.shape[-1] // 2
        turn = cos, torch.cat((-sin[..., :half], sin[..., half:]), -1)
        q, k = rotate(q, turn), rotate(k, turn)
    slot = torch.where(slots >= -1, slots, -2 - slots)
    here = (slot[:, None] == torch.arange(keys.shape[0]))[:, :, None]
    here = here & (positions[:, None] == torch.arange(keys.shape[2]))[:, None]  # (N, slots, tokens)
    for cached, new in ((keys, k), (values, v)):
        written = torch.einsum("nst,nhd->shtd", here.to(new.dtype), new)
        cached.copy_(torch.where(here.any(0)[:, None, :, None], written, cached))
    return q


def write(
    k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, angles: Tensor | None = None,
    norm: tuple[Tensor, float] | None = None,
) -> None:  # fmt: skip
    """As `kernels.turn.write`."""
    turn_and_write(k, k, v, keys, values, slots, positions, angles, None if norm is None else (norm[0], *norm))


def decode(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor, scale: float,
    angles: Tensor | None = None, norms: tuple[Tensor, Tensor, float] | None = None, window: int | None = None,
    tiles: Any = None, firsts: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """As `kernels.attention.decode`. K and V of all rows are written before any attends, whatever `firsts` says."""
    q = turn_and_write(q, k, v, keys, values, slots, positions, angles, norms)
    slot = torch.where(slots >= -1, slots, -2 - slots)
    at = torch.arange(keys.shape[2])
    sees = (at <= positions[:, None]) & (slots >= 0)[:, None]
    if window is not None:
        sees = sees & (at > positions[:, None] - window)
    group = q.shape[1] // k.shape[1]
    mine_k, mine_v = (x[slot.clamp(min=0)].repeat_interleave(group, 1) for x in (keys, values))
    scores = torch.einsum("nhd,nhtd->nht", q, mine_k) * scale
    shares = scores.masked_fill(~sees[:, None], -1e30).softmax(-1).masked_fill(~sees[:, None], 0.0)
    return torch.einsum("nht,nhtd->nhd", shares, mine_v).flatten(1)


@contextmanager
def exact() -> Iterator[ExactTorch]:
    """Attention of decodes by `decode` and `write` above, for models and caches with the kernels that are given."""
    attention = pytest.importorskip("helios_sim.live.kernels.attention")
    turn = pytest.importorskip("helios_sim.live.kernels.turn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "decode", decode)
        patch.setattr(turn, "write", write)
        yield EXACT
