"""OpenTelemetry spans of generative AI as JSON lines: OTLP/JSON as the collector's file exporter writes it.

Each line is a batch `{"resourceSpans": [...]}`. A span is a request if it counts tokens: gen_ai.usage.input_tokens
and output_tokens (the semantic conventions), or prompt_tokens and completion_tokens (vLLM, and older conventions). vLLM
adds gen_ai.latency.time_to_first_token, e2e and time_in_queue (s, from its arrival at the server).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from helios_sim.errors import UserError
from helios_sim.logs.document import Document
from helios_sim.logs.figures import TOTALS, Figure, Known, Look, Ours
from helios_sim.logs.record import (
    FIX,
    Begins,
    RequestLog,
    Row,
    close_to,
    gathered,
    number,
    other_models,
    stamp_ns,
    whole,
)
from helios_sim.request import NS_PER_S
from helios_sim.untrusted import check_name, reading, shortened

NAME = "OpenTelemetry GenAI spans"
_PROMPT = ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens")
_OUTPUT = ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens")
_TTFT, _E2E, _QUEUE = (f"gen_ai.latency.{name}" for name in ("time_to_first_token", "e2e", "time_in_queue"))
_WRITES = ("chat", "text_completion", "generate_content", None)  # operations that write tokens
_MODEL = ("gen_ai.request.model", "gen_ai.response.model")
_SERVICE = ("service.name", "service.instance.id")
_SAMPLED = re.compile(r"(?:^|,)ot=(?:[^,]*;)?(?:th:(?!0+(?:[;,]|$))|p:(?!0(?:[;,]|$)))")  # of now, and before
_ERROR = (2, "STATUS_CODE_ERROR")
_EFFECTS = {
    "gen_ai.usage.cache_read.input_tokens": "what of the prompts the prefix cache served is computed anew here",
    "gen_ai.usage.cached_tokens": "what of the prompts the prefix cache served is computed anew here",
    **dict.fromkeys(("gen_ai.request.n", "gen_ai.request.choice.count", "n"),
                    "several answers to one prompt, which are counted as one"),
    **dict.fromkeys(("sampling.probability", "sampling.ratio"),
                    "spans are those of a sample, and the requests beside them are missing, so the load was higher"),
    **dict.fromkeys(("gen_ai.conversation.id", "session.id"),
                    "what the turns of a session share is computed anew for each"),
}  # fmt: skip
# Attributes that are read, that say how a request was sampled, traced or sent, or that hold its texts.
_HARMLESS = (
    r"gen_ai\.usage\.(input|output|prompt|completion|reasoning\.output)_?tokens|gen_ai\.latency\..*|gen_ai\.(operation\.name|system|provider\.name|output\.type|token\.type|agent\..*)"
    r"|gen_ai\.request\.(id|model|max_tokens|temperature|top_[pk]|seed|stop_sequences|(frequency|presence)_penalty"
    r"|streaming|encoding_formats)|gen_ai\.response\.(id|model|finish_reasons)|gen_ai\.(prompt|completion)\..*"
    r"|gen_ai\.(input|output)\.messages|gen_ai\.(system_instructions|tool\..*)|(llm|openinference|traceloop)\..*"
    r"|(http|url|net|network|server|client|user_agent|peer|otel|telemetry|code|thread|process|host|k8s|service|rpc)\..*"
    r"|(error|exception)\..*|openai\..*|input\.(value|mime_type)|output\.(value|mime_type)"
)


_MOST = "{count} of {all} answers have more tokens than were asked for: {said} were, and one has {ours}"


def _part(of: str) -> Callable[[Mapping[str, Any], re.Match[str]], Ours]:
    """The range of a part of another figure: from 0 to that figure."""
    return lambda said, _: (0.0, float(said[of])) if isinstance(said.get(of), int | float) else None


def _total(said: Mapping[str, Any], _: re.Match[str]) -> Ours:
    prompt, output = (_first(said, names) for names in (_PROMPT, _OUTPUT))
    return prompt + output if type(prompt) is int and type(output) is int else None


_KNOWN = Known(
    read=_HARMLESS,
    figures=(
        Figure(r"(llm|gen_ai)\.usage\.total_tokens", _total, 0.0, 0.5, told=TOTALS),
        Figure(r"gen_ai\.request\.max_tokens", lambda said, _: None if (output := _first(said, _OUTPUT)) is None
               else (float(output), math.inf), 0.0, 0.0, told=_MOST),
        Figure(r"gen_ai\.latency\.time_in_model_prefill", _part(_TTFT), 0.05, 0.1, f"as {_TTFT} says"),
        Figure(r"gen_ai\.latency\.time_in_model_(decode|inference)", _part(_E2E), 0.05, 0.1, f"as {_E2E} says"),
        Figure(r"gen_ai\.latency\.time_in_(scheduler|model_forward|model_execute)", _part(_E2E), 0.05, 0.1,
               f"as {_E2E} says"),
    ),
    effects=_EFFECTS,
)  # fmt: skip


def is_it(document: Document) -> bool:
    return document.begins_with(b"{") and document.names("resourceSpans")


def read(document: Document, part: int | None = None) -> RequestLog:
    """Read a log. Raises UserError for a line that is no batch, an impossible span, or if no span counts tokens."""
    document.chosen(part or 1, ["the file"], "runs")
    spans, servers = list[_Told](), dict[str, str]()
    for place, span, server in _spans(document):
        spans.append((place, span, _attributes(place, span)))
        servers[place] = server
    told = [(place, span, said) for place, span, said in spans if _first(said, _OUTPUT) is not None]
    skipped = Counter(str(said.get("gen_ai.operation.name")) for _, _, said in told if not _writes(said))
    told, twice = _once([one for one in told if _writes(one[2])])
    if not told:
        allowed = f"spans that count tokens: {_PROMPT[0]} and {_OUTPUT[0]}"
        raise UserError(document.name, f"{len(spans)} spans", allowed, "take spans of the server or of a client")
    inner = _innermost(told, spans)
    outer = len(told) - len(inner)
    notices = [f"{document.name}: {n} spans of {name} write no tokens and are left out." for name, n in skipped.items()]
    if twice:
        notices.append(f"{document.name}: {twice} spans are there twice, as exporters repeat them, and count once.")
    others = len(spans) - len(told) - twice - sum(skipped.values())
    if others:
        notices.append(f"{document.name}: {others} spans without tokens are not requests, and are left out.")
    if outer:
        notices.append(f"{document.name}: {outer} spans have another one of the same request inside, which counts.")
    of_server = [_TTFT in said or _E2E in said for _, _, said in inner]
    if any(of_server) and not all(of_server):
        allowed = "all of a server (with gen_ai.latency.e2e), or all of clients"
        told_how = f"{sum(of_server)} of {len(inner)} with gen_ai.latency"
        raise UserError(document.name, told_how, allowed, "filter the spans by service.name")
    rows = [_row(place, span, said) for place, span, said in inner]
    look = Look(document.name, _KNOWN)
    for place, _, said in inner:
        look.at(place, said, said)
    notices += look.notices()
    notices += _of_sampling(document.name, inner)
    several = dict.fromkeys(filter(None, (servers[place] for place, _, _ in inner)))
    if len(several) > 1:
        told_of = f"spans are of {len(several)} services or instances, {', '.join(list(several)[:3])}"
        notices.append(f"{document.name}: {told_of}: here all go to one server, or to server.replicas.")
    models = dict.fromkeys(str(_first(said, _MODEL)) for _, _, said in inner if _first(said, _MODEL))
    notices += other_models(document.name, models)
    stated = {"model": next(iter(models), None)}
    return gathered(document.source, NAME, rows, Begins.RECEIVED if any(of_server) else Begins.SENT, stated, notices)


def _of_sampling(source: str, inner: list[_Told]) -> list[str]:
    """A sentence if the trace state says that only a part of all spans was kept (th: the share that was not)."""
    part = [str(state) for _, span, _ in inner if _SAMPLED.search(state := str(span.get("traceState") or ""))]
    told = f"{len(part)} of {len(inner)} spans are those of a sample (traceState {part[0][:40]})" if part else ""
    return [f"{source}: {told}: the requests beside them are missing, so the load was higher."] if part else []


def _spans(document: Document) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Yield spans with their places, and the service and instance that their resource names."""
    for place, batch in document.numbered_objects():
        found = 0
        for resource in _list(place, batch, "resourceSpans"):
            server = _service(resource.get("resource"))
            # by today's name, and the name before OTLP 1.0
            scopes = _list(place, resource, "scopeSpans") + _list(place, resource, "instrumentationLibrarySpans")
            for scope in scopes:
                for span in _list(place, scope, "spans"):
                    found += 1
                    yield f"{place}, span {found}", span, server


