"""Mutants of a checkpoint folder: its config, the headers and bytes of its shards, their index, its tokenizer."""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from faults import NAMES, Mutant, changed_bytes, changed_json, main
from faults.gguf_files import run

CONFIG, INDEX = "config.json", "model.safetensors.index.json"
_KINDS = ("F64", "F16", "BF16", "F8_E4M3", "I8", "I32", "U8", "BOOL", "X99", "")
_LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 123456\n"


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield Mutant("unchanged", lambda folder: _written(folder, {}))
    families = ("llama", "gpt2", "opt", "qwen2", "gemma3")
    while True:
        files = _files(rng.choice(families))
        shard = rng.choice(sorted(name for name in files if name.endswith(".safetensors")))
        kind = rng.choice((*["config"] * 4, "header", "header", "bytes", "data", "index", "index", "tokenizer", "file"))
        if kind == "config":
            what, changed = changed_json(json.loads(files[CONFIG]), rng)
            new = {CONFIG: json.dumps(changed).encode()}
        elif kind == "tokenizer":
            name = rng.choice(("tokenizer.json", "tokenizer_config.json"))
            what, changed = changed_json(json.loads(files[name]), rng)
            new = {name: json.dumps(changed).encode()}
        elif kind == "index":
            what, changed = _changed_index(json.loads(files[INDEX]), rng)
            new = {INDEX: json.dumps(changed).encode()}
        elif kind == "header":
            what, content = changed_header(files[shard], rng)
            new = {shard: content}
        elif kind == "data":
            what, content = changed_data(files[shard], rng)
            new = {shard: content}
        elif kind == "bytes":
            name = rng.choice(sorted(files))
            what, content = changed_bytes(files[name], rng, rng.choice((16, 2_000, None)))
            what, new = f"{name}: {what}", {name: content}
        else:
            what, new = _changed_file(rng.choice((CONFIG, INDEX, shard, "tokenizer.json")), rng)
        yield Mutant(f"folder {kind}: {what}", lambda folder, files=files, new=new: _written(folder, files | new))


def read(path: Path) -> None:
    """Open the folder, load its tokenizer and all layers, and compute logits, which must be finite."""
    import torch

    from helios_sim.live.checkpoint.source import find_checkpoint

    torch.set_num_threads(1)
    os.environ["HELIOS_CACHE"] = str(path.parent / "cache")
    checkpoint = find_checkpoint(str(path))
    checkpoint.tokenizer()("The bridge keeper", add_special_tokens=False)
    run(checkpoint)


def changed_header(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """The header of a safetensors file with one change."""
    (length,) = struct.unpack_from("<Q", content)
    header: dict[str, Any] = json.loads(content[8 : 8 + length])
    name = rng.choice([n for n in header if n != "__metadata__"])
    kind = rng.choice(("json", "json", "dtype", "name", "length", "scale"))
    if kind == "json":
        what, changed = changed_json(header, rng)
        text = json.dumps(changed).encode()
        return what, struct.pack("<Q", len(text)) + text + content[8 + length :]
    if kind == "length":
        wrong = rng.choice((0, 1, length - 1, length + 1, 1 << 40, (1 << 64) - 1))
        return f"length {wrong}", struct.pack("<Q", wrong) + content[8:]
    if kind == "dtype":
        header[name]["dtype"] = rng.choice(_KINDS)
    elif kind == "name":
        header[rng.choice((*NAMES, name.replace("weight", "bias"), name.replace(".0.", ".9.")))] = header.pop(name)
    else:
        header[f"{name}_scale_inv"] = {"dtype": "F32", "shape": [], "data_offsets": [len(content) - 8 - length] * 2}
    text = json.dumps(header).encode()
    return f"{kind} of {name}", struct.pack("<Q", len(text)) + text + content[8 + length :]


def changed_data(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One value of a tensor in float32 changed to NaN, infinity, or a number near the end of its range."""
    (length,) = struct.unpack_from("<Q", content)
    at = 8 + length + rng.randrange((len(content) - 8 - length) // 4) * 4
    value = rng.choice((float("nan"), float("inf"), -float("inf"), 3e38, -1e30, 1e7))
    return f"value {value} at {at}", content[:at] + struct.pack("<f", value) + content[at + 4 :]


def _changed_index(index: dict[str, Any], rng: random.Random) -> tuple[str, object]:
    if rng.random() < 0.5:
        return changed_json(index, rng)
    name = rng.choice(sorted(index["weight_map"]))
    shards = sorted(set(index["weight_map"].values()))
    new = rng.choice((*NAMES, "../" + shards[0], str(Path("/") / shards[0]), "./" + shards[0], *shards, CONFIG))
    index["weight_map"][name] = new
    return f"{name} in {new[:40]!r}", index


def _changed_file(name: str, rng: random.Random) -> tuple[str, dict[str, Any]]:
    """A file that is missing, empty, of another kind, or stands for something else."""
    kinds: dict[str, Any] = {
        "missing": None, "empty": b"", "a folder": "folder", "a loop": "loop", "a pipe": "pipe", "a device": "device",
        "large and sparse": "sparse", "a pointer of Git LFS": _LFS, "nested": b"[" * 200_000, "no UTF-8": b"\xff\xfe{}",
        "a number of many digits": b'{"num_hidden_layers": ' + b"9" * 100_000 + b"}", "a list": b"[1]",
    }  # fmt: skip
    kind = rng.choice(sorted(kinds))
    if rng.random() < 0.2:
        beside = rng.choice(("quantize_config.json", "adapter_config.json", "hf_quant_config.json"))
        return f"{beside} beside it", {beside: b"{}"}
    return f"{name} is {kind}", {name: kinds[kind]}


@cache
def _files(family: str) -> dict[str, bytes]:
    from tiny_models import tiny_model, tiny_tokenizer

    with TemporaryDirectory() as folder:
        tiny_model(family, 2).save_pretrained(folder, max_shard_size="100KB")
        tiny_tokenizer().save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


def _written(folder: Path, files: dict[str, Any]) -> Path:
    place = folder / "model"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    for name, content in (files or _files("llama")).items():
        path = place / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content == "folder":
            path.mkdir()
        elif content in ("loop", "device"):
            path.symlink_to(path.name if content == "loop" else "/dev/zero")
        elif content == "pipe":
            os.mkfifo(path)
        elif content == "sparse":
            with path.open("wb") as file:
                file.truncate(1 << 36)
    return place


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
