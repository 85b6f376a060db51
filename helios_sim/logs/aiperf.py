"""aiperf's `profile_export.jsonl` (--export-level records), as 0.13 writes it: a request in each line.

`metadata` has its times (ns since 1970), `metrics` figures by name, each with its unit, and `error` is there where it
failed. The layout is that of aiperf/common/models/record_models.py (MetricRecordInfo).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.figures import TOTALS, Figure, Known, Look, Ours, exactly, server_counted
from helios_sim.logs.record import (
    FIX,
    Begins,
    RequestLog,
    Row,
    counted,
    gathered,
    number,
    only_once,
    reason,
    stamp_ns,
    whole,
)
from helios_sim.request import NS_PER_S
from helios_sim.untrusted import Fields, shortened

NAME = "aiperf records"
_PER_S = {"ns": 1e9, "us": 1e6, "ms": 1e3, "sec": 1.0, "s": 1.0}
_OF_A_RUN = ("benchmark_phase", "session_num", "turn_index", "agent_depth", "source_id")  # once in each
_SLACK_S = 0.1  # allowed difference between figures of a request and its stamps, which come from two clocks
_OF_HTTP = "{count} of {all} requests took {said} by their HTTP times, and {ours} by request_latency, which counts"
_BY = "as its other metrics say"


@dataclass(frozen=True, slots=True)
class _Said:
    """The metrics of an answered request, times in seconds."""

    by_name: Mapping[str, float]
    gaps_s: Sequence[float]

    def of(self, *names: str) -> tuple[float, ...] | None:
        """The metrics; None if some are missing."""
        known = [self.by_name[name] for name in names if name in self.by_name]
        return tuple(known) if len(known) == len(names) else None


def _ratio(above: str, below: str) -> Callable[[_Said, re.Match[str]], float | None]:
    def found(said: _Said, _: re.Match[str]) -> float | None:
        both = said.of(above, below)
        return None if both is None or both[1] <= 0 else both[0] / both[1]

    return found


def _difference(above: str, below: str) -> Callable[[_Said, re.Match[str]], Ours]:
    def found(said: _Said, _: re.Match[str]) -> Ours:
        both = said.of(above, below)
        return None if both is None else both[0] - both[1]

    return found


def _between_tokens(said: _Said, _: re.Match[str]) -> Ours:
    both, tokens = said.of("request_latency", "time_to_first_token"), said.by_name.get("output_sequence_length", 0.0)
    return (both[0] - both[1]) / (tokens - 1) if both is not None and tokens > 1 else None


def _of_usage(said: _Said, _: re.Match[str]) -> Ours:
    both = said.of("usage_prompt_tokens", "usage_completion_tokens")
    return None if both is None else sum(both)


def _of_counts(said: _Said, match: re.Match[str]) -> Ours:
    """The difference between the server's and the client's count in per cent."""
    client = {"prompt": "input_sequence_length", "completion": "output_sequence_length"}[match[1]]
    both = said.of(f"usage_{match[1]}_tokens", client)
    return None if both is None or not both[1] else 100 * abs(both[0] - both[1]) / both[1]


def _first_output(said: _Said, _: re.Match[str]) -> Ours:
    both = said.of("time_to_first_token", "request_latency")
    return None if both is None else (both[0], both[1])


def _sum(*names: str) -> Callable[[_Said, re.Match[str]], Ours]:
    """The sum of those that are given; None if none is."""
    return lambda said, _: sum(said.by_name.get(name, 0.0) for name in names) if said.of(names[0]) else None


_SETUP = ("http_req_blocked", "http_req_dns_lookup", "http_req_connecting")
_HTTP = ("http_req_waiting", "http_req_sending", "http_req_receiving")
_SPECULATIVE = "speculative decoding was on: several tokens an iteration, which the simulation lacks"
_RECORD = Known(
    read=r"metadata\.(x_request_id|turn_index|request_(start|end)_ns|benchmark_phase|was_cancelled|credit_issued_ns"
         r"|source_id|endpoint_url)|error(\..*)?|metrics",
    effects={"spec_decode_acceptance": _SPECULATIVE},
    harmless=r"trace_data(\..*)?|metadata\.(session_num|agent_depth|x_correlation_id|conversation_id|request_ack_ns|worker_id"
             r"|record_processor_id|cancellation_time_ns|context_overflow_skip)",
)  # fmt: skip
_METRICS = Known(
    read="time_to_first_token|request_latency|inter_chunk_latency|usage_(prompt|completion)_tokens|error_isl",
    figures=(
        Figure("time_to_second_token", lambda said, _: said.gaps_s[0] if said.gaps_s else None, 0.05, 1e-4, _BY),
        Figure("decode_duration", _difference("request_latency", "time_to_first_token"), 0.05, 1e-4, _BY),
        Figure("inter_token_latency", _between_tokens, 0.05, 1e-4, "by its other times"),
        Figure("output_token_throughput_per_user", lambda said, _: None if not (
            each_s := said.by_name.get("inter_token_latency")) else 1.0 / each_s, by=_BY),
        Figure("prefill_throughput(_per_user)?", _ratio("input_sequence_length", "time_to_first_token"), by=_BY),
        Figure("stream_prefill_latency", _difference("time_to_first_token", "stream_setup_latency"), 0.05, 1e-4, _BY),
        Figure("time_to_first_output_token", _first_output, 0.05, 1e-4, _BY),
        Figure("thinking_efficiency", _ratio("reasoning_token_count", "output_token_count"), 0.05, 0.01, _BY),
        Figure("http_req_total", _sum(*_HTTP, *_SETUP), 0.05, 1e-4, _BY),
        Figure("http_req_duration", _sum(*_HTTP), 0.05, 1e-4, _BY),
        Figure("http_req_(total|duration)", lambda said, _: None if (took := said.of("request_latency")) is None
               else (took[0] / 10 - 0.1, 10 * took[0] + 0.1), 0.0, 0.0, told=_OF_HTTP),
        exactly("output_token_count", lambda said, _: None if "output_sequence_length" not in said.by_name else
                said.by_name["output_sequence_length"] - said.by_name.get("reasoning_token_count", 0.0),
                "output_sequence_length without reasoning"),
        server_counted("input_sequence_length", "prompt tokens",
                       lambda said, _: said.by_name.get("usage_prompt_tokens")),
        server_counted("output_sequence_length", "output tokens",
                       lambda said, _: said.by_name.get("usage_completion_tokens")),
        Figure("usage_(prompt|completion)_tokens_diff_pct", _of_counts, 0.05, 0.1, _BY),
        Figure("osl_mismatch_diff_pct", lambda said, match: None if not (
            ratio := _ratio("output_sequence_length", "requested_osl")(said, match)
        ) else 100 * (ratio - 1), 0.05, 0.1, _BY),
        Figure("usage_reasoning_tokens", lambda said, _: None if (whole := said.of("usage_completion_tokens")) is None
               else (0.0, whole[0]), 0.0, 0.5, "as usage_completion_tokens says"),
        Figure("usage_total_tokens", _of_usage, 0.0, 0.5, told=TOTALS),
    ),
    effects={
        "usage_prompt_cache_read_tokens": "what of the prompt the prefix cache served is computed anew here",
        "spec_decode_acceptance": _SPECULATIVE,
        "image_latency": "prompts had images", "video_inference_time": "prompts had video",
    },
    harmless=r"reasoning_token_count|stream_setup_latency|osl_mismatch_count|requested_osl"
             r"|usage_reasoning_tokens_diff_pct|http_req_\w+|(min|max)_\w+_timestamp|(\w+_)?request_count"
             r"|good_request_fraction|replay_\w+|accuracy\w*|streamed_request",
)  # fmt: skip


DECLARED = (("*.metrics.", _METRICS), ("*.", _RECORD))  # by where the mapping stands


def is_it(document: Document) -> bool:
    return document.begins_with(b"{") and document.names("metadata", "request_start_ns", "benchmark_phase")


def read(document: Document, part: int | None = None) -> RequestLog:
    """Read a log. Raises UserError for a line that is no record of aiperf, or contradicts itself."""
    document.chosen(part or 1, ["the file"], "runs")
    rows, turns = [], 0
    records, figures = Look(document.name, _RECORD), Look(document.name, _METRICS, "metrics.")
    ids, servers, sessions = dict[str, str](), dict[str, None](), Counter[tuple[object, ...]]()
    for place, value in document.numbered_objects():
        row = _row(place, Fields(value, place, FIX))
        rows.append(row)
        only_once(place, "metadata.x_request_id", value["metadata"].get("x_request_id"), ids)
        turns += bool(value["metadata"].get("turn_index"))
        sessions[tuple(str(value["metadata"].get(name)) for name in _OF_A_RUN)] += 1
        servers |= dict.fromkeys(filter(None, [str(value["metadata"].get("endpoint_url") or "")]))
        plain, said, units = _plain(value.get("metrics"))
        records.at(place, value)
        figures.at(place, plain, None if row.failure is not None else said, units)
    notices = [*records.notices(), *figures.notices()]
    if len(servers) > 1:
        told = f"{len(servers)} endpoints, {', '.join(list(servers)[:3])}"
        notices.append(f"{document.name}: requests went to {told}: here all go to one server, or to server.replicas.")
    again = sum(count - 1 for count in sessions.values())
    if again:
        notices.append(f"{document.name}: {again} requests have session and turn of another one, as where the records "
                       "of several runs are joined: all are replayed as one run.")  # fmt: skip
    if turns:
        notices.append(f"{document.name}: {turns} requests continue a conversation: what its turns share is computed "
                       "anew for each.")  # fmt: skip
    return gathered(document.source, NAME, rows, Begins.SENT, {}, notices)


def _plain(metrics: object) -> tuple[dict[str, Any], _Said, dict[str, float]]:
    """All metrics by name in their own units; those that are numbers with times in seconds; the units of times."""
    plain, by_name = dict[str, Any](), dict[str, float]()
    units, gaps_s = dict[str, float](), list[float]()
    for name, one in metrics.items() if isinstance(metrics, Mapping) else ():
        plain[name] = value = one.get("value") if isinstance(one, Mapping) else one
        unit = _PER_S.get(str(one.get("unit"))) if isinstance(one, Mapping) else None
        if unit is not None:
            units[name] = unit
        if isinstance(value, int | float) and not isinstance(value, bool):
            by_name[name] = value / (unit or 1.0)
        elif name == "inter_chunk_latency" and isinstance(value, list):
            gaps_s = [gap / (unit or 1.0) for gap in value if isinstance(gap, int | float)]
    return plain, _Said(by_name, gaps_s), units


def _stamp(place: str, about: Fields, name: str) -> int:
    """Nanoseconds since 1970. Tables of Python write them as floats, which are right to 256 ns."""
    value = about.value(name)
    is_whole = isinstance(value, float) and value.is_integer() and 0 <= value < 1 << 62
    return stamp_ns(place, name, int(value) if is_whole else about.integer(name, 0, 1 << 62))


def _row(place: str, record: Fields) -> Row:
    about, metrics = record.inner("metadata"), record.inner("metrics", {})

    def figure(name: str) -> Any:
        return metrics.inner(name).value("value") if metrics.has(name) else None

    def seconds(name: str) -> float | None:
        """A figure with the unit beside it, in seconds."""
        if not metrics.has(name):
            return None
        unit = metrics.inner(name).text("unit", _PER_S)
        return number(place, f"metrics.{name}", figure(name)) / _PER_S[unit]

    def tokens(*names: str) -> int:
        found = next((figure(name) for name in names if metrics.has(name)), None)
        return whole(place, names[0], found or 0) if failed else counted(place, names[-1], found)

    start_ns, end_ns = (_stamp(place, about, name) for name in ("request_start_ns", "request_end_ns"))
    if end_ns < start_ns:
        raise UserError(f"{place}: request_end_ns", end_ns, f"no earlier than request_start_ns, {start_ns}", FIX)
    arrival_s, planned_s = start_ns / NS_PER_S, None
    if about.value("credit_issued_ns", None) is not None:
        planned_s = _stamp(place, about, "credit_issued_ns") / NS_PER_S
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
        return Row(place, arrival_s, prompt, output, failure=why if code is None else f"{code}: {why}", warm_up=warm_up,
                   planned_s=planned_s)  # fmt: skip
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
    return Row(place, arrival_s, prompt, output, ttft_s, e2e_s, token_s=times, warm_up=warm_up, planned_s=planned_s)
