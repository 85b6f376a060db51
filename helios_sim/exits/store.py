"""Files of exit traces: reading and writing them, and finding one by its name.

A trace is a folder, shipped ones at data/exits/<model>@<source>/:

- trace.json, the header: {"format": "exit-trace", "schema_version": 1, "model": name, "exits": depths ascending, the
  last being the whole model, "tasks": names, "n_tokens": rows of the table, "columns": which per-exit columns are
  there, "published_threshold" and "published_confidence": null unless the trace has no confidences, "human_text":
  whether people wrote the text, "sha256": of the table's file, "provenance": class, source, command, ...}
- tokens.parquet, one row a token in reading order, sorted by task: task (index into tasks), prompt (an id that is
  unique in the file), chars (characters covered, at least 0), and for each exit depth D a column <column>_D:
  agree_D (bool, always there), and as listed in "columns": one for each recorded confidence (`rule.MEASURES` names
  them), bits_D (-log2 of the probability of the text's own token), or confident_D (bool, published traces). Each model
  among the header's "drafters", if it has any, has a column drafted_by_<model>: whether that model predicts the whole
  model's token (bool). Each model among "drafters_sure" has a column sure_of_draft_<model>: how sure that model was of
  its draft (float, 0 to 1).

The texts of a task, one after the other, have the same total of characters in every model's trace, so that traces of
different models line up.
"""

from __future__ import annotations

import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim import files
from helios_sim.contents import Stamp, stamp
from helios_sim.errors import UserError
from helios_sim.exits.rule import BY_COLUMN, MEASURES, Confidence
from helios_sim.exits.table import MOST_EXITS, MOST_TOKENS, is_table, read_table
from helios_sim.exits.trace import ExitTrace
from helios_sim.provenance import Provenance
from helios_sim.untrusted import MIB, Fields, is_there, read_bytes, read_json, read_parquet, reading, shortened

SCHEMA_VERSION = 1
SHIPPED = Path(__file__).parents[1] / "data" / "exits"
HEADER, TABLE = "trace.json", "tokens.parquet"
_PER_TOKEN = {"task": "whole", "prompt": "whole", "chars": "whole"}
_KINDS = {"agree": "flag", "confident": "flag"}  # all other columns are numbers
_DRAFTER, _SURE = "drafted_by_", "sure_of_draft_"
_MOST_BYTES = 256 * MIB
_PER_EXIT = ("agree", *BY_COLUMN, "confident", "bits")
_FIX = "write the trace anew, or fetch the file again"


def load_trace(model: str, source: str, **parameters: Any) -> ExitTrace:
    """Loads the trace of a model from `source`: "published", the name of a shipped source, or the path of a trace's
    folder or of the user's own table (`table`).

    `parameters` are the fields of `published.PublishedParameters`; a measured trace has none. UserError if there is no
    such trace, the folder holds another model, or it is damaged.
    """
    if source == "published":
        from helios_sim.exits.published import EXIT_SHARES, published_trace

        if model not in EXIT_SHARES:
            allowed = f"published exits exist for {', '.join(EXIT_SHARES)}; for {model} there are: {_sources_of(model)}"
            raise UserError("exits.source", source, allowed, "set one of these, or exits.source=none")
        return published_trace(model, **parameters)
    if parameters:
        name = next(iter(parameters))
        key = f"exits.parameters.{name}"
        raise UserError(key, parameters[name], "a recorded trace has no parameters", "leave it out")
    if is_table(source):
        if not is_there(Path(source).expanduser()):
            shown = Path(source).expanduser().absolute().parent
            raise UserError("exits.source", source, f"a table that is there: {shown} has none of this name",
                            "correct the path")  # fmt: skip
        return read_table(Path(source).expanduser(), model)[0]
    with reading("exits.source", shortened(source), "is no path", "name a folder, or a shipped source"):
        folder = folder_of(model, source)
    if not is_there(folder / HEADER):
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


def folder_of(model: str, source: str) -> Path:
    """The folder of a recorded trace, which may not exist: the shipped one of that name, or the path itself."""
    shipped = SHIPPED / f"{model}@{source}"
    return shipped if (shipped / HEADER).is_file() else Path(source).expanduser()


def _sources_of(model: str) -> str:
    """The possible sources of a model's exits, in words, for a model without published ones."""
    shipped = sorted(folder.name.partition("@")[2] for folder in SHIPPED.glob(f"{model}@*"))
    own = "a table or a trace of your own (python -m calibrate model=... measures one)"
    return ", ".join((*shipped, own))


