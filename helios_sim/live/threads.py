"""An engine in a thread of its own, so that several replicas compute at once behind one clock.

The loop, the policies and SimPy's processes stay in the environment's thread. An iteration is handed to the engine's
thread, and its outcome comes back by `WallClock.call`, as clients' calls do. Other calls that use the device run in the
engine's thread too, one after the other, since torch keeps a current card for each thread.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from helios_sim.exits.rule import ExitRule
from helios_sim.exits.trace import TokenSpan
from helios_sim.live.clock import WallClock
from helios_sim.policy.telemetry import Observation
from helios_sim.request import Request
from helios_sim.serving.iteration import Around, Executes, IterationFailed, Outcome, OutOfMemory, Plan

if TYPE_CHECKING:
    from helios_sim.live.engine import Faults

_T = TypeVar("_T")


class EngineThread:
    """The thread of one engine. It runs the calls that it is given one after the other."""

    def __init__(self, clock: WallClock, name: str) -> None:
        self._clock = clock
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name)

    def ask(self, what: Callable[[], _T]) -> _T:
        """Run `what` in the engine's thread, wait for it, and return its result or raise its error."""
        return self._worker.submit(what).result()

    def tell(self, what: Callable[[], None]) -> None:
        """Run `what` in the engine's thread without waiting. Its error is raised in the environment's thread."""
        self._worker.submit(what).add_done_callback(self._look)

    def hand(
        self, what: Callable[[], _T], tell: Callable[[Callable[[], _T]], None], end_ns: Callable[[_T], int | None]
    ) -> None:
        """Run `what` in the engine's thread without waiting, and then call `tell` in the environment's thread.

        `tell` gets a function that returns the result of `what` or raises its error. It is called at the end time that
        `end_ns` gives for the result, or that the error names, or else at once.
        """

        def ended(done: Future[_T]) -> None:
            error = done.exception()
            at_ns = error.end_ns if isinstance(error, OutOfMemory | IterationFailed) else None
            self._clock.call(come_back, always=True, at_ns=end_ns(done.result()) if error is None else at_ns)

        def come_back() -> None:
            self._clock.close_door()
            tell(done.result)

        self._clock.open_door()  # keeps the run going until `come_back`
        done = self._worker.submit(what)
        done.add_done_callback(ended)

    def close(self) -> None:
        """Wait until all calls have run, and end the thread."""
        self._worker.shutdown(wait=True)

    def _look(self, done: Future[None]) -> None:
        if done.exception() is not None:
            self._clock.call(done.result, always=True)


class Handed(Around):
    """Runs an engine's iterations and probes in its thread, by the `Hands` protocol."""

    def __init__(self, inner: Executes, thread: EngineThread) -> None:
        super().__init__(inner)
        self._executes, self._thread = inner, thread

    def hand(self, plan: Plan, now_ns: int, tell: Callable[[Callable[[], Outcome]], None]) -> None:
        self._thread.hand(lambda: self._executes.execute(plan, now_ns), tell, lambda outcome: outcome.end_ns)

    def probe(
        self, model: str, requests: Sequence[Request], exit_rule: ExitRule
    ) -> tuple[int, tuple[Observation, ...]]:
        return self._thread.ask(lambda: self._inner.probe(model, requests, exit_rule))

    def hand_probe(
        self,
        model: str,
        requests: Sequence[Request],
        exit_rule: ExitRule,
        tell: Callable[[Callable[[], tuple[int, tuple[Observation, ...]]]], None],
    ) -> None:
        self._thread.hand(lambda: self._inner.probe(model, requests, exit_rule), tell, lambda scored: None)

    def hold(self, layers: Mapping[str, int], for_good: bool = False) -> None:
        held = dict(layers)
        self._thread.ask(lambda: self._inner.hold(held, for_good))

    def lay_beside(self, model: str, drafter: str) -> None:
        self._thread.ask(lambda: self._inner.lay_beside(model, drafter))

    def free(self) -> None:
        self._thread.ask(self._inner.free)

    def start_transfer(self, n_bytes: int, model: str, on_done: Callable[[], None]) -> None:
        self._thread.ask(lambda: self._inner.start_transfer(n_bytes, model, on_done))

    def observe(
        self, model: str, request_id: int, span: TokenSpan, n_tokens: int, exit_rule: ExitRule, time_ns: int
    ) -> Observation:
        return self._thread.ask(
            lambda: self._inner.observe(model, request_id, span, n_tokens, exit_rule, time_ns)
        )

    def forget(self, request_id: int, again: bool = False) -> None:
        """Forget the request without waiting, since requests may leave while an iteration runs."""
        self._thread.tell(lambda: self._inner.forget(request_id, again))


def share_threads(engines: int) -> Callable[[], None]:
    """Divide torch's CPU threads among engines that compute on one CPU. Returns a function that undoes it."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(max(1, before // engines))
    return partial(torch.set_num_threads, before)


class ToServer:
    """Passes failures of requests and loads from an engine's thread to its server."""

    def __init__(self, faults: Faults, clock: WallClock) -> None:
        self._faults, self._clock = faults, clock

    def request_failed(self, request_id: int, reason: str) -> None:
        self._clock.call(lambda: self._faults.request_failed(request_id, reason), always=True)

    def load_failed(self, model: str, reason: str) -> None:
        """Pass the failure on directly, since it comes by the clock already."""
        self._faults.load_failed(model, reason)
