"""LayerSkip's rates, weights and curricula against the formulae of the paper (arXiv 2404.16710)."""

from __future__ import annotations

import math

import pytest

from calibrate.exits.layer_skip import drop_rates, joined, loss_scale, rotated, weights


@pytest.mark.parametrize("layers", [2, 6, 30])
def test_layers_are_left_out_more_often_the_deeper_they_are(layers: int) -> None:
    found = drop_rates(layers, 0.2)
    for layer, rate in enumerate(found):  # p_l = D(l) p_max with D(l) = e^(l ln 2 / (L - 1)) - 1
        assert rate == pytest.approx(0.2 * (math.exp(layer * math.log(2) / (layers - 1)) - 1))
    assert (found[0], found[-1]) == (0.0, pytest.approx(0.2))
    assert list(found) == sorted(found)


def test_a_single_layer_is_never_left_out() -> None:
    assert drop_rates(1, 0.5) == (0.0,)


@pytest.mark.parametrize("e_scale", [0.2, 1.0])
def test_the_loss_weighs_deeper_exits_more(e_scale: float) -> None:
    layers = 12
    for layer in range(layers - 1):  # the exit after layer l, counted from 0
        assert loss_scale(layer + 1, layers, e_scale) == pytest.approx(e_scale * sum(range(layer + 1)))
    assert loss_scale(layers, layers, e_scale) == pytest.approx(layers - 1 + e_scale * sum(range(layers - 1)))
    shares = weights((3, 6, 12), layers, e_scale)
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] / shares[1] == pytest.approx(sum(range(3)) / sum(range(6)))


def test_exits_take_turns() -> None:
    exits = (3, 6, 9, 12, 15)
    assert [rotated(exits, step, 2) for step in range(3)] == [(3, 9, 15), (6, 12), (3, 9, 15)]
    for step in range(7):  # in so many steps in a row every exit is trained once
        turns = [depth for k in range(3) for depth in rotated(exits, step + k, 3)]
        assert sorted(turns) == list(exits)
    assert rotated(exits, 5, 1) == exits


def test_exits_join_from_the_deepest_on_until_half_of_the_run() -> None:
    exits = (3, 6, 9)
    assert joined(exits, 0.0) == ()
    assert joined(exits, 1 / 8) == (9,)  # one every T / 2L, full depth being the fourth
    assert joined(exits, 2 / 8) == (6, 9)
    assert joined(exits, 3 / 8) == exits
    assert joined(exits, 1.0) == exits
