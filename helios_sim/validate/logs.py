"""Reads the log of a real vLLM run, and compares data that it has twice.

A folder holds `meta.json`: model, vllm_version, engine_kwargs and, where logged, kv_cache, hardware and
resolved_config; `requests.jsonl`: one request a line with input_toks, output_toks, queued_ts, scheduled_ts,
first_token_ts, last_token_ts (one monotonic clock, s), arrival_time (another clock, s) and, where known, priority and
num_cached_tokens. `workload.csv` (optional): idx, arrival_ns, input_toks, output_toks. `timeseries.csv` (optional): t,
running, waiting and others at 1 Hz from a start that is not logged. The tables below declare what is read of each.
Other data that could matter are named in `ServingLog.notices`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.profile.importers.reading import column_names, find_table, read_columns
from helios_sim.request import LONGEST, NS_PER_S, all_to_ns, to_ns
from helios_sim.untrusted import MIB, in_short, parse_json, read_json, read_text, shortened
from helios_sim.validate.engine import Engine

IntColumn = NDArray[np.int64]
_COUNTS = ("input_toks", "output_toks")
_TIMES = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
_CACHED = "num_cached_tokens"  # prompt tokens found in the prefix cache
_LONG_AGO_S = 4e9  # no clock of seconds shows more, until 2096
_NUMBERS = {  # for each key of a line whether it is required, and its range
    **dict.fromkeys(_COUNTS, (True, 1, LONGEST)), **dict.fromkeys(_TIMES, (True, -_LONG_AGO_S, _LONG_AGO_S)),
    "scheduled_ts": (False, -_LONG_AGO_S, _LONG_AGO_S), "arrival_time": (False, -_LONG_AGO_S, _LONG_AGO_S),
    "priority": (False, -LONGEST, LONGEST), _CACHED: (False, 0, LONGEST),
}  # fmt: skip
_OF_NO_MATTER = {  # observations and labels that are not used
    "requests.jsonl": {"request_id", "finish_reason", "idx", "prompt", "text", "model", "task"},
    "timeseries.csv": {"gen_throughput", "prompt_compute_throughput", "kv_cache_pct"},
    "workload.csv": {"idx", "request_id"},
    "meta.json": {
        "schema_version", "dataset_path", "dataset_hash", "started_at", "finished_at", "tick_seconds", "num_requests",
        "resolve_only", "status",
    },
}  # fmt: skip
_ENDED = ("stop", "length", "eos", "stop_sequence")  # reasons of answered requests
_OF_HARDWARE = {  # read, or harmless
    "device_name", "device_count", "device_total_memory_bytes", "driver_version", "cuda_version", "compute_capability",
    "cpu", "cpu_model", "cpu_count", "host_memory_bytes", "hostname", "os", "kernel", "python", "torch_version",
    "device_uuid", "pci_bus_id", "multi_processor_count",
}  # fmt: skip
_SLOWEST_S = 5.0  # mean time of a token, above which times are in another unit
_READ_OF_META = {"model", "vllm_version", "engine_kwargs", "kv_cache", "hardware", "resolved_config"}
_SERIES = ("t", "prompt_throughput", "running", "waiting")
_AT_ONCE_S = 1e-3  # allowed difference of two stamps of one token
_APART_S = 10.0  # or half of the run: allowed difference of the clocks' offset between requests
_LATE_S = 1.0  # delay of sending from which it is reported
_FIX, _MOST_BYTES = "correct the log", 256 * MIB


@dataclass(frozen=True, slots=True)
class Times:
    """Times of n requests in ns since the first was queued, each (n,), in the order of the log's requests."""

    queued_ns: IntColumn  # the engine received it
    scheduled_ns: IntColumn  # it was first scheduled
    first_ns: IntColumn
    last_ns: IntColumn


@dataclass(frozen=True, slots=True)
class Series:
    """Running and waiting requests over time, each (k,)."""

    time_s: NDArray[np.float64]  # since the first request was queued
    running: NDArray[np.float64]
    waiting: NDArray[np.float64]
    cached_share: float | None  # share of prompt tokens from the prefix cache; None if not logged
    preemptions: int | None  # None if not logged


