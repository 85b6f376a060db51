"""Makes the setup for simulating a logged run from its settings and tables: profile, KV blocks, limits, rules."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from helios_sim.errors import UserError
from helios_sim.profile.catalog import (
    CARDS,
    GIB,
    PCIE_LINK,
    UNLIMITED,
    Card,
    Link,
    activation_reserve_bytes,
    published_card,
    published_model,
    same_shape,
)
from helios_sim.profile.importers.layers import READ_OF_META, Terms, layer_profile, read_meta, unread_columns
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import Basis, CostSource, ModelSpec, Runtime
from helios_sim.provenance import Assumption
from helios_sim.study.modes import FidelityConfig
from helios_sim.untrusted import shortened
from helios_sim.validate.engine import graph_mode
from helios_sim.validate.logs import ServingLog

ENGINE_BYTES = 2**30  # of each card, beside weights, activations and KV: context, workspaces, captured graphs
ASYNC_SINCE = (0, 14)  # vLLM's first version that schedules asynchronously unless told not to
V1_SINCE = (0, 8)  # the first version with v1 as the default engine
UTILISATION, UTILISATION_UNTIL = 0.9, (0, 19)  # the default share of a card's memory up to this version
_VALUE_BYTES = {"auto": 2, "bfloat16": 2, "float16": 2, "half": 2, "float32": 4, "float": 4}
_VARIANTS = {"bf16": 2, "bfloat16": 2, "fp16": 2, "float16": 2, "fp32": 4, "float32": 4, "fp8": 1}  # bytes a value
_MOST = 2**31 - 1
_CLOSE = 0.05  # blocks that were logged and those of logged bytes may differ by so much
_FIX = "correct the log, or take another one"
# What tables and a run may differ in, with the engine's default; None: there is none, or it is not known.
_OF_A_KERNEL = {"block_size": 16, "attention_backend": None, "quantization": None}


@dataclass(frozen=True, slots=True)
class Setup:
    """The setup without estimated quantities. The cards of a group are one device."""

    profile: Profile
    kv_blocks: int
    block_tokens: int
    max_running_requests: int
    max_batch_tokens: int
    schedule_ahead: int
    vllm_v1: bool
    whole_prompts: bool
    prefix_caching: bool  # of the engine; the simulation lets only preempted requests find their own blocks again
    order: str  # of the waiting line
    facts: tuple[tuple[str, str], ...]  # (name, value and source), for the reader
    assumptions: tuple[Assumption, ...]
    notices: tuple[str, ...]  # sentences on features of the run that are not simulated
    own_types: bool = True  # kernels were measured in the run's types, so that its roofline applies

    def with_profile(self, profile: Profile) -> Setup:
        return replace(self, profile=profile)


def set_up(log: ServingLog, config: FidelityConfig) -> Setup:
    """Raise UserError if a setting, a table, a shape or a size is missing, with the parameter that gives it."""
    version, engine = log.version, log.engine
    if version is not None and version < V1_SINCE:
        allowed = "0.8 or later: earlier ones schedule otherwise (engine v0)"
        raise UserError("meta.json: vllm_version", log.meta["vllm_version"], allowed, "take another log")
    degree = config.tensor_parallel or engine.whole("tensor_parallel_size", 1, 1024, 1)
    _check_counts(config, degree)
    tables = log.folder / "profile"
    if not tables.is_dir():
        raise UserError(
            "profile", str(tables), "a folder with the card's kernel times", "copy it into the log's folder"
        )
    model = _model(log, config)
    stated = read_meta(tables)
    _check_tables(log, config, stated)
    hardware, card, of_card = _card(log, config, stated, degree)
    link = Link(
        config.link.latency_s or card.link.latency_s,
        config.link.bytes_per_s or card.link.bytes_per_s,
        "set by fidelity.link" if config.link.latency_s or config.link.bytes_per_s else card.link.source,
    )
    runtime, of_graphs = _runtime(log)
    terms = Terms(mixed=config.mixed_term, unequal_kv=config.unequal_kv_term)
    profile = layer_profile(tables, model, hardware, card, runtime, degree, link, terms)
    blocks, blocks_from, assumed = _blocks(log, config, model, card, degree)
    running, budget = _limit(log, "max_num_seqs"), _limit(log, "max_num_batched_tokens")
    whole = _whole_prompts(log, budget)
    ahead, ahead_from = _ahead(log, config)
    caching = engine.flag("enable_prefix_caching", True)
    caching_from = "logged" if engine.has("enable_prefix_caching") else "the default"
    order, of_order = _order(log)
    facts = (
        ("engine", f"vLLM {log.meta.get('vllm_version', 'of a version not logged')}, tensor parallel {degree}"),
        ("limits", f"{running} requests, {budget} tokens an iteration{', whole prompts' if whole else ''}"),
        ("KV blocks", f"{blocks:,} of {_block_tokens(log)} tokens ({blocks_from})"),
        ("asynchronous scheduling", f"{'on' if ahead else 'off'} ({ahead_from})"),
        ("prefix caching", f"{'on' if caching else 'off'} ({caching_from})"),
        ("arrivals", log.arrivals_from),
    )
    of_versions, of_types = _of_kernels(log, stated)
    of_tables = _of_tables(log, stated)
    if columns := unread_columns(tables, degree):
        of_tables.append(f"profile: not read: {', '.join(columns[:12])}.")
    notices = (
        *log.notices, *of_card, *of_versions, *of_types, *of_tables, *of_graphs, *of_order, *_of_prefixes(log, caching),
    )  # fmt: skip
    return Setup(
        profile, blocks, _block_tokens(log), running, budget, ahead, config.scheduler == "vllm_v1", whole, caching,
        order, facts, assumed, notices, not of_types,
    )  # fmt: skip


def _check_counts(config: FidelityConfig, degree: int) -> None:
    """Raise UserError for a setting that would do nothing beside the others and this log."""
    for key, value, counts, where in (
        ("link.latency_s", config.link.latency_s, degree > 1, "only between the cards of a tensor-parallel group"),
        ("link.bytes_per_s", config.link.bytes_per_s, degree > 1, "only between the cards of a tensor-parallel group"),
        ("memory_utilisation", config.memory_utilisation, config.kv_blocks is None, "only without fidelity.kv_blocks"),
        ("memory_bytes", config.memory_bytes, config.kv_blocks is None, "only without fidelity.kv_blocks"),
    ):
        if value is not None and not counts:
            raise UserError(f"fidelity.{key}", value, f"does nothing here: it counts {where}", "leave it out")


def engine_settings(log: ServingLog) -> dict[str, Any]:
    """The engine's settings as a study has them, by path. Raises UserError if the simulation cannot follow one."""
    if log.version is not None and log.version < V1_SINCE:
        allowed = "0.8 or later: earlier ones schedule otherwise (engine v0)"
        raise UserError("meta.json: vllm_version", log.meta["vllm_version"], allowed, "take another log")
    budget = _limit(log, "max_num_batched_tokens")
    if _whole_prompts(log, budget):
        allowed = "true: prompts that are not chunked are replayed by +experiment=fidelity_vllm alone"
        raise UserError("meta.json: enable_chunked_prefill", False, allowed, "take that experiment")
    return {
        "server.max_running_requests": _limit(log, "max_num_seqs"), "server.max_batch_tokens": budget,
        "server.block_tokens": _block_tokens(log), "server.schedule_ahead": _ahead(log, FidelityConfig())[0],
        "server.scheduler": "vllm_v1", "server.order": _order(log)[0],
    }  # fmt: skip


