"""The simulated engine: times come from a profile, exits from a trace. The serving loop is in `core`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import simpy
from numpy.typing import NDArray

from helios_sim.core.layout import (
    AGREES_THERE,
    BREACHES_THERE,
    LEAF_BITS,
    Drafter,
    IntArray,
    Storage,
    Trace,
)
from helios_sim.errors import UserError
from helios_sim.exits.replay import Replay, replay
from helios_sim.exits.rule import (
    MEASURES,
    Clairvoyant,
    DraftModel,
    ExitRule,
    FixedCap,
    PerToken,
    ReleaseEarly,
    SelfSpeculation,
)
from helios_sim.exits.schedule import schedule_of
from helios_sim.exits.trace import BoundTrace, ExitTrace, TokenSpan
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule
from helios_sim.policy.drafts import slowest_drafter
from helios_sim.policy.telemetry import Observation, Released, Situation
from helios_sim.profile.composition import Composition, PrefillChunk
from helios_sim.profile.profile import Profile
from helios_sim.request import Request, to_ns, whole_ns
from helios_sim.serving.exit_rules import flushes, released, split_above
from helios_sim.serving.iteration import Places, Terms

# Columns of requests as `Foresees.tokens_of` gets them.
_PROMPT_CHARS, _OUTPUT_CHARS, _TASK, _TEXT_START = 2, 3, 4, 5


@dataclass(frozen=True, slots=True)
class ModelData:
    """What the engine knows of one model: its costs and its recorded exits under the workload's task numbers."""

    profile: Profile
    trace: BoundTrace


