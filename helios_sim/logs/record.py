"""One form for the requests of every log: arrivals, lengths and times.

A reader passes `Row`s to `gathered`, which checks them in the same way for all tools and lists what the log lacks.
Unknown values stay unknown (None, or NaN for single requests).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.request import LONGEST, NS_PER_S
from helios_sim.untrusted import shortened

FloatColumn = NDArray[np.float64]
IntColumn = NDArray[np.int64]
OK = "ok"
SLOWEST_S, QUICKEST_S = 5.0, 2e-6  # per token, in the median: beyond, times are in another unit
_SLOWER, _MANY = 300, 0.1  # in multiples of the median, and the share of such requests that no engine has
_RATES, _TIMED = 2.0, 20  # factor by which rates may differ before it is reported, and requests needed to know a rate
_PAUSE_S, _FEWEST = 600, 4  # shortest pause that is reported, and requests needed for that
_LATE_S = 0.1  # delay of sending from which it is reported
LATEST_S = 4e9  # no clock of seconds shows more, until 2096
EARLIEST_S = 978_307_200  # 2001 since 1970: a time before it is in another unit
_ROUNDED_S = 1e-3  # tools round single times to a millisecond
FIX = "correct the log, or take another one"


class Begins(StrEnum):
    """The moment from which a log counts TTFT and E2E."""

    SENT = "the client has sent the request"
    RECEIVED = "the server has received the request"
    QUEUED = "the engine's loop has taken in the request"


@dataclass(frozen=True, slots=True, eq=False)
class PromptTexts:
    """The `hash_ids` of each prompt. Equal ids are equal parts of texts; each part has the same number of tokens."""

    starts: IntColumn  # (n + 1,) where the ids of each prompt begin
    ids: IntColumn  # renumbered from 0


@dataclass(frozen=True, slots=True, eq=False)
class TokenTimes:
    """Times of the chunks of each answer since its request was sent. A chunk is a token unless the log says more."""

    starts: IntColumn  # (n + 1,) where the times of each request begin
    time_s: FloatColumn


@dataclass(frozen=True, slots=True, eq=False)
class RequestLog:
    """The requests of a log in order of arrival, n >= 1. Columns are (n,), or None if the log does not have them."""

    source: str  # the file or folder
    format: str  # "guidellm 0.8.0"
    begins: Begins
    arrival_s: FloatColumn | None  # since the first arrival
    prompt_tokens: IntColumn
    output_tokens: IntColumn  # 0 without an answer
    completed: NDArray[np.bool_]  # False if it failed; then it has no times
    status: tuple[str, ...]  # OK, or why it failed
    ttft_s: FloatColumn | None = None  # NaN if not known
    e2e_s: FloatColumn | None = None  # to the last token
    queue_s: FloatColumn | None = None  # from `begins` to the first scheduling
    token_times: TokenTimes | None = None
    priority: IntColumn | None = None
    task: tuple[str, ...] | None = None
    texts: PromptTexts | None = None
    stated: Mapping[str, Any] = field(default_factory=dict)  # the log's statements on the run, by name
    missing: tuple[str, ...] = ()  # sentences on data that it lacks
    notices: tuple[str, ...] = ()  # sentences on data that are not used
    # by name, if there is only a histogram: share of the requests, and the range of that percentile in seconds
    percentiles: Mapping[str, Sequence[tuple[float, tuple[float, float]]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @property
    def failed(self) -> int:
        return int(np.count_nonzero(~self.completed))

    @property
    def failures(self) -> tuple[str, ...]:
        """A sentence on failed requests; none if all were answered."""
        if not self.failed:
            return ()
        reasons = Counter(why[:60] for why, done in zip(self.status, self.completed, strict=True) if not done)
        told = "; ".join(f"{count} x {why}" for why, count in reasons.most_common(3))
        more = f"; and {len(reasons) - 3} other reasons" if len(reasons) > 3 else ""
        return (f"{self.source}: {self.failed} of {len(self)} requests failed and are left out: {told}{more}.",)

    def tpot_s(self) -> FloatColumn | None:
        """Seconds per token after the first, (n,); NaN if not known. None if it is not known of any request."""
        if self.ttft_s is None or self.e2e_s is None:
            return None
        further = np.where(self.output_tokens > 1, self.output_tokens - 1, 0)
        with np.errstate(divide="ignore", invalid="ignore"):
            found = (self.e2e_s - self.ttft_s) / further
        return np.where(further > 0, found, np.nan)


@dataclass(slots=True)
class Row:
    """One request of a log. Times are in seconds since its arrival, except for the arrival itself."""

    place: str  # "run.json, request 3", for messages
    arrival_s: float | None
    prompt_tokens: int
    output_tokens: int
    ttft_s: float | None = None
    e2e_s: float | None = None
    queue_s: float | None = None
    token_s: Sequence[float] | None = None
    failure: str | None = None  # why it got no answer; None if it got one
    priority: int | None = None
    task: str | None = None
    warm_up: bool = False  # served, but the tool does not count its times
    planned_s: float | None = None  # when the client meant to send it, by the clock of arrival_s


def number(place: str, key: str, value: object, low: float = 0.0, high: float = LATEST_S) -> float:
    """The value as a finite number in the range. UserError naming the place and the key where it is none."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise UserError(f"{place}: {key}", shortened(value), f"a number from {low:g} to {high:g}", FIX)
    return float(value)


