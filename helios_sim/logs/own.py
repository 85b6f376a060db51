"""The log that `python -m helios_sim.observe` writes: a header in the first line, then a request in each.

All times of a request are in seconds and since it was sent, but `arrival_s` (sent) and `planned_s`, which are since the
run began. Written while the requests run, in the order in which they end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.figures import Figure, Known, Look
from helios_sim.logs.record import FIX, OK, Begins, RequestLog, Row, gathered, not_read, number, only_once, whole
from helios_sim.request import LONGEST
from helios_sim.untrusted import Fields, shortened

NAME, KEY, VERSION = "helios-sim observe", "helios_log", 1
_OF_HEADER = ("model", "url", "loop", "users", "api", "started_at", "count_from", "ignore_eos", "seed", "workload")
_MORE = "{count} of {all} answers have more tokens than were asked for: {said} were, and one has {ours}"
_SHORT = "{count} of {all} answers ended as long as was asked for and are not: {said} tokens were, and one has {ours}"


@dataclass(frozen=True, slots=True)
class _Answer:
    """The outcome of one request."""

    tokens: int
    by_length: bool  # it ended at the length that was asked for


_KNOWN = Known(
    read="arrival_s|planned_s|prompt_tokens|output_tokens|ttft_s|e2e_s|token_times_s|task|priority|status",
    figures=(
        Figure("asked_tokens", lambda one, _: (one.tokens, math.inf), 0.0, 0.0, told=_MORE, zero=True),
        Figure("asked_tokens", lambda one, _: (0.0, one.tokens) if one.by_length else None, 0.0, 0.0, told=_SHORT),
    ),
    effects={"cached_tokens": "what of the prompts the prefix cache served is computed anew here"},
    harmless="index|finish_reason",
)
DECLARED = (("*.", _KNOWN),)  # lines after the header


def is_it(document: Document) -> bool:
    return document.begins_with(b"{") and document.names(KEY)


def header(**about: Any) -> str:
    """The header line."""
    return json.dumps({KEY: VERSION, **about})


def line(row: Mapping[str, Any]) -> str:
    """The line of one request. Keys without a value are left out."""
    return json.dumps({name: value for name, value in row.items() if value is not None}, allow_nan=False)


def read(document: Document, part: int | None = None) -> RequestLog:
    """Read a log. Raises UserError for a header of another version, and for an impossible line."""
    document.chosen(part or 1, ["the file"], "runs")
    (first, about), *lines = document.numbered_objects()
    head = Fields(about, first, FIX)
    head.integer(KEY, VERSION, VERSION)
    head.ignore(_OF_HEADER)
    rows, seen, look = [], dict[str, str](), Look(document.name, _KNOWN)
    for place, value in lines:
        row = _row(place, Fields(value, place, FIX))
        rows.append(row)
        only_once(place, "index", value.get("index"), seen)
        answer = _Answer(row.output_tokens, value.get("finish_reason") == "length")
        look.at(place, value, None if row.failure is not None else answer)
    notices = [*not_read(document.name, [*head.rest, *head.off]), *look.notices()]
    users = about.get("users")
    stated = {"model": about.get("model"), "in_flight_at_most": users, "url": about.get("url")}
    return gathered(document.source, NAME, rows, Begins.SENT, stated, notices)


def _row(place: str, fields: Fields) -> Row:
    arrival_s = number(place, "arrival_s", fields.value("arrival_s"))
    prompt, output = (whole(place, name, fields.value(name, 0)) for name in ("prompt_tokens", "output_tokens"))
    planned_s = fields.maybe("planned_s", 0.0, 1e9)
    status, task = fields.text("status"), fields.value("task", None)
    if task is not None and not isinstance(task, str):
        raise UserError(f"{place}: task", shortened(task), "a text", FIX)
    ttft_s, e2e_s = (fields.maybe(name, 0.0, 1e9) for name in ("ttft_s", "e2e_s"))
    times = fields.numbers("token_times_s", 0.0, 1e9) if fields.has("token_times_s") else None
    given = fields.value("priority", None)
    priority = None if given is None else whole(place, "priority", given, -LONGEST)
    if status != OK:
        return Row(place, arrival_s, prompt, output, failure=status, task=task, priority=priority,
                   planned_s=planned_s)  # fmt: skip
    return Row(place, arrival_s, prompt, output, ttft_s, e2e_s, token_s=times, task=task, priority=priority,
               planned_s=planned_s)  # fmt: skip
