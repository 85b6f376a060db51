"""Scrapes of a server's `/metrics` page over time: Prometheus text with times, or a file for each scrape.

Such pages hold sums and histograms, not requests: `told` says what they give, and what no histogram can.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.logs.record import FIX
from helios_sim.untrusted import MIB, read_text, shortened

NAME = "scrapes of /metrics"
SUFFIXES = (".prom", ".txt", ".metrics")
_MOST_FILES = 20_000
_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+(\S+))?$")
_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')
_OF_NAME = (re.compile(r"(?<!\d)(\d{10})(?:\.(\d+))?(?!\d)"), re.compile(r"(?<!\d)(\d{13})(?!\d)"))
# By what they count: vLLM's names, since 0.8 and before.
_FINISHED, _PROMPT, _OUTPUT = "vllm:request_success_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
_PREEMPTED = "vllm:num_preemptions_total"
_HISTOGRAMS = {
    "TTFT": ("vllm:time_to_first_token_seconds",),
    "time per output token": ("vllm:request_time_per_output_token_seconds", "vllm:inter_token_latency_seconds",
                              "vllm:time_per_output_token_seconds"),
    "E2E": ("vllm:e2e_request_latency_seconds",),
    "time in the queue": ("vllm:request_queue_time_seconds",),
}  # fmt: skip
_GAUGES = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc",
           "vllm:gpu_cache_usage_perc")  # fmt: skip
_FIX_LINE = "correct or remove the line"
CANNOT = (
    "when single requests came", "the lengths of a request together, prompt with output",
    "TTFT, TPOT and E2E of a request together", "a percentile closer than its bucket", "requests that failed",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scrapes:
    """Sums over all labels but `le` (and the model, of which there is one), k scrapes in order of time."""

    source: str
    time_s: NDArray[np.float64]  # (k,) since the first
    values: Mapping[str, NDArray[np.float64]]  # counters and gauges by name, (k,) each; NaN: not in that scrape
    buckets: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]  # bounds (b,), cumulative counts (k, b)
    models: tuple[str, ...]
    notices: tuple[str, ...]


def is_text(head: bytes) -> bool:
    first = next((line for line in head.splitlines() if line.strip()), b"")
    if first.startswith((b"# HELP ", b"# TYPE ")):
        return True
    return bool(_LINE.match(first.decode(errors="replace"))) and b":" in first.split(b"{")[0]


def of_folder(folder: Path) -> list[Path]:
    """Files of single scrapes in it; none: it is not a folder of scrapes."""
    found = [path for path in sorted(folder.iterdir()) if path.name.removesuffix(".gz").endswith(SUFFIXES)]
    return [path for path in found[:_MOST_FILES] if is_text(_head(path))]


def _head(path: Path) -> bytes:
    return read_text(path, 64 * MIB, FIX)[:4096]


def read(paths: Sequence[Path]) -> Scrapes:
    """One file with times in its samples, or several, a scrape each. UserError for a line that is no sample."""
    samples: dict[float, dict[str, float]] = {}
    bounds: dict[float, dict[str, dict[float, float]]] = {}
    models: dict[str, None] = {}
    by_write = 0
    for path in paths:
        own = None
        if len(paths) > 1:
            own = _time_of(path)
            by_write += own is None
            own = path.stat().st_mtime if own is None else own
        text = read_text(path, 256 * MIB, FIX).decode()
        scale = 1.0 if text.rstrip().endswith("# EOF") else 1e-3  # OpenMetrics writes seconds, the older text ms
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip() or line.startswith("#"):
                continue
            place = f"{path.name}, line {number}"
            found = _LINE.match(line.split(" # ")[0].strip())
            if found is None:
                raise UserError(place, line[:80], "a sample: name{labels} value, and a time", _FIX_LINE)
            name, labels, value, stamp = found[1], dict(_LABEL.findall(found[2] or "")), found[3], found[4]
            if not name.startswith("vllm:"):
                continue
            time_s = _float(place, stamp) * scale if stamp is not None else own
            if time_s is None:
                fix = "save each scrape to a file of its own, such as metrics_$(date +%s).prom in one folder"
                raise UserError(place, line[:80], "a time after the value: one page alone shows no change", fix)
            models |= dict.fromkeys([labels["model_name"]] if "model_name" in labels else [])
            amount = _float(place, value)
            if name.endswith("_bucket"):
                of = bounds.setdefault(time_s, {}).setdefault(name.removesuffix("_bucket"), {})
                edge = _float(place, labels.get("le", ""))
                of[edge] = of.get(edge, 0.0) + amount
            else:
                at = samples.setdefault(time_s, {})
                at[name] = at.get(name, 0.0) + amount
    source = paths[0].name if len(paths) == 1 else paths[0].parent.name
    if len(samples) < 2:
        raise UserError(source, f"{len(samples)} scrapes of vLLM's metrics", "at least 2", "scrape for longer")
    told_by = f"{source}: no time in the names of {by_write} files: when they were written counts."
    notices = [told_by] if by_write else []
    if len(models) > 1:
        notices.append(f"{source}: sums over {len(models)} models: {', '.join(list(models)[:4])}.")
    return _scrapes(source, samples, bounds, tuple(models), notices)


def _time_of(path: Path) -> float | None:
    """Seconds since 1970 by a file's name: a count of seconds or milliseconds, or a date; None: it has none."""
    seconds, milliseconds = (pattern.search(path.name) for pattern in _OF_NAME)
    if milliseconds:
        return int(milliseconds[1]) / 1e3
    if seconds:
        return float(f"{seconds[1]}.{seconds[2] or 0}")
    dated = re.search(r"(\d{4})-?(\d\d)-?(\d\d)[T_-]?(\d\d)[:-]?(\d\d)[:-]?(\d\d)", path.name)
    try:
        return datetime(*map(int, dated.groups()), tzinfo=UTC).timestamp() if dated else None  # type: ignore[misc, arg-type]
    except ValueError:
        return None


