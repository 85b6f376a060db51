"""Readers of the logs of benchmark tools: a file of each tool as it writes it, and damaged ones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import assume, given, strategies as st

import log_samples as samples
from helios_sim.errors import UserError
from helios_sim.logs import Begins, RequestLog, read_folder, read_tool
from helios_sim.logs.scrapes import Scrapes, drawn_lengths
from helios_sim.logs.tools import opened
from helios_sim.workload import read_trace


def read(path: Path, part: int | None = None) -> RequestLog:
    log = read_tool(opened(path), part)
    assert log is not None
    return log


def as_json(folder: Path, value: Any, name: str = "log.json") -> Path:
    (folder / name).write_text(json.dumps(value))
    return folder / name


def as_lines(folder: Path, values: list[Any], name: str = "log.jsonl") -> Path:
    (folder / name).write_text("".join(f"{json.dumps(value)}\n" for value in values))
    return folder / name


def test_vllm_bench(tmp_path: Path) -> None:
    log = read(as_json(tmp_path, samples.vllm_bench()))
    assert log.begins is Begins.SENT
    assert log.arrival_s == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert log.prompt_tokens.tolist() == [120, 50, 100, 110]
    assert log.completed.tolist() == [True, False, True, True]
    assert log.ttft_s == pytest.approx([0.06, np.nan, 0.05, 0.04], nan_ok=True)
    assert log.e2e_s == pytest.approx([0.091, np.nan, 0.072, 0.06], nan_ok=True)
    assert log.tpot_s() == pytest.approx([0.031 / 3, np.nan, 0.011, 0.02], nan_ok=True)
    assert log.token_times is not None
    assert np.diff(log.token_times.starts).tolist() == [4, 0, 3, 2]
    assert log.stated["model"] == "meta-llama/Llama-3.1-8B"
    assert log.failures == ("log.json: 1 of 4 requests failed and are left out: 1 x TimeoutError: no answer.",)
    assert not log.notices


def test_an_answer_of_no_tokens_counts_as_failed(tmp_path: Path) -> None:
    report = samples.guidellm()
    _requests(report)["successful"][0]["output_tokens"] = 0
    report["benchmarks"][0]["metrics"] = {}
    log = read(as_json(tmp_path, report))
    assert log.failed == 2
    assert "1 x an answer of 0 tokens" in log.failures[0]


def test_of_several_runs_in_a_file_one_is_named(tmp_path: Path) -> None:
    """--append-result writes a run a line."""
    path = as_lines(tmp_path, [samples.vllm_bench(), samples.vllm_bench() | {"request_rate": 20.0}], "runs.json")
    with pytest.raises(UserError, match=r"from_log\.part.*2: meta-llama/Llama-3.1-8B at 20"):
        read(path)
    assert read(path, 2).stated["request_rate"] == 20.0
    with pytest.raises(UserError, match="one of the 2 runs"):
        read(path, 3)


@pytest.mark.parametrize("form", ["json", "yaml"])
def test_guidellm(tmp_path: Path, form: str) -> None:
    report = samples.guidellm()
    path = tmp_path / f"benchmarks.{form}"
    path.write_text(json.dumps(report) if form == "json" else yaml.dump(report))
    log = read(path)
    assert log.format == "guidellm 0.8.0"
    assert len(log) == 5
    assert log.failed == 1
    assert "429" in log.failures[0]
    (first, *_) = report["benchmarks"][0]["requests"]["successful"]
    assert log.ttft_s is not None
    assert np.nanmin(np.abs(1e3 * log.ttft_s - first["time_to_first_token_ms"])) < 1e-6
    tpot = log.tpot_s()
    assert tpot is not None
    assert np.nanmin(np.abs(1e3 * tpot - first["inter_token_latency_ms"])) < 1e-6
    assert log.output_tokens.tolist().count(4) == 4
    assert log.token_times is None
    assert any("times of single tokens" in sentence for sentence in log.missing)
    assert log.arrival_s is not None
    assert np.diff(log.arrival_s) == pytest.approx(0.1, abs=0.02)


def test_aiperf(tmp_path: Path) -> None:
    log = read(samples.SAMPLES / "aiperf-0.13.0.jsonl")
    assert log.arrival_s == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    assert log.completed.tolist() == [True, True, False, True, True]
    assert log.ttft_s == pytest.approx([np.nan, 0.0225, np.nan, 0.03, 0.0225], nan_ok=True)  # the first is a warm-up
    assert log.e2e_s == pytest.approx([np.nan, 0.033, np.nan, 0.0405, 0.0309], nan_ok=True)
    assert log.prompt_tokens.tolist() == [20, 21, 22, 23, 24]
    assert "1 requests of the warm-up are replayed" in log.notices[0]
    assert "429: too many requests" in log.failures[0]
    seconds = samples.aiperf()
    for record in seconds:
        for name, figure in record["metrics"].items():
            if figure["unit"] == "ms":
                value = figure["value"]
                many = isinstance(value, list)
                record["metrics"][name] = {"value": [v / 1e3 for v in value] if many else value / 1e3, "unit": "sec"}
    assert read(as_lines(tmp_path, seconds)).e2e_s == pytest.approx(log.e2e_s, nan_ok=True)


def test_inference_perf_after_retries_and_long_prompts(tmp_path: Path) -> None:
    """0.7: the attempt that was answered began so much later; what the prompt hides comes after 64 KiB."""
    plain = samples.inference_perf()
    retried = samples.inference_perf()
    retried[0]["request"] = "x" * 100_000
    retried[0]["start_time"] -= 2.0
    retried[0]["info"] |= {"retries_attempted": 1, "retries_recovered": True, "retry_wasted_sec": 2.0}
    before, now = (read(as_json(tmp_path, rows, f"{n}.json")) for n, rows in enumerate((plain, retried)))
    assert before.ttft_s is not None
    assert now.ttft_s == pytest.approx(before.ttft_s, nan_ok=True)
    assert now.arrival_s == pytest.approx(before.arrival_s)
    assert any("sent again" in notice for notice in now.notices)


def test_the_header_of_a_trace_is_no_log(tmp_path: Path) -> None:
    samples.write_blis(tmp_path)
    with pytest.raises(UserError, match=r"trace\.csv"):
        read_tool(opened(tmp_path / "trace.yaml"))


def test_inference_perf(tmp_path: Path) -> None:
    as_json(tmp_path, samples.inference_perf(), "per_request_lifecycle_metrics.json")
    log = read_folder(tmp_path)
    assert log.arrival_s == pytest.approx([0.0, 0.1, 0.2])
    assert log.prompt_tokens.tolist() == [100, 90, 80]
    assert log.ttft_s == pytest.approx([0.05, np.nan, 0.04], nan_ok=True)
    assert log.e2e_s == pytest.approx([0.07, np.nan, 0.055], nan_ok=True)
    assert "HTTP Error 503: overloaded" in log.failures[0]
    summary = as_json(tmp_path, {"load_summary": {"count": 60}, "successes": {"count": 60}}, "stage.json")
    with pytest.raises(UserError, match="per_request: true"):
        read(summary)


def test_blis(tmp_path: Path) -> None:
    log = read(samples.write_blis(tmp_path))
    assert log.arrival_s == pytest.approx([0.0, 0.11, 0.25])
    assert log.prompt_tokens.tolist() == [101, 102, 102]  # the server's count; else the prompt with its prefix
    assert log.ttft_s == pytest.approx([0.06, 0.05, np.nan], nan_ok=True)
    assert log.e2e_s == pytest.approx([0.1, 0.08, np.nan], nan_ok=True)
    assert log.stated["model"] == "meta-llama/Llama-3.1-8B"
    assert any("prefix_group is not read: prefixes" in notice for notice in log.notices)
    assert "HTTP timeout: slow" in log.failures[0]
    (tmp_path / "trace.yaml").unlink()
    assert any("no header" in notice for notice in read(tmp_path / "trace.csv").notices)
    simulated = read(samples.write_blis(tmp_path, header={"mode": "generated", "warm_up_requests": 1}))
    assert any("simulated by BLIS" in notice for notice in simulated.notices)
    assert simulated.ttft_s == pytest.approx([np.nan, 0.05, np.nan], nan_ok=True)


def test_spans(tmp_path: Path) -> None:
    log = read(as_lines(tmp_path, samples.spans()))
    assert log.begins is Begins.RECEIVED
    assert log.prompt_tokens.tolist() == [100, 60, 80]  # by arrival, and without the client's span around the first
    assert log.ttft_s == pytest.approx([0.05, 0.05, 0.04])
    assert log.e2e_s == pytest.approx([0.2, 0.15, 0.1])
    assert log.queue_s == pytest.approx([0.001] * 3)
    assert any("1 spans have another one of the same request inside" in notice for notice in log.notices)
    assert any("1 spans without tokens" in notice for notice in log.notices)
    clients = samples.spans()[:1]
    del clients[0]["resourceSpans"][0]["scopeSpans"][0]["spans"][1]
    log = read(as_lines(tmp_path, clients))
    assert log.begins is Begins.SENT
    assert log.ttft_s is None
    assert log.e2e_s == pytest.approx([0.3])


def test_what_logs_tell_besides_is_said(tmp_path: Path) -> None:
    """Spans that an exporter repeated, tokens without times of their own, and a report with its keys in any order."""
    repeated = read(as_lines(tmp_path, [*samples.spans(), samples.spans()[2]]))
    assert len(repeated) == 3
    assert "1 spans are there twice" in " ".join(repeated.notices)
    requests = samples.inference_perf()
    requests[0]["info"]["response_metrics"]["output_token_times"] = [50.05]
    assert "1 of 2 answers came in fewer or more chunks" in " ".join(read(as_json(tmp_path, requests)).notices)
    bench = samples.vllm_bench() | {"num_prompts": 1000}
    assert "num_prompts is 1000, and its lists have 4" in " ".join(read(as_json(tmp_path, bench)).notices)
    records = samples.aiperf()
    for number, record in enumerate(records):
        record["metadata"]["endpoint_url"] = f"http://server-{number % 2}"
    assert "requests went to 2 endpoints" in " ".join(read(as_lines(tmp_path, records)).notices)
    path = tmp_path / "report.yaml"
    path.write_text(yaml.safe_dump(samples.guidellm(), sort_keys=False))
    assert len(read(path)) == 5


def test_what_pages_tell_besides_is_said(tmp_path: Path) -> None:
    """Drafts, adapters and aborted requests, where they come in the time that is scraped."""
    folder = samples.write_scrapes(tmp_path / "scraped")
    for i, page in enumerate(sorted(folder.iterdir())):
        further = (f"vllm:spec_decode_num_draft_tokens_total {50 * i}\n"
                   f'vllm:request_success_total{{engine="0",finished_reason="abort",model_name="m"}} {2 * i}\n'
                   'vllm:lora_requests_info{max_lora="4",running_lora_adapters="a"} 1.0\n')  # fmt: skip
        page.write_text(page.read_text() + further)
    said = " ".join(read_folder(folder).notices)
    for part in ("num_draft_tokens_total grew by 100", "4 requests were aborted", "adapters of LoRA"):
        assert part in said


def test_servegen_draws_what_its_distributions_say(tmp_path: Path) -> None:
    folder = samples.write_servegen(tmp_path / "m-large")
    log = read_folder(folder, (0.0, 600.0), seed=1)
    assert len(log) == pytest.approx(1.33 * 600, rel=0.02)
    assert set(log.prompt_tokens.tolist()) == {100, 200, 300}
    assert np.mean(log.output_tokens) == pytest.approx(15, rel=0.05)
    assert "drawn from distributions" in log.notices[0]
    assert read_folder(folder, (0.0, 600.0), seed=1).prompt_tokens.tolist() == log.prompt_tokens.tolist()
    with pytest.raises(UserError, match="span_s"):
        read_folder(folder, None)
    with pytest.raises(UserError, match="seconds in which its clients sent"):
        read_folder(folder, (600.0, 1200.0))


def test_requests_drawn_from_scrapes_have_their_sums_and_histograms(tmp_path: Path) -> None:
    log = read_folder(samples.write_scrapes(tmp_path / "pages", times=100), seed=3)
    assert log.arrival_s is not None
    assert len(log) == 10_000 + 200  # those that finished, and those in flight at the end
    assert log.arrival_s[6_499] < 10.0 < log.arrival_s[6_500] + 0.1  # 6,000 finished and 500 were in flight then
    assert np.histogram(log.prompt_tokens, [1, 101, 201, 501])[0].tolist() == [0, 5_100, 5_100]
    assert np.histogram(log.output_tokens, [1, 21, 101])[0].tolist() == [6_120, 4_080]
    assert log.prompt_tokens.mean() == pytest.approx(200, abs=0.5)
    assert log.output_tokens.mean() == pytest.approx(30, abs=0.5)
    assert log.ttft_s is None
    assert log.percentiles["TTFT"] == [(0.5, (0.0, 0.05)), (0.9, (0.05, 0.1)), (0.99, (0.05, 0.1))]
    assert log.stated["model"] == "m"
    said = " ".join((*log.notices, *log.missing))
    assert "3 scrapes in 20 s" in said
    assert "10000 requests finished, 500/s, with 200 prompt tokens and 30 output tokens" in said
    assert "TTFT: p50 0 to 0.05 s, p90 0.05 to 0.1 s" in said
    assert "10200 requests are drawn with seed 3" in said
    assert "when single requests came between two scrapes" in said
    again, other = (read_folder(tmp_path / "pages", seed=seed) for seed in (3, 4))
    assert again.prompt_tokens.tolist() == log.prompt_tokens.tolist()
    assert other.prompt_tokens.tolist() != log.prompt_tokens.tolist()


def test_scrapes_in_one_file_with_times(tmp_path: Path) -> None:
    stamped = tmp_path / "all.prom"
    values = {"running": 0, "length": 0, "half": 7, "ttft_s": 0.2}
    pages = [
        samples.PAGE.format(**values, stop=s, prompt=300 * s, output=15 * s, few=s, more=7 + s) for s in (1, 5)
    ]
    stamped.write_text("".join(
        "".join(f"{line} {1_796_029_855_000 + 4000 * i}\n" if not line.startswith("#") else f"{line}\n"
                for line in page.splitlines())
        for i, page in enumerate(pages)
    ))  # fmt: skip
    log = read_tool(opened(stamped))
    assert log is not None
    assert len(log) == 4
    assert any("2 scrapes in 4 s" in notice for notice in log.notices)
    assert abs(log.prompt_tokens.sum() - 1200) <= 2


@pytest.mark.slow
@given(
    st.lists(st.tuples(st.integers(1, 400), st.integers(0, 60)), min_size=1, max_size=8),
    st.floats(0, 1), st.integers(1, 500), st.integers(0, 9),
)  # fmt: skip
def test_drawn_lengths_keep_each_bucket_and_the_mean(
    buckets: list[tuple[int, int]], where: float, n: int, seed: int
) -> None:
    assume(sum(count for _, count in buckets))
    edges = np.cumsum([width for width, _ in buckets]).astype(float)
    counts = np.array([count for _, count in buckets], float)
    low = np.concatenate([[0.0], edges[:-1]]) + 1
    least, most = (float((counts * bound).sum() / counts.sum()) for bound in (low, edges))
    mean = least + where * (most - least)
    name = "vllm:request_prompt_tokens"
    values = {f"{name}_sum": np.array([0.0, mean * counts.sum()]), f"{name}_count": np.array([0.0, counts.sum()])}
    page = Scrapes("page", np.array([0.0, 1.0]), values, {name: (edges, np.stack([0 * edges, counts.cumsum()]))},
                   (), 0, ())  # fmt: skip
    found = drawn_lengths(page, name, n, np.random.default_rng(seed))
    assert found.shape == (n,)
    shares = np.array([((found >= a) & (found <= b)).sum() for a, b in zip(low, edges, strict=True)])
    assert shares.sum() == n
    assert np.abs(shares - counts / counts.sum() * n).max() < 1.0
    can_be = [float((shares * bound).sum() / n) for bound in (low, edges)]  # so many requests in these buckets
    assert abs(found.mean() - np.clip(mean, *can_be)) <= 0.5


Change = Callable[[Any], None]


def damaged(tmp_path: Path, tool: str, change: Change) -> Path:
    whole = {"vllm": samples.vllm_bench, "guidellm": samples.guidellm, "inference-perf": samples.inference_perf}
    if tool in whole:
        value: Any = whole[tool]()
        change(value)
        return as_json(tmp_path, value)
    values: Any = {"aiperf": samples.aiperf, "spans": samples.spans}[tool]()
    change(values)
    return as_lines(tmp_path, values)


def _span(values: Any) -> Any:
    return values[1]["resourceSpans"][0]["scopeSpans"][0]["spans"][0]


def _whole(key: str, value: int) -> dict[str, Any]:
    return {"key": key, "value": {"intValue": str(value)}}


def _gaps(record: Any, gaps_ms: list[float]) -> None:
    if "inter_chunk_latency" in record["metrics"]:
        record["metrics"]["inter_chunk_latency"]["value"] = gaps_ms


def _requests(report: Any) -> Any:
    return report["benchmarks"][0]["requests"]


@pytest.mark.parametrize(
    ("tool", "change", "named"),
    [
        ("vllm", lambda v: v["ttfts"].pop(), "a list of 4|a list of 3"),
        ("vllm", lambda v: v["ttfts"].__setitem__(1, -0.1), "request 2: ttfts"),
        ("vllm", lambda v: v["itls"][0].__setitem__(0, 30.0), "request 1: latencies"),
        ("vllm", lambda v: v.update(itls=[[9.0] * 2, [9.0] * 3, [], [9.0]], latencies=[18.05, 27.06, 0, 9.04],
                                    duration=99), "another unit"),
        ("vllm", lambda v: v.update(completed=4), "completed"),
        ("vllm", lambda v: v.update(total_output_tokens=90), "total_output_tokens"),
        ("vllm", lambda v: v.update(duration=0.0005, request_throughput=6000.0, output_throughput=18000.0,
                                    total_token_throughput=678000.0), None),
        ("vllm", lambda v: v.update(start_times=[1e6, 2e6, 3e6, 4e6]), "duration"),
        ("vllm", lambda v: v.update(mean_ttft_ms=5e4), "mean_ttft_ms=50000.0: 50, as its lists say"),
        ("vllm", lambda v: v.update(median_ttft_ms=90.0), "median_ttft_ms=90.0: 50, as its lists say"),
        ("vllm", lambda v: v.update(mean_tpot_ms=90.0), r"mean_tpot_ms=90.0: 13.7778"),
        ("vllm", lambda v: v.update(mean_itl_ms=90.0), r"mean_itl_ms=90.0: 12.1667"),
        ("vllm", lambda v: v.update(request_throughput=60.0), "request_throughput=60.0: 6, by its duration"),
        ("vllm", lambda v: v.update(output_throughput=1.0), "output_throughput=1.0: 18, by its duration"),
        ("vllm", lambda v: v.update(total_token_throughput=9.0), "total_token_throughput=9.0: 678, by its duration"),
        ("guidellm", lambda v: _requests(v)["successful"][0].update(total_tokens=9999), "total_tokens=9999: 13, "),
        ("vllm", lambda v: v.update(mean_e2el_ms=743.0), r"mean_e2el_ms=743.0: 74\.3333"),
        ("vllm", lambda v: v.update(max_concurrency=1, start_times=[1e3 + i / 1e3 for i in range(4)]),
         "3 requests at once': at most 1"),
        ("vllm", lambda v: v.update({"start_times ": v.pop("start_times")}), "'start_times ' has blanks around it"),
        ("guidellm", lambda v: _requests(v)["successful"][0].update(request_latency=9.0), "request_latency=9.0: 0.03"),
        ("guidellm", lambda v: _requests(v)["successful"][0].update(inter_token_latency_ms=900.0),
         "inter_token_latency_ms=900.0: 2.19"),
        ("aiperf", lambda v: [_gaps(one, [0.0021] * 5) for one in v],
         "token times='4.2e-05 s between first and last tokens.*about 0.0399 s"),
        ("aiperf", lambda v: [_gaps(one, [2.1, 4.2, 6.3, 8.4, 10.5]) for one in v], "token times='0.1[0-9]* s between"),
        ("aiperf", lambda v: v[1]["metrics"]["inter_token_latency"].update(value=210.0), "=210.0: 2.1, by its"),
        ("aiperf", lambda v: v[1]["metrics"].update({"time_to_first_token ": v[1]["metrics"].pop("request_latency")}),
         "'time_to_first_token ' has blanks"),
        ("spans", lambda v: _span(v)["attributes"].append(_whole("gen_ai.usage.input_tokens", 999)),
         "gen_ai.usage.prompt_tokens=80: 999, as gen_ai.usage.input_tokens says"),
        ("spans", lambda v: _span(v)["attributes"].append(_whole("gen_ai.usage.completion_tokens", 7)),
         "completion_tokens='3 and 7': one value"),
        ("spans", lambda v: _span(v)["attributes"].append(_whole("gen_ai.usage.output_tokens ", 7)),
         "'gen_ai.usage.output_tokens ' has blanks"),
        ("vllm", lambda v: [v.pop(name) for name in ("ttfts", "itls")], "--save-detailed"),
        ("vllm", lambda v: v.update(errors=["x"] * 4, output_lens=[0] * 4, completed=0, failed=4,
                                    total_input_tokens=0, total_output_tokens=0), "all failed"),
        ("guidellm", lambda v: v["metadata"].update(version=3), "metadata.version"),
        ("guidellm", lambda v: v.update(benchmarks=[]), "benchmarks"),
        ("guidellm", lambda v: _requests(v)["successful"].pop(), "requests.successful"),
        ("guidellm", lambda v: _requests(v)["successful"][1]["info"]["timings"].update(request_start=None),
         "successful request 2: timings.request_start"),
        ("guidellm", lambda v: _requests(v)["successful"][1].update(time_to_first_token_ms=9e3), "as its timings say"),
        ("aiperf", lambda v: v[3]["metadata"].update(request_end_ns=0), "line 4: request_end_ns"),
        ("aiperf", lambda v: v[1]["metrics"]["request_latency"].update(unit="sec"), "line 2: request_latency"),
        ("aiperf", lambda v: v[1]["metadata"].update(request_end_ns=v[1]["metadata"]["request_start_ns"] + 9 * 10**9),
         "line 2: request_latency='0.033 s': near 9 s"),
        ("aiperf", lambda v: v[1]["metrics"]["request_latency"].update(unit="weeks"), "unit of request_latency"),
        ("aiperf", lambda v: v[1]["metrics"].pop("output_sequence_length"), "line 2: output_sequence_length"),
        ("guidellm", lambda v: _requests(v)["successful"][0].update(prompt_tokens=None), "request 1: prompt_tokens"),
        ("inference-perf", lambda v: v[1].update(end_time=1.0), "request 2: end_time"),
        ("inference-perf", lambda v: v[0]["info"]["response_metrics"].update(output_token_times=[0.0]),
         "request 1: output_token_times"),
        ("aiperf", lambda v: v[1]["metadata"].update(request_start_ns=1_796_029_855_000_000), "it is in another unit"),
        ("aiperf", lambda v: v[1]["metrics"]["inter_chunk_latency"].update(unit="sec"), "inter_chunk_latency="),
        ("inference-perf", lambda v: v.append(v[0]), "request 4: start_time and end_time=.*request 1 has it too"),
        ("aiperf", lambda v: v.append(v[1]), "line 6: metadata.x_request_id=.*line 2 has it too"),
        ("guidellm", lambda v: _requests(v)["successful"].append(_requests(v)["successful"][0]),
         "successful request 5: request_id=.*successful request 1 has it too"),
        ("spans", lambda v: _span(v).update(startTimeUnixNano="1796029855000000"), "it is in another unit"),
        ("spans", lambda v: _span(v).update(startTimeUnixNano="soon"), "line 2, span 1: startTimeUnixNano"),
        ("spans", lambda v: _span(v)["attributes"][1]["value"].update(doubleValue=100.0), "gen_ai.latency.e2e"),
        ("spans", lambda v: _span(v)["attributes"][3]["value"].update(intValue="many"), "gen_ai.usage.prompt_tokens"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path: Path, tool: str, change: Change, named: str | None) -> None:
    path = damaged(tmp_path, tool, change)
    if named is None:  # rounding of a short run is no contradiction
        read(path)
        return
    with pytest.raises(UserError, match=named):
        read(path)


def observed(**changes: Any) -> list[dict[str, Any]]:
    """A log of our own: ten requests, half a second apart, three tokens each."""
    rows = [
        {"index": i, "arrival_s": i / 2, "prompt_tokens": 100 + i, "output_tokens": 3, "status": "ok", "ttft_s": 0.05,
         "e2e_s": 0.07, "token_times_s": [0.05, 0.06, 0.07]}
        for i in range(10)
    ]  # fmt: skip
    return [{"helios_log": 1, "model": "m"} | changes, *rows]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda v: v.append(v[4]), "line 12: index=3: of one request: log.jsonl, line 5 has it too"),
        (lambda v: v[3].update(ttft_s=0.01), "line 4: token times='the first after 0.05 s': 0.01 s"),
        (lambda v: v[3].update(token_times_s=[0.05, 0.06, 7.0]), "line 4: token times='the last after 7 s'"),
        (lambda v: [one.update(e2e_s=0.7) for one in v[1:]], "token times='0.2 s between.*about 6.5 s"),
        (lambda v: [one.update(ttft_s=50, e2e_s=70, token_times_s=[50, 60, 70]) for one in v[7:]],
         "4 of 10 requests with 10 s a token"),
        (lambda v: [one.update(priority=1) for one in v[2:]], "line 2: priority=None"),
        (lambda v: v[0].update(users=1) or [one.update(arrival_s=0.0) for one in v[1:]], "10 requests at once.*most 1"),
    ],
)  # fmt: skip
def test_a_log_of_our_own_that_contradicts_itself(tmp_path: Path, change: Change, named: str) -> None:
    lines = observed()
    assert read(as_lines(tmp_path, lines)).e2e_s == pytest.approx([0.07] * 10)
    change(lines)
    with pytest.raises(UserError, match=named):
        read(as_lines(tmp_path, lines))


def test_the_order_of_keys_is_no_matter(tmp_path: Path) -> None:
    """As `jq -S` sorts them: texts of prompts and answers then stand before what tells the tool."""
    bench, report, requests = samples.vllm_bench(), samples.guidellm(), samples.inference_perf()
    bench["generated_texts"][0] = _requests(report)["successful"][0]["output"] = requests[0]["request"] = "x" * 90_000
    for value, there in ((bench, 4), (report, 5), (requests, 3)):
        (tmp_path / "log.json").write_text(json.dumps(value, sort_keys=True))
        assert len(read(tmp_path / "log.json")) == there


def test_inference_perf_in_lines_and_as_before_0_6(tmp_path: Path) -> None:
    want = read(as_json(tmp_path, samples.inference_perf()))
    old = samples.inference_perf()
    for request in old:
        answer = request["info"]["response_metrics"] or {"output_tokens": 0, "output_token_times": []}
        request["info"] = {name: answer[name] for name in ("output_tokens", "output_token_times")} | {
            "input_tokens": request["info"]["input_tokens"], "extra_info": {}, "lora_adapter": None,
        }  # fmt: skip
    for found in (read(as_lines(tmp_path, samples.inference_perf())), read(as_json(tmp_path, old))):
        assert found.output_tokens.tolist() == want.output_tokens.tolist() == [3, 0, 2]
        assert found.e2e_s == pytest.approx(want.e2e_s, nan_ok=True)


def test_the_innermost_span_counts_however_far_the_outer_one_is(tmp_path: Path) -> None:
    batches = samples.spans()
    spans = [span for batch in batches for span in batch["resourceSpans"][0]["scopeSpans"][0]["spans"]]
    for span in spans:
        span["attributes"] = [one for one in span["attributes"] if not one["key"].startswith("gen_ai.latency")]
    sent = {**spans[0], "spanId": "aa", "parentSpanId": spans[0]["spanId"], "attributes": []}
    spans[1]["parentSpanId"] = "aa"
    batches[0]["resourceSpans"][0]["scopeSpans"][0]["spans"].append(sent)
    assert len(read(as_lines(tmp_path, batches))) == 3


def test_what_server_and_client_counted_is_compared(tmp_path: Path) -> None:
    requests, records, report = samples.inference_perf(), samples.aiperf(), samples.guidellm()
    requests[0]["info"]["input_tokens"] = 9000
    records[1]["metrics"]["usage_prompt_tokens"] = {"value": 900, "unit": "tokens"}
    report["benchmarks"][0]["metrics"], one = {}, _requests(report)["successful"][0]
    one |= {"prompt_tokens": 90, "total_tokens": None, "tokens_per_second": None}
    one["input_metrics"]["total_tokens"] = 90
    for path, told in ((as_json(tmp_path, requests), "1 of 2 requests, such as 100 in place of 9,000"),
                       (as_lines(tmp_path, records), "1 of 1 requests, such as 900 in place of 21"),
                       (as_json(tmp_path, report, "r.json"), "1 of 4 requests, such as 90 in place of 9")):  # fmt: skip
        said = " ".join(read(path).notices)
        assert f"the server counted other prompt tokens than the client in {told}: the server's count" in said


def test_runs_that_were_joined_are_told(tmp_path: Path) -> None:
    records = samples.aiperf()
    for record in samples.aiperf():
        about = record["metadata"]
        about |= {"x_request_id": about["x_request_id"] + "b"} | {
            name: about[name] + 3600 * 10**9 for name in ("request_start_ns", "request_end_ns")
        }
        records.append(record)
    said = " ".join(read(as_lines(tmp_path, records)).notices)
    assert "5 requests have session and turn of another one" in said
    assert "no request came for 3,600 s after the first 5: if two runs were joined, take one" in said
    table = tmp_path / "t.csv"
    table.write_text("request_id,arrival_s,prompt_tokens,output_tokens\n" + "".join(
        f"{i % 6},{i + 9000 * (i > 5)},5,5\n" for i in range(9)
    ))  # fmt: skip
    said = " ".join(read_trace(table).notices)
    assert "3 of 9 rows have the request_id of another one" in said
    assert "no request came for 9,001 s after the first 6" in said


@pytest.mark.parametrize(
    ("name", "text", "named"),
    [
        ("a.json", '{"date": 1, "tokenizer_id": "x", "num_prompts": 4', "line 1"),
        ("a.json", '{\n"date": 1,\n"tokenizer_id": "x", "num_prompts": NaN\n}', "NaN"),
        ("a.jsonl", '{"metadata": {"request_start_ns": 1, "benchmark_phase": "profiling"}}\n{"metadata": ', "line 2"),
        ("a.json", '[{"start_time": 1, "end_time": 2, "info": 3, "request": 4}', "damaged"),
        ("a.yaml", "benchmarks:\n- config: {a: [\n", "damaged"),
        ("a.jsonl", '{"helios_log": 2}\n', "helios_log of a.jsonl, line 1"),
        ("a.prom", "# TYPE vllm:x counter\nvllm:x_total one two three\n", "line 2"),
        ("a.prom", '# TYPE vllm:x counter\nvllm:x_total{engine="0"} 1\n', "line 2"),
    ],
)
def test_broken_text_is_named(tmp_path: Path, name: str, text: str, named: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=named):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"row_1": {"output_tokens": "many"}}, "line 3: output_tokens"),
        ({"row_0": {"status": "perhaps"}}, "line 2: status"),
        ({"row_0": {"last_chunk_time_us": "5"}}, "line 2"),
        ({"row_0": {"send_time_us": "0"}}, "line 2: send_time_us"),
        ({"row_0": {"send_time_us": "1796029855000"}}, "line 2: send_time_us.*microseconds since 1970"),
        ({"row_1": {"request_id": "0"}}, "line 3: request_id='0': of one request: trace.csv, line 2"),
        ({"header": {"time_unit": "ms"}}, "time_unit"),
        ({"header": {"server": {"max_num_seqs": "64"}}}, "max_num_seqs of server in trace.yaml='64'"),
        ({"row_0": {"streaming": "yes"}}, "line 2: streaming='yes': true or false"),
        ({"header": {"trace_version": 9}}, "trace_version"),
    ],
)
def test_damaged_blis(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        read(samples.write_blis(tmp_path, **change))


@pytest.mark.parametrize(
    ("file", "text", "named"),
    [
        ("chunk-0-trace.csv", "0,1.3,8.6,Weibull,0.9\n", "chunk-0-trace.csv, line 1"),
        ("chunk-0-trace.csv", "0,1.3,8.6,Pareto,0.9,1\n", "Gamma or Weibull"),
        ("chunk-0-trace.csv", "0,1.3,8.6,Gamma,0.9,1\n" * 2, "600 s or more after the one before, which began at 0"),
        ("chunk-0-dataset.json", '{"0": {"input_tokens": "{1: 0.2}", "output_tokens": "{1: 1}"}}', "0.2, not 1"),
        ("chunk-0-dataset.json", '{"0": {"input_tokens": "__import__(1)", "output_tokens": "{1: 1}"}}', "damaged"),
    ],
)
def test_damaged_servegen(tmp_path: Path, file: str, text: str, named: str) -> None:
    folder = samples.write_servegen(tmp_path / "clients")
    (folder / file).write_text(text)
    with pytest.raises(UserError, match=named):
        read_folder(folder, (0.0, 600.0))


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("vllm:request_prompt_tokens", "vllm:of_another_version", "the histogram vllm:request_prompt_tokens"),
        ("vllm:request_success_total", "vllm:of_another_version", "vllm:request_success_total in at least 2"),
        ('_generation_tokens_sum{engine="0",model_name="m"} 3500', '_generation_tokens_sum{engine="0"} 350000',
         "a mean of 3495 tokens"),
        ('num_requests_running{engine="0",model_name="m"}', 'num_requests_running{engine="0",model_name="b"}',
         "the pages of one model"),
        ('prompt_tokens_total{engine="0",model_name="m"} ', 'prompt_tokens_total{engine="0",model_name="m"} 9',
         "prompt tokens a request': about 200, as the histogram says"),
        ('_prompt_tokens_count{engine="0",model_name="m"} ', '_prompt_tokens_count{engine="0",model_name="m"} 3',
         "request_prompt_tokens_count='.* requests': about 100, by which"),
        ("vllm:", "sglang:", "sglang:num_requests_running.*whose names begin with vllm"),
        ("# HELP", "HTTP/1.1 200 OK\r\n\r\n# HELP", "headers of HTTP"),
        ("# TYPE python_info gauge", 'vllm:prompt_tokens_total{engine="0",model_name="m"} 1', "each sample once"),
    ],
)  # fmt: skip
def test_scrapes_that_cannot_be_drawn_from(tmp_path: Path, old: str, new: str, named: str) -> None:
    folder = samples.write_scrapes(tmp_path / "pages")
    for page in folder.iterdir():
        page.write_text(page.read_text().replace(old, new))
    with pytest.raises(UserError, match=named):
        read_folder(folder)


def test_times_of_copies_are_no_times_of_scrapes(tmp_path: Path) -> None:
    folder = samples.write_scrapes(tmp_path / "pages")
    for number, page in enumerate(sorted(folder.iterdir())):
        page.rename(folder / f"{number}.prom")
    with pytest.raises(UserError, match=r"3 files written within .*as copies are"):
        read_folder(folder)
    for number, page in enumerate(sorted(folder.iterdir())):
        os.utime(page, (1_796_029_855 + 10 * number,) * 2)
    assert any("when they were written counts" in said for said in read_folder(folder).notices)


def test_an_engine_that_comes_later_is_named(tmp_path: Path) -> None:
    """Its counters began before it was scraped, and would count as requests of the time that was."""
    folder = samples.write_scrapes(tmp_path)
    last = sorted(folder.iterdir())[-1]
    last.write_text(last.read_text() + "".join(
        line.replace('engine="0"', 'engine="1"') + "\n" for line in last.read_text().splitlines() if "engine" in line
    ))  # fmt: skip
    with pytest.raises(UserError, match=r"scrape 1='no engine 1': all engines in every scrape, 0, 1"):
        read_folder(folder)


def test_columns_of_a_trace_stand_there_once(tmp_path: Path) -> None:
    path = samples.write_blis(tmp_path)
    text = path.read_text()
    for old, new, named in (("finish_reason", "output_tokens", "output_tokens': each column once"),
                            ("finish_reason", "finish_reason ", "'finish_reason ' has blanks")):  # fmt: skip
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=named):
            read(path)


def test_counters_that_fall_are_refused(tmp_path: Path) -> None:
    folder = samples.write_scrapes(tmp_path)
    last = sorted(folder.iterdir())[-1]
    last.write_text(last.read_text().replace("vllm:prompt_tokens_total{engine=\"0\",model_name=\"m\"} 21000",
                                             "vllm:prompt_tokens_total{engine=\"0\",model_name=\"m\"} 5"))  # fmt: skip
    with pytest.raises(UserError, match=r"scrape 3.*falls from 13000 to 5"):
        read_folder(folder)


def test_a_log_of_a_tool_is_a_workload_for_every_experiment(tmp_path: Path) -> None:
    path = as_json(tmp_path, samples.vllm_bench())
    trace = read_trace(path)
    assert trace.arrival_ns is not None
    assert trace.arrival_ns.tolist() == [0, 200_000_000, 300_000_000]
    assert trace.prompt_tokens.tolist() == [120, 100, 110]
    assert any("1 of 4 requests failed" in notice for notice in trace.notices)
    assert len(read_trace(path, limit=2)) == 2
    with pytest.raises(UserError, match="time_unit"):
        read_trace(path, time_unit="ms")


def test_what_no_reader_knows_is_named(tmp_path: Path) -> None:
    records = samples.aiperf()
    for record in records:
        record["metadata"]["lane"] = 4
        record["metrics"]["prefix_hits"] = {"value": 0.5, "unit": "ratio"}
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    said = " ".join(read(tmp_path / "a.jsonl").notices)
    assert "not read: metadata.lane." in said
    assert "not read: metrics.prefix_hits." in said

    report = samples.guidellm()
    report["benchmarks"][0]["cooldown_duration"] = 3.0
    for i, one in enumerate(report["benchmarks"][0]["requests"]["successful"]):
        one["info"] |= {"turn_index": i, "retries": 2}
    said = " ".join(read(as_json(tmp_path, report)).notices)
    for text in ("not read: info.retries", "3 requests continue a conversation", "last 3 s (cool-down)"):
        assert text in said

    requests = samples.inference_perf()
    requests[0]["info"]["extra_info"] = {"prefix": "x"}
    assert any("info.extra_info" in said for said in read(as_json(tmp_path, requests)).notices)

    batches = samples.spans()
    for batch in batches:
        for span in batch["resourceSpans"][0]["scopeSpans"][0]["spans"]:
            span["attributes"] += [{"key": "gen_ai.conversation.id", "value": {"stringValue": "c"}},
                                   {"key": "batch.of", "value": {"intValue": "4"}}]  # fmt: skip
    (tmp_path / "s.jsonl").write_text("".join(f"{json.dumps(batch)}\n" for batch in batches))
    said = " ".join(read(tmp_path / "s.jsonl").notices)
    assert "not read: batch.of" in said
    assert "gen_ai.conversation.id is not read: what the turns" in said

    table = samples.write_blis(tmp_path / "blis", header={"server": {"type": "vllm", "kv_dtype": "fp8", "lora": None}})
    assert any("server.kv_dtype, server.lora" in said for said in read(table).notices)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ({"backend": "sglang", "sharegpt_output_len": None, "random_input_len": 8, "ttfts": []}, "SGLang"),
        ({"elapsed_time": 1.0, "num_requests": 5, "tokens_per_second": 9.0}, "vllm bench throughput"),
        ({"avg_latency": 1.0, "latencies": [1.0], "percentiles": {}}, "vllm bench latency"),
        ({"service_kind": "openai", "experiments": []}, "GenAI-Perf"),
        ([{"number_input_tokens": 5, "inter_token_latency_s": 0.1}], "LLMPerf"),
        ({"data": [{"traceID": "a", "spans": [{"operationName": "b"}]}]}, "Jaeger"),
        ({"aiperf_version": "0.13", "request_latency": {}}, "profile_export.jsonl"),
        ({"metadata": {}, "payload": {}, "responses": []}, "profile_export.jsonl"),
        ([{"resourceSpans": []}], "one batch in each line"),
        ({"benchmarks": [{"type_": "a", "run_id": "b"}]}, "guidellm before"),
        ({"aggregated_metrics": {}, "individual_request_metrics": []}, "genai-bench"),
        ([samples.vllm_bench()], "an array of objects of vllm bench"),
    ],
)
def test_files_of_other_tools_are_told_apart(tmp_path: Path, content: object, what: str) -> None:
    for indent in (None, 2):
        (tmp_path / "run.json").write_text(json.dumps(content, indent=indent))
        with pytest.raises(UserError, match=what):
            read(tmp_path / "run.json")


def test_versions_and_folders_that_cannot_be_told(tmp_path: Path) -> None:
    report = samples.guidellm()
    report["metadata"]["version"] = 1
    with pytest.raises(UserError, match=r"metadata\.version=1: 2, as guidellm 0\.8 writes it"):
        read(as_json(tmp_path, report))
    (tmp_path / "two").mkdir()
    for name in ("benchmarks.json", "log.jsonl"):
        (tmp_path / "two" / name).write_text("{}")
    with pytest.raises(UserError, match=r"not of benchmarks\.json, log\.jsonl"):
        read_folder(tmp_path / "two")
