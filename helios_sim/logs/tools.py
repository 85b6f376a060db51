"""Recognises the tool that wrote a file or folder by its content, and reads its requests."""

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
    """A benchmark tool: how its files are recognised and read."""

    name: str
    is_it: Callable[[Document], bool]
    read: Callable[[Document, int | None, int], RequestLog]  # document, run, seed


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
_NAMES = ("benchmarks.json", "benchmarks.yaml", "profile_export.jsonl", "log.jsonl")  # of guidellm, aiperf, observe
_OBSERVE = "drive the server with python -m helios_sim.observe, or vllm bench serve --save-result --save-detailed"
_PAGES = "save the page itself, twice or more in one folder: curl -s http://SERVER/metrics > metrics_$(date +%s).prom"
_OTHERS: tuple[tuple[tuple[str, ...], str, str], ...] = (  # keys of files of known tools that are not read
    (("sharegpt_output_len", "random_input_len"), "a report of SGLang's bench_serving, without arrivals", _OBSERVE),
    (("elapsed_time", "num_requests", "tokens_per_second"), "a summary of vllm bench throughput", _OBSERVE),
    (("avg_latency", "percentiles"), "a summary of vllm bench latency", _OBSERVE),
    (("service_kind", "experiments"), "GenAI-Perf's profile", "run aiperf, which took its place"),
    (("aggregated_metrics", "individual_request_metrics"), "genai-bench's requests, without arrivals", _OBSERVE),
    (("number_input_tokens", "inter_token_latency_s"), "LLMPerf's requests, without arrivals", _OBSERVE),
    (("traceID", "operationName"), "a trace of Jaeger", "let the OpenTelemetry collector write OTLP/JSON to a file"),
    (("metric", "values", "timestamps"), "an export of series", _PAGES),
    (("resourceSpans",), "an array of batches of spans", "write one batch in each line"),
    (("aiperf_version", "request_latency"), "AIPerf's summary", "take profile_export.jsonl (--export-level records)"),
    (("metadata", "payload", "responses"), "AIPerf's raw export", "take profile_export.jsonl beside it"),
    (("type_", "run_id", "benchmarks"), "a report of guidellm before 0.3", "run a newer guidellm"),
)
FORMATS = (*(tool.name for tool in TOOLS), "ServeGen", "LLMServingSim", "Azure", "Mooncake", "BurstGPT", "tables")


def tool_of(document: Document) -> Tool | None:
    """The tool, by the beginning of the text; None for a table of requests, or an unknown file.

    Raises UserError for a file of another tool, which is not read.
    """
    for names, what, fix in _OTHERS:
        if document.names(*names) and not any(tool.is_it(document) for tool in TOOLS):
            if names == ("resourceSpans",) and document.begins_with(b"{"):
                continue
            raise UserError(document.name, what, f"a log of one of {', '.join(FORMATS)}", fix)
    is_part = document.begins_with(b"{") and not document.names("guidellm_version")
    if is_part and document.names("request_totals", "requests"):
        raise UserError(document.name, "a benchmark of guidellm by itself", "its report", "take the whole report")
    if document.begins_with(b'{__name__="'):
        raise UserError(document.name, "a dump of Prometheus' series", "pages of /metrics of the server", _PAGES)
    found = next((tool for tool in TOOLS if tool.is_it(document)), None)
    if document.begins_with(b"["):  # inference-perf writes an array with names that others use too
        inside = Document(document.path, document.head[1:].lstrip())
        within = next((tool for tool in TOOLS if tool.is_it(inside)), None)
        if within is not None and within is not found:
            if within.name == "vllm bench" and not document.names("ttfts"):
                detailed = "run vllm bench serve with --save-result --save-detailed, and take the file of one run"
                raise UserError(document.name, "summaries of vllm bench", "the lists of all requests", detailed)
            fix = f"write each in a line of its own: jq -c '.[]' {document.name} > log.jsonl"
            raise UserError(document.name, f"an array of objects of {within.name}", "its objects one by one", fix)
    return found


def read_tool(document: Document, part: int | None = None, seed: int = 0) -> RequestLog | None:
    """The requests of a file, or None if none of the tools wrote it. `part` chooses one of several runs, from 1.

    `seed` is for requests that are drawn, if the file has only their sums.
    """
    with reading(document.name, "damaged", "a whole log of one of the tools", FIX):
        tool = tool_of(document)
        return None if tool is None else tool.read(document, part, seed)


def opened(path: Path) -> Document:
    """Open a file. Raises UserError if it is not text, or too large for a log of a tool."""
    return Document(path, read_text(path, MOST_BYTES, FIX))


def read_folder(folder: Path, span_s: tuple[float, float] | None = None, seed: int = 0) -> RequestLog:
    """The requests of a folder: reports of inference-perf, clients of ServeGen, scrapes, or the one log in it.

    Raises UserError for a folder of nothing that is known.
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
        there = [name for name in _NAMES if (folder / name).is_file()]
        if len(there) > 1:
            raise UserError("log", str(folder), f"a folder of one log, not of {', '.join(there)}", "name the file")
        for name in there:
            if (log := read_tool(opened(folder / name))) is not None:
                return log
    allowed = f"a folder with {inference_perf.FILE}, {', '.join(_NAMES)}, chunk-N-trace.csv, scrapes, or meta.json"
    raise UserError("log", str(folder), allowed, "name the log's file itself")
