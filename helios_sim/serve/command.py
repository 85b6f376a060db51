"""One server from settings to exit status: the engine runs in this process, the front in a process of its own.

SIGTERM (or Ctrl-C) drains: new requests are refused, open ones are answered. A second signal aborts open requests.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from types import FrameType
from typing import Any

from helios_sim.errors import UserError
from helios_sim.report.terminal import say
from helios_sim.serve.front.kept import Kept
from helios_sim.serve.front.limits import keys_of
from helios_sim.serve.front.process import MOST_WAITING, FrontSettings, run_front
from helios_sim.serve.messages import Abort, Drain, End, Ended, FromEngine, Ready
from helios_sim.serve.service import Service
from helios_sim.serve.settings import ServeConfig, ServedConfig
from helios_sim.serve.text import known_folder, open_reader

_JOIN_S = 15.0  # longest wait for the front to end after it was told to
_MOST_AT_ONCE = 512  # most messages in one write to the pipe


def serve(config: ServedConfig) -> int:
    """Serves until stopped. Returns 0 then, or 1 if engine or front ended by itself.

    UserError if the settings, the weights or the device cannot serve.
    """
    settings = config.serve
    keys = keys_of(settings)
    if settings.records is not None:
        Kept(settings.records)  # a file that cannot be written is refused here, before anything is loaded
    with listening(settings) as sock, TemporaryDirectory(prefix="helios-serve-") as scratch:
        link = Link()
        service = Service(config.study(), settings, link.emit)
        tokenizers = _tokenizers(service, settings, Path(scratch))
        host, port = sock.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        front = FrontSettings(
            settings, keys, tokenizers, service.layers, service.vocabularies,
            service.config.mode, service.config.server.order == "priority", _about(service, settings),
        )  # fmt: skip
        link.start(front, sock, service)
        say(f"{address}: loading {', '.join(service.models)} for {service.job.arm.name}, mode={service.config.mode}; "
            f"the page is at /, Ctrl-C stops", sys.stderr)  # fmt: skip
        with signals(link):
            try:
                service.run()
            finally:
                link.finish()
    ended = link.ended
    if ended is None or ended.error is not None:
        return 1
    why = "stopped" if link.was_told_to_stop else f"the front process has ended by itself, status {link.front_status}"
    say(f"helios_sim.serve: {why}; {ended.books[0]} requests came in, {ended.books[1]} left", sys.stderr)
    return 0 if link.was_told_to_stop else 1


@contextlib.contextmanager
def listening(settings: ServeConfig) -> Iterator[socket.socket]:
    """Opens the listening socket. UserError if the address is taken or not one of this machine."""
    try:
        family = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)[0][0]
        # The protocol is named so that each token is written at once: without it, asyncio leaves Nagle's algorithm on.
        sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    except OSError as error:
        raise UserError("serve.host", settings.host, f"an address of this machine ({error})", "correct it") from error
    with sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            sock.bind((settings.host, settings.port))
            sock.listen(MOST_WAITING)  # clients that connect before the front runs wait for it
        except (OSError, OverflowError) as error:
            fix = "choose another, or 0 for any that is free"
            raise UserError("serve.port", settings.port, f"a port that is free here ({error})", fix) from error
        yield sock


class Link:
    """The link between the engine (in this thread) and the front process. Two threads read and write the pipe."""

    def __init__(self) -> None:
        self._out: SimpleQueue[FromEngine | Drain | Abort | None] = SimpleQueue()
        self._stops = 0
        self._began_s = time.monotonic()
        self._service: Service | None = None
        self.ready = threading.Event()
        self.ended: Ended | None = None

    @property
    def was_told_to_stop(self) -> bool:
        return self._stops > 0

    @property
    def front_status(self) -> int | None:
        """Exit status of the front process: negative if a signal ended it, None while it runs."""
        return self._front.exitcode

    def emit(self, message: FromEngine) -> None:
        """Passes a message from the engine on to the front."""
        if isinstance(message, Ended):
            self.ended = message
        self._out.put(message)
        if isinstance(message, Ready):
            self.ready.set()
            say(f"ready, {time.monotonic() - self._began_s:.1f} s after the start", sys.stderr)

    def stop(self) -> None:
        """Drains when called first, aborts when called again. KeyboardInterrupt if the engine is not ready yet."""
        self._stops += 1
        self._out.put(Drain() if self._stops == 1 else Abort())
        if not self.ready.is_set():
            raise KeyboardInterrupt

    def start(self, settings: FrontSettings, sock: socket.socket, service: Service) -> None:
        self._service = service
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        self._pipe: Connection = ours
        self._front = context.Process(target=run_front, args=(theirs, sock, settings), name="front", daemon=True)
        self._front.start()
        theirs.close()
        self._threads = [
            threading.Thread(target=self._write, name="to the front", daemon=True),
            threading.Thread(target=self._read, name="from the front", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Ends the front, once the engine has ended. A front that does not end in time is killed."""
        self._out.put(Abort())
        self._out.put(None)
        self._front.join(_JOIN_S)
        if self._front.is_alive():
            self._front.terminate()
            self._front.kill()
            self._front.join()
        self._pipe.close()

    def _write(self) -> None:
        while True:
            messages = [self._out.get()]
            while not self._out.empty() and len(messages) < _MOST_AT_ONCE:
                messages.append(self._out.get())
            last = None in messages
            try:
                self._pipe.send([message for message in messages if message is not None])
            except OSError:  # the front has gone
                return
            if last:
                return

    def _read(self) -> None:
        service = self._service
        assert service is not None
        try:
            while True:
                message = self._pipe.recv()
                service.tell(message)
        except (EOFError, OSError):
            if self.ready.wait(600) and self.ended is None:
                service.tell(End())


@contextlib.contextmanager
def signals(link: Link) -> Iterator[None]:
    """Makes SIGINT and SIGTERM stop the server: the first drains, the second aborts."""

    def on_signal(number: int, frame: FrameType | None) -> None:
        link.stop()

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tokenizers(service: Service, settings: ServeConfig, scratch: Path) -> Mapping[str, str | None]:
    """Folder of each candidate's tokenizer, for the front to read; None for the built-in vocabulary."""
    for name in settings.tokenizers:
        if name not in service.models:
            allowed = f"one of {', '.join(service.models)}"
            raise UserError(f"serve.tokenizers.{name}", settings.tokenizers[name], allowed, "name a candidate")
    if service.config.mode != "live":
        for folder in settings.tokenizers.values():
            open_reader(folder)  # refused here, before the front process is started
        return {model: known_folder(model, settings.tokenizers) for model in service.models}
    return service.save_tokenizers(scratch)


def _about(service: Service, settings: ServeConfig) -> Mapping[str, Any]:
    config = service.config
    return {
        "name": settings.name, "mode": config.mode, "arm": service.job.arm.name, "policy": service.job.arm.policy.name,
        "hardware": config.live.device if config.mode == "live" else config.hardware, "speedup": settings.speedup,
        "candidates": dict(service.layers),
    }  # fmt: skip


