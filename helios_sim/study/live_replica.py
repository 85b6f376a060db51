"""One replica of a live run: its engine, notes of its iterations, and measurements of the device's pace."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import cycle
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from helios_sim.errors import TooLittleMemory
from helios_sim.live.clock import WallClock
from helios_sim.live.energy import Meter
from helios_sim.live.served import LiveModel, PromptTexts
from helios_sim.live.threads import EngineThread, Handed, ToServer
from helios_sim.profile.pace import DECODE, PROMPT
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Anchors
from helios_sim.request import Request, to_ns
from helios_sim.serving.iteration import Engine, OutOfMemory
from helios_sim.serving.replica import SERVED_TEXTS
from helios_sim.study.fleet import Kind
from helios_sim.study.schema import Config
from helios_sim.study.watched import LiveNotes, WatchedEngine

if TYPE_CHECKING:
    from helios_sim.live.device import Step
    from helios_sim.live.engine import LiveEngine
    from helios_sim.live.model.decoder import SegmentedModel
    from helios_sim.live.model.weights import LayerWeights
    from helios_sim.profile.spec import Anchor
    from helios_sim.serving.server import Server

WARM_REQUESTS = 8  # most requests that run together in the warm-up
KEPT_STEPS = 10_000  # of a few hundred bytes each
_T = TypeVar("_T")
_log = logging.getLogger(__name__)


class LiveReplica:
    """A replica: `device_engine` computes, and `engine` is the wrapper of it that the replica's server uses."""

    server: Server  # from `begin` on

    def __init__(
        self,
        config: Config,
        kind: Kind,
        number: int,
        models: Mapping[str, LiveModel],
        texts: PromptTexts,
        requests: Sequence[Request],
        clock: WallClock,
        meter: Meter,
        alone: bool,
    ) -> None:
        """Make the engine. `number` is the replica's, `requests` are the workload's. `alone`: it is the only replica,
        and its engine runs in the environment's thread. Each of several engines has a thread of its own.
        """
        self._config, self._kind, self._clock, self.number = config, kind, clock, number
        self._requests = requests[:WARM_REQUESTS]
        self._thread = None if alone else EngineThread(clock, f"replica-{number}")
        device = config.live.device_of(number)
        self.device_engine = self._in_thread(
            lambda: make_engine(config, kind, device, models, texts, requests, clock)
        )
        profiles = {name: data.profile for name, data in kind.parts.models.items()}
        self._pace = Pace(self.device_engine, profiles, clock, meter, config.live.pace_every_s)
        # With several replicas all steps are kept: to add them up, the clock would have to stop while others compute.
        kept = KEPT_STEPS if alone else None
        self._watched = WatchedEngine(self.device_engine, clock, self._pace.look_within, kept)
        self.engine: Engine = self._watched if self._thread is None else Handed(self._watched, self._thread)

    def begin(self, make_server: Callable[[Engine], Server]) -> Server:
        """Return the server, with its first deployment loaded and everything warm. UserError if memory does not
        suffice."""
        from helios_sim.live.pace import warm_up

        self.server = server = make_server(self.engine)
        engine, live = self.device_engine, self._config.live
        engine.faults = server if self._thread is None else ToServer(server, self._clock)
        server.open()
        deployment = server.decisions[0].deployment
        places = engine.work.places[deployment.active.model].requests
        requests, batch_tokens = self._requests[:places], self._kind.parts.situation.max_batch_tokens
        try:
            self._in_thread(lambda: engine.capture(deployment))
            self._in_thread(lambda: warm_up(engine, deployment, requests, batch_tokens, live.warm_up))
        except OutOfMemory as short:
            raise TooLittleMemory(
                "memory", short.reason, "enough for captured steps and an iteration beside weights and KV",
                "lower server.max_running_requests or server.max_batch_tokens, or free memory",
            ) from short  # fmt: skip
        self._in_thread(self._pace.look_beside)
        return server

    def end(self) -> LiveNotes:
        """Return the replica's sums, at the end of the run."""
        work = self.device_engine.work
        self._in_thread(self._pace.look_beside)
        return replace(
            self._watched.notes(),
            pace=self._pace.mean(DECODE),
            prompt_pace=self._pace.mean(PROMPT),
            shortages=self.device_engine.shortages,
            kv_bytes=work.reserved_bytes,
            places=min(places.requests for places in work.places.values()),
            places_wanted=work.wanted,
        )

    def close(self) -> None:
        """Leave nothing of the replica on the device."""
        self._pace.close()
        self._in_thread(self.device_engine.close)
        if self._thread is not None:
            self._thread.close()

    def _in_thread(self, what: Callable[[], _T]) -> _T:
        return what() if self._thread is None else self._thread.ask(what)