def whole(place: str, key: str, value: object, low: int = 0, high: int = LONGEST) -> int:
    """The value as a whole number in the range; 12.0 is one. Raises UserError if it is none."""
    found = number(place, key, value, low, high)
    if found != int(found):
        raise UserError(f"{place}: {key}", shortened(value), f"a whole number from {low} to {high}", FIX)
    return int(found)


def counted(place: str, key: str, value: object) -> int:
    """A required number of tokens. Raises UserError if it is missing, which is not the same as 0."""
    if value is None:
        raise UserError(f"{place}: {key}", None, "a number of tokens in a request that was answered", FIX)
    return whole(place, key, value)


def stamp_ns(place: str, key: str, value: int) -> int:
    """The value in ns since 1970. Raises UserError if it lies before 2001, as microseconds and milliseconds do."""
    if 0 < value < EARLIEST_S * NS_PER_S:
        raise UserError(f"{place}: {key}", value, "nanoseconds since 1970, after 2001: it is in another unit", FIX)
    return value


def only_once(place: str, key: str, value: object, seen: dict[str, str]) -> None:
    """Add the id of a request to the `seen` ones, with its place. Raises UserError if it is among them."""
    if isinstance(value, str | int) and seen.setdefault(str(value), place) != place:
        fix = "remove one of them: files were joined, or written twice"
        raise UserError(f"{place}: {key}", shortened(value), f"of one request: {seen[str(value)]} has it too", fix)


def gathered(
    source: str,
    kind: str,
    rows: Sequence[Row],
    begins: Begins,
    stated: Mapping[str, Any] | None = None,
    notices: Sequence[str] = (),
) -> RequestLog:
    """Make a log of rows. Raises UserError for an impossible row, and if no request was answered."""
    if not rows:
        raise UserError(source, "no requests", "a log of at least one", "take another log")
    for row in rows:
        if row.failure is None and row.output_tokens == 0:
            row.failure = "an answer of 0 tokens"
        _check(row)
    found = sorted(rows, key=lambda row: (row.arrival_s is None, row.arrival_s or 0.0))
    done = np.array([row.failure is None for row in found])
    if not done.any():
        why = Counter(str(row.failure)[:80] for row in found).most_common(1)[0][0]
        raise UserError(source, f"{len(found)} requests, all failed", f"some that were answered ({why})", FIX)
    answered = [row for row in found if row.failure is None]
    arrivals = [row.arrival_s for row in answered]
    arrival_s = None
    if all(time is not None for time in arrivals):
        times = np.array([np.nan if row.arrival_s is None else row.arrival_s for row in found])
        arrival_s = times - np.nanmin(times)
    without = [row for row in rows if row.priority is None]
    if without and len(without) < len(rows):
        raise UserError(f"{without[0].place}: priority", None, "a number in every request, or in none", FIX)
    log = RequestLog(
        source=source,
        format=kind,
        begins=begins,
        arrival_s=arrival_s,
        prompt_tokens=np.array([row.prompt_tokens for row in found], np.int64),
        output_tokens=np.array([row.output_tokens for row in found], np.int64),
        completed=done,
        status=tuple(OK if row.failure is None else row.failure for row in found),
        ttft_s=_times(found, "ttft_s"),
        e2e_s=_times(found, "e2e_s"),
        queue_s=_times(found, "queue_s"),
        token_times=_token_times(found),
        priority=np.array([row.priority for row in found], np.int64) if _all(found, "priority") else None,
        task=tuple(str(row.task) for row in found) if _all(found, "task") else None,
        stated=dict(stated or {}),
        notices=(*notices, *_of_chunks(source, answered), *_of_warm_up(source, found), *_of_pause(source, arrival_s),
                 *_of_rate(source, arrival_s, stated or {}), *_of_plan(source, rows)),
    )
    _check_pace(log, answered)
    _check_gaps(log, answered)
    _check_in_flight(log, answered)
    return _with_missing(log)


