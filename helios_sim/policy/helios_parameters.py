"""Settings of HELIOS, and its published constants.

The paper's constants are per token and per request of a server with batch 1; `batch_scaled` scales them with the mean
batch, since at batch 300 one iteration fills the window three times. Comments mark the constants that are not published
(evaluated tokens, half-life, cooldown).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from helios_sim.errors import UserError
from helios_sim.exits.rule import Confidence, require_threshold
from helios_sim.policy.checks import check_not_negative, check_positive
from helios_sim.policy.deployment import InFlight, KvRule

PUBLISHED_SHORTLIST = 3
PUBLISHED_PROMPTS = 5
PUBLISHED_ROUND_REQUESTS = 150
PUBLISHED_WINDOW_TOKENS = 100
PUBLISHED_LIMIT = 50
SCALED_COOLDOWN_S = 5.0
SCALED_ROUND_BATCHES = 10


class Constants(StrEnum):
    PUBLISHED = "published"
    BATCH_SCALED = "batch_scaled"


class Evaluation(StrEnum):
    """The way candidates are assessed in a round."""

    SERVE = "serve"  # each candidate in turn is loaded whole and serves a few prompts, as in the paper
    PROBE = "probe"  # each candidate scores text that was already served, while serving goes on; ours
    OFF = "off"  # no observations: offline exits and load decide


class BreachAction(StrEnum):
    """The answer to a breach of the limit."""

    CHEAPER = "cheaper"  # load or switch, by predicted cost until the next round
    LOAD_ONLY = "load_only"
    SWITCH_ONLY = "switch_only"
    TRANSFER_ONLY = "transfer_only"  # load or switch, by bytes over bandwidth alone


class Raised(StrEnum):
    """The exit rule once the remaining layers are loaded. Not published; FULL_DEPTH is our reading."""

    FULL_DEPTH = "full_depth"  # every token runs all layers until the next round, as it ran all layers to the cap
    EARLY_EXIT = "early_exit"  # a token leaves at the first exit where it is confident, K and V are propagated


class Standby(StrEnum):
    """Weights of other shortlisted candidates that stay in memory."""

    NONE = "none"
    CAPS = "caps"  # up to their caps
    WHOLE = "whole"


@dataclass(frozen=True, slots=True)
class RoundConstants:
    """Constants in force between two rounds."""

    round_requests: int
    window_tokens: int
    limit: int
    cooldown_s: float  # after the answer to a breach, further breaches are ignored for this time


@dataclass(frozen=True, slots=True)
class HeliosParameters:
    """Settings of `policy=helios`.

    With `constants` batch_scaled, at a mean batch B, window and limit are multiplied by B, and a round has at least
    10 B requests.
    """

    threshold: float  # below it a token that leaves at the cap counts as a breach
    confidence: Confidence = Confidence.MAX_PROBABILITY
    constants: Constants = Constants.PUBLISHED
    evaluation: Evaluation = Evaluation.SERVE
    on_breach: BreachAction = BreachAction.CHEAPER
    raised: Raised = Raised.FULL_DEPTH
    raised_kv_rule: KvRule = KvRule.PROPAGATE  # for tokens that leave early once all layers are loaded
    standby: Standby = Standby.NONE
    in_flight: InFlight = InFlight.DRAIN
    shortlist: int = PUBLISHED_SHORTLIST
    prompts_per_candidate: int = PUBLISHED_PROMPTS
    evaluated_tokens: int | None = 20  # per evaluated request; None means all. Not published: to be swept
    round_requests: int = PUBLISHED_ROUND_REQUESTS
    window_tokens: int = PUBLISHED_WINDOW_TOKENS
    limit: int = PUBLISHED_LIMIT
    cooldown_s: float | None = None  # None means 0 as published, or 5 s with batch_scaled (ours)
    half_life_requests: float = 300.0  # ours: evidence from two rounds ago has half the weight
    cap_layers: int | None = None  # None means by the cap rule
    batch_limit: int | None = None  # None means the server's own limit

    def __post_init__(self) -> None:
        require_threshold("policy.threshold", self.threshold)
        for key in ("shortlist", "prompts_per_candidate", "evaluated_tokens", "round_requests", "window_tokens"):
            check_positive(key, getattr(self, key))
        for key in ("half_life_requests", "cap_layers", "batch_limit"):
            check_positive(key, getattr(self, key))
        check_not_negative("cooldown_s", self.cooldown_s)
        if self.raised_kv_rule is KvRule.NONE:
            allowed = "propagate or recompute: later tokens that go deeper read K and V of the layers left out"
            raise UserError("policy.raised_kv_rule", "none", allowed, "set policy.raised_kv_rule=propagate")
        check_not_negative("limit", self.limit)
        if self.limit >= self.window_tokens:
            allowed = f"below the window of {self.window_tokens} tokens, or it is never exceeded"
            raise UserError("policy.limit", self.limit, allowed, "lower policy.limit or widen policy.window_tokens")

    def at_batch(self, batch: float) -> RoundConstants:
        """The constants at a mean batch of `batch` requests."""
        if self.constants is Constants.PUBLISHED:
            return RoundConstants(self.round_requests, self.window_tokens, self.limit, self.cooldown_s or 0.0)
        b = max(1, round(batch))
        cooldown_s = SCALED_COOLDOWN_S if self.cooldown_s is None else self.cooldown_s
        return RoundConstants(
            max(self.round_requests, SCALED_ROUND_BATCHES * b), self.window_tokens * b, self.limit * b, cooldown_s
        )
