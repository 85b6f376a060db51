"""Which tool wrote a file or folder, by what stands in it, and its requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from helios_sim.errors import UserError
from helios_sim.logs import aiperf, blis, guidellm, inference_perf, own, scrapes, servegen, spans, vllm_bench
from helios_sim.logs.document import MOST_BYTES, Document
from helios_sim.logs.record import FIX, RequestLog
from helios_sim.untrusted import read_text, reading


@dataclass(frozen=True, slots=True)
class Tool:
    name: str
    is_it: Callable[[Document], bool]
    read: Callable[[Document, int | None, int], RequestLog]  # which of its runs, and the seed of what is drawn


def _tool(name: str, module: ModuleType) -> Tool:
    return Tool(name, module.is_it, lambda document, part, _: module.read(document, part))


def _scraped(document: Document, part: int | None, seed: int) -> RequestLog:
    document.chosen(part or 1, ["the file"], "runs")
    return scrapes.drawn(scrapes.read([document.path]), seed)


TOOLS = (
    _tool("observe", own), _tool("vllm bench", vllm_bench), _tool("guidellm", guidellm), _tool("aiperf", aiperf),
    _tool("inference-perf", inference_perf), _tool("BLIS TraceV2", blis), _tool("OpenTelemetry spans", spans),
    Tool(scrapes.NAME, lambda document: scrapes.is_text(document.head), _scraped),
)  # fmt: skip
_NAMES = ("benchmarks.json", "profile_export.jsonl", "log.jsonl")  # of guidellm, aiperf and observe
FORMATS = (*(tool.name for tool in TOOLS), "ServeGen", "LLMServingSim", "Azure", "Mooncake", "BurstGPT", "tables")


def tool_of(document: Document) -> Tool | None:
    """The tool by the beginning of the text; None: a table of requests, or nothing that is known."""
    return next((tool for tool in TOOLS if tool.is_it(document)), None)


def read_tool(document: Document, part: int | None = None, seed: int = 0) -> RequestLog | None:
    """The requests of a file that one of the tools wrote; None where none did. `part`: of several runs, from 1.

    `seed`: of requests that are drawn, where the file has only their sums.
    """
    with reading(document.name, "damaged", "a whole log of one of the tools", FIX):
        tool = tool_of(document)
        return None if tool is None else tool.read(document, part, seed)


def opened(path: Path) -> Document:
    """UserError for what is no text, or too large for a log of a tool."""
    return Document(path, read_text(path, MOST_BYTES, FIX))


def read_folder(folder: Path, span_s: tuple[float, float] | None = None, seed: int = 0) -> RequestLog:
    """The requests of a folder: reports of inference-perf, clients of ServeGen, scrapes, or the one log in it.

    UserError for a folder of nothing that is known.
    """
    with reading(str(folder), "damaged", "the folder of a log", FIX):
        requests = inference_perf.of_folder(folder)
        if requests is not None:
            return inference_perf.read(opened(requests))
        if servegen.of_folder(folder):
            return servegen.read_folder(folder, span_s, seed)
        pages = scrapes.of_folder(folder)
        if pages:
            return scrapes.drawn(scrapes.read(pages), seed)
        for name in _NAMES:
            if (folder / name).is_file() and (log := read_tool(opened(folder / name))) is not None:
                return log
    allowed = f"a folder with {inference_perf.FILE}, {', '.join(_NAMES)}, chunk-N-trace.csv, scrapes, or meta.json"
    raise UserError("log", str(folder), allowed, "name the log's file itself")
