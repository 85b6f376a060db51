"""Every kind of values that a GGUF file may hold, in every family: against transformers, and against ggml's formats.

A model holds a tensor of each kind, of random blocks. transformers reads the same file by itself. The values of the
kinds without tables are computed once more here, number by number, as ggml's C code does.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from helios_sim.errors import WeightsError
from helios_sim.live.checkpoint.gguf_file import readable_kinds
from helios_sim.live.checkpoint.source import find_checkpoint
from helios_sim.live.memory.kv import DecodeStep, KvCache
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.profile.gguf_header import LongArray, read_header
from live_example import TOLERANCE, decode_logits, packed_logits, prompt_logits, reference_logits, token_ids
from tiny_models import tiny_model, write_gguf

Kind = GGMLQuantizationType
WIDTH = 256  # the longest block
SIZES = {
    "hidden_size": WIDTH, "intermediate_size": WIDTH, "head_dim": 64, "num_attention_heads": 4,
    "num_key_value_heads": 4,
}  # fmt: skip
LAYERS = 4  # of seven matrices each: more than there are kinds
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {}, "qwen2": {},
    # transformers scales by 256 ** -0.5 whatever the file says, llama.cpp by the size of a head
    "gemma3": {"head_dim": 256, "query_pre_attn_scalar": 256, "num_attention_heads": 2, "num_key_value_heads": 1},
}  # fmt: skip


def blocks(kind: Kind, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random blocks (rows, bytes) whose values are those of weights: finite, at most 0.5, and not all about zero."""
    n_values, n_bytes = GGML_QUANT_SIZES[kind]
    rng, wanted, found = np.random.default_rng([seed, kind]), rows * columns // n_values, []
    if kind in (Kind.F32, Kind.F16, Kind.BF16):
        values = rng.normal(scale=0.1, size=(rows, columns)).astype(np.float32)
        return gguf.quants.quantize(values, kind).view(np.uint8) if kind is not Kind.F32 else values.view(np.uint8)
    while sum(map(len, found)) < wanted:
        drawn = rng.integers(0, 256, (max(4096, wanted), n_bytes), dtype=np.uint8)
        with np.errstate(all="ignore"):
            largest = np.abs(gguf.quants.dequantize(drawn, kind)).max(axis=1)
        found.append(drawn[(largest < 0.5) & (largest > 1e-3)])
    return np.concatenate(found)[:wanted].reshape(rows, -1)


@pytest.fixture(scope="module", params=FAMILIES)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[SegmentedModel, Any, Path]:
    """Our model and transformers' of one file with a matrix of every kind, its norms as float32."""
    import transformers

    reference = tiny_model(request.param, LAYERS, **SIZES | FAMILIES[request.param])
    kinds = cycle(Kind[name] for name in readable_kinds())
    path = tmp_path_factory.mktemp(request.param) / "kinds.gguf"
    vocabulary = {f"{request.param}.vocab_size": ("uint32", reference.config.vocab_size)}  # transformers asks for it
    write_gguf(path, reference, keys=vocabulary, kinds=lambda _, shape: (kind := next(kinds), blocks(kind, *shape)))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return SegmentedModel.load(find_checkpoint(str(path))), theirs.eval(), path


