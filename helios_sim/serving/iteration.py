"""What the server asks an engine to run, what comes back, and the protocol that every engine follows.

Nothing here says whether the engine computes on a device or from a profile: the server cannot tell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence as SequenceOf
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from helios_sim.exits.rule import ExitRule
from helios_sim.exits.trace import TokenSpan
from helios_sim.policy.deployment import BatchingRule, KvRule, ServicePlan
from helios_sim.policy.telemetry import Observation
from helios_sim.profile.composition import Composition
from helios_sim.profile.profile import Profile
from helios_sim.request import Request
from helios_sim.serving.batch import RunningBatch, Sequence

BoolArray = NDArray[np.bool_]
IntArray = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class PrefillPart:
    """A chunk of one running request's prompt."""

    index: int  # in the running batch
    tokens: int
    context_tokens: int
    finishes: bool  # its last token yields the next output token


@dataclass(frozen=True, slots=True)
class Plan:
    """The next iteration, or up to `max_iterations` of them where nothing of this replica can come between."""

    model: str
    loaded_layers: int
    run_layers: int  # depth of tokens that are not observed, at most loaded_layers
    exit_rule: ExitRule
    batching: BatchingRule
    kv_rule: KvRule
    batch: RunningBatch
    decoding: int  # so many requests decode: the first ones of the batch
    prefill: tuple[PrefillPart, ...]
    observe_tokens: int | None  # each request's first tokens that run all loaded layers, every exit observed
    service_plan: ServicePlan | None  # depths of every token, in place of the exit rule: the oracle's
    max_iterations: int  # 1 whenever there is prefill
    new_blocks: IntArray  # (max_iterations,) KV blocks that the decodes take up by the end of each iteration
    host_ahead: bool  # the host plans the next iteration while this one runs
    loading: bool  # weights stream in meanwhile


@dataclass(frozen=True, slots=True)
class Tokens:
    """What became of the tokens of D requests in k iterations. Scalars stand for all of them."""

    layers: int | IntArray  # (k, D) layers that the token ran
    breach: BoolArray | None  # (k, D) left at the cap without confidence; None: none did
    agrees: BoolArray | None  # (k, D) equal to full depth's token; None: all are
    microbits: IntArray | None = None  # (k, D) -log2 of the probability of the text's own token; None: not recorded


@dataclass(frozen=True, slots=True)
class Outcome:
    """k iterations, already computed; the server may use only the first of them."""

    end_ns: IntArray  # (k,) absolute, ascending
    profile: Profile  # of the model and the card that ran it
    composition: Composition  # what ran
    decoded: Tokens  # of the requests that decode
    prefilled: Tokens  # (1, P) of the parts that finish, in their order

    def iterations_until(self, time_ns: int, passed: bool = False) -> int:
        """Iterations up to and including the one in progress at that time (at least 1).

        One that ends exactly then is in progress, unless this server's turn at that time has `passed`.
        """
        side: Literal["left", "right"] = "right" if passed else "left"
        return min(int(self.end_ns.searchsorted(time_ns, side)) + 1, len(self.end_ns))


@dataclass(frozen=True, slots=True)
class Places:
    """What an engine's memory has room for at once."""

    requests: int
    tokens: int  # of each of them at most, prompt and answer


class OutOfMemory(Exception):
    """The device had no memory for an iteration: nothing of it counts, and whoever was in it must start again."""

    def __init__(self, reason: str, end_ns: int) -> None:
        super().__init__(reason)
        self.reason, self.end_ns = reason, end_ns  # absolute: when it was given up


class Engine(Protocol):
    """Executes plans and moves weights. Times are absolute integer nanoseconds of the environment's clock."""

    def tokenize(self, model: str, request: Request, answered_chars: int = 0) -> tuple[int, TokenSpan]:
        """Prompt tokens (with the characters answered so far) and the span of what is still to be answered."""
        ...

    def places(self, model: str) -> Places | None:
        """For requests of this model; None: as many and as long ones as the server's blocks hold."""
        ...

    def execute(self, plan: Plan, now_ns: int) -> Outcome:
        """Runs the plan's iterations, starting now. Raises OutOfMemory where the device has none for the first one."""
        ...

    def hold(self, layers: Mapping[str, int]) -> None:
        """So many layers of these models lie in memory from now on, or are about to; everything else leaves it.

        What is named first, when a run begins, is there at once.
        """
        ...

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        """Starts to copy a model's weights into the card and calls back when they are there. Transfers queue up."""
        ...

    def observe(self, sequence: Sequence, n_tokens: int, exit_rule: ExitRule) -> Observation:
        """What every exit said about the first tokens of this request's answer."""
        ...

    def forget(self, request_id: int) -> None:
        """The request has left the system. Of those that completed, a probe may still ask for the latest texts."""
        ...

    def probe(
        self, model: str, requests: SequenceOf[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        """Scores served texts, prompt and answer, in one full-depth pass. Returns its duration in ns and the scores."""
        ...
