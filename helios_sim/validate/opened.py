"""Opens a log for a study: its requests in one form, its engine's settings, and a profile if it has kernel times.

The requests are written as a trace that every arm replays. The log's settings of the engine replace the study's; if
they differ, the report names both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from helios_sim.errors import UserError
from helios_sim.files import write_text
from helios_sim.logs import Begins, RequestLog, own, read_folder, read_tool, servegen, tools
from helios_sim.logs.document import MOST_BYTES
from helios_sim.logs.record import OK
from helios_sim.profile.catalog import same_shape
from helios_sim.profile.devices import group_of
from helios_sim.profile.profile import Profile
from helios_sim.profile.store import write_profile
from helios_sim.request import NS_PER_S
from helios_sim.shared_data import shared_data_folder
from helios_sim.study.modes import FidelityConfig
from helios_sim.study.schema import Config
from helios_sim.study.workload import OF_THE_MODEL
from helios_sim.untrusted import is_there
from helios_sim.validate.logs import ServingLog, read_log
from helios_sim.validate.setup import engine_on_other_kernels, engine_settings, set_up
from helios_sim.vary.settings import with_settings
from helios_sim.workload import RequestTrace, read_trace
from helios_sim.workload.traces import locate

OF_THE_LOG = "of_the_log"  # value of model or hardware: the one stated in the log
TRACE, PROFILES = "replayed.jsonl", "profiles"  # in the output folder
LIMITS = ("server.max_batch_tokens", "server.max_running_requests")  # settings on which times depend
_HALF_A_BLOCK = 0.5


@dataclass(frozen=True, slots=True)
class Opened:
    """A log with its settings and profile."""

    log: RequestLog
    settings: Mapping[str, Any]  # settings of the study by path, from the log's engine
    model: str | None = None  # stated in the log
    hardware: str | None = None
    profile: Profile | None = None  # from kernel times beside the log
    kv_blocks: int | None = None
    blocks_from: str = ""
    table: Path | None = None  # the file itself, if it is a table that workloads read
    is_folder: bool = False
    has_kernels: bool = False  # there are kernel times beside it, even if they do not price the replay
    notices: tuple[str, ...] = ()


def open_log(config: Config) -> Opened:
    """Open a log. Raises UserError if it is missing, cannot be read, or holds nothing to replay."""
    wanted = config.from_log
    if wanted.log is None:
        raise UserError("log", None, "a file or folder of requests that were served", "set log=FILE")
    opened = _opened(config, _found(wanted.log))
    for key, value, default, counts, where in (
        ("part", wanted.part, None, opened.log.format != "table of requests" and not opened.is_folder,
         "only with a file of several runs"),
        ("span_s", wanted.span_s, None, opened.log.format == servegen.NAME, "only with ServeGen's clients"),
        ("kernels", wanted.kernels, True, opened.has_kernels, "only with kernel times beside the log"),
        ("engine_of_log", wanted.engine_of_log, True, bool(opened.settings), "only with a log that states its engine"),
    ):  # fmt: skip
        if value != default and not counts:
            raise UserError(f"from_log.{key}", value, f"does nothing here: it counts {where}", "leave it out")
    return opened


def _opened(config: Config, path: Path) -> Opened:
    wanted = config.from_log
    if path.is_dir() and is_there(path / "meta.json") and is_there(path / "requests.jsonl"):
        return _of_vllm(read_log(path), config)
    seed = config.seeds[0] if isinstance(config.seeds, list) else 0
    if path.is_dir():
        span = None if wanted.span_s is None else (wanted.span_s[0], wanted.span_s[1])
        log = read_folder(path, span, seed)
        return Opened(log, {}, log.stated.get("model"), is_folder=True)
    if path.stat().st_size <= MOST_BYTES:
        found = read_tool(tools.opened(path), wanted.part, seed)
        if found is not None:
            return Opened(found, _stated_engine(found), found.stated.get("model"))
    return Opened(_of_table(read_trace(path, time_unit=config.workload.arrivals.time_unit, texts=True)), {}, table=path)


def _found(text: str) -> Path:
    """The path itself, or the path within the folder of shared data."""
    for path in (Path(text).expanduser(), shared_data_folder() / text):
        if is_there(path, Path.is_dir):
            return path
    try:
        return locate(Path(text).expanduser())
    except UserError as error:
        raise error.about("log") from error


def _stated_engine(log: RequestLog) -> dict[str, Any]:
    """Settings of the server in a tool's header."""
    names = {"max_num_seqs": "server.max_running_requests", "block_size": "server.block_tokens",
             "gpu_memory_utilization": "server.memory_utilisation",
             "tensor_parallel": "server.tensor_parallel"}  # fmt: skip
    return {path: log.stated[name] for name, path in names.items() if log.stated.get(name)}