def write_trace(trace: ExitTrace, folder: Path) -> None:
    """Writes the trace's folder, all of its files or none. UserError if it cannot be written."""
    import pyarrow as pa

    columns: dict[str, Any] = {name: getattr(trace, name) for name in _PER_TOKEN}
    recorded: dict[str, Any] = {MEASURES[c].column: values for c, values in trace.confidences.items()}
    recorded |= {"agree": trace.agree, "confident": trace.confident, "bits": trace.bits}
    per_exit = [name for name in _PER_EXIT if recorded.get(name) is not None]
    for name in per_exit:
        for e, depth in enumerate(trace.exits):
            columns[f"{name}_{depth}"] = recorded[name][:, e]
    columns |= {f"{_DRAFTER}{name}": drafted for name, drafted in trace.drafters.items()}
    columns |= {f"{_SURE}{name}": sure for name, sure in trace.drafters_sure.items()}
    table = files.parquet(pa.table(columns))
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
        **({"drafters": list(trace.drafters)} if trace.drafters else {}),  # this key and the next came later
        **({"drafters_sure": list(trace.drafters_sure)} if trace.drafters_sure else {}),
        "sha256": hashlib.sha256(table).hexdigest(),
        "provenance": trace.provenance.to_json(),
    }
    files.write_together(folder, {TABLE: table}, HEADER, f"{json.dumps(header, indent=2)}\n".encode())


def read_trace(folder: Path) -> ExitTrace:
    """Reads the trace in a folder; UserError if a file is missing, damaged, or of another schema version.

    It is read once for all arms, seeds and designs of a process, and again only if it was written since.
    """
    return _read_trace(folder, tuple(stamp(path) for path in (folder / HEADER, folder / TABLE) if path.is_file()))


@lru_cache(maxsize=8)
def _read_trace(folder: Path, written: tuple[Stamp, ...]) -> ExitTrace:
    values = read_json(folder / HEADER, _FIX)
    if values.get("format") != "exit-trace":
        raise UserError("exit trace", str(folder / HEADER), "not the header of an exit trace", _FIX)
    if values.get("schema_version") != SCHEMA_VERSION:
        allowed = f"{folder / HEADER}: this version reads {SCHEMA_VERSION}"
        fix = "measure the trace again, or use the version of this program that wrote it"
        raise UserError("schema_version", shortened(values.get("schema_version")), allowed, fix)
    with reading("exit trace", str(folder), "a value has the wrong form", _FIX):
        header = Fields(values, str(folder / HEADER), _FIX)
        header.ignore(["format", "schema_version"])
        exits = header.integers("exits", 1, 10_000, MOST_EXITS)
        recorded = header.texts("columns", len(_PER_EXIT))
        unknown = [name for name in recorded if name not in _PER_EXIT]
        if unknown or len(set(recorded)) < len(recorded) or "agree" not in recorded:
            raise header.wrong("columns", list(recorded), f"agree and others of {', '.join(_PER_EXIT)}, each once")
        content = read_bytes(folder / TABLE, _MOST_BYTES, _FIX)
        if hashlib.sha256(content).hexdigest() != header.text("sha256"):
            raise UserError("exit trace", str(folder / TABLE), "its sha256 is not the one in its header", _FIX)
        kinds = {f"{name}_{depth}": _KINDS.get(name, "number") for name in recorded for depth in exits}
        drafters = header.texts("drafters", 100) if header.has("drafters") else ()
        sure = header.texts("drafters_sure", 100) if header.has("drafters_sure") else ()
        kinds |= {f"{_DRAFTER}{name}": "flag" for name in drafters} | {f"{_SURE}{name}": "number" for name in sure}
        columns = read_parquet(folder / TABLE, {**_PER_TOKEN, **kinds}, _FIX, MOST_TOKENS, content, exact=True)
        if len(columns["task"]) != header.integer("n_tokens", 1, MOST_TOKENS):
            found = f"{folder / TABLE} has {len(columns['task'])} rows"
            raise UserError("n_tokens", header.value("n_tokens"), found, _FIX)
        wide = {name: np.column_stack([columns[f"{name}_{depth}"] for depth in exits]) for name in recorded}
        measured = {BY_COLUMN[name]: wide.pop(name).astype(np.float32) for name in recorded if name in BY_COLUMN}
        published, names = header.has("published_confidence"), [c.value for c in Confidence]
        trace = ExitTrace(
            model=header.text("model"),
            exits=exits,
            tasks=header.texts("tasks", 10_000),
            provenance=Provenance.from_json(header.inner("provenance").values),
            drafters={name: columns[f"{_DRAFTER}{name}"] for name in drafters},
            drafters_sure={name: columns[f"{_SURE}{name}"].astype(np.float32) for name in sure},
            published_threshold=header.maybe("published_threshold", 0, 1),
            published_confidence=Confidence(header.text("published_confidence", names)) if published else None,
            human_text=header.flag("human_text"),
            confidences=measured,
            agree=wide["agree"],
            confident=wide.get("confident"),
            bits=wide["bits"].astype(np.float32) if "bits" in wide else None,
            **{name: columns[name].astype(np.int32) for name in _PER_TOKEN},
        )
        header.ignore(["published_confidence"])
        header.refuse_rest("no such key is known")
        return trace
