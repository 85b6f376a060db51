"""Answers that leave at a ramp while the model goes on, on the device (Apparate, arXiv 2312.05385).

Every decode runs all layers. At each ramp its token there is read, and the first ramp that is sure of it gives the
answer's token, delivered at that moment: the text goes on with it, as after any early exit, in the next iteration. K
and V are those of all layers. What the whole model says in its place is the verdict, which policies are told.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor

from helios_sim.exits.rule import ReleaseEarly
from helios_sim.live.answers import Answer
from helios_sim.live.exits import CapturedHeads, ExitDecider, ExitReader, HeadOutput, Row, Tally, confident
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.policy.telemetry import Released
from helios_sim.serving.iteration import Token


@dataclass(slots=True)
class RampedToken:
    """What the ramps said of one token, in their order, and what the whole model said."""

    rule: ReleaseEarly
    recorded: Mapping[int, bool] | None = None  # whether each ramp agrees, from a trace; None: as the model says
    choices: list[int] = field(default_factory=list)  # where the ramp's word is known
    confidences: list[float] = field(default_factory=list)
    ramp: int = 0  # layers of the ramp that delivered; 0: none did
    token: int = 0  # that it delivered
    word: int = 0  # the likeliest there, which the token is unless it was drawn
    time_ns: int = 0  # when
    verdict: int = 0

    @property
    def delivered_agrees(self) -> bool:
        return self.word == self.verdict if self.recorded is None else self.recorded[self.ramp]

    def agrees(self) -> list[bool]:
        """By ramp, where the policy is told of all of them."""
        if self.recorded is not None:
            return [self.recorded[ramp] for ramp in self.rule.ramps]
        return [choice == self.verdict for choice in self.choices]


class ReleaseDecider(ExitDecider):
    """Looks at the ramps, which are the ends of the bands before the last. `clock`: ns of the run."""

    def __init__(
        self,
        model: SegmentedModel,
        exits: ExitReader,
        rule: ReleaseEarly,
        clock: Callable[[], int],
        captured: CapturedHeads | None = None,
    ) -> None:
        super().__init__(model, exits, rule, False, captured)
        self._rule, self._clock, self._measure, self._by_head = rule, clock, rule.confidence, rule.confidence.by_head
        self._at_least = [float(np.float32(each)) for each in rule.thresholds]  # as traces compare it

    def decide(
        self, band: int, end: int, rows: Sequence[Row], states: Tensor, tally: Tally, said: HeadOutput | None = None
    ) -> None:
        """Note what leaves at a ramp; after the last layer, give every row its token."""
        if end in self._rule.ramps:
            at = [i for i, row in enumerate(rows) if row.ramped is not None]
            if at:
                self._ramp(end, [rows[i] for i in at], states if len(at) == len(states) else states[at], band, tally)
            return
        said = self._said(end, rows, states, None)
        tally.sampled(len(rows))
        for place, row in enumerate(rows):
            row.layers, row.finite, seen = end, said.finite[place], row.ramped
            row.chosen = seen.token if seen is not None and seen.ramp else said.token(place, row.choice)
            if seen is not None:
                seen.verdict = said.tokens[place]

    def _ramp(self, end: int, rows: Sequence[Row], states: Tensor, band: int, tally: Tally) -> None:
        at_least, measure, said = self._at_least[self._rule.ramps.index(end)], self._rule.confidence, None
        if self._by_head or self._rule.tells_all:  # whether it is right is asked of every token
            said = self._said(end, rows, states, measure)
            assert said.confidence is not None
            values = said.confidence
            tally.add("check_tokens", band, len(rows))
        else:
            values = self._exits.check(end, states, measure).tolist()
        if not self._by_head:
            tally.add("classifier_tokens", band, len(rows))
        leaving = []
        for i, (row, value) in enumerate(zip(rows, values, strict=True)):
            assert row.ramped is not None
            row.ramped.confidences.append(value)
            if said is not None:
                row.ramped.choices.append(said.tokens[i])
            if not row.ramped.ramp and confident(row, end, value >= at_least):
                leaving.append(i)
        if not leaving:
            return
        places = leaving
        if said is None:  # the check does not say which token it is
            said, places = self._said(end, [rows[i] for i in leaving], states[leaving], None), [*range(len(leaving))]
            tally.add("check_tokens", band, len(leaving))
        for i, place in zip(leaving, places, strict=True):
            seen = rows[i].ramped
            assert seen is not None
            seen.token, seen.word = said.token(place, rows[i].choice), said.tokens[place]
            seen.ramp, seen.time_ns = end, self._clock()


def delivered(token: Token, row: Row, end_ns: int) -> Token:
    """The row's token with where and when it was delivered, in an iteration that ended then."""
    seen = row.ramped
    if seen is None or not seen.ramp:
        return token
    return token._replace(
        ramp=seen.ramp, earlier_ns=max(0, end_ns - seen.time_ns), agrees=seen.delivered_agrees
    )


def told(answer: Answer, rule: ReleaseEarly, chars: int, time_ns: int) -> Released:
    """An answer's tokens that passed the rule's ramps: those before a change of the ramps say nothing of these."""
    seen = [each for each in answer.ramped if each.rule.ramps == rule.ramps and each.rule.tells_all]
    confidences = np.array([each.confidences for each in seen], np.float32).reshape(-1, len(rule.ramps))
    return Released(
        model=answer.model, request_id=answer.request.request_id, time_ns=time_ns,
        confident=confidences >= np.array(rule.thresholds, np.float32),
        agrees=np.array([each.agrees() for each in seen], np.bool_).reshape(confidences.shape),
        bits=None, chars=chars, confidences=confidences,
    )  # fmt: skip