def _of_table(trace: RequestTrace) -> RequestLog:
    n = len(trace)
    missing = ["times to first token", "times to the last token", "which requests failed"]
    return RequestLog(
        source=trace.source,
        format="table of requests",
        begins=Begins.SENT,
        arrival_s=None if trace.arrival_ns is None else trace.arrival_ns / NS_PER_S,
        prompt_tokens=trace.prompt_tokens,
        output_tokens=trace.output_tokens,
        completed=np.ones(n, np.bool_),
        status=(OK,) * n,
        priority=trace.priority,
        texts=trace.texts,
        missing=tuple(f"{trace.source} does not say: {what}." for what in missing),
        notices=trace.notices if trace.arrival_ns is not None else (*trace.notices, trace.no_arrivals),
    )


def _of_vllm(serving: ServingLog, config: Config) -> Opened:
    """Open the folder of a vLLM run, which has stamps and settings of the engine."""
    wanted = config.from_log
    times = serving.measured
    log = RequestLog(
        source=serving.folder.name,
        format=f"vLLM {serving.meta.get('vllm_version', '')} in LLMServingSim's layout",
        begins=Begins.QUEUED,
        arrival_s=serving.arrival_ns / NS_PER_S,
        prompt_tokens=serving.prompt_tokens,
        output_tokens=serving.output_tokens,
        completed=np.ones(len(serving), np.bool_),
        status=(OK,) * len(serving),
        ttft_s=(times.first_ns - times.queued_ns) / NS_PER_S,
        e2e_s=(times.last_ns - times.queued_ns) / NS_PER_S,
        queue_s=(times.scheduled_ns - times.queued_ns) / NS_PER_S,
        priority=serving.priority,
        stated={"model": serving.meta["model"]},
        missing=(f"{serving.folder.name} does not say: times of single tokens.",),
        notices=serving.notices,
    )
    model = str(serving.meta["model"])
    hardware = (serving.meta.get("hardware") or {}).get("device_name")
    settings = engine_settings(serving)
    own_model = config.models[0] == OF_THE_LOG or same_shape(config.models[0], model)
    if wanted.kernels and own_model and (serving.folder / "profile").is_dir():
        setup = set_up(serving, FidelityConfig(kv_blocks=wanted.kv_blocks))
        name = setup.profile.hardware.name
        if config.hardware in (OF_THE_LOG, name) or config.hardware.lower() == name.lower():
            facts = dict(setup.facts)
            return Opened(
                log, {**settings, "runtime.preset": "profile"}, model, name, setup.profile, setup.kv_blocks,
                facts["KV blocks"], notices=setup.notices, is_folder=True, has_kernels=True,
            )  # fmt: skip
    further, blocks, notices = engine_on_other_kernels(serving)
    told = "" if blocks is None else "logged, less the engine's own one"
    return Opened(
        log, {**settings, **further}, model, hardware, kv_blocks=blocks, blocks_from=told, notices=tuple(notices),
        is_folder=True, has_kernels=own_model and (serving.folder / "profile").is_dir(),
    )  # fmt: skip


def prepared(opened: Opened, config: Config, folder: Path) -> tuple[Config, tuple[str, ...]]:
    """The study's settings with the log's requests and engine, and sentences on differences from the given ones.

    Writes the requests, and the profile if the log has kernel times, into the folder.
    """
    wanted, log = config.from_log, opened.log
    if log.arrival_s is None:
        raise UserError("log", log.source, "times at which requests came: without them nothing is replayed",
                        "take another log, or draw arrivals: +experiment=own workload.lengths.trace=FILE")  # fmt: skip
    changes, notices = _of_models(opened, config)
    if wanted.engine_of_log:
        settings = dict(opened.settings)
        cards = group_of(changes["hardware"])[0]
        if cards > 1 and (stated := settings.pop("server.tensor_parallel", cards)) != cards:
            notices.append(f"hardware={changes['hardware']}, and the log states tensor parallelism of {stated}.")
        for path, value in settings.items():
            now = _at(config, path)
            if now != value and (path != "runtime.preset" or value == "eager"):
                notices.append(f"{path} is {value}, as the log states; the settings have {now}.")
        changes |= settings
    unknown = [path for path in LIMITS if path not in changes]
    if unknown:
        counted = " and ".join(f"{path}={_at(config, path)}" for path in unknown)
        notices.append(f"{log.source} does not say what its engine's limits were: {counted}, as the settings say.")
    if opened.profile is not None:
        write_profile(opened.profile, folder / PROFILES / opened.profile.name)
        changes |= {"profile_folder": str(folder / PROFILES), "runtime.preset": "profile"}
    trace = opened.table or folder / TRACE
    if opened.table is None:
        write_text(trace, _as_lines(log, changes["models"][0]))
    most, there = config.workload.n_requests, int(np.count_nonzero(log.completed))
    changes |= {
        "workload.chars_per_token": OF_THE_MODEL,
        "workload.n_requests": None if most is None or most >= there else most,
        "workload.statement": f"The requests of {log.source}: arrivals and lengths as logged.",
        "workload.arrivals.kind": "trace", "workload.arrivals.trace": str(trace), "workload.arrivals.rate_per_s": None,
        "workload.lengths.kind": "trace", "workload.lengths.trace": str(trace),
    }  # fmt: skip
    changed = with_settings(config, changes)
    blocks = wanted.kv_blocks or opened.kv_blocks
    if blocks is not None:
        changed = with_settings(changed, {"server.memory_utilisation": _share_of(changed, blocks)})
    return changed, tuple(notices)


