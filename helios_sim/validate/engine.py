"""Settings of a vLLM engine in a log: followed, known not to matter, or not modelled.

A log has a setting up to three times: as requested (`engine_kwargs`), as resolved by the engine (`resolved_config`, by
section), and as carried out (`kv_cache`). All places are read and compared. The tables below declare each name. A
setting that would change the result and cannot be followed raises an error or is named in the report; so is a name that
is in no table.

Names and defaults are those of vLLM's EngineArgs (vllm/engine/arg_utils.py) and configs (vllm/config/), 0.8 to 0.19.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from helios_sim.errors import UserError
from helios_sim.untrusted import parse_json, shortened


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


HONOURED = _words(
    "dtype kv_cache_dtype max_model_len max_num_seqs max_num_batched_tokens tensor_parallel_size block_size "
    "gpu_memory_utilization kv_cache_memory_bytes num_gpu_blocks num_gpu_blocks_override enable_prefix_caching "
    "scheduling_policy async_scheduling enforce_eager cudagraph_mode cudagraph_capture_sizes "
    "max_cudagraph_capture_size optimization_level enable_chunked_prefill"
)
# Settings that the engine may resolve differently from the request, without a contradiction.
_RESOLVED_FREELY = _words(
    "kv_cache_dtype max_model_len block_size enable_prefix_caching async_scheduling enforce_eager cudagraph_mode "
    "cudagraph_capture_sizes max_cudagraph_capture_size optimization_level enable_chunked_prefill"
)


@dataclass(frozen=True, slots=True)
class Rule:
    """A setting that the simulation does not follow, its harmless values, and the meaning of all others."""

    off: tuple[Any, ...]
    why: str


_ONE, _NO = (1, 0), (False, 0)
REFUSED = {
    **dict.fromkeys(
        ("pipeline_parallel_size", "data_parallel_size", "data_parallel_size_local", "prefill_context_parallel_size",
         "decode_context_parallel_size", "context_parallel_size"),
        Rule(_ONE, "requests of one tensor-parallel group are simulated, and no other parallelism"),
    ),
    "nnodes": Rule(_ONE, "one machine: links between machines are not modelled"),
    **dict.fromkeys(
        ("enable_expert_parallel", "enable_eplb", "enable_elastic_ep", "is_moe_model"),
        Rule(_NO, "dense models: experts are not modelled"),
    ),
    **dict.fromkeys(("enable_dbo", "ubatch_size"), Rule(_NO, "a batch that runs as one: overlap is not modelled")),
    **dict.fromkeys(
        ("quantization", "quant_config", "quantization_config"),
        Rule((), "weights in 16 or 32 bits: neither the bytes nor the kernels of quantized weights are modelled"),
    ),
    **dict.fromkeys(
        ("cpu_offload_gb", "offload_group_size"),
        Rule((0,), "weights that stay on the card: what is copied in each iteration is not modelled"),
    ),
    **dict.fromkeys(
        ("kv_offloading_size", "kv_transfer_config", "ec_transfer_config"),
        Rule((0,), "a KV cache that stays on its card: transfers of it are not modelled"),
    ),
    **dict.fromkeys(
        ("speculative_config", "speculative_model", "num_speculative_tokens", "num_lookahead_slots",
         "diffusion_config"),
        Rule((0,), "one token an iteration: speculative decoding is not modelled"),
    ),
    "long_prefill_token_threshold": Rule((0,), "chunks limited by the token budget alone"),
    "max_num_partial_prefills": Rule((0, 1), "chunks limited by the token budget alone"),
    **dict.fromkeys(
        ("enable_lora", "lora_config", "lora_modules", "default_mm_loras"),
        Rule(_NO, "one set of weights: adapters (LoRA) are not modelled"),
    ),
    "scheduler_cls": Rule(
        ("vllm.v1.core.sched.scheduler.scheduler", "vllm.v1.core.sched.async_scheduler.asyncscheduler"),
        "vLLM's own scheduler: another one decides otherwise",
    ),
    "num_scheduler_steps": Rule(_ONE, "a schedule for each iteration"),
    "scheduler_delay_factor": Rule((0,), "no wait before a prompt is scheduled"),
    "preemption_mode": Rule(("recompute",), "preemption by recomputation, as vLLM v1 does"),
    "kv_sharing_fast_prefill": Rule(_NO, "prompts that run all layers"),
    "load_format": Rule(
        ("auto", "hf", "pt", "safetensors", "npcache", "dummy", "tensorizer", "runai_streamer", "mistral",
         "runai_streamer_sharded", "sharded_state", "fastsafetensors", "instanttensor"),
        "weights that are served as they were stored: what is quantized while it is loaded is not modelled",
    ),
    **dict.fromkeys(
        ("device", "device_type"), Rule(("auto", "cuda", "cuda:0"), "a run on the card whose kernels were measured")
    ),
    "hf_overrides": Rule((), "the model's own shape: another one would need tables of its own"),
    "runner": Rule(("auto", "generate"), "a model that generates text"),
    "runner_type": Rule(("auto", "generate"), "a model that generates text"),
    "task": Rule(("auto", "generate"), "a model that generates text"),
    "convert": Rule(("auto", "none"), "a model that generates text"),
}  # fmt: skip
NAMED = {
    "sliding_window": Rule((), "attention over a window: KV and times are those of the whole context here"),
    "model_impl": Rule(("auto", "vllm"), "another implementation of the model: the tables may be of vLLM's own"),
    "attention_backend": Rule(("auto",), "attention of a named kernel: the tables must be of the same one"),
    "logits_processors": Rule((), "processors of logits: what they take is not modelled"),
    "logits_processor_pattern": Rule((), "processors of logits: what they take is not modelled"),
    "worker_cls": Rule(
        ("auto", "vllm.v1.worker.gpu_worker.worker"), "a worker of its own: what it does is not modelled"
    ),
    "worker_extension_cls": Rule((), "an extension of the worker: what it does is not modelled"),
    "additional_config": Rule((), "settings of a platform: what they do is not modelled"),
    "override_attention_dtype": Rule(("auto",), "attention in a type of its own: the tables must be of the same one"),
    "performance_mode": Rule(("balanced",), "captured sizes and kernels of this mode: those of the default are used"),
    "stream_interval": Rule(_ONE, "tokens that are sent several at once: here each is told when it is computed"),
    "async_engine": Rule((True,), "an engine that blocks: gaps between iterations are those that are estimated"),
}
DOES_NOT_MATTER = {
    "it is done before the first request": (
        "download_dir safetensors_load_strategy model_loader_extra_config ignore_patterns config_format "
        "hf_config_path revision code_revision tokenizer_revision hf_token trust_remote_code use_tqdm_on_load "
        "pt_load_map_location max_parallel_loading_workers allow_deprecated_quantization enable_sleep_mode "
        "enable_ep_weight_filter skip_mm_profiling model_weights weights"
    ),
    "it is about text and interfaces, outside of the iterations": (
        "tokenizer tokenizer_mode skip_tokenizer_init served_model_name tokenizer_pool_size tokenizer_pool_type "
        "tokenizer_pool_extra_config enable_prompt_embeds generation_config override_generation_config max_logprobs "
        "logprobs_mode guided_decoding_backend guided_decoding_disable_fallback "
        "guided_decoding_disable_any_whitespace guided_decoding_disable_additional_properties "
        "structured_outputs_config reasoning_parser reasoning_parser_plugin allowed_local_media_path "
        "allowed_media_domains io_processor_plugin pooler_config override_pooler_config tokens_only "
        "spec_target_max_model_len seed"
    ),
    "it is about what is logged": (
        "disable_log_stats disable_log_requests enable_log_requests aggregate_engine_logging "
        "show_hidden_metrics_for_version otlp_traces_endpoint collect_detailed_traces kv_cache_metrics "
        "kv_cache_metrics_sample cudagraph_metrics enable_layerwise_nvtx_tracing enable_mfu_metrics "
        "enable_logging_iteration_details enable_mm_processor_stats kv_events_config profiler_config "
        "ray_workers_use_nsight calculate_kv_scales instance_id"
    ),
    "it is about addresses, ranks and processes": (
        "distributed_executor_backend master_addr master_port node_rank rank world_size data_parallel_rank "
        "data_parallel_rank_local data_parallel_start_rank data_parallel_address data_parallel_rpc_port "
        "data_parallel_master_ip data_parallel_master_port data_parallel_backend data_parallel_external_lb "
        "data_parallel_hybrid_lb sd_worker_cls ray_runtime_env placement_group numa_bind numa_bind_nodes "
        "numa_bind_cpus assigned_physical_gpu_ids distributed_timeout_seconds cpu_distributed_timeout_seconds "
        "enable_fault_tolerance engine_recovery_timeout internal_fault_report_port external_fault_notify_port "
        "gloo_comm_timeout shutdown_on_fault_tolerance_failure fault_tolerance_config weight_transfer_config "
        "fail_on_environ_validation"
    ),
    "it counts only beside what is refused": (
        "max_loras max_lora_rank max_cpu_loras lora_dtype lora_extra_vocab_size fully_sharded_loras "
        "long_lora_scaling_factors enable_lora_bias enable_tower_connector_lora specialize_active_lora "
        "kv_offloading_backend eplb_config num_redundant_experts eplb_window_size eplb_step_interval "
        "eplb_log_balancedness expert_placement_strategy all2all_backend dbo_decode_token_threshold "
        "dbo_prefill_token_threshold "
        "disable_nccl_for_dp_synchronization dcp_kv_cache_interleave_size cp_kv_cache_interleave_size "
        "dcp_comm_backend cpu_offload_params offload_backend offload_num_in_group offload_prefetch_step offload_params "
        "max_long_partial_prefills mamba_cache_dtype mamba_ssm_cache_dtype mamba_block_size "
        "mamba_cache_mode mamba_page_size_padded limit_mm_per_prompt enable_mm_embeds interleave_mm_strings "
        "media_io_kwargs mm_processor_kwargs disable_mm_preprocessor_cache mm_processor_cache_gb "
        "mm_processor_cache_type mm_shm_cache_max_object_size_mb mm_encoder_only mm_encoder_tp_mode "
        "mm_encoder_attn_backend video_pruning_rate disable_chunked_mm_input multimodal_config is_multimodal_model "
        "max_num_encoder_input_tokens encoder_cache_size is_encoder_decoder enable_return_routed_experts "
        "prefix_caching_hash_algo prefix_match_unit prefix_cache_retention_interval"
    ),
    "vLLM v1 does not read it": "swap_space use_v2_block_manager max_seq_len_to_capture disable_async_output_proc",
    "it changes nothing for models with full attention whose prompts share nothing": (
        "disable_sliding_window disable_cascade_attn disable_hybrid_kv_cache_manager is_attention_free "
        "rope_scaling rope_theta"
    ),
    "all-reduces are priced by fidelity.link": "disable_custom_all_reduce",
    "it follows from others": (
        "hf_config hf_text_config hf_image_processor_config encoder_config model_arch_config architecture convert_type "
        "original_max_model_len max_num_scheduled_tokens world_size_across_dp data_parallel_index "
        "num_kv_tokens num_cpu_blocks user_specified_block_size "
        "user_specified_mamba_block_size kv_cache_layout effective_attention_block_size kv_cache_size_tokens "
        "kv_cache_max_concurrency swap_space_bytes attn_group_size scheduler_reserve_full_isl"
    ),
}
# Sections of resolved_config that are read, or refused as a whole, or ignored for the reason given.
_WHOLE = ("quant_config", "lora_config", "speculative_config", "kv_transfer_config", "ec_transfer_config",
          "diffusion_config", "additional_config", "kv_events_config", "weight_transfer_config", "eplb_config",
          "profiler_config", "structured_outputs_config", "multimodal_config", "pooler_config")  # fmt: skip
_LEFT = {
    "load_config": "it is done before the first request", "device_config": "all but the device is about processes",
    "observability_config": "it is about what is logged", "decoding_config": "it is about text",
    "reasoning_config": "it is about text", "prompt_adapter_config": "it counts only beside what is refused",
    "mamba_config": "it counts only beside what is refused", "ec_manager_config": "it is about encoders",
    "compilation_config": "tables hold kernels as they were launched, one by one",
    "kernel_config": "tables hold kernels as they were launched, one by one",
    "attention_config": "tables hold kernels as they were launched, one by one",
}  # fmt: skip
_OTHER_NAMES = {
    "cache_config.cache_dtype": "kv_cache_dtype", "scheduler_config.policy": "scheduling_policy",
    "attention_config.backend": "attention_backend", "chunked_prefill_enabled": "enable_chunked_prefill",
    "cuda_graph_sizes": "cudagraph_capture_sizes", "seed_everything": "seed",
    "compilation_config.use_cudagraph": "use_cudagraph",
    "engine_kwargs.O": "optimization_level",
}  # fmt: skip
# Sections with kernels that may differ from the tables': what the engine resolved there is reported like settings.
_OF_KERNELS = ("compilation_config", "kernel_config", "attention_config")
# A config inside a section is logged as its Python repr, such as UVAOffloadConfig(cpu_offload_gb=0).
_OBJECT = re.compile(r"[A-Z]\w*\(.*\)")
_FIELD = re.compile(r"(\w+)=(True|False|None|'[^']*'|-?\d+(?:\.\d+)?\b)")
# Levels of compilation, called modes since 0.11. Below the last one no graph can be captured piece by piece.
_MODES = {"none": 0, "stock_torch_compile": 1, "dynamo_trace_once": 2, "vllm_compile": 3}
_PIECEWISE = 3
# Names in ignored sections that do not change what is computed.
_ASKED_OF_NO_MATTER = _words(
    "cache_dir local_cache_dir debug_dump_path compile_sizes compile_cache_save_format traced_files "
    "cudagraph_num_of_warmups cudagraph_copy_inputs bs_to_padded_graph_size max_capture_size full_cuda_graph "
    "use_inductor splitting_ops mode level"
)
_RESOLVED_OF_NO_MATTER = _words(
    "compile_mm_encoder cudagraph_mm_encoder encoder_cudagraph_token_budgets compile_ranges_split_points "
    "encoder_cudagraph_max_vision_items_per_batch encoder_cudagraph_max_frames_per_batch compile_ranges_endpoints "
    "inductor_compile_config inductor_passes cudagraph_specialize_lora use_inductor_graph_partition "
    "dynamic_shapes_config fast_moe_cold_start static_all_moe_layers enabled_custom_ops disabled_custom_ops "
    "compilation_time static_forward_context evaluate_guards ir_enable_torch_wrap ir_op_priority type "
    "enable_flashinfer_autotune disable_flashinfer_prefill eliminate_noops assume_32_bit_indexing"
)
_USUAL = {
    "backend": ("inductor",), "custom_ops": ("none",), "moe_backend": ("auto",), "linear_backend": ("auto",),
    "flash_attn_max_num_splits_for_cuda_graph": (32,),
}  # fmt: skip
_GRAPH_MODES = {
    "0": "none", "1": "piecewise", "2": "full", "[2, 0]": "full_decode_only", "[2, 1]": "full_and_piecewise",
}  # fmt: skip
_OFF = (None, False, 0, "", "auto", "default", "none")
_KNOWN = {name: why for why, names in DOES_NOT_MATTER.items() for name in names.split()}
_FIX = "take another log"


@dataclass(frozen=True, slots=True)
class Said:
    """A setting in one place of the log. It is null only if its name is not known."""

    name: str
    place: str  # engine_kwargs, kv_cache, resolved_config.SECTION
    value: Any

    @property
    def resolved(self) -> bool:
        return not self.place.startswith("engine_kwargs")

    def __str__(self) -> str:
        return f"{shortened(self.value)} in {self.place}"


@dataclass(frozen=True, slots=True)
class Engine:
    """The settings by name, and sentences on those that the simulation does not follow."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    @classmethod
    def of(cls, meta: Mapping[str, Any]) -> Engine:
        """Read the settings. Raises UserError if two places contradict each other, or a setting cannot be followed."""
        places: dict[str, list[Said]] = {}
        for said in _said(meta):
            places.setdefault(said.name, []).append(said)
        notices: list[str] = []
        unknown: list[Said] = []
        off: list[Said] = []
        for name, all_said in places.items():
            if name == "model":
                _check_model(meta, all_said)
            elif name in REFUSED:
                _refuse(all_said, REFUSED[name])
            elif name in HONOURED:
                notices += _compared(all_said)
            elif name in NAMED:
                on = [said for said in all_said if not _is_off(said.value, NAMED[name].off)]
                notices += [f"meta.json: {name} is {on[0]}: {NAMED[name].why}."] if on else []
            elif name not in _KNOWN:
                on = [said for said in all_said if not _is_off(said.value, ())]
                unknown += on[:1]
                off += [] if on else all_said[:1]
        notices += [f"meta.json: not known, so not modelled: {_shown(unknown)}."] if unknown else []
        notices += [f"meta.json: off, and not known what else is the default: {_shown(off)}."] if off else []
        settings = {name: _in_force(all_said) for name, all_said in places.items() if name in HONOURED}
        _check_budget(settings.get("max_num_batched_tokens"), places.get("max_num_scheduled_tokens", []))
        return cls(settings, tuple(notices))

    def has(self, name: str) -> bool:
        return name in self.settings

    def value(self, name: str, default: Any = None) -> Any:
        """The value in force; the default if no place has the setting or all are null."""
        return self.settings.get(name, default)

    def whole(self, name: str, least: int, most: int, default: int | None = None) -> int:
        """The value as a whole number. Raises UserError if it is not one, or is missing without a default."""
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            fix = "add it to meta.json" if value is None else "correct the log"
            raise UserError(_key(name), shortened(value), f"a whole number from {least} to {most}", fix)
        return value

    def share(self, name: str, default: float) -> float:
        value = self.value(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise UserError(_key(name), shortened(value), "a number above 0, at most 1", "correct the log")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.value(name, default)
        if not isinstance(value, bool) and value not in (0, 1):
            raise UserError(_key(name), shortened(value), "true or false", "correct the log")
        return bool(value)

    def text(self, name: str, default: str) -> str:
        """The value in lower case, without the `torch.` before types."""
        return str(self.value(name, default)).lower().removeprefix("torch.")


def _shown(several: list[Said]) -> str:
    more = f" and {len(several) - 12} more" if len(several) > 12 else ""
    return ", ".join(f"{said.name} ({said})" for said in several[:12]) + more


def _key(name: str) -> str:
    return f"meta.json: engine_kwargs.{name}"


def _said(meta: Mapping[str, Any]) -> Iterator[Said]:
    yield from _of_section("engine_kwargs", meta["engine_kwargs"])
    yield from _of_section("kv_cache", meta.get("kv_cache") or {})
    for section, values in (meta.get("resolved_config") or {}).items():
        if isinstance(values, str) and _OBJECT.fullmatch(values) and section not in _WHOLE:
            values = _fields_of(values)
        if isinstance(values, Mapping) and section not in _WHOLE:
            yield from _of_section(f"resolved_config.{section}", values)
        elif section not in _LEFT and (values is not None or _is_unknown(section)):
            yield Said(section, "resolved_config", values)


def _of_section(place: str, values: Mapping[str, Any]) -> Iterator[Said]:
    """The settings of one section by their names in EngineArgs; of an ignored section only those that are used."""
    section = place.rpartition(".")[2]
    asked = place.startswith("engine_kwargs")
    for key, value in (_with_graphs(values, asked) if section == "compilation_config" else values).items():
        plain = key.replace("-", "_")
        if plain != plain.strip():
            raise UserError(f"meta.json: {place}", key, "names without blanks around them", "correct the log")
        if plain == "compilation_config" and not isinstance(value, Mapping):
            yield from _of_compilation(place, value)
            continue
        if isinstance(value, Mapping) and (plain in _LEFT or plain == "offload_config" or plain in ("uva", "prefetch")):
            yield from _of_section(f"{place}.{plain}", value)
            continue
        if isinstance(value, str) and _OBJECT.fullmatch(value):
            yield from _of_section(f"{place}.{plain}", _fields_of(value))
            continue
        name = _OTHER_NAMES.get(f"{section}.{plain}", _OTHER_NAMES.get(plain, plain))
        if name == "use_cudagraph":
            name, value = "cudagraph_mode", None if value else "none"
        unlimited = name == "max_model_len" and value in (-1, "auto")
        told = _is_told(place, name, value, asked) and (value is not None or _is_unknown(name))
        if unlimited or not (told or (value is not None and _has_use(name))):
            continue
        yield Said(name, place, value)


def _has_use(name: str) -> bool:
    return name in HONOURED or name in NAMED or name in REFUSED


def _is_unknown(name: str) -> bool:
    return not _has_use(name) and name not in _KNOWN and name not in ("model", *_WHOLE)


def _is_told(place: str, name: str, value: Any, asked: bool) -> bool:
    """Whether a setting without a use is reported.

    In an ignored section these are settings that the user requested, and settings of unusual kernels.
    """
    left = next((part for part in place.split(".") if part in _LEFT), None)
    if left is None:
        return True
    usual = _USUAL.get(name, ())
    if name in _ASKED_OF_NO_MATTER or value in usual or value == list(usual):
        return False
    if asked:
        return value is not None
    if isinstance(value, Mapping):
        return any(_is_told(place, inner, each, asked) for inner, each in value.items())
    return left in _OF_KERNELS and name not in _RESOLVED_OF_NO_MATTER and not _is_off(value, ())


def _fields_of(value: str) -> dict[str, Any]:
    """The fields of a config's Python repr that are numbers, texts, true, false or null."""
    return {name: _plain(text) for name, text in _FIELD.findall(value)}


_CONSTANTS = {"True": True, "False": False, "None": None}


def _plain(text: str) -> bool | str | float | None:
    if text in _CONSTANTS or text.startswith("'"):
        return _CONSTANTS[text] if text in _CONSTANTS else text[1:-1]
    return float(text) if "." in text else int(text)


def _with_graphs(values: Mapping[str, Any], asked: bool) -> dict[str, Any]:
    """A compilation_config. If its mode (or level) leaves no graphs, vLLM overrides the settings of graphs."""
    mode = values.get("mode", values.get("level", _PIECEWISE))
    plain = str(mode).lower().removeprefix("compilationmode.")
    level: int = mode if type(mode) is int else _MODES.get(plain, _PIECEWISE) if mode is not None else _PIECEWISE
    found = {key: value for key, value in values.items() if key not in ("mode", "level")}
    graphs = values.get("cudagraph_mode")
    whole = graphs is not None and (not asked or "piecewise" not in graph_mode(graphs))
    return found if level >= _PIECEWISE or whole else {**found, "cudagraph_mode": "none"}


def _of_compilation(place: str, value: Any) -> Iterator[Said]:
    """A compilation_config that is JSON text, as on a command line, or a level, as until 0.10."""
    name = "compilation_config"
    if type(value) is int:
        if value < _PIECEWISE:  # graphs are captured from this level on
            yield Said("cudagraph_mode", f"{place}.{name}", "none")
        return
    try:
        parsed = parse_json(value) if isinstance(value, str) else value
    except ValueError:
        parsed = value
    if isinstance(parsed, Mapping):
        yield from _of_section(f"{place}.{name}", parsed)
    elif parsed is not None:
        yield Said(name, place, value)


def _check_budget(budget: Any, planned: list[Said]) -> None:
    for said in planned:
        if budget is not None and said.value != budget:
            allowed = f"max_num_batched_tokens, {budget}: a smaller plan than the batch is not modelled"
            raise UserError(f"meta.json: {said.place}.{said.name}", shortened(said.value), allowed, _FIX)


def _is_off(value: Any, off: tuple[Any, ...]) -> bool:
    """Whether the value is one of these; without any, one of the values that usually mean off."""
    if isinstance(value, list | dict):
        return not value
    plain = value.lower().removeprefix("<class '").removesuffix("'>") if isinstance(value, str) else value
    return plain in (*off, "", "none") or (not off and plain in _OFF)


def _refuse(all_said: list[Said], rule: Rule) -> None:
    for said in all_said:
        if not _is_off(said.value, rule.off):
            raise UserError(f"meta.json: {said.place}.{said.name}", shortened(said.value), rule.why, _FIX)


def _compared(all_said: list[Said]) -> list[str]:
    """A sentence if the engine resolved a setting differently and may do so; raises UserError if it may not."""
    given = [said for said in all_said if said.value != "auto" or said.name == "kv_cache_dtype"] or all_said[:1]
    first, notices = given[0], []
    for other in given[1:]:
        if _alike(first.name, first.value) == _alike(other.name, other.value):
            continue
        if first.resolved or first.name not in _RESOLVED_FREELY:
            told = f"{first}, {other}"
            raise UserError(f"meta.json: {first.name}", told, "the same in all places", "correct the log")
        notices.append(f"meta.json: {first.name} is {first} and {other}: the latter, as resolved, counts.")
        first = other
    return notices


def _alike(name: str, value: Any) -> Any:
    """A value in the form in which two places are compared: text in lower case, types by one name."""
    if name == "cudagraph_mode":
        return graph_mode(value)
    if not isinstance(value, str):
        return value
    plain = value.lower().removeprefix("torch.")
    return {"half": "float16", "float": "float32"}.get(plain, plain) if name == "dtype" else plain


def graph_mode(value: Any) -> str:
    """A CUDAGraphMode by its name, whether the log has its name or its value; raises UserError for another."""
    plain = str(value).lower().removeprefix("cudagraphmode.")
    found = _GRAPH_MODES.get(plain, plain)
    if found not in _GRAPH_MODES.values():
        allowed = f"one of {', '.join(_GRAPH_MODES.values())}"
        raise UserError(_key("cudagraph_mode"), shortened(value), allowed, "correct the log")
    return found


def _check_model(meta: Mapping[str, Any], all_said: list[Said]) -> None:
    """Check that both places name one model. Paths may differ except for the last part, since copies are common."""
    asked = [str(said.value) for said in all_said if not said.resolved]
    names = {name.rstrip("/").rpartition("/")[2].lower() for name in (str(meta["model"]), *asked)}
    if len(names) > 1:
        told = f"{meta['model']}; in engine_kwargs {', '.join(asked)}"
        raise UserError("meta.json: model", told, "one model", "correct the log")


def _in_force(all_said: list[Said]) -> Any:
    return next((said.value for said in reversed(all_said) if said.resolved), all_said[0].value)
