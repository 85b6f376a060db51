"""Scrapes of a server's `/metrics` page over time: Prometheus text with times, or a file for each scrape.

Such pages hold sums and histograms, not requests. `drawn` makes requests with the same sums and histograms, and says
what was drawn and what pages cannot tell.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.logs.record import EARLIEST_S, FIX, OK, Begins, IntColumn, RequestLog
from helios_sim.untrusted import MIB, lines_of, read_text, shortened

NAME = "scrapes of /metrics"
SUFFIXES = (".prom", ".txt", ".metrics")
_LEAST_S = 0.1  # between scrapes: files with closer times were copied together
_MOST_FILES, _MOST_REQUESTS = 20_000, 5_000_000
_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)(?:\s+(\S+))?$")
_LABEL = re.compile(r'([A-Za-z_]\w*)="((?:[^"\\]|\\.)*)"')
_OF_NAME = (re.compile(r"(?<!\d)(\d{10})(?:\.(\d+))?(?!\d)"), re.compile(r"(?<!\d)(\d{13})(?!\d)"))
# By quantity: vLLM's names, since 0.8 and before.
_FINISHED, _PROMPT, _OUTPUT = "vllm:request_success_total", "vllm:prompt_tokens_total", "vllm:generation_tokens_total"
_PREEMPTED = "vllm:num_preemptions_total"
_CACHED = "vllm:prefix_cache_hits_total"
_EFFECTS = {  # counters of things that the simulation lacks, if they grow
    "vllm:external_prefix_cache_hits_total": "prompt tokens of a cache outside the engine; here all are computed",
    "vllm:spec_decode_num_draft_tokens_total": "drafts of speculative decoding, several tokens an iteration; here one",
    "vllm:mm_cache_queries_total": "images or sounds in prompts, which are counted as text",
}
_ABORTED, _ADAPTERS = "vllm:request_aborted", "vllm:running_lora_adapters"  # of labels, in names of their own
_LENGTHS = {"prompt": "vllm:request_prompt_tokens", "output": "vllm:request_generation_tokens"}
_IN_FLIGHT = ("vllm:num_requests_running", "vllm:num_requests_waiting")
_LATEST_S = 4e9
_BEYOND = 4  # lengths above the last edge are drawn up to this multiple of it
_STEPS = 60  # steps of a bisection
_APART, _MANY, _OFF = 8, 20, 3  # requests by which two counts may differ; from when on, and how far, means are compared
_HISTOGRAMS = {
    "TTFT": ("vllm:time_to_first_token_seconds",),
    "TPOT": ("vllm:request_time_per_output_token_seconds", "vllm:inter_token_latency_seconds",
             "vllm:time_per_output_token_seconds"),
    "E2E": ("vllm:e2e_request_latency_seconds",),
    "time in the queue": ("vllm:request_queue_time_seconds",),
}  # fmt: skip
_GAUGES = (*_IN_FLIGHT, "vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")
_FIX_LINE = "correct or remove the line"
_CANNOT = ("when single requests came between two scrapes", "which prompt had which answer",
           "times of single requests")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Scrapes:
    """Sums over all labels except `le` and the model, in k scrapes in order of time."""

    source: str
    time_s: NDArray[np.float64]  # (k,) since the first
    values: Mapping[str, NDArray[np.float64]]  # counters and gauges by name, (k,) each; NaN if not in a scrape
    buckets: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]  # bounds (b,), cumulative counts (k, b)
    models: tuple[str, ...]
    engines: int  # replicas that are summed up: labels of that name
    notices: tuple[str, ...]


def is_text(head: bytes) -> bool:
    first = next((line for line in head.splitlines() if line.strip()), b"")
    if first.startswith((b"# HELP ", b"# TYPE ")):
        return True
    found = _LINE.match(first.decode(errors="replace"))
    return found is not None and ":" in found[1].rstrip(":")  # a name that ends with one is a key of YAML


def of_folder(folder: Path) -> list[Path]:
    """The files of single scrapes in a folder; empty if it has none."""
    found = [path for path in sorted(folder.iterdir()) if path.name.removesuffix(".gz").endswith(SUFFIXES)]
    heads = {path: _head(path) for path in found[:_MOST_FILES]}
    if (with_header := next((path for path, head in heads.items() if head.startswith(b"HTTP/")), None)) is not None:
        raise UserError(with_header.name, "headers of HTTP", "the page alone", "save it by curl without -i")
    return [path for path, head in heads.items() if is_text(head)]


def _head(path: Path) -> bytes:
    return read_text(path, 64 * MIB, FIX)[:4096]


def read(paths: Sequence[Path]) -> Scrapes:
    """Read a file with times in its samples, or one for each scrape. Raises UserError for a line that is no sample."""
    samples: dict[float, dict[str, float]] = {}
    bounds: dict[float, dict[str, dict[float, float]]] = {}
    models: dict[str, None] = {}
    engines: dict[float, set[str]] = {}
    by_write, others = 0, dict[str, None]()
    finished = dict[tuple[float, str], str]()  # by time and labels: the page that counts it
    for path in paths:
        own, seen = None, set[int]()
        if len(paths) > 1:
            own = _time_of(path)
            by_write += own is None
            own = path.stat().st_mtime if own is None else own
        text = read_text(path, 256 * MIB, FIX).decode()
        scale = 1.0 if text.rstrip().endswith("# EOF") else 1e-3  # OpenMetrics writes seconds, the older text ms
        for number, line in enumerate(lines_of(text), 1):
            if not line.strip() or line.startswith("#"):
                continue
            place = f"{path.name}, line {number}"
            found = _LINE.match(line.split(" # ")[0].strip())
            if found is None:
                raise UserError(place, line[:80], "a sample: name{labels} value, and a time", _FIX_LINE)
            name, labels, value, stamp = found[1], dict(_LABEL.findall(found[2] or "")), found[3], found[4]
            if not name.startswith("vllm:"):
                others |= {name: None}
                continue
            time_s = _stamp(place, stamp, scale) if stamp is not None else own
            if time_s is None:
                fix = "save each scrape to a file of its own, such as metrics_$(date +%s).prom in one folder"
                raise UserError(place, line[:80], "a time after the value: one page alone shows no change", fix)
            models |= dict.fromkeys([labels["model_name"]] if "model_name" in labels else [])
            engines.setdefault(time_s, set()).update([labels["engine"]] if "engine" in labels else [])
            amount = _float(place, value)
            if (sample := hash((time_s, name, found[2]))) in seen:
                raise UserError(place, line[:80], "each sample once at a time", "take pages that were not joined")
            seen.add(sample)
            if name == _FINISHED and (first := finished.setdefault((time_s, str(found[2])), path.name)) != path.name:
                told, allowed = f"{line[:60]}, as in {first}", "the pages of one server, each of another time"
                raise UserError(place, told, allowed, "take the pages of one server")
            if name.endswith("_bucket"):
                of = bounds.setdefault(time_s, {}).setdefault(name.removesuffix("_bucket"), {})
                edge = _float(place, labels.get("le", ""))
                if math.isnan(edge):
                    raise UserError(f"{place}: le", labels["le"], "the edge of a bucket, a number or +Inf", _FIX_LINE)
                of[edge] = of.get(edge, 0.0) + amount
            else:
                at = samples.setdefault(time_s, {})
                at[name] = at.get(name, 0.0) + amount
                if name == _FINISHED and labels.get("finished_reason") in ("abort", "error"):
                    at[_ABORTED] = at.get(_ABORTED, 0.0) + amount
                if labels.get("running_lora_adapters"):
                    at[_ADAPTERS] = 1.0
    source = paths[0].name if len(paths) == 1 else paths[0].parent.name
    if not samples and others:
        allowed = "vLLM's metrics, whose names begin with vllm: - those of other servers are not read"
        raise UserError(source, ", ".join(list(others)[:4]), allowed, "drive it with python -m helios_sim.observe")
    if len(samples) < 2:
        raise UserError(source, f"{len(samples)} scrapes of vLLM's metrics", "at least 2", "scrape for longer")
    if by_write and max(samples) - min(samples) < _LEAST_S * (len(samples) - 1):
        told = f"{len(samples)} files written within {max(samples) - min(samples):.2g} s, as copies are"
        fix = "let their names tell it, such as metrics_$(date +%s).prom, or copy them with cp -p"
        raise UserError(source, told, "the time of each scrape", fix)
    told_by = f"{source}: no time in the names of {by_write} files: when they were written counts."
    notices = [told_by] if by_write else []
    if len(models) > 1:
        allowed = "the pages of one model: a sum over several is of no engine that could be simulated"
        raise UserError(source, ", ".join(list(models)[:4]), allowed, "keep the samples of one model_name")
    known = set[str]().union(*engines.values())
    for number, time_s in enumerate(sorted(engines), 1):
        if lacking := known - engines[time_s]:
            told = f"no engine {', '.join(sorted(lacking))}"
            allowed = f"all engines in every scrape, {', '.join(sorted(known))}: what one did before counts else as new"
            raise UserError(f"{source}, scrape {number}", told, allowed, "take the scrapes in which all are there")
    return _scrapes(source, samples, bounds, (tuple(models), len(known)), notices)


def _time_of(path: Path) -> float | None:
    """Seconds since 1970 from a file's name: a number of seconds or milliseconds, or a date; None without one."""
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


