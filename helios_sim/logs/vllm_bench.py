"""`vllm bench serve --save-result --save-detailed`: one JSON object, or one in each line with --append-result.

Lists with one entry for each request: input_lens, output_lens, ttfts and itls (s), start_times (s, one monotonic clock;
missing before vLLM 0.10) and errors ("" for an answer). The layout is that of vllm/benchmarks/serve.py and
vllm/benchmarks/lib/endpoint_request_func.py.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.figures import Figure, Known, Look, Ours, exactly, statistic
from helios_sim.logs.record import FIX, Begins, RequestLog, Row, close_to, gathered, number, reason, whole
from helios_sim.untrusted import Fields, shortened

NAME = "vllm bench serve"
_LISTS = ("input_lens", "output_lens", "ttfts", "itls", "errors")
_COUNTS = ("completed", "failed", "total_input_tokens", "total_output_tokens")
_MOST_SECONDS = 100_000
_DETAILED = "run vllm bench serve with --save-result --save-detailed"
_SPECULATIVE = "speculative decoding was on: several tokens an iteration, which the simulation does not have"
_BY_LISTS, _BY_DURATION = "as its lists say", "by its duration"


@dataclass(frozen=True, slots=True)
class _Run:
    """What the lists of a run say; None if not known of which requests the run's own figures are."""

    rows: Sequence[Row]
    duration_s: float
    times: Mapping[str, NDArray[np.float64]] | None

    @property
    def done(self) -> list[Row]:
        return [row for row in self.rows if row.failure is None]

    def rate(self, total: float) -> float | None:
        return total / self.duration_s if self.times is not None and self.duration_s > 0 else None


def _of_times(run: _Run, name: re.Match[str]) -> Ours:
    found = statistic(name[1], (run.times or {}).get(name[2], ()))
    return None if found is None or isinstance(found, tuple) else 1e3 * found


def _most_tokens(run: _Run, _: re.Match[str]) -> Ours:
    """Chunks in the fullest second, counted from the sending of the first answered request."""
    if run.times is None or any(row.arrival_s is None for row in run.done):
        return None
    first_s = min(row.arrival_s or 0.0 for row in run.done)
    seconds = Counter(
        int((row.arrival_s or 0.0) + time_s - first_s) for row in run.done for time_s in row.token_s or ()
    )
    most = max(seconds.values(), default=0)
    return 0.9 * most - 2, 1.1 * most + 2  # chunks near the end of a second fall into either


def _most_at_once(run: _Run, _: re.Match[str]) -> Ours:
    """The range of requests at once: versions count those at one time, or within one second and the next."""
    spans = [(row.arrival_s, row.arrival_s + row.e2e_s) for row in run.done
             if row.arrival_s is not None and row.e2e_s is not None]  # fmt: skip
    if run.times is None or len(spans) < len(run.done) or not spans:
        return None
    begins, ends = (np.sort(np.array(times)) for times in zip(*spans, strict=True))
    low = int((np.arange(1, len(begins) + 1) - np.searchsorted(ends, begins + 1e-6, "right")).max())
    first_s = begins[0]
    seconds = range(int(ends[-1] - first_s) + 2) if ends[-1] - first_s < _MOST_SECONDS else ()
    high = max((int(np.searchsorted(begins, first_s + s + 1) - np.searchsorted(ends, first_s + s - 1, "right"))
                for s in seconds), default=len(begins))  # fmt: skip
    return float(low), float(high)


def _took(run: _Run, _: re.Match[str]) -> Ours:
    ends = [row.arrival_s + row.e2e_s for row in run.done if row.arrival_s is not None and row.e2e_s is not None]
    starts = [row.arrival_s for row in run.rows if row.arrival_s is not None]
    return ((max(ends) - min(starts) - 1.0) / 1.02, math.inf) if ends else None


