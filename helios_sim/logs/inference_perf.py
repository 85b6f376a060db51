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
from helios_sim.logs.record import (
    FIX,
    Begins,
    RequestLog,
    Row,
    gathered,
    not_read,
    note_others,
    number,
    only_once,
    other_counts,
    other_totals,
    whole,
)
from helios_sim.untrusted import Fields, shortened

NAME = "inference-perf"
_OF_ONE = ("start_time", "end_time", "info")
FILE = "per_request_lifecycle_metrics.json"
_EFFECTS = {
    "cached_tokens": "what of the prompts the prefix cache served is computed anew here",
    "lora_adapter": "adapters of LoRA, which the simulation does not have",
    "image": "prompts had images, which are not counted", "video": "prompts had video, which is not counted",
    "audio": "prompts had audio, which is not counted",
    "retries_attempted": "requests that were sent again count from when the attempt that was answered was sent",
}  # fmt: skip


_OF_REQUEST = re.compile(r"start_time|end_time|scheduled_time|request|response|info|error|stage_id|request_id")
_OF_INFO = re.compile(r"(request|response)_metrics|lora_adapter|labels|(in|out)put_tokens|output_token_times")
_OF_ANSWER = re.compile(r"output_tokens|server_usage|response_chunks|chunk_times|output_token_times")
_OF_USAGE = re.compile(r"(prompt|completion|total)_tokens(_details)?")
_OF_PROMPT = re.compile(r"text|image|video|audio")


def is_it(document: Document) -> bool:
    if document.names(*_OF_ONE):
        return document.begins_with(b"[") or document.begins_with(b"{")
    return document.begins_with(b"{") and document.names("load_summary", "successes")


def of_folder(folder: Path) -> Path | None:
    """The file of its requests in a folder of reports."""
    return folder / FILE if (folder / FILE).is_file() else None


def read(document: Document, part: int | None = None) -> RequestLog:
    """UserError for a summary, and for a request that cannot be."""
    document.chosen(part or 1, ["the file"], "runs")
    if not document.names(*_OF_ONE):
        fix = f"set report.request_lifecycle.per_request: true in its configuration, and take {FILE}"
        raise UserError(document.name, "a summary of a stage", "the requests themselves", fix)
    rows, matter, left, ids = [], dict.fromkeys(_EFFECTS, 0), dict[str, None](), dict[str, str]()
    counts: dict[str, list[tuple[int, int]]] = {"prompt tokens": [], "output tokens": []}
    totals, again, texts = list[tuple[Any, Any, Any]](), Counter[str](), list[tuple[int, int]]()
    for place, value in _requests(document):
        if not isinstance(value, dict):
            raise UserError(place, shortened(value), "a request", FIX)
        span = f"{value.get('start_time')} to {value.get('end_time')}"
        only_once(place, "start_time and end_time", span, ids)
        rows.append(_row(place, Fields(value, place, FIX), matter))
        _note(left, value)
        info, answer = value.get("info") or {}, _answer(value.get("info") or {})
        usage = answer.get("server_usage") or {}
        totals.append((usage.get("total_tokens"), usage.get("prompt_tokens"), usage.get("completion_tokens")))
        again[str(value.get("request_id"))] += value.get("request_id") is not None
        read_of = info.get("request_metrics") or {}
        alone = not any(read_of.get(name) for name in ("image", "video", "audio"))
        said = (read_of.get("text") or {}).get("input_tokens") if alone else None
        if type(said) is int and type(info.get("input_tokens")) is int and said != info["input_tokens"]:
            texts.append((info["input_tokens"], said))
        for what, ours, theirs in (("prompt tokens", usage.get("prompt_tokens"), info.get("input_tokens")),
                                   ("output tokens", usage.get("completion_tokens"), answer.get("output_tokens"))):
            if type(ours) is int and type(theirs) is int:
                counts[what].append((ours, theirs))
    notices = not_read(document.name, [*(name for name, count in matter.items() if count), *left], _EFFECTS)
    notices += [said for what, pairs in counts.items() for said in other_counts(document.name, what, pairs)]
    notices += other_totals(document.name, totals)
    twice = sum(count - 1 for count in again.values() if count > 1)
    if twice:
        notices.append(f"{document.name}: {twice} requests have the request_id of another one: all are replayed.")
    if texts:
        notices.append(f"{document.name}: {len(texts)} requests have other input_tokens in info than in "
                       f"request_metrics.text, such as {texts[0][0]:,} and {texts[0][1]:,}: the former, where the "
                       "server counted none.")  # fmt: skip
    return gathered(document.source, NAME, rows, Begins.SENT, {}, notices)


def _requests(document: Document) -> list[tuple[str, Any]]:
    """Each with the place where it stands."""
    if document.begins_with(b"{"):
        return list(document.numbered_objects())
    return [(f"{document.name}, request {i}", value) for i, value in enumerate(document.array(), 1)]


def _note(left: dict[str, None], request: dict[str, Any]) -> None:
    info = request.get("info") or {}
    answer = _answer(info)
    note_others(left, request, _OF_REQUEST)
    note_others(left, info, _OF_INFO, "info.")
    note_others(left, info.get("request_metrics"), _OF_PROMPT, "request_metrics.")
    note_others(left, answer, _OF_ANSWER, "response_metrics.")
    note_others(left, answer.get("server_usage"), _OF_USAGE, "server_usage.")


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
    if times and (times[0] < 0 or times[-1] > end_s - start_s + 0.1):
        told = f"{times[0]:.6g} to {times[-1]:.6g} s after start_time"
        raise UserError(f"{place}: {name}", told, f"from 0 to {end_s - start_s:.6g} s, its end_time", FIX)
    return times


def _row(place: str, request: Fields, matter: dict[str, int]) -> Row:
    start_s, end_s = (number(place, name, request.value(name)) for name in ("start_time", "end_time"))
    if end_s < start_s:
        raise UserError(f"{place}: end_time", end_s, f"no earlier than start_time, {start_s}", FIX)
    info = request.inner("info", {})
    wasted = info.value("retry_wasted_sec", None)  # until then, attempts failed before the engine had the request
    if wasted is not None and request.value("error", None) is None:
        start_s += number(place, "info.retry_wasted_sec", wasted, 0.0, end_s - start_s)
    matter["retries_attempted"] += wasted is not None
    sent, answer = info.inner("request_metrics", {}), Fields(_answer(info.values), place, FIX)
    usage: dict[str, Any] = dict(answer.inner("server_usage", {}).values)
    prompt = whole(place, "prompt tokens", usage.get("prompt_tokens") or info.value("input_tokens", 0))
    output = whole(place, "output tokens", usage.get("completion_tokens") or answer.value("output_tokens", 0))
    for name in ("image", "video", "audio"):
        matter[name] += sent.value(name, None) is not None
    matter["lora_adapter"] += info.value("lora_adapter", None) is not None
    matter["cached_tokens"] += bool((usage.get("prompt_tokens_details") or {}).get("cached_tokens"))
    if request.value("error", None) is not None:
        error = request.inner("error")
        why = f"{error.text('error_type', default='error')}: {error.text('error_msg', default='')}"
        return Row(place, start_s, prompt, output, failure=why.strip().splitlines()[0][:200])
    _, times = (_stamps(place, answer, name, start_s, end_s) for name in ("chunk_times", "output_token_times"))
    ttft_s, e2e_s = (times[0], times[-1]) if times else (None, end_s - start_s)
    return Row(place, start_s, prompt, output, ttft_s, e2e_s, token_s=times or None)
