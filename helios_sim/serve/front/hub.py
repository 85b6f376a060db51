"""The front's side of open requests: each is a stream of the tokens that the engine sends."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from time import monotonic
from typing import Any

from helios_sim.request import RequestRecord, Status
from helios_sim.serve.asked import Ask
from helios_sim.serve.front.metrics import Metrics
from helios_sim.serve.front.problems import Gone, Problem
from helios_sim.serve.messages import (
    Cancel,
    Decided,
    EndAnswer,
    Ended,
    FromEngine,
    Left,
    Look,
    Ready,
    Refused,
    State,
    Switched,
    ToEngine,
    Token,
    Tokens,
)

_KEPT_DECISIONS = 200
_FRESH_S = 0.05  # a state younger than this is not asked for again
_WAIT_S = 30.0  # longest wait for the engine's state, since an iteration may take long


class Stream:
    """The tokens of one request. Items are (token, model, replica), then at the end the record or an exception."""

    def __init__(self, ask: Ask) -> None:
        self.ask, self.began_s = ask, monotonic()
        self.record: RequestRecord | None = None
        self.seen: Mapping[str, Any] | None = None  # the front's figures of the complete answer
        self._items: deque[tuple[Token, str, int] | RequestRecord | BaseException] = deque()
        self._more = asyncio.Event()
        self.closed = False

    def put(self, item: tuple[Token, str, int] | RequestRecord | BaseException) -> None:
        self._items.append(item)
        self._more.set()

    async def get(self) -> tuple[Token, str, int] | None:
        """Waits for the next token; None after the last. Raises the exception that ended the stream, if one did."""
        while not self._items:
            self._more.clear()
            await self._more.wait()
        item = self._items.popleft()
        if isinstance(item, BaseException):
            raise item
        if isinstance(item, RequestRecord):
            return None
        return item


class Hub:
    """All open requests, and the engine's state. `send` passes a message to the engine.

    All of it runs in the event loop's thread.
    """

    def __init__(self, send: Callable[[ToEngine], None], metrics: Metrics) -> None:
        self._send, self.metrics = send, metrics
        self._open: dict[int, Stream] = {}
        self._numbers = 0
        self.ready: Ready | None = None
        self.ended: Ended | None = None
        self.state: State | None = None
        self._state_s = float("-inf")
        self._looking: asyncio.Future[State] | None = None
        self.decisions: deque[Mapping[str, Any]] = deque(maxlen=_KEPT_DECISIONS)
        self._listeners: set[Callable[[str, Mapping[str, Any]], None]] = set()
        self.closing = False
        self.on_answer: Callable[[Mapping[str, Any], RequestRecord], None] | None = None

    @property
    def open(self) -> int:
        """Number of requests in the engine."""
        return len(self._open)

    @property
    def model(self) -> str | None:
        """Model of the first replica in the latest state; None before the first state."""
        return None if self.state is None else self.state.replicas[0].model

    def ask(self, ask: Ask) -> Stream:
        """Gives a request the next number and sends it to the engine. Problem if the engine has ended."""
        ask = replace(ask, request_id=self._numbers)
        self._numbers += 1
        if self.ended is not None:
            raise Problem(503, "The engine has ended", None, "engine_ended")
        stream = self._open[ask.request_id] = Stream(ask)
        self._send(ask)
        return stream

    def note_answer(self, stream: Stream, seen: Mapping[str, Any]) -> None:
        """Notes the front's figures of a complete answer; the engine's record may come later."""
        stream.seen = seen
        self._keep(stream)

    def _keep(self, stream: Stream) -> None:
        if self.on_answer is not None and stream.seen is not None and stream.record is not None:
            self.on_answer(stream.seen, stream.record)

    def end_answer(self, stream: Stream) -> None:
        """Tells the engine that the answer is complete before its planned end: it completes with its next token."""
        if not stream.closed and stream.ask.request_id in self._open:
            self._send(EndAnswer(stream.ask.request_id))
        stream.closed = True

    def cancel(self, stream: Stream, reason: str) -> None:
        """Aborts the request at the engine's next iteration, unless it has left or the stream is closed."""
        if not stream.closed and stream.ask.request_id in self._open:
            self._send(Cancel(stream.ask.request_id, reason))
        stream.closed = True

    def close(self) -> None:
        """Makes the event streams of listeners end."""
        self.closing = True

    def disturb(self, error: BaseException) -> None:
        """Ends every open request with this error."""
        for stream in self._open.values():
            stream.put(error)

    async def look(self) -> State:
        """The engine's state, at most `_FRESH_S` old. Problem if the engine does not serve or answer in time."""
        if self.state is not None and monotonic() - self._state_s < _FRESH_S:
            return self.state
        if self.ended is not None or self.ready is None:
            raise Problem(503, "The engine does not serve", None, "engine_not_ready", 1)
        if self._looking is None:
            self._looking = asyncio.get_running_loop().create_future()
            self._send(Look())
        try:
            return await asyncio.wait_for(asyncio.shield(self._looking), _WAIT_S)
        except TimeoutError:
            raise Problem(503, "The engine does not tell its state", None, "engine_busy", 1) from None

    @property
    def listeners(self) -> int:
        return len(self._listeners)

    def send(self, message: ToEngine) -> None:
        self._send(message)

    def listen(self, listener: Callable[[str, Mapping[str, Any]], None]) -> Callable[[], None]:
        """Adds a listener of decisions, switches and requests that have left. Returns a function that removes it."""
        self._listeners.add(listener)
        return lambda: self._listeners.discard(listener)

    # --- Messages from the engine -----------------------------------------------------------------------------------

    def receive(self, message: FromEngine) -> None:
        if isinstance(message, Tokens):
            self._tokens(message)
        elif isinstance(message, Left):
            self._left(message.record)
        elif isinstance(message, Refused):
            stream = self._open.pop(message.request_id, None)
            if stream is not None:
                param, code = ("model", "model_not_loaded") if message.not_loaded else (None, "engine_overloaded")
                stream.put(Problem(503, message.reason, param, code, 5))
        elif isinstance(message, Decided):
            self.decisions.append(message.row)
            self._tell("decision", message.row)
        elif isinstance(message, Switched):
            self.metrics.note_switch(message)
            self._tell("switch", message._asdict())
        elif isinstance(message, State):
            self._note_state(message)
        elif isinstance(message, Ready):
            self.ready = message
            self._send(Look())
        elif isinstance(message, Ended):
            self.ended = message
            self.disturb(Problem(503, "The engine has ended", None, "engine_ended"))
            self._open.clear()

    def _tokens(self, message: Tokens) -> None:
        self.metrics.note_iteration(message)
        for token in message.tokens:
            stream = self._open.get(token.request_id)
            if stream is not None and not stream.closed:
                stream.put((token, message.model, message.replica))

    def _left(self, record: RequestRecord) -> None:
        stream = self._open.pop(record.request_id, None)
        self.metrics.note_record(record)
        if self._listeners:
            self._tell("left", {
                "request_id": record.request_id, "model": record.model, "status": record.status.value,
                "reason": record.drop_reason, "prompt_tokens": record.prompt_tokens,
                "output_tokens": record.output_tokens,
            })  # fmt: skip
        if stream is None:
            return
        stream.record = record
        self._keep(stream)
        if record.status is Status.COMPLETED:
            stream.put(record)
        elif record.status is Status.UNFINISHED:
            stream.put(Problem(503, "The server has stopped before the answer was complete", None, "server_stopped"))
        elif stream.closed:
            stream.put(Gone(record.drop_reason or ""))
        else:
            stream.put(Problem(400, f"The request cannot be served: {record.drop_reason}", None, "request_dropped"))

    def _note_state(self, state: State) -> None:
        self.metrics.note_state(state, self.state)
        self.state, self._state_s = state, monotonic()
        if self._looking is not None and not self._looking.done():
            self._looking.set_result(state)
        self._looking = None

    def _tell(self, kind: str, what: Mapping[str, Any]) -> None:
        for listener in tuple(self._listeners):
            listener(kind, what)
