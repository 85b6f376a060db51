"""Handles requests for an answer: reads the body, admits it, sends it to the engine, writes the answer, books it.

This is bare ASGI, since every token is a separate write and a client that leaves must be noticed at once.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, MutableMapping, Sequence
from contextlib import aclosing, suppress
from time import monotonic, time
from typing import Any
from uuid import uuid4

from helios_sim.errors import UserError
from helios_sim.serve.asked import Ask, Sampling
from helios_sim.serve.front.answering import DONE, Answering, Piece, Writer, error_event
from helios_sim.serve.front.books import Books
from helios_sim.serve.front.hub import Hub, Stream
from helios_sim.serve.front.limits import Gate
from helios_sim.serve.front.metrics import LEFT
from helios_sim.serve.front.problems import Gone, Problem, wrong
from helios_sim.serve.front.reading import Wanted, parsed, read_chat, read_completion
from helios_sim.serve.settings import ServeConfig
from helios_sim.serve.text import Reader, Script

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
_LONG_CHARS = 2_000  # longer texts are tokenized in a thread; shorter ones take the event loop a few ms at worst
_MOST_ID = 128  # most characters of a client's request id
_MOST_DISCARDED = 64 << 20  # most bytes that are read of a body that is refused
_SSE = [
    (b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]  # fmt: skip


class Generator:
    """Answers requests. `simulates`: text is made up. `by_priority`: priorities order the waiting queue."""

    def __init__(
        self, hub: Hub, gate: Gate, serve: ServeConfig, readers: dict[str, Reader], simulates: bool, by_priority: bool
    ) -> None:
        self._hub, self._gate, self._serve, self._readers = hub, gate, serve, readers
        self._simulates, self._by_priority = simulates, by_priority
        self._scripts = {model: Script(reader) for model, reader in readers.items()} if simulates else {}
        self.books = Books()
        self.closed: Problem | None = None  # why new requests are refused; None if they are not
        self.asking = 0  # prompts of requests that were admitted and have not ended

    async def answer(self, chat: bool, headers: Mapping[str, str], client: str, receive: Receive, send: Send) -> None:
        """Handles one POST request, and books its outcome."""
        books, began_s = self.books, monotonic()
        books.received += 1
        request_id = headers.get("x-request-id", "")[:_MOST_ID] or uuid4().hex
        own = [(b"x-request-id", request_id.encode("latin-1", "replace"))]
        begun = False
        unread = "expect" not in headers  # whether the client sends (the rest of) the body regardless of our answer

        async def start(status: int, more: Sequence[tuple[bytes, bytes]]) -> None:
            nonlocal begun
            begun = True
            await send({"type": "http.response.start", "status": status, "headers": [*more, *own]})

        async def tell(problem: Problem) -> None:
            if begun:
                await send({"type": "http.response.body", "body": error_event(problem)})
                return
            if unread and problem.status != 408:
                await self._discard(receive)
            body = json.dumps(problem.body).encode()
            named = [(name.lower().encode(), value.encode()) for name, value in problem.headers.items()]
            length = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
            await start(problem.status, [*length, *named])
            await send({"type": "http.response.body", "body": body})

        try:
            self._gate.check_host(headers)
            client = self._gate.check_key(headers) or client
            body = await self.body(headers, receive)
            unread = False
            wanted = (read_chat if chat else read_completion)(parsed(body))
            async with asyncio.timeout(self._serve.request_timeout_s):
                await self._serve_one(wanted, client, request_id, began_s, receive, start, send)
            books.answered += 1
        except Gone:
            books.cancelled += 1
        except TimeoutError:
            books.failed += 1
            await tell(Problem(504, f"No answer within {self._serve.request_timeout_s:g} s", None, "timeout"))
        except Problem as problem:
            if begun:
                books.failed += 1
            else:
                books.refused += 1
            await tell(problem)
        except asyncio.CancelledError:
            books.cancelled += 1
            raise
        except Exception:
            books.failed += 1
            with suppress(Exception):
                await tell(Problem(500, "The server failed to answer; its log says why", None, "internal_error"))
            raise

    async def body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """Reads the whole body. Problem if it is too large, too slow or not plain JSON; Gone if the client leaves."""
        most, parts, length = self._serve.max_body_bytes, [], 0
        declared, coding = headers.get("content-length", "0"), headers.get("content-encoding", "identity")
        too_large = Problem(413, f"The body is larger than {most} bytes", None, "body_too_large")
        if not declared.isdigit() or int(declared) > most:
            raise too_large
        kind = headers.get("content-type", "application/json").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(415, "The body must be of type application/json", None, "unsupported_media_type")
        if coding.strip().lower() not in ("", "identity"):
            told = f"A body with Content-Encoding {coding[:50]} is not read: send it as it is"
            raise Problem(415, told, None, "unsupported_media_type")
        try:
            async with asyncio.timeout(self._serve.body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Gone
                    parts.append(message.get("body", b""))
                    length += len(parts[-1])
                    if length > most:
                        raise too_large
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError:
            told = f"The body did not arrive within {self._serve.body_timeout_s:g} s"
            raise Problem(408, told, None, "body_timeout") from None

    async def _discard(self, receive: Receive) -> None:
        """Reads and drops the rest of a body, up to a limit.

        Many clients write the whole body before they read, and get no answer if the connection is closed meanwhile.
        """
        left = _MOST_DISCARDED
        with suppress(TimeoutError):
            async with asyncio.timeout(self._serve.body_timeout_s):
                while left > 0 and (message := await receive()).get("more_body"):
                    left -= len(message["body"])

    async def _serve_one(
        self,
        wanted: Wanted,
        client: str,
        request_id: str,
        began_s: float,
        receive: Receive,
        start: Callable[[int, Sequence[tuple[bytes, bytes]]], Awaitable[None]],
        send: Send,
    ) -> None:
        prompts = max(1, len(wanted.prompts))
        with self._gate.counted(client, prompts):
            self._check_room(prompts)
            self.asking += prompts
            streams: list[Stream] = []
            watcher: asyncio.Task[None] | None = None
            try:
                asks = await self._asks(wanted)
                if self.closed is not None:  # closed meanwhile: a long prompt takes a while to tokenize
                    raise self.closed
                streams += [self._hub.ask(ask) for ask in asks]
                watcher = asyncio.create_task(_watch(receive, streams))
                answers = [
                    Answering(self._hub, stream, wanted, self._readers, self._scripts, began_s, request_id)
                    for stream in streams
                ]
                kind = "chatcmpl" if wanted.chat else "cmpl"
                writer = Writer(wanted, f"{kind}-{request_id}", int(time()), self._readers)
                if wanted.stream:
                    await self._write_stream(wanted, answers, writer, start, send)
                else:
                    await self._write_whole(answers, writer, start, send)
            finally:
                self.asking -= prompts
                if watcher is not None:
                    watcher.cancel()
                for stream in streams:
                    self._hub.cancel(stream, LEFT)

    def _check_room(self, prompts: int) -> None:
        if self.closed is not None:
            raise self.closed
        ready = self._hub.ready
        if ready is None or self._hub.ended is not None:
            raise Problem(503, "The engine does not serve yet", None, "engine_not_ready", 1)
        if self.asking + prompts > ready.most_running + self._serve.max_queue:
            raise Problem(429, f"The queue is full: {self.asking} requests are open", None, "engine_overloaded", 1)

    # --- Text to token ids ------------------------------------------------------------------------------------------

    async def _asks(self, wanted: Wanted) -> list[Ask]:
        model = self.candidate(wanted.model)
        if wanted.priority and not self._by_priority:
            raise wrong("priority", "priority counts only where server.order=priority", "unsupported_parameter")
        if wanted.logprobs and self._simulates:
            raise wrong("logprobs", "logprobs are not known where mode=simulate: nothing is computed",
                        "unsupported_parameter")  # fmt: skip
        if not wanted.chat:
            return [await self._ask(wanted, model, prompt) for prompt in wanted.prompts]
        first = self._readers[model or next(iter(self._readers))]
        try:
            text = {name: reader.chat(wanted.messages) for name, reader in self._readers.items()}
        except UserError as error:
            told = f"The chat template of {first.name} refuses these messages: {error.allowed}"
            raise wrong("messages", told) from None
        return [await self._ask(wanted, model, text)]

    async def _ask(self, wanted: Wanted, model: str | None, prompt: str | Sequence[int] | Mapping[str, str]) -> Ask:
        if isinstance(prompt, list):
            name = model or self._hub.model or next(iter(self._readers))
            of, reader = name, self._readers[name]
            highest = max(prompt)
            if highest >= reader.vocab_size:
                raise wrong("prompt", f"{of} knows the token ids 0 to {reader.vocab_size - 1}, and not {highest}")
            text: Mapping[str, str] = {}
            if len(self._readers) > 1:
                words = reader.decode(prompt)
                text = {name: words for name in self._readers if name != of}
            ids = {of: tuple(prompt)} | await self._encoded(text, wanted.special)
            chars = len(reader.decode(prompt))
        else:
            text = prompt if isinstance(prompt, Mapping) else dict.fromkeys(self._readers, str(prompt))
            ids = await self._encoded(text, wanted.special)
            chars = max(map(len, text.values()))
        longest = max(map(len, ids.values()))
        if not min(map(len, ids.values())):
            raise wrong("messages" if wanted.chat else "prompt", "The prompt is empty: it has no token")
        assert self._hub.ready is not None
        context = self._hub.ready.context_tokens
        most = wanted.max_tokens
        limit = self._serve.max_tokens
        if most is not None and limit is not None and most > limit:
            raise wrong("max_tokens", f"max_tokens is {most}, and this server allows {limit}")
        if longest + (most or 1) > context:
            told = (
                f"This model's maximum context length is {context} tokens. However, you requested {longest} tokens "
                f"in the prompt and {most or 1} for the answer. Please reduce the length of either."
            )
            raise wrong("messages" if wanted.chat else "prompt", told, "context_length_exceeded")
        if most is None:
            most = min(context - longest, limit or context)
        temperature = self._serve.temperature if wanted.temperature is None else wanted.temperature
        return Ask(
            -1, ids, chars, most, min(wanted.min_tokens, most), wanted.ignore_eos, model,
            Sampling(temperature, wanted.top_p, wanted.seed, wanted.logprobs), wanted.priority,
        )  # fmt: skip

    async def _encoded(self, text: Mapping[str, str], special: bool) -> dict[str, tuple[int, ...]]:
        def encode() -> dict[str, tuple[int, ...]]:
            return {name: tuple(self._readers[name].encode(words, special)) for name, words in text.items()}

        if sum(map(len, text.values())) > _LONG_CHARS:
            return await asyncio.to_thread(encode)
        return encode()

    def candidate(self, name: str | None) -> str | None:
        """The only candidate that may answer; None if any may. Problem for an unknown name."""
        if name is None or name == self._serve.name:
            return None
        if name not in self._readers:
            known = ", ".join((self._serve.name, *self._readers))
            told = f"The model `{name[:200]}` does not exist: there are {known}"
            raise Problem(404, told, "model", "model_not_found")
        return name

    # --- Writing answers --------------------------------------------------------------------------------------------

    async def _write_whole(
        self, answers: Sequence[Answering], writer: Writer, start: Callable[..., Awaitable[None]], send: Send
    ) -> None:
        found: list[list[Piece]] = []
        for answer in answers:
            async with aclosing(answer.pieces()) as pieces:
                found.append([piece async for piece in pieces])
        body = json.dumps(writer.whole(found, _together(answers)), ensure_ascii=False).encode()
        await start(200, [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())])
        await send({"type": "http.response.body", "body": body})

    async def _write_stream(
        self,
        wanted: Wanted,
        answers: Sequence[Answering],
        writer: Writer,
        start: Callable[..., Awaitable[None]],
        send: Send,
    ) -> None:
        begun, model = False, ""
        async with aclosing(_merged(answers)) as merged:
            async for index, piece in merged:
                if not begun:  # only now: a request refused before its first token gets an HTTP status of its own
                    begun = True
                    await start(200, _SSE)
                model = piece.model
                chunk = writer.chunk(index, piece, _together(answers) if wanted.usage_in_chunks else None)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        last = writer.usage(_together(answers), model) if wanted.usage else b""
        await send({"type": "http.response.body", "body": last + DONE})


def _together(answers: Sequence[Answering]) -> dict[str, int]:
    if len(answers) == 1:
        return answers[0].usage
    return {name: sum(answer.usage[name] for answer in answers) for name in answers[0].usage}


async def _watch(receive: Receive, streams: Sequence[Stream]) -> None:
    """Waits until the client leaves, then ends the streams with Gone."""
    while (await receive())["type"] != "http.disconnect":
        pass
    for stream in streams:
        stream.put(Gone())


async def _merged(answers: Sequence[Answering]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Yields pieces of several answers as they come, each with the index of its prompt."""
    if len(answers) == 1:
        async with aclosing(answers[0].pieces()) as pieces:
            async for piece in pieces:
                yield 0, piece
        return
    found: asyncio.Queue[tuple[int, Piece | BaseException | None]] = asyncio.Queue()

    async def forward(index: int) -> None:
        try:
            async with aclosing(answers[index].pieces()) as pieces:
                async for piece in pieces:
                    found.put_nowait((index, piece))
            found.put_nowait((index, None))
        except Exception as error:
            found.put_nowait((index, error))

    tasks = [asyncio.create_task(forward(index)) for index in range(len(answers))]
    try:
        left = len(tasks)
        while left:
            index, came = await found.get()
            if isinstance(came, BaseException):
                raise came
            if came is None:
                left -= 1
            else:
                yield index, came
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
