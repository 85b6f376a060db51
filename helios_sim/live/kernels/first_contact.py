"""Check that the project's kernels compute on this very card what torch computes, before anything is measured.

One layer and a head run through them. At the first launch on a host Triton compiles, builds its launcher and looks for
the driver's library, so obstacles to that are found as well.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from helios_sim.live.kernels.interface import TORCH, Kernels
from helios_sim.live.model.architecture import Architecture

BATCHES = (2, 6)  # one with products by the project's kernels, one by the library
POSITIONS = (150, 1, 63, 64, 200, 97)  # tokens in the cache; contexts are divided into splits
SLOTS = (5, 1, 7, 0, 3, 6)
TOKENS = 256  # in a slot
WORDS = 5000  # enough for the head's kernel to divide the vocabulary into parts
MOST_ERROR = 0.05  # of a row, relative to its norm: bfloat16's is 0.005, a wrong kernel's about 1
_SHAPE = Architecture(
    family="llama", n_layers=1, d_model=256, n_heads=8, n_kv_heads=2, head_dim=64, d_ff=512, vocab_size=WORDS,
    max_context_tokens=TOKENS, norm_eps=1e-5, activation="silu", tied_embeddings=False, attention_scale=0.125,
)  # fmt: skip


@cache
def fault(device: torch.device) -> str | None:
    """What the kernels lack on this card, in a few words; None if they work."""
    from helios_sim.live.kernels.card import TRITON

    try:
        with torch.cuda.device(device):  # Triton launches on the current card
            off = max(largest_error(TRITON, device, batch) for batch in BATCHES)
    except Exception as error:  # whatever Triton, its compilers or the driver may raise
        said = (str(error) or type(error).__name__).splitlines()[0]
        return f"a host on which they can be built and launched ({said})"
    if off < MOST_ERROR:
        return None
    return f"a card on which they compute what torch does: here a layer's results are {100 * off:.0f} % off"


@torch.inference_mode()
def largest_error(kernels: Kernels, device: torch.device, batch: int) -> float:
    """The largest error of a row in bfloat16 against torch in float32, relative to the row's norm. NaN counts as 1."""
    drawn = torch.Generator(device).manual_seed(0)

    def values(*shape: int) -> Tensor:
        return torch.randn(shape, generator=drawn, device=device).to(torch.bfloat16)

    d, ff, heads, kv_heads = _SHAPE.d_model, _SHAPE.d_ff, _SHAPE.n_heads, _SHAPE.n_kv_heads
    width = _SHAPE.head_dim
    shapes = ((heads + 2 * kv_heads) * width, d), (d, heads * width), (2 * ff, d), (d, ff), (WORDS, d)
    given = [values(batch, d), values(d), *(values(*shape) / shape[1] ** 0.5 for shape in shapes)]
    given += [values(2, len(SLOTS) + 2, kv_heads, TOKENS, width)]
    found, wanted = _through(kernels, *given), _through(TORCH, *(x.float() for x in given))
    errors = [(a.float() - b).norm(dim=1) / b.norm(dim=1) for a, b in zip(found, wanted, strict=True)]
    return float(torch.cat(errors).nan_to_num(1.0).max())


def _through(
    kernels: Kernels, hidden: Tensor, norm: Tensor, qkv: Tensor, out: Tensor, mlp_in: Tensor, mlp_out: Tensor,
    head: Tensor, cached: Tensor,
) -> list[Tensor]:  # fmt: skip
    """Run a layer and the head. Returns rows of attention, states, written K and V, logits and the largest logit."""
    a, on, n = _SHAPE, hidden.device, len(hidden)
    at, positions = torch.tensor(SLOTS[:n], device=on), torch.tensor(POSITIONS[:n], device=on)
    half = a.head_dim // 2
    angle = torch.arange(TOKENS, device=on)[:, None] * 1e4 ** (-torch.arange(half, device=on) / half)
    angles = torch.cat((angle.cos(), angle.sin()), 1)
    keys, values = cached.clone()
    _, inner = kernels.enter(a, hidden, None, None, norm, None, qkv, None, mlp=False)
    q, k, v = inner.view(n, -1, a.head_dim).split((a.n_heads, a.n_kv_heads, a.n_kv_heads), 1)
    if kernels.any_lengths:
        from helios_sim.live.kernels.attention import decode  # imports Triton

        mixed = decode(q, k, v, keys, values, at, positions, a.attention_scale, angles)
    else:
        mixed = _attended(q, k, v, keys, values, angles, n)
    hidden, inner = kernels.enter(
        a, hidden, kernels.product(mixed, out, None), None, norm, None, mlp_in, None, mlp=True
    )
    hidden = kernels.add(a, hidden, kernels.product(inner, mlp_out, None), None)
    logits = kernels.logits(a, hidden, norm, None, head)
    said = kernels.look_at(logits, "max_probability", 1.0)
    best = logits.max(-1).values if said is None else said[1]
    written = (x[at, :, positions].flatten(1) for x in (keys, values))
    return [mixed, hidden, *written, logits, best[:, None]]


def _attended(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, angles: Tensor, n: int) -> Tensor:
    """Attention by its definition, one request after the other."""
    found, shared = [], _SHAPE.n_heads // _SHAPE.n_kv_heads
    for i, (slot, position) in enumerate(zip(SLOTS[:n], POSITIONS[:n], strict=True)):
        cos, sin = angles[position].chunk(2)

        def turned(x: Tensor, cos: Tensor = cos, sin: Tensor = sin) -> Tensor:
            a, b = x.chunk(2, -1)
            return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)

        keys[slot, :, position], values[slot, :, position] = turned(k[i]), v[i]
        ks, vs = (x[slot, :, : position + 1].repeat_interleave(shared, 0) for x in (keys, values))
        scores = (ks @ turned(q[i])[:, :, None])[..., 0] * _SHAPE.attention_scale
        found.append((scores.softmax(-1)[:, None] @ vs).flatten())
    return torch.stack(found)