def _stamp(place: str, text: str, scale: float) -> float:
    """The time after a sample, in seconds since 1970."""
    time_s = _float(place, text) * scale
    if not EARLIEST_S <= time_s <= _LATEST_S:
        allowed = f"{'seconds' if scale == 1.0 else 'milliseconds'} since 1970, after 2001"
        raise UserError(place, text, allowed, "milliseconds are meant, and seconds in OpenMetrics, which ends in # EOF")
    return time_s


def _float(place: str, text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise UserError(place, shortened(text), "a number", _FIX_LINE) from error


def _scrapes(
    source: str,
    samples: Mapping[float, Mapping[str, float]],
    bounds: Mapping[float, Mapping[str, Mapping[float, float]]],
    of: tuple[tuple[str, ...], int],
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
    return Scrapes(source, np.array(times) - times[0], values, buckets, *of, tuple(notices))


def grown(scrapes: Scrapes, name: str) -> float | None:
    """The growth of a counter; None if it is not there."""
    values = scrapes.values.get(name)
    if values is None:
        return None
    known = values[~np.isnan(values)]
    return float(known[-1] - known[0]) if len(known) > 1 else None


def between(scrapes: Scrapes, name: str, share: float) -> tuple[float, float] | None:
    """The edges of the bucket with this percentile of the values between two scrapes; None without a histogram."""
    if name not in scrapes.buckets:
        return None
    edges, counts = scrapes.buckets[name]
    whole = counts[~np.isnan(counts).any(axis=1)]
    if len(whole) < 2 or (added := whole[-1] - whole[0])[-1] <= 0:
        return None
    at = int(np.searchsorted(added, share * added[-1]))
    return (0.0 if at == 0 else float(edges[at - 1])), float(edges[min(at, len(edges) - 1)])


def told(scrapes: Scrapes) -> list[str]:
    """Sentences on the content of the pages."""
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


def drawn(scrapes: Scrapes, seed: int) -> RequestLog:
    """Draw requests with the pages' sums and histograms: the same number in each interval, and the same lengths.

    Arrivals in an interval are independent uniform times, as in a Poisson process of which the number is known. Lengths
    keep the count of each bucket and the mean. Raises UserError if the pages lack one of these.
    """
    _check_counts(scrapes)
    _check_sums(scrapes)
    rng = np.random.default_rng(seed)
    time_s, come = _arrivals(scrapes)
    n = int(come.sum())
    if not 1 <= n <= _MOST_REQUESTS:
        raise UserError(scrapes.source, f"{n} requests that came", f"1 to {_MOST_REQUESTS}", "scrape while it serves")
    arrival_s = np.sort(np.repeat(time_s[:-1], come) + rng.random(n) * np.repeat(np.diff(time_s), come))
    lengths = {what: drawn_lengths(scrapes, name, n, rng) for what, name in _LENGTHS.items()}
    times = {what: next((name for name in names if name in scrapes.buckets), "") for what, names in _HISTOGRAMS.items()}
    known = {what: [(q, at) for q in (0.5, 0.9, 0.99) if (at := between(scrapes, name, q))]
             for what, name in times.items()}  # fmt: skip
    return RequestLog(
        source=scrapes.source, format=NAME, begins=Begins.RECEIVED, arrival_s=arrival_s - arrival_s[0],
        prompt_tokens=lengths["prompt"], output_tokens=lengths["output"], completed=np.ones(n, np.bool_),
        status=(OK,) * n, stated={"model": scrapes.models[0] if scrapes.models else None},
        missing=(f"{scrapes.source} does not say: {', '.join(_CANNOT[:-1])}, or {_CANNOT[-1]}.",),
        notices=(*told(scrapes), *scrapes.notices, *_of_drawing(scrapes, n, seed)),
        percentiles={what: found for what, found in known.items() if found},
    )  # fmt: skip


def _check_counts(scrapes: Scrapes) -> None:
    """Raise UserError if a histogram of finished requests counts far more or fewer of them than their counter."""
    done = grown(scrapes, _FINISHED)
    for name in _LENGTHS.values():
        counted = grown(scrapes, f"{name}_count")
        if done is None or counted is None or abs(done - counted) <= max(_APART, 0.1 * max(done, counted)):
            continue
        told, allowed = f"{counted:g} requests", f"about {done:g}, by which {_FINISHED} grew"
        raise UserError(f"{scrapes.source}: {name}_count", told, allowed, "take whole pages of one server")
    came, read_ = done, grown(scrapes, _PROMPT)
    total, counted = (grown(scrapes, f"{_LENGTHS['prompt']}_{part}") for part in ("sum", "count"))
    if not came or not read_ or not total or not counted or came < _MANY:
        return
    most = (float(np.nan_to_num(scrapes.values[name]).max()) for name in _IN_FLIGHT if name in scrapes.values)
    in_flight = max(most, default=0.0)  # requests with prompts that are read and answers that are not finished
    each = total / counted
    if read_ / came < each / _OFF or read_ / (came + in_flight) > each * _OFF:
        told = f"{read_ / came:.4g} prompt tokens a request"
        raise UserError(f"{scrapes.source}: {_PROMPT}", told, f"about {each:.4g}, as the histogram says", FIX)


def _check_sums(scrapes: Scrapes) -> None:
    """Raise UserError if the sum of a histogram of times is not what its buckets can hold."""
    for name in (name for names in _HISTOGRAMS.values() for name in names if name in scrapes.buckets):
        edges, counts = scrapes.buckets[name]
        whole, total = counts[~np.isnan(counts).any(axis=1)], grown(scrapes, f"{name}_sum")
        shares = np.diff(whole[-1] - whole[0], prepend=0.0) if len(whole) else np.zeros(len(edges))
        if total is None or shares.sum() < _MANY or (shares < 0).any():
            continue
        there = shares > 0
        low = np.concatenate([[0.0], edges[:-1]])
        least, most = (float(shares[there] @ bound[there]) for bound in (low, edges))
        if not 0.95 * least <= total <= 1.05 * most:
            allowed = f"from {least:.4g} to {most:.4g} s, by its buckets"
            raise UserError(f"{scrapes.source}: {name}_sum", f"{total:.4g} s between the scrapes", allowed, FIX)


def _arrivals(scrapes: Scrapes) -> tuple[NDArray[np.float64], IntColumn]:
    """Edges of the intervals, (k,) in seconds, and the arrivals in each, (k - 1,)."""
    finished = scrapes.values.get(_FINISHED)
    if finished is None or np.count_nonzero(~np.isnan(finished)) < 2:
        raise UserError(scrapes.source, None, f"{_FINISHED} in at least 2 scrapes", "scrape the whole page")
    seen = ~np.isnan(finished)
    there = finished[seen]
    for name in _IN_FLIGHT:
        there = there + np.nan_to_num(scrapes.values.get(name, np.zeros_like(finished))[seen])
    # the gauges are read a moment before or after the counter, so that a request can seem to be gone
    up_to = np.maximum.accumulate(np.round(there - there[0]).astype(np.int64))
    return scrapes.time_s[seen], np.diff(up_to)


def drawn_lengths(scrapes: Scrapes, name: str, n: int, rng: np.random.Generator) -> IntColumn:
    """Lengths of n requests, (n,): each bucket has its share to within one request, and the mean is the page's.

    The mean is kept to half a token if n requests in these buckets can have it.
    """
    if name not in scrapes.buckets:
        raise UserError(scrapes.source, None, f"the histogram {name}", "scrape the whole page")
    edges, counts = scrapes.buckets[name]
    whole = counts[~np.isnan(counts).any(axis=1)]
    shares = np.diff(whole[-1] - whole[0], prepend=0.0) if len(whole) else np.zeros(len(edges))
    if not (shares >= 0).all() or shares.sum() <= 0:
        raise UserError(f"{scrapes.source}: {name}", "no requests, or fewer in a wider bucket",
                        "a histogram that grew between its first scrape and its last", FIX)  # fmt: skip
    finite = edges[np.isfinite(edges)]
    top = _BEYOND * finite[-1] if len(finite) else 1.0
    high = np.where(np.isfinite(edges), edges, top)
    low = np.concatenate([[0.0], high[:-1]])
    exact = shares / shares.sum() * n
    quota = np.floor(exact).astype(np.int64)
    quota[np.argsort(quota - exact, kind="stable")[: n - quota.sum()]] += 1
    bucket, u = np.repeat(np.arange(len(edges)), quota), rng.random(n)

    def at(power: float) -> IntColumn:
        found = np.floor(low[bucket] + 1 + (high[bucket] - low[bucket] - 1e-9) * u**power)
        lengths: IntColumn = np.clip(found, low[bucket] + 1, np.maximum(high[bucket], 1)).astype(np.int64)
        return lengths

    total, count = grown(scrapes, f"{name}_sum"), grown(scrapes, f"{name}_count")
    if not total or not count:
        return rng.permutation(at(1.0))
    mean = total / count
    least, most = (float(shares @ bound / shares.sum()) for bound in (low + 1, high))
    if not least - 0.5 <= mean <= most + 0.5:
        allowed = f"from {least:.4g} to {most:.4g}, by its buckets"
        raise UserError(f"{scrapes.source}: {name}_sum", f"a mean of {mean:.4g} tokens", allowed, FIX)
    short, long = -30.0, 30.0  # of the power, as its logarithm: the mean falls with it
    for _ in range(_STEPS):
        middle = (short + long) / 2
        short, long = (middle, long) if at(np.exp(middle)).mean() > mean else (short, middle)
    nearest = min((at(np.exp(power)) for power in (short, long)), key=lambda lengths: abs(lengths.mean() - mean))
    return rng.permutation(nearest)


def _of_drawing(scrapes: Scrapes, n: int, seed: int) -> list[str]:
    said = [
        f"{scrapes.source}: {n} requests are drawn with seed {seed}: as many between two scrapes as came then, at "
        "uniform times, with the lengths of its histograms, prompt and output independent; none is a real request."
    ]
    cached = grown(scrapes, _CACHED)
    if cached:
        said.append(f"{scrapes.source}: {cached:g} prompt tokens came from the prefix cache; here all are computed.")
    for name, effect in _EFFECTS.items():
        if count := grown(scrapes, name):
            said.append(f"{scrapes.source}: {name} grew by {count:g}: {effect}.")
    if aborted := grown(scrapes, _ABORTED):
        said.append(f"{scrapes.source}: {aborted:g} requests were aborted, and are drawn as answered ones.")
    if _ADAPTERS in scrapes.values:
        said.append(f"{scrapes.source}: adapters of LoRA ran, which the simulation does not have.")
    if scrapes.engines > 1:
        said.append(f"{scrapes.source}: the sum over {scrapes.engines} engines: server.replicas={scrapes.engines}.")
    return said
