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
from helios_sim.logs import RequestLog, read_tool
from helios_sim.logs.tools import opened

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


def _answered(report: Any) -> Any:
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
    return lambda batches: _spans(batches[1])[0]["attributes"].append(given)


def _spans(batch: Any) -> Any:
    return batch["resourceSpans"][0]["scopeSpans"][0]["spans"]


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
        ("guidellm", lambda v: _answered(v)[0].update(output_tokens_per_second=9e3), "output_tokens_per_second=9000.0"),
        ("guidellm", lambda v: _answered(v)[0].update(tokens_per_second=4.0), "tokens_per_second=4.0: 43"),
        ("guidellm", lambda v: _answered(v)[0].update(time_per_output_token_ms=73.9), "time_per_output_token_ms=73.9"),
        ("guidellm", lambda v: _answered(v)[0].update(request_start_time=1796030000.0), "request_start_time"),
        ("guidellm", lambda v: _answered(v)[0].update(request_end_time=1796030999.0), "request_end_time"),
        ("guidellm", lambda v: _answered(v)[0]["info"].update(status="errored"), "info='errored': completed"),
        ("guidellm", lambda v: v["benchmarks"][0].update(duration=4e3), "duration=4000.0: 0.43"),
        ("guidellm", lambda v: v["benchmarks"][0].update(start_time=1.0, end_time=1.43), "within the run"),
        ("guidellm", lambda v: v["benchmarks"][0]["metrics"].update(
            time_to_first_token_ms={"successful": {"mean": 9e3}}
        ), "time_to_first_token_ms.successful.mean=9000.0"),
        ("aiperf", _metric("output_token_throughput_per_user", 4.0, "tokens/sec/user"), "per_user=4.0: 476"),
        ("aiperf", _metric("time_to_second_token", 0.9, "sec"), "time_to_second_token=0.9: 0.0021"),
        ("aiperf", _metric("decode_duration", 900.0, "ms"), "decode_duration=900.0: 10.5"),
        ("inference-perf", lambda v: _answer(v).update(chunk_times=[50500.0, 50510.0]), "chunk_times"),
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
        answered = _answered(report)
        for metric, key in (("request_latency", "request_latency"), ("prompt_token_count", "prompt_tokens")):
            mean = sum(one[key] for one in answered) / len(answered)
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
    assert len(changed(tmp_path, "spans", lambda v: _spans(v[1])[0]["attributes"].append(text))) == 3
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
