"""The live engine for models with random weights: real times, with exits taken from a recorded trace.

The output of such a model means nothing, so confidences, and what full depth would have said, come from the exit trace,
token by token as in a simulation. Everything is still computed: layers, heads, checks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence as SequenceOf

from helios_sim.exits.rule import ExitRule, FixedCap, PerToken
from helios_sim.exits.trace import TokenSpan
from helios_sim.live.answers import Answer
from helios_sim.live.engine import LiveEngine
from helios_sim.live.rows import Chunk, Row
from helios_sim.policy.telemetry import Observation
from helios_sim.request import Request
from helios_sim.serving.iteration import Member, Plan


class ReplayingEngine(LiveEngine):
    """A `LiveEngine` with exits that follow the models' traces."""

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
            row.recorded = self._confident(plan, answer, member)
        return rows

    def _chunks(self, plan: Plan, answers: SequenceOf[Answer]) -> list[Chunk]:
        chunks = super()._chunks(plan, answers)
        for part, chunk in zip(plan.prefill, chunks, strict=True):
            if chunk.row is not None:
                chunk.row.recorded = self._confident(plan, answers[part.index], plan.members[part.index])
        return chunks

    def _confident(self, plan: Plan, answer: Answer, member: Member) -> Mapping[int, bool] | None:
        """Confidence of the next token by depth, from the trace; None if the exit rule does not ask."""
        rule = plan.exit_rule
        if not isinstance(rule, FixedCap | PerToken):
            return None
        trace, span = self._models[plan.model].trace.trace, member.span
        at = span.first + (span.start + len(answer.tokens)) % span.length
        return dict(zip(trace.exits, trace.confident_at(rule.threshold, rule.confidence)[at].tolist(), strict=True))

    def _recorded(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule
    ) -> Observation:
        trace = self._models[model].trace.trace
        rows = span.indices()[:n_tokens]
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
