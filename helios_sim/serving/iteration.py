"""The plan and the outcome of an iteration on a device, and the protocols of engines."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from helios_sim.core.layout import Drafter, Numbers, Storage, Table, Trace
from helios_sim.core.price import PriceTables
from helios_sim.exits.rule import ExitRule
from helios_sim.exits.trace import TokenSpan
from helios_sim.policy.deployment import BatchingRule, Deployment, KvRule, Regrouping, ServicePlan
from helios_sim.policy.telemetry import Observation, Situation
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import Request

IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Member:
    """A running request before the iteration."""

    request: Request
    model: str
    prompt_tokens: int
    output_tokens: int
    span: TokenSpan
    generated: int  # output tokens produced so far
    context_tokens: int  # tokens with K and V in the cache
    recent: int = 0  # exits of its latest tokens, for exits that check near them (`exits/schedule.py`)
    held: int = 0  # the band before which its next token waits; 0 if it does not wait


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """A chunk of one running request's prompt."""

    index: int  # of its request among the members
    tokens: int
    context_tokens: int
    finishes: bool  # its last token yields the next output token


@dataclass(frozen=True, slots=True)
class Plan:
    """The next iteration."""

    model: str
    loaded_layers: int
    run_layers: int  # depth of tokens that are not observed, at most loaded_layers
    exit_rule: ExitRule
    batching: BatchingRule
    kv_rule: KvRule
    members: Sequence[Member]  # running requests in order of admission: decodes first, then prefills
    decoding: int  # members that decode: the first ones
    prefill: tuple[PrefillPart, ...]
    observe_tokens: int | None  # first tokens of each answer that run all loaded layers and are checked at every exit
    service_plan: ServicePlan | None  # the oracle's depths of every token, in place of the exit rule
    host_ahead: bool  # the host plans the next iteration while this one runs
    loading: bool  # weights stream in meanwhile
    drafts: int = 0  # most tokens that a request drafts, verified in the same iteration; 0: none drafts
    regrouping: Regrouping = field(default_factory=Regrouping)  # with BatchingRule.REBATCH
    first_band: int = 0  # first band that the decodes run; above 0 they go on from an exit
    waiting: int = 0  # members after the decodes that wait at an exit meanwhile
    resident_layers: int | None = None  # layers above come from host memory when they run; None: all are resident


class Token(NamedTuple):
    """The outcome of one request's token."""

    layers: int  # layers that it ran
    breach: bool = False  # it left at the cap without confidence
    last: bool = False  # it ends the answer, which may have been planned longer
    drafted: int = 0  # tokens that the request drafted before it
    accepted: int = 0  # drafts that were accepted
    held: int = 0  # above 0 there is no token yet: it waits before this band
    ramp: int = 0  # depth of the exit that released the answer while the token ran on; 0: it was released at the end
    earlier_ns: int = 0  # how long before the end of the iteration the answer was released
    agrees: bool = True  # it agrees with full depth, as far as the device knows


@dataclass(frozen=True, slots=True)
class Outcome:
    """An iteration that has run."""

    end_ns: int  # absolute
    profile: Profile  # profile of the model and the card that ran it
    composition: Composition  # rows that ran
    decoded: Sequence[Token]  # tokens of the members that decode
    prefilled: Sequence[Token]  # tokens of the prompts that finish, in their order
    drafted: Sequence[Composition] = ()  # rows of each draft pass before
    draft_ns: int = 0  # time of the draft passes
    drafter: Profile | None = None  # profile of the drafter, if it is another model
    late_layers: int = 0  # layers that came from host memory

    @property
    def parts(self) -> list[tuple[Profile, Composition]]:
        """All passes that ran, in order, each with the profile that prices it."""
        return [*((self.drafter or self.profile, step) for step in self.drafted), (self.profile, self.composition)]


@dataclass(frozen=True, slots=True)
class Places:
    """The requests that an engine's memory has room for at once."""

    requests: int
    tokens: int  # most tokens of each request, prompt and answer


class OutOfMemory(Exception):
    """The device had no memory for an iteration: nothing of it counts, and its requests must start again."""

    def __init__(self, reason: str, end_ns: int) -> None:
        super().__init__(reason)
        self.reason, self.end_ns = reason, end_ns  # absolute: when it was given up


class IterationFailed(Exception):
    """The device gave no result of an iteration: nothing of it counts, and its requests are lost."""

    def __init__(self, reason: str, end_ns: int) -> None:
        super().__init__(reason)
        self.reason, self.end_ns = reason, end_ns  # absolute: when it was given up


