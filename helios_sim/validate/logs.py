"""Reads the log of a real vLLM run, and finds what its simulation needs: profile, KV blocks, limits.

A folder holds `meta.json`: model, vllm_version, engine_kwargs and, where logged, kv_cache, hardware and
resolved_config; `requests.jsonl`: one request a line with input_toks, output_toks, queued_ts, scheduled_ts,
first_token_ts, last_token_ts (one monotonic clock, s) and arrival_time (another clock, s). `workload.csv` (optional):
idx, arrival_ns, input_toks, output_toks. `timeseries.csv` (optional): t, running, waiting at 1 Hz from a start that is
not logged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helios_sim.errors import UserError
from helios_sim.profile.catalog import (
    CARDS,
    PCIE_LINK,
    Card,
    Link,
    activation_reserve_bytes,
    published_card,
    published_model,
)
from helios_sim.profile.importers.layers import Terms, layer_profile, read_meta
from helios_sim.profile.importers.reading import find_table, read_columns
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Basis, CostSource, ModelSpec, Runtime
from helios_sim.provenance import Assumption
from helios_sim.study.modes import FidelityConfig

IntColumn = NDArray[np.int64]
_COUNTS = ("input_toks", "output_toks")
_TIMES = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
UNLIMITED = 1e18  # operations or bytes a second: more than any card has
ENGINE_BYTES = 2**30  # of each card, beside weights, activations and KV: context, workspaces, captured graphs
ASYNC_SINCE = (0, 14)  # vLLM's first version that schedules asynchronously unless told not to


@dataclass(frozen=True, slots=True)
class Times:
    """What n requests experienced, ns since the first was queued, each (n,). One order of requests everywhere."""

    queued_ns: IntColumn  # the engine has seen it
    scheduled_ns: IntColumn  # the plan in which it first runs was made
    first_ns: IntColumn
    last_ns: IntColumn


@dataclass(frozen=True, slots=True)
class Series:
    """Running and waiting requests over time, each (k,)."""

    time_s: NDArray[np.float64]  # since the first request was queued
    running: NDArray[np.float64]
    waiting: NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ServingLog:
    """Requests are in order of arrival, those at one time in the order of the file."""

    folder: Path
    meta: dict[str, Any]
    arrival_ns: IntColumn  # (n,) since the first
    prompt_tokens: IntColumn
    output_tokens: IntColumn
    measured: Times
    series: Series | None
    arrivals_from: str  # which file and column

    def __len__(self) -> int:
        return len(self.arrival_ns)

    def engine(self, key: str, default: Any = None) -> Any:
        """A setting as vLLM resolved it, else as it was asked for."""
        for section in (self.meta.get("resolved_config") or {}).values():
            if isinstance(section, dict) and section.get(key) is not None:
                return section[key]
        value = (self.meta.get("kv_cache") or {}).get(key)
        if value is None:
            value = self.meta["engine_kwargs"].get(key)
        return default if value is None else value


def read_log(folder: Path) -> ServingLog:
    """UserError for a folder, a file, a key or a value that is not there or cannot be."""
    if not folder.is_dir():
        raise UserError(
            "fidelity.folder", str(folder), "a folder with meta.json, requests.jsonl, profile/", "correct it"
        )
    meta = _meta(folder / "meta.json")
    rows = _requests(folder / "requests.jsonl")
    counts = {key: np.array([row[key] for row in rows], np.int64) for key in _COUNTS}
    for key, values in counts.items():
        if values.min() < 1:
            raise UserError(f"requests.jsonl: {key}", int(values.min()), "at least 1 token", "correct the log")
    seconds = {key: np.array([row.get(key, row["queued_ts"]) for row in rows], np.float64) for key in _TIMES}
    start_s = seconds["queued_ts"].min()
    times = {key: np.rint((values - start_s) * 1e9).astype(np.int64) for key, values in seconds.items()}
    if np.any(times["first_token_ts"] < times["queued_ts"]) or np.any(times["last_token_ts"] < times["first_token_ts"]):
        raise UserError("requests.jsonl", "queued, first token, last token", "times in that order", "correct the log")
    arrival_ns, arrivals_from = _arrivals(folder, rows, counts, times["queued_ts"])
    order = np.argsort(arrival_ns, kind="stable")
    measured = Times(*(times[key][order] for key in _TIMES))
    prompt_tokens = counts["input_toks"][order]
    return ServingLog(
        folder=folder,
        meta=meta,
        arrival_ns=arrival_ns[order],
        prompt_tokens=prompt_tokens,
        output_tokens=counts["output_toks"][order],
        measured=measured,
        series=_series(folder, measured, prompt_tokens),
        arrivals_from=arrivals_from,
    )


def _meta(path: Path) -> dict[str, Any]:
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(str(path), str(error), "a JSON object", "copy or correct the file") from error
    for key in ("model", "engine_kwargs"):
        if not isinstance(meta, dict) or key not in meta:
            raise UserError(f"{path}: {key}", None, "the run's model and engine settings", f"add {key}")
    if not isinstance(meta, dict) or not isinstance(meta["engine_kwargs"], dict):
        raise UserError(f"{path}: engine_kwargs", meta["engine_kwargs"], "a JSON object", "correct it")
    return meta


def _requests(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(str(path), str(error.strerror), "one JSON object a line", "copy the file there") from error
    rows = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}", line[:80], "a JSON object", "correct the line") from error
        for key in (*_COUNTS, "queued_ts", "first_token_ts", "last_token_ts"):
            if not isinstance(row, dict) or not isinstance(row.get(key), int | float):
                value = row.get(key) if isinstance(row, dict) else row
                raise UserError(f"{path}, line {number}: {key}", value, "a number in every line", "correct the line")
        rows.append(row)
    if len(rows) < 4:
        raise UserError(str(path), len(rows), "at least 4 requests", "take a longer log")
    return rows


def _arrivals(
    folder: Path, rows: list[dict[str, Any]], counts: dict[str, IntColumn], queued_ns: IntColumn
) -> tuple[IntColumn, str]:
    """When the engine's front end got each request, since the first. Its clock's offset cancels."""
    path = find_table([folder], "workload")
    planned = None
    if path is not None:
        columns = read_columns(path, ("arrival_ns", *_COUNTS))
        if any(not np.array_equal(columns[key].astype(np.int64), counts[key]) for key in _COUNTS):
            raise UserError(str(path), f"{len(columns['arrival_ns'])} rows", "the requests of requests.jsonl, in order",
                            "correct or remove it")  # fmt: skip
        planned = columns["arrival_ns"].astype(np.int64)
    if all(isinstance(row.get("arrival_time"), int | float) for row in rows):
        seconds = np.array([row["arrival_time"] for row in rows], np.float64)
        return np.rint((seconds - seconds.min()) * 1e9).astype(np.int64), "requests.jsonl: arrival_time"
    if planned is not None:
        return planned - planned.min(), "workload.csv: arrival_ns"
    return queued_ns, "requests.jsonl: queued_ts, which is later by what the engine was busy"


def _series(folder: Path, measured: Times, prompt_tokens: IntColumn) -> Series | None:
    path = find_table([folder], "timeseries")
    if path is None:
        return None
    columns = read_columns(path, ("t", "prompt_throughput", "running", "waiting"))
    time_s, rate = columns["t"].astype(np.float64), columns["prompt_throughput"].astype(np.float64)
    tick_s = float(np.median(np.diff(time_s))) if len(time_s) > 1 else 1.0
    # The series counts a prompt's tokens when its first token comes: that tells when its clock began.
    counted = np.cumsum(rate * tick_s)
    order = np.argsort(measured.first_ns)
    first_s, tokens = measured.first_ns[order] / 1e9, np.cumsum(prompt_tokens[order])
    offsets = np.arange(-1.0, 10.0, 0.01)
    misses = []
    for offset in offsets:
        seen = np.searchsorted(first_s, time_s - offset, side="right")
        misses.append(np.abs(np.where(seen > 0, tokens[np.maximum(seen, 1) - 1], 0) - counted).sum())
    best = offsets[np.isclose(misses, min(misses))].mean()
    return Series(time_s - best, columns["running"].astype(np.float64), columns["waiting"].astype(np.float64))


@dataclass(frozen=True, slots=True)
class Setup:
    """Everything but the quantities that are estimated. The cards of a group are one device here."""

    profile: Profile
    kv_blocks: int
    block_tokens: int
    max_running_requests: int
    max_batch_tokens: int
    schedule_ahead: int
    vllm_v1: bool
    facts: tuple[tuple[str, str], ...]  # (what, value and where it is from), for the reader
    assumptions: tuple[Assumption, ...]

    def with_profile(self, profile: Profile) -> Setup:
        return replace(self, profile=profile)


def set_up(log: ServingLog, config: FidelityConfig) -> Setup:
    """UserError where a setting, a table, a shape or a size is missing, with the parameter that gives it."""
    degree = config.tensor_parallel or int(log.engine("tensor_parallel_size", 1))
    for key, allowed in (("data_parallel_size", 1), ("pipeline_parallel_size", 1), ("enable_expert_parallel", False)):
        value = log.meta["engine_kwargs"].get(key, allowed)
        if value != allowed:
            only = f"{allowed}, since nothing else is modelled"
            raise UserError(f"meta.json: engine_kwargs.{key}", value, only, "take another log")
    tables = log.folder / "profile"
    if not tables.is_dir():
        raise UserError(
            "profile", str(tables), "a folder with the card's kernel times", "copy it into the log's folder"
        )
    model = _model(log, config)
    hardware, card = _card(log, config, tables)
    link = Link(
        config.link.latency_s or card.link.latency_s,
        config.link.bytes_per_s or card.link.bytes_per_s,
        "set by fidelity.link" if config.link.latency_s or config.link.bytes_per_s else card.link.source,
    )
    runtime = _runtime(log)
    terms = Terms(mixed=config.mixed_term, unequal_kv=config.unequal_kv_term)
    profile = layer_profile(tables, model, hardware, card, runtime, degree, link, terms)
    blocks, blocks_from, assumed = _blocks(log, config, model, card, degree)
    running, budget = _limit(log, "max_num_seqs"), _limit(log, "max_num_batched_tokens")
    ahead, ahead_from = _ahead(log, config)
    facts = (
        ("engine", f"vLLM {log.meta.get('vllm_version', 'of a version not logged')}, tensor parallel {degree}"),
        ("limits", f"{running} requests, {budget} tokens an iteration"),
        ("KV blocks", f"{blocks:,} of {_block_tokens(log)} tokens ({blocks_from})"),
        ("asynchronous scheduling", f"{'on' if ahead else 'off'} ({ahead_from})"),
        ("arrivals", log.arrivals_from),
    )
    return Setup(
        profile, blocks, _block_tokens(log), running, budget, ahead, config.scheduler == "vllm_v1", facts, assumed
    )


def _model(log: ServingLog, config: FidelityConfig) -> ModelSpec:
    name, key = (config.model, "fidelity.model") if config.model else (str(log.meta["model"]), "fidelity.model")
    model = replace(published_model(name, key), chars_per_token=1.0)  # its requests are counted in its own tokens
    context = log.engine("max_model_len")
    kv_type = str(log.engine("kv_cache_dtype", "auto"))
    bytes_per_value = 1 if kv_type.startswith("fp8") else 2
    longest = int((log.prompt_tokens + log.output_tokens).max())
    limit = int(context) if context else max(model.max_context_tokens, longest)
    return replace(model, max_context_tokens=limit, kv_bytes_per_value=bytes_per_value)


def _card(log: ServingLog, config: FidelityConfig, tables: Path) -> tuple[str, Card]:
    logged = log.meta.get("hardware") or {}
    names = [config.hardware] if config.hardware else [read_meta(tables).get("hardware"), logged.get("device_name")]
    known = [(str(name), card) for name in names if name and (card := published_card(str(name))) is not None]
    total = config.memory_bytes or logged.get("device_total_memory_bytes")
    if known:
        name, card = known[0]
        return name, replace(card, total_bytes=int(total)) if total else card
    name = next((str(n) for n in names if n), "unknown card")
    if config.hardware or not (total or config.kv_blocks or log.engine("num_gpu_blocks")):
        raise UserError(
            "fidelity.hardware", config.hardware or name, f"a known card; known: {', '.join(CARDS)}",
            "set fidelity.hardware to one of these, or fidelity.memory_bytes to the card's memory",
        )  # fmt: skip
    # Memory is all that serving needs of it; without limits of bandwidth there is no roofline to compare with.
    return name, Card(int(total or 2**40), UNLIMITED, UNLIMITED, None, PCIE_LINK, "not in the table of cards")


def _runtime(log: ServingLog) -> Runtime:
    """Costs of the host that no table has are estimated later; what it does while the device works costs nothing."""
    sizes = log.engine("cudagraph_capture_sizes")
    eager = bool(log.engine("enforce_eager", False))
    largest = min(2 * _limit(log, "max_num_seqs"), 512)
    usual = tuple(n for n in (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)) if n <= largest)
    graphs = None if eager else tuple(sizes) if isinstance(sizes, list) else usual
    hides = ("launch_s_per_layer", "launch_s_per_graph", "host_overhead_s")
    hidden = "asynchronous scheduling hides it behind the device; what it does not is gap_s"
    return Runtime(
        launch_s_per_layer=0.0, launch_s_per_graph=0.0, sync_s=0.0, host_overhead_s=0.0, graph_batch_sizes=graphs,
        sources=(
            *(CostSource(key, Basis.DEFINITION, hidden) for key in hides),
            CostSource("sync_s", Basis.DEFINITION, "nothing exits early"),
            CostSource("graph_batch_sizes", Basis.STATED, "vLLM's captured sizes, logged or by max_num_seqs"),
        ),
    )  # fmt: skip


def _blocks(
    log: ServingLog, config: FidelityConfig, model: ModelSpec, card: Card, degree: int
) -> tuple[int, str, tuple[Assumption, ...]]:
    """KV blocks that requests can have: vLLM keeps one of them for itself."""
    logged = log.engine("num_gpu_blocks")
    if config.kv_blocks is not None:
        return config.kv_blocks, "set by fidelity.kv_blocks", ()
    if isinstance(logged, int) and logged > 1:
        return logged - 1, "logged, less the engine's own one", ()
    share = config.memory_utilisation or log.engine("gpu_memory_utilization", 0.9)
    budget = _limit(log, "max_num_batched_tokens")
    activations = activation_reserve_bytes(model, budget, _limit(log, "max_num_seqs")) // degree
    weights = model.weight_bytes(model.n_layers) // degree
    pool = int(card.total_bytes * share) - weights - activations - ENGINE_BYTES
    block = _block_tokens(log) * model.n_layers * model.kv_bytes_per_token_layer // min(degree, model.n_kv_heads)
    if pool < block * 2:
        raise UserError(
            "fidelity.memory_bytes", card.total_bytes, f"more than weights, activations and engine need at {share:g}",
            "set fidelity.memory_bytes, fidelity.memory_utilisation or fidelity.kv_blocks",
        )  # fmt: skip
    why = "CUDA context, workspaces and captured graphs; no block count was logged"
    assumed = Assumption("engine_bytes", float(ENGINE_BYTES), why, "fidelity.kv_blocks")
    return pool // block - 1, f"computed from {card.total_bytes / 2**30:.1f} GiB x {share:g}", (assumed,)


def _block_tokens(log: ServingLog) -> int:
    return int(log.engine("block_size", 16))


def _limit(log: ServingLog, key: str) -> int:
    value = log.engine(key)
    if not isinstance(value, int) or value < 1:
        raise UserError(f"meta.json: engine_kwargs.{key}", value, "a whole number from 1", "add it to meta.json")
    return value


def _ahead(log: ServingLog, config: FidelityConfig) -> tuple[int, str]:
    if config.schedule_ahead is not None:
        return config.schedule_ahead, "set by fidelity.schedule_ahead"
    logged = log.engine("async_scheduling")
    if isinstance(logged, bool):
        return int(logged), "logged"
    numbers = [int(part) for part in str(log.meta.get("vllm_version", "")).split(".")[:2] if part.isdigit()]
    known = len(numbers) == 2
    text = "the default of this version" if known else "no version logged: the default of later ones"
    return int(not known or tuple(numbers) >= ASYNC_SINCE), text
