"""Mutants of request traces: tables, JSON lines and JSON arrays of the formats that are known, plain and packed."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import re
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from fractions import Fraction
from pathlib import Path

from faults import Mutant, changed_bytes, changed_json, main, one_file
from faults.text_tables import changed_table, packed

ROWS = 60
# Names of arrival, prompt and output in the tables below.
NAMES = (
    ("arrival_s", "prompt_tokens", "output_tokens"), ("TIMESTAMP", "ContextTokens", "GeneratedTokens"),
    ("arrived_at", "num_prefill_tokens", "num_decode_tokens"), ("arrival_ns", "input_toks", "output_toks"),
    ("timestamp", "input_length", "output_length"),
)  # fmt: skip
TABLES = {
    "own.csv": ("arrival_s,prompt_tokens,output_tokens,priority",
                lambda i: f"{i / 7:.3f},{100 + i},{5 + i % 9},{i % 3}"),
    "azure.csv": (
        "TIMESTAMP,ContextTokens,GeneratedTokens",
        lambda i: f"2024-05-10 00:00:{i % 60:02d}.0099300+00:00,{374 + i},{44 + i % 5}",
    ),
    "vidur.tsv": ("arrived_at\tnum_prefill_tokens\tnum_decode_tokens\tnum_total_tokens",
                  lambda i: f"{i / 3}\t{20 + i}\t{3 + i}\t{23 + 2 * i}"),
    "log.csv": ("arrival_ns,input_toks,output_toks", lambda i: f"{i * 300_000_000},{50 + i},{9 + i}"),
}  # fmt: skip


def mutants(seed: int) -> Iterator[Mutant]:
    rng = random.Random(seed)
    yield one_file("unchanged", "own.csv", _table("own.csv").encode())
    while True:
        name = rng.choice((*TABLES, "mooncake.jsonl", "array.json"))
        if name in TABLES:
            what, content = changed_table(_table(name), rng, "\t" if name.endswith(".tsv") else ",")
        else:
            what, content = _changed_rows(name, rng)
        if rng.random() < 0.15:
            how, content = packed(content, rng)
            name, what = f"{name}.gz", f"{what}; {how}"
        yield one_file(f"{name}: {what}", name, content)


def read(path: Path) -> None:
    """Read the trace, compare it with a plain reader's rows, and draw the requests of a workload that uses it."""
    import numpy as np

    from helios_sim.workload import AllAtOnce, TaskMix, TraceArrivals, TraceLengths, Workload, generate, read_trace

    trace = read_trace(path)
    expected = plainly_read(path)
    got = [*zip(trace.prompt_tokens.tolist(), trace.output_tokens.tolist(), strict=True)]
    assert expected is None or got == [row[1:] for row in expected], "other lengths than a plain reader finds"
    if expected is not None and trace.arrival_ns is not None:
        arrivals_ns = [round((row[0] - expected[0][0]) * 10**9) for row in expected]
        assert np.abs(trace.arrival_ns - np.array(arrivals_ns)).max() <= 1_000, "other arrivals than a plain reader's"
    arrivals = AllAtOnce() if trace.arrival_ns is None else TraceArrivals(trace)
    for block in generate(Workload(arrivals, TraceLengths(trace), TaskMix.single("text")), 0):
        assert (block.prompt_chars >= 1).all()
        assert (block.output_chars >= 1).all()
        assert (np.diff(block.arrival_ns) >= 0).all()
        assert block.arrival_ns[0] >= 0


def plainly_read(path: Path) -> list[tuple[Fraction, int, int]] | None:
    """(arrival in s, prompt, output) of each request by arrival, read cell by cell; None where names were changed."""
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    if text.lstrip()[:1] in "[{":
        rows = json.loads(text) if text.lstrip()[0] == "[" else [json.loads(x) for x in text.splitlines() if x.strip()]
    else:
        separator = "\t" if "\t" in text.split("\n")[0] else ","
        rows = list(csv.DictReader(io.StringIO(text, newline=""), delimiter=separator))
    names = [name for name in NAMES if rows and all(n in rows[0] for n in name)]
    if len(names) != 1 or len(rows[0]) != len({*rows[0]}):
        return None
    at, prompt, output = names[0]
    unit = Fraction(1, {"timestamp": 1000, "arrival_ns": 10**9}.get(at, 1))
    found = []
    for row in rows:
        cell = row[at]
        if ":" in str(cell):
            moment = datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", cell)).replace(tzinfo=None)
            when = Fraction((moment - datetime(1970, 1, 1)) // timedelta(microseconds=1), 10**6)
        else:
            when = Fraction(str(cell).strip()) * unit
        found.append((when, int(float(row[prompt])), int(float(row[output]))))
    answered = [row for row in found if row[2]]  # requests that got nothing are left out, and counted
    return sorted(answered or found, key=lambda row: row[0])


def _table(name: str) -> str:
    header, row = TABLES[name]
    return "\n".join([header, *(row(i) for i in range(ROWS))]) + "\n"


def _changed_rows(name: str, rng: random.Random) -> tuple[str, bytes]:
    rows: list[object] = [
        {"timestamp": 500 * i, "input_length": 300 + i, "output_length": 7 + i, "hash_ids": [0, i]} for i in range(ROWS)
    ]
    kind = rng.choice(("row", "row", "row", "bytes", "raw"))
    what, at = kind, rng.randrange(ROWS)
    if kind == "row":
        what, rows[at] = changed_json(rows[at], rng)
    lines = [json.dumps(row) for row in rows]
    if kind == "raw":
        lines[at] = rng.choice(("", "[]", "1", '"x"', "{", "[" * 200_000, '{"a":' * 50_000, "null", "NaN", "{}", "\0"))
        what = f"line {at + 1} is {lines[at][:20]!r}"
    text = "[" + ",\n".join(lines) + "]" if name.endswith(".json") else "\n".join(lines) + "\n"
    content = text.encode(errors="surrogatepass")
    return changed_bytes(content, rng) if kind == "bytes" else (what, content)


if __name__ == "__main__":
    sys.exit(main(mutants, read, sys.argv[1:]))
