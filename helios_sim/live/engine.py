"""The live engine: iterations run on the real device, weights really move, and times come from the wall clock.

`LiveEngine` follows the same `Engine` protocol as the simulated engine. Where weights are random, `replaying.py` takes
exits from a recorded trace.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence as SequenceOf
from dataclasses import replace
from typing import Protocol

from helios_sim.errors import UserError
from helios_sim.exits.rule import (
    Clairvoyant,
    DraftModel,
    ExitRule,
    PerToken,
    ReleaseEarly,
    SelfSpeculation,
)
from helios_sim.exits.schedule import schedule_of
from helios_sim.exits.trace import TokenSpan
from helios_sim.live.answers import Answer, Answers, observation, score
from helios_sim.live.captures import measures, passes, segments
from helios_sim.live.clock import WallClock
from helios_sim.live.device import Device, oom_message, open_device
from helios_sim.live.exits import Choice, Chunk, ObservedToken, Row, Tally
from helios_sim.live.forward import Forward
from helios_sim.live.memory.kv import CacheShape
from helios_sim.live.memory.paged import paged_tokens
from helios_sim.live.memory.residents import Residents
from helios_sim.live.memory.workspace import Workspace, try_out
from helios_sim.live.model.decoder import SegmentedModel
from helios_sim.live.other_drafts import OtherDrafts, require_one_tokenizer
from helios_sim.live.release import RampedToken, delivered, told
from helios_sim.live.served import LiveModel, PromptTexts
from helios_sim.live.speculation import Drafts, Speculation
from helios_sim.policy.deployment import Deployment, KvRule
from helios_sim.policy.telemetry import Observation
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import Request
from helios_sim.serving.iteration import Member, Outcome, OutOfMemory, Places, Plan, Token
from helios_sim.serving.replica import SERVED_TEXTS

_log = logging.getLogger(__name__)


class Faults(Protocol):
    """Receives failures of requests and loads. A `Server` is one."""

    def request_failed(self, request_id: int, reason: str) -> None: ...
    def load_failed(self, model: str, reason: str) -> None: ...


class LiveEngine:
    """Engine that computes on a real device, by the `Engine` protocol. One object serves one replica.

    slots: number of requests that can run at once if memory suffices.
    slot_tokens: the most tokens of a request, prompt and answer together.
    kernels: triton, torch or flashinfer, if `device` is a name; None for the kernels that suit the device.
    weight_bytes: device memory for weights; None for as much as all models need.
    residents: weights that are loaded already, if any.
    kept_answers: number of answers to keep of requests that completed and left, the latest ones; None to keep all.
    """

    def __init__(
        self,
        env: WallClock,
        models: Mapping[str, LiveModel],
        texts: PromptTexts,
        *,
        slots: int,
        slot_tokens: int,
        device: str | Device = "cpu",
        kernels: str | None = None,
        weight_bytes: int | None = None,
        residents: Residents | None = None,
        kept_answers: int | None = SERVED_TEXTS,
    ) -> None:
        self._env, self._models, self._texts = env, models, texts
        on = open_device(device, kernels) if isinstance(device, str) else device
        self.device = on
        self.residents = residents or Residents(models, on, weight_bytes)
        page = on.kernels.page_tokens
        self.work = Workspace(
            {name: _cache_shape(name, model, slot_tokens, page) for name, model in models.items()}, slots, on,
            max(model.profile.activation_reserve_bytes for model in models.values()),
        )  # fmt: skip
        self.answers = Answers(kept_answers)
        self.faults: Faults | None = None
        self.judges = False  # whether answers record the model's confidence in each token at full depth
        self.forward_ns = 0  # total time in forward passes of iterations
        self.shortages = 0  # iterations that ran out of memory
        self.loading = 0  # transfers in progress

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        return self._models[model].lengths(request, answered_chars)

    def prompt(self, model: str, request: Request, n_tokens: int, answered: str = "") -> list[int]:
        """The `n_tokens` ids that the model reads: the prompt and what other models have answered so far."""
        return self._models[model].prompt_ids(request, self._texts, n_tokens, answered)

    def choice(self, answer: Answer) -> Choice | None:
        """Return the function that samples the next token from its logits; None for the likeliest token."""
        return None

    def ends(self, answer: Answer) -> bool:
        """Whether the latest token ends the answer, even if more tokens were planned."""
        return False

    def places(self, model: str) -> Places | None:
        return self.work.places[model]

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        """Hold so many layers of each model. After the first load, reserve KV memory from the memory that is left."""
        self.residents.hold(layers, for_good)
        if layers and not self.work.reserved_bytes:
            name, end = next(iter(layers.items()))
            try_out(self.residents.running(name, end), end)
            self.work.reserve()
        elif layers and not self.work.is_reserved:  # after `free`
            self.work.reserve()

    def lay_beside(self, model: str, drafter: str) -> None:
        """Pair a model with a drafter; the next `hold` reserves KV memory anew. UserError if tokenizers differ."""
        if self.work.pair == (model, drafter):
            return
        require_one_tokenizer(self._models, model, drafter)
        self.work.keep_only(set(), self.answers)
        self.work.close()
        self.work.pair = model, drafter

    def free(self) -> None:
        self.work.keep_only(set(), self.answers)
        self.work.close()
        self.residents.free()

    def capture(self, deployment: Deployment | None = None) -> int:
        """Capture decode steps as graphs before time starts. Returns how many.

        Only the steps of this deployment are captured if it has no triggers; else those of all models at all depths.
        Models that are not loaded are captured too if each has its own place in memory, or else when they first run.
        Raises OutOfMemory if memory does not suffice.
        """
        if not self.device.captures:
            return 0
        final = deployment is not None and not deployment.triggers
        owing = deployment is not None and deployment.kv_rule is KvRule.RECOMPUTE
        captured = 0
        try:
            for name, data in self._models.items():
                if deployment is not None and final and name != deployment.active.model:
                    continue
                with self.residents.laid_out(name) as model:
                    if model is not None:
                        of = segments(data.exits, deployment if final else None)
                        exits = self.residents.exits(name)
                        rules = passes(data.exits, deployment, model.architecture.n_layers)
                        looks = data.exits, measures(deployment)
                        captured += self.work.capture(name, model, of, exits, *looks, owing, rules)
        except MemoryError as error:
            raise OutOfMemory(str(error), max(1, self._env.wall_ns)) from error
        return captured

    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        """Run the iteration; requests that arrive meanwhile are admitted after it.

        Raises OutOfMemory if memory does not suffice, and UserError for a policy that needs to know the future.
        """
        if plan.service_plan is not None or isinstance(plan.exit_rule, Clairvoyant):
            raise UserError("policy", "oracle", "what no policy can know is known only in a simulation", "leave it out")
        reason = None
        try:
            model = self.residents.running(plan.model, plan.loaded_layers, plan.resident_layers is not None)
            self.work.use(plan.model, model, plan.loaded_layers)
            answers = self._members(plan)
            if plan.drafts:
                if self.work.ahead is not None:
                    self.work.ahead.forget()
                return self._speculate(plan, model, answers, now_ns)
            rows, chunks = self._rows(plan, answers), self._chunks(plan, answers)
            read = self._read_beside(plan, model, answers, chunks)
            tally = self._forward(plan, model, rows, chunks)
        except (MemoryError, RuntimeError) as error:
            reason = oom_message(error)
            if reason is None:
                raise
        if reason is not None:  # outside `except`, since the error keeps the tensors of its frames alive
            self.shortages += 1
            self.work.keep_only(set(), self.answers)
            raise OutOfMemory(reason, max(now_ns + 1, self._env.wall_ns))
        self._note(plan, answers, rows, chunks)
        outcome = self._outcome(plan, answers, rows, chunks, tally, now_ns)
        return replace(outcome, drafted=read, drafter=self._drafter_profile(plan)) if read else outcome

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        """Load the held layers that are not resident yet, if any, and then call `on_done` in the clock's thread."""
        env = self._env
        env.open_door()
        self.loading += 1

        def finished(error: Exception | None) -> None:
            env.close_door()
            self.loading -= 1
            if error is None:
                on_done()
            elif self.faults is not None:
                self.faults.load_failed(model, str(error))
            else:
                raise error

        self.residents.load(model, lambda error: env.call(lambda: finished(error), always=True))

    def observe(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        answer = self.answers[request_id]
        data = self._models[answer.model]
        if isinstance(exit_rule, ReleaseEarly):
            return told(answer, exit_rule, len(data.decode(answer.tokens[1:])), time_ns)
        return observation(
            data, answer, answer.choices(n_tokens), answer.confidences(n_tokens), exit_rule, time_ns
        )

    def forget(self, request_id: int, again: bool = False) -> None:
        answer = self.answers.get(request_id)
        if answer is not None:
            self.work.give_up(answer)
            self.answers.note_left(request_id, again)

    def probe(
        self, model: str, requests: SequenceOf[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        start_ns = self._env.wall_ns
        data, now_ns = self._models[model], int(self._env.now)
        answers = [self._as_text_of(model, data, request) for request in requests]
        found: tuple[Observation, ...] = ()
        try:
            with self.residents.whole(model) as whole:
                exits = self.residents.exits(model)
                found = tuple(score(data, whole, exits, answer, exit_rule, now_ns) for answer in answers)
        except (MemoryError, RuntimeError) as error:  # serving goes on without the probe
            _log.warning("%s scored nothing: %s", model, error)
        return max(1, self._env.wall_ns - start_ns), found

    def close(self) -> None:
        """Stop the loading thread, and free the memory for weights, KV and captured graphs."""
        self.faults = None
        for answer in self.answers.values():
            answer.lose_cache()
        self.work.close()
        self.residents.close()
        self.device.release()

    def _as_text_of(self, model: str, data: LiveModel, request: Request) -> Answer:
        """Encode a served text with the tokenizer of another model, as an answer of that model."""
        served = self.answers[request.request_id]
        answered = served.before + self._models[served.model].decode(served.tokens)
        prompt_tokens, _ = self.tokenize(model, request)
        ids = data.encode(answered) or data.encode(" ")
        return Answer(request, model, self.prompt(model, request, prompt_tokens), len(ids), tokens=ids)

    def _members(self, plan: Plan) -> list[Answer]:
        """The batch's answers, each with a slot. Requests that left the batch lose their slots."""
        self.work.keep_only({member.request.request_id for member in plan.members}, self.answers)
        answers = []
        for member in plan.members:
            answer = self._answer(member)
            if answer.cached > member.context_tokens:  # it was preempted and came back
                answer.lose_cache()
            if not member.held:  # if it waited at an exit, its token starts over
                answer.waits = None
            self.work.place(answer)
            answers.append(answer)
        self.work.arrange(answers, plan.decoding + plan.waiting)
        return answers

    def _answer(self, member: Member) -> Answer:
        request = member.request
        known = self.answers.get(request.request_id)
        if known is not None and known.model == member.model and len(known.tokens) == member.generated:
            return known
        before = "" if known is None else known.before + self._models[known.model].decode(known.tokens)
        prompt = self.prompt(member.model, request, member.prompt_tokens, before)
        answer = Answer(request, member.model, prompt, member.output_tokens, before)
        self.answers[request.request_id] = answer
        return answer

    def _rows(self, plan: Plan, answers: SequenceOf[Answer]) -> list[Row]:
        per_token, schedule = isinstance(plan.exit_rule, PerToken), None
        if isinstance(plan.exit_rule, PerToken) and plan.exit_rule.looks:
            schedule = schedule_of(self._models[plan.model].exits, plan.exit_rule)
        rows = []
        for answer, member in zip(answers[: plan.decoding], plan.members, strict=False):
            seen = ObservedToken() if _observed(plan, answer) else None
            deep = per_token or seen is not None
            slot, at = self.work.slots.of(answer.request.request_id), answer.cached
            rows.append(Row(
                slot, at, answer.ids(at, at + 1)[0], plan.loaded_layers if deep else plan.run_layers,
                asks=per_token and seen is None, judged=self.judges, seen=seen, owed=answer.owed,
                choice=self.choice(answer), more=len(answer.tokens) + 1 < answer.planned_tokens, waits=answer.waits,
                ramped=RampedToken(plan.exit_rule) if isinstance(plan.exit_rule, ReleaseEarly) else None,
                checks=None if schedule is None else schedule.looking(member.recent),
            ))  # fmt: skip
        return rows

    def _chunks(self, plan: Plan, answers: SequenceOf[Answer]) -> list[Chunk]:
        chunks = []
        for part in plan.prefill:
            answer = answers[part.index]
            observed = _observed(plan, answer)
            layers = plan.loaded_layers if observed or isinstance(plan.exit_rule, PerToken) else plan.run_layers
            slot, start = self.work.slots.of(answer.request.request_id), answer.cached
            ids = answer.ids(start, part.context_tokens + part.tokens)
            row = None
            if part.finishes:
                seen = ObservedToken() if observed else None
                row = Row(
                    slot, start + len(ids) - 1, ids[-1], layers, judged=self.judges, decodes=False, seen=seen,
                    choice=self.choice(answer),
                )  # fmt: skip
            chunks.append(Chunk(slot, ids, start, layers, row))
        return chunks

    def _forward(self, plan: Plan, model: SegmentedModel, rows: SequenceOf[Row], chunks: SequenceOf[Chunk]) -> Tally:
        """Run the forward pass, which gives every row its next token."""
        exits = self._models[plan.model].exits
        banded = isinstance(plan.exit_rule, PerToken) or any(
            row.seen is not None or row.owed for row in (*rows, *(c.row for c in chunks if c.row is not None))
        ) or any(chunk.layers != plan.run_layers for chunk in chunks)  # fmt: skip
        bounds = exits[: exits.index(plan.loaded_layers) + 1] if banded else (plan.run_layers,)
        if isinstance(plan.exit_rule, ReleaseEarly) and rows:
            bounds = (*plan.exit_rule.ramps, plan.loaded_layers)
        work, heads, clock = self.work, self.residents.exits(plan.model), lambda: self._env.wall_ns
        forward = Forward(model, heads, work.cache, plan, bounds, work.captured, work.ahead, work.one_pass, clock)
        began_ns = self._env.wall_ns
        tally = forward.run(sorted(rows, key=lambda row: row.slot), chunks)
        self.residents.return_first(plan.model)
        if work.ahead is None or not work.ahead.goes_on:
            # K and V of rows that exited may be computed after the last token was read.
            self.device.mark().synchronize()
        self.forward_ns += self._env.wall_ns - began_ns
        return tally

    def _speculate(self, plan: Plan, model: SegmentedModel, answers: list[Answer], now_ns: int) -> Outcome:
        """Let requests draft, verify what they drafted, and add what was accepted to the answers."""
        decoding = list(zip(answers[: plan.decoding], plan.members, strict=False))
        decoding.sort(key=lambda each: self._slot(each[0]))
        requests = []
        for answer, member in decoding:
            at, choice = answer.cached, self.choice(answer)
            most = 0 if choice is not None else min(plan.drafts, member.output_tokens - member.generated - 1)
            requests.append(Drafts(self._slot(answer), at, answer.ids(at, at + 1)[0], most, choice))
        chunks = self._chunks(plan, answers)
        run = self._drafting(plan, model, answers)
        run.judged = self.judges
        began_ns = self._env.wall_ns
        drafted = run.draft(requests, chunks)
        draft_ns = self._env.wall_ns - began_ns
        composition = run.verify(requests, chunks)
        self.forward_ns += self._env.wall_ns - began_ns
        tokens = {}
        for (answer, member), drafts in zip(decoding, requests, strict=True):
            kept = self._accepted(plan, answer, member, drafts) + 1
            for n, (chosen, finite) in enumerate(zip(drafts.chosen[:kept], drafts.finite, strict=False)):
                row = Row(drafts.slot, 0, 0, 0, chosen=chosen, layers=plan.loaded_layers, finite=finite)
                row.confidence = drafts.confidence[n]
                answer.cached += 1
                self._add(answer, row)
                token = self._token(answer, row)._replace(drafted=drafts.most, accepted=n)
                if token.last or not finite:
                    break
            answer.read = min(answer.read, answer.cached)  # the drafter's K and V of rejected drafts no longer count
            tokens[answer.request.request_id] = token
        self._note_prompts(plan, answers, chunks)
        first = [(answers[p.index], c.row) for p, c in zip(plan.prefill, chunks, strict=True) if c.row is not None]
        return Outcome(
            end_ns=max(now_ns + 1, self._env.wall_ns),
            profile=self._models[plan.model].pricing(plan.exit_rule, plan.resident_layers),
            composition=replace(composition, loading=plan.loading),
            decoded=[tokens[member.request.request_id] for member in plan.members[: plan.decoding]],
            prefilled=[self._token(answer, row) for answer, row in first],
            drafted=[replace(step, loading=plan.loading) for step in drafted],
            draft_ns=draft_ns,
            drafter=self._drafter_profile(plan),
            late_layers=self.residents.came(plan.model),
        )

    def _drafting(self, plan: Plan, model: SegmentedModel, answers: SequenceOf[Answer]) -> Speculation:
        """Return what drafts (an exit of the model, or another model) and verifies."""
        rule, exits, cache, beside = plan.exit_rule, self.residents.exits(plan.model), self.work.cache, self.work.beside
        if isinstance(rule, SelfSpeculation):
            return Speculation(model, exits, cache, rule.exit_layers)
        assert isinstance(rule, DraftModel)
        assert beside is not None
        drafter = self.residents.running(rule.drafter, self._models[rule.drafter].profile.model.n_layers)
        by_slot = {self._slot(answer): answer for answer in answers}
        return OtherDrafts(model, exits, cache, drafter, self.residents.exits(rule.drafter), beside, by_slot)

    def _read_beside(
        self, plan: Plan, model: SegmentedModel, answers: SequenceOf[Answer], chunks: SequenceOf[Chunk]
    ) -> list[Composition]:
        """Let the drafter read the prompt chunks of an iteration without drafts. Returns the steps that it ran."""
        if not chunks or not isinstance(plan.exit_rule, DraftModel):
            return []
        began_ns = self._env.wall_ns
        ran = self._drafting(plan, model, answers).draft([], chunks)
        self.forward_ns += self._env.wall_ns - began_ns
        return ran

    def _drafter_profile(self, plan: Plan) -> Profile | None:
        rule = plan.exit_rule
        return self._models[rule.drafter].profile if isinstance(rule, DraftModel) else None

    def _slot(self, answer: Answer) -> int:
        return self.work.slots.of(answer.request.request_id)

    def _accepted(self, plan: Plan, answer: Answer, member: Member, drafts: Drafts) -> int:
        """Return how many of the request's drafts become tokens."""
        return drafts.agreed()

    def _note(self, plan: Plan, answers: SequenceOf[Answer], rows: SequenceOf[Row], chunks: SequenceOf[Chunk]) -> None:
        """Add the iteration's tokens to the answers."""
        for answer, row in zip(answers, rows, strict=False):
            answer.waits = None if row.layers else row.waits
            if row.layers:
                answer.cached += 1
                self._add(answer, row)
        self._note_prompts(plan, answers, chunks)

    def _note_prompts(self, plan: Plan, answers: SequenceOf[Answer], chunks: SequenceOf[Chunk]) -> None:
        for part, chunk in zip(plan.prefill, chunks, strict=True):
            answer = answers[part.index]
            answer.cached += len(chunk.tokens)
            if chunk.row is not None:
                self._add(answer, chunk.row)

    def _add(self, answer: Answer, row: Row) -> None:
        assert row.chosen is not None
        answer.tokens.append(row.chosen)
        answer.depths.append(row.layers)
        if row.confidence is not None:
            answer.sure.append(row.confidence)
        if row.seen is not None:
            answer.seen.append(row.seen)
        if row.ramped is not None:
            answer.ramped.append(row.ramped)
        if not row.finite:
            self.work.spoil(answer.request.request_id)
            reason = f"{answer.model} computed no number (NaN or infinity) for its token {len(answer.tokens)}"
            if self.faults is None:
                raise FloatingPointError(reason)
            self.faults.request_failed(answer.request.request_id, reason)

    def _outcome(
        self,
        plan: Plan,
        answers: SequenceOf[Answer],
        rows: SequenceOf[Row],
        chunks: SequenceOf[Chunk],
        tally: Tally,
        now_ns: int,
    ) -> Outcome:
        first = [
            (answers[part.index], chunk.row)
            for part, chunk in zip(plan.prefill, chunks, strict=True)
            if chunk.row is not None
        ]
        end_ns = max(now_ns + 1, self._env.wall_ns)
        return Outcome(
            end_ns=end_ns,
            profile=self._models[plan.model].pricing(plan.exit_rule, plan.resident_layers),
            composition=tally.composition(plan, chunks, self.device.captures),
            decoded=[
                delivered(self._token(answer, row), row, end_ns) if row.layers else self._held(plan, row)
                for answer, row in zip(answers, rows, strict=False)
            ],
            prefilled=[self._token(answer, row) for answer, row in first],
            late_layers=self.residents.came(plan.model),
        )

    def _held(self, plan: Plan, row: Row) -> Token:
        assert row.waits is not None
        return Token(0, held=self._models[plan.model].exits.index(row.waits.depth) + 1)

    def _token(self, answer: Answer, row: Row) -> Token:
        last = self.ends(answer)
        if last:
            answer.planned_tokens = len(answer.tokens)
        return Token(row.layers, row.breach, last)


def _cache_shape(name: str, model: LiveModel, slot_tokens: int, page: int) -> CacheShape:
    """Shape of the model's KV cache. Slots are whole pages of `page` tokens, or of any length if `page` is 0."""
    a = model.checkpoint.architecture
    tokens = min(slot_tokens, a.max_context_tokens)
    if page:
        tokens = paged_tokens(a, name, model.dtype, tokens, page)
    return CacheShape(a, model.profile.model.n_layers, tokens, model.dtype)


def _observed(plan: Plan, answer: Answer) -> bool:
    return plan.observe_tokens is not None and len(answer.tokens) < plan.observe_tokens