def _took_at_most(run: _Run, _: re.Match[str]) -> Ours:
    """The longest plausible time: twice that of the requests plus a minute; None if some failed and have no end."""
    ends = [row.arrival_s + row.e2e_s for row in run.done if row.arrival_s is not None and row.e2e_s is not None]
    starts = [row.arrival_s for row in run.done if row.arrival_s is not None]
    return (0.0, 2 * (max(ends) - min(starts)) + 60.0) if ends and len(ends) == len(run.rows) else None


_LONG = "duration is {said} s, and the requests of its lists took {ours} s with twice the time and a minute"
_STATISTIC = r"(mean|median|std|p(?:100|\d\d?)(?:\.\d+)?)"
_KNOWN = Known(
    read="|".join((*_LISTS, "latencies|start_times|queue_times|model_id|num_prompts|request_rate|max_concurrency")),
    figures=(
        exactly("completed", lambda run, _: len(run.done), _BY_LISTS),
        exactly("failed", lambda run, _: len(run.rows) - len(run.done), _BY_LISTS),
        exactly("total_input_tokens", lambda run, _: sum(row.prompt_tokens for row in run.done), _BY_LISTS),
        exactly("total_output_tokens", lambda run, _: sum(row.output_tokens for row in run.done), _BY_LISTS),
        Figure("duration", _took, 0.0, 0.0, "the time that its requests took"),
        Figure("duration", _took_at_most, 0.0, 0.0, told=_LONG),
        Figure(rf"{_STATISTIC}_(ttft|tpot|itl|e2el|client_queue_time|e2el_including_client_queue)_ms", _of_times, 0.05,
               0.1, f"{_BY_LISTS} in seconds"),
        Figure("request_throughput", lambda run, _: run.rate(len(run.done)), 0.02, 1e-3, _BY_DURATION),
        Figure("output_throughput", lambda run, _: run.rate(sum(row.output_tokens for row in run.done)), 0.02, 1e-3,
               _BY_DURATION),
        Figure("total_token_throughput", lambda run, _: run.rate(
            sum(row.output_tokens + row.prompt_tokens for row in run.done)
        ), 0.02, 1e-3, _BY_DURATION),
        Figure("request_goodput:?", lambda run, _: None if (most := run.rate(len(run.done))) is None else (0.0, most),
               0.02, 1e-3, _BY_DURATION),
        Figure("max_output_tokens_per_s", _most_tokens, 0.0, 0.0, _BY_LISTS),
        Figure("max_concurrent_requests", _most_at_once, 0.0, 1.0, _BY_LISTS),
    ),
    effects={
        r"spec_decode_\w+": _SPECULATIVE,
        r"probe_\w+": "probes were sent besides and are not in the lists, so the engine had more to do",
        "rtfx": "prompts had audio, which is not counted",
    },
    harmless=r"date|endpoint_type|backend|label|tokenizer_id|burstiness|generated_texts|rps_change_events"
             r"|ramp_up_(strategy|start_rps|end_rps)",
)  # fmt: skip


DECLARED = (("", _KNOWN),)  # by the place of the mapping


def is_it(document: Document) -> bool:
    return document.begins_with(b"{") and document.names("tokenizer_id", "num_prompts")


