"""Reads a folder with the log of a real vLLM run. Knows the files, not how to simulate them.

`meta.json`: model, vllm_version, engine_kwargs and, where logged, kv_cache, hardware and resolved_config.
`requests.jsonl`: one request a line with input_toks, output_toks, queued_ts, scheduled_ts, first_token_ts,
last_token_ts (one monotonic clock, s) and arrival_time (another clock, s). `workload.csv` (optional): idx, arrival_ns,
input_toks, output_toks. `timeseries.csv` (optional): t, running, waiting at 1 Hz from a start that is not logged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.profile.importers.reading import find_table, read_columns

IntColumn = NDArray[np.int64]
_COUNTS = ("input_toks", "output_toks")
_TIMES = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")


@dataclass(frozen=True, slots=True)
class Times:
    """What n requests experienced, ns since the first was queued, each (n,). One order of requests everywhere."""

    queued_ns: IntColumn  # the engine has seen it
    scheduled_ns: IntColumn  # the plan in which it first runs was made
    first_ns: IntColumn
    last_ns: IntColumn


@dataclass(frozen=True, slots=True)
class Series:
    """Running and waiting requests over time, each (k,)."""

    time_s: NDArray[np.float64]  # since the first request was queued
    running: NDArray[np.float64]
    waiting: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ServingLog:
    """Requests are in order of arrival, those at one time in the order of the file."""

    folder: Path
    meta: dict[str, Any]
    arrival_ns: IntColumn  # (n,) since the first
    prompt_tokens: IntColumn
    output_tokens: IntColumn
    measured: Times
    series: Series | None
    arrivals_from: str  # which file and column

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def engine(self, key: str, default: Any = None) -> Any:
        """A setting as vLLM resolved it, else as it was asked for."""
        for section in (self.meta.get("resolved_config") or {}).values():
            if isinstance(section, dict) and section.get(key) is not None:
                return section[key]
        value = (self.meta.get("kv_cache") or {}).get(key)
        if value is None:
            value = self.meta["engine_kwargs"].get(key)
        return default if value is None else value


def read_log(folder: Path) -> ServingLog:
    """UserError for a folder, a file, a key or a value that is not there or cannot be."""
    if not folder.is_dir():
        raise UserError(
            "fidelity.folder", str(folder), "a folder with meta.json, requests.jsonl, profile/", "correct it"
        )
    meta = _meta(folder / "meta.json")
    rows = _requests(folder / "requests.jsonl")
    counts = {key: np.array([row[key] for row in rows], np.int64) for key in _COUNTS}
    for key, values in counts.items():
        if values.min() < 1:
            raise UserError(f"requests.jsonl: {key}", int(values.min()), "at least 1 token", "correct the log")
    seconds = {key: np.array([row.get(key, row["queued_ts"]) for row in rows], np.float64) for key in _TIMES}
    start_s = seconds["queued_ts"].min()
    times = {key: np.rint((values - start_s) * 1e9).astype(np.int64) for key, values in seconds.items()}
    if np.any(times["first_token_ts"] < times["queued_ts"]) or np.any(times["last_token_ts"] < times["first_token_ts"]):
        raise UserError("requests.jsonl", "queued, first token, last token", "times in that order", "correct the log")
    arrival_ns, arrivals_from = _arrivals(folder, rows, counts, times["queued_ts"])
    order = np.argsort(arrival_ns, kind="stable")
    measured = Times(*(times[key][order] for key in _TIMES))
    prompt_tokens = counts["input_toks"][order]
    return ServingLog(
        folder=folder,
        meta=meta,
        arrival_ns=arrival_ns[order],
        prompt_tokens=prompt_tokens,
        output_tokens=counts["output_toks"][order],
        measured=measured,
        series=_series(folder, measured, prompt_tokens),
        arrivals_from=arrivals_from,
    )


def _meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), str(error), "a JSON object", "copy or correct the file") from error
    for key in ("model", "engine_kwargs"):
        if not isinstance(meta, dict) or key not in meta:
            raise UserError(f"{path}: {key}", None, "the run's model and engine settings", f"add {key}")
    if not isinstance(meta, dict) or not isinstance(meta["engine_kwargs"], dict):
        raise UserError(f"{path}: engine_kwargs", meta["engine_kwargs"], "a JSON object", "correct it")
    return meta


def _requests(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(str(path), str(error.strerror), "one JSON object a line", "copy the file there") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}", line[:80], "a JSON object", "correct the line") from error
        for key in (*_COUNTS, "queued_ts", "first_token_ts", "last_token_ts"):
            if not isinstance(row, dict) or not isinstance(row.get(key), int | float):
                value = row.get(key) if isinstance(row, dict) else row
                raise UserError(f"{path}, line {number}: {key}", value, "a number in every line", "correct the line")
        rows.append(row)
    if len(rows) < 4:
        raise UserError(str(path), len(rows), "at least 4 requests", "take a longer log")
    return rows


def _arrivals(
    folder: Path, rows: list[dict[str, Any]], counts: dict[str, IntColumn], queued_ns: IntColumn
) -> tuple[IntColumn, str]:
    """When the engine's front end got each request, since the first. Its clock's offset cancels."""
    path = find_table([folder], "workload")
    planned = None
    if path is not None:
        columns = read_columns(path, ("arrival_ns", *_COUNTS))
        if any(not np.array_equal(columns[key].astype(np.int64), counts[key]) for key in _COUNTS):
            raise UserError(str(path), f"{len(columns['arrival_ns'])} rows", "the requests of requests.jsonl, in order",
                            "correct or remove it")  # fmt: skip
        planned = columns["arrival_ns"].astype(np.int64)
    if all(isinstance(row.get("arrival_time"), int | float) for row in rows):
        seconds = np.array([row["arrival_time"] for row in rows], np.float64)
        return np.rint((seconds - seconds.min()) * 1e9).astype(np.int64), "requests.jsonl: arrival_time"
    if planned is not None:
        return planned - planned.min(), "workload.csv: arrival_ns"
    return queued_ns, "requests.jsonl: queued_ts, which is later by what the engine was busy"


def _series(folder: Path, measured: Times, prompt_tokens: IntColumn) -> Series | None:
    path = find_table([folder], "timeseries")
    if path is None:
        return None
    columns = read_columns(path, ("t", "prompt_throughput", "running", "waiting"))
    time_s, rate = columns["t"].astype(np.float64), columns["prompt_throughput"].astype(np.float64)
    tick_s = float(np.median(np.diff(time_s))) if len(time_s) > 1 else 1.0
    # The series counts a prompt's tokens when its first token comes: that tells when its clock began.
    counted = np.cumsum(rate * tick_s)
    order = np.argsort(measured.first_ns)
    first_s, tokens = measured.first_ns[order] / 1e9, np.cumsum(prompt_tokens[order])
    offsets = np.arange(-1.0, 10.0, 0.01)
    misses = []
    for offset in offsets:
        seen = np.searchsorted(first_s, time_s - offset, side="right")
        misses.append(np.abs(np.where(seen > 0, tokens[np.maximum(seen, 1) - 1], 0) - counted).sum())
    best = offsets[np.isclose(misses, min(misses))].mean()
    return Series(time_s - best, columns["running"].astype(np.float64), columns["waiting"].astype(np.float64))
