"""Small logs in the formats of the tools that write them.

tests/logs/guidellm-0.8.0.json was written by guidellm 0.8.0 in a run of five requests (fields that no reader reads
taken out; its metrics are those of its requests by guidellm/schemas/statistics.py, made afterwards),
tests/logs/aiperf-0.13.0.jsonl by the models of aiperf 0.13.0 (MetricRecordInfo.model_dump_json). The others are built
as these sources write them:

- vllm bench: vllm/benchmarks/serve.py and lib/endpoint_request_func.py (main of 2026-08; same keys since 0.10)
- inference-perf 0.6.1: inference_perf/reportgen/base.py, apis/base.py (RequestLifecycleMetric)
- BLIS 0.7.15: inference-sim/sim/workload/tracev2.go, cmd/observe.go
- ServeGen: servegen/clientpool.py and data/language/m-large (f891d11)
- spans: OTLP/JSON of the OpenTelemetry collector's file exporter; attributes of vllm/v1/engine/output_processor.py
- scrapes: the text that prometheus_client 0.23 writes, with the names of vllm/v1/metrics/loggers.py
"""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import yaml

SAMPLES = Path(__file__).parent / "logs"


def guidellm() -> dict[str, Any]:
    return json.loads((SAMPLES / "guidellm-0.8.0.json").read_text())


def aiperf() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (SAMPLES / "aiperf-0.13.0.jsonl").read_text().splitlines()]


def vllm_bench() -> dict[str, Any]:
    """Four requests of which the third failed."""
    return {
        "date": "20260830-101500", "endpoint_type": "openai", "backend": "openai", "label": None,
        "model_id": "meta-llama/Llama-3.1-8B", "tokenizer_id": "meta-llama/Llama-3.1-8B", "num_prompts": 4,
        "request_rate": 10.0, "burstiness": 1.0, "max_concurrency": None, "duration": 0.5, "completed": 3, "failed": 1,
        "total_input_tokens": 330, "total_output_tokens": 9, "request_throughput": 6.0, "request_goodput": None,
        "output_throughput": 18.0, "total_token_throughput": 678.0,
        "input_lens": [100, 120, 50, 110], "output_lens": [3, 4, 0, 2],
        "ttfts": [0.05, 0.06, 0.0, 0.04], "itls": [[0.01, 0.012], [0.01, 0.01, 0.011], [], [0.02]],
        "latencies": [0.072, 0.091, 0.0, 0.06], "start_times": [1000.2, 1000.0, 1000.1, 1000.3],
        "queue_times": [0.0] * 4, "generated_texts": ["a", "b", "", "c"],
        "errors": ["", "", "Traceback (most recent call last):\n  ...\nTimeoutError: no answer", ""],
        "max_output_tokens_per_s": 9.0, "max_concurrent_requests": 2, "rtfx": 0.0, "mean_ttft_ms": 50.0,
        "median_ttft_ms": 50.0, "std_ttft_ms": 8.2, "p99_ttft_ms": 60.0, "mean_e2el_ms": 74.3,
    }  # fmt: skip


def inference_perf() -> list[dict[str, Any]]:
    def request(start: float, prompt: int, times: list[float], error: dict[str, str] | None = None) -> dict[str, Any]:
        usage = {"prompt_tokens": prompt, "completion_tokens": len(times), "total_tokens": prompt + len(times)}
        answer = {
            "output_tokens": len(times), "server_usage": usage, "response_chunks": ["x"] * len(times),
            "chunk_times": [start + t for t in times], "output_token_times": [start + t for t in times],
        }  # fmt: skip
        info = {
            "request_metrics": {"text": {"input_tokens": prompt}, "image": None, "video": None, "audio": None},
            "response_metrics": None if error else answer, "extra_info": {}, "lora_adapter": None, "labels": {},
            "input_tokens": prompt,
        }  # fmt: skip
        end = start + (times[-1] if times else 0.5) + 0.001
        return {"start_time": start, "end_time": end, "request": "{}", "response": "x", "info": info, "error": error}

    failed = {"error_type": "HTTP Error 503", "error_msg": "overloaded"}
    return [request(50.0, 100, [0.05, 0.06, 0.07]), request(50.2, 80, [0.04, 0.055]), request(50.1, 90, [], failed)]


