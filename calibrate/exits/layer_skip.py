"""LayerSkip's recipe (Elhoushi et al. 2024, https://arxiv.org/abs/2404.16710): which layers a text leaves out while a
model is trained, which exits are trained in a step, and how much each counts.

Layers are counted from 0 to L - 1; the exit at depth d is after layer d - 1, and full depth is after layer L - 1.

Layer dropout (section 4.1): a text leaves layer l out with probability D(l) p_max, D(l) = exp(l ln 2 / (L - 1)) - 1, so
that the first layer always runs and the last is left out most often. The time factor S(t) is 1, as in the paper for a
model that is already trained.

Early exit loss (section 4.2): the sum over exits of C(t, l) e(l) / sum C(t, i) e(i) times the loss there, with
e(l) = e_scale (0 + 1 + ... + l) below the last layer, and e(L - 1) = L - 1 + e_scale (0 + 1 + ... + (L - 2)).

Curriculum C(t, l): the rotational one trains every R-th exit and shifts by one exit each step. In the gradual one exits
join from the deepest to the first, one every T / 2L of T steps; here the exits and full depth take the place of the L
layers. Full depth is trained in every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Curriculum(StrEnum):
    """Which exits are trained in a step."""

    ROTATIONAL = "rotational"  # every R-th exit, in turn
    GRADUAL = "gradual"  # exits join from the deepest on


@dataclass(frozen=True, slots=True)
class LayerSkip:
    """The recipe's constants."""

    drop_most: float = 0.1  # p_max
    loss_scale: float = 1.0  # e_scale
    curriculum: Curriculum = Curriculum.ROTATIONAL
    every: int = 2  # R of the rotational curriculum


def drop_rates(layers: int, most: float) -> tuple[float, ...]:
    """The probability that a text leaves each layer out: 0 at the first, `most` at the last."""
    return tuple(most * math.expm1(math.log(2) * layer / max(1, layers - 1)) for layer in range(layers))


def loss_scale(depth: int, layers: int, e_scale: float) -> float:
    """e(l) of the exit at this depth."""
    if depth < layers:
        return e_scale * depth * (depth - 1) / 2
    return layers - 1 + e_scale * (layers - 1) * (layers - 2) / 2


def weights(depths: Sequence[int], layers: int, e_scale: float) -> tuple[float, ...]:
    """The share of the loss at each of these depths, which sum to 1. At least one of them must count."""
    scales = [loss_scale(depth, layers, e_scale) for depth in depths]
    return tuple(scale / sum(scales) for scale in scales)


def rotated(exits: Sequence[int], step: int, every: int) -> tuple[int, ...]:
    """The exits that are trained in this step of the rotational curriculum."""
    return tuple(depth for number, depth in enumerate(exits) if (number - step) % every == 0)


def joined(exits: Sequence[int], progress: float) -> tuple[int, ...]:
    """The exits that are trained once the share `progress` of the gradual curriculum is over."""
    count = min(len(exits), int(2 * (len(exits) + 1) * progress))
    return tuple(exits[len(exits) - count :])
