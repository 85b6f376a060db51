"""inference-perf's `per_request_lifecycle_metrics.json` (report.request_lifecycle.per_request: true), of 0.6 and 0.7.

A JSON array of requests, or one in each line, with start_time and end_time (s, one monotonic clock), info and error.
Before 0.6 the figures of an answer stood in info itself. The summaries beside it (summary_,
stage_N_lifecycle_metrics.json) hold no requests and are refused with what to set.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.figures import TOTALS, Figure, Known, Look, server_counted
from helios_sim.logs.record import FIX, Begins, RequestLog, Row, gathered, number, only_once, whole
from helios_sim.untrusted import Fields, shortened

NAME = "inference-perf"
_OF_ONE = ("start_time", "end_time", "info")
FILE = "per_request_lifecycle_metrics.json"
_TEXTS = ("{count} requests have other input_tokens in info than in request_metrics.text, such as {ours} and {said}: "
          "the former, where the server counted none")  # fmt: skip
_USAGE = r"info\.response_metrics\.server_usage\."
_NOTED_S = 1e-3  # an end may be noted so long before the last event
_APART_S = 0.1  # chunks and tokens are noted one after the other
_END = "{count} of {all} requests ended long after their last tokens, which count: such as at {said}, not {ours}"
_Asked = Mapping[str, Any]  # a request in the file


def _usage(request: _Asked, *names: str) -> float | None:
    """The sum of the server's counts; None if some are missing."""
    usage = _answer(request.get("info") or {}).get("server_usage") or {}
    found = [usage.get(name) for name in names]
    return sum(found) if all(type(count) is int for count in found) else None  # type: ignore[arg-type]


def _of_text(request: _Asked, _: re.Match[str]) -> float | None:
    info = request.get("info") or {}
    count = info.get("input_tokens")
    alone = not any((info.get("request_metrics") or {}).get(name) for name in ("image", "video", "audio"))
    return count if alone and type(count) is int else None


def _end(request: _Asked, _: re.Match[str]) -> tuple[float, float] | None:
    """The range for the end: from the last token to ten times as long."""
    start_s, times = request.get("start_time"), _answer(request.get("info") or {}).get("output_token_times")
    last_s = times[-1] if isinstance(times, list) and times else None
    known = isinstance(start_s, int | float) and isinstance(last_s, int | float)
    return (0.0, last_s + 10 * (last_s - start_s) + 1.0) if known else None  # type: ignore[operator]


_KNOWN = Known(
    read=rf"start_time|scheduled_time|error(\..*)?|{_USAGE}(prompt|completion)_tokens|info(\.response_metrics)?\.output_token_times"
         r"|info\.response_metrics\.chunk_times",
    figures=(
        Figure("end_time", _end, 0.0, told=_END),
        Figure(f"{_USAGE}total_tokens", lambda one, _: _usage(one, "prompt_tokens", "completion_tokens"), 0.0, 0.5,
               told=TOTALS),
        server_counted(r"info\.input_tokens", "prompt tokens", lambda one, _: _usage(one, "prompt_tokens")),
        server_counted(r"info(\.response_metrics)?\.output_tokens", "output tokens",
                       lambda one, _: _usage(one, "completion_tokens")),
        Figure(r"info\.request_metrics\.text\.input_tokens", _of_text, 0.0, 0.5, told=_TEXTS),
    ),
    effects={
        rf"{_USAGE}prompt_tokens_details\.cached_tokens":
            "what of the prompts the prefix cache served is computed anew here",
        "info.lora_adapter": "adapters of LoRA, which the simulation does not have",
        "info.request_metrics.image": "prompts had images, which are not counted",
        "info.request_metrics.video": "prompts had video, which is not counted",
        "info.request_metrics.audio": "prompts had audio, which is not counted",
        "info.retry_wasted_sec":
            "requests that were sent again count from when the attempt that was answered was sent",
        "session_id": "what the turns of a session share is computed anew for each",
    },
    harmless=r"request|response|stage_id|request_id|\w+_slo_sec|info\.labels(\..*)?"
             rf"|{_USAGE}(prompt|completion)_tokens_details(\..*)?|info\.response_metrics\.response_chunks"
             r"|info\.retries_attempted",
)  # fmt: skip


DECLARED = (("*.", _KNOWN),)  # by where the mapping stands


def is_it(document: Document) -> bool:
    if document.names(*_OF_ONE):
        return document.begins_with(b"[") or document.begins_with(b"{")
    return document.begins_with(b"{") and document.names("load_summary", "successes")


def of_folder(folder: Path) -> Path | None:
    """The file of requests in a folder of reports."""
    return folder / FILE if (folder / FILE).is_file() else None