def engine_on_other_kernels(log: ServingLog) -> tuple[dict[str, Any], int | None, list[str]]:
    """Further settings where the log's own kernel times do not price it, its KV blocks, and what is not followed."""
    engine = log.engine
    found: dict[str, Any] = {"server.tensor_parallel": engine.whole("tensor_parallel_size", 1, 1024, 1)}
    notices = list(_of_prefixes(log, engine.flag("enable_prefix_caching", True)))
    value_bytes = _value_bytes(log)
    if _kv_bytes(log, value_bytes) == 1:
        found["server.kv_cache_dtype"] = "fp8"
    if engine.has("gpu_memory_utilization"):
        found["server.memory_utilisation"] = engine.share("gpu_memory_utilization", UTILISATION)
    if value_bytes == 4:
        notices.append("The run was in float32: memory and times are those of bf16 here.")
    graphs, of_graphs = _graphs(log)
    if graphs is None:
        found["runtime.preset"] = "eager"
    elif engine.has("cudagraph_capture_sizes") or engine.has("max_cudagraph_capture_size"):
        told = f"The run captured graphs up to {graphs[-1]} requests: those of runtime.preset are used."
        notices.append(told)
    blocks = _counted(log)
    return found, None if blocks is None else blocks[0] - 1, [*notices, *of_graphs]


