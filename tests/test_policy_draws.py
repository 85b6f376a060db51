"""Draws of the bootstrap, compiled: the same as numpy's, to the last bit."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings, strategies as st

from helios_sim.core import machine
from helios_sim.core.draws import draw as interpreted
from helios_sim.policy.cap import by_numpy, counts_drawn, places


def draw(*arguments) -> bool:
    """As machine code."""
    code = machine.load()
    assert code is not None
    return code.draw(*arguments)


def test_compiled_and_interpreted_draw_the_same() -> None:
    for n in (1, 2, 30):
        drawn = []
        for function in (draw, interpreted):
            rng, counts = np.random.default_rng(n), np.zeros((4, n))
            assert function(rng, counts, *(each.copy() for each in places(n)))
            drawn.append((counts.tolist(), rng.random()))
        assert drawn[0] == drawn[1]


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 700), resamples=st.integers(1, 6), seed=st.integers(0, 2**32))
def test_counts_and_what_the_generator_draws_next_are_numpys(n: int, resamples: int, seed: int) -> None:
    ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
    counts = np.zeros((resamples, n))
    assert draw(ours, counts, *places(n))
    assert (counts == by_numpy(n, resamples, theirs)).all()
    assert ours.random() == theirs.random()


def test_where_numpy_has_another_method_the_compiled_form_refuses() -> None:
    """Half of 100 draws are expected at the first place."""
    chances = np.full(100, 0.5)
    assert not draw(np.random.default_rng(0), np.zeros((1, 100)), chances, np.zeros((100, 101)))


def test_what_is_drawn_does_not_depend_on_what_is_compiled(monkeypatch) -> None:
    drawn = []
    for answer in (True, False):
        monkeypatch.setattr("helios_sim.policy.cap.compiled_is_numpys", lambda answer=answer: answer)
        drawn.append(counts_drawn(40, 5, np.random.default_rng(3)))
    assert (drawn[0] == drawn[1]).all()
