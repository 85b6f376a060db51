"""The search for the least number that will do is right where answers are not in order, and asks for few of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given, strategies as st

from helios_sim.vary.least import Answers, Found, least, together

BEYOND = 2


def run(series: Sequence[Sequence[bool]], **options: object) -> Found:
    """`series`: whether 1, 2, ... hold, in each of them."""

    def answer(asked: Mapping[str, Sequence[int]]) -> Mapping[str, Mapping[int, Answers]]:
        return {key: {n: tuple(of[n - 1] for of in series) for n in numbers} for key, numbers in asked.items()}

    return together({"only": least(len(series[0]), beyond=BEYOND, **options)}, answer)["only"]


def brute(of: Sequence[bool]) -> int | None:
    """One more than the largest number that fails."""
    number = 1 + max((n for n, holds in enumerate(of, 1) if not holds), default=0)
    return number if number <= len(of) else None


@st.composite
def orderly(draw: st.DrawFn, most: int) -> list[bool]:
    """It fails, then holds at up to BEYOND numbers in a row between failures, then holds."""
    low, high = sorted((draw(st.integers(0, most)), draw(st.integers(0, most))))
    middle = []
    while len(middle) < high - low:
        middle += [True] * draw(st.integers(0, BEYOND)) + [False]
    return ([False] * low + middle + [True] * most)[:most]


@given(st.data(), st.integers(1, 80))
def test_it_finds_what_trying_every_number_finds(data: st.DataObject, most: int) -> None:
    series = data.draw(st.lists(orderly(most), min_size=1, max_size=4))
    start = data.draw(st.integers(1, most))
    found = run(series, start=start)
    assert found.least == tuple(map(brute, series)) == run(series, every=True).least
    assert all(answers == tuple(of[n - 1] for of in series) for n, answers in found.tried.items())


@given(st.integers(1, 2000), st.integers(1, 2000), st.integers(1, 2000))
def test_it_asks_for_few_numbers(most: int, first: int, start: int) -> None:
    found = run([[n >= first for n in range(1, most + 1)]], start=min(start, most))
    assert found.least == (first if first <= most else None,)
    assert len(found.tried) <= 2 * most.bit_length() + BEYOND + 1


def test_a_number_that_holds_by_chance_is_not_the_answer() -> None:
    assert run([[False, True, True, False, True, True, True, True]]).least == (5,)


def test_searches_are_asked_together() -> None:
    rounds: list[set[str]] = []

    def answer(asked: Mapping[str, Sequence[int]]) -> Mapping[str, Mapping[int, Answers]]:
        rounds.append(set(asked))
        return {key: {n: (n >= int(key),) for n in numbers} for key, numbers in asked.items()}

    found = together({key: least(64) for key in ("1", "9", "40")}, answer)
    assert {key: it.least for key, it in found.items()} == {"1": (1,), "9": (9,), "40": (40,)}
    assert rounds[0] == {"1", "9", "40"}
    assert len(rounds) < 20