def _model(log: ServingLog, config: FidelityConfig) -> ModelSpec:
    name = config.model or str(log.meta["model"])
    # Its requests are counted in its own tokens.
    model = replace(published_model(name, "fidelity.model"), chars_per_token=1.0)
    value_bytes = _value_bytes(log)
    longest = int((log.prompt_tokens + log.output_tokens).max())
    context = log.engine.whole("max_model_len", 1, _MOST, max(model.max_context_tokens, longest))
    if longest > context:
        told = f"{longest} tokens of a request in requests.jsonl"
        raise UserError("meta.json: max_model_len", context, f"at least the {told}", _FIX)
    return replace(
        model, max_context_tokens=context, weight_bytes_per_value=value_bytes,
        kv_bytes_per_value=_kv_bytes(log, value_bytes),
    )  # fmt: skip


def _value_bytes(log: ServingLog) -> int:
    kind = log.engine.text("dtype", "auto")
    if kind not in _VALUE_BYTES:
        raise UserError("meta.json: engine_kwargs.dtype", shortened(kind), f"one of {', '.join(_VALUE_BYTES)}", _FIX)
    return _VALUE_BYTES[kind]


def _kv_bytes(log: ServingLog, value_bytes: int) -> int:
    kind = log.engine.text("kv_cache_dtype", "auto")
    if kind in ("fp8", "fp8_e4m3", "fp8_e5m2", "fp8_inc"):
        return 1
    if kind not in _VALUE_BYTES:
        allowed = "auto, bfloat16, float16 or fp8: other caches are not modelled"
        raise UserError("meta.json: engine_kwargs.kv_cache_dtype", shortened(kind), allowed, "take another log")
    return value_bytes if kind == "auto" else _VALUE_BYTES[kind]


def _check_tables(log: ServingLog, config: FidelityConfig, stated: Mapping[str, Any]) -> None:
    """Raise UserError if the tables are of another model than the log, unless a setting says which shape to use."""
    logged, measured = str(log.meta["model"]), stated.get("model")
    if config.model is not None or not isinstance(measured, str):
        return
    if not same_shape(logged.rstrip("/"), measured.rstrip("/")):
        told = f"{measured} in profile/meta.yaml, {logged} in meta.json"
        raise UserError("model", told, "one model", "copy the tables of the run's model, or set fidelity.model")


def _card(
    log: ServingLog, config: FidelityConfig, stated: Mapping[str, Any], degree: int
) -> tuple[str, Card, list[str]]:
    """A card by its name, and what is to be said of it. Raises UserError if two names contradict each other."""
    logged = log.meta.get("hardware") or {}
    number = logged.get("device_count")
    if isinstance(number, int) and number < degree:
        raise UserError("meta.json: hardware.device_count", number, f"at least tensor_parallel_size, {degree}", _FIX)
    names = [config.hardware] if config.hardware else [stated.get("hardware"), logged.get("device_name")]
    known = [(str(name), card) for name in names if name and (card := published_card(str(name))) is not None]
    if len(known) == 2 and known[0][1] != known[1][1]:
        told = f"{known[0][0]} in profile/meta.yaml, {known[1][0]} in meta.json"
        raise UserError("hardware", told, "one card", "copy the tables of the run's card, or set fidelity.hardware")
    total = logged.get("device_total_memory_bytes")
    if total is not None and (isinstance(total, bool) or not isinstance(total, int) or not 2**20 <= total <= 2**50):
        raise UserError("meta.json: hardware.device_total_memory_bytes", shortened(total), "bytes of a card", _FIX)
    total = config.memory_bytes or total
    if known:
        name, card = known[0]
        if total is None:
            return name, card, []
        told = f"{name} has {card.total_bytes / GIB:.1f} GiB, meta.json says {total / GIB:.1f}: the latter counts."
        said = config.memory_bytes is None and not 0.9 <= total / card.total_bytes <= 1.1
        return name, replace(card, total_bytes=total), [told] if said else []
    name = next((str(n) for n in names if n), "unknown card")
    counted = any(log.engine.has(key) for key in ("num_gpu_blocks", "num_gpu_blocks_override", "kv_cache_memory_bytes"))
    if config.hardware or not (total or config.kv_blocks or counted):
        raise UserError(
            "fidelity.hardware", config.hardware or name, f"a known card; known: {', '.join(CARDS)}",
            "set fidelity.hardware to one of these, or fidelity.memory_bytes to the card's memory",
        )  # fmt: skip
    # Memory is all that serving needs of it; without limits of bandwidth there is no roofline to compare with.
    return name, Card(total or 2**40, UNLIMITED, UNLIMITED, None, PCIE_LINK, "not in the table of cards"), []


