"""The front process: an event loop that runs the HTTP server, and the pipe to the engine."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from helios_sim.serve.front.app import make_app
from helios_sim.serve.front.generate import Generator
from helios_sim.serve.front.hub import Hub
from helios_sim.serve.front.kept import Kept
from helios_sim.serve.front.limits import Gate
from helios_sim.serve.front.metrics import Metrics
from helios_sim.serve.front.problems import Problem
from helios_sim.serve.messages import Abort, Drain, FromEngine, Look, ToEngine
from helios_sim.serve.settings import ServeConfig
from helios_sim.serve.text import open_reader

_HEAD_S = 20.0  # longest time for the head of a request to arrive
_LOOK_S = 0.5  # time between requests for the engine's state, while requests are open or a listener listens
MOST_WAITING = 2048  # most connections that wait to be accepted


@dataclass(frozen=True, slots=True)
class FrontSettings:
    """Settings and facts of the engine that the front needs. It can be pickled."""

    serve: ServeConfig
    keys: tuple[bytes, ...]
    tokenizers: Mapping[str, str | None]  # folder by candidate; None: the built-in vocabulary
    layers: Mapping[str, int]  # layers of each candidate
    vocabularies: Mapping[str, int]  # vocabulary size of each candidate
    mode: str
    by_priority: bool
    about: Mapping[str, Any]  # what the page shows of the server


def run_front(pipe: Connection, sock: socket.socket, settings: FrontSettings) -> None:
    """Serves until the engine's process tells it to drain or to abort, or is gone."""
    for number in (signal.SIGINT, signal.SIGTERM):  # the engine's process gets them too, and tells this one what to do
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(Front(pipe, sock, settings).run())


class Front:
    def __init__(self, pipe: Connection, sock: socket.socket, settings: FrontSettings) -> None:
        self._pipe, self._sock, self._settings = pipe, sock, settings
        serve = settings.serve
        sizes = settings.vocabularies
        readers = {model: open_reader(folder, sizes[model]) for model, folder in settings.tokenizers.items()}
        simulates = settings.mode != "live"
        metrics = Metrics(settings.layers, serve.max_model_len, serve.speedup)
        self._gate = Gate(serve, settings.keys)
        self.hub = Hub(self._send, metrics)
        if serve.records is not None:
            self.hub.on_answer = Kept(serve.records).note
        self.generator = Generator(self.hub, self._gate, serve, readers, simulates, settings.by_priority)
        named = {model: reader.name for model, reader in readers.items()}
        app = make_app(self.hub, self.generator, self._gate, readers, {**settings.about, "tokenizers": named})
        self._server = _Server(uvicorn.Config(
            app, http=_Impatient, ws="none", lifespan="off", log_level="warning", access_log=False, server_header=False,
            timeout_keep_alive=30, backlog=MOST_WAITING, h11_max_incomplete_event_size=1 << 16, loop="asyncio",
            timeout_graceful_shutdown=5,
        ))  # fmt: skip
        self._stopping: asyncio.Task[None] | None = None

    async def run(self) -> None:
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, name="engine", daemon=True).start()
        looking = asyncio.create_task(self._look_often())
        try:
            await self._server.serve(sockets=[self._sock])
        finally:
            looking.cancel()

    def _send(self, message: ToEngine) -> None:
        with contextlib.suppress(OSError):  # the engine is gone; the listening thread notices
            self._pipe.send(message)

    def _listen(self) -> None:
        """Passes messages from the engine to the event loop. Runs in its own thread."""
        try:
            while True:
                self._loop.call_soon_threadsafe(self._receive, self._pipe.recv())
        except (EOFError, OSError, RuntimeError):  # RuntimeError: the loop is closed
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._abort)

    def _receive(self, messages: list[FromEngine | Drain | Abort]) -> None:
        for message in messages:
            if isinstance(message, Drain):
                self._stopping = self._stopping or asyncio.create_task(self._drain())
            elif isinstance(message, Abort):
                self._abort()
            else:
                self.hub.receive(message)
        if self.hub.ended is not None:
            self._abort()

    async def _drain(self) -> None:
        """Refuses new requests, waits up to `drain_s` for the open ones, then aborts."""
        self.generator.closed = Problem(503, "The server is shutting down", None, "shutting_down", 5)
        until_s = monotonic() + self._settings.serve.drain_s
        while self.generator.asking and monotonic() < until_s:
            await asyncio.sleep(0.02)
        self._abort()

    def _abort(self) -> None:
        self.generator.closed = Problem(503, "The server is shutting down", None, "shutting_down", 5)
        self.hub.disturb(Problem(503, "The server has stopped before the answer was complete", None, "server_stopped"))
        self.hub.close()
        self._server.should_exit = True

    async def _look_often(self) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            if self.hub.ready is not None and (self.hub.open or self.hub.listeners):
                self._send(Look())


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals to the engine's process."""
        yield


class _Impatient(H11Protocol):
    """Closes a connection if the head of a request does not arrive in time, even if bytes trickle in."""

    _head: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self._await_head()
        elif self._head is not None:
            self._head.cancel()
            self._head = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._head is not None:
            self._head.cancel()
        super().connection_lost(exc)

    def _unsupported_upgrade_warning(self) -> None:
        """Stays silent: a request for a web socket is answered as plain HTTP, and clients cannot fill the log."""

    def _await_head(self) -> None:
        if self._head is None:
            self._head = self.loop.call_later(_HEAD_S, self._give_up)

    def _give_up(self) -> None:
        self._head = None
        idle = self.cycle is None or self.cycle.response_complete
        if idle and not self.transport.is_closing():
            self.transport.close()