class Engine(Protocol):
    """Tokenizes, moves weights, observes and probes. Times are absolute integer nanoseconds of the environment's clock.

    An engine either runs iterations (`Executes`) or says beforehand what they take (`Foresees`).
    """

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        """Prompt tokens, including the text answered so far, and the span of the tokens still to be answered."""
        ...

    def places(self, model: str) -> Places | None:
        """The room for requests of this model, or None if only the server's blocks limit it."""
        ...

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        """Keep so many layers of these models in memory, now or when they have been loaded; free everything else.

        The models of the first call, when a run begins, are loaded at once. With `for_good` no other call follows.
        """
        ...

    def lay_beside(self, model: str, drafter: str) -> None:
        """Keep K and V of a drafter beside those of the model that it drafts for, until another pair is named.

        `hold` is called next. Nothing may be running, unless this is the pair already."""
        ...

    def free(self) -> None:
        """Free all weights and all K and V, until `hold` is called. Nothing may be running."""
        ...

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        """Start to copy weights to the card, and call back when they are there. Transfers run one at a time."""
        ...

    def observe(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        """The predictions of every exit for the first tokens of this request's answer."""
        ...

    def forget(self, request_id: int, again: bool = False) -> None:
        """Note that the request has left the system. A probe may still ask for the texts of the latest completed ones.

        With `again` it will come back under the same id and start anew.
        """
        ...

    def probe(
        self, model: str, requests: Sequence[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        """Score served texts, prompt and answer, in one full-depth pass. Returns its duration in ns and the scores."""
        ...


@runtime_checkable
class Executes(Engine, Protocol):
    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        """Run the iteration, starting now. Raises OutOfMemory if the device lacks memory for it, and IterationFailed if
        it gives no result."""
        ...


@runtime_checkable
class Hands(Engine, Protocol):
    """An engine that executes iterations in its own thread, beside other replicas."""

    def hand(self, plan: Plan, now_ns: int, tell: Callable[[Callable[[], Outcome]], None]) -> None:
        """Start the iteration and return. When it has ended, `tell` is called in the environment's thread, with a
        function that returns the outcome or raises, as `Executes.execute` does."""
        ...

    def hand_probe(
        self,
        model: str,
        requests: Sequence[Request],
        exit_rule: ExitRule,
        tell: Callable[[Callable[[], tuple[int, tuple[Observation, ...]]]], None],
    ) -> None:
        """Start a probe in the same way. The function passed to `tell` returns what `Engine.probe` does."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """All that the loop needs to price iterations of a model on a card under a deployment."""

    rules: Mapping[str, int]  # the core.layout.RULES that depend on the exits and the profile
    exits: tuple[int, ...]
    trace: Trace
    prices: PriceTables
    scalars: Table  # core.price.SCALARS, one row
    uniform: tuple[Table, Numbers]  # bands of iterations in which all tokens run the same layers, with layers by class
    banded: tuple[Table, Numbers]  # bands of all other iterations
    drafter: Drafter  # prices of another model that drafts; without one, of the model itself


@runtime_checkable
class Foresees(Engine, Protocol):
    warm_up_ns: int  # extra time of the very first iteration

    def terms(self, deployment: Deployment, situation: Situation, storage: Storage) -> Terms: ...

    def tokens_of(self, model: str, requests: IntArray) -> IntArray:
        """Tokenize requests (n, 9): prompt and output tokens, first, start and length in the trace, (n, 5)."""
        ...

    @property
    def transfer_end_ns(self) -> int | None:
        """The end of the transfer in progress, or None if there is none."""
        ...


class Around:
    """An engine that wraps another one and passes every call on to it."""

    def __init__(self, inner: Engine) -> None:
        self._inner = inner

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        return self._inner.tokenize(model, request, answered_chars)

    def places(self, model: str) -> Places | None:
        return self._inner.places(model)

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        self._inner.hold(layers, for_good)

    def lay_beside(self, model: str, drafter: str) -> None:
        self._inner.lay_beside(model, drafter)

    def free(self) -> None:
        self._inner.free()

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        self._inner.start_transfer(n_bytes, model, on_done)

    def observe(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        return self._inner.observe(model, request_id, span, n_tokens, exit_rule, time_ns)

    def forget(self, request_id: int, again: bool = False) -> None:
        self._inner.forget(request_id, again)

    def probe(
        self, model: str, requests: Sequence[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        return self._inner.probe(model, requests, exit_rule)
