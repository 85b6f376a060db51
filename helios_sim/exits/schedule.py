"""Which exits look at a token where each is looked at alone (`rule.PerToken.looks`), as bits of a number.

One definition for the loop (`core/depths.py:look`) and for live serving: exits that always look, those near where a
request's latest tokens left, and how these are remembered. Exit e is bit e; the last exit looks at nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from helios_sim.core.depths import looking, remembered
from helios_sim.core.layout import EXIT_BITS
from helios_sim.exits.rule import MEASURES, PerToken


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Of a rule and a model's exits."""

    always: int  # exits that look at every token
    recent_mask: int  # of what is remembered of a request's latest tokens; 0: nothing is
    near: NDArray[np.int64]  # (E,) exits that look where one of the latest tokens left at exit e

    def looking(self, recent: int) -> int:
        """The exits that look at a request's next token; `recent` is what is remembered of its latest."""
        return int(looking(self.always, recent, self.near))

    def remembered(self, recent: int, leaf: int) -> int:
        """What is remembered of them once a token has left at exit number `leaf`."""
        return int(remembered(recent, leaf, self.recent_mask))


@lru_cache(maxsize=64)
def _schedule(exits: tuple[int, ...], rule: PerToken) -> Schedule:
    depths, proposes = np.array(exits), MEASURES[rule.confidence].proposes
    bits = np.left_shift(1, np.arange(len(depths) - 1))
    always = np.array([rule.checks_at(depth) or (proposes and e == 0) for e, depth in enumerate(exits[:-1])], np.int64)
    tokens, layers = (0, -1) if rule.near is None else (rule.near.tokens, rule.near.layers)
    near = (np.abs(depths[:, None] - depths[:-1]) <= layers).astype(np.int64) @ bits
    return Schedule(int(always @ bits), (1 << EXIT_BITS * tokens) - 1, near)


def schedule_of(exits: Sequence[int], rule: PerToken) -> Schedule:
    """That of a rule which looks at each token alone; `exits` are depths in layers, the last the whole model."""
    return _schedule(tuple(exits), rule)
