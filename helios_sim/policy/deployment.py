"""Decisions of a policy: a deployment that the server carries out, and the triggers that ask the policy again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.exits.rule import DraftModel, ExitRule, PerToken, ReleaseEarly, SelfSpeculation


@dataclass(frozen=True, slots=True)
class Started:
    """The start of the run. It only occurs as a cause; no deployment declares it."""


@dataclass(frozen=True, slots=True)
class Judged:
    """A judgement of answers to a task, by a router that learns from them. It only occurs as a cause in the log."""

    task: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A failed load of weights. It only occurs as a cause; no deployment declares it.

    The deployment that was in force serves on, without admission limit, observed tokens and probe, and the policy is
    asked.
    """

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Faulted:
    """A fault that struck the replica. It only occurs as a cause in the log: no policy is asked."""

    what: str


@dataclass(frozen=True, slots=True)
class BreachLimit:
    """Fires if more than `limit` of the last `window_tokens` decode tokens left at the cap without confidence.

    Observed tokens do not count. Tokens enter the window in order of iteration, then of the request's place in the
    batch. The trigger is tested at the end of an iteration once the window is full. Firing clears the window, and so
    does a new deployment that changes the placement.
    """

    window_tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class Completed:
    """Fires when `requests` requests were completed since this deployment was decided, or since it last fired."""

    requests: int


@dataclass(frozen=True, slots=True)
class Drained:
    """Fires when nothing is running any more and the deployment's admission limit is used up."""


@dataclass(frozen=True, slots=True)
class Probed:
    """Fires when the deployment's probe has scored every candidate that it names."""


@dataclass(frozen=True, slots=True)
class AtTime:
    """Fires once, at the end of the first iteration at or after this time; on an idle server exactly at this time."""

    time_ns: int


@dataclass(frozen=True, slots=True)
class QueueAbove:
    """Fires if more than `requests` wait, at the end of an iteration; again only after the number fell to the limit."""

    requests: int


@dataclass(frozen=True, slots=True)
class RunningAbove:
    """Fires if more than `requests` run. Tested and fired like QueueAbove."""

    requests: int


@dataclass(frozen=True, slots=True)
class KvAbove:
    """Fires if more than this share of the KV blocks (0 to 1, to a millionth) is in use. Tested like QueueAbove."""

    share: float


@dataclass(frozen=True, slots=True)
class SloBelow:
    """Fires if less than this share (0 to 1) of the last `requests` completed requests met every SLO of the study.

    Requests count from when the deployment came into force, and the trigger is tested once there are `requests` of
    them. Firing clears the count, and so does a new deployment that changes the placement. The trigger is refused if
    the study has no `slo`.
    """

    share: float  # to a millionth
    requests: int = 64


@dataclass(frozen=True, slots=True)
class PowerAbove:
    """Fires if the replica's card, or group of cards, drew more than `watts` on average over the last `window_s` s.

    Tested and fired like QueueAbove, once a window is over. A simulated card draws the middle of its band: see
    `Energy`. The trigger is refused if the card's power is not known, or if it cannot reach `watts`.
    """

    watts: float  # to a milliwatt
    window_s: float = 10.0  # from 0.1 to 50


Trigger = (
    BreachLimit | Completed | Drained | Probed | AtTime | QueueAbove | RunningAbove | KvAbove | SloBelow | PowerAbove
)
Cause = Trigger | Started | LoadFailed | Faulted | Judged


LATE_ROOM = 2  # late layers that have room on the card


@dataclass(frozen=True, slots=True)
class Placement:
    """A model with its layers loaded up to `layers`, the cap.

    With `resident_layers` only so many layers stay on the card. The late layers above them come from host memory in
    each iteration that runs them, while other layers run: the iteration takes as long as the layers or the link,
    whichever is slower. `LATE_ROOM` late layers have room on the card, so that one runs while the next comes.
    """

    model: str
    layers: int
    resident_layers: int | None = None  # None means all layers

    @property
    def held_layers(self) -> int:
        """Number of layers that its weights take room for on the card."""
        return self.layers if self.resident_layers is None else min(self.resident_layers + LATE_ROOM, self.layers)


class BatchingRule(StrEnum):
    EACH_TOKEN = "each_token"  # noqa: S105 - a token leaves alone; the rest of the batch goes on without it
    LAZY = "lazy"  # the batch leaves early only if all its tokens are confident; KV is filled in the same iteration
    REBATCH = "rebatch"  # if enough tokens want to leave, they do; the rest waits to be regrouped (`Regrouping`)


class KvRule(StrEnum):
    """How a token gets K and V in the layers that it did not run."""

    PROPAGATE = "propagate"  # computed from the exit's hidden state in the same iteration
    RECOMPUTE = "recompute"  # the token runs these layers later, with the next token of its request that goes there
    COPY = "copy"  # K and V of the exit's own layer are used. In a simulation pages are mapped, at no cost
    NONE = "none"  # not at all: no later token of the request goes deeper, or needs them (the oracle)


