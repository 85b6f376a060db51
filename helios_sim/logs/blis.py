"""TraceV2 of inference-sim (BLIS), as `blis observe` writes it: a table of requests and a YAML header beside it.

The columns and the header are those of sim/workload/tracev2.go (trace versions 2 and 3). Times are in microseconds;
a table of `blis run` or `blis replay` was simulated, which the header's `mode` says.
"""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.figures import MORE_CHUNKS, Figure, Known, Look
from helios_sim.logs.record import (
    EARLIEST_S,
    FIX,
    LATEST_S,
    Begins,
    RequestLog,
    Row,
    gathered,
    not_read,
    only_once,
    other_models,
)
from helios_sim.request import LONGEST
from helios_sim.untrusted import MIB, Fields, check_name, check_quotes, parse_yaml, read_text, reading, shortened

NAME = "BLIS TraceV2"
_NEEDED = (
    "request_id", "streaming", "input_tokens", "output_tokens", "prefix_length", "server_input_tokens",
    "arrival_time_us", "send_time_us", "first_chunk_time_us", "last_chunk_time_us", "status",
)  # fmt: skip
_TEXTS = "{count} of {all} prompts have more text than tokens, such as {said} and not {ours}, which count"
_COUNTS = (  # in cells that are nothing or whole numbers of at least 0
    "round_index", "text_tokens", "image_tokens", "audio_tokens", "video_tokens", "deadline_us", "slo_target_us",
    "num_chunks", "think_time_us", "prefix_length", "input_tokens", "output_tokens", "server_input_tokens",
    "arrival_time_us", "send_time_us", "first_chunk_time_us", "last_chunk_time_us",
)  # fmt: skip
_KNOWN = Known(
    read="request_id|streaming|output_tokens|prefix_length|vllm_priority|status|error_message|model|input_tokens"
         "|(arrival|send|first_chunk|last_chunk)_time_us",
    figures=(
        Figure("num_chunks", lambda row, _: (0.0, 1.1 * row["output_tokens"] + 3), 0.0, 0.0, told=MORE_CHUNKS),
        Figure("text_tokens", lambda row, _: (0.0, row["input_tokens"] + row["prefix_length"]), 0.0, 0.5, told=_TEXTS),
        Figure("server_input_tokens", lambda row, _: row["input_tokens"] + row["prefix_length"], 1 / 3, 32,
               told="the server counted other prompt tokens than the client in {count} of {all} requests, such as "
                    "{said} in place of {ours}: the server's count"),
    ),
    effects={
        "session_id": "what the turns of a session share is computed anew for each",
        "prefix_group": "prefixes that groups share are computed anew for each request",
        "image_tokens": "prompts had images, which are counted as text",
        "audio_tokens": "prompts had audio, which is counted as text",
        "video_tokens": "prompts had video, which is counted as text",
        "adapter": "adapters of LoRA, which the simulation does not have",
    },
    harmless="client_id|tenant_id|slo_class|round_index|reason_ratio|deadline_us|slo_target_us|finish_reason"
             "|x_request_id|think_time_us",
)  # fmt: skip
DECLARED = (("*.", _KNOWN),)
_FLAGS = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}
_LINE = "correct or remove the line"
_ROUNDED = re.compile(r"\d[.,]?\d*[eE]\+?\d+")
_OF_HEADER = ("trace_version", "time_unit", "mode", "warm_up_requests", "server", "created_at", "workload_seed",
              "workload_spec", "network", "goodput_slo_targets", "session_context_growth")  # fmt: skip


def is_it(document: Document) -> bool:
    if document.path.suffix in (".yaml", ".yml") and b"trace_version:" in document.head:
        fix = "name the table beside it, such as trace.csv"
        raise UserError("log", document.path.name, f"the requests of a {NAME}, of which this is the header", fix)
    first = document.head.split(b"\n", 1)[0]
    if b"arrival_time_us\t" in first or b"arrival_time_us;" in first:
        fix = "take the table as BLIS wrote it, or write it with commas"
        raise UserError(document.name, "a table with tabs or semicolons", f"commas between the cells of a {NAME}", fix)
    return b"arrival_time_us" in first and b"first_chunk_time_us" in first and b"," in first