def make_engine(
    config: Config,
    kind: Kind,
    device: str,
    models: Mapping[str, LiveModel],
    texts: PromptTexts,
    requests: Sequence[Request],
    clock: WallClock,
) -> LiveEngine:
    """Make the live engine, with room for the workload's longest requests."""
    from helios_sim.live.engine import LiveEngine
    from helios_sim.live.replaying import ReplayingEngine

    slots = min(kind.parts.situation.max_running_requests, len(requests))
    engine = ReplayingEngine if any(model.replays for model in models.values()) else LiveEngine
    return engine(
        clock, models, texts, slots=slots, slot_tokens=_slot_tokens(config, models, requests),
        device=device, kernels=config.live.kernels,
        kept_answers=None if config.live.score else SERVED_TEXTS,  # scoring reads all answers after the run
    )  # fmt: skip


def _slot_tokens(config: Config, models: Mapping[str, LiveModel], requests: Sequence[Request]) -> int:
    """Return the tokens of a slot: whole blocks, and one block more, as a text may grow when it changes its model."""
    block_tokens = config.server.block_tokens
    return (-(-_longest(models, requests) // block_tokens) + 1) * block_tokens


def _longest(models: Mapping[str, LiveModel], requests: Sequence[Request]) -> int:
    """Return the tokens of the longest request, prompt and answer, by the model that needs the most tokens for it."""
    longest = 1
    for model in models.values():
        for request in requests:
            prompt_tokens, span = model.lengths(request)
            longest = max(longest, prompt_tokens + span.n_tokens)
    return longest


class Pace:
    """Times a decode step and a prompt step before and after a run, or now and then within it, in turns and with clock
    and meter stopped.
    """

    def __init__(
        self, engine: LiveEngine, profiles: Mapping[str, Profile], clock: WallClock, meter: Meter, every_s: float | None
    ) -> None:
        self._engine, self._profiles, self._clock, self._meter = engine, profiles, clock, meter
        self._every_ns = None if every_s is None else to_ns(every_s, "live.pace_every_s")
        self._due_ns = 0
        self._turns = cycle((DECODE, PROMPT))
        self._found: dict[str, list[float]] = {DECODE: [], PROMPT: []}
        # by model and step: the layers of which the step was made, and the step
        self._ready: dict[tuple[str, str], tuple[list[LayerWeights], Step]] = {}

    def mean(self, anchor: str) -> float | None:
        """Return the step's time over its time when the profile was measured; above 1 is slower. None if the profile
        has no such time, the device has no memory for the step, or the run ended before the step's turn.

        It is a mean over the profile's median: tables hold medians, and the time of a run is a sum.
        """
        known = self._found[anchor]
        return fmean(known) if known else None

    def close(self) -> None:
        """Free the memory of the steps."""
        self._ready.clear()

    def look_beside(self) -> None:
        """Time some steps before or after the run, unless they are timed within it; their median counts."""
        from helios_sim.live.pace import REPEATS

        if self._every_ns is None:
            there = self._engine.residents.layers
            for anchor in self._found:
                self._note(anchor, max(there, key=lambda model: there[model]), REPEATS)

    def look_within(self, name: str) -> None:
        """Time one step of the model that runs next, if a step is due. No transfer may be under way."""
        if self._every_ns is None or self._clock.wall_ns < self._due_ns:
            return
        with self._clock.stopped(), self._meter.left_out():
            self._note(next(self._turns), name, 1)
        self._due_ns = self._clock.wall_ns + self._every_ns

    def _note(self, name: str, of_model: str, repeats: int) -> None:
        """Time the step of anchor `name` for `of_model`, a model in memory, and note its pace."""
        from helios_sim.live.pace import seconds

        known = self._profiles[of_model].anchors or Anchors()
        anchor = known.decode if name == DECODE else known.prompt
        if anchor is None:
            return
        model = self._engine.residents.running(of_model, 1)
        try:
            step = self._step((of_model, name), model, anchor)
            found_s = seconds(step, self._engine.device, repeats)
            self._found[name].append(found_s / model.n_loaded / anchor.layer_s)
        except (MemoryError, RuntimeError) as short:  # torch's own out-of-memory is a RuntimeError
            _log.warning("the device's pace is not known: %s", short)

    def _step(self, key: tuple[str, str], model: SegmentedModel, anchor: Anchor) -> Step:
        """Return the step that was prepared last time, unless layers came or went since."""
        from helios_sim.live.pace import prepared

        known = self._ready.get(key)
        if known is not None and list(map(id, known[0])) == list(map(id, model.layers)):
            return known[1]
        self._ready.pop(key, None)  # free its memory first
        step: Step = prepared(model, self._engine.device, anchor)
        self._ready[key] = list(model.layers), step
        return step
