"""Messages between engine and front. They are plain tuples, since thousands go through a pipe each second."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from helios_sim.request import RequestRecord
from helios_sim.serve.asked import Ask

# --- Front to engine, with `asked.Ask`


class Cancel(NamedTuple):
    request_id: int
    reason: str


class EndAnswer(NamedTuple):
    """A stop string was found in the text: the request completes with its next token."""

    request_id: int


class Look(NamedTuple):
    """Asks for a `State`."""


class Sleep(NamedTuple):
    """Frees the weights as soon as nothing runs. The front refuses requests until `Wake`."""


class Wake(NamedTuple):
    pass


class End(NamedTuple):
    """Ends the run now; requests still in the engine leave as unfinished."""


ToEngine = Ask | Cancel | EndAnswer | Look | Sleep | Wake | End

# --- Engine's process to front


class Drain(NamedTuple):
    """Tells the front to refuse new requests, to answer open ones, and to end."""


class Abort(NamedTuple):
    """Tells the front to end open requests with an error, and to end."""


class Token(NamedTuple):
    request_id: int
    number: int  # place in the answer, from 0
    token: int | None  # token id; None if nothing is computed, and the front makes up the text
    layers: int  # layers that the token ran
    breach: bool
    last: bool  # the answer ends with this token
    ended: bool  # this token is an end token, which is no part of the text
    logprob: tuple[float, int, float] | None  # its logprob; id and logprob of the likeliest token


class Tokens(NamedTuple):
    """All tokens of an iteration."""

    replica: int
    time_ns: int  # end of the iteration by the engine's clock
    model: str
    prompt_tokens: int  # prompt tokens that the iteration computed
    tokens: tuple[Token, ...]


class Left(NamedTuple):
    """A request has left the engine, with this record."""

    record: RequestRecord


class Refused(NamedTuple):
    """The engine did not take a request."""

    request_id: int
    reason: str
    not_loaded: bool  # the model it names is not loaded; if False, the queue is full or the server ends


class Decided(NamedTuple):
    """A line of the decision log."""

    row: Mapping[str, Any]


class Switched(NamedTuple):
    """A replica now serves with another model."""

    replica: int
    before: str
    now: str


class ReplicaState(NamedTuple):
    replica: int
    model: str
    layers: int  # loaded layers
    n_layers: int  # layers of the whole model
    run_layers: int  # most layers that a token runs, unless it is observed
    resident: Mapping[str, int]  # layers in memory by model
    loading: str | None  # the model that is being loaded; None if none is
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
    time_ns: int  # by the engine's clock
    late_s: float  # how far the engine is behind the wall clock
    replicas: tuple[ReplicaState, ...]
    energy_j: float | None  # since the server began; None if unknown
    energy_of: str  # source of the figure, or why there is none
    asleep: bool


class Ready(NamedTuple):
    """The engine serves from now on."""

    context_tokens: int  # most tokens of a request (prompt and answer) that every candidate takes
    most_running: int  # most requests that run at once, over all replicas


class Ended(NamedTuple):
    """The engine has ended. `error` says why if it failed, else it is None."""

    error: str | None
    books: tuple[int, int] = (0, 0)  # number of requests that arrived, and that left


FromEngine = Tokens | Left | Refused | Decided | Switched | State | Ready | Ended
