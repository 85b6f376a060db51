"""The HTTP endpoints. FastAPI routes the quick ones; completions and chats are handled in `generate`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from statistics import quantiles
from time import time
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

import helios_sim
from helios_sim.errors import UserError
from helios_sim.files import json_value
from helios_sim.serve.front.generate import Generator
from helios_sim.serve.front.hub import Hub
from helios_sim.serve.front.limits import Gate
from helios_sim.serve.front.problems import Gone, Problem, wrong
from helios_sim.serve.front.reading import parsed, read_to_detokenize, read_to_tokenize
from helios_sim.serve.messages import Sleep, Wake
from helios_sim.serve.text import Reader

PAGE = Path(__file__).with_name("page.html")
OPEN = ("/", "/health")  # paths that need no key, since they tell nothing
_MOST_LISTENERS = 32
_BY_PAGE = {
    "content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "x-content-type-options": "nosniff", "referrer-policy": "no-referrer",
}  # fmt: skip


class AnswerEndpoint:
    """The endpoint of completions, or of chats, as a bare ASGI application."""

    def __init__(self, generator: Generator, chat: bool) -> None:
        self._generator, self._chat = generator, chat

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client = scope.get("client") or ("", 0)
        await self._generator.answer(self._chat, _headers(scope), str(client[0]), receive, send)


class Guard:
    """Checks host and key of all requests, except those for answers: `Generator.answer` checks and books those."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app, self._gate = app, gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in ANSWERS:
            headers = _headers(scope)
            try:
                self._gate.check_host(headers)
                if scope["path"] not in OPEN:
                    self._gate.check_key(headers)
            except Problem as problem:
                await _response(problem)(scope, receive, send)
                return
        await self._app(scope, receive, send)


ANSWERS = ("/v1/completions", "/v1/chat/completions")


