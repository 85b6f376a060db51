"""`vllm bench serve --save-result --save-detailed`: one JSON object, or one in each line with --append-result.

Lists with one entry for each request: input_lens, output_lens, ttfts and itls (s), start_times (s, one monotonic clock;
missing before vLLM 0.10) and errors ("" for an answer). The layout is that of vllm/benchmarks/serve.py and
vllm/benchmarks/lib/endpoint_request_func.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.record import (
    FIX,
    Begins,
    RequestLog,
    Row,
    check_same,
    close_to,
    gathered,
    not_read,
    number,
    reason,
    whole,
)
from helios_sim.untrusted import Fields, shortened

NAME = "vllm bench serve"
_LISTS = ("input_lens", "output_lens", "ttfts", "itls", "errors")
_DETAILED = "run vllm bench serve with --save-result --save-detailed"
_OF_NO_MATTER = (  # summaries of the lists, labels, and what the lists show themselves
    "date", "endpoint_type", "backend", "label", "tokenizer_id", "num_prompts", "burstiness", "request_throughput",
    "request_goodput", "output_throughput", "total_token_throughput", "generated_texts", "queue_times",
    "max_output_tokens_per_s", "max_concurrent_requests", "rtfx", "rps_change_events", "ramp_up_strategy",
    "ramp_up_start_rps", "ramp_up_end_rps", "model_id", "request_rate", "max_concurrency", "request_goodput:",
)  # fmt: skip
_STATISTICS = ("mean_", "median_", "std_", "p")  # of ttft, tpot, itl, e2el, in ms
_OF_STATISTICS = ("ttft_ms", "tpot_ms", "itl_ms", "e2el_ms", "client_queue_time_ms", "e2el_including_client_queue_ms")
_STATISTIC = re.compile(r"(mean|median|std|p(?:100|\d\d?)(?:\.\d+)?)_(ttft|tpot|itl|e2el)_ms")
_SPECULATIVE = "speculative decoding was on: several tokens an iteration, which the simulation does not have"
_EFFECTS = {
    "spec_decode_acceptance_rate": _SPECULATIVE,
    "probe_completed": "probes were sent beside the requests and are not in the lists, so the engine had more to do",
}
_PARTS_OF = ("spec_decode_", "probe_")  # of which one name is told


def is_it(document: Document) -> bool:
    return document.begins_with(b"{") and document.names("tokenizer_id", "num_prompts")


def read(document: Document, part: int | None = None) -> RequestLog:
    """`part`: which of several runs in one file, from 1. UserError where it has no lists, or contradicts itself."""
    runs = document.objects()
    run = runs[document.chosen(part, [_told(run) for run in runs], "runs")]
    where = document.name
    fields = Fields(run, where, FIX)
    missing = [name for name in _LISTS if not isinstance(run.get(name), list)]
    if missing:
        if any(str(name).startswith("diffusion_") for name in run):
            raise UserError(where, "diffusion decoding", "a model that writes token by token", "take another log")
        raise UserError(f"{where}: {missing[0]}", shortened(run.get(missing[0])), "a list of all requests", _DETAILED)
    lists: dict[str, list[Any]] = {name: fields.value(name) for name in _LISTS}
    for name in ("start_times", "latencies"):
        if fields.has(name):
            lists[name] = fields.value(name)
    count = len(lists["ttfts"])
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != count:
            told = f"{len(values)} entries" if isinstance(values, list) else shortened(values)
            raise UserError(f"{where}: {name}", told, f"a list of {count}, as ttfts has", FIX)
    rows = [_row(where, lists, i) for i in range(count)]
    _check_totals(where, fields, rows)
    fields.ignore([*_OF_NO_MATTER, "duration", *(name for name in run if _is_statistic(name))])
    left = [name for name in (*fields.rest, *fields.off) if name in _EFFECTS or not str(name).startswith(_PARTS_OF)]
    notices = not_read(where, left, _EFFECTS)
    asked = run.get("num_prompts")
    if asked != count:
        notices.append(f"{where}: num_prompts is {shortened(asked)}, and its lists have {count} requests, which count.")
    most = run.get("max_concurrency")
    stated = {"model": run.get("model_id"), "in_flight_at_most": most, "request_rate": run.get("request_rate")}
    log = gathered(document.source, NAME, rows, Begins.SENT, stated, notices)
    _check_means(where, fields, rows)
    return log


def _told(run: Mapping[str, Any]) -> str:
    return f"{shortened(run.get('model_id'))} at {run.get('request_rate')} requests/s, {run.get('date')}"


def _is_statistic(name: object) -> bool:
    return str(name).startswith(_STATISTICS) and str(name).endswith(_OF_STATISTICS)


def _row(where: str, lists: Mapping[str, Sequence[Any]], i: int) -> Row:
    place = f"{where}, request {i + 1}"
    starts = lists.get("start_times")
    arrival_s = None if starts is None else number(place, "start_times", starts[i])
    prompt, output = (whole(place, name, lists[name][i]) for name in ("input_lens", "output_lens"))
    error = lists["errors"][i]
    if not isinstance(error, str):
        raise UserError(f"{place}: errors", shortened(error), 'a text, "" for an answer', FIX)
    if error or output == 0:
        return Row(place, arrival_s, prompt, output, failure=reason(error, "no answer, and no reason is given"))
    ttft_s = number(place, "ttfts", lists["ttfts"][i])
    if ttft_s == 0.0:
        raise UserError(f"{place}: ttfts", 0.0, "above 0 in an answered request: its first token was not timed", FIX)
    gaps = lists["itls"][i]
    if not isinstance(gaps, list):
        raise UserError(f"{place}: itls", shortened(gaps), "a list of seconds", FIX)
    times = list(accumulate((number(place, "itls", gap) for gap in gaps), initial=ttft_s))
    if "latencies" in lists:
        latency_s = number(place, "latencies", lists["latencies"][i])
        if not close_to(latency_s, times[-1], 0.01, 0.01):
            told = f"{latency_s:.6g} s"
            raise UserError(f"{place}: latencies", told, f"ttfts and itls together, {times[-1]:.6g} s", FIX)
    return Row(place, arrival_s, prompt, output, ttft_s, times[-1], token_s=times)


def _check_means(where: str, fields: Fields, rows: Sequence[Row]) -> None:
    """UserError where the run's own figures are not those of its requests, such as lists in milliseconds."""
    done = [(row, row.ttft_s, row.e2e_s, row.token_s) for row in rows
            if row.failure is None and row.ttft_s is not None and row.e2e_s is not None and row.token_s]  # fmt: skip
    if any(row.output_tokens == 0 for row in rows) and len(done) != fields.value("completed", None):
        return  # of some it is not known whether they count
    times = {
        "ttft": [ttft_s for _, ttft_s, _, _ in done], "e2el": [e2e_s for _, _, e2e_s, _ in done],
        "tpot": [(e2e_s - ttft_s) / (row.output_tokens - 1) for row, ttft_s, e2e_s, _ in done if row.output_tokens > 1],
        "itl": [after - before for *_, token_s in done for before, after in pairwise(token_s)],
    }  # fmt: skip
    for statistic in fields.values:
        found = _STATISTIC.fullmatch(str(statistic))
        if found is not None and (values := times[found[2]]):
            ours_ms = 1e3 * _figure(found[1], values)
            check_same(where, statistic, fields.value(statistic, None), ours_ms, 0.05, 1.0, "lists say in seconds")
    duration_s = fields.number("duration", 0, 1e9, 0.0)
    output = sum(row.output_tokens for row, *_ in done)
    totals = {
        "request_throughput": len(done), "output_throughput": output,
        "total_token_throughput": output + sum(row.prompt_tokens for row, *_ in done),
    }  # fmt: skip
    for name, total in totals.items() if duration_s > 0 else ():
        if fields.has(name) and not close_to(said := fields.number(name, 0, 1e12), total / duration_s, 0.02, 1e-3):
            raise UserError(f"{where}: {name}", said, f"{total / duration_s:.6g}, by its duration", FIX)