def _all(rows: Sequence[Row], name: str) -> bool:
    return all(getattr(row, name) is not None for row in rows)


def _check(row: Row) -> None:
    """Raise UserError for impossible values of one request."""
    if row.arrival_s is not None:
        number(row.place, "arrival", row.arrival_s, -LATEST_S)
    if row.failure is not None:
        return
    if row.prompt_tokens < 1:
        told = f"{row.prompt_tokens} prompt tokens"
        raise UserError(row.place, told, "at least one in a request that was answered", FIX)
    for name in ("ttft_s", "e2e_s", "queue_s"):
        if getattr(row, name) is not None:
            number(row.place, name.removesuffix("_s"), getattr(row, name), 0.0)
    order = [(name, getattr(row, name)) for name in ("queue_s", "ttft_s", "e2e_s") if getattr(row, name) is not None]
    for (before, early_s), (after, late_s) in pairwise(order):
        if late_s < early_s - _ROUNDED_S:
            told = f"{after} {late_s:.6g}, {before} {early_s:.6g}"
            raise UserError(row.place, told, f"{before} no later than {after}", FIX)
    if row.token_s is not None and any(b < a for a, b in pairwise(row.token_s)):
        raise UserError(f"{row.place}: token times", "not in order", "each no earlier than the one before", FIX)
    if row.token_s:
        first_s, last_s = row.token_s[0], row.token_s[-1]
        if row.ttft_s is not None and not close_to(first_s, row.ttft_s, 0.01, _ROUNDED_S):
            told = f"the first after {first_s:.6g} s"
            raise UserError(f"{row.place}: token times", told, f"{row.ttft_s:.6g} s, its time to first token", FIX)
        if row.e2e_s is not None and last_s > 1.05 * row.e2e_s + 0.1:
            told = f"the last after {last_s:.6g} s"
            raise UserError(f"{row.place}: token times", told, f"no later than its end, {row.e2e_s:.6g} s", FIX)


def _times(rows: Sequence[Row], name: str) -> FloatColumn | None:
    """A column of the requests that count; None if none of them has it."""
    known = [row.failure is None and not row.warm_up and getattr(row, name) is not None for row in rows]
    if not any(known):
        return None
    return np.array([getattr(row, name) if there else np.nan for row, there in zip(rows, known, strict=True)])


def _token_times(rows: Sequence[Row]) -> TokenTimes | None:
    known = [[] if row.failure is not None or row.token_s is None else list(row.token_s) for row in rows]
    if not any(known):
        return None
    starts = np.concatenate([[0], np.cumsum([len(times) for times in known])]).astype(np.int64)
    return TokenTimes(starts, np.array([time for times in known for time in times], np.float64))


def _of_chunks(source: str, answered: Sequence[Row]) -> list[str]:
    timed = [row for row in answered if row.token_s]
    uneven = sum(len(row.token_s or ()) != row.output_tokens for row in timed)
    if not uneven:
        return []
    told = f"{uneven} of {len(timed)} answers came in fewer or more chunks than tokens"
    found = [f"{source}: {told}: gaps are those between chunks."]
    more = [row for row in timed if len(row.token_s or ()) > 1.1 * row.output_tokens + 2]
    if more:
        such = f"{len(more[0].token_s or ()):,} of {more[0].output_tokens:,}"
        told = f"{len(more)} of {len(timed)} answers came in more chunks than tokens, such as {such}"
        found.append(f"{source}: {told}: a chunk holds at least one, so that their tokens are counted too few.")
    return found


