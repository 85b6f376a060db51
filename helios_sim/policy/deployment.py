"""What a policy decides: a deployment that the server carries out, and the triggers on which it is asked again."""

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
    """The run begins. Only ever a cause, never declared."""


@dataclass(frozen=True, slots=True)
class Judged:
    """Answers to a task were judged, by a router that learns from them. Only ever a cause, never declared."""

    task: str


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Weights that were decided on could not be loaded: what was in force before serves on, at most without the limits
    of a round, and the policy is asked. Only ever a cause, never declared."""

    model: str
    reason: str


@dataclass(frozen=True, slots=True)
class Faulted:
    """A fault struck the replica. Only ever a cause in the log: no policy is asked."""

    what: str


@dataclass(frozen=True, slots=True)
class BreachLimit:
    """More than `limit` of the last `window_tokens` decode tokens left at the cap without confidence.

    Tokens count in order of iteration, then of the request's place in the batch; tested at the end of an iteration
    once the window is full. Firing clears the window, and so does a new deployment that changes the placement.
    """

    window_tokens: int
    limit: int


@dataclass(frozen=True, slots=True)
class Completed:
    """So many requests were completed since this deployment was decided (or since it last fired)."""

    requests: int


@dataclass(frozen=True, slots=True)
class Drained:
    """Nothing is running any more and the deployment's admission limit is used up."""


@dataclass(frozen=True, slots=True)
class Probed:
    """The deployment's probe has scored every candidate that it names."""


@dataclass(frozen=True, slots=True)
class AtTime:
    """The end of the first iteration at or after this time; an idle server fires exactly then. Fires once."""

    time_ns: int


@dataclass(frozen=True, slots=True)
class QueueAbove:
    """More than `requests` wait. Tested at the end of an iteration; fires again only after falling to or below."""

    requests: int


@dataclass(frozen=True, slots=True)
class RunningAbove:
    """More than `requests` run. Tested and fired as QueueAbove."""

    requests: int


@dataclass(frozen=True, slots=True)
class KvAbove:
    """More than this share of the KV blocks is in use, 0 to 1, to a millionth. Tested and fired as QueueAbove."""

    share: float


@dataclass(frozen=True, slots=True)
class SloBelow:
    """Fewer than this share of the last `requests` completed requests met every SLO of the study, 0 to 1.

    They count since the deployment came into force, and it is tested once there are so many. Firing begins anew, and so
    does a new deployment that changes the placement. Refused where the study has no `slo`.
    """

    share: float  # to a millionth
    requests: int = 64


@dataclass(frozen=True, slots=True)
class PowerAbove:
    """Over the last `window_s` seconds the replica's card, or group of cards, drew more than so many watts on average.

    Tested and fired as QueueAbove, once a window is over. A simulated card draws the middle of its band: see
    `Energy`. Refused where its power is not known, and with watts that it cannot reach.
    """

    watts: float  # to a milliwatt
    window_s: float = 10.0  # from 0.1 to 50


Trigger = (
    BreachLimit | Completed | Drained | Probed | AtTime | QueueAbove | RunningAbove | KvAbove | SloBelow | PowerAbove
)
Cause = Trigger | Started | LoadFailed | Faulted | Judged


LATE_ROOM = 2  # layers


@dataclass(frozen=True, slots=True)
class Placement:
    """A model with its layers loaded up to `layers`, the cap.

    With `resident_layers` only so many stay on the card. Those above come from host memory, in each iteration that runs
    them, beside the others: it takes as long as they do, or as the link does, whichever is longer. `LATE_ROOM` more
    have room on the card, where one runs while the next comes.
    """

    model: str
    layers: int
    resident_layers: int | None = None  # None: all of them

    @property
    def held_layers(self) -> int:
        """As many as its weights take room for on the card."""
        return self.layers if self.resident_layers is None else min(self.resident_layers + LATE_ROOM, self.layers)


class BatchingRule(StrEnum):
    EACH_TOKEN = "each_token"  # noqa: S105 - a token leaves alone; the rest of the batch goes on without it
    LAZY = "lazy"  # the batch leaves early only when all of it is confident; KV is filled in the same iteration
    REBATCH = "rebatch"  # enough tokens that want to leave do so, the rest waits for others (`Regrouping`)


