"""Mutants of a GGUF file (a tiny Llama with its tokenizer): keys, types, lengths, tensors' headers and bytes."""

from __future__ import annotations

import os
import random
import struct
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from faults import NAMES, NUMBERS, Mutant, changed_bytes, main

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_KINDS = (0, 1, 2, 4, 8, 12, 20, 24, 28, 30, 31, 38, 39, 41, 99, 1 << 31)
_FLOATS = (float("nan"), float("inf"), -1.0, 0.0, 1e30, 1e-30)


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield Mutant("unchanged", lambda folder: _written(folder, _content()))
    while True:
        whole = _content(rng.choice(("llama", "llama", "gemma3", "qwen2")))
        keys, tensors, data = parsed(whole)
        kind = rng.choice(("bytes", *["value"] * 3, "type", "name", "array", "tensor", "tensor", "data"))
        if kind == "bytes":
            what, content = changed_bytes(whole, rng, rng.choice((24, 2_000, 40_000, None)))
        else:
            what, content = _changed(kind, keys, tensors, data, rng)
        yield Mutant(f"gguf {kind}: {what}", lambda folder, content=content: _written(folder, content))


def read(path: Path) -> None:
    """Open the file, make its tokenizer, load all layers, and compute logits, which must be finite."""
    import torch

    from helios_sim.live.checkpoint.source import find_checkpoint

    torch.set_num_threads(1)
    os.environ["HELIOS_CACHE"] = str(path.parent / "cache")
    checkpoint = find_checkpoint(str(path))
    ids = checkpoint.tokenizer()("The bridge keeper", add_special_tokens=False)["input_ids"]
    assert ids
    run(checkpoint)


def run(checkpoint: Any) -> None:
    """Load the whole checkpoint and compute the logits of a few tokens, which must be finite."""
    import torch

    from helios_sim.live.memory.kv import Packed
    from helios_sim.live.model.decoder import SegmentedModel

    model = SegmentedModel.load(checkpoint)
    with torch.no_grad():
        step = Packed(model.architecture, 1, 8)
        tokens = torch.arange(8) % model.architecture.vocab_size
        hidden = model.run(model.embed(tokens, step.positions), 0, model.n_loaded, step)
        assert bool(torch.isfinite(model.logits(hidden)).all()), "logits that are no numbers were accepted"


