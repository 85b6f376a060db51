"""Requests as they arrive and records as they leave, with text counted in characters.

Token counts belong to a model, because tokenizers differ: `ModelSpec.tokens` turns characters into tokens for
prompts, and the exit trace that replays a request's answer says how many tokens the answer has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError

NS_PER_S = 1_000_000_000
LATEST_NS = 2.0**62  # 146 years: later times do not fit int64 with room for a run
LONGEST = 2**31 - 1  # tokens or characters of one text: no model reads more, and sums of lengths stay within int64


def token_counts(chars: NDArray[np.int64], chars_per_token: float) -> NDArray[np.int64]:
    """Return the tokens of n texts, shape (n,), at least one each."""
    return np.maximum(np.rint(chars / chars_per_token).astype(np.int64), 1)


def to_ns(seconds: float, what: str = "time") -> int:
    """Round a time to whole nanoseconds, halves to even. UserError about `what` if not finite or above 146 years."""
    ns = seconds * NS_PER_S
    if not abs(ns) <= LATEST_NS:  # true for NaN
        raise _no_time(what, seconds)
    return round(ns)


def all_to_ns(times: NDArray[np.float64], what: str = "times", ns_per: int = NS_PER_S) -> NDArray[np.int64]:
    """Round an array of times, of any shape and in units of `ns_per` ns, to whole nanoseconds, as `to_ns` does."""
    ns = times * ns_per
    good = np.abs(ns) <= LATEST_NS  # false for NaN
    if not good.all():
        raise _no_time(what, float(times[~good][0]))
    whole: NDArray[np.int64] = np.rint(ns).astype(np.int64)
    return whole


def _no_time(what: str, value: float) -> UserError:
    return UserError(what, value, "a finite time of at most 146 years", "correct the time, or its unit")


def whole_ns(seconds: NDArray[np.float64]) -> NDArray[np.int64]:
    """Round durations (n,) to whole nanoseconds, at least one, so that time always advances."""
    if len(seconds) == 1:  # plain numbers are quicker
        return np.array([max(to_ns(seconds.item(), "duration"), 1)])
    whole = all_to_ns(seconds, "durations")
    return np.maximum(whole, 1, out=whole)


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a workload: when it comes, how long it is, and which recorded text stands for its answer."""

    request_id: int  # position in the workload, from 0
    arrival_ns: int
    prompt_chars: int
    output_chars: int
    task: int  # index into the workload's task names
    text_start: int  # where the answer lies in the task's text; exit traces take it modulo their length
    priority: int = 0  # the lowest is served first if the server's order is by priority
    shared: int = -1  # row of the shared text that the prompt begins with (workload.prefixes); -1: none
    stream: int = -1  # the session that the rest of the prompt and the answer belong to; -1: none, a text of its own


@dataclass(frozen=True, slots=True)
class RequestBlock:
    """Columns of consecutive requests, each of shape (n,) and dtype int64; arrivals do not decrease."""

    request_id: NDArray[np.int64]
    arrival_ns: NDArray[np.int64]
    prompt_chars: NDArray[np.int64]
    output_chars: NDArray[np.int64]
    task: NDArray[np.int64]
    text_start: NDArray[np.int64]
    priority: Any = None  # an array like the others; None: all are 0
    shared: Any = None  # None: all are -1
    stream: Any = None

    def __post_init__(self) -> None:
        n = len(self.request_id)
        if self.priority is None:
            object.__setattr__(self, "priority", np.zeros(n, np.int64))
        if self.shared is None:
            object.__setattr__(self, "shared", np.full(n, -1, np.int64))
        if self.stream is None:
            object.__setattr__(self, "stream", np.full(n, -1, np.int64))

    def __len__(self) -> int:
        return len(self.request_id)

    def __getitem__(self, which: slice | NDArray[np.intp]) -> RequestBlock:
        """Return the requests at these positions."""
        return RequestBlock(*(getattr(self, f.name)[which] for f in fields(self)))

    def rows(self) -> Iterator[Request]:
        columns = (getattr(self, f.name).tolist() for f in fields(self))
        for row in zip(*columns, strict=True):
            yield Request(*row)


@dataclass(frozen=True, slots=True)
class Slo:
    """Service level objectives: bounds that a good request meets; None if there is no bound."""

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    @property
    def any(self) -> bool:
        return any(bound is not None for bound in (self.ttft_s, self.tpot_s, self.e2e_s))


class Status(StrEnum):
    COMPLETED = "completed"
    DROPPED = "dropped"
    UNFINISHED = "unfinished"  # still in the system when the run was stopped


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """What one request experienced under one arm. Times are None for events that did not happen."""

    request_id: int
    replica: int
    task: int
    model: str  # the model that produced the last token
    status: Status
    drop_reason: str | None
    arrival_ns: int
    scheduled_ns: int | None  # first time in an iteration
    first_token_ns: int | None
    last_token_ns: int | None
    prompt_tokens: int
    output_tokens: int
    prompt_chars: int
    output_chars: int
    layers_run: int  # summed over output tokens, the layers that each ran (without recomputation)
    early_tokens: int  # left before the deepest layer of the whole model
    breach_tokens: int  # left at the cap without confidence
    agreed_tokens: int  # equal to the same model's token at full depth
    evaluated_tokens: int  # run at full depth with every exit observed, in an evaluation round
    preemptions: int
    # Cost of the reference text in millionths of a bit: -log2 of the probability of each of its tokens, by the served
    # model at the exit where that token left. None unless people wrote the text and it was recorded for all models.
    microbits: int | None = None
    cached_tokens: int | None = None  # prompt tokens found cached when it first entered; None without prefix caching


@dataclass(frozen=True, slots=True)
class RecordBlock:
    """Records of n requests that left one after the other: columns (n,) by the names of RequestRecord."""

    numbers: dict[str, NDArray[np.int64]]
    maybe: dict[str, tuple[NDArray[np.int64], NDArray[np.bool_]]]  # values, and where there is one
    labels: dict[str, tuple[NDArray[np.int64], tuple[str | None, ...]]]  # codes, and what each stands for

    def __len__(self) -> int:
        return len(self.numbers["request_id"])
