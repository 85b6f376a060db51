"""Mutants of a profile's folder: keys, types and numbers of its header, cells, columns and rows of its tables."""

from __future__ import annotations

import io
import json
import random
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from faults import NUMBERS, Mutant, changed_bytes, changed_json, main

SHIPPED = Path(__file__).parents[2] / "helios_sim/data/profiles"
NAMES = ("smollm2-135m@epyc-2core", "opt-1.3b@a100-40gb")  # measured, and derived
HEADER, TABLES = "profile.json", ("rows.parquet", "grids.parquet", "terms.parquet")
_CELLS: tuple[Any, ...] = (None, -1, 0, 1e-300, 1e300, float("nan"), float("inf"), "x", "", True, *NUMBERS)


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield _written("unchanged", dict(_files(NAMES[0])))
    while True:
        files = dict(_files(rng.choice(NAMES)))
        tables = [name for name in TABLES if name in files]
        kind = rng.choice(("header", "header", "header", "header", "table", "table", "table", "bytes", "file"))
        if kind == "header":
            what, changed = changed_json(json.loads(files[HEADER]), rng)
            files[HEADER] = json.dumps(changed).encode(errors="surrogatepass")
        elif kind == "file":
            name = rng.choice((HEADER, *tables))
            contents = None, b"", b"[" * 100_000, b"PAR1", b"\xff\xfe", b"{}", files[rng.choice(tables)]
            files[name] = rng.choice(contents)
            what = f"{name} is {files[name] if files[name] is None else files[name][:8]!r}"
        else:
            name = rng.choice((HEADER, *tables) if kind == "bytes" else tables)
            change = changed_bytes if kind == "bytes" else changed_parquet
            how, files[name] = change(files[name], rng)
            what = f"{name}: {how}"
        yield _written(f"{kind}: {what}", files)


def read(path: Path) -> None:
    """Read the profile and price iterations of decodes, prompts and checks, whose times must be finite."""
    import numpy as np

    from helios_sim.errors import UserError
    from helios_sim.profile.composition import Composition, PrefillChunk
    from helios_sim.profile.store import read_profile

    profile = read_profile(path)
    whole = np.array([[3], [70]])
    layers = profile.model.n_layers
    decodes = Composition((layers,), whole, whole * 90, whole[:, 0], check_tokens=whole)
    mixed = Composition(
        (layers,), whole[:1], whole[:1] * 90, whole[0], prefill=(PrefillChunk(40, 8, layers),),
        decode_kv_least=np.array([20]), decode_kv_most=np.array([200]),
    )  # fmt: skip
    for c in (decodes, mixed):
        for values in (profile.iteration_time_s(c), profile.iteration_floor_s(c)):
            assert bool(np.isfinite(values).all()), f"a price of {values}"
            assert bool((values >= 0).all()), f"a price of {values}"
    try:
        profile.iteration_time_s(Composition((layers,), whole, whole * 90, whole[:, 0], classifier_tokens=whole))
    except UserError:
        assert profile.check_classifier is None
    assert profile.weight_bytes(layers) > 0
    assert profile.load_time_s(1 << 30) > 0
    json.dumps(profile.provenance.to_json())


def changed_parquet(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """One change of a table: a cell, a column, its name or type, rows, or the whole."""
    with pq.ParquetFile(pa.BufferReader(content)) as file:
        table = file.read()
    name = rng.choice(table.column_names)
    at, column = table.column_names.index(name), table[name]
    kind = rng.choice(("cell", "cell", "cell", "constant", "type", "drop", "double", "rename", "rows", "order", "nest"))
    row, value = rng.randrange(table.num_rows), rng.choice(_CELLS)
    what = f"{kind} {name}"
    if kind in ("cell", "constant"):
        cells = column.to_pylist()
        cells = [value] * len(cells) if kind == "constant" else [*cells[:row], value, *cells[row + 1 :]]
        table = table.set_column(at, name, _array(cells, column.type))
        what += f" = {str(value)[:30]!r}"
    elif kind == "type":
        to = rng.choice((pa.string(), pa.float32(), pa.float64(), pa.int8(), pa.uint64(), pa.bool_(), pa.date32()))
        table = table.set_column(at, name, _array([str(x) for x in column.to_pylist()], to))
        what += f" to {to}"
    elif kind == "nest":
        table = table.set_column(at, name, pa.array([[x] for x in column.to_pylist()]))
    elif kind == "drop":
        table = table.drop_columns([name])
    elif kind == "double":
        table = table.append_column(rng.choice((name, "extra", f"{name}_2")), column)
    elif kind == "rename":
        new = rng.choice(("", "x", "../x", "ü"))
        table = table.rename_columns([new if n == name else n for n in table.column_names])
    elif kind == "rows":
        first, count = rng.randrange(table.num_rows), rng.choice((0, 1, 2, table.num_rows // 2))
        table = rng.choice((table.slice(first, count), pa.concat_tables([table] * rng.choice((2, 50)))))
    else:
        order = list(range(table.num_rows))
        rng.shuffle(order)
        table = table.take(pa.array(order))
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return what, out.getvalue()


def _array(cells: list[Any], kind: pa.DataType) -> pa.Array:
    """Of that type if the cells can be, else of the type that they have, else of texts."""
    for wanted in (kind, None, pa.string()):
        try:
            return pa.array(cells if wanted != pa.string() else [str(c) for c in cells], wanted)
        except (pa.ArrowException, OverflowError, TypeError, ValueError):
            continue
    raise AssertionError(kind)


@cache
def _files(name: str) -> tuple[tuple[str, Any], ...]:
    return tuple((path.name, path.read_bytes()) for path in sorted((SHIPPED / name).iterdir()))


def _written(what: str, files: dict[str, Any]) -> Mutant:
    def write(folder: Path) -> Path:
        path = folder / "profile"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, content in files.items():
            if content is not None:
                (path / name).write_bytes(content)
        return path

    return Mutant(what, write)


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