def _at(config: Config, path: str) -> Any:
    value: Any = config
    for name in path.split("."):
        value = getattr(value, name)
    return value


def _of_models(opened: Opened, config: Config) -> tuple[dict[str, Any], list[str]]:
    """Model and hardware from the settings, else from the log. Raises UserError if neither has one."""
    notices: list[str] = []
    if len(config.models) > 1:
        fix = "name one; models that are asked on the same arrivals are from_log.models=[...]"
        raise UserError("models", config.models, "the one model that served the log", fix)
    model, hardware = config.models[0], config.hardware
    if model == OF_THE_LOG:
        if not opened.model:
            allowed = f"which model served {opened.log.source}: the log does not say"
            raise UserError("model", None, allowed, "set model=NAME")
        model = opened.model
    elif opened.model and not same_shape(model, opened.model):
        notices.append(f"The log is of {opened.model}, and is priced as {model}.")
    if hardware == OF_THE_LOG:
        if not opened.hardware:
            fix = "set hardware=NAME, such as h100-80gb"
            raise UserError("hardware", None, f"which card served {opened.log.source}: the log does not say", fix)
        hardware = opened.hardware
    if opened.profile is not None:
        model, hardware = opened.profile.model.name, opened.profile.hardware.name
    return {"models": [model], "hardware": hardware}, notices


def _as_lines(log: RequestLog, model: str) -> str:
    """The answered requests as lines of this project's own log format."""
    assert log.arrival_s is not None
    lines = [own.header(model=model)]
    for i in np.flatnonzero(log.completed):
        row = {"arrival_s": float(log.arrival_s[i]), "prompt_tokens": int(log.prompt_tokens[i]),
               "output_tokens": int(log.output_tokens[i]), "status": OK,
               "priority": None if log.priority is None else int(log.priority[i])}  # fmt: skip
        lines.append(own.line(row))
    return "\n".join(lines) + "\n"


def _share_of(config: Config, blocks: int) -> float:
    """The share of the card's memory that gives so many KV blocks. Raises UserError if it has too little."""
    from helios_sim.study.build import build_profile

    profile = build_profile(config, config.models[0])
    layers, tokens = profile.model.n_layers, config.server.block_tokens
    pool = (blocks + _HALF_A_BLOCK) * tokens * profile.kv_bytes_per_token(layers)
    share = (profile.weight_bytes(layers) + profile.activation_reserve_bytes + pool) / profile.hardware.hbm_bytes
    if share > 1.0:
        told = f"{blocks:,} blocks of {tokens} tokens"
        allowed = f"at most what {profile.hardware.name} has room for beside {profile.model.name}"
        raise UserError("from_log.kv_blocks", told, allowed, "correct it, the model or the hardware")
    return float(share)


def answered(log: RequestLog, most: int | None) -> RequestLog:
    """The first `most` answered requests, with arrivals counted from the first."""
    rows = np.flatnonzero(log.completed)[:most]

    def part(column: Any) -> Any:
        return None if column is None else column[rows]

    assert log.arrival_s is not None
    arrival_s = log.arrival_s[rows]
    return replace(
        log, arrival_s=arrival_s - arrival_s.min(), prompt_tokens=log.prompt_tokens[rows],
        output_tokens=log.output_tokens[rows], completed=log.completed[rows], status=tuple(log.status[i] for i in rows),
        ttft_s=part(log.ttft_s), e2e_s=part(log.e2e_s), queue_s=part(log.queue_s), priority=part(log.priority),
        token_times=None, task=None, texts=None,
    )  # fmt: skip