def write_blis(folder: Path, **changes: Any) -> Path:
    """The table; the header lies beside it."""
    names = [
        "request_id", "client_id", "tenant_id", "slo_class", "session_id", "round_index", "prefix_group",
        "prefix_length", "streaming", "input_tokens", "output_tokens", "text_tokens", "image_tokens", "audio_tokens",
        "video_tokens", "reason_ratio", "model", "deadline_us", "server_input_tokens", "arrival_time_us",
        "send_time_us", "first_chunk_time_us", "last_chunk_time_us", "num_chunks", "status", "error_message",
        "finish_reason",
    ]  # fmt: skip
    base = 1_796_029_855_000_000
    rows = []
    for i, (at, first, last) in enumerate(((0, 60_000, 100_000), (110_000, 50_000, 80_000), (250_000, 0, 0))):
        row = dict.fromkeys(names, "0") | {
            "request_id": str(i), "client_id": "c", "tenant_id": "", "slo_class": "", "session_id": "",
            "prefix_group": "g", "prefix_length": "16", "streaming": "true", "input_tokens": str(84 + i),
            "output_tokens": "5" if first else "0", "model": "", "server_input_tokens": str(101 + i) if first else "0",
            "arrival_time_us": str(at), "send_time_us": str(base + at), "num_chunks": "6",
            "first_chunk_time_us": str(base + at + first) if first else "0",
            "last_chunk_time_us": str(base + at + last) if last else "0",
            "status": "ok" if first else "timeout", "error_message": "" if first else "HTTP timeout: slow",
            "finish_reason": "length" if first else "",
        }  # fmt: skip
        rows.append(row | changes.get(f"row_{i}", {}))
    header = {"trace_version": 3, "time_unit": "us", "mode": "real", "warm_up_requests": 0, "created_at": "2026-08-30",
              "server": {"type": "vllm", "model": "meta-llama/Llama-3.1-8B"},
              "network": {"measured_rtt_ms": 0.2}} | changes.get("header", {})  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trace.yaml").write_text(yaml.safe_dump(header))
    path = folder / "trace.csv"
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, names)
        table.writeheader()
        table.writerows(rows)
    return path


def spans() -> list[dict[str, Any]]:
    """A batch in each line: a client's span around vLLM's of the same request, two more of vLLM, a tool call."""

    def attribute(key: str, value: object) -> dict[str, Any]:
        kind = "stringValue" if isinstance(value, str) else "intValue" if isinstance(value, int) else "doubleValue"
        return {"key": key, "value": {kind: str(value) if kind == "intValue" else value}}

    def span(number: int, start_ns: int, took_s: float, name: str, said: dict[str, object], **more: Any) -> dict:
        base = 1_796_029_855_000_000_000
        return {
            "traceId": f"{number:032x}", "spanId": f"{number:016x}", "name": name, "kind": 2,
            "startTimeUnixNano": str(base + start_ns), "endTimeUnixNano": str(base + start_ns + int(took_s * 1e9)),
            "attributes": [attribute(key, value) for key, value in said.items()], "status": {}, **more,
        }  # fmt: skip

    def served(number: int, start_ns: int, prompt: int, output: int, ttft_s: float, e2e_s: float, **more: Any) -> dict:
        said: dict[str, object] = {
            "gen_ai.latency.time_to_first_token": ttft_s, "gen_ai.latency.e2e": e2e_s,
            "gen_ai.latency.time_in_queue": 0.001, "gen_ai.usage.prompt_tokens": prompt,
            "gen_ai.usage.completion_tokens": output, "gen_ai.request.id": f"r{number}",
        }  # fmt: skip
        return span(number, start_ns, e2e_s, "llm_request", said, **more)

    client = {"gen_ai.operation.name": "chat", "gen_ai.request.model": "m", "gen_ai.usage.input_tokens": 100,
              "gen_ai.usage.output_tokens": 5}  # fmt: skip
    around = span(1, 0, 0.3, "chat m", client) | {"spanId": "00000000000000ff"}
    batches = [
        [around, served(1, 5_000_000, 100, 5, 0.05, 0.2, parentSpanId="00000000000000ff")],
        [served(3, 400_000_000, 80, 3, 0.04, 0.1), span(9, 0, 0.1, "execute_tool x", {"gen_ai.operation.name": "x"})],
        [served(2, 200_000_000, 60, 4, 0.05, 0.15)],
    ]
    resource = {"attributes": [attribute("service.name", "vllm-server")]}
    return [{"resourceSpans": [{"resource": resource, "scopeSpans": [{"scope": {"name": "vllm"}, "spans": batch}]}]}
            for batch in batches]  # fmt: skip


