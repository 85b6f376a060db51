"""The log that `python -m helios_sim.observe` writes: a header in the first line, then a request in each.

All times of a request are in seconds and since it was sent, but `arrival_s` (sent) and `planned_s`, which are since the
run began. Written while the requests run, in the order in which they end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.record import FIX, OK, Begins, RequestLog, Row, gathered, not_read, number, only_once, whole
from helios_sim.request import LONGEST
from helios_sim.untrusted import Fields, shortened

NAME, KEY, VERSION = "helios-sim observe", "helios_log", 1
_OF_HEADER = ("model", "url", "loop", "users", "api", "started_at", "count_from", "ignore_eos", "seed", "workload")
_OF_A_LINE = ("index", "planned_s", "finish_reason", "asked_tokens", "cached_tokens")
_CACHED = {"cached_tokens": "what of the prompts the prefix cache served is computed anew here"}


def is_it(document: Document) -> bool:
    return document.begins_with(b"{") and document.names(KEY)


def header(**about: Any) -> str:
    """The first line."""
    return json.dumps({KEY: VERSION, **about})


def line(row: Mapping[str, Any]) -> str:
    """The line of one request. Keys without a value are left out."""
    return json.dumps({name: value for name, value in row.items() if value is not None}, allow_nan=False)


def read(document: Document, part: int | None = None) -> RequestLog:
    """UserError for a header of another version, and for a line that cannot be."""
    document.chosen(part or 1, ["the file"], "runs")
    (first, about), *lines = document.numbered_objects()
    head = Fields(about, first, FIX)
    head.integer(KEY, VERSION, VERSION)
    head.ignore(_OF_HEADER)
    rows, left, cached, seen = [], dict[str, None](), 0, dict[str, str]()
    for place, value in lines:
        fields = Fields(value, place, FIX)
        rows.append(_row(place, fields))
        only_once(place, "index", value.get("index"), seen)
        fields.ignore(_OF_A_LINE)
        left |= dict.fromkeys((*fields.rest, *fields.off))
        cached += bool(value.get("cached_tokens"))
    notices = not_read(document.name, [*head.rest, *head.off, *left])
    notices += not_read(document.name, ["cached_tokens"] if cached else [], _CACHED)
    users = about.get("users")
    stated = {"model": about.get("model"), "in_flight_at_most": users, "url": about.get("url")}
    return gathered(document.source, NAME, rows, Begins.SENT, stated, notices)


def _row(place: str, fields: Fields) -> Row:
    arrival_s = number(place, "arrival_s", fields.value("arrival_s"))
    prompt, output = (whole(place, name, fields.value(name, 0)) for name in ("prompt_tokens", "output_tokens"))
    status, task = fields.text("status"), fields.value("task", None)
    if task is not None and not isinstance(task, str):
        raise UserError(f"{place}: task", shortened(task), "a text", FIX)
    ttft_s, e2e_s = (fields.maybe(name, 0.0, 1e9) for name in ("ttft_s", "e2e_s"))
    times = fields.numbers("token_times_s", 0.0, 1e9) if fields.has("token_times_s") else None
    given = fields.value("priority", None)
    priority = None if given is None else whole(place, "priority", given, -LONGEST)
    if status != OK:
        return Row(place, arrival_s, prompt, output, failure=status, task=task, priority=priority)
    return Row(place, arrival_s, prompt, output, ttft_s, e2e_s, token_s=times, task=task, priority=priority)