def _runtime(log: ServingLog) -> tuple[Runtime, list[str]]:
    """Costs of the host that no table has are estimated later; what it does while the device works costs nothing."""
    graphs, notices = _graphs(log)
    hides = ("launch_s_per_layer", "launch_s_per_graph", "host_overhead_s")
    hidden = "asynchronous scheduling hides it behind the device; what it does not is gap_s"
    return Runtime(
        launch_s_per_layer=0.0, launch_s_per_graph=0.0, sync_s=0.0, host_overhead_s=0.0, graph_batch_sizes=graphs,
        sources=(
            *(CostSource(key, Basis.DEFINITION, hidden) for key in hides),
            CostSource("sync_s", Basis.DEFINITION, "nothing exits early"),
            CostSource("graph_batch_sizes", Basis.STATED, "vLLM's captured sizes, logged or by max_num_seqs"),
        ),
    ), notices  # fmt: skip


def _graphs(log: ServingLog) -> tuple[tuple[int, ...] | None, list[str]]:
    """The batch sizes of captured graphs, None without any, and what is to be said of them."""
    engine = log.engine
    mode = graph_mode(engine.value("cudagraph_mode", "full_and_piecewise"))
    level = engine.text("optimization_level", "2")
    if engine.flag("enforce_eager", False) or mode == "none" or level in ("0", "o0"):
        return None, []
    piecewise = ["meta.json: cudagraph_mode is PIECEWISE: attention is priced as in a whole graph."]
    notices = piecewise if mode == "piecewise" or level in ("1", "o1") else []
    sizes = engine.value("cudagraph_capture_sizes")
    if isinstance(sizes, list):
        if not all(type(n) is int and 1 <= n <= _MOST for n in sizes):
            raise UserError("meta.json: cudagraph_capture_sizes", shortened(sizes), "whole numbers from 1", _FIX)
        return tuple(sorted(set(sizes))) or None, notices
    if sizes is not None and not (isinstance(sizes, str) and sizes.startswith("<")):  # a long list is logged as a tag
        raise UserError("meta.json: cudagraph_capture_sizes", shortened(sizes), "a list of sizes", _FIX)
    largest = engine.whole("max_cudagraph_capture_size", 0, _MOST, min(2 * _limit(log, "max_num_seqs"), 512))
    usual = (1, 2, 4, *range(8, 257, 8), *range(272, max(largest, 512) + 1, 16))
    return tuple(n for n in usual if n <= largest) or None, notices