@dataclass(frozen=True, slots=True)
class ServingLog:
    """The log of a vLLM run. Requests are in order of arrival; those at one time in the order of the file."""

    folder: Path
    meta: Mapping[str, Any]
    engine: Engine
    arrival_ns: IntColumn  # (n,) since the first arrival
    prompt_tokens: IntColumn
    output_tokens: IntColumn
    priority: IntColumn | None  # None if not logged
    cached_tokens: int | None  # of all prompts, by requests.jsonl; None if not logged
    measured: Times
    series: Series | None
    arrivals_from: str  # file and column of the arrivals
    notices: tuple[str, ...]  # sentences on data that are not used

    def __len__(self) -> int:
        return len(self.arrival_ns)

    @property
    def cached_share(self) -> float | None:
        """The share of prompt tokens from the prefix cache; None if not logged."""
        if self.cached_tokens is not None:
            return self.cached_tokens / int(self.prompt_tokens.sum())
        return None if self.series is None else self.series.cached_share

    @property
    def version(self) -> tuple[int, ...] | None:
        """The first two numbers of vLLM's version; None if not logged."""
        parts = str(self.meta.get("vllm_version") or "").lstrip("v").split(".")[:2]
        return tuple(int(part) for part in parts) if len(parts) == 2 and all(p.isdigit() for p in parts) else None


def read_log(folder: Path) -> ServingLog:
    """Read a log. Raises UserError for missing or impossible data, and for contradictions."""
    if not folder.is_dir():
        raise UserError(
            "fidelity.folder", str(folder), "a folder with meta.json, requests.jsonl, profile/", "correct it"
        )
    meta = _meta(folder / "meta.json")
    engine = Engine.of(meta)
    rows = _requests(folder / "requests.jsonl")
    counts = {key: np.array([row[key] for row in rows], np.int64) for key in _COUNTS}
    seconds = {key: np.array([row.get(key, row["queued_ts"]) for row in rows], np.float64) for key in _TIMES}
    times = {key: all_to_ns(values - seconds["queued_ts"].min(), key) for key, values in seconds.items()}
    _check_meta(meta, rows, float(max(values.max() for values in seconds.values()) - seconds["queued_ts"].min()))
    arrival_ns, arrivals_from, late = _arrivals(folder, rows, counts, times["queued_ts"])
    order = np.argsort(arrival_ns, kind="stable")
    measured = Times(*(times[key][order] for key in _TIMES))
    prompt_tokens = counts["input_toks"][order]
    series, unread = _series(folder, meta, engine, measured, prompt_tokens)
    priorities = [row["priority"] for row in rows if "priority" in row]
    cached_tokens = sum(row[_CACHED] for row in rows) if _CACHED in rows[0] else None
    if cached_tokens and engine.value("enable_prefix_caching") is False:
        told = f"{cached_tokens} in all lines"
        raise UserError(f"requests.jsonl: {_CACHED}", told, "0: meta.json says that prefix caching is off", _FIX)
    return ServingLog(
        folder=folder,
        meta=meta,
        engine=engine,
        arrival_ns=arrival_ns[order],
        prompt_tokens=prompt_tokens,
        output_tokens=counts["output_toks"][order],
        priority=np.array(priorities, np.int64)[order] if priorities else None,
        cached_tokens=cached_tokens,
        measured=measured,
        series=series,
        arrivals_from=arrivals_from,
        notices=(
            *engine.notices, *late, *_not_read("requests.jsonl", {key for row in rows for key in row}, _NUMBERS),
            *_not_read("meta.json", meta, _READ_OF_META), *_of_hardware(meta), *_of_ends(rows), *unread,
        ),
    )  # fmt: skip


def _not_read(file: str, names: Iterable[str], read: Collection[str]) -> list[str]:
    left = sorted(name for name in names if name not in read and name not in _OF_NO_MATTER[file])
    more = f" and {len(left) - 12} more" if len(left) > 12 else ""
    return [f"{file}: not read: {', '.join(left[:12])}{more}."] if left else []


def _of_hardware(meta: Mapping[str, Any]) -> list[str]:
    """A sentence on data of the device that are not used, such as a power limit or a part of the card."""
    said = (meta.get("hardware") or {}).items()
    left = [f"{key} ({str(value)[:40]})" for key, value in said if value and key not in _OF_HARDWARE]
    return [f"meta.json: hardware: not read: {', '.join(left[:12])}."] if left else []


def _of_ends(rows: list[dict[str, Any]]) -> list[str]:
    """A sentence on requests that did not end with an answer; they are simulated up to their last token."""
    ends = Counter(str(row["finish_reason"]) for row in rows if row.get("finish_reason") not in (None, *_ENDED))
    told = ", ".join(f"{count} of {len(rows)} requests ended by {why[:40]}" for why, count in ends.most_common(3))
    return [f"requests.jsonl: {told}: they are simulated to be answered as long as they were."] if told else []


