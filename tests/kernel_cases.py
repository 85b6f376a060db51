"""Errors of the kernels against float64, by Triton's interpreter: `python kernel_cases.py` prints JSON.

`exhaustive N/PARTS` in place of that: one part of all cases of attention; `exhaustive others`: of all other kernels.

A process of its own, since Triton decides when a kernel is defined whether to interpret or to compile it.
"""

from __future__ import annotations

import interpreted  # isort: skip - before Triton

import itertools
import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from helios_sim.exits.rule import Confidence, PerToken
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.device import CpuDevice
from helios_sim.live.exits import ExitReader, Row, Tally
from helios_sim.live.forward import Forward
from helios_sim.live.graphs import GraphedDecodes
from helios_sim.live.kernels import activation, attention, first_contact as contact, gemv, head, norms, turn
from helios_sim.live.kernels.card import TRITON, TritonKernels
from helios_sim.live.kernels.interface import TORCH, UNKNOWN, Inside
from helios_sim.live.memory.decodes import decode_step, first_positions
from helios_sim.live.memory.kv import KvCache
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.heads import ExitHeads
from helios_sim.live.one_pass import OnePass, Rule
from helios_sim.policy.deployment import BatchingRule, KvRule
from tiny_models import write_tiny

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
EPS = 1e-5
ACTIVATIONS = {
    "silu": F.silu, "relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@dataclass(frozen=True)
class Attention:
    """Requests of these lengths (the new token included) in these slots; -1 is padding, -2 - s writes to slot s.

    A slot that comes several times is one request, whose rows are different tokens.
    """

    heads: int
    kv_heads: int
    width: int
    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    dtype: torch.dtype = FLOAT32
    turned: bool = False  # q and k come turned already
    normed: bool = False
    window: int | None = None
    splits: int | None = None

    @property
    def name(self) -> str:
        shape = f"{self.heads}/{self.kv_heads} heads of {self.width}"
        more = f"{'' if self.splits is None else f', {self.splits} splits'}{', normed' if self.normed else ''}"
        window = "" if self.window is None else f", window {self.window}"
        several = f"{len(self.lengths)} of up to {max(self.lengths)}" if len(self.lengths) > 6 else list(self.lengths)
        rows = "" if not self.repeated else f" in {list(self.slots)}"
        return f"attention {shape}, lengths {several}{rows}{more}{window}, {str(self.dtype)[6:]}"

    @property
    def repeated(self) -> bool:
        return any(slot >= 0 and self.slots.count(slot) > 1 for slot in self.slots)

    def first(self, row: int) -> int:
        """The position of the first row of the row's request."""
        return min(n - 1 for n, slot in zip(self.lengths, self.slots, strict=True) if slot == self.slots[row])


def error(got: Tensor, wanted: Tensor) -> float:
    """The largest error of a row, relative to the row's length."""
    rows, wide = wanted.reshape(len(wanted), -1).double(), got.reshape(len(got), -1).double()
    return float(((wide - rows).norm(dim=1) / rows.norm(dim=1).clamp(min=1e-30)).max())


def drawn(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.randn(shape).to(dtype)


def rms(x: Tensor, weight: Tensor) -> Tensor:
    x = x.double()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight.double()


def turned(x: Tensor, angles: Tensor, position: int) -> Tensor:
    half = x.shape[-1] // 2
    cos, sin = angles[position].double().split(half)
    a, b = x.double().split(half, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def attend(case: Attention) -> dict[str, float]:
    """Errors of what comes out and of what is written, and bytes of K and V that are read beyond what is needed."""
    torch.manual_seed(len(case.lengths) + case.width)
    h, kv, d, n, dtype = case.heads, case.kv_heads, case.width, len(case.lengths), case.dtype
    tokens = max(case.lengths) + 3
    n_slots = 2 + max(max(slot, -2 - slot) for slot in case.slots)
    keys, values = (drawn(n_slots, kv, tokens, d, dtype=dtype) for _ in range(2))
    was = keys.clone(), values.clone()
    wanted_keys, wanted_values = keys.clone(), values.clone()
    q, k, v = drawn(n, h + 2 * kv, d, dtype=dtype).split((h, kv, kv), 1)
    frequency = 1e4 ** (-torch.arange(0, d, 2) / d)
    angle = torch.arange(tokens)[:, None] * frequency
    angles = torch.cat((angle.cos(), angle.sin()), 1)
    weights = (drawn(d, dtype=dtype), drawn(d, dtype=dtype))
    wanted, queries = torch.zeros(n, h, d, dtype=torch.float64), []
    for row, (length, slot) in enumerate(zip(case.lengths, case.slots, strict=True)):
        if slot == -1:
            continue
        place = max(slot, -2 - slot)
        query, key = q[row], k[row]
        if case.normed:
            query, key = rms(query, weights[0]).to(dtype), rms(key, weights[1]).to(dtype)
        if not case.turned:
            query, key = (turned(x, angles, length - 1).to(dtype) for x in (query, key))
        wanted_keys[place, :, length - 1], wanted_values[place, :, length - 1] = key, v[row]
        queries.append((row, length, slot, query))
    for row, length, slot, query in queries:
        if slot < 0:
            continue
        first = 0 if case.window is None else max(0, length - case.window)
        ks, vs = (x[slot, :, first:length].double().repeat_interleave(h // kv, 0) for x in (wanted_keys, wanted_values))
        shares = torch.softmax((query.double()[:, None] * ks).sum(-1) * d**-0.5, -1)
        wanted[row] = (shares[:, None] @ vs)[:, 0]
    tiles = attention.tiling(n, h, kv, d, tokens, 132, dtype.itemsize)
    tiles = tiles if case.splits is None else replace(tiles, splits=case.splits)
    with interpreted.reads([keys, values]) as counted:
        at = torch.tensor(case.slots), torch.tensor(case.lengths) - 1
        turning = None if case.turned else angles, (*weights, EPS) if case.normed else None
        firsts = first_positions(*at) if case.repeated else None
        got = attention.decode(q, k, v, keys, values, *at, d**-0.5, *turning, case.window, tiles, firsts)
    of_heads = 0  # tokens that are read of KV heads: those of rows beside it, by every head for itself
    for row, (length, slot) in enumerate(zip(case.lengths, case.slots, strict=True)):
        past = range(max(0, length - (case.window or length)), length - 1) if slot >= 0 else range(0)
        later = sum(at >= case.first(row) for at in past) if case.repeated and tiles.splits > 1 else 0
        of_heads += kv * (len(past) - later) + h * later
    needed = 2 * of_heads * d * dtype.itemsize
    there = ((keys, was[0], wanted_keys), (values, was[1], wanted_values))
    alone = all(torch.equal(now == before, then == before) for now, before, then in there)
    real = [row for row, slot in enumerate(case.slots) if slot >= 0]
    found = got.view(n, h, d)
    return {
        "error": error(found[real].flatten(0, 1), wanted[real].flatten(0, 1)),
        "written": max(error(now.flatten(0, 2), then.flatten(0, 2)) for now, _, then in there),
        "elsewhere": float(not alone), "read_too_much": float(counted.n_bytes - needed),
        "padding": float(sum(found[row].abs().sum() for row, slot in enumerate(case.slots) if slot < 0)),
    }  # fmt: skip


def attentions(exhaustive: bool) -> Iterator[Attention]:
    """All kinds of heads at all widths, and what is special in a length, a batch, a slot or a window."""
    kinds = ((4, 4), (4, 1), (8, 1), (3, 1)) if not exhaustive else ((4, 4), (8, 2), (16, 2), (32, 1), (9, 3), (71, 1))
    for dtype in (FLOAT32, BFLOAT16):
        for heads, kv in kinds:
            for width in (64, 96, 128, 256) if not exhaustive else (64, 80, 96, 128, 256):
                yield Attention(heads, kv, width, (70, 1), (2, 0), dtype)
        yield Attention(2, 1, 64, (130, 65, 9, 40), (4, -1, 0, -3), dtype, splits=4)
        yield Attention(2, 2, 32, (1, 90, 70), (1, -2, -4), dtype, normed=True, window=50, splits=1)
        yield Attention(2, 2, 32, (1, 200), (1, 0), dtype, normed=True, window=50, splits=2)
        yield Attention(4, 2, 64, (40, 33), (0, 1), dtype, turned=True, splits=1)
        for splits in (1, 2):  # tokens 8, 6 and 5 of one request, of which 7 is in the cache; one of another; padding
            yield Attention(4, 2, 64, (9, 100, 7, 6, 1), (2, 0, 2, 2, -1), dtype, splits=splits)
        yield Attention(3, 1, 64, (160, 141, 90, 142), (1, 1, 0, 1), dtype, normed=True, window=20, splits=1)
        yield Attention(2, 2, 32, (99, 150, 151), (0, 0, 0), dtype, window=60, splits=2)
    yield Attention(1, 1, 64, (4096,), (0,))
    if not exhaustive:
        return
    for dtype in (FLOAT32, BFLOAT16):
        for heads, kv in ((2, 2), (8, 2), (8, 1)):
            for lengths in ((2, 3, 63, 64), (65, 127, 128, 129), (500, 1000), (2047,), (4095, 4096)):
                for splits in (1, 4, 32):
                    yield Attention(heads, kv, 128, lengths, tuple(range(len(lengths))), dtype, splits=splits)
                    if len(lengths) > 1:
                        yield Attention(heads, kv, 128, lengths, (0,) * len(lengths), dtype, splits=splits)
        for heads, kv in ((2, 2), (4, 1), (8, 1), (32, 1)):  # of one KV head 1, 4, 8, and all
            for width in (64, 96, 128, 256):
                for lengths in ((4096,), (1, 63, 64, 65), (1023, 1, 2048, 4000)):
                    yield Attention(heads, kv, width, lengths, tuple(range(len(lengths))), dtype)
                for batch in (16, 64, 256) if (width in (64, 128)) == (dtype is BFLOAT16) else (16, 64):
                    spread = tuple(1 + (37 * i) % 150 for i in range(batch - 1)), (400,)
                    yield Attention(heads, kv, width, sum(spread, ()), tuple(range(batch)), dtype)
        for batch in (1, 2, 3, 7, 16, 64, 256):
            yield Attention(4, 1, 64, tuple(1 + (37 * i) % 150 for i in range(batch)), tuple(range(batch))[::-1], dtype)


def rows(exhaustive: bool) -> Iterator[tuple[str, float]]:
    """Errors of the other kernels."""
    for dtype in (FLOAT32, BFLOAT16):
        for n, width in ((1, 64), (3, 96), (5, 576)) if not exhaustive else ((1, 64), (4, 576), (256, 4096), (2, 8192)):
            for layer_norm, sandwich in ((False, False), (True, False), (False, True)):
                yield from normed_rows(n, width, layer_norm, sandwich, dtype)
        for name in ACTIVATIONS:
            for gated in (False, True):
                inner = 3 * drawn(2, 2100 if gated else 1050, dtype=dtype)
                exact = ACTIVATIONS[name](inner[:, :1050].double()) * (inner[:, 1050:].double() if gated else 1.0)
                off = error(activation.activate(inner, name, gated), exact)
                yield f"{name}{' with a gate' if gated else ''}, {str(dtype)[6:]}", off
        for n, width, outputs in ((1, 4096, 9), (2, 300, 17), (3, 700, 6)):
            x = drawn(n, 2 * width, dtype=dtype)[:, :width]
            matrix, more = drawn(outputs, width, dtype=dtype), drawn(outputs, dtype=dtype)
            exact = x.double() @ matrix.double().T + more.double()
            yield f"product {n} x {width}, {str(dtype)[6:]}", error(gemv.product(x, matrix, more), exact)
        for n, words in ((1, 100), (3, 9000)):
            logits = 3 * drawn(n, words, dtype=dtype)
            p = (logits.double() / 1.3).softmax(-1)
            top = p.topk(2).values
            measures = (top[:, 0], top[:, 0] - top[:, 1], 1 + (p * p.log()).sum(-1) / math.log(words))
            for measure, exact in enumerate(measures):
                tokens, best, sure = head.look_at(logits, measure, 1.3)
                wrong = 0.0 if torch.equal(tokens, logits.argmax(-1)) else math.inf
                off = max(float((sure - exact).abs().max()), error(best, logits.max(-1).values.double() / 1.3), wrong)
                yield f"head of {words} words, measure {measure}, {str(dtype)[6:]}", off


def normed_rows(
    n: int, width: int, layer_norm: bool, sandwich: bool, dtype: torch.dtype
) -> Iterator[tuple[str, float]]:
    """The sum with the residual stream and its norm, alone and before products of a few rows."""
    about = f"{n} x {width}, {'LayerNorm' if layer_norm else 'RMSNorm'}{', sandwich' if sandwich else ''}"
    about = f"{about}, {str(dtype)[6:]}"
    hidden, delta = drawn(n, width, dtype=dtype), drawn(n, width, dtype=dtype)
    after, weight, shift = (drawn(width, dtype=dtype) for _ in range(3))
    post, bias = after if sandwich else None, shift if layer_norm else None
    total, normed = norms.add_norm(hidden, delta, post, weight, bias, EPS)
    added = hidden.double() + (rms(delta, after).to(dtype).double() if sandwich else delta.double())
    yield f"sum {about}", error(total, added)
    wanted = rms(total, weight)
    if layer_norm:
        wanted = F.layer_norm(total.double(), (width,), weight.double(), shift.double(), EPS)
    yield f"norm {about}", error(normed, wanted)
    if n > gemv.MOST_ROWS:
        return
    for name, gated, outputs in (("silu", True, 40), ("relu", False, 33), ("gelu_tanh", True, 20), ("gelu", False, 7)):
        matrix = drawn((2 if gated else 1) * outputs, width, dtype=dtype) / width**0.5
        more = None if gated else drawn(outputs, dtype=dtype)
        again, out = gemv.normed_product(hidden, delta, post, weight, bias, EPS, matrix, more, name, gated)
        inner = wanted @ matrix.double().T + (0.0 if more is None else more.double())
        exact = ACTIVATIONS[name](inner[:, :outputs]) * (inner[:, outputs:] if gated else 1.0)
        yield f"norm, product and {name} {about}", max(error(out, exact), error(again, added))
        if name == "silu" and n > 1 and dtype is FLOAT32:
            yield from frozen_rows(n, (hidden, delta, post, weight, bias, EPS, matrix, more, name, gated), out, about)


def frozen_rows(n: int, given: tuple[Any, ...], out: Tensor, about: str) -> Iterator[tuple[str, float]]:
    """Rows that keep their state, beside rows that do not; once all do, no weight is read that nobody needs."""
    hidden, (matrix, more, name) = given[0], given[6:9]
    some, none = torch.arange(n) - 1, torch.full((n,), -2)
    total, product = gemv.normed_product(*given, some, needed=False)
    kept = max(error(total[some < 0], hidden[some < 0]), error(norms.add_norm(*given[:6], some)[0], total))
    yield f"frozen rows, {name} {about}", max(kept, error(product[1:], out[1:]) if n > 1 else 0.0)
    with interpreted.reads([matrix]) as counted:
        all_kept, _ = gemv.normed_product(*given, none, needed=False)
        gemv.product(hidden, matrix, more if more is None or len(more) == len(matrix) else None, none)
    yield f"all rows frozen, {name} {about}", error(all_kept, hidden) + counted.n_bytes
    _, product = gemv.normed_product(*given[:1], None, *given[2:], none, needed=True)
    yield f"needed of frozen rows, {name} {about}", error(product, gemv.normed_product(given[0], None, *given[2:])[1])


def steps() -> Iterator[tuple[str, float]]:
    """One decode step of whole small models, captured: hidden states by the kernels beside those by torch."""
    with tempfile.TemporaryDirectory() as folder:
        for family in ("llama", "opt", "gpt2", "qwen2", "gemma3"):
            layers = 6 if family == "gemma3" else 3  # its layers are of two kinds
            source = find_checkpoint(str(write_tiny(family, Path(folder) / family, layers=layers)))
            for n in (2, 6):
                found = [_after_a_step(source, kernels, n) for kernels in (TORCH, TRITON)]
                yield f"{family}, batch {n}", max(error(a, b) for a, b in zip(*found[::-1], strict=True))


def repeated() -> float:
    """Several tokens of a request in one step, of which later ones see earlier ones: the error beside torch's step."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        source = find_checkpoint(str(write_tiny("llama", Path(folder))))
    a, found = source.architecture, []
    q, k, v = (torch.randn(4, heads, a.head_dim) for heads in (a.n_heads, a.n_kv_heads, a.n_kv_heads))
    noise = torch.randn(3, a.n_kv_heads, 40, a.head_dim)
    for kernels in (TORCH, TRITON):
        cache = KvCache(a, 1, 3, 40, kernels=kernels)
        for tensor in (*cache.keys, *cache.values):
            tensor.copy_(noise)
        found.append(decode_step(cache, [2, 0, 2, 2], [9, 3, 8, 5])(0, q, k, v))
    return error(*found[::-1])


def turned_outside() -> dict[str, float]:
    """Where other attention follows: errors of q and of what is written, beside the kernel that does all of it."""
    torch.manual_seed(0)
    found = {}
    angle = torch.arange(50)[:, None] * 1e4 ** (-torch.arange(0, 64, 2) / 64)
    angles, weights = torch.cat((angle.cos(), angle.sin()), 1), (drawn(64), drawn(64))
    slots, positions = torch.tensor([2, -1, 0, -5]), torch.tensor([7, 49, 0, 30])
    for heads, kv, normed in ((4, 4, False), (6, 2, True)):
        q, k, v = drawn(4, heads + 2 * kv, 64).split((heads, kv, kv), 1)
        noise, norms = drawn(2, 5, kv, 50, 64), (*weights, EPS) if normed else None
        (keys, values), (wanted_keys, wanted_values) = noise.clone(), noise.clone()
        attention.decode(q, k, v, wanted_keys, wanted_values, slots, positions, 0.125, angles, norms)
        got = turn.turn_and_write(q, k, v, keys, values, slots, positions, angles, norms)
        of_q = rms(q, weights[0]) if normed else q
        wanted = [turned(x, angles, int(at)) for x, at in zip(of_q, positions, strict=True)]
        real = [0, 2, 3]
        found[f"{heads}/{kv}"] = error(got[real].flatten(0, 1), torch.stack(wanted)[real].flatten(0, 1))
        found[f"{heads}/{kv}, written"] = float(not (keys.equal(wanted_keys) and values.equal(wanted_values)))
        keys, values = noise.clone()
        turn.write(k, v, keys, values, slots, positions, angles, (weights[1], EPS) if normed else None)
        found[f"{heads}/{kv}, alone"] = float(not (keys.equal(wanted_keys) and values.equal(wanted_values)))
    return found


def leaves() -> int:
    """In how many cases the kernel lets other rows leave than torch's operations do, or with something else."""
    different = 0
    for lazy, last, asks, looks in itertools.product((False, True), repeat=4):
        for sure_before in (0, 1):
            n = 5
            now = torch.tensor([3, -1, 0, -6, 7])
            recorded = torch.tensor([UNKNOWN, 1.0, 1.0 - lazy, 0.0, UNKNOWN], dtype=torch.float64)
            sure = torch.tensor([0.7, 0.9, 0.1, 0.2, 0.3 + 0.5 * (1 - lazy)]) if asks else None
            threshold, look = torch.full((n,), 0.5, dtype=torch.float64), None
            if looks:
                look = torch.tensor([5, 6, 7, 8, 9]), torch.tensor([1.5, math.nan, math.inf, 0.0, -2.0])
            found = []
            for kernels in (TRITON, TORCH):
                was_sure = torch.full((n,), sure_before)
                rows = Inside(now.clone(), was_sure, torch.full((4, n), -7.0, dtype=torch.float64))
                kernels.leave(rows, 12, sure, look, threshold, recorded, lazy, last)
                found.append((rows.now.tolist(), rows.was_sure.tolist(), rows.said.tolist()))
            different += found[0] != found[1]
    return different


def one_pass(exhaustive: bool) -> list[float]:
    """Passes through exits by the kernels beside bands by torch: errors of K and V, and wrong depths and tokens."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for family, n in (("llama", 3), ("llama", 6), ("opt", 3)) if exhaustive else (("llama", 3),):
            source = find_checkpoint(str(write_tiny(family, Path(folder) / family, layers=3)))
            (kernel_kv, kernel_said), (torch_kv, torch_said) = _after_a_pass(source, n)
            wrong = sum(a != b for a, b in zip(kernel_said, torch_said, strict=True))
            found.append(max(error(a, b) for a, b in zip(kernel_kv, torch_kv, strict=True)) + wrong)
    return found


def _after_a_pass(source: Any, n: int) -> list[tuple[list[Tensor], list[tuple[int, int]]]]:
    """K and V of all layers at the rows' positions, and their depths and tokens."""
    found, exits, slots = [], (1, 2, 3), [5, 1, 7, 0, 3, 6][:n]
    for kernels in (TRITON, TORCH):
        torch.manual_seed(0)
        model = SegmentedModel.load(source, kernels=kernels)
        cache = KvCache(model.architecture, 3, 8, 40, kernels=kernels)
        for tensor in (*cache.keys, *cache.values):
            tensor.copy_(torch.randn(tensor.shape))
        rows = [
            Row(slot, 3 + 5 * i, 7 + i, 3, asks=True, recorded={1: i % 3 == 0, 2: i % 3 < 2, 3: True})
            for i, slot in enumerate(slots)
        ]
        reader, device = ExitReader(ExitHeads.own(exits[:-1]), 3), CpuDevice(kernels)
        if kernels is TRITON:
            rule = Rule(exits, (True, True), Confidence.MAX_PROBABILITY, lazy=False, watched=False)
            OnePass(GraphedDecodes(model, cache, device), device).run(reader, rule, 0.5, rows, Tally(exits))
        else:
            plan = SimpleNamespace(
                exit_rule=PerToken(0.5), batching=BatchingRule.EACH_TOKEN, kv_rule=KvRule.PROPAGATE, loaded_layers=3,
                first_band=0,
            )  # fmt: skip
            Forward(model, reader, cache, plan, exits).run(rows, [])  # type: ignore[arg-type]
        at = [(row.slot, slice(None), row.position) for row in rows]
        kv = [torch.stack([tensor[place] for place in at]) for tensor in (*cache.keys, *cache.values)]
        found.append((kv, [(row.layers, row.chosen) for row in rows]))
    return found


def _after_a_step(source: Any, kernels: Any, n: int) -> list[Tensor]:
    """Hidden states after some layers and after all, and K and V of the last layer."""
    torch.manual_seed(0)
    model = SegmentedModel.load(source, kernels=kernels)
    layers, slots = model.n_loaded, [5, 1, 7, 0, 3, 6]
    cache = KvCache(model.architecture, layers, 8, 40, kernels=kernels)
    for tensor in (*cache.keys, *cache.values):
        tensor.copy_(torch.randn(tensor.shape))
    step = GraphedDecodes(model, cache, CpuDevice(kernels))
    decodes = [Row(slots[i], 3 + 5 * i, 7 + i, layers) for i in range(n)]
    first = step.run(decodes, None, 0, 2).clone()
    last = step.run(decodes, first, 2, layers).clone()
    return [first, last, *(x[slots[i], :, 3 + 5 * i] for x in (cache.keys[-1], cache.values[-1]) for i in range(n))]


def first_contact() -> list[float]:
    """What is found when the kernels first run on a card: their error, and that of kernels of which one is wrong."""

    class Wrong(TritonKernels):
        def product(self, x: Tensor, weight: Tensor, bias: Tensor | None, slots: Tensor | None = None) -> Tensor:
            return 1.1 * super().product(x, weight, bias, slots)

    contact.WORDS, on = 200, torch.device("cpu")  # fewer than on a card, since each takes the interpreter long
    return [*(contact.largest_error(TRITON, on, n) for n in contact.BATCHES), contact.largest_error(Wrong(), on, 2)]


def not_numbers() -> list[bool]:
    """Whether the best logit tells that a row of logits holds no numbers: NaN, infinity, mostly minus infinity, one."""
    logits = drawn(4, 5000)
    logits[0, 7], logits[1, 4999], logits[2, :4999], logits[3, 3] = math.nan, math.inf, -math.inf, -math.inf
    _, best, _ = head.look_at(logits, 2)
    return torch.isnan(best).tolist()


def attended_not_numbers() -> list[list[bool]]:
    """Which of two requests come out as NaN where a key, a value, and the new query of the second one are NaN."""
    found = []
    for kv_heads, splits, spoilt in itertools.product((4, 1), (1, 4), range(3)):
        keys, values = drawn(2, kv_heads, 200, 64), drawn(2, kv_heads, 200, 64)
        qkv = drawn(2, 4 + 2 * kv_heads, 64)
        (keys[1, :, 150], values[1, :, 150], qkv[1, :4])[spoilt].fill_(math.nan)
        tiles = replace(attention.tiling(2, 4, kv_heads, 64, 200, 132, 4), splits=splits)
        q, k, v = qkv.split((4, kv_heads, kv_heads), 1)
        places, lengths = torch.tensor([0, 1]), torch.tensor([190, 190])
        got = attention.decode(q, k, v, keys, values, places, lengths, 0.125, tiles=tiles)
        found.append(torch.isnan(got).any(1).tolist())
    return found


def others(exhaustive: bool) -> dict[str, Any]:
    """Of all kernels but attention."""
    return {
        "rows": dict(rows(exhaustive)), "steps": dict(steps()), "repeated": repeated(), "turned": turned_outside(),
        "one_pass": one_pass(exhaustive), "leaves": leaves(), "not_numbers": not_numbers(),
        "attended": attended_not_numbers(), "first_contact": first_contact(),
    }  # fmt: skip


def main(words: list[str]) -> dict[str, Any]:
    if not words:
        return {"attention": {case.name: attend(case) for case in attentions(False)}, **others(False)}
    if words[1] == "others":
        return others(True)
    part, parts = map(int, words[1].split("/"))
    return {"attention": {case.name: attend(case) for case in itertools.islice(attentions(True), part, None, parts)}}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1:])))