def write_servegen(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "chunk-0-trace.csv").write_text(
        "0,1.33,8.6,Weibull,0.9,0.4\n600,0,0,,0,0\n1200,0.5,1.2,Gamma,1.0,3.4\n"
    )
    fields = {"input_tokens": "{100: 0.5, 200: 0.25, 300: 0.25}", "output_tokens": "{10: 0.5, 20: 0.5}"}
    (folder / "chunk-0-dataset.json").write_text(json.dumps({"0": fields}))
    return folder


PAGE = """# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{{engine="0",model_name="m"}} {running}
# TYPE vllm:request_success_total counter
vllm:request_success_total{{engine="0",finished_reason="stop",model_name="m"}} {stop}
vllm:request_success_total{{engine="0",finished_reason="length",model_name="m"}} {length}
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{engine="0",model_name="m"}} {prompt}
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{engine="0",model_name="m"}} {output}
# TYPE vllm:time_to_first_token_seconds histogram
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.05",model_name="m"}} {few}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="0.1",model_name="m"}} {more}
vllm:time_to_first_token_seconds_bucket{{engine="0",le="+Inf",model_name="m"}} {more}
vllm:time_to_first_token_seconds_count{{engine="0",model_name="m"}} {more}
vllm:time_to_first_token_seconds_sum{{engine="0",model_name="m"}} {ttft_s}
# TYPE vllm:request_prompt_tokens histogram
vllm:request_prompt_tokens_bucket{{engine="0",le="100.0",model_name="m"}} 7.0
vllm:request_prompt_tokens_bucket{{engine="0",le="200.0",model_name="m"}} {half}
vllm:request_prompt_tokens_bucket{{engine="0",le="500.0",model_name="m"}} {more}
vllm:request_prompt_tokens_bucket{{engine="0",le="+Inf",model_name="m"}} {more}
vllm:request_prompt_tokens_count{{engine="0",model_name="m"}} {more}
vllm:request_prompt_tokens_sum{{engine="0",model_name="m"}} {prompt}
# TYPE vllm:request_generation_tokens histogram
vllm:request_generation_tokens_bucket{{engine="0",le="20.0",model_name="m"}} {few}
vllm:request_generation_tokens_bucket{{engine="0",le="100.0",model_name="m"}} {more}
vllm:request_generation_tokens_bucket{{engine="0",le="+Inf",model_name="m"}} {more}
vllm:request_generation_tokens_count{{engine="0",model_name="m"}} {more}
vllm:request_generation_tokens_sum{{engine="0",model_name="m"}} {output}
# TYPE python_info gauge
python_info{{implementation="CPython"}} 1.0
"""


def write_scrapes(folder: Path, times: int = 1) -> Path:
    """Three scrapes ten seconds apart, 100 requests in them, or so many times as many.

    60 % of the answers have at most 20 tokens, half of the prompts 101 to 200, the others up to 500.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for i, (running, done) in enumerate(((0, 0), (5, 60), (2, 100))):
        running, done = times * running, times * done
        values = {"running": running, "stop": 10 + done // 2, "length": 5 + done - done // 2, "more": 15 + done,
                  "prompt": 1000 + 200 * done, "output": 500 + 30 * done, "few": 3 + int(0.6 * done),
                  "half": 7 + done // 2, "ttft_s": 0.05 * (15 + done)}  # fmt: skip
        (folder / f"metrics_{1_796_029_855 + 10 * i}.prom").write_text(PAGE.format(**values))
    return folder
