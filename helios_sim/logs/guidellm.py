"""guidellm's report (`--output kind=json` or yaml), as 0.8 writes it: benchmarks, with requests by how they ended.

Times of a request are in `info.timings` (s since 1970); tokens are those that the server counted, where it told them.
The last token, not the end of the stream, ends a request here. Single tokens have no times.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.figures import (
    FEWER_CHUNKS,
    MORE_CHUNKS,
    Figure,
    Known,
    Look,
    Ours,
    exactly,
    server_counted,
    statistic,
)
from helios_sim.logs.record import FIX, Begins, RequestLog, Row, counted, gathered, number, only_once, reason, whole
from helios_sim.request import LONGEST
from helios_sim.untrusted import Fields, shortened

SCHEMA = 2  # schema version of the report
_APART_S = 60.0  # longest time between a request and the measured span, which warm-up and cool-down shorten
_AS_IT_CAN = ("synchronous", "concurrent", "throughput")  # strategies without planned times
_ENDS = ("successful", "incomplete", "errored")
_EFFECTS = {
    "cached_tokens": "how much of prompts the prefix cache served, which is computed anew here",
    "image_tokens": "prompts had images, which are counted as text",
    "audio_tokens": "prompts had audio, which is counted as text",
    "video_tokens": "prompts had video, which is counted as text",
}
_DELAYS = "{count} of {all} delays since a request was planned are not those of its timings: {said} s and not {ours}"
_BY_TIMINGS, _BY_REQUESTS = "as its timings say", "as its requests say"


@dataclass(frozen=True, slots=True)
class _One:
    """An answered request, times in seconds since 1970."""

    start_s: float
    first_s: float | None
    last_s: float | None
    end_s: float | None
    prompt: int
    output: int
    output_first_s: float | None = None
    chunks: int | None = None  # chunks with tokens; None if nothing was streamed
    planned_s: float | None = None

    @property
    def took_s(self) -> float | None:
        return None if self.end_s is None else self.end_s - self.start_s

    @property
    def written_s(self) -> float | None:
        """Seconds to the last token, or to the end if that is not known."""
        last_s = self.end_s if self.last_s is None else self.last_s
        return None if last_s is None else last_s - self.start_s

    def rate(self, tokens: int) -> float | None:
        return tokens / self.took_s if self.took_s and self.output else None

    @property
    def gap_s(self) -> float | None:
        known = self.first_s is not None and self.last_s is not None and self.output > 1
        return (self.last_s - self.first_s) / (self.output - 1) if known else None  # type: ignore[operator]


def _ms(time_s: float | None) -> float | None:
    return None if time_s is None else 1e3 * time_s


_KNOWN = Known(
    read=r"request_id|info\.(status|error|turn_index|history_len)|prompt_tokens|output_tokens"
         r"|info\.timings\.(targeted_start|request_(start|end)|(first|last)_token_iteration)",
    figures=(
        exactly("total_tokens", lambda one, _: one.prompt + one.output if one.output else None, "the sum of both"),
        exactly(r"input_metrics\.total_tokens", lambda one, _: one.prompt, "as prompt_tokens says"),
        exactly(r"output_metrics\.total_tokens", lambda one, _: one.output or None, "as output_tokens says"),
        exactly(r"request_start_time|info\.started_at", lambda one, _: one.start_s, _BY_TIMINGS),
        exactly(r"request_end_time|info\.completed_at", lambda one, _: one.end_s, _BY_TIMINGS),
        Figure("request_latency", lambda one, _: one.took_s, 0.01, 1e-3, _BY_TIMINGS),
        Figure("time_to_first_token_ms", lambda one, _: None if one.first_s is None else _ms(one.first_s - one.start_s),
               0.01, 0.1, _BY_TIMINGS),
        Figure("time_to_first_output_token_ms", lambda one, _: None if one.output_first_s is None
               else _ms(one.output_first_s - one.start_s), 0.01, 0.1, _BY_TIMINGS),
        Figure("inter_token_latency_ms", lambda one, _: _ms(one.gap_s), by=_BY_TIMINGS),
        Figure("time_per_output_token_ms", lambda one, _: None if one.written_s is None or not one.output
               else _ms(one.written_s / one.output), by=_BY_TIMINGS),
        Figure("output_tokens_per_second", lambda one, _: one.rate(one.output), by=_BY_TIMINGS),
        Figure("tokens_per_second", lambda one, _: one.rate(one.prompt + one.output), by=_BY_TIMINGS),
        Figure("output_tokens_per_iteration", lambda one, _: one.output / one.chunks if one.chunks and one.output else
               None, 0.02, 0.01, _BY_TIMINGS),
        Figure("iter_tokens_per_iteration", lambda one, _: (one.output - 1) / (one.chunks - 1)
               if one.chunks and one.chunks > 1 and one.output > 1 else None, 0.02, 0.01, _BY_TIMINGS),
        Figure(r"info\.timings\.token_iterations", lambda one, _: (0.0, one.output + 2.0), 0.0, told=MORE_CHUNKS),
        Figure(r"info\.timings\.token_iterations", lambda one, _: (one.output / 1.5 - 2.0, math.inf), 0.0,
               told=FEWER_CHUNKS),
        Figure("request_dispatch_delay", lambda one, _: None if one.planned_s is None else one.start_s - one.planned_s,
               0.05, told=_DELAYS, zero=True),
        Figure("request_scheduled_latency", lambda one, _: None if one.planned_s is None or one.end_s is None
               else one.end_s - one.planned_s, 0.05, told=_DELAYS, zero=True),
        server_counted(r"input_metrics\.text_tokens", "prompt tokens", lambda one, _: one.prompt),
        server_counted(r"output_metrics\.text_tokens", "output tokens", lambda one, _: one.output),
    ),
    effects={rf"(input_metrics\.)?{name}": why for name, why in _EFFECTS.items()},
    harmless=r"type_|request_args|response_(id|metrics)|output|reasoning_output"
             r"|turn_\w+_delay|time_to_last_round_trip_ms|avg_round_trip_time_ms"
             r"|info\.(request_id|conversation_id|preceding_nodes|node_id|agent_id|parent_node_ids|traceback|settings"
             r"|scheduler_(node_id|process_id|start_time))"
             r"|info\.timings\.(predecessor_completed|queued|dequeued|scheduled_at|resolve_(start|end)"
             r"|(first|last)_request_iteration|first_output_token_iteration|request_iterations|finalized"
             r"|last_request_sent|(request_sent|token_received)_(sum|count))"
             r"|(in|out)put_metrics\.\w+_(words|characters|count|pixels|bytes|frames|seconds|samples)"
             r"|output_metrics\.(?!text|total)\w+_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Run:
    """One benchmark of a report."""

    ones: Sequence[_One]  # answered requests
    span: tuple[float, float] | None  # the measured span, in seconds since 1970
    listed: int  # requests in the report
    kept: dict[str, tuple[NDArray[np.float64], NDArray[np.float64]]] = field(default_factory=dict)  # by metric


def _of_requests(run: _Run, match: re.Match[str]) -> Ours:
    """A statistic of all answers as guidellm computes it, with missing values as 0."""
    name, figure = match[1], match[2].removeprefix("percentiles.")
    if name not in run.kept:
        values = [value or 0.0 for value in (_VALUES[name](one) for one in run.ones)]
        weights = [_WEIGHTS[name](one) if name in _WEIGHTS else 1.0 for one in run.ones]
        run.kept[name] = np.array(values, np.float64), np.array(weights, np.float64)
    return statistic(figure, *run.kept[name])


def _token_rate(run: _Run, match: re.Match[str]) -> Ours:
    """Tokens per second between the first and the last event. A prompt counts at the first token."""
    begins, ends = [one.first_s for one in run.ones], [one.last_s for one in run.ones]
    times = [time_s for time_s in (*begins, *(() if match[1] == "prompt_tokens" else ends)) if time_s is not None]
    if None in (*begins, *ends) or len(run.ones) < 2 or max(times) <= min(times):
        return None
    prompt, output = sum(one.prompt for one in run.ones), sum(one.output for one in run.ones)
    tokens = {"prompt_tokens": prompt, "output_tokens": output, "tokens": prompt + output}[match[1]]
    return float(tokens / (max(times) - min(times)))


def _request_rate(run: _Run, _: re.Match[str]) -> Ours:
    """The range of completions per second of the measured span; those just outside may count or not."""
    if run.span is None or run.span[1] <= run.span[0] or len(run.ones) < 2:
        return None
    ends = [one.end_s for one in run.ones if one.end_s is not None]
    inside = sum(run.span[0] + 1e-3 <= time_s <= run.span[1] - 1e-3 for time_s in ends)
    took_s = run.span[1] - run.span[0]
    return inside / took_s, len(run.ones) / took_s


def _at_once(run: _Run, _: re.Match[str]) -> Ours:
    """The mean number of requests at once over the measured span."""
    if run.span is None or run.span[1] <= run.span[0]:
        return None
    begin_s, end_s = run.span
    held_s = sum(max(min(one.end_s, end_s) - max(one.start_s, begin_s), 0.0) for one in run.ones if one.end_s)
    return held_s / (end_s - begin_s)


_VALUES: dict[str, Callable[[_One], float | None]] = {
    "request_latency": lambda one: one.took_s,
    "time_to_first_token_ms": lambda one: None if one.first_s is None else _ms(one.first_s - one.start_s),
    "time_to_first_output_token_ms": lambda one: None if one.output_first_s is None
    else _ms(one.output_first_s - one.start_s),
    "time_per_output_token_ms": lambda one: None if one.written_s is None or not one.output
    else _ms(one.written_s / one.output),
    "inter_token_latency_ms": lambda one: _ms(one.gap_s),
    "prompt_token_count": lambda one: one.prompt,
    "output_token_count": lambda one: one.output,
    "total_token_count": lambda one: one.prompt + one.output,
}  # fmt: skip
_WEIGHTS: dict[str, Callable[[_One], float]] = {
    "time_per_output_token_ms": lambda one: one.output, "inter_token_latency_ms": lambda one: (one.output or 1) - 1,
}  # fmt: skip
_FIGURE = r"(mean|median|variance|std_dev|min|max|count|total_sum|percentiles\.p\d+)"
_STATISTICS = Known(
    read=r"request_totals\.(successful|incomplete|errored)",
    figures=(
        Figure(rf"({'|'.join(_VALUES)})\.successful\.{_FIGURE}", _of_requests, 0.05, 5e-4, _BY_REQUESTS),
        Figure(r"(prompt_tokens|output_tokens|tokens)_per_second\.successful\.mean", _token_rate, by=_BY_REQUESTS),
        exactly(r"request_totals\.total", lambda run, _: run.listed, "as its requests add up to"),
        Figure(r"requests_per_second\.successful\.mean", _request_rate, 0.05, 1e-3, _BY_REQUESTS),
        Figure(r"request_concurrency\.successful\.mean", _at_once, 0.1, 0.1, _BY_REQUESTS),
    ),
    # of rates it weighs times between events, so that medians and percentiles say little
    harmless=r"\w+\.(total|incomplete|errored)|\w+\.successful\.(mode|pdf)"
             r"|((requests|prompt_tokens|output_tokens|tokens)_per_second|request_concurrency)\.successful\.(?!mean).*"
             r"|request_streaming_iterations_count(\..*)?|\w+_tokens_per_iteration(\..*)?"
             r"|time_to_last_round_trip_ms(\..*)?|avg_round_trip_time_ms(\..*)?|turn_\w+_delay(\..*)?"
             r"|request_(dispatch_delay|scheduled_latency)(\..*)?|(text|image|video|audio|tool_call)(\..*)?",
)  # fmt: skip


_OF_BENCHMARK = Known(
    read="requests|metrics|start_time|end_time|warmup_duration|cooldown_duration",
    figures=(
        exactly("duration", lambda span, _: max(span[1] - span[0], 0.0), "as start_time and end_time say"),
        exactly(r"scheduler_metrics\.measure_start_time", lambda span, _: span[0], "as start_time says"),
        exactly(r"scheduler_metrics\.measure_end_time", lambda span, _: span[1], "as end_time says"),
    ),
    harmless=r"type_|config(\..*)?|scheduler_state(\..*)?|scheduler_metrics\.\w*(avg|made|start_time|end_time).*",
)  # fmt: skip


DECLARED = (("benchmarks.*.requests.*.*.", _KNOWN), ("benchmarks.*.metrics.", _STATISTICS),
            ("benchmarks.*.", _OF_BENCHMARK))  # fmt: skip


def is_it(document: Document) -> bool:
    if document.begins_with(b"{"):
        return document.names("guidellm_version")
    named = document.path.name.removesuffix(".gz").endswith((".yaml", ".yml"))
    # its keys in the order of guidellm, or in any other
    return document.begins_with(b"benchmarks:\n") or (named and b"guidellm_version:" in document.head)


def read(document: Document, part: int | None = None) -> RequestLog:
    """Read a report. `part` chooses a benchmark of several, such as of a sweep of rates, from 1."""
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
    config = benchmark.inner("config", {})
    backend, strategy = config.inner("backend", {}), config.inner("strategy", {})
    is_planned = strategy.value("type_", None) not in _AS_IT_CAN
    rows: list[Row] = []
    answered: list[_One] = []
    ids, look, turns = dict[str, str](), Look(where, _KNOWN), 0
    for end in _ENDS:
        listed = requests.value(end, [])
        if not isinstance(listed, list):
            raise UserError(f"{where}: requests.{end}", shortened(listed), "a list of requests", FIX)
        for i, one in enumerate(listed, 1):
            row, facts = _row(f"{where}, {end} request {i}", one, end)
            look.at(row.place, one, facts)
            row.planned_s = row.planned_s if is_planned else None
            rows.append(row)
            answered += [] if facts is None else [facts]
            only_once(row.place, "request_id", one.get("request_id"), ids)
            turns += facts is not None and bool(one["info"].get("turn_index") or one["info"].get("history_len"))
    _check_whole(where, benchmark, requests)
    statistics, whole_run = Look(f"{where}, metrics", _STATISTICS), Look(where, _OF_BENCHMARK)
    span = _check_span(where, benchmark, rows)
    statistics.at(f"{where}, metrics", benchmark.inner("metrics", {}).values, _Run(answered, span, len(rows)))
    whole_run.at(where, benchmark.values, span)
    notices = [*look.notices(), *statistics.notices(), *whole_run.notices()]
    if turns:
        notices.append(f"{where}: {turns} requests continue a conversation: what its turns share is computed anew for "
                       "each.")  # fmt: skip
    for name, end, phase in (("warmup_duration", "first", "warm-up"), ("cooldown_duration", "last", "cool-down")):
        duration_s = benchmark.number(name, -1e9, 1e9, 0.0)
        if duration_s > 0:
            notices.append(f"{where}: requests of its {end} {duration_s:.3g} s ({phase}) are not in the report, "
                           "so the engine had more to do then.")  # fmt: skip
    stated = {
        "model": backend.value("model", None), "strategy": strategy.value("type_", None),
        "in_flight_at_most": strategy.value("streams", strategy.value("max_concurrency", None)),
        "request_rate": strategy.value("rate", None),
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


def _row(place: str, request: Any, end: str) -> tuple[Row, _One | None]:
    if not isinstance(request, dict):
        raise UserError(place, shortened(request), "a request", FIX)
    fields = Fields(request, place, FIX)
    info = fields.inner("info")
    timings = info.inner("timings")

    def time_s(name: str) -> float | None:
        value = timings.value(name, None)
        return None if value is None else number(place, f"timings.{name}", value)

    start_s, planned_s = time_s("request_start"), time_s("targeted_start")
    delay_s = fields.maybe("request_dispatch_delay", -1e9, 1e9)
    if planned_s is None and start_s is not None and delay_s is not None:
        planned_s = start_s - delay_s
    lengths = [fields.value(name, None) for name in ("prompt_tokens", "output_tokens")]
    if end != "successful":
        why = reason(info.value("error", None), f"the run ended before it did ({info.value('status', end)})")
        prompt, output = (whole(place, "tokens", length or 0) for length in lengths)
        return Row(place, start_s, prompt, output, failure=why, planned_s=planned_s), None
    prompt, output = (counted(place, n, v) for n, v in zip(("prompt_tokens", "output_tokens"), lengths, strict=True))
    if start_s is None:
        raise UserError(f"{place}: timings.request_start", None, "a time in a request that was answered", FIX)
    first_s, last_s, end_s = (time_s(n) for n in ("first_token_iteration", "last_token_iteration", "request_end"))
    ttft_s = None if first_s is None else first_s - start_s
    e2e_s = None if (ended_s := end_s if last_s is None else last_s) is None else ended_s - start_s
    status, error = info.value("status", None), info.value("error", None)
    if status in ("errored", "cancelled") or error:
        told = shortened(error or status)
        raise UserError(f"{place}: info", told, "completed, and no error, as requests.successful says", FIX)
    facts = _One(start_s, first_s, last_s, end_s, prompt, output, time_s("first_output_token_iteration"),
                 timings.integer("token_iterations", 0, LONGEST, 0) or None, planned_s)  # fmt: skip
    return Row(place, start_s, prompt, output, ttft_s, e2e_s, planned_s=planned_s), facts


def _check_span(where: str, benchmark: Fields, rows: Sequence[Row]) -> tuple[float, float] | None:
    """When the run began and ended; None: it is not said. Raises UserError for answered requests far outside."""
    begin_s, end_s = (benchmark.value(name, None) for name in ("start_time", "end_time"))
    if begin_s is None or end_s is None:
        return None
    begin_s, end_s = (number(where, f"{n}_time", t) for n, t in (("start", begin_s), ("end", end_s)))
    for row in rows:
        sent_s = row.arrival_s
        if row.failure is not None or sent_s is None:
            continue
        if sent_s > end_s + _APART_S or sent_s + (row.e2e_s or 0.0) < begin_s - _APART_S:
            allowed = f"within the run, {begin_s:.3f} to {end_s:.3f}, as its start_time and end_time say"
            raise UserError(f"{row.place}: timings.request_start", sent_s, allowed, FIX)
    return begin_s, end_s


def _check_whole(where: str, benchmark: Fields, requests: Fields) -> None:
    """Raise UserError if the report lists a sample of its requests only."""
    totals = benchmark.inner("metrics", {}).inner("request_totals", {})
    for end in _ENDS:
        served, listed = totals.value(end, None), len(requests.value(end, []))
        if served is not None and (count := whole(where, f"request_totals.{end}", served)) != listed:
            fix = "run guidellm without a limit of sampled requests (--metrics), or take another log"
            fix = "take each report as guidellm wrote it: lists were joined" if listed > count else fix
            raise UserError(f"{where}: requests.{end}", f"{listed} requests", f"all {served} of the run", fix)
