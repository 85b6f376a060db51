"""The simulated engine: time from a profile, exits from a trace. Knows no queue and no policy.

It computes as many iterations at once as the plan allows; each has the same bits as if it were computed alone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence as SequenceOf
from dataclasses import dataclass, replace

import numpy as np
import simpy

from helios_sim.engine.ahead import terms_of, tokens_of
from helios_sim.engine.depths import Depths, decode_depths
from helios_sim.exits.replay import Replay, replay
from helios_sim.exits.rule import Clairvoyant, ExitRule, FixedCap, FullDepth, PerToken
from helios_sim.exits.trace import BoundTrace, TokenSpan
from helios_sim.policy.deployment import Deployment
from helios_sim.policy.telemetry import Observation, Situation
from helios_sim.profile.composition import Composition, IntArray, PrefillChunk
from helios_sim.profile.profile import Profile
from helios_sim.request import NS_PER_S, Request, whole_ns
from helios_sim.serving.ahead.contract import Terms
from helios_sim.serving.batch import Column, Sequence
from helios_sim.serving.iteration import Outcome, Places, Plan, Tokens


@dataclass(frozen=True, slots=True)
class ModelData:
    """What the engine knows of one model: its costs and its recorded exits under the workload's task numbers."""

    profile: Profile
    trace: BoundTrace