def read(document: Document, part: int | None = None) -> RequestLog:
    """`part`: which of several runs in one file, from 1. Raises UserError if it has no lists, or contradicts itself."""
    runs = document.objects()
    run = runs[document.chosen(part, [_told(run) for run in runs], "runs")]
    where = document.name
    fields = Fields(run, where, FIX)
    missing = [name for name in _LISTS if not isinstance(run.get(name), list)]
    if missing:
        if "total_input_sequences" in run:
            raise UserError(where, "embeddings", "a run of a model that writes tokens", "take another log")
        if any(str(name).startswith("diffusion_") for name in run):
            raise UserError(where, "diffusion decoding", "a model that writes token by token", "take another log")
        fix = "take the file as vllm bench wrote it" if run.get(missing[0]) else _DETAILED
        raise UserError(f"{where}: {missing[0]}", shortened(run.get(missing[0])), "a list of all requests", fix)
    lists: dict[str, list[Any]] = {name: fields.value(name) for name in _LISTS}
    for name in ("start_times", "latencies", "queue_times"):
        if fields.has(name):
            lists[name] = fields.value(name)
    count = len(lists["ttfts"])
    for name, values in lists.items():
        if not isinstance(values, list) or len(values) != count:
            told = f"{len(values)} entries" if isinstance(values, list) else shortened(values)
            raise UserError(f"{where}: {name}", told, f"a list of {count}, as ttfts has", FIX)
    rows = [_row(where, lists, i) for i in range(count)]
    notices = list[str]()
    asked = run.get("num_prompts")
    if asked != count:
        notices.append(f"{where}: num_prompts is {shortened(asked)}, and its lists have {count} requests, which count.")
    most = run.get("max_concurrency")
    stated = {"model": run.get("model_id"), "in_flight_at_most": most, "request_rate": run.get("request_rate")}
    look = Look(where, _KNOWN)
    look.at(where, {name: run[name] for name in _COUNTS if name in run}, _Run(rows, 0.0, None))
    log = gathered(document.source, NAME, rows, Begins.SENT, stated, notices)
    look.at(where, {name: value for name, value in run.items() if name not in _COUNTS}, _of(fields, rows))
    return replace(log, notices=(*log.notices, *look.notices()))


def _told(run: Mapping[str, Any]) -> str:
    return f"{shortened(run.get('model_id'))} at {run.get('request_rate')} requests/s, {run.get('date')}"


def _row(where: str, lists: Mapping[str, Sequence[Any]], i: int) -> Row:
    place = f"{where}, request {i + 1}"
    starts = lists.get("start_times")
    arrival_s = None if starts is None else number(place, "start_times", starts[i])
    planned_s = None
    if arrival_s is not None and "queue_times" in lists:  # the client's wait before it sends
        planned_s = arrival_s - number(place, "queue_times", lists["queue_times"][i])
    prompt, output = (whole(place, name, lists[name][i]) for name in ("input_lens", "output_lens"))
    error = lists["errors"][i]
    if not isinstance(error, str):
        raise UserError(f"{place}: errors", shortened(error), 'a text, "" for an answer', FIX)
    if error or output == 0:
        return Row(place, arrival_s, prompt, output, failure=reason(error, "no answer, and no reason is given"),
                   planned_s=planned_s)  # fmt: skip
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
    return Row(place, arrival_s, prompt, output, ttft_s, times[-1], token_s=times, planned_s=planned_s)


def _of(fields: Fields, rows: Sequence[Row]) -> _Run:
    done = [(row, row.ttft_s, row.e2e_s, row.token_s) for row in rows
            if row.failure is None and row.ttft_s is not None and row.e2e_s is not None and row.token_s]  # fmt: skip
    duration_s = fields.number("duration", 0, 1e9, 0.0)
    if any(row.output_tokens == 0 for row in rows) and len(done) != fields.value("completed", None):
        return _Run(rows, duration_s, None)
    times = {
        "ttft": [ttft_s for _, ttft_s, _, _ in done], "e2el": [e2e_s for _, _, e2e_s, _ in done],
        "tpot": [(e2e_s - ttft_s) / (row.output_tokens - 1) for row, ttft_s, e2e_s, _ in done if row.output_tokens > 1],
        "itl": [after - before for *_, token_s in done for before, after in pairwise(token_s)],
    }  # fmt: skip
    waits = fields.numbers("queue_times", 0.0, 1e9, len(rows)) if fields.has("queue_times") else None
    if waits is not None:
        of_done = [(wait_s, row.e2e_s or 0.0) for wait_s, row in zip(waits, rows, strict=True) if row.failure is None]
        times["client_queue_time"] = [wait_s for wait_s, _ in of_done]
        times["e2el_including_client_queue"] = [wait_s + e2e_s for wait_s, e2e_s in of_done]
    return _Run(rows, duration_s, {name: np.array(of_one, np.float64) for name, of_one in times.items()})
