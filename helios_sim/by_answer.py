"""Routers that choose a kind of replica by what its answers are worth, and cascades, in which a second kind may answer.

A cascade asks the first of its kinds. When the answer has ended, a confidence that is too low sends the request, with
its whole prompt, to the next kind; both answers take time and memory. The user sees one answer, the one that counts: it
comes whole if it might have been replaced, and token by token from the last kind. A bandit learns from the answers that
have ended which kind serves a task best. `mixed` looks at nothing: it is the control that a router has to beat.
`best_answer` looks at the recorded text, which no real router knows beforehand: it is the bound of all routers.

Among the replicas of a kind a request goes to the one with the fewest requests, the first of equals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf, sqrt
from typing import Any, Protocol

import numpy as np
from numpy.random import SeedSequence

from helios_sim.exits.trace import MICROBITS
from helios_sim.request import Request, RequestRecord, Status

Confidence = Callable[[Request, RequestRecord], float]
"""How sure a model was of an answer that has ended, from 0 to 1."""
BitsOf = Callable[[int, Request], int]
"""Millionths of a bit that the text of a request would cost a kind of this number."""


@dataclass(frozen=True, slots=True)
class Favoured:
    """A time from which on the bandit takes this kind for the best one of a task."""

    time_ns: int
    task: int | None  # None if the bandit does not tell tasks apart
    kind: int
    verdicts: Mapping[str, Mapping[str, float]]  # by kind: answers judged, and their mean bits per character


@dataclass(slots=True)
class Answered:
    """Counts of one run of a router, besides where it sent each request."""

    cascades: bool = False
    escalations: int = 0  # times that a request went on to the next kind
    escalated: int = 0  # requests that went on at least once
    refused: int = 0  # requests that the last kind could not run, so that an earlier answer counts
    replaced_tokens: int = 0  # output tokens of answers that do not count
    favoured: list[Favoured] = field(default_factory=list)


class Judging(Protocol):
    """A router in one run."""

    @property
    def answered(self) -> Answered: ...
    def choose(self, request: Request) -> int:
        """Return the number of the replica for a request that arrives now."""

    def judge(self, record: RequestRecord, left_ns: int) -> RequestRecord | Request:
        """Judge a request that left its replica: return its record, or the request if another kind is to answer it."""


class ByAnswer(Protocol):
    """Settings of a router that goes by answers; each run makes its own router from them."""

    def begin(self, requests_in: Sequence[int], seed: int) -> Judging:
        """Return the router of one run. `requests_in`: requests in each replica now, kept up to date by the caller."""


@dataclass(frozen=True, slots=True)
class Cascade:
    stages: tuple[tuple[int, ...], ...]  # replicas of each kind, in the order in which kinds are asked
    escalate_below: float  # a confidence below it is too low
    confidence: Confidence

    def begin(self, requests_in: Sequence[int], seed: int) -> Judging:
        return _Escalating(self, requests_in)


@dataclass(frozen=True, slots=True)
class Bandit:
    """Thompson sampling of means: for each kind (and task) a normal distribution around the mean of its answers.

    An answer's worth is minus its bits per character. With n answers of mean m and squared distances from m that sum
    to S, the draw is m + z sqrt((spread^2 + S) / n^2), z standard normal, less the kind's cost. Kinds without a judged
    answer come first; of several such kinds, the one that was sent the fewest requests.
    """

    kinds: Mapping[str, tuple[int, ...]]  # replicas of each
    by_task: bool  # learn each task separately
    spread: float  # bits per character by which answers of one kind are assumed to differ before any is known
    costs: Mapping[str, float]  # by kind: bits per character by which it has to be better, because of its price

    def begin(self, requests_in: Sequence[int], seed: int) -> Judging:
        return _Sampling(self, requests_in, seed)


@dataclass(frozen=True, slots=True)
class Mixed:
    kinds: tuple[tuple[int, ...], ...]
    shares: tuple[float, ...]  # of the requests; they sum to 1

    def begin(self, requests_in: Sequence[int], seed: int) -> Judging:
        rng, bounds = _draws(seed, "mixed"), np.cumsum(self.shares)
        last = int(np.flatnonzero(self.shares)[-1])

        def kind_of(request: Request) -> int:
            return min(int(bounds.searchsorted(rng.random(), "right")), last)

        return _Sending(self.kinds, kind_of, requests_in)


@dataclass(frozen=True, slots=True)
class BestAnswer:
    kinds: tuple[tuple[int, ...], ...]
    bits_of: BitsOf

    def begin(self, requests_in: Sequence[int], seed: int) -> Judging:
        def kind_of(request: Request) -> int:
            return min(range(len(self.kinds)), key=lambda kind: self.bits_of(kind, request))

        return _Sending(self.kinds, kind_of, requests_in)


class _Sending:
    """Each request goes to a kind and stays there."""

    def __init__(
        self, kinds: tuple[tuple[int, ...], ...], kind_of: Callable[[Request], int], requests_in: Sequence[int]
    ) -> None:
        self.answered = Answered()
        self._kinds, self._kind_of, self._requests_in = kinds, kind_of, requests_in

    def choose(self, request: Request) -> int:
        return _emptiest(self._kinds[self._kind_of(request)], self._requests_in)

    def judge(self, record: RequestRecord, left_ns: int) -> RequestRecord | Request:
        return record


@dataclass(slots=True)
class _Asked:
    """A request of a cascade that has no final answer yet."""

    request: Request  # as it first arrived
    stage: int = 0  # the kind that answers now
    first: RequestRecord | None = None  # record of the first time that it left a replica
    answer: RequestRecord | None = None  # latest completed answer, which counts if no later kind completes one


class _Escalating:
    def __init__(self, cascade: Cascade, requests_in: Sequence[int]) -> None:
        self.answered = Answered(cascades=True)
        self._cascade, self._requests_in = cascade, requests_in
        self._asked: dict[int, _Asked] = {}

    def choose(self, request: Request) -> int:
        asked = self._asked.setdefault(request.request_id, _Asked(request))
        return _emptiest(self._cascade.stages[asked.stage], self._requests_in)

    def judge(self, record: RequestRecord, left_ns: int) -> RequestRecord | Request:
        cascade, asked = self._cascade, self._asked[record.request_id]
        asked.first = asked.first or record
        may_go_on = asked.stage + 1 < len(cascade.stages) and record.status is not Status.UNFINISHED
        if record.status is Status.COMPLETED:
            self._replace(asked.answer)
            asked.answer = record
        else:
            self.answered.refused += asked.answer is not None and not may_go_on
        confidence = 0.0
        if record.status is Status.COMPLETED and may_go_on:
            confidence = cascade.confidence(asked.request, record)
        if may_go_on and confidence < cascade.escalate_below:
            self.answered.escalated += not asked.stage
            asked.stage += 1
            self.answered.escalations += 1
            return asked.request
        del self._asked[record.request_id]
        return self._seen(asked, record, left_ns)

    def _replace(self, answer: RequestRecord | None) -> None:
        self.answered.replaced_tokens += 0 if answer is None else answer.output_tokens

    def _seen(self, asked: _Asked, record: RequestRecord, left_ns: int) -> RequestRecord:
        """Return the record as the user sees it; `record` is from the last time that the request left a replica."""
        last_stage = len(self._cascade.stages) - 1
        if record.status is Status.DROPPED and asked.answer is not None:
            record = replace(asked.answer, first_token_ns=left_ns, last_token_ns=left_ns)
        elif record.status is Status.COMPLETED and asked.stage < last_stage and self._cascade.escalate_below > 0:
            record = replace(record, first_token_ns=record.last_token_ns)
        elif record.status is Status.UNFINISHED:
            self._replace(asked.answer)
        first = asked.first
        if first is None or first.scheduled_ns is None:
            return replace(record, arrival_ns=asked.request.arrival_ns)
        return replace(record, arrival_ns=asked.request.arrival_ns, scheduled_ns=first.scheduled_ns)


@dataclass(slots=True)
class _Known:
    """Statistics of one kind's answers, of one task if tasks are told apart. Worth is minus bits per character."""

    sent: int = 0
    judged: int = 0
    mean: float = 0.0
    squares: float = 0.0  # squared distances from the mean, summed

    def add(self, worth: float) -> None:
        self.judged += 1
        before = worth - self.mean
        self.mean += before / self.judged
        self.squares += before * (worth - self.mean)