def _blocks(
    log: ServingLog, config: FidelityConfig, model: ModelSpec, card: Card, degree: int
) -> tuple[int, str, tuple[Assumption, ...]]:
    """KV blocks that requests can have: vLLM keeps one of them for itself."""
    if config.kv_blocks is not None:
        return config.kv_blocks, "set by fidelity.kv_blocks", ()
    block = _block_tokens(log) * model.n_layers * model.kv_bytes_per_token_layer // min(degree, model.n_kv_heads)
    given, counted = _bytes_given(log), _counted(log)
    if counted is not None:
        _check_counted(*counted, block, given, card)
    elif given is not None:
        counted = given // block, f"of kv_cache_memory_bytes, {given:,}"
    if counted is not None:
        for key in ("memory_utilisation", "memory_bytes"):
            if (value := getattr(config, key)) is not None:
                allowed = f"null: the log gives the blocks themselves ({counted[1]})"
                raise UserError(f"fidelity.{key}", value, allowed, "set fidelity.kv_blocks")
        if counted[0] < 2:
            raise UserError("meta.json: KV cache", f"{counted[0]} blocks", "at least 2: the engine keeps one", _FIX)
        return counted[0] - 1, f"{counted[1]}, less the engine's own one", ()
    share, assumed = _share(log, config)
    budget = _limit(log, "max_num_batched_tokens")
    activations = activation_reserve_bytes(model, budget, _limit(log, "max_num_seqs")) // degree
    weights = model.weight_bytes(model.n_layers) // degree
    pool = int(card.total_bytes * share) - weights - activations - ENGINE_BYTES
    if pool < block * 2:
        raise UserError(
            "fidelity.memory_bytes", card.total_bytes, f"more than weights, activations and engine need at {share:g}",
            "set fidelity.memory_bytes, fidelity.memory_utilisation or fidelity.kv_blocks",
        )  # fmt: skip
    why = "CUDA context, workspaces and captured graphs; no block count was logged"
    assumed = (Assumption("engine_bytes", float(ENGINE_BYTES), why, "fidelity.kv_blocks"), *assumed)
    return pool // block - 1, f"computed from {card.total_bytes / 2**30:.1f} GiB x {share:g}", assumed


def _bytes_given(log: ServingLog) -> int | None:
    has = log.engine.has("kv_cache_memory_bytes")
    return log.engine.whole("kv_cache_memory_bytes", 1, 2**50) if has else None


def _counted(log: ServingLog) -> tuple[int, str] | None:
    """The number of blocks that the log states, and its name there. Raises UserError if it has two of them."""
    found = {key: log.engine.whole(key, 1, 2**40) for key in ("num_gpu_blocks", "num_gpu_blocks_override")
             if log.engine.has(key)}  # fmt: skip
    if len(set(found.values())) > 1:
        told = ", ".join(f"{key} {value}" for key, value in found.items())
        raise UserError("meta.json: KV cache", told, "one number of blocks", _FIX)
    return next(((value, f"logged as {key}") for key, value in found.items()), None)


def _check_counted(blocks: int, name: str, block: int, given: int | None, card: Card) -> None:
    """Raise UserError if the blocks are not those of the bytes that the log gives, or do not fit into the card."""
    if given is not None and abs(blocks * block - given) > max(_CLOSE * given, block):
        told = f"{blocks:,} blocks of {block:,} bytes ({name}), kv_cache_memory_bytes {given:,}"
        raise UserError("meta.json: KV cache", told, "one size", _FIX)
    if blocks * block > card.total_bytes:
        told = f"{blocks:,} blocks of {block:,} bytes ({name})"
        allowed = f"at most the card's {card.total_bytes:,} bytes with this model, dtype and block_size"
        raise UserError("meta.json: KV cache", told, allowed, "correct the log, or set fidelity.kv_blocks")


def _share(log: ServingLog, config: FidelityConfig) -> tuple[float, tuple[Assumption, ...]]:
    """The share of a card's memory that the engine may use."""
    if config.memory_utilisation is not None:
        return config.memory_utilisation, ()
    assumed: tuple[Assumption, ...] = ()
    if not log.engine.has("gpu_memory_utilization") and (log.version is None or log.version > UTILISATION_UNTIL):
        why = "not logged, nor is the default of this version known; later ones have 0.92"
        assumed = (Assumption("gpu_memory_utilization", UTILISATION, why, "fidelity.memory_utilisation"),)
    return log.engine.share("gpu_memory_utilization", UTILISATION), assumed


def _block_tokens(log: ServingLog) -> int:
    return log.engine.whole("block_size", 1, 2**20, 16)


def _limit(log: ServingLog, key: str) -> int:
    return log.engine.whole(key, 1, 2**24)


def _whole_prompts(log: ServingLog, budget: int) -> bool:
    """Whether prompts are not chunked. Raises UserError if one of them would then not fit into the budget."""
    if log.engine.flag("enable_chunked_prefill", True):
        return False
    longest = log.engine.whole("max_model_len", 1, _MOST, int((log.prompt_tokens + log.output_tokens).max()))
    if budget < longest:
        allowed = f"at least {longest}, the longest sequence: without chunked prefill vLLM demands it"
        raise UserError("meta.json: max_num_batched_tokens", budget, allowed, _FIX)
    return True


