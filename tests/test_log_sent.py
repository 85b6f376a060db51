"""When and by whom requests were sent: clients that were late, samples, several servers, files cut or joined."""

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
from test_log_figures import Change, answered, changed, spans_of


def _late(tool: str) -> Change:
    """The second request that is listed was planned 40 s before it was sent."""
    if tool == "vllm":
        return lambda run: run.update(queue_times=[0.0, 40.0, 0.0, 0.05])
    if tool == "guidellm":
        return lambda report: answered(report)[1]["info"]["timings"].update(
            targeted_start=answered(report)[1]["info"]["timings"]["request_start"] - 40
        )
    if tool == "aiperf":
        return lambda records: records[1]["metadata"].update(
            credit_issued_ns=records[1]["metadata"]["request_start_ns"] - 40 * 10**9
        )
    return lambda requests: [one.update(scheduled_time=one["start_time"]) for one in requests] + [
        requests[1].update(scheduled_time=requests[1]["start_time"] - 40)
    ]


@pytest.mark.parametrize("tool", ["vllm", "guidellm", "aiperf", "inference-perf"])
def test_a_client_that_was_late_is_told(tmp_path: Path, tool: str) -> None:
    def told(log: RequestLog) -> list[str]:
        return [notice for notice in log.notices if "than it planned" in notice]

    assert told(changed(tmp_path, tool, lambda log: None)) == []
    late = changed(tmp_path, tool, _late(tool))
    assert len(told(late)) == 1
    assert re.search("sent 1 of [3-5] requests later than it planned, by up to 40 s", told(late)[0])
    assert late.arrival_s is not None
    assert late.arrival_s[-1] < 10  # when they were sent counts


def test_a_client_that_sends_when_it_can_was_not_late(tmp_path: Path) -> None:
    def throughput(report: Any) -> None:
        _late("guidellm")(report)
        report["benchmarks"][0]["config"]["strategy"] = {"type_": "throughput", "max_concurrency": 64}

    assert not any("than it planned" in notice for notice in changed(tmp_path, "guidellm", throughput).notices)


@pytest.mark.parametrize(("by_s", "when"), [(0.2, "later"), (-0.2, "earlier"), (0.05, None)])
def test_lateness_counts_from_the_plan_of_observe_and_blis(tmp_path: Path, by_s: float, when: str | None) -> None:
    row = {"prompt_tokens": 9, "output_tokens": 2, "status": "ok", "ttft_s": 0.05, "e2e_s": 0.07}
    rows = [{"index": i, "arrival_s": 10.0 + i, "planned_s": 10.0 + i - (by_s if i == 1 else 0), **row}
            for i in range(3)]  # fmt: skip
    own_log = tmp_path / "log.jsonl"
    own_log.write_text("".join(f"{json.dumps(one)}\n" for one in [{"helios_log": 1, "model": "m"}, *rows]))
    table = samples.write_blis(tmp_path / "blis", row_2={"arrival_time_us": str(250_000 - max(int(by_s * 1e6), 0))})
    for path in (own_log, table) if by_s > 0 else (own_log,):  # BLIS: since the one that was sent best
        log = read_tool(opened(path))
        assert log is not None
        told = [notice for notice in log.notices if "than it planned" in notice]
        assert len(told) == (when is not None)
        assert not told or f"1 of 3 requests {when} than it planned, by up to 0.2 s" in told[0]


def test_delays_of_guidellm_are_held_against_its_timings(tmp_path: Path) -> None:
    def delayed(report: Any) -> None:
        for one in answered(report):
            one["request_dispatch_delay"] = 100.0

    def alone(report: Any) -> None:
        delayed(report)
        for one in answered(report):
            del one["info"]["timings"]["targeted_start"]

    told = changed(tmp_path, "guidellm", delayed).notices
    assert any("100 s and not" in notice for notice in told)
    assert not any("than it planned" in notice for notice in told)
    assert any("up to 100 s" in notice for notice in changed(tmp_path, "guidellm", alone).notices)


@pytest.mark.parametrize(("state", "is_sample"), [
    ("ot=th:e666", True), ("a=b,ot=rv:123;th:8", True), ("ot=p:3", True),
    ("ot=th:0", False), ("ot=p:0;r:1", False), ("vendor=th:8", False), ("", False), (None, False),
])  # fmt: skip
def test_spans_of_a_sample_are_told(tmp_path: Path, state: str | None, is_sample: bool) -> None:
    def sampled(batches: Any) -> None:
        for batch in batches:
            for span in spans_of(batch):
                span["traceState"] = state

    assert any("of a sample" in notice for notice in changed(tmp_path, "spans", sampled).notices) == is_sample


def test_spans_of_several_servers_are_told(tmp_path: Path) -> None:
    def several(batches: Any) -> None:
        for i, batch in enumerate(batches):
            named = [{"key": "service.instance.id", "value": {"stringValue": f"i{i}"}}, {"key": "no value"}]
            batch["resourceSpans"][0]["resource"] = {"attributes": named}

    told = "spans are of 3 services or instances, i0, i1, i2"
    assert any(told in notice for notice in changed(tmp_path, "spans", several).notices)
    assert not any("instances" in notice for notice in changed(tmp_path, "spans", lambda batches: None).notices)