def _float(place: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(place, shortened(text), "a number", _FIX_LINE) from error


def _scrapes(
    source: str,
    samples: Mapping[float, Mapping[str, float]],
    bounds: Mapping[float, Mapping[str, Mapping[float, float]]],
    models: tuple[str, ...],
    notices: list[str],
) -> Scrapes:
    times = sorted(samples)
    names = sorted({name for at in samples.values() for name in at})
    values = {name: np.array([samples[t].get(name, np.nan) for t in times]) for name in names}
    for name in names:
        if name.endswith(("_total", "_count", "_sum")):
            drops = np.flatnonzero(np.diff(values[name]) < 0)
            if len(drops):
                told = f"{name} falls from {values[name][drops[0]]:g} to {values[name][drops[0] + 1]:g}"
                allowed = "counters that never fall: the server began anew"
                raise UserError(f"{source}, scrape {drops[0] + 2}", told, allowed, "take the scrapes of one run")
    buckets = {}
    for name in sorted({name for at in bounds.values() for name in at}):
        edges = sorted({edge for at in bounds.values() for edge in at.get(name, {})})
        counts = np.array([[bounds.get(t, {}).get(name, {}).get(edge, np.nan) for edge in edges] for t in times])
        buckets[name] = np.array(edges), counts
    return Scrapes(source, np.array(times) - times[0], values, buckets, models, tuple(notices))


def grown(scrapes: Scrapes, name: str) -> float | None:
    """By how much a counter grew; None where it is not there."""
    values = scrapes.values.get(name)
    if values is None:
        return None
    known = values[~np.isnan(values)]
    return float(known[-1] - known[0]) if len(known) > 1 else None


def between(scrapes: Scrapes, name: str, share: float) -> tuple[float, float] | None:
    """The edges of the bucket in which this percentile of what came meanwhile lies; None: there is no histogram."""
    if name not in scrapes.buckets:
        return None
    edges, counts = scrapes.buckets[name]
    whole = counts[~np.isnan(counts).any(axis=1)]
    if len(whole) < 2 or (added := whole[-1] - whole[0])[-1] <= 0:
        return None
    at = int(np.searchsorted(added, share * added[-1]))
    return (0.0 if at == 0 else float(edges[at - 1])), float(edges[min(at, len(edges) - 1)])


def told(scrapes: Scrapes) -> list[str]:
    """What the pages give, in sentences."""
    span_s = float(scrapes.time_s[-1])
    said = [f"{scrapes.source}: {len(scrapes.time_s)} scrapes in {span_s:.4g} s."]
    done, read_, written = (grown(scrapes, name) for name in (_FINISHED, _PROMPT, _OUTPUT))
    if done:
        totals = ((read_, "prompt"), (written, "output"))
        each = " and ".join(f"{total / done:.4g} {what} tokens" for total, what in totals if total)
        said.append(f"{done:g} requests finished, {done / span_s:.3g}/s, with {each or 'unknown lengths'} on average.")
    for what, names in _HISTOGRAMS.items():
        name = next((name for name in names if name in scrapes.buckets), None)
        found = [(q, between(scrapes, name, q)) for q in (0.5, 0.9, 0.99)] if name else []
        parts = [f"p{100 * q:g} {at[0]:g} to {at[1]:g} s" for q, at in found if at is not None]
        if parts:
            said.append(f"{what}: {', '.join(parts)}.")
    for name in _GAUGES:
        values = scrapes.values.get(name)
        if values is not None and not np.isnan(values).all():
            mean, most = np.nanmean(values), np.nanmax(values)
            said.append(f"{name.removeprefix('vllm:')}: {mean:.3g} on average, {most:.3g} at most.")
    preempted = grown(scrapes, _PREEMPTED)
    if preempted is not None:
        said.append(f"{preempted:g} preemptions.")
    return said


def no_requests(scrapes: Scrapes) -> UserError:
    """Why nothing can be replayed from it, what it gives, and how to go on."""
    span_s, done = float(scrapes.time_s[-1]), grown(scrapes, _FINISHED) or 0.0
    fix = "log requests with any client, or python -m helios_sim.observe"
    if done:
        means = {name: (grown(scrapes, name) or 0.0) / done for name in (_PROMPT, _OUTPUT)}
        fix += (
            f"; or draw them: +experiment=own workload.arrivals.rate_per_s={done / span_s:.3g} "
            f"workload.lengths.prompt.mean={means[_PROMPT]:.4g} workload.lengths.output.mean={means[_OUTPUT]:.4g}"
        )
    allowed = f"requests to replay, and a page of metrics cannot tell {', '.join(CANNOT[:-1])} or {CANNOT[-1]}"
    return UserError("log", " ".join([*told(scrapes), *scrapes.notices]), allowed, fix)