def _figure(name: str, values: Sequence[float]) -> float:
    """mean, median, std, or a percentile such as p99 and p99.9, as numpy has them."""
    if name.startswith("p"):
        return float(np.percentile(values, float(name[1:])))
    return float(np.mean(values) if name == "mean" else np.median(values) if name == "median" else np.std(values))


def _check_totals(where: str, fields: Fields, rows: Sequence[Row]) -> None:
    """UserError where the run's own totals are not those of its requests."""
    done = [row for row in rows if row.failure is None]
    totals = {
        "completed": len(done), "failed": len(rows) - len(done),
        "total_input_tokens": sum(row.prompt_tokens for row in done),
        "total_output_tokens": sum(row.output_tokens for row in done),
    }  # fmt: skip
    for name, ours in totals.items():
        if fields.has(name) and fields.integer(name, 0, 1 << 62) != ours:
            raise UserError(f"{where}: {name}", fields.value(name), f"{ours}, as its lists add up to", FIX)
    ends = [row.arrival_s + row.e2e_s for row in done if row.arrival_s is not None and row.e2e_s is not None]
    starts = [row.arrival_s for row in rows if row.arrival_s is not None]
    if fields.has("duration") and ends:
        duration_s, span_s = fields.number("duration", 0, 1e9), max(ends) - min(starts)
        if span_s > 1.02 * duration_s + 1.0:
            raise UserError(f"{where}: duration", duration_s, f"at least the {span_s:.6g} s that requests took", FIX)