MOST_FLUSH_S = 3600.0


@dataclass(frozen=True, slots=True)
class Regrouping:
    """The rule by which BatchingRule.REBATCH splits a batch at an exit, and the rest waits (DREX, arXiv 2512.15705).

    A batch that reaches an exit is split there if more than the share `split_above` of it wants to leave; that share is
    the cost of regrouping over the time of the remaining layers. If all tokens want to leave, all leave; if too few
    want to, all run on. After a split the rest keeps its hidden states and its place among the running requests. It
    runs on when `flush_requests` wait at the exit, when one has waited for `flush_s`, when one would miss the study's
    slo.tpot_s otherwise, or when nothing else decodes.
    """

    split_above: float | tuple[float, ...] = 0.0  # for all exits, or by exit before the last; 1 means all or none leave
    flush_requests: int | None = None  # None means as many as decode without waiting
    flush_s: float | None = None  # None means no limit


class InFlight(StrEnum):
    """The treatment of running requests when the model changes."""

    DRAIN = "drain"  # running requests finish on the old model; no new one starts meanwhile
    MIGRATE = "migrate"  # their text is tokenized anew and prefilled on the new model


def require_one_card(rule: ExitRule) -> None:
    """Raises UserError for a rule with drafts from another card, since a live server has one card."""
    if isinstance(rule, DraftModel) and rule.own_card is not None:
        allowed, value = "null: live, a server has one card", "own" if rule.own_card.parts == 1 else "pipelined"
        fix = "leave it and policy.exchange_s out, or set mode=simulate"
        raise UserError("policy.drafter_on", value, allowed, fix)


@dataclass(frozen=True, slots=True)
class Probe:
    """A probe: each model scores text that was already served, prompt and answer, in one full-depth prefill pass."""

    models: tuple[str, ...]
    prompts: int  # number of latest completed requests to score


class ServicePlan(Protocol):
    """The oracle's plan: which model serves each request, and how deep each of its tokens runs.

    At admission the head of the waiting queue starts if its model is the active one; if not, the server changes to its
    model as soon as nothing is running. The prompt runs to the first token's depth. There are no exit checks, and K and
    V of layers that a token did not run are neither computed nor missed.
    """

    def model(self, request_id: int) -> str: ...

    def layers(self, request_id: int) -> NDArray[np.int64]:
        """Depth of each output token of that request, (n,), in the tokens of its model."""
        ...


@dataclass(frozen=True, slots=True)
class Deployment:
    """A policy's decision for a replica: models and layers, exit rule, limits, and when the policy is asked again."""

    active: Placement
    exit_rule: ExitRule
    standby: tuple[Placement, ...] = ()
    batching: BatchingRule = BatchingRule.EACH_TOKEN
    kv_rule: KvRule = KvRule.PROPAGATE
    regrouping: Regrouping = Regrouping()  # used with BatchingRule.REBATCH
    batch_limit: int | None = None  # requests running at once; None means the server's own limit
    in_flight: InFlight = InFlight.DRAIN
    admit_limit: int | None = None  # requests that may start under this deployment; None means no limit
    observe_tokens: int | None = None  # first tokens of each request that run all loaded layers, every exit observed
    run_layers: int | None = None  # depth of tokens that are not observed, an exit; None means all loaded layers
    probe: Probe | None = None
    instant: bool = False  # loads and switches cost neither time nor memory; for the oracle only
    plan: ServicePlan | None = None  # replaces the exit rule; for the oracle only
    triggers: tuple[Trigger, ...] = ()
    reason: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)  # for the decision log, JSON values
    # The second-best option, if several were weighed: a report simulates it beside this one.
    next_best: Deployment | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.exit_rule, PerToken) and self.kv_rule is KvRule.NONE:
            raise UserError(
                "deployment.kv_rule",
                self.kv_rule.value,
                "per-token exits need propagate or recompute: tokens that go deeper read K and V of those that left",
                "set kv_rule=KvRule.PROPAGATE",
            )
        if self.batching is BatchingRule.REBATCH and self.observe_tokens is not None:
            raise UserError(
                "deployment.observe_tokens",
                self.observe_tokens,
                "no tokens are observed where batches are split at exits",
                "set observe_tokens=None, or another batching",
            )
        if isinstance(self.exit_rule, ReleaseEarly) and self.observe_tokens is not None:
            raise UserError(
                "deployment.observe_tokens",
                self.observe_tokens,
                "with ReleaseEarly every token runs all layers: ReleaseEarly(tells_all=True) tells of them",
                "set observe_tokens=None",
            )
        if isinstance(self.exit_rule, SelfSpeculation | DraftModel) and self.observe_tokens is not None:
            raise UserError(
                "deployment.observe_tokens",
                self.observe_tokens,
                "no tokens are observed where tokens are drafted, which tells itself how many drafts were accepted",
                "set observe_tokens=None",
            )