def _ahead(log: ServingLog, config: FidelityConfig) -> tuple[int, str]:
    if config.schedule_ahead is not None:
        return config.schedule_ahead, "set by fidelity.schedule_ahead"
    if log.engine.has("async_scheduling"):
        return int(log.engine.flag("async_scheduling", True)), "logged"
    known = log.version is not None
    text = "the default of this version" if known else "of a version that is not known: the default of later ones"
    return int(log.version is None or log.version >= ASYNC_SINCE), text


def _order(log: ServingLog) -> tuple[str, list[str]]:
    """The order of the waiting line, and what is to be said of it."""
    policy = log.engine.text("scheduling_policy", "fcfs")
    if policy not in ("fcfs", "priority"):
        allowed = "fcfs or priority"
        raise UserError("meta.json: engine_kwargs.scheduling_policy", shortened(policy), allowed, "take another log")
    if policy == "fcfs" and log.priority is not None:
        return "fcfs", ["requests.jsonl has priorities, which count for nothing: scheduling_policy is fcfs."]
    if policy == "priority" and log.priority is None:
        return "fcfs", ["meta.json: scheduling_policy is priority, but requests.jsonl has no priority: all are alike."]
    return policy, []


def _of_kernels(log: ServingLog, stated: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Sentences if kernels were measured with another version, and with other types, than the engine's."""
    versions = log.meta.get("vllm_version"), stated.get("vllm_version")
    if not isinstance(versions[1], str | None):
        allowed = 'a text in quotes, such as "0.10.0": YAML reads 0.10 as 0.1'
        raise UserError("profile/meta.yaml: vllm_version", versions[1], allowed, "put it in quotes")
    other = None not in versions and str(versions[0]) != str(versions[1])
    of_versions = [f"Kernel times are of vLLM {versions[1]}, the run is of {versions[0]}."] if other else []
    notices = []
    variant = str(stated.get("variant", "bf16")).lower()
    weights, _, rest = variant.partition("-")
    value_bytes = _value_bytes(log)
    if _VARIANTS.get(weights, 2) != value_bytes:
        kind = log.engine.text("dtype", "auto")
        told = f"Kernel times were measured in {variant}, the run is in {kind}"
        notices.append(f"{told}: memory is that of the run, times are not.")
    if _kv_bytes(log, value_bytes) < value_bytes and "fp8" not in rest:
        kind = log.engine.text("kv_cache_dtype", "auto")
        told = f"Kernel times were measured in {variant}, the KV cache was in {kind}"
        notices.append(f"{told}: memory is that of the run, times are not.")
    return of_versions, notices


def _of_tables(log: ServingLog, stated: Mapping[str, Any]) -> list[str]:
    """Sentences on settings of the measured kernels that the run did not have, and on keys that are not read."""
    engine = stated.get("engine_effective")
    said = {**(engine if isinstance(engine, Mapping) else {}), **stated}
    found = []
    for key, usual in _OF_A_KERNEL.items():
        measured, ran = said.get(key), log.engine.value(key, usual)
        if measured in (None, False, "auto", "none") or str(measured).lower() == str(ran).lower():
            continue
        if ran not in (None, "auto"):
            found.append(f"Kernel times were measured with {key} {shortened(measured)}, the run had {ran}.")
        elif key == "quantization":
            told = f"{shortened(measured)}, which the run did not have"
            raise UserError("profile/meta.yaml: quantization", told, "tables of the run's weights", "copy those")
        else:
            found.append(f"Kernel times were measured with {key} {shortened(measured)}.")
    left = [f"{key} ({str(v)[:40]})" for key, v in stated.items() if v and key not in READ_OF_META]
    return [*found, *([f"profile/meta.yaml: not read: {', '.join(left[:12])}."] if left else [])]


def _of_prefixes(log: ServingLog, caching: bool) -> list[str]:
    if not caching:
        return ["Prefix caching was off: prompts share nothing, and a preempted request is computed anew."]
    share = log.cached_share
    worth = "how much that is, the log does not say" if share is None else f"it served {share:.1%} of the prompt tokens"
    return [f"Prefix caching was on, and prefixes that prompts share are computed anew here: {worth}."]
