"""Mutants of a folder of exit heads. Where tensors change, the sha256 in the header follows, so that they are read."""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from faults import Mutant, changed_bytes, changed_json, main
from faults.hub_folders import changed_data, changed_header

HEADER, TENSORS = "heads.json", "heads.safetensors"
D, EXITS = 32, (1, 2)


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield Mutant("unchanged", lambda folder: _written(folder, *files()))
    while True:
        header, tensors = files()
        kind = rng.choice(("json", "json", "json", "header", "header", "data", "bytes", "sum", "file"))
        new: tuple[bytes | None, bytes | None]
        if kind == "json":
            what, changed = changed_json(json.loads(header), rng)
            new = json.dumps(changed).encode(), tensors
        elif kind == "file":
            at, content = rng.randrange(2), rng.choice((None, b"", b"[" * 100_000, b"\xff\xfe", b"GGUF"))
            what = f"{(HEADER, TENSORS)[at]} is {content if content is None else content[:8]!r}"
            new = (content, tensors) if at == 0 else (header, content)
        elif kind in ("sum", "bytes"):
            what, content = changed_bytes(tensors, rng, rng.choice((16, 2_000, None)))
            new = (header, content) if kind == "sum" else (_summed(header, content), content)
        else:
            what, content = (changed_header if kind == "header" else changed_data)(tensors, rng)
            new = _summed(header, content), content
        yield Mutant(f"heads {kind}: {what}", lambda folder, new=new: _written(folder, *new))


def read(path: Path) -> None:
    """Load the heads and use each of them on a state; every result must be finite."""
    import torch

    from helios_sim.live.model.heads import ExitHeads

    torch.set_num_threads(1)
    heads = ExitHeads.load(path, architecture())
    states = torch.linspace(-1, 1, 3 * D).view(3, D)
    for index in range(len(heads.exits) + 1):
        for values in (heads.adapt(index, states), heads.classify(index, states)):
            assert bool(torch.isfinite(values).all()), "a head that computes no numbers was accepted"


def architecture() -> Any:
    from helios_sim.live.model.architecture import Architecture, Rope

    return Architecture(
        family="llama", n_layers=4, d_model=D, n_heads=2, n_kv_heads=2, head_dim=16, d_ff=64, vocab_size=320,
        max_context_tokens=128, norm_eps=1e-5, activation="silu", tied_embeddings=False, attention_scale=0.25,
        rope=Rope(1e4),
    )  # fmt: skip


@cache
def files() -> tuple[bytes, bytes]:
    import torch

    from helios_sim.live.model.heads import write_heads

    shapes = {
        "scale": (D,), "linear": (D, D), "bias": (D,), "gate": (8, D), "up": (8, D), "down": (D, 8),
        "check_in": (6, D), "check_bias": (6,), "check_out": (6,), "check_offset": (),
    }  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    tensors = {
        depth: {name: 0.1 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        for depth in EXITS
    }
    header = {
        "model": "tiny", "architecture": {"family": "llama", "n_layers": 4, "d_model": D, "vocab_size": 320},
        "exits": list(EXITS), "risk_scale": [1.0, 1.5], "temperature": [0.9, 0.95, 1.0],
    }  # fmt: skip
    with TemporaryDirectory() as folder:
        write_heads(Path(folder), header, tensors)
        return (Path(folder) / HEADER).read_bytes(), (Path(folder) / TENSORS).read_bytes()


def _summed(header: bytes, tensors: bytes) -> bytes:
    return json.dumps(json.loads(header) | {"sha256": hashlib.sha256(tensors).hexdigest()}).encode()


def _written(folder: Path, header: bytes | None, tensors: bytes | None) -> Path:
    for name, content in ((HEADER, header), (TENSORS, tensors)):
        if content is not None:
            (folder / name).write_bytes(content)
    return folder


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
