"""A trace read back equals what was written; a damaged one is refused with the reason."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from helios_sim.errors import UserError
from helios_sim.exits.artificial import synthetic_trace
from helios_sim.exits.published import published_trace
from helios_sim.exits.rule import Confidence
from helios_sim.exits.store import load_trace, read_trace, write_trace
from helios_sim.exits.trace import ExitTrace


@pytest.mark.parametrize(
    "trace",
    [
        synthetic_trace(tasks=("prose", "code"), tokens=300, uneven=True),
        synthetic_trace(exits=(12,), tokens=7, human_text=False),
        published_trace("opt-1.3b", prompts_per_task=2, task_spread=0.3),
    ],
    ids=["recorded", "one exit", "published"],
)
def test_round_trip(trace: ExitTrace, tmp_path: Path) -> None:
    write_trace(trace, tmp_path / "a")
    again = read_trace(tmp_path / "a")
    for name in ("model", "exits", "tasks", "published_threshold", "published_confidence", "human_text", "provenance"):
        assert getattr(again, name) == getattr(trace, name), name
    for name in ("task", "prompt", "chars", "agree", "confident", "bits", *Confidence):
        ours, theirs = (t.confidences.get(name, getattr(t, name, None)) for t in (trace, again))
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert ours.dtype == theirs.dtype
            assert np.array_equal(ours, theirs), name
    write_trace(again, tmp_path / "b")
    for file in ("trace.json", "tokens.parquet"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["tokens.parquet", "trace.json"]


def edit(key: str, value: Any) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        header = json.loads((folder / "trace.json").read_text())
        if value is None:
            del header[key]
        else:
            header[key] = value
        (folder / "trace.json").write_text(json.dumps(header))

    return apply


def flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "tokens.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "tokens.parquet").write_bytes(content)


def no_parquet(folder: Path) -> None:
    (folder / "tokens.parquet").write_bytes(b"text")
    edit("sha256", hashlib.sha256(b"text").hexdigest())(folder)


def without_a_column(folder: Path) -> None:
    table = pq.read_table(folder / "tokens.parquet").drop_columns(["agree_8"])
    pq.write_table(table, folder / "tokens.parquet")
    edit("sha256", hashlib.sha256((folder / "tokens.parquet").read_bytes()).hexdigest())(folder)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "trace.json").unlink(), "a file: there is none"),
        (lambda f: (f / "trace.json").write_text("{"), "there is none|JSON object|Parquet file"),
        (lambda f: (f / "trace.json").write_text("[1]"), "not the header|JSON object"),
        (lambda f: (f / "tokens.parquet").unlink(), "there is none|JSON object|Parquet file"),
        (flip_a_byte, "sha256"),
        (no_parquet, "there is none|JSON object|Parquet file"),
        (without_a_column, "agree_8"),
        (edit("schema_version", 99), "schema_version=99"),
        (edit("n_tokens", 5), "has 40 rows"),
        (edit("exits", [4, 8]), "agree"),
        (edit("exits", 4), "whole numbers|each once|wrong form"),
        (edit("exits", None), "exits of .*key is missing"),
        (edit("columns", ["agree", "guess"]), "guess"),
        (edit("columns", ["confidence"]), "whole numbers|each once|wrong form"),
        (edit("provenance", {"provenance_class": "rumour"}), "wrong form|missing"),
        (edit("tasks", ["only", "more"]), "tasks|task"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], says: str, tmp_path: Path) -> None:
    write_trace(synthetic_trace(tokens=40, exits=(4, 8, 12), seed=8), tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=says):
        read_trace(tmp_path)


def test_a_trace_is_found_by_its_folder(tmp_path: Path) -> None:
    write_trace(synthetic_trace("tiny", tokens=40), tmp_path)
    assert load_trace("tiny", str(tmp_path)).n_tokens == 40
    with pytest.raises(UserError, match="is of tiny, not large"):
        load_trace("large", str(tmp_path))
    with pytest.raises(UserError, match="no parameters"):
        load_trace("tiny", str(tmp_path), unchanged=0.8)
    with pytest.raises(UserError, match="no exit trace of tiny"):
        load_trace("tiny", "nowhere")