def test_every_kind_in_every_family_gives_transformers_logits(both: tuple[SegmentedModel, Any, Path]) -> None:
    model, reference, path = both
    stored = {tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert stored == set(readable_kinds())
    ids = token_ids(batch=2, tokens=40)
    want = reference_logits(reference, ids)
    assert want.std() > 0.1
    torch.testing.assert_close(packed_logits(model, ids), want, atol=TOLERANCE, rtol=0)


def test_decodes_from_the_cache_are_transformers_too(both: tuple[SegmentedModel, Any, Path]) -> None:
    model, reference, _ = both
    ids, n = token_ids(batch=1, tokens=30)[0], 24
    cache = KvCache(model.architecture, model.n_loaded, 1, 32)
    got = [prompt_logits(model, cache, 0, ids[:n], (n,))[-1]]
    got += [decode_logits(model, DecodeStep(cache, [0], [at]), ids[at : at + 1])[0] for at in range(n, 30)]
    with torch.no_grad():
        past = reference(ids[None, :n], use_cache=True)
        want = [past.logits[0, -1]]
        for at in range(n, 30):
            past = reference(ids[None, at : at + 1], past_key_values=past.past_key_values, use_cache=True)
            want.append(past.logits[0, -1])
    torch.testing.assert_close(torch.stack(got), torch.stack(want), atol=TOLERANCE, rtol=0)


def test_a_header_is_what_the_gguf_package_reads(both: tuple[SegmentedModel, Any, Path]) -> None:
    header, reader = read_header(both[2]), gguf.GGUFReader(both[2])
    assert {name: (t.shape, t.kind, t.offset, t.n_bytes) for name, t in header.tensors.items()} == {
        t.name: (tuple(map(int, t.shape[::-1])), int(t.tensor_type), t.data_offset, int(t.n_bytes))
        for t in reader.tensors
    }
    theirs = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert header.metadata.keys() == theirs.keys()
    for name, value in header.metadata.items():
        if isinstance(value, LongArray):
            assert value.length == len(theirs[name])
        else:
            assert (list(value) if isinstance(value, tuple) else value) == theirs[name]


# The formats of ggml (ggml-common.h, ggml-quants.c, gguf.md), one value after the other.


def half(data: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", data, at)[0])


def q4_0(b: bytes) -> Iterator[float]:
    yield from (half(b, 0) * ((b[2 + i % 16] >> 4 * (i // 16) & 15) - 8) for i in range(32))


def q4_1(b: bytes) -> Iterator[float]:
    yield from (half(b, 0) * (b[4 + i % 16] >> 4 * (i // 16) & 15) + half(b, 2) for i in range(32))


def q5_0(b: bytes) -> Iterator[float]:
    high = int.from_bytes(b[2:6], "little")
    for i in range(32):
        yield half(b, 0) * ((b[6 + i % 16] >> 4 * (i // 16) & 15 | (high >> i & 1) << 4) - 16)


def q5_1(b: bytes) -> Iterator[float]:
    high = int.from_bytes(b[4:8], "little")
    for i in range(32):
        yield half(b, 0) * (b[8 + i % 16] >> 4 * (i // 16) & 15 | (high >> i & 1) << 4) + half(b, 2)


def q8_0(b: bytes) -> Iterator[float]:
    yield from (half(b, 0) * x for x in struct.unpack_from("<32b", b, 2))


def q2_k(b: bytes) -> Iterator[float]:
    d, least = half(b, 80), half(b, 82)
    for i in range(256):
        q = b[16 + i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3
        yield d * (b[i // 16] & 15) * q - least * (b[i // 16] >> 4)


def q3_k(b: bytes) -> Iterator[float]:
    high, low, packed, d = b[:32], b[32:96], b[96:108], half(b, 108)
    for i in range(256):
        j = i // 16
        scale = (packed[j % 8] >> 4 * (j // 8) & 15 | (packed[8 + j % 4] >> 2 * (j // 4) & 3) << 4) - 32
        q = low[i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3
        yield d * scale * (q - (0 if high[i % 32] >> i // 32 & 1 else 4))


def k_scales(packed: bytes, j: int) -> tuple[int, int]:
    """Scale and minimum of sub-block j of Q4_K and Q5_K, six bits each."""
    if j < 4:
        return packed[j] & 63, packed[j + 4] & 63
    return packed[j + 4] & 15 | packed[j - 4] >> 6 << 4, packed[j + 4] >> 4 | packed[j] >> 6 << 4


def q4_k(b: bytes) -> Iterator[float]:
    for i in range(256):
        scale, least = k_scales(b[4:16], i // 32)
        q = b[16 + i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15
        yield half(b, 0) * scale * q - half(b, 2) * least


def q5_k(b: bytes) -> Iterator[float]:
    for i in range(256):
        scale, least = k_scales(b[4:16], i // 32)
        q = b[48 + i // 64 * 32 + i % 32] >> 4 * (i % 64 // 32) & 15 | (b[16 + i % 32] >> i // 32 & 1) << 4
        yield half(b, 0) * scale * q - half(b, 2) * least


def q6_k(b: bytes) -> Iterator[float]:
    scales, d = struct.unpack_from("<16b", b, 192), half(b, 208)
    for i in range(256):
        part, within, row = i // 128, i % 128, i % 32
        low = b[part * 64 + row + 32 * (within // 32 % 2)] >> 4 * (within // 64) & 15
        high = b[128 + part * 32 + row] >> within // 32 * 2 & 3
        yield d * scales[i // 16] * ((low | high << 4) - 32)


NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)  # twice the values of E2M1


def iq4_nl(b: bytes) -> Iterator[float]:
    yield from (half(b, 0) * NL[b[2 + i % 16] >> 4 * (i // 16) & 15] for i in range(32))


def iq4_xs(b: bytes) -> Iterator[float]:
    high = int.from_bytes(b[2:4], "little")
    for i in range(256):
        j = i // 32
        scale = (b[4 + j // 2] >> 4 * (j % 2) & 15 | (high >> 2 * j & 3) << 4) - 32
        yield half(b, 0) * scale * NL[b[8 + j * 16 + i % 16] >> 4 * (i % 32 // 16) & 15]


def mxfp4(b: bytes) -> Iterator[float]:
    yield from (2.0 ** (b[0] - 128) * FP4[b[1 + i % 16] >> 4 * (i // 16) & 15] for i in range(32))


def tq2_0(b: bytes) -> Iterator[float]:
    yield from (half(b, 64) * ((b[i // 128 * 32 + i % 32] >> i % 128 // 32 * 2 & 3) - 1) for i in range(256))


def tq1_0(b: bytes) -> Iterator[float]:
    for first, count, trits in ((0, 32, 5), (32, 16, 5), (48, 4, 4)):
        for n in range(trits):
            for m in range(count):
                yield half(b, 52) * ((b[first + m] * 3**n % 256 * 3 >> 8) - 1)


BY_HAND: dict[str, Callable[[bytes], Iterator[float]]] = {
    "F16": lambda b: iter(struct.unpack("<e", b)), "BF16": lambda b: iter(struct.unpack("<f", b"\0\0" + b)),
    "Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k,
    "Q5_K": q5_k, "Q6_K": q6_k, "IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "MXFP4": mxfp4, "TQ1_0": tq1_0, "TQ2_0": tq2_0,
}  # fmt: skip


def one_kind(path: Path, kind: Kind, rows: np.ndarray) -> Path:
    """A file whose first K matrix has that kind, and these rows (n, bytes) over and over."""
    tiled = np.tile(rows, (WIDTH // len(rows), 1))
    return write_gguf(
        path, tiny_model("llama", 1, **SIZES), kinds=lambda name, _: (kind, tiled) if "attn_k." in name else None
    )


@pytest.mark.parametrize("name", BY_HAND)
def test_a_kind_is_what_ggml_says_of_it(name: str, tmp_path: Path) -> None:
    rows, n_bytes = blocks(Kind[name], 4, WIDTH, seed=1), GGML_QUANT_SIZES[Kind[name]][1]
    checkpoint = find_checkpoint(str(one_kind(tmp_path / "one.gguf", Kind[name], rows)))
    by_hand = [
        [value for at in range(0, len(row), n_bytes) for value in BY_HAND[name](row[at : at + n_bytes])]
        for row in map(bytes, rows)
    ]
    got = checkpoint.rows("blk.0.attn_k.weight", 0, 4).numpy()
    np.testing.assert_allclose(got, np.array(by_hand), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", [kind for kind in Kind if kind.name not in readable_kinds()], ids=lambda k: k.name)
def test_a_kind_that_is_not_read_is_named_when_the_file_is_opened(kind: Kind, tmp_path: Path) -> None:
    n_values, n_bytes = GGML_QUANT_SIZES[kind]
    rows = np.zeros((1, WIDTH // n_values * n_bytes), np.uint8)
    with pytest.raises(WeightsError, match=rf"attn_k\.weight.*{kind.name}.*of another quantization"):
        find_checkpoint(str(one_kind(tmp_path / "one.gguf", kind, rows)))