def _of_warm_up(source: str, rows: Sequence[Row]) -> list[str]:
    count = sum(row.warm_up for row in rows)
    return [f"{source}: {count} requests of the warm-up are replayed, and their times do not count."] if count else []


def _check_pace(log: RequestLog, answered: Sequence[Row]) -> None:
    """Raise UserError if times cannot be in seconds."""
    paces = [
        (row.e2e_s - row.ttft_s) / (row.output_tokens - 1)
        for row in answered
        if row.output_tokens > 1 and row.e2e_s is not None and row.ttft_s is not None
    ]
    if paces and not QUICKEST_S <= (middle := median(paces)) <= SLOWEST_S:
        told = f"{middle:.3g} s a token in half of the requests"
        allowed = f"{QUICKEST_S:g} to {SLOWEST_S:g} s: its times are in another unit, or no tokens were streamed"
        raise UserError(log.source, told, allowed, FIX)


    slow = [pace for pace in paces if pace > _SLOWER * middle] if paces else []
    if len(slow) > 2 and len(slow) >= _MANY * len(paces):
        told = f"{len(slow)} of {len(paces)} requests with {median(slow):.3g} s a token"
        allowed = f"all in one unit: half of the requests have {middle:.3g} s or less"
        raise UserError(log.source, told, allowed, FIX)


def _check_gaps(log: RequestLog, answered: Sequence[Row]) -> None:
    """Raise UserError if the gaps between tokens do not add up to the time from the first token to the end.

    Single short answers are not checked, since clocks and the end of a stream make a difference there.
    """
    timed = [(row.token_s[-1] - row.token_s[0], row.e2e_s - row.ttft_s) for row in answered
             if row.token_s and len(row.token_s) > 1 and row.ttft_s is not None and row.e2e_s is not None]  # fmt: skip
    gaps_s, between_s = (sum(times) for times in zip(*timed, strict=True)) if timed else (0.0, 0.0)
    slack_s = _ROUNDED_S * len(timed)
    if gaps_s < 0.5 * between_s - slack_s or gaps_s > 1.05 * between_s + slack_s:
        told = f"{gaps_s:.4g} s between first and last tokens, all answers together"
        raise UserError(f"{log.source}: token times", told, f"about {between_s:.4g} s, by TTFT and E2E", FIX)


def _check_in_flight(log: RequestLog, answered: Sequence[Row]) -> None:
    """Raise UserError if more requests ran at once than the client kept in flight, as stated in the log."""
    most = log.stated.get("in_flight_at_most")
    if most is not None and (type(most) not in (int, float) or most < 1 or most != int(most)):
        key = f"{log.source}: requests that its client kept in flight"
        raise UserError(key, shortened(most), "null, or a whole number from 1", FIX)
    spans = [(row.arrival_s + _ROUNDED_S, row.arrival_s + row.e2e_s - _ROUNDED_S) for row in answered
             if row.arrival_s is not None and row.e2e_s is not None and row.e2e_s > 2 * _ROUNDED_S]  # fmt: skip
    if most is None or not spans:
        return
    begins, ends = (np.sort(np.array(times)) for times in zip(*spans, strict=True))
    at_once = int((np.arange(1, len(begins) + 1) - np.searchsorted(ends, begins)).max())
    if at_once > most:
        allowed = f"at most {most:g}, which it says that its client kept in flight"
        raise UserError(log.source, f"{at_once} requests at once", allowed, FIX)


def _of_pause(source: str, arrival_s: FloatColumn | None) -> list[str]:
    told = None if arrival_s is None else pause_told(source, arrival_s[~np.isnan(arrival_s)])
    return [] if told is None else [f"{told}."]


def _of_rate(source: str, arrival_s: FloatColumn | None, stated: Mapping[str, Any]) -> list[str]:
    """A sentence if requests arrived at another rate than the log states, and no limit explains it."""
    asked = stated.get("request_rate")
    if isinstance(asked, int | float) and asked < 0:
        return [f"{source}: it says {asked:g} requests/s, which cannot be: the times of its requests count."]
    times = None if arrival_s is None else arrival_s[~np.isnan(arrival_s)]
    if times is None or len(times) < _TIMED or not isinstance(asked, int | float) or not 0 < asked < math.inf:
        return []
    span_s = float(times[-1] - times[0])
    found = (len(times) - 1) / span_s if span_s > 0 else math.inf
    limited = stated.get("in_flight_at_most") is not None and found < asked  # the limit explains it
    if limited or asked / _RATES <= found <= asked * _RATES:
        return []
    return [f"{source}: it says {asked:g} requests/s, and its requests came at {found:.3g} requests/s, which count."]