def test_stamps_of_aiperf_that_became_floats_are_the_same(tmp_path: Path) -> None:
    def floats(records: Any) -> None:
        for record in records:
            record["metadata"]["request_start_ns"] = float(record["metadata"]["request_start_ns"])

    plain, read = (changed(tmp_path, "aiperf", change).arrival_s for change in (lambda records: None, floats))
    assert plain is not None
    assert read is not None
    assert read == pytest.approx(plain, abs=1e-6)


def _joined(report: Any) -> None:
    first = answered(report)
    first += [one | {"request_id": f"b{i}"} for i, one in enumerate(first)]


@pytest.mark.parametrize(("text", "fix"), [
    (lambda: json.dumps(samples.guidellm(), indent=1)[:-40], "correct the log"),
    (lambda: json.dumps(samples.inference_perf(), indent=1)[:-40], "take the whole file"),
    (lambda: json.dumps([{"tokenizer_id": "m", "num_prompts": 4, "mean_ttft_ms": 50.0}]), "--save-detailed"),
    (lambda: '{"metric": {"__name__": "vllm:x"}, "values": [1], "timestamps": [2]}', "curl"),
    (lambda: '{__name__="vllm:x", engine="0"} 1 1796029855000', "curl"),
])  # fmt: skip
def test_the_fix_is_that_of_the_file(tmp_path: Path, text: Callable[[], str], fix: str) -> None:
    path = tmp_path / "log.json"
    path.write_text(text())
    with pytest.raises(UserError, match=fix):
        read_tool(opened(path))


def test_lists_of_two_reports_that_were_joined_are_no_sample(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lists were joined"):
        changed(tmp_path, "guidellm", _joined)


@pytest.mark.parametrize(("cell", "told"), [("1.79603E+15", "a spreadsheet has rounded it"),
                                            ("1796029855000000000", "in another unit")])  # fmt: skip
def test_stamps_of_blis_that_cannot_be(tmp_path: Path, cell: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        read_tool(opened(samples.write_blis(tmp_path, row_0={"send_time_us": cell})))


def _first(requests: Any, **said: Any) -> None:
    requests[0]["info"]["response_metrics"].update(said)


@pytest.mark.parametrize(("change", "told"), [
    (lambda requests: requests[0].update(end_time=requests[0]["start_time"] + 0.05), "its end_time"),
    (lambda requests: _first(requests, output_tokens=None, server_usage=None), "no number of them"),
])  # fmt: skip
def test_answers_of_inference_perf_end_after_their_tokens_and_count_them(
    tmp_path: Path, change: Change, told: str
) -> None:
    with pytest.raises(UserError, match=told):
        changed(tmp_path, "inference-perf", change)


def test_a_benchmark_of_guidellm_by_itself_is_no_request(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text("".join(json.dumps(one) for one in samples.guidellm()["benchmarks"]))
    with pytest.raises(UserError, match="take the whole report"):
        read_tool(opened(path))


def test_a_rate_below_zero_is_told(tmp_path: Path) -> None:
    told = changed(tmp_path, "vllm", lambda run: run.update(request_rate=-5.0)).notices
    assert any("-5 requests/s, which cannot be" in notice for notice in told)


def test_tables_of_blis_with_tabs_are_refused(tmp_path: Path) -> None:
    table = samples.write_blis(tmp_path)
    table.write_text(table.read_text().replace(",", "\t"))
    with pytest.raises(UserError, match="commas"):
        read_tool(opened(table))


def test_edges_of_buckets_and_lengths_of_clients_are_named(tmp_path: Path) -> None:
    pages = samples.write_scrapes(tmp_path / "pages")
    for page in pages.iterdir():
        page.write_text(page.read_text().replace('le="0.05"', 'le="NaN"'))
    with pytest.raises(UserError, match="edge of a bucket"):
        read_folder(pages)
    clients = samples.write_servegen(tmp_path / "clients")
    (clients / "chunk-0-dataset.json").write_text('{"0": {"image_tokens": "{9: 1.0}", "output_tokens": "{9: 1.0}"}}')
    with pytest.raises(UserError, match="input_tokens"):
        read_folder(clients, (0.0, 600.0))
    (clients / "chunk-0-dataset.json.gz").write_bytes(b"")
    with pytest.raises(UserError, match="remove one"):
        read_folder(clients, (0.0, 600.0))


def test_pages_of_two_servers_are_no_sum(tmp_path: Path) -> None:
    pages = samples.write_scrapes(tmp_path)
    for page in list(pages.iterdir()):
        (pages / f"other_{page.name}").write_text(page.read_text())
    with pytest.raises(UserError, match="pages of one server"):
        read_folder(pages)
    for page in pages.glob("other_*"):  # engines of one server may have pages of their own
        page.write_text(page.read_text().replace('engine="0"', 'engine="1"'))
    assert any("2 engines" in notice for notice in read_folder(pages).notices)


def test_requests_of_inference_perf_within_an_object_are_no_request(tmp_path: Path) -> None:
    path = tmp_path / "log.json"
    path.write_text(json.dumps({"requests": samples.inference_perf()}))
    with pytest.raises(UserError, match="an array of requests"):
        read_tool(opened(path))
