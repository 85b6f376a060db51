"""aiperf's `profile_export.jsonl` (--export-level records), as 0.13 writes it: a request in each line.

`metadata` has its times (ns since 1970), `metrics` figures by name, each with its unit, and `error` is there where it
failed. The layout is that of aiperf/common/models/record_models.py (MetricRecordInfo).
"""

from __future__ import annotations

import re
from collections import Counter
from itertools import accumulate
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
    other_totals,
    reason,
    stamp_ns,
    whole,
)
from helios_sim.request import NS_PER_S
from helios_sim.untrusted import Fields, shortened

NAME = "aiperf records"
_PER_S = {"ns": 1e9, "us": 1e6, "ms": 1e3, "sec": 1.0, "s": 1.0}
_OF_A_RUN = ("benchmark_phase", "session_num", "turn_index", "agent_depth", "source_id")  # once in each
_SLACK_S = 0.1  # between the figures of a request and its stamps, which are of two clocks
_EFFECTS = {
    "usage_prompt_cache_read_tokens": "what of the prompt the prefix cache served is computed anew here",
    "spec_decode_acceptance": "speculative decoding was on: several tokens an iteration, which the simulation lacks",
    "image_latency": "prompts had images", "video_inference_time": "prompts had video",
}  # fmt: skip
_OF_RECORD = re.compile(rf"metadata|metrics|error|trace_data|{'|'.join(_EFFECTS)}")
_OF_METADATA = re.compile(
    r"session_num|x_(request|correlation)_id|conversation_id|turn_index|request_(start|ack|end)_ns|worker_id"
    r"|record_processor_id|benchmark_phase|was_cancelled|cancellation_time_ns|credit_issued_ns|context_overflow_skip"
    r"|agent_depth|source_id|endpoint_url"
)
_OF_METRICS = re.compile(  # figures that are read, follow from these, or say how the client did
    r"time_to_(first|second)(_output)?_token|request_latency|inter_(chunk|token)_latency|stream_\w*latency"
    r"|decode_duration|(in|out)put_sequence_length|output_token_count|reasoning_token_count|error_isl|osl_mismatch\w*"
    r"|\w*_throughput(_per_user)?|usage_(prompt|completion|total|reasoning)_tokens|\w+_diff_pct|http_req_\w+"
    r"|(min|max)_\w+_timestamp|(\w+_)?request_count|good_request_fraction|replay_\w+|accuracy\w*|thinking_efficiency"
    rf"|{'|'.join(_EFFECTS)}"
)


def is_it(document: Document) -> bool:
    return document.begins_with(b"{") and document.names("metadata", "request_start_ns", "benchmark_phase")


def read(document: Document, part: int | None = None) -> RequestLog:
    """UserError for a line that is no record of aiperf, or contradicts itself."""
    document.chosen(part or 1, ["the file"], "runs")
    rows, matter, turns, left = [], Counter[str](), 0, dict[str, None]()
    counts, totals = list[tuple[int, int]](), list[tuple[Any, Any, Any]]()
    ids, servers, sessions = dict[str, str](), dict[str, None](), Counter[tuple[object, ...]]()
    for place, value in document.numbered_objects():
        record = Fields(value, place, FIX)
        rows.append(_row(place, record))
        only_once(place, "metadata.x_request_id", value["metadata"].get("x_request_id"), ids)
        metrics = value.get("metrics") or {}
        matter.update(name for name in _EFFECTS if name in value or _value_of(metrics, name))
        turns += bool(value["metadata"].get("turn_index"))
        both = [_value_of(metrics, name) for name in ("usage_prompt_tokens", "input_sequence_length")]
        counts += [(both[0], both[1])] if all(type(count) is int for count in both) else []
        totals.append((_value_of(metrics, "usage_total_tokens"), _value_of(metrics, "usage_prompt_tokens"),
                       _value_of(metrics, "usage_completion_tokens")))  # fmt: skip
        sessions[tuple(str(value["metadata"].get(name)) for name in _OF_A_RUN)] += 1
        servers |= dict.fromkeys(filter(None, [str(value["metadata"].get("endpoint_url") or "")]))
        note_others(left, value, _OF_RECORD)
        note_others(left, value["metadata"], _OF_METADATA, "metadata.")
        note_others(left, metrics, _OF_METRICS, "metrics.")
    notices = not_read(document.name, [*(name for name in _EFFECTS if matter[name]), *left], _EFFECTS)
    if len(servers) > 1:
        told = f"{len(servers)} endpoints, {', '.join(list(servers)[:3])}"
        notices.append(f"{document.name}: requests went to {told}: here all go to one server, or to server.replicas.")
    notices += other_counts(document.name, "prompt tokens", counts) + other_totals(document.name, totals)
    again = sum(count - 1 for count in sessions.values())
    if again:
        notices.append(f"{document.name}: {again} requests have session and turn of another one, as where the records "
                       "of several runs are joined: all are replayed as one run.")  # fmt: skip
    if turns:
        notices.append(f"{document.name}: {turns} requests continue a conversation: what its turns share is computed "
                       "anew for each.")  # fmt: skip
    return gathered(document.source, NAME, rows, Begins.SENT, {}, notices)