class SimulatedEngine:
    """Implements the `Foresees` protocol. One object serves one replica.

    `warm_up_ns`: the very first iteration takes so much longer.
    """

    def __init__(self, env: simpy.Environment, models: Mapping[str, ModelData], warm_up_ns: int = 0) -> None:
        self.warm_up_ns = warm_up_ns
        self._env = env
        self._models = models
        self._channel_free_ns = 0  # one transfer at a time over the host link
        self._transfer_ends_ns: deque[int] = deque()
        self._terms: dict[Any, Terms] = {}

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        data = self._models[model]
        prompt_tokens = data.profile.model.tokens(request.prompt_chars + answered_chars)
        span = data.trace.locate(
            request.task, request.text_start + answered_chars, request.output_chars - answered_chars
        )
        return prompt_tokens, span

    def tokens_of(self, model: str, requests: IntArray) -> IntArray:
        data, (_, _, prompt, output, task, text, *_) = self._models[model], requests.T
        first, start, length, tokens = data.trace.locate_many(task, text, output).T
        return np.stack([data.profile.model.tokens_of_many(prompt), tokens, first, start, length], axis=1)

    def terms(self, deployment: Deployment, situation: Situation, storage: Storage) -> Terms:
        """The terms of a deployment. Deployments that do not differ in anything that is priced share one object."""
        d = deployment
        regroups = d.batching is BatchingRule.REBATCH and isinstance(d.exit_rule, PerToken)
        key = (
            d.active, d.run_layers, d.exit_rule, d.batching, d.kv_rule, d.plan is not None,
            d.regrouping if regroups else None,
        )  # fmt: skip
        found = self._terms.get(key)
        if found is None:
            if situation.shares and (regroups or isinstance(d.exit_rule, SelfSpeculation | DraftModel)):
                why = "of tokens that wait at an exit: false with batching=rebatch"
                if not regroups:
                    why = "blocks that are shared are not lent to drafts here: false where tokens are drafted"
                raise UserError("server.enable_prefix_caching", True, why, "set server.enable_prefix_caching=false")
            drafter = None
            if isinstance(d.exit_rule, DraftModel):  # side by side, the slowest counts
                profiles = {name: self._models[name].profile for name in d.exit_rule.drafters}
                drafter = self._models[slowest_drafter(profiles)]
            found = self._terms[key] = _terms(self._models[d.active.model], d, storage, drafter)
        return found

    def places(self, model: str) -> Places | None:
        return None

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        """Do nothing: the server counts memory."""

    def lay_beside(self, model: str, drafter: str) -> None:
        """Do nothing: the server counts memory."""

    def free(self) -> None:
        """Do nothing: the server counts memory."""

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        duration_ns = max(1, to_ns(self._models[model].profile.load_time_s(n_bytes), "load"))
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
        """The end of the transfer in progress, or None if there is none."""
        return self._transfer_ends_ns[0] if self._transfer_ends_ns else None

    def forget(self, request_id: int, again: bool = False) -> None:
        """Do nothing: a request's exits are in the trace, and nothing is kept of it here."""

    def observe(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        trace = self._models[model].trace.trace
        if isinstance(exit_rule, ReleaseEarly):
            rows = span.indices()[1:n_tokens]  # a prompt's token passes no ramp
            return Released.recorded(model, request_id, trace, rows, exit_rule, time_ns)
        of_text = span.rows(n_tokens)
        if isinstance(exit_rule, FixedCap | PerToken):
            confident = trace.confident_at(exit_rule.threshold, exit_rule.confidence, of_text)
        else:
            confident = trace.agree[of_text]
        return Observation(
            model=model,
            request_id=request_id,
            time_ns=time_ns,
            confident=confident,
            agrees=trace.agree[of_text],
            bits=trace.bits[of_text] if trace.bits is not None and trace.human_text else None,
            chars=int(np.add.reduce(trace.chars[of_text], dtype=np.int64)),
        )

    def probe(
        self, model: str, requests: Sequence[Request], exit_rule: ExitRule
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
            observations.append(self.observe(model, request.request_id, span, rows, exit_rule, now_ns))
        return duration_ns, tuple(observations)


def _terms(data: ModelData, deployment: Deployment, storage: Storage, drafter: ModelData | None) -> Terms:
    profile, trace, rule, loaded = data.profile, data.trace.trace, deployment.exit_rule, deployment.active.layers
    if deployment.active.resident_layers is not None:
        profile = profile.with_resident(deployment.active.resident_layers)
    per_token, clairvoyant = isinstance(rule, PerToken), isinstance(rule, Clairvoyant)
    replayed = replay(trace, rule, loaded if per_token or clairvoyant else deployment.run_layers or loaded)
    whole, planned = replayed.layers == trace.n_layers, deployment.plan is not None
    lazy, kv_rule = deployment.batching is BatchingRule.LAZY, deployment.kv_rule
    releases = isinstance(rule, ReleaseEarly) and not planned
    confidence = rule.confidence if isinstance(rule, FixedCap | PerToken | ReleaseEarly) else None
    classifier = confidence is not None and not confidence.by_head
    # A capped token's own logits give the confidences of a head, but not a check on the hidden state.
    watches_cap = classifier and isinstance(rule, FixedCap) and not whole
    if confidence is not None and (watches_cap or (classifier and (per_token or releases))):
        profile = profile.checking(confidence)  # refuses where its cost is not known
    # Above a fixed cap nothing reads K and V any more, and a clairvoyant's skipped layers cost nothing.
    propagates = per_token and (kv_rule is KvRule.PROPAGATE or (lazy and kv_rule is KvRule.RECOMPUTE))
    loaded_exit = trace.exits.index(loaded)
    bounds = trace.exits if planned else trace.exits[: loaded_exit + 1]
    agree, draft_exit = trace.agree, 0
    if isinstance(rule, SelfSpeculation) and not planned:
        bounds, draft_exit = (rule.exit_layers, loaded), trace.exits.index(rule.exit_layers)
    elif isinstance(rule, DraftModel) and not planned:
        bounds, draft_exit = (loaded,), len(trace.exits)
        agree = np.ascontiguousarray(np.column_stack([agree, trace.drafted_by_all(rule.drafters)]))
    looks, seen_alone = _looks(trace, rule if not planned else None)
    rules = {
        "per_token": per_token and not planned,
        "clairvoyant": clairvoyant and not planned,
        "head_checks": (per_token or releases) and not classifier,
        **released(deployment),
        **looks,
        "watches_cap": watches_cap,
        "lazy": lazy and not planned,
        "propagates": propagates,
        "repays": per_token and not propagates and kv_rule is KvRule.RECOMPUTE,
        "owes": kv_rule is KvRule.RECOMPUTE,
        **flushes(deployment),
        "draft_exit": draft_exit,
        "reads_trace": per_token or clairvoyant or releases or planned or not whole or trace.microbits is not None,
        "scores": trace.microbits is not None,
        "spread": profile.prices_spread or (drafter is not None and drafter.profile.prices_spread),
        "rule_exit": len(replayed.exits) - 1,
        "loaded_exit": loaded_exit,
        # An oracle's skipped layers cost nothing and lack nothing.
        "rule_layers": loaded if clairvoyant or planned else replayed.layers,
        "loaded_layers": loaded,
        "bands": len(bounds),
    }
    microbits = np.zeros((0, 0), np.int64) if trace.microbits is None else trace.microbits
    seen = Trace(
        _frozen(np.array(trace.exits, np.int64)), _frozen(_leaves(replayed)),
        _frozen(agree.view(np.uint8)), _frozen(microbits), np.zeros(1, np.int64),
        np.array([int(_checks_at(rule, depth)) for depth in trace.exits]),
        split_above(deployment.regrouping, loaded_exit),
        *map(_frozen, seen_alone),
    )  # fmt: skip
    pricing = profile.pricing
    uniform, banded = pricing.spans((replayed.layers,)), pricing.spans(bounds)
    prices, scalars = storage.group(pricing.tables), pricing.scalars(storage)
    whole_band = (uniform.table(storage), storage.array(uniform.class_layers))
    drafts = Drafter(*whole_band)
    if drafter is not None:
        tables, scalars, band = pricing.with_drafter(drafter.profile.pricing, storage)
        prices, drafts = storage.group(tables), Drafter(*band)
    return Terms(
        rules,
        trace.exits,
        storage.group(seen),
        prices,
        scalars,
        whole_band,
        (banded.table(storage), storage.array(banded.class_layers)),
        drafts,
    )


def _leaves(replayed: Replay) -> NDArray[np.int16]:
    """`Trace.leaves` of a replayed trace."""
    found = replayed.exit_index.astype(np.int16) << LEAF_BITS
    found |= replayed.breach * np.int16(BREACHES_THERE)
    found |= replayed.agreed * np.int16(AGREES_THERE)
    return found


def _checks_at(rule: ExitRule, depth: int) -> bool:
    """Whether the rule checks tokens at this depth before they have run all layers."""
    if isinstance(rule, ReleaseEarly):
        return depth in rule.ramps
    return isinstance(rule, PerToken) and rule.checks_at(depth)


def _looks(trace: ExitTrace, rule: ExitRule | None) -> tuple[dict[str, int], tuple[IntArray, IntArray, IntArray]]:
    """Rules of exits that check tokens one by one, and the trace's `sure` (T,), `in_vain` (T,) and `near` (E,)."""
    none = np.zeros(0, np.int64)
    if not isinstance(rule, PerToken) or not rule.looks:
        return {"looks": 0, "proposes": 0, "always_checks": 0, "recent_mask": 0}, (none, none, none)
    schedule, proposes = schedule_of(trace.exits, rule), MEASURES[rule.confidence].proposes
    bits = np.left_shift(1, np.arange(len(trace.exits) - 1))
    rules = {
        "looks": 1, "proposes": int(proposes), "always_checks": schedule.always, "recent_mask": schedule.recent_mask,
    }  # fmt: skip
    sure: IntArray = trace.confident_at(rule.threshold, rule.confidence)[:, :-1].astype(np.int64) @ bits
    in_vain: IntArray = np.zeros_like(sure)
    if proposes:
        asked = trace.recorded(rule.confidence)[:, :-1] <= -np.float32(rule.threshold)
        in_vain = asked.astype(np.int64) @ bits
    return rules, (sure, in_vain, schedule.near)


def _frozen(values: NDArray[Any]) -> NDArray[Any]:
    """Return a read-only view, so that all arrays have one type: each further type would be compiled anew."""
    view = values.view()
    view.flags.writeable = False
    return view