def _meta(path: Path) -> dict[str, Any]:
    meta = read_json(path, "copy or correct the file")
    for key in ("model", "engine_kwargs"):
        if key not in meta:
            raise UserError(f"{path}: {key}", None, "the run's model and engine settings", f"add {key}")
    for key in ("engine_kwargs", "kv_cache", "hardware", "resolved_config"):
        optional = key != "engine_kwargs" and meta.get(key) is None
        if not optional and not isinstance(meta[key], dict):
            raise UserError(f"{path}: {key}", shortened(meta[key]), "a JSON object", "correct it")
    if not isinstance(meta.get("vllm_version") or "", str):
        raise UserError(f"{path}: vllm_version", shortened(meta["vllm_version"]), 'a text such as "0.19.0"', _FIX)
    version = meta.get("schema_version", 1)
    if version != 1:
        raise UserError(f"{path}: schema_version", version, "1, as LLMServingSim writes it", "take a log of that form")
    return meta


def _check_meta(meta: Mapping[str, Any], rows: list[dict[str, Any]], span_s: float) -> None:
    """Raise UserError if the header contradicts the requests."""
    if meta.get("resolve_only"):
        raise UserError("meta.json: resolve_only", True, "false: such a run served nothing", "take another log")
    number = meta.get("num_requests")
    if number is not None and number != len(rows):
        allowed = f"{len(rows)}, the lines of requests.jsonl"
        raise UserError("meta.json: num_requests", shortened(number), allowed, "copy the whole log, or correct it")
    _check_rows(meta, rows)
    began, ended = (_date(meta, key) for key in ("started_at", "finished_at"))
    if began is not None and ended is not None and (ended - began).total_seconds() + _LATE_S < span_s:
        told = f"{(ended - began).total_seconds():.0f} s after started_at"
        raise UserError("meta.json: finished_at", told, f"as long as the requests take, {span_s:.0f} s", _FIX)


def _check_rows(meta: Mapping[str, Any], rows: list[dict[str, Any]]) -> None:
    """Raise UserError for a request of another model than the header's, and for times that cannot be in seconds."""
    served = meta["engine_kwargs"].get("served_model_name") or []
    names = {str(meta["model"]), *([served] if isinstance(served, str) else served if isinstance(served, list) else [])}
    known = {str(name).rstrip("/").rpartition("/")[2].lower() for name in names}
    for number, row in enumerate(rows, 1):
        model = row.get("model")
        if model is not None and str(model).rstrip("/").rpartition("/")[2].lower() not in known:
            allowed = f"{meta['model']}, as meta.json says"
            raise UserError(f"requests.jsonl, request {number}: model", shortened(model), allowed, _FIX)
    paces = [(row["last_token_ts"] - row["first_token_ts"]) / (row["output_toks"] - 1) for row in rows
             if row["output_toks"] > 1]  # fmt: skip
    if paces and median(paces) > _SLOWEST_S:
        told = f"{median(paces):.3g} s a token in half of the requests"
        raise UserError("requests.jsonl", told, f"times in seconds: at most {_SLOWEST_S:g} s a token", _FIX)


def _date(meta: Mapping[str, Any], key: str) -> datetime | None:
    """Parse a time; one without an offset is in UTC. Raises UserError for other texts."""
    value = meta.get(key)
    if value is None:
        return None
    try:
        found = datetime.fromisoformat(str(value))
    except ValueError as error:
        allowed = "a date and time such as 2026-04-25T18:47:18Z"
        raise UserError(f"meta.json: {key}", shortened(value), allowed, _FIX) from error
    return found if found.tzinfo is not None else found.replace(tzinfo=UTC)