def make_app(
    hub: Hub, generator: Generator, gate: Gate, readers: Mapping[str, Reader], about: Mapping[str, Any]
) -> FastAPI:
    """Makes the application. `about` is shown on the page: mode, policy, names and layers of the candidates."""
    app = FastAPI(title="helios-sim", version=helios_sim.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.router.routes.append(Route(ANSWERS[0], AnswerEndpoint(generator, chat=False), methods=["POST"]))
    app.router.routes.append(Route(ANSWERS[1], AnswerEndpoint(generator, chat=True), methods=["POST"]))
    app.add_middleware(Guard, gate=gate)
    app.add_exception_handler(Problem, lambda _, problem: _response(problem))
    app.add_exception_handler(Gone, lambda *_: Response(status_code=499))
    app.add_exception_handler(HTTPException, _not_found)
    app.add_exception_handler(RequestValidationError, _not_valid)
    app.add_exception_handler(Exception, lambda *_: _response(Problem(500, "The server failed; its log says why")))
    _add_openai(app, generator, readers, about, hub)
    _add_engine(app, hub, generator)
    _add_ours(app, hub, generator, about)
    return app


def _add_openai(
    app: FastAPI, generator: Generator, readers: Mapping[str, Reader], about: Mapping[str, Any], hub: Hub
) -> None:
    created = int(time())

    @app.get("/v1/models")
    async def models() -> Any:
        """Lists the candidates, and the name by which clients ask for the loaded one."""
        context = None if hub.ready is None else hub.ready.context_tokens
        names = [about["name"], *readers]
        return {
            "object": "list",
            "data": [
                {"id": name, "object": "model", "created": created, "owned_by": "helios-sim", "root": name,
                 "parent": None, "max_model_len": context, "permission": []}
                for name in names
            ],
        }  # fmt: skip

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        generator.candidate(name)  # raises Problem for an unknown name
        return next(one for one in (await models())["data"] if one["id"] == name)

    async def read(request: Request) -> dict[str, Any]:
        return parsed(await generator.body({k.lower(): v for k, v in request.headers.items()}, request.receive))

    def reader_of(name: str | None) -> Reader:
        return readers[generator.candidate(name) or hub.model or next(iter(readers))]

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        asked = read_to_tokenize(await read(request))
        reader = reader_of(asked.model)
        try:
            text = reader.chat(asked.messages) if asked.prompt is None else asked.prompt
        except UserError as error:
            raise wrong("messages", f"The chat template refuses these messages: {error.allowed}") from None
        ids = await asyncio.to_thread(reader.encode, text, asked.special)
        context = None if hub.ready is None else hub.ready.context_tokens
        return {"count": len(ids), "max_model_len": context, "tokens": ids, "token_strs": None}

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Any:
        model, ids = read_to_detokenize(await read(request))
        reader = reader_of(model)
        if max(ids, default=0) >= reader.vocab_size:
            raise wrong("tokens", f"tokens must be a list of token ids from 0 to {reader.vocab_size - 1}")
        return {"prompt": await asyncio.to_thread(reader.decode, ids)}


def _add_engine(app: FastAPI, hub: Hub, generator: Generator) -> None:
    sleeping = Problem(503, "The model sleeps: its weights are not in memory. POST /wake_up", None, "asleep", 5)

    @app.get("/health")
    async def health() -> Response:
        """Returns 200 while requests can be answered (also asleep), else 503."""
        good = hub.ready is not None and hub.ended is None and generator.closed in (None, sleeping)
        return Response(status_code=200 if good else 503)

    @app.get("/version")
    async def version() -> Any:
        return {"version": helios_sim.__version__}

    @app.get("/metrics")
    async def metrics() -> Response:
        await _fresh(hub)
        return Response(hub.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.post("/sleep")
    async def sleep(request: Request, level: int = 1) -> Response:
        """Refuses new requests and, once the running ones are done, frees the memory of weights and KV."""
        _check_query(request, ("level",))
        if level not in (1, 2):
            raise wrong("level", "level must be 1 or 2; both free weights and K and V")
        if generator.closed not in (None, sleeping):
            raise generator.closed
        generator.closed = sleeping
        hub.send(Sleep())
        while not (await hub.look()).asleep:
            await asyncio.sleep(0.06)
            if generator.closed is not sleeping:
                raise generator.closed or Problem(409, "It was woken before it slept", None, "woken")
        return Response()

    @app.post("/wake_up")
    async def wake_up(request: Request) -> Response:
        """Brings weights and KV back into memory. vLLM's tags, which wake parts of them, are not supported."""
        _check_query(request, ())
        if generator.closed is not sleeping:
            return Response()
        hub.send(Wake())
        await asyncio.sleep(0.06)
        while (await hub.look()).asleep:
            await asyncio.sleep(0.06)
        if generator.closed is sleeping:
            generator.closed = None
        return Response()

    @app.get("/is_sleeping")
    async def is_sleeping() -> Any:
        return {"is_sleeping": (await hub.look()).asleep}


def _add_ours(app: FastAPI, hub: Hub, generator: Generator, about: Mapping[str, Any]) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return Response(PAGE.read_bytes(), media_type="text/html; charset=utf-8", headers=_BY_PAGE)

    @app.get("/helios/state")
    async def state() -> Any:
        await _fresh(hub)
        return JSONResponse(told_state(hub, generator, about))

    @app.get("/helios/events")
    async def events(request: Request) -> Response:
        if hub.listeners >= _MOST_LISTENERS:
            raise Problem(429, f"{_MOST_LISTENERS} listen already", None, "rate_limit_exceeded", 5)
        return StreamingResponse(_events(hub, generator, about), media_type="text/event-stream",
                                 headers={"cache-control": "no-cache"})  # fmt: skip


async def _events(hub: Hub, generator: Generator, about: Mapping[str, Any]) -> AsyncIterator[bytes]:
    """Yields decisions, switches and departures as they come, and the state every second."""
    found: asyncio.Queue[bytes] = asyncio.Queue(maxsize=1000)

    def put(kind: str, what: Mapping[str, Any]) -> None:
        if not found.full():  # a listener that reads too slowly misses some
            found.put_nowait(_event(kind, what))

    ends = hub.listen(put)
    try:
        while hub.ended is None and not hub.closing:
            await _fresh(hub)
            yield _event("state", told_state(hub, generator, about))
            try:
                async with asyncio.timeout(1.0):
                    while not hub.closing:
                        yield await found.get()
            except TimeoutError:
                pass
    finally:
        ends()


def _event(kind: str, what: Mapping[str, Any]) -> bytes:
    return f"event: {kind}\ndata: {json.dumps(json_value(what))}\n\n".encode()


def told_state(hub: Hub, generator: Generator, about: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of /helios/state. Unknown values are null."""
    state, recent = hub.state, hub.metrics.recent()
    return {
        **about,
        "time_s": None if state is None else state.time_ns / 1e9,
        "late_s": None if state is None else state.late_s,
        "asleep": False if state is None else state.asleep,
        "accepts": generator.closed is None,
        "replicas": [] if state is None else [replica._asdict() for replica in state.replicas],
        "energy_j": None if state is None else state.energy_j,
        "energy_of": None if state is None else state.energy_of,
        "queue": {"open": generator.asking, "in_engine": hub.open},
        "tokens_per_s": hub.metrics.tokens_per_s(),
        "recent": {name: _spread(values) for name, values in recent.items()},
        "points": {name: values[-200:] for name, values in recent.items()},
        "depths": hub.metrics.depths_seen,
        "decisions": json_value(list(hub.decisions)[-50:]),
        "books": generator.books.told(),
    }


def _spread(values: list[float]) -> dict[str, float | int | None]:
    if not values:
        return {"requests": 0, "p50": None, "p95": None}
    cuts = quantiles(values, n=20, method="inclusive") if len(values) > 1 else values * 19
    return {"requests": len(values), "p50": cuts[9], "p95": cuts[18]}


async def _fresh(hub: Hub) -> None:
    """Asks the engine for its state. If it does not answer in time, the last state stays."""
    try:
        async with asyncio.timeout(2.0):
            await hub.look()
    except (Problem, TimeoutError):
        pass


def _check_query(request: Request, known: Sequence[str]) -> None:
    for name in request.query_params:
        if name not in known:
            raise wrong(name, f"Unrecognized query parameter: {name[:100]}", "unrecognized_argument")


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}


def _response(problem: Problem) -> Response:
    body = json.dumps(problem.body)  # in ASCII, since the message may quote half a surrogate pair
    return Response(body, problem.status, dict(problem.headers), "application/json")


async def _not_valid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong_one = error.errors()[0]
    name = str(wrong_one["loc"][-1])
    return _response(wrong(name, f"{name}: {wrong_one['msg']}"))


async def _not_found(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    told = f"{request.method} {request.url.path[:200]}: {error.detail}"
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    response = _response(Problem(error.status_code, told, None, code))
    response.headers.update(error.headers or {})
    return response


