"""Exits by predictors (`model/predictors.py`): which rows leave, given the words proposed at the first exit.

At the first exit the head runs for every row. Its likeliest words are proposed to the predictors of this exit and of
later ones. If a predictor is sure, the head runs, and the row leaves with the head's word if that is among the proposed
ones, as in `core/depths.py:look` for recorded exits. A row's `checks` say which exits look at it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from helios_sim.exits.rule import MEASURES, ExitRule, PerToken
from helios_sim.live.exits import CapturedHeads, ExitDecider, ExitReader, HeadOutput, Row, Tally, some
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.model.predictors import Predictors, features, likeliest, no_predictors, signed


def decider(
    model: SegmentedModel, exits: ExitReader, rule: ExitRule, lazy: bool, captured: CapturedHeads | None
) -> ExitDecider:
    """Return the object that applies the rule."""
    if isinstance(rule, PerToken) and MEASURES[rule.confidence].proposes:
        return PredictedExits(model, exits, rule, lazy, captured)
    return ExitDecider(model, exits, rule, lazy, captured)


def _predictors(exits: ExitReader) -> Predictors:
    """The predictors of these exits. UserError if there are none."""
    if exits.predictors is None:
        raise no_predictors()
    return exits.predictors


class PredictedExits(ExitDecider):
    """Applies a rule with the confidence `predictor`, in one iteration. Bands end at the exits, in their order."""

    _kept: Sequence[Row] = ()  # rows that were at the exit before, by identity
    _words: Tensor  # (n, WORDS) words proposed for `_kept`
    _before: Tensor  # (n, d) states of `_kept` at the exit before
    _proposed: dict[int, list[int]]  # the words of each row, on the host, by identity

    def decide(
        self, band: int, end: int, rows: Sequence[Row], states: Tensor, tally: Tally, said: HeadOutput | None = None
    ) -> None:
        """Decide as `ExitDecider` does. For observed rows, predictor and head run at every exit."""
        stops = {i for i, row in enumerate(rows) if row.last_layer == end}
        observed = {i for i, row in enumerate(rows) if row.seen is not None}
        asking = {i for i, row in enumerate(rows) if row.asks} - stops
        early = end < self._whole
        watched = {i for i in stops if rows[i].decodes and i not in observed} if early else set()
        kept = [i for i, row in enumerate(rows) if row.asks or row.seen is not None] if early else []
        through = sorted(stops.union(kept) if band == 0 else stops | observed)
        if kept and band == 0:
            said = self._exits.read(self._model, end, some(states, through), None)
            places = [place for place, i in enumerate(through) if rows[i].asks or rows[i].seen is not None]
            self._propose([rows[i] for i in kept], some(said.logits, places))
        look = [i for i in kept if i not in asking or band == 0 or self._asks(rows[i], band, end)]
        sure = dict(zip(look, self._sure(band, rows, kept, look, states), strict=True))
        asked = {i for i in look if i in asking and self._is_asked(rows[i], end, sure[i])}
        if band:
            through = sorted(asked.union(through))
        tally.add("classifier_tokens", band, len(look))
        if not through:
            return
        if said is None:
            said = self._said(end, [rows[i] for i in through], some(states, through), None)
        tally.sampled(len(stops))
        tally.add("check_tokens", band, len(through) - len(stops))
        for place, i in enumerate(through):
            row, foreseen = rows[i], 1.0
            if i in sure:
                foreseen = sure[i] if said.tokens[place] in self._proposed[id(row)] else -sure[i]
            row.sure = i in asked and self._leaves(row, end, foreseen)
            if row.seen is not None:
                row.seen.choices.append(said.tokens[place])
                row.seen.confidence.append(foreseen)
            if i in stops or row.sure:
                row.chosen, row.layers, row.finite = said.token(place, row.choice), end, said.finite[place]
                row.breach = i in watched and not self._leaves(row, end, foreseen)

    def _propose(self, rows: Sequence[Row], logits: Tensor) -> None:
        self._words = likeliest(logits)
        self._proposed = {id(row): words for row, words in zip(rows, self._words.tolist(), strict=True)}

    def _sure(self, band: int, rows: Sequence[Row], kept: list[int], look: list[int], states: Tensor) -> list[float]:
        """Output of this exit's predictor for the rows that it looks at, with one transfer to the host."""
        if not kept:
            return []
        here, before = some(states, kept), None
        if band:
            place = {id(row): at for at, row in enumerate(self._kept)}
            still = [place[id(rows[i])] for i in kept]
            before, self._words = some(self._before, still), some(self._words, still)
        self._kept, self._before = [rows[i] for i in kept], here.clone()  # a later band may overwrite it
        if not look:
            return []
        among = [at for at, i in enumerate(kept) if i in set(look)]
        earlier, words = None if before is None else some(before, among), some(self._words, among)
        seen = features(self._model, self._exits.heads, band, some(here, among), earlier, words)
        found: list[float] = _predictors(self._exits).predicted(band, seen).tolist()
        return found

    def _is_asked(self, row: Row, end: int, sure: float) -> bool:
        return self._reaches(sure) if row.asked is None else row.asked[end]

    def _leaves(self, row: Row, end: int, foreseen: float) -> bool:
        return self._reaches(foreseen) if row.recorded is None else row.recorded[end]

    def _reaches(self, value: float) -> bool:
        return value >= float(np.float32(self._threshold))  # as traces compare it


class Foresight:
    """Output of the predictors for the same n tokens at one exit after the other, as traces record it."""

    def __init__(self, model: SegmentedModel, exits: ExitReader) -> None:
        self._model, self._exits = model, exits
        self._words: Tensor | None = None
        self._before: Tensor | None = None

    def says(self, exit_index: int, states: Tensor, said: HeadOutput) -> list[float]:
        """The confidences at this exit for states (n, d), given the head's output there; 1 at full depth."""
        if exit_index == len(self._exits.heads.exits):
            return [1.0] * len(said.tokens)
        words = likeliest(said.logits) if self._words is None else self._words
        seen = features(self._model, self._exits.heads, exit_index, states, self._before, words)
        self._words, self._before = words, states
        choice = torch.tensor(said.tokens, device=states.device)
        found: list[float] = signed(_predictors(self._exits).predicted(exit_index, seen), choice, words).tolist()
        return found
