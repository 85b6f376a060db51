"""What stands between iterations computed ahead and those around them: the engine, the server and its books.

Knows neither how they are computed nor how a replica's state is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol, runtime_checkable

from helios_sim.exits.rule import ExitRule
from helios_sim.exits.trace import TokenSpan
from helios_sim.policy.deployment import Deployment
from helios_sim.policy.telemetry import Observation, Situation
from helios_sim.profile.composition import IntArray
from helios_sim.profile.price_tables import PriceTables, Scalars
from helios_sim.request import RequestRecord
from helios_sim.serving.ahead.layout import Rules, Trace


class Stop(Enum):
    """What the server does next."""

    DECIDE = "a trigger has fired"
    WAIT = "there is nothing to run, and no arrival that is known"
    GO_ON = "records are handed over in between"


@dataclass(frozen=True, slots=True)
class Ledger:
    """Who came and left in a stretch, for whoever counts requests in the system."""

    records: list[RequestRecord]
    arrived: int
    from_ns: int
    until_ns: int
    presence_ns: int  # requests in the system, integrated from then until then
    sojourn_ns: int  # time in the system of those who left


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds as long as a deployment is in force."""

    rules: Rules
    trace: Trace
    prices: PriceTables
    scalars: Scalars
    uniform: IntArray  # bands of an iteration in which all tokens run the same layers
    banded: IntArray  # bands of the others


@dataclass(frozen=True, slots=True)
class Meanwhile:
    """What goes on beside serving, and so what ends a stretch besides triggers."""

    loading: bool  # weights are on their way: when the first of them are there is known beforehand
    pending: bool = False  # a deployment is decided: until it is in force no policy is asked, and nobody is dropped
    draining: bool = False  # nobody starts; what is in flight is to finish
    room_blocks: int | None = None  # answers in flight must come to need no more than these before anything loads


@runtime_checkable
class Foreseeing(Protocol):
    """An engine that says beforehand what iterations will cost and what becomes of tokens."""

    def terms(
        self, deployment: Deployment, situation: Situation, running_limit: int, closed_loop: bool
    ) -> Terms | None: ...

    def tokens_of(self, model: str, arrivals: IntArray) -> IntArray: ...

    @property
    def transfer_end_ns(self) -> int | None:
        """When the transfer of weights in progress ends; None: there is none."""
        ...

    def observed(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation: ...