def _requests(path: Path) -> list[dict[str, Any]]:
    lines = read_text(path, _MOST_BYTES, "copy the file there").decode().splitlines()
    rows: list[dict[str, Any]] = []
    seen: dict[str, int] = {}  # lines by request_id
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = parse_json(line, plain_names=True)
        except (ValueError, RecursionError) as error:
            raise UserError(where, line[:80], f"a JSON object ({in_short(error)})", "correct the line") from error
        if not isinstance(row, dict):
            raise UserError(where, line[:80], "a JSON object", "correct the line")
        _check_row(where, row)
        name = f"line {number}" if row.get("request_id") is None else str(row["request_id"])
        if name in seen:
            raise UserError(where, f"request_id {name[:80]}", f"another than in line {seen[name]}", "correct the line")
        seen[name] = number
        rows.append(row)
    if len(rows) < 4:
        raise UserError(str(path), len(rows), "at least 4 requests", "take a longer log")
    for key in ("scheduled_ts", "arrival_time", "priority", _CACHED):  # all requests must have it, or none
        having = [row.get(key) is not None for row in rows]
        if any(having) and not all(having):
            number = [n for n, line in enumerate(lines, 1) if line.strip()][having.index(False)]
            raise UserError(f"{path}, line {number}: {key}", None, "a number in every line, or in none", _FIX)
    return rows


def _check_row(where: str, row: dict[str, Any]) -> None:
    """Raise UserError for a value that is missing, not a number, out of range, or contradicts another."""
    for key, (needed, low, high) in _NUMBERS.items():
        value = row.get(key)
        if value is None and not needed:
            row.pop(key, None)
            continue
        whole_number = key in _COUNTS or key in ("priority", _CACHED)
        kinds = int if whole_number else int | float
        if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
            what = "a whole number" if whole_number else "a number in every line"
            allowed = f"{what}, from {low:.16g} to {high:.16g}"
            raise UserError(f"{where}: {key}", shortened(value), allowed, "correct the line")
    if row.get(_CACHED, 0) > row["input_toks"]:
        told = f"{_CACHED} {row[_CACHED]}, input_toks {row['input_toks']}"
        raise UserError(where, told, "no more cached than there are", "correct the line")
    known = [key for key in _TIMES if key in row]
    for before, after in pairwise(known):
        if row[after] < row[before]:
            told = f"{after} {row[after]!r} before {before} {row[before]!r}"
            raise UserError(where, told, f"times in the order {', '.join(known)}", "correct the line")
    answered_s = row["last_token_ts"] - row["first_token_ts"]
    if row["output_toks"] == 1 and answered_s > _AT_ONCE_S:
        told = f"last_token_ts {answered_s:.3f} s after first_token_ts, output_toks 1"
        raise UserError(where, told, "both of one token", "correct the line")
    if row["output_toks"] > 1 and answered_s <= 0:
        told = f"output_toks {row['output_toks']}, last_token_ts equal to first_token_ts"
        raise UserError(where, told, "one token at a time", "correct the line")


def _arrivals(
    folder: Path, rows: list[dict[str, Any]], counts: dict[str, IntColumn], queued_ns: IntColumn
) -> tuple[IntColumn, str, list[str]]:
    """Arrivals at the engine's front end since the first, in which its clock's offset cancels.

    Also returns their source, and sentences on differences between sources.
    """
    planned = _planned(find_table([folder], "workload"), counts)
    if "arrival_time" in rows[0]:
        seconds = np.array([row["arrival_time"] for row in rows], np.float64)
        arrival_ns = all_to_ns(seconds - seconds.min(), "arrival_time")
        _check_clocks(arrival_ns, queued_ns)
        late_s = 0.0 if planned is None else float(np.abs(arrival_ns - planned).max()) / NS_PER_S
        late = [
            f"workload.csv and arrival_time of requests.jsonl differ by up to {late_s:.1f} s: the latter counts."
        ] if late_s > _LATE_S else []  # fmt: skip
        return arrival_ns, "requests.jsonl: arrival_time", late
    if planned is not None:
        _check_clocks(planned, queued_ns)
        return planned, "workload.csv: arrival_ns", []
    return queued_ns, "requests.jsonl: queued_ts, which is later by what the engine was busy", []


def _planned(path: Path | None, counts: dict[str, IntColumn]) -> IntColumn | None:
    if path is None:
        return None
    columns = read_columns(path, ("arrival_ns", *_COUNTS))
    allowed = "the requests of requests.jsonl, in order"
    if len(columns["arrival_ns"]) != len(counts["input_toks"]):
        raise UserError(str(path), f"{len(columns['arrival_ns'])} rows", allowed, "correct or remove it")
    for key in _COUNTS:
        differ = np.flatnonzero(columns[key] != counts[key])
        if len(differ):
            row = int(differ[0])
            told = f"{key} {columns[key][row]:g}, requests.jsonl {counts[key][row]}"
            raise UserError(f"{path}, row {row + 1}", told, allowed, "correct or remove it")
    arrival_ns: IntColumn = all_to_ns(columns["arrival_ns"].astype(np.float64), f"{path}: arrival_ns", 1)
    return np.asarray(arrival_ns - arrival_ns.min(), np.int64)


