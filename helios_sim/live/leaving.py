"""Who leaves at the end of a band, and with which token. Knows exits and the rule, no layer and no cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from helios_sim.exits.rule import Confidence, ExitRule, FixedCap, PerToken
from helios_sim.live.look import Exits
from helios_sim.live.model import SegmentedModel
from helios_sim.live.tally import Tally


@dataclass(slots=True)
class Owed:
    """A token that left and still has to run the layers from `depth` on, before anybody reads its K and V there."""

    position: int
    depth: int
    hidden: Tensor  # (1, d_model)


@dataclass(slots=True)
class Seen:
    """What each exit said of one observed token, in the order of the exits."""

    choices: list[int] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """A token on its way: of a request that decodes, or the last one of a prompt that finishes."""

    slot: int
    position: int
    token: int
    last_layer: int  # where it is sampled at the latest
    asks: bool = False  # leaves at the first confident exit
    decodes: bool = True
    seen: Seen | None = None  # observed at every exit
    owed: list[Owed] = field(default_factory=list)  # of its request
    sure: bool = False  # was confident somewhere
    recorded: Mapping[int, bool] | None = None  # whether exits are confident, by depth, whatever the model says
    chosen: int | None = None  # the token that it became
    layers: int = 0  # after which it left; 0 while it has not
    breach: bool = False
    finite: bool = True


class Leaving:
    """The plan's exit rule at work."""

    def __init__(self, model: SegmentedModel, exits: Exits, rule: ExitRule, lazy: bool) -> None:
        self._model, self._exits, self._lazy = model, exits, lazy
        watched = rule if isinstance(rule, FixedCap | PerToken) else None
        self._threshold = 0.0 if watched is None else watched.threshold
        self._measure = None if watched is None else watched.confidence
        self._by_head = self._measure is not Confidence.CLASSIFIER
        self._whole = model.architecture.n_layers
        self._waiting: list[tuple[list[Row], Tensor]] = []  # for the head, with their adapted states

    def decide(self, band: int, end: int, rows: Sequence[Row], states: Tensor, tally: Tally) -> None:
        """Samples whoever stops here, asks whoever may leave, notes what is observed.

        `states` (n, d) are the rows' after `end` layers. At most one transfer to the host for the question and one
        for the tokens; where the head answers both, they are the same. Whoever leaves by a question that does not
        need the head gets its token in `finish`.
        """
        stops = {i for i, row in enumerate(rows) if row.last_layer == end}
        asking = [i for i, row in enumerate(rows) if row.asks and i not in stops]
        leaving: set[int] = set()
        if asking and not self._by_head:
            tally.add("classifier_tokens", band, len(asking))
            sure = self._exits.classify(end, _some(states, asking)) >= self._threshold
            leaving = self._agreed(rows, asking, end, sure.tolist())
        observed = {i for i, row in enumerate(rows) if row.seen is not None}
        watched = {i for i in stops if rows[i].decodes and i not in observed} if end < self._whole else set()
        later = set() if self._by_head else (stops | leaving) - observed - watched
        self._let_go(end, rows, sorted(later), states, tally)
        through = sorted((stops | leaving | observed | (set(asking) if self._by_head else set())) - later)
        if not through:
            return
        asks_head = self._by_head and bool(asking)
        measure = self._measure if observed or watched or asks_head else None
        look = self._exits.look(self._model, end, _some(states, through), measure)
        confidence = look.confidence or [0.0] * len(through)
        if asks_head:
            by_row = dict(zip(through, confidence, strict=True))
            leaving = self._agreed(rows, asking, end, [by_row[i] >= self._threshold for i in asking])
        sampled = (stops | (set() if self._by_head else leaving)) - later
        tally.sampled(len(sampled))
        tally.add("check_tokens", band, len(through) - len(sampled))
        if not self._by_head:
            tally.add("classifier_tokens", band, len(watched))
        for i, token, sure_here, finite in zip(through, look.tokens, confidence, look.finite, strict=True):
            row = rows[i]
            if row.seen is not None:
                row.seen.choices.append(token)
                row.seen.confidence.append(sure_here)
            if i in stops or i in leaving:
                row.chosen, row.layers, row.finite = token, end, finite
                row.breach = i in watched and self._measure is not None and not (
                    row.sure or _said(row, end, sure_here >= self._threshold)
                )  # fmt: skip

    def finish(self) -> None:
        """Gives everybody who left without one its token: the head is read once, whatever depths they left at."""
        if not self._waiting:
            return
        found = self._exits.tokens(self._model, torch.cat([adapted for _, adapted in self._waiting]))
        rows = [row for left, _ in self._waiting for row in left]
        for row, token, finite in zip(rows, found.tokens, found.finite, strict=True):
            row.chosen, row.finite = token, finite
        self._waiting.clear()

    def _let_go(self, end: int, rows: Sequence[Row], going: list[int], states: Tensor, tally: Tally) -> None:
        if not going:
            return
        left = [rows[i] for i in going]
        for row in left:
            row.layers = end
        tally.sampled(len(left))
        adapted = self._exits.adapted(self._model, end, _some(states, going))
        self._waiting.append((left, adapted.clone() if adapted is states else adapted))  # a later band may write there

    def _agreed(self, rows: Sequence[Row], asking: list[int], end: int, sure: list[bool]) -> set[int]:
        """Each leaves alone, or lazily all together once each of them was confident somewhere."""
        for i, confident in zip(asking, sure, strict=True):
            rows[i].sure = rows[i].sure or _said(rows[i], end, confident)
        if self._lazy:
            return set(asking) if all(rows[i].sure for i in asking) else set()
        return {i for i in asking if rows[i].sure}


def _said(row: Row, depth: int, sure: bool) -> bool:
    return sure if row.recorded is None else row.recorded[depth]


def _some(states: Tensor, rows: Sequence[int]) -> Tensor:
    return states if len(rows) == len(states) else states[list(rows)]
