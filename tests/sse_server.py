"""A small OpenAI-compatible server for the tests: one chunk for each token, at times that the test knows."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

MODEL = "tiny"


@dataclass
class Endpoint:
    """What the server does, and what it has seen."""

    ttft_s: float = 0.02
    gap_s: float = 0.002
    usage: bool = True  # whether it tells its own counts
    broken: Mapping[int, str] = field(default_factory=dict)  # by number of the request: refuse, cut, silent, slow
    merged: bool = False  # two tokens in one chunk
    longest: int = 1 << 20  # answers end by themselves after so many tokens
    key: str | None = None  # without it nothing is listed
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    port: int = 0
    running: int = 0
    most_running: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                line, *rest = head.split("\r\n")
                method, path, _ = line.split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (one.partition(":") for one in rest if one)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if method == "GET":
                    models = {"object": "list", "data": [{"id": MODEL, "object": "model", "max_model_len": 4096}]}
                    if self.key not in (None, headers.get("authorization", "").removeprefix("Bearer ")):
                        _answer(writer, 401, {"error": "Unauthorized"})
                        continue
                    _answer(writer, 200, models if path == "/v1/models" else {"status": "ok"})
                else:
                    self.headers.append(headers)
                    await self._complete(json.loads(body), path.endswith("chat/completions"), writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    async def _complete(self, asked: dict[str, Any], chat: bool, writer: asyncio.StreamWriter) -> None:
        number = len(self.bodies)
        self.bodies.append(asked)
        how = self.broken.get(number, "")
        if how == "refuse":
            _answer(writer, 429, {"error": {"message": "too many requests", "type": "rate_limit", "code": 429}})
            return
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self._stream(asked, chat, writer, how)
        finally:
            self.running -= 1

    async def _stream(self, asked: dict[str, Any], chat: bool, writer: asyncio.StreamWriter, how: str) -> None:
        tokens = int(asked.get("max_tokens") or asked.get("max_completion_tokens") or 4)
        tokens = min(tokens, self.longest)
        prompt = asked["messages"] if chat else asked["prompt"]
        read = len(prompt) if isinstance(prompt, list) and not chat else len(json.dumps(prompt).split())
        usage = {"prompt_tokens": read, "completion_tokens": tokens, "total_tokens": read + tokens}
        if not asked.get("stream"):
            await asyncio.sleep(self.ttft_s + self.gap_s * (tokens - 1))
            text = " a" * tokens
            choice = {"index": 0, "finish_reason": "length"}
            choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
            _answer(writer, 200, {"id": "x", "object": "x", "model": MODEL, "choices": [choice], "usage": usage})
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        await asyncio.sleep(60 if how == "slow" else self.ttft_s)
        for token in range(0, tokens, 2 if self.merged else 1):
            if token:
                await asyncio.sleep(self.gap_s)
            if how == "cut" and token >= tokens // 2:
                writer.close()
                return
            text = " a" * (2 if self.merged else 1)
            choice = {"index": 0, "finish_reason": "length" if token + 1 >= tokens else None}
            choice |= {"delta": {"role": "assistant", "content": text}} if chat else {"text": text}
            if how != "silent":
                _chunk(writer, {"id": "x", "object": "x", "model": MODEL, "choices": [choice]})
            await writer.drain()
        if self.usage and how != "silent":
            _chunk(writer, {"id": "x", "object": "x", "model": MODEL, "choices": [], "usage": usage})
        data = b"data: [DONE]\n\n"
        writer.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data))


def _chunk(writer: asyncio.StreamWriter, event: dict[str, Any]) -> None:
    data = f"data: {json.dumps(event)}\n\n".encode()
    writer.write(b"%x\r\n%s\r\n" % (len(data), data))


def _answer(writer: asyncio.StreamWriter, status: int, value: dict[str, Any]) -> None:
    body = json.dumps(value).encode()
    writer.write(b"HTTP/1.1 %d X\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                 % (status, len(body), body))  # fmt: skip


@contextmanager
def endpoint(**settings: Any) -> Iterator[Endpoint]:
    """The server, in a thread of its own as long as the `with` block lasts."""
    served = Endpoint(**settings)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(served.serve, "127.0.0.1", served.port)

    async def stop() -> None:
        server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    server = asyncio.run_coroutine_threadsafe(start(), loop).result()
    served.port = server.sockets[0].getsockname()[1]
    try:
        yield served
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


if __name__ == "__main__":
    with endpoint(port=8123) as running:
        print(running.url, flush=True)
        threading.Event().wait()
