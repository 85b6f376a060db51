"""What engine and front tell each other. Plain tuples, since thousands of them go through a pipe each second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from helios_sim.request import RequestRecord
from helios_sim.serve.asked import Ask

# --- From the front to the engine, beside `Ask` itself


class Cancel(NamedTuple):
    request_id: int
    reason: str


class EndAnswer(NamedTuple):
    """A stop was found in the text: the request completes with its next token."""

    request_id: int


class Look(NamedTuple):
    """Asks for a `State`."""


class Sleep(NamedTuple):
    """Weights leave memory as soon as nothing runs. The front lets no request in before `Wake`."""


class Wake(NamedTuple):
    pass


class End(NamedTuple):
    """The run ends now; requests that are still there leave as unfinished."""


ToEngine = Ask | Cancel | EndAnswer | Look | Sleep | Wake | End

# --- From the engine's process to the front


class Drain(NamedTuple):
    """No further request comes in; those that are open are answered, and then the front ends."""


class Abort(NamedTuple):
    """Open requests end with an error, and the front ends."""


class Token(NamedTuple):
    request_id: int
    number: int  # in its answer, from 0
    token: int | None  # None where nothing is computed: the front makes up the text
    layers: int
    breach: bool
    last: bool  # the answer ends with it; an end token is no part of the text
    ended: bool  # by an end token
    logprob: tuple[float, int, float] | None  # its own, and the likeliest token with its


class Tokens(NamedTuple):
    """All tokens of an iteration."""

    replica: int
    time_ns: int  # of the engine's clock, at the end of the iteration
    model: str
    prompt_tokens: int  # that the iteration computed
    tokens: tuple[Token, ...]


class Left(NamedTuple):
    """A request has left the engine."""

    record: RequestRecord


class Refused(NamedTuple):
    """The engine did not take a request."""

    request_id: int
    reason: str
    not_loaded: bool  # the model that it names; otherwise there are too many, or the server ends


class Decided(NamedTuple):
    """A line of the decision log."""

    row: Mapping[str, Any]


class Switched(NamedTuple):
    """Another model serves."""

    replica: int
    before: str
    now: str


class ReplicaState(NamedTuple):
    replica: int
    model: str
    layers: int  # loaded
    n_layers: int  # of the whole model
    run_layers: int  # the cap: tokens that are not observed run so many at most
    resident: Mapping[str, int]  # layers by model, whatever is in memory
    loading: str | None  # a model whose weights are under way
    running: int
    waiting: int
    used_blocks: int
    total_blocks: int
    preemptions: int
    switches: int
    loads: int
    load_s: float
    prefix_queries: int
    prefix_hits: int


class State(NamedTuple):
    time_ns: int  # of the engine's clock
    late_s: float  # by how much the engine is behind the wall clock
    replicas: tuple[ReplicaState, ...]
    energy_j: float | None  # None: it is not known here
    energy_of: str  # where it comes from, or why there is none
    asleep: bool


class Ready(NamedTuple):
    """The engine serves from now on."""

    context_tokens: int  # most tokens of a request, prompt and answer, on any candidate
    most_running: int  # requests that run at once, on all replicas


class Ended(NamedTuple):
    """The engine has ended. `error`: why, where it should not have."""

    error: str | None
    books: tuple[int, int] = (0, 0)  # requests that arrived, and that left with a record


FromEngine = Tokens | Left | Refused | Decided | Switched | State | Ready | Ended