def _service(resource: Any) -> str:
    """The names of a server; empty if it has none."""
    said = resource.get("attributes") if isinstance(resource, dict) else None
    named = {str(one.get("key")): one.get("value") for one in said or () if isinstance(one, dict)}
    return " ".join(str(*value.values()) for name in _SERVICE
                    if isinstance(value := named.get(name), dict) and len(value) == 1)  # fmt: skip


def _list(place: str, value: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = value.get(name, [])
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise UserError(f"{place}: {name}", shortened(found), "a list of objects, as in OTLP/JSON", FIX)
    return found


def _attributes(place: str, span: dict[str, Any]) -> dict[str, Any]:
    """Attributes by key. OTLP/JSON writes whole numbers as texts."""
    found: dict[str, Any] = {}
    for one in _list(place, span, "attributes"):
        value = one.get("value")
        if not isinstance(one.get("key"), str) or not isinstance(value, dict):
            raise UserError(f"{place}: attributes", shortened(one), 'objects such as {"key": ..., "value": {...}}', FIX)
        kind, plain = next(iter(value.items()), ("", None))
        if kind == "intValue":
            try:
                plain = int(str(plain))
            except (TypeError, ValueError) as error:
                raise UserError(f"{place}: {one['key']}", shortened(plain), "a whole number", FIX) from error
        with reading(f"{place}: attributes", one["key"], "names", FIX):
            check_name(one["key"])
        if found.setdefault(one["key"], plain) != plain:
            told = f"{shortened(found[one['key']])} and {shortened(plain)}"
            raise UserError(f"{place}: {one['key']}", told, "one value: the attribute stands there twice", FIX)
    return found


def _first(said: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((said[name] for name in names if said.get(name) is not None), None)


def _writes(said: dict[str, Any]) -> bool:
    return said.get("gen_ai.operation.name") in _WRITES


_Told = tuple[str, dict[str, Any], dict[str, Any]]


def _once(told: list[_Told]) -> tuple[list[_Told], int]:
    """The spans without repeated ids, and the number of those left out."""
    seen, found = set(), []
    for one in told:
        name = one[1].get("traceId"), one[1].get("spanId")
        if None in name or str(name) not in seen:
            found.append(one)
        seen.add(str(name))
    return found, len(told) - len(found)


def _innermost(told: list[_Told], spans: list[_Told]) -> list[_Told]:
    """The innermost spans: without those of clients and gateways around the server's own span of a request."""
    above = {(span.get("traceId"), span.get("spanId")): span.get("parentSpanId") for _, span, _ in spans}
    around: set[tuple[Any, Any]] = set()
    for _, span, _ in told:
        place = span.get("traceId"), span.get("parentSpanId")
        while place[1] and place not in around:
            around.add(place)
            place = place[0], above.get(place)
    return [one for one in told if (one[1].get("traceId"), one[1].get("spanId")) not in around]


def _tokens(place: str, said: dict[str, Any]) -> tuple[int, int]:
    """Tokens of prompt and answer. Raises UserError if two names of one figure say otherwise."""
    counts = []
    for names, others in ((_PROMPT, ("llm.token_count.prompt", "llm.usage.prompt_tokens")),
                          (_OUTPUT, ("llm.token_count.completion", "llm.usage.completion_tokens"))):  # fmt: skip
        given = {name: whole(place, name, said[name]) for name in (*names, *others) if said.get(name) is not None}
        first = next(iter(given), "")
        other = next((name for name, count in given.items() if count != given[first]), None)
        if other is not None:
            raise UserError(f"{place}: {other}", given[other], f"{given[first]}, as {first} says", FIX)
        counts.append(given.get(first, 0))
    return counts[0], counts[1]


def _row(place: str, span: dict[str, Any], said: dict[str, Any]) -> Row:
    def stamp(name: str) -> int:
        text = str(span.get(name, ""))
        if not text.isascii() or not text.isdecimal():
            raise UserError(f"{place}: {name}", shortened(span.get(name)), "nanoseconds since 1970", FIX)
        return stamp_ns(place, name, int(text))

    def seconds(name: str) -> float | None:
        return None if said.get(name) is None else number(place, name, said[name])

    start_ns, end_ns = stamp("startTimeUnixNano"), stamp("endTimeUnixNano")
    if end_ns < start_ns:
        raise UserError(f"{place}: endTimeUnixNano", end_ns, f"no earlier than startTimeUnixNano, {start_ns}", FIX)
    arrival_s, took_s = start_ns / NS_PER_S, (end_ns - start_ns) / NS_PER_S
    prompt, output = _tokens(place, said)
    status = span.get("status") or {}
    if isinstance(status, dict) and status.get("code") in _ERROR:
        why = str(status.get("message") or said.get("error.type") or "error")
        return Row(place, arrival_s, prompt, output, failure=why[:200])
    e2e_s = seconds(_E2E)
    if e2e_s is not None and not close_to(e2e_s, took_s, 0.05, 0.25):
        raise UserError(f"{place}: {_E2E}", e2e_s, f"about the {took_s:.6g} s that the span took", FIX)
    return Row(place, arrival_s, prompt, output, seconds(_TTFT), took_s if e2e_s is None else e2e_s, seconds(_QUEUE))
