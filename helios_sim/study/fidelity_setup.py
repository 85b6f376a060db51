"""What a logged run needs to be simulated: profile, KV blocks, limits. Knows where each comes from, runs nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from helios_sim.errors import UserError
from helios_sim.profile.catalog import CARDS, PCIE_LINK, Card, Link, published_card, published_model
from helios_sim.profile.importers.layers import Terms, layer_profile, read_meta
from helios_sim.profile.models import activation_reserve_bytes
from helios_sim.profile.profile import Profile
from helios_sim.profile.spec import ModelSpec, Runtime
from helios_sim.provenance import Assumption
from helios_sim.study.fidelity_log import ServingLog
from helios_sim.study.fidelity_schema import FidelityConfig

ENGINE_BYTES = 2**30  # of each card, beside weights, activations and KV: context, workspaces, captured graphs
ASYNC_SINCE = (0, 14)  # vLLM's first version that schedules asynchronously unless told not to


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
    model = published_model(name, key)
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
    return name, Card(int(total or 2**40), np.inf, np.inf, None, PCIE_LINK, "not in the table of cards")


def _runtime(log: ServingLog) -> Runtime:
    """Costs of the host that no table has are estimated later; what it does while the device works costs nothing."""
    sizes = log.engine("cudagraph_capture_sizes")
    eager = bool(log.engine("enforce_eager", False))
    largest = min(2 * _limit(log, "max_num_seqs"), 512)
    usual = tuple(n for n in (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16)) if n <= largest)
    graphs = None if eager else tuple(sizes) if isinstance(sizes, list) else usual
    hidden = "by definition: asynchronous scheduling hides it behind the device; what it does not is gap_s"
    return Runtime(
        launch_s_per_layer=0.0, launch_s_per_graph=0.0, sync_s=0.0, host_overhead_s=0.0, graph_batch_sizes=graphs,
        sources=(
            ("launch_s_per_layer", hidden), ("launch_s_per_graph", hidden), ("host_overhead_s", hidden),
            ("sync_s", "by definition: nothing exits early"),
            ("graph_batch_sizes", "vLLM's captured sizes, logged or its defaults for max_num_seqs"),
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
