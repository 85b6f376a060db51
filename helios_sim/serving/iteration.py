"""What the server asks a device to run, what comes back, and the protocols that engines follow."""

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
    """A running request, as it stands before the iteration."""

    request: Request
    model: str
    prompt_tokens: int
    output_tokens: int
    span: TokenSpan
    generated: int  # output tokens produced so far
    context_tokens: int  # whose K and V are in the cache
    recent: int = 0  # where its latest tokens left, where exits near these look (`exits/schedule.py`)
    held: int = 0  # the band before which its next token waits; 0: it does not


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """A chunk of one running request's prompt."""

    index: int  # among the members
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
    members: Sequence[Member]  # of the batch, in order of admission: those that decode, then those that prefill
    decoding: int  # so many members decode: the first ones
    prefill: tuple[PrefillPart, ...]
    observe_tokens: int | None  # each request's first tokens that run all loaded layers, every exit observed
    service_plan: ServicePlan | None  # depths of every token, in place of the exit rule: the oracle's
    host_ahead: bool  # the host plans the next iteration while this one runs
    loading: bool  # weights stream in meanwhile
    drafts: int = 0  # tokens that a request drafts at most, to be verified at once; 0: none drafts
    regrouping: Regrouping = field(default_factory=Regrouping)  # with BatchingRule.REBATCH
    first_band: int = 0  # with which the tokens of those that decode begin or go on
    waiting: int = 0  # so many members after those that decode wait at an exit meanwhile
    resident_layers: int | None = None  # those above come from host memory when they run; None: all are there


class Token(NamedTuple):
    """What became of one request's token."""

    layers: int  # that it ran
    breach: bool = False  # it left at the cap without confidence
    last: bool = False  # it ends the answer, which may have been planned longer
    drafted: int = 0  # tokens that its request drafted before it
    accepted: int = 0  # those of them that became tokens too
    held: int = 0  # there is none yet: it waits before this band
    ramp: int = 0  # layers of the exit where its answer left while it ran on; 0: it left at the end
    earlier_ns: int = 0  # by how much that was before the iteration ended
    agrees: bool = True  # with full depth, as far as the device knows


@dataclass(frozen=True, slots=True)
class Outcome:
    """An iteration that has run."""

    end_ns: int  # absolute
    profile: Profile  # of the model and the card that ran it
    composition: Composition  # what ran
    decoded: Sequence[Token]  # of the members that decode
    prefilled: Sequence[Token]  # of the parts that finish, in their order
    drafted: Sequence[Composition] = ()  # what ran before: a step of drafting each
    draft_ns: int = 0  # that they took
    drafter: Profile | None = None  # of the model that ran those, where it is another one
    late_layers: int = 0  # that came from host memory

    @property
    def parts(self) -> list[tuple[Profile, Composition]]:
        """All that ran, in order, each with the profile that prices it."""
        return [*((self.drafter or self.profile, step) for step in self.drafted), (self.profile, self.composition)]


@dataclass(frozen=True, slots=True)
class Places:
    """What an engine's memory has room for at once."""

    requests: int
    tokens: int  # of each of them at most, prompt and answer


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
        """Prompt tokens (with the characters answered so far) and the span of what is still to be answered."""
        ...

    def places(self, model: str) -> Places | None:
        """For requests of this model; None: as many and as long ones as the server's blocks hold."""
        ...

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        """So many layers of these models lie in memory from now on, or are about to; everything else leaves it.

        What is named first, when a run begins, is there at once. `for_good`: nothing else will be.
        """
        ...

    def lay_beside(self, model: str, drafter: str) -> None:
        """From now on K and V of a model that drafts lie beside those of the model that it drafts for, as long as no
        other pair is named. `hold` comes next. Nothing may be running, unless this is the pair already."""
        ...

    def free(self) -> None:
        """All weights and all K and V leave memory, until `hold` says what is to be there. Nothing may be running."""
        ...

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        """Starts to copy a model's weights into the card and calls back when they are there. Transfers queue up."""
        ...

    def observe(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        """What every exit said about the first tokens of this request's answer."""
        ...

    def forget(self, request_id: int, again: bool = False) -> None:
        """The request has left the system. Of those that completed, a probe may still ask for the latest texts.

        `again`: it will come back under this number and start anew.
        """
        ...

    def probe(
        self, model: str, requests: Sequence[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        """Scores served texts, prompt and answer, in one full-depth pass. Returns its duration in ns and the scores."""
        ...


@runtime_checkable
class Executes(Engine, Protocol):
    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        """Runs the iteration, starting now. Raises OutOfMemory where the device has none for it, and IterationFailed
        where it gives no result."""
        ...


@runtime_checkable
class Hands(Engine, Protocol):
    """An engine that executes in a thread of its own, beside others."""

    def hand(self, plan: Plan, now_ns: int, tell: Callable[[Callable[[], Outcome]], None]) -> None:
        """Starts the iteration and returns. When it has ended, `tell` is called in the environment's thread with what
        returns its outcome, or raises, as `Executes.execute` does."""
        ...

    def hand_probe(
        self,
        model: str,
        requests: Sequence[Request],
        exit_rule: ExitRule,
        tell: Callable[[Callable[[], tuple[int, tuple[Observation, ...]]]], None],
    ) -> None:
        """Starts a probe likewise; what `tell` is called with returns what `Engine.probe` does."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Terms:
    """What the loop needs to know of a model, a card and a deployment to say what iterations take."""

    rules: Mapping[str, int]  # of core.layout.RULES, those that depend on the exits and the profile
    exits: tuple[int, ...]
    trace: Trace
    prices: PriceTables
    scalars: Table  # of core.price.SCALARS, one row
    uniform: tuple[Table, Numbers]  # bands of iterations in which all tokens run the same layers, with layers by class
    banded: tuple[Table, Numbers]  # of the others
    drafter: Drafter  # what another model that drafts costs; without one, the model itself


@runtime_checkable
class Foresees(Engine, Protocol):
    warm_up_ns: int  # the very first iteration takes so much longer

    def terms(self, deployment: Deployment, situation: Situation, storage: Storage) -> Terms: ...

    def tokens_of(self, model: str, requests: IntArray) -> IntArray:
        """`tokenize` of requests (n, 9): prompt and output tokens, first, start and length in the trace, (n, 5)."""
        ...

    @property
    def transfer_end_ns(self) -> int | None:
        """When the transfer in progress ends; None: there is none."""
        ...


class Around:
    """An engine around another one, to which it hands everything on."""

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
