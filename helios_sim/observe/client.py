"""A client of an OpenAI-compatible server that times every chunk: HTTP/1.1 by asyncio, a connection for each request.

Times are taken when bytes arrive, before they are parsed. A request counts as sent when its connection is open and its
bytes are handed to the system.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import SplitResult

_MOST_HEAD, _MOST_BODY = 1 << 16, 1 << 22  # bytes of an answer's head, and of a body that is no stream


class AnswerError(Exception):
    """The server's answer cannot be used; the message says why."""


@dataclass(slots=True)
class Answer:
    """The answer to one request. Times are those of `time.perf_counter`."""

    sent_at: float | None = None  # None if it could not be sent
    token_at: list[float] = field(default_factory=list)  # time of each chunk with text
    prompt_tokens: int | None = None  # as the server counts
    output_tokens: int | None = None
    cached_tokens: int | None = None
    finish_reason: str | None = None
    error: str | None = None  # None if it was answered


class Client:
    def __init__(self, address: SplitResult, key: str | None, timeout_s: float) -> None:
        self._address, self._key, self._timeout_s = address, key, timeout_s
        self._tls = ssl.create_default_context() if address.scheme == "https" else None

    async def get(self, path: str) -> Any:
        """The JSON value at a path. Raises AnswerError or OSError if there is none."""
        async with asyncio.timeout(min(self._timeout_s, 30.0)):
            reader, writer = await self._connect()
            try:
                writer.write(self._head("GET", path, b""))
                status, body = await self._answered(reader)
                content = b"".join([part async for part in body])
            finally:
                writer.close()
        if status != 200:
            raise AnswerError(_told(status, content))
        return json.loads(content)

    async def ask(self, path: str, body: Mapping[str, Any]) -> Answer:
        """Send one request and follow its stream to the end. Never raises an error of the server or of the network."""
        answer = Answer()
        content = json.dumps(body).encode()
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._follow(self._head("POST", path, content) + content, answer)
        except TimeoutError:
            answer.error = f"no answer within {self._timeout_s:g} s"
        except asyncio.IncompleteReadError:
            answer.error = "the connection ended in the middle of an answer"
        except (AnswerError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            answer.error = f"{type(error).__name__}: {error}" if not isinstance(error, AnswerError) else str(error)
        return answer

    async def _follow(self, request: bytes, answer: Answer) -> None:
        reader, writer = await self._connect()
        try:
            answer.sent_at = time.perf_counter()
            writer.write(request)
            await writer.drain()
            status, body = await self._answered(reader)
            if status != 200:
                raise AnswerError(_told(status, b"".join([part async for part in body])))
            done = False
            async for event, at in _events(body):
                done = done or event == "[DONE]"
                if event != "[DONE]":
                    _take(_parsed(event), at, answer)
            if not done:
                raise AnswerError("the stream ended before it was done")
            if not answer.token_at:
                raise AnswerError("no token came")
        finally:
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        port = self._address.port or (443 if self._tls else 80)
        return await asyncio.open_connection(self._address.hostname, port, ssl=self._tls, limit=_MOST_HEAD)

    def _head(self, method: str, path: str, content: bytes) -> bytes:
        lines = [f"{method} {self._address.path}{path} HTTP/1.1", f"Host: {self._address.netloc.rpartition('@')[2]}",
                 "Connection: close", "Accept: text/event-stream, application/json"]  # fmt: skip
        if content:
            lines += ["Content-Type: application/json", f"Content-Length: {len(content)}"]
        if self._key:
            lines.append(f"Authorization: Bearer {self._key}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode()

    async def _answered(self, reader: asyncio.StreamReader) -> tuple[int, AsyncIterator[bytes]]:
        """Return the status, and the body in parts as they arrive."""
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        except (asyncio.LimitOverrunError, asyncio.IncompleteReadError) as error:
            raise AnswerError("the server closed the connection without an answer") from error
        first, *lines = head.split("\r\n")
        parts = first.split(" ", 2)
        if len(parts) < 2 or not parts[0].startswith("HTTP/1.") or not parts[1].isdigit():
            raise AnswerError(f"no answer of HTTP: {first[:80]}")
        headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "chunked" in headers.get("transfer-encoding", "").lower():
            return int(parts[1]), _chunked(reader)
        length = headers.get("content-length")
        return int(parts[1]), _plain(reader, int(length) if length is not None and length.isdigit() else None)


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while True:
        line = await reader.readuntil(b"\r\n")
        try:
            size = int(line.split(b";")[0], 16)
        except ValueError as error:
            raise AnswerError(f"a chunk without its length: {line[:40]!r}") from error
        if size == 0:
            return
        left = size
        while left:  # in parts, since a chunk of the transfer may be long
            part = await reader.read(left)
            if not part:
                raise asyncio.IncompleteReadError(b"", left)
            left -= len(part)
            yield part
        await reader.readexactly(2)


async def _plain(reader: asyncio.StreamReader, length: int | None) -> AsyncIterator[bytes]:
    left = length
    while left is None or left > 0:
        part = await reader.read(_MOST_HEAD if left is None else min(left, _MOST_HEAD))
        if not part:
            if left:
                raise asyncio.IncompleteReadError(b"", left)
            return
        left = None if left is None else left - len(part)
        yield part


async def _events(body: AsyncIterator[bytes]) -> AsyncIterator[tuple[str, float]]:
    """Yield the data of each event of a stream, and the time of its last byte. Raises AnswerError for other bodies."""
    rest, at, found = b"", 0.0, False
    async for part in body:
        at = time.perf_counter()
        rest = (rest + part).replace(b"\r\n", b"\n")
        *whole, rest = rest.split(b"\n\n")
        if len(rest) > _MOST_BODY:
            raise AnswerError(f"an event of more than {_MOST_BODY} bytes")
        for event in whole:
            if data := _data(event):
                found = True
                yield data, at
    if data := _data(rest):  # the last event may lack the line that ends it
        yield data, at
    elif rest.strip() and not found:
        raise AnswerError(f"no stream of events: {' '.join(rest.decode(errors='replace').split())[:80]}")


def _data(event: bytes) -> str:
    """The data of an event; "" for none, as of a comment."""
    return b"\n".join(line[5:].strip() for line in event.split(b"\n") if line.startswith(b"data:")).decode()


def _parsed(event: str) -> Any:
    try:
        return json.loads(event)
    except (ValueError, RecursionError) as error:
        raise AnswerError(f"an event that is no JSON: {event[:80]}") from error


def _take(event: Any, at: float, answer: Answer) -> None:
    """Note the content of an event. Raises AnswerError if it is an error."""
    if not isinstance(event, dict):
        raise AnswerError(f"an event that is no object: {str(event)[:80]}")
    if event.get("error"):
        error = event["error"]
        text = str(error.get("message", error) if isinstance(error, dict) else error)
        raise AnswerError(f"error in the stream: {text[:200]}")
    usage, choices = event.get("usage") or {}, event.get("choices") or []
    if not isinstance(usage, dict) or not isinstance(choices, list) or not all(isinstance(c, dict) for c in choices):
        raise AnswerError(f"an event of another form: {str(event)[:80]}")
    answer.prompt_tokens = _count(usage, "prompt_tokens", answer.prompt_tokens)
    answer.output_tokens = _count(usage, "completion_tokens", answer.output_tokens)
    answer.cached_tokens = _count(usage.get("prompt_tokens_details") or {}, "cached_tokens", answer.cached_tokens)
    for choice in choices:
        delta = choice.get("delta") or {}
        if choice.get("text") or delta.get("content") or delta.get("reasoning_content") or delta.get("reasoning"):
            answer.token_at.append(at)
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason


def _count(usage: Mapping[str, Any], name: str, before: int | None) -> int | None:
    """A number of tokens; `before` if it is not given. Raises AnswerError if it is no number of tokens."""
    value = usage.get(name)
    if value is None:
        return before
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise AnswerError(f"usage.{name} is no number of tokens: {str(value)[:40]}")
    return value


def _told(status: int, content: bytes) -> str:
    """An HTTP error with the server's own words."""
    text = content[:_MOST_BODY].decode(errors="replace")
    try:
        said = json.loads(text)
        error = said.get("error", said)
        text = str(error.get("message", error) if isinstance(error, dict) else error)
    except (ValueError, AttributeError):
        pass
    return f"HTTP {status}: {' '.join(text.split())[:200]}".removesuffix(": ")
