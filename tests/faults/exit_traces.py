"""Mutants of an exit trace's folder. Where its table changes, the sha256 in its header mostly follows."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import Mutant, changed_bytes, changed_json, main
from faults.profiles import changed_parquet

HEADER, TABLE = "trace.json", "tokens.parquet"


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield _written("unchanged", *_files(0))
    while True:
        header, table = _files(rng.randrange(2))
        kind = rng.choice(("header", "header", "header", "table", "table", "table", "bytes", "sum", "file"))
        new: tuple[bytes | None, bytes | None]
        if kind == "header":
            what, changed = changed_json(json.loads(header), rng)
            new = json.dumps(changed).encode(errors="surrogatepass"), table
        elif kind == "file":
            at, content = rng.randrange(2), rng.choice((None, b"", b"[" * 100_000, b"PAR1", b"\xff\xfe", b"{}"))
            what = f"{(HEADER, TABLE)[at]} is {content if content is None else content[:8]!r}"
            new = (content, table) if at == 0 else (header, content)
        else:
            what, content = changed_parquet(table, rng) if kind == "table" else changed_bytes(table, rng)
            summed = json.loads(header) | {"sha256": hashlib.sha256(content).hexdigest()}
            new = header if kind == "sum" else json.dumps(summed).encode(), content
        yield _written(f"exit trace {kind}: {what}", *new)


def read(path: Path) -> None:
    """Read the trace and replay every measure that it holds under a threshold."""
    from helios_sim.exits.replay import offline_exits, replay
    from helios_sim.exits.rule import PerToken
    from helios_sim.exits.store import read_trace

    trace = read_trace(path)
    asked = [(trace.published_threshold or 0.7, c) for c in trace.confidences or [trace.published_confidence]]
    for threshold, confidence in asked:
        assert confidence is not None
        found = replay(trace, PerToken(threshold, confidence), trace.n_layers)
        assert found.exit_index.min() >= 0
        assert found.exit_index.max() < len(trace.exits)
        assert abs(offline_exits(trace, threshold, confidence).exit_share.sum() - 1) < 1e-9
    bound = trace.bind(trace.tasks)
    assert all(bound.locate(k, 17, 40).n_tokens >= 1 for k in range(len(trace.tasks)))
    json.dumps(trace.provenance.to_json())


@cache
def _files(which: int) -> tuple[bytes, bytes]:
    """Header and table of a measured trace, and of a published one."""
    from helios_sim.exits.artificial import synthetic_trace
    from helios_sim.exits.published import published_trace
    from helios_sim.exits.store import write_trace

    with TemporaryDirectory() as folder:
        measured = synthetic_trace(tasks=("prose", "code"), tokens=300, uneven=True)
        write_trace(measured if which == 0 else published_trace("opt-1.3b", prompts_per_task=2), Path(folder))
        return (Path(folder) / HEADER).read_bytes(), (Path(folder) / TABLE).read_bytes()


def _written(what: str, header: bytes | None, table: bytes | None) -> Mutant:
    def write(folder: Path) -> Path:
        path = folder / "trace"
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name, content in ((HEADER, header), (TABLE, table)):
            if content is not None:
                (path / name).write_bytes(content)
        return path

    return Mutant(what, write)


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
