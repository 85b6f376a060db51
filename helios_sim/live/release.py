"""Answers that leave at a ramp while the model goes on, on the device (Apparate, arXiv 2312.05385).

Every decode runs all layers. Each ramp predicts the next token from its depth. The first ramp that is confident gives
the answer's token, which is delivered at that moment; the next iteration goes on with it, as after any early exit. K
and V are computed in all layers. The whole model's token is the verdict on the delivered one, which policies are told.
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
    """What the ramps predicted for one token, in their order, and what the whole model did."""

    rule: ReleaseEarly
    recorded: Mapping[int, bool] | None = None  # whether each ramp agrees, from a trace; None for the model's own
    choices: list[int] = field(default_factory=list)  # each ramp's likeliest token, if it was computed
    confidences: list[float] = field(default_factory=list)
    ramp: int = 0  # layers of the ramp that delivered; 0 if none did
    token: int = 0  # the token that it delivered
    word: int = 0  # the likeliest token there; the same as `token` unless that was sampled
    time_ns: int = 0  # time of the delivery
    verdict: int = 0  # the whole model's likeliest token

    @property
    def delivered_agrees(self) -> bool:
        return self.word == self.verdict if self.recorded is None else self.recorded[self.ramp]

    def agrees(self) -> list[bool]:
        """Whether each ramp agrees with the whole model, if the rule tells the policy about all ramps."""
        if self.recorded is not None:
            return [self.recorded[ramp] for ramp in self.rule.ramps]
        return [choice == self.verdict for choice in self.choices]


class ReleaseDecider(ExitDecider):
    """Applies `ReleaseEarly`. Its ramps are the ends of all bands but the last. `clock`: the time of the run in ns."""

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
        """Note which answers leave at a ramp; after the last layer, give every row its token."""
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
        if self._by_head or self._rule.tells_all:  # the policy is told for every token whether it is right
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
    """Add to the row's token where and when it was delivered, in an iteration that ended at `end_ns`."""
    seen = row.ramped
    if seen is None or not seen.ramp:
        return token
    return token._replace(
        ramp=seen.ramp, earlier_ns=max(0, end_ns - seen.time_ns), agrees=seen.delivered_agrees
    )


def told(answer: Answer, rule: ReleaseEarly, chars: int, time_ns: int) -> Released:
    """What the rule's ramps said about an answer's tokens, without tokens from before a change of the ramps."""
    seen = [each for each in answer.ramped if each.rule.ramps == rule.ramps and each.rule.tells_all]
    confidences = np.array([each.confidences for each in seen], np.float32).reshape(-1, len(rule.ramps))
    return Released(
        model=answer.model, request_id=answer.request.request_id, time_ns=time_ns,
        confident=confidences >= np.array(rule.thresholds, np.float32),
        agrees=np.array([each.agrees() for each in seen], np.bool_).reshape(confidences.shape),
        bits=None, chars=chars, confidences=confidences,
    )  # fmt: skip
