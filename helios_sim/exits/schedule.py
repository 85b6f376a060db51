"""The exits that check a token if each token is checked alone (`rule.PerToken.looks`), as a bit mask.

This is the one definition for the loop (`core/depths.py:look`) and for live serving: which exits always check, which
check since a request's latest tokens left near them, and how the latest exits are remembered. Exit e is bit e; the last
exit never checks.
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
    """The checking exits of one rule on one model, as bit masks."""

    always: int  # exits that check every token
    recent_mask: int  # bits that remember the exits of a request's latest tokens; 0 if none are remembered
    near: NDArray[np.int64]  # (E,) exits that check if one of the latest tokens left at exit e

    def looking(self, recent: int) -> int:
        """The exits that check a request's next token; `recent` holds the exits of its latest tokens."""
        return int(looking(self.always, recent, self.near))

    def remembered(self, recent: int, leaf: int) -> int:
        """The exits of the latest tokens, as `recent` above, after another token has left at exit number `leaf`."""
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
    """The schedule of a rule that checks each token alone; `exits` are depths in layers, the last the whole model."""
    return _schedule(tuple(exits), rule)