def read(document: Document, part: int | None = None) -> RequestLog:
    """Read a log. Raises UserError for an impossible line or header."""
    document.chosen(part or 1, ["the file"], "runs")
    header, where = _header(document.path)
    check_quotes(document.name, document.content, _LINE)
    table = csv.reader(io.StringIO(document.content.decode()))
    names = next(table)
    missing = [name for name in _NEEDED if name not in names]
    if missing:
        raise UserError(f"{document.name}, line 1", missing, "the columns of a TraceV2", FIX)
    with reading(f"{document.name}, line 1", "names", "names of columns, each once", FIX):
        for name in names:
            check_name(name)
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"{document.name}, line 1", twice[0], "each column once", FIX)
    real = header is None or header.text("mode", ("real", "generated", "replayed")) == "real"
    warm_up = 0 if header is None else header.integer("warm_up_requests", 0, LONGEST, 0)
    rows: list[Row] = []
    look = Look(document.name, _KNOWN)
    priorities = "vllm_priority" in names
    ids, row_models = dict[str, str](), dict[str, None]()
    for cells in table:
        place = f"{document.name}, line {table.line_num}"
        if len(cells) != len(names):
            raise UserError(place, f"{len(cells)} cells", f"{len(names)}, as the header has", _LINE)
        row = dict(zip(names, cells, strict=True))
        only_once(place, "request_id", row["request_id"], ids)
        row_models[row.get("model", "")] = None
        sent = row["send_time_us"]
        if header is not None and real and sent.isascii() and sent.isdecimal() and 0 < int(sent) < EARLIEST_S * 10**6:
            raise UserError(f"{place}: send_time_us", sent, "microseconds since 1970, after 2001", FIX)
        rows.append(_row(place, row, real, len(rows) < warm_up, priorities))
        plain = {name: _count(place, row, name) if name in _COUNTS else cell for name, cell in row.items()}
        look.at(place, plain, None if rows[-1].failure is not None else plain)
    ahead_s = min((row.arrival_s - row.planned_s for row in rows if row.arrival_s is not None
                   and row.planned_s is not None), default=0.0)  # fmt: skip
    for one in rows:  # planned times count from the start of the run, taken from the request with the least delay
        one.planned_s = None if one.planned_s is None else one.planned_s + ahead_s
    notices = look.notices()
    stated: dict[str, object] = {}
    models: list[object] = list(row_models)
    if header is None:
        notices.append(f"{document.name}: no header (YAML) lies beside it: whether it was measured, and which requests "
                       "are of the warm-up, is not known.")  # fmt: skip
    else:
        if not real:
            notices.append(f"{where}: mode is {header.text('mode')}: its times were simulated by BLIS, not measured.")
        server = header.inner("server", {})
        stated = {"model": server.value("model", None), "gpu_memory_utilization": server.maybe(
            "gpu_memory_utilization", 0.0, 1.0
        )}  # fmt: skip
        models.append(stated["model"])
        for name in ("tensor_parallel", "max_num_seqs", "block_size", "max_model_len"):
            stated[name] = server.integer(name, 0, LONGEST) if server.has(name) else None
        header.ignore(_OF_HEADER)
        server.ignore(("type", "url", "version"))
        left = [f"server.{name}" for name in (*server.rest, *server.off)]
        notices += not_read(where, [*header.rest, *(name for name in header.off if "." not in name), *left])
    notices += other_models(document.name, models)
    return gathered(document.source, NAME, rows, Begins.SENT, stated, notices)


def _header(table: Path) -> tuple[Fields | None, str]:
    """The header of a table: the YAML file of its name, else the only header in its folder."""
    same = [path for suffix in (".yaml", ".yml") if (path := table.with_suffix(suffix)).is_file()]
    beside = same or [path for path in sorted(table.parent.glob("*.y*ml"))[:50] if b"trace_version" in _text(path)]
    if not beside:
        return None, ""
    if len(beside) > 1:
        told = ", ".join(path.name for path in beside)
        raise UserError(f"{table.name}: header", told, "one YAML header beside it", "name it as the table")
    path = beside[0]
    with reading(path.name, "damaged", "a YAML mapping", FIX):
        found = parse_yaml(_text(path))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
    header = Fields(found, path.name, FIX)
    if (version := header.integer("trace_version", 0, 1 << 16)) not in (2, 3):
        allowed = "2 or 3: others are not read"
        raise UserError(f"{path.name}: trace_version", version, allowed, "write it with BLIS 0.7, or take another log")
    header.text("time_unit", ("us", "microseconds"))
    return header, path.name


def _text(path: Path) -> bytes:
    return read_text(path, MIB, FIX)


def _count(place: str, row: dict[str, str], name: str) -> int:
    text = row[name].strip() or ("" if name in _NEEDED else "0")
    if not text.isascii() or not text.isdecimal():
        fix = "take the table as BLIS wrote it: a spreadsheet has rounded it" if _ROUNDED.fullmatch(text) else _LINE
        raise UserError(f"{place}: {name}", shortened(row[name]), "a whole number of at least 0", fix)
    return int(text)


def _row(place: str, row: dict[str, str], real: bool, warm_up: bool, priorities: bool) -> Row:
    def count(name: str) -> int:
        return _count(place, row, name)

    sent_us, first_us, last_us = (count(f"{name}_time_us") for name in ("send", "first_chunk", "last_chunk"))
    planned_us = count("arrival_time_us")
    if sent_us > LATEST_S * 1e6:
        raise UserError(f"{place}: send_time_us", sent_us, "microseconds since 1970: it is in another unit", FIX)
    planned_s = planned_us / 1e6 if real and sent_us else None
    arrival_s = (sent_us if sent_us else planned_us) / 1e6
    # What is written is the prompt without the prefix that it shares; the server's count, where there is one, is whole.
    prompt = count("server_input_tokens") or count("input_tokens") + count("prefix_length")
    output, status = count("output_tokens"), row["status"]
    if status not in ("ok", "error", "timeout", "incomplete"):
        raise UserError(f"{place}: status", shortened(status), "ok, error, timeout or incomplete", _LINE)
    priority = count("vllm_priority") if priorities else None
    if status != "ok":
        why = row.get("error_message", "").strip().splitlines()
        known = bool(sent_us) or not real
        return Row(place, arrival_s if known else None, prompt, output, failure=why[0][:200] if why else status,
                   priority=priority, warm_up=warm_up, planned_s=planned_s)  # fmt: skip
    if not sent_us and real:
        raise UserError(f"{place}: send_time_us", 0, "a time in a request that was answered", _LINE)
    streamed = _FLAGS.get(row["streaming"].strip().lower())
    if streamed is None:
        raise UserError(f"{place}: streaming", shortened(row["streaming"]), "true or false", _LINE)
    base_us = sent_us or planned_us
    if first_us and not base_us <= first_us <= last_us:
        told = f"send {base_us}, first chunk {first_us}, last chunk {last_us}"
        raise UserError(place, told, "times in that order", _LINE)
    ttft_s = (first_us - base_us) / 1e6 if streamed and first_us else None
    e2e_s = (last_us - base_us) / 1e6 if last_us else None
    return Row(place, arrival_s, prompt, output, ttft_s, e2e_s, priority=priority, warm_up=warm_up,
               planned_s=planned_s)  # fmt: skip
