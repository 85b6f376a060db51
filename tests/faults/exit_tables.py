"""Mutants of tables of exits of one's own: rows, cells, columns and bytes of both layouts, in CSV and Parquet."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from faults import Mutant, changed_bytes, main, one_file
from faults.profiles import changed_parquet
from faults.text_tables import changed_table

NAMES = ("wide.csv", "long.csv", "wide.parquet", "long.parquet")


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield one_file("unchanged", NAMES[0], _tables()[NAMES[0]])
    while True:
        name = rng.choice(NAMES)
        content = _tables()[name]
        if rng.random() < 0.2:
            what, changed = changed_bytes(content, rng)
        elif name.endswith(".csv"):
            what, changed = changed_table(content.decode(), rng)
        else:
            what, changed = changed_parquet(content, rng)
        yield one_file(f"{name}: {what}", name, changed)


def read(path: Path) -> None:
    """Read the table, and replay the trace that it gives under a threshold."""
    from helios_sim.exits.replay import replay
    from helios_sim.exits.rule import PerToken
    from helios_sim.exits.table import Told, read_table

    trace, _ = read_table(path, "m", Told(human_text=True))
    for confidence, values in trace.confidences.items():
        assert values.min() >= 0
        assert values.max() <= 1
        found = replay(trace, PerToken(0.7, confidence), trace.n_layers)
        assert 0 <= found.exit_index.min() <= found.exit_index.max() < len(trace.exits)
    assert trace.agree[:, -1].all()
    assert trace.chars.min() >= 0


@cache
def _tables() -> dict[str, bytes]:
    from test_exits_table import columns, longer, written

    found = {}
    with TemporaryDirectory() as folder:
        for layout, table in (("wide", columns()), ("long", longer(columns()))):
            for ending in ("csv", "parquet"):
                name = f"{layout}.{ending}"
                found[name] = written(Path(folder), table, name).read_bytes()
    return found


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