def _value_of(metrics: Any, name: str) -> Any:
    one = metrics.get(name) if isinstance(metrics, dict) else None
    return one.get("value") if isinstance(one, dict) else None


def _row(place: str, record: Fields) -> Row:
    about, metrics = record.inner("metadata"), record.inner("metrics", {})

    def figure(name: str) -> Any:
        return metrics.inner(name).value("value") if metrics.has(name) else None

    def seconds(name: str) -> float | None:
        """In the unit that stands beside the figure."""
        if not metrics.has(name):
            return None
        unit = metrics.inner(name).text("unit", _PER_S)
        return number(place, f"metrics.{name}", figure(name)) / _PER_S[unit]

    def tokens(*names: str) -> int:
        found = next((figure(name) for name in names if metrics.has(name)), None)
        return whole(place, names[0], found or 0) if failed else counted(place, names[-1], found)

    start_ns, end_ns = (
        stamp_ns(place, name, about.integer(name, 0, 1 << 62)) for name in ("request_start_ns", "request_end_ns")
    )
    if end_ns < start_ns:
        raise UserError(f"{place}: request_end_ns", end_ns, f"no earlier than request_start_ns, {start_ns}", FIX)
    arrival_s = start_ns / NS_PER_S
    warm_up = about.text("benchmark_phase", ("warmup", "profiling")) == "warmup"
    error = record.value("error", None)
    failed = error is not None or about.flag("was_cancelled", False)
    prompt = tokens("usage_prompt_tokens", "error_isl", "input_sequence_length")
    output = tokens("usage_completion_tokens", "output_sequence_length")
    if failed:
        fields = record.inner("error", {})
        code = fields.value("code", None)
        default = "cancelled by the client" if error is None else None
        why = reason(fields.value("message", None), fields.value("type", None), default)
        return Row(place, arrival_s, prompt, output, failure=why if code is None else f"{code}: {why}", warm_up=warm_up)
    ttft_s, e2e_s = seconds("time_to_first_token"), seconds("request_latency")
    took_s = (end_ns - start_ns) / NS_PER_S
    if e2e_s is not None and e2e_s > 1.01 * took_s + _SLACK_S:
        told = f"{e2e_s:.6g} s"
        raise UserError(f"{place}: request_latency", told, f"at most the {took_s:.6g} s between its stamps", FIX)
    if e2e_s is not None and 10 * e2e_s < took_s - _SLACK_S:
        raise UserError(f"{place}: request_latency", f"{e2e_s:.6g} s", f"near {took_s:.6g} s, as its stamps say", FIX)
    times = None
    if ttft_s is not None and metrics.has("inter_chunk_latency"):
        gaps, unit = figure("inter_chunk_latency"), metrics.inner("inter_chunk_latency").text("unit", _PER_S)
        if not isinstance(gaps, list):
            raise UserError(f"{place}: inter_chunk_latency", shortened(gaps), "a list of times", FIX)
        times = list(accumulate(
            (number(place, "inter_chunk_latency", gap) / _PER_S[unit] for gap in gaps), initial=ttft_s
        ))  # fmt: skip
        if e2e_s is not None and not 0.5 * e2e_s - 0.01 <= times[-1] <= 1.05 * e2e_s + _SLACK_S:
            told = f"{times[-1]:.6g} s with the time to first token"
            raise UserError(f"{place}: inter_chunk_latency", told, f"about request_latency, {e2e_s:.6g} s", FIX)
        second_s = seconds("time_to_second_token")
        if second_s is not None and len(times) > 1:
            check_same(place, "time_to_second_token in ms", 1e3 * second_s, 1e3 * (times[1] - times[0]), 0.05, 1.0)
    decoded_s = seconds("decode_duration")
    if decoded_s is not None and ttft_s is not None and e2e_s is not None:
        check_same(place, "decode_duration in ms", 1e3 * decoded_s, 1e3 * (e2e_s - ttft_s), 0.05, 1.0)
    each_s = seconds("inter_token_latency")
    if each_s:
        check_same(place, "output_token_throughput_per_user", figure("output_token_throughput_per_user"), 1.0 / each_s)
    counted_here = tokens("output_sequence_length") if metrics.has("output_sequence_length") else 0
    if each_s is not None and ttft_s is not None and e2e_s is not None and counted_here > 1:
        ours_s = (e2e_s - ttft_s) / (counted_here - 1)
        if not close_to(each_s, ours_s, 0.05, 1e-3):
            told = f"{each_s:.6g} s"
            raise UserError(f"{place}: inter_token_latency", told, f"about {ours_s:.6g} s, by its other times", FIX)
    return Row(place, arrival_s, prompt, output, ttft_s, e2e_s, token_s=times, warm_up=warm_up)
