"""The engine that serves clients: one or more servers on the wall clock, controlled by messages from another thread.

`Service.run` is one long run of `simulation.simulate`, with its scheduler, policies and books. Requests come in only
through the `Door` of the wall clock. Events are passed to `emit`, in the engine's own thread.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import Full
from typing import TYPE_CHECKING

import simpy

from helios_sim.errors import TooLittleMemory, UserError
from helios_sim.live.clock import Door, WallClock
from helios_sim.report.decisions import decision_row
from helios_sim.request import NS_PER_S, Request, RequestRecord
from helios_sim.serve.asked import Ask, Asked, Book
from helios_sim.serve.energy import Energy, Modelled, counted
from helios_sim.serve.messages import (
    Cancel,
    Decided,
    End,
    EndAnswer,
    Ended,
    FromEngine,
    Left,
    Look,
    Ready,
    Refused,
    ReplicaState,
    Sleep,
    State,
    Switched,
    ToEngine,
    Token,
    Tokens,
    Wake,
)
from helios_sim.serve.settings import ServeConfig, served_job
from helios_sim.serve.simulated import Answers, AskedSimulated
from helios_sim.serving.iteration import Engine
from helios_sim.serving.replica import OnLeft
from helios_sim.serving.server import Produced, Server
from helios_sim.simulation import Run, System, simulate
from helios_sim.study.fleet import shared_fleet
from helios_sim.study.modes import SIMULATE
from helios_sim.study.schema import Config

if TYPE_CHECKING:
    from helios_sim.live.served import LiveModel
    from helios_sim.serve.live.engine import AskedLive

Emit = Callable[[FromEngine], None]
_FOREVER = sys.maxsize  # number of requests of the run, since a server does not know how many will come
_WARM_REQUESTS = 4


class Service:
    """The engine of one server. `emit` gets every event; it must not block."""

    def __init__(self, config: Config, serve: ServeConfig, emit: Emit) -> None:
        """Opens profiles and traces. UserError for settings that cannot be served."""
        self._serve, self._emit = serve, emit
        self.job = served_job(config, serve)
        self.config = self.job.config
        self._fleet = shared_fleet(self.config, self.job.seed)
        self._models = self._fleet.models
        if serve.name in self._models:
            allowed = "no candidate's name: by this one clients ask for whichever is loaded"
            raise UserError("serve.name", serve.name, allowed, "leave it out, or take another")
        self.clock = WallClock(serve.speedup)
        self.book = Book()
        self._answers = Answers(self._fleet.parts.workload, self.job.seed, self._models)
        self._live: AskedLive | None = None
        self._live_models: Mapping[str, LiveModel] | None = None
        self._energy: Energy | None = None
        self._door: Door | None = None
        self._system: System | None = None
        self._servers: list[Server] = []
        self._told: list[int] = []  # number of decisions passed to `emit`, by replica
        self._serving: list[str] = []  # model by replica, as last passed to `emit`
        self._asleep = self._sleepy = False

    @property
    def models(self) -> tuple[str, ...]:
        """Names of the candidates."""
        return tuple(self._models)

    @property
    def layers(self) -> dict[str, int]:
        """Number of layers of each whole candidate."""
        return {name: data.profile.model.n_layers for name, data in self._models.items()}

    @property
    def vocabularies(self) -> dict[str, int]:
        """Vocabulary size of each candidate."""
        return {name: data.profile.model.vocab_size for name, data in self._models.items()}

    def save_tokenizers(self, folder: Path) -> dict[str, str]:
        """Writes each candidate's tokenizer into a folder of its own, for a process without torch (mode=live only)."""
        found = {}
        for number, (name, model) in enumerate(self._opened().items()):
            place = folder / str(number)
            model.tokenizer.save_pretrained(place)
            found[name] = str(place)
        return found

    def run(self) -> None:
        """Serves until `End`, then emits `Ended`. Raises the error if the engine fails."""
        try:
            run = self._run()
        except UserError as error:
            self._emit(Ended(str(error)))
            raise
        except BaseException as error:
            self._emit(Ended(f"the engine failed: {type(error).__name__}: {error}"))
            raise
        finally:
            if self._live is not None:
                self._live.close()
        self._emit(Ended(None, (run.requests, sum(server.books[3] for server in run.servers))))

    def _run(self) -> Run:
        return simulate(
            self._make_server, iter(()), _FOREVER, self._on_record, replicas=self._fleet.replicas,
            routing=self._fleet.routing, env=self.clock, outside=self._open_door,
        )  # fmt: skip

    def tell(self, message: ToEngine) -> None:
        """Takes a message of the front. Called from one other thread, after `Ready`. Messages after `End` are lost."""
        door = self._door
        assert door is not None
        try:
            if isinstance(message, Ask):
                self._take(message, door)
            elif isinstance(message, Cancel):
                door.cancel(message.request_id, message.reason)
            elif isinstance(message, EndAnswer):
                if message.request_id in self.book:
                    door.end_answer(message.request_id)
            elif isinstance(message, End):
                door.close(now=True)
            elif isinstance(message, Look):
                self.clock.call(self._tell_state)
            elif isinstance(message, Sleep):
                self.clock.call(self._sleep, always=True)
            elif isinstance(message, Wake):
                self.clock.call(self._wake, always=True)
        except (UserError, Full) as refused:
            if isinstance(message, Ask):
                self.book.pop(message.request_id, None)
                self._emit(Refused(message.request_id, str(refused), not_loaded=False))

    def _take(self, ask: Ask, door: Door) -> None:
        """Sends a request into the engine. The loaded model may change before it arrives, which does no harm."""
        loaded = self._servers[0].placement.model
        if ask.model is not None and all(server.placement.model != ask.model for server in self._servers):
            told = f"{ask.model} is not loaded now: the policy serves {loaded}"
            self._emit(Refused(ask.request_id, told, not_loaded=True))
            return
        asked, like = self._answers.next(ask, loaded)
        if self._live is not None:
            asked = Asked(ask, ask.max_tokens)
        self.book[ask.request_id] = asked
        per_token = self._models[loaded].profile.model.chars_per_token
        door.send(Request(
            ask.request_id, 0, max(1, ask.chars), max(1, round(asked.n_tokens * per_token)), like.task, like.text_start,
            ask.priority,
        ))  # fmt: skip

    # --- Functions that run in the engine's thread ------------------------------------------------------------------

    def _make_server(self, env: simpy.Environment, number: int, on_left: OnLeft) -> Server:
        kind = self._fleet.kind_of(number)
        situation, policy = kind.parts.situation, (kind.policy or self.job.arm.policy).make()
        if self.config.mode == SIMULATE:
            engine: Engine = AskedSimulated(env, kind.parts.models, self.book)
        else:
            engine = self._live = self._open_live()
        server = Server(env, number, engine, policy, situation, on_left)
        server.keep_few_samples()
        server.on_tokens = self._on_tokens
        if self._live is not None:
            self._live.faults = server
            server.open()
            self._warm_up(self._live, server)
        self._servers.append(server)
        self._told.append(0)
        self._serving.append("")
        return server

    def _opened(self) -> Mapping[str, LiveModel]:
        from helios_sim.study.live import check_settings, opened

        if self._live_models is None:
            check_settings(self.config, self._fleet)
            self._live_models = opened(self.config, self._fleet.parts, self.config.live.device_of(0))
        return self._live_models

    def _open_live(self) -> AskedLive:
        from helios_sim.serve.live.engine import AskedLive

        server = self.config.server
        block_tokens = server.block_tokens
        slot_tokens = (-(-self._serve.max_model_len // block_tokens) + 1) * block_tokens
        return AskedLive.opened(
            self.clock, self._opened(), self.book, slots=server.max_running_requests, slot_tokens=slot_tokens,
            device=self.config.live.device, kernels=self.config.live.kernels,
        )  # fmt: skip

    def _warm_up(self, engine: AskedLive, server: Server) -> None:
        from helios_sim.live.pace import warm_up
        from helios_sim.serving.iteration import OutOfMemory

        deployment, live = server.decisions[0].deployment, self.config.live
        _, like = self._answers.next(Ask(0, {}, 1, 1), deployment.active.model)
        places = engine.work.places[deployment.active.model].requests
        requests = [replace(like, output_chars=64)] * min(_WARM_REQUESTS, places)
        try:
            engine.capture(deployment)
            warm_up(engine, deployment, requests, self.config.server.max_batch_tokens, live.warm_up)
        except OutOfMemory as short:
            raise TooLittleMemory(
                "memory", short.reason, "enough for captured steps and an iteration beside weights and KV",
                "lower server.max_running_requests, serve.max_model_len or server.max_batch_tokens, or free memory",
            ) from short  # fmt: skip

    def _open_door(self, system: System) -> None:
        self._system = system
        self._door = Door(self.clock, system, len(self._fleet.parts.workload.mix.tasks))
        card = self._fleet.kinds[0].card
        device = None if self._live is None else self.config.live.device
        self._energy = energy = Modelled(card, self._servers) if device is None else counted(device)
        for server in self._servers:
            server.joules = lambda: energy.joules(int(self.clock.now))
        gc.collect()
        gc.freeze()
        self.clock.sync()
        self._emit(Ready(self._context_tokens(), self._most_running()))

    def _context_tokens(self) -> int:
        return min(self._serve.max_model_len, *(d.profile.model.max_context_tokens for d in self._models.values()))

    def _most_running(self) -> int:
        return sum(kind.parts.situation.max_running_requests * len(kind.numbers) for kind in self._fleet.kinds)

    def _on_tokens(self, server: Server, produced: Sequence[Produced]) -> None:
        found, model = [], server.placement.model
        for one in produced:
            asked = self.book.get(one.request_id)
            if asked is None:
                continue
            asked.produced += 1
            found.append(self._token(one, asked))
        self._tell_switch(server)
        if found:
            prompts = server.scheduled.prompt_tokens
            self._emit(Tokens(server.number, int(self.clock.now), model, prompts, tuple(found)))

    def _token(self, one: Produced, asked: Asked) -> Token:
        last = asked.produced >= asked.n_tokens
        if self._live is None:
            return Token(one.request_id, one.number, None, one.layers, one.breach, last, last and not self._full(asked),
                         None)  # fmt: skip
        answer = self._live.answers[one.request_id]
        ended = one.after == 0 and self._live.ends(answer)
        logprob = asked.logprobs[-1] if asked.logprobs else None
        return Token(
            one.request_id, one.number, answer.tokens[-1 - one.after], one.layers, one.breach, last or ended, ended,
            logprob,
        )  # fmt: skip

    @staticmethod
    def _full(asked: Asked) -> bool:
        """Whether the answer is as long as the client allows."""
        return asked.n_tokens >= asked.ask.max_tokens

    def _on_record(self, record: RequestRecord) -> None:
        self.book.note_left(record.request_id)
        self._emit(Left(record))
        self._tell_decisions()

    def _tell_switch(self, server: Server) -> None:
        before, now = self._serving[server.number], server.placement.model
        if before != now:
            self._serving[server.number] = now
            if before:
                self._emit(Switched(server.number, before, now))

    def _tell_decisions(self) -> None:
        for place, server in enumerate(self._servers):
            self._tell_switch(server)
            made = len(server.decisions) + server.decisions_left_out
            new, self._told[place] = made - self._told[place], made
            for decision in server.decisions[-new:] if new else ():
                row = decision_row(self.job.arm.name, decision)
                self._emit(Decided({name: getattr(row, name) for name in row.__slots__}))

    def _sleep(self) -> None:
        self._sleepy = not self._asleep
        self._fall_asleep()

    def _fall_asleep(self) -> None:
        """Frees the weights if that is wanted, no request is in the system and nothing loads."""
        if self._sleepy and all(not s.requests_in_system and s.loads is None for s in self._servers):
            self._sleepy, self._asleep = False, True
            for server in self._servers:
                server.free_weights()

    def _wake(self) -> None:
        """Loads the weights again. The engine is awake once every replica has them."""
        if not self._asleep:
            self._sleepy = False
            return
        waiting = set(range(len(self._servers)))

        def done(number: int) -> None:
            waiting.discard(number)
            self._asleep = bool(waiting)
            self._tell_state()

        for server in self._servers:
            server.load_weights(partial(done, server.number))

    def _tell_state(self) -> None:
        self._fall_asleep()
        self._tell_decisions()
        now_ns = int(self.clock.now)
        late_s = max(0.0, (self.clock.wall_ns - now_ns) / NS_PER_S)
        energy, replicas = self._energy, tuple(map(self._replica, self._servers))
        assert energy is not None
        self._emit(State(now_ns, late_s, replicas, energy.joules(now_ns), energy.told, self._asleep))

    def _replica(self, server: Server) -> ReplicaState:
        s, stats, at = server.state, server.stats, server.placement
        resident = {} if self._asleep else server.resident
        return ReplicaState(
            server.number, at.model, at.layers, self._models[at.model].profile.model.n_layers, int(s.run_layers),
            resident, server.loads, int(s.running), int(s.waiting), int(s.used_blocks), int(s.total_blocks),
            stats.preemptions, stats.switches, stats.loads, stats.load_ns / NS_PER_S, stats.prefix_cache_queries,
            stats.prefix_cache_hits,
        )  # fmt: skip
