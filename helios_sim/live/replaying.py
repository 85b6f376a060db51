"""The live engine for models with random weights: all is computed, but exits and drafts follow a recorded trace.

The output of random weights means nothing, so an exit's confidence in it would mean nothing either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as SequenceOf

import numpy as np

from helios_sim.exits.rule import MEASURES, DraftModel, ExitRule, FixedCap, PerToken, ReleaseEarly, SelfSpeculation
from helios_sim.exits.trace import TokenSpan
from helios_sim.live.answers import Answer
from helios_sim.live.engine import LiveEngine
from helios_sim.live.exits import Chunk, Row
from helios_sim.live.release import RampedToken
from helios_sim.live.speculation import Drafts
from helios_sim.policy.telemetry import Observation, Released
from helios_sim.request import Request
from helios_sim.serving.iteration import Member, Plan


class ReplayingEngine(LiveEngine):
    """A `LiveEngine` in which exits and accepted drafts follow the models' traces."""

    def lay_beside(self, model: str, drafter: str) -> None:
        self._models[model].trace.trace.drafted_by(drafter)  # UserError if that was not recorded
        super().lay_beside(model, drafter)

    def observe(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        return self._recorded(model, request_id, span, n_tokens, exit_rule)

    def probe(
        self, model: str, requests: SequenceOf[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        taken_ns, scored = super().probe(model, requests, exit_rule)
        found = []
        for request in requests[: len(scored)]:
            _, span = self.tokenize(model, request)
            found.append(self._recorded(model, request.request_id, span, span.n_tokens, exit_rule))
        return taken_ns, tuple(found)

    def _rows(self, plan: Plan, answers: SequenceOf[Answer]) -> list[Row]:
        rows = super()._rows(plan, answers)
        for row, answer, member in zip(rows, answers, plan.members, strict=False):
            if isinstance(plan.exit_rule, ReleaseEarly):
                row.recorded, row.ramped = self._at_ramps(plan.model, plan.exit_rule, answer, member)
                continue
            row.recorded, row.asked = self._confident(plan, answer, member), self._asked(plan, answer, member)
        return rows

    def _chunks(self, plan: Plan, answers: SequenceOf[Answer]) -> list[Chunk]:
        chunks = super()._chunks(plan, answers)
        for part, chunk in zip(plan.prefill, chunks, strict=True):
            if chunk.row is not None:
                chunk.row.recorded = self._confident(plan, answers[part.index], plan.members[part.index])
        return chunks

    def _accepted(self, plan: Plan, answer: Answer, member: Member, drafts: Drafts) -> int:
        trace, span, rule, accepted = self._models[plan.model].trace.trace, member.span, plan.exit_rule, 0
        if isinstance(rule, DraftModel):
            agree = trace.drafted_by(rule.drafter)
        else:
            assert isinstance(rule, SelfSpeculation)
            agree = trace.agree[:, trace.exits.index(rule.exit_layers)]
        while accepted < drafts.most:
            if not agree[span.first + (span.start + len(answer.tokens) + accepted) % span.length]:
                break
            accepted += 1
        return accepted

    def _confident(self, plan: Plan, answer: Answer, member: Member) -> Mapping[int, bool] | None:
        """Whether each depth is confident of the next token, from the trace; None if the exit rule does not ask."""
        rule = plan.exit_rule
        if not isinstance(rule, FixedCap | PerToken):
            return None
        trace, span = self._models[plan.model].trace.trace, member.span
        at = span.first + (span.start + len(answer.tokens)) % span.length
        return dict(zip(trace.exits, trace.confident_at(rule.threshold, rule.confidence)[at].tolist(), strict=True))

    def _at_ramps(
        self, model: str, rule: ReleaseEarly, answer: Answer, member: Member
    ) -> tuple[dict[int, bool], RampedToken]:
        """Whether each ramp is confident of the next token, by depth, and whether each agrees, from the trace."""
        trace = self._models[model].trace.trace
        row = member.span.first + (member.span.start + len(answer.tokens)) % member.span.length
        seen = Released.recorded(model, answer.request.request_id, trace, np.array([row]), rule, 0)
        sure, agrees = (dict(zip(rule.ramps, of[0].tolist(), strict=True)) for of in (seen.confident, seen.agrees))
        return sure, RampedToken(rule, agrees)

    def _asked(self, plan: Plan, answer: Answer, member: Member) -> Mapping[int, bool] | None:
        """Whether a predictor asks the head at each depth, in vain or not; None if the rule uses no predictors."""
        rule = plan.exit_rule
        if not isinstance(rule, PerToken) or not MEASURES[rule.confidence].proposes:
            return None
        trace, span = self._models[plan.model].trace.trace, member.span
        at = span.first + (span.start + len(answer.tokens)) % span.length
        asked = abs(trace.recorded(rule.confidence)[at]) >= np.float32(rule.threshold)
        return dict(zip(trace.exits, asked.tolist(), strict=True))

    def _recorded(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule
    ) -> Observation:
        trace = self._models[model].trace.trace
        rows = span.indices()[:n_tokens]
        if isinstance(exit_rule, ReleaseEarly):
            return Released.recorded(model, request_id, trace, rows[1:], exit_rule, int(self._env.now))
        confident = trace.agree
        if isinstance(exit_rule, FixedCap | PerToken):
            confident = trace.confident_at(exit_rule.threshold, exit_rule.confidence)
        return Observation(
            model=model,
            request_id=request_id,
            time_ns=int(self._env.now),
            confident=confident[rows],
            agrees=trace.agree[rows],
            bits=None,  # the text does not exist
            chars=int(trace.chars[rows].sum()),
        )
