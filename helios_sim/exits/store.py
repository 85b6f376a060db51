"""Reads and writes exit traces, and finds one by its name.

A trace is a folder, shipped ones at data/exits/<model>@<source>/:

- trace.json, the header: {"format": "exit-trace", "schema_version": 1, "model": name, "exits": depths ascending, the
  last being the whole model, "tasks": names, "n_tokens": rows of the table, "columns": which per-exit columns are
  there, "published_threshold" and "published_confidence": null unless the trace has no confidences, "human_text":
  whether people wrote the text, "sha256": of the table's file, "provenance": class, source, command, ...}
- tokens.parquet, one row a token in reading order, sorted by task: task (index into tasks), prompt (an id that is
  unique in the file), chars (characters covered, at least 0), and for each exit depth D a column <column>_D:
  agree_D (bool, always there), and as listed in "columns": one for each confidence that was recorded
  (`confidence.MEASURES` names them), bits_D (-log2 of the probability of the text's own token), or confident_D (bool,
  published traces).

The texts of a task, one after the other, have the same total of characters in every model's trace: that is what
lines models up.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import MEASURES, Confidence
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import Provenance

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parents[1] / "data" / "exits"
HEADER, TABLE = "trace.json", "tokens.parquet"
_PER_TOKEN = ("task", "prompt", "chars")
_MEASURED = {measure.column: confidence for confidence, measure in MEASURES.items()}
_PER_EXIT = ("agree", *_MEASURED, "confident", "bits")
_FIX = "write the trace anew, or fetch the file again"


def load_trace(model: str, source: str, **parameters: Any) -> ExitTrace:
    """The trace of a model from `source`: "published", a shipped source's name, or the path of a trace's folder.

    `parameters` are those of `published.PublishedParameters`; a measured trace has none. UserError where there is no
    such trace, the folder holds another model, or it is damaged.
    """
    if source == "published":
        from helios_sim.exits.published import published_trace

        return published_trace(model, **parameters)
    if parameters:
        name = next(iter(parameters))
        key = f"exits.parameters.{name}"
        raise UserError(key, parameters[name], "a recorded trace has no parameters", "leave it out")
    shipped = SHIPPED / f"{model}@{source}"
    folder = shipped if (shipped / HEADER).is_file() else Path(source)
    if not (folder / HEADER).is_file():
        names = sorted(p.parent.name for p in SHIPPED.glob(f"*/{HEADER}"))
        raise UserError(
            "exits.source",
            source,
            f"no exit trace of {model} there; 'published' has the OPT pair, shipped: {', '.join(names) or 'none'}",
            f"name one of these, or a folder with {HEADER} and {TABLE}",
        )
    trace = read_trace(folder)
    if trace.model != model:
        raise UserError(
            "exits.source", source, f"the trace there is of {trace.model}, not {model}", "name another folder"
        )
    return trace


def write_trace(trace: ExitTrace, folder: Path) -> None:
    """Writes the trace's folder, the header last. Each file appears complete or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {name: getattr(trace, name) for name in _PER_TOKEN}
    recorded: dict[str, Any] = {MEASURES[c].column: values for c, values in trace.confidences.items()}
    recorded |= {"agree": trace.agree, "confident": trace.confident, "bits": trace.bits}
    per_exit = [name for name in _PER_EXIT if recorded.get(name) is not None]
    for name in per_exit:
        for e, depth in enumerate(trace.exits):
            columns[f"{name}_{depth}"] = recorded[name][:, e]
    folder.mkdir(parents=True, exist_ok=True)
    draft = folder / f"{TABLE}.part"
    pq.write_table(pa.table(columns), draft, compression="zstd")
    header = {
        "format": "exit-trace",
        "schema_version": SCHEMA_VERSION,
        "model": trace.model,
        "exits": trace.exits,
        "tasks": trace.tasks,
        "n_tokens": trace.n_tokens,
        "columns": per_exit,
        "published_threshold": trace.published_threshold,
        "published_confidence": trace.published_confidence,
        "human_text": trace.human_text,
        "sha256": hashlib.sha256(draft.read_bytes()).hexdigest(),
        "provenance": trace.provenance.to_json(),
    }
    os.replace(draft, folder / TABLE)
    draft = folder / f"{HEADER}.part"
    draft.write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    os.replace(draft, folder / HEADER)


def read_trace(folder: Path) -> ExitTrace:
    """The trace in a folder; UserError when a file is missing, damaged, or of another schema version."""
    header = _header(folder / HEADER)
    try:
        exits = tuple(int(depth) for depth in header["exits"])
        per_exit = [str(name) for name in header["columns"]]
        table = _table(folder / TABLE, header["sha256"])
        columns: dict[str, Any] = {name: _values(table[name]) for name in _PER_TOKEN}
        for name in per_exit:
            if name not in _PER_EXIT:
                raise UserError("columns", name, f"{folder / HEADER}: {', '.join(_PER_EXIT)}", _FIX)
            columns[name] = np.column_stack([_values(table[f"{name}_{depth}"]) for depth in exits])
        if table.num_rows != header["n_tokens"]:
            raise UserError("n_tokens", header["n_tokens"], f"{folder / TABLE} has {table.num_rows} rows", _FIX)
        confidences = {confidence: columns.pop(name) for name, confidence in _MEASURED.items() if name in columns}
        measure = header["published_confidence"]
        return ExitTrace(
            model=str(header["model"]),
            exits=exits,
            tasks=tuple(str(name) for name in header["tasks"]),
            provenance=Provenance.from_json(header["provenance"]),
            published_threshold=header["published_threshold"],
            published_confidence=None if measure is None else Confidence(measure),
            human_text=bool(header["human_text"]),
            confidences=confidences,
            **columns,
        )
    except UserError:
        raise
    except KeyError as error:
        raise UserError("exit trace", str(folder), f"{error.args[0]} is missing", _FIX) from error
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError("exit trace", str(folder), f"a value has the wrong form ({error})", _FIX) from error


def _values(column: Any) -> NDArray[Any]:
    """The column's values. pyarrow's own `to_numpy` would import pandas where it is installed, which is slow."""
    import pyarrow as pa

    if pa.types.is_boolean(column.type):
        return np.from_dlpack(column.cast(pa.uint8()).combine_chunks()).view(np.bool_)
    return np.from_dlpack(column.combine_chunks())


def _header(path: Path) -> Mapping[str, Any]:
    try:
        header = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError("exit trace", str(path), "no such file", "name a folder that holds an exit trace") from error
    except (OSError, ValueError) as error:
        raise UserError("exit trace", str(path), f"unreadable ({error})", _FIX) from error
    if not isinstance(header, dict) or header.get("format") != "exit-trace":
        raise UserError("exit trace", str(path), "not the header of an exit trace", _FIX)
    if header.get("schema_version") != SCHEMA_VERSION:
        raise UserError(
            "schema_version",
            header.get("schema_version"),
            f"{path}: this version reads {SCHEMA_VERSION}",
            "measure the trace again, or use the version of this program that wrote it",
        )
    return header


def _table(path: Path, sha256: str) -> Any:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise UserError("exit trace", str(path), "its sha256 is not the one in its header", _FIX)
        return pq.ParquetFile(pa.BufferReader(content)).read()  # read_table would import pandas
    except (OSError, pa.ArrowException) as error:
        raise UserError("exit trace", str(path), f"unreadable ({error})", _FIX) from error
