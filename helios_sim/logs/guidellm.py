"""guidellm's report (`--output kind=json` or yaml), as 0.8 writes it: benchmarks, with requests by how they ended.

Times of a request are in `info.timings` (s since 1970); tokens are those that the server counted, where it told them.
The last token, not the end of the stream, ends a request here. Single tokens have no times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.record import (
    FIX,
    Begins,
    RequestLog,
    Row,
    check_same,
    close_to,
    counted,
    gathered,
    not_read,
    note_others,
    number,
    only_once,
    other_counts,
    reason,
    whole,
)
from helios_sim.untrusted import Fields, shortened

SCHEMA = 2  # of the report
_APART_S = 60.0  # between a request and the time of the run that is measured, which warm-up and cool-down cut
_OF_ALL = {"request_latency": "request_latency", "time_to_first_token_ms": "time_to_first_token_ms",
           "prompt_token_count": "prompt_tokens", "output_token_count": "output_tokens"}  # means of each, unweighted
_ENDS = ("successful", "incomplete", "errored")
_EFFECTS = {
    "cached_tokens": "how much of prompts the prefix cache served, which is computed anew here",
    "image_tokens": "prompts had images, which are counted as text",
    "audio_tokens": "prompts had audio, which is counted as text",
    "video_tokens": "prompts had video, which is counted as text",
}
_OF_REQUEST = re.compile(
    r"type_|request_(id|args|start_time|end_time|latency|dispatch_delay|scheduled_latency)|response_(id|metrics)|output"
    r"|reasoning_output|info|(in|out)put_metrics|(prompt|output|total|cached)_tokens|turn_\w+_delay|\w+_ms"
    r"|(output_)?tokens_per_(second|iteration)|iter_tokens_per_iteration"
)
_OF_INFO = re.compile(
    r"request_id|conversation_id|history_len|turn_index|preceding_nodes|node_id|agent_id|parent_node_ids|status|error"
    r"|scheduler_(node_id|process_id|start_time)|timings|settings|traceback|started_at|completed_at"
)
_OF_INPUT = re.compile(
    rf"\w+_(words|characters|count|pixels|bytes|frames|seconds|samples)|total_tokens|text_tokens|{'|'.join(_EFFECTS)}"
)


def is_it(document: Document) -> bool:
    if document.begins_with(b"{"):
        return document.names("guidellm_version")
    named = document.path.name.removesuffix(".gz").endswith((".yaml", ".yml"))
    # its keys in the order of guidellm, or in any other
    return document.begins_with(b"benchmarks:\n") or (named and b"guidellm_version:" in document.head)


def read(document: Document, part: int | None = None) -> RequestLog:
    """`part`: which benchmark of a report that has several, such as a sweep of rates, from 1."""
    report = Fields(document.mapping(), document.name, FIX)
    metadata = report.inner("metadata")
    if metadata.integer("version", 0, 1 << 16) != SCHEMA:
        told, fix = f"{SCHEMA}, as guidellm 0.8 writes it", "run that version, or take another log"
        raise UserError(f"{document.name}: metadata.version", metadata.value("version"), told, fix)
    benchmarks = report.value("benchmarks")
    if not isinstance(benchmarks, list) or not benchmarks or not all(isinstance(b, dict) for b in benchmarks):
        raise UserError(f"{document.name}: benchmarks", shortened(benchmarks), "a list of at least one benchmark", FIX)
    place = document.chosen(part, [_told(b) for b in benchmarks], "benchmarks")
    where = f"{document.name}: benchmark {place + 1}"
    benchmark = Fields(benchmarks[place], where, FIX)
    requests = benchmark.inner("requests")
    rows: list[Row] = []
    ids = dict[str, str]()
    for end in _ENDS:
        listed = requests.value(end, [])
        if not isinstance(listed, list):
            raise UserError(f"{where}: requests.{end}", shortened(listed), "a list of requests", FIX)
        rows += [_row(f"{where}, {end} request {i}", one, end) for i, one in enumerate(listed, 1)]
        for i, one in enumerate(listed, 1):
            only_once(f"{where}, {end} request {i}", "request_id", one.get("request_id"), ids)
    _check_whole(where, benchmark, requests)
    _check_means(where, benchmark, requests.value("successful", []), rows)
    matter, left, turns = dict.fromkeys(_EFFECTS, 0), dict[str, None](), 0
    for i, one in enumerate(requests.value("successful", []), 1):
        read_of_prompt = Fields(one, f"{where}, successful request {i}", FIX).inner("input_metrics", {})
        for name in matter:
            matter[name] += read_of_prompt.has(name)
        matter["cached_tokens"] += bool(one.get("cached_tokens"))
        turns += bool(one["info"].get("turn_index") or one["info"].get("history_len"))
        note_others(left, one, _OF_REQUEST)
        note_others(left, one["info"], _OF_INFO, "info.")
        note_others(left, read_of_prompt.values, _OF_INPUT, "input_metrics.")
    notices = not_read(where, [*(name for name, count in matter.items() if count), *left], _EFFECTS)
    for what, name in (("prompt tokens", "input_metrics"), ("output tokens", "output_metrics")):
        both = [(one.get(what.replace(" ", "_")), (one.get(name) or {}).get("text_tokens"))
                for one in requests.value("successful", []) if isinstance(one.get(name) or {}, dict)]  # fmt: skip
        notices += other_counts(where, what, [(a, b) for a, b in both if type(a) is int and type(b) is int])
    if turns:
        notices.append(f"{where}: {turns} requests continue a conversation: what its turns share is computed anew for "
                       "each.")  # fmt: skip
    for name, end, phase in (("warmup_duration", "first", "warm-up"), ("cooldown_duration", "last", "cool-down")):
        duration_s = benchmark.number(name, -1e9, 1e9, 0.0)
        if duration_s > 0:
            notices.append(f"{where}: requests of its {end} {duration_s:.3g} s ({phase}) are not in the report, "
                           "so the engine had more to do then.")  # fmt: skip
    config = benchmark.inner("config", {})
    backend, strategy = config.inner("backend", {}), config.inner("strategy", {})
    stated = {
        "model": backend.value("model", None), "strategy": strategy.value("type_", None),
        "in_flight_at_most": strategy.value("streams", None),
        "started_s": benchmark.value("start_time", None),
    }  # fmt: skip
    kind = f"guidellm {metadata.text('guidellm_version')}"
    return gathered(document.source, kind, rows, Begins.SENT, stated, notices)


def _told(benchmark: Mapping[str, Any]) -> str:
    config = benchmark.get("config") or {}
    strategy = config.get("strategy") or {} if isinstance(config, dict) else {}
    rate = strategy.get("rate", strategy.get("streams")) if isinstance(strategy, dict) else None
    kind = strategy.get("type_") if isinstance(strategy, dict) else None
    return f"{shortened(kind)} {shortened(rate)}"


def _row(place: str, request: Any, end: str) -> Row:
    if not isinstance(request, dict):
        raise UserError(place, shortened(request), "a request", FIX)
    fields = Fields(request, place, FIX)
    info = fields.inner("info")
    timings = info.inner("timings")

    def time_s(name: str) -> float | None:
        value = timings.value(name, None)
        return None if value is None else number(place, f"timings.{name}", value)

    start_s = time_s("request_start")
    lengths = [fields.value(name, None) for name in ("prompt_tokens", "output_tokens")]
    if end != "successful":
        why = reason(info.value("error", None), f"the run ended before it did ({info.value('status', end)})")
        prompt, output = (whole(place, "tokens", length or 0) for length in lengths)
        return Row(place, start_s, prompt, output, failure=why)
    prompt, output = (counted(place, n, v) for n, v in zip(("prompt_tokens", "output_tokens"), lengths, strict=True))
    total = fields.value("total_tokens", None)
    if total is not None and output and total != prompt + output:
        raise UserError(f"{place}: total_tokens", shortened(total), f"the sum, {prompt} + {output}", FIX)
    if start_s is None:
        raise UserError(f"{place}: timings.request_start", None, "a time in a request that was answered", FIX)
    first_s, last_s, end_s = (time_s(n) for n in ("first_token_iteration", "last_token_iteration", "request_end"))
    ttft_s = None if first_s is None else first_s - start_s
    e2e_s = None if (ended_s := end_s if last_s is None else last_s) is None else ended_s - start_s
    told_ms = fields.value("time_to_first_token_ms", None)
    if ttft_s is not None and told_ms is not None:
        key = "time_to_first_token_ms"
        if not close_to(number(place, key, told_ms), 1e3 * ttft_s, 0.01, 0.1):
            raise UserError(f"{place}: {key}", told_ms, f"{1e3 * ttft_s:.6g}, as its timings say", FIX)
    took_s = None if end_s is None else end_s - start_s
    each_s = None if first_s is None or last_s is None or output < 2 else (last_s - first_s) / (output - 1)
    a_token_s = None if last_s is None or not output else (last_s - start_s) / output
    rate = None if not took_s or not output else 1.0 / took_s  # an answer of 0 tokens is none
    for key, ours, scale in (
        ("request_start_time", start_s, 1.0), ("request_end_time", end_s, 1.0), ("request_latency", took_s, 1.0),
        ("inter_token_latency_ms", each_s, 1e3), ("time_per_output_token_ms", a_token_s, 1e3),
        ("output_tokens_per_second", rate, output), ("tokens_per_second", rate, prompt + output),
    ):  # fmt: skip
        if ours is not None:
            share = 0.0 if key.endswith("_time") else 0.05
            check_same(place, key, fields.value(key, None), ours * scale, share, by="timings say")
    status, error = info.value("status", None), info.value("error", None)
    if status in ("errored", "cancelled") or error:
        told = shortened(error or status)
        raise UserError(f"{place}: info", told, "completed, and no error, as requests.successful says", FIX)
    return Row(place, start_s, prompt, output, ttft_s, e2e_s)


def _check_means(where: str, benchmark: Fields, answered: Sequence[Mapping[str, Any]], rows: Sequence[Row]) -> None:
    """UserError where what the report says of the whole run is not what its requests say."""
    metrics = benchmark.inner("metrics", {})
    for name, key in _OF_ALL.items():
        said = metrics.inner(name, {}).inner("successful", {}).value("mean", None)
        if said is not None and answered:
            ours = fmean(float(one.get(key) or 0.0) for one in answered)
            check_same(where, f"metrics.{name}.successful.mean", said, ours, by="requests say")
    begin_s, end_s = (benchmark.value(name, None) for name in ("start_time", "end_time"))
    if begin_s is None or end_s is None:
        return
    begin_s, end_s = (number(where, f"{n}_time", t) for n, t in (("start", begin_s), ("end", end_s)))
    check_same(where, "duration", benchmark.value("duration", None), max(end_s - begin_s, 0.0), slack=1.0,
               by="start_time and end_time say")
    for row in rows:
        sent_s = row.arrival_s
        if row.failure is not None or sent_s is None:
            continue
        if sent_s > end_s + _APART_S or sent_s + (row.e2e_s or 0.0) < begin_s - _APART_S:
            allowed = f"within the run, {begin_s:.3f} to {end_s:.3f}, as its start_time and end_time say"
            raise UserError(f"{row.place}: timings.request_start", sent_s, allowed, FIX)


def _check_whole(where: str, benchmark: Fields, requests: Fields) -> None:
    """UserError where the report lists a sample of its requests only."""
    totals = benchmark.inner("metrics", {}).inner("request_totals", {})
    for end in _ENDS:
        served, listed = totals.value(end, None), len(requests.value(end, []))
        if served is not None and whole(where, f"request_totals.{end}", served) != listed:
            fix = "run guidellm without a limit of sampled requests (--metrics), or take another log"
            raise UserError(f"{where}: requests.{end}", f"{listed} requests", f"all {served} of the run", fix)
