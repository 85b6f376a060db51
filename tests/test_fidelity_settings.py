"""Settings in a vLLM log: honoured to the right value, refused, or named; and two places that contradict each other."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from command_line import CommandLine
from helios_sim.errors import UserError
from helios_sim.profile.catalog import activation_reserve_bytes, published_model
from helios_sim.study.modes import FidelityConfig
from helios_sim.validate import engine
from helios_sim.validate.logs import read_log
from helios_sim.validate.replay import run_once
from helios_sim.validate.setup import ENGINE_BYTES, Setup, set_up
from vllm_log import change_meta, change_request, read_requests, write_log, write_requests

DEFAULT_BLOCKS = 107_339
TOKEN_BYTES = 24 * 2 * 2 * 64 * 2  # of Qwen2.5-0.5B: layers, K and V, heads, width, bytes
CARD_BYTES = 24_564 * 2**20


def setup_of(folder: Path, engine: dict | None = None, **others: object) -> Setup:
    return set_up(read_log(change_meta(folder, engine, **others)), FidelityConfig())


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return write_log(tmp_path / "log")


# --- Honoured ---------------------------------------------------------------------------------------------------------


def computed(value_bytes: int, kv_bytes: int, share: float = 0.9) -> int:
    from dataclasses import replace

    model = replace(
        published_model("Qwen/Qwen2.5-0.5B"), weight_bytes_per_value=value_bytes, kv_bytes_per_value=kv_bytes
    )
    pool = int(CARD_BYTES * share) - model.weight_bytes(24) - activation_reserve_bytes(model, 256, 8) - ENGINE_BYTES
    return pool // (16 * TOKEN_BYTES // 2 * kv_bytes) - 1


@pytest.mark.parametrize(
    ("engine", "blocks"),
    [
        ({}, DEFAULT_BLOCKS),
        ({"dtype": "float16"}, DEFAULT_BLOCKS),
        ({"dtype": "auto"}, DEFAULT_BLOCKS),
        ({"dtype": "torch.bfloat16"}, DEFAULT_BLOCKS),
        ({"dtype": "float32"}, computed(4, 4)),
        ({"kv_cache_dtype": "fp8"}, computed(2, 1)),
        ({"dtype": "float32", "kv_cache_dtype": "bfloat16"}, computed(4, 2)),
        ({"gpu_memory_utilization": 0.5}, computed(2, 2, 0.5)),
        ({"kv_cache_memory_bytes": 2**27}, 682 - 1),
        ({"kv_cache_memory_bytes": 2**27, "dtype": "float32"}, 341 - 1),
        ({"kv_cache_memory_bytes": 2**27, "block_size": 32}, 341 - 1),
        ({"num_gpu_blocks_override": 500}, 499),
        ({"num-gpu-blocks-override": 500}, 499),
    ],
)
def test_kv_blocks_follow_the_settings(log: Path, engine: dict, blocks: int) -> None:
    assert setup_of(log, engine).kv_blocks == blocks


def test_the_right_values_in_round_numbers() -> None:
    assert computed(2, 2) == DEFAULT_BLOCKS
    assert computed(4, 4) == pytest.approx(DEFAULT_BLOCKS / 2, rel=0.06)  # about half
    assert computed(2, 1) == pytest.approx(DEFAULT_BLOCKS * 2, rel=0.01)


@pytest.mark.parametrize(
    ("engine", "attribute", "value"),
    [
        ({"block_size": 32}, "block_tokens", 32), ({"max_num_seqs": 5}, "max_running_requests", 5),
        ({"max_num_batched_tokens": 99}, "max_batch_tokens", 99), ({"async_scheduling": False}, "schedule_ahead", 0),
        ({}, "schedule_ahead", 1), ({"enable_prefix_caching": False}, "prefix_caching", False),
        ({"enable_chunked_prefill": False, "max_num_batched_tokens": 400}, "whole_prompts", True),
        ({}, "prefix_caching", True), ({"scheduling_policy": "priority"}, "order", "fcfs"),
    ],
)  # fmt: skip
def test_rules_follow_the_settings(log: Path, engine: dict, attribute: str, value: object) -> None:
    assert getattr(setup_of(log, engine), attribute) == value


@pytest.mark.parametrize(
    ("engine", "sizes"),
    [
        ({}, (1, 2, 4, 8, 16)), ({"enforce_eager": True}, None), ({"cudagraph_capture_sizes": [4, 1]}, (1, 4)),
        ({"max_cudagraph_capture_size": 4}, (1, 2, 4)), ({"compilation_config": {"cudagraph_mode": "NONE"}}, None),
        ({"compilation_config": {"cudagraph_capture_sizes": [2]}}, (2,)), ({"optimization_level": 0}, None),
    ],
)  # fmt: skip
def test_captured_graphs_follow_the_settings(log: Path, engine: dict, sizes: tuple[int, ...] | None) -> None:
    assert setup_of(log, engine).profile.runtime.graph_batch_sizes == sizes


def test_without_prefix_caching_a_preempted_request_is_computed_anew(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", blocks=40, output=90, requests=30)
    means = []
    for on in (None, True, False):
        log = read_log(change_meta(folder, {"enable_prefix_caching": on}))
        times = run_once(log, set_up(log, FidelityConfig())).times
        means.append((times.last_ns - times.queued_ns).mean())
    assert means[0] == means[1]  # on is vLLM's default
    assert means[2] > 1.005 * means[1]


def test_requests_of_lower_numbers_go_first(tmp_path: Path) -> None:
    folder = write_log(tmp_path / "log", requests=30, output=60)
    change_meta(folder, {"max_num_seqs": 2})
    (folder / "timeseries.csv").unlink()
    plain = read_log(folder)
    rows = [{**row, "priority": -i} for i, row in enumerate(read_requests(folder))]  # the last to come is the first
    write_requests(folder, rows)
    ignored = read_log(folder)
    assert any("scheduling_policy is fcfs" in notice for notice in set_up(ignored, FidelityConfig()).notices)
    change_meta(folder, {"scheduling_policy": "priority"})
    served = []
    for log in (plain, ignored, read_log(folder)):
        setup = set_up(log, FidelityConfig())
        served.append((setup.order, run_once(log, setup).times.scheduled_ns))
    assert [order for order, _ in served] == ["fcfs", "fcfs", "priority"]
    assert np.array_equal(served[0][1], served[1][1])
    assert np.argmax(served[0][1]) == 29
    assert served[2][1][29] < served[0][1][29]
    assert np.argmax(served[2][1]) < 15


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("quantization", "fp8"), ("quantization", "awq_marlin"), ("cpu_offload_gb", 4), ("cpu_offload_gb", 1),
        ("kv_offloading_size", 8.0), ("kv_transfer_config", {"kv_connector": "NixlConnector"}),
        ("speculative_config", {"method": "ngram", "num_speculative_tokens": 3}), ("speculative_model", "x/y"),
        ("num_speculative_tokens", 2), ("enable_chunked_prefill", "no"), ("long_prefill_token_threshold", 512),
        ("max_num_partial_prefills", 2), ("pipeline_parallel_size", 2), ("data_parallel_size", 4),
        ("decode_context_parallel_size", 2), ("prefill_context_parallel_size", 2), ("nnodes", 2),
        ("enable_expert_parallel", True), ("enable_eplb", True), ("enable_dbo", True), ("enable_lora", True),
        ("lora_modules", ["a=b"]), ("scheduler_cls", "mine.Scheduler"), ("hf_overrides", {"num_hidden_layers": 1}),
        ("runner", "pooling"), ("scheduling_policy", "sjf"), ("kv_cache_dtype", "nvfp4"), ("dtype", "int8"),
        ("num_scheduler_steps", 8), ("preemption_mode", "swap"), ("kv_sharing_fast_prefill", True),
        ("max_num_seqs", True), ("max_num_seqs", 1e30), ("max_num_seqs", "128"), ("max_num_batched_tokens", 0),
        ("gpu_memory_utilization", 90), ("kv_cache_memory_bytes", -1), ("num_gpu_blocks_override", 1),
        ("block_size", 0), ("enforce_eager", "yes"), ("cudagraph_capture_sizes", [0]),
        ("cudagraph_capture_sizes", 4), ("cudagraph_mode", "HALF"), ("max_model_len", 10),
        ("load_format", "bitsandbytes"), ("load_format", "gguf"), ("device", "cpu"), ("max_num_scheduled_tokens", 64),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused(log: Path, name: str, value: object) -> None:
    with pytest.raises(UserError, match=r"meta\.json.*Fix"):
        setup_of(log, {name: value})


@pytest.mark.parametrize(
    ("section", "name", "value"),
    [
        ("parallel_config", "data_parallel_size", 2), ("parallel_config", "pipeline_parallel_size", 2),
        ("parallel_config", "tensor_parallel_size", 2), ("parallel_config", "enable_expert_parallel", True),
        ("model_config", "quantization", "fp8"), ("scheduler_config", "num_lookahead_slots", 4),
        ("scheduler_config", "long_prefill_token_threshold", 100), ("cache_config", "cpu_offload_gb", 4),
        ("offload_config", "uva", {"cpu_offload_gb": 4}), ("scheduler_config", "policy", "sjf"),
        ("offload_config", "uva", "UVAOffloadConfig(cpu_offload_gb=4)"),
        ("cache_config", "cache_dtype", "turboquant_4bit_nc"), ("load_config", "load_format", "bitsandbytes"),
        ("device_config", "device", "tpu"), ("scheduler_config", "max_num_scheduled_tokens", 64),
    ],
)  # fmt: skip
def test_what_the_engine_resolved_is_refused_too(log: Path, section: str, name: str, value: object) -> None:
    with pytest.raises(UserError, match=r"meta\.json"):
        setup_of(log, resolved_config={section: {name: value}})


@pytest.mark.parametrize("section", ["quant_config", "lora_config", "speculative_config", "kv_transfer_config"])
def test_a_section_that_should_be_empty_is_refused(log: Path, section: str) -> None:
    assert setup_of(log, resolved_config={section: None}).kv_blocks == DEFAULT_BLOCKS
    for value in ({"method": "x"}, "<Fp8Config>"):
        with pytest.raises(UserError, match=section):
            setup_of(log, resolved_config={section: value})


def test_prompts_in_one_piece_must_fit_into_the_budget(log: Path) -> None:
    with pytest.raises(UserError, match="max_num_batched_tokens=256: at least"):
        setup_of(log, {"enable_chunked_prefill": False})
    with pytest.raises(UserError, match="at least 32768"):
        setup_of(log, {"max_num_batched_tokens": 8192, "max_model_len": 32_768})


def test_an_older_engine_is_refused(log: Path) -> None:
    with pytest.raises(UserError, match="engine v0"):
        setup_of(log, vllm_version="0.6.3.post1")


def test_a_setting_that_does_not_count_is_refused(log: Path) -> None:
    change_meta(log, {"kv_cache_memory_bytes": 2**27})
    with pytest.raises(UserError, match=r"fidelity\.memory_utilisation"):
        set_up(read_log(log), FidelityConfig(memory_utilisation=0.5))


# --- Named ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({}, "Prefix caching was on, and prefixes that prompts share are computed anew here: how much that is"),
        ({"enable_prefix_caching": False}, "Prefix caching was off"),
        ({"dtype": "float32"}, "Kernel times were measured in bf16, the run is in float32"),
        ({"kv_cache_dtype": "fp8_e4m3"}, "the KV cache was in fp8_e4m3"),
        ({"attention_backend": "FLASHINFER"}, "attention_backend is FLASHINFER in engine_kwargs"),
        ({"attention_config": {"backend": "FLASHINFER"}}, "attention_backend is FLASHINFER"),
        ({"stream_interval": 10}, "stream_interval is 10 in engine_kwargs: tokens that are sent several"),
        ({"model_impl": "transformers"}, "model_impl is transformers"),
        ({"logits_processors": ["a.B"]}, "logits_processors is"),
        ({"scheduling_policy": "priority"}, "scheduling_policy is priority, but requests.jsonl has no priority"),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, "cudagraph_mode is PIECEWISE"),
        ({"warp_factor": 9}, "not known, so not modelled: warp_factor (9 in engine_kwargs)"),
    ],
)  # fmt: skip
def test_what_is_not_modelled_is_named(log: Path, engine: dict, said: str) -> None:
    assert any(said in notice for notice in setup_of(log, engine).notices)


def test_what_prefix_caching_served_is_said_where_the_log_has_it(log: Path) -> None:
    header = "t,prompt_throughput,prompt_compute_throughput,prompt_cached_throughput,running,waiting,preempted"
    rows = [f"{t},100,90,10,1,0,{t % 2}" for t in range(1, 9)]
    (log / "timeseries.csv").write_text("\n".join([header, *rows]) + "\n")
    assert any("it served 10.0% of the prompt tokens" in notice for notice in setup_of(log).notices)
    series = read_log(log).series
    assert series is not None
    assert series.preemptions == 4
    with pytest.raises(UserError, match=r"timeseries\.csv, row 1.*prefix caching is off"):
        setup_of(log, {"enable_prefix_caching": False})


def test_what_each_request_found_in_the_cache_is_said(log: Path) -> None:
    rows = read_requests(log)
    write_requests(log, [{**row, "num_cached_tokens": row["input_toks"] // 2} for row in rows])
    share = sum(row["input_toks"] // 2 for row in rows) / sum(row["input_toks"] for row in rows)
    assert any(f"it served {share:.1%} of the prompt tokens" in notice for notice in setup_of(log).notices)
    with pytest.raises(UserError, match=r"requests\.jsonl: num_cached_tokens.*prefix caching is off"):
        setup_of(log, {"enable_prefix_caching": False})
    change_meta(log, {"enable_prefix_caching": True})
    change_request(log, 4, num_cached_tokens=1000)
    with pytest.raises(UserError, match=r"line 4.*no more cached than there are"):
        read_log(log)


def test_requests_without_a_name_are_not_taken_for_one(log: Path) -> None:
    write_requests(log, [{**row, "request_id": None} for row in read_requests(log)])
    assert len(read_log(log)) == len(read_requests(log))


def test_keys_of_requests_that_are_not_read_are_named(log: Path) -> None:
    change_request(log, 3, lora_name="a", spec_tokens=4)
    assert "requests.jsonl: not read: lora_name, spec_tokens." in set_up(read_log(log), FidelityConfig()).notices


@pytest.mark.slow
def test_notices_reach_the_report_and_the_terminal(command: CommandLine, log: Path, tmp_path: Path) -> None:
    change_meta(log, {"warp_factor": 9, "dtype": "float32"})
    said = command("+experiment=fidelity_vllm", f"fidelity.folder={log}", "fidelity.load_factors=[1.0]")
    page = (tmp_path / "out" / "report.html").read_text()
    for text in ("not modelled: warp_factor", "measured in bf16, the run is in float32", "Prefix caching was on"):
        assert text in said.out
        assert text in page
    assert f"{computed(4, 4):,} of 16 tokens" in page
    # Times in bf16 are no share of what the card needs for float32.
    assert said.summary["arms"]["simulated"]["metrics"]["roofline_fraction"] is None


@pytest.mark.slow
def test_kernels_quicker_than_the_card_are_refused(command: CommandLine, log: Path) -> None:
    (log / "profile" / "skew.csv").unlink()
    for table in (log / "profile").glob("*.csv"):
        header, *rows = table.read_text().splitlines()
        place = header.split(",").index("time_us") if "time_us" in header.split(",") else None
        if place is not None:
            cells = [row.split(",") for row in rows]
            for row in cells:  # but at the most rows, where the unit of a table is compared with the card
                kept = row[1] == {"dense": "512", "per_sequence": "64"}.get(table.stem)
                row[place] = str(float(row[place]) / (1 if kept else 1000))
            table.write_text("\n".join([header, *map(",".join, cells)]) + "\n")
    words = ("fidelity.load_factors=[1.0]", "fidelity.hardware=a100-80gb", "fidelity.estimate=false")
    said = command("+experiment=fidelity_vllm", f"fidelity.folder={log}", "pictures=false", *words)
    assert said.status == 1
    assert "at most 1 of what the card can do" in said.err


# EngineArgs of vLLM 0.19 at their defaults, and sections as an engine resolves them: nothing to refuse or to name.
DEFAULTS = {
    "model": "Qwen/Qwen2.5-0.5B", "served_model_name": None, "tokenizer": None, "runner": "auto", "convert": "auto",
    "skip_tokenizer_init": False, "enable_prompt_embeds": False, "tokenizer_mode": "auto", "trust_remote_code": False,
    "load_format": "auto", "config_format": "auto", "dtype": "auto", "kv_cache_dtype": "auto", "seed": 0,
    "max_model_len": None, "cudagraph_capture_sizes": None, "max_cudagraph_capture_size": None,
    "distributed_executor_backend": None, "pipeline_parallel_size": 1, "master_addr": "127.0.0.1",
    "master_port": 29501, "nnodes": 1, "node_rank": 0, "tensor_parallel_size": 1, "prefill_context_parallel_size": 1,
    "decode_context_parallel_size": 1, "dcp_kv_cache_interleave_size": 1, "cp_kv_cache_interleave_size": 1,
    "data_parallel_size": 1, "data_parallel_rank": None, "data_parallel_size_local": None,
    "data_parallel_hybrid_lb": False, "data_parallel_external_lb": False, "data_parallel_backend": "mp",
    "enable_expert_parallel": False, "all2all_backend": "allgather_reducescatter", "enable_dbo": False,
    "ubatch_size": 0, "dbo_decode_token_threshold": 32, "dbo_prefill_token_threshold": 512,
    "eplb_config": {"window_size": 1000, "step_interval": 3000}, "enable_eplb": False,
    "expert_placement_strategy": "linear", "block_size": None, "enable_prefix_caching": None,
    "prefix_caching_hash_algo": "sha256", "disable_sliding_window": False, "disable_cascade_attn": False,
    "swap_space": 4, "cpu_offload_gb": 0, "offload_backend": "auto", "offload_group_size": 0,
    "offload_num_in_group": 1, "offload_prefetch_step": 1, "gpu_memory_utilization": 0.9,
    "kv_cache_memory_bytes": None, "max_num_partial_prefills": 1, "max_long_partial_prefills": 1,
    "long_prefill_token_threshold": 0, "max_logprobs": 20, "logprobs_mode": "raw_logprobs", "disable_log_stats": False,
    "hf_overrides": {}, "quantization": None, "enforce_eager": False, "disable_custom_all_reduce": False,
    "limit_mm_per_prompt": {}, "mm_processor_cache_gb": 4, "mm_processor_cache_type": "lru",
    "mm_encoder_tp_mode": "weights", "enable_lora": False, "max_loras": 1, "max_lora_rank": 16, "lora_dtype": "auto",
    "num_gpu_blocks_override": None, "ignore_patterns": "original/**/*", "enable_chunked_prefill": None,
    "disable_hybrid_kv_cache_manager": None, "structured_outputs_config": {"backend": "auto"},
    "reasoning_parser": "", "speculative_config": None, "kv_cache_metrics": False, "kv_cache_metrics_sample": 0.01,
    "scheduling_policy": "fcfs", "scheduler_cls": None, "pooler_config": None,
    "compilation_config": {"mode": 3, "backend": "inductor", "cudagraph_mode": "FULL_AND_PIECEWISE"},
    "attention_config": {"backend": None}, "worker_cls": "auto", "worker_extension_cls": "", "profiler_config": None,
    "kv_transfer_config": None, "kv_events_config": None, "generation_config": "auto", "enable_sleep_mode": False,
    "model_impl": "auto", "override_attention_dtype": None, "attention_backend": None, "calculate_kv_scales": False,
    "mamba_cache_dtype": "auto", "mamba_cache_mode": "none", "kv_offloading_size": None,
    "kv_offloading_backend": "native", "additional_config": {}, "use_tqdm_on_load": True,
    "pt_load_map_location": "cpu", "logits_processors": None, "async_scheduling": None, "stream_interval": 1,
    "kv_sharing_fast_prefill": False, "optimization_level": 2, "performance_mode": "balanced", "tokens_only": False,
}  # fmt: skip
RESOLVED = {
    "cache_config": {"block_size": 16, "cache_dtype": "auto", "enable_prefix_caching": True, "num_gpu_blocks": 4000,
                     "gpu_memory_utilization": 0.9, "sliding_window": None, "num_cpu_blocks": None, "swap_space": 4},
    "model_config": {"model": "/cache/snapshots/abc", "dtype": "torch.bfloat16", "max_model_len": 32768,
                     "quantization": None, "enforce_eager": False, "hf_config": "<Qwen2Config>"},
    "scheduler_config": {"max_num_seqs": 8, "max_num_batched_tokens": 256, "policy": "fcfs", "async_scheduling": True,
                         "enable_chunked_prefill": True, "runner_type": "generate", "encoder_cache_size": 256,
                         "scheduler_cls": "<class 'vllm.v1.core.sched.async_scheduler.AsyncScheduler'>"},
    "parallel_config": {"tensor_parallel_size": 1, "data_parallel_size": 1, "data_parallel_size_local": 1,
                        "world_size": 1, "worker_cls": "vllm.v1.worker.gpu_worker.Worker", "rank": 0,
                        "is_moe_model": False, "data_parallel_rpc_port": 29550},
    "compilation_config": {"mode": 3, "cudagraph_mode": [2, 1], "cudagraph_capture_sizes": [1, 2, 4, 8, 16],
                           "splitting_ops": ["vllm::unified_attention"], "max_cudagraph_capture_size": 16},
    "offload_config": {"offload_backend": "auto", "uva": "UVAOffloadConfig(cpu_offload_gb=0, cpu_offload_params=set())",
                       "prefetch": {"offload_group_size": 0, "offload_num_in_group": 1}},
    "device_config": {"device": "cuda"}, "load_config": {"load_format": "auto"}, "quant_config": None,
    "attention_config": {"backend": None, "flash_attn_version": None}, "kernel_config": {"moe_backend": "auto"},
    "observability_config": {"kv_cache_metrics_sample": 0.01}, "instance_id": "ab12c", "optimization_level": 2,
    "lora_config": None, "speculative_config": None, "additional_config": {}, "performance_mode": "balanced",
}  # fmt: skip


@pytest.mark.parametrize(
    ("compiled", "graphs"),
    [
        (0, False), (2, False), (3, True), ('{"cudagraph_mode": "NONE"}', False), ('{"level": 3}', True),
        ({"level": 0}, False), ({"level": 0, "cudagraph_mode": "FULL"}, True), (None, True),
        ({"mode": 0}, False), ({"mode": "NONE"}, False), ({"mode": "CompilationMode.VLLM_COMPILE"}, True),
        ({"mode": 1, "cudagraph_mode": "FULL_AND_PIECEWISE"}, False), ({"mode": None}, True),
        ({"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"}, True),
    ],
)  # fmt: skip
def test_a_level_of_compilation_says_whether_there_are_graphs(log: Path, compiled: object, graphs: bool) -> None:
    setup = setup_of(log, {"compilation_config": compiled})
    assert (setup.profile.runtime.graph_batch_sizes is not None) == graphs


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ({"compilation_config": {"pass_config": {"fuse_attn_quant": True}}}, "pass_config ("),
        ({"compilation_config": {"backend": "eager"}}, "backend (eager"),
        ({"attention_config": {"flash_attn_version": 2}}, "flash_attn_version (2"),
        ({"kernel_config": {"moe_backend": "triton"}}, "moe_backend (triton"),
    ],
)  # fmt: skip
def test_what_is_asked_of_a_section_that_is_left_is_named(log: Path, engine: dict, said: str) -> None:
    assert any(said in notice for notice in setup_of(log, engine).notices)


def test_fields_of_a_config_in_a_text_are_looked_at(log: Path) -> None:
    resolved = {"scheduler_config": {"extra": "Throttle(max_waiting=4, rule='late', on=True, off=False, least=0)"}}
    said = " ".join(setup_of(log, {}, resolved_config=resolved).notices)
    known, _, off = said.partition("off, and not known what else is the default: ")
    for text in ("max_waiting (4", "rule (late", "on (True"):
        assert text in known
    for text in ("off (False", "least (0"):
        assert text in off


def test_a_compilation_that_cannot_be_read_is_named(log: Path) -> None:
    assert any("compilation_config (fast" in notice for notice in setup_of(log, {"compilation_config": "fast"}).notices)


def test_what_is_said_of_a_device_and_of_tables_and_not_read_is_named(log: Path) -> None:
    with (log / "profile" / "meta.yaml").open("a") as file:
        file.write("engine_effective: {block_size: 32, attention_backend: TRITON}\nclocks: locked\n")
    hardware = {"device_name": "NVIDIA GeForce RTX 4090", "driver_version": "580", "power_limit_w": 300, "mig": False}
    said = " ".join(setup_of(log, {"attention_backend": "FLASH_ATTN"}, hardware=hardware).notices)
    assert "hardware: not read: power_limit_w (300)." in said
    assert "measured with block_size 32, the run had 16" in said
    assert "attention_backend is FLASH_ATTN" in said
    assert "measured with attention_backend TRITON." in said
    assert "profile/meta.yaml: not read: clocks (locked)." in said


def test_a_version_that_yaml_takes_for_a_number_is_refused(log: Path) -> None:
    with (log / "profile" / "meta.yaml").open("a") as file:
        file.write("vllm_version: 0.10\n")
    with pytest.raises(UserError, match=r"vllm_version=0\.1: a text in quotes"):
        setup_of(log)


def test_tables_of_quantized_kernels_are_refused(log: Path) -> None:
    with (log / "profile" / "meta.yaml").open("a") as file:
        file.write("engine_effective: {quantization: fp8}\n")
    with pytest.raises(UserError, match="tables of the run's weights"):
        setup_of(log)


def test_requests_without_an_answer_are_counted(log: Path) -> None:
    for number, why in ((1, "abort"), (2, "abort"), (3, "stop"), (4, "error")):
        change_request(log, number, finish_reason=why)
    (said,) = [notice for notice in read_log(log).notices if "ended by" in notice]
    assert "2 of 24 requests ended by abort, 1 of 24 requests ended by error" in said


def test_a_request_of_another_model_is_named(log: Path) -> None:
    change_request(log, 5, model="models/Qwen2.5-0.5B")
    read_log(log)
    change_request(log, 5, model="my-adapter")
    with pytest.raises(UserError, match="request 5: model='my-adapter'"):
        read_log(log)
    change_meta(log, {"served_model_name": ["my-adapter", "other"]})
    read_log(log)


def test_times_in_milliseconds_are_refused(log: Path) -> None:
    rows = read_requests(log)
    stamps = ("queued_ts", "scheduled_ts", "first_token_ts", "last_token_ts")
    write_requests(log, [
        {key: value * 1000 if key in stamps else value for key, value in row.items() if key != "arrival_time"}
        for row in rows
    ])  # fmt: skip
    with pytest.raises(UserError, match="times in seconds"):
        read_log(log)


def test_an_engine_at_its_defaults_gives_no_notice(log: Path) -> None:
    kv_cache = {"num_gpu_blocks": 4000, "block_size": 16, "enable_prefix_caching": True, "num_kv_tokens": 64_000}
    setup = setup_of(log, DEFAULTS, resolved_config=RESOLVED, kv_cache=kv_cache)
    assert [notice for notice in setup.notices if not notice.startswith("Prefix caching was on")] == []
    assert (setup.kv_blocks, setup.schedule_ahead) == (3999, 1)
    assert setup.profile.model.max_context_tokens == 32_768


def test_every_name_is_declared_once() -> None:
    names = [*engine.HONOURED, *engine.REFUSED, *engine.NAMED]
    names += [name for each in engine.DOES_NOT_MATTER.values() for name in each.split()]
    assert sorted(names) == sorted(set(names))


# --- Contradictions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("others", "said"),
    [
        ({"resolved_config": {"scheduler_config": {"max_num_seqs": 16}}}, "max_num_seqs.*8 in engine_kwargs, 16 in"),
        ({"resolved_config": {"cache_config": {"num_gpu_blocks": 9}}, "kv_cache": {"num_gpu_blocks": 40}}, "num_gpu"),
        ({"resolved_config": {"model_config": {"dtype": "torch.float32"}}}, "dtype"),
        ({"model": "Qwen/Qwen2.5-7B"}, "model"), ({"num_requests": 25}, "num_requests.*24, the lines"),
        ({"started_at": "2026-04-25T18:47:18Z", "finished_at": "2026-04-25T18:46:18+00:00"}, "finished_at"),
        ({"started_at": "yesterday"}, "started_at"), ({"schema_version": 2}, "schema_version"),
        ({"resolve_only": True}, "resolve_only"), ({"tick_seconds": 1.0}, "timeseries.csv.*tick_seconds"),
        ({"hardware": {"device_name": "NVIDIA H100 80GB HBM3"}}, "hardware.*RTX4090.*H100"),
        ({"hardware": {"device_count": 0}}, "device_count"), ({"kv_cache": []}, "kv_cache"),
        ({"kv_cache": {"num_gpu_blocks": 10**7}}, "KV cache.*at most the card"),
    ],
)  # fmt: skip
def test_a_header_that_contradicts_another_place_is_refused(log: Path, others: dict, said: str) -> None:
    meta = json.loads((log / "meta.json").read_text())
    change_meta(log, {"dtype": "bfloat16", "model": meta["model"]})
    with pytest.raises(UserError, match=rf"(?s){said}"):
        setup_of(log, **others)


def test_blocks_and_bytes_that_contradict_each_other_are_refused(log: Path) -> None:
    assert setup_of(log, {"kv_cache_memory_bytes": 2**27}, kv_cache={"num_gpu_blocks": 682}).kv_blocks == 681
    with pytest.raises(UserError, match="one size"):
        setup_of(log, kv_cache={"num_gpu_blocks": 5000})
    with pytest.raises(UserError, match="one number of blocks"):
        setup_of(log, {"num_gpu_blocks_override": 600}, kv_cache={"num_gpu_blocks": 682})


def test_tables_of_another_model_are_refused(log: Path) -> None:
    change_meta(log, model="Qwen/Qwen2.5-1.5B-Instruct")
    with pytest.raises(UserError, match=r"Qwen2\.5-0\.5B in profile/meta\.yaml, Qwen/Qwen2\.5-1\.5B-Instruct"):
        set_up(read_log(log), FidelityConfig())
    change_meta(log, model="Qwen/Qwen2.5-0.5B-Instruct")
    assert set_up(read_log(log), FidelityConfig()).kv_blocks == DEFAULT_BLOCKS


def test_what_the_engine_fell_back_to_counts_and_is_said(log: Path) -> None:
    resolved = {"scheduler_config": {"async_scheduling": False}, "cache_config": {"enable_prefix_caching": False}}
    setup = setup_of(log, {"async_scheduling": True, "enable_prefix_caching": True}, resolved_config=resolved)
    assert (setup.schedule_ahead, setup.prefix_caching) == (0, False)
    assert sum("the latter, as resolved, counts" in notice for notice in setup.notices) == 2


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"scheduled_ts": 1.0}, "line 5.*scheduled_ts 1.0 before queued_ts"),
        ({"first_token_ts": 1.0}, "line 5.*first_token_ts 1.0 before scheduled_ts"),
        ({"last_token_ts": 1.0}, "line 5.*last_token_ts 1.0 before first_token_ts"),
        ({"output_toks": 1}, "line 5.*both of one token"), ({"output_toks": 2.5}, "line 5.*output_toks"),
        ({"input_toks": 0}, "line 5.*input_toks"), ({"input_toks": True}, "line 5.*input_toks"),
        ({"request_id": "bench-1"}, "line 5.*bench-1.*another than in line 2"),
        ({"queued_ts": "50"}, "line 5.*queued_ts"), ({"queued_ts": 1e300}, "line 5.*queued_ts"),
        ({"arrival_time": 2e9}, "request 5.*two clocks"), ({"queued_ts": 1.0}, "request 5.*two clocks"),
        ({"arrival_time": 1e12}, "line 5: arrival_time"), ({"arrival_time": None}, "line 5: arrival_time"),
        ({"scheduled_ts": None}, "line 5: scheduled_ts"), ({"priority": 1}, "line 1: priority"),
        ({"num_cached_tokens": 1}, "line 1: num_cached_tokens"),
    ],
)  # fmt: skip
def test_the_line_that_contradicts_itself_or_others_is_named(log: Path, values: dict, said: str) -> None:
    change_request(log, 5, **values)
    with pytest.raises(UserError, match=said):
        read_log(log)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"input_toks": 5, "input_toks": 6}', "'input_toks' stands there twice"),
        ('{"input_toks": 5, "output_toks": 6, "queued_ts": NaN}', "NaN is no number"),
        ("[1, 2]", "a JSON object"), ("{", "a JSON object"), ('{"a": 1e999}', "beyond the range"),
    ],
)  # fmt: skip
def test_a_damaged_line_is_named(log: Path, line: str, said: str) -> None:
    lines = (log / "requests.jsonl").read_text().splitlines()
    (log / "requests.jsonl").write_text("\n".join([*lines[:6], line, *lines[7:]]) + "\n")
    with pytest.raises(UserError, match=rf"line 7.*{said}"):
        read_log(log)


@pytest.mark.parametrize(
    ("file", "row", "text", "said"),
    [
        ("timeseries.csv", 4, "0.1,100,50,3,1,0", r"row 4: t.*later than the row before"),
        ("timeseries.csv", 4, "0.4,100,50,nan,1,0", r"row 4: running"),
        ("timeseries.csv", 4, "0.4,100,50,9,1,0", r"row 4.*9 running.*max_num_seqs"),
        ("timeseries.csv", 4, "0.4,100,50,-1,1,0", r"row 4: running"),
    ],
)
def test_a_row_of_the_series_that_cannot_be_is_named(log: Path, file: str, row: int, text: str, said: str) -> None:
    lines = (log / file).read_text().splitlines()
    lines[row] = text
    (log / file).write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=said):
        read_log(log)


def test_a_workload_that_differs_in_one_row_is_named(log: Path) -> None:
    rows = read_requests(log)
    lines = ["idx,arrival_ns,input_toks,output_toks"]
    for i, row in enumerate(rows):
        lines.append(f"{i},{round((row['arrival_time'] - 1e9) * 1e9)},{row['input_toks']},{row['output_toks']}")
    (log / "workload.csv").write_text("\n".join(lines) + "\n")
    assert read_log(log).notices == ()
    lines[7] = f"6,1,{rows[6]['input_toks'] + 1},{rows[6]['output_toks']}"
    (log / "workload.csv").write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"workload\.csv, row 7.*input_toks"):
        read_log(log)


@pytest.mark.parametrize(
    ("section", "values", "said"),
    [
        ("compilation_config", {"mode": 3, "pass_config": {"eliminate_noops": True, "fuse_attn_quant": True}},
         "pass_config ("),
        ("compilation_config", {"mode": 3, "custom_ops": ["all"]}, "custom_ops (['all']"),
        ("attention_config", {"flash_attn_version": 3}, "flash_attn_version (3"),
        ("kernel_config", {"linear_backend": "cutlass"}, "linear_backend (cutlass"),
        ("new_config", None, "new_config (None"), ("model_config", {"enable_warp": False}, "enable_warp (False"),
    ],
)  # fmt: skip
def test_what_the_engine_resolved_by_itself_is_named_where_it_counts(
    log: Path, section: str, values: object, said: str
) -> None:
    assert any(said in notice for notice in setup_of(log, resolved_config={section: values}).notices)


def test_what_the_engine_resolves_as_usual_is_not_named(log: Path) -> None:
    usual = {"mode": 3, "backend": "inductor", "custom_ops": ["none"], "compile_ranges_split_points": [2048],
             "pass_config": {"fuse_norm_quant": False, "eliminate_noops": True}, "local_cache_dir": None,
             "dynamic_shapes_config": {"type": "backed", "evaluate_guards": False}}  # fmt: skip
    notices = setup_of(log, resolved_config={"compilation_config": usual}).notices
    assert not any("not known" in notice for notice in notices)


def test_settings_that_are_off_and_not_known_are_named(log: Path) -> None:
    said = " ".join(setup_of(log, {"enable_warp": False, "warp_level": None, "warp": True}).notices)
    assert "not modelled: warp (True in engine_kwargs)." in said
    assert "the default: enable_warp (False in engine_kwargs), warp_level (None in engine_kwargs)." in said


def test_a_section_in_a_text_is_compared_too(log: Path) -> None:
    assert setup_of(log, {"max_model_len": "auto"}).profile.model.max_context_tokens == 32_768
    with pytest.raises(UserError, match=r"tensor_parallel_size='1 in engine_kwargs, 2 in resolved_config"):
        setup_of(log, resolved_config={"parallel_config": "ParallelConfig(tensor_parallel_size=2, rank=0)"})
