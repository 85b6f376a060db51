"""When a policy wants to be asked: declared as data, so that the engine finds the first moment inside a leap."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins. Only ever a cause, never declared."""


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """Weights that were decided on could not be loaded. Only ever a cause in the log: no policy is asked."""

    model: str
    reason: str


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


Trigger = BreachLimit | Completed | Drained | Probed | AtTime | QueueAbove
Cause = Trigger | Started | LoadFailed