def _check_clocks(arrival_ns: IntColumn, queued_ns: IntColumn) -> None:
    """Raise UserError if a request was queued long before or after its arrival, compared with the others."""
    after = queued_ns - arrival_ns
    away_ns = np.abs(after - int(np.median(after)))
    row = int(np.argmax(away_ns))
    if away_ns[row] > max(to_ns(_APART_S), arrival_ns.max() // 2):
        told = f"arrival and queued_ts {away_ns[row] / NS_PER_S:.0f} s further apart than those of the others"
        raise UserError(f"requests.jsonl, request {row + 1}", told, "two clocks that go alike, in seconds", _FIX)


def _series(
    folder: Path, meta: Mapping[str, Any], engine: Engine, measured: Times, prompt_tokens: IntColumn
) -> tuple[Series | None, list[str]]:
    path = find_table([folder], "timeseries")
    if path is None:
        return None, []
    names = column_names(path)
    more = [name for name in ("prompt_cached_throughput", "preempted") if name in names]
    columns = {name: values.astype(np.float64) for name, values in read_columns(path, (*_SERIES, *more)).items()}
    _check_series(path, columns, meta, engine)
    time_s, rate = columns["t"], columns["prompt_throughput"]
    tick_s = float(np.median(np.diff(time_s))) if len(time_s) > 1 else 1.0
    # The series counts a prompt's tokens at its first token, which shows when the series' clock began.
    counted = np.cumsum(rate * tick_s)
    order = np.argsort(measured.first_ns)
    first_s, tokens = measured.first_ns[order] / NS_PER_S, np.cumsum(prompt_tokens[order])
    offsets = np.arange(-1.0, 10.0, 0.01)
    misses = []
    for offset in offsets:
        seen = np.searchsorted(first_s, time_s - offset, side="right")
        misses.append(np.abs(np.where(seen > 0, tokens[np.maximum(seen, 1) - 1], 0) - counted).sum())
    best = offsets[np.isclose(misses, min(misses))].mean()
    cached, preempted = columns.get("prompt_cached_throughput"), columns.get("preempted")
    return Series(
        time_s - best, columns["running"], columns["waiting"],
        None if cached is None or rate.sum() <= 0 else float(cached.sum() / rate.sum()),
        None if preempted is None else int(preempted.sum()),
    ), _not_read("timeseries.csv", names, (*_SERIES, *more))  # fmt: skip


def _check_series(
    path: Path, columns: Mapping[str, NDArray[np.float64]], meta: Mapping[str, Any], engine: Engine
) -> None:
    """Raise UserError for an impossible row, or one that contradicts the settings."""
    for name, values in columns.items():
        bad = np.flatnonzero(~((values >= 0) & (values <= 1e12)))  # true for NaN
        if len(bad):
            row = int(bad[0])
            raise UserError(f"{path}, row {row + 1}: {name}", float(values[row]), "a number of at least 0", _FIX)
    steps = np.diff(columns["t"])
    if len(steps) and steps.min() <= 0:
        row = int(np.argmin(steps)) + 2
        raise UserError(f"{path}, row {row}: t", float(columns["t"][row - 1]), "later than the row before", _FIX)
    tick_s = meta.get("tick_seconds")
    if len(steps) and isinstance(tick_s, int | float) and not 0.9 * tick_s <= np.median(steps) <= 1.1 * tick_s:
        told = f"rows {np.median(steps):g} s apart"
        raise UserError(str(path), told, f"{tick_s:g} s, which is tick_seconds of meta.json", _FIX)
    most = engine.value("max_num_seqs")
    row = int(np.argmax(columns["running"]))
    if isinstance(most, int) and columns["running"][row] > most:
        told = f"{columns['running'][row]:g} running"
        raise UserError(f"{path}, row {row + 1}", told, f"at most max_num_seqs of meta.json, {most}", _FIX)
    cached = columns.get("prompt_cached_throughput")
    if cached is not None and cached.max() > 0 and engine.value("enable_prefix_caching") is False:
        row = int(np.argmax(cached))
        told = f"prompt_cached_throughput {cached[row]:g}"
        raise UserError(f"{path}, row {row + 1}", told, "0, since meta.json says that prefix caching is off", _FIX)