class KvRule(StrEnum):
    """What happens to the K and V of a token in the layers that it did not run."""

    PROPAGATE = "propagate"  # computed from the exit's hidden state in the same iteration
    RECOMPUTE = "recompute"  # the token runs the layers later, with the next token of its request that goes there
    COPY = "copy"  # those of the exit's own layer stand for them. Simulated: pages are mapped, at no cost
    NONE = "none"  # no later token of its request goes deeper, or it needs none there (the oracle)


MOST_FLUSH_S = 3600.0


@dataclass(frozen=True, slots=True)
class Regrouping:
    """When BatchingRule.REBATCH splits a batch at an exit, and how long the rest waits there (DREX, arXiv 2512.15705).

    A batch that reaches an exit is split where more than `split_above` of it wants to leave; that share is the cost of
    regrouping over the time of the layers that are left. Where all of it wants to leave it does; where too little does,
    all of it runs on. The rest keeps its hidden states and its place among the running requests. It runs on when
    `flush_requests` wait at the exit, when one has waited for `flush_s`, when one would miss the study's slo.tpot_s
    otherwise, or when nothing else decodes.
    """

    split_above: float | tuple[float, ...] = 0.0  # of every exit, or by exit before the last; 1: only all together
    flush_requests: int | None = None  # None: as many as do not wait
    flush_s: float | None = None  # None: however long


class InFlight(StrEnum):
    """What happens to running requests when the model changes."""

    DRAIN = "drain"  # they finish on the old model, nothing new starts meanwhile
    MIGRATE = "migrate"  # their text is tokenized anew and prefilled on the new model


def require_one_card(rule: ExitRule) -> None:
    """UserError for drafts that another card makes: a live server has one."""
    if isinstance(rule, DraftModel) and rule.own_card is not None:
        allowed, value = "null: live, a server has one card", "own" if rule.own_card.parts == 1 else "pipelined"
        fix = "leave it and policy.exchange_s out, or set mode=simulate"
        raise UserError("policy.drafter_on", value, allowed, fix)


@dataclass(frozen=True, slots=True)
class Probe:
    """Score text that was already served, prompt and answer, in one full-depth prefill pass on each model."""

    models: tuple[str, ...]
    prompts: int  # the latest completed requests that are scored


class ServicePlan(Protocol):
    """Which model serves each request and how deep each of its tokens runs: for the oracle only.

    At admission the head of the queue starts if its model is the active one; if not, the server changes to it as
    soon as nothing is running. The prompt runs to the first token's depth. Nothing is checked, K and V of layers
    that a token did not run are neither computed nor missed.
    """

    def model(self, request_id: int) -> str: ...

    def layers(self, request_id: int) -> NDArray[np.int64]:
        """(n,) depth of each output token of that request, in the tokens of its model."""
        ...


@dataclass(frozen=True, slots=True)
class Deployment:
    """What a replica is to serve with: models and layers, exit rule, limits, and when the policy is asked again."""

    active: Placement
    exit_rule: ExitRule
    standby: tuple[Placement, ...] = ()
    batching: BatchingRule = BatchingRule.EACH_TOKEN
    kv_rule: KvRule = KvRule.PROPAGATE
    regrouping: Regrouping = Regrouping()  # with BatchingRule.REBATCH
    batch_limit: int | None = None  # requests running at once; None: the server's own limit
    in_flight: InFlight = InFlight.DRAIN
    admit_limit: int | None = None  # requests that may start under this deployment; None: no limit
    observe_tokens: int | None = None  # first tokens of each request at full loaded depth, every exit observed
    run_layers: int | None = None  # depth of tokens that are not observed, an exit; None: all loaded layers
    probe: Probe | None = None
    instant: bool = False  # loads and switches cost neither time nor memory: for the oracle only
    plan: ServicePlan | None = None  # takes the place of the exit rule; for the oracle only
    triggers: tuple[Trigger, ...] = ()
    reason: str = ""
    evidence: Mapping[str, Any] = field(default_factory=dict)  # for the decision log, JSON values
    # What would have been decided without this option, where several were weighed: a report serves it beside this one.
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