class _Sampling:
    def __init__(self, bandit: Bandit, requests_in: Sequence[int], seed: int) -> None:
        self.answered = Answered()
        self._bandit, self._requests_in = bandit, requests_in
        self._names, self._members = tuple(bandit.kinds), tuple(bandit.kinds.values())
        self._kind_of = {number: kind for kind, members in enumerate(self._members) for number in members}
        self._costs = [bandit.costs.get(name, 0.0) for name in self._names]
        self._known: dict[int | None, list[_Known]] = {}
        self._favoured: dict[int | None, int] = {}
        self._worst = inf  # lowest worth of any answer so far; inf if none has ended
        self._rng = _draws(seed, "bandit")

    def choose(self, request: Request) -> int:
        known = self._of(self._told_apart(request.task))
        drawn = self._rng.standard_normal(len(known)).tolist()
        untried = [kind for kind, it in enumerate(known) if not it.judged]
        if untried:
            kind = min(untried, key=lambda kind: known[kind].sent)
        else:
            kind = max(range(len(known)), key=lambda kind: self._draw(known[kind], drawn[kind]) - self._costs[kind])
        known[kind].sent += 1
        return _emptiest(self._members[kind], self._requests_in)

    def _draw(self, known: _Known, z: float) -> float:
        return known.mean + z * sqrt(self._bandit.spread**2 + known.squares) / known.judged

    def judge(self, record: RequestRecord, left_ns: int) -> RequestRecord | Request:
        """Learn from an answer. A request that its replica refused counts as the worst answer so far."""
        if record.status is Status.UNFINISHED:
            return record
        worth = self._worst
        if record.status is Status.COMPLETED:
            assert record.microbits is not None
            worth = -record.microbits / MICROBITS / record.output_chars
            self._worst = min(self._worst, worth)
        if worth < inf:
            task = self._told_apart(record.task)
            known = self._of(task)
            known[self._kind_of[record.replica]].add(worth)
            self._note(task, known, left_ns)
        return record

    def _told_apart(self, task: int) -> int | None:
        return task if self._bandit.by_task else None

    def _of(self, task: int | None) -> list[_Known]:
        return self._known.setdefault(task, [_Known() for _ in self._names])

    def _note(self, task: int | None, known: Sequence[_Known], now_ns: int) -> None:
        """Note if another kind is taken for the best now, once each kind has been tried."""
        if not all(it.judged for it in known):
            return
        best = max(range(len(known)), key=lambda kind: known[kind].mean - self._costs[kind])
        if self._favoured.get(task) != best:
            self._favoured[task] = best
            verdicts = {
                name: {"answers": it.judged, "bits_per_char": -it.mean}
                for name, it in zip(self._names, known, strict=True)
            }
            self.answered.favoured.append(Favoured(now_ns, task, best, verdicts))


def _emptiest(members: Sequence[int], requests_in: Sequence[int]) -> int:
    return min(members, key=lambda number: requests_in[number])


def _draws(seed: int, what: str) -> Any:
    return np.random.Generator(np.random.PCG64(SeedSequence(seed, spawn_key=tuple(what.encode()))))
