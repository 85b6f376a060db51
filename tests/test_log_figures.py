"""Figures that a log states in two places are compared, whichever tool wrote it; and texts may hold what they like."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import log_samples as samples
from helios_sim.errors import UserError
from helios_sim.logs import RequestLog, read_folder, read_tool
from helios_sim.logs.tools import opened

SUMS = ("total_output_tokens", "output_throughput", "total_token_throughput", "mean_e2el_ms", "max_output_tokens_per_s")
RATES = ("inter_token_latency_ms", "time_per_output_token_ms", "output_tokens_per_second", "tokens_per_second",
         "output_tokens_per_iteration", "iter_tokens_per_iteration")  # fmt: skip
Change = Callable[[Any], Any]
MAKERS: dict[str, Callable[[], Any]] = {
    "vllm": samples.vllm_bench, "guidellm": samples.guidellm, "inference-perf": samples.inference_perf,
    "aiperf": samples.aiperf, "spans": samples.spans,
}  # fmt: skip


def changed(folder: Path, tool: str, change: Change) -> RequestLog:
    value = MAKERS[tool]()
    change(value)
    in_lines = tool in ("aiperf", "spans")
    texts = [json.dumps(one, ensure_ascii=False) for one in (value if in_lines else [value])]
    path = folder / ("log.jsonl" if in_lines else "log.json")
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    log = read_tool(opened(path))
    assert log is not None
    return log


def answered(report: Any) -> Any:
    return report["benchmarks"][0]["requests"]["successful"]


def _metric(name: str, value: float, unit: str) -> Change:
    return lambda records: records[1]["metrics"].update({name: {"value": value, "unit": unit}})


def _usage(total: int) -> Change:
    counts = {"prompt": 21, "completion": 6, "total": total}
    return lambda records: records[1]["metrics"].update(
        {f"usage_{name}_tokens": {"value": count, "unit": "tokens"} for name, count in counts.items()}
    )


def _attribute(key: str, value: int) -> Change:
    given = {"key": key, "value": {"intValue": str(value)}}
    return lambda batches: spans_of(batches[1])[0]["attributes"].append(given)


def spans_of(batch: Any) -> Any:
    return batch["resourceSpans"][0]["scopeSpans"][0]["spans"]


def _of_run(report: Any, metric: str) -> Any:
    return report["benchmarks"][0]["metrics"][metric]["successful"]


def _answer(requests: Any) -> Any:
    return requests[0]["info"]["response_metrics"]


@pytest.mark.parametrize(
    ("tool", "change", "named"),
    [
        ("vllm", lambda v: v.update(p99_ttft_ms=600.0), "p99_ttft_ms=600.0: 59.8, as its lists say"),
        ("vllm", lambda v: v.update({"p99.9_itl_ms": 110.0}), r"p99.9_itl_ms=110.0: 19.9"),
        ("vllm", lambda v: v.update(std_ttft_ms=82.0), "std_ttft_ms=82.0: 8.16"),
        ("vllm", lambda v: v["ttfts"].__setitem__(1, 0.0), "request 2: ttfts=0.0: above 0"),
        ("vllm", lambda v: v.update(max_concurrency="2"), "kept in flight='2': null, or a whole number"),
        ("vllm", lambda v: v.update(max_concurrency=1.0, start_times=[1000.0, 1000.01, 1000.02, 1000.03]), "at most 1"),
        ("guidellm", lambda v: answered(v)[0].update(output_tokens_per_second=9e3), "output_tokens_per_second=9000.0"),
        ("guidellm", lambda v: answered(v)[0].update(tokens_per_second=4.0), "tokens_per_second=4.0: 43"),
        ("guidellm", lambda v: answered(v)[0].update(time_per_output_token_ms=73.9), "time_per_output_token_ms=73.9"),
        ("guidellm", lambda v: answered(v)[0].update(request_start_time=1796030000.0), "request_start_time"),
        ("guidellm", lambda v: answered(v)[0].update(request_end_time=1796030999.0), "request_end_time"),
        ("guidellm", lambda v: answered(v)[0]["info"].update(status="errored"), "info='errored': completed"),
        ("guidellm", lambda v: v["benchmarks"][0].update(duration=4e3), "duration=4000.0: 0.43"),
        ("guidellm", lambda v: v["benchmarks"][0].update(start_time=1.0, end_time=1.43), "within the run"),
        ("guidellm", lambda v: v["benchmarks"][0]["metrics"].update(
            time_to_first_token_ms={"successful": {"mean": 9e3}}
        ), "time_to_first_token_ms.successful.mean=9000.0"),
        ("aiperf", _metric("output_token_throughput_per_user", 4.0, "tokens/sec/user"), "per_user=4.0: 476"),
        ("aiperf", _metric("time_to_second_token", 0.9, "sec"), "time_to_second_token=0.9: 0.0021"),
        ("aiperf", _metric("decode_duration", 900.0, "ms"), "decode_duration=900.0: 10.5"),
        ("aiperf", _metric("prefill_throughput_per_user", 4.0, "tokens/sec/user"), "per_user=4.0: 933.333"),
        ("aiperf", lambda v: _usage(27)(v) or _metric("usage_reasoning_tokens", 600, "tokens")(v),
         "usage_reasoning_tokens=600: at most 6, as usage_completion_tokens says"),
        ("aiperf", lambda v: _usage(27)(v) or _metric("usage_prompt_tokens_diff_pct", 900.0, "%")(v), "=900.0: 0"),
        ("aiperf", lambda v: v[0]["metrics"]["request_latency"].update(value=34.9), "inter_token_latency=2.1: 2.48"),
        ("aiperf", _metric("reasoning_token_count", 4, "tokens"), "output_token_count=6: 2, output_sequence_length"),
        ("aiperf", lambda v: v[1]["metrics"].update(
            http_req_waiting={"value": 23.0, "unit": "ms"}, http_req_total={"value": 900.0, "unit": "ms"}
        ), "http_req_total=900.0: 23, as its other"),
        ("guidellm", lambda v: _of_run(v, "time_to_first_token_ms")["percentiles"].update(p99=9e3), "p99=9000.0: 23"),
        ("guidellm", lambda v: _of_run(v, "inter_token_latency_ms").update(median=9.0), "median=9.0: 2.205.* to 2.339"),
        ("guidellm", lambda v: _of_run(v, "requests_per_second").update(mean=900.0), "mean=900.0: 6.97.* to 9.293"),
        ("guidellm", lambda v: answered(v)[0]["info"].update(completed_at=1796030399.5),
         r"completed_at=1796030399.5: 1796030303.123, as its timings say"),
        ("vllm", lambda v: v.update(max_output_tokens_per_s=900.0), "max_output_tokens_per_s=900.0: 6.1 to 11.9"),
        ("vllm", lambda v: v.update(max_concurrent_requests=90), "max_concurrent_requests=90: 1 to 3"),
        ("vllm", lambda v: v.update(request_goodput=60.0), "request_goodput=60.0: at most 6, by its duration"),
        ("vllm", lambda v: v.update(mean_client_queue_time_ms=60.0), "client_queue_time_ms=60.0: 0, as its lists"),
        ("vllm", lambda v: v.update(total_input_sequences=3, ttfts=None), "embeddings"),
        ("inference-perf", lambda v: _answer(v).update(chunk_times=[50500.0, 50510.0]), "chunk_times"),
        ("inference-perf", lambda v: _answer(v).update(chunk_times=[50.4, 50.5]) or v[0].update(end_time=50.6),
         "chunk_times='0.4 to 0.5 s after start_time': around output_token_times, 0.05 to 0.07 s"),
        ("spans", _attribute("llm.token_count.prompt", 9000), "llm.token_count.prompt=9000: 80"),
    ],
)  # fmt: skip
def test_what_is_stated_twice_is_compared(tmp_path: Path, tool: str, change: Change, named: str) -> None:
    with pytest.raises(UserError, match=named):
        changed(tmp_path, tool, change)


@pytest.mark.parametrize(
    ("tool", "change", "said"),
    [
        ("aiperf", _usage(9000), "a total other than prompt and answer, such as 9,000 in place of 27"),
        ("spans", _attribute("gen_ai.request.max_tokens", 1), "asked for: 1 were, and one has at least 3"),
        ("aiperf", _metric("usage_completion_tokens", 600, "tokens"), "other output tokens than the client"),
        ("vllm", lambda v: v.update(duration=3200.0, request_throughput=4 / 3200, output_throughput=10 / 3200,
                                    total_token_throughput=390 / 3200, completed=4, failed=0, errors=[""] * 4,
                                    output_lens=[3, 4, 1, 2], ttfts=[0.05, 0.06, 0.05, 0.04], mean_ttft_ms=None,
                                    median_ttft_ms=None, std_ttft_ms=None, p99_ttft_ms=None, mean_e2el_ms=None,
                                    latencies=[0.072, 0.091, 0.05, 0.06], total_input_tokens=380,
                                    total_output_tokens=10), "duration is 3,200 s, and the requests of its lists took"),
        ("vllm", lambda v: v.update(spec_decode_acceptance_length=2.5), "acceptance_length is not read: speculative"),
        ("vllm", lambda v: v.update(output_lens=[1, 1, 0, 1], itls=[[0.01] * 5, [0.01] * 5, [], [0.01] * 5],
                                    **dict.fromkeys((*SUMS, "latencies"))), "such as 6 of 1: a chunk holds at least"),
        ("guidellm", lambda v: [one["info"]["timings"].update(token_iterations=1) or one.update(
            output_tokens=8, total_tokens=None, **dict.fromkeys(RATES)) or one["output_metrics"].update(total_tokens=8)
            for one in answered(v)] and v["benchmarks"][0].update(metrics={}), "several at once, as with speculative"),
        ("inference-perf", lambda v: v[0].update(end_time=900.0), "ended long after their last tokens"),
        ("inference-perf", lambda v: v[0].update(session_id="a"), "session_id is not read: what the turns"),
        ("inference-perf", lambda v: _answer(v)["server_usage"].update(total_tokens=9000), "9,000 in place of 103"),
        ("inference-perf", lambda v: [one.update(request_id="a") for one in v[:2]], "1 requests have the request_id"),
        ("inference-perf", lambda v: v[0]["info"]["request_metrics"]["text"].update(input_tokens=9000),
         "such as 100 and 9,000"),
    ],
)  # fmt: skip
def test_counts_that_differ_are_told(tmp_path: Path, tool: str, change: Change, said: str) -> None:
    assert re.search(said, " ".join(changed(tmp_path, tool, change).notices))


def test_right_figures_are_no_contradiction(tmp_path: Path) -> None:
    """As numpy has percentiles and guidellm its means."""
    bench = changed(tmp_path, "vllm", lambda v: v.update(
        {"p90_ttft_ms": 58.0, "p50_itl_ms": 11.0, "p99_tpot_ms": 19.8, "max_concurrency": 4}
    ))  # fmt: skip
    assert len(bench) == 4

    def means(report: Any) -> None:
        ones = answered(report)
        for metric, key in (("request_latency", "request_latency"), ("prompt_token_count", "prompt_tokens")):
            mean = sum(one[key] for one in ones) / len(ones)
            report["benchmarks"][0]["metrics"][metric] = {"successful": {"mean": mean}}

    assert len(changed(tmp_path, "guidellm", means)) == 5
    assert not changed(tmp_path, "aiperf", _usage(27)).failed - 1


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ({"code": None, "type": "Timeout", "message": ""}, "1 x Timeout"),
        ({"code": None, "type": None, "message": " \n "}, "1 x no reason is given"),
        ({"code": 503, "type": "X", "message": None}, "1 x 503: X"),
    ],
)
def test_errors_without_words(tmp_path: Path, error: dict[str, Any], said: str) -> None:
    log = changed(tmp_path, "aiperf", lambda v: v[3].update(error=error))
    assert said in log.failures[0]


def test_requests_of_several_models_are_told(tmp_path: Path) -> None:
    samples.write_blis(tmp_path, row_0={"model": "a"}, row_1={"model": "b"})
    log = read_tool(opened(tmp_path / "trace.csv"))
    assert log is not None
    assert "requests of 3 models, a, b, meta-llama/Llama-3.1-8B" in " ".join(log.notices)


def test_texts_may_hold_what_other_tools_take_for_ends_of_lines(tmp_path: Path) -> None:
    """JSON allows U+2028 and U+0085 within a text, and a cell of CSV may be a whole prompt."""
    text = {"key": "gen_ai.prompt.0.content", "value": {"stringValue": "a\u2028b\u0085c"}}
    assert len(changed(tmp_path, "spans", lambda v: spans_of(v[1])[0]["attributes"].append(text))) == 3
    samples.write_blis(tmp_path, row_2={"error_message": "x" * 200_000})
    log = read_tool(opened(tmp_path / "trace.csv"))
    assert log is not None
    assert len(log) == 3


def test_spans_of_libraries_before_otlp_1_count(tmp_path: Path) -> None:
    def renamed(batches: Any) -> None:
        resource = batches[1]["resourceSpans"][0]
        resource["instrumentationLibrarySpans"] = resource.pop("scopeSpans")

    assert changed(tmp_path, "spans", renamed).prompt_tokens.tolist() == [100, 60, 80]


def test_an_array_of_reports_is_told_apart_from_one_of_requests(tmp_path: Path) -> None:
    path = tmp_path / "all.json"
    path.write_text(json.dumps([samples.guidellm()]))
    with pytest.raises(UserError, match=r"an array of objects of guidellm.*jq"):
        read_tool(opened(path))


def test_a_rate_that_a_log_says_and_does_not_have_is_told(tmp_path: Path) -> None:
    """Of twenty requests or more; those of a client with a limit wait for each other and come later."""
    lists = {"input_lens": 9, "output_lens": 1, "ttfts": 0.05, "itls": [], "errors": ""}
    run = {"tokenizer_id": "m", "num_prompts": 30, "request_rate": 10.0, **{k: [v] * 30 for k, v in lists.items()}}
    said = "it says 10 requests/s, and its requests came at 2 requests/s, which count"
    for limit, told in ((None, True), (4, False)):
        path = tmp_path / "log.json"
        path.write_text(json.dumps({**run, "max_concurrency": limit, "start_times": [i / 2 for i in range(30)]}))
        log = read_tool(opened(path))
        assert log is not None
        assert (said in " ".join(log.notices)) is told


def test_all_cells_of_a_blis_trace_are_looked_at(tmp_path: Path) -> None:
    samples.write_blis(tmp_path, row_0={"num_chunks": "500", "text_tokens": "900", "server_input_tokens": "9000"})
    log = read_tool(opened(tmp_path / "trace.csv"))
    assert log is not None
    said = " ".join(log.notices)
    for told in ("such as 500 and not at most 8.5", "more text than tokens, such as 900", "9,000 in place of 100"):
        assert told in said
    samples.write_blis(tmp_path, row_0={"input_tokens": "-5"})
    with pytest.raises(UserError, match="line 2: input_tokens='-5': a whole number of at least 0"):
        read_tool(opened(tmp_path / "trace.csv"))


def test_a_report_that_ends_in_the_middle_is_no_bad_line(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps(samples.vllm_bench())[:300])
    with pytest.raises(UserError, match="it ends in the middle: take the whole file"):
        read_tool(opened(path))


def test_sums_and_lengths_that_cannot_be(tmp_path: Path) -> None:
    """Of scrapes, the sum of times that its buckets cannot hold; of ServeGen, a client twice and lengths of none."""
    pages = samples.write_scrapes(tmp_path / "pages")
    assert len(read_folder(pages)) == 102
    last = sorted(pages.iterdir())[-1]
    last.write_text(re.sub(r"(token_seconds_sum.*) .*", r"\1 5000.0", last.read_text()))
    with pytest.raises(UserError, match="seconds_sum='4999 s between the scrapes': from 2 to 7 s, by its buckets"):
        read_folder(pages)
    clients = samples.write_servegen(tmp_path / "clients")
    (clients / "chunk-0-trace.csv.gz").write_bytes((clients / "chunk-0-trace.csv").read_bytes())
    with pytest.raises(UserError, match=r"client 0='chunk-0-trace.csv and chunk-0-trace.csv.gz': one file of each"):
        read_folder(clients, (0.0, 600.0))
    (clients / "chunk-0-trace.csv.gz").unlink()
    for length in ("99999999999", "10.5"):
        lengths = {"input_tokens": f"{{{length}: 1.0}}", "output_tokens": "{10: 1.0}"}
        (clients / "chunk-0-dataset.json").write_text(json.dumps({"0": lengths}))
        with pytest.raises(UserError, match=f"whole numbers from 0 to 2147483647, unlike {length}"):
            read_folder(clients, (0.0, 600.0))