def _changed(
    kind: str, keys: list[list[Any]], tensors: list[list[Any]], data: list[bytes], rng: random.Random
) -> tuple[str, bytes]:
    key, tensor = rng.choice(keys), rng.randrange(len(tensors))
    if kind == "value":
        key = rng.choice([k for k in keys if k[1] != _ARRAY])
        values: tuple[Any, ...] = NAMES if key[1] == _STRING else _FLOATS if key[1] in (6, 12) else NUMBERS
        value = rng.choice(values)
        key[2] = value if key[1] in (_STRING, 6, 12) else _wrapped(value, key[1])
        what = f"{key[0]} = {str(key[2])[:40]!r}"
    elif kind == "type":
        typed = (4, 7), (5, -3), (6, 0.5), (7, True), (_STRING, "x"), (_ARRAY, (4, [1, 2])), (77, None)
        key[1], key[2] = rng.choice(typed)
        what = f"{key[0]} of type {key[1]}"
    elif kind == "name":
        how = rng.choice(("drop", "double", "rename"))
        at = keys.index(key)
        keys[at : at + 1] = {"drop": [], "double": [key, list(key)], "rename": [[rng.choice(NAMES), *key[1:]]]}[how]
        what = f"{how} {key[0]}"
    elif kind == "array":
        key = rng.choice([k for k in keys if k[1] == _ARRAY])
        items = list(key[2][1])
        how = rng.choice(("length", "drop", "nested", "item", "empty"))
        at = rng.randrange(len(items))
        before, after = items[:at], items[at + 1 :]
        changed = {"drop": before + after, "empty": [], "item": [*before, type(items[at])(7), *after]}.get(how, items)
        length = rng.choice(NUMBERS[3:13]) if how == "length" else len(changed)
        key[2] = (_ARRAY if how == "nested" else key[2][0], changed, length)
        what = f"{how} {key[0]}"
    elif kind == "tensor":
        how = rng.choice(("name", "dims", "kind", "offset", "drop", "double", "dimensions"))
        name, dims, of_kind, offset = tensors[tensor]
        new = {
            "name": [rng.choice((*NAMES, "blk.0.attn_q.bias", "rope_freqs.weight")), dims, of_kind, offset],
            "dims": [name, [*dims[:-1], rng.choice((*NUMBERS[:12], dims[-1] + 1, dims[-1] * 2))], of_kind, offset],
            "dimensions": [name, rng.choice(([], dims * 2, [*dims, 1], [1] * 70)), of_kind, offset],
            "kind": [name, dims, rng.choice(_KINDS), offset],
            "offset": [name, dims, of_kind, rng.choice((*NUMBERS[:12], offset + 1, offset + 32))],
        }.get(how)
        tensors[tensor : tensor + 1] = [new] if new else [] if how == "drop" else [tensors[tensor]] * 2
        what = f"{how} of {name}: {str(new)[:80]}"
    else:
        content = data[tensor]
        bits = struct.pack("<f", rng.choice((*_FLOATS, -1e38, 3e38)))
        at = rng.randrange(len(content) // 4) * 4
        data[tensor] = content[:at] + bits + content[at + 4 :]
        what = f"{tensors[tensor][0]}[{at // 4}] = {struct.unpack('<f', bits)[0]}"
    return what, joined(keys, tensors, data)


def _wrapped(value: int, kind: int) -> Any:
    bits = 8 * struct.calcsize(_SCALARS[kind])
    if kind == 7:
        return bool(value)
    value &= (1 << bits) - 1
    return value - (1 << bits) if _SCALARS[kind] in "bhiq" and value >> (bits - 1) else value


@cache
def _content(family: str = "llama") -> bytes:
    from tiny_models import tiny_model, tiny_tokenizer, write_gguf

    own = {"head_dim": 8, "query_pre_attn_scalar": 8, "layer_types": None} if family == "gemma3" else {}
    model = tiny_model(family, 2, hidden_size=32, intermediate_size=64, **own)
    with TemporaryDirectory() as folder:
        return write_gguf(Path(folder) / "tiny.gguf", model, tokenizer=tiny_tokenizer()).read_bytes()


def parsed(content: bytes) -> tuple[list[list[Any]], list[list[Any]], list[bytes]]:
    """Keys [name, type, value], tensors [name, dims, kind, offset], and the bytes of each tensor."""
    at = 24

    def take(form: str) -> tuple[Any, ...]:
        nonlocal at
        at += struct.calcsize("<" + form)
        return struct.unpack_from("<" + form, content, at - struct.calcsize("<" + form))

    def text() -> str:
        nonlocal at
        (length,) = take("Q")
        at += length
        return content[at - length : at].decode()

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            return take(_SCALARS[kind])[0]
        item, length = take("IQ")
        return item, [text() for _ in range(length)] if item == _STRING else list(take(f"{length}{_SCALARS[item]}"))

    n_tensors, n_keys = struct.unpack_from("<QQ", content, 8)
    keys, tensors = [], []
    for _ in range(n_keys):
        name, kind = text(), take("I")[0]
        keys.append([name, kind, value(kind)])
    for _ in range(n_tensors):
        name, count = text(), take("I")[0]
        dims = list(take(f"{count}Q"))
        tensors.append([name, dims, *take("IQ")])
    begin = -(-at // 32) * 32
    ends = [offset for *_, offset in tensors[1:]] + [len(content) - begin]
    return keys, tensors, [content[begin + t[3] : begin + end] for t, end in zip(tensors, ends, strict=True)]


def joined(keys: list[list[Any]], tensors: list[list[Any]], data: list[bytes]) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def packed(kind: int, value: Any) -> bytes:
        if kind == _STRING:
            return text(value)
        if kind == _ARRAY:
            item, items, *length = value
            form = _SCALARS.get(item, "d")
            body = b"".join(text(v) if isinstance(v, str) else struct.pack("<" + form, v) for v in items)
            return struct.pack("<IQ", item, (length[0] if length else len(items)) % (1 << 64)) + body
        return struct.pack("<" + _SCALARS[kind], value) if kind in _SCALARS else b""

    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(keys))
    out += b"".join(text(name) + struct.pack("<I", kind) + packed(kind, value) for name, kind, value in keys)
    for name, dims, kind, offset in tensors:
        sizes = [size % (1 << 64) for size in dims]
        out += text(name) + struct.pack(f"<I{len(sizes)}QIQ", len(sizes), *sizes, kind, offset % (1 << 64))
    return out + b"\0" * (-len(out) % 32) + b"".join(data)


def _written(folder: Path, content: bytes) -> Path:
    path = folder / "mutant.gguf"
    path.write_bytes(content)
    return path


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
