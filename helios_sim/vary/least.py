"""Search for the least number from which on a condition holds, if each try is expensive and answers are not monotonic.

A search asks for numbers and is told the answers: a truth value for each of several series, such as one per seed. It
runs nothing itself, so that many searches can be asked at the same time.

It doubles its steps until one number fails and another holds, and halves what lies between. Bisection alone would be
wrong where a number holds by chance below others that fail. So the answer of a series is defined as one more than the
largest number that fails, and the search ends when that number and `beyond` further ones were tried. This is what
trying every number gives, unless more than `beyond` numbers in a row hold below one that fails.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

Answers = tuple[bool, ...]  # one per series
Search = Generator[tuple[int, ...], Mapping[int, Answers], "Found"]

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Found:
    """The least number of each series; None if even the largest that may be tried fails."""

    least: tuple[int | None, ...]
    tried: Mapping[int, Answers]


def least(most: int, *, start: int = 1, beyond: int = 2, every: bool = False) -> Search:
    """Search 1 to `most` for each series, beginning at `start`. `every`: try all numbers, for comparison."""
    known: dict[int, Answers] = {}
    wanted = set(range(1, most + 1)) if every else {min(max(start, 1), most)}
    while wanted:
        known.update((yield tuple(sorted(wanted))))
        series = range(len(next(iter(known.values()))))
        columns = [{n: answers[place] for n, answers in known.items()} for place in series]
        wanted = {n for column in columns for n in _next(column, most, start, beyond)} - known.keys()
    return Found(tuple(n if n <= most else None for n in map(_after_failures, columns)), dict(sorted(known.items())))


def _after_failures(known: Mapping[int, bool]) -> int:
    return 1 + max((n for n, holds in known.items() if not holds), default=0)


def _next(known: Mapping[int, bool], most: int, start: int, beyond: int) -> range | tuple[int, ...]:
    """Return the numbers to try next for one series; its search has ended if all of them are known."""
    first = _after_failures(known)
    above = min((n for n in known if n >= first), default=most + 1)  # the smallest that holds, none fails above it
    if above > most:  # nothing holds yet, at least not above all that fails
        return (min(most, 2 * (first - 1)),)
    if first == 1:  # nothing fails yet
        return (max(1, start - 2 * (start - above) - 1),) if above > 1 else range(1, min(most, 1 + beyond) + 1)
    if above > first:
        return ((first - 1 + above) // 2,)
    return range(first, min(most, first + beyond) + 1)


def together(
    searches: Mapping[_Key, Search],
    answer: Callable[[Mapping[_Key, Sequence[int]]], Mapping[_Key, Mapping[int, Answers]]],
) -> dict[_Key, Found]:
    """Return what each search finds. Each call of `answer` gets the questions of all searches that have not ended."""
    found: dict[_Key, Found] = {}
    told: Mapping[_Key, Mapping[int, Answers] | None] = dict.fromkeys(searches)
    while told:
        asked: dict[_Key, Sequence[int]] = {}
        for key, answers in told.items():
            try:
                asked[key] = next(searches[key]) if answers is None else searches[key].send(answers)
            except StopIteration as end:
                found[key] = end.value
        told = answer(asked) if asked else {}
    return found