def read(document: Document, part: int | None = None) -> RequestLog:
    """Read a log. Raises UserError for a summary, and for an impossible request."""
    document.chosen(part or 1, ["the file"], "runs")
    if not document.names(*_OF_ONE):
        fix = f"set report.request_lifecycle.per_request: true in its configuration, and take {FILE}"
        raise UserError(document.name, "a summary of a stage", "the requests themselves", fix)
    rows, ids, again, look = [], dict[str, str](), Counter[str](), Look(document.name, _KNOWN)
    for place, value in _requests(document):
        if not isinstance(value, dict):
            raise UserError(place, shortened(value), "a request", FIX)
        span = f"{value.get('start_time')} to {value.get('end_time')}"
        only_once(place, "start_time and end_time", span, ids)
        rows.append(_row(place, Fields(value, place, FIX)))
        look.at(place, value, value)
        again[str(value.get("request_id"))] += value.get("request_id") is not None
    notices = look.notices()
    twice = sum(count - 1 for count in again.values() if count > 1)
    if twice:
        notices.append(f"{document.name}: {twice} requests have the request_id of another one: all are replayed.")
    return gathered(document.source, NAME, rows, Begins.SENT, {}, notices)


def _requests(document: Document) -> list[tuple[str, Any]]:
    """Yield requests with their places."""
    if document.begins_with(b"{"):
        found = list(document.numbered_objects())
        if len(found) == 1 and not any(name in found[0][1] for name in _OF_ONE):
            told, fix = f"an object of {shortened(list(found[0][1]))}", f"take {FILE} as inference-perf wrote it"
            raise UserError(document.name, told, "an array of requests, or one in each line", fix)
        return found
    return [(f"{document.name}, request {i}", value) for i, value in enumerate(document.array(), 1)]


def _answer(info: Mapping[str, Any]) -> Mapping[str, Any]:
    """The figures of an answer: in a mapping of their own, or beside those of the request, as before 0.6."""
    own = info.get("response_metrics")
    if own is not None or "response_metrics" in info:
        return own or {}
    return {name: info[name] for name in ("output_tokens", "output_token_times") if name in info}


def _stamps(place: str, answer: Fields, name: str, start_s: float, end_s: float) -> list[float]:
    """Times of an answer since its request was sent."""
    stamps = answer.value(name, [])
    if not isinstance(stamps, list):
        raise UserError(f"{place}: {name}", shortened(stamps), "a list of times", FIX)
    times = [number(place, name, stamp) - start_s for stamp in stamps]
    if times and (times[0] < 0 or times[-1] > end_s - start_s + _NOTED_S):
        told = f"{times[0]:.6g} to {times[-1]:.6g} s after start_time"
        raise UserError(f"{place}: {name}", told, f"from 0 to {end_s - start_s:.6g} s, its end_time", FIX)
    return times


def _row(place: str, request: Fields) -> Row:
    start_s, end_s = (number(place, name, request.value(name)) for name in ("start_time", "end_time"))
    if end_s < start_s:
        raise UserError(f"{place}: end_time", end_s, f"no earlier than start_time, {start_s}", FIX)
    planned = request.value("scheduled_time", None)
    planned_s = None if planned is None else number(place, "scheduled_time", planned)
    info = request.inner("info", {})
    wasted = info.value("retry_wasted_sec", None)  # time of failed attempts before the engine got the request
    if wasted is not None and request.value("error", None) is None:
        start_s += number(place, "info.retry_wasted_sec", wasted, 0.0, end_s - start_s)
    answer = Fields(_answer(info.values), place, FIX)
    usage: dict[str, Any] = dict(answer.inner("server_usage", {}).values)
    prompt = whole(place, "prompt tokens", usage.get("prompt_tokens") or info.value("input_tokens", 0))
    output = whole(place, "output tokens", usage.get("completion_tokens") or answer.value("output_tokens", 0))
    if request.value("error", None) is not None:
        error = request.inner("error")
        why = f"{error.text('error_type', default='error')}: {error.text('error_msg', default='')}"
        return Row(place, start_s, prompt, output, failure=why.strip().splitlines()[0][:200],
                   planned_s=planned_s)  # fmt: skip
    chunks, times = (_stamps(place, answer, name, start_s, end_s) for name in ("chunk_times", "output_token_times"))
    if chunks and times and (times[0] < chunks[0] - _APART_S or times[-1] > chunks[-1] + _APART_S):
        told = f"{chunks[0]:.6g} to {chunks[-1]:.6g} s after start_time"
        allowed = f"around output_token_times, {times[0]:.6g} to {times[-1]:.6g} s"
        raise UserError(f"{place}: chunk_times", told, allowed, FIX)
    if times and not output:
        told = f"{len(times)} times of tokens and no number of them"
        raise UserError(f"{place}: output tokens", told, "output_tokens, or completion_tokens of the server", FIX)
    ttft_s, e2e_s = (times[0], times[-1]) if times else (None, end_s - start_s)
    return Row(place, start_s, prompt, output, ttft_s, e2e_s, token_s=times or None, planned_s=planned_s)