class SimulatedEngine:
    """Follows the `Engine` protocol. One object serves one replica."""

    def __init__(self, env: simpy.Environment, models: Mapping[str, ModelData]) -> None:
        self._env = env
        self._models = models
        self._channel_free_ns = 0  # one transfer at a time over the host link
        self._transfer_ends_ns: deque[int] = deque()

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        data = self._models[model]
        prompt_tokens = data.profile.model.tokens(request.prompt_chars + answered_chars)
        span = data.trace.locate(
            request.task, request.text_start + answered_chars, request.output_chars - answered_chars
        )
        return prompt_tokens, span

    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        data = self._models[plan.model]
        rule_layers = plan.run_layers if isinstance(plan.exit_rule, FixedCap | FullDepth) else plan.loaded_layers
        replayed = replay(data.trace.trace, plan.exit_rule, rule_layers)
        depths = decode_depths(plan, data.trace.trace, replayed)
        prefilled, chunks = self._prefill(plan, data, replayed)
        composition = _composition(plan, depths, chunks)
        if data.profile.prices_spread:
            composition = _with_spread(plan, composition)
        time_ns = whole_ns(data.profile.iteration_time_s(composition))
        return Outcome(
            end_ns=time_ns.cumsum() + now_ns,
            profile=data.profile,
            composition=composition,
            decoded=depths.tokens,
            prefilled=prefilled,
        )

    def places(self, model: str) -> Places | None:
        return None

    def hold(self, layers: Mapping[str, int]) -> None:
        """Memory is counted by the server; nothing lies in it here."""

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        duration_ns = max(1, round(self._models[model].profile.load_time_s(n_bytes) * NS_PER_S))
        now_ns = int(self._env.now)
        self._channel_free_ns = max(now_ns, self._channel_free_ns) + duration_ns
        arrival = self._env.timeout(self._channel_free_ns - now_ns)
        assert arrival.callbacks is not None
        self._transfer_ends_ns.append(self._channel_free_ns)
        arrival.callbacks.append(lambda _: self._transfer_ended(on_done))

    def _transfer_ended(self, on_done: Callable[[], None]) -> None:
        self._transfer_ends_ns.popleft()
        on_done()

    @property
    def transfer_end_ns(self) -> int | None:
        """When the transfer in progress ends; None: there is none."""
        return self._transfer_ends_ns[0] if self._transfer_ends_ns else None

    def observe(self, sequence: Sequence, n_tokens: int, exit_rule: ExitRule) -> Observation:
        request_id = sequence.request.request_id
        return self.observed(sequence.model, request_id, sequence.span, n_tokens, exit_rule, int(self._env.now))

    def terms(
        self, deployment: Deployment, situation: Situation, running_limit: int, closed_loop: bool
    ) -> Terms | None:
        """What iterations under this deployment need to be computed ahead; None where they cannot be."""
        data = self._models[deployment.active.model]
        return terms_of(data.profile, data.trace.trace, deployment, situation, running_limit, closed_loop)

    def tokens_of(self, model: str, arrivals: IntArray) -> IntArray:
        """`tokenize` of n requests that are rows of arrivals, shape (n, TOKENS_COLUMNS)."""
        data = self._models[model]
        return tokens_of(data.profile, data.trace, arrivals)

    def forget(self, request_id: int) -> None:
        """Nothing is kept of a request here: its exits lie in the trace."""

    def probe(
        self, model: str, requests: SequenceOf[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        data = self._models[model]
        n_layers = data.profile.model.n_layers
        duration_ns = 0
        observations = []
        for request in requests:
            prompt_tokens, span = self.tokenize(model, request)
            rows = span.n_tokens
            exits = data.trace.trace.exits
            checked = np.full((1, len(exits)), rows, np.int64)
            checked[0, -1] = 0  # the last exit is sampled from
            composition = Composition(
                bounds=exits,
                decode_tokens=np.zeros((1, len(exits)), np.int64),
                decode_kv_tokens=np.zeros((1, len(exits)), np.int64),
                sampled_tokens=np.array([rows], np.int64),
                check_tokens=checked,
                prefill=(PrefillChunk(prompt_tokens + rows, 0, n_layers),),
                host_sync_at_checks=False,
            )
            duration_ns += int(whole_ns(data.profile.iteration_time_s(composition))[0])
            now_ns = int(self._env.now)
            observations.append(self.observed(model, request.request_id, span, rows, exit_rule, now_ns))
        return duration_ns, tuple(observations)

    def observed(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        trace = self._models[model].trace.trace
        rows = span.indices()[:n_tokens]
        if isinstance(exit_rule, FixedCap | PerToken):
            confident = trace.confident_at(exit_rule.threshold, exit_rule.confidence)[rows]
        else:
            confident = trace.agree[rows]
        return Observation(
            model=model,
            request_id=request_id,
            time_ns=time_ns,
            confident=confident,
            agrees=trace.agree[rows],
            bits=trace.bits[rows] if trace.bits is not None and trace.human_text else None,
            chars=int(trace.chars[rows].sum()),
        )

    def _prefill(self, plan: Plan, data: ModelData, replayed: Replay) -> tuple[Tokens, tuple[PrefillChunk, ...]]:
        """Chunks to price, and the first tokens of the prompts that finish; those come from the last layer run."""
        if not plan.prefill:
            return Tokens(plan.run_layers, None, None), ()
        trace = data.trace.trace
        chunks, layers, agrees, microbits = [], [], [], []
        for part in plan.prefill:
            observed = _observed(plan, part.index)
            depth = plan.loaded_layers if observed else replayed.layers
            if plan.service_plan is not None:
                request_id = plan.batch.members[part.index].request.request_id
                depth = int(plan.service_plan.layers(request_id)[_generated(plan, part.index)])
            elif isinstance(plan.exit_rule, Clairvoyant) and not observed:
                depth = trace.exits[int(replayed.exit_index[_next_row(plan, part.index)])]
            chunks.append(PrefillChunk(part.tokens, part.context_tokens, depth))
            if part.finishes:
                at = _next_row(plan, part.index), trace.exits.index(depth)
                layers.append(depth)
                agrees.append(bool(trace.agree[at]))
                if trace.microbits is not None:
                    microbits.append(int(trace.microbits[at]))
        scores = np.array([microbits], np.int64) if microbits else None
        if all(depth == trace.n_layers for depth in layers):
            return Tokens(trace.n_layers, None, None, scores), tuple(chunks)
        return Tokens(np.array([layers], np.int64), None, np.array([agrees], bool), scores), tuple(chunks)


def _composition(plan: Plan, depths: Depths, chunks: tuple[PrefillChunk, ...]) -> Composition:
    check, sampled = depths.check_tokens, depths.sampled_tokens
    if chunks:
        deepest = max(chunk.layers for chunk in chunks)
        if not all(chunk.layers in depths.bounds for chunk in chunks):
            raise ValueError(f"prefill to {deepest} layers, bands end at {depths.bounds}")
        finishing = [part.index for part in plan.prefill if part.finishes]
        sampled = sampled + len(finishing)
        observed = sum(_observed(plan, index) for index in finishing)
        if observed:  # a prompt's last token is checked at every exit, as the answer's further tokens are
            check = np.zeros_like(depths.decode_tokens) if check is None else check.copy()
            check[:, :-1] += observed
    return Composition(
        bounds=depths.bounds,
        decode_tokens=depths.decode_tokens,
        decode_kv_tokens=depths.decode_kv_tokens,
        sampled_tokens=sampled,
        check_tokens=check,
        classifier_tokens=depths.classifier_tokens,
        propagated_tokens=depths.propagated_tokens,
        prefill=chunks,
        host_sync_at_checks=isinstance(plan.exit_rule, PerToken),
        host_ahead=plan.host_ahead,
        loading=plan.loading,
    )


def _with_spread(plan: Plan, composition: Composition) -> Composition:
    """The shortest and the longest context of the decodes, which grow by a token in each iteration."""
    context = plan.batch.decoding_column(Column.CONTEXT)
    if not len(context):
        return composition
    steps = np.arange(1, composition.n_iterations + 1, dtype=np.int64)
    return replace(composition, decode_kv_least=int(context.min()) + steps, decode_kv_most=int(context.max()) + steps)


def _observed(plan: Plan, index: int) -> bool:
    """Whether the next token of this request is one of those that run all loaded layers, every exit observed."""
    return plan.observe_tokens is not None and _generated(plan, index) < plan.observe_tokens


def _generated(plan: Plan, index: int) -> int:
    return int(plan.batch.column(Column.GENERATED)[index])


def _next_row(plan: Plan, index: int) -> int:
    batch = plan.batch
    first, start, length, generated = (
        int(batch.column(column)[index]) for column in (Column.FIRST, Column.START, Column.LENGTH, Column.GENERATED)
    )
    return first + (start + generated) % length