def _of_plan(source: str, rows: Sequence[Row]) -> list[str]:
    """Sentences if the client did not send requests at the planned times."""
    late_s = [row.arrival_s - row.planned_s for row in rows if row.arrival_s is not None and row.planned_s is not None]
    found = []
    for off_s, when in ((late_s, "later"), ([-time_s for time_s in late_s], "earlier")):
        far_s = [time_s for time_s in off_s if time_s > _LATE_S]
        if far_s:
            told = f"the client sent {len(far_s)} of {len(rows)} requests {when} than it planned, by up to"
            most = f"{max(far_s):,.0f}" if max(far_s) >= 100 else f"{max(far_s):.3g}"
            found.append(f"{source}: {told} {most} s: they come when they were sent.")
    return found


def pause_told(source: str, arrival_s: FloatColumn) -> str | None:
    """A sentence if a pause takes most of the time, as between runs with files that were joined; else None.

    `arrival_s` is in order.
    """
    if len(arrival_s) < _FEWEST:
        return None
    gaps = np.diff(arrival_s)
    before = int(np.argmax(gaps)) + 1
    longest_s = float(gaps[before - 1])
    if longest_s < max(_PAUSE_S, 0.5 * float(arrival_s[-1] - arrival_s[0])):
        return None
    told = f"no request came for {longest_s:,.0f} s after the first {before}"
    return f"{source}: {told}: if two runs were joined, take one"


def _with_missing(log: RequestLog) -> RequestLog:
    """The log with a sentence for everything that it lacks."""
    known = {
        "when requests came, so they cannot be replayed": log.arrival_s,
        "times to first token": log.ttft_s,
        "times to the last token": log.e2e_s,
        "times of single tokens, so gaps between tokens have no measured side": log.token_times,
    }
    found = [f"{log.source} does not say: {what}." for what, column in known.items() if column is None]
    for what, column in (("a time to first token", log.ttft_s), ("an end", log.e2e_s)):
        gaps = 0 if column is None else int(np.count_nonzero(np.isnan(column) & log.completed))
        if gaps:
            found.append(f"{log.source}: {gaps} of {len(log)} requests have no {what.split(' ', 1)[1]} that counts.")
    if log.arrival_s is not None and np.isnan(log.arrival_s).any():
        found.append(f"{log.source}: {int(np.isnan(log.arrival_s).sum())} failed requests have no time of arrival.")
    return replace(log, missing=tuple(found))


def not_read(source: str, names: Sequence[str], effects: Mapping[str, str] | None = None) -> list[str]:
    """A sentence on data that are not used: names that matter with their `effects`, then all others."""
    told = [f"{source}: {name} is not read: {(effects or {})[name]}." for name in names if name in (effects or {})]
    rest = [name for name in names if name not in (effects or {})]
    if rest:
        more = f" and {len(rest) - 12} more" if len(rest) > 12 else ""
        told.append(f"{source}: not read: {', '.join(str(name)[:40] for name in rest[:12])}{more}.")
    return told


def other_models(source: str, models: Iterable[object]) -> list[str]:
    """A sentence if requests were of several models."""
    names = list(dict.fromkeys(str(model) for model in models if model))
    if len(names) < 2:
        return []
    told = f"requests of {len(names)} models, {', '.join(names[:4])}"
    return [f"{source}: {told}: all are taken to be of the one that is set."]


def reason(*texts: object) -> str:
    """The last line of the first text that is not empty."""
    said = next((str(text).strip() for text in texts if text is not None and str(text).strip()), "no reason is given")
    return said.splitlines()[-1][:200]


def close_to(a: float, b: float, share: float = 0.01, slack: float = 1e-6) -> bool:
    """Whether two figures are equal up to rounding."""
    return math.isclose(a, b, rel_tol=share, abs_tol=slack)
